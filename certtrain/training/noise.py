"""Random numbers that are a pure function of a key and of where they are used; no generator has a state to save.

An image then draws the same whichever process, part of a batch or device works on it, and a resumed run draws on as
if it had never stopped. (Counter-based generators: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_32_BITS = 2**32 - 1


def mixed(x: Tensor) -> Tensor:
    """A bijection of the 32-bit integers that leaves no pattern of its argument visible; int64, elementwise.

    The multipliers are those of C. Wellons' search for hash functions ("hash-prospector"), small enough that no product
    leaves the 64 bits.
    """
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _32_BITS
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _32_BITS
    return x ^ (x >> 15)


def step_keys(seed: int, steps: Tensor) -> Tensor:
    """A key for each step (int64, any shape) of the run that has this seed."""
    return mixed(mixed(torch.full_like(steps, seed & _32_BITS)) ^ (steps & _32_BITS))


def uniform(key: Tensor, positions: Tensor, shape: Sequence[int], like: Tensor, draw: int = 0) -> Tensor:
    """Numbers in [0, 1), one for each element of each image.

    Args:
        key: scalar int64, of the step.
        positions: (B,) int64, of the images in the whole batch.
        shape: of one image; the result is (B, *shape), of `like`'s type.
        draw: which of several draws that a step makes.
    """
    return ((_bits(key, positions, shape, draw) >> 8).to(like.dtype) / 2**24).view(len(positions), *shape)


def normal(key: Tensor, positions: Tensor, shape: Sequence[int], like: Tensor, draw: int = 0) -> Tensor:
    """Standard normal numbers, between -5.3 and 5.3, as `uniform` draws others."""
    within = ((_bits(key, positions, shape, draw) >> 9).to(like.dtype) + 0.5) / 2**23  # exact in float32: never 0 or 1
    return torch.special.ndtri(within).view(len(positions), *shape)


def _bits(key: Tensor, positions: Tensor, shape: Sequence[int], draw: int) -> Tensor:
    """32 of them, for each element of `shape` at each position."""
    of_position = mixed(mixed(key ^ mixed(torch.full_like(key, draw + 1))) ^ positions)
    elements = mixed(torch.arange(math.prod(shape), device=positions.device))
    return mixed(of_position[:, None] ^ elements)
