"""How much memory backward passes through a network take, and how many images they go through at once for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import psutil
import torch
from torch import Tensor

from certtrain.bounds.graph import Call, Graph
from certtrain.bounds.recording import PointWalk
from certtrain.errors import UsageError

COPIES = 20  # of a row's coefficients that a step of a backward pass holds at once; a test counts them
CACHE = 2**22  # bytes: arrays of coefficients that are no larger stay in a CPU's cache from one operation to the next


@dataclass(frozen=True)
class Footprint:
    """Elements per image: of the network's largest value, and of all values together; and the shape of the output."""

    largest: int
    total: int
    output: torch.Size

    @classmethod
    def of(cls, graph: Graph[Any], image: Tensor) -> Self:
        """That of a network, counted on one image (1, ...)."""
        walk = _CountingWalk()
        with torch.no_grad():
            output = graph.run(image, walk)
        entering = image[0].numel()
        return cls(max(walk.largest, entering), walk.total + entering, output.shape[1:])

    def batch(self, inputs: Tensor, method: str, max_memory: int | None) -> tuple[int, int]:
        """Images of `inputs` (B, ...), and rows of coefficients for each, to work on at once in `max_memory` bytes.

        Raises:
            UsageError: that does not suffice for one image.
        """
        budget = free_memory(inputs.device) // 2 if max_memory is None else max_memory
        kept = self.total if method == "alpha-crown" else self.largest
        classes = self.output.numel()
        image = COPIES * kept * inputs.element_size() * classes
        if image > budget:
            raise UsageError(
                f"max_memory: {method} needs {image:,} bytes for one image of this network, not {budget:,}"
            )
        row = self.largest * inputs.element_size()
        images = max(1, min(len(inputs), budget // image))
        rows = max(1, budget // (COPIES * row * images))
        if inputs.device.type == "cpu":
            images = max(1, min(images, CACHE // (row * classes)))
            rows = max(1, min(rows, max(classes, CACHE // (row * images))))
        return images, rows


class _CountingWalk(PointWalk):
    def __init__(self) -> None:
        self.largest, self.total = 0, 0  # elements per image

    def apply(self, call: Call, args: tuple[Any, ...]) -> Tensor:
        value = super().apply(call, args)
        size = value.shape[1:].numel()
        self.largest, self.total = max(self.largest, size), self.total + size
        return value


def free_memory(device: torch.device) -> int:
    """Bytes that are free on `device`; on a GPU with those that PyTorch holds, but no tensor does."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    available: int = psutil.virtual_memory().available
    return available
