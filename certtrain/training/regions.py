"""Regions that a method propagates, beside the whole epsilon box (`bounds.linf_box`)."""

from __future__ import annotations

import torch
from torch import Tensor

from certtrain.bounds import Box


def small_box(box: Box, points: Tensor, share: float) -> Box:
    """A box around each point, of `share` of the radius that `box` has in each pixel, moved to lie inside `box`.

    (Müller et al. 2023, arXiv 2210.04871, with the radius as CTBench's code has it.)
    """
    radius = share * (box.upper - box.lower) / 2
    return Box.around(torch.clamp(points, box.lower + radius, box.upper - radius), radius)


def small_linf_box(images: Tensor, points: Tensor, eps: Tensor, share: float) -> Box:
    """The pixels within share·eps of a point, which is moved until they lie within eps of the image; cut to [0, 1].

    (Müller et al. 2023, arXiv 2210.04871, with the radius as in the authors' code.)
    """
    slack, radius = (1 - share) * eps, share * eps
    center = torch.clamp(points, images - slack, images + slack)
    # What the cut takes at either end; centre and radius hold what ends of so small a box would lose to rounding.
    below, above = (radius - center).clamp(min=0), (radius - (1 - center)).clamp(min=0)
    return Box.around(center + (below - above) / 2, radius - (below + above) / 2)
