"""Small networks that several test files ask questions of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from certtrain.models import build_model
from certtrain.runs.checkpoint import save_architecture, save_weights
from certtrain.runs.files import WEIGHTS


def narrow_cnn7(batch_norm: bool = True) -> nn.Module:
    return build_model(
        "cnn7",
        (3, 16, 16),
        5,
        mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.3, 0.25),
        options={"width": 3, "linear_width": 16, "batch_norm": batch_norm},
    )


def narrow_wide_resnet(batch_norm: bool = True) -> nn.Module:
    options = {"base_width": 2, "widen_factor": 2, "linear_width": 16, "batch_norm": batch_norm}
    return build_model("wide-resnet", (3, 16, 16), 5, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25), options=options)


def narrow_resnext(batch_norm: bool = True) -> nn.Module:
    """Two blocks a stage, the second with an identity for a shortcut, as for TinyImageNet."""
    options = {"stem_width": 3, "bottleneck_width": 2, "blocks": 2, "linear_width": 16, "batch_norm": batch_norm}
    return build_model("resnext", (3, 16, 16), 5, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25), options=options)


class Block(nn.Module):
    """A basic block; the shortcut is a convolution where the shapes change."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        out += self.shortcut(x)
        return F.relu(out)


def residual_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 1, 1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        Block(4, 4, 1),
        Block(4, 6, 2),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(6 * 4 * 4, 5),
    )


class Inception(nn.Module):
    """Branches of a convolution, of max pooling and of average pooling, concatenated."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(channels, out, 3, 2, 1, bias=False), nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        parts = [F.relu(self.bn(self.conv(x))), F.max_pool2d(x, 2), F.avg_pool2d(x, 2)]
        return torch.cat(parts, 1)


def pooling_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 1, 1),
        nn.ReLU(),
        Inception(4, 3),
        nn.Conv2d(11, 4, 3, 1, 1),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 4 * 4, 5),
    )


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """BatchNorm parameters and statistics away from 0 and 1, so that a wrong one shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for tensor, low, high in (
                    (module.weight, -1.0, 1.5),
                    (module.bias, -0.5, 0.5),
                    (module.running_mean, -0.5, 0.5),
                    (module.running_var, 0.5, 2.0),
                ):
                    if tensor is not None:
                        tensor.copy_(low + (high - low) * torch.rand(tensor.shape, generator=generator).to(tensor))
    return model


def save_model(folder: Path, model: nn.Module, architecture: Mapping[str, Any]) -> None:
    """model.json and model.safetensors, as a run leaves them."""
    save_architecture(folder, architecture)
    save_weights(folder / WEIGHTS, model)


class Do(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Threshold(nn.Module):
    """One pixel: class 1 above 0.5, class 0 below. What holds at every radius is known exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 2)
        with torch.no_grad():
            self.linear.weight.copy_(torch.tensor([[-1.0], [1.0]]))
            self.linear.bias.copy_(torch.tensor([0.5, -0.5]))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1))
