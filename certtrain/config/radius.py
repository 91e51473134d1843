"""How a perturbation radius is written, in a configuration, on the command line, and where it is shown."""

from __future__ import annotations

import re
from numbers import Real
from typing import Any

from certtrain.config.reading import write_value
from certtrain.errors import shown

# ASCII digits, and few: Python reads those of every script, and takes hours over 1e99999999 as a fraction.
_NUMBER = re.compile(r"[-+]?(?:[0-9]{1,40}(?:\.[0-9]{0,40})?|\.[0-9]{1,40})(?:[eE][-+]?[0-9]{1,3})?")
_RATIO = re.compile(r"([-+]?[0-9]{1,40}) */ *([0-9]{1,40})")


def parse_radius(value: Any) -> float:
    """A perturbation radius in pixel units of [0, 1], written as a number or as a fraction like "8/255".

    Raises:
        ValueError: not a number, or outside [0, 1].
    """
    radius = _number(value.strip()) if isinstance(value, str) else value
    if isinstance(radius, bool) or not isinstance(radius, Real):
        raise ValueError(f"{shown(value)} is not a radius: write a number or a fraction such as 8/255")
    if not 0 <= radius <= 1:  # type: ignore[operator] # Real's stub has no order
        raise ValueError(f"a radius lies between 0 and 1 (pixels are scaled to [0, 1]), not {shown(value)}")
    return float(radius)


def _number(text: str) -> float | None:
    if ratio := _RATIO.fullmatch(text):
        numerator, denominator = map(int, ratio.groups())
        return numerator / denominator if denominator else None
    return float(text) if _NUMBER.fullmatch(text) else None


def format_radius(eps: float) -> str:
    """As people write it, and `parse_radius` reads it: k/255, where no short decimal says the same."""
    steps = round(255 * eps)
    is_short = float(f"{eps:g}") == eps
    return f"{steps}/255" if steps / 255 == eps and not is_short else write_value(eps)
