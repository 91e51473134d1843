"""A network that changes after it was recorded, or is copied: bounds are of what it computes now."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from certtrain.bounds import BoundedModel, linf_box
from certtrain.bounds.structure import structure_of

X = torch.rand(2, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1])


@dataclass(slots=True)
class Slotted:
    factor: float = 1.0


class Settings:
    def __init__(self) -> None:
        self.factor = 1.0


class Network(nn.Module):
    """A linear layer whose logits are multiplied by a factor that some attribute holds, and shifted."""

    factor = 1.0

    def __init__(self, factor_of: Callable[[Any], float] = lambda self: self.factor) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.norm = nn.LayerNorm(4, bias=False)
        self.register_parameter("shift", None)
        self.register_buffer("offset", None)
        self.slotted, self.settings = Slotted(), Settings()
        self.nested = {"a": [{"b": ({"c": [1.0]},)}]}
        self.within = {"settings": [self.settings]}
        self.nested["itself"] = self.nested
        self.factor_of = factor_of

    def scale(self) -> float:
        return self.factor_of(self)

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer(self.norm(x)) * self.scale()
        z = z if self.shift is None else z + self.shift
        return z if self.offset is None else z + self.offset


def test_where_a_network_lies_is_part_of_what_was_recorded():
    """A forward may make its constants where the parameters are."""
    here = structure_of(Network())
    assert here[0][6] == structure_of(Network())[0][6]
    assert structure_of(Network().to("meta"))[1][6] != here[1][6]


def of_class(net: Network) -> None:
    type(net).factor = -3.0


def of_method(net: Network) -> None:
    type(net).scale = lambda self: -3.0


CHANGES: dict[str, tuple[Callable[[Any], float], Callable[[Any], Any]]] = {
    "a parameter that was none": (
        lambda net: 1.0,
        lambda net: setattr(net, "shift", nn.Parameter(torch.eye(3)[1] * 9)),
    ),
    "a buffer that was none": (lambda net: 1.0, lambda net: setattr(net, "offset", torch.eye(3)[2] * 9)),
    "a layer's bias that was none": (lambda net: 1.0, lambda net: setattr(net.norm, "bias", nn.Parameter(X[0] * 9))),
    "an attribute": (lambda net: net.settings.factor, lambda net: setattr(net.settings, "factor", -3.0)),
    "a slot": (lambda net: net.slotted.factor, lambda net: setattr(net.slotted, "factor", -3.0)),
    "deep in containers": (
        lambda net: net.nested["a"][0]["b"][0]["c"][0],
        lambda net: net.nested["a"][0]["b"][0]["c"].__setitem__(0, -3.0),
    ),
    "an object in containers": (
        lambda net: net.within["settings"][0].factor,
        lambda net: setattr(net.within["settings"][0], "factor", -3.0),
    ),
    "a class attribute": (lambda net: net.factor, of_class),
    "a method of the class": (lambda net: 1.0, of_method),
}


def margins_of(net: BoundedModel) -> Tensor:
    with torch.no_grad():
        return net.margins(linf_box(X, 0.0, clip=None), LABELS)


def true_margins(model: nn.Module) -> Tensor:
    with torch.no_grad():
        logits = model(X)
    return logits.gather(1, LABELS[:, None]) - logits


@pytest.mark.parametrize("change", CHANGES)
def test_bounds_follow_a_change(change):
    factor, make = CHANGES[change]
    model = type("Own", (Network,), {})(factor).eval()
    net = BoundedModel(model, X)
    before = margins_of(net)
    torch.testing.assert_close(before, true_margins(model))
    make(model)
    assert not torch.allclose(true_margins(model), before)
    torch.testing.assert_close(margins_of(net), true_margins(model))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copy", "pickle"])
@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in a module"])
def test_a_copy_bounds_the_copy(how, inside):
    model = nn.Sequential(nn.Linear(4, 3)).eval()
    net = BoundedModel(model, X)
    margins_of(net)
    if inside:
        holder = nn.Identity()
        holder.net = net
        other = how(holder).net
    else:
        other = how(net)
    with torch.no_grad():
        other.model[0].weight.neg_()
    torch.testing.assert_close(margins_of(other), true_margins(other.model))
    torch.testing.assert_close(margins_of(net), true_margins(model))
    assert not torch.allclose(margins_of(net), margins_of(other))


@pytest.mark.parametrize("box_type", [torch.float32, torch.float64])
def test_a_normalization_without_eps_has_that_of_the_networks_type(box_type):
    """PyTorch takes the least number of the type it computes in; bounds of a float32 network are in float64, too."""
    model = nn.RMSNorm(4)
    x = 1e-4 * X
    net = BoundedModel(nn.Sequential(model, nn.Linear(4, 3)).eval(), x)
    with torch.no_grad():
        found = net.ibp(linf_box(x.to(box_type), 0.0, clip=None)).output.center
        torch.testing.assert_close(found, net.model(x).to(box_type), rtol=1e-4, atol=1e-5)
