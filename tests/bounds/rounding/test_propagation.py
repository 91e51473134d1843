"""Sound bounds against exact emulations of floating-point arithmetic: every order of every sum, fused or not."""

from __future__ import annotations

import copy
import itertools
import math
from fractions import Fraction
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from certtrain.bound_methods import METHODS
from certtrain.bounds import BoundedModel, Box, linf_box
from certtrain.bounds.rounding.arithmetic import ARITHMETICS, sum_error
from certtrain.bounds.rounding.boxes import enclosing_linf_box, nearest_above, nearest_below
from certtrain.errors import UnsupportedOperation, UsageError
from certtrain.verification.branch_and_bound import Search
from certtrain.verification.folding import fold_batch_norm
from tests.bounds.rounding.order_detector import OrderDetector
from tests.networks import narrow_cnn7, pooling_network, randomized, residual_network

# --- an emulator that rounds rationals: (bits of the significand, smallest exponent) ----------------------------------

FLOAT32, BF16, TF32 = (24, -149), (8, -133), (11, -136)


def rounded(value: Fraction, format_: tuple[int, int], truncate: bool = False) -> Fraction:
    """The nearest number of a binary format, ties to even, gradual underflow; or the one next to it towards zero."""
    if value == 0:
        return value
    bits, smallest = format_
    exponent = max(_floor_log2(abs(value)) - bits + 1, smallest)
    scaled = value / Fraction(2) ** exponent
    integer = int(scaled) if truncate else round(scaled)  # Python rounds ties to even
    return integer * Fraction(2) ** exponent


def _floor_log2(value: Fraction) -> int:
    guess = value.numerator.bit_length() - value.denominator.bit_length()
    return guess if Fraction(2) ** guess <= value else guess - 1


def test_the_emulator_is_numpys_float32():
    generator = np.random.default_rng(0)
    pairs = generator.standard_normal((500, 2)) * 10.0 ** generator.integers(-42, 3, (500, 2))
    for a, b in pairs.astype(np.float32):
        exact = Fraction(float(a)), Fraction(float(b))
        assert float(rounded(exact[0] * exact[1], FLOAT32)) == float(a * b)
        assert float(rounded(exact[0] + exact[1], FLOAT32)) == float(a + b)


def all_sums(products: tuple[tuple[Fraction, Fraction], ...], flush: bool = False) -> frozenset[Fraction]:
    """Every float32 value of Σ a·b, over all orders and parenthesisations, each addition of a product fused or not."""

    def finished(value: Fraction) -> Fraction:
        value = rounded(value, FLOAT32)
        return Fraction(0) if flush and abs(value) < Fraction(2) ** -126 else value

    @cache
    def values(subset: frozenset[int]) -> frozenset[Fraction]:
        if len(subset) == 1:
            (index,) = subset
            a, b = products[index]
            return frozenset({finished(a * b)})
        first = min(subset)
        rest = sorted(subset - {first})
        found = set()
        for size in range(len(rest)):
            for others in itertools.combinations(rest, size):
                left = frozenset({first, *others})
                right = subset - left
                for x, y in itertools.product(values(left), values(right)):
                    found.add(finished(x + y))
                for one, other in ((left, right), (right, left)):
                    if len(one) == 1:
                        a, b = products[next(iter(one))]
                        found |= {finished(a * b + y) for y in values(other)}
        return frozenset(found)

    return values(frozenset(range(len(products))))


def exact(tensor: Tensor) -> list:
    return [exact(part) for part in tensor] if tensor.dim() else Fraction(tensor.item())


def layer_values(
    linear: nn.Linear, inputs: tuple[Fraction, ...], arithmetic: str, flush: bool, truncate: bool
) -> list[frozenset[Fraction]]:
    """All that each neuron can compute."""
    weight, bias = exact(linear.weight.detach()), exact(linear.bias.detach())
    if arithmetic != "float32":
        format_ = TF32 if arithmetic == "tf32" else BF16
        cut = truncate and arithmetic == "tf32"
        weight = [[rounded(w, format_, cut) for w in row] for row in weight]
        inputs = tuple(rounded(x, format_, cut) for x in inputs)
    found = []
    for row, b in zip(weight, bias, strict=True):
        sums = all_sums((*zip(row, inputs, strict=True), (b, Fraction(1))), flush)
        found.append(frozenset(rounded(s, BF16) for s in sums) if arithmetic == "bf16" else sums)
    return found


