"""Values of any number of axes, as rows of elements and back."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def flattened(x: Tensor, kept: int) -> Tensor:
    """`x` (…, *shape) with `kept` axes before the shape: (…, elements), one element where the shape is ()."""
    return x.unsqueeze(-1).flatten(kept)


def shaped(rows: Tensor, shape: Sequence[int]) -> Tensor:
    """Rows (…, elements) as (…, *shape), the shape () included."""
    return rows.unflatten(-1, tuple(shape)) if shape else rows.squeeze(-1)
