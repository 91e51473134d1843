"""Backward linear bounds against auto_LiRPA, against closed forms, and against points of the box."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from itertools import pairwise

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

from certtrain.bounds import BoundedModel, Box, linf_box, lirpa
from certtrain.bounds import memory as memory_file
from certtrain.bounds.linear import AlphaOptions, fused_cross_entropy, lower_bounds
from certtrain.bounds.linear import alpha as alpha_file
from certtrain.bounds.linear import crown as crown_file
from certtrain.bounds.linear.backward import RULES as BACKWARD
from certtrain.bounds.linear.patches import Coefficients, Patches
from certtrain.bounds.linear.relaxations import RELAXATIONS as LINES
from certtrain.bounds.linear.relaxations import unstable_relus
from certtrain.bounds.lirpa import LirpaModel
from certtrain.bounds.memory import free_memory
from certtrain.bounds.results import Record
from certtrain.errors import UnsupportedOperation, UsageError
from certtrain.models import build_model
from certtrain.per_axis import per_axis
from tests.bounds.random_networks import attack, networks, points_of, random_box
from tests.bounds.test_interval import assert_close
from tests.networks import (
    narrow_cnn7,
    narrow_resnext,
    narrow_wide_resnet,
    pooling_network,
    randomized,
    residual_network,
)
from tests.test_scripts import script

BACKWARD_METHODS = ("crown-ibp", "crown", "alpha-crown")
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
BUILDERS = {
    "cnn7": (narrow_cnn7, 0.1),
    "cnn7-no-bn": (lambda: narrow_cnn7(batch_norm=False), 8 / 255),
    "wide-resnet": (narrow_wide_resnet, 0.5),
    "resnext": (narrow_resnext, 0.5),
    "residual": (residual_network, 0.1),
    "pooling": (pooling_network, 0.05),
}
FEW_NEURONS = ("cnn7", "cnn7-no-bn", "residual", "pooling")  # full CROWN takes auto_LiRPA seconds, not minutes
LABELS = torch.tensor([3, 0, 2])


def case(name: str, dtype: torch.dtype = torch.float64, count: int = 3) -> tuple[nn.Module, Tensor, Box]:
    """A network in eval mode, `count` images, and a box around them."""
    torch.manual_seed(0)
    build, radius = BUILDERS[name]
    model = randomized(build()).to(dtype).eval()
    images = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    return model, images, linf_box(images, radius)


@pytest.mark.parametrize(
    ("name", "dtype", "count"),
    [
        *((name, torch.float64, 3) for name in BUILDERS),
        *((name, torch.float64, 2) for name in FEW_NEURONS),
        ("cnn7", torch.float32, 2),
    ],
)
def test_in_every_case_a_good_share_of_the_relus_is_unstable(name, dtype, count):
    """Or there would be little to bound."""
    model, images, box = case(name, dtype, count)
    relus = torch.cat([unstable_relus(relu).flatten() for relu in BoundedModel(model, images).ibp(box).relu_inputs])
    assert relus.double().mean() > 0.2


def recorded(model: nn.Module, box: Box) -> Record:
    return BoundedModel(model, box.center).ibp(box, record=True).record


# --- against auto_LiRPA -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *(
            pytest.param(name, torch.float64, marks=[pytest.mark.slow] if name in ("residual", "cnn7-no-bn") else [])
            for name in FEW_NEURONS
        ),
        pytest.param("cnn7", torch.float32, marks=pytest.mark.slow),
    ],
)
def test_raw_margins_equal_auto_lirpa(name, dtype):
    model, images, box = case(name, dtype, count=2)
    labels = LABELS[:2]
    twin = copy.deepcopy(model)
    net, witness = BoundedModel(model, images), LirpaModel(twin, images)
    options = {"intersect": False, "alpha": AlphaOptions(steps=0)}
    with torch.no_grad():
        expected = {method: witness.margins(box, labels, method, intersect=False) for method in ("crown-ibp", "crown")}
        expected["alpha-crown"] = expected["crown"]
        for method in BACKWARD_METHODS:
            assert_close(net.margins(box, labels, method, **options), expected[method], TOLERANCE[dtype])
        if dtype == torch.float32:  # in float64 it is asserted below, with the gradient
            model.train()
            twin.train()
            margins = net.margins(box, labels, "crown-ibp", clean=images, **options)
            in_training = witness.margins(box, labels, "crown-ibp", clean=images, intersect=False)
            assert_close(margins, in_training, TOLERANCE[dtype])
    assert (expected["crown"] - expected["crown-ibp"]).abs().max() > 1e-3  # not one and the same question


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", BUILDERS)
def test_crown_ibp_loss_and_gradient_equal_auto_lirpa(name, training):
    model, images, box = case(name)
    model.train(training)
    twin = copy.deepcopy(model)
    margins = BoundedModel(model, images).margins(box, LABELS, "crown-ibp", clean=images, intersect=False)
    expected = LirpaModel(twin, images).margins(box, LABELS, "crown-ibp", clean=images, intersect=False)
    assert_close(margins, expected, TOLERANCE[torch.float64])
    F.cross_entropy(-margins, LABELS).backward()
    F.cross_entropy(-expected, LABELS).backward()
    for found, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close(found.grad, expected.grad, 1e-8)
    for found, expected in zip(model.buffers(), twin.buffers(), strict=True):
        assert_close(found.double(), expected.double(), 1e-12)


class SumOfExponentials(nn.Module):
    """Σ_j exp(z_j - z_y) for one class y, which auto_LiRPA's loss fusion bounds."""

    def __init__(self, model: nn.Module, label: int, classes: int) -> None:
        super().__init__()
        self.model, self.difference = model, nn.Linear(classes, classes)
        with torch.no_grad():
            self.difference.weight.copy_(torch.eye(classes))
            self.difference.weight[:, label] -= 1.0
            self.difference.bias.zero_()
        self.difference.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(self.difference(self.model(x))).sum(-1, keepdim=True)


