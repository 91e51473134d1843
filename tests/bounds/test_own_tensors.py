"""A forward may come by its own tensors in any way, and store what it computes: bounds follow, the module stays."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from certtrain.affine_layers import affine_weights, classifier_tensors
from certtrain.bounds import BoundedModel, linf_box
from certtrain.errors import UnsupportedOperation
from certtrain.initialization import ibp_init_

X = torch.rand(8, 4, generator=torch.Generator().manual_seed(0))

WAYS: dict[str, Callable[[nn.Module], Tensor]] = {
    "self.layers[0].weight": lambda net: net.layers[0].weight,
    "next(self.parameters())": lambda net: next(net.parameters()),
    "next(self.parameters()).data": lambda net: next(net.parameters()).data,
    "next(self.parameters()).detach()": lambda net: next(net.parameters()).detach(),
    "dict(self.named_parameters())": lambda net: dict(net.named_parameters())["layers.0.weight"],
    "self._parameters": lambda net: net.layers[0]._parameters["weight"],
    "self.state_dict()": lambda net: net.state_dict()["layers.0.weight"],
    "next(self.buffers())": lambda net: next(net.buffers()),
    "self._buffers": lambda net: net._buffers["matrix"],
}
USES: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda w: w,
    "/ its norm": lambda w: w / w.norm(dim=1, keepdim=True),
    "1 -": lambda w: 1 - w,
    "** 2": lambda w: w**2,
    "F.softplus": F.softplus,
    "abs": abs,
    ".T.T": lambda w: 2 * w.T.T,
    "mT": lambda w: w.mT.mT + 1,
    "einsum": lambda w: torch.einsum("ij,ij->ij", w, w),
    "cat of slices": lambda w: torch.cat([w[:1], 2 * w[1:]]),
    "sizes": lambda w: w.view(w.size(0), -1) * w.shape[1] + w.new_ones(3, 4) * w.dim(),
    "stack": lambda w: torch.stack([w, w])[0].clamp(min=0),
}


class Fetching(nn.Module):
    def __init__(self, way: str, use: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 3, bias=False)])
        self.register_buffer("matrix", torch.randn(3, 4))
        self.fetch, self.use = WAYS[way], USES[use]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.use(self.fetch(self)))


def every_way_and_use() -> list[Any]:
    """Each way with one use, and each use with one way; all others are slow."""
    usual = ("next(self.parameters())", "/ its norm")
    slow = {(way, use): way != usual[0] and use != usual[1] for way, use in itertools.product(WAYS, USES)}
    return [pytest.param(*pair, marks=[pytest.mark.slow] * is_slow) for pair, is_slow in slow.items()]


@pytest.mark.parametrize(("way", "use"), every_way_and_use())
def test_what_is_computed_from_weights_follows_them(way, use):
    torch.manual_seed(0)
    model = Fetching(way, use).eval()
    net, box = BoundedModel(model, X), linf_box(X, 0.0)
    net.ibp(box)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.copy_(torch.randn(3, 4))
        expected = model(X)
    torch.testing.assert_close(net.ibp(box).output.center.detach(), expected)
    outputs = model(X).sum(), net.ibp(box).output.center.sum()
    assert outputs[0].requires_grad == outputs[1].requires_grad
    if outputs[0].requires_grad:
        expected, found = (torch.autograd.grad(output, model.layers[0].weight)[0] for output in outputs)
        torch.testing.assert_close(found, expected)


class Storing(nn.Module):
    """Caches a constant that it computes, and keeps its features, as forwards for hooks and plots do."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.last = nn.Linear(4, 5), nn.Linear(5, 3)
        self.register_buffer("frequency", torch.ones(4))
        self.shift: Tensor | None = None
        self.seen: list[Tensor] = []
        self.kept: dict[str, list[Tensor]] = {"all": []}

    def forward(self, x: Tensor) -> Tensor:
        if self.shift is None:
            self.shift = 2 * self.frequency
        features = F.relu(self.hidden(x + self.shift) * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
        self.features = features
        self.seen.append(features)
        self.kept["all"].append(features)
        self.register_buffer("latest", features)
        return self.last(features)


def stored_by(model: Storing) -> list[int]:
    """Which objects, by their addresses."""
    tensors = [model.shift, *model.seen, *model.kept["all"], *model._buffers.values(), getattr(model, "features", None)]
    return [*map(id, tensors), len(model.seen), len(model._buffers)]


@pytest.mark.parametrize(
    "look",
    [lambda model: BoundedModel(model, X), affine_weights, classifier_tensors, ibp_init_],
    ids=["BoundedModel", "affine_weights", "classifier_tensors", "ibp_init_"],
)
@pytest.mark.parametrize("used", [False, True])
def test_a_module_that_stores_what_it_computes_is_left_as_it_was(look, used):
    torch.manual_seed(0)
    model = Storing().eval()
    if used:
        with torch.no_grad():
            model(X)
    names = {name: list(vars(part)) for name, part in model.named_modules()}
    before = stored_by(model)
    look(model)
    assert {name: list(vars(part)) for name, part in model.named_modules()} == names
    assert stored_by(model) == before
    pickle.dumps(model)
    assert type(model(X)) is Tensor


def test_bounds_of_a_module_that_stores_what_it_computes():
    torch.manual_seed(0)
    model = Storing().eval()
    net, box = BoundedModel(model, X), linf_box(X, 0.1)
    for _ in range(2):
        point = box.lower + (box.upper - box.lower) * torch.rand_like(X)
        assert net.ibp(box).output.contains(model(point), 1e-5).all()


ASKING: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a number": lambda net, x: net.layer(x) * (1.0 if torch.is_grad_enabled() else -1.0),
    "a tensor": lambda net, x: net.layer(x) + torch.tensor([0.5 + torch.is_grad_enabled(), 2.0, 3.0]),
    "a layer": lambda net, x: net.layer(x) if torch.is_grad_enabled() else net.other(x),
    "an operation": lambda net, x: net.layer(x).relu() if torch.is_grad_enabled() else net.layer(x),
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("way", ASKING)
def test_a_forward_that_asks_for_gradients_is_refused(way, grad):
    class Asking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.other = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return ASKING[way](self, x)

    with torch.set_grad_enabled(grad), pytest.raises(UnsupportedOperation, match="something tracing does not see"):
        BoundedModel(Asking().eval(), X)
