"""Branch and bound: complete verification of images that bounds alone leave unknown.

For each image and wrong class the box is split, neuron by neuron, into domains on which z_y - z_j can be bounded well
enough. (Bunel et al. 2020, arXiv 1909.06588; the bounds: `bounds.linear.beta`.) Domains of several images are bounded
together, the worst of each first. The leaves of the trees that prove an image can be kept: with their slopes and
multipliers each can be bounded again without a search.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from certtrain.bounds.box import Box
from certtrain.bounds.graph import Call
from certtrain.bounds.linear.beta import Ascent, DomainBatch, Neurons, Splits
from certtrain.bounds.linear.crown import backward_margins
from certtrain.bounds.linear.patches import Coefficients, dense
from certtrain.bounds.margins import better, only_finite, proved
from certtrain.bounds.results import Record
from certtrain.errors import UsageError, require_counts
from certtrain.verification.attacks import predictions
from certtrain.verification.domains import Domain, ImageSearch, Leaf, Split
from certtrain.verification.leaf import exact_leaf
from certtrain.verification.trees import MOST_BYTES, Trees
from certtrain.verification.verdicts import Verdict

if TYPE_CHECKING:
    from certtrain.bounds.model import BoundedModel

CHECKABLE = 1e-7  # least bound of a leaf that is kept: another program, rounding otherwise, is to find it above 0 too
OVERHEAD = 1600  # bytes that a domain takes beside its slopes: multipliers, splits, and what Python adds; measured


@dataclass(frozen=True)
class Search:
    """How branch and bound searches.

    Args:
        timeout: seconds for each image. Those of a batch are shared by the images whose domains are in it.
        images: how many are searched at once.
        domains: how many are bounded together.
        candidates: how many splits are tried, by one pass each, before one is chosen; 1 trusts the scores.
        ascent: how each domain's slopes and multipliers are optimised.
        max_memory: bytes that waiting domains may take.
        keep_leaves: keep what proves each image, as certificates need it; one for which that is too much is given up.

    Raises:
        UsageError: a negative time, or no images, domains or candidates.
    """

    timeout: float = 100.0
    images: int = 8
    domains: int = 32
    candidates: int = 3
    ascent: Ascent = field(default_factory=lambda: Ascent(steps=10))
    max_memory: int = 2**31
    keep_leaves: bool = False

    def __post_init__(self) -> None:
        require_counts(images=self.images, domains=self.domains, candidates=self.candidates)
        if not self.timeout >= 0:
            raise UsageError(f"timeout is a number of seconds of at least 0, not {self.timeout}")


@dataclass(frozen=True)
class Outcome:
    """What the search found of one image.

    lower: (K,) lower bounds of z_y - z_j, 0 at j = y; point: misclassified, where attacked; domains: how many were
    bounded; leaves: what proves it, where they were kept; undecided: (U,), neurons.
    """

    verdict: Verdict
    lower: Tensor
    point: Tensor | None
    domains: int
    seconds: float
    leaves: tuple[Leaf, ...]
    undecided: Tensor

    def trees(self) -> Trees:
        """The leaves as certificates hold them."""
        splits = [split for leaf in self.leaves for split in leaf.splits]
        multipliers = [leaf.multipliers.cpu().numpy() for leaf in self.leaves]
        return Trees(
            undecided=self.undecided.cpu().numpy(),
            target=np.array([leaf.target for leaf in self.leaves], np.int64),
            splits=np.array([len(leaf.splits) for leaf in self.leaves], np.int64),
            neuron=np.array([split.neuron for split in splits], np.int64),
            above=np.array([split.above for split in splits], bool),
            multiplier=np.concatenate(multipliers) if multipliers else np.zeros(0),
            slopes=np.stack([leaf.slopes.cpu().numpy() for leaf in self.leaves])
            if self.leaves
            else np.zeros((0, len(self.undecided))),
        )


def branch_and_bound(
    model: nn.Module, record: Record, labels: Tensor, margins: Tensor, search: Search, points: Box | None = None
) -> list[Outcome]:
    """Settle images for which `margins` are not all positive.

    Args:
        model: computes logits (B, K) of points; in eval mode.
        record: of B images, its boxes as tight as is known (`tightened`). Where it has slack, proofs are of what the
            network computes.
        labels: (B,); margins: (B, K), lower bounds already known.
        search: how, and for how long.
        points: (B, ...) in the model's type, among which attacked ones are looked for; by default the record's box.

    Returns:
        An Outcome for each image. A margin that is positive without a search has no leaves.

    Raises:
        UnsupportedOperation: a nonlinear operation whose input cannot be split.
        UsageError: a `max_memory` that does not hold the roots.
    """
    outcomes = dict(settle(model, record, labels, margins, search, points))
    return [outcomes[position] for position in range(len(labels))]


def settle(
    model: nn.Module, record: Record, labels: Tensor, margins: Tensor, search: Search, points: Box | None = None
) -> Iterator[tuple[int, Outcome]]:
    """`branch_and_bound`, of which each image's outcome comes, with its position, as soon as it is known."""
    points = record.boxes[0] if points is None else points
    known = only_finite(margins.detach(), labels)
    return _BatchSearch(model, record.detach(), labels, known, search, points).outcomes()


