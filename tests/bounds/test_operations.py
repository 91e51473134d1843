"""Every operation there is: its spellings, its bounds, and what it must refuse, from one table of examples."""

from __future__ import annotations

import itertools
import operator
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from certtrain.bounds import BoundedModel, Box, linf_box
from certtrain.bounds.attention import _allowed, attend, masked
from certtrain.bounds.batch_norm import SETTLED_BY_CLEAN, scale_shift
from certtrain.bounds.interval import RULES
from certtrain.bounds.linear.backward import PARAMETRIZED
from certtrain.bounds.linear.backward import RULES as BACKWARD
from certtrain.bounds.linear.normalization import _lines as normalized_lines
from certtrain.bounds.linear.relaxations import RELAXATIONS
from certtrain.bounds.lirpa import LirpaModel
from certtrain.bounds.normalization import deviation, inverse_root, normalized, with_batch_axis
from certtrain.bounds.operations.activations import gelu, power
from certtrain.bounds.operations.arithmetic import add, sub
from certtrain.bounds.operations.joining import cat, chunk, split, unbind
from certtrain.bounds.operations.movement import cast, expand, identity, narrow, reshape
from certtrain.bounds.operations.pooling import resize
from certtrain.bounds.operations.products import einsum
from certtrain.bounds.operations.record import (
    DECOMPOSITIONS,
    FUNCTIONS,
    METHODS,
    MODULES,
    OPERATIONS,
    Affine,
    Operation,
    PiecewiseLinear,
    Smooth,
    anything,
    at_settings,
)
from certtrain.bounds.rounding.table import RULES as SOUND
from certtrain.errors import UnsupportedOperation
from tests.bounds.random_networks import points_of
from tests.bounds.test_lirpa import needs_auto_lirpa

Function = Callable[[Tensor], Tensor]
IMAGES = 3


def ramp(*shape: int) -> Tensor:
    """A constant whose elements all differ, none of them 0."""
    return torch.linspace(-1.1, 1.3, max(1, torch.Size(shape).numel()), dtype=torch.float64).view(shape)


def batch_of(x: Tensor, *shape: int) -> Tensor:
    """A constant with an axis for the images."""
    return x.new_ones(x.shape[0], *shape) * ramp(*shape)


@dataclass(frozen=True)
class Example:
    """How an operation is called.

    Args:
        shape: of one image.
        keywords: the arguments after the first, by the names PyTorch gives them, in its order.
        modules: with the spellings as modules.
        calls: by spelling, for those that take other arguments than `keywords`: ways to call it.
        refused: calls that its preconditions must refuse by name.
        range: of the inputs.
    """

    shape: tuple[int, ...] = (3, 4)
    keywords: Mapping[str, Any] = field(default_factory=dict)
    modules: Sequence[nn.Module] = ()
    calls: Mapping[Any, Sequence[Function]] = field(default_factory=dict)
    refused: Sequence[Function] = ()
    range: tuple[float, float] = (-2.5, 2.5)


IMAGE = (3, 6, 6)


def elementwise(*modules: nn.Module, **keywords: Any) -> Example:
    return Example(keywords=keywords, modules=modules, shape=(3, 4))


def arithmetic(name: str, alpha: bool = False) -> Example:
    """x + 2 and its like: by number, by constant tensor, by keyword, by operator."""
    function, other = getattr(torch, name), ramp(3, 1)
    symbol = {"add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv}[name]
    in_place = getattr(operator, {"div": "itruediv"}.get(name, f"i{name}"))
    calls: dict[Any, list[Function]] = {
        symbol: [lambda x: symbol(x, other), lambda x: symbol(x, 0.7)],
        in_place: [lambda x: in_place(x + 0, other)],
    }
    if name != "div":
        calls[symbol] += [lambda x: symbol(other, x), lambda x: symbol(2, x)]
    if name in ("add", "sub"):
        calls[function] = [
            lambda x: function(x, other),
            lambda x: function(input=x, other=other, alpha=0.5),
            lambda x: function(other, x, alpha=2),
            lambda x: function(x, x * x.new_ones(1) * 0.5),
        ]
    refused = [lambda x: symbol(x, torch.ones(IMAGES, 1, 3, 4)), lambda x: function(x, 1.0, out=torch.empty(0))]
    if name == "div":
        refused.append(lambda x: torch.div(x, 2.0, rounding_mode="floor"))
    elif name != "mul":
        refused.append(lambda x: function(x, 1.0, alpha=float("inf")))
    return Example(keywords={"other": other}, calls=calls, refused=refused)


def convolution(dims: int, transposed: bool = False, **keywords: Any) -> Example:
    shape = (4, 7, 6, 5)[: dims + 1]
    weight = ramp(*((4, 2) if transposed else (6, 2)), *[3] * dims)
    kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dims}d")
    settings = {"stride": 2, "padding": 1, **keywords, "groups": 2}
    if not transposed:
        settings["dilation"] = 2
        settings = {name: settings[name] for name in ("stride", "padding", "dilation", "groups")}
    bias = ramp(4 if transposed else 6)
    function = getattr(F, f"conv{'_transpose' if transposed else ''}{dims}d")
    return Example(
        shape,
        {"weight": weight, "bias": bias, **settings},
        [kind(4, 4, 3, padding=1, groups=2), kind(4, 3, 2, stride=2, bias=False)],
        refused=[
            lambda x: function(x[0], weight),
            lambda x: function(ramp(1, *shape), x.reshape(-1, 2, *[1] * dims) * 1.0),
        ],
    )


def pooling(function: Callable, *modules: nn.Module, dims: int = 2, **keywords: Any) -> Example:
    return Example(
        (2, 6, 6, 6)[: dims + 1],
        keywords,
        modules,
        refused=[lambda x: function(x[:, 0], **keywords), *_wrong_indices(function, keywords)],
    )


def _wrong_indices(function: Callable, keywords: Mapping[str, Any]) -> list[Function]:
    return [lambda x: function(x, **keywords, return_indices=True)[0]] if "max" in function.__name__ else []


def dropout(dims: int) -> Example:
    name = f"{dims}d" if dims else ""
    function = getattr(F, f"dropout{name}")
    shape = (2, 3, 3, 3)[: dims + 1] if dims else (3, 4)
    refused = [lambda x: function(x[:, 0], 0.5, True)] if dims else []
    return Example(shape, {"p": 0.3, "training": False}, [getattr(nn, f"Dropout{name}")(0.3).eval()], refused=refused)


def moves(refused: Sequence[Function], **keywords: Any) -> Example:
    return Example(IMAGE, keywords, refused=refused)


