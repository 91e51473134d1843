"""README.md: what its first command came to, by seeds."""

from __future__ import annotations

from pages.common import ROOT, of_setting, put, seeds_table


def fill() -> None:
    put(ROOT / "README.md", digits=seeds_table(of_setting("digits")))