def tiny_network(seed: int, scale: float = 1.0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale * 10.0 ** torch.randint(-3, 4, parameter.shape))
    return model


def contains(box: Box, values: tuple[Fraction, ...]) -> bool:
    pairs = zip(values, box.lower[0].tolist(), box.upper[0].tolist(), strict=True)
    return all(Fraction(low) <= value <= Fraction(high) for value, low, high in pairs)


def special_points(lower: Tensor, upper: Tensor) -> list[Tensor]:
    corners = [torch.tensor(corner) for corner in itertools.product(*zip(lower.tolist(), upper.tolist(), strict=True))]
    return [corners[0], corners[-1], corners[2], (lower + upper) / 2]


@pytest.mark.parametrize("arithmetic", ["float32", "tf32", "bf16"])
@pytest.mark.parametrize("seed", range(4))
def test_no_order_of_any_sum_leaves_the_sound_boxes(seed, arithmetic):
    model = tiny_network(seed, scale=1e-37 if seed == 3 else 1.0)  # the last one computes with subnormal numbers
    net = BoundedModel(model, torch.rand(1, 3))
    lower = torch.tensor([[0.1, -0.0, 1e-40]])
    upper = lower + torch.tensor([[0.0, 0.3, 1e-39]])
    bounds = net.ibp(Box(lower, upper), arithmetic=arithmetic)
    margins = [net.margins(Box(lower, upper), torch.tensor([0]), name, arithmetic=arithmetic) for name in METHODS]
    proved = Fraction(max(found[0, 1].item() for found in margins))
    seen = 0
    for point, flush in itertools.product(special_points(lower[0], upper[0]), (False, True)):
        hidden = layer_values(model[0], tuple(exact(point)), arithmetic, flush, truncate=flush)
        for values in itertools.product(*hidden):
            assert contains(bounds.relu_inputs[0], values)
        activations = [sorted({max(v, Fraction(0)) for v in values}) for values in hidden]
        for inputs in itertools.product(*activations):
            logits = layer_values(model[2], inputs, arithmetic, flush, truncate=flush)
            for values in itertools.product(*logits):
                seen += 1
                assert contains(bounds.output, values)
                assert values[0] - values[1] >= proved
    assert seen >= 8


def test_such_values_do_leave_plain_float32_boxes():
    outside = 0
    for seed in range(20):
        model = tiny_network(seed)
        x = torch.rand(1, 3)
        plain = BoundedModel(model, x).ibp(linf_box(x, 0.0)).relu_inputs[0].detach()
        values = itertools.product(*layer_values(model[0], tuple(exact(x[0])), "float32", False, False))
        outside += sum(not contains(plain, combination) for combination in values)
    assert outside > 0


# --- longer sums, in random orders ------------------------------------------------------------------------------------


def random_tree_sum(terms: np.ndarray, generator: np.random.Generator) -> np.float32:
    """The float32 sum of `terms` by a random binary tree over a random order."""
    values = list(generator.permutation(terms))
    while len(values) > 1:
        i = int(generator.integers(len(values) - 1))
        values[i : i + 2] = [np.float32(values[i] + values[i + 1])]
    return values[0]


def test_thousands_of_random_orders_stay_inside():
    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    linear = nn.Linear(60, 1, bias=False)
    x = torch.rand(1, 60) * 1000
    bounds = BoundedModel(linear, x).ibp(enclosing_linf_box(x, 0.0, clip=None), arithmetic="float32")
    plain = BoundedModel(linear, x).ibp(linf_box(x, 0.0, clip=None))
    products = (linear.weight.detach().numpy()[0] * x.numpy()[0]).astype(np.float32)
    sums = torch.tensor([random_tree_sum(products, generator) for _ in range(3000)])[:, None]
    assert bounds.output.contains(sums.double()).all()
    assert not plain.output.contains(sums).all()


