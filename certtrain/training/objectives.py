"""What a training step minimises, and its gradient.

One step takes a batch through the network once, clean input and box together, and gets from that joint pass the
loss, the regularizers and the step's metrics. Everything stays on the device; nothing here waits for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from certtrain.bounds import BoundedModel, Bounds, Box, linf_box
from certtrain.bounds.batch_norm import Coefficients
from certtrain.bounds.linear import fused_cross_entropy
from certtrain.initialization import AFFINE_MODULES
from certtrain.regularizers import Moments, l1_penalty, moments, relu_balance_of, tightness_of
from certtrain.runtime.compilation import Compiled
from certtrain.runtime.distributed import ALONE, Ranks
from certtrain.runtime.precision import Precision, training_precision

Metrics = dict[str, Tensor]  # scalars, means over the batch

SMALLEST_RADIUS = 1e-6  # of the box that the regularizers look at while epsilon is 0


class Phase(Enum):
    """What is minimised at this point of the schedule; a step is compiled once for each."""

    NATURAL = "natural"  # cross-entropy of the clean logits, no bounds at all
    BEFORE = "before"  # epsilon is 0: natural cross-entropy and the regularizers
    WARMUP = "warmup"  # epsilon grows: robust cross-entropy and the regularizers, which fade
    FULL = "full"  # epsilon has reached its maximum: robust cross-entropy alone, by IBP


@dataclass(frozen=True)
class Objective:
    """The loss of certified training, as a function of a batch.

    Args:
        net: the network.
        method: "natural" without bounds, "ibp", or "crown-ibp": margins are β·CROWN-IBP + (1 - β)·IBP with
            β = 1 - eps / max_eps.
        loss_fusion: bound the cross-entropy itself, one backward row instead of one for each class (crown-ibp).
        regularization: weight λ of the two regularizers while epsilon is 0.
        tightness, relu_balance: which of the two to use.
        tolerance: their τ.
        l1: weight of the sum of absolute values of all convolution and linear weights.
        activation_checkpointing: backward computes the boxes again instead of keeping them (ibp).
        accumulation: number of parts a batch is worked through in; the gradient is the whole batch's in any case.
        precision: of the products.
        compile_for: (whole) batches of this size take a compiled step, others an eager one, as does any in parts.
        ranks: the processes that have a share of each batch; `net` must have been given their `sum`.
    """

    net: BoundedModel
    method: str = "ibp"
    loss_fusion: bool = False
    regularization: float = 0.5
    tightness: bool = True
    relu_balance: bool = True
    tolerance: float = 0.5
    l1: float = 0.0
    activation_checkpointing: bool = False
    accumulation: int = 1
    precision: Precision = "float32"
    compile_for: int | None = None
    ranks: Ranks = ALONE

    def __post_init__(self) -> None:
        # A compiled method belongs to one objective: its graph holds this network's parameters.
        object.__setattr__(self, "_compiled_terms", Compiled(self._terms) if self.compile_for else None)
        in_parts = self.accumulation > 1
        step = self._eager_or_compiled_terms
        object.__setattr__(self, "_step", None if in_parts else self.ranks.synchronized(self.net.model, step))

    def phase(self, eps: float, max_eps: float) -> Phase:
        if self.method == "natural":
            return Phase.NATURAL
        if eps == 0:
            return Phase.BEFORE if self._regularizes else Phase.NATURAL
        return Phase.WARMUP if eps < max_eps else Phase.FULL

    def backward(
        self, images: Tensor, labels: Tensor, eps: Tensor, progress: Tensor, phase: Phase, size: int | None = None
    ) -> Metrics:
        """Add the gradient of the batch's loss to the parameters' `.grad`; updates BatchNorm's running statistics.

        Args:
            images: (B, C, H, W) in [0, 1]; labels: (B,). Of a batch that other ranks have a share of, this rank's.
            eps: the radius now, a scalar tensor; progress: eps / max_eps.
            size: images in the whole batch, if not B.

        Returns:
            `loss`, its terms, `natural_error` and (where margins are bounded) `verified_error` of the whole batch.
        """
        size = size or len(images)
        with training_precision(self.precision, images.device):
            if self.accumulation == 1:
                terms = _scaled(self._step(size, images, labels, eps, progress, phase), len(images) / size)
                _total(terms).backward()
            else:
                terms = self._backward_in_parts(images, labels, eps, progress, phase, size)
                self.ranks.sum_gradients(self.net.model)
        metrics = {"loss": _total(terms), **terms}
        values = self.ranks.sum(torch.stack([value.detach() for value in metrics.values()]))
        return dict(zip(metrics, values.unbind(), strict=True))

    def _eager_or_compiled_terms(self, size: int, *arguments: Any) -> Metrics:
        if size != self.compile_for:
            return self._terms(*arguments)
        _ = self.net.graph  # recorded, if need be, before anything is compiled
        return self._compiled_terms(*arguments)

    def _terms(self, images: Tensor, labels: Tensor, eps: Tensor, progress: Tensor, phase: Phase) -> Metrics:
        if phase is Phase.NATURAL:
            return self._clean_terms(self.net.clean_pass(images).output, labels, phase)
        box = _box(images, eps, phase)
        if self.activation_checkpointing:
            clean = self.net.clean_pass(images)
            logits, bounds = clean.output, self._bounds(box, clean.coefficients, phase)
        else:
            bounds = self.net.ibp(box, clean=images, record=self._goes_backward(phase))
            logits = bounds.clean
        terms = self._clean_terms(logits, labels, phase) | self._robust_terms(bounds, labels, progress, phase)
        if phase is Phase.FULL or not self._regularizes:
            return terms
        return terms | self._regularizer_terms(BatchSums.of(bounds).over(self.ranks), progress)

    def _bounds(self, box: Box, coefficients: Mapping[int, Coefficients], phase: Phase) -> Bounds:
        """Of a box whose clean input has gone ahead."""
        if self.activation_checkpointing:
            observe = moments if self._regularizes and phase is not Phase.FULL else _nothing
            return self.net.ibp_in_segments(box, coefficients, observe)
        return self.net.ibp(box, coefficients=coefficients, record=self._goes_backward(phase))

    def _backward_in_parts(
        self, images: Tensor, labels: Tensor, eps: Tensor, progress: Tensor, phase: Phase, size: int
    ) -> Metrics:
        """The gradient of `_terms`, in less memory.

        The clean pass takes the whole batch, so that BatchNorm sees all of it. The boxes follow in parts, with copies
        of the BatchNorm coefficients; the gradient that gathers in those copies goes back through the clean pass
        at the end. The regularizers are functions of sums over the batch, which a first walk gathers.
        """
        clean = self.net.clean_pass(images)
        terms = _scaled(self._clean_terms(clean.output, labels, phase), len(images) / size)
        pending = [(_total(terms), None)] if terms.keys() & LOSS_TERMS else []
        if phase is not Phase.NATURAL:
            copies = {i: tuple(c.detach().requires_grad_() for c in pair) for i, pair in clean.coefficients.items()}
            parts = list(zip(images.chunk(self.accumulation), labels.chunk(self.accumulation), strict=True))
            regularizes = phase is not Phase.FULL and self._regularizes
            whole = self._sums_over(parts, copies, eps, phase) if regularizes else None
            for part, part_labels in parts:
                box = _box(part, eps, phase)
                bounds = self._bounds(box, copies, phase)
                share = len(part) / size
                robust = _scaled(self._robust_terms(bounds, part_labels, progress, phase), share)
                sums = None if whole is None else BatchSums.of(bounds).completed_by(whole)
                regularizers = {} if sums is None else self._regularizer_terms(sums, progress)
                _total(robust | regularizers).backward()
                mine = robust | _scaled(regularizers, share)
                terms |= {name: terms.get(name, 0) + value.detach() for name, value in mine.items()}
            for index, pair in clean.coefficients.items():
                pending += [(c, copy.grad) for c, copy in zip(pair, copies[index], strict=True) if c.requires_grad]
        tensors, gradients = zip(*pending, strict=True)
        torch.autograd.backward(tensors, gradients)
        return terms

    def _sums_over(
        self,
        parts: Sequence[tuple[Tensor, Tensor]],
        coefficients: Mapping[int, Coefficients],
        eps: Tensor,
        phase: Phase,
    ) -> BatchSums:
        with torch.no_grad():
            sums = [BatchSums.of(self.net.ibp(_box(part, eps, phase), coefficients=coefficients)) for part, _ in parts]
            return reduce(BatchSums.plus, sums).over(self.ranks)

    @property
    def _regularizes(self) -> bool:
        return self.regularization > 0 and (self.tightness or self.relu_balance)

    def _clean_terms(self, logits: Tensor, labels: Tensor, phase: Phase) -> Metrics:
        terms: Metrics = {"natural_error": (logits.argmax(1) != labels).to(logits.dtype).mean()}
        if phase in (Phase.NATURAL, Phase.BEFORE):
            terms["natural_loss"] = F.cross_entropy(logits, labels)
        if self.l1:
            terms["l1_loss"] = self.l1 * l1_penalty(affine_weights(self.net.model))
        return terms

    def _goes_backward(self, phase: Phase) -> bool:
        return self.method == "crown-ibp" and phase is Phase.WARMUP

    def _robust_terms(self, bounds: Bounds, labels: Tensor, progress: Tensor, phase: Phase) -> Metrics:
        if phase is Phase.BEFORE:
            return {}
        margins = self.net.margins_of(bounds, labels)
        if self._goes_backward(phase) and self.loss_fusion:
            loss = fused_cross_entropy(bounds, labels, share=1 - progress).mean()
        else:
            if self._goes_backward(phase):
                margins = (1 - progress) * self.net.margins_of(bounds, labels, "crown-ibp") + progress * margins
            loss = F.cross_entropy(-margins, labels)
        return {"robust_loss": loss, "verified_error": 1 - proved(margins).to(margins.dtype).mean()}

    def _regularizer_terms(self, sums: BatchSums, progress: Tensor) -> Metrics:
        weight = self.regularization * (1 - progress)
        terms: Metrics = {}
        if self.tightness:
            terms["tightness_loss"] = weight * tightness_of(sums.layers, sums.input_radius, self.tolerance)
        if self.relu_balance:
            terms["relu_balance_loss"] = weight * relu_balance_of(sums.layers, self.tolerance)
        return terms


@dataclass(frozen=True)
class BatchSums:
    """The moments of every ReLU's input box, and those of the box that enters the first affine layer."""

    layers: tuple[Moments, ...]
    first: Moments

    @classmethod
    def of(cls, bounds: Bounds) -> BatchSums:
        return cls(tuple(_moments(seen) for seen in bounds.relu_inputs), _moments(bounds.affine_input))

    @property
    def input_radius(self) -> Tensor:
        return self.first.radius / self.first.elements

    def plus(self, other: BatchSums) -> BatchSums:
        layers = zip(self.layers, other.layers, strict=True)
        return BatchSums(tuple(a.plus(b) for a, b in layers), self.first.plus(other.first))

    def over(self, ranks: Ranks) -> BatchSums:
        """The sums over all ranks' shares of the batch, with gradient."""
        if ranks.size == 1:
            return self
        each = (*self.layers, self.first)
        sums = ranks.sum(torch.stack([value for one in each for value in one])).unflatten(0, (len(each), -1))
        *layers, first = (Moments(*one.unbind()) for one in sums)
        return BatchSums(tuple(layers), first)

    def completed_by(self, whole: BatchSums) -> BatchSums:
        """`whole`, with gradient through this part of it only."""
        layers = zip(self.layers, whole.layers, strict=True)
        return BatchSums(tuple(a.completed_by(b) for a, b in layers), self.first.completed_by(whole.first))


LOSS_TERMS = {"natural_loss", "robust_loss", "tightness_loss", "relu_balance_loss", "l1_loss"}


def _scaled(terms: Metrics, share: float) -> Metrics:
    """Means over a part as terms of the whole batch's mean, of which the part is this share."""
    return terms if share == 1 else {name: share * value for name, value in terms.items()}


def _total(terms: Metrics) -> Tensor:
    return torch.stack([value for name, value in terms.items() if name in LOSS_TERMS]).sum()


def proved(margins: Tensor) -> Tensor:
    """(B,) bool: every margin (B, K) but the label's own is positive."""
    return (margins > 0).sum(1) == margins.shape[1] - 1


def affine_weights(model: nn.Module) -> list[Tensor]:
    return [module.weight for module in model.modules() if isinstance(module, AFFINE_MODULES)]


def _moments(seen: Box | Moments) -> Moments:
    return seen if isinstance(seen, Moments) else moments(seen)


def _nothing(box: Box) -> None:
    return None


def _box(images: Tensor, eps: Tensor, phase: Phase) -> Box:
    return linf_box(images, torch.full_like(eps, SMALLEST_RADIUS) if phase is Phase.BEFORE else eps)
