"""Does a network compute what another program computes of it, as far as float32 can tell?

Every output is judged by itself, so that neither its bias nor another output hides what is wrong with it: by how it
varies over the inputs, and by how far rounding takes the network from itself in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor, nn

from certtrain.bounds.recording import agree
from certtrain.modules import copied

Replay = Callable[[Tensor], Tensor]

OF_VARIATION = 1e-4
OF_ROUNDING = 16  # sums in another order, another exp: up to 4 was seen
STEP = torch.finfo(torch.float32).eps


class Comparison:
    """Holds a network in float32, as it is now, against what other programs compute of it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.exact: nn.Module | None = None
        with suppress(Exception):  # a module that cannot be copied, a device without float64
            self.exact = copied(model).double()

    @torch.no_grad()
    def agrees(self, inputs: Tensor, outputs: Tensor) -> bool:
        """Whether `outputs` (B, ...) are those of `inputs` (B, ...); what is not finite must be the same."""
        found = one_by_one(self.model, inputs)
        rounding = self._rounding(inputs) + STEP * _size(found)
        return agree(outputs, found, OF_VARIATION, 0.0, OF_ROUNDING * rounding)

    def _rounding(self, inputs: Tensor) -> Tensor:
        """The most by which each output (...) differs from float64: at the inputs and, as a few may be lucky, near."""
        noise = torch.rand(inputs.shape, generator=torch.Generator().manual_seed(0), device="cpu").to(inputs)
        around = torch.cat([inputs, inputs * (1 + 1e-3 * noise)])
        found = one_by_one(self.model, around)
        if self.exact is not None:
            with suppress(Exception):  # a forward with constants of one type, of any type
                return _size(found.double() - one_by_one(self.exact, around.double()))
        return 8 * STEP * _size(found).amax()


def one_by_one(run: Replay, inputs: Tensor) -> Tensor:
    """Outputs (B, ...), on the CPU, of inputs (B, ...), into which `run` may write."""
    return torch.cat([run(one.clone()) for one in inputs.split(1)]).cpu()


def _size(outputs: Tensor) -> Tensor:
    """Of each output (...), the largest over the batch that is finite."""
    return outputs.where(outputs.isfinite(), 0.0).abs().amax(0)
