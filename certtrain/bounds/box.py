"""Axis-aligned boxes: the sets that flow through a network."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Self, TypeVar

import torch
from torch import Tensor

from certtrain.bounds.readable import values_readable
from certtrain.errors import UsageError

B = TypeVar("B", bound="Box")


class Box:
    """The set {x : lower <= x <= upper}, elementwise; both ends have one shape, the set's dimensions.

    A box keeps the form it was made in, its two ends or its centre and radius, and derives the other on demand:
    a chain of affine maps then neither recomputes nor loses digits of small radii.
    """

    __slots__ = ("_by_ends", "_center", "_lower", "_radius", "_upper")

    def __init__(self, lower: Tensor, upper: Tensor) -> None:
        if lower.shape != upper.shape:
            raise ValueError(f"lower has shape {tuple(lower.shape)}, upper {tuple(upper.shape)}: they must be equal")
        self._by_ends = True  # which form it was made in: the other, once asked for, is there as well
        self._lower: Tensor | None = lower
        self._upper: Tensor | None = upper
        self._center: Tensor | None = None
        self._radius: Tensor | None = None

    @classmethod
    def around(cls, center: Tensor, radius: Tensor) -> Self:
        """The box [center - radius, center + radius]; `radius` must be non-negative and of center's shape."""
        if center.shape != radius.shape:
            raise ValueError(f"center has shape {tuple(center.shape)}, radius {tuple(radius.shape)}: must be equal")
        box = cls.__new__(cls)
        box._by_ends = False
        box._lower = box._upper = None
        box._center, box._radius = center, radius
        return box

    @classmethod
    def cat(cls, parts: Sequence[Box | Tensor], dim: int = 0) -> Self:
        """The boxes one behind the other along `dim`; a tensor among them is a single point."""
        boxes = [part if isinstance(part, Box) else cls(part, part) for part in parts]
        return cls.around(torch.cat([b.center for b in boxes], dim), torch.cat([b.radius for b in boxes], dim))

    @property
    def lower(self) -> Tensor:
        """The lower end of every element."""
        return self._derived("_lower", self.center - self.radius) if self._lower is None else self._lower

    @property
    def upper(self) -> Tensor:
        """The upper end of every element."""
        return self._derived("_upper", self.center + self.radius) if self._upper is None else self._upper

    @property
    def center(self) -> Tensor:
        """(lower + upper) / 2."""
        if self._center is not None:
            return self._center
        return self._derived("_center", torch.add(self.lower / 2, self.upper, alpha=0.5))  # the ends' sum may overflow

    @property
    def radius(self) -> Tensor:
        """(upper - lower) / 2, never negative."""
        return self._derived("_radius", (self.upper - self.lower) / 2) if self._radius is None else self._radius

    def _derived(self, name: str, value: Tensor) -> Tensor:
        """`value`, kept for the next question, but not by a question under no_grad: the next may be for a gradient."""
        made_of = (self._lower, self._upper) if self._by_ends else (self._center, self._radius)
        if value.requires_grad or not any(part is not None and part.requires_grad for part in made_of):
            setattr(self, name, value)
        return value

    @property
    def shape(self) -> torch.Size:
        """Of both ends."""
        return self.like.shape

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The box with `function`, which only moves or averages elements, applied to the form this box was made in."""
        if self._by_ends:
            return type(self)(function(self.lower), function(self.upper))
        return self.around(function(self.center), function(self.radius))

    def take(self, images: slice | Tensor) -> Self:
        """The box of these images alone."""
        return self.map(lambda part: part[images])

    @property
    def like(self) -> Tensor:
        """A tensor of the box's shape, dtype and device; its values mean nothing."""
        return self._lower if self._lower is not None else self.center

    def contains(self, point: Tensor, tolerance: float = 0.0) -> Tensor:
        """Elementwise: does `point` lie between the ends, give or take `tolerance`? A bool tensor."""
        return (point >= self.lower - tolerance) & (point <= self.upper + tolerance)

    @property
    def empty(self) -> Tensor:
        """Does no point lie in it? A bool scalar; NaN is not looked for."""
        if self._by_ends:
            return (self.lower > self.upper).any()
        return (self.radius < 0).any()

    def detach(self) -> Box:
        """The same box, without its history of gradients."""
        return Box(self.lower.detach(), self.upper.detach())

    def __repr__(self) -> str:
        return f"Box(shape={tuple(self.shape)})"


def linf_box(x: Tensor, eps: float | Tensor, clip: tuple[float, float] | None = (0.0, 1.0)) -> Box:
    """All images within `eps` of `x` in every pixel, cut to the valid range.

    Args:
        x: images, any shape.
        eps: perturbation radius in the units of `x`; a scalar tensor (so that a compiled step need not be rebuilt
            as it grows), or a tensor that broadcasts against `x`, for a radius per image.
        clip: the range pixels can take, or None for no cut.

    Raises:
        UsageError: `x` is not floating-point, the radius is negative or not finite (a tensor is not looked into), or
            all images within `eps` lie outside `clip` (on a GPU, which would be waited for, `BoundedModel.margins` says
            so).
    """
    if not x.is_floating_point():
        raise UsageError(f"a box is drawn around floating-point images in [0, 1], not {x.dtype}")
    if not isinstance(eps, Tensor) and not 0 <= eps < math.inf:
        raise UsageError(f"a radius is a finite number and not negative, not {eps}")
    return clipped_to(Box(x - eps, x + eps), clip)


def clipped_to(box: B, clip: tuple[float, float] | None) -> B:
    """What of a box, given by its ends, lies in the range `clip`; raises UsageError where nothing does."""
    if clip is None:
        return box
    part = type(box)(box.lower.clamp(min=clip[0]), box.upper.clamp(max=clip[1]))
    if values_readable(part.like) and part.empty:
        raise UsageError(
            f"images lie outside of {clip}, further than the radius: pass clip=None, or images in that range and "
            "normalise them in the network"
        )
    return part


def refuse_empty(box: Box) -> None:
    """Raises UsageError where a box has no point, of which everything would be proved, and values can be read."""
    if values_readable(box.like) and box.empty:
        raise UsageError(EMPTY)


EMPTY = "the box is empty, or has NaN in it: lower must be at most upper everywhere"
