"""Questions that have no answer are refused; an empty box, of which everything is true, above all."""

from __future__ import annotations

import copy
import math
import re
import threading
from fractions import Fraction

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from certtrain.bound_methods import BRANCH_AND_BOUND, METHODS, STAGES
from certtrain.bounds import BoundedModel, Bounder, Box, bounded_model, linf_box
from certtrain.bounds.linear import AlphaOptions, alpha_margins, crown_margins, fused_cross_entropy
from certtrain.bounds.margins import better, merged_margins, only_finite, proved
from certtrain.bounds.rounding import propagation as sound
from certtrain.bounds.rounding.boxes import enclosing_linf_box
from certtrain.errors import UsageError

X = torch.rand(2, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 2])


both_backends = pytest.mark.parametrize("backend", ["native", "lirpa"])


def network(backend: str = "native") -> Bounder:
    torch.manual_seed(0)
    return bounded_model(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), X, backend)


@pytest.mark.parametrize("make", [linf_box, enclosing_linf_box])
@settings(max_examples=50, deadline=None)
@given(x=st.floats(-3, 3), eps=st.floats(0, 2), low=st.floats(-1, 1), width=st.floats(0, 2))
def test_a_box_is_those_points_near_the_image_that_lie_in_the_range(make, x, eps, low, width):
    ends = max(x - eps, low), min(x + eps, low + width)
    image = torch.tensor([[x]], dtype=torch.float64)
    if ends[0] > ends[1] + 1e-12:
        with pytest.raises(UsageError, match="outside"):
            make(image, eps, (low, low + width))
    elif ends[0] < ends[1] - 1e-12:
        box = make(image, eps, (low, low + width))
        assert (box.lower.item(), box.upper.item()) == pytest.approx(ends, abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(eps=st.one_of(st.floats(max_value=-1e-300), st.just(float("nan")), st.just(float("inf"))))
def test_a_radius_is_finite_and_not_negative(eps):
    with pytest.raises(UsageError, match="radius"):
        linf_box(X, eps)


@both_backends
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_an_empty_box_proves_nothing(method, value, backend):
    lower = X.clone()
    lower[1, 3] = X[1, 3] + value
    with pytest.raises(UsageError, match="empty"):
        network(backend).margins(Box(lower, X), LABELS, method)


@both_backends
@pytest.mark.parametrize("ask", [lambda net, box: net.ibp(box), lambda net, box: net.ibp(box, clean=X)])
def test_a_pass_has_no_empty_box(ask, backend):
    for box in (Box(X, X - 0.1), Box.around(X, torch.full_like(X, -0.1))):
        with pytest.raises(UsageError, match="empty"):
            ask(network(backend), box)


@pytest.mark.parametrize("ask", [
    lambda net, box: net.ibp(box, arithmetic="float32"), lambda net, box: net.recorded(box, None, "float32"),
    lambda net, box: net.recorded(box), lambda net, box: net.ibp_in_segments(box, {}, lambda box: None),
    lambda net, box: net.tightened(box),
])  # fmt: skip
def test_no_pass_has_an_empty_box(ask):
    with pytest.raises(UsageError, match="empty"):
        ask(network(), Box(X.double(), X.double() - 0.1))


def test_bounds_are_asked_for_under_vmap_too():
    net = network()
    expected = net.ibp(linf_box(X, 0.1)).output.lower
    found = torch.func.vmap(lambda x: net.ibp(linf_box(x[None], 0.1)).output.lower[0])(X)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("looking", [True, False], ids=["at values", "at none"])
@pytest.mark.parametrize("make", [linf_box, enclosing_linf_box])
@pytest.mark.parametrize("where", [-1.5, -0.2, 1.2, 7.0])
@pytest.mark.parametrize("method", METHODS)
def test_an_image_far_outside_the_valid_range_is_not_proved(method, where, make, looking, monkeypatch):
    """It has no neighbour in the range; 0 or 1 is none. Where values cannot be looked at, the question is refused."""
    if not looking:
        monkeypatch.setattr("certtrain.bounds.box.values_readable", lambda x: False)
    x = X.clone()
    x[1, 2] = where
    with pytest.raises(UsageError, match="pass clip=None" if looking else "empty"):
        network().margins(make(x, 0.1), LABELS, method)
    assert make(x, 0.1, clip=None).contains(x).all()


@both_backends
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float16, torch.bfloat16])
def test_a_box_is_of_float32_or_float64(dtype, backend):
    x = X.to(dtype)
    with pytest.raises(UsageError, match="float"):
        network(backend).margins(Box(x, x), LABELS)