def batch_norm_variants(x: np.ndarray, m: np.ndarray, v: np.ndarray, w: np.ndarray, b: np.ndarray) -> list[np.ndarray]:
    """What float32 implementations of BatchNorm compute."""
    one, eps = np.float32(1), np.float32(1e-5)
    inverse = one / np.sqrt(v + eps)
    scale = w * inverse
    return [
        x * scale + (b - m * scale),
        (x - m) * inverse * w + b,
        (x - m) * scale + b,
        (x - m) / np.sqrt(v + eps) * w + b,
        w * ((x - m) * inverse) + b,
    ]


@pytest.mark.parametrize("seed", range(3))
def test_every_way_to_compute_a_batch_norm_stays_inside(seed):
    torch.manual_seed(seed)
    model = randomized(nn.Sequential(nn.Linear(5, 200), nn.BatchNorm1d(200)), seed).eval()
    x = torch.randn(1, 5) * 10
    bounds = BoundedModel(model, x).ibp(enclosing_linf_box(x, 0.0, clip=None), arithmetic="float32")
    linear, norm = model
    hidden = (linear.weight.double() @ x[0].double() + linear.bias.double()).float().detach().numpy()
    parts = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    mean, variance, weight, bias = (part.detach().numpy() for part in parts)
    variants = batch_norm_variants(hidden, mean, variance, weight, bias)
    scale = weight / np.sqrt(variance + np.float32(1e-5))
    folded_weight = linear.weight.detach().numpy() * scale[:, None]
    folded_bias = (linear.bias.detach().numpy() - mean) * scale + bias
    for order in itertools.permutations(range(6)):
        terms = np.concatenate([folded_weight * x.numpy(), folded_bias[:, None]], axis=1)[:, order]
        total = terms[:, 0]
        for column in range(1, 6):
            total = total + terms[:, column]
        variants.append(total)
    for computed in variants:
        assert computed.dtype == np.float32
        assert bounds.output.contains(torch.from_numpy(computed).double()[None]).all()


