"""Random networks over the whole operation table, and over the ways in which networks misuse it.

A network is a `Recipe`: names of layers and a seed, so that it can be written to a file, made again, and shrunk by
leaving layers out. Layers map (B, 4, 4, 4) to itself until one flattens; from there on (B, 8) to itself.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGE = (4, 4, 4)
FEATURES = 8
CLASSES = 3
Function = Callable[[Any, Tensor], Tensor]


class Draw:
    """The random numbers of one layer; they do not depend on the layers around it."""

    def __init__(self, key: str) -> None:
        self.random = random.Random(key)
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(40))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def number(self) -> float:
        return self.random.choice([-1, 1]) * self.random.uniform(0.1, 2)

    def choice(self, *options: Any) -> Any:
        return self.random.choice(options)


class Layer(nn.Module):
    """A layer given by its forward, with modules, buffers, parameters and plain attributes of these names."""

    def __init__(self, function: Function, **attributes: Any) -> None:
        super().__init__()
        self.function = function
        for name, value in attributes.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def do(function: Callable[[Tensor], Tensor]) -> Callable[[Draw], nn.Module]:
    return lambda draw: Layer(lambda self, x: function(x))


def module(make: Callable[[], nn.Module]) -> Callable[[Draw], nn.Module]:
    return lambda draw: make()


def with_constant(
    function: Callable[[Tensor, Tensor], Tensor], make: Callable[[Draw], Tensor]
) -> Callable[[Draw], nn.Module]:
    return lambda draw: Layer(lambda self, x: function(x, self.c), c=make(draw))


def chain(*modules: Callable[[], nn.Module]) -> Callable[[Draw], nn.Module]:
    return lambda draw: nn.Sequential(*[make() for make in modules])


def conv() -> nn.Module:
    return nn.Conv2d(4, 4, 3, padding=1)


def norm() -> nn.Module:
    return nn.BatchNorm2d(4)


def channels(draw: Draw) -> Tensor:
    return draw.normal(4, 1, 1) + 3


def integers(dtype: torch.dtype, low: int, high: int) -> Callable[[Draw], Tensor]:
    return lambda draw: torch.randint(low, high, (4, 1, 1), generator=draw.generator).to(dtype)


def residual(join: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Draw], nn.Module]:
    return lambda draw: Layer(lambda self, x: join(self.conv(x), x), conv=conv())


def add_in_place(x: Tensor, y: Tensor) -> Tensor:
    x += y
    return x


def subtract_in_place(x: Tensor, y: Tensor) -> Tensor:
    x = x * 1
    x -= y
    return x


def reversed_channels(x: Tensor) -> Tensor:
    one, two, three, four = x.unbind(1)
    return torch.cat([part.unsqueeze(1) for part in (four, three, two, one)], 1)


def attended(self: nn.Module, x: Tensor) -> Tensor:
    tokens = x.flatten(2)
    return self.f(tokens, tokens, tokens, need_weights=False)[0].unflatten(2, (4, 4))


ORDINARY: dict[str, Callable[[Draw], nn.Module]] = {
    "conv": module(conv),
    "conv without bias": module(lambda: nn.Conv2d(4, 4, 3, padding="same", dilation=2, bias=False)),
    "grouped conv": module(lambda: nn.Conv2d(4, 4, 1, groups=2)),
    "transposed conv": module(lambda: nn.ConvTranspose2d(4, 4, 3, padding=1)),
    "grouped transposed conv": module(lambda: nn.ConvTranspose2d(4, 4, 3, padding=1, groups=4)),
    "conv 1d": chain(lambda: nn.Flatten(2), lambda: nn.Conv1d(4, 4, 3, padding=1), lambda: nn.Unflatten(2, (4, 4))),
    "transposed conv 1d": chain(
        lambda: nn.Flatten(2), lambda: nn.ConvTranspose1d(4, 4, 1), lambda: nn.Unflatten(2, (4, 4))
    ),
    "conv 3d": chain(lambda: nn.Unflatten(1, (1, 4)), lambda: nn.Conv3d(1, 1, 3, padding=1), lambda: nn.Flatten(1, 2)),
    "linear": chain(lambda: nn.Flatten(), lambda: nn.Linear(64, 64), lambda: nn.Unflatten(1, IMAGE)),
    "linear over the last axis": module(lambda: nn.Linear(4, 4)),
    "BatchNorm": module(norm),
    "BatchNorm without parameters": module(lambda: nn.BatchNorm2d(4, affine=False)),
    "conv, BatchNorm": chain(conv, norm),
    "conv, BatchNorm, ReLU in place": chain(conv, norm, lambda: nn.ReLU(inplace=True)),
    "conv, Identity, BatchNorm": chain(conv, nn.Identity, norm),
    "conv, Dropout, BatchNorm": chain(conv, lambda: nn.Dropout(0.5), norm),
    "conv, BatchNorm, BatchNorm": chain(conv, norm, norm),
    "linear over tokens, BatchNorm": chain(
        lambda: nn.Flatten(2), lambda: nn.Linear(16, 16), lambda: nn.BatchNorm1d(4), lambda: nn.Unflatten(2, (4, 4))
    ),
    "ReLU": module(nn.ReLU),
    "LeakyReLU": lambda draw: nn.LeakyReLU(draw.choice(0.0, 0.01, 0.5, 1.0)),
    "steep LeakyReLU": lambda draw: nn.LeakyReLU(1.5),
    "Sigmoid": module(nn.Sigmoid),
    "Tanh": module(nn.Tanh),
    "Dropout": module(lambda: nn.Dropout(0.3)),
    "Identity": module(nn.Identity),
    "ReLU6": module(nn.ReLU6),
    "Hardtanh": module(lambda: nn.Hardtanh(-0.3, 0.5)),
    "PReLU": lambda draw: nn.PReLU(4),
    **{
        name: module(getattr(nn, name))
        for name in (
            "ELU",
            "SELU",
            "CELU",
            "Softplus",
            "LogSigmoid",
            "GELU",
            "SiLU",
            "Mish",
            "Hardswish",
            "Hardsigmoid",
            "Dropout2d",
        )
    },
    "abs": do(lambda x: x.abs()),
    "square": do(lambda x: x.square() + x**3),
    "exponential": do(lambda x: torch.exp(0.1 * x)),
    "root of a positive value": do(lambda x: (x.abs() + 1).sqrt() + torch.rsqrt(x.abs() + 0.5)),
    "logarithm of a positive value": do(lambda x: torch.log(x.abs() + 1) + (x.abs() + 0.7).reciprocal()),
    "clamp": do(lambda x: x.clamp(-0.5, 0.3).clamp(min=-0.2)),
    "maximum": residual(lambda y, x: torch.maximum(y, x)),
    "minimum": residual(lambda y, x: torch.minimum(y, x) + x.amax(1, keepdim=True) - x.amin((2, 3), keepdim=True)),
    "pooling 3d": do(lambda x: F.max_pool3d(F.avg_pool3d(x.unsqueeze(1), 3, 1, 1), 3, 1, 1).squeeze(1)),
    "adaptive max pooling": do(lambda x: F.adaptive_max_pool2d(x, 4)),
    "resizing": do(lambda x: F.interpolate(F.interpolate(x, scale_factor=2.3), size=(4, 4), mode="nearest-exact")),
    "bilinear resizing": do(lambda x: F.interpolate(x, size=(7, 7), mode="bilinear")[:, :, 1:5, 2:6]),
    "flips and rolls": do(lambda x: torch.roll(x.flip(1), (1, 2), (2, 3)).movedim(1, 2)),
    "narrow": do(lambda x: torch.cat([x.narrow(1, 1, 3), x.select(1, 0).unsqueeze(1)], 1)),
    "repeats": do(lambda x: torch.tile(x, (1, 1, 2)).repeat(1, 2, 1, 1)[:, 2:6, :, 1:5]),
    "expand": do(lambda x: x + x[:, :1].expand(-1, 4, -1, -1)),
    "index_select": with_constant(lambda x, c: x.index_select(1, c), lambda draw: torch.tensor([2, 0, 1, 1])),
    "shuffles": do(lambda x: F.channel_shuffle(F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2), 2)),
    "negation": do(lambda x: -x),
    "max pooling": module(lambda: nn.MaxPool2d(3, 1, 1)),
    "average pooling": module(lambda: nn.AvgPool2d(3, 1, 1)),
    "average pooling without padding's count": do(
        lambda x: F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
    ),
    "average pooling, divisor": lambda draw: nn.AvgPool2d(3, 1, 1, divisor_override=draw.choice(1, 5, 2**20)),
    "adaptive pooling": do(lambda x: F.adaptive_avg_pool2d(x, (4, 4))),
    "upsampled means": do(lambda x: x - x.mean((2, 3), keepdim=True)),
    "sums": do(lambda x: x + torch.sum(x, 1, keepdim=True)),
    "padding": do(lambda x: F.pad(x, (1, 0, 0, 1))[:, :, 1:, :4]),
    "chunks": do(lambda x: torch.cat([part for part in x.chunk(2, 1)][::-1], 1)),
    "split": do(lambda x: torch.cat([part.clone() for part in x.split([1, 3], dim=1)], 1)),
    "unbind": do(reversed_channels),
    "permute": do(lambda x: x.permute(0, 3, 1, 2)),
    "transpose": do(lambda x: x.transpose(1, -1).contiguous()),
    "LayerNorm": module(lambda: nn.LayerNorm((4, 4))),
    "GroupNorm": module(lambda: nn.GroupNorm(2, 4)),
    "InstanceNorm": module(lambda: nn.InstanceNorm2d(4, affine=True)),
    "RMSNorm": module(lambda: nn.RMSNorm(4)),
    "softmax": do(lambda x: F.softmax(x, 1)),
    "log_softmax": do(lambda x: F.log_softmax(x, -1)),
    "product of two values": residual(lambda y, x: y * x),
    "matrix product of two values": residual(lambda y, x: y @ x.transpose(-1, -2)),
    "quotient of two values": residual(lambda y, x: y / (x.abs() + 0.5)),
    "attention": lambda draw: Layer(attended, f=nn.MultiheadAttention(16, 2, batch_first=True)),
    "causal attention": do(lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True)),
    "transformer layer": chain(
        lambda: nn.Flatten(2),
        lambda: nn.TransformerEncoderLayer(16, 2, 8, dropout=0.0, batch_first=True, norm_first=True),
        lambda: nn.Unflatten(2, (4, 4)),
    ),
    "detach": do(lambda x: x - x.detach() * 0.5),
    "squeeze": do(lambda x: torch.cat([x[:, i : i + 1].squeeze(1).unsqueeze(1) for i in (2, 0, 3, 1)], 1)),
    "casts": do(lambda x: x.double().to(x.dtype)),
    "matmul": with_constant(torch.matmul, lambda draw: draw.normal(4, 4)),
    "matmul from the left": with_constant(lambda x, c: c @ x, lambda draw: draw.normal(4, 4)),
    "einsum": with_constant(lambda x, c: torch.einsum("bchw,cd->bdhw", x, c), lambda draw: draw.normal(4, 4)),
    "shift": with_constant(lambda x, c: x + c, channels),
    "difference": with_constant(lambda x, c: c - x, channels),
    "scale": with_constant(lambda x, c: x * c, channels),
    "quotient": with_constant(lambda x, c: x / c, channels),
    "number": lambda draw: Layer(lambda self, x: (x - self.n) * self.n, n=draw.number()),
    "residual": residual(lambda y, x: y + x),
    "residual, relu": residual(lambda y, x: F.relu(y + x)),
    "residual difference": residual(lambda y, x: torch.sub(y, x, alpha=0.3)),
    "concatenation": residual(lambda y, x: torch.cat([y, x], 1)[:, ::2]),
}

USES_OF_KEYWORDS: dict[str, Callable[[Draw], nn.Module]] = {
    "relu(input=)": do(lambda x: F.relu(input=x)),
    "leaky_relu(input=)": do(lambda x: F.leaky_relu(negative_slope=0.2, input=x)),
    "cat(tensors=)": do(lambda x: torch.cat(dim=1, tensors=[x[:, 2:], x[:, :2]])),
    "cat(axis=)": do(lambda x: torch.cat([x[:, 2:], x[:, :2]], axis=1)),
    "add(other=)": with_constant(lambda x, c: torch.add(x, other=c, alpha=-2), channels),
    "add(input=, other=)": with_constant(lambda x, c: torch.add(other=x, input=c), channels),
    "sub(other=)": with_constant(lambda x, c: x.sub(other=c, alpha=0.7), channels),
    "mul(other=)": with_constant(lambda x, c: torch.mul(other=c, input=x), channels),
    "div(other=)": with_constant(lambda x, c: x.div(other=c), channels),
    "div(rounding_mode=)": with_constant(lambda x, c: torch.div(x, c, rounding_mode="floor"), channels),
    "linear(bias=)": lambda draw: Layer(
        lambda self, x: F.linear(x, weight=self.w, bias=self.b), w=draw.normal(4, 4), b=draw.normal(4)
    ),
    "conv2d(bias=)": lambda draw: Layer(
        lambda self, x: F.conv2d(padding=1, weight=self.w, bias=self.b, input=x),
        w=draw.normal(4, 4, 3, 3) / 4,
        b=draw.normal(4),
    ),
    "batch_norm(running_var=)": lambda draw: Layer(
        lambda self, x: F.batch_norm(x, running_var=self.v, running_mean=self.m, bias=self.b),
        m=draw.normal(4),
        v=draw.normal(4).abs() + 0.5,
        b=draw.normal(4),
    ),
    "mean(dim=)": do(lambda x: x + torch.mean(keepdim=True, dim=(1, -1), input=x)),
    "mean(axis=)": do(lambda x: x + x.mean(axis=1, keepdims=True)),
    "mean(dtype=)": do(lambda x: x + x.mean(1, keepdim=True, dtype=torch.float16)),
    "sum(dtype=)": do(lambda x: x + x.sum(1, keepdim=True, dtype=torch.int32)),
    "flatten(start_dim=)": do(lambda x: torch.flatten(x, start_dim=2).unflatten(sizes=(4, 4), dim=-1)),
    "permute(dims=)": do(lambda x: torch.permute(dims=(0, 2, 1, 3), input=x)),
    "transpose(dim0=)": do(lambda x: x.transpose(dim1=1, dim0=3)),
    "reshape(shape=)": do(lambda x: torch.reshape(shape=(-1, 64), input=x).view(x.shape)),
    "max_pool2d(kernel_size=)": do(lambda x: F.max_pool2d(kernel_size=3, input=x, padding=1, stride=1)),
    "avg_pool2d(divisor_override=)": do(
        lambda x: F.avg_pool2d(divisor_override=3, kernel_size=3, stride=1, input=x, padding=1)
    ),
    "pad(value=)": do(lambda x: F.pad(pad=(0, 1), input=x, value=-0.7)[..., 1:]),
    "pad(mode=)": do(lambda x: F.pad(x, (1, 1, 0, 0), mode="reflect")[..., 1:-1]),
    "chunk(chunks=)": do(lambda x: torch.cat(list(torch.chunk(chunks=2, dim=1, input=x)), 1)),
}

MISUSES: dict[str, Callable[[Draw], nn.Module]] = {
    # constants of other types
    "uint8": with_constant(lambda x, c: x - c, integers(torch.uint8, 0, 256)),
    "int8, alpha": with_constant(lambda x, c: torch.add(x, c, alpha=100), integers(torch.int8, -128, 128)),
    "int64": with_constant(lambda x, c: c * x, integers(torch.int64, -3, 4)),
    "negated uint8": with_constant(lambda x, c: x + -c, integers(torch.uint8, 0, 256)),
    "bool": with_constant(lambda x, c: x * c, integers(torch.bool, 0, 2)),
    "float16": with_constant(lambda x, c: x + c, lambda draw: channels(draw).half()),
    "int32 matmul": with_constant(
        lambda x, c: x @ c.to(x.dtype),
        lambda draw: torch.randint(-2, 3, (4, 4), generator=draw.generator, dtype=torch.int32),
    ),
    "index tensor": with_constant(lambda x, c: x[:, c], lambda draw: torch.tensor([3, 0, 0, 1])),
    "bool mask": with_constant(
        lambda x, c: torch.cat([x[:, c], x[:, ~c]], 1), lambda draw: torch.tensor([True, False, True, False])
    ),
    "mask over the batch": with_constant(lambda x, c: x[..., c] + x, lambda draw: torch.ones(4, dtype=torch.bool)),
    # constants that are computed
    "reciprocal buffer": with_constant(lambda x, c: x * (1 / c), channels),
    "scaled parameter": lambda draw: Layer(
        lambda self, x: F.linear(x, self.w * self.g), w=nn.Parameter(draw.normal(4, 4)), g=nn.Parameter(draw.normal(1))
    ),
    "constant of the forward": do(lambda x: x + torch.full_like(x[:, :1], 0.1) * 3),
    "tensor of the forward": do(lambda x: x + torch.tensor([0.1, 0.2, 0.3, 0.4]).to(x.dtype).view(4, 1, 1)),
    "weight_norm": lambda draw: nn.utils.parametrizations.weight_norm(conv()),
    "spectral_norm": lambda draw: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
    # arguments
    "negative divisor": do(lambda x: F.avg_pool2d(x, 3, 1, 1, divisor_override=-3)),
    "great divisor": do(lambda x: F.avg_pool2d(x, 3, 1, 1, divisor_override=2**40)),
    "negative slope": do(lambda x: F.leaky_relu(x, -0.3)),
    "great alpha": do(lambda x: torch.add(x, x, alpha=2.0**60)),
    "circular padding": module(lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")),
    # the batch axis
    "mean over the batch": do(lambda x: x - x.mean(0)),
    "mean over everything": do(lambda x: x - x.mean()),
    "sequence first": lambda draw: Layer(lambda self, x: self.f(x.transpose(0, 1)).transpose(0, 1), f=nn.Linear(4, 4)),
    "cat along the batch": do(lambda x: torch.cat([x, x], 0)[: x.shape[0]]),
    "tokens in the batch": lambda draw: Layer(
        lambda self, x: self.f(x.reshape(-1, 4)).reshape(-1, *IMAGE), f=nn.Linear(4, 4)
    ),
    "folded batch": do(lambda x: x.flatten(0, 1).unflatten(0, (-1, 4))),
    "flipped batch": do(lambda x: x.flip(0)),
    "rolled batch": do(lambda x: torch.cat([x[1:], x[:1]])),
    "unpacked batch": do(lambda x: torch.stack([*x])),
    "counted batch": do(lambda x: x + torch.arange(len(x)).view(-1, 1, 1, 1)),
    "numbered batch": do(lambda x: x + torch.arange(x.size(0)).view(-1, 1, 1, 1)),
    "scaled by the batch": do(lambda x: x * x.shape[0]),
    "constant with a batch axis": with_constant(lambda x, c: x + c, lambda draw: draw.normal(3, 4, 1, 1)),
    "constant for one image": with_constant(lambda x, c: x + c, lambda draw: draw.normal(1, 4, 1, 1)),
    "cat with a constant": with_constant(
        lambda x, c: torch.cat([x[:, :3], c.expand(x.shape[0], 1, 4, 4)], 1), lambda draw: draw.normal(1, 1, 4, 4)
    ),
    # the same value twice
    "product of values": residual(lambda y, x: y * x),
    "quotient of values": residual(lambda y, x: y / (x * x + 1)),
    # no rule
    "softmax": do(lambda x: x.softmax(1)),
    "GELU": module(nn.GELU),
    "where": do(lambda x: torch.where(x > 0, x, 0.5 * x)),
    "half": do(lambda x: x.half().to(x.dtype)),
    # what surrounds a forward
    "autocast": lambda draw: Layer(_under_autocast, conv=conv()),
    "no_grad": do(lambda x: _without_gradient(x)),
    "hook": lambda draw: _hooked(conv()),
    "hook on a container": lambda draw: _hooked(nn.Sequential(conv(), nn.ReLU())),
    "forward of an instance": lambda draw: _with_own_forward(conv()),
    "attribute tensor": lambda draw: _with_attribute(draw.normal(4, 1, 1)),
}


def _written(change: Callable[[Tensor], Any], then: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Draw], nn.Module]:
    """x is a value of the layer's own; `change` writes into it or a view, and `then` reads both names."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.conv(x)
        return then(x, change(x))

    return lambda draw: Layer(forward, conv=conv())


