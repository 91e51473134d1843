"""Values of any number of axes, as rows of elements and back; and what stands beside them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def flattened(x: Tensor, kept: int) -> Tensor:
    """`x` (…, *shape) with `kept` axes before the shape: (…, elements), one element where the shape is ()."""
    return x.unsqueeze(-1).flatten(kept)


def shaped(rows: Tensor, shape: Sequence[int]) -> Tensor:
    """Rows (…, elements) as (…, *shape), the shape () included."""
    return rows.unflatten(-1, tuple(shape)) if shape else rows.squeeze(-1)


def per_image(values: Tensor, like: Tensor) -> Tensor:
    """(B,) as (B, 1, ...), to be broadcast against `like` (B, ...)."""
    return values.view(-1, *[1] * (like.dim() - 1))


def per_channel(values: Tensor, dims: int) -> Tensor:
    """(C,) as (1, C, 1, ...), of so many axes."""
    return values.view(1, -1, *[1] * (dims - 2))
