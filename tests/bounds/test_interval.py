"""Interval bounds against auto_LiRPA, and against what the documentation says of BatchNorm and margins."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from certtrain.bounds import BoundedModel, Box, linf_box
from certtrain.bounds.joint_pass import shrunk
from certtrain.bounds.lirpa import LirpaModel
from certtrain.errors import UsageError
from certtrain.regularizers import relu_balance_loss, tightness_loss
from tests.networks import narrow_cnn7, narrow_resnext, narrow_wide_resnet, randomized, residual_network

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


BUILDERS = {
    "cnn7": narrow_cnn7,
    "cnn7-no-bn": partial(narrow_cnn7, batch_norm=False),
    "wide-resnet": narrow_wide_resnet,
    "wide-resnet-no-bn": partial(narrow_wide_resnet, batch_norm=False),
    "resnext": narrow_resnext,
    "resnext-no-bn": partial(narrow_resnext, batch_norm=False),
    "residual": residual_network,
}


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomized(BUILDERS[name]())


@pytest.fixture(params=BUILDERS)
def network(request: pytest.FixtureRequest) -> nn.Module:
    return built(request.param)


def batch(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(6, 3, 16, 16, generator=generator, dtype=torch.float64)
    return images.to(dtype), torch.tensor([0, 1, 2, 3, 4, 0])


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Equal within `tolerance` of the largest magnitude in the tensor."""
    assert found.shape == expected.shape
    scale = expected.abs().max().clamp(min=1e-30)
    assert ((found - expected).abs().max() / scale).item() <= tolerance


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float64) for name in BUILDERS), ("residual", torch.float32)]
)
def test_boxes_margins_losses_and_gradients_equal_auto_lirpa(name, dtype, training):
    tolerance = TOLERANCE[dtype]
    network = built(name).to(dtype).train(training)
    images, labels = batch(dtype)
    box = linf_box(images, 2 / 255)
    twin = copy.deepcopy(network)
    native, witness = BoundedModel(network, images), LirpaModel(twin, images)

    def answers(net):
        bounds = net.ibp(box, clean=images)
        # The margins take a joint pass of their own, whose running statistics are compared below as well.
        margins = net.margins(box, labels, clean=images)
        loss = F.cross_entropy(-margins, labels) + F.cross_entropy(bounds.clean, labels)
        loss = loss + tightness_loss(bounds.relu_inputs, bounds.affine_input) + relu_balance_loss(bounds.relu_inputs)
        return bounds, margins, loss

    (bounds, margins, loss), (expected_bounds, expected_margins, expected_loss) = answers(native), answers(witness)
    assert len(bounds.relu_inputs) == len(expected_bounds.relu_inputs) > 0
    pairs = zip(
        (bounds.output, bounds.affine_input, *bounds.relu_inputs),
        (expected_bounds.output, expected_bounds.affine_input, *expected_bounds.relu_inputs),
        strict=True,
    )
    for found, expected in pairs:
        assert_close(found.lower, expected.lower, tolerance)
        assert_close(found.upper, expected.upper, tolerance)
    assert_close(bounds.clean, expected_bounds.clean, tolerance)
    assert_close(margins, expected_margins, tolerance)
    loss.backward()
    expected_loss.backward()
    gradients = dict(twin.named_parameters())
    for name, parameter in network.named_parameters():
        assert_close(parameter.grad, gradients[name].grad, 10 * tolerance)
    for found, expected in zip(network.buffers(), twin.buffers(), strict=True):
        assert_close(found.double(), expected.double(), tolerance)


def test_a_degenerate_box_gives_the_networks_own_output(network):
    images, _ = batch(torch.float64)
    network = network.double().eval()
    bounds = BoundedModel(network, images).ibp(linf_box(images, 0.0))
    expected = network(images)
    torch.testing.assert_close(bounds.output.lower, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(bounds.output.upper, expected, rtol=1e-12, atol=1e-12)


def test_the_clean_part_of_a_joint_pass_is_the_modules_own_training_forward(network):
    images, _ = batch(torch.float64)
    network = network.double().train()
    net = BoundedModel(network, images)
    twin = copy.deepcopy(network)
    clean = net.ibp(linf_box(images, 0.01), clean=images).clean
    torch.testing.assert_close(clean, twin(images), rtol=1e-12, atol=1e-12)
    for found, expected in zip(network.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_batch_norm_in_training_mode_needs_the_clean_input():
    images, _ = batch(torch.float32)
    net = BoundedModel(narrow_cnn7().train(), images)
    with pytest.raises(UsageError, match="clean="):
        net.ibp(linf_box(images, 0.01))


def test_the_model_may_change_mode_between_calls():
    images, _ = batch(torch.float64)
    model = randomized(narrow_cnn7()).double().train()
    net = BoundedModel(model, images)
    net.ibp(linf_box(images, 0.0), clean=images)
    model.eval()
    torch.testing.assert_close(net.ibp(linf_box(images, 0.0)).output.center, model(images))


def test_given_coefficients_replace_the_batch_statistics():
    """Parts of a batch, with the whole batch's BatchNorm coefficients, give the whole batch's boxes."""
    images, _ = batch(torch.float64)
    model = randomized(narrow_cnn7()).double().train()
    net = BoundedModel(model, images)
    whole = net.ibp(linf_box(images, 0.01), clean=images).output
    coefficients = net.clean_pass(images).coefficients
    before = [buffer.clone() for buffer in model.buffers()]
    parts = [net.ibp(linf_box(part, 0.01), coefficients=coefficients).output for part in images.split(2)]
    torch.testing.assert_close(torch.cat([part.lower for part in parts]), whole.lower)
    torch.testing.assert_close(torch.cat([part.upper for part in parts]), whole.upper)
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))


