"""Counts against closed forms."""

from __future__ import annotations

import pytest
import torch

from certtrain.bounds import BoundedModel
from certtrain.errors import UsageError
from certtrain.models import MODELS, build_model
from certtrain.training.cost import network_size, step_macs
from certtrain.training.method import Phase
from certtrain.training.methods import CrownIBP
from certtrain.training.regularization import Regularization
from certtrain.training.step import GradientStep

CNN7 = 32**2 * (27 * 64 + 576 * 64) + 16**2 * (576 * 128 + 2 * 1152 * 128) + 128 * 16**2 * 512 + 512 * 10
# Stem; then of each stage: 1×1, 3×3 in two groups, 1×1, shortcut, each at the size of its output.
RESNEXT = (
    32**2 * (27 * 64 + 64 * 64 + 9 * 32 * 64 + 64 * 128 + 64 * 128)
    + (32**2 * 128 * 128 + 16**2 * (9 * 64 * 128 + 128 * 256 + 128 * 256))
    + (16**2 * 256 * 256 + 8**2 * (9 * 128 * 256 + 256 * 512 + 256 * 512))
    + 512 * 8**2 * 512
    + 512 * 10
)


@pytest.mark.parametrize(("name", "macs"), [("cnn7", CNN7), ("resnext", RESNEXT)])
def test_a_networks_size(name, macs):
    size = network_size(name, (3, 32, 32), 10)
    assert size.macs == macs
    assert size.parameters == sum(p.numel() for p in build_model(name, (3, 32, 32), 10).parameters())


def test_images_that_a_network_refuses_are_named(monkeypatch):
    def picky(image_shape, num_classes):
        raise ValueError("only squares")

    monkeypatch.setitem(MODELS, "picky", picky)
    with pytest.raises(UsageError, match=r"model picky cannot .*only squares"):
        network_size("picky", (3, 4, 5), 10)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "macs", "first"), [("cnn7", CNN7, 27 * 64), ("resnext", RESNEXT, 27 * 64)])
def test_training_steps(name, macs, first):
    """Backward is twice forward, but for the gradient of the images, which nobody wants; IBP passes thrice as much."""
    model = build_model(name, (3, 32, 32), 10).train()
    before = [p.clone() for p in model.parameters()]
    net = BoundedModel(model, torch.rand(2, 3, 32, 32))
    natural = 3 * macs - 32**2 * first
    ibp = GradientStep(net, regularization=Regularization(0.0))
    assert step_macs(ibp, (3, 32, 32), Phase.NATURAL) == natural
    assert step_macs(ibp, (3, 32, 32), Phase.NATURAL, batch_size=128) == natural
    assert step_macs(ibp, (3, 32, 32), Phase.FULL) == pytest.approx(3 * natural, rel=1e-3)
    fused = step_macs(GradientStep(net, CrownIBP(loss_fusion=True)), (3, 32, 32), Phase.WARMUP)
    rows = step_macs(GradientStep(net, CrownIBP()), (3, 32, 32), Phase.WARMUP)
    assert 3.3 * natural < fused < 5 * natural < 10 * natural < rows
    for parameter, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, value)
        assert parameter.grad is None
