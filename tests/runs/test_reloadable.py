"""A network that could not be handed out is refused before the first step; any other comes back as it was trained."""

from __future__ import annotations

import re

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import certtrain
from certtrain.errors import CheckpointError
from certtrain.models import build_model
from certtrain.runs.checkpoint import require_reloadable
from tests.commands import TINY, contents

HIDDEN = 6


class Flat(nn.Module):
    """A linear network, to be varied."""

    def __init__(self, image_shape, num_classes) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, HIDDEN), nn.Linear(HIDDEN, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.hidden(F.relu(self.first(x.flatten(1))))))

    def hidden(self, x: Tensor) -> Tensor:
        return x


# --- what works -------------------------------------------------------------------------------------------------------


class TiedModule(Flat):
    """One layer in two places."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.a = nn.Linear(HIDDEN, HIDDEN)
        self.b = self.a

    def hidden(self, x):
        return self.b(F.relu(self.a(x)))


class TiedWeight(Flat):
    """Two layers with one weight."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.a, self.b = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.b.weight = self.a.weight

    def hidden(self, x):
        return self.b(F.relu(self.a(x)))


class BufferOfAPart(Flat):
    """A buffer that is a view of another's memory."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.register_buffer("whole", torch.linspace(0, 1, 2 * HIDDEN))
        self.register_buffer("part", self.whole[HIDDEN:])

    def hidden(self, x):
        return x + self.part


class Lazy(Flat):
    def __init__(self, image_shape, num_classes) -> None:
        super().__init__(image_shape, num_classes)
        self.first, self.last = nn.LazyLinear(HIDDEN), nn.LazyLinear(num_classes)


class TensorAsExtraState(Flat):
    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.extra = torch.tensor([1.0, 2.0])

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


class IntegerBuffer(Flat):
    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.register_buffer("count", torch.tensor(2**40))
        self.register_buffer("flags", torch.tensor([True, False]))


# --- what does not ----------------------------------------------------------------------------------------------------


class ExtraState(Flat):
    def get_extra_state(self):
        return {"seen": 3}

    def set_extra_state(self, state):
        pass


class Expanded(Flat):
    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.register_buffer("shift", torch.ones(1).expand(HIDDEN))

    def hidden(self, x):
        return x + self.shift


class Complex(Flat):
    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.register_buffer("phase", torch.ones(2, dtype=torch.complex64))


class Sparse(Flat):
    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.register_buffer("pattern", torch.eye(3).to_sparse())


class RandomConstant(Flat):
    """What decides the logits, and is not saved."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.register_buffer("shift", torch.randn(HIDDEN), persistent=False)

    def hidden(self, x):
        return x + self.shift


class Overflowing(Flat):
    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return torch.cat([logits[:, :1] + 1e38 * 1e38, logits[:, 1:]], dim=1)


class NotANumber(Flat):
    def hidden(self, x):
        return x * torch.nan


class RandomAndOverflowing(Overflowing, RandomConstant):
    """One logit is always the same; the others are compared all the same."""


class RandomShape(Flat):
    sizes = iter(range(5, 100))

    def __init__(self, image_shape, num_classes) -> None:
        super().__init__(image_shape, num_classes)
        hidden = next(self.sizes)
        self.first, self.last = nn.Linear(64, hidden), nn.Linear(hidden, num_classes)


WORK = [TiedModule, TiedWeight, BufferOfAPart, Lazy, TensorAsExtraState, IntegerBuffer]
REFUSED = {
    ExtraState: r"cannot be saved: network\._extra_state is a dict, not a tensor",
    Expanded: r"cannot be saved: network\.shift is an expanded tensor",
    Complex: r"cannot be saved: network\.phase is a tensor of torch\.complex64",
    Sparse: r"cannot be saved: network\.pattern is a tensor of .* torch\.sparse_coo",
    RandomConstant: r"could not be loaded once it is trained: it would return other logits",
    RandomAndOverflowing: r"could not be loaded once it is trained: it would return other logits",
    RandomShape: r"could not be loaded once it is trained: what was saved is of another architecture",
}
ARGUMENTS = [value for value in TINY if not value.startswith("model.")]


def trained(cli, network, folder, *more):
    name = f"model={{name: {__name__}:{network.__name__}}}"
    return cli("train", "digits", "--out", folder, "--device", "cpu", *ARGUMENTS, name, *more)


@pytest.mark.parametrize("network", WORK)
def test_a_network_that_can_be_saved_is_trained_and_comes_back(cli, tmp_path, network):
    run, images = tmp_path / "run", torch.rand(5, 1, 8, 8)
    outcome = trained(cli, network, run, "training.epochs=2", "optimizer.milestones=[]")
    assert outcome.code == 0, outcome.err
    final, last = (certtrain.load_model(file, trust=True) for file in (run, run / "last.ckpt"))
    assert torch.equal(final(images), last(images))
    assert trained(cli, network, run, "training.epochs=2", "optimizer.milestones=[]", "--resume").code == 0
    assert torch.equal(certtrain.load_model(run, trust=True)(images), final(images))


@pytest.mark.parametrize("network", [TiedModule, TiedWeight])
def test_tied_weights_are_tied_again_and_must_agree(cli, tmp_path, network):
    run = tmp_path / "run"
    assert trained(cli, network, run).code == 0
    model = certtrain.load_model(run, trust=True).network
    assert model.a.weight.data_ptr() == model.b.weight.data_ptr()
    weights = safetensors.torch.load_file(run / "model.safetensors")
    weights["network.b.weight"] = weights["network.b.weight"] + 1
    safetensors.torch.save_file(weights, run / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"values of network\.[ab]\.weight that the model does not keep"):
        certtrain.load_model(run, trust=True)


@pytest.mark.parametrize("network", REFUSED)
def test_a_network_that_cannot_be_handed_out_is_refused_before_the_first_step(cli, tmp_path, network):
    outcome = trained(cli, network, tmp_path / "run")
    assert outcome.code == 2
    assert re.search(REFUSED[network], outcome.error), outcome.error
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("network", [Overflowing, NotANumber])
def test_a_network_without_finite_logits_can_be_loaded_like_any_other(network):
    module, architecture = f"{__name__}:{network.__name__}", {"image_shape": [1, 8, 8], "num_classes": 10}
    model = build_model(module, **architecture, trust=True).eval()
    assert not model(torch.rand(1, 1, 8, 8)).isfinite().all()
    require_reloadable(model, {"name": module, **architecture}, trust=True)


class Smooth(Flat):
    """Without a neuron that could be active or inactive."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x.flatten(1))))


def test_regularizers_that_find_no_activation_are_an_error_before_the_first_step(cli, tmp_path):
    outcome = trained(cli, Smooth, tmp_path / "run")
    assert outcome.code == 2
    assert re.search(r"no ReLU .* set regularizers\.weight to 0", outcome.error)
    assert contents(tmp_path) == {}


def test_weights_of_another_type_are_not_rounded(run):
    """The checker of certificates reads the file as it is: what is proved of it is to hold for what is loaded."""
    weights = safetensors.torch.load_file(run / "model.safetensors")
    weights["network.0.weight"] = weights["network.0.weight"].double()
    safetensors.torch.save_file(weights, run / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"network\.0\.weight is .* of float64, not"):
        certtrain.load_model(run)