@both_backends
@pytest.mark.parametrize(
    "labels",
    [torch.tensor([0, 3]), torch.tensor([-1, 0]), torch.tensor([0.0, 1.0]), torch.tensor([0]), LABELS[:, None]],
)
def test_labels_are_classes_one_for_each_image(labels, backend):
    with pytest.raises(UsageError, match="labels"):
        network(backend).margins(linf_box(X, 0.1), labels)


PRODUCTS = {
    "linear": lambda x, w: nn.functional.linear(x, w),
    "@": lambda x, w: x @ w.T,
    "einsum": lambda x, w: torch.einsum("bi,oi->bo", x, w),
    "einsum, constant first": lambda x, w: torch.einsum("oi,bi->bo", w, x),
    "addmm": lambda x, w: torch.addmm(w[:1, 0], x, w.T),
    "baddbmm": lambda x, w: torch.baddbmm(w[None, :1, :1], x[:, None], w.T.expand(x.shape[0], 4, 5)).flatten(1),
}


COMPUTE_A_CONSTANT = {"addmm", "baddbmm"}  # which no floating-point rule covers


@pytest.mark.parametrize(
    ("way", "arithmetic"),
    [(way, None) for way in PRODUCTS] + [(way, "float32") for way in PRODUCTS if way not in COMPUTE_A_CONSTANT],
)
def test_the_first_layer_is_found_however_it_is_written(way, arithmetic):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Parameter(torch.randn(5, 4)), nn.Linear(5, 3)

        def forward(self, x):
            return self.last(torch.relu(PRODUCTS[way](2 * x, self.first)))

    net = BoundedModel(Network().eval(), X)
    entering = net.ibp(linf_box(X, 0.1), arithmetic=arithmetic).affine_input
    expected = 2 * linf_box(X, 0.1).center.to(entering.center.dtype)
    assert torch.allclose(entering.center.flatten(1), expected, atol=1e-5)  # (B, 1, 4) for baddbmm


OF_A_PASS = {
    "margins_of": lambda net, bounds, labels: net.margins_of(bounds, labels),
    "margins_of, crown-ibp": lambda net, bounds, labels: net.margins_of(bounds, labels, "crown-ibp"),
    "crown_margins": lambda net, bounds, labels: crown_margins(bounds, labels),
    "alpha_margins": lambda net, bounds, labels: alpha_margins(bounds, labels, AlphaOptions(steps=1)),
    "fused_cross_entropy": lambda net, bounds, labels: fused_cross_entropy(bounds, labels),
    "merged_margins": lambda net, bounds, labels: merged_margins(bounds.tail, bounds.tail_input, labels),
}
RECORDED = ["margins_of, crown-ibp", "crown_margins", "alpha_margins", "fused_cross_entropy"]


@pytest.mark.parametrize(
    "labels",
    [
        torch.tensor([0, 3]),
        torch.tensor([-1, 0]),
        torch.tensor([0.0, 1.0]),
        torch.tensor([0, 1], dtype=torch.int32),
        torch.tensor([0]),
        torch.tensor(0),
        LABELS[:, None],
        torch.tensor([0, 1, 2]),
    ],
    ids=str,
)
@pytest.mark.parametrize("ask", OF_A_PASS)
def test_labels_of_a_pass_are_classes_one_for_each_image(ask, labels):
    net = network()
    with pytest.raises(UsageError, match="labels"):
        OF_A_PASS[ask](net, net.ibp(linf_box(X, 0.1), record=True), labels)


@both_backends
def test_labels_of_a_pass_are_classes_by_either_backend(backend):
    net = network(backend)
    with pytest.raises(UsageError, match="labels"):
        net.margins_of(net.ibp(linf_box(X, 0.1)), torch.tensor([0]))


