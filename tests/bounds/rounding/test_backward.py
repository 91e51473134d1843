"""Linear bounds that cover rounding, against adversaries who choose every rounding error."""

from __future__ import annotations

import copy
import itertools
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from certtrain.bound_methods import METHODS
from certtrain.bounds import BoundedModel
from certtrain.bounds.linear.backward import lower_bounds
from certtrain.bounds.rounding.arithmetic import ARITHMETICS
from certtrain.bounds.rounding.backward import PULLED_BACK_BY_TRANSPOSE, RELAXATION_MAGNITUDES
from certtrain.bounds.rounding.boxes import OutwardBox, enclosing_linf_box
from certtrain.bounds.rounding.table import RULES
from certtrain.errors import UnsupportedOperation
from tests.bounds.rounding.by_hand import (
    CASES,
    MODES,
    ORDERS,
    ROUNDING,
    Adversary,
    ByHand,
    exactly,
    spread,
    spread_,
)
from tests.bounds.rounding.by_hand import setting as operation
from tests.bounds.rounding.order_detector import OrderDetector

LINEAR = METHODS[1:]
LABEL = torch.tensor([1])


class Small(nn.Module):
    """Every operation that linear bounds go back through in floating point, and a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 2, 2, padding=1), nn.BatchNorm2d(2)
        self.branch, self.last = nn.Conv2d(2, 2, 1, bias=False), nn.Linear(8, 3)
        self.register_buffer("mean", torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.norm(self.first((x - self.mean) / 0.7)), 0.1)
        h = F.relu(h + 0.5 * self.branch(h))
        return self.last(F.avg_pool2d(h, 2, 1).flatten(1))


def setting(seed: int) -> tuple[BoundedModel, Tensor]:
    torch.manual_seed(seed)
    model = spread_(Small()).eval()
    return BoundedModel(model, torch.rand(1, 1, 2, 2)), torch.rand(1, 1, 2, 2)


def least_difference(values) -> Fraction:
    logits = values.reshape(-1)
    return min(logits[1] - logits[0], logits[1] - logits[2])


@pytest.mark.parametrize(
    ("arithmetic", "eps"),
    [
        pytest.param(arithmetic, eps, marks=[pytest.mark.slow] if arithmetic == "float64" else [])
        for arithmetic in ARITHMETICS
        for eps in (0.0, 0.2)
    ],
)
def test_no_adversary_falls_below_a_margin(arithmetic, eps):
    net, x = setting(len(arithmetic))
    box = enclosing_linf_box(x, eps, clip=None)
    graph = net.graph
    points = [x] if eps == 0 else [x, box.lower.float(), box.upper.float()]
    adversaries = [
        Adversary(ARITHMETICS[arithmetic], mode, order, fused)
        for mode, order, fused in itertools.product(MODES, ORDERS, (False, True))
    ]
    reached = [
        least_difference(graph.run(exactly(p) if arithmetic != "bf16" else a.stored(exactly(p)), ByHand(a)))
        for p in points
        for a in adversaries[:: 1 if arithmetic == "float32" else 5]
    ]
    for method in LINEAR:
        margins = net.margins(box, LABEL, method, arithmetic=arithmetic, intersect=False)[0]
        assert min(reached) >= Fraction(min(margins[0].item(), margins[2].item()))


@pytest.mark.parametrize("method", LINEAR)
def test_greater_errors_are_noticed(method):
    net, x = setting(0)
    box = enclosing_linf_box(x, 0.0, clip=None)
    margins = net.margins(box, LABEL, method, arithmetic="float32", intersect=False)[0]
    found = [least_difference(net.graph.run(exactly(x), ByHand(Adversary(mode=mode, size=256)))) for mode in MODES]
    assert min(found) < Fraction(min(margins[0].item(), margins[2].item()))


@pytest.mark.parametrize("arithmetic", ["float32", "float64"])
@pytest.mark.parametrize("method", LINEAR)
def test_they_lose_little(method, arithmetic):
    net, x = setting(3)
    box = enclosing_linf_box(x, 0.1, clip=None)
    plain = BoundedModel(copy.deepcopy(net.model).double(), x.double())
    expected = plain.margins(box, LABEL, method, intersect=False)
    found = net.margins(box, LABEL, method, arithmetic=arithmetic, intersect=False)
    assert (found <= expected + 1e-12).all()
    assert (found >= expected - (1e-4 if arithmetic == "float32" else 1e-7) * expected.abs().max()).all()


@pytest.mark.parametrize("method", LINEAR)
def test_a_network_that_fools_a_plain_verifier_is_not_proved(method):
    x, label = torch.tensor([[0.95]]), torch.tensor([0])
    for order in itertools.permutations(range(3)):
        net = BoundedModel(OrderDetector(order), x)
        box = enclosing_linf_box(x, 0.01)
        assert not (net.margins(box, label, method, arithmetic="float32")[0, 1] > 0).item()


# --- every operation --------------------------------------------------------------------------------------------------

REFUSED = {
    "softmax",
    "attention",
    "layer norm",
    "group norm",
    "instance norm",
    "rms norm",
    "roots",
    "interpolate",
    "interpolate, exact",
}
LINEAR_CASES = [name for name in CASES if name not in REFUSED]


def between(name: str, wide: bool) -> tuple[BoundedModel, OutwardBox, list[Tensor]]:
    """A network of one operation, a box, and points of it: its opposite corners, and others."""
    model, x = operation(name)
    y = x + wide * 0.3 * spread(*x.shape)
    points = [x, y, *(torch.where(torch.rand_like(x) < 0.5, x, y) for _ in range(2))] if wide else [x]
    return BoundedModel(model, x), OutwardBox(torch.minimum(x, y).double(), torch.maximum(x, y).double()), points


def functions_of(output: Tensor) -> Tensor:
    """(1, R, ...): some elements of the result and their negatives, and sums of all."""
    eye = torch.eye(output[0].numel(), dtype=torch.float64)[torch.randperm(output[0].numel())[:8]]
    rows = torch.cat([eye, -eye, spread(3, eye.shape[1]).double()])
    return rows.view(1, -1, *output.shape[1:])


def falls_below(net: BoundedModel, box: OutwardBox, points: list[Tensor], arithmetic: str, size: int = 1) -> int:
    """How often an adversary's result is below the bounds that a backward pass gives of linear functions of it."""
    record = net.recorded(box, arithmetic=arithmetic).recorded
    rows = functions_of(record.boxes[record.output].like)
    lower = [Fraction(bound) for bound in lower_bounds(record, record.output, rows)[0].tolist()]
    coefficients = [exactly(row) for row in rows[0]]
    count = 0
    for mode, fused in itertools.product(("up", "down", "random"), (False, True)):
        for point in points:
            adversary = Adversary(ARITHMETICS[arithmetic], mode, fused=fused, size=size)
            entering = exactly(point) if arithmetic != "bf16" else adversary.stored(exactly(point))
            result = net.graph.run(entering, ByHand(adversary)).reshape(-1)
            values = [(row.reshape(-1) * result).sum() for row in coefficients]
            count += sum(value < bound for value, bound in zip(values, lower, strict=True))
    return count


