"""Every rule's count of roundings, against each operation in rational arithmetic with an adversary's errors.

`BY_HAND` has an operation for each of `rounding.table`; a rule without one fails here. What an adversary reaches must
lie in the sound box of a box that is a point.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

from certtrain.bounds import BoundedModel, Box
from certtrain.bounds.graph import leaves
from certtrain.bounds.rounding.arithmetic import ARITHMETICS
from certtrain.bounds.rounding.boxes import OutwardBox, enclosing_linf_box
from certtrain.bounds.rounding.table import RULES
from certtrain.errors import UnsupportedOperation
from tests.bounds.rounding.by_hand import (
    BY_HAND,
    CASES,
    FORMULAS,
    IDENTITIES,
    MODES,
    ORDERS,
    ROUNDING,
    Adversary,
    ByHand,
    One,
    Values,
    adversaries,
    exactly,
    outside,
    setting,
    sound_box,
    spread,
)

COARSE = [name for name in ARITHMETICS if name not in ("float32", "float64")]


def test_every_sound_rule_has_its_operation_by_hand_and_a_network():
    assert {f.__name__ for f in RULES.keys() ^ BY_HAND.keys()} == set()
    used = set()
    for name in CASES:
        model, x = setting(name)
        used |= {step.function for step in BoundedModel(model, x).graph.steps}
    assert {f.__name__ for f in RULES.keys() - used - IDENTITIES} == set()


@pytest.mark.parametrize(
    "arithmetic", ["float32", "float64", *(pytest.param(a, marks=pytest.mark.slow) for a in COARSE)]
)
@pytest.mark.parametrize("name", CASES)
def test_no_adversary_leaves_the_box(name, arithmetic):
    model, x = setting(name, seed=len(arithmetic))
    net = BoundedModel(model, x)
    if (name, arithmetic) == ("cast", "float64"):
        pytest.skip("to float32, in a network of float64: refused")
    box = sound_box(net, x, arithmetic)
    assert box.lower.isfinite().all()
    graph, formulas = net.graph, FORMULAS if "batch_norm" in name else 1
    for adversary in adversaries(arithmetic, formulas)[:: 1 if arithmetic == "float32" else 5]:
        values = exactly(x) if arithmetic != "bf16" else adversary.stored(exactly(x))
        assert outside(box, graph.run(values, ByHand(adversary))) == 0, vars(adversary)


@pytest.mark.parametrize("neighbour", [1e30, math.inf])
@pytest.mark.parametrize("name", CASES)
def test_an_image_has_the_box_that_it_has_alone(name, neighbour):
    """Whatever stands beside it in a batch, of which something on the way may overflow."""
    model, x = setting(name)
    net, x = BoundedModel(model, x), x[:1]
    far = torch.full_like(x, neighbour, dtype=torch.float64)
    batch = OutwardBox(torch.cat([x.double(), -far]), torch.cat([x.double(), far]))
    for arithmetic in ("float32", "bf16"):
        alone, together = (net.ibp(box, arithmetic=arithmetic).output for box in (batch.take(slice(1)), batch))
        width = (alone.upper - alone.lower).amax()
        for end in ("lower", "upper"):  # but for the order in which PyTorch sums
            difference = (getattr(together, end)[:1] - getattr(alone, end)).abs().amax()
            assert difference <= 1e-3 * width + 1e-300


@pytest.mark.parametrize("name", ROUNDING)
def test_signs_chosen_for_the_result_stay_inside_and_great_errors_are_noticed(name):
    """For one output: each rounding's sign is that of its effect."""
    model, x = setting(name, seed=1)
    net = BoundedModel(model, x)
    box, graph = sound_box(net, x, "float32"), net.graph

    def result(signs: dict[int, int] | str, size: int = 1) -> tuple[Values, int]:
        adversary = Adversary(mode=signs, size=size)
        return graph.run(exactly(x), ByHand(adversary)), adversary.roundings

    exact, count = result({})
    output = count % exact.size
    effects = {k: result({k: 1})[0].reshape(-1)[output] - exact.reshape(-1)[output] for k in range(count)}
    for direction in (1, -1):
        signs = {k: direction * ((effect > 0) - (effect < 0)) for k, effect in effects.items()}
        assert outside(box, result(signs)[0]) == 0
    assert max(outside(box, result(mode, size=64)[0]) for mode in MODES) > 0