def test_labels_of_a_pass_that_covers_rounding_are_classes():
    bounds = network().ibp(linf_box(X, 0.1), arithmetic="bf16")
    with pytest.raises(UsageError, match="labels"):
        sound.margins_of(bounds, torch.tensor([-1, 0]), "bf16")


@pytest.mark.parametrize("ask", RECORDED)
def test_backward_passes_are_of_a_recorded_pass(ask):
    net = network()
    with pytest.raises(UsageError, match="record=True"):
        OF_A_PASS[ask](net, net.ibp(linf_box(X, 0.1)), LABELS)


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("ask", ["margins_of", "margins_of, crown-ibp", "fused_cross_entropy"])
def test_bounds_that_cover_rounding_have_margins_of_their_own(ask, recorded):
    net, box = network(), linf_box(X, 0.1)
    bounds = net.recorded(box, None, "bf16") if recorded else net.ibp(box, arithmetic="bf16")
    with pytest.raises(UsageError, match="arithmetic="):
        OF_A_PASS[ask](net, bounds, LABELS)


def image_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))


ASKING = {
    "ibp": lambda net, x: net.ibp(linf_box(x, 0.1), x),
    "ibp, sound": lambda net, x: net.ibp(linf_box(x, 0.1), arithmetic="float32"),
    "margins": lambda net, x: net.margins(linf_box(x, 0.1), LABELS, "crown", x),
    "margins, sound": lambda net, x: net.margins(linf_box(x, 0.1), LABELS, "crown", arithmetic="float32"),
    "segments": lambda net, x: net.ibp_in_segments(linf_box(x, 0.1), {}, lambda box: None),
    "clean pass": lambda net, x: net.clean_pass(x),
    "boxes": lambda net, x: net.tightened(linf_box(x, 0.1)),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 9, 8), (8, 8), (64,), (1, 1, 8, 8)], ids=str)
@pytest.mark.parametrize("ask", ASKING)
def test_inputs_are_of_a_shape_that_the_network_takes(ask, shape, training):
    net = BoundedModel(image_network().train(training), torch.rand(2, 1, 8, 8))
    with pytest.raises(UsageError, match=re.escape(f"{shape} are none of this network's, which are (1, 8, 8)")):
        ASKING[ask](net, torch.rand(2, *shape))


def test_a_network_that_takes_images_of_several_sizes_is_asked_about_all_of_them():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    recorded_there, recorded_here = (BoundedModel(model, torch.rand(1, 1, size, size)) for size in (8, 12))
    box = linf_box(torch.rand(2, 1, 12, 12), 0.1)
    for method in METHODS:
        there, here = (net.margins(box, LABELS, method) for net in (recorded_there, recorded_here))
        torch.testing.assert_close(there, here)


def of_several_sizes(layer: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), layer, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


LIVELY = {  # what a walk in training mode changes: running statistics, the generator, an estimate of a norm
    "BatchNorm": lambda: nn.BatchNorm2d(4),
    "cumulative BatchNorm": lambda: nn.BatchNorm2d(4, momentum=None),
    "Dropout": lambda: nn.Dropout(0.5),
    "Dropout2d": lambda: nn.Dropout2d(0.5),
    "spectral_norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 3), n_power_iterations=100),
}
ONE_WALK = {
    "ibp": lambda net, x: net.ibp(linf_box(x, 0.1), x),
    "clean pass": lambda net, x: net.clean_pass(x),
    "recorded": lambda net, x: net.recorded(linf_box(x, 0.1), x),
    "margins": lambda net, x: net.margins(linf_box(x, 0.1), LABELS, "crown-ibp", x),
}


@pytest.mark.parametrize("ask", ONE_WALK)
@pytest.mark.parametrize("layer", LIVELY)
def test_a_question_at_another_size_leaves_what_one_forward_leaves(layer, ask):
    model = of_several_sizes(LIVELY[layer]()).train()
    net = BoundedModel(model, torch.rand(1, 1, 8, 8))
    net.clean_pass(torch.rand(2, 1, 8, 8))
    with torch.no_grad():
        for weight in model.parameters():  # a norm that was estimated before is that of other weights now
            weight.copy_(torch.randn_like(weight))
    for size in (12, 9, 12):
        x, twin = torch.rand(2, 1, size, size), copy.deepcopy(model)
        torch.manual_seed(1)
        twin(x)
        drawn = torch.get_rng_state()
        torch.manual_seed(1)
        ONE_WALK[ask](net, x)
        assert torch.equal(torch.get_rng_state(), drawn)
        torch.testing.assert_close(dict(model.named_buffers()), dict(twin.named_buffers()))


