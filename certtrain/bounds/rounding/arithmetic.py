"""How a deployed network rounds, and what that can make of a sum; docs/soundness.md, (4) to (6)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from certtrain.errors import unknown


@dataclass(frozen=True)
class Arithmetic:
    """How a deployed network rounds.

    unit: relative error of one operation, and of an addition within a sum of products
    operands: relative error that the two operands of a product bring in together as they are rounded to its format
    stored: relative error of a result as it is written to memory, in addition to `unit`
    tiny: what an underflow, gradual or flushed to zero, can cost at most: the smallest normal number
    largest: the greatest finite number
    """

    unit: Fraction
    operands: Fraction
    stored: Fraction
    tiny: float
    largest: float


def _power(exponent: int) -> Fraction:
    return Fraction(2) ** exponent


_FLOAT32_RANGE = (2.0**-126, 2.0**127)

ARITHMETICS: dict[str, Arithmetic] = {
    "float64": Arithmetic(_power(-53), Fraction(0), Fraction(0), 2.0**-1022, 2.0**1023),
    "float32": Arithmetic(_power(-24), Fraction(0), Fraction(0), *_FLOAT32_RANGE),
    # Operands lose all but ten bits, perhaps by truncation; the units that add them truncate as well.
    "tf32": Arithmetic(_power(-22), (1 + _power(-10)) ** 2 - 1, Fraction(0), *_FLOAT32_RANGE),
    # Weights and activations are kept in bfloat16 (rounded to nearest), sums and BatchNorm's parameters in float32.
    "bf16": Arithmetic(_power(-22), _power(-8), _power(-8), *_FLOAT32_RANGE),
}

BOUND_ARITHMETIC = ARITHMETICS["float64"]  # in which the bounds themselves are computed
COEFFICIENT_ROUNDINGS = 16  # from BatchNorm's four parameters to a weight that it is folded into, at the most
LARGEST_FACTOR = 2.0**40  # of elementwise scalings; none smaller than its inverse either, but zero
PLACE_ERROR = 2.0**-20  # of the place of a nearest pixel, which any arithmetic computes in float32 or better
SPARE_ROUNDINGS = 24  # of a bound's, around a sum: magnitudes, error terms, conversions; far fewer than this


def arithmetic_named(name: str) -> Arithmetic:
    if name not in ARITHMETICS:
        raise unknown("arithmetic", name, ARITHMETICS)
    return ARITHMETICS[name]


# --- error factors, as exact rationals rounded up ---------------------------------------------------------------------


def rounded_up(value: Fraction) -> float:
    return math.nextafter(float(value), math.inf)


def compound(unit: Fraction, count: int) -> Fraction | None:
    """1 / (1 - k·u) ≥ (1 ± u)^±k, or None where k·u ≥ 1 and nothing is known."""
    total = count * unit
    return 1 / (1 - total) if total < 1 else None


@lru_cache(maxsize=1024)
def sum_error(arithmetic: Arithmetic, terms: int, foldings: int = 1) -> float:
    """Eq. 4: e with |computed - exact| ≤ e·(Σ|w_i||x_i| + |b|), for the deployed network's deviation plus the bound's.

    `foldings`: BatchNorms that may be folded into the weights, one after the other.
    """
    deployed = compound(arithmetic.unit, terms + 1 + max(1, foldings) * COEFFICIENT_ROUNDINGS)
    bound = compound(BOUND_ARITHMETIC.unit, terms + 1 + SPARE_ROUNDINGS)
    if deployed is None or bound is None:
        return math.inf
    return rounded_up((1 + arithmetic.operands) * (1 + arithmetic.stored) ** 2 * deployed - 1 + bound - 1)


@lru_cache(maxsize=1024)
def elementwise_error(arithmetic: Arithmetic, roundings: int) -> float:
    """Eq. 6: the same for a few operations on single elements, relative to the sum of the magnitudes they combine."""
    deployed = compound(arithmetic.unit, roundings)
    bound = compound(BOUND_ARITHMETIC.unit, roundings + SPARE_ROUNDINGS)
    if deployed is None or bound is None:
        return math.inf
    return rounded_up((1 + arithmetic.stored) ** 2 * deployed - 1 + bound - 1)


@lru_cache(maxsize=1024)
def inflation(terms: int) -> float:
    """Eq. 5: what a float64 sum of so many non-negative terms is multiplied by to be no less than the exact one."""
    bound = compound(BOUND_ARITHMETIC.unit, terms + SPARE_ROUNDINGS)
    return math.inf if bound is None else rounded_up(bound)