def test_alpha_costs_four_roundings():
    """x + α·c with x = 0: c and α as they are stored, their product, and the sum."""
    model = One(lambda self, x: torch.add(x, self.c, alpha=0.7), torch.tensor([[3.0]]))
    x = torch.zeros(1, 1)
    box = sound_box(BoundedModel(model, x), x, "float32")
    reached = Fraction(0.7) * 3 * (1 + Fraction(1, 2**24)) ** 4
    assert Fraction(2.1) * (1 + Fraction(3, 2**24)) < reached <= Fraction(box.upper.item())


# --- sums of thousands ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["up", "down", "away from zero"])
@pytest.mark.parametrize("sign", ["equal", "cancelling"])
def test_long_sums(mode, sign):
    torch.manual_seed(0)
    model = nn.Linear(4096, 1)
    x = torch.rand(1, 4096)
    with torch.no_grad():
        model.weight.copy_(torch.rand(1, 4096))
        if sign == "cancelling":
            model.weight[0, 1::2] = -model.weight[0, ::2] * x[0, ::2] / x[0, 1::2]
    net = BoundedModel(model, x)
    box, graph = sound_box(net, x, "float32"), net.graph
    for order in ORDERS:
        assert outside(box, graph.run(exactly(x), ByHand(Adversary(mode=mode, order=order)))) == 0


# --- BatchNorm folded into what is before it --------------------------------------------------------------------------


def folded(a: Adversary, weight: Values, bias: Values, norm: nn.BatchNorm1d) -> tuple[Values, Values]:
    """The layer's weights and bias with a BatchNorm in them: the bias is centred first, or last."""
    m, v, w, b = (exactly(p) for p in (norm.running_mean, norm.running_var, norm.weight, norm.bias))
    r = a.rounded
    scale = r(w * r(Fraction(1) / a.root(r(v + a.rounded(exactly(norm.eps))))))
    if a.fused:
        return r(weight * scale[:, None]), r(r(r(bias * scale) - r(m * scale)) + b)
    return r(weight * scale[:, None]), r(r(r(bias - m) * scale) + b)


BETWEEN: dict[str, Callable[[], list[nn.Module]]] = {
    "nothing": lambda: [],
    "Identity": lambda: [nn.Identity()],
    "Dropout": lambda: [nn.Dropout(0.5), nn.Identity(), nn.Dropout(0.2)],
    "flatten": lambda: [nn.Flatten()],
    "another BatchNorm": lambda: [nn.BatchNorm1d(2)],
    "another BatchNorm and Dropout": lambda: [nn.Dropout(0.5), nn.BatchNorm1d(2), nn.Identity()],
}


@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize(
    ("inputs", "what"),
    [(4, "terms that cancel"), (4, "a mean beside small terms"), (4096, "a mean beside small terms")],
)
def test_folded_batch_norm(between, inputs, what):
    """Every weight is rounded once more for each; the mean becomes a part of the bias, one term of a long sum."""
    torch.manual_seed(inputs)
    model = nn.Sequential(nn.Linear(inputs, 2), *BETWEEN[between](), nn.BatchNorm1d(2)).eval()
    norms = [module for module in model if isinstance(module, nn.BatchNorm1d)]
    x = torch.rand(1, inputs)
    x[0, 1::2] = x[0, ::2]
    with torch.no_grad():
        model[0].weight[:, 1::2] = -model[0].weight[:, ::2]
        model[0].bias.zero_()
        for norm in norms:
            norm.weight.copy_(torch.tensor([1.0, -2.0]))
            norm.running_var.copy_(torch.tensor([0.5, 3.0]))
            if what == "a mean beside small terms":
                model[0].weight.mul_(1e-4)
                norm.running_mean.copy_(torch.tensor([3.0, 40.0]))
    box = sound_box(BoundedModel(model, x), x, "float32")
    assert box.lower.isfinite().all()
    ways = itertools.product(MODES, (False, True), (False, True)) if inputs < 100 else [("up", False, True)]
    for mode, fused, first in ways:
        adversary = Adversary(mode=mode, fused=fused)
        weight, bias = exactly(model[0].weight), exactly(model[0].bias)
        for norm in norms:
            weight, bias = folded(adversary, weight, bias, norm)
        for row, shift, low, high in zip(weight, bias, box.lower[0].tolist(), box.upper[0].tolist(), strict=True):
            terms = list(adversary.product(exactly(x)[0], row))
            terms.insert(0 if first else len(terms), shift)
            assert Fraction(low) <= adversary.sum(terms) <= Fraction(high), (mode, fused, first)
            if inputs > 100:
                break


