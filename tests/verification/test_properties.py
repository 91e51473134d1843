from __future__ import annotations

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import nn

from certtrain.bound_methods import BRANCH_AND_BOUND, METHODS, STAGES
from certtrain.bounds import BoundedModel, Box
from certtrain.bounds.linear.beta import Ascent
from certtrain.errors import UnsupportedOperation, UsageError
from certtrain.verification import properties
from certtrain.verification.attacks import APGD, PGD, Ensemble, TargetedAPGD
from certtrain.verification.branch_and_bound import Search
from certtrain.verification.properties import Case, _Least

decide = partial(properties.decide, search=Search(timeout=math.inf))  # no verdict depends on the clock
ATTACK = Ensemble((PGD(20, 2), APGD("ce", 20), TargetedAPGD(20)))


def mlp(seed: int = 0, inputs: int = 3, hidden: int = 4, outputs: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs)).eval()


def least_excess(model: nn.Module, case: Case) -> float:
    """The least over the box of max_s (rows·y - limits)_s, exactly: a linear program for each activation pattern."""
    first, second = (np.asarray(model[i].weight.detach().double()) for i in (0, 2))
    bias, offset = (np.asarray(model[i].bias.detach().double()) for i in (0, 2))
    rows, limits = case.rows.numpy(), case.limits.numpy()
    ends = list(zip(case.box.lower.tolist(), case.box.upper.tolist(), strict=True))
    best = np.inf
    for pattern in itertools.product([0.0, 1.0], repeat=len(bias)):
        on = np.array(pattern)
        weight, constant = second @ (on[:, None] * first), second @ (on * bias) + offset
        # variables: x and t; minimise t with rows·y - limits <= t, and the pattern's signs
        above = np.hstack([rows @ weight, -np.ones((len(rows), 1))])
        signs = np.hstack([np.where(on[:, None] > 0, -first, first), np.zeros((len(bias), 1))])
        result = linprog(
            [0.0] * len(ends) + [1.0],
            np.vstack([above, signs]),
            np.concatenate([limits - rows @ constant, np.where(on > 0, bias, -bias)]),
            bounds=[*ends, (None, None)],
        )
        if result.status == 0:
            best = min(best, result.fun)
    return best


