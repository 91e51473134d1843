"""What `verify` asks of every image, and the answers for portions of them, in whatever process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from certtrain.bound_methods import BRANCH_AND_BOUND
from certtrain.bounds import BoundedModel, Bounder, Box, bounded_model
from certtrain.bounds.linear.beta import Neurons
from certtrain.bounds.margins import proved
from certtrain.data import Split, to_float
from certtrain.data.seeding import generator
from certtrain.errors import UnsupportedOperation
from certtrain.modules import evaluating
from certtrain.runtime.precision import full_precision
from certtrain.runtime.timing import now_on
from certtrain.verification.attacks import Attack, inscribed_linf_box, predictions
from certtrain.verification.branch_and_bound import Search, root_margins, settle
from certtrain.verification.cascade import around_attack
from certtrain.verification.digests import digest_of
from certtrain.verification.folding import fold_batch_norm
from certtrain.verification.model_digest import model_digest
from certtrain.verification.pixels import perturbation_box
from certtrain.verification.results import ImageResult
from certtrain.verification.verdicts import Verdict

Portion = tuple[float, Sequence[int]]  # a radius, and positions of images
Seconds = list[tuple[float, ...]]  # of each image, by the methods that were asked about it


@dataclass(frozen=True)
class Question:
    """What `verify` asks, whatever the radius, of every image."""

    methods: tuple[str, ...]
    arithmetic: str | None
    attack: Attack | None
    seed: int
    backend: str
    search: Search

    @property
    def searches(self) -> bool:
        return BRANCH_AND_BOUND in self.methods


class Answers:
    """The results of `verify` for portions of its images; it can be sent to other processes."""

    def __init__(self, question: Question, model: nn.Module, data: Split) -> None:
        self.question, self.model, self.data = question, model, data

    def __reduce__(self) -> tuple[Any, ...]:
        return Answers, (self.question, self.model, self.data)  # the network is recorded there anew

    @cached_property
    def net(self) -> Bounder:
        question, example = self.question, to_float(self.data.images[:1])
        fold = question.backend == "native" and question.arithmetic is None
        return bounded_model(_fewest_operations(self.model, example) if fold else self.model, example, question.backend)

    def check(self) -> None:
        """Ask about the first image's own pixels, of which bounds cost least: what cannot be done is found out here.

        Raises:
            UnsupportedOperation: the network has no such bounds, or cannot be searched.
            UsageError: one image's do not fit into memory.
        """
        arithmetic, labels = self.question.arithmetic, self.data.labels[:1]
        box = perturbation_box(self.data.images[:1], 0.0, arithmetic)
        with torch.no_grad():
            for method in self.question.methods:
                bound = "crown" if method == BRANCH_AND_BOUND else method  # what a search begins with
                self.net.margins(box, labels, bound, arithmetic=arithmetic)
            if self.question.searches:
                assert isinstance(self.net, BoundedModel)
                Neurons.of(self.net.recorded(box, None, arithmetic).recorded)

    def asked(self, radii: Sequence[float]) -> dict[str, Any]:
        """All that the results depend on, for a `ResultFile`."""
        question = self.question
        searched = {**vars(question.search), "ascent": repr(question.search.ascent)} if question.searches else {}
        return {
            "model_sha256": model_digest(self.model),
            "data_sha256": digest_of(self.data),
            "images": len(self.data),
            "shape": list(self.data.images.shape[1:]),
            "eps": list(radii),
            "methods": list(question.methods),
            "arithmetic": question.arithmetic,
            "backend": question.backend,
            "attack": repr(question.attack),
            "seed": question.seed,
        } | {f"search.{key}": value for key, value in searched.items()}

    def __call__(self, portion: Portion) -> Iterator[ImageResult]:
        """The results of these images as they come: those that branch and bound is asked about last."""
        eps, positions = portion
        with evaluating(self.model), full_precision():
            part = self.data.take(torch.tensor(positions))
            images, labels = to_float(part.images), part.labels
            prediction = predictions(self.model, images)
            correct = prediction == labels
            box = perturbation_box(part.images, eps, self.question.arithmetic)
            before_attack, after_attack = around_attack(self.question.methods)
            margins = unknown_margins(labels, self.net.classes, box.like.dtype)
            seconds: Seconds = [()] * len(labels)
            for i, method in enumerate(before_attack):
                left = correct & ~proved(margins) if i > 0 else torch.ones_like(correct)
                margins, seconds = self._bounded(method, box, labels, left, margins, seconds)
            left = correct & ~proved(margins)
            attacked, points = self._attacks(images, labels, eps, left, positions)
            for method in after_attack:
                left = correct & ~attacked & ~proved(margins)
                margins, seconds = self._bounded(method, box, labels, left, margins, seconds)
            holds = proved(margins) & correct & ~attacked
            verdicts = np.select(
                [flags.cpu().numpy() for flags in (~correct, holds, attacked)],
                [Verdict.MISCLASSIFIED, Verdict.PROVED, Verdict.ATTACKED],
                Verdict.UNKNOWN,
            ).tolist()
            smallest = _least(margins, labels)
            found = [
                ImageResult(eps, image, int(prediction[i]), verdicts[i], float(smallest[i]), seconds[i])
                for i, image in enumerate(positions)
            ]
            for i, point in zip(attacked.nonzero()[:, 0].tolist(), points, strict=True):
                found[i] = replace(found[i], point=point.cpu())
            unknown = [i for i, verdict in enumerate(verdicts) if verdict == Verdict.UNKNOWN and self.question.searches]
            yield from (result for i, result in enumerate(found) if i not in set(unknown))
            for some in in_parts(unknown, self.question.search.images):
                index = torch.tensor(some, device=labels.device)
                yield from self._searched(
                    [found[i] for i in some],
                    box.take(index),
                    images[index],
                    labels[index],
                    margins[index],
                )

    def _searched(
        self, left: Sequence[ImageResult], box: Box, images: Tensor, labels: Tensor, margins: Tensor
    ) -> Iterator[ImageResult]:
        """By branch and bound; its points are looked for in the network as it is deployed."""
        assert isinstance(self.net, BoundedModel)
        started, search = now_on(labels.device), self.question.search
        record = self.net.tightened(box, self.question.arithmetic)
        margins = root_margins(record, labels, margins)
        spent = (now_on(labels.device) - started) / len(left)
        points = inscribed_linf_box(images, left[0].eps)
        rest = replace(search, timeout=max(0.0, search.timeout - spent))
        for i, outcome in settle(self.model, record, labels, margins, rest, points):
            least = float(_least(outcome.lower[None], labels[i : i + 1]))
            yield replace(
                left[i],
                verdict=outcome.verdict.value,
                margin=least if outcome.verdict == Verdict.PROVED else min(least, 0.0),  # of what waits it may be above
                seconds=(*left[i].seconds, spent + outcome.seconds),
                domains=outcome.domains,
                point=None if outcome.point is None else outcome.point.cpu(),
                tree=outcome.trees().to_bytes() if outcome.leaves else None,
            )

    def _attacks(
        self,
        images: Tensor,
        labels: Tensor,
        eps: float,
        left: Tensor,
        positions: Sequence[int],
    ) -> tuple[Tensor, Tensor]:
        """(B,) bool, and the points found, in the network as it is deployed, whose BatchNorms are not folded.

        An image's attack follows from the seed and its own position alone.
        """
        attacked, points = torch.zeros_like(left), images[:0]
        chosen = left.nonzero()[:, 0]
        attack = self.question.attack
        if attack is not None and len(chosen) > 0:
            generators = [generator(self.question.seed, positions[i]) for i in chosen.tolist()]
            points, broken = attack(self.model, images[chosen], labels[chosen], eps, generators)
            attacked[chosen], points = broken, points[broken]
        return attacked, points

    @torch.no_grad()
    def _bounded(
        self, method: str, box: Box, labels: Tensor, left: Tensor, margins: Tensor, seconds: Seconds
    ) -> tuple[Tensor, Seconds]:
        """Margins (B, K) as they are with those by `method` of the images `left` (B,), and the seconds that each method
        took of each image."""
        chosen = left.nonzero()[:, 0]
        if len(chosen) == 0:
            return margins, seconds
        started = now_on(labels.device)
        arithmetic, stops = self.question.arithmetic, self.question.backend == "native"
        bounds = self.net.margins(box.take(chosen), labels[chosen], method, arithmetic=arithmetic, early_stop=stops)
        each = (now_on(labels.device) - started) / len(chosen)
        spent = [(*known, each) if asked else known for known, asked in zip(seconds, left.tolist(), strict=True)]
        return margins.index_copy(0, chosen, torch.maximum(margins[chosen], bounds)), spent


def unknown_margins(labels: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """(B, K): what is known of margins before any bound, -inf, and 0 at the label."""
    return torch.full((len(labels), classes), -torch.inf, dtype=dtype, device=labels.device).scatter(
        1, labels[:, None], 0.0
    )


def _least(margins: Tensor, labels: Tensor) -> Tensor:
    """(B,): the smallest of the margins (B, K) of wrong classes."""
    return margins.scatter(1, labels[:, None], torch.inf).amin(1)


def _fewest_operations(model: nn.Module, example: Tensor) -> nn.Module:
    """`model` with BatchNorm folded, if that computes the same."""
    try:
        return fold_batch_norm(model, example)
    except UnsupportedOperation:
        return model


def in_parts(images: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (images[start : start + size] for start in range(0, len(images), size))
