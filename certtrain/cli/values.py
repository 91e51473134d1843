"""What the text of an option means: types for argparse, which say what is wrong with a text that means nothing."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from certtrain.errors import shown

MOST = 10**9  # of a number on the command line


def positive(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and 1 <= int(text[:20]) <= MOST):
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a whole number between 1 and {MOST}")
    return int(text)


def seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= MOST:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a number of seconds between 0 and {MOST}")
    return number


def path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("an empty path")
    return Path(text)


def radius(text: str) -> float:
    from certtrain.config.radius import parse_radius

    try:
        return parse_radius(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def operations(text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,30}(\.[0-9]{1,30})?([eE][+]?[0-9]{1,2})?", text) or not 1 <= float(text) <= 1e30:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a number of operations between 1 and 1e30, as 2e15")
    return float(text)


def share(text: str) -> float:
    if not re.fullmatch(r"0?\.[0-9]{1,9}", text) or not 0 < float(text) < 1:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a number between 0 and 1, such as 0.95")
    return float(text)


def image_shape(text: str) -> tuple[int, ...]:
    sizes = text.lower().replace("×", "x").split("x")
    if len(sizes) != 3 or not all(re.fullmatch("[1-9][0-9]{0,3}", size) for size in sizes):
        raise argparse.ArgumentTypeError(f"{shown(text)} is not an image shape: channels x height x width, as 3x32x32")
    return tuple(map(int, sizes))
