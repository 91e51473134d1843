"""Points of a box as a network may be given them."""

from __future__ import annotations

import torch
from torch import Tensor

from certtrain.bounds.rounding.boxes import nearest_above, nearest_below


def nearest_inside(point: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """The float32 nearest to a point that lies between the ends, in float64."""
    nearest = point.float()
    nearest = torch.where(nearest < lower, nearest_above(lower.double(), torch.float32), nearest)
    return torch.where(nearest > upper, nearest_below(upper.double(), torch.float32), nearest)
