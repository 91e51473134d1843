"""Several tensors into one, and one into several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from certtrain.bounds.operations.movement import moves, over
from certtrain.bounds.operations.preconditions import aligned, off_the_batch_axis, only
from certtrain.bounds.operations.record import DECOMPOSITIONS, Affine, Shape, define


def _bind_cat(tensors: Any, dim: int = 0, *, out: None = None) -> tuple[Any, ...]:
    only(out, None, "out")
    return list(tensors), dim


def _joins(parts: Any, dim: int) -> None:
    aligned(*parts)
    values = [part for part in parts if isinstance(part, Shape)]
    off_the_batch_axis(values[0].dims, dim)


def cat(parts: Sequence[Any], dim: int = 0) -> Tensor:
    """Constants that were recorded for one image are of any number."""
    images = max(len(part) for part in parts)
    return torch.cat([part if len(part) == images else part.expand(images, *part.shape[1:]) for part in parts], dim)


define(
    cat,
    _bind_cat,
    functions=(torch.cat, (torch.concat, _bind_cat), (torch.concatenate, _bind_cat)),
    affine=Affine.JOINTLY,
    require=_joins,
)


def _decompose_stack(call: Any, tensors: Any, dim: int = 0, *, out: None = None) -> Any:
    only(out, None, "out")
    return call(cat, [call(Tensor.unsqueeze, tensor, dim) for tensor in tensors], dim)


DECOMPOSITIONS[torch.stack] = _decompose_stack


# --- one tensor into several: the recorder asks for each part on its own ----------------------------------------------


def chunk(x: Tensor, chunks: int, dim: int, part: int) -> Tensor:
    return x.chunk(chunks, dim)[part]


def split(x: Tensor, sizes: Any, dim: int, part: int) -> Tensor:
    return x.split(sizes, dim)[part]


def unbind(x: Tensor, dim: int, part: int) -> Tensor:
    return x.unbind(dim)[part]


moves(
    chunk,
    lambda input, chunks, dim=0: (input, chunks, dim),
    over(1),
    functions=(torch.chunk,),
    methods=("chunk",),
    parts=True,
)
moves(
    split,
    lambda tensor, split_size_or_sections, dim=0: (tensor, split_size_or_sections, dim),
    over(1),
    functions=(torch.split,),
    methods=(("split", lambda self, split_size, dim=0: (self, split_size, dim)),),
    parts=True,
)
moves(unbind, lambda input, dim=0: (input, dim), over(0), functions=(torch.unbind,), methods=("unbind",), parts=True)
