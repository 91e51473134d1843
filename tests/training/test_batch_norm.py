"""Whose statistics BatchNorm has, against networks whose statistics were set by hand; population statistics."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from certtrain.bounds import BoundedModel, linf_box
from certtrain.data import load_dataset, to_float
from certtrain.errors import UsageError
from certtrain.runs.checkpoint import load_model
from certtrain.training.averaging import reestimate_statistics
from certtrain.training.losses import Metrics
from certtrain.training.method import Method, Phase, scheduled
from certtrain.training.methods import IBP, MTLIBP, CrownIBP
from certtrain.training.regularization import Regularization
from certtrain.training.step import GradientStep, Statistics
from tests.config.refused import check_refused
from tests.training.test_methods import ATTACK, BATCH, EPS, Witness, batch, check_same_gradients, network


def step(model: nn.Module, method: Method, statistics: Statistics, **options) -> Metrics:
    images, labels = batch()
    trained = GradientStep(BoundedModel(model, images), method, Regularization(0.0), statistics=statistics, **options)
    return trained.backward(images, labels, scheduled(EPS, like=images), Phase.FULL)


@pytest.mark.parametrize("parts", [1, 3])
def test_statistics_of_the_attacked_batch_are_for_all_but_the_clean_loss(parts):
    """The points that were attacked with the clean batch's statistics go through the network as a batch."""
    images, labels = batch()
    model, other = network(), network()
    metrics = step(model, MTLIBP(alpha=0.3, w=0.8, attack=ATTACK), "adversarial", accumulation=parts)
    points = Witness(other, images).attacked(images, labels)
    net = Witness(other, points)
    ibp = F.cross_entropy(-net.margins((images - EPS).clamp(0, 1), (images + EPS).clamp(0, 1), labels), labels)
    robust = 0.3 * ibp + 0.7 * F.cross_entropy(net.logits(points), labels)
    expected = 0.8 * robust + 0.2 * F.cross_entropy(Witness(other, images).logits(images), labels)
    expected.backward()
    assert metrics["loss"].item() == pytest.approx(expected.item(), rel=1e-9)
    check_same_gradients(model, other)
    other(images), other(points)  # which update the running statistics as the step must have
    for value, running in zip(model.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(value, running, rtol=1e-12, atol=1e-12)


def centered_loss(model: nn.Sequential, images: Tensor, labels: Tensor) -> Tensor:
    """IBP layer by layer, each BatchNorm with the mean and variance of the middles of its boxes."""
    conv, bn1, _, _, linear, bn2, _, last = model
    low, high = (images - EPS).clamp(0, 1), (images + EPS).clamp(0, 1)
    for weighted, bn in ((lambda x, w, b: F.conv2d(x, w, b, 2, 1), bn1), (F.linear, bn2)):
        layer = conv if bn is bn1 else linear
        center = weighted((low + high) / 2, layer.weight, layer.bias)
        radius = weighted((high - low) / 2, layer.weight.abs(), None)
        flat = center.transpose(0, 1).flatten(1)
        shape = (-1, *[1] * (center.dim() - 2))
        scale = (bn.weight / (flat.var(1, correction=0) + bn.eps).sqrt()).view(shape)
        center = (center - flat.mean(1).view(shape)) * scale + bn.bias.view(shape)
        low, high = F.relu(center - radius * scale.abs()).flatten(1), F.relu(center + radius * scale.abs()).flatten(1)
        if bn is bn1:
            low, high = low.flatten(1), high.flatten(1)
    rows = last.weight[labels][:, None] - last.weight
    margins = (rows * ((low + high) / 2)[:, None] - rows.abs() * ((high - low) / 2)[:, None]).sum(2)
    return F.cross_entropy(-(margins + last.bias[labels][:, None] - last.bias), labels)


def test_statistics_of_the_middle_need_no_clean_input():
    model, other = network(), network()
    metrics = step(model, IBP(), "center")
    expected = centered_loss(other, *batch())
    expected.backward()
    assert metrics["loss"].item() == pytest.approx(expected.item(), rel=1e-9)
    assert "natural_error" not in metrics
    check_same_gradients(model, other)


def test_without_radius_the_middle_is_the_clean_input():
    images, labels = batch()
    found = []
    for statistics in ("clean", "center"):
        model = network()
        trained = GradientStep(BoundedModel(model, images), CrownIBP(), Regularization(0.0), statistics=statistics)
        loss = trained.backward(images, labels, scheduled(0.0, 0.5, like=images), Phase.WARMUP)["loss"]
        found.append([loss, *(p.grad for p in model.parameters()), *model.buffers()])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


def test_population_statistics_are_means_over_all_images():
    model, images = network(), torch.rand(11, 2, 6, 6, dtype=torch.float64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    reestimate_statistics(model, images.split(4))
    inputs = [model[0](part) for part in images.split(4)]
    for name, value in (("running_mean", Tensor.mean), ("running_var", Tensor.var)):
        expected = sum(value(x.transpose(0, 1).flatten(1), 1) * len(x) for x in inputs) / 11
        torch.testing.assert_close(getattr(model[1], name), expected, rtol=1e-12, atol=1e-12)
    assert model.training
    assert model[1].momentum == 0.1
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == ("running" not in name), name


@pytest.mark.parametrize("population", [False, True])
def test_population_statistics_of_a_run_are_those_of_its_network(train, tmp_path, population):
    """Of what the last weights of its first layer make of its training images."""
    assert train(f"training.batch_norm.population={population}").code == 0
    model, images = load_model(tmp_path / "run"), to_float(load_dataset("digits").train.images[:96])
    first = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    entering: list[Tensor] = []
    first.register_forward_pre_hook(lambda module, inputs: entering.extend(inputs))
    with torch.no_grad():
        model(images)
    mean = entering[0].mean((0, 2, 3))
    assert torch.allclose(first.running_mean, mean, rtol=1e-4, atol=1e-5) == population


@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "sabr"])
def test_runs_with_statistics_of_the_middle(train, method):
    assert train(f"training.method={method}", "training.batch_norm.statistics=center").code == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.batch_norm.statistics=adversarial"], "statistics adversarial: method ibp attacks no images"),
        (["training.batch_norm.statistics=center", "training.method=mtl-ibp"], "statistics center is for methods that"),
        (["training.batch_norm.statistics=center", "training.method={name: ibp, w: 0.5}"], "statistics center is for"),
        (["training.batch_norm.statistics=center", "training.accumulation=2"], "statistics center is for methods that"),
        (["training.batch_norm.statistics=middle"], r"training\.batch_norm\.statistics: "),
    ],
)
def test_what_does_not_go_together_is_said(overrides, message):
    check_refused(overrides, message)


def test_a_network_without_batch_norm_has_no_statistics(train):
    outcome = train("training.batch_norm.population=true", "model.options.batch_norm=false")
    assert outcome.code == 2
    assert outcome.error == "training.batch_norm: model cnn-small has no BatchNorm"


def test_a_box_whose_middle_is_not_asked_for_still_needs_a_clean_input():
    images, _ = batch()
    assert len(images) == BATCH
    with pytest.raises(UsageError, match="pass clean="):
        BoundedModel(network(), images).ibp(linf_box(images, EPS))