def fusion_of_auto_lirpa(model: nn.Module, images: Tensor, box: Box, label: int) -> Tensor:
    """Upper bounds (B,) of the cross-entropy with `label`."""
    fused = SumOfExponentials(model, label, 5).double().train(model.training)
    witness = LirpaModel(fused, images)
    witness._forward(box, images)
    (exp,) = [node for node in witness._net.modules() if type(node).__name__ == "BoundExp"]
    with lirpa._default_dtype(torch.float64):
        _, upper = witness._net.compute_bounds(IBP=True, C=None, method="backward", bound_lower=False)
    return upper[:, 0].log() + exp.max_input[:, 0]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ["cnn7", "pooling"])
def test_fused_cross_entropy_and_gradient_equal_auto_lirpa(name, training, monkeypatch):
    monkeypatch.setitem(lirpa._BOUND_OPTIONS, "loss_fusion", True)
    model, images, box = case(name)
    with torch.no_grad():
        # auto_LiRPA keeps the chords' slopes above 1e-6: the boxes must not be too wide.
        list(model.modules())[-1].weight.mul_(1e-3)
    model.train(training)
    twin = copy.deepcopy(model)

    bounds = BoundedModel(model, images).ibp(box, clean=images, record=True)
    output, own = bounds.output, LABELS[:, None]
    differences = Box(output.lower - output.upper.gather(1, own), output.upper - output.lower.gather(1, own))
    at_own = F.one_hot(LABELS, 5) == 1
    differences = Box(differences.lower.masked_fill(at_own, 0.0), differences.upper.masked_fill(at_own, 0.0))
    loss = fused_cross_entropy(bounds, LABELS, differences=differences)

    by_label = {label: fusion_of_auto_lirpa(twin, images, box, label) for label in LABELS.tolist()}
    expected = torch.stack([by_label[label][i] for i, label in enumerate(LABELS.tolist())])
    assert_close(loss, expected, 1e-9)
    loss.mean().backward()
    expected.mean().backward()
    for found, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close(found.grad, expected.grad, 1e-8)


