"""The training step's loss and gradient against the formulas, written out with auto_LiRPA's bounds."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from certtrain.bounds import BoundedModel, bounded_model, linf_box
from certtrain.bounds.backends import BACKENDS
from certtrain.bounds.linear import fused_cross_entropy
from certtrain.bounds.lirpa import LirpaModel
from certtrain.bounds.margins import proved
from certtrain.errors import UsageError
from certtrain.models import build_model
from certtrain.regularizers import relu_balance_loss, tightness_loss
from certtrain.schedules import SmoothedEpsilon
from certtrain.training.losses import Metrics
from certtrain.training.method import Method, Phase, scheduled
from certtrain.training.methods import IBP, METHODS, SABR, Adversarial, CrownIBP, Natural
from certtrain.training.regularization import Regularization
from certtrain.training.step import Batch, GradientStep
from tests.networks import narrow_cnn7, randomized, residual_network

EPS, EPS_RATIO = torch.tensor(2 / 255, dtype=torch.float64), torch.tensor(0.25, dtype=torch.float64)
AT = scheduled(2 / 255, 0.25, like=EPS)


def batch(size: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(size, 3, 16, 16, generator=generator, dtype=torch.float64)
    return images, torch.randint(0, 5, (size,), generator=generator)


def network() -> nn.Module:
    torch.manual_seed(0)
    return randomized(narrow_cnn7()).double().train()


def step(model: nn.Module, phase: Phase, **options) -> Metrics:
    images, labels = batch()
    return GradientStep(BoundedModel(model, images), **options).backward(images, labels, AT, phase)


def published_loss(model: nn.Module, phase: Phase, method: Method) -> Tensor:
    """DESIGN's objective, the bounds those of auto_LiRPA; λ = 0.5, τ = 0.5, L1 weight 1e-4."""
    images, labels = batch()
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    loss = 1e-4 * sum(weight.abs().sum() for weight in weights)
    if phase is Phase.NATURAL:
        return loss + F.cross_entropy(model(images), labels)
    net = LirpaModel(model, images)
    eps = 1e-6 if phase is Phase.BEFORE else EPS
    bounds = net.ibp(linf_box(images, eps), clean=images)
    if phase is Phase.BEFORE:
        loss = loss + F.cross_entropy(bounds.clean, labels)
    else:
        margins = net.margins(linf_box(images, eps), labels, clean=images)
        if isinstance(method, CrownIBP) and phase is Phase.WARMUP:
            backward = net.margins(linf_box(images, eps), labels, "crown-ibp", clean=images, intersect=False)
            margins = (1 - EPS_RATIO) * backward + EPS_RATIO * margins
        loss = loss + F.cross_entropy(-margins, labels)
    if phase is not Phase.FULL:
        regularizer = tightness_loss(bounds.relu_inputs, bounds.affine_input) + relu_balance_loss(bounds.relu_inputs)
        loss = loss + 0.5 * (1 - EPS_RATIO) * regularizer
    return loss


@pytest.mark.parametrize("method", [IBP(), CrownIBP()], ids=["ibp", "crown-ibp"])
@pytest.mark.parametrize("phase", Phase)
def test_loss_and_gradient_equal_the_published_objective(phase, method):
    model, twin = network(), network()
    metrics = step(model, phase, method=method, l1=1e-4)
    expected = published_loss(twin, phase, method)
    expected.backward()
    assert metrics["loss"].item() == pytest.approx(expected.item(), rel=1e-9)
    for (name, parameter), expected_parameter in zip(model.named_parameters(), twin.parameters(), strict=True):
        scale = expected_parameter.grad.abs().max().clamp(min=1e-12)
        assert ((parameter.grad - expected_parameter.grad).abs().max() / scale).item() < 1e-6, name


@pytest.mark.parametrize("method", [IBP(), SABR(attack={"steps": 1})], ids=["ibp", "sabr"])
@pytest.mark.parametrize("eps", [1e-12, 1e-9, 2e-8, 1e-7])
def test_tightness_at_the_beginning_of_the_ramp_is_that_of_a_radius_that_float32_can_hold(eps, method):
    """Of boxes so small it does not depend on the radius, as float64 says."""
    images, labels = batch()
    net, twin = BoundedModel(network().float(), images.float()), LirpaModel(network(), images)
    trained = GradientStep(net, method, Regularization(1.0, tolerance=0.3))
    found = trained.backward(images.float(), labels, scheduled(eps, 0.0), Phase.WARMUP)["tightness_loss"]
    bounds = twin.ibp(linf_box(images, 1e-6), clean=images)
    expected = tightness_loss(bounds.relu_inputs, bounds.affine_input, 0.3)
    assert 0.1 < expected < 0.9
    assert found.item() == pytest.approx(expected.item(), rel=0.02)