MOVES = {"more moves", "reshaping", "parts"}  # of many elements


@pytest.mark.parametrize("wide", [False, True], ids=["point", "box"])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in MOVES else []) for name in LINEAR_CASES]
)
def test_no_adversary_falls_below_what_a_backward_pass_gives_of_an_operation(name, wide):
    assert falls_below(*between(name, wide), "float32") == 0


OTHERS = [(name, arithmetic) for name in LINEAR_CASES for arithmetic in ARITHMETICS if arithmetic != "float32"]
OTHERS.remove(("cast", "float64"))  # to float32, in a network of float64: refused


@pytest.mark.slow
@pytest.mark.parametrize(("name", "arithmetic"), OTHERS)
def test_nor_in_other_arithmetics(name, arithmetic):
    for wide in (False, True):
        assert falls_below(*between(name, wide), arithmetic) == 0


@pytest.mark.parametrize("name", [name for name in LINEAR_CASES if name in ROUNDING])
def test_greater_errors_of_an_operation_are_noticed(name):
    assert falls_below(*between(name, wide=False), "float32", size=256) > 0


def test_every_operation_is_gone_back_through_or_refused():
    assert {function.__name__ for function in set(RULES) - PULLED_BACK_BY_TRANSPOSE - RELAXATION_MAGNITUDES.keys()} == {
        *("softmax", "attend", "deviation", "inverse_root", "normalized", "sqrt", "rsqrt", "reciprocal", "resize")
    }


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_linear_bounds_cannot_go_back_through_soundly_is_named(name):
    net, box, _ = between(name, wide=False)
    assert net.ibp(box, arithmetic="float32").output.lower.isfinite().any()
    with pytest.raises(UnsupportedOperation, match=r"covers rounding; methods that support it: ibp"):
        net.recorded(box, arithmetic="float32")
