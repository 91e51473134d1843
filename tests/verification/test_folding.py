from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from certtrain.bounds import BoundedModel, linf_box
from certtrain.models import build_model
from certtrain.verification.folding import fold_batch_norm
from tests.networks import Inception, narrow_cnn7, pooling_network, randomized, residual_network


def norms(model):
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def check_same(model, images, remaining=0):
    """The folded copy agrees with `model` in float64, has `remaining` BatchNorms, and leaves `model` as it was."""
    model = randomized(model.double()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    folded = fold_batch_norm(model, images.double())
    assert len(norms(folded)) == remaining
    assert not any(module.training for module in folded.modules())
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    images = images.double()
    with torch.no_grad():
        torch.testing.assert_close(folded(images), model.eval()(images), rtol=1e-12, atol=1e-12)
    return folded


@pytest.mark.parametrize(
    ("build", "size"),
    [
        (narrow_cnn7, 16),
        (residual_network, 16),
        (pooling_network, 16),
        (lambda: build_model("mlp", (3, 4, 4), 5, mean=(0.5,) * 3, std=(0.2,) * 3, options={"widths": [8, 6]}), 4),
        (lambda: build_model("cnn-small", (3, 8, 8), 5, options={"width": 2, "linear_width": 8}), 8),
    ],
)
def test_no_batch_norm_is_left_and_the_outputs_agree(build, size):
    torch.manual_seed(0)
    check_same(build(), torch.rand(3, 3, size, size))


def test_negative_and_missing_weights_groups_transposed_and_one_dimensional_layers():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, groups=3),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.ConvTranspose2d(6, 4, 2, 2, bias=False),
        nn.BatchNorm2d(4, affine=False),
        nn.Flatten(2),
        nn.Conv1d(4, 2, 3, padding_mode="circular", padding=1),
        nn.BatchNorm1d(2),
        nn.Flatten(),
        nn.Linear(128, 5, bias=False),
        nn.BatchNorm1d(5, affine=False),
    )
    randomized(model)
    assert min(norm.weight.min() for norm in norms(model) if norm.affine) < 0
    check_same(model, torch.rand(2, 3, 4, 4))


class Reads(nn.Module):
    """A convolution whose result, or weight, is read a second time."""

    def __init__(self, second):
        super().__init__()
        self.conv, self.bn, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), second

    def forward(self, x):
        return self.second(self, x, self.conv(x))


@pytest.mark.parametrize(
    "second",
    [
        lambda self, x, y: self.bn(y) + y,  # read twice
        lambda self, x, y: self.bn(self.conv(y)),  # called twice
        lambda self, x, y: F.conv2d(self.bn(y), self.conv.weight),  # its weight read
        lambda self, x, y: self.bn(x) + y,  # BatchNorm of something else
        lambda self, x, y: self.bn(F.relu(y)),
        lambda self, x, y: self.bn(y.mul_(2)),
    ],
)
def test_what_cannot_be_folded_stays(second):
    torch.manual_seed(0)
    check_same(Reads(second), torch.rand(2, 3, 8, 8), remaining=1)


def test_batch_norm_that_uses_the_batchs_own_statistics_stays():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    check_same(model, torch.rand(2, 3, 8, 8), remaining=1)


def test_grouped_transposed_convolutions_hooked_and_parametrized_layers_stay():
    torch.manual_seed(0)
    images = torch.rand(2, 4, 5, 5)
    check_same(nn.Sequential(nn.ConvTranspose2d(4, 4, 2, groups=2), nn.BatchNorm2d(4)), images, remaining=1)
    normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3))
    check_same(nn.Sequential(normed, nn.BatchNorm2d(4)), images, remaining=1)
    hooked = nn.Conv2d(4, 4, 3)
    hooked.register_forward_hook(lambda module, arguments, result: 2 * result)
    check_same(nn.Sequential(hooked, nn.BatchNorm2d(4)), images, remaining=1)


def test_a_batch_norm_shared_by_two_convolutions_is_folded_into_both():
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4)
    check_same(nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Conv2d(4, 4, 3), norm), torch.rand(2, 3, 8, 8))


def test_weights_are_rounded_once():
    """In float32, folding is as near to the exact weights as float32 allows."""
    torch.manual_seed(0)
    model = randomized(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    image = torch.rand(1, 3, 8, 8)
    single, exact = fold_batch_norm(model, image), fold_batch_norm(model.double(), image.double())
    for name, value in single.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, exact.state_dict()[name].float())


def test_the_folded_network_can_be_bounded_and_names_stay():
    torch.manual_seed(0)
    model = randomized(
        nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), Inception(4, 3), nn.Flatten(), nn.Linear(44, 5)).double()
    )
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    folded = fold_batch_norm(model, images)
    assert "1.conv.bias" in folded.state_dict()
    box = linf_box(images, 0.01)
    expected, bounds = (BoundedModel(net.eval(), images).ibp(box).output for net in (model, folded))
    torch.testing.assert_close(bounds.lower, expected.lower, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(bounds.upper, expected.upper, rtol=1e-9, atol=1e-9)
