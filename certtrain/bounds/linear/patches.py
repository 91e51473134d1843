"""Coefficients of linear functions of a value, for each of B images R functions: dense, or zero outside a window.

A neuron of a convolution sees a window of what enters it, and a wider one of what came before. Pulling back only those
windows is what makes bounds of all of a convolution's neurons affordable. (Xu et al. 2020, arXiv 2002.12920)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from certtrain.bounds.batch_norm import scale_shift
from certtrain.bounds.box import Box
from certtrain.bounds.graph import Call, Ref, leaves, map_leaves
from certtrain.bounds.linear.relaxations import LinearRelaxation
from certtrain.bounds.operations.arithmetic import add, sub
from certtrain.bounds.operations.movement import cast, identity
from certtrain.bounds.shapes import flattened
from certtrain.per_axis import per_axis


@dataclass(frozen=True)
class Patches:
    """Coefficients (B, R, C, H, W), of maps, that are zero outside one window for each function.

    values: (B, R, h, w, C), channels last, so that what lies at a pixel is one row of memory; zero outside the map.
    corner: (B, R, 2) int64, the window's first row and column, which may be outside the map.
    size: (H, W) of the map.
    """

    values: Tensor
    corner: Tensor
    size: tuple[int, int]

    @classmethod
    def one_hot(cls, neurons: Tensor, shape: torch.Size, like: Tensor) -> Patches:
        """The values themselves of `neurons` (B, R), by position in a flattened map of `shape` (C, H, W)."""
        channels, height, width = shape
        pixel = neurons % (height * width)
        values = F.one_hot(neurons // (height * width), channels).to(like)[:, :, None, None]
        return cls(values, torch.stack([pixel // width, pixel % width], 2), (height, width))

    @property
    def window(self) -> tuple[int, int]:
        return self.values.shape[2], self.values.shape[3]

    @property
    def is_local(self) -> bool:
        """Is the window smaller than the map?"""
        return self.window[0] * self.window[1] < self.size[0] * self.size[1]

    def with_values(self, values: Tensor) -> Patches:
        return Patches(values, self.corner, self.size)

    def with_negative(self) -> Patches:
        """These functions, and then their negatives: (B, 2 R, ...)."""
        return Patches(torch.cat([self.values, -self.values], 1), self.corner.repeat(1, 2, 1), self.size)

    def masked(self) -> Patches:
        """Without what sticks out of the map."""
        rows, columns = self._positions()
        inside = ((rows >= 0) & (rows < self.size[0]))[..., :, None] & ((columns >= 0) & (columns < self.size[1]))[
            ..., None, :
        ]
        return self if bool(inside.all()) else self.with_values(self.values * inside[..., None])

    def pixels(self) -> Tensor:
        """(B, R, h, w) int64: where in the flattened map each entry is; the nearest pixel for those outside it."""
        rows, columns = self._positions()
        rows, columns = rows.clamp(0, self.size[0] - 1), columns.clamp(0, self.size[1] - 1)
        return rows[..., :, None] * self.size[1] + columns[..., None, :]

    def at(self, maps: Tensor) -> Tensor:
        """The part of `maps` (B, H, W, C) under each window: (B, R, h, w, C)."""
        pixels = self.pixels()
        images = torch.arange(len(maps), device=maps.device) * maps.shape[1:3].numel()
        index = (pixels + images.view(-1, 1, 1, 1)).flatten()
        return maps.flatten(0, 2).index_select(0, index).view(*pixels.shape, maps.shape[3])

    def dense(self) -> Tensor:
        """(B, R, C, H, W)."""
        batch, rows, *_, channels = self.values.shape
        pixels = self.pixels().flatten(0, 1).flatten(1)  # of entries outside the map, which are zero, any will do
        maps = self.values.new_zeros(batch * rows, self.size[0] * self.size[1], channels)
        values = self.values.flatten(0, 1).flatten(1, 2)
        maps = maps.scatter_add(1, pixels[..., None].expand_as(values), values)
        return maps.view(batch, rows, *self.size, channels).permute(0, 1, 4, 2, 3)

    def pulled_through(self, weight: Tensor, size: tuple[int, int], settings: Convolution) -> Patches:
        """Coefficients of what enters a convolution with this weight, of maps of `size`."""
        rows = self.values.flatten(0, 1).permute(0, 3, 1, 2)
        pulled = F.conv_transpose2d(
            rows, weight, None, settings.stride, 0, 0, settings.groups, settings.dilation
        ).permute(0, 2, 3, 1)
        stride = torch.tensor(settings.stride, device=self.corner.device)
        padding = torch.tensor(settings.padding, device=self.corner.device)
        values = pulled.contiguous().unflatten(0, self.values.shape[:2])
        return Patches(values, self.corner * stride - padding, size).masked()

    def _positions(self) -> tuple[Tensor, Tensor]:
        rows = self.corner[..., 0, None] + torch.arange(self.window[0], device=self.corner.device)
        columns = self.corner[..., 1, None] + torch.arange(self.window[1], device=self.corner.device)
        return rows, columns

    def __add__(self, other: Patches) -> Patches | Tensor:
        """Of windows that lie alike in each function the smallest that holds both; else dense."""
        first = torch.minimum(self.corner, other.corner)
        ends = [part.corner + torch.tensor(part.window, device=first.device) for part in (self, other)]
        height, width = (torch.maximum(*ends) - first).flatten(0, 1).amax(0).tolist()
        if height > self.size[0] or width > self.size[1]:
            return self.dense() + other.dense()
        total = self.values.new_zeros(*self.values.shape[:2], height, width, self.values.shape[4])
        for part in (self, other):
            offset = part.corner - first
            if bool((offset != offset[:1, :1]).any()):
                return self.dense() + other.dense()
            (top, left), (h, w) = offset[0, 0].tolist(), part.window
            total[:, :, top : top + h, left : left + w] += part.values
        return Patches(total, first, self.size)


@dataclass(frozen=True)
class Convolution:
    """How a convolution moves its kernel: a number for each axis of a map, rows first."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, call: Call) -> Convolution | None:
        """That of a call; None where the ends of an axis are padded by different numbers, as "same" may do."""
        _, weight, _, stride, padding, dilation, groups = call.args
        kernel = weight.shape[2:]
        stride, dilation = per_axis(stride, len(kernel)), per_axis(dilation, len(kernel))
        if padding == "valid":
            padding = 0
        elif padding == "same":
            both_ends = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
            if any(number % 2 for number in both_ends):
                return None
            padding = [number // 2 for number in both_ends]
        return cls(stride, per_axis(padding, len(kernel)), dilation, groups)

    def unread(self, size: Sequence[int], kernel: Sequence[int]) -> list[int]:
        """How much of a padded map lies behind the last place of the kernel, along each axis."""
        padded = [number + 2 * padding for number, padding in zip(size, self.padding, strict=True)]
        reach = [dilation * (number - 1) + 1 for dilation, number in zip(self.dilation, kernel, strict=True)]
        return [(whole - part) % step for whole, part, step in zip(padded, reach, self.stride, strict=True)]


Coefficients = Tensor | Patches


def added(x: Coefficients, y: Coefficients) -> Coefficients:
    if isinstance(x, Patches) and isinstance(y, Patches):
        return x + y
    return dense(x) + dense(y)


def dense(coefficients: Coefficients) -> Tensor:
    return coefficients.dense() if isinstance(coefficients, Patches) else coefficients


Contributions = list[tuple[Ref, Coefficients]]
Rule = Callable[[Call, Patches, Mapping[int, Box]], tuple[Contributions, Tensor] | None]


def through(lines: LinearRelaxation, a: Coefficients) -> tuple[Coefficients, Tensor]:
    """`a` pulled back through a relaxed function: the coefficients before it, and the constants (B, R)."""
    if isinstance(a, Patches):
        return _patches_through(lines, a)
    positive, negative = a.clamp(min=0), a.clamp(max=0)
    pulled = positive * lines.lower_slope[:, None] + negative * lines.upper_slope[:, None]
    return pulled, dot(positive, lines.lower_offset) + dot(negative, lines.upper_offset)


def _patches_through(lines: LinearRelaxation, a: Patches) -> tuple[Patches, Tensor]:
    """As `through`; the windows of all maps are taken at once."""
    known = [offset for offset in (lines.lower_offset, lines.upper_offset) if offset is not None]
    maps = a.at(_channels_last(lines.lower_slope, lines.upper_slope, *known))
    slope_below, slope_above, *offsets = maps.chunk(2 + len(known), -1)
    positive, negative = a.values.clamp(min=0), a.values.clamp(max=0)
    pulled = torch.addcmul(positive * slope_below, negative, slope_above)
    constant = a.values.new_zeros(a.values.shape[:2])
    for part, offset in ((positive, lines.lower_offset), (negative, lines.upper_offset)):
        if offset is not None:
            constant = constant + flattened(part * offsets.pop(0), 2).sum(2)
    return a.with_values(pulled), constant


def dot(a: Coefficients, values: Tensor | None) -> Tensor:
    """(B, R): a·values, which are (B, ...), or None for zeros."""
    if values is None:
        like = a.values if isinstance(a, Patches) else a
        return like.new_zeros(like.shape[:2])
    if isinstance(a, Patches):
        return flattened(a.values * a.at(_channels_last(values)), 2).sum(2)
    if a.dim() > 3 and a.stride(2) == 1:  # channels last: flattened as they lie, or they would have to be copied
        a, values = a.movedim(2, -1), values.movedim(1, -1)
    return torch.einsum("brn,bn->br", flattened(a, 2), flattened(values, 1))


def magnitude(a: Coefficients) -> Coefficients:
    return a.with_values(a.values.abs()) if isinstance(a, Patches) else a.abs()


def _channels_last(*maps: Tensor) -> Tensor:
    """(B, C, H, W) each -> (B, H, W, all of their channels)."""
    return torch.cat([part.permute(0, 2, 3, 1) for part in maps], -1)


def _same(call: Call, a: Patches, boxes: Mapping[int, Box]) -> tuple[Contributions, Tensor]:
    return [(call.args[0], a)], a.values.new_zeros(a.values.shape[:2])


def _scaled(call: Call, a: Patches, boxes: Mapping[int, Box]) -> tuple[Contributions, Tensor]:
    ref, scale, shift = call.args
    shape = boxes[ref.index].shape
    scale, shift = a.at(_channels_last(scale.expand(shape), shift.expand(shape))).chunk(2, -1)
    return [(ref, a.with_values(a.values * scale))], flattened(a.values * shift, 2).sum(2)


def _sum(sign: int) -> Rule:
    """x + y or x - y, of two values or of a value and a constant, without broadcasting a value."""

    def rule(call: Call, a: Patches, boxes: Mapping[int, Box]) -> tuple[Contributions, Tensor] | None:
        x, y, alpha = call.args
        contributions: Contributions = []
        constant = a.values.new_zeros(a.values.shape[:2])
        for argument, factor in ((x, 1), (y, sign * alpha)):
            if not isinstance(argument, Ref):
                shift = a.at(_channels_last(constant_map(factor * argument, boxes[call.index])))
                constant = constant + flattened(a.values * shift, 2).sum(2)
            elif boxes[argument.index].shape != boxes[call.index].shape:
                return None
            else:
                contributions.append((argument, a if factor == 1 else a.with_values(factor * a.values)))
        return contributions, constant

    return rule


def _scaling(call: Call, a: Patches, boxes: Mapping[int, Box]) -> tuple[Contributions, Tensor] | None:
    found = constant_factor(call, boxes)
    if found is None:
        return None
    ref, factor = found
    pulled = a.with_values(a.values * a.at(_channels_last(factor)))
    return [(ref, pulled)], a.values.new_zeros(a.values.shape[:2])


def constant_factor(call: Call, boxes: Mapping[int, Box]) -> tuple[Ref, Tensor] | None:
    """The value and the factor (B, ...) of x y, x / y or -x, y a constant; None where the value is broadcast."""
    (ref,) = leaves(call.args, Ref)
    box = boxes[call.index]
    if boxes[ref.index].shape != box.shape:
        return None
    one = torch.ones((), dtype=box.like.dtype, device=box.like.device)
    return ref, constant_map(call.function(*map_leaves(call.args, Ref, lambda _: one)), box)


def constant_map(value: Tensor | float, box: Box) -> Tensor:
    """A constant as broadcast beside the values of `box`: (B, ...)."""
    return torch.as_tensor(value, dtype=box.like.dtype, device=box.like.device).expand(box.shape)


def _conv2d(call: Call, a: Patches, boxes: Mapping[int, Box]) -> tuple[Contributions, Tensor] | None:
    x, weight, bias, *_ = call.args
    settings = Convolution.of(call)
    if settings is None:
        return None
    height, width = boxes[x.index].shape[2:]
    pulled = a.pulled_through(weight, (height, width), settings)
    constant = a.values.new_zeros(a.values.shape[:2]) if bias is None else a.values.sum((2, 3)) @ bias
    return [(x, pulled if pulled.is_local else pulled.dense())], constant


RULES: dict[Callable, Rule] = {
    identity: _same,
    cast: _same,
    Tensor.contiguous: _same,
    Tensor.clone: _same,
    scale_shift: _scaled,
    add: _sum(1),
    sub: _sum(-1),
    torch.mul: _scaling,
    torch.div: _scaling,
    torch.neg: _scaling,
    F.conv2d: _conv2d,
}
"""Of operations that keep windows windows; None of a rule, as any other operation, makes them dense."""
