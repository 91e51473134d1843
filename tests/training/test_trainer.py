"""What the loop must not do: wait for the device within an epoch, or grow."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from certtrain.runs.callbacks import Recorder
from certtrain.schedules import SmoothedEpsilon
from certtrain.training.method import Phase
from certtrain.training.trainer import Trainer
from tests.commands import STEPS_PER_EPOCH
from tests.runs.test_train import Told

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


class Noted:
    """A step that notes where the schedules stand."""

    def __init__(self):
        self.seen = []

    def phase(self, eps, ramp):
        return Phase.WARMUP

    def backward(self, images, labels, at, phase, size=None):
        self.seen.append((at.eps.item(), at.eps_ratio.item(), at.ramp.item()))
        return {"loss": torch.zeros(())}

    def rehearse(self, images, labels, at, phase, size=None):
        self.backward(images, labels, at, phase)


@pytest.mark.parametrize("initial", [0, 2 / 255, 0.02, 8 / 255, 16 / 255])
def test_the_share_of_the_radiuss_way_goes_from_0_to_1_wherever_it_begins(initial):
    """Up or down; and where it stays as it is, with the steps: in training, and when steps are tried before."""
    last, batches = 8 / 255, [(torch.zeros(2, 1), torch.zeros(2))] * 5
    radius, step, model = SmoothedEpsilon(last, 2, 8, initial=initial), Noted(), torch.nn.Linear(1, 1)
    trainer = Trainer(
        model, step, torch.optim.SGD(model.parameters()), lambda epoch, first: iter(batches[first:]), [2] * 5, 2,
        radius, last, radius.ramp, lambda step: 0.1, initial,
    )  # fmt: skip
    trainer.run(Told())
    assert len(step.seen) == 10
    for number, (eps, share, ramp) in enumerate(step.seen):
        way = last - initial
        expected = (radius(number) - initial) / way if way else radius.ramp(number)
        assert share == pytest.approx(expected, abs=1e-6)
        assert (eps, ramp) == pytest.approx((radius(number), radius.ramp(number)))
        if initial == 0:
            assert share == (torch.tensor(eps) / last).item(), "bit for bit"
    shares = [share for _, share, _ in step.seen]
    assert shares[:3] == [0] * 3 != shares[3:6] == sorted(shares[3:6])
    assert shares[8:] == [1, 1]
    tried = len(step.seen)
    trainer.rehearse(*batches[0], 2)
    assert step.seen[tried:] == [step.seen[9]], "the last of the steps of this phase"
