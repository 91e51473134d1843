"""Random networks of every supported operation, random boxes, and points in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from certtrain.bounds import Box
from tests.networks import Do, randomized

Layer = Callable[[Tensor], Tensor]


class Flow(nn.Module):
    """Layers of one size in, the same size out, drawn by hypothesis, then a flatten of a drawn spelling."""

    def __init__(self, head: nn.Module, steps: list[nn.Module], flatten: Layer, classes: int) -> None:
        super().__init__()
        self.head, self.steps, self.flatten = head, nn.ModuleList(steps), flatten
        self.classifier = nn.LazyLinear(classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x)
        for step in self.steps:
            x = step(x)
        return self.classifier(self.flatten(x))


class Constant(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], constant: Tensor) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("constant", constant)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.constant)


class Branches(nn.Module):
    def __init__(self, one: nn.Module, other: nn.Module, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.other, self.join = one, other, join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self.one(x), self.other(x))


class Attending(nn.Module):
    """Rows of pixels as tokens."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 5, 0.0, batch_first=True, **settings)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1, 2)).unflatten(1, (3, 4))


def add_in_place(x: Tensor, y: Tensor) -> Tensor:
    x = x * 1.0
    x += y
    return x


def reversed_channels(x: Tensor) -> Tensor:
    one, two, three = x.unbind(1)
    return torch.cat([part.unsqueeze(1) for part in (three, two, one)], 1)


def subtract_in_place(x: Tensor, y: Tensor) -> Tensor:
    x = x + 0.0
    x -= y
    return x


FLATTENS: list[Layer] = [
    nn.Flatten(),
    lambda x: torch.flatten(x, 1),
    lambda x: x.flatten(1),
    lambda x: x.contiguous().view(x.size(0), -1),
    lambda x: x.reshape(x.shape[0], -1),
    lambda x: x.mean((2, 3)),
    lambda x: x.mean(dim=(-1, -2), keepdim=True).flatten(1),
    lambda x: F.adaptive_avg_pool2d(x, 2).flatten(1),
    lambda x: F.adaptive_avg_pool2d(x, 1)[:, :, 0, 0],
    lambda x: x.permute(0, 2, 3, 1).reshape(x.size(0), -1),
    lambda x: x.transpose(1, 2).contiguous().view(x.size(0), -1),
    lambda x: F.max_pool2d(x, 2).flatten(1),
    lambda x: F.avg_pool2d(x, 2, padding=1).flatten(1),
    lambda x: torch.sum(x, 2).flatten(1),
    lambda x: F.avg_pool1d(F.max_pool1d(x.flatten(2), 2), 2).flatten(1),
    nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(2, 1), nn.AdaptiveAvgPool2d(2), nn.Flatten()),
    nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 2, 3), nn.BatchNorm1d(2), nn.ReLU(), nn.Flatten()),
    nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Conv3d(1, 2, 2), nn.Flatten()),
    nn.Sequential(nn.Flatten(), nn.Unflatten(1, (3, 16)), nn.MaxPool1d(2), nn.AvgPool1d(2), nn.Flatten()),
]


STEPS: list[Callable[[], nn.Module]] = [
    lambda: nn.Conv2d(3, 3, 3, padding=1, padding_mode="zeros"),
    lambda: nn.Conv2d(3, 3, 1, groups=3),
    lambda: nn.Conv2d(3, 3, 3, padding="same", dilation=2, bias=False),
    lambda: nn.ConvTranspose2d(3, 3, 3, padding=1),
    lambda: nn.BatchNorm2d(3),
    lambda: nn.BatchNorm2d(3, affine=False),
    lambda: nn.ReLU(),
    lambda: nn.Sequential(Do(lambda x: x + 0.0), nn.ReLU(inplace=True)),  # autograd may need the value it overwrites
    lambda: nn.LeakyReLU(0.2),
    lambda: nn.Sigmoid(),
    lambda: nn.Tanh(),
    lambda: nn.Dropout(0.5),
    lambda: nn.Identity(),
    lambda: nn.Sequential(nn.Flatten(2), nn.ConvTranspose1d(3, 3, 1), nn.Unflatten(2, (4, 4))),
    lambda: nn.Sequential(nn.Flatten(2), nn.AdaptiveAvgPool1d(16), nn.Unflatten(2, (4, 4))),
    lambda: nn.Sequential(nn.Flatten(), nn.Linear(48, 48), nn.Unflatten(1, (3, 4, 4))),
    lambda: nn.MaxPool2d(3, 1, 1),
    lambda: nn.AvgPool2d(3, 1, 1),
    lambda: Do(F.relu),
    lambda: Do(lambda x: F.relu(x * 1.0, inplace=True)),
    lambda: Do(lambda x: (x + 0.0).relu_()),
    lambda: Do(lambda x: F.leaky_relu(x, 0.1)),
    lambda: Do(torch.sigmoid),
    lambda: Do(lambda x: x.tanh()),
    lambda: Do(lambda x: -x),
    lambda: Do(lambda x: F.pad(x, (1, 1, 0, 0), value=0.3)[..., 1:-1]),
    lambda: Do(lambda x: F.dropout(x, 0.5, training=False)),
    lambda: Do(lambda x: torch.cat([part for part in x.chunk(3, 1)][::-1], 1)),
    lambda: Do(lambda x: torch.cat([part.clone() for part in x.split([1, 2], dim=1)], 1)),
    lambda: Do(reversed_channels),
    lambda: Do(lambda x: x.double().to(x.dtype).view_as(x)),
    lambda: Constant(torch.matmul, torch.linspace(-1, 1, 16).view(4, 4)),
    lambda: Constant(lambda x, c: c @ x, torch.linspace(-1, 1, 16).view(4, 4)),
    lambda: Constant(lambda x, c: torch.einsum("bchw,cd->bdhw", x, c), torch.linspace(-1, 1, 9).view(3, 3)),
    lambda: Do(lambda x: torch.cat([x[:, :1], x[:, 1:].unsqueeze(1).squeeze(1)], dim=1)),
    lambda: nn.GELU(),
    lambda: nn.SiLU(),
    lambda: nn.Hardswish(),
    lambda: nn.Mish(),
    lambda: nn.ELU(1.5),
    lambda: nn.SELU(),
    lambda: nn.Softplus(),
    lambda: nn.PReLU(3),
    lambda: nn.ReLU6(),
    lambda: Do(lambda x: x.clamp(-0.5, 1.0)),
    lambda: Do(lambda x: abs(x)),
    lambda: Do(lambda x: torch.maximum(x, -0.5 * x)),
    lambda: Do(lambda x: torch.minimum(x, x.flip(1)).roll(1, 2)),
    lambda: Do(lambda x: x - x.amax((2, 3), keepdim=True)),
    lambda: nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(3, 12, 3, 2), nn.PixelShuffle(2)),
    lambda: nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular"),
    lambda: nn.Sequential(nn.AvgPool2d(2), nn.Upsample(scale_factor=2, mode="bilinear")),
    lambda: Do(lambda x: torch.stack([x[:, 0], x[:, 1], x.narrow(1, 2, 1).squeeze(1)], 1)),
    lambda: Attending(),
    lambda: Attending(norm_first=True, activation="gelu"),
    lambda: Do(lambda x: F.scaled_dot_product_attention(x, x.mT, x + 1, is_causal=True)),
    lambda: Do(lambda x: torch.einsum("bchw,bcwd->bchd", x, x) * x),
    lambda: Do(lambda x: x / (x * x + 1)),
    lambda: Do(lambda x: x.log_softmax(1)),
    lambda: nn.LayerNorm(4),
    lambda: nn.RMSNorm((4, 4)),
    lambda: nn.GroupNorm(3, 3),
    lambda: nn.InstanceNorm2d(3, affine=True),
]