IN_PLACE: dict[str, Callable[[Draw], nn.Module]] = {
    "its input": do(lambda x: add_in_place(x, 0.25)),
    "its input, normalised": lambda draw: Layer(_normalised_in_place),
    "relu_": _written(lambda x: x.relu_(), lambda x, y: x + y),
    "F.relu(x, inplace=True)": _written(lambda x: F.relu(x, inplace=True), lambda x, y: x - 0.3 * y),
    "F.relu(x, True)": _written(lambda x: F.relu(x, True), lambda x, y: x - 0.3 * y),
    "F.leaky_relu(x, 0.2, True)": _written(lambda x: F.leaky_relu(x, 0.2, True), lambda x, y: x - 0.3 * y),
    "mul_": _written(lambda x: x.mul_(-2), lambda x, y: x + y),
    "add_(alpha=)": _written(lambda x: x.add_(1, alpha=-2), lambda x, y: x + y),
    "add_(other=) to zeros": do(lambda x: _added_to_zeros(x)),
    "+=": residual(lambda y, x: add_in_place(y, x) + y),
    "-=": residual(subtract_in_place),
    "view": _written(lambda x: x.view(-1, 64).relu_(), lambda x, y: x + y.view(-1, *IMAGE)),
    "view of a view": _written(lambda x: x.flatten(2)[:, :, 2:].relu_(), lambda x, y: x),
    "chunk's part": _written(lambda x: x.chunk(2, 1)[0].relu_(), lambda x, y: torch.cat([y, x[:, 2:]], 1)),
    "chunk's part, the other read": do(lambda x: _half_written(x)),
    "base while a view is read": do(lambda x: _base_written(x * 1)),
    "transposed": _written(lambda x: x.transpose(1, 2).mul_(3), lambda x, y: x),
    "detached": _written(lambda x: x.detach().relu_(), lambda x, y: x),
    "Dropout, then ReLU": lambda draw: Layer(
        lambda self, x: _relu_of_alias(self.conv(x), self.alias), conv=conv(), alias=nn.Dropout(draw.choice(0.0, 0.5))
    ),
    "Identity, then ReLU": lambda draw: Layer(
        lambda self, x: _relu_of_alias(self.conv(x), self.alias), conv=conv(), alias=nn.Identity()
    ),
    "F.dropout, then ReLU": do(lambda x: _relu_of_alias(x * 1, lambda y: F.dropout(y, 0.5, False))),
    "contiguous, then ReLU": do(lambda x: _relu_of_alias(x * 1, lambda y: y.contiguous())),
    "same type, then ReLU": do(lambda x: _relu_of_alias(x * 1, lambda y: y.to(y.dtype))),
    "clone, then ReLU": do(lambda x: _relu_of_alias(x * 1, lambda y: y.clone())),
    "reshape, then ReLU": do(lambda x: _relu_of_alias(x * 1, lambda y: y.reshape(-1, *IMAGE))),
    "setitem": do(lambda x: _set_item(x * 1)),
    "transpose_": do(lambda x: (x * 1).transpose_(1, 2)),
    "counter": lambda draw: Layer(_counting, count=torch.zeros(())),
}


