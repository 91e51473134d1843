"""Smoothed steps against their formulas, with networks that are perturbed one by one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from certtrain.bounds import BoundedModel
from certtrain.config.smoothing import NoSmoothingSection, PGPESection, RGSSection
from certtrain.training.losses import Metrics
from certtrain.training.method import Phase, scheduled
from certtrain.training.noise import normal, step_keys, uniform
from certtrain.training.smoothing import WEIGHT_DRAWS, smoothed
from certtrain.training.step import GradientStep
from tests.config.refused import check_refused
from tests.training.test_methods import (
    EPS,
    METHODS_SHOWN,
    NO_REGULARIZATION,
    batch,
    check_same_gradients,
    network,
    witness,
    witnessed,
)

KEY = torch.tensor(5)
RGS, PGPE = RGSSection(std=0.02, samples=3), PGPESection(std=0.02, pairs=3)


def step(model: nn.Module, name: str, section: RGSSection | PGPESection) -> Metrics:
    images, labels = batch()
    plain = GradientStep(BoundedModel(model, images), METHODS_SHOWN[name], NO_REGULARIZATION)
    return smoothed(section, plain).backward(images, labels, scheduled(EPS, 1.0, like=images, key=int(KEY)), Phase.FULL)


def noise(model: nn.Module, number: int) -> list[Tensor]:
    return [
        normal(KEY, torch.tensor([position]), weight.shape, weight, WEIGHT_DRAWS + number)[0]
        for position, weight in enumerate(model.parameters())
    ]


def perturbed(model: nn.Sequential, directions: list[Tensor], std: float) -> nn.Sequential:
    other = copy.deepcopy(model)
    for parameter, direction in zip(other.parameters(), directions, strict=True):
        parameter.data = parameter.data + std * direction
    return other


def loss(name: str, model: nn.Sequential) -> Tensor:
    return witnessed(name, witness(name, model), *batch())


SHOWN = ["adversarial", "ibp", "sabr, shrunk", "exp-ibp", "staps"]


@pytest.mark.parametrize("name", SHOWN)
def test_rgs_is_the_mean_of_gradients_at_perturbed_weights(name):
    model, other, losses = network(), network(), []
    for parameter in other.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for sample in range(3):
        moved = perturbed(other, noise(other, sample), 0.02)
        losses.append(loss(name, moved))
        for parameter, gradient in zip(
            other.parameters(), torch.autograd.grad(losses[-1], moved.parameters()), strict=True
        ):
            parameter.grad += gradient / 3
    metrics = step(model, name, RGS)
    assert metrics["loss"].item() == pytest.approx(sum(value.item() for value in losses) / 3, rel=1e-9)
    check_same_gradients(model, other)


@pytest.mark.parametrize("name", SHOWN)
def test_pgpe_weighs_directions_by_differences_of_losses(name):
    model, other, losses = network(), network(), []
    for parameter in other.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for pair in range(3):
        directions = noise(other, pair)
        losses += [loss(name, perturbed(other, directions, sign * 0.02)).item() for sign in (1, -1)]
        for parameter, direction in zip(other.parameters(), directions, strict=True):
            parameter.grad += (losses[-2] - losses[-1]) / (2 * 0.02) * direction / 3
    metrics = step(model, name, PGPE)
    assert metrics["loss"].item() == pytest.approx(sum(losses) / 6, rel=1e-9)
    check_same_gradients(model, other, 1e-7)


def test_rgs_in_parts_is_the_same():
    images, labels = batch()
    models, at = (network(), network()), scheduled(EPS, 0.5, like=images, key=5)
    for model, parts in zip(models, (1, 3), strict=True):
        plain = GradientStep(BoundedModel(model, images), METHODS_SHOWN["exp-ibp"], accumulation=parts)
        smoothed(RGS, plain).backward(images, labels, at, Phase.WARMUP)
    check_same_gradients(*models)


@pytest.mark.parametrize("section", [RGS, PGPE], ids=["rgs", "pgpe"])
def test_weights_come_back_and_statistics_are_updated_once_by_their_mean(section):
    model, other = network(), network()
    other.requires_grad_(False)
    step(model, "ibp", section)
    signs = (1,) if section is RGS else (1, -1)
    copies = [perturbed(other, noise(other, number), sign * 0.02) for number in range(3) for sign in signs]
    for moved in copies:
        moved(batch()[0])
    for name, value in other.named_parameters():
        assert torch.equal(model.get_parameter(name), value)
    for name, value in model.named_buffers():
        expected = sum(moved.get_buffer(name).double() for moved in copies) / len(copies)
        torch.testing.assert_close(value.double(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("section", [RGS, PGPE], ids=["rgs", "pgpe"])
def test_a_gradient_is_added_to_what_is_there(section):
    model, other = network(), network()
    step(model, "ibp", section)
    for parameter in other.parameters():
        parameter.grad = torch.ones_like(parameter)
    step(other, "ibp", section)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad + 1, two.grad)


def test_a_parameter_that_is_not_used_gets_no_gradient_by_rgs():
    model = network()
    model[2].unused = nn.Parameter(torch.zeros(3))
    step(model, "ibp", RGS)
    assert model[2].unused.grad is None


def test_without_smoothing_a_step_is_itself():
    plain = GradientStep(BoundedModel(network(), batch()[0]))
    assert smoothed(NoSmoothingSection(), plain) is plain


def test_noise_is_normal_and_belongs_to_a_step_and_a_place():
    keys, positions, like = step_keys(7, torch.arange(50)), torch.arange(64), torch.empty(())
    drawn = torch.stack([normal(key, positions, (48,), like) for key in keys])
    assert drawn.dtype == torch.float32
    assert drawn.isfinite().all()
    for power, moment in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0)):
        assert (drawn.double() ** power).mean().item() == pytest.approx(moment, abs=0.05), power
    shares = [(drawn < end).double().mean().item() for end in (-1.959964, -0.674490, 0.674490, 1.959964)]
    assert shares == pytest.approx([0.025, 0.25, 0.75, 0.975], abs=0.005)
    rows = drawn.flatten(0, 1)
    correlations = torch.corrcoef(rows[:1500]) - torch.eye(1500)
    assert correlations.abs().mean() < 0.13
    assert torch.equal(normal(keys[3], positions[10:20], (48,), like), drawn[3, 10:20])
    weights = uniform(keys[0], positions, (48,), like, WEIGHT_DRAWS)
    assert not torch.equal(weights, uniform(keys[0], positions, (48,), like))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.smoothing=gauss"], r"training\.smoothing: unknown smoothing 'gauss'"),
        (
            ["training.smoothing={name: pgpe, samples: 3}"],
            r"unknown key .*samples: it belongs to training\.smoothing rgs",
        ),
        (["training.smoothing={name: rgs, std: 0}"], r"training\.smoothing\.std: .*greater than 0"),
        (["training.smoothing={name: pgpe, pairs: 0}"], r"training\.smoothing\.pairs: "),
        (["training.smoothing=pgpe", "training.accumulation=2"], "training.smoothing pgpe never goes backward"),
        (
            ["training.smoothing=pgpe", "training.activation_checkpointing=true"],
            "training.smoothing pgpe never goes backward",
        ),
    ],
)
def test_what_is_wrong_is_said(overrides, message):
    check_refused(overrides, message)