def random_cases(seed: int, radius: float, count: int) -> list[Case]:
    """Conjunctions of one to three constraints, near the middle of what the outputs are."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    center = drawn(3)
    box = Box(center - radius, center + radius)
    return [Case(box, drawn(size, 3), drawn(size) / 2) for size in (1 + i % 3 for i in range(count))]


@pytest.mark.parametrize("radius", [0.05, pytest.param(0.5, marks=pytest.mark.slow)])
def test_verdicts_are_those_of_linear_programs(radius):
    """Of every pattern of activations; constraints of more than one conjunction and of several rows among them."""
    verdicts = []
    for seed in range(10):
        model, cases = mlp(seed), random_cases(seed, radius, 1 + seed % 3)
        least = min(least_excess(model, case) for case in cases)
        decision = decide(model, cases, [3], METHODS, ATTACK)
        verdicts.append(decision.verdict)
        if decision.verdict == "unsat":
            assert least > -1e-6
        if decision.verdict == "sat":
            assert least < 1e-6
            point = decision.point
            assert torch.equal(model(point[None])[0], decision.outputs)
            assert any(case.holds(decision.outputs) for case in cases)
            assert ((cases[0].box.lower <= point.double()) & (point.double() <= cases[0].box.upper)).all()
        if abs(least) > 0.2:
            assert decision.verdict != "unknown"
        if abs(least) > 1e-4:
            assert decide(model, cases, [3], STAGES, ATTACK).verdict == ("unsat" if least > 0 else "sat")
            assert decide(model, cases, [3], [BRANCH_AND_BOUND]).verdict == ("unsat" if least > 0 else "sat")
    assert {"unsat", "sat"} <= set(verdicts)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("methods", [*([method] for method in METHODS), [BRANCH_AND_BOUND]])
def test_coefficients_that_float32_does_not_have_refute_nothing_that_holds(methods, seed):
    """The first output, twice, by coefficients that float32 cannot tell apart: their difference alone decides."""
    generator = torch.Generator().manual_seed(seed)
    rounded, size = torch.rand(1, generator=generator).double(), 10.0 ** (5 + seed % 3)
    rows = torch.tensor([[float(rounded) - 1e-9 * float(rounded), -float(rounded)]], dtype=torch.float64)
    assert torch.equal(rows[0, 0].float(), -rows[0, 1].float())
    model = nn.Linear(1, 2)
    with torch.no_grad():
        model.weight.fill_(1.0)
        model.bias.zero_()
    point = torch.tensor([size], dtype=torch.float64)
    holds = Case(Box(point, point), rows, 0.5 * (rows @ point.expand(2)))  # half of a negative difference is above it
    assert holds.holds(model(point.float())), "the witness: float64"
    assert decide(model, [holds], [1], methods).verdict != "unsat"
    refutable = Case(Box(point, point), rows, rows @ point.expand(2) - 0.01 * size)
    assert decide(model, [refutable], [1], methods).verdict == "unsat"


@pytest.mark.parametrize("sizes", [[1], [2], [3, 1], [1, 5, 2, 8, 4]])
def test_the_least_of_neighbours(sizes):
    values = torch.randn(20, sum(sizes), generator=torch.Generator().manual_seed(0))
    expected = torch.stack([part.amin(1) for part in values.split(sizes, 1)], 1)
    torch.testing.assert_close(_Least(sizes)(values), expected)


def test_a_property_that_takes_longer_than_there_is_time():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 3)).eval()
    verdicts = []
    for seed in (1, 3, 4, 5):
        cases = [Case(case.box, 3 * case.rows, case.limits - 1.5) for case in random_cases(seed, 1.0, 2)]
        decided = decide(model, cases, [3], [BRANCH_AND_BOUND]).verdict
        late = decide(model, cases, [3], [BRANCH_AND_BOUND], search=Search(timeout=0)).verdict
        assert decided in ("sat", "unsat")
        assert late in (decided, "timeout")
        verdicts.append(late)
    assert "timeout" in verdicts


def robustness(center, radius, label, classes):
    box = Box(center - radius, center + radius)
    eye = torch.eye(classes, dtype=torch.float64)
    return [Case(box, (eye[label] - eye[j])[None], torch.zeros(1, dtype=torch.float64))
            for j in range(classes) if j != label]  # fmt: skip


def test_robustness_is_what_margins_say():
    model = mlp(3, inputs=5, hidden=8, outputs=4)
    centers = torch.rand(20, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    radius = 0.4
    labels = model(centers.float()).argmax(1)
    box = Box((centers - radius).float(), (centers + radius).float())
    margins = BoundedModel(model, centers.float()).margins(box, labels).scatter(1, labels[:, None], torch.inf).amin(1)
    clear = margins.abs() > 1e-4
    verdicts = [decide(model, robustness(*one, 4), [5], ["ibp"]).verdict
                for one in zip(centers, [radius] * 20, labels.tolist(), strict=True)]  # fmt: skip
    expected = ["unsat" if margin > 0 else "unknown" for margin in margins.tolist()]
    assert clear.sum() > 15
    assert {"unsat", "unknown"} == set(verdicts)
    assert [v for v, c in zip(verdicts, clear.tolist(), strict=True) if c] == [
        e for e, c in zip(expected, clear.tolist(), strict=True) if c
    ]


def identity(size=1):
    model = nn.Linear(size, size, bias=False).eval()
    nn.init.eye_(model.weight)
    return model


def at_least(limit, low, high):
    box = Box(torch.tensor([low], dtype=torch.float64), torch.tensor([high], dtype=torch.float64))
    return Case(box, torch.tensor([[-1.0]]).double(), torch.tensor([-limit]).double())


def test_several_boxes_are_asked_about_one_after_the_other():
    model = identity()
    assert decide(model, [at_least(2.0, 0, 1), at_least(3.0, 1, 2.5)], [1], ["ibp"], ATTACK).verdict == "unsat"
    decision = decide(model, [at_least(2.0, 0, 1), at_least(3.0, 1, 3.5)], [1], ["ibp"], ATTACK)
    assert decision.verdict == "sat"
    assert 3 <= decision.point.item() <= 3.5
    assert decide(model, [], [1], ["ibp"], ATTACK).verdict == "unsat"


def test_what_runs_in_deployment_decides_whether_a_point_counts():
    """Where rounding alone tells them apart."""
    model, cases = identity(), [at_least(1.0, 0, 1)]
    assert decide(model, cases, [1], ["ibp"], ATTACK).verdict == "sat"
    assert decide(model, cases, [1], ["ibp"], ATTACK, replay=lambda x: model(x) * (1 - 1e-6)).verdict == "unknown"


@pytest.mark.parametrize("box", [(0.0, 1.0), (3.0, 3.0 + 1e-6), (-2.0, -2.0), (254.0, 255.0), (1e6, 2e6)])
@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("wrong", [lambda x: 1.1 * x, lambda x: -x, lambda x: 0 * x, lambda x: x / 0 + torch.inf])
def test_nothing_is_proved_of_a_network_that_is_another_one_in_deployment(box, offset, wrong):
    class Shifted(nn.Module):
        """Its second output has a bias of its own, the third is constant."""

        def forward(self, x):
            return torch.cat([x + offset, x + 1e4, torch.ones_like(x)], 1)

    case, model = at_least(3e6, *box), Shifted().eval()
    case = Case(case.box, torch.cat([case.rows, torch.zeros(1, 2)], 1), case.limits)
    assert decide(model, [case], [1], ["ibp"], replay=model).verdict == "unsat"
    with pytest.raises(UnsupportedOperation, match=r"computes otherwise|not finite"):
        decide(model, [case], [1], ["ibp"], replay=lambda x: model(wrong(x)))


def test_nothing_is_proved_of_outputs_that_are_not_finite():
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU()).eval()
    nn.init.constant_(model[0].bias, torch.inf)
    with pytest.raises(UnsupportedOperation, match="not finite"):
        decide(model, [at_least(1.0, 0, 1)], [1], ["ibp"], replay=model)


@pytest.mark.parametrize("rows", [[[1, 0], [0, -1]], [[0, -1], [1, 0]], [[1, -1]], [[-1, 0], [1, 0], [0, -1]]])
@pytest.mark.parametrize(("methods", "attack"), [(["ibp"], ATTACK), (STAGES, ATTACK), ([BRANCH_AND_BOUND], None)])
def test_a_constraint_that_is_met_with_equality_is_met(rows, methods, attack):
    """At x = (·, 1) alone: the first output is 0 everywhere, and no number is below it."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU()).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
        model[0].bias.copy_(torch.tensor([-5.0, 0.0]))
    box, rows = Box(torch.zeros(2).double(), torch.ones(2).double()), torch.tensor(rows, dtype=torch.float64)
    limits = rows @ torch.tensor([0.0, 1.0], dtype=torch.float64)
    decision = decide(model, [Case(box, rows, limits)], [2], methods, attack)
    assert decision.verdict == "sat"
    assert decision.point[1] == 1
    assert decision.outputs.tolist() == [0, 1]
    assert decide(model, [Case(box, rows, limits - 1e-6)], [2], methods, attack).verdict != "sat"


