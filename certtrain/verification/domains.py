"""What branch and bound knows while it searches: domains, with their slopes and multipliers, of each image."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from certtrain.verification.verdicts import Verdict

BLOCK = 32  # vectors of slopes


@dataclass(frozen=True)
class Split:
    """A neuron, by its position among all (`Neurons`), at least or at most a threshold."""

    neuron: int
    threshold: float
    above: bool


@dataclass(frozen=True)
class Leaf:
    """A domain that is proved: z_y - z_j > 0 on it.

    slopes: (U,), of the image's undecided neurons; multipliers: one for each split.
    """

    target: int
    splits: tuple[Split, ...]
    slopes: Tensor
    multipliers: Tensor
    lower: float


class Slopes:
    """Vectors of slopes by number, held in blocks: so many small tensors, one by one, would leave holes in the heap."""

    def __init__(self) -> None:
        self.blocks: list[Tensor] = []
        self.free: list[int] = []

    def put(self, slopes: Tensor) -> int:
        if not self.free:
            start = BLOCK * len(self.blocks)
            self.blocks.append(slopes.new_empty(BLOCK, len(slopes)))
            self.free += reversed(range(start, start + BLOCK))
        number = self.free.pop()
        self[number].copy_(slopes)
        return number

    def __getitem__(self, number: int) -> Tensor:
        return self.blocks[number // BLOCK][number % BLOCK]

    def drop(self, number: int) -> None:
        self.free.append(number)


@dataclass(order=True)
class Domain:
    """Waiting to be split, ordered by its bound; or a leaf."""

    lower: float
    number: int
    target: int = field(compare=False)
    splits: tuple[Split, ...] = field(compare=False)
    slopes: int = field(compare=False)  # their number among the image's
    multipliers: np.ndarray = field(compare=False)


@dataclass
class ImageSearch:
    """The state of one image's search."""

    position: int
    label: int
    lower: Tensor  # (K,), of the classes without a tree
    undecided: Tensor  # neurons, positions
    roots: list[Domain] = field(default_factory=list)  # those that are not bounded yet, of classes without a proof
    waiting: list[Domain] = field(default_factory=list)
    leaves: list[Domain] = field(default_factory=list)
    splits: int = 0  # of those leaves, together
    slopes: Slopes = field(default_factory=Slopes)  # of the undecided neurons, of these domains
    worst: dict[int, float] = field(default_factory=dict)  # by class, of its leaves
    domains: int = 0
    seconds: float = 0.0
    point: Tensor | None = None
    verdict: Verdict | None = None

    def leaf(self, domain: Domain) -> Leaf:
        """One of `leaves`, to be kept."""
        slopes = self.slopes[domain.slopes].clone()
        multipliers = torch.from_numpy(domain.multipliers).to(slopes.device)
        return Leaf(domain.target, domain.splits, slopes, multipliers, domain.lower)

    def give_up(self) -> None:
        """What waits is not searched: its bounds are what is left of it."""
        for domain in self.waiting:
            self.worst[domain.target] = min(domain.lower, self.worst.get(domain.target, torch.inf))
        self.forget()

    def forget(self) -> None:
        self.roots, self.waiting, self.leaves, self.slopes = [], [], [], Slopes()
