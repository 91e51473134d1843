"""The training step's loss and gradient against the formulas, written out with auto_LiRPA's bounds."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from certtrain.bounds import BoundedModel, linf_box
from certtrain.bounds.linear import fused_cross_entropy
from certtrain.bounds.lirpa import LirpaModel
from certtrain.models import build_model
from certtrain.regularizers import relu_balance_loss, tightness_loss
from certtrain.training.objectives import Metrics, Objective, Phase, proved
from tests.networks import narrow_cnn7, randomized, residual_network

EPS, PROGRESS = torch.tensor(2 / 255, dtype=torch.float64), torch.tensor(0.25, dtype=torch.float64)


def batch(size: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(size, 3, 16, 16, generator=generator, dtype=torch.float64)
    return images, torch.randint(0, 5, (size,), generator=generator)


def network() -> nn.Module:
    torch.manual_seed(0)
    return randomized(narrow_cnn7()).double().train()


def step(model: nn.Module, phase: Phase, **options) -> Metrics:
    images, labels = batch()
    return Objective(BoundedModel(model, images), **options).backward(images, labels, EPS, PROGRESS, phase)


def published_loss(model: nn.Module, phase: Phase, method: str) -> Tensor:
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
        if method == "crown-ibp" and phase is Phase.WARMUP:
            backward = net.margins(linf_box(images, eps), labels, "crown-ibp", clean=images, intersect=False)
            margins = (1 - PROGRESS) * backward + PROGRESS * margins
        loss = loss + F.cross_entropy(-margins, labels)
    if phase is not Phase.FULL:
        regularizer = tightness_loss(bounds.relu_inputs, bounds.affine_input) + relu_balance_loss(bounds.relu_inputs)
        loss = loss + 0.5 * (1 - PROGRESS) * regularizer
    return loss


@pytest.mark.parametrize("method", ["ibp", "crown-ibp"])
@pytest.mark.parametrize("phase", Phase)
def test_loss_and_gradient_equal_the_published_objective(phase, method):
    ours, theirs = network(), network()
    metrics = step(ours, phase, method=method, l1=1e-4)
    expected = published_loss(theirs, phase, method)
    expected.backward()
    assert metrics["loss"].item() == pytest.approx(expected.item(), rel=1e-9)
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        scale = other.grad.abs().max().clamp(min=1e-12)
        assert ((mine.grad - other.grad).abs().max() / scale).item() < 1e-6, name


def test_loss_fusion_bounds_the_cross_entropy_itself():
    """The fused loss of the step is that of its joint pass, with the share that warmup has left; the rest stays."""
    images, labels = batch()
    fused, plain = (step(network(), Phase.WARMUP, method="crown-ibp", loss_fusion=fusion) for fusion in (True, False))
    bounds = BoundedModel(network(), images).ibp(linf_box(images, EPS), clean=images, record=True)
    expected = fused_cross_entropy(bounds, labels, 1 - PROGRESS).mean()
    assert fused["robust_loss"].item() == pytest.approx(expected.item(), rel=1e-12)
    assert fused["robust_loss"] != plain["robust_loss"]
    for term in ("tightness_loss", "relu_balance_loss", "natural_error"):
        assert torch.equal(fused[term], plain[term])


@pytest.mark.parametrize("fusion", [False, True], ids=["margins", "fusion"])
@pytest.mark.parametrize("eps", [0.0, 2 / 255])
def test_crown_ibp_ends_as_ibp(eps, fusion):
    """At the end of warmup β is 0, and what is left is the loss of IBP; before it there are no bounds at all."""
    images, labels = batch()
    progress, phase = torch.tensor(1.0).double(), Phase.WARMUP if eps else Phase.BEFORE

    def loss(**options) -> float:
        objective = Objective(BoundedModel(network(), images), **options)
        return objective.backward(images, labels, torch.tensor(eps).double(), progress, phase)["loss"].item()

    assert loss(method="crown-ibp", loss_fusion=fusion) == pytest.approx(loss(method="ibp"), rel=1e-9)


@pytest.mark.parametrize("parts", [2, 4, 5])
@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize(
    "method",
    [{"method": "ibp"}, {"method": "crown-ibp"}, {"method": "crown-ibp", "loss_fusion": True}],
    ids=["ibp", "crown-ibp", "fusion"],
)
def test_accumulation_gives_the_whole_batchs_gradient_and_statistics(phase, parts, method):
    whole, divided = network(), network()
    expected = step(whole, phase, **method, l1=1e-4)
    metrics = step(divided, phase, **method, l1=1e-4, accumulation=parts)
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name], value, rtol=1e-9, atol=1e-12)
    for mine, other in zip(divided.parameters(), whole.parameters(), strict=True):
        scale = other.grad.abs().max().clamp(min=1e-30)
        assert ((mine.grad - other.grad).abs().max() / scale).item() < 1e-9
    for mine, other in zip(divided.buffers(), whole.buffers(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def assert_same_step(model: nn.Module, metrics: Metrics, other: nn.Module, expected: Metrics) -> None:
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name], value, rtol=1e-9, atol=1e-12)
    for mine, its in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad, rtol=1e-9, atol=1e-12)
    for mine, its in zip(model.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-12, atol=1e-12)


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


@pytest.mark.parametrize("phase", [Phase.WARMUP, Phase.FULL])
def test_activation_checkpointing_keeps_less_for_the_way_back(phase):
    model = build_model("cnn7", (3, 32, 32), 10, options={"width": 8, "linear_width": 32}).train()
    images, labels = torch.rand(16, 3, 32, 32), torch.randint(0, 10, (16,))

    def bytes_kept(checkpointing: bool) -> int:
        """After a forward pass: what autograd has saved, and what Python holds, such as that between segments."""
        objective = Objective(BoundedModel(model, images[:1]), activation_checkpointing=checkpointing)
        gc.collect()
        before = {id(thing) for thing in gc.get_objects()}
        storages = {}

        def keep(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            terms = objective._terms(images, labels, EPS.float(), PROGRESS.float(), phase)
        for thing in gc.get_objects():
            if id(thing) not in before and type(thing) is Tensor:
                keep(thing)
        assert terms["robust_loss"].requires_grad  # alive until here
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
        ({"regularization": 0.0}, 0.0, Phase.NATURAL),
        ({"regularization": 0.0}, 0.1, Phase.WARMUP),
        ({"tightness": False, "relu_balance": False}, 0.0, Phase.NATURAL),
        ({"method": "natural"}, 0.1, Phase.NATURAL),
        ({"method": "crown-ibp"}, 0.1, Phase.WARMUP),
        ({"method": "crown-ibp"}, 0.3, Phase.FULL),
    ],
)
def test_phases(options, eps, phase):
    assert Objective(BoundedModel(nn.Linear(2, 2), torch.rand(1, 2)), **options).phase(eps, 0.3) is phase
