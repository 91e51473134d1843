"""auto_LiRPA's answers against closed forms written out here, so that it can be trusted as a witness elsewhere."""

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from certtrain.bounds.box import linf_box
from certtrain.bounds.linear import AlphaOptions
from certtrain.bounds.lirpa import LirpaModel, load_auto_lirpa
from certtrain.errors import MissingDependency, UnsupportedOperation, UsageError

try:
    load_auto_lirpa()
except MissingDependency as error:
    missing = str(error)
else:
    missing = ""
needs_auto_lirpa = pytest.mark.skipif(bool(missing), reason=missing)

LABELS = torch.tensor([1, 0, 3])


class Normalize(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1))

    def forward(self, x):
        return (x - self.mean) / self.std


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return torch.relu(x + self.conv(x))


class Concatenate(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, x):
        return torch.cat([x, torch.relu(self.conv(x))], dim=1)


def convnet(*middle, features=64, norm=nn.BatchNorm2d):
    torch.manual_seed(0)
    stem = [Normalize(), nn.Conv2d(3, 4, 3, stride=2, padding=1), norm(4), nn.ReLU()]
    return nn.Sequential(*stem, *middle, nn.Flatten(), nn.Linear(features, 5)).double()


@pytest.fixture
def images():
    torch.manual_seed(1)
    return torch.rand(3, 3, 8, 8, dtype=torch.float64)


def wrap(model):
    return LirpaModel(model, torch.rand(2, 3, 8, 8, dtype=torch.float64))


def interval_by_hand(model, box, clean):
    """Centre and radius after Normalize, before the ReLU and before the last layer of `convnet()`."""
    normalize, conv, norm, _, _, _ = model
    center, radius = normalize(box.center), box.radius / normalize.std
    first = center, radius
    center = conv(center)
    radius = F.conv2d(radius, conv.weight.abs(), stride=2, padding=1)
    if norm.training:
        activations = conv(normalize(clean))
        mean, var = activations.mean((0, 2, 3)), activations.var((0, 2, 3), unbiased=False)
    else:
        mean, var = norm.running_mean, norm.running_var
    scale = (norm.weight / (var + norm.eps).sqrt()).view(-1, 1, 1)
    center = (center - mean.view(-1, 1, 1)) * scale + norm.bias.view(-1, 1, 1)
    radius = radius * scale.abs()
    lower, upper = (center - radius).relu().flatten(1), (center + radius).relu().flatten(1)
    return first, (center, radius), ((lower + upper) / 2, (upper - lower) / 2)


def margins_by_hand(linear, center, radius, labels):
    weight = linear.weight[labels][:, None] - linear.weight
    bias = linear.bias[labels][:, None] - linear.bias
    return (weight * center[:, None] - weight.abs() * radius[:, None]).sum(2) + bias


@needs_auto_lirpa
@pytest.mark.parametrize("training", [False, True])
def test_ibp_and_its_margins_equal_the_closed_form(images, training):
    model = convnet().train(training)
    nn.init.uniform_(model[2].weight, -1, 1)
    box, clean = linf_box(images, 0.01), images if training else None
    first, hidden, last = interval_by_hand(model, box, images)

    net = wrap(model)
    bounds, margins = net.ibp(box, clean), net.margins(box, LABELS, "ibp", clean)

    assert len(bounds.relu_inputs) == 1
    for got, (center, radius) in [(bounds.affine_input, first), (bounds.relu_inputs[0], hidden)]:
        torch.testing.assert_close(got.lower, center - radius)
        torch.testing.assert_close(got.upper, center + radius)
    torch.testing.assert_close(bounds.output.center, model[-1](last[0]))
    torch.testing.assert_close(bounds.output.radius, F.linear(last[1], model[-1].weight.abs()))
    torch.testing.assert_close(margins, margins_by_hand(model[-1], *last, LABELS))
    assert (margins.gather(1, LABELS[:, None]) == 0).all()
    if training:
        torch.testing.assert_close(bounds.clean, copy.deepcopy(model)(images))
    else:
        assert bounds.clean is None


@needs_auto_lirpa
@pytest.mark.parametrize("method", ["crown-ibp", "crown"])
def test_crown_of_one_hidden_layer_equals_the_closed_form(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 5)).double()
    x = torch.rand(3, 6, dtype=torch.float64)
    box = linf_box(x, 0.3)
    center = model[0](box.center)
    radius = box.radius @ model[0].weight.abs().T
    lower, upper = center - radius, center + radius
    assert ((lower < 0) & (upper > 0)).any()
    assert (lower > 0).any()
    above = (upper / (upper - lower)).where((lower < 0) & (upper > 0), (lower >= 0).double())
    offset = (-above * lower).where((lower < 0) & (upper > 0), torch.zeros_like(lower))
    below = (upper > -lower).double()

    weight = model[2].weight[LABELS][:, None] - model[2].weight
    slope = torch.where(weight > 0, below[:, None], above[:, None])
    constant = (weight.clamp(max=0) * offset[:, None]).sum(2) + model[2].bias[LABELS][:, None] - model[2].bias
    linear = (weight * slope) @ model[0].weight
    constant = constant + (weight * slope) @ model[0].bias
    expected = (linear * box.center[:, None] - linear.abs() * box.radius[:, None]).sum(2) + constant

    margins = LirpaModel(model, x).margins(box, LABELS, method)
    torch.testing.assert_close(margins, expected, rtol=1e-6, atol=1e-6)


