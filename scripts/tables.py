"""Fill the tables of README and docs, and draw the plots, from the JSON that the other scripts wrote.

python scripts/tables.py
"""

from __future__ import annotations

from pages import (
    ablation,
    benchmark,
    board,
    methods,
    models,
    profile,
    readme,
    scaling,
    soundness,
    studies,
    training_methods,
    transformers,
    verification,
    warmup,
)

PAGES = (
    readme,
    ablation,
    benchmark,
    board,
    methods,
    models,
    profile,
    scaling,
    soundness,
    studies,
    training_methods,
    transformers,
    verification,
    warmup,
)


def main() -> None:
    for page in PAGES:
        page.fill()


if __name__ == "__main__":
    main()
