"""What moves, repeats or drops elements, and computes nothing."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from certtrain.bounds.operations.inspections import type_of
from certtrain.bounds.operations.preconditions import (
    axes_of,
    batched,
    first_alone,
    off_the_batch_axis,
    only,
    require_that,
)
from certtrain.bounds.operations.record import (
    DECOMPOSITIONS,
    MODULES,
    OPERATIONS,
    Affine,
    Bind,
    Shape,
    anything,
    define,
)


def _sizes(*sizes: Any) -> tuple[Any, ...]:
    """`view(2, 3)` and `view((2, 3))` are the same."""
    return tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], tuple | list | torch.Size) else sizes


def moves(
    function: Callable, bind: Bind, require: Callable[..., None] = anything, view: bool = True, **spellings: Any
) -> None:
    define(function, bind, affine=Affine.FIRST, reshaping=True, view=view, require=require, **spellings)


def over(*positions: int) -> Callable[..., None]:
    """The settings at these positions (from 0) name axes, none of them the images'."""

    def require(x: Any, *settings: Any) -> None:
        first_alone(x, *settings)
        off_the_batch_axis(x.dims, *[axis for position in positions for axis in axes_of(settings[position])])

    return require


def identity(x: Tensor) -> Tensor:
    return x


define(
    identity,
    lambda input: (input,),
    affine=Affine.FIRST,
    reshaping=True,
    view=True,
    identity=lambda x: True,
    modules={nn.Identity: lambda m: ()},
)


def _flattens(x: Any, start_dim: int, end_dim: int) -> None:
    require_that(start_dim % x.dims != 0 or end_dim % x.dims == 0, "it folds the batch axis into another")


def _permutes(x: Any, dims: Any) -> None:
    require_that(dims[0] % x.dims == 0, "it moves the batch axis")


def _squeezes(x: Any, dim: Any) -> None:
    require_that(dim is not None, "it drops every axis of length 1, the batch axis of a single image too: say which")
    off_the_batch_axis(x.dims, *axes_of(dim))


def _unsqueezes(x: Any, dim: int) -> None:
    off_the_batch_axis(x.dims + 1, dim)


def _indexes(x: Any, index: Any) -> None:
    """The first axis is taken whole, and stays the first."""
    items = index if isinstance(index, tuple) else (index,)
    require_that(not any(isinstance(item, Shape) for item in items), "an index that depends on the input has no rule")
    explicit = sum(_indexed_axes(item) for item in items)
    first = items[0] if items else Ellipsis
    whole = (first is Ellipsis and explicit < x.dims) or (isinstance(first, slice) and first == slice(None))
    require_that(whole, "it takes some of the images only, or adds an axis before theirs: write x[:, ...]")
    advanced = [position for position, item in enumerate(items) if isinstance(item, Tensor | list)]
    adjacent = not advanced or advanced[-1] - advanced[0] == len(advanced) - 1
    require_that(adjacent, "index tensors with a slice between them move their axes to the front")


def _indexed_axes(item: Any) -> int:
    """How many axes of the indexed value one item of an index takes: a mask as many as it has."""
    if isinstance(item, Tensor) and item.dtype in (torch.bool, torch.uint8):
        return item.dim()
    return int(item is not None and item is not Ellipsis)


def _bind_pad(input: Any, pad: Any, mode: str = "constant", value: float | None = None) -> tuple[Any, ...]:
    """Without pairs of 0 for the first axes, which ONNX writes down."""
    pad = tuple(pad)
    while mode == "constant" and len(pad) > 2 and pad[-2:] == (0, 0):
        pad = pad[:-2]
    return input, pad, mode, value