NETWORKS = {
    "plain": lambda: convnet(),
    "deep": lambda: convnet(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
    "residual": lambda: convnet(Residual()),
    "concatenation": lambda: convnet(Concatenate(), features=96),
    "average pooling": lambda: convnet(nn.AvgPool2d(2), features=16),
    "max pooling": lambda: convnet(nn.MaxPool2d(2), features=16),
}


@needs_auto_lirpa
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "crown", "alpha-crown"])
def test_margins_hold_at_corners_of_the_box(images, network, method):
    if (network, method) == ("max pooling", "alpha-crown"):
        pytest.skip("auto_LiRPA optimises the slopes of a MaxPool in float32 only")
    model = NETWORKS[network]().eval()
    box = linf_box(images, 0.02)
    margins = wrap(model).margins(box, LABELS, method)
    for _ in range(100):
        logits = model(torch.where(torch.rand_like(images) < 0.5, box.lower, box.upper))
        assert (logits.gather(1, LABELS[:, None]) - logits >= margins - 1e-9).all()


@needs_auto_lirpa
def test_alpha_crown_is_no_looser_than_crown_and_leaves_no_gradient(images):
    model = NETWORKS["deep"]().train()
    box, net = linf_box(images, 0.02), wrap(model)
    crown = net.margins(box, LABELS, "crown", images)
    alpha = net.margins(box, LABELS, "alpha-crown", images, alpha=AlphaOptions(steps=5))
    assert (alpha >= crown - 1e-6).all()
    assert not alpha.requires_grad
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@needs_auto_lirpa
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "crown"])
def test_gradients_reach_the_parameters(images, method, training):
    model = NETWORKS["deep"]().train(training)
    wrap(model).margins(linf_box(images, 0.01), LABELS, method, images).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert name == "8.bias" or parameter.grad.abs().max() > 0 or (training and name in ("1.bias", "4.bias")), name


@needs_auto_lirpa
def test_gradient_equals_that_of_the_closed_form(images):
    model, twin = convnet().train(), convnet().train()
    box = linf_box(images, 0.01)
    bounds = wrap(model).ibp(box, images)
    (bounds.relu_inputs[0].radius.square().sum() + bounds.output.lower.sum()).backward()
    _, (_, radius), (center, last) = interval_by_hand(twin, box, images)
    lower = twin[-1](center) - F.linear(last, twin[-1].weight.abs())
    (radius.square().sum() + lower.sum()).backward()
    for found, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)


@needs_auto_lirpa
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_call_updates_running_statistics_once_as_the_module_would(images, momentum):
    model = NETWORKS["deep"]().train()
    model[2].momentum = momentum
    twin = copy.deepcopy(model)
    net, box = wrap(model), linf_box(images, 0.01)
    assert model.training
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))
    for call in (net.ibp, lambda *a: net.margins(a[0], LABELS, "crown-ibp", a[1]), net.ibp):
        call(box, images)
        twin(images)
        for name, value in twin.state_dict().items():
            torch.testing.assert_close(model.state_dict()[name], value, msg=name)
    model.eval()
    net.ibp(box, images)
    assert model[2].num_batches_tracked == 3


@needs_auto_lirpa
def test_a_call_sees_the_present_parameters_buffers_and_flags(images):
    model = convnet().eval()
    box, net = linf_box(images, 0.01), wrap(model)
    model[1].weight.requires_grad_(False)
    with torch.no_grad():
        model[1].weight.mul_(2)
    model[2].running_var = torch.full_like(model[2].running_var, 3.0)
    torch.testing.assert_close(net.margins(box, LABELS), wrap(copy.deepcopy(model)).margins(box, LABELS))
    assert not model[1].weight.requires_grad
    assert model[1].bias.requires_grad


@needs_auto_lirpa
def test_mistakes_are_explained(images):
    box, net = linf_box(images, 0.01), wrap(convnet().train())
    with pytest.raises(UsageError, match="pass `clean`"):
        net.ibp(box)
    with pytest.raises(UsageError, match="did you mean crown"):
        net.margins(box, LABELS, "crwn", images)
    with pytest.raises(UnsupportedOperation, match="Dropout"):
        wrap(convnet(nn.Dropout(0.5)))


def test_absence_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "auto_LiRPA", None)
    with pytest.raises(MissingDependency, match="pip install"):
        LirpaModel(nn.Linear(2, 2), torch.zeros(1, 2))
