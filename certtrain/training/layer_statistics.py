"""How tight the bounds of each layer are, and in which states its ReLUs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from certtrain.bounds import Bounder, Box, linf_box
from certtrain.modules import evaluating
from certtrain.regularizers import layer_tightness
from certtrain.runtime.precision import full_precision


@dataclass(frozen=True)
class LayerStatistics:
    """One ReLU's input box: mean radius, tightness (mean(r_0) / mean(r_i)), and shares of its neurons over a batch.

    dead: neurons that are inactive for every image of the batch.
    """

    radius: float
    tightness: float
    active: float
    inactive: float
    unstable: float
    dead: float


@torch.no_grad()
def layer_statistics(net: Bounder, images: Tensor, eps: float) -> list[LayerStatistics]:
    """Statistics of every ReLU for the boxes of radius `eps` around `images` (B, C, H, W): in eval mode, in float32."""
    with evaluating(net.model), full_precision():
        bounds = net.ibp(linf_box(images, eps))
    first = bounds.affine_input.radius.mean()
    return [_statistics(box, first) for box in bounds.relu_inputs]


def _statistics(box: Box, input_radius: Tensor) -> LayerStatistics:
    active, inactive = box.lower > 0, box.upper < 0
    radius = box.radius.mean()
    shares = torch.stack([active.float().mean(), inactive.float().mean(), inactive.all(0).float().mean()])
    act, inact, dead = shares.tolist()
    tightness = layer_tightness(radius, input_radius)
    return LayerStatistics(radius.item(), tightness.item(), act, inact, 1 - act - inact, dead)
