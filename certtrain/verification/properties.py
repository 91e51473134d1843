"""Properties: can an input of a box have outputs that satisfy linear constraints? It is what VNN-LIB files ask.

Such a question is one about margins and misclassified points, of another network: behind the given one a linear layer
computes what is left until each constraint is met, and class 0, whose logit is just below 0, means that one is not. For
branch and bound the least of each case's constraints follows, by ReLUs, which can be split.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor, nn

from certtrain.bound_methods import BRANCH_AND_BOUND
from certtrain.bounds import BoundedModel, Box
from certtrain.bounds.rounding.boxes import nearest_above, nearest_below
from certtrain.data.seeding import generator
from certtrain.errors import UnsupportedOperation, UsageError
from certtrain.modules import device_of, evaluating
from certtrain.runtime.precision import full_precision
from certtrain.verification.attacks import Attack
from certtrain.verification.branch_and_bound import Search, branch_and_bound, root_margins
from certtrain.verification.cascade import check_cascade
from certtrain.verification.deployed import Comparison, Replay, one_by_one
from certtrain.verification.verdicts import Verdict


@dataclass(frozen=True, eq=False)
class Case:
    """Counterexamples: inputs of `box` whose outputs y satisfy rows·y ≤ limits.

    box: of (N,) float64, the elements of the flattened input; rows: (S, K), limits: (S,), float64, S ≥ 1.
    """

    box: Box
    rows: Tensor
    limits: Tensor

    def holds(self, outputs: Tensor) -> bool:
        """Whether `outputs` (K,) satisfy all of the constraints."""
        return bool((self.rows @ outputs.double() <= self.limits).all())


@dataclass(frozen=True, eq=False)
class Decision:
    """unsat: there is no counterexample; sat: `point`, of the network's input shape, is one, with `outputs` (K,).

    timeout: branch and bound had no more time; unknown: nothing that was asked has decided it.
    """

    verdict: Literal["unsat", "sat", "timeout", "unknown"]
    point: Tensor | None = None
    outputs: Tensor | None = None


DEFAULT_SEARCH = Search()


def decide(
    model: nn.Module,
    cases: Sequence[Case],
    input_shape: Sequence[int],
    methods: Sequence[str],
    attack: Attack | None = None,
    *,
    search: Search = DEFAULT_SEARCH,
    replay: Replay | None = None,
    seed: int = 0,
) -> Decision:
    """Look for a counterexample of any of the cases, and prove that there is none.

    Args:
        model: with float32 parameters; takes inputs (B, *input_shape), returns outputs (B, ...) of K elements.
        methods: of `BoundedModel.margins`, by price: each is asked only while cases are left. The last may be
            "branch-and-bound".
        attack: by which counterexamples are looked for first; None for none.
        search: how branch and bound searches; its timeout is that of all cases together.
        replay: outputs (1, ...) of an input (1, *input_shape) as they are computed in deployment, which alone decide
            whether a point is a counterexample; None: the model's. It is held against the model on points of every box.

    Raises:
        UsageError: the cases are about inputs or outputs of other sizes; branch and bound before another method.
        UnsupportedOperation: the network has an operation without a rule, or one that branch and bound cannot split
            and has to; it computes something else in deployment, or nothing that is finite.
    """
    check_cascade(methods)
    device = device_of(model)
    undecided: list[Literal["timeout", "unknown"]] = []
    with evaluating(model), full_precision():
        _check_sizes(model, cases, torch.zeros(1, *input_shape, device=device))
        comparison = None if replay is None else Comparison(model)
        for box, together in _by_box(cases):
            question = _Question(model, box, together, input_shape, device, replay or model)
            if comparison is not None:
                question.require_agreement(comparison)
            point = None if attack is None else question.attacked(attack, seed)
            refuted = torch.zeros(len(together), dtype=torch.bool)
            for method in methods:
                if point is not None or refuted.all():
                    break
                if method != BRANCH_AND_BOUND:
                    refuted |= question.refuted(method)
                    continue
                started = time.perf_counter()
                verdict, point = question.searched(search, refuted)
                search = replace(search, timeout=max(0.0, search.timeout - (time.perf_counter() - started)))
                refuted |= verdict == Verdict.PROVED
                if verdict == Verdict.TIMEOUT:
                    undecided.append("timeout")
            if point is not None:
                return Decision("sat", *point)
            if not refuted.all():
                undecided.append("unknown")
    return Decision(undecided[0] if undecided else "unsat")


def _by_box(cases: Sequence[Case]) -> Iterator[tuple[Box, list[Case]]]:
    """Neighbours that are about the same box, together."""

    def values(case: Case) -> tuple[bytes, bytes]:
        return case.box.lower.numpy().tobytes(), case.box.upper.numpy().tobytes()

    for _, group in groupby(cases, values):
        together = list(group)
        yield together[0].box, together


def _check_sizes(model: nn.Module, cases: Sequence[Case], example: Tensor) -> None:
    with torch.no_grad():
        outputs = model(example).numel()
    for case in cases:
        inputs, asked = case.box.shape[0], case.rows.shape[1]
        if (inputs, asked) != (example.numel(), outputs):
            raise UsageError(
                f"the property is about {inputs} inputs and {asked} outputs; the network has {example.numel()} and "
                f"{outputs}"
            )


class _Constraints(nn.Module):
    """The network, and behind it 0 and limits - rows·y for every constraint: (B, 1 + S).

    0 is the number just below it, since a constraint that is met with equality is met.
    """

    def __init__(self, network: nn.Module, rows: Tensor, limits: Tensor) -> None:
        super().__init__()
        self.network, self.flatten, self.left = network, nn.Flatten(), nn.Linear(rows.shape[1], 1 + len(rows))
        with torch.no_grad():
            self.left.weight.copy_(torch.cat([torch.zeros_like(rows[:1]), -rows]))
            self.left.bias.copy_(torch.cat([limits.new_tensor([-torch.finfo(limits.dtype).tiny]), limits]))

    def forward(self, x: Tensor) -> Tensor:
        return self.left(self.flatten(self.network(x)))


class _Least(nn.Module):
    """(B, S) -> (B, P): the least of each of P groups of neighbours, of the given sizes.

    min(a, b) = a - relu(a - b), by pairs, so that branch and bound has a neuron to split.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.firsts, self.differences = nn.ModuleList(), nn.ModuleList()
        while max(sizes) > 1:
            starts = [sum(sizes[:i]) for i in range(len(sizes))]
            pairs = [
                (start + i, start + min(i + 1, size - 1))
                for start, size in zip(starts, sizes, strict=True)
                for i in range(0, size, 2)
            ]
            one, other = (torch.eye(sum(sizes))[list(which)] for which in zip(*pairs, strict=True))
            self.firsts.append(_fixed_linear(one))
            self.differences.append(_fixed_linear(one - other))
            sizes = [(size + 1) // 2 for size in sizes]

    def forward(self, x: Tensor) -> Tensor:
        for first, difference in zip(self.firsts, self.differences, strict=True):
            x = first(x) - torch.relu(difference(x))
        return x


def _fixed_linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], len(weight), bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


