"""README.md: what its first command came to, by seeds, on processors of two kinds."""

from __future__ import annotations

from typing import Any

from common import ROOT

from pages.common import of_setting, put, seeds_table


def fill() -> None:
    put(ROOT / "README.md", digits=processors_table(of_setting("digits"), of_setting("digits", "reproduce-avx2")))


def processors_table(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> str:
    """Of each seed the errors and seconds on the first processor, and the verified error on the second."""
    there = {summary["seed"]: f"{100 * summary['verified_error']:.1f} %" for summary in second}
    head, rule, *rows = seeds_table(first).splitlines()
    lines = [f"{head} verified error, AVX2 alone |", f"{rule}---:|"]
    lines += [f"{row} {there[summary['seed']]} |" for row, summary in zip(rows, first, strict=True)]
    return "\n".join(lines)
