"""Boxes whose conversions round outward, and numbers rounded to a coarser type in a known direction."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from certtrain.bounds.box import Box, clipped_to
from certtrain.bounds.rounding.arithmetic import COEFFICIENT_ROUNDINGS, LARGEST_FACTOR, Arithmetic, inflation


def down(x: Tensor) -> Tensor:
    """Below the exact result, where `x` is a result rounded to nearest."""
    return torch.nextafter(x, torch.full_like(x, -torch.inf))


def up(x: Tensor) -> Tensor:
    """Above the exact result, where `x` is a result rounded to nearest."""
    return torch.nextafter(x, torch.full_like(x, torch.inf))


def nearest_below(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The greatest numbers of a coarser type that are not above `x`."""
    nearest = x.to(dtype)
    return torch.where(nearest > x, down(nearest), nearest)


def nearest_above(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The least numbers of a coarser type that are not below `x`."""
    nearest = x.to(dtype)
    return torch.where(nearest < x, up(nearest), nearest)


class OutwardBox(Box):
    """A float64 box whose other form encloses the one it was made in, in exact arithmetic."""

    __slots__ = ()

    @classmethod
    def around(cls, center: Tensor, radius: Tensor) -> Self:
        """`Box.around`; an element whose centre is infinite, or either no number, is unbounded."""
        known = center.isfinite() & ~radius.isnan()
        return super().around(torch.where(known, center, 0.0), torch.where(known, radius, torch.inf))

    @classmethod
    def by_ends(cls, box: Box) -> Self:
        """`box` by its ends, whose other form encloses them, whatever form it was made in."""
        return cls(box.lower, box.upper)

    @property
    def center(self) -> Tensor:
        if self._center is None:
            middle = (self.lower + self.upper) / 2
            self._center = torch.where(middle.isfinite(), middle, 0.0)  # of [0, inf), too
        return self._center

    @property
    def lower(self) -> Tensor:
        if self._lower is None:
            self._lower = down(self.center - self.radius)
        return self._lower

    @property
    def upper(self) -> Tensor:
        if self._upper is None:
            self._upper = up(self.center + self.radius)
        return self._upper

    @property
    def radius(self) -> Tensor:
        if self._radius is None:
            center = self.center
            self._radius = up(torch.maximum(self.upper - center, center - self.lower))
        return self._radius

    @property
    def magnitude(self) -> Tensor:
        """No less than |x| for any x in the box, but for one rounding."""
        return self.center.abs() + self.radius


def outward(box: Box) -> OutwardBox:
    """`box`, of any type, as it was made: its other form is rounded."""
    if isinstance(box, OutwardBox):
        return box
    if box._by_ends:
        return OutwardBox(box.lower.double(), box.upper.double())
    return OutwardBox.around(box.center.double(), box.radius.double())


def enclosing_linf_box(x: Tensor, eps: float | Tensor, clip: tuple[float, float] | None = (0.0, 1.0)) -> OutwardBox:
    """`linf_box` that no rounding has made smaller: every real point within `eps` of `x`, and in `clip`, is inside."""
    x = x.double()
    return clipped_to(OutwardBox(down(x - eps), up(x + eps)), clip)


def widened(
    box: OutwardBox, error: float, magnitude: Tensor, arithmetic: Arithmetic, terms: int = 1, losses: Any = 0.0
) -> OutwardBox:
    """`box` and whatever lies within error·magnitude of it or has lost an underflow; all reals where it may overflow.

    Every factor that meets a value is below LARGEST_FACTOR, so that an underflow costs no more than that many `tiny`;
    `losses` adds underflows that cost more.
    """
    underflow = 8 * (terms + COEFFICIENT_ROUNDINGS) * LARGEST_FACTOR * arithmetic.tiny
    radius = (box.radius + error * magnitude + underflow + losses) * inflation(1)
    fits = 2 * terms * (magnitude + radius) <= arithmetic.largest
    return OutwardBox.around(box.center, torch.where(fits, radius, torch.inf))


def unbounded_unless(known: Tensor, box: OutwardBox) -> OutwardBox:
    """`box`, and all reals for the elements of which nothing is known."""
    return OutwardBox.around(box.center, torch.where(known, box.radius, torch.inf))