class Functional(nn.Module):
    """No module has its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.matrix = nn.Parameter(torch.randn(2, 1, 3, 3)), nn.Parameter(torch.randn(3, 2 * 6 * 6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(F.conv2d(x, self.kernel)).flatten(1), self.matrix)


class Attending(nn.Module):
    """Rows of an image attend to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.last = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(1, 2)
        return self.last(self.attention(rows, rows, rows, need_weights=False)[0].flatten(1))


def tied() -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    model[3].weight = model[1].weight
    return model


@pytest.mark.parametrize(
    ("model", "weights"),
    [
        (Functional(), lambda model: [model.kernel, model.matrix]),
        (Attending(), lambda m: [m.attention.in_proj_weight, m.attention.out_proj.weight, m.last.weight]),
        (tied(), lambda model: [model[1].weight, model[5].weight]),
        (
            nn.Sequential(nn.Flatten(), weight_norm(nn.Linear(64, 4)), nn.ReLU(), nn.Linear(4, 3)),
            lambda model: [model[1].weight, model[3].weight],
        ),
    ],
    ids=["functional", "attention", "tied", "parametrized"],
)
def test_l1_is_of_each_weight_that_a_layer_multiplies_by_once(model, weights):
    images, labels = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    trained = GradientStep(BoundedModel(model, images), Natural(), l1=0.5)
    found = trained.backward(images, labels, scheduled(0.0, 0.0, like=images), Phase.NATURAL)["l1_loss"]
    expected = 0.5 * sum(weight.double().abs().sum().item() for weight in weights(model))
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_l1_of_a_network_without_affine_layers_is_refused():
    net = BoundedModel(nn.Sequential(nn.Flatten(), nn.ReLU()), torch.rand(1, 1, 2, 2))
    with pytest.raises(UsageError, match=r"regularizers\.l1: the network has no weight of an affine layer"):
        GradientStep(net, Natural(), l1=0.5)


def test_loss_fusion_bounds_the_cross_entropy_itself():
    """The fused loss of the step is that of its joint pass, with the share that warmup has left; the rest stays."""
    images, labels = batch()
    fused, plain = (step(network(), Phase.WARMUP, method=CrownIBP(loss_fusion=fusion)) for fusion in (True, False))
    bounds = BoundedModel(network(), images).ibp(linf_box(images, EPS), clean=images, record=True)
    expected = fused_cross_entropy(bounds, labels, 1 - EPS_RATIO).mean()
    assert fused["robust_loss"].item() == pytest.approx(expected.item(), rel=1e-12)
    assert fused["robust_loss"] != plain["robust_loss"]
    for term in ("tightness_loss", "relu_balance_loss", "natural_error"):
        assert torch.equal(fused[term], plain[term])


@pytest.mark.parametrize("fusion", [False, True], ids=["margins", "fusion"])
@pytest.mark.parametrize("eps", [0.0, 2 / 255])
def test_crown_ibp_ends_as_ibp(eps, fusion):
    """At the end of warmup β is 0, and what is left is the loss of IBP; before it there are no bounds at all."""
    images, labels = batch()
    at, phase = scheduled(eps, 1.0, like=images), Phase.WARMUP if eps else Phase.BEFORE

    def loss(method: Method) -> float:
        trained = GradientStep(BoundedModel(network(), images), method)
        return trained.backward(images, labels, at, phase)["loss"].item()

    assert loss(CrownIBP(loss_fusion=fusion)) == pytest.approx(loss(IBP()), rel=1e-9)


