#!/usr/bin/env bash
# The wheel, installed into an environment of its own outside the repository, does what the tutorial says, word by word.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
uv build --quiet --sdist --wheel --out-dir "$work/dist"
# As the project's own environment has been resolved, so that nothing is downloaded twice.
uv pip freeze --exclude-editable --quiet > "$work/versions.txt"
uv venv --quiet --python .venv/bin/python "$work/env"
uv pip install --quiet --python "$work/env" --constraint "$work/versions.txt" "certtrain[report] @ $(echo "$work"/dist/*.whl)"
cp scripts/run_page.py docs/tutorial.md "$work"
cd "$work"
env/bin/python run_page.py tutorial.md
