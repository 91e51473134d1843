"""Plain feed-forward networks, with full BN (after every convolution and hidden linear layer) or without."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from certtrain.models.layers import classifier, convolution, divided, is_large, require_sizes


def cnn7(
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    width: int = 64,
    linear_width: int = 512,
    batch_norm: bool = True,
) -> nn.Sequential:
    """CNN-7 of the short-warmup paper: convolutions width, width, 2·width (stride 2), 2·width, 2·width, two linear.

    For images of 64 pixels and more the fifth convolution has stride 2 as well.
    """
    require_sizes("cnn7", width=width, linear_width=linear_width)
    last_stride = 2 if is_large(image_shape) else 1
    convolutions = [(width, 1), (width, 1), (2 * width, 2), (2 * width, 1), (2 * width, last_stride)]
    return _cnn(image_shape, num_classes, convolutions, [linear_width], batch_norm)


def cnn_large(
    image_shape: tuple[int, int, int], num_classes: int, *, width: int = 64, linear_width: int = 512
) -> nn.Sequential:
    """The "large" network of the IBP and CROWN-IBP papers, without BatchNorm. (Gowal et al. 2018.)"""
    require_sizes("cnn-large", width=width, linear_width=linear_width)
    convolutions = [(width, 1), (width, 1), (2 * width, 2), (2 * width, 1), (2 * width, 1)]
    return _cnn(image_shape, num_classes, convolutions, [linear_width], batch_norm=False)


def cnn_small(
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    width: int = 32,
    linear_width: int = 128,
    batch_norm: bool = True,
) -> nn.Sequential:
    """Two convolutions (the second with stride 2 and twice the width) and two linear layers: for 8×8 digits."""
    require_sizes("cnn-small", width=width, linear_width=linear_width)
    return _cnn(image_shape, num_classes, [(width, 1), (2 * width, 2)], [linear_width], batch_norm)


def mlp(
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    widths: Sequence[int] = (256, 256),
    batch_norm: bool = True,
) -> nn.Sequential:
    """Linear layers only."""
    require_sizes("mlp", **{f"widths[{i}]": width for i, width in enumerate(widths)})
    return _cnn(image_shape, num_classes, [], widths, batch_norm)


def _cnn(
    image_shape: tuple[int, int, int],
    num_classes: int,
    convolutions: Sequence[tuple[int, int]],
    hidden: Sequence[int],
    batch_norm: bool,
) -> nn.Sequential:
    """3×3 convolutions of (channels, stride), then hidden linear layers, then the classifier."""
    channels, height, width = image_shape
    layers: list[nn.Module] = []
    for out_channels, stride in convolutions:
        layers += [*convolution(channels, out_channels, 3, stride, batch_norm=batch_norm), nn.ReLU()]
        channels, height, width = out_channels, divided(height, stride), divided(width, stride)
    return nn.Sequential(*layers, *classifier((channels, height, width), hidden, num_classes, batch_norm=batch_norm))