@pytest.mark.parametrize("parts", [pytest.param(2, marks=pytest.mark.slow), 4, 5])
@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize(
    "method",
    [IBP(), CrownIBP(), CrownIBP(loss_fusion=True)],
    ids=["ibp", "crown-ibp", "fusion"],
)
def test_accumulation_gives_the_whole_batchs_gradient_and_statistics(phase, parts, method):
    whole, divided = network(), network()
    expected = step(whole, phase, method=method, l1=1e-4)
    metrics = step(divided, phase, method=method, l1=1e-4, accumulation=parts)
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name], value, rtol=1e-9, atol=1e-12)
    for found, expected in zip(divided.parameters(), whole.parameters(), strict=True):
        scale = expected.grad.abs().max().clamp(min=1e-30)
        assert ((found.grad - expected.grad).abs().max() / scale).item() < 1e-9
    for found, expected in zip(divided.buffers(), whole.buffers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def assert_same_step(model: nn.Module, metrics: Metrics, other: nn.Module, expected: Metrics) -> None:
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name], value, rtol=1e-9, atol=1e-12)
    for found, wanted in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-9, atol=1e-12)
    for found, wanted in zip(model.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("make", [narrow_cnn7, residual_network], ids=["cnn7", "residual"])
def test_activation_checkpointing_changes_nothing(make, phase, parts):
    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return randomized(make()).double().train()

    kept, recomputed = fresh(), fresh()
    expected = step(kept, phase, l1=1e-4)
    metrics = step(recomputed, phase, l1=1e-4, activation_checkpointing=True, accumulation=parts)
    assert_same_step(recomputed, metrics, kept, expected)


@pytest.mark.parametrize("phase", [pytest.param(Phase.WARMUP, marks=pytest.mark.slow), Phase.FULL])
def test_activation_checkpointing_keeps_less_for_the_way_back(phase):
    model = build_model("cnn7", (3, 32, 32), 10, options={"width": 8, "linear_width": 32}).train()
    images, labels = torch.rand(16, 3, 32, 32), torch.randint(0, 10, (16,))

    def bytes_kept(checkpointing: bool) -> int:
        """After a forward pass: what autograd has saved, and what Python holds, such as that between segments."""
        trained = GradientStep(BoundedModel(model, images[:1]), activation_checkpointing=checkpointing)
        gc.collect()
        before = {id(thing) for thing in gc.get_objects()}
        storages = {}

        def keep(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            terms = trained._terms(1.0, Batch(images, labels, labels), scheduled(2 / 255, 0.25), phase)
        for thing in gc.get_objects():
            if id(thing) not in before and type(thing) is Tensor:
                keep(thing)
        assert terms.losses["robust_loss"].requires_grad  # alive until here
        return sum(storages.values())

    assert bytes_kept(True) < 0.6 * bytes_kept(False)


def test_metrics_count_errors():
    images, labels = batch()
    model = network()
    with torch.no_grad():
        wrong = (copy.deepcopy(model)(images).argmax(1) != labels).double().mean()
        margins = LirpaModel(copy.deepcopy(model), images).margins(linf_box(images, EPS), labels, clean=images)
        open_ = 1 - ((margins > 0).sum(1) == 4).double().mean()
    metrics = step(model, Phase.FULL)
    assert metrics["natural_error"].item() == pytest.approx(wrong.item())
    assert metrics["verified_error"].item() == pytest.approx(open_.item())


def test_proved_needs_every_margin_but_the_labels_own():
    margins = torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 0.0], [0.1, 0.0, -0.1], [float("nan"), 0.0, 1.0]])
    assert proved(margins).tolist() == [True, False, False, False]


@pytest.mark.parametrize(
    ("options", "eps", "phase"),
    [
        ({}, 0.0, Phase.BEFORE),
        ({}, 0.1, Phase.WARMUP),
        ({}, 0.3, Phase.FULL),
        ({"regularization": Regularization(0.0)}, 0.0, Phase.NATURAL),
        ({"regularization": Regularization(0.0)}, 0.1, Phase.FULL),
        ({"regularization": Regularization(0.0), "method": CrownIBP()}, 0.1, Phase.WARMUP),
        ({"regularization": Regularization(0.0), "method": CrownIBP(beta=(1.0, 0.5))}, 0.1, Phase.FULL),
        ({"method": CrownIBP(beta=(1.0, 0.5))}, 0.1, Phase.WARMUP),
        ({"method": Adversarial()}, 0.1, Phase.FULL),
        ({"regularization": Regularization(tightness=False, relu_balance=False)}, 0.0, Phase.NATURAL),
        ({"method": Natural()}, 0.1, Phase.NATURAL),
        ({"method": CrownIBP()}, 0.1, Phase.WARMUP),
        ({"method": CrownIBP()}, 0.3, Phase.FULL),
    ],
)
def test_phases(options, eps, phase):
    net = BoundedModel(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), torch.rand(1, 2))
    assert GradientStep(net, **options).phase(eps, eps / 0.3) is phase


