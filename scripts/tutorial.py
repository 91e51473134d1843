"""What the commands of the tutorial print: docs/results/tutorial.json, which `scripts/tables.py` puts into the page.

python scripts/tutorial.py
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

from common import DOCS, RESULTS
from run_page import commands

from certtrain.runs.provenance import versions
from certtrain.runtime.files import write_json

PAGE = DOCS / "tutorial.md"
SHOWN = {
    "training": "certtrain train first.yaml",
    "verifying": "--method ibp,crown-ibp,crown",
    "checking": "certtrain check",
}


def printed() -> dict[str, list[str]]:
    """The lines that each of the shown commands printed, all commands run in the page's order, in one empty folder."""
    lines: dict[str, list[str]] = {}
    os.environ["COLUMNS"] = "100"  # as wide as the page
    with tempfile.TemporaryDirectory() as folder:
        for block, command in commands(PAGE, Path(folder)):
            done = subprocess.run(**command, check=True, capture_output=True, text=True)
            print(done.stdout)
            lines |= {name: done.stdout.splitlines() for name, shown in SHOWN.items() if shown in block.text}
    return lines


def main() -> None:
    write_json(RESULTS / "tutorial.json", {"versions": versions(), "printed": printed()})


if __name__ == "__main__":
    main()