def test_a_search_goes_on_from_points_that_deployment_does_not_confirm():
    """x - 1.2·relu(x - 0.6) is 0.52 at x = 1 and above that from 0.52 on; deployment, where rounding differs, gives
    less than the limit above 0.9, where the search begins."""
    model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1, bias=False)).eval()
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].bias.copy_(torch.tensor([0.0, -0.6]))
        model[2].weight.copy_(torch.tensor([[1.0, -1.2]]))
        limit = model(torch.ones(1, 1)).item() - 1e-6
    asked = []

    def deployed(x):
        asked.append(x.item())
        y = model(x)
        return torch.where(x > 0.9, y.clamp(max=limit - 1e-6), y)

    search = Search(timeout=math.inf, ascent=Ascent(steps=0))
    decision = decide(model, [at_least(limit, 0, 1)], [1], [BRANCH_AND_BOUND], search=search, replay=deployed)
    assert asked[8] == 1, "the first but for those where both are compared"
    assert decision.verdict == "sat"
    assert limit <= decision.point.item() <= 0.9


def test_an_input_that_is_fixed_between_two_floats_is_the_nearest_one():
    model = nn.Sequential(nn.Linear(2, 1, bias=False)).eval()
    nn.init.ones_(model[0].weight)
    box = Box(torch.tensor([0.1, 0.0], dtype=torch.float64), torch.tensor([0.1, 1.0], dtype=torch.float64))
    case = Case(box, torch.tensor([[-1.0]]).double(), torch.tensor([-1.05]).double())
    decision = decide(model, [case], [2], ["ibp"], ATTACK)
    assert decision.verdict == "sat"
    assert decision.point[0] == np.float32(0.1)


def test_a_property_of_other_sizes_is_refused():
    with pytest.raises(UsageError, match="3 inputs and 3 outputs; the network has 4 and 2"):
        decide(mlp(0, inputs=4, outputs=2), random_cases(0, 0.1, 1), [4], ["ibp"])


@pytest.mark.parametrize("methods", [["ibp"], ["crown"], METHODS, ["ibp", BRANCH_AND_BOUND]])
def test_a_counterexample_is_not_refuted_because_something_overflows(methods):
    """2e38 (a + b - c - d) - 1 is -1 where all are 1; a sum on the way to it is not finite."""
    model = nn.Sequential(nn.Linear(4, 1)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[2e38, 2e38, -2e38, -2e38]]))
        model[0].bias.fill_(-1.0)
    ends = torch.full((4,), 1 - 2.0**-6, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    case = Case(Box(*ends), torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
    assert decide(model, [case], [4], methods).verdict != "unsat"