# --- loss fusion without a witness ------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("name", BUILDERS)
def test_fused_cross_entropy_is_above_the_cross_entropy_of_every_point(name, share):
    model, images, box = case(name)
    net = BoundedModel(model, images)
    with torch.no_grad():
        bounds = net.ibp(box, record=True)
        fused = fused_cross_entropy(bounds, LABELS, share)
    points = points_of(box, 20, torch.Generator().manual_seed(0))
    points += [attack(model, box, output, sign) for output in range(5) for sign in (1, -1)]
    for point in points:
        with torch.no_grad():
            assert (fused >= F.cross_entropy(model(point), LABELS, reduction="none") - 1e-9).all()


def test_fused_cross_entropy_without_a_share_is_that_of_the_interval_margins():
    model, images, box = case("cnn7")
    net = BoundedModel(model, images)
    with torch.no_grad():
        bounds = net.ibp(box, record=True)
        fused = fused_cross_entropy(bounds, LABELS, 0.0)
        expected = F.cross_entropy(-net.margins(box, LABELS), LABELS, reduction="none")
    torch.testing.assert_close(fused, expected, rtol=1e-12, atol=1e-12)


def test_fused_cross_entropy_of_a_linear_network_is_the_sum_of_chords():
    """The chords' sum is linear in the input; its maximum over a box is at a corner, and every corner is tried."""
    torch.manual_seed(0)
    model, labels = nn.Linear(4, 3).double(), torch.tensor([2, 0])
    box = linf_box(torch.rand(2, 4, dtype=torch.float64), 0.3, clip=None)
    bounds = BoundedModel(model, box.center).ibp(box, record=True)
    low, high = -2 - torch.rand(2, 3, dtype=torch.float64), 1 + torch.rand(2, 3, dtype=torch.float64)
    corners = torch.cartesian_prod(*[torch.tensor([-0.3, 0.3], dtype=torch.float64)] * 4)
    logits = model(box.center[:, None] + corners)
    own = logits.gather(2, labels[:, None, None].expand(-1, 16, 1))
    chords = low.exp()[:, None] + ((high.exp() - low.exp()) / (high - low))[:, None] * (logits - own - low[:, None])
    expected = chords.sum(2).amax(1).log()
    torch.testing.assert_close(
        fused_cross_entropy(bounds, labels, differences=Box(low, high)), expected, rtol=1e-12, atol=1e-12
    )


# --- against points ---------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    drawn=networks(),
    radius=st.sampled_from([1e-6, 1e-2, 0.3, 5.0]),
    labels=st.lists(st.integers(0, 3), min_size=3, max_size=3),
)
def test_margins_are_below_every_point_and_grow_with_the_methods_price(drawn, radius, labels):
    model, seed = drawn
    box, labels = random_box(seed, radius), torch.tensor(labels)
    box = Box(box.lower, box.upper)
    net, alpha = BoundedModel(model, box.center), AlphaOptions(steps=4)
    with torch.no_grad():
        raw = [net.margins(box, labels, method, intersect=False, alpha=alpha) for method in BACKWARD_METHODS]
        by_price = [net.margins(box, labels, method, alpha=alpha) for method in ("ibp", *BACKWARD_METHODS)]
    points = points_of(box, 8, torch.Generator().manual_seed(seed + 1))
    points += [attack(model, box, i, sign) for i in range(4) for sign in (1, -1)]
    with torch.no_grad():
        found = torch.stack([logits.gather(1, labels[:, None]) - logits for logits in map(model, points)]).amin(0)
    for margins in (*raw, *by_price):
        assert (margins <= found + 1e-9 * (1 + margins.abs().max())).all()
        assert (margins.gather(1, labels[:, None]).abs() <= 1e-12).all()
    for cheaper, dearer in pairwise(by_price):
        assert (cheaper <= dearer).all()


# --- elementwise functions --------------------------------------------------------------------------------------------

ELEMENTWISE = {
    "relu": (F.relu, {}),
    "leaky": (F.leaky_relu, {"negative_slope": 0.01}),
    "leakier": (F.leaky_relu, {"negative_slope": 0.3}),
    "concave": (F.leaky_relu, {"negative_slope": 2.0}),
    "straight": (F.leaky_relu, {"negative_slope": 1.0}),
    "sigmoid": (torch.sigmoid, {}),
    "tanh": (torch.tanh, {}),
}
ENDS = [0.0, 1e-300, 1e-12, 1e-7, 1e-6, 1e-3, 0.1, 0.7, 1.0, 2.0, 3.0, 5.0, 17.0, 40.0, 1e3, 1e6]