batch_norm_statistics = {"running_mean": ramp(3), "running_var": ramp(3).square() + 0.5}

OTHER_CASTS = ("half", "bfloat16", "long", "int", "bool", "cuda")

EXAMPLES: dict[Callable, Example] = {
    # linear maps
    F.linear: Example(
        keywords={"weight": ramp(5, 4), "bias": ramp(5)},
        modules=[nn.Linear(4, 2), nn.Linear(4, 3, bias=False)],
        refused=[lambda x: F.linear(x, x[0]), lambda x: F.linear(x[0, 0], ramp(5, 4))],
    ),
    F.conv1d: convolution(1),
    F.conv2d: convolution(2),
    F.conv3d: convolution(3),
    F.conv_transpose1d: convolution(1, True, output_padding=1),
    F.conv_transpose2d: convolution(2, True, output_padding=1),
    torch.matmul: Example(
        (5, 4),
        {"other": ramp(4, 2)},
        calls={
            operator.matmul: [lambda x: x @ ramp(4, 2), lambda x: ramp(2, 5) @ x, lambda x: x @ batch_of(x, 4, 2)],
            torch.bmm: [lambda x: torch.bmm(x, mat2=batch_of(x, 4, 2))],
            torch.mm: [lambda x: torch.mm(input=x[:, 0], mat2=ramp(4, 2))],
            "bmm": [lambda x: x.bmm(batch_of(x, 4, 2))],
            "mm": [lambda x: x[:, 0].mm(ramp(4, 2))],
            torch.addmm: [
                lambda x: torch.addmm(ramp(2), x[:, 0], ramp(4, 2)),
                lambda x: torch.addmm(input=ramp(2), mat1=x[:, 0], mat2=ramp(4, 2), beta=0.5, alpha=-2),
            ],
            "addmm": [lambda x: x[:, 1, :2].addmm(x[:, 0], ramp(4, 2))],
            torch.baddbmm: [lambda x: torch.baddbmm(ramp(1, 5, 2), x, batch_of(x, 4, 2), beta=2)],
            "baddbmm": [lambda x: x[..., :2].baddbmm(x, batch_of(x, 4, 2))],
        },
        refused=[lambda x: x.flatten(1) @ x.flatten(1).transpose(0, 1), lambda x: ramp(IMAGES, IMAGES) @ x.flatten(1)],
    ),
    einsum: Example(
        (5, 4),
        calls={
            torch.einsum: [
                lambda x: torch.einsum("bij,jk->bik", x, ramp(4, 2)),
                lambda x: torch.einsum("kj,bij->bki", [ramp(3, 4), x]),
            ]
        },
        refused=[lambda x: torch.einsum("bij,jb->bi", x, ramp(4, IMAGES)), lambda x: torch.einsum("bij->bij", x)],
    ),
    # arithmetic
    add: arithmetic("add"),
    sub: arithmetic("sub"),
    torch.mul: arithmetic("mul"),
    torch.div: arithmetic("div"),
    torch.neg: Example(calls={operator.neg: [lambda x: -x]}),
    # activations
    F.relu: elementwise(nn.ReLU(), nn.ReLU(inplace=True)),
    F.leaky_relu: Example(
        keywords={"negative_slope": 0.3},
        modules=[nn.LeakyReLU(0.1), nn.LeakyReLU(2.0)],
        refused=[lambda x: F.leaky_relu(x, -0.1)],
    ),
    F.prelu: Example(
        keywords={"weight": torch.tensor([0.2, -0.5, 1.7], dtype=torch.float64)},
        modules=[nn.PReLU(3), nn.PReLU()],
        refused=[lambda x: F.prelu(x, x[0, :, 0]), lambda x: F.prelu(x[0, 0], ramp(1))],
    ),
    F.relu6: Example(modules=[nn.ReLU6(), nn.ReLU6(inplace=True)], range=(-3.0, 9.0)),
    torch.clamp: Example(
        keywords={"min": -0.4, "max": 0.9},
        calls={
            torch.clamp_min: [lambda x: torch.clamp_min(x, 0.3), lambda x: torch.clamp_min(input=x, min=-0.4)],
            torch.clamp_max: [lambda x: torch.clamp_max(x, 0.3), lambda x: torch.clamp_max(input=x, max=-0.4)],
            torch.clamp_min_: [lambda x: torch.clamp_min_(x + 0, 0.3)],
            torch.clamp_max_: [lambda x: torch.clamp_max_(x + 0, max=0.3)],
            "clamp_min": [lambda x: x.clamp_min(0.3), lambda x: (x + 0).clamp_min_(min=0.3)],
            "clamp_max": [lambda x: x.clamp_max(0.3), lambda x: (x + 0).clamp_max_(max=0.3)],
            "clamp": [lambda x: x.clamp(max=0.5), lambda x: x.clamp(0), lambda x: (x + 0).clamp_(0, 1)],
        },
        refused=[lambda x: x.clamp(ramp(4)), lambda x: x.clamp(min=float("nan")), lambda x: x.clamp(x[:, :1], 1)],
    ),
    F.hardtanh: Example(
        keywords={"min_val": -0.5, "max_val": 0.7},
        modules=[nn.Hardtanh(), nn.Hardtanh(-2, 1.5, inplace=True)],
        refused=[lambda x: F.hardtanh(x, -1, float("inf"))],
    ),
    F.hardsigmoid: Example(modules=[nn.Hardsigmoid(), nn.Hardsigmoid(inplace=True)], range=(-5.0, 5.0)),
    torch.abs: Example(calls={operator.abs: [lambda x: abs(x)], "__abs__": [lambda x: abs(x)]}),
    torch.sigmoid: elementwise(nn.Sigmoid()),
    torch.tanh: elementwise(nn.Tanh()),
    F.elu: Example(
        keywords={"alpha": 1.7},
        modules=[nn.ELU(), nn.ELU(0.3, inplace=True)],
        refused=[lambda x: F.elu(x, -0.5), lambda x: F.elu(x, float("inf"))],
    ),
    F.selu: elementwise(nn.SELU(), nn.SELU(inplace=True)),
    F.celu: Example(
        keywords={"alpha": 0.6}, modules=[nn.CELU(), nn.CELU(2.0, inplace=True)], refused=[lambda x: F.celu(x, -1.0)]
    ),
    F.softplus: Example(
        keywords={"beta": 2.0, "threshold": 25.0},
        modules=[nn.Softplus(), nn.Softplus(0.5)],
        refused=[lambda x: F.softplus(x, -1.0), lambda x: F.softplus(x, 1.0, 2.0)],
    ),
    F.logsigmoid: elementwise(nn.LogSigmoid()),
    torch.exp: Example(),
    torch.sqrt: Example(range=(0.1, 4.0)),
    torch.log: Example(range=(0.1, 4.0)),
    torch.reciprocal: Example(range=(0.2, 4.0)),
    torch.rsqrt: Example(range=(0.2, 4.0)),
    gelu: Example(
        modules=[nn.GELU(), nn.GELU("tanh")],
        calls={F.gelu: [F.gelu, lambda x: F.gelu(input=x, approximate="tanh")]},
        refused=[lambda x: F.gelu(x, approximate="tan")],
    ),
    F.silu: elementwise(nn.SiLU(), nn.SiLU(inplace=True)),
    F.mish: elementwise(nn.Mish(), nn.Mish(inplace=True)),
    F.hardswish: Example(modules=[nn.Hardswish(), nn.Hardswish(inplace=True)], range=(-5.0, 5.0)),
    torch.square: Example(calls={torch.pow: [lambda x: torch.pow(x, 2)], operator.pow: [lambda x: x**2]}),
    power: Example(
        calls={
            torch.pow: [lambda x: torch.pow(x, 3), lambda x: torch.pow(input=x, exponent=4)],
            "pow": [lambda x: x.pow(exponent=3), lambda x: (x + 0).pow_(3)],
            "__pow__": [lambda x: x.__pow__(5)],
            operator.pow: [lambda x: x**1, lambda x: x**3.0],
        },
        refused=[lambda x: x**0.5, lambda x: x**-1, lambda x: 2**x, lambda x: x ** x.new_ones(4), lambda x: x**99],
    ),
    # pooling and the largest of several
    F.max_pool1d: pooling(F.max_pool1d, nn.MaxPool1d(3, 2, 1), dims=1, kernel_size=2, stride=1),
    F.max_pool2d: pooling(F.max_pool2d, nn.MaxPool2d(3, 2, 1), kernel_size=2, stride=1, padding=1, dilation=2),
    F.max_pool3d: pooling(F.max_pool3d, nn.MaxPool3d(3, 2, 1), dims=3, kernel_size=2, stride=1),
    F.adaptive_max_pool1d: pooling(F.adaptive_max_pool1d, nn.AdaptiveMaxPool1d(2), dims=1, output_size=4),
    F.adaptive_max_pool2d: pooling(F.adaptive_max_pool2d, nn.AdaptiveMaxPool2d((3, 4)), output_size=4),
    F.avg_pool1d: pooling(F.avg_pool1d, nn.AvgPool1d(3, 2, 1), dims=1, kernel_size=2, stride=1),
    F.avg_pool2d: pooling(
        F.avg_pool2d,
        nn.AvgPool2d(3, 2, 1, True, False),
        kernel_size=2,
        stride=1,
        padding=1,
        ceil_mode=False,
        count_include_pad=True,
        divisor_override=3,
    ),
    F.avg_pool3d: pooling(F.avg_pool3d, nn.AvgPool3d(3, 2, 1), dims=3, kernel_size=2, stride=1),
    F.adaptive_avg_pool1d: pooling(F.adaptive_avg_pool1d, nn.AdaptiveAvgPool1d(2), dims=1, output_size=4),
    F.adaptive_avg_pool2d: pooling(F.adaptive_avg_pool2d, nn.AdaptiveAvgPool2d((3, 4)), output_size=4),
    F.adaptive_avg_pool3d: pooling(F.adaptive_avg_pool3d, nn.AdaptiveAvgPool3d(2), dims=3, output_size=4),
    **{
        function: Example(
            IMAGE,
            {"dim": (1, -1), "keepdim": True},
            calls={name: [lambda x, name=name: getattr(x, name)(2), lambda x, name=name: getattr(x, name)(dim=(3, 1))]},
            refused=[
                lambda x, name=name: getattr(x, name)(),
                lambda x, name=name: getattr(x, name)(0),
                lambda x, name=name: getattr(x, name)((1, -4)),
            ],
        )
        for function, name in (
            (torch.amax, "amax"),
            (torch.amin, "amin"),
            (Tensor.mean, "mean"),
            (Tensor.sum, "sum"),
        )
    },
    **{
        function: Example(
            keywords={"other": ramp(3, 1)},
            calls={
                function: [
                    lambda x, f=function: f(x, ramp(3, 1)),
                    lambda x, f=function: f(input=ramp(3, 1), other=x),
                    lambda x, f=function: f(x, other=-x + 0.2),
                    lambda x, f=function: f(x[:, :1], x),
                ],
                either: [lambda x, f=either: f(x, -0.5 * x), lambda x, f=either: f(x, other=ramp(4))],
                short: [lambda x, short=short: getattr(x, short)(ramp(4))],
            },
            refused=[
                lambda x, f=function: f(x, torch.ones(IMAGES, 1, 3, 4)),
                lambda x, f=either: f(x, 1)[0],
                lambda x, f=either: f(x),
                lambda x, f=either: f(x, dim=1)[0],
            ],
        )
        for function, either, short in ((torch.maximum, torch.max, "max"), (torch.minimum, torch.min, "min"))
    },
    # BatchNorm and Dropout
    F.batch_norm: Example(
        IMAGE,
        batch_norm_statistics | {"weight": ramp(3), "bias": ramp(3)},
        modules=[nn.BatchNorm2d(3).eval(), nn.BatchNorm2d(3, affine=False).eval()],
        calls={
            nn.BatchNorm1d: [nn.Sequential(nn.Flatten(2), nn.BatchNorm1d(3)).eval()],
            nn.BatchNorm3d: [nn.Sequential(nn.Unflatten(1, (3, 1)), nn.BatchNorm3d(3)).eval()],
            nn.SyncBatchNorm: [nn.SyncBatchNorm(3).eval()],
        },
        refused=[lambda x: F.batch_norm(x[0, 0, 0], **batch_norm_statistics)],
    ),
    F.dropout: Example(
        keywords={"p": 0.3, "training": False},
        modules=[nn.Dropout(0.3).eval()],
        calls={torch.dropout: [lambda x: torch.dropout(x, p=0.3, train=False)]},
    ),
    F.dropout1d: dropout(1),
    F.dropout2d: dropout(2),
    F.dropout3d: dropout(3),
    # moving elements
    identity: Example(modules=[nn.Identity()]),
    cast: Example(
        calls={
            "to": [lambda x: x.to(torch.float64), lambda x: x.to("cpu", dtype=torch.float64, copy=True)],
            **{name: [lambda x, name=name: getattr(x, name)()] for name in ("double", "cpu")},
            "float": [lambda x: (x * 0).float().double()],
            "type_as": [lambda x: x.type_as(ramp(1))],
            **dict.fromkeys(OTHER_CASTS, ()),
        },
        refused=[
            *(lambda x, name=name: getattr(x, name)() for name in OTHER_CASTS if name != "cuda"),
            lambda x: x.to(torch.float16),
        ],
    ),
    torch.flatten: Example(
        IMAGE, {"start_dim": 1, "end_dim": 2}, [nn.Flatten(), nn.Flatten(1, 2)], refused=[lambda x: torch.flatten(x)]
    ),
    reshape: Example(
        (3, 4),
        calls={
            "view": [lambda x: x.view(-1, 4, 3), lambda x: x.view((-1, 12)), lambda x: x.view(x.size(0), -1)],
            "reshape": [lambda x: x.reshape(x.shape[0], -1), lambda x: x.reshape((-1, 6, 2))],
            torch.reshape: [lambda x: torch.reshape(x, (-1, 12)), lambda x: torch.reshape(input=x, shape=(-1, 12))],
            "view_as": [lambda x: x.view_as(x.flatten(1))],
            "reshape_as": [lambda x: x.reshape_as(x.flatten(1))],
        },
    ),
    Tensor.permute: Example(
        IMAGE,
        {"dims": (0, 2, 3, 1)},
        calls={"permute": [lambda x: x.permute(0, 2, -1, 1), lambda x: x.permute((0, 3, 1, 2))]},
        refused=[lambda x: x.permute(1, 0, 2, 3)],
    ),
    Tensor.transpose: Example(
        IMAGE,
        {"dim0": 1, "dim1": -1},
        calls={
            torch.swapaxes: [lambda x: torch.swapaxes(x, axis0=1, axis1=2)],
            "swapaxes": [lambda x: x.swapaxes(1, 2)],
            "mT": [lambda x: x.mT],
        },
        refused=[lambda x: x.transpose(0, 1), lambda x: x.swapaxes(2, -4)],
    ),
    Tensor.squeeze: Example(
        (3, 1, 4), {"dim": 2}, refused=[lambda x: x.squeeze(), lambda x: x.squeeze(0), lambda x: x.squeeze(-4)]
    ),
    Tensor.unsqueeze: Example(keywords={"dim": 1}, refused=[lambda x: x.unsqueeze(0), lambda x: x.unsqueeze(-4)]),
    Tensor.unflatten: Example(
        (6, 2),
        {"dim": 1, "sizes": (2, 3)},
        [nn.Unflatten(1, (3, 2))],
        {
            torch.unflatten: [
                lambda x: torch.unflatten(x, 1, (2, 3)),
                lambda x: torch.unflatten(x, dim=-1, sizes=(1, 2)),
            ]
        },
        refused=[lambda x: x.unflatten(0, (1, IMAGES))],
    ),
    Tensor.contiguous: Example(),
    Tensor.clone: Example(),
    Tensor.detach: Example(),
    operator.getitem: Example(
        IMAGE,
        calls={
            operator.getitem: [
                lambda x: x[:, 1],
                lambda x: x[..., 1:-1],
                lambda x: x[:, None, [2, 0]],
                lambda x: x[:, torch.tensor([1, 1])],
            ],
            "__getitem__": [lambda x: x.__getitem__((slice(None), 1))],
        },
        refused=[lambda x: x[0], lambda x: x[1:], lambda x: x[None], lambda x: x[[0, 1]], lambda x: x[:, [0], :, [1]]],
    ),
    F.pad: Example(
        IMAGE,
        {"pad": (1, 2, 0, 1), "mode": "constant", "value": 0.3},
        [
            nn.ZeroPad2d((1, 2, 0, 1)),
            nn.ConstantPad2d(1, 0.7),
            nn.ReflectionPad2d(1),
            nn.ReplicationPad2d((1, 0, 2, 0)),
            nn.CircularPad2d(1),
        ],
        {
            **{
                kind: [nn.Sequential(nn.Flatten(2), kind(1, *([0.7] if kind is nn.ConstantPad1d else [])))]
                for kind in (nn.ZeroPad1d, nn.ConstantPad1d, nn.ReflectionPad1d, nn.ReplicationPad1d, nn.CircularPad1d)
            },
            **{
                kind: [nn.Sequential(nn.Unflatten(1, (1, 3)), kind(1, *([0.7] if kind is nn.ConstantPad3d else [])))]
                for kind in (nn.ZeroPad3d, nn.ConstantPad3d, nn.ReflectionPad3d, nn.ReplicationPad3d, nn.CircularPad3d)
            },
            "mode": [lambda x: F.pad(x, (1, 1, 2, 0), mode="reflect"), lambda x: F.pad(x, [1, 1], "constant", -1)],
            **{
                mode: [nn.Conv2d(3, 2, 3, padding=1, padding_mode=mode)]
                for mode in ("reflect", "replicate", "circular")
            },
        },
        refused=[lambda x: F.pad(x, (0, 0) * 3 + (1, 0)), lambda x: F.pad(x, (1, 1), value=float("inf"))],
    ),
    narrow: moves([lambda x: x.narrow(0, 0, IMAGES)], dim=1, start=1, length=2),
    torch.select: moves([lambda x: x.select(0, 1)], dim=-1, index=2),
    torch.index_select: moves(
        [lambda x: x.index_select(0, torch.tensor([1, 0, 2])), lambda x: torch.index_select(x, -4, torch.arange(3))],
        dim=1,
        index=torch.tensor([2, 0, 2]),
    ),
    torch.flip: Example(
        IMAGE,
        {"dims": (1, -1)},
        calls={"flip": [lambda x: x.flip(1), lambda x: x.flip((2, 3))]},
        refused=[lambda x: x.flip(0), lambda x: x.flip((1, -4))],
    ),
    torch.roll: Example(
        IMAGE,
        {"shifts": (1, 2), "dims": (1, 2)},
        refused=[lambda x: x.roll(1), lambda x: torch.roll(x, 1, 0), lambda x: torch.roll(x, (1, 1), (1, 0))],
    ),
    Tensor.repeat: Example(
        calls={"repeat": [lambda x: x.repeat(1, 2, 1), lambda x: x.repeat((1, 1, 3))]},
        refused=[lambda x: x.repeat(2, 1, 1), lambda x: x.repeat(1, 1, 1, 1)],
    ),
    torch.tile: Example(
        keywords={"dims": (2, 1)},
        calls={"tile": [lambda x: x.tile(3), lambda x: x.tile((1, 2, 1))]},
        refused=[lambda x: x.tile(2, 1, 1), lambda x: torch.tile(x, (1, 1, 1, 1))],
    ),
    expand: Example(
        (3, 1),
        calls={
            "expand": [lambda x: x.expand(-1, 3, 5), lambda x: x.expand((x.shape[0], -1, 2))],
            "expand_as": [lambda x: x.expand_as(torch.cat([x, x], 2))],
        },
        refused=[lambda x: x.expand(2, IMAGES, 3, 1), lambda x: x.expand(1, -1, -1, -1)],
    ),
    torch.movedim: Example(
        IMAGE,
        {"source": 1, "destination": -1},
        calls={"movedim": [lambda x: x.movedim((1, 2), (3, 1))]},
        refused=[lambda x: x.movedim(0, 1), lambda x: torch.moveaxis(x, 2, -4)],
    ),
    F.pixel_shuffle: Example(
        (4, 2, 3), {"upscale_factor": 2}, [nn.PixelShuffle(2)], refused=[lambda x: F.pixel_shuffle(x.flatten(2), 2)]
    ),
    F.pixel_unshuffle: Example(
        (1, 4, 6), {"downscale_factor": 2}, [nn.PixelUnshuffle(2)], refused=[lambda x: F.pixel_unshuffle(x[:, 0], 2)]
    ),
    F.channel_shuffle: Example(
        (4, 2, 3), {"groups": 2}, [nn.ChannelShuffle(2)], refused=[lambda x: F.channel_shuffle(x.flatten(1), 2)]
    ),
    resize: Example(
        IMAGE,
        {"size": None, "scale_factor": 2, "mode": "bilinear", "align_corners": True},
        [
            nn.Upsample(scale_factor=2),
            nn.Upsample((9, 4), mode="bilinear"),
            nn.UpsamplingNearest2d(size=8),
            nn.UpsamplingBilinear2d(scale_factor=1.5),
        ],
        {
            F.interpolate: [
                lambda x: F.interpolate(x, 9),
                lambda x: F.interpolate(input=x, scale_factor=1.5, mode="nearest-exact"),
                lambda x: F.interpolate(x, scale_factor=(1.1, 2.2), recompute_scale_factor=True),
                lambda x: F.interpolate(x, size=(4, 5), mode="area"),
                lambda x: F.interpolate(x.flatten(2), size=20, mode="linear"),
            ],
            F.upsample: [lambda x: F.upsample(x, scale_factor=2)],
        },
        refused=[
            lambda x: F.interpolate(x, 9, mode="bicubic"),
            lambda x: F.interpolate(x, 9, mode="bilinear", antialias=True),
            *[
                lambda x, factor=factor, mode=mode: F.interpolate(x, scale_factor=factor, mode=mode)
                for factor in (1.1, 2.2, (1.0, 2.05), (1.5, 0.7))
                for mode in ("nearest", "nearest-exact")
            ],
        ],
    ),
    cat: Example(
        calls={
            spelling: [
                lambda x, f=spelling: f([x, -x], 1),
                lambda x, f=spelling: f(tensors=(x, 2 * x, x), dim=-1),
                lambda x, f=spelling: f((x, x.new_zeros(x.shape[0], 1, 4)), dim=1),
            ]
            for spelling in (torch.cat, torch.concat, torch.concatenate)
        }
        | {torch.stack: [lambda x: torch.stack([x, -x], 1), lambda x: torch.stack(tensors=(x, x), dim=-1)]},
        refused=[
            lambda x: torch.cat([x, x]),
            lambda x: torch.cat([x, x], dim=-3),
            lambda x: torch.stack([x, x]),
            lambda x: torch.stack([x, x], -4),
        ],
    ),
    chunk: Example(
        calls={
            torch.chunk: [lambda x: torch.chunk(x, 2, 1)[0], lambda x: torch.chunk(input=x, chunks=2, dim=2)[1]],
            "chunk": [lambda x: x.chunk(3, dim=1)[2]],
        },
        refused=[lambda x: x.chunk(1)[0], lambda x: torch.chunk(x, 1, -3)[0]],
    ),
    split: Example(
        calls={
            torch.split: [lambda x: torch.split(x, 2, 1)[1], lambda x: torch.split(x, [1, 3], dim=2)[1]],
            "split": [lambda x: x.split([1, 2], dim=1)[0]],
        },
        refused=[lambda x: x.split(IMAGES)[0]],
    ),
    unbind: Example(
        calls={torch.unbind: [lambda x: torch.unbind(x, 1)[2]], "unbind": [lambda x: x.unbind(dim=-1)[0]]},
        refused=[lambda x: x.unbind()[0]],
    ),
}