class TestMargins:
    def test_of_a_linear_network_are_exact(self):
        """The minimum of a linear function over a box is at a corner; every corner is tried."""
        torch.manual_seed(0)
        linear = nn.Linear(4, 3).double()
        x, labels = torch.rand(2, 4, dtype=torch.float64), torch.tensor([2, 0])
        box = linf_box(x, 0.1, clip=None)
        margins = BoundedModel(linear, x).margins(box, labels)
        corners = torch.cartesian_prod(*[torch.tensor([-0.1, 0.1], dtype=torch.float64)] * 4)
        logits = linear(x[:, None] + corners)
        own = logits.gather(2, labels[:, None, None].expand(-1, 16, 1))
        torch.testing.assert_close(margins, (own - logits).amin(1), rtol=1e-12, atol=1e-12)
        assert (margins.gather(1, labels[:, None]) == 0).all()

    def test_a_tail_of_several_affine_operations_is_merged_too(self):
        """A fully convolutional classifier, pooled: as tight as the one linear layer it amounts to."""
        torch.manual_seed(0)
        head = nn.Sequential(nn.ReLU(), nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
        x, labels = torch.randn(5, 3, 4, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
        box = linf_box(x, 0.2, clip=None)
        weight = head[1].weight[:, :, 0, 0]
        h = Box(box.lower.relu(), box.upper.relu())
        center, radius = h.center.mean((2, 3)), h.radius.mean((2, 3))
        difference = weight[labels][:, None] - weight
        bias = head[1].bias
        expected = (difference * center[:, None]).sum(2) - (difference.abs() * radius[:, None]).sum(2)
        expected = expected + bias[labels][:, None] - bias
        torch.testing.assert_close(BoundedModel(head, x).margins(box, labels), expected, rtol=1e-12, atol=1e-12)

    def test_without_an_affine_tail_are_differences_of_the_logits(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid()).double()
        x, labels = torch.rand(2, 3, dtype=torch.float64), torch.tensor([1, 3])
        net, box = BoundedModel(model, x), linf_box(x, 0.1)
        output = net.ibp(box).output
        expected = output.lower.gather(1, labels[:, None]) - output.upper
        expected.scatter_(1, labels[:, None], 0.0)
        torch.testing.assert_close(net.margins(box, labels), expected, rtol=1e-12, atol=1e-12)

    def test_unknown_method_names_the_known_ones(self):
        x = torch.rand(1, 3)
        net = BoundedModel(nn.Linear(3, 2), x)
        with pytest.raises(UsageError, match="ibp"):
            net.margins(linf_box(x, 0.1), torch.tensor([0]), method="ipb")


# --- boxes that bound nothing ----------------------------------------------------------------------------------------


def test_only_upper_ends_behind_unstable_relus_are_shrunk():
    entering = Box(torch.tensor([-2.0, -2.0, 1.0, -3.0, 0.0]), torch.tensor([4.0, -1.0, 2.0, 0.0, 5.0]))
    box = shrunk(Box(entering.lower.relu(), entering.upper.relu()), entering, 0.8)
    torch.testing.assert_close(box.lower, torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0]))
    torch.testing.assert_close(box.upper, torch.tensor([3.2, 0.0, 2.0, 0.0, 5.0]))


def test_what_was_shrunk_is_no_bound_and_nothing_that_verifies_can_ask_for_it():
    """relu(x - 0.5) and its negative for x in [0, 1]: at most 0.5, and 0.4 where shrunk."""
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2)).train()
    for layer, weight, bias in ((model[0], [[1.0]], [-0.5]), (model[2], [[1.0], [-1.0]], [0.0, 0.0])):
        layer.weight.data, layer.bias.data = torch.tensor(weight), torch.tensor(bias)
    net, box = BoundedModel(model, torch.zeros(1, 1)), linf_box(torch.full((1, 1), 0.5), 0.5)
    torch.testing.assert_close(net.ibp(box, shrink=0.8).output.upper, torch.tensor([[0.4, 0.0]]))
    assert model(torch.ones(1, 1))[0, 0] == 0.5
    model.eval()
    for ask in (net.ibp, partial(net.ibp_in_segments, coefficients={}, observe=Box.detach)):
        with pytest.raises(UsageError, match="for training mode alone"):
            ask(box, shrink=0.8)
    with pytest.raises(TypeError):
        net.margins(box, torch.tensor([0]), shrink=0.8)
