"""What a pass of a box through a network found, whatever arithmetic it covers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from certtrain.bounds.box import Box
from certtrain.bounds.graph import Call, map_leaves
from certtrain.errors import UsageError


@dataclass(frozen=True)
class Record:
    """Everything one pass computed: each call in order, and the box of each value by its index (0 is the input).

    slack: of a pass that covers rounding (`rounding.backward`), by call what a coefficient of 1 of each element of its
    value can lose to rounding, in the deployed network and in a backward pass; None of a pass in real mathematics.
    """

    calls: tuple[Call, ...]
    boxes: Mapping[int, Box]
    output: int
    slack: Mapping[int, Tensor] | None = None

    @property
    def covers_rounding(self) -> bool:
        """See `Bounds`."""
        return self.slack is not None

    def take(self, images: Tensor) -> Record:
        """Of these images alone, any of them several times; what the calls hold is not looked at."""
        boxes = {index: box.take(images) for index, box in self.boxes.items()}
        slack = None if self.slack is None else {index: part[images] for index, part in self.slack.items()}
        return replace(self, boxes=boxes, slack=slack)

    def detach(self) -> Record:
        """The same boxes and weights, without gradient."""
        calls = [replace(call, args=map_leaves(call.args, Tensor, Tensor.detach)) for call in self.calls]
        return replace(self, calls=tuple(calls), boxes={index: box.detach() for index, box in self.boxes.items()})


@dataclass(frozen=True)
class Bounds:
    """What one joint pass of a box, and of the clean input in it, found.

    clean: logits of the clean input (B, K), None when only a box was given
    output: box of the logits (B, K)
    relu_inputs: box before each ReLU, or activation of its kind (`Operation.rectifies`), in the order of the network
    affine_input: box that enters the first convolution or linear layer (after the input normalisation)
    tail, tail_input: the affine operations that end the network, and the box that enters them; the output's where
        there are none
    record: all calls and boxes, where the pass was asked to keep them
    covers_rounding: is this what the network computes in floating point (`rounding`), not real mathematics?
    """

    clean: Tensor | None
    output: Box
    relu_inputs: tuple[Box, ...]
    affine_input: Box
    tail: tuple[Call, ...]
    tail_input: Box
    record: Record | None = None
    covers_rounding: bool = False

    @property
    def recorded(self) -> Record:
        """`record`, of a pass that was asked for it."""
        if self.record is None:
            raise UsageError("this pass was not recorded, which backward passes need: ask ibp(..., record=True)")
        return self.record

    def require_real(self) -> None:
        """Raises UsageError for a pass that covers rounding, whose margins are others."""
        if self.covers_rounding:
            raise UsageError("these bounds cover rounding: ask margins(box, labels, arithmetic=...) for their margins")
