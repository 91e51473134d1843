"""What a run that began with another network forgot and learned, as the table that terminal and page show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ERRORS = ("natural_error", "verified_error")


def forgetting_table(start: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: each time that the network was measured, on the setting it comes from and on the present one.

    The last row is how the errors moved: above 0 on the old setting, something was forgotten.

    Args:
        start: of summary.json, with what `certtrain.runs.forgetting` measured.
    """
    settings = start["settings"]
    columns = [(name, error) for name in settings for error in ERRORS]
    rows = [
        ("before", start["before"]),
        *((row["epoch"], row) for row in start["along"]),
        ("at the end", start["after"]),
    ]
    shown = [[str(when), *(_share(row[name][error]) for name, error in columns)] for when, row in rows]
    moved = [_move(start["before"][name][error], start["after"][name][error]) for name, error in columns]
    return ["after epoch", *(_heading(settings[name], name, error) for name, error in columns)], [
        *shown,
        ["change", *moved],
    ]


def _heading(setting: Mapping[str, Any], name: str, error: str) -> str:
    return f"{error.replace('_', ' ')}, {name}: {setting['data']}, {setting['eps']:.5f}"


def _share(error: float | None) -> str:
    return "–" if error is None else f"{error:.2%}"


def _move(before: float | None, after: float | None) -> str:
    return "–" if before is None or after is None else f"{after - before:+.2%}"
