"""What a network and a training step compute, in multiply-accumulates, and what they write: counted, not measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from certtrain.errors import UsageError
from certtrain.models import build_model
from certtrain.modules import blank_images, evaluating
from certtrain.training.method import Phase, scheduled
from certtrain.training.step import Step


class Size(NamedTuple):
    """Of a network: its parameters, and the multiply-accumulates of its products for one image."""

    parameters: int
    macs: int


def network_size(
    name: str, image_shape: Sequence[int], num_classes: int, options: Mapping[str, Any] | None = None
) -> Size:
    """The size of the network `name` (`build_model`), built without memory for its weights.

    Raises:
        UsageError: the network cannot be built, or refuses images of that shape (C, H, W).
    """
    try:
        with torch.device("meta"):
            model = build_model(name, image_shape, num_classes, options=options).eval()
            with FlopCounterMode(display=False) as counter:
                model(torch.empty(1, *image_shape))
    except (RuntimeError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"model {name} cannot take {'×'.join(map(str, image_shape))} images: {reason}") from error
    return Size(sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2)


def clean_macs(model: nn.Module, image_shape: Sequence[int]) -> int:
    """Multiply-accumulates of the clean pass of one image (C, H, W). Modes and statistics stay."""
    counter = FlopCounterMode(display=False)
    _clean_pass(model, image_shape, counter)
    return counter.get_total_flops() // 2


def clean_elements(model: nn.Module, image_shape: Sequence[int]) -> int:
    """Numbers that the operations of the clean pass of one image (C, H, W) write. Modes and statistics stay."""
    counter = _Written()
    _clean_pass(model, image_shape, counter)
    return counter.elements


def _clean_pass(model: nn.Module, image_shape: Sequence[int], counter: TorchDispatchMode | FlopCounterMode) -> None:
    image = blank_images(model, 1, image_shape)  # made outside: that is not counted
    with evaluating(model), torch.no_grad(), counter:
        model(image)


class _Written(TorchDispatchMode):
    """Counts the elements of results that are no views."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.elements += sum(value.numel() for value in tree_leaves(result) if isinstance(value, Tensor))
        return result


def step_macs(step: Step, image_shape: Sequence[int], phase: Phase, batch_size: int = 2) -> float:
    """Multiply-accumulates of one training step in a phase, forward and backward, for each image of its batch.

    Elementwise work (ReLU, BatchNorm, |W|) is not counted. The network's weights stay; BatchNorm counts the step.
    """
    _ = step.net.graph  # recorded, and checked, with numbers
    with FakeTensorMode(allow_non_fake_inputs=True):
        images, labels = torch.empty(batch_size, *image_shape), torch.zeros(batch_size, dtype=torch.int64)
        with FlopCounterMode(display=False, custom_mapping={_CONVOLUTION_BACKWARD: _convolution_backward}) as counter:
            step.backward(images, labels, scheduled(0.0), phase)
    step.net.model.zero_grad(set_to_none=True)
    return counter.get_total_flops() / 2 / batch_size


_CONVOLUTION_BACKWARD = torch.ops.aten.convolution_backward


def _convolution_backward(
    output: torch.Size, x: torch.Size, weight: torch.Size, bias: Any, stride: Any, padding: Any, dilation: Any,
    transposed: bool, output_padding: Any, groups: int, wanted: Sequence[bool], out_shape: Any = None,
) -> int:  # fmt: skip
    """Each gradient costs what the convolution does; torch's own count takes a grouped one for dense."""
    positions = math.prod((x if transposed else output)[2:]) * x[0]
    return 2 * positions * math.prod(weight) * sum(wanted[:2])
