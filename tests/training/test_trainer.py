"""What the loop must not do: wait for the device within an epoch, or grow."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from certtrain.runs.callbacks import Recorder
from tests.commands import STEPS_PER_EPOCH

WAITING = {
    torch.ops.aten._local_scalar_dense,  # item(), float(), bool()
    torch.ops.aten.nonzero,
    torch.ops.aten.masked_select,
    torch.ops.aten.equal,
}


class NoWaiting(TorchDispatchMode):
    """Where `forbidden`, an operation whose result the host must wait for on a GPU is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.forbidden, self.allowed = False, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in WAITING or _has_boolean_index(function, args):
            assert not self.forbidden, f"{function} within an epoch"
            self.allowed += 1
        return function(*args, **(kwargs or {}))


def _has_boolean_index(function, args):
    indices = args[1] if function.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put_) else []
    return any(index is not None and index.dtype is torch.bool for index in indices)


@pytest.fixture
def observed(monkeypatch):
    """Have functions called after each step, and after each epoch, of a run of the command line."""

    def observe(after_step, after_epoch):
        class Observed(Recorder):
            def after_step(self, trainer):
                ended = super().after_step(trainer)
                after_step(trainer)
                return ended

            def after_epoch(self, trainer, report):
                ended = super().after_epoch(trainer, report)
                after_epoch(trainer)
                return ended

        monkeypatch.setattr("certtrain.runs.train.Recorder", Observed)

    return observe


@pytest.mark.parametrize("wait", [Tensor.item, float, bool, Tensor.nonzero, lambda x: x[x > 0]])
def test_waiting_is_noticed(wait):
    with NoWaiting() as mode:
        mode.forbidden = True
        with pytest.raises(AssertionError, match="within an epoch"):
            wait(torch.tensor([1.0]))


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["training.method=crown-ibp"],
        ["training.method=mtl-ibp"],
        ["training.accumulation=2", "data.flip=true", "data.crop=1"],
    ],
)
def test_no_step_of_an_epoch_waits_for_the_device(train, observed, monkeypatch, options):
    for module in ("box", "margins"):  # as on a GPU
        monkeypatch.setattr(f"certtrain.bounds.{module}.values_readable", lambda x: False)
    mode, forbidden_at = NoWaiting(), []

    def after_step(trainer):
        forbidden_at.append(mode.forbidden)
        mode.forbidden = trainer.step % STEPS_PER_EPOCH != 0  # its last step over, the epoch is summed up

    def after_epoch(trainer):
        mode.forbidden = trainer.step < trainer.total_steps

    observed(after_step, after_epoch)
    with mode:
        assert train(*options).code == 0
    assert forbidden_at == [False] + [True] * (3 * STEPS_PER_EPOCH - 1)
    assert mode.allowed > 0


@pytest.mark.slow
def test_a_long_run_holds_no_more_than_a_short_one(train, observed):
    """Live tensors and their bytes at the end of epochs of three steps, soon after warmup and much later."""
    held = {}

    def after_epoch(trainer):
        if trainer.epoch in (20, 100):
            gc.collect()
            tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
            held[trainer.epoch] = len(tensors), sum(tensor.nbytes for tensor in tensors)

    observed(lambda trainer: None, after_epoch)
    epochs = ["training.epochs=101", "epsilon.warmup_epochs=10", "training.checkpoint_seconds=1"]
    assert train(*epochs).code == 0
    assert held[20] == held[100]
    assert held[20][0] > 10
