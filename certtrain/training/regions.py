"""Regions that a method propagates, beside the whole epsilon box (`bounds.linf_box`)."""

from __future__ import annotations

import torch
from torch import Tensor

from certtrain.bounds import Box, linf_box


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
    slack = (1 - share) * eps
    return linf_box(torch.clamp(points, images - slack, images + slack), share * eps)
