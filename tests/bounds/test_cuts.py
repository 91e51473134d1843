"""Where networks are cut in two, against the definition: whatever was before the cut may be exchanged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from certtrain.bounds import BoundedModel, linf_box
from certtrain.bounds.graph import Graph
from certtrain.bounds.recording import PointWalk
from certtrain.errors import UsageError
from certtrain.models import build_model
from tests.networks import (
    narrow_cnn7,
    narrow_resnext,
    narrow_wide_resnet,
    pooling_network,
    randomized,
    residual_network,
)

ACTIVATIONS = ("relu", "gelu", "tanh", "sigmoid")  # of the networks below; a normalization's own are none


class Written(nn.Module):
    """A network given by its forward function, with two layers and a few numbers."""

    def __init__(self, forward: Any) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 3)
        self.scale, self.function = nn.Parameter(torch.rand(12)), forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x.flatten(1))


def gated(self, x):
    x = self.first(x)
    x = x * torch.sigmoid(x)
    return self.last(torch.relu(self.second(x)))


def two_gates_at_once(self, x):
    x = torch.tanh(self.first(x)) * torch.sigmoid(self.second(x))
    return self.last(torch.relu(x))


def a_constant_from_before(self, x):
    scale = self.scale.exp() + 1
    x = torch.relu(self.first(x) * scale)
    return self.last(torch.relu(self.second(x) * scale))


def sizes_asked_for_where_they_are_used(self, x):
    x = torch.relu(self.first(x))
    x = x.reshape(x.shape[0], 2, -1)
    return self.last(torch.tanh(x).reshape(x.shape[0], -1))


def the_batch_size_asked_for_at_the_start(self, x):
    images = x.shape[0]
    x = torch.relu(self.first(x)).reshape(images, 3, 4)
    return self.last(torch.tanh(x).reshape(images, 12))


def values_that_nobody_uses(self, x):
    x = torch.relu(self.first(x))
    aside = torch.tanh(x)
    y = torch.relu(self.second(x))
    _ = aside + x
    return self.last(y)


def normalized_by_every_layer_norm(self, x):
    x = F.layer_norm(self.first(x), x.shape[1:])
    x = F.rms_norm(torch.relu(x), (12,), eps=1e-5)
    x = torch.relu(F.group_norm(self.second(x), 3))
    return self.last(x)


def without_an_activation(self, x):
    return self.last(self.first(x))


def from_the_input_to_the_end(self, x):
    return self.last(torch.relu(self.second(torch.relu(self.first(x)))) + x)


def transformer(**options: Any) -> nn.Module:
    return build_model("vit", (3, 4, 4), 5, options={"width": 8, "heads": 2, "depth": 2, **options})


IN_A_LINE = {
    "cnn7": (narrow_cnn7, 16),
    "cnn7 without norms": (lambda: narrow_cnn7(batch_norm=False), 16),
    "cnn-large": (lambda: build_model("cnn-large", (3, 16, 16), 5, options={"width": 2, "linear_width": 8}), 16),
    "cnn-2layer": (lambda: build_model("cnn-2layer", (3, 8, 8), 5, options={"width": 2, "linear_width": 8}), 8),
    "mlp": (lambda: build_model("mlp", (3, 2, 2), 3, options={"widths": [7, 6, 5]}), 2),
}
NETWORKS = {
    **IN_A_LINE,
    "wide-resnet": (narrow_wide_resnet, 16),
    "resnext": (narrow_resnext, 16),
    "residual": (residual_network, 16),
    "inception": (pooling_network, 16),
    "pre": (transformer, 4),
    "post, gelu": (lambda: transformer(norm="post", activation="gelu", pool="token"), 4),
    "none": (lambda: transformer(norm="none", pool="flatten", shifted_patches=True), 4),
    "pre, batch": (lambda: transformer(norm_kind="batch"), 4),
    "post, no variance": (lambda: transformer(norm="post", norm_kind="layer-no-variance"), 4),
    **{
        forward.__name__: (lambda forward=forward: Written(forward), 2)
        for forward in (
            gated,
            two_gates_at_once,
            a_constant_from_before,
            sizes_asked_for_where_they_are_used,
            the_batch_size_asked_for_at_the_start,
            values_that_nobody_uses,
            normalized_by_every_layer_norm,
            without_an_activation,
            from_the_input_to_the_end,
        )
    },
}


def network(name: str) -> tuple[BoundedModel, Tensor]:
    """In training mode, and five images."""
    torch.manual_seed(0)
    build, size = NETWORKS[name]
    images = torch.rand(5, 3, size, size, dtype=torch.float64)
    return BoundedModel(randomized(build()).double().train(), images), images


def all_values(net: BoundedModel, images: Tensor, coefficients: Any) -> dict[int, Any]:
    walk, values = Kept(), {0: images}
    net.graph.run(images, walk, coefficients)
    return values | walk.values


class Kept(PointWalk):
    def __init__(self) -> None:
        self.values: dict[int, Tensor] = {}

    def apply(self, call: Any, args: tuple[Any, ...]) -> Tensor:
        self.values[call.index] = super().apply(call, args)
        return self.values[call.index]


def continued(graph: Graph, at: int, value: Tensor, before: Tensor, coefficients: Any) -> Tensor | None:
    """The output where the value at `at` is this one, and all values before it are those of the images `before`."""
    values: dict[int, Any] = {0: before}
    graph.advance(values, range(1, at + 1), PointWalk(), coefficients)
    values[at] = value
    try:
        graph.advance(values, range(at + 1, len(graph.steps)), PointWalk(), coefficients)
    except Exception:  # of shapes that do not fit: five images here, three there
        return None
    return values[graph.output]


def defined_cuts(net: BoundedModel, images: Tensor) -> dict[int, int]:
    """What `cuts` is to find, value by value, by trying."""
    graph, clean = net.graph, net.clean_pass(images)
    values, others = all_values(net, images, clean.coefficients), torch.rand_like(images)[:3]
    counted = [
        at
        for at in values
        if is_activation(graph, at)
        and not torch.equal(continued(graph, at, values[at] + 1, images, clean.coefficients), clean.output)
    ]
    possible: dict[int, list[int]] = {}
    for at in values:
        found = continued(graph, at, values[at], others, clean.coefficients)
        if found is not None and found.shape == clean.output.shape and torch.allclose(found, clean.output, rtol=1e-12):
            possible.setdefault(sum(later > at for later in counted), []).append(at)
    return {
        behind: next((at for at in candidates if at in counted), candidates[-1])
        for behind, candidates in possible.items()
        if behind
    }


def is_activation(graph: Graph, at: int) -> bool:
    return getattr(graph.steps[at].function, "__name__", "") in ACTIVATIONS


@pytest.mark.parametrize("name", NETWORKS)
def test_cuts_are_as_they_are_defined(name):
    net, images = network(name)
    with torch.no_grad():
        assert {number: cut.at for number, cut in net.graph.cuts.items()} == defined_cuts(net, images)


@pytest.mark.parametrize("name", IN_A_LINE)
def test_in_a_line_of_layers_a_cut_is_directly_behind_an_activation(name):
    net, _ = network(name)
    steps = net.graph.steps
    behind = [at for at in range(len(steps)) if is_activation(net.graph, at)]
    assert len(behind) > 1
    for tail in range(1, len(behind)):
        cut = net.split(tail).cut
        assert cut.at == behind[-tail - 1]
        assert cut.behind == tuple(range(cut.at + 1, len(steps)))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_tail_continues_what_the_head_began_for_any_number_of_points(name):
    net, images = network(name)
    clean = net.clean_pass(images)
    boxes = net.ibp(linf_box(images, 0.0), coefficients=clean.coefficients, record=True).recorded.boxes
    for tail in net.graph.cuts:
        split = net.split(tail)
        hidden = boxes[split.cut.at].center.repeat_interleave(2, 0)
        expected = clean.output.repeat_interleave(2, 0)
        torch.testing.assert_close(split.tail(hidden, clean.coefficients), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cnn7", [1, 2, 3, 4, 5, 6]),
        ("wide-resnet", [1, 2, 3, 4, 5, 6, 7, 8]),
        ("resnext", [1, 2, 4, 5, 7, 8, 10, 11, 13, 14, 16, 17, 19, 20]),
        ("residual", [1, 2, 3, 4, 5]),
        ("pre", [1, 2]),
        ("post, gelu", [1, 2]),
        ("none", [1, 2]),
        ("gated", [1, 2]),
        ("two_gates_at_once", [1, 3]),
        ("a_constant_from_before", [1, 2]),
        ("sizes_asked_for_where_they_are_used", [1, 2]),
        ("values_that_nobody_uses", [1, 2]),
        ("normalized_by_every_layer_norm", [1, 2]),
        ("the_batch_size_asked_for_at_the_start", [2]),
        ("from_the_input_to_the_end", [2]),
    ],
)
def test_a_tail_of_every_number_that_is_possible_and_no_other(name, expected):
    net, _ = network(name)
    assert sorted(net.graph.cuts) == expected
    for tail in {*range(max(expected) + 2)} - {*expected}:
        with pytest.raises(UsageError, match=f"with {tail} activations .*; possible: {', '.join(map(str, expected))}$"):
            net.split(tail)


def test_a_network_without_activations_has_no_tail():
    net, _ = network("without_an_activation")
    with pytest.raises(UsageError, match="cannot be cut with 1 activations behind the cut; it has none"):
        net.split(1)


@pytest.mark.parametrize("name", ["pre", "none", "pre, batch"])
def test_a_transformer_is_cut_at_its_residual_sums(name):
    """With one activation behind, which is the last block's: behind that block's attention."""
    net, _ = network(name)
    step = net.graph.steps[net.split(1).cut.at]
    assert step.where == "add in module 'network.2'"