@pytest.mark.parametrize("initial", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("name", METHODS)
def test_what_differs_on_the_way_does_so_wherever_the_radius_comes_from(name, initial):
    """A run may begin at the radius of another: below, at, or above its own."""
    layers = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    trained = GradientStep(BoundedModel(layers, torch.rand(1, 2)), METHODS[name](), Regularization(0.0))
    radius = SmoothedEpsilon(0.3, 0, 100, initial=initial)
    phases = [trained.phase(radius(step), radius.ramp(step)) for step in (0, 10, 99, 100, 150)]
    way = {"natural": Phase.NATURAL, "crown-ibp": Phase.WARMUP, "taps": Phase.WARMUP, "staps": Phase.WARMUP}
    assert phases[:3] == [way.get(name, Phase.FULL)] * 3
    assert phases[3:] == [Phase.NATURAL if name == "natural" else Phase.FULL] * 2


# --- networks of other kinds -----------------------------------------------------------------------------------------


def without_batch_norm(activation: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 256, 8), activation, nn.Linear(8, 5)).double().train()


@pytest.mark.parametrize("phase", Phase)
def test_accumulation_without_batch_norm(phase):
    whole, divided = without_batch_norm(nn.ReLU()), without_batch_norm(nn.ReLU())
    assert_same_step(divided, step(divided, phase, accumulation=3), whole, step(whole, phase))


@pytest.mark.parametrize("phase", Phase)
def test_accumulation_with_a_batch_norm_that_the_regularizers_do_not_reach(phase):
    """Before warmup the boxes' loss looks no further than the last ReLU."""

    def with_batch_norm_last() -> nn.Module:
        torch.manual_seed(0)
        layers = (nn.Flatten(), nn.Linear(3 * 256, 8), nn.ReLU(), nn.Linear(8, 5), nn.BatchNorm1d(5))
        return nn.Sequential(*layers).double().train()

    whole, divided = with_batch_norm_last(), with_batch_norm_last()
    assert_same_step(divided, step(divided, phase, accumulation=3), whole, step(whole, phase))


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.Identity()])
def test_regularizers_without_an_activation_they_know_are_an_error_that_names_the_keys(activation):
    for backend in BACKENDS:
        net = bounded_model(without_batch_norm(activation), batch()[0], backend)
        with pytest.raises(UsageError, match=r"regularizers\.weight to 0.* regularizers\.tightness"):
            GradientStep(net)
    metrics = step(without_batch_norm(activation), Phase.WARMUP, regularization=Regularization(0.0))
    assert metrics["loss"] == metrics["robust_loss"] > 0


def test_verified_is_the_bound_on_the_whole_box_and_what_is_trained_has_a_name_of_its_own():
    """While β > 0 the margins of CROWN-IBP training are a mixture; afterwards they are IBP's."""
    images, labels = batch()
    expected = BoundedModel(network(), images).margins(linf_box(images, EPS), labels, clean=images)
    for phase in (Phase.WARMUP, Phase.FULL):
        metrics = step(network(), phase, method=CrownIBP())
        assert metrics["verified_error"].item() == pytest.approx(1 - proved(expected).double().mean().item())
        assert ("robust_error" in metrics) == (phase is Phase.WARMUP)


@pytest.mark.parametrize(("beta", "along"), [((1.0, 0.5), "epsilon"), ((0.8, 0.2), "steps")])
def test_beta_falls_between_its_ends_with_epsilon_or_with_the_steps(beta, along):
    """β = 0.75 and 0.5 of the way; at full epsilon the second value stays."""
    images, labels = batch()
    for at, phase, share in (
        (scheduled(2 / 255, 0.25, 0.5, like=EPS), Phase.WARMUP, 0.25 if along == "epsilon" else 0.5),
        (scheduled(2 / 255, like=EPS), Phase.FULL, 1.0),
    ):
        weight = beta[0] + (beta[1] - beta[0]) * share
        net = BoundedModel(network(), images)
        bounds = net.ibp(linf_box(images, EPS), clean=images, record=True)
        margins = weight * net.margins_of(bounds, labels, "crown-ibp") + (1 - weight) * net.margins_of(bounds, labels)
        trained = GradientStep(BoundedModel(network(), images), CrownIBP(beta=beta, beta_along=along))
        found = trained.backward(images, labels, at, phase)["robust_loss"]
        torch.testing.assert_close(found, F.cross_entropy(-margins, labels), rtol=1e-10, atol=0)
