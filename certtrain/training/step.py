"""One training step: the gradient of a method's loss on one batch.

A step takes a batch through the network once, clean input and box together, and gets from that joint pass the loss,
the regularizers and the step's metrics. Everything stays on the device; nothing here waits for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from certtrain.bounds import BoundedModel, Bounds, Box, linf_box
from certtrain.bounds.tracing import Coefficients
from certtrain.initialization import AFFINE_MODULES
from certtrain.regularizers import l1_penalty, moments
from certtrain.runtime.compilation import Compiled
from certtrain.runtime.distributed import ALONE, Ranks
from certtrain.runtime.precision import Precision, training_precision
from certtrain.training.losses import Metrics, classification_error, total
from certtrain.training.methods import IBP, Method, Part, Phase, Scheduled
from certtrain.training.regularization import BatchSums, Regularization

SMALLEST_RADIUS = 1e-6  # of the box that the regularizers look at while epsilon is 0
DEFAULT_METHOD, DEFAULT_REGULARIZATION = IBP(), Regularization()


class Batch(NamedTuple):
    """images (B, C, H, W) in [0, 1], labels (B,)."""

    images: Tensor
    labels: Tensor

    def parts(self, count: int) -> list[Batch]:
        return [Batch(*part) for part in zip(*(tensor.chunk(count) for tensor in self), strict=True)]


class Terms(NamedTuple):
    """losses: what adds up to the loss; metrics: what is reported besides. Means over a batch, or shares of them."""

    losses: Metrics
    metrics: Metrics

    def scaled(self, share: float) -> Terms:
        """Means over a part as addends of the whole batch's means, of which the part is this share."""
        return self if share == 1 else Terms(*({name: share * v for name, v in group.items()} for group in self))

    def plus(self, other: Terms) -> Terms:
        return Terms(
            *({**a, **{name: a.get(name, 0) + v for name, v in b.items()}} for a, b in zip(self, other, strict=True))
        )

    def detach(self) -> Terms:
        return Terms(*({name: value.detach() for name, value in group.items()} for group in self))


