"""The short warmup's regularizers as terms of a step: functions of the whole batch, in however many parts it comes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from certtrain.bounds import Bounder, Bounds, Box
from certtrain.errors import UsageError
from certtrain.regularizers import Moments, moments, relu_balance_of, tightness_of
from certtrain.runtime.distributed import Ranks
from certtrain.training.losses import Metrics


@dataclass(frozen=True)
class Regularization:
    """Bound tightness and ReLU balance. (Shi et al. 2021, arXiv 2103.17268, section 3.3.)

    weight: λ, of both until epsilon moves; it fades as λ·(1 - share of epsilon's way that is done), which from 0 is
    λ·(1 - eps / max_eps).
    tightness, relu_balance: which of the two to use; tolerance: their τ.
    """

    weight: float = 0.5
    tightness: bool = True
    relu_balance: bool = True
    tolerance: float = 0.5

    @property
    def is_used(self) -> bool:
        return self.weight > 0 and (self.tightness or self.relu_balance)

    def require(self, net: Bounder) -> None:
        """Raises UsageError if the network has no activation whose states the terms could be functions of."""
        if not net.rectifiers:
            raise UsageError(
                "the network has no ReLU for the regularizers to look at: set regularizers.weight to 0, "
                "or both regularizers.tightness and regularizers.relu_balance to false"
            )

    def terms(self, sums: BatchSums, eps_ratio: Tensor) -> Metrics:
        """The weighted terms."""
        weight = self.weight * (1 - eps_ratio)
        terms: Metrics = {}
        if self.tightness:
            terms["tightness_loss"] = weight * tightness_of(sums.layers, sums.input_radius, self.tolerance)
        if self.relu_balance:
            terms["relu_balance_loss"] = weight * relu_balance_of(sums.layers, self.tolerance)
        return terms


@dataclass(frozen=True)
class BatchSums:
    """Sums over a batch, or over a part of it, that some losses are functions of.

    layers: moments of the box before each ReLU.
    first: those of the box that enters the first affine layer.
    losses: a method's losses, each a mean over a part times the part's share of the batch.
    """

    layers: tuple[Moments, ...]
    first: Moments
    losses: Mapping[str, Tensor]

    @classmethod
    def of(cls, bounds: Bounds, losses: Mapping[str, Tensor], share: float) -> BatchSums:
        scaled = {name: share * value for name, value in losses.items()}
        return cls(tuple(_moments(seen) for seen in bounds.relu_inputs), _moments(bounds.affine_input), scaled)

    @property
    def input_radius(self) -> Tensor:
        return self.first.radius / self.first.elements

    def plus(self, other: BatchSums) -> BatchSums:
        layers = zip(self.layers, other.layers, strict=True)
        losses = {name: value + other.losses[name] for name, value in self.losses.items()}
        return BatchSums(tuple(a.plus(b) for a, b in layers), self.first.plus(other.first), losses)

    def over(self, ranks: Ranks) -> BatchSums:
        """The sums over all ranks' shares of the batch, with gradient."""
        if ranks.world_size == 1:
            return self
        each = (*self.layers, self.first)
        numbers = [value for one in each for value in one] + list(self.losses.values())
        sums = ranks.all_reduce(torch.stack(numbers)).split([len(self.first)] * len(each) + [len(self.losses)])
        *layers, first = (Moments(*one.unbind()) for one in sums[:-1])
        return BatchSums(tuple(layers), first, dict(zip(self.losses, sums[-1].unbind(), strict=True)))

    def completed_by(self, whole: BatchSums) -> BatchSums:
        """`whole`, with gradient through this part of it only."""
        layers = zip(self.layers, whole.layers, strict=True)
        losses = {name: part + (whole.losses[name] - part).detach() for name, part in self.losses.items()}
        return BatchSums(tuple(a.completed_by(b) for a, b in layers), self.first.completed_by(whole.first), losses)


def _moments(seen: Box | Moments) -> Moments:
    return seen if isinstance(seen, Moments) else moments(seen)
