"""Averages of weights against the weights of every step, and what a run makes of them."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
from torch import Tensor

import certtrain
from certtrain.config import load_config
from certtrain.data import load_dataset, to_float
from certtrain.runs.progress import ProgressDisplay
from certtrain.schedules import AverageShare
from certtrain.training.averaging import reestimate_statistics
from tests.commands import STEPS_PER_EPOCH, TINY, one_thread, signal_at
from tests.config.refused import check_refused
from tests.networks import narrow_cnn7

RAW, AVERAGED = "model-raw.safetensors", "model.safetensors"


class Weights(certtrain.Observer):
    """Of every parameter after every step."""

    def __init__(self) -> None:
        self.after: list[dict[str, Tensor]] = []

    def after_step(self, trainer):
        self.after.append({name: value.detach().double() for name, value in trainer.model.named_parameters()})


def ema(weights: list[Tensor], decay: float) -> Tensor:
    """w₀·dⁿ + (1 - d)·Σ wᵢ·dⁿ⁻ⁱ over i = 1 … n."""
    n = len(weights) - 1
    return weights[0] * decay**n + (1 - decay) * sum(w * decay ** (n - i) for i, w in enumerate(weights) if i)


AVERAGES = {
    "{name: ema, start_epoch: 2, decay: 0.7}": (range(4, 10), lambda taken: ema(taken, 0.7)),
    "{name: ema, start_epoch: 1, every_steps: 4, decay: 0.5}": ((4, 8), lambda taken: ema(taken, 0.5)),
    "{name: swa, start_epoch: 1, every_epochs: 2}": ((3, 9), lambda taken: sum(taken) / 2),
    "{name: swa, start_epoch: 3}": ((9,), lambda taken: taken[0]),
    "{name: swa, start_epoch: 2, every_steps: 2}": ((5, 7, 9), lambda taken: sum(taken) / 3),
}


@pytest.mark.parametrize("averaging", AVERAGES)
def test_both_networks_are_handed_out_and_evaluated(averaging, tmp_path):
    """Nine steps, three an epoch."""
    weights, run = Weights(), tmp_path / "run"
    config = load_config("digits", [*TINY, f"training.averaging={averaging}"])
    with one_thread():
        summary = certtrain.train(config, run, device="cpu", callbacks=[weights]).summary
    raw, averaged = (safetensors.torch.load_file(run / file) for file in (RAW, AVERAGED))
    steps, average = AVERAGES[averaging]
    for name in weights.after[0]:
        assert torch.equal(raw[name].double(), weights.after[-1][name])
        expected = average([weights.after[step - 1][name] for step in steps])
        torch.testing.assert_close(averaged[name].double(), expected, rtol=1e-5, atol=1e-7)
    assert summary == json.loads((run / "summary.json").read_text())
    assert list(summary["networks"]) == [RAW, AVERAGED]
    assert summary["networks"][AVERAGED]["radii"] == summary["radii"]
    for file in (RAW, AVERAGED):
        (found,) = summary["networks"][file]["radii"]
        test = load_dataset("digits").test.take(slice(50))
        wrong = (certtrain.load_model(run / file)(to_float(test.images)).argmax(1) != test.labels).double().mean()
        assert found["natural_error"] == pytest.approx(wrong.item())
        assert found["natural_error"] <= found["pgd_error"] <= found["verified_error"]


def test_the_averaged_network_has_statistics_of_its_own(train, tmp_path):
    """Those of the first BatchNorm are means over all images of what enters it; the other network's run behind."""
    assert train("training.averaging={name: ema, decay: 0.9}").code == 0
    images, found = to_float(load_dataset("digits").train.take(slice(96)).images), {}
    for file in (RAW, AVERAGED):
        model = certtrain.load_model(tmp_path / "run" / file)
        norm = next(module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d))
        seen: list[Tensor] = []
        norm.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(inputs[0]))
        model(images)
        found[file] = (norm.running_mean - seen[0].mean((0, 2, 3))).abs().max().item()
    assert found[AVERAGED] < 1e-6 < 1e-3 < found[RAW]


