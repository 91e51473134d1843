"""The tightness and the states of ReLUs, of a network that is worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from certtrain.bounds import BoundedModel
from certtrain.training.layer_statistics import layer_statistics


def test_layer_statistics_of_a_network_known_by_hand():
    """Four neurons: always active, always inactive, unstable, and inactive for one image of two."""
    model = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [1.0], [2.0], [1.0]]))
        model[0].bias.copy_(torch.tensor([1.0, -5.0, -1.0, -0.4]))
    images = torch.tensor([[0.5], [0.2]])
    (layer,) = layer_statistics(BoundedModel(model, images), images, 0.05)
    # third neuron: 2·[0.45, 0.55] - 1 unstable, 2·[0.15, 0.25] - 1 inactive; fourth: active, then inactive
    assert (layer.active, layer.inactive, layer.unstable, layer.dead) == pytest.approx((3 / 8, 4 / 8, 1 / 8, 1 / 4))
    assert layer.radius == pytest.approx(0.05 * (1 + 1 + 2 + 1) / 4, rel=1e-5)
    assert layer.tightness == pytest.approx(1 / 1.25, rel=1e-5)