UNNAMED = {operator.abs, operator.neg, operator.matmul}  # take no keywords


class Called(nn.Module):
    """A function, of scaled inputs, as a network."""

    def __init__(self, function: Function, scale: float = 1.0, shift: float = 0.0) -> None:
        super().__init__()
        self.function, self.scale, self.shift = function, scale, shift

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x * self.scale + self.shift).flatten(1)


class Head(Called):
    """A function that ends a network."""

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def spellings(operation: Operation) -> list[Any]:
    """Every public way to write the operation: functions, names of methods, classes of modules."""
    table = [*FUNCTIONS.items(), *METHODS.items(), *MODULES.items()]
    return [spelling for spelling, (record, _) in table if record is operation and not is_canonical_only(spelling)]


def is_canonical_only(spelling: Any) -> bool:
    """The name of a record, which networks do not call."""
    module = getattr(spelling, "__module__", None) or ""
    return (
        module.startswith("certtrain")
        or spelling in vars(Tensor).values()
        or spelling in vars(Tensor.__base__).values()
    )


def ways(spelling: Any, example: Example) -> Iterator[Function]:
    """The calls of a spelling: by position, by keyword, in place."""
    if spelling in example.calls:
        yield from example.calls[spelling]
    elif isinstance(spelling, type):
        yield from [module for module in example.modules if isinstance(module, spelling)]
    elif isinstance(spelling, str):
        name = spelling.removesuffix("_")
        yield lambda x: getattr(x, spelling)(*example.keywords.values())
        if not spelling.startswith("__"):
            yield lambda x: getattr(x, spelling)(**example.keywords)
        if hasattr(Tensor, f"{name}_"):
            yield lambda x: getattr(x + 0, f"{name}_")(*example.keywords.values())
    else:
        yield lambda x: spelling(x, *example.keywords.values())
        if spelling not in UNNAMED:
            yield lambda x: spelling(input=x, **example.keywords)
            if isinstance(spelling, types.FunctionType) and "inplace" in signature(spelling).parameters:
                yield lambda x: spelling(x, **example.keywords, inplace=True)


