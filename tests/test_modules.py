"""Where a network lies, of what type its images are, and its mode, whatever tensors it has."""

import threading

import pytest
import torch
from torch import nn

from certtrain.bounds import BoundedModel, linf_box
from certtrain.errors import UnsupportedOperation
from certtrain.modules import blank_images, copied, device_of
from certtrain.runs.build import output_shape
from certtrain.verification.folding import fold_batch_norm


class Constants(nn.Module):
    """A network whose numbers are `kind`."""

    def __init__(self, kind, device="cpu", dtype=torch.float32):
        super().__init__()
        self.flatten = nn.Flatten()
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64, device=device) if kind != "none" else None)
        value = torch.zeros(4, 2, device=device, dtype=dtype)
        if kind == "parameters":
            self.value = nn.Parameter(value)
        else:
            self.register_buffer("value", value if kind == "buffers" else None)

    def forward(self, x):
        x = self.flatten(x)
        return x if self.value is None else x @ self.value


@pytest.mark.parametrize(("kind", "device"), [("parameters", "meta"), ("buffers", "meta"), ("none", "cpu")])
def test_the_device_is_that_of_whatever_tensors_a_network_has(kind, device):
    model = Constants(kind, "meta")
    assert device_of(model).type == blank_images(model, 2, (1, 2, 2)).device.type == device


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["parameters", "buffers", "none"])
@pytest.mark.parametrize("training", [False, True])
def test_blank_images_go_through_and_leave_the_mode(kind, dtype, training):
    model = Constants(kind, dtype=dtype).train(training)
    images = blank_images(model, 2, (1, 2, 2))
    assert images.shape == (2, 1, 2, 2)
    assert model(images).dtype == (torch.float32 if kind == "none" else dtype)
    assert output_shape("constants", model, (1, 2, 2)) == (1, 4 if kind == "none" else 2)
    assert model.training == model.flatten.training == training


class Keeping(nn.Module):
    """A network that keeps what its layers computed, where `keep` says, as some do to look at it later."""

    def __init__(self, keep):
        super().__init__()
        self.keep, self.seen, self.by_name = keep, [], {}
        self.convolution, self.norm, self.linear = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(8, 2)

    def forward(self, x):
        hidden = torch.relu(self.norm(self.convolution(x)))
        self.keep(self, hidden)
        return self.linear(hidden.flatten(1))


KEPT = {
    "as an attribute": lambda self, hidden: setattr(self, "hidden", hidden),
    "of a layer": lambda self, hidden: setattr(self.linear, "entering", hidden),
    "in a list": lambda self, hidden: self.seen.append(hidden),
    "in a tuple of a dict": lambda self, hidden: self.by_name.update(hidden=(hidden, [hidden])),
    "not": lambda self, hidden: None,
}


@pytest.mark.parametrize("keep", KEPT.values(), ids=KEPT.keys())
@pytest.mark.parametrize("training", [True, False])
def test_a_network_that_keeps_results_of_its_last_forward_is_bounded(keep, training):
    model = Keeping(keep).train(training)
    images = torch.rand(4, 1, 4, 4)
    logits = model(images)
    bounded = BoundedModel(model, images[:1])
    assert bounded.graph
    logits.sum().backward()  # the history of what it keeps is still there
    assert model.convolution.weight.grad is not None
    found = bounded.ibp(linf_box(images, 0.0), images)
    assert torch.allclose(found.clean, logits, atol=1e-6)
    assert torch.allclose(found.output.center, logits, atol=1e-6)


@pytest.mark.parametrize("keep", KEPT.values(), ids=KEPT.keys())
def test_a_network_that_keeps_results_of_its_last_forward_is_folded(keep):
    model = Keeping(keep).eval()
    images = torch.rand(4, 1, 4, 4)
    logits = model(images)
    assert torch.allclose(fold_batch_norm(model, images)(images), logits, atol=1e-6)


def test_a_copy_shares_within_itself_what_the_model_shares_and_nothing_with_it():
    model = Keeping(KEPT["in a tuple of a dict"])
    model(torch.rand(2, 1, 4, 4))
    twin = copied(model)
    first, (second,) = twin.by_name["hidden"]
    assert first is second
    assert first is not model.by_name["hidden"][0]
    assert torch.equal(first, model.by_name["hidden"][0])
    assert not first.requires_grad
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in twin.parameters())
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in model.parameters()}


def test_a_network_in_training_that_cannot_be_copied_says_why():
    model = Keeping(KEPT["not"])
    model.lock = threading.Lock()
    bounded = BoundedModel(model, torch.rand(1, 1, 4, 4))  # runs nothing but eval mode
    with pytest.raises(UnsupportedOperation, match="lock"):
        _ = bounded.graph
    model.eval()
    assert bounded.graph