def intervals() -> Box:
    """All intervals between ENDS and their negatives, degenerate ones too; random ones; narrow ones anywhere."""
    generator = torch.Generator().manual_seed(0)
    ends = torch.tensor(ENDS, dtype=torch.float64)
    grid = torch.cartesian_prod(*[torch.cat([-ends, ends])] * 2)
    random = 4 * torch.randn(500, 2, generator=generator, dtype=torch.float64)
    width = 10.0 ** torch.randint(-14, 0, (500,), generator=generator).double()
    narrow = torch.stack([random[:, 0], random[:, 0] + width], 1)
    pairs = torch.cat([grid, random, narrow])
    return Box(pairs.amin(1), pairs.amax(1))


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_lines_enclose_the_function_and_touch_it(name):
    function, options = ELEMENTWISE[name]
    x = intervals()
    lines = LINES[function](x, *options.values())
    shares = torch.linspace(0, 1, 1001, dtype=torch.float64)
    points = (x.lower + shares[:, None] * (x.upper - x.lower)).clamp(x.lower, x.upper)
    values = function(points, **options)
    above_lower = values - lines.below(points)
    below_upper = lines.above(points) - values
    for gap in (above_lower, below_upper):
        assert gap.isfinite().all()
        assert gap.min() >= -1e-9
        assert gap[:, x.radius < 20].amin(0).max() < 1e-3
        assert gap[:, x.upper == x.lower].max() < 1e-9
    # Where an S-shaped function bends both ways, a line that misses its far end could be moved closer.
    if name in ("sigmoid", "tanh"):
        bends = (x.lower < 0) & (x.upper > 0) & (x.radius < 20)
        assert above_lower[-1, bends].max() < 1e-6
        assert below_upper[0, bends].max() < 1e-6


# --- max pooling ------------------------------------------------------------------------------------------------------


class PoolByKeywords(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.max_pool2d(x, kernel_size=3, stride=2, padding=1)


POOLS = {
    "tiling": nn.MaxPool2d(2),
    "overlapping": nn.MaxPool2d(3, 1),
    "padded": nn.MaxPool2d(3, 2, 1),
    "dilated": nn.MaxPool2d(2, 1, 1, dilation=2),
    "oblong": nn.MaxPool2d((2, 3), (1, 2), (0, 1)),
    "gaps": nn.MaxPool2d(1, 3),
    "keywords": PoolByKeywords(),
    "1d": nn.MaxPool1d(3, 2, 1),
    "1d-dilated": nn.MaxPool1d(2, 1, 1, dilation=2),
}
CEILING = {"ceil": nn.MaxPool2d(2, 2, ceil_mode=True), "ceil-1d": nn.MaxPool1d(3, 2, 1, ceil_mode=True)}


def pooled(pool: nn.Module, centers: Tensor, radius: float) -> tuple[Box, Tensor, Tensor]:
    """A box for `pool`, random linear functions of the result, and their lower bounds."""
    centers = centers.view(2, 3, 49) if isinstance(pool, nn.MaxPool1d) else centers.view(2, 3, 7, 7)
    box = linf_box(centers, radius, clip=None)
    record = recorded(pool, box)
    a = torch.randn(2, 6, *record.boxes[record.output].shape[1:], dtype=torch.float64)
    return box, a, lower_bounds(record, record.output, a)


@pytest.mark.parametrize("name", POOLS | CEILING)
def test_max_pooling_bounds_are_below_every_point(name):
    torch.manual_seed(0)
    pool = (POOLS | CEILING)[name]
    box, a, bounds = pooled(pool, torch.randn(294, dtype=torch.float64), 0.5)
    for point in points_of(box, 200, torch.Generator().manual_seed(0)):
        assert ((a * pool(point)[:, None]).flatten(2).sum(2) >= bounds - 1e-12).all()


@pytest.mark.parametrize("name", POOLS)
def test_max_pooling_is_exact_where_one_input_is_largest_in_any_case(name):
    """It is then linear on the box, and a linear function is least at the corner that its gradient points away from."""
    torch.manual_seed(0)
    box, a, bounds = pooled(POOLS[name], torch.randperm(294).double() - 147, 0.4)
    for row in range(a.shape[1]):
        center = box.center.clone().requires_grad_()
        (gradient,) = torch.autograd.grad((a[:, row] * POOLS[name](center)).sum(), center)
        least = POOLS[name](box.center - gradient.sign() * 0.4)
        torch.testing.assert_close(bounds[:, row], (a[:, row] * least).flatten(1).sum(1), rtol=1e-12, atol=1e-9)


# --- against closed forms ---------------------------------------------------------------------------------------------


def mlp() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3)).double()