class GradientStep:
    """The gradient of a method's loss, as a function of a batch.

    Args:
        net: the network.
        method: what is minimised.
        regularization: what is added to it until epsilon has reached its maximum.
        l1: weight of the sum of absolute values of all convolution and linear weights.
        activation_checkpointing: backward computes the boxes again instead of keeping them.
        accumulation: number of parts a batch is worked through in; the gradient is the whole batch's in any case.
        precision: of the products.
        compile_for: (whole) batches of this size take a compiled step, others an eager one, as does any in parts.
        ranks: the processes that have a share of each batch; `net` must have been given their `sum`.
    """

    def __init__(
        self,
        net: BoundedModel,
        method: Method = DEFAULT_METHOD,
        regularization: Regularization = DEFAULT_REGULARIZATION,
        *,
        l1: float = 0.0,
        activation_checkpointing: bool = False,
        accumulation: int = 1,
        precision: Precision = "float32",
        compile_for: int | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.net, self.method, self.regularization = net, method, regularization
        self._l1, self._checkpointing, self._accumulation = l1, activation_checkpointing, accumulation
        self._precision: Precision = precision
        self._ranks = ranks
        # A compiled method belongs to one step: its graph holds this network's parameters.
        self._compile_for, self._compiled_terms = compile_for, Compiled(self._terms) if compile_for else None
        self._whole = self._terms_of_whole
        if accumulation == 1:
            self._whole = ranks.synchronized(net.model, self._terms_of_whole)

    def phase(self, eps: float, max_eps: float) -> Phase:
        if not self.method.is_robust:
            return Phase.NATURAL
        if eps == 0:
            return Phase.BEFORE if self.regularization.is_used else Phase.NATURAL
        return Phase.WARMUP if eps < max_eps else Phase.FULL

    def backward(self, images: Tensor, labels: Tensor, at: Scheduled, phase: Phase, size: int | None = None) -> Metrics:
        """Add the gradient of the batch's loss to the parameters' `.grad`; updates BatchNorm's running statistics.

        Args:
            images: (B, C, H, W) in [0, 1]; labels: (B,). Of a batch that other ranks have a share of, this rank's.
            at: where the schedules stand.
            size: images in the whole batch, if not B.

        Returns:
            `loss`, its terms, `natural_error` and the errors of what the method minimises, of the whole batch.
        """
        size = size or len(images)
        batch, share = Batch(images, labels), len(images) / size
        with training_precision(self._precision, images.device):
            if self._accumulation == 1:
                terms = self._whole(size, share, batch, at, phase).scaled(share)
                total(terms.losses).backward()
            else:
                terms = self._backward_in_parts(size, batch, at, phase)
                self._ranks.sum_gradients(self.net.model)
        metrics = {"loss": total(terms.losses), **terms.losses, **terms.metrics}
        values = self._ranks.sum(torch.stack([value.detach() for value in metrics.values()]))
        return dict(zip(metrics, values.unbind(), strict=True))

    # --- a batch in one piece -------------------------------------------------------------------------------------

    def _terms_of_whole(self, size: int, share: float, batch: Batch, at: Scheduled, phase: Phase) -> Terms:
        if size != self._compile_for:
            return self._terms(share, batch, at, phase)
        _ = self.net.graph  # recorded, if need be, before anything is compiled
        return self._compiled_terms(share, batch, at, phase)

    def _terms(self, share: float, batch: Batch, at: Scheduled, phase: Phase) -> Terms:
        if phase is Phase.NATURAL:
            return self._clean_terms(self.net.clean_pass(batch.images).output, batch.labels, phase)
        if self._checkpointing:
            clean = self.net.clean_pass(batch.images)
            logits, bounds = clean.output, self._bounds(batch, clean.coefficients, at, phase)
        else:
            box = self._region(batch.images, at, phase)
            bounds = self.net.ibp(box, clean=batch.images, record=self.method.uses_relaxations(phase))
            logits = bounds.clean
        terms, sums = self._part_terms(batch, bounds, share, at, phase)
        terms = self._clean_terms(logits, batch.labels, phase).plus(terms)
        return terms if sums is None else terms.plus(self._batch_terms(sums.over(self._ranks), at, phase))

    # --- a batch in parts -----------------------------------------------------------------------------------------

    def _backward_in_parts(self, size: int, batch: Batch, at: Scheduled, phase: Phase) -> Terms:
        """The gradient of `_terms`, in less memory.

        The clean pass takes the whole batch, so that BatchNorm sees all of it. The boxes follow in parts, with copies
        of the BatchNorm coefficients; the gradient that gathers in those copies goes back through the clean pass
        at the end. What is a function of sums over the batch needs a first walk, which gathers them.
        """
        clean = self.net.clean_pass(batch.images)
        terms = self._clean_terms(clean.output, batch.labels, phase).scaled(len(batch.images) / size)
        pending = [(total(terms.losses), None)] if terms.losses else []
        if phase is not Phase.NATURAL:
            copies = {i: tuple(c.detach().requires_grad_() for c in pair) for i, pair in clean.coefficients.items()}
            parts = batch.parts(self._accumulation)
            whole = self._sums_over(parts, size, copies, at, phase) if self._needs_sums(phase) else None
            for part in parts:
                share = len(part.images) / size
                bounds = self._bounds(part, copies, at, phase)
                own, sums = self._part_terms(part, bounds, share, at, phase)
                own = own.scaled(share)
                shared = Terms({}, {}) if sums is None else self._batch_terms(sums.completed_by(whole), at, phase)
                total(own.losses | shared.losses).backward()
                terms = terms.plus(own.detach()).plus(shared.scaled(share).detach())
            for index, pair in clean.coefficients.items():
                pending += [(c, copy.grad) for c, copy in zip(pair, copies[index], strict=True) if c.requires_grad]
        if pending:  # without BatchNorm nothing but the clean terms goes back through the clean pass
            torch.autograd.backward(*zip(*pending, strict=True))
        return terms.detach()

    @torch.no_grad()
    def _sums_over(
        self, parts: Sequence[Batch], size: int, coefficients: Mapping[int, Coefficients], at: Scheduled, phase: Phase
    ) -> BatchSums:
        found = []
        for part in parts:
            bounds = self._bounds(part, coefficients, at, phase)
            found.append(self._part_terms(part, bounds, len(part.images) / size, at, phase)[1])
        return reduce(BatchSums.plus, found).over(self._ranks)

    # --- pieces ---------------------------------------------------------------------------------------------------

    def _region(self, images: Tensor, at: Scheduled, phase: Phase) -> Box:
        if phase is Phase.BEFORE:
            return linf_box(images, torch.full_like(at.eps, SMALLEST_RADIUS))
        return self.method.region(images, at.eps)

    def _bounds(self, part: Batch, coefficients: Mapping[int, Coefficients], at: Scheduled, phase: Phase) -> Bounds:
        """Of a region whose clean input has gone ahead."""
        box = self._region(part.images, at, phase)
        if self._checkpointing:
            observe = moments if self._needs_sums(phase) else _nothing
            return self.net.ibp_in_segments(box, coefficients, observe)
        return self.net.ibp(box, coefficients=coefficients, record=self.method.uses_relaxations(phase))

    def _clean_terms(self, logits: Tensor, labels: Tensor, phase: Phase) -> Terms:
        losses: Metrics = {}
        if phase in (Phase.NATURAL, Phase.BEFORE):
            losses["natural_loss"] = F.cross_entropy(logits, labels)
        if self._l1:
            losses["l1_loss"] = self._l1 * l1_penalty(affine_weights(self.net.model))
        return Terms(losses, {"natural_error": classification_error(logits, labels)})

    def _part_terms(
        self, part: Batch, bounds: Bounds, share: float, at: Scheduled, phase: Phase
    ) -> tuple[Terms, BatchSums | None]:
        """The terms that are means over images, and the sums over images that the others are functions of."""
        terms = Terms({}, {})
        if phase is not Phase.BEFORE:
            found = self.method.losses(Part(self.net, part.labels, bounds), at, phase)
            terms = Terms({"robust_loss": self.method.robust_loss(found.losses)}, found.errors)
        return terms, BatchSums.of(bounds, {}, share) if self._needs_sums(phase) else None

    def _batch_terms(self, sums: BatchSums, at: Scheduled, phase: Phase) -> Terms:
        """The terms that are no means over images, but functions of sums over the whole batch."""
        return Terms(self.regularization.terms(sums, at.eps_ratio), {})

    def _needs_sums(self, phase: Phase) -> bool:
        return self.regularization.is_used and phase in (Phase.BEFORE, Phase.WARMUP)


def affine_weights(model: nn.Module) -> list[Tensor]:
    return [module.weight for module in model.modules() if isinstance(module, AFFINE_MODULES)]


def _nothing(box: Box) -> None:
    return None
