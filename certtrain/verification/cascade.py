"""The stages of a verification by price, and which of them go together; told without torch."""

from __future__ import annotations

from collections.abc import Sequence

from certtrain.bound_methods import BRANCH_AND_BOUND
from certtrain.errors import UsageError

CHEAPER_THAN_ATTACK = ("ibp", "crown-ibp")


def around_attack(methods: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The bounds asked before images are attacked, and those asked of images that withstand.

    Before it: each that costs less than an attack, and the first, whatever it is, since it is asked of all images.
    """
    bounds = [name for name in methods if name != BRANCH_AND_BOUND]
    dear = next((i for i, name in enumerate(bounds) if i > 0 and name not in CHEAPER_THAN_ATTACK), len(bounds))
    return tuple(bounds[:dear]), tuple(bounds[dear:])


def check_cascade(methods: Sequence[str], backend: str = "native") -> None:
    """Raises UsageError for branch and bound where it cannot be: before another method, or beside what it lacks."""
    if BRANCH_AND_BOUND in methods[:-1]:
        raise UsageError(f"{BRANCH_AND_BOUND} leaves nothing to another method: name it once, as the last")
    if BRANCH_AND_BOUND in methods and backend != "native":
        raise UsageError(f"{BRANCH_AND_BOUND} is for backend native, not {backend}")
