"""Fill the tables of README and docs, and draw the plots, from the JSON that the other scripts wrote.

python scripts/tables.py
"""

from __future__ import annotations

import pkgutil
from importlib import import_module

import pages


def main() -> None:
    for module in pkgutil.iter_modules(pages.__path__):
        if module.name != "common":
            import_module(f"pages.{module.name}").fill()


if __name__ == "__main__":
    main()