@torch.no_grad()
def root_margins(record: Record, labels: Tensor, known: Tensor) -> Tensor:
    """Margins (B, K) as `known`, or by a backward pass on the record's boxes where that is better; finite, or -inf."""
    return only_finite(better(known, backward_margins(record, labels)), labels)


def searched_margins(
    net: BoundedModel,
    box: Box,
    labels: Tensor,
    known: Tensor,
    search: Search,
    points: Box,
    arithmetic: str | None = None,
    max_memory: int | None = None,
) -> Tensor:
    """Margins (B, K) as `known`, or as the search leaves them where those do not prove an image.

    Args:
        net: in eval mode.
        box: (B, ...); labels: (B,).
        points: as of `branch_and_bound`; arithmetic, max_memory: as of `BoundedModel.margins`.

    Raises:
        As `branch_and_bound`.
    """
    found = known.clone()
    unproved = (~proved(known)).nonzero()[:, 0]
    for left in unproved.split(search.images) if len(unproved) else ():
        record = net.tightened(box.take(left), arithmetic, max_memory)
        margins = root_margins(record, labels[left], known[left])
        outcomes = branch_and_bound(net.model, record, labels[left], margins, search, points.take(left))
        found[left] = torch.stack([outcome.lower for outcome in outcomes])
    return found


Node = tuple[ImageSearch, Domain]


