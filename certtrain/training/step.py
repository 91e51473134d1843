"""One training step: the gradient of a method's loss on one batch.

A step takes a batch through the network once, clean input and box together, and gets from that joint pass the loss,
the regularizers and the step's metrics. Where the method attacks the batch first, the clean input goes ahead, and box
and attacked points follow together. Everything stays on the device; nothing here waits for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from certtrain.affine_layers import affine_weights
from certtrain.bounds import Bounder, Bounds, Box, linf_box
from certtrain.bounds.batch_norm import SETTLED_BY_CLEAN, Coefficients
from certtrain.bounds.model import CleanPass
from certtrain.errors import UsageError
from certtrain.modules import evaluating, generators_kept
from certtrain.regularizers import l1_penalty, moments
from certtrain.runtime.compilation import Compiled
from certtrain.runtime.distributed import ALONE, Ranks
from certtrain.runtime.precision import Precision, training_precision
from certtrain.training.attack import attacked, visiting
from certtrain.training.losses import Metrics, classification_error, total
from certtrain.training.method import Method, Part, Phase, Scheduled
from certtrain.training.methods import IBP
from certtrain.training.noise import uniform
from certtrain.training.regularization import BatchSums, Regularization

Statistics = Literal["clean", "adversarial", "center"]

DROPOUTS = SETTLED_BY_CLEAN.keys() - {F.batch_norm}
SMALLEST_RADIUS = 1e-6  # of a box that the regularizers look at: much smaller ones float32 rounds away from pixels
DEFAULT_METHOD, DEFAULT_REGULARIZATION = IBP(), Regularization()


class Batch(NamedTuple):
    """Images, or a part of them.

    images: (B, C, H, W) in [0, 1]; labels: (B,).
    positions: (B,) int64, in the whole batch; points: (B, C, H, W) attacked around the images, if any were.
    """

    images: Tensor
    labels: Tensor
    positions: Tensor
    points: Tensor | None = None

    def parts(self, count: int) -> list[Batch]:
        given = [tensor.chunk(count) for tensor in self if tensor is not None]
        return [Batch(*part) for part in zip(*given, strict=True)]


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


class Step(Protocol):
    """What a trainer asks of a step; `GradientStep` says what it means."""

    @property
    def net(self) -> Bounder: ...

    def phase(self, eps: float, ramp: float) -> Phase: ...

    def backward(
        self, images: Tensor, labels: Tensor, at: Scheduled, phase: Phase, size: int | None = None
    ) -> Metrics: ...

    def rehearse(
        self, images: Tensor, labels: Tensor, at: Scheduled, phase: Phase, size: int | None = None
    ) -> None: ...


class GradientStep:
    """The gradient of a method's loss, as a function of a batch.

    Args:
        net: the network.
        method: what is minimised.
        regularization: what is added to it until epsilon has reached its maximum.
        statistics: those that BatchNorm has while epsilon is above 0: of the clean batch, of the attacked points, or of
            the middle of the region, layer by layer, which leaves out the clean input.
        l1: weight of the sum of absolute values of the weights of all affine layers, each taken once.
        activation_checkpointing: backward computes the boxes again instead of keeping them.
        accumulation: number of parts a batch is worked through in; the gradient is the whole batch's in any case.
        precision: of the products.
        compile_for: (whole) batches of this size take a compiled step, others an eager one, as does any in parts.
        ranks: the processes that have a share of each batch; `net` must have been given their `all_reduce`.
    """

    def __init__(
        self,
        net: Bounder,
        method: Method = DEFAULT_METHOD,
        regularization: Regularization = DEFAULT_REGULARIZATION,
        *,
        statistics: Statistics = "clean",
        l1: float = 0.0,
        activation_checkpointing: bool = False,
        accumulation: int = 1,
        precision: Precision = "float32",
        compile_for: int | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        method.require(net)
        if regularization.is_used and method.has_region:
            regularization.require(net)
        self.net, self.method, self.regularization = net, method, regularization
        self._statistics: Statistics = statistics
        self._l1, self._affine_weights = l1, affine_weights(net.model) if l1 else []
        if l1 and not self._affine_weights:
            raise UsageError("regularizers.l1: the network has no weight of an affine layer to sum: set it to 0")
        self._checkpointing, self._accumulation = activation_checkpointing, accumulation
        self._precision: Precision = precision
        self._ranks = ranks
        self._require_one_pass_for_dropout()
        # A compiled method belongs to one step: its graph holds this network's parameters.
        self._compile_for, self._compiled_terms = compile_for, Compiled(self._terms) if compile_for else None
        self._compiled_visit = Compiled(self._visit) if compile_for and method.attack else None
        self._whole = self._terms_of_whole
        if accumulation == 1:
            self._whole = ranks.data_parallel(net.model, self._terms_of_whole)

    def _require_one_pass_for_dropout(self) -> None:
        """Its mask is drawn once for all that goes through the network together, and cannot be had again.

        Raises:
            UsageError: Dropout is active, and boxes go through without clean images, or a batch in parts.
        """
        method, center = self.method, self._statistics == "center"
        alone = not (method.asks_for_logits or center) and (method.attack or method.asks_for_coefficients)
        apart = {
            "training.accumulation": method.has_region and self._accumulation > 1,
            "training.activation_checkpointing": method.has_region and self._checkpointing,
            f"training.method {method.options.name}": method.has_region and alone,
            "several processes": self._ranks.world_size > 1,
        }
        reason = next((name for name, holds in apart.items() if holds), None)
        if reason is not None and has_dropout(self.net):
            raise UsageError(
                f"the network's Dropout is not for {reason}: what goes through apart there would lose other values; "
                "set its probability to 0"
            )

    def phase(self, eps: float, ramp: float) -> Phase:
        """What is minimised at this radius, with this share of warmup's steps done, whether the radius grows or not."""
        if not self.method.is_robust:
            return Phase.NATURAL
        if eps == 0:
            return Phase.BEFORE if self._regularizes else Phase.NATURAL
        differs = ramp < 1 and (self._regularizes or self.method.differs_in_warmup)
        return Phase.WARMUP if differs else Phase.FULL

    def backward(self, images: Tensor, labels: Tensor, at: Scheduled, phase: Phase, size: int | None = None) -> Metrics:
        """Add the gradient of the batch's loss to the parameters' `.grad`; updates BatchNorm's running statistics.

        Args:
            images: (B, C, H, W) in [0, 1]; labels: (B,). Of a batch that other ranks have a share of, this rank's.
            at: where the schedules stand.
            size: images in the whole batch, if not B.

        Returns:
            `loss`, its terms, `natural_error` (where the clean batch was looked at) and the errors of what the method
            minimises, of the whole batch.
        """
        size = size or len(images)
        share = len(images) / size
        with training_precision(self._precision, images.device):
            batch = self._batch(images, labels, at, phase, size)
            if self._accumulation == 1:
                terms = self._whole(size, share, batch, at, phase).scaled(share)
                total(terms.losses).backward()
            else:
                terms = self._backward_in_parts(size, batch, at, phase)
                self._ranks.all_reduce_gradients(self.net.model)
        return self._metrics(terms)

    @torch.no_grad()
    def evaluate(self, images: Tensor, labels: Tensor, at: Scheduled, phase: Phase, size: int | None = None) -> Metrics:
        """What `backward` returns, and does to BatchNorm's running statistics, without any gradient."""
        size = size or len(images)
        share = len(images) / size
        with training_precision(self._precision, images.device):
            batch = self._batch(images, labels, at, phase, size)
            return self._metrics(self._terms_of_whole(size, share, batch, at, phase).scaled(share))

    def rehearse(self, images: Tensor, labels: Tensor, at: Scheduled, phase: Phase, size: int | None = None) -> None:
        """Compute what `backward` would, and leave nothing of it: what it cannot do is told before it has to."""
        model, device = self.net.model, images.device
        size = size or len(images)
        precision = training_precision(self._precision, device)
        with evaluating(model), buffers_kept(model), generators_kept(device), precision:
            model.train()
            batch = self._batch(images, labels, at, phase, size)
            if self._accumulation == 1:
                self._terms(len(images) / size, batch, at, phase)
            else:
                self._backward_in_parts(size, batch, at, phase)
                model.zero_grad(set_to_none=True)

    def _batch(self, images: Tensor, labels: Tensor, at: Scheduled, phase: Phase, size: int) -> Batch:
        """With the points that the method attacks, where it does."""
        share = self._ranks.share(range(size))
        positions = torch.arange(
            share.start, share.stop, device=images.device
        )  # made there: a copy would be waited for
        batch = Batch(images, labels, positions)
        return batch._replace(points=self._attacked(size, batch, at, phase))

    def _metrics(self, terms: Terms) -> Metrics:
        """Of the whole batch, from this rank's share of it."""
        metrics = {"loss": total(terms.losses), **terms.losses, **terms.metrics}
        values = self._ranks.all_reduce(torch.stack([value.detach() for value in metrics.values()]))
        return dict(zip(metrics, values.unbind(), strict=True))

    # --- a batch in one piece -------------------------------------------------------------------------------------

    def _terms_of_whole(self, size: int, share: float, batch: Batch, at: Scheduled, phase: Phase) -> Terms:
        compiled = self._compiled_terms
        if compiled is None or size != self._compile_for:
            return self._terms(share, batch, at, phase)
        _ = self.net.graph  # recorded, if need be, before anything is compiled
        return compiled(share, batch, at, phase)

    def _terms(self, share: float, batch: Batch, at: Scheduled, phase: Phase) -> Terms:
        if phase is Phase.NATURAL:
            return self._clean_terms(self.net.clean_pass(batch.images).output, batch.labels, at, phase)
        if self._statistics == "center" and phase is not Phase.BEFORE:
            return self._terms_of_center(share, batch, at, phase)
        if self._checkpointing or batch.points is not None or self.method.asks_for_coefficients:
            clean = self._clean_pass(batch)
            logits, part = clean.output, self._part(batch, clean.coefficients, at, phase)
        else:
            bounds = self._region_bounds(batch, at, phase, clean=batch.images)
            assert bounds.clean is not None
            logits, part = bounds.clean, Part(self.net, batch.labels, batch.positions, bounds)
        terms, sums = self._part_terms(part, share, at, phase)
        terms = self._clean_terms(logits, batch.labels, at, phase).plus(terms)
        return self._with_batch_terms(terms, sums, at, phase)

    def _terms_of_center(self, share: float, batch: Batch, at: Scheduled, phase: Phase) -> Terms:
        bounds = self._region_bounds(batch, at, phase, from_center=True)
        part = Part(self.net, batch.labels, batch.positions, bounds)
        terms, sums = self._part_terms(part, share, at, phase)
        return self._with_batch_terms(terms.plus(Terms(self._l1_terms(), {})), sums, at, phase)

    def _with_batch_terms(self, terms: Terms, sums: BatchSums | None, at: Scheduled, phase: Phase) -> Terms:
        return terms if sums is None else terms.plus(self._batch_terms(sums.over(self._ranks), at, phase))

    # --- a batch in parts -----------------------------------------------------------------------------------------

    def _backward_in_parts(self, size: int, batch: Batch, at: Scheduled, phase: Phase) -> Terms:
        """The gradient of `_terms`, in less memory.

        The clean pass takes the whole batch, so that BatchNorm sees all of it. The boxes follow in parts, with copies
        of the BatchNorm coefficients; the gradient that gathers in those copies goes back through the clean pass
        at the end. What is a function of sums over the batch needs a first walk, which gathers them.
        """
        clean = self._clean_pass(batch)
        terms = self._clean_terms(clean.output, batch.labels, at, phase).scaled(len(batch.images) / size)
        pending: list[tuple[Tensor, Tensor | None]] = [(total(terms.losses), None)] if terms.losses else []
        if phase is not Phase.NATURAL:
            copies = {i: _leaves(*pair) for i, pair in clean.coefficients.items()}
            parts = batch.parts(self._accumulation)
            whole = self._sums_over(parts, size, copies, at, phase) if self._needs_sums(phase) else None
            for part in parts:
                share = len(part.images) / size
                own, sums = self._part_terms(self._part(part, copies, at, phase), share, at, phase)
                own = own.scaled(share)
                shared = Terms({}, {})
                if sums is not None and whole is not None:
                    shared = self._batch_terms(sums.completed_by(whole), at, phase)
                total(own.losses | shared.losses).backward()
                terms = terms.plus(own.detach()).plus(shared.scaled(share).detach())
            for index, pair in clean.coefficients.items():
                gradients = [(c, copy.grad) for c, copy in zip(pair, copies[index], strict=True) if c.requires_grad]
                pending += [(c, gradient) for c, gradient in gradients if gradient is not None]
        if pending:  # without BatchNorm nothing but the clean terms goes back through the clean pass
            values, into = zip(*pending, strict=True)
            torch.autograd.backward(values, into)
        return terms.detach()

    @torch.no_grad()
    def _sums_over(
        self, parts: Sequence[Batch], size: int, coefficients: Mapping[int, Coefficients], at: Scheduled, phase: Phase
    ) -> BatchSums:
        found = (
            self._part_terms(self._part(part, coefficients, at, phase), len(part.images) / size, at, phase)[1]
            for part in parts
        )
        return reduce(BatchSums.plus, (sums for sums in found if sums is not None)).over(self._ranks)

    # --- the attack -----------------------------------------------------------------------------------------------

    def _attacked(self, size: int, batch: Batch, at: Scheduled, phase: Phase) -> Tensor | None:
        """A point around each image, where the method attacks; leaves no gradient and BatchNorm as it was."""
        options = self.method.attack
        if options is None or phase in (Phase.NATURAL, Phase.BEFORE):
            return None
        compiled = self._compiled_visit if size == self._compile_for else None
        images, labels = batch.images, batch.labels
        mode, seen = (evaluating, images[:1]) if options.statistics == "running" else (buffers_kept, images)
        with mode(self.net.model), torch.no_grad():
            coefficients = self.net.clean_pass(seen).coefficients  # running statistics are the same for any images
            return attacked(
                options,
                images,
                at.eps,
                lambda x: (compiled or self._visit)(x, labels, coefficients),
                lambda x: self._cross_entropies(x, labels, coefficients),
                lambda draw: uniform(at.key, batch.positions, images.shape[1:], images, draw),
            )

    def _visit(self, x: Tensor, labels: Tensor, coefficients: Mapping[int, Coefficients]) -> tuple[Tensor, Tensor]:
        """The gradient of each image's cross-entropy, (B, C, H, W), and the cross-entropies (B,)."""
        return visiting(lambda x: self._cross_entropies(x, labels, coefficients))(x)

    def _cross_entropies(self, x: Tensor, labels: Tensor, coefficients: Mapping[int, Coefficients]) -> Tensor:
        return F.cross_entropy(self.net.clean_pass(x, coefficients).output, labels, reduction="none")

    # --- pieces ---------------------------------------------------------------------------------------------------

    def _clean_pass(self, batch: Batch) -> CleanPass:
        """The clean logits, and the BatchNorm coefficients for them and all that follows."""
        if self._statistics == "clean" or batch.points is None:
            return self.net.clean_pass(batch.images)
        clean = self.net.clean_pass(batch.images)  # the running statistics are of both, as in the authors' code
        return CleanPass(clean.output, self.net.clean_pass(batch.points).coefficients)

    def _region(self, batch: Batch, at: Scheduled, phase: Phase) -> Box:
        if phase is Phase.BEFORE:
            return linf_box(batch.images, torch.full_like(at.eps, SMALLEST_RADIUS))
        looked_at = self._regularizes and phase is not Phase.FULL
        eps = at.eps.clamp(min=SMALLEST_RADIUS) if looked_at else at.eps
        return self.method.region(batch.images, eps, batch.points)

    def _shrink(self, phase: Phase) -> float | None:
        return None if phase is Phase.BEFORE else self.method.shrink

    def _region_bounds(
        self,
        batch: Batch,
        at: Scheduled,
        phase: Phase,
        clean: Tensor | None = None,
        coefficients: Mapping[int, Coefficients] | None = None,
        from_center: bool = False,
    ) -> Bounds:
        """What the network makes of the region, and of the points `clean` that go along."""
        box, keep, shrink = self._region(batch, at, phase), self.method.keeps_boxes(phase), self._shrink(phase)
        return self.net.ibp(box, clean, coefficients, record=keep, from_center=from_center, shrink=shrink)

    def _part(self, batch: Batch, coefficients: Mapping[int, Coefficients], at: Scheduled, phase: Phase) -> Part:
        """What the network makes of region and points, whose clean input has gone ahead."""
        points = batch.points if self.method.asks_for_logits else None
        logits: Tensor | None = None
        bounds: Bounds | None = None
        if not self.method.has_region or (self._checkpointing and points is not None):
            assert points is not None
            logits = self.net.clean_pass(points, coefficients).output
        if self.method.has_region and self._checkpointing:
            observe = moments if self._needs_sums(phase) else _nothing
            box, shrink = self._region(batch, at, phase), self._shrink(phase)
            bounds = self.net.ibp_in_segments(box, coefficients, observe, shrink=shrink)
        elif self.method.has_region:
            bounds = self._region_bounds(batch, at, phase, points, coefficients)
            logits = bounds.clean
        return Part(self.net, batch.labels, batch.positions, bounds, logits, coefficients)

    def _clean_terms(self, logits: Tensor, labels: Tensor, at: Scheduled, phase: Phase) -> Terms:
        losses: Metrics = {}
        is_robust = phase in (Phase.WARMUP, Phase.FULL)
        weight = self.method.natural_weight(at) if is_robust else 1.0
        if isinstance(weight, Tensor) or weight:
            losses["natural_loss"] = weight * F.cross_entropy(logits, labels)
        losses |= self._l1_terms()
        return Terms(losses, {"natural_error": classification_error(logits, labels)})

    def _l1_terms(self) -> Metrics:
        if not self._l1:
            return {}
        return {"l1_loss": self._l1 * l1_penalty(getattr(owner, name) for owner, name in self._affine_weights)}

    def _part_terms(self, part: Part, share: float, at: Scheduled, phase: Phase) -> tuple[Terms, BatchSums | None]:
        """The terms that are means over images, and the sums over images that the others are functions of."""
        terms = Terms({}, {})
        losses: Metrics = {}
        if phase is not Phase.BEFORE:
            losses, errors = self.method.losses(part, at, phase)
            terms = Terms({}, {name: value for name, value in losses.items() if name != "robust_loss"} | errors)
            if not self.method.is_of_batch_means:
                terms = terms.plus(self._robust_term(losses, at))
        return terms, BatchSums.of(part.region_bounds, losses, share) if self._needs_sums(phase) else None

    def _batch_terms(self, sums: BatchSums, at: Scheduled, phase: Phase) -> Terms:
        """The terms that are no means over images, but functions of sums over the whole batch."""
        terms = Terms({}, {})
        if self.method.is_of_batch_means and phase is not Phase.BEFORE:
            terms = self._robust_term(sums.losses, at)
        if self._regularizes and phase is not Phase.FULL:
            terms = terms.plus(Terms(self.regularization.terms(sums, at.eps_ratio), {}))
        return terms

    def _robust_term(self, losses: Mapping[str, Tensor], at: Scheduled) -> Terms:
        return Terms({"robust_loss": (1 - self.method.natural_weight(at)) * self.method.robust_loss(losses)}, {})

    @property
    def _regularizes(self) -> bool:
        return self.regularization.is_used and self.method.has_region

    def _needs_sums(self, phase: Phase) -> bool:
        return self.method.is_of_batch_means or (self._regularizes and phase is not Phase.FULL)


def has_dropout(net: Bounder) -> bool:
    """Whether the network drops values in training mode."""
    with evaluating(net.model):
        net.model.train()
        calls = [(*step.args, *step.arguments()) for step in net.graph.steps[1:] if step.function in DROPOUTS]
    return any(training and p for _, p, training in calls)


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Whatever happens to the buffers of `model` is undone after: BatchNorm's statistics are as before."""
    before = [buffer.clone() for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(model.buffers(), before, strict=True):
                buffer.copy_(value)


def _leaves(scale: Tensor, shift: Tensor) -> Coefficients:
    return scale.detach().requires_grad_(), shift.detach().requires_grad_()


def _nothing(box: Box) -> None:
    return None
