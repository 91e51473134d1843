"""The small networks of the CROWN-IBP paper (Zhang et al. 2020, arXiv 1906.06316), of which it trains nine on CIFAR-10.

Published without BatchNorm; `batch_norm=True` adds it after every convolution and hidden linear layer.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from certtrain.models.layers import classifier, require_sizes

Convolution = tuple[int, int, int, int]  # output channels, kernel, stride, padding


def cnn_2layer(
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    width: int = 2,
    linear_width: int = 256,
    batch_norm: bool = False,
) -> nn.Sequential:
    """Two convolutions, 4×4 with stride 2, of 4·width and 8·width channels, and one hidden linear layer."""
    require_sizes("cnn-2layer", width=width, linear_width=linear_width)
    convolutions = [(4 * width, 4, 2, 1), (8 * width, 4, 2, 1)]
    return _network(image_shape, num_classes, convolutions, [linear_width], batch_norm)


def cnn_3layer(
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    width: int = 1,
    kernel: int = 3,
    linear_width: int | None = None,
    batch_norm: bool = False,
) -> nn.Sequential:
    """Convolutions of 4·width, 8·width and 8·width channels, and one hidden linear layer, of 64·width unless told.

    The first two are `kernel`×`kernel` with padding 1, the third is 4×4 with stride 4.
    """
    if linear_width is None:
        linear_width = 64 * width
    require_sizes("cnn-3layer", width=width, kernel=kernel, linear_width=linear_width)
    convolutions = [(4 * width, kernel, 1, 1), (8 * width, kernel, 1, 1), (8 * width, 4, 4, 0)]
    return _network(image_shape, num_classes, convolutions, [linear_width], batch_norm)


def cnn_4layer(
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    width: int = 1,
    linear_width: int = 256,
    batch_norm: bool = False,
) -> nn.Sequential:
    """Convolutions 3×3, and 4×4 with stride 2, of 4·width channels and again of 8·width; two hidden linear layers."""
    require_sizes("cnn-4layer", width=width, linear_width=linear_width)
    convolutions = [(4 * width, 3, 1, 1), (4 * width, 4, 2, 1), (8 * width, 3, 1, 1), (8 * width, 4, 2, 1)]
    return _network(image_shape, num_classes, convolutions, [linear_width, linear_width], batch_norm)


def _network(
    image_shape: tuple[int, int, int],
    num_classes: int,
    convolutions: Sequence[Convolution],
    hidden: Sequence[int],
    batch_norm: bool,
) -> nn.Sequential:
    channels, *sizes = image_shape
    layers: list[nn.Module] = []
    for out_channels, kernel, stride, padding in convolutions:
        layers.append(nn.Conv2d(channels, out_channels, kernel, stride, padding, bias=not batch_norm))
        layers += [nn.BatchNorm2d(out_channels)] * batch_norm + [nn.ReLU()]
        channels, sizes = out_channels, [(size + 2 * padding - kernel) // stride + 1 for size in sizes]
    return nn.Sequential(*layers, *classifier((channels, *sizes), hidden, num_classes, batch_norm=batch_norm))
