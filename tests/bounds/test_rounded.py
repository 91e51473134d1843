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
from certtrain.bounds.rounding.arithmetic import ARITHMETICS
from certtrain.bounds.rounding.boxes import enclosing_linf_box
from certtrain.errors import UnsupportedOperation
from tests.bounds.test_rounding import OrderDetector
from tests.bounds.test_roundings import MODES, ORDERS, Adversary, ByHand, exactly, spread_

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


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("eps", [0.0, 0.2])
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


@pytest.mark.parametrize(
    ("layer", "named"), [(nn.MaxPool2d(2), "MaxPool2d"), (nn.ReLU6(), "ReLU6"), (nn.Hardtanh(), "Hardtanh")]
)
def test_what_linear_bounds_cannot_go_back_through_soundly_is_named(layer, named):
    model = nn.Sequential(nn.Conv2d(1, 2, 1), layer, nn.Flatten(), nn.LazyLinear(3))
    x = torch.rand(1, 1, 4, 4)
    model(x)
    box = enclosing_linf_box(x, 0.1)
    net = BoundedModel(model.eval(), x)
    assert net.margins(box, LABEL, arithmetic="float32").isfinite().all()
    with pytest.raises(UnsupportedOperation, match=rf"{named}.* covers rounding; methods that support it: ibp"):
        net.margins(box, LABEL, "crown-ibp", arithmetic="float32")