class _Shares(nn.Module):
    """Inputs (B, 1, 1, N) as shares of the box (lower, upper), for attacks."""

    def __init__(self, network: nn.Module, box: Box) -> None:
        super().__init__()
        self.network, self.box = network, box

    def point(self, share: Tensor) -> Tensor:
        lower, upper = self.box.lower, self.box.upper
        return (lower + share.view(-1, *lower.shape[1:]) * (upper - lower)).clamp(lower, upper)

    def forward(self, share: Tensor) -> Tensor:
        return self.network(self.point(share))


class _Judged(nn.Module):
    """Points (B, ...) -> (B, 2): class 1 is predicted of those that are counterexamples in deployment."""

    def __init__(self, question: _Question) -> None:
        super().__init__()
        self.question = question

    def forward(self, points: Tensor) -> Tensor:
        found = [self.question.counterexample(point) is not None for point in points]
        return torch.tensor([[0.0, 1.0 if one else -1.0] for one in found])


class _Question:
    """Cases about one box: the network that tells them apart, what is proved of it, and its points."""

    def __init__(
        self,
        model: nn.Module,
        box: Box,
        cases: Sequence[Case],
        input_shape: Sequence[int],
        device: torch.device,
        replay: Replay,
    ) -> None:
        self.cases, self.replay = cases, replay
        self.sizes = [len(case.limits) for case in cases]
        self.label = torch.zeros(1, dtype=torch.int64, device=device)

        def shaped(part: Tensor) -> Tensor:
            return part.to(device).view(1, *input_shape)

        self.enclosing = Box(nearest_below(box.lower, torch.float32), nearest_above(box.upper, torch.float32)).map(
            shaped
        )
        self.points = _float32_points(box).map(shaped)
        self.constraints = _Constraints(model, *_in_float32(model, self.enclosing, cases)).to(device)

    def require_agreement(self, comparison: Comparison) -> None:
        """Raises where the network, on points of the box, is not what `replay` computes."""
        inputs = _spread_over(self.points)
        outputs = one_by_one(self.replay, inputs)
        if not outputs.isfinite().any(0).all():
            raise UnsupportedOperation(
                "an output of the network is not finite on inputs that the property is about: nothing is known of it"
            )
        if not comparison.agrees(inputs, outputs):
            raise UnsupportedOperation(
                "the network computes otherwise than in deployment on inputs that the property is about: no proof "
                "of it would hold there"
            )

    def least(self) -> nn.Module:
        """Class 1 + i is predicted where case i holds."""
        return nn.Sequential(self.constraints, _Least([1, *self.sizes]).to(self.label.device)).eval()

    def refuted(self, method: str) -> Tensor:
        """(cases,) bool: whether the case has a constraint that no input of the box meets."""
        net = BoundedModel(self.constraints, self.enclosing.lower)
        with torch.no_grad():
            beyond = net.margins(self.enclosing, self.label, method)[0, 1:]  # lower bounds of rows·y - limits
        return torch.stack([(part > 0).any() for part in beyond.split(self.sizes)]).cpu()

    def searched(self, search: Search, refuted: Tensor) -> tuple[Verdict, tuple[Tensor, Tensor] | None]:
        """What branch and bound finds of the cases that are not refuted, and a counterexample."""
        net = BoundedModel(self.least(), self.enclosing.lower)
        record = net.tightened(self.enclosing)
        above = torch.cat([torch.zeros_like(refuted[:1]), refuted])
        known = torch.where(above, 1.0, -torch.inf)  # of what is refuted a margin is positive, whatever its size
        margins = root_margins(record, self.label, known[None].to(self.enclosing.lower))
        (outcome,) = branch_and_bound(_Judged(self), record, self.label, margins, search, self.points)
        return outcome.verdict, None if outcome.point is None else self.counterexample(outcome.point)

    def attacked(self, attack: Attack, seed: int) -> tuple[Tensor, Tensor] | None:
        shares = _Shares(self.least(), self.points)
        middle = torch.full((1, 1, 1, self.points.lower.numel()), 0.5, device=self.label.device)
        reach = 0.5 + 2**-20  # so that the ends, which the box of shares is cut to, are in it
        found, _ = attack(shares, middle, self.label, reach, [generator(seed)])
        return self.counterexample(shares.point(found)[0])

    def counterexample(self, point: Tensor) -> tuple[Tensor, Tensor] | None:
        """The point, of the input's shape, and its outputs, if these satisfy a case as `replay` computes them."""
        with torch.no_grad():
            outputs = self.replay(point[None]).flatten().cpu()
        return (point.cpu(), outputs) if any(case.holds(outputs) for case in self.cases) else None