def crown_by_hand(layers: list[tuple], hidden: list[tuple], function, center, radius) -> float:
    """The lower bound of `function` of the last of `layers`, numpy arrays, with (lower, upper) of each hidden one."""
    coefficients, constant = function, 0.0
    for position in reversed(range(len(layers))):
        weight, bias = layers[position]
        constant += coefficients @ bias
        coefficients = coefficients @ weight
        if position > 0:
            for j, (lower, upper) in enumerate(zip(*hidden[position - 1], strict=True)):
                if upper <= 0:
                    coefficients[j] = 0.0
                elif lower < 0 and coefficients[j] > 0:
                    coefficients[j] *= float(upper > -lower)
                elif lower < 0:
                    constant -= coefficients[j] * upper * lower / (upper - lower)
                    coefficients[j] *= upper / (upper - lower)
    return coefficients @ center - abs(coefficients) @ radius + constant


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_lower_bounds_of_any_function_of_any_layer_equal_the_closed_form(depth):
    model = mlp()
    box = random_input = linf_box(torch.randn(5, 4, dtype=torch.float64), 0.5, clip=None)
    record = recorded(model, random_input)
    index = [call.index for call in record.calls if call.function is F.linear][depth - 1]
    a = torch.randn(5, 8, *record.boxes[index].shape[1:], dtype=torch.float64)
    relus = [record.boxes[call.args[0].index].detach() for call in record.calls if call.function is F.relu]
    assert all(unstable_relus(relu).any() and not unstable_relus(relu).all() for relu in relus)
    found = lower_bounds(record, index, a)
    layers = [(m.weight.detach().numpy(), m.bias.detach().numpy()) for m in model if isinstance(m, nn.Linear)][:depth]
    for image in range(5):
        hidden = [(relu.lower[image].numpy(), relu.upper[image].numpy()) for relu in relus]
        center, radius = box.center[image].numpy(), box.radius[image].numpy()
        for row in range(8):
            expected = crown_by_hand(layers, hidden, a[image, row].numpy(), center, radius)
            assert found[image, row].item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_margins_of_a_linear_network_are_exact_by_every_method():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 3)).double()
    x, labels = torch.rand(2, 1, 6, 6, dtype=torch.float64), torch.tensor([2, 0])
    net, box = BoundedModel(model, x), linf_box(x, 0.1, clip=None)
    exact = net.margins(box, labels)
    for method in BACKWARD_METHODS:
        torch.testing.assert_close(net.margins(box, labels, method, intersect=False), exact, rtol=1e-12, atol=1e-12)


class Convolving(nn.Module):
    """A convolution by its function, with its settings as they are spelled."""

    def __init__(self, function: Callable[..., Tensor], weight: Tensor, **spelled: object) -> None:
        super().__init__()
        self.function, self.weight, self.spelled = function, nn.Parameter(weight), spelled

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight, torch.arange(6.0, dtype=x.dtype), **self.spelled)


