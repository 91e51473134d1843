"""What tracing must keep apart (in-place writes, modes, spellings), and what it must refuse."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from certtrain.bounds import BoundedModel, linf_box
from certtrain.errors import UnsupportedOperation


class Written(nn.Module):
    """A network given by its forward function."""

    def __init__(self, forward) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(4, 4), forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def bounds_of(forward, training: bool = False):
    torch.manual_seed(0)
    model = Written(forward).double().train(training)
    x = torch.rand(3, 4, dtype=torch.float64)
    return BoundedModel(model, x).ibp(linf_box(x, 0.0), clean=x).output, model(x.clone())


def relu_overwrites_its_input(self, x):
    h = self.layer(x)
    F.relu(h, inplace=True)
    return h - 0.1


def sum_overwrites_a_branch_that_has_two_names(self, x):
    h = self.layer(x)
    identity = h
    h += 1.0
    return h + identity


def method_overwrites(self, x):
    h = self.layer(x)
    h.mul_(-2)
    return h


def scaled_in_place(self, x):
    h = self.layer(x)
    h *= 3.0
    h /= 2.0
    h -= 0.5
    return h


def a_module_overwrites(self, x):
    h = self.layer(x)
    nn.ReLU(inplace=True)
    return F.leaky_relu(h, 0.5, inplace=True) + h


@pytest.mark.parametrize(
    "forward",
    [
        relu_overwrites_its_input,
        sum_overwrites_a_branch_that_has_two_names,
        method_overwrites,
        scaled_in_place,
        a_module_overwrites,
    ],
    ids=lambda f: f.__name__,
)
def test_in_place_operations_change_every_name_of_the_tensor(forward):
    output, expected = bounds_of(forward)
    torch.testing.assert_close(output.center, expected)


def test_a_module_that_works_in_place_changes_its_input():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.relu = nn.Linear(4, 4), nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            h = self.layer(x)
            return self.relu(h) + h

    model, x = Net().double(), torch.rand(3, 4, dtype=torch.float64)
    output = BoundedModel(model, x).ibp(linf_box(x, 0.0)).output
    torch.testing.assert_close(output.center, model(x))


def test_writing_into_a_view_of_a_tensor_used_again_is_refused():
    def forward(self, x):
        h = self.layer(x)
        h.view(-1, 2, 2).relu_()
        return h

    with pytest.raises(UnsupportedOperation, match="view"):
        bounds_of(forward)


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda self, x: torch.sin(self.layer(x)), "sin"),
        (lambda self, x: self.layer(x).cos(), "cos"),
        (lambda self, x: self.layer(x).H, "'H'"),
        (lambda self, x: self.layer(x) if x.sum() > 0 else x, "branch"),
        (lambda self, x: (self.layer(x), x), "one tensor"),
        (lambda self, x: F.linear(x, x), "weights that depend on the input"),
    ],
)
def test_what_has_no_rule_is_named(forward, message):
    with pytest.raises(UnsupportedOperation, match=message):
        bounds_of(forward)


def test_an_unsupported_module_is_named_with_its_path_and_the_way_out():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Hardshrink()))
    with pytest.raises(UnsupportedOperation, match=r"Hardshrink in module '1\.0'.*backend: lirpa"):
        BoundedModel(model, torch.rand(1, 4))


@pytest.mark.parametrize(
    "layer",
    [
        nn.MaxPool2d(2, return_indices=True),
        nn.LeakyReLU(-0.1),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_options_without_a_rule_are_refused(layer):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            out = self.layer(x)
            return out.flatten(1) if isinstance(out, Tensor) or not isinstance(out, tuple) else out[0].flatten(1)

    x = torch.rand(1, 2, 6, 6)
    with pytest.raises((UnsupportedOperation, AttributeError)) as error:
        BoundedModel(Net(), x).ibp(linf_box(x, 0.1))
    assert isinstance(error.value, UnsupportedOperation)


def test_hooks_are_refused_since_bounds_would_not_see_them():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].register_forward_hook(lambda module, args, output: output + 1)
    with pytest.raises(UnsupportedOperation, match="hooks"):
        BoundedModel(model, torch.rand(1, 4))


def test_a_subclass_with_its_own_forward_is_traced_not_taken_for_its_base():
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model, x = nn.Sequential(Doubled(4, 4)).double(), torch.rand(2, 4, dtype=torch.float64)
    output = BoundedModel(model, x).ibp(linf_box(x, 0.0)).output
    torch.testing.assert_close(output.center, model(x))


def test_parametrized_weights_are_the_parametrized_ones():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4).double())
    model, x = nn.Sequential(layer, nn.ReLU()), torch.rand(2, 4, dtype=torch.float64)
    net = BoundedModel(model, x)
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(3)
    torch.testing.assert_close(net.ibp(linf_box(x, 0.0)).output.center, model(x))


def test_functional_dropout_and_branches_on_the_mode_follow_it():
    def forward(self, x):
        h = F.dropout(self.layer(x), 0.5, training=self.training)
        return h + 1 if self.training else h - 1

    torch.manual_seed(0)
    model, x = Written(forward).double().train(), torch.rand(3, 4, dtype=torch.float64)
    net = BoundedModel(model, x)
    trained = net.ibp(linf_box(x, 0.0), clean=x)
    kept = model.layer(x) * 2
    assert (torch.isclose(trained.clean, kept + 1) | torch.isclose(trained.clean, torch.ones_like(kept))).all()
    torch.testing.assert_close(trained.output.center, trained.clean)  # one mask for both
    model.eval()
    torch.testing.assert_close(net.ibp(linf_box(x, 0.0)).output.center, model.layer(x) - 1)


def test_the_model_is_left_in_its_modes_and_its_buffers_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU()).train()
    model[1].eval()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    BoundedModel(model, torch.rand(3, 4))
    assert model.training
    assert not model[1].training
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())


def test_a_batch_norm_frozen_in_eval_mode_keeps_its_statistics():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).double().train()
    model[1].eval()
    x = torch.rand(5, 4, dtype=torch.float64)
    bounds = BoundedModel(model, x).ibp(linf_box(x, 0.0), clean=x)
    torch.testing.assert_close(bounds.output.center, model(x))


@pytest.mark.parametrize("momentum", [0.3, None], ids=["momentum", "cumulative"])
def test_running_statistics_are_updated_as_pytorch_does(momentum):
    bounded, plain = (nn.BatchNorm1d(4, momentum=momentum).double().train() for _ in range(2))
    net = BoundedModel(nn.Sequential(bounded), torch.rand(2, 4, dtype=torch.float64))
    for step in range(3):
        x = torch.rand(5, 4, dtype=torch.float64) + step
        net.ibp(linf_box(x, 0.1, clip=None), clean=x)
        plain(x)
    for found, expected in zip(bounded.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("within", [False, True])
def test_what_spreads_a_network_over_devices_names_the_one_inside(within):
    network = nn.DataParallel(nn.Linear(4, 3))
    with pytest.raises(UnsupportedOperation, match=r"give the network inside, its \.module"):
        BoundedModel(nn.Sequential(network) if within else network, torch.rand(1, 4)).ibp(
            linf_box(torch.rand(1, 4), 0.1)
        )