# --- the ends of the range --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [-36, -30, -20, 20, 30, 36])
def test_folded_weights_that_overflow_or_underflow(exponent):
    """The deployed network's, folded in float32 by hand with every order of two; subnormal numbers flushed or not."""
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -2.0, 3.0], [0.5, 0.5, -1.0]]) * 10.0**exponent)
        model[0].bias.zero_()
        model[1].weight.copy_(torch.tensor([1e-8, 1e8]))
        model[1].running_var.copy_(torch.tensor([1e4, 1e-4]))
    x = torch.tensor([[1.0, 2.0, 0.5]])
    box = sound_box(BoundedModel(model, x), x, "float32")
    assert not box.lower.isnan().any()
    scale = (model[1].weight / torch.sqrt(model[1].running_var + model[1].eps)).detach()
    for flush in (False, True):
        weight = (model[0].weight * scale[:, None]).detach()
        if flush:
            weight = torch.where(weight.abs() < 2.0**-126, 0.0, weight)
        computed = (x * weight).sum(1).double()
        finite = computed.isfinite()
        assert box.contains(computed[None])[0, finite].all()
        assert (box.radius[0, ~finite] == torch.inf).all()


@pytest.mark.parametrize("size", [1.0, 2.0**60, 2.0**126])
def test_a_great_divisor_behind_a_sum_that_overflows(size):
    """The sum is taken first, and may overflow although the result is small."""
    model = nn.AvgPool2d(2, divisor_override=2**40)
    x = torch.full((1, 1, 2, 2), size)
    net = BoundedModel(model, torch.ones(1, 1, 2, 2))
    box = sound_box(net, x, "float32")
    with torch.no_grad():
        computed = model(x).double()
    assert computed.isfinite().all() == (size < 2.0**126)
    assert (box.contains(computed) | computed.isinf()).all()
    assert (box.radius == torch.inf).all() == bool(computed.isinf().any())


@pytest.mark.parametrize("mean", [1e-36, 1e-38, 1e-44, 0.0])
def test_tiny_means_do_not_cost_the_proof(mean):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).eval()
    with torch.no_grad():
        model[1].running_mean.fill_(mean)
        model[3].bias.copy_(torch.tensor([5.0, 0.0]))
    x, labels = torch.rand(5, 4), torch.zeros(5, dtype=torch.int64)
    net = BoundedModel(model, x)
    box = enclosing_linf_box(x, 1e-3)
    for arithmetic in ARITHMETICS:
        bounds = net.ibp(box, arithmetic=arithmetic)
        assert not bounds.output.lower.isnan().any()
        assert (net.margins(box, labels, arithmetic=arithmetic)[:, 1] > 0).all()


# --- what is computed from parameters, or in another type, is refused by name -----------------------------------------


