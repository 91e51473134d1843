"""Options that do not go together."""

from __future__ import annotations

import argparse

from certtrain.errors import UsageError


def refuse(options: argparse.Namespace, asked: str, *names: str) -> None:
    """None of the options may stand beside `asked`, which has no use for them."""
    given = [f"--{name.replace('_', '-')}" for name in names if _is_said(getattr(options, name))]
    if given:
        raise UsageError(f"{' and '.join(given)} cannot be combined with {asked}")


def _is_said(value: object) -> bool:
    """Without a word, an option is None, a switch False, and the device "auto"."""
    return value is not None and value is not False and value != "auto"