def test_boxes_in_segments_at_another_size_leave_statistics_alone():
    model = of_several_sizes(nn.BatchNorm2d(4)).train()
    net, x = BoundedModel(model, torch.rand(1, 1, 8, 8)), torch.rand(2, 1, 12, 12)
    clean = BoundedModel(model, x).clean_pass(x)
    before = copy.deepcopy(dict(model.named_buffers()))
    net.ibp_in_segments(linf_box(x, 0.1), clean.coefficients, lambda box: None)
    torch.testing.assert_close(dict(model.named_buffers()), before, rtol=0, atol=0)


def test_a_network_that_cannot_be_copied_is_asked_about_other_sizes_too():
    model = of_several_sizes(nn.Identity()).eval()
    model.lock = threading.Lock()
    net, box = BoundedModel(model, torch.rand(1, 1, 8, 8)), linf_box(torch.rand(2, 1, 12, 12), 0.1)
    assert net.ibp(box).output.contains(model(box.lower), 1e-5).all()


@pytest.mark.parametrize(
    "clean", [X[:1], X.repeat(2, 1), X.double(), X[:, :1], X[0]], ids=["fewer", "more", "type", "shape", "axes"]
)
@pytest.mark.parametrize("method", METHODS)
def test_clean_inputs_are_points_of_the_box(clean, method):
    with pytest.raises(UsageError, match="clean must be points of the box"):
        network().margins(linf_box(X, 0.1), LABELS, method, clean)


@pytest.mark.parametrize("arithmetic", [None, "float32"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("method", [*METHODS, BRANCH_AND_BOUND])
def test_of_no_images_there_are_no_margins(method, training, arithmetic):
    net = BoundedModel(image_network().train(training), torch.rand(2, 1, 8, 8))
    none = torch.rand(0, 1, 8, 8)
    margins = net.margins(linf_box(none, 0.1), LABELS[:0], method, none, arithmetic=arithmetic)
    assert margins.shape == (0, 3)
    assert margins.dtype == (torch.float32 if arithmetic is None else torch.float64)
    if not training:
        assert net.ibp(linf_box(none, 0.1), arithmetic=arithmetic).output.shape == net.clean_pass(none).output.shape


@both_backends
@pytest.mark.parametrize("method", METHODS)
def test_one_logit_has_no_margins(method, backend):
    net = bounded_model(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 1)), X, backend)
    with pytest.raises(UsageError, match="needs two"):
        net.margins(linf_box(X, 0.1), torch.zeros(2, dtype=torch.int64), method)


def test_one_number_an_image_is_no_logits():
    class Summed(nn.Linear):
        def forward(self, input):
            return super().forward(input).sum(1)

    net = BoundedModel(Summed(4, 3), X)
    for ask in (lambda: net.classes, lambda: net.margins(linf_box(X, 0.1), LABELS)):
        with pytest.raises(UsageError, match=r"logits \(B, K\)"):
            ask()


@pytest.mark.parametrize("shape", [(1,), (4, 3), (3, 1)], ids=str)
def test_margins_are_of_logits(shape):
    """(B, K): values of any shape have boxes, but no margins."""
    model = nn.Sequential(nn.Linear(4, 12), nn.Unflatten(1, (-1, *shape)))
    net = BoundedModel(model, X)
    assert net.ibp(linf_box(X, 0.1)).output.shape[2:] == shape
    with pytest.raises(UsageError, match=r"margins are of logits \(B, K\)"):
        net.margins(linf_box(X, 0.1), LABELS)


@pytest.mark.parametrize("example", [torch.rand(0, 4), torch.tensor(0.5)], ids=["no images", "no axis"])
def test_an_example_is_a_batch_of_one_at_least(example):
    with pytest.raises(UsageError, match="no batch of at least one"):
        BoundedModel(nn.Linear(4, 3), example)