@pytest.mark.parametrize("option", ["batch_norm.population=true", "averaging={name: ema, decay: 0.9}"])
def test_statistics_are_those_of_what_is_drawn_old_images_included(train, tmp_path, option):
    """22 of 87 in an epoch, in batches none of which BatchNorm refuses: 65 images by 32 would leave one alone."""
    replay = "replay={share: 0.25, data: {name: digits, classes: [0, 1, 2], limit: 22}}"
    outcome = train(f"training.{option}", replay, "data.limit=65", "data.flip=true", "data.crop=2")
    assert outcome.code == 0, outcome.err
    new, old = (load_dataset("digits", classes=classes).train for classes in (None, [0, 1, 2]))
    model = certtrain.load_model(tmp_path / "run" / AVERAGED)
    norm = next(module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d))
    seen: list[Tensor] = []
    norm.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    model(to_float(torch.cat([new.images[:65], old.images[:22]])))
    torch.testing.assert_close(norm.running_mean, seen[0].mean((0, 2, 3)), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "step"), [("{name: ema, decay: 0.8}", 5), ("{name: swa, start_epoch: 1}", STEPS_PER_EPOCH)]
)
def test_an_average_is_resumed_exactly(train, tmp_path, monkeypatch, name, step):
    option, run = f"training.averaging={name}", tmp_path / "run"
    assert train(option).code == 0
    whole = [(run / file).read_bytes() for file in (RAW, AVERAGED)]
    with monkeypatch.context() as patch:
        patch.setattr(ProgressDisplay, "after_step", signal_at(step))
        assert train(option, "--overwrite").code == 130
    assert not (run / RAW).exists()
    assert train("--resume").code == 0
    assert [(run / file).read_bytes() for file in (RAW, AVERAGED)] == whole


def test_the_command_line_shows_both(train):
    outcome = train("training.averaging={name: swa, start_epoch: 2}", "data.validation=0.5")
    assert outcome.code == 0
    assert outcome.out.count("0.10000") == 5, "in epoch 3, and a table each of test and validation images"
    assert "averaged; those after the last step (model-raw.safetensors)" in outcome.out


def test_without_batch_norm_weights_alone_are_averaged(train, tmp_path):
    options = ["model.options.batch_norm=false", "training.averaging={name: swa, start_epoch: 2}"]
    assert train(*options).code == 0
    raw, averaged = (safetensors.torch.load_file(tmp_path / "run" / file) for file in (RAW, AVERAGED))
    assert any(not torch.equal(raw[name], averaged[name]) for name in raw)


def test_statistics_of_a_network_without_any_need_no_image():
    def none():
        raise AssertionError("a batch was asked for")
        yield

    reestimate_statistics(narrow_cnn7(batch_norm=False), none())


def test_shares_of_an_average():
    assert [AverageShare(3, 2)(steps) for steps in range(9)] == [0, 0, 0, 1, 0, 1 / 2, 0, 1 / 3, 0]
    decayed = [AverageShare(3, 2, 0.75)(steps) for steps in range(9)]
    assert decayed == [0, 0, 0, 1, 0, 0.25, 0, 0.25, 0]


@pytest.mark.parametrize(
    ("averaging", "message"),
    [
        ("{name: swa, start_epoch: 61}", r"training\.averaging\.start_epoch: 61 of 60 epochs"),
        ("{name: ema, start_epoch: 61}", r"training\.averaging\.start_epoch: 61 of 60 epochs"),
        ("swa", r"training\.averaging\.start_epoch is missing"),
        ("{name: swa, start_epoch: 1, every_epochs: 2, every_steps: 3}", "training.averaging: .* both say how often"),
        ("{name: ema, decay: 1}", r"training\.averaging\.decay: .*less than 1"),
        ("{name: swa, start_epoch: 1, decay: 0.9}", r"unknown key .*decay: it belongs to training\.averaging ema"),
        ("polyak", r"training\.averaging: unknown averaging 'polyak': choose from ema, none, swa"),
    ],
)
def test_what_is_wrong_is_said(averaging, message):
    check_refused([f"training.averaging={averaging}"], message)


def test_an_average_that_takes_no_weights_is_refused_before_anything_is_written(train, tmp_path):
    outcome = train("training.averaging={name: ema, start_epoch: 3, every_steps: 4}")
    assert outcome.code == 2
    assert outcome.error == (
        "training.averaging would take its first weights after step 10, and the run has 9: begin earlier, or average "
        "more often"
    )
    assert not (tmp_path / "run").exists()
