"""How images lie in memory while a network is trained, and which convolutions oneDNN must not be given."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from certtrain.modules import blank_images, evaluating
from certtrain.per_axis import per_axis
from certtrain.runtime.precision import Precision


def layout_for(precision: Precision, device: torch.device, compiled: bool) -> torch.memory_format:
    """How convolutions' weights should lie, and with them everything between.

    Tensor cores read channels last, and so do a CPU's convolutions in a compiled step, which converts nothing between.
    """
    faster = precision != "float32" if device.type == "cuda" else compiled
    return torch.channels_last if faster else torch.contiguous_format


def lay_out_(model: nn.Module, layout: torch.memory_format, image_shape: Sequence[int]) -> torch.memory_format:
    """Give the model's weights `layout`, in place, or leave them contiguous where the network cannot take it.

    One that flattens by `x.view(len(x), -1)` takes no channels-last images, and a warning says so.

    Args:
        image_shape: (C, H, W), which the network is known to take in contiguous layout.

    Returns:
        The layout that the model has now.
    """
    model.to(memory_format=layout)
    if layout is not torch.contiguous_format:
        try:
            convolutions_of(model, image_shape)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            warnings.warn(f"trained in contiguous layout, since the network takes no other: {reason}", stacklevel=2)
            layout = torch.contiguous_format
            model.to(memory_format=layout)
    return layout


@contextmanager
def safe_convolutions(model: nn.Module, image_shape: Sequence[int]) -> Iterator[None]:
    """Gradients inside are computed without oneDNN if one of the model's convolutions `overruns_a_buffer` of it.

    The whole of oneDNN, since such a convolution may meet channels-last memory wherever it is: the compiler chooses it
    by itself, and one-channel images are in both layouts at once. Slower, so a warning says so.
    """
    on_cpu = all(tensor.device.type == "cpu" for tensor in model.parameters())
    affected = on_cpu and onednn_takes_avx2() and any(map(overruns_a_buffer, convolutions_of(model, image_shape)))
    onednn: Any = torch.backends.mkldnn
    enabled = onednn.enabled
    if affected and enabled:
        warnings.warn(
            "trained without oneDNN, which on this CPU would write past its memory for a strided 1×1 convolution of "
            f"fewer than {_AVX2_FLOATS} channels; slower, the same",
            stacklevel=3,
        )
        onednn.enabled = False
    try:
        yield
    finally:
        onednn.enabled = enabled


class Convolution(NamedTuple):
    """What one call of aten.convolution computes. `channels` and `size` are those of the larger images: the input's,
    or of a transposed convolution the output's."""

    channels: int
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    groups: int
    dtype: torch.dtype = torch.float32


_AVX2_FLOATS = 8  # in one of its registers


def overruns_a_buffer(convolution: Convolution) -> bool:
    """Whether oneDNN (3.13.3, in torch 2.15) may corrupt memory in this convolution's gradient, on CPUs with AVX2.

    Before a strided 1×1 convolution's weight gradient is taken, the kernel `jit_1x1:avx2` gathers the pixels that the
    stride meets. It reserves as many numbers for a pixel as there are channels, but writes whole registers of eight.
    Measured, with guarded memory, in docs/onednn.md: fewer than eight channels, one group, no padding, a size that
    the stride divides, and channels-last memory. AVX-512 and older CPUs take other kernels.
    """
    kernel, stride = convolution.kernel, convolution.stride
    return (
        convolution.dtype is torch.float32
        and len(kernel) == 2
        and max(kernel) == 1 < max(stride)
        and max(convolution.padding) == 0
        and convolution.groups == 1
        and convolution.channels < _AVX2_FLOATS
        and all(size % step == 0 for size, step in zip(convolution.size, stride, strict=True))
    )


def onednn_takes_avx2() -> bool:
    """Whether oneDNN uses AVX2 here: most desktops, or any newer CPU under ONEDNN_MAX_CPU_ISA=AVX2."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    return limit.startswith("AVX2") or torch.backends.cpu.get_cpu_capability() == "AVX2"


def convolutions_of(model: nn.Module, image_shape: Sequence[int]) -> list[Convolution]:
    """Every convolution that two blank images (C, H, W) go through, called as a module or not.

    BatchNorm's statistics and every module's mode stay. Raises whatever the model does.
    """
    images, recorder = blank_images(model, 2, image_shape), _Recorder()
    with evaluating(model), torch.no_grad(), recorder:
        model(images)
    return recorder.found


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[Convolution] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.convolution.default:
            images, weight, _, stride, padding, _, transposed, _, groups = args
            larger: Tensor = result if transposed else images
            channels, size, kernel = larger.shape[1], tuple(larger.shape[2:]), tuple(weight.shape[2:])
            stride, padding = per_axis(stride, len(size)), per_axis(padding, len(size))
            self.found.append(Convolution(channels, size, kernel, stride, padding, groups, images.dtype))
        return result