class _BatchSearch:
    """The search of a batch of images: first their roots are bounded, then the worst domains are split, until each
    image has a verdict.

    Attributes:
        model, record, search, points: as of `branch_and_bound`.
        neurons: those that can be split, of all layers in a row.
        classes: how many logits there are.
        counter: numbers the domains; of two with the same bound the older is split first.
        images: the state of each image's search, by its position.
        initial: the slopes (U,) that the search of an image begins with, by the position of those that have roots.
    """

    def __init__(
        self, model: nn.Module, record: Record, labels: Tensor, margins: Tensor, search: Search, points: Box
    ) -> None:
        self.model, self.record, self.search, self.points = model, record, search, points
        self.neurons = Neurons.of(record)
        self.classes = margins.shape[1]
        self.counter = itertools.count()
        _, undecided = self.neurons.thresholds(self.neurons.boxes(record))
        self.images = [
            ImageSearch(i, int(labels[i]), margins[i].clone(), undecided[i].nonzero()[:, 0]) for i in range(len(labels))
        ]
        unproved = (margins <= 0).scatter(1, labels[:, None], False)
        empty = np.zeros(0, margins.cpu().numpy().dtype)
        for i, j in unproved.nonzero().tolist():
            self.images[i].roots.append(Domain(float(margins[i, j]), next(self.counter), j, (), 0, empty))
        needed = sum(len(image.roots) * self._domain_bytes(image) for image in self.images)
        if needed > search.max_memory:
            raise UsageError(f"max_memory: the first domains of {len(labels)} images take {needed:,} bytes already")
        asked = [(image, image.roots[0]) for image in self.images if image.roots]
        slopes = self._batch(asked).initial_slopes() if asked else ()
        self.initial = {image.position: start[image.undecided] for (image, _), start in zip(asked, slopes, strict=True)}

    def outcomes(self) -> Iterator[tuple[int, Outcome]]:
        searched = list(self.images)
        while searched:
            self._decide(searched)
            for image in searched:
                if image.verdict is not None:
                    yield image.position, self._outcome(image)
                    image.forget()
            searched = [image for image in searched if image.verdict is None]
            if roots := self._next_roots(searched):
                self._timed(self._bound_roots, roots)
            elif searched:
                self._timed(self._split_worst, self._chosen(searched))

    def _timed(self, step: Callable[[Sequence[Node]], None], nodes: Sequence[Node]) -> None:
        """The time of a step is shared by the images of its domains."""
        started = time.perf_counter()
        step(nodes)
        seconds = (time.perf_counter() - started) / len(nodes)
        for image, _ in nodes:
            image.seconds += seconds

    def _next_roots(self, searched: Sequence[ImageSearch]) -> list[Node]:
        roots: list[Node] = []
        for image in searched:
            count = self.search.domains - len(roots)
            roots += [(image, root) for root in image.roots[:count]]
            image.roots = image.roots[count:]
        return roots

    def _chosen(self, searched: Sequence[ImageSearch]) -> list[Node]:
        """The worst domain of each image, in turn, until there are enough."""
        chosen: list[Node] = []
        active = list(searched)
        while active and len(chosen) < self.search.domains:
            for image in active:
                if len(chosen) < self.search.domains:
                    chosen.append((image, heapq.heappop(image.waiting)))
            active = [image for image in active if image.waiting]
        return chosen

    def _split_worst(self, chosen: Sequence[Node]) -> None:
        """Split each domain in two, bound the halves, and keep those that are not proved."""
        splittable: list[tuple[Node, list[Split]]] = []
        for node, (point, candidates) in zip(chosen, self._candidates(chosen), strict=True):
            image, domain = node
            self._try_point(image, point)
            if candidates:
                splittable.append((node, candidates))
            elif image.verdict is None:
                self._settle_exactly(image, domain)
        splittable = [(node, candidates) for node, candidates in splittable if node[0].verdict is None]
        if splittable:
            self._bound(self._halves(splittable))
        self._release(chosen)

    def _candidates(self, nodes: Sequence[Node]) -> Iterator[tuple[Tensor, list[Split]]]:
        """Of each domain the point where its bound is least, and the best candidates for a split."""
        batch = self._batch(nodes)
        coefficients: dict[int, Tensor] = {}

        def observe(call: Call, a: Coefficients) -> None:
            coefficients[call.index] = dense(a)[:, 0]

        with torch.no_grad():
            bounds = batch.linear_bounds(*self._parameters(nodes), observe)
            thresholds, undecided = self.neurons.thresholds(batch.box)
            gaps = batch.gaps(coefficients).nan_to_num(torch.inf, torch.inf, torch.inf)  # unbounded: the first to split
            scores = torch.where(undecided, gaps, -torch.inf)
            best, chosen = scores.topk(min(self.search.candidates, scores.shape[1]), 1)
            at = thresholds.gather(1, chosen)
        points = bounds.minimizers()[:, 0]
        for row in range(len(nodes)):
            known = zip(chosen[row].tolist(), at[row].tolist(), best[row].tolist(), strict=True)
            yield points[row], [Split(neuron, point, True) for neuron, point, score in known if score > -torch.inf]

    def _halves(self, splittable: Sequence[tuple[Node, list[Split]]]) -> list[Node]:
        """Both sides of the best candidate of each: of which the worse half has the best bound."""
        tried = [half for node, candidates in splittable for split in candidates for half in self._sides(node, split)]
        if len(tried) == 2 * len(splittable):
            return tried
        with torch.no_grad():
            lower = self._batch(tried).linear_bounds(*self._parameters(tried)).least()[:, 0]
        worse = lower.nan_to_num(-torch.inf, -torch.inf, -torch.inf).view(-1, 2).amin(1).tolist()
        halves: list[Node] = []
        start = 0
        for _, candidates in splittable:
            scores = worse[start : start + len(candidates)]
            best = 2 * (start + scores.index(max(scores)))
            halves += tried[best : best + 2]
            start += len(candidates)
        return halves

    def _sides(self, node: Node, split: Split) -> list[Node]:
        image, parent = node
        multipliers = np.append(parent.multipliers, parent.multipliers.dtype.type(0))
        sides = [(*parent.splits, side) for side in (split, replace(split, above=False))]
        return [
            (image, replace(parent, number=next(self.counter), splits=splits, multipliers=multipliers))
            for splits in sides
        ]

    def _bound_roots(self, roots: Sequence[Node]) -> None:
        for image, root in roots:
            root.slopes = image.slopes.put(self.initial[image.position])
        self._bound(roots)
        self._release(roots)

    def _release(self, nodes: Sequence[Node]) -> None:
        """Of domains that others have taken the place of."""
        for image, domain in nodes:
            image.slopes.drop(domain.slopes)

    def _bound(self, nodes: Sequence[Node]) -> None:
        """Bound domains, then keep those that are proved as leaves and the others for later."""
        batch = self._batch(nodes)
        found = batch.optimized(*self._parameters(nodes), self.search.ascent)
        bounds, multipliers = found.lower.tolist(), found.multipliers.cpu().numpy()
        for row, (image, domain) in enumerate(nodes):
            image.domains += 1
            child = replace(
                domain, lower=max(domain.lower, bounds[row]), multipliers=multipliers[row, : len(domain.splits)].copy()
            )
            slopes = found.slopes[row, image.undecided]
            if self._proves(bounds[row]):
                self._keep(image, child, slopes)
            else:
                child.slopes = image.slopes.put(slopes)
                heapq.heappush(image.waiting, child)

    def _proves(self, lower: float) -> bool:
        return (CHECKABLE if self.search.keep_leaves else 0) < lower < math.inf

    def _settle_exactly(self, image: ImageSearch, domain: Domain) -> None:
        """Where nothing is left to split the network is affine, and the domain a linear program."""
        image.domains += 1
        batch = self._batch([(image, domain)])
        slopes, _ = self._parameters([(image, domain)])
        found = exact_leaf(batch, slopes)
        if found.multipliers is not None:
            lower = float(batch.linear_bounds(slopes, found.multipliers[None]).least())
            if self._proves(lower):
                leaf = replace(domain, lower=lower, multipliers=found.multipliers.cpu().numpy())
                self._keep(image, leaf, image.slopes[domain.slopes])
                return
        if found.point is not None:
            self._try_point(image, found.point)
        image.verdict = image.verdict or Verdict.ALL_SPLIT

    def _try_point(self, image: ImageSearch, point: Tensor) -> None:
        if image.verdict is not None:
            return
        lower, upper = self.points.lower[image.position], self.points.upper[image.position]
        point = point.to(lower.dtype).clamp(lower, upper)
        if int(predictions(self.model, point[None])) != image.label:
            image.verdict, image.point = Verdict.ATTACKED, point

    def _keep(self, image: ImageSearch, domain: Domain, slopes: Tensor) -> None:
        image.worst[domain.target] = min(domain.lower, image.worst.get(domain.target, torch.inf))
        if self.search.keep_leaves:
            image.leaves.append(replace(domain, slopes=image.slopes.put(slopes)))
            image.splits += len(domain.splits)

    def _batch(self, nodes: Sequence[Node]) -> DomainBatch:
        like = self.images[0].lower
        images = torch.tensor([image.position for image, _ in nodes], device=like.device)
        functions = torch.zeros(len(nodes), self.classes, dtype=like.dtype, device=like.device)
        for row, (image, domain) in enumerate(nodes):
            functions[row, image.label], functions[row, domain.target] = 1, -1
        most = max(len(domain.splits) for _, domain in nodes)
        neuron = torch.zeros(len(nodes), most, dtype=torch.int64, device=like.device)
        sign, threshold = functions.new_zeros(len(nodes), most), functions.new_zeros(len(nodes), most)
        for row, (_, domain) in enumerate(nodes):
            for i, split in enumerate(domain.splits):
                neuron[row, i], threshold[row, i] = split.neuron, split.threshold
                sign[row, i] = -1 if split.above else 1
        return DomainBatch(self.record, self.neurons, images, functions, Splits(neuron, sign, threshold))

    def _parameters(self, nodes: Sequence[Node]) -> tuple[Tensor, Tensor]:
        """Slopes (D, N) and multipliers (D, S)."""
        slopes = torch.stack([self._spread(image, image.slopes[domain.slopes]) for image, domain in nodes])
        multipliers = np.zeros((len(nodes), max(len(domain.splits) for _, domain in nodes)))
        for row, (_, domain) in enumerate(nodes):
            multipliers[row, : len(domain.splits)] = domain.multipliers
        return slopes, torch.from_numpy(multipliers).to(slopes)

    def _spread(self, image: ImageSearch, slopes: Tensor) -> Tensor:
        """Of the undecided neurons -> of all; those of the others have no effect."""
        return slopes.new_zeros(self.neurons.total).scatter(0, image.undecided, slopes)

    def _decide(self, searched: Sequence[ImageSearch]) -> None:
        """Give a verdict to those that are proved, or whose time is over, or whose trees nobody would read; and of the
        others to the largest, while there is too much."""
        for image in searched:
            if image.verdict is None and self._tree_bytes(image) > MOST_BYTES:
                image.verdict = Verdict.MEMORY
            elif image.verdict is None and not image.roots and not image.waiting:
                image.verdict = Verdict.PROVED
            elif image.verdict is None and image.seconds > self.search.timeout:
                image.verdict = Verdict.TIMEOUT
        kept = {image.position: self._bytes(image) for image in searched if image.verdict is None}
        while sum(kept.values()) > self.search.max_memory:
            largest = max(kept, key=kept.__getitem__)
            self.images[largest].verdict = Verdict.MEMORY
            del kept[largest]
        for image in searched:
            if image.verdict not in (None, Verdict.PROVED):
                image.give_up()

    def _bytes(self, image: ImageSearch) -> int:
        """What its waiting domains take, and leaves that are kept."""
        return (len(image.waiting) + len(image.leaves)) * self._domain_bytes(image)

    def _tree_bytes(self, image: ImageSearch) -> int:
        return Trees.most_bytes(len(image.undecided), len(image.leaves), image.splits) if image.leaves else 0

    def _domain_bytes(self, image: ImageSearch) -> int:
        return len(image.undecided) * self.record.boxes[0].like.element_size() + OVERHEAD

    def _outcome(self, image: ImageSearch) -> Outcome:
        assert image.verdict is not None
        lower = image.lower.clone()
        if image.verdict not in (Verdict.ATTACKED, Verdict.ALL_SPLIT):  # which leave domains neither proved nor waiting
            for target, worst in image.worst.items():
                lower[target] = max(float(lower[target]), worst)
        leaves = tuple(map(image.leaf, image.leaves)) if image.verdict == Verdict.PROVED else ()
        return Outcome(image.verdict, lower, image.point, image.domains, image.seconds, leaves, image.undecided)