def test_a_network_may_move_after_its_example_was_given(monkeypatch):
    """Its other mode is recorded on the device that it is on then."""
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval()
    net = BoundedModel(model, X)
    model.to("meta").train()
    checked = []
    monkeypatch.setattr(
        "certtrain.bounds.model.check_recording", lambda model, image: checked.append(image.device.type)
    )
    assert len(net.graph.steps) > 1
    assert checked == ["meta"]


class Overflowing(nn.Module):
    """Infinite beside finite logits, and infinity less infinity inside of a box."""

    def __init__(self) -> None:
        super().__init__()
        self.identity = nn.Linear(4, 4)
        with torch.no_grad():
            self.identity.weight.copy_(torch.eye(4))

    def forward(self, x):
        x = self.identity(x)
        return torch.cat([torch.exp(1e3 * x[:, :2]), torch.relu(x[:, 2:] - 0.5)], 1)


@pytest.mark.parametrize("backend", ["native", "lirpa"])
@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_known_where_values_overflow(method, backend):
    box = linf_box(X.clamp(min=0.5), 0.1)
    margins = bounded_model(Overflowing(), X, backend).margins(box, LABELS, method).detach()
    assert (margins.isfinite() | (margins == -torch.inf)).all()
    assert margins[0, 1] == margins[1, 0] == margins[1, 1] == -torch.inf
    assert (margins.gather(1, LABELS[:, None]) == 0).all()


OVERFLOWS = {  # weights (2, n), biases (2,), and the ends of every input
    "the sum of a box's ends": ([[0.1], [-0.1]], [-3e38, 0.0], 2e38, 2.2e38),
    "a sum on the way": ([[2e38, 2e38, -2e38, -2e38], [0.0] * 4], [-1.0, 0.0], 1 - 2.0**-6, 1.0),
    "logits, one above and one below": ([[3e38, 3e38], [-3e38, -3e38]], [-3e38, 3e38], 0.1, 0.9),
}


@pytest.mark.parametrize("method", STAGES)
@pytest.mark.parametrize("name", OVERFLOWS)
def test_what_overflows_proves_nothing_that_is_false(name, method):
    """Finite boxes and weights, of which arithmetic without bounds knows the least margin: it is below 0."""
    weight, bias, low, high = OVERFLOWS[name]
    layer = nn.Linear(len(weight[0]), 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight))
        layer.bias.copy_(torch.tensor(bias))
    ends = [[Fraction(torch.tensor(end).item()) for end in (low, high)]] * len(weight[0])
    (w, v), (b, c) = ([[Fraction(x) for x in row] for row in layer.weight.tolist()], map(Fraction, layer.bias.tolist()))
    least = b - c + sum(min((x - y) * end for end in part) for x, y, part in zip(w, v, ends, strict=True))
    assert least < 0
    x = torch.full((1, len(ends)), low)
    net = BoundedModel(nn.Sequential(layer).eval(), torch.zeros_like(x))
    margins = net.margins(Box(x, torch.full_like(x, high)), torch.tensor([0]), method)
    assert not proved(margins).any()
    assert margins[0, 1] == -torch.inf or Fraction(margins[0, 1].item()) <= least * (1 - Fraction(1, 10**6))


@pytest.mark.parametrize("other", [1.0, -1.0, torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("margin", [1.0, -1.0, torch.inf, -torch.inf, torch.nan])
def test_a_margin_that_is_not_finite_says_nothing(margin, other):
    margins, labels = torch.tensor([[0.0, margin, other]]), torch.tensor([0])
    assert proved(margins).item() == (margin == other == 1.0)
    one, two = (value if math.isfinite(value) else -math.inf for value in (margin, other))
    assert only_finite(margins, labels).tolist() == [[0.0, one, two]]
    assert better(margins[:, 1], margins[:, 2]).tolist() == [max(one, two)]


def test_tensors_without_values_are_asked_for_none():
    net = network("native")
    net.ibp(linf_box(X, 0.1))  # recorded on tensors that have some
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x, labels = mode.from_tensor(X), mode.from_tensor(LABELS)
        bounds = net.ibp(linf_box(x, 0.1), record=True)
        assert net.margins_of(bounds, labels, "crown-ibp").shape == (2, 3)