NETWORKS = {
    "cnn7": lambda: narrow_cnn7(),
    "cnn7 without BatchNorm": lambda: narrow_cnn7(batch_norm=False),
    "residual": residual_network,
    "pooling": pooling_network,
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("arithmetic", ["float32", "bf16"])
def test_sampled_points_stay_inside_and_float64_adds_next_to_nothing(name, arithmetic):
    torch.manual_seed(0)
    model = randomized(NETWORKS[name]()).eval()
    x, labels = torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    box = enclosing_linf_box(x, 2 / 255)
    net = BoundedModel(model, x)
    bounds, margins = net.ibp(box, arithmetic=arithmetic), net.margins(box, labels, arithmetic=arithmetic)
    if arithmetic == "float32":
        deployed = [model, fold_batch_norm(model, x)]
    else:  # whose BatchNorm keeps its parameters in float32, which PyTorch's does not
        deployed = [copy.deepcopy(model).bfloat16()] if name == "cnn7 without BatchNorm" else []
    for _ in range(50):
        corner = torch.rand_like(x) < 0.5
        point = torch.where(corner, nearest_above(box.lower, x.dtype), nearest_below(box.upper, x.dtype))
        for network in deployed:
            with torch.no_grad():
                logits = network(point.to(next(network.parameters()).dtype)).double()
            assert bounds.output.contains(logits).all()
            assert (logits.gather(1, labels[:, None]) - logits >= margins).all()
    reference = BoundedModel(copy.deepcopy(model).double(), x.double())
    plain = reference.margins(linf_box(x.double(), 2 / 255), labels)
    fine = reference.margins(box, labels, arithmetic="float64")
    assert (fine <= plain + 1e-12).all()
    if name != "pooling":  # whose logits come from a linear layer behind pooling
        torch.testing.assert_close(fine, plain, rtol=1e-9, atol=1e-9)


class Arithmetics(nn.Module):
    """Sums, products and quotients with constants and with another branch, padding, slices and means."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.register_buffer("scale", torch.tensor([0.3, -0.7, 1.9, 0.1]).view(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = (self.conv(x) - self.scale) / self.scale + 0.1 * x
        y = F.pad(F.leaky_relu(-y, 0.3), (1, 0, 0, 1))[:, 1:] * 3.7
        return torch.cat([y.mean((2, 3)), y.sum(3).flatten(1)], 1)


OPERATIONS = {
    "arithmetic": (Arithmetics, (4, 6, 6)),
    "grouped convolution": (lambda: nn.Conv2d(4, 6, 3, 2, 1, groups=2), (4, 6, 6)),
    "transposed convolution": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, groups=2, bias=False), (4, 5, 5)),
    "convolution 1d": (lambda: nn.Sequential(nn.Conv1d(4, 3, 3), nn.AvgPool1d(2), nn.BatchNorm1d(3)), (4, 9)),
    "adaptive pooling": (lambda: nn.AdaptiveAvgPool2d((3, 2)), (4, 7, 5)),
    "pooling with padding": (lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True), (4, 6, 6)),
    "BatchNorm alone": (lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), (4, 5, 5)),
    "BatchNorm without parameters": (lambda: nn.BatchNorm2d(4, affine=False), (4, 5, 5)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_holds_what_float32_computes_and_little_more(name):
    """Boxes that are a point: all that they may hold is rounding, which is small beside the values."""
    make, shape = OPERATIONS[name]
    torch.manual_seed(0)
    model = randomized(nn.Sequential(make(), nn.Flatten())).eval()
    x = torch.randn(50, *shape) * 10.0 ** torch.randint(-3, 4, (50, *[1] * len(shape)))
    output = BoundedModel(model, x).ibp(enclosing_linf_box(x, 0.0, clip=None), arithmetic="float32").output
    with torch.no_grad():
        for computed in (model(x), model(x.flip(0)).flip(0), torch.cat([model(one[None]) for one in x])):
            assert output.contains(computed.double()).all()
        truth = model.double()(x.double())
    assert output.contains(truth).all()
    assert ((output.upper - output.lower).amax(1) < 1e-3 * truth.abs().amax(1) + 1e-3).all()


# --- a network made to fool a plain verifier --------------------------------------------------------------------------


def test_a_network_that_fools_a_plain_verifier_is_not_proved():
    x, label = torch.tensor([[0.95]]), torch.tensor([0])
    fooled = 0
    for order in itertools.permutations(range(3)):
        model = OrderDetector(order)
        net = BoundedModel(model, x)
        box = linf_box(x, 0.01)
        proves = bool((net.margins(box, label)[0, 1] > 0).item())
        classes = {int(value > Fraction(1, 2)) for value in _orders_of(model)}
        fooled += proves and classes == {0, 1}
        assert not (net.margins(box, label, arithmetic="float32")[0, 1] > 0).item()
    assert fooled > 0


def _orders_of(model: OrderDetector) -> frozenset[Fraction]:
    """What `sum` gives at x = 0.95, in all orders."""
    inputs = model.hidden(torch.tensor([[0.95]])).relu()[0].detach()
    return all_sums(tuple(zip(exact(model.sum.weight.detach()[0]), exact(inputs), strict=True)))


# --- bad input --------------------------------------------------------------------------------------------------------


def test_overflow_is_never_proved():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    x = torch.tensor([[0.5, 0.5]])
    net = BoundedModel(model, x)  # before the weights grow, so that the network itself can be tried
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3e38, 3e38], [0.0, 0.0]]))  # 3e38 in the end, on the way perhaps more
        model[0].bias.copy_(torch.tensor([-3e38, 1.0]))
        model[2].weight.copy_(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
        model[2].bias.zero_()
    box = enclosing_linf_box(x, 0.0)
    assert net.margins(linf_box(x, 0.0), torch.tensor([0]))[0, 1] > 0
    assert net.margins(box, torch.tensor([0]), arithmetic="float64")[0, 1] > 0
    assert net.margins(box, torch.tensor([0]), arithmetic="float32")[0, 1] == -torch.inf


def test_error_of_a_sum_is_highams_gamma():
    for terms in (1, 10, 1000):
        unit = 2.0**-24
        gamma = (terms + 17) * unit / (1 - (terms + 17) * unit)
        assert gamma < sum_error(ARITHMETICS["float32"], terms) < gamma * (1 + 1e-6)
    assert sum_error(ARITHMETICS["float32"], 2**24) == float("inf")


def test_an_enclosing_box_reaches_as_far_as_the_radius():
    x = torch.rand(1000)
    box = enclosing_linf_box(x, 0.1, clip=None)
    for value, low, high in zip(exact(x), exact(box.lower), exact(box.upper), strict=True):
        assert low <= value - Fraction(0.1)
        assert value + Fraction(0.1) <= high


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (nn.Sequential(nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, 2)), "Sigmoid in module '1'"),
        (nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), "Tanh in module '1'"),
    ],
)
def test_an_operation_without_a_sound_rule_is_named(model, named):
    x = torch.rand(1, 4)
    with pytest.raises(UnsupportedOperation, match=named):
        BoundedModel(model, x).margins(linf_box(x, 0.1), torch.tensor([0]), arithmetic="float32")


class ScaledWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.gain = nn.Parameter(torch.rand(2, 4)), nn.Parameter(torch.rand(1))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.gain)


def test_parameters_computed_from_parameters_are_refused():
    x = torch.rand(1, 4)
    with pytest.raises(UnsupportedOperation, match="parameters alone"):
        BoundedModel(ScaledWeights(), x).margins(linf_box(x, 0.1), torch.tensor([0]), arithmetic="float32")


def test_what_is_asked_wrongly_is_refused():
    x = torch.rand(2, 4)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2)).eval()
    net = BoundedModel(model, x)
    box, labels = linf_box(x, 0.1), torch.tensor([0, 1])
    with pytest.raises(UsageError, match="unknown arithmetic 'float23': did you mean float32"):
        net.margins(box, labels, arithmetic="float23")
    model.train()
    with pytest.raises(UsageError, match="eval mode"):
        net.margins(box, labels, arithmetic="float32")


# --- convolutions -----------------------------------------------------------------------------------------------------


class Convolutions(TorchDispatchMode):
    """Whether cuDNN, which may take transforms instead of sums, was allowed at each convolution of float64 bounds."""

    def __init__(self):
        super().__init__()
        self.by_cudnn = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket is torch.ops.aten.convolution and args[0].dtype == torch.float64:
            self.by_cudnn.append(torch.backends.cudnn.enabled)
        return function(*args, **(kwargs or {}))


CONVOLUTIONAL = {
    "2d": nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, (1, 3)), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)
    ),
    "1d": nn.Sequential(
        nn.Flatten(2), nn.Conv1d(1, 3, 3), nn.ReLU(), nn.Conv1d(3, 2, 3), nn.Flatten(), nn.Linear(64, 3)
    ),
}


@pytest.mark.parametrize("method", [*METHODS, "branch-and-bound"])
@pytest.mark.parametrize("network", CONVOLUTIONAL)
def test_bounds_that_cover_rounding_take_convolutions_as_sums(network, method):
    """Forwards and backwards, in the search too; and the setting is back afterwards, on as it was or off."""
    model, labels = randomized(copy.deepcopy(CONVOLUTIONAL[network])).eval(), torch.zeros(1, dtype=torch.int64)
    images = torch.rand(1, 1, 6, 6)
    search = {"search": Search(timeout=math.inf)} if method == "branch-and-bound" else {}
    for enabled in (True, False):
        with torch.backends.cudnn.flags(enabled=enabled), Convolutions() as seen:
            net = BoundedModel(model, images)
            seen.by_cudnn.clear()  # what was recorded was no bound
            net.margins(linf_box(images, 0.1), labels, method, arithmetic="float32", **search)
            assert torch.backends.cudnn.enabled == enabled
        assert seen.by_cudnn
        assert not any(seen.by_cudnn)