def _pads(x: Any, pad: Any, mode: str, value: Any) -> None:
    first_alone(x, pad, value)
    require_that(len(pad) // 2 < x.dims, "it pads the batch axis")
    require_that(value is None or math.isfinite(value), f"padding with {value!r} has no rule")


def reshape(x: Tensor, shape: Any) -> Tensor:
    return x.reshape(_sizes(*shape) if isinstance(shape, tuple | list) else shape)


def cast(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """As real mathematics nothing: values keep the type they are computed in."""
    return x


def _decompose_to(call: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
    """`x.to(dtype)`, `x.to(device)`, `x.to(device, dtype)`, `x.to(tensor)`; where to it is moved does not matter."""
    kinds = (kwargs.pop("dtype", None), *args)
    for ignored in ("device", "non_blocking", "copy", "memory_format"):
        kwargs.pop(ignored, None)
    require_that(not kwargs, f"to({', '.join(kwargs)}=...) has no rule")
    return call(cast, input, call(type_of, *kinds))


def _casts(x: Any, dtype: Any) -> None:
    require_that(dtype in (None, torch.float32, torch.float64), f"a cast to {dtype} has no rule")


moves(
    cast,
    lambda x, dtype=None: (x, dtype),
    _casts,
    methods=(
        ("float", lambda input: (input, torch.float32)),
        ("cpu", lambda input: (input, None)),
        ("double", lambda input: (input, torch.float64)),
        ("half", lambda input: (input, torch.float16)),
        ("bfloat16", lambda input: (input, torch.bfloat16)),
        ("long", lambda input: (input, torch.int64)),
        ("int", lambda input: (input, torch.int32)),
        ("bool", lambda input: (input, torch.bool)),
        ("cuda", lambda input, *device: (input, None)),
    ),
)
DECOMPOSITIONS |= {"to": _decompose_to, "type_as": lambda call, input, other: call(cast, input, call(type_of, other))}
moves(
    torch.flatten,
    lambda input, start_dim=0, end_dim=-1: (input, start_dim, end_dim),
    _flattens,
    methods=("flatten",),
    modules={nn.Flatten: lambda m: (m.start_dim, m.end_dim)},
)
moves(
    reshape,
    lambda input, *shape: (input, _sizes(*shape)),
    methods=("view", "reshape"),
    functions=((torch.reshape, lambda input, shape: (input, shape)),),
)
DECOMPOSITIONS["view_as"] = lambda call, input, other: call(reshape, input, call(getattr, other, "shape"))
DECOMPOSITIONS["reshape_as"] = DECOMPOSITIONS["view_as"]
moves(
    Tensor.permute,
    lambda input, *dims: (input, _sizes(*dims)),
    _permutes,
    methods=("permute",),
    functions=((torch.permute, lambda input, dims: (input, dims)),),
)
moves(
    Tensor.transpose,
    lambda input, dim0, dim1: (input, dim0, dim1),
    over(0, 1),
    functions=(torch.transpose, (torch.swapaxes, lambda input, axis0, axis1: (input, axis0, axis1)), torch.swapdims),
    methods=("transpose", ("swapaxes", lambda input, axis0, axis1: (input, axis0, axis1)), "swapdims"),
)
moves(Tensor.squeeze, lambda input, dim=None: (input, dim), _squeezes, functions=(torch.squeeze,), methods=("squeeze",))
moves(
    Tensor.unsqueeze, lambda input, dim: (input, dim), _unsqueezes, functions=(torch.unsqueeze,), methods=("unsqueeze",)
)
moves(
    Tensor.unflatten,
    lambda input, dim, sizes: (input, dim, tuple(sizes)),
    over(0),
    functions=(torch.unflatten,),
    methods=("unflatten",),
    modules={nn.Unflatten: lambda m: (m.dim, tuple(m.unflattened_size))},
)
moves(Tensor.contiguous, lambda input, memory_format=None: (input,), methods=("contiguous",))
moves(
    Tensor.clone, lambda input, memory_format=None: (input,), view=False, methods=("clone",), functions=(torch.clone,)
)
moves(Tensor.detach, lambda input: (input,), methods=("detach",), functions=(torch.detach,))
moves(operator.getitem, lambda x, index: (x, index), _indexes, methods=("__getitem__",))
define(F.pad, _bind_pad, affine=Affine.FIRST, increasing=True, require=_pads)


DIFFERENTIABLE: dict[Callable[..., Any], Callable[..., Any]] = {Tensor.detach: identity}
"""Of functions whose derivative is no transpose (that of `detach` is 0, as of a constant): the same maps with one."""


def differentiable(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same map where derivatives are taken to transpose it."""
    return DIFFERENTIABLE.get(function, function)


for _suffix in ("1d", "2d", "3d"):  # of modules that call it; what they pad with they hold themselves
    MODULES |= {
        getattr(nn, f"{_kind}{_suffix}"): (OPERATIONS[F.pad], _settings)
        for _kind, _settings in (
            ("ZeroPad", lambda m: (tuple(m.padding), "constant", 0.0)),
            ("ConstantPad", lambda m: (tuple(m.padding), "constant", m.value)),
            ("ReflectionPad", lambda m: (tuple(m.padding), "reflect", None)),
            ("ReplicationPad", lambda m: (tuple(m.padding), "replicate", None)),
            ("CircularPad", lambda m: (tuple(m.padding), "circular", None)),
        )
    }


def narrow(x: Tensor, dim: int, start: int, length: int) -> Tensor:
    return x.narrow(dim, start, length)


def _rolls(x: Any, shifts: Any, dims: Any) -> None:
    require_that(
        dims is not None and dims != (), "it rolls over all axes together, and would mix images: name the axes"
    )
    over(1)(x, shifts, dims)


def _repeats(x: Any, repeats: tuple[Any, ...]) -> None:
    first_alone(x, *repeats)
    require_that(len(repeats) <= x.dims, "it adds an axis before the images'")
    require_that(len(repeats) < x.dims or repeats[0] == 1, "it repeats the images")


def _expands(x: Any, sizes: Any) -> None:
    first_alone(x, *sizes)
    require_that(len(sizes) == x.dims and sizes[0] in (-1, x[0]), "it adds an axis before the images', or more images")


def expand(x: Tensor, sizes: Any) -> Tensor:
    """However many images there are: a record of one is asked about many."""
    return x.expand(-1, *_sizes(*sizes)[1:])


def _moves_axes(x: Any, source: Any, destination: Any) -> None:
    first_alone(x, source, destination)
    for axes in (axes_of(source), axes_of(destination)):
        off_the_batch_axis(x.dims, *axes)


moves(
    narrow,
    lambda input, dim, start, length: (input, dim, start, length),
    over(0),
    functions=(torch.narrow,),
    methods=("narrow",),
)
moves(
    torch.select,
    lambda input, dim, index: (input, dim, index),
    over(0),
    methods=("select",),
)


def _bind_index_select(input: Any, dim: Any, index: Any, *, out: None = None) -> tuple[Any, ...]:
    only(out, None, "out")
    return input, dim, index


moves(
    torch.index_select,
    _bind_index_select,
    over(0),
    view=False,
    methods=("index_select",),
)
moves(
    torch.flip,
    lambda input, dims: (input, dims),
    over(0),
    view=False,
    methods=(("flip", lambda input, *dims: (input, _sizes(*dims))),),
)
moves(
    torch.roll,
    lambda input, shifts, dims=None: (input, shifts, dims),
    _rolls,
    view=False,
    methods=("roll",),
)
moves(
    Tensor.repeat,
    lambda input, *repeats: (input, _sizes(*repeats)),
    _repeats,
    view=False,
    methods=("repeat",),
)
moves(
    torch.tile,
    lambda input, dims: (input, dims),
    _repeats,
    view=False,
    methods=(("tile", lambda input, *dims: (input, _sizes(*dims))),),
)
moves(expand, lambda input, *sizes: (input, _sizes(*sizes)), _expands, methods=("expand",))
DECOMPOSITIONS["expand_as"] = lambda call, input, other: call(expand, input, call(getattr, other, "shape"))
moves(
    torch.movedim,
    lambda input, source, destination: (input, source, destination),
    _moves_axes,
    functions=(torch.moveaxis,),
    methods=("movedim", "moveaxis"),
)
moves(
    F.pixel_shuffle,
    lambda input, upscale_factor: (input, upscale_factor),
    batched(4),
    view=False,
    functions=(torch.pixel_shuffle,),
    modules={nn.PixelShuffle: lambda m: (m.upscale_factor,)},
)
moves(
    F.pixel_unshuffle,
    lambda input, downscale_factor: (input, downscale_factor),
    batched(4),
    view=False,
    functions=(torch.pixel_unshuffle,),
    modules={nn.PixelUnshuffle: lambda m: (m.downscale_factor,)},
)
moves(
    F.channel_shuffle,
    lambda input, groups: (input, groups),
    batched(3, 4, 5),
    view=False,
    functions=(torch.channel_shuffle,),
    modules={nn.ChannelShuffle: lambda m: (m.groups,)},
)
