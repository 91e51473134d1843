"""Properties: can an input of a box have outputs that satisfy linear constraints? It is what VNN-LIB files ask.

Such a question is one about margins and misclassified points, of another network: behind the given one a linear layer
computes what is left until each constraint is met, and class 0, whose logit is 0, means that one is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor, nn

from certtrain.bounds import BoundedModel, Box
from certtrain.bounds.model import evaluating
from certtrain.bounds.rounding import nearest_above, nearest_below
from certtrain.data.seeding import generator
from certtrain.errors import UsageError
from certtrain.runtime.precision import full_precision
from certtrain.verification.attacks import Attack

Replay = Callable[[Tensor], Tensor]


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
    """unsat: there is no counterexample; sat: `point`, of the network's input shape, is one, with `outputs` (K,)."""

    verdict: Literal["unsat", "sat", "unknown"]
    point: Tensor | None = None
    outputs: Tensor | None = None


def decide(
    model: nn.Module,
    cases: Sequence[Case],
    input_shape: Sequence[int],
    methods: Sequence[str],
    attack: Attack | None = None,
    *,
    replay: Replay | None = None,
    seed: int = 0,
) -> Decision:
    """Look for a counterexample of any of the cases, and prove that there is none.

    Args:
        model: with float32 parameters; takes inputs (B, *input_shape), returns outputs (B, ...) of K elements.
        methods: of `BoundedModel.margins`, by price: each is asked only while cases are left.
        attack: by which counterexamples are looked for first; None for none.
        replay: outputs (1, ...) of an input (1, *input_shape) as they are computed in deployment, which alone decide
            whether a point is a counterexample; None: the model's.

    Raises:
        UsageError: the cases are about inputs or outputs of other sizes.
        UnsupportedOperation: the network has an operation without a rule.
    """
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    settled = True
    with evaluating(model), full_precision():
        _check_sizes(model, cases, torch.zeros(1, *input_shape, device=device))
        for box, together in _by_box(cases):
            constraints = _Constraints(model, together).to(device)
            if attack is not None:
                found = _counterexample(constraints, box, together, input_shape, attack, replay or model, seed)
                if found is not None:
                    return Decision("sat", *found)
            settled = settled and _refuted(constraints, box, together, input_shape, methods, device)
    return Decision("unsat" if settled else "unknown")


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
    """The network, and behind it 0 and limits - rows·y for every constraint of every case: (B, 1 + S)."""

    def __init__(self, network: nn.Module, cases: Sequence[Case]) -> None:
        super().__init__()
        rows, limits = torch.cat([case.rows for case in cases]), torch.cat([case.limits for case in cases])
        self.network, self.flatten, self.left = network, nn.Flatten(), nn.Linear(rows.shape[1], 1 + len(rows))
        with torch.no_grad():
            self.left.weight.copy_(torch.cat([torch.zeros_like(rows[:1]), -rows]))
            limits = nearest_above(limits, torch.float32)  # met by all that is met
            self.left.bias.copy_(torch.cat([torch.zeros_like(limits[:1]), limits]))

    def forward(self, x: Tensor) -> Tensor:
        return self.left(self.flatten(self.network(x)))


def _refuted(
    constraints: _Constraints,
    box: Box,
    cases: Sequence[Case],
    input_shape: Sequence[int],
    methods: Sequence[str],
    device: torch.device,
) -> bool:
    """Whether each case has a constraint that no input of the box meets."""
    enclosing = Box(nearest_below(box.lower, torch.float32), nearest_above(box.upper, torch.float32))
    enclosing = enclosing.map(lambda part: part.to(device).view(1, *input_shape))
    net = BoundedModel(constraints, enclosing.lower)
    label = torch.zeros(1, dtype=torch.int64, device=device)
    sizes = [len(case.limits) for case in cases]
    refuted = torch.zeros(len(cases), dtype=torch.bool)
    for method in methods:
        with torch.no_grad():
            beyond = net.margins(enclosing, label, method)[0, 1:]  # lower bounds of rows·y - limits
        refuted |= torch.stack([(part > 0).any() for part in beyond.split(sizes)]).cpu()
        if refuted.all():
            return True
    return False


class _Satisfaction(nn.Module):
    """Inputs (B, 1, 1, N) as shares of the box, to 0 and what is left for each case's worst constraint: (B, 1 + cases).

    Class 1 + i is predicted where case i holds.
    """

    def __init__(self, constraints: _Constraints, box: Box, cases: Sequence[Case], input_shape: Sequence[int]) -> None:
        super().__init__()
        self.constraints, self.input_shape = constraints, tuple(input_shape)
        self.sizes = [len(case.limits) for case in cases]
        inner = Box(nearest_above(box.lower, torch.float32), nearest_below(box.upper, torch.float32))
        between = inner.lower > inner.upper  # no float32 is in the interval: the nearest one stands for it
        nearest = box.center.float()
        device = constraints.left.weight.device
        self.lower = torch.where(between, nearest, inner.lower).to(device)
        self.upper = torch.where(between, nearest, inner.upper).to(device)

    def point(self, share: Tensor) -> Tensor:
        x = self.lower + share.flatten(1) * (self.upper - self.lower)
        return x.clamp(self.lower, self.upper).view(-1, *self.input_shape)

    def forward(self, share: Tensor) -> Tensor:
        left = self.constraints(self.point(share))
        return torch.stack([left[:, 0], *(part.amin(1) for part in left[:, 1:].split(self.sizes, 1))], 1)


def _counterexample(
    constraints: _Constraints,
    box: Box,
    cases: Sequence[Case],
    input_shape: Sequence[int],
    attack: Attack,
    replay: Replay,
    seed: int,
) -> tuple[Tensor, Tensor] | None:
    """A point of the input's shape and its outputs, which satisfy a case when they are computed by `replay`."""
    satisfaction = _Satisfaction(constraints, box, cases, input_shape)
    middle = torch.full((1, 1, 1, math.prod(input_shape)), 0.5, device=constraints.left.weight.device)
    label = torch.zeros(1, dtype=torch.int64, device=middle.device)
    reach = 0.5 + 2**-20  # so that the ends, which the box of shares is cut to, are in it
    shares, _ = attack(satisfaction, middle, label, reach, [generator(seed)])
    with torch.no_grad():
        point = satisfaction.point(shares)
        outputs = replay(point).flatten().cpu()
    return (point[0].cpu(), outputs) if any(case.holds(outputs) for case in cases) else None