def spelled(number: int) -> st.SearchStrategy[object]:
    """A setting of a convolution in `number` dimensions, up to 2: a number, one in a list, or one for each axis."""
    sizes = st.integers(1, 2)
    return sizes | st.lists(sizes, min_size=1, max_size=1) | st.tuples(*[sizes] * number)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Convolving, Tensor]:
    """One of 1, 2 or 3 dimensions, transposed or not, however it is spelled, and two images for it."""
    function, axes = draw(
        st.sampled_from([(F.conv1d, 1), (F.conv2d, 2), (F.conv3d, 3), (F.conv_transpose1d, 1), (F.conv_transpose2d, 2)])
    )
    random, groups = torch.Generator().manual_seed(draw(st.integers(0, 999))), draw(st.sampled_from([1, 2]))
    stride, dilation = draw(spelled(axes)), draw(spelled(axes))
    settings_ = {"stride": stride, "dilation": dilation, "groups": groups}
    if function in (F.conv_transpose1d, F.conv_transpose2d):
        channels = (4, 6 // groups)
        most = [max(sizes) - 1 for sizes in zip(per_axis(stride, axes), per_axis(dilation, axes), strict=True)]
        settings_ |= {"padding": 1, "output_padding": draw(st.tuples(*[st.integers(0, number) for number in most]))}
    else:
        channels = (6, 4 // groups)
        named = ["valid", "same"] if set(per_axis(stride, axes)) == {1} else ["valid"]
        settings_["padding"] = draw(st.just(0) | spelled(axes) | st.sampled_from(named))
    kernel, size = draw(st.tuples(*[st.integers(1, 3)] * axes)), draw(st.tuples(*[st.integers(5, 7)] * axes))
    weight = torch.randn(*channels, *kernel, generator=random, dtype=torch.float64)
    return Convolving(function, weight, **settings_), torch.randn(2, 4, *size, generator=random, dtype=torch.float64)


@pytest.mark.slow
@given(drawn=convolutions(), channels_last=st.booleans())
@settings(max_examples=150, deadline=None)
def test_a_convolution_is_pulled_back_however_it_is_spelled(drawn, channels_last):
    """As the bounds of an affine function are: its value at the center, less the radius by its derivatives."""
    model, x = drawn
    if channels_last and x.dim() == 4:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    box = linf_box(x, 0.1, clip=None)
    record = recorded(model, box)
    a = torch.randn(2, 3, *model(x).shape[1:], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        values = (a * model(x)[:, None]).flatten(2).sum(2)
    jacobian = torch.autograd.functional.jacobian
    derivatives = [
        jacobian(lambda v, rows=rows: (rows * model(v[None])).flatten(1).sum(1), image)
        for rows, image in zip(a, x, strict=True)
    ]
    expected = values - 0.1 * torch.stack(derivatives).abs().flatten(2).sum(2)
    torch.testing.assert_close(lower_bounds(record, record.output, a), expected, rtol=1e-12, atol=1e-12)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_what_pytorch_keeps_of_a_gpu_is_free(monkeypatch):
    """10 GB that the driver has left, and 4 of the 60 that PyTorch has taken from it, which no tensor has."""
    for name, value in {"mem_get_info": (10, 80), "memory_reserved": 60, "memory_allocated": 56}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert free_memory(torch.device("cuda", 1)) == 14


def spy_on_coefficients(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    shapes: list[torch.Size] = []

    def spying(record: Record, index: int, a: Coefficients, *slopes: object, **lines: object) -> Tensor:
        shapes.append(a.values.shape if isinstance(a, Patches) else a.shape)
        return lower_bounds(record, index, a, *slopes, **lines)

    monkeypatch.setattr(crown_file, "lower_bounds", spying)
    return shapes


def bytes_needed(question: Callable[..., Tensor]) -> int:
    with pytest.raises(UsageError, match=r"needs ([\d,]+) bytes for one image") as error:
        question(max_memory=1)
    return int(re.search(r"needs ([\d,]+)", str(error.value))[1].replace(",", ""))


@pytest.mark.parametrize("portion", [pytest.param(2, marks=pytest.mark.slow), 10])
@pytest.mark.parametrize("method", BACKWARD_METHODS)
def test_max_memory_is_kept_within_a_fifth(method, portion, monkeypatch):
    """Of a convolutional network, whatever a cache holds."""
    torch.manual_seed(0)
    options = {"width": 8, "linear_width": 32}
    model = build_model("cnn-2layer", (3, 8, 8), 10, mean=(0.5,) * 3, std=(0.25,) * 3, options=options).eval()
    images, labels = torch.rand(6, 3, 8, 8), torch.arange(6)
    net, box = BoundedModel(model, images), linf_box(images, 0.05)
    monkeypatch.setattr(memory_file, "CACHE", 2**60)

    def question(max_memory: int) -> Tensor:
        with torch.no_grad():
            return net.margins(box, labels, method, max_memory=max_memory, intersect=False, alpha=AlphaOptions(steps=2))

    allowed = portion * bytes_needed(question)
    with script("live_bytes").LiveBytes() as live:
        question(allowed)
    assert allowed / 10 < live.peak < 1.2 * allowed


@pytest.mark.parametrize(
    "method",
    [pytest.param(method, marks=[pytest.mark.slow] if method == "crown" else []) for method in BACKWARD_METHODS],
)
def test_least_memory_gives_the_same_margins_in_small_portions(method, monkeypatch):
    model, images, box = case("pooling")
    net = BoundedModel(model, images)

    def question(max_memory: int) -> Tensor:
        with torch.no_grad():
            options = {"intersect": False, "alpha": AlphaOptions(steps=3)}  # every image asks about every neuron
            return net.margins(box, LABELS, method, max_memory=max_memory, **options)

    enough = bytes_needed(question)
    with pytest.raises(UsageError, match="max_memory"):
        question(max_memory=enough - 1)
    shapes = spy_on_coefficients(monkeypatch)
    whole = question(max_memory=2**40)
    assert {shape[0] for shape in shapes} == {3}
    most_rows = max(shape[1] for shape in shapes)
    shapes.clear()
    torch.testing.assert_close(question(max_memory=enough), whole, rtol=1e-12, atol=1e-12)
    assert {shape[0] for shape in shapes} == {1}
    assert method == "crown-ibp" or max(shape[1] for shape in shapes) < most_rows


# --- alpha-CROWN ------------------------------------------------------------------------------------------------------


def test_optimised_slopes_improve_on_crown_and_leave_the_models_gradients_alone():
    model, images, box = case("cnn7-no-bn")
    first, *others = model.parameters()
    first.grad = torch.ones_like(first)
    net = BoundedModel(model, images)
    crown, alpha = (net.margins(box, LABELS, method, intersect=False) for method in ("crown", "alpha-crown"))
    assert (alpha >= crown).all()
    assert (alpha > crown + 0.01 * crown.abs()).any()
    assert not alpha.requires_grad
    assert torch.equal(first.grad, torch.ones_like(first))
    assert all(parameter.grad is None for parameter in others)


def test_a_proved_batch_costs_one_pass(monkeypatch):
    model, images, _ = case("cnn7-no-bn")
    net, box, labels = BoundedModel(model, images), linf_box(images, 1e-5), model(images).argmax(1)
    crown = net.margins(box, labels, "crown", intersect=False).detach()
    assert ((crown > 0).sum(1) == 4).all()
    asked, ask = [], alpha_file.crown_margins
    monkeypatch.setattr(alpha_file, "crown_margins", lambda *question: asked.append(1) or ask(*question))
    assert torch.equal(net.margins(box, labels, "alpha-crown", intersect=False), crown)
    assert len(asked) == 1


def test_an_image_takes_steps_until_it_is_proved_whatever_is_beside_it(monkeypatch):
    """Among boxes that grow, some are proved by crown, some after a few steps, and some never."""
    model, radii = mlp(), torch.linspace(0.01, 1.0, 30, dtype=torch.float64)
    x = 3 * torch.randn(2, 4, dtype=torch.float64)[1].expand(30, 4)
    net, box, labels = BoundedModel(model, x), linf_box(x, radii[:, None], clip=None), model(x).argmax(1)
    options = {"intersect": False, "alpha": AlphaOptions(steps=8)}
    together = net.margins(box, labels, "alpha-crown", **options)
    asked, ask = [0] * 30, alpha_file.crown_margins
    for i in range(30):

        def counting(*question: object, i: int = i) -> Tensor:
            asked[i] += 1
            return ask(*question)

        monkeypatch.setattr(alpha_file, "crown_margins", counting)
        own = slice(i, i + 1)
        alone = net.margins(Box(box.lower[own], box.upper[own]), labels[own], "alpha-crown", **options)
        torch.testing.assert_close(alone, together[own], rtol=1e-12, atol=1e-12)
    assert {1, 9} < set(asked)
    assert [(row > 0).sum().item() == 2 for row in together] == [passes < 9 for passes in asked]


class Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(-0.4, 0.9)


FREE = [nn.ReLU(), nn.LeakyReLU(0.3), nn.PReLU(6), nn.PReLU(init=-0.5), nn.ReLU6(), nn.Hardtanh(), Clamp()]


@pytest.mark.parametrize("activation", FREE, ids=str)
def test_slopes_that_want_to_leave_their_range_do_not(activation):
    """The minimum of a small network over its box, on a fine grid, is above what long, hasty steps arrive at."""
    torch.manual_seed(0)
    grid = torch.cartesian_prod(*[torch.linspace(-1, 1, 101, dtype=torch.float64)] * 2)
    for _ in range(3):
        model = nn.Sequential(nn.Linear(2, 6), activation, nn.Linear(6, 6), activation, nn.Linear(6, 3)).double()
        box, labels = linf_box(torch.zeros(1, 2, dtype=torch.float64), 1.0, clip=None), torch.tensor([0])
        alpha = AlphaOptions(steps=30, lr=1.0)
        margins = BoundedModel(model, box.center).margins(box, labels, "alpha-crown", intersect=False, alpha=alpha)
        logits = model(grid)
        assert (margins <= (logits[:, :1] - logits).amin(0) + 1e-9).all()


@pytest.mark.parametrize("activation", FREE, ids=str)
def test_slopes_are_optimised_below_whatever_leaves_them_free(activation):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(2, 6), activation, nn.Linear(6, 6), activation, nn.Linear(6, 3)).double()
    with torch.no_grad():
        for linear in (model[0], model[2]):
            linear.weight.mul_(3)
    box, labels = linf_box(torch.zeros(1, 2, dtype=torch.float64), 1.0, clip=None), torch.tensor([0])
    net = BoundedModel(model, box.center)
    crown, alpha = (net.margins(box, labels, method, intersect=False) for method in ("crown", "alpha-crown"))
    assert (alpha >= crown).all()
    assert (alpha > crown + 0.01 * crown.abs()).any()


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", BACKWARD_METHODS)
def test_an_operation_without_a_relaxation_is_named_with_the_methods_that_support_it(method, monkeypatch):
    monkeypatch.delitem(BACKWARD, F.max_pool2d)
    model, images, box = case("pooling")
    net = BoundedModel(model, images)
    with pytest.raises(UnsupportedOperation, match=r"MaxPool2d in module '4'.* ibp"):
        net.margins(box, LABELS, method)
    assert net.margins(box, LABELS, "ibp").shape == (3, 5)


@pytest.mark.parametrize("intersect", [True, False])
@pytest.mark.parametrize("end", [torch.inf, -torch.inf, torch.nan])
def test_boxes_are_not_made_of_ends_that_are_not_finite(end, intersect, monkeypatch):
    """Where a backward pass overflows nothing is known: the cheaper box stays, or all numbers are in the box."""
    torch.manual_seed(0)
    net = BoundedModel(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), torch.rand(2, 3))
    record = net.recorded(linf_box(torch.rand(2, 3), 1.0)).recorded
    monkeypatch.setattr(
        crown_file, "_both_ends", lambda _, index, neurons, lines: torch.full((len(neurons), 2 * neurons.shape[1]), end)
    )
    found = crown_file.tightened(record, 100, intersect)
    index = record.calls[0].index
    before, after = record.boxes[index], found.boxes[index]
    assert torch.equal(after.lower, before.lower if intersect else torch.full_like(before.lower, -torch.inf))
    assert torch.equal(after.upper, before.upper if intersect else torch.full_like(before.upper, torch.inf))