@st.composite
def steps(draw: st.DrawFn, depth: int = 2) -> nn.Module:
    """A module that maps (B, 3, 4, 4) to (B, 3, 4, 4)."""
    number = st.floats(-2, 2).filter(lambda value: abs(value) > 1e-2)
    simple = st.sampled_from(STEPS).map(lambda make: make())
    scaled = st.builds(
        lambda c, function: Do(lambda x: function(x, c)),
        number,
        st.sampled_from(
            [
                lambda x, c: x * c,
                lambda x, c: c * x,
                lambda x, c: x / c,
                lambda x, c: c - x,
                lambda x, c: torch.add(x, c),
            ]
        ),
    )
    constants = st.builds(
        Constant,
        st.sampled_from([torch.add, torch.sub, torch.mul, torch.div, add_in_place, lambda x, c: c - x]),
        st.integers(0, 99).map(lambda seed: torch.randn(3, 1, 1, generator=torch.Generator().manual_seed(seed)) + 3),
    )
    leaves = simple | scaled | constants
    if depth == 0:
        return draw(leaves)
    joined = st.builds(
        Branches,
        steps(depth - 1),
        steps(depth - 1),
        st.sampled_from(
            [
                torch.add,
                lambda x, y: x - y,
                add_in_place,
                subtract_in_place,
                lambda x, y: torch.add(x, y, alpha=-0.5),
                lambda x, y: torch.cat([x, y], 1)[:, 1:4],
            ]
        ),
    )
    return draw(leaves | joined)


@st.composite
def networks(draw: st.DrawFn) -> tuple[nn.Module, int]:
    seed = draw(st.integers(0, 10_000))
    torch.manual_seed(seed)
    inner = draw(st.lists(steps(), min_size=1, max_size=5))
    model = Flow(nn.Conv2d(2, 3, 3, padding=1), inner, draw(st.sampled_from(FLATTENS)), 4).double()
    model.eval()(torch.zeros(2, 2, 4, 4, dtype=torch.float64))  # gives the lazy layer its size
    return randomized(model, seed), seed


def random_box(seed: int, radius: float) -> Box:
    generator = torch.Generator().manual_seed(seed)
    center = torch.rand(3, 2, 4, 4, generator=generator, dtype=torch.float64)
    return Box.around(center, radius * torch.rand(center.shape, generator=generator, dtype=torch.float64))


def points_of(box: Box, count: int, generator: torch.Generator | None = None) -> list[Tensor]:
    shares = [torch.rand(box.shape, generator=generator, dtype=torch.float64) for _ in range(count)]
    corners = [(share > 0.5).double() for share in shares]
    return [box.lower + share * (box.upper - box.lower) for share in [*shares, *corners]]


def attack(model: nn.Module, box: Box, output: int, sign: int) -> Tensor:
    """Signed gradient steps that push one output up or down, inside the box."""
    x = box.center.clone()
    for _ in range(8):
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(sign * model(x)[:, output].sum(), x)
        step = 0.5 * (box.upper - box.lower)
        x = (x.detach() + step * gradient.sign()).clamp(box.lower, box.upper)
    return x
