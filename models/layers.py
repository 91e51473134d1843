"""What the architectures are made of: affine layers with full BN or without, and the classifier that ends them all."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from certtrain.errors import require_counts


def require_sizes(architecture: str, **options: object) -> None:
    """Raises UsageError for an option of an architecture that is no whole number of at least 1."""
    require_counts(**{f"model {architecture}: {name}": value for name, value in options.items()})


def convolution(
    channels: int, out_channels: int, kernel: int = 3, stride: int = 1, *, batch_norm: bool, groups: int = 1
) -> list[nn.Module]:
    """A convolution, odd kernel, that divides height and width by `stride` (rounded up); BatchNorm takes its bias."""
    conv = nn.Conv2d(channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=not batch_norm)
    return [conv, nn.BatchNorm2d(out_channels)] if batch_norm else [conv]


def classifier(
    image_shape: Sequence[int], widths: Sequence[int], num_classes: int, *, batch_norm: bool
) -> list[nn.Module]:
    """Flatten, hidden linear layers of `widths`, and the linear layer that gives (B, num_classes) logits."""
    channels, height, width = image_shape
    layers: list[nn.Module] = [nn.Flatten()]
    features = channels * height * width
    for out_features in widths:
        layers.append(nn.Linear(features, out_features, bias=not batch_norm))
        layers += [nn.BatchNorm1d(out_features)] * batch_norm + [nn.ReLU()]
        features = out_features
    return [*layers, nn.Linear(features, num_classes)]


def divided(size: int, stride: int) -> int:
    """Height or width behind convolutions that divide by `stride` altogether."""
    return -(-size // stride)


def is_large(image_shape: Sequence[int]) -> bool:
    """Whether images have TinyImageNet's 64 pixels or more, for which the published networks differ."""
    return image_shape[1] >= 64