def normalised_weight() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(4, 2))


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "weight_norm": (normalised_weight, "weight is computed from other parameters"),
    "spectral_norm": (
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 2)),
        "weight is computed from other parameters",
    ),
    "weight_norm with hooks": (lambda: nn.utils.weight_norm(nn.Linear(4, 2)), "forward hooks"),
    "reciprocal of a buffer": (lambda: One(lambda self, x: x * (1 / self.c), spread(4)), "truediv .*no sound rule"),
    "root of a buffer": (lambda: One(lambda self, x: x + self.c.abs().sqrt(), spread(4)), "Tensor.abs .*no sound rule"),
    "cast of a buffer": (lambda: One(lambda self, x: x + self.c.half(), spread(4)), "Tensor.half .*no sound rule"),
    "a constant made and multiplied": (
        lambda: One(lambda self, x: x + torch.full_like(x[:, :1], 0.1) * 3),
        "mul .*no sound rule",
    ),
    "a range": (lambda: One(lambda self, x: x + torch.arange(x.size(1)) / 3), "arange .*no sound rule"),
    "a tensor of the forward": (
        lambda: One(lambda self, x: x + torch.tensor([0.1, 0.2, 0.3, 0.4])),
        "a tensor made in the forward has no sound rule",
    ),
    "mean in another type": (lambda: One(lambda self, x: x + x.mean(1, keepdim=True, dtype=torch.float16)), "dtype"),
    "sum in another type": (lambda: One(lambda self, x: x + x.sum(1, keepdim=True, dtype=torch.int32)), "dtype"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_sound_rule_is_refused_by_name(name):
    make, message = REFUSED[name]
    x = torch.rand(1, 4)
    with pytest.raises(UnsupportedOperation, match=message):
        BoundedModel(make(), x).ibp(Box(x, x), arithmetic="float32")


@pytest.mark.parametrize(
    "function",
    [
        lambda self, x: x @ self.c.t(),
        lambda self, x: x @ self.c.T[: x.size(1)],
        lambda self, x: x.to(self.c.dtype) + self.c.view(-1)[:4],
        lambda self, x: x + torch.full_like(x[:, :1], 0.1),
        lambda self, x: torch.cat([x, self.c[:1].expand(x.shape[0], -1)], 1),
        lambda self, x: x.reshape(x.size(0), 2 * (x.shape[1] // 2)),
    ],
)
def test_what_only_moves_constants_or_counts_is_not(function):
    model, x = One(function, spread(3, 4)), torch.rand(1, 4)
    box = sound_box(BoundedModel(model, x), x, "float32")
    assert box.contains(model(x).double()).all()


def test_the_walks_constants_are_those_of_the_network():
    """By hand and without errors: the module's own float64 result."""
    for name in CASES:
        model, x = setting(name)
        walk = ByHand(Adversary(mode={}))
        found = BoundedModel(model, x).graph.run(exactly(x), walk)
        with torch.no_grad():
            expected = model.double()(x.double())
        computed = torch.tensor([float(value) for value in found.reshape(-1)], dtype=torch.float64)
        torch.testing.assert_close(computed, expected.double().flatten(), rtol=1e-6, atol=1e-6)
        assert not leaves(walk, Tensor)


@pytest.mark.parametrize(
    "ends", [(0.0, math.inf), (-math.inf, 0.0), (-math.inf, math.inf), (-1e308, 1e308), (1e308, 1.5e308)]
)
@pytest.mark.parametrize("name", ["linear", "conv", "batch_norm", "relu", "add", "mul", "leaky_relu"])
def test_a_box_that_is_unbounded_on_one_side_stays_one(name, ends):
    """Its centre is no number that anything can be computed with."""
    box = OutwardBox(*(torch.full((1, 2, 3, 3), end, dtype=torch.float64) for end in ends))
    assert (box.center - box.radius <= box.lower).all()
    assert (box.center + box.radius >= box.upper).all()
    model = {
        "linear": nn.Linear(3, 2),
        "conv": nn.Conv2d(2, 2, 2),
        "batch_norm": nn.BatchNorm2d(2).eval(),
        "relu": nn.ReLU(),
        "leaky_relu": nn.LeakyReLU(0.5),
        "add": One(lambda self, x: x + x),
        "mul": One(lambda self, x: x * self.c, torch.tensor(0.0)),
    }[name]
    network = nn.Sequential(model, nn.ReLU(), nn.Flatten(), nn.LazyLinear(2)).eval()
    network(torch.rand(1, 2, 3, 3))
    found = BoundedModel(network, torch.rand(1, 2, 3, 3))
    bounds = found.ibp(box, arithmetic="float32")
    for part in (*bounds.relu_inputs, bounds.output):
        assert not part.lower.isnan().any()
        assert not part.upper.isnan().any()