def all_calls(function: Callable) -> list[Function]:
    example = EXAMPLES[function]
    extra = [call for spelling in example.calls for call in example.calls[spelling]]
    found = [call for spelling in spellings(OPERATIONS[function]) for call in ways(spelling, example)]
    return list({id(call): call for call in [*found, *extra]}.values())


def different_calls(function: Callable) -> list[Function]:
    """Those that may mean different things: without the spellings that follow from others."""
    example = EXAMPLES[function]
    by_settings = [*example.modules, *[call for calls in example.calls.values() for call in calls]]
    return by_settings + all_calls(function)[:1]


def network(call: Function) -> nn.Module:
    torch.manual_seed(0)
    return Called(call).double().eval()


def inputs(example: Example, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    low, high = example.range
    return low + (high - low) * torch.rand(IMAGES, *example.shape, generator=generator, dtype=torch.float64)


def name_of(function: Any) -> str:
    return OPERATIONS[function].name


each_elementwise = pytest.mark.parametrize(
    "function", [f for f in OPERATIONS if OPERATIONS[f].elementwise], ids=name_of
)
each_operation = pytest.mark.parametrize("function", EXAMPLES, ids=name_of)
ELSEWHERE = {torch.softmax, torch.log_softmax, attend, deviation, with_batch_axis, inverse_root, masked, normalized}
"""In test_attention.py."""
NORMALIZATIONS = {F.layer_norm, torch.layer_norm, F.rms_norm, torch.rms_norm, F.group_norm, F.instance_norm}


# --- the table is whole -----------------------------------------------------------------------------------------------


def test_every_operation_has_an_example_and_no_other_has():
    assert {name_of(f) for f in OPERATIONS.keys() - EXAMPLES.keys() - ELSEWHERE} == set()
    assert EXAMPLES.keys() <= OPERATIONS.keys()


@each_operation
def test_every_spelling_has_a_call(function):
    example = EXAMPLES[function]
    bare = [s for s in spellings(OPERATIONS[function]) if not list(ways(s, example))]
    assert set(bare) <= set(OTHER_CASTS)


@each_operation
def test_every_precondition_has_a_call_that_it_refuses(function):
    if OPERATIONS[function].require is not anything and function is not identity:
        assert EXAMPLES[function].refused


@each_operation
def test_every_operation_declares_a_trait(function):
    o = OPERATIONS[function]
    traits = [o.affine is not Affine.NO, o.reshaping, o.averaging, o.increasing, o.decreasing, o.minimum is not None]
    assert any(traits) or isinstance(o.curve, PiecewiseLinear)
    assert o.curve is None or o.elementwise
    assert (o.curve is not None) == o.elementwise


def test_every_operation_has_a_linear_rule_and_an_interval_rule():
    affine = {function for function, record in OPERATIONS.items() if record.affine is not Affine.NO}
    ruled = affine | RELAXATIONS.keys() | BACKWARD.keys() | PARAMETRIZED.keys()
    of_batch_norm = {scale_shift}  # affine, and what F.batch_norm settles to
    assert {name_of(f) for f in (OPERATIONS.keys() | RULES.keys()) - ruled - of_batch_norm} == set()
    assert {name_of(f) for f in OPERATIONS.keys() - RULES.keys() - SETTLED_BY_CLEAN.keys()} == set()


# --- spellings --------------------------------------------------------------------------------------------------------


@each_operation
def test_every_spelling_computes_what_the_module_computes_and_no_point_leaves_its_box(function):
    example = EXAMPLES[function]
    x = inputs(example)
    for call in all_calls(function):
        model = network(call)
        with torch.no_grad():
            net, expected = BoundedModel(model, x), model(x)
            output = net.ibp(linf_box(x, 0.0, clip=None)).output
            torch.testing.assert_close(output.lower, expected, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(output.upper, expected, rtol=1e-9, atol=1e-9)
            for box in boxes(example):
                output = net.ibp(box).output
                assert all(output.contains(model(point), 1e-9).all() for point in points_of(box, 2))


@each_operation
def test_what_its_preconditions_forbid_is_refused_by_name(function):
    x = inputs(EXAMPLES[function])
    for call in EXAMPLES[function].refused:
        with pytest.raises(UnsupportedOperation):
            BoundedModel(network(call), x).ibp(linf_box(x, 0.0, clip=None))


# --- bounds -----------------------------------------------------------------------------------------------------------


def boxes(example: Example) -> list[Box]:
    low, high = example.range
    x = inputs(example, seed=1)
    return [
        Box((x - radius).clamp(low, high), (x + radius * torch.rand_like(x)).clamp(low, high))
        for radius in (1e-6, 0.2, 3.0)
    ]


@each_operation
def test_linear_functions_of_its_result_are_above_their_bounds(function):
    """By CROWN-IBP and CROWN, behind a layer and before one."""
    example = EXAMPLES[function]
    size = torch.Size(example.shape).numel()
    low, high = example.range
    for call in different_calls(function):
        torch.manual_seed(0)
        layers = [nn.Linear(5, size), nn.Tanh(), nn.Unflatten(1, example.shape)]
        scaled = Called(call, 0.999 * (high - low) / 2, (low + high) / 2)
        model = nn.Sequential(*layers, scaled, nn.Flatten(), nn.LazyLinear(4)).double().eval()
        x, labels = torch.rand(IMAGES, 5, dtype=torch.float64), torch.tensor([0, 1, 2])
        with torch.no_grad():
            model(x)
            net = BoundedModel(model, x)
            for radius in (0.0, 0.3):
                box = linf_box(x, radius, clip=None)
                methods = ("crown-ibp", "crown") if radius and not OPERATIONS[function].reshaping else ("crown-ibp",)
                margins = [net.margins(box, labels, method, intersect=False) for method in methods]
                for point in points_of(box, 10 if radius else 1):
                    logits = model(point)
                    exact = logits.gather(1, labels[:, None]) - logits
                    assert all((exact >= found - 1e-9).all() for found in margins)
                    if not radius:
                        torch.testing.assert_close(margins[0], exact, rtol=1e-6, atol=1e-6)


ENDS = [0.0, 1e-300, 1e-12, 1e-7, 1e-6, 1e-3, 0.1, 0.7, 1.0, 1.3, 2.0, 3.0, 5.0, 6.0, 17.0, 40.0, 1e3, 1e6]
GROWING_FAST = {torch.exp, torch.square, power}
SETTINGS: dict[Callable, list[tuple[Any, ...]]] = {
    F.leaky_relu: [(0.01,), (2.0,)],
    F.prelu: [(torch.tensor([value], dtype=torch.float64),) for value in (0.25, -0.5, 3.0)],
    torch.clamp: [(-0.4, 0.9), (None, 0.5), (0.3, None), (1.0, -1.0)],
    F.hardtanh: [(-1.0, 1.0)],
    F.elu: [(1.0,), (0.0,), (2.5,)],
    F.celu: [(1.0,), (0.2,)],
    F.softplus: [(1.0, 20.0), (5.0, 30.0)],
    gelu: [("none",), ("tanh",)],
    power: [(1,), (3,), (4,), (7,)],
    inverse_root: [(0.5,), (2.0,)],
}


def intervals(function: Callable) -> Box:
    """All intervals between ENDS and their negatives, degenerate ones too; narrow ones anywhere; within the domain."""
    generator = torch.Generator().manual_seed(0)
    ends = torch.tensor([end for end in ENDS if function not in GROWING_FAST or end < 6], dtype=torch.float64)
    positive = OPERATIONS[function].positive
    signed = ends if function is inverse_root else torch.cat([-ends, ends])  # of squares
    ends = ends[ends >= 1e-3] if positive else signed
    random = 4 * torch.randn(300, 1, generator=generator, dtype=torch.float64)
    random = random.abs() + 0.01 if positive or function is inverse_root else random
    width = 10.0 ** torch.randint(-14, 1, (300, 1), generator=generator).double()
    pairs = torch.cat([torch.cartesian_prod(ends, ends), torch.cat([random, random + width], 1)])
    return Box(pairs.amin(1)[None], pairs.amax(1)[None])


@each_elementwise
def test_boxes_and_lines_enclose_the_function_and_touch_it(function):
    for settings in SETTINGS.get(function, [()]):
        x = intervals(function)
        if function is F.prelu:  # whose weight is of channels
            x = Box(x.lower.T, x.upper.T)
        lines, values_box = RELAXATIONS[function](x, *settings), RULES[function](x, *settings)
        for share in torch.linspace(0, 1, 201, dtype=torch.float64):
            points = (x.lower + share * (x.upper - x.lower)).clamp(x.lower, x.upper)
            values = function(points, *settings)
            slack = 1e-9 * (1 + values.abs())
            assert values_box.contains(values, slack).all()
            assert (values - lines.below(points) >= -slack).all()
            assert (lines.above(points) - values >= -slack).all()
        narrow_ones = x.upper - x.lower < 1e-7
        for line in (lines.below, lines.above):
            gap = (line(x.lower) - function(x.lower, *settings)).abs()
            assert gap[narrow_ones].max() < 1e-3 if OPERATIONS[function].positive else gap[narrow_ones].max() < 1e-6
        exact = values_box.upper - values_box.lower
        assert exact[x.upper == x.lower].max() == 0


@each_elementwise
def test_lines_have_the_gradient_by_which_they_move_with_the_box(function):
    """On both sides of 0, on one, and near it, against central differences of each end in turn."""
    generator = torch.Generator().manual_seed(0)
    ends = 2 * torch.randn(2, 300, 1, generator=generator, dtype=torch.float64)
    ends[:, :100] *= 0.2
    ends = ends.abs() + 0.1 if OPERATIONS[function].positive or function is inverse_root else ends
    ends = torch.stack([ends.amin(0), ends.amax(0) + 0.05])
    points = ends[0] + torch.rand(ends[0].shape, generator=generator, dtype=torch.float64) * (ends[1] - ends[0])
    for settings in SETTINGS.get(function, [()]):

        def values(ends):
            lines = RELAXATIONS[function](Box(*ends), *settings)  # noqa: B023
            return torch.stack([lines.below(points), lines.above(points)])

        assert wrong_gradients(values, ends) <= 3  # where lines of other slopes become the better ones, and at kinks


@pytest.mark.parametrize("radius", [0.1, 1.0, 3.0])
def test_lines_of_normalized_values_have_the_gradient_by_which_they_move(radius):
    """They touch at a point that moves with the box: the least of all, so that its own moving counts for nothing."""
    generator = torch.Generator().manual_seed(0)
    center, width, share = torch.randn(3, 50, 6, generator=generator, dtype=torch.float64)
    ends = torch.stack([center - radius * width.abs(), center + radius * width.abs() + 0.05])
    points = ends[0] + share.sigmoid() * (ends[1] - ends[0])

    def values(ends):
        lines = normalized_lines(Box(*ends), (-1,), 1e-5)
        return torch.stack([lines.below(points), lines.above(points)])

    assert wrong_gradients(values, ends) <= 3


def wrong_gradients(values: Callable[[Tensor], Tensor], ends: Tensor) -> int:
    """How many rows of lines do not move as central differences say while all lower, or all upper, ends do."""
    wrong = 0
    for line, end in itertools.product(range(2), range(2)):
        moved = ends.clone().requires_grad_()
        (found,) = torch.autograd.grad(values(moved)[line].sum(), moved, allow_unused=True)
        step = torch.zeros_like(ends)
        step[end] = 1e-5
        expected = ((values(ends + step) - values(ends - step))[line] / 2e-5).sum(-1)
        along = torch.zeros_like(expected) if found is None else found[end].sum(-1)
        wrong += int(((along - expected).abs() > 1e-3 * (1 + expected.abs())).sum())
    return wrong


def test_minima_are_the_least_values():
    for function, operation in OPERATIONS.items():
        if operation.minimum is None:
            continue
        for settings in SETTINGS.get(function, [()]):
            least = torch.as_tensor(at_settings(operation.minimum, *settings), dtype=torch.float64)
            if least.isfinite():
                around = least + torch.linspace(-3, 3, 10001, dtype=torch.float64)
                assert function(around, *settings).min() >= function(least, *settings) - 1e-15


def test_curvatures_bound_the_second_derivative():
    x = torch.linspace(-15, 15, 6007, dtype=torch.float64)
    for function, operation in OPERATIONS.items():
        if not isinstance(operation.curve, Smooth):
            continue
        for settings in SETTINGS.get(function, [()]):
            first = torch.func.vmap(torch.func.grad(torch.func.grad(lambda v: function(v, *settings))))  # noqa: B023
            with torch.no_grad():
                kinks = at_settings(operation.curve.kinks, *settings)
            smooth = torch.stack([(x - kink).abs() > 1e-6 for kink in [*kinks, 1e9]]).all(0)
            bound = operation.curve.curvature(x.abs(), x.abs(), *settings)
            assert (first(x).abs() <= bound + 1e-9 * (1 + bound))[smooth].all(), operation.name


# --- domains, modes, sound rules --------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [torch.sqrt, torch.log, torch.reciprocal, torch.rsqrt], ids=name_of)
def test_boxes_outside_the_domain_are_refused_by_name(function):
    x = torch.rand(IMAGES, 4, dtype=torch.float64) + 0.5
    net = BoundedModel(network(function), x)
    net.ibp(linf_box(x, 0.1, clip=None))
    with pytest.raises(UnsupportedOperation, match=f"{function.__name__}.*above 0"):
        net.ibp(linf_box(x, 1.0, clip=None))


@pytest.mark.parametrize(
    ("layer", "shape", "named"),
    [
        (nn.LocalResponseNorm(2), (4, 3, 3), "LocalResponseNorm"),
        (nn.AlphaDropout(), (4, 3), "AlphaDropout"),
        (lambda x: F.normalize(x, dim=1), (4, 3), "normalize"),
        (lambda x: x[:, 0].T, (4, 3), "'T'"),
        (lambda x: torch.addbmm(x[0], x, x.mT), (3, 3), "addbmm"),
        (lambda x: torch.mean(x, 1, dtype=torch.float16), (4, 3), "dtype"),
        (lambda x: torch.sum(x, 1, dtype=torch.float32), (4, 3), "dtype"),
        (lambda x: torch.exp(x, out=torch.empty(0)), (4, 3), "out"),
        (lambda x: torch.clamp(x, 0, 1, out=torch.empty(0)), (4, 3), "out"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_has_no_rule_is_refused_by_name(layer, shape, named):
    x = torch.rand(IMAGES, *shape, dtype=torch.float64)
    with pytest.raises(UnsupportedOperation, match=named):
        BoundedModel(network(layer), x).ibp(linf_box(x, 0.0))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_dropout_of_channels_draws_one_mask_for_clean_input_and_box(dims):
    x = torch.rand(IMAGES, *(4, 2, 2, 2)[: dims + 1], dtype=torch.float64)
    model = nn.Sequential(getattr(nn, f"Dropout{dims}d")(0.5), nn.Flatten()).train()
    bounds = BoundedModel(model, x).ibp(linf_box(x, 0.0), clean=x)
    torch.testing.assert_close(bounds.output.center, bounds.clean)
    dropped = (bounds.clean == 0).view(IMAGES, 4, -1)
    assert (dropped.all(2) == dropped.any(2)).all()
    assert dropped.any()
    assert not dropped.all()


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_a_softmax_that_ends_the_network_leaves_the_margins_of_the_logits(name):
    torch.manual_seed(0)
    x, labels = torch.rand(IMAGES, 4, dtype=torch.float64), torch.tensor([0, 1, 2])
    layer, box = nn.Linear(4, 3).double(), linf_box(x, 0.1)
    expected = BoundedModel(layer, x).margins(box, labels)
    module = {"softmax": nn.Softmax, "log_softmax": nn.LogSoftmax}[name]
    heads = [module(1), module(-1)]
    for head in (getattr(torch, name), getattr(F, name), lambda x, dim: getattr(x, name)(dim)):
        heads += [Head(lambda x, head=head: head(x, 1)), Head(lambda x, head=head: head(x, dim=-1))]
    for head in heads:
        model = nn.Sequential(layer, head)
        torch.testing.assert_close(BoundedModel(model, x).margins(box, labels), expected)
    with pytest.raises(UnsupportedOperation, match=r"axis 0|one image"):
        BoundedModel(nn.Sequential(layer, module(0)), x)


@each_operation
def test_sound_boxes_hold_what_float32_computes(function):
    if function not in SOUND or OPERATIONS[function].affine is Affine.ONE:
        return
    example = EXAMPLES[function]
    for call in [call for call in all_calls(function) if isinstance(call, nn.Module)] or all_calls(function)[:2]:
        model = network(call).float()
        x = inputs(example).float()
        box = linf_box(x, 0.1, clip=None)
        try:
            output = BoundedModel(model, x).ibp(box, arithmetic="float32").output
        except UnsupportedOperation as error:
            assert "sound rule" in str(error)  # noqa: PT017
            continue
        for point in points_of(Box(box.lower.double(), box.upper.double()), 4):
            with torch.no_grad():
                assert output.contains(model(point.float()).double()).all()


@pytest.mark.parametrize("function", [gelu, F.elu, torch.exp, F.softplus, torch.tanh, torch.log], ids=name_of)
def test_transcendental_functions_have_no_sound_rule(function):
    x = inputs(EXAMPLES[function]).float()
    with pytest.raises(UnsupportedOperation, match=f"(?i){name_of(function)}.*no sound rule"):
        BoundedModel(Called(next(iter(all_calls(function)))), x).ibp(linf_box(x, 0.0, clip=None), arithmetic="float32")


def test_decompositions_are_called():
    covered = {spelling for example in EXAMPLES.values() for spelling in example.calls}
    in_attention = {F.scaled_dot_product_attention, _allowed}  # test_attention.py
    elsewhere = {"pow_", operator.ipow, *NORMALIZATIONS, *in_attention}
    assert DECOMPOSITIONS.keys() - covered - elsewhere == set()


@each_elementwise
def test_gradients_of_lines_and_boxes_are_finite(function):
    """Of degenerate and wide boxes too: torch.where hides a NaN, its gradient does not."""
    for settings in SETTINGS.get(function, [()]):
        x = intervals(function)
        kept = (x.upper < 20) & (x.lower > -20)
        ends = [end[kept][:, None].requires_grad_() for end in (x.lower, x.upper)]
        box = RULES[function](Box(*ends), *settings)
        results = [*RELAXATIONS[function](Box(*ends), *settings), box.lower, box.upper]
        for result in results:
            if result is not None and result.requires_grad:
                gradients = torch.autograd.grad(result.sum(), ends, retain_graph=True, allow_unused=True)
                assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)


@needs_auto_lirpa
@pytest.mark.parametrize(
    ("function", "methods"),
    [
        (torch.exp, ("ibp", "crown-ibp", "crown")),
        (lambda x: torch.log(x + 5), ("ibp", "crown-ibp", "crown")),
        (torch.abs, ("ibp",)),
        (lambda x: torch.sqrt(x + 5), ("ibp",)),
        (lambda x: x**2, ("ibp",)),
        (F.softplus, ("ibp",)),
    ],
    ids=["exp", "log", "abs", "sqrt", "square", "softplus"],
)
def test_margins_equal_auto_lirpa(function, methods):
    """Where it has the operation, and the same relaxation of it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), Called(function), nn.Linear(8, 3)).double().eval()
    x, labels = torch.rand(IMAGES, 4, dtype=torch.float64), torch.tensor([0, 1, 2])
    box = linf_box(x, 0.3, clip=None)
    for method in methods:
        with torch.no_grad():
            found = BoundedModel(model, x).margins(box, labels, method, intersect=False)
            expected = LirpaModel(model, x).margins(box, labels, method, intersect=False)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
