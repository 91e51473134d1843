"""Residual networks of the short-warmup paper, with full BN (also in every shortcut) or without."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from certtrain.errors import UsageError
from certtrain.models.layers import classifier, convolution, divided, is_large, require_sizes

MOST_BLOCKS = 1000  # of a stage; a greater number, in a file from elsewhere, is a trap


class Residual(nn.Module):
    """relu(branch(x) + shortcut(x)); the shortcut is a 1×1 convolution where the shapes of the two differ."""

    def __init__(
        self, branch: Sequence[nn.Module], channels: int, out_channels: int, stride: int, batch_norm: bool
    ) -> None:
        super().__init__()
        self.branch = nn.Sequential(*branch)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out_channels:
            self.shortcut = nn.Sequential(*convolution(channels, out_channels, 1, stride, batch_norm=batch_norm))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.branch(x) + self.shortcut(x))


def wide_resnet(
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    base_width: int = 16,
    widen_factor: int | None = None,
    linear_width: int = 512,
    batch_norm: bool = True,
) -> nn.Sequential:
    """Wide-ResNet: a stem and three stages of one basic block, of base_width · widen_factor · (1, 2, 4) channels.

    The widen factor is 8 unless given, 10 for images of 64 pixels and more. (Zagoruyko & Komodakis 2016, arXiv
    1605.07146; as small, and without pooling, in the short-warmup paper.)
    """
    if widen_factor is None:
        widen_factor = 10 if is_large(image_shape) else 8
    require_sizes("wide-resnet", base_width=base_width, widen_factor=widen_factor, linear_width=linear_width)
    channels, blocks = base_width, []
    for multiple, stride in ((1, 1), (2, 2), (4, 2)):
        out = multiple * widen_factor * base_width
        branch = [
            *convolution(channels, out, 3, stride, batch_norm=batch_norm),
            nn.ReLU(),
            *convolution(out, out, 3, batch_norm=batch_norm),
        ]
        blocks.append(Residual(branch, channels, out, stride, batch_norm))
        channels = out
    return _network(image_shape, num_classes, base_width, blocks, channels, linear_width, batch_norm)


def resnext(
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    blocks: int | None = None,
    cardinality: int = 2,
    bottleneck_width: int | None = None,
    stem_width: int | None = None,
    linear_width: int = 512,
    batch_norm: bool = True,
) -> nn.Sequential:
    """ResNeXt: a stem and three stages of grouped bottleneck blocks, whose width doubles from stage to stage.

    Unless told otherwise, the stem has 64 channels and a stage one block of bottleneck width 32; for images of 64
    pixels and more, 16 channels and two blocks of width 8. A block's output has twice the channels of its grouped
    convolution. (Xie et al. 2017, arXiv 1611.05431.)
    """
    per_stage = (2 if is_large(image_shape) else 1) if blocks is None else blocks
    if not 1 <= per_stage <= MOST_BLOCKS:
        raise UsageError(f"resnext: blocks is between 1 and {MOST_BLOCKS}, not {per_stage}")
    if bottleneck_width is None:
        bottleneck_width = 8 if is_large(image_shape) else 32
    if stem_width is None:
        stem_width = 16 if is_large(image_shape) else 64
    widths = {"bottleneck_width": bottleneck_width, "stem_width": stem_width, "linear_width": linear_width}
    require_sizes("resnext", blocks=per_stage, cardinality=cardinality, **widths)
    channels, stages = stem_width, []
    for stage, first_stride in enumerate((1, 2, 2)):
        inner = cardinality * bottleneck_width * 2**stage
        for stride in [first_stride] + [1] * (per_stage - 1):
            branch = [
                *convolution(channels, inner, 1, batch_norm=batch_norm),
                nn.ReLU(),
                *convolution(inner, inner, 3, stride, batch_norm=batch_norm, groups=cardinality),
                nn.ReLU(),
                *convolution(inner, 2 * inner, 1, batch_norm=batch_norm),
            ]
            stages.append(Residual(branch, channels, 2 * inner, stride, batch_norm))
            channels = 2 * inner
    return _network(image_shape, num_classes, stem_width, stages, channels, linear_width, batch_norm)


def _network(
    image_shape: tuple[int, int, int],
    num_classes: int,
    stem_width: int,
    blocks: Sequence[nn.Module],
    channels: int,
    linear_width: int,
    batch_norm: bool,
) -> nn.Sequential:
    """Blocks that divide the image's size by 4 and return `channels`, between a 3×3 stem and the classifier."""
    stem = [*convolution(image_shape[0], stem_width, 3, batch_norm=batch_norm), nn.ReLU()]
    shape = (channels, divided(image_shape[1], 4), divided(image_shape[2], 4))
    return nn.Sequential(*stem, *blocks, *classifier(shape, [linear_width], num_classes, batch_norm=batch_norm))
