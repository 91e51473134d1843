"""Options that do not go together."""

from __future__ import annotations

import argparse

from certtrain.errors import UsageError


def refuse(options: argparse.Namespace, asked: str, *names: str) -> None:
    """None of the options may stand beside `asked`, which has no use for them."""
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(options, name) is not None]
    if given:
        raise UsageError(f"{' and '.join(given)} cannot be combined with {asked}")