def _normalised_in_place(self: Any, x: Tensor) -> Tensor:
    x -= 0.4
    x /= 0.3
    return x


def _added_to_zeros(x: Tensor) -> Tensor:
    zeros = torch.zeros_like(x)
    zeros.add_(other=x)
    return zeros - 2 * x


def _half_written(x: Tensor) -> Tensor:
    one, other = (x * 1).chunk(2, 1)
    one.relu_()
    return torch.cat([other, one], 1)


def _base_written(x: Tensor) -> Tensor:
    view = x.flatten(1)
    x.relu_()
    return view.view(-1, *IMAGE) - 0.5


def _relu_of_alias(x: Tensor, alias: Callable[[Tensor], Tensor]) -> Tensor:
    alias(x).relu_()
    return x - 0.1


def _set_item(x: Tensor) -> Tensor:
    x[:, 0] = 0.0
    return x


def _counting(self: Any, x: Tensor) -> Tensor:
    self.count.add_(1)
    return x * self.count


def _under_autocast(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y = self.conv(x)
    return y.to(x.dtype)


def _without_gradient(x: Tensor) -> Tensor:
    with torch.no_grad():
        y = x * 2
    return y + x


def _hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(_after)
    return layer


def _after(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2 + 1


def _with_own_forward(layer: nn.Module) -> nn.Module:
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    layer.forward = lambda x: F.conv2d(x, weight.to(x.dtype), bias.to(x.dtype), padding=1).relu()
    return layer


def _with_attribute(tensor: Tensor) -> nn.Module:
    layer = Layer(lambda self, x: x + self.held[0].to(x.dtype))
    layer.held = [tensor]
    return layer


FLATTENS: dict[str, Callable[[Draw], nn.Module]] = {
    "flatten": module(nn.Flatten),
    "flatten(1)": do(lambda x: x.flatten(1)),
    "view": do(lambda x: x.contiguous().view(x.size(0), -1)),
    "reshape": do(lambda x: x.reshape(x.shape[0], -1)),
    "mean": do(lambda x: x.mean((2, 3))),
    "sum": do(lambda x: torch.sum(x, 2).flatten(1)),
    "max pooling": do(lambda x: F.max_pool2d(x, 2).flatten(1)),
    "average pooling": do(lambda x: F.avg_pool2d(x, 2, padding=1).flatten(1)),
    "adaptive pooling": do(lambda x: F.adaptive_avg_pool2d(x, 1)[:, :, 0, 0]),
    "pooling 1d": do(lambda x: F.avg_pool1d(F.max_pool1d(x.flatten(2), 2), 2).flatten(1)),
    "adaptive pooling 3d": do(lambda x: F.adaptive_avg_pool3d(x.unsqueeze(1), (3, 2, 2)).flatten(1)),
    "adaptive max pooling 1d": do(lambda x: F.adaptive_max_pool1d(x.flatten(2), 5).flatten(1)),
    "transposed convolution 3d": lambda draw: Layer(
        lambda self, x: self.f(x.unsqueeze(1)).flatten(1)[:, 10:50], f=nn.ConvTranspose3d(1, 1, 2)
    ),
    "adaptive pooling 1d": do(lambda x: F.adaptive_avg_pool1d(x.flatten(2), 3).flatten(1)),
    "permuted": do(lambda x: x.permute(0, 2, 3, 1).reshape(x.size(0), -1)),
}

FEATURE_LAYERS: dict[str, Callable[[Draw], nn.Module]] = {
    "linear": module(lambda: nn.Linear(FEATURES, FEATURES)),
    "linear, BatchNorm": chain(lambda: nn.Linear(FEATURES, FEATURES), lambda: nn.BatchNorm1d(FEATURES)),
    "linear, Dropout, BatchNorm, BatchNorm": chain(
        lambda: nn.Linear(FEATURES, FEATURES),
        lambda: nn.Dropout(0.2),
        lambda: nn.BatchNorm1d(FEATURES),
        lambda: nn.BatchNorm1d(FEATURES, affine=False),
    ),
    "ReLU": module(nn.ReLU),
    "LeakyReLU": module(lambda: nn.LeakyReLU(0.1)),
    "functional": lambda draw: Layer(
        lambda self, x: F.relu(F.linear(x, self.w, bias=self.b)),
        w=nn.Parameter(draw.normal(FEATURES, FEATURES) / 2),
        b=nn.Parameter(draw.normal(FEATURES)),
    ),
    "tokens, BatchNorm": chain(
        lambda: nn.Unflatten(1, (4, 2)), lambda: nn.Linear(2, 2), lambda: nn.BatchNorm1d(4), nn.Flatten
    ),
    "dense": lambda draw: Layer(lambda self, x: torch.cat([x, self.f(x)], 1)[:, 4:12], f=nn.Linear(FEATURES, FEATURES)),
}

ENDS: dict[str, Callable[[Draw], nn.Module]] = {
    "linear": module(lambda: nn.Linear(FEATURES, CLASSES)),
    "linear, BatchNorm": chain(lambda: nn.Linear(FEATURES, CLASSES), lambda: nn.BatchNorm1d(CLASSES)),
    "linear(bias=)": lambda draw: Layer(
        lambda self, x: F.linear(x, self.w, bias=self.b),
        w=nn.Parameter(draw.normal(CLASSES, FEATURES)),
        b=nn.Parameter(draw.normal(CLASSES)),
    ),
    "matmul": lambda draw: Layer(
        lambda self, x: x @ self.w + self.b,
        w=nn.Parameter(draw.normal(FEATURES, CLASSES)),
        b=nn.Parameter(draw.normal(CLASSES)),
    ),
    "transposed weight": lambda draw: Layer(
        lambda self, x: torch.matmul(x, self.w.t()), w=nn.Parameter(draw.normal(CLASSES, FEATURES))
    ),
    "small logits": lambda draw: _scaled_end(1e-6),
    "large logits": lambda draw: _scaled_end(1e6),
    "small differences": lambda draw: Layer(lambda self, x: self.f(x) * 1e-4 + 100, f=nn.Linear(FEATURES, CLASSES)),
    "log_softmax": chain(lambda: nn.Linear(FEATURES, CLASSES), lambda: nn.LogSoftmax(1)),
    "two linear layers": chain(lambda: nn.Linear(FEATURES, 5), lambda: nn.Linear(5, CLASSES)),
}


def _scaled_end(factor: float) -> nn.Module:
    layer = nn.Linear(FEATURES, CLASSES)
    with torch.no_grad():
        layer.weight.mul_(factor)
        layer.bias.mul_(factor)
    return layer


LAYERS = {
    **{("image", name): make for name, make in ORDINARY.items()},
    **{("keywords", name): make for name, make in USES_OF_KEYWORDS.items()},
    **{("misuse", name): make for name, make in MISUSES.items()},
    **{("in place", name): make for name, make in IN_PLACE.items()},
    **{("flatten", name): make for name, make in FLATTENS.items()},
    **{("features", name): make for name, make in FEATURE_LAYERS.items()},
    **{("end", name): make for name, make in ENDS.items()},
}
SMALLEST_MEAN = 1e-36


@dataclass(frozen=True)
class Recipe:
    """A network: layers as (kind, name, number of its random numbers), and how large its numbers are.

    scale: of all weights; statistics: of BatchNorms, "ordinary", "tiny means" or "wide" (scales over many magnitudes).
    """

    seed: int
    layers: tuple[tuple[str, str, int], ...]
    scale: float = 1.0
    statistics: str = "ordinary"

    @classmethod
    def drawn(cls, seed: int) -> Recipe:
        choose = random.Random(seed)
        kinds = ["image"] * choose.randint(1, 3)
        kinds += [kind for kind, share in (("keywords", 0.4), ("misuse", 0.3), ("in place", 0.3))
                  if choose.random() < share]  # fmt: skip
        choose.shuffle(kinds)
        kinds += ["flatten", *["features"] * choose.randint(0, 2), "end"]
        names = {kind: sorted(name for k, name in LAYERS if k == kind) for kind in set(kinds)}
        layers = tuple((kind, choose.choice(names[kind]), number) for number, kind in enumerate(kinds))
        scale = choose.choice([1.0, 1.0, 1.0, 0.03, 30.0])
        statistics = choose.choice(["ordinary", "ordinary", "ordinary", "tiny means", "wide"])
        return cls(seed, layers, scale, statistics)

    def without(self, position: int) -> Recipe:
        return replace(self, layers=self.layers[:position] + self.layers[position + 1 :])

    def simpler(self) -> Sequence[Recipe]:
        """This one with a layer left out, or with ordinary numbers."""
        dropped = [self.without(i) for i, (kind, *_) in enumerate(self.layers) if kind not in ("flatten", "end")]
        plain = [("flatten", "flatten", 0), ("end", "linear", 0)]
        for kind, name, number in plain:
            at = next(i for i, layer in enumerate(self.layers) if layer[0] == kind)
            if self.layers[at][1] != name:
                changed = (*self.layers[:at], (kind, name, number), *self.layers[at + 1 :])
                dropped.append(replace(self, layers=changed))
        if self.scale != 1.0:
            dropped.append(replace(self, scale=1.0))
        if self.statistics != "ordinary":
            dropped.append(replace(self, statistics="ordinary"))
        return dropped

    def network(self) -> nn.Module:
        """In eval mode, in float32."""
        with torch.random.fork_rng(devices=[]):
            modules = []
            for kind, name, number in self.layers:
                key = f"{self.seed}/{number}"
                torch.manual_seed(random.Random(key).getrandbits(40))
                layer = LAYERS[kind, name](Draw(key))
                _rescale(layer, self.scale)
                _normalise(layer, self.statistics, Draw(f"{key}/statistics"))
                modules.append(layer)
                if kind == "flatten":
                    modules.append(Layer(_to_features, w=nn.Parameter(torch.randn(FEATURES, 64) / 4)))
        return nn.Sequential(*modules).eval()


def _to_features(self: Any, x: Tensor) -> Tensor:
    """Of any number of features, eight; they differ from one way to flatten to the next."""
    return F.linear(x, self.w[:, : x.shape[1]])


@torch.no_grad()
def _rescale(layer: nn.Module, scale: float) -> None:
    for parameter in layer.parameters():
        if parameter.dim() > 1:
            parameter.mul_(scale)


@torch.no_grad()
def _normalise(layer: nn.Module, statistics: str, draw: Draw) -> None:
    for norm_ in layer.modules():
        if isinstance(norm_, nn.modules.batchnorm._BatchNorm):
            size = norm_.num_features
            norm_.running_mean.copy_(draw.normal(size) * (SMALLEST_MEAN if statistics == "tiny means" else 0.5))
            exponents = draw.normal(size) * (3.0 if statistics == "wide" else 0.3)
            norm_.running_var.copy_(10.0**exponents)
            if norm_.weight is not None:
                norm_.weight.copy_(draw.normal(size))
                norm_.bias.copy_(draw.normal(size) * 0.5)
