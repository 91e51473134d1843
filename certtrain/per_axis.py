"""Strides, paddings and sizes of windows, however they are spelled."""

from __future__ import annotations

from collections.abc import Iterable


def per_axis(setting: int | Iterable[int], axes: int) -> tuple[int, ...]:
    """A setting with a number for each axis of a map; torch also takes one for all, alone or in a sequence."""
    numbers = tuple(setting) if isinstance(setting, Iterable) else (setting,)
    return numbers * axes if len(numbers) == 1 else numbers
