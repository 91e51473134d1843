"""Gradient ascent on the free parameters of linear bounds: Adam, with a projection after each step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MEAN_DECAY, SQUARE_DECAY, EPSILON = 0.9, 0.999, 1e-8


@dataclass
class _State:
    mean: Tensor
    square: Tensor
    steps: int = 0


class ProjectedAdam:
    """Kingma & Ba 2015, algorithm 1, upwards, on tensors that are changed in place.

    Not `torch.optim.Adam`, which imports PyTorch's compiler when it is made: seconds of a process that bounds an image.

    Args:
        parameters: what is optimised.
        rates: of each, for the first step; they decay by `decay` with every step.
        ends: of each, what it is clamped between; they broadcast to it.
    """

    def __init__(
        self, parameters: Sequence[Tensor], rates: Sequence[float], ends: Sequence[tuple[Tensor, Tensor]], decay: float
    ) -> None:
        self.parameters, self.rates, self.ends, self.decay = parameters, rates, ends, decay
        self.states = [_State(torch.zeros_like(part), torch.zeros_like(part)) for part in parameters]
        self.steps = 0

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor | None]) -> None:
        """Along the gradients of what is to grow; a parameter with None stays as it is."""
        for part, gradient, state, rate, ends in zip(
            self.parameters, gradients, self.states, self.rates, self.ends, strict=True
        ):
            if gradient is None:
                continue
            state.steps += 1
            state.mean.lerp_(gradient, 1 - MEAN_DECAY)
            state.square.mul_(SQUARE_DECAY).addcmul_(gradient, gradient, value=1 - SQUARE_DECAY)
            scale = state.square.sqrt().div_(math.sqrt(1 - SQUARE_DECAY**state.steps)).add_(EPSILON)
            step = rate * self.decay**self.steps / (1 - MEAN_DECAY**state.steps)
            part.addcdiv_(state.mean, scale, value=step).clamp_(*ends)
        self.steps += 1