@torch.no_grad()
def _in_float32(model: nn.Module, box: Box, cases: Sequence[Case]) -> tuple[Tensor, Tensor]:
    """All rows (S, K) and limits (S,) in float32, such that outputs on the box that meet the given ones meet these."""
    rows, limits = torch.cat([case.rows for case in cases]), torch.cat([case.limits for case in cases])
    lost = (rows - rows.float().double()).abs()
    if lost.any():
        outputs = BoundedModel(model, box.lower).ibp(box).output
        largest = torch.maximum(outputs.lower.abs(), outputs.upper.abs()).flatten().double().cpu()
        limits = limits + torch.where(lost > 0, lost * largest, 0).sum(1)
    return rows.float(), nearest_above(limits, torch.float32)


def _float32_points(box: Box) -> Box:
    """The float32 numbers in a float64 box; where an interval has none, the nearest one stands for it."""
    lower, upper = nearest_above(box.lower, torch.float32), nearest_below(box.upper, torch.float32)
    none = lower > upper
    nearest = box.center.float()
    return Box(torch.where(none, nearest, lower), torch.where(none, nearest, upper))


def _spread_over(box: Box) -> Tensor:
    """(8, ...): both ends of a box (1, ...) and, always the same, three other corners and three points inside."""
    shares = torch.rand(
        8, *box.shape[1:], generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu"
    )
    shares[0], shares[1], shares[2:5] = 0.0, 1.0, shares[2:5].round()
    lower, upper = box.lower.cpu().double(), box.upper.cpu().double()
    return (lower + shares * (upper - lower)).to(box.lower).clamp(box.lower, box.upper)
