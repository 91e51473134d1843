import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import sys
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import safetensors.torch
import torch

import certtrain
from certtrain.bound_methods import STAGES
from certtrain.bounds.linear.relaxations import RELAXATIONS
from certtrain.bounds.rounding.table import RULES as SOUND_RULES
from certtrain.config import load_config
from certtrain.errors import CheckpointError
from certtrain.runs import evaluation
from certtrain.runs.callbacks import Recorder
from certtrain.runs.checkpoint import load_checkpoint, save_checkpoint
from certtrain.runs.files import RUN_FILES, TENSORBOARD
from certtrain.runs.progress import ProgressDisplay
from certtrain.runtime.files import write_text
from tests.commands import (
    STEPS_PER_EPOCH,
    contents,
    disk_with_room_for,
    exit_code,
    one_thread,
    signal_at,
    start,
    train_arguments,
    wait_until,
)
from tests.runs.comparing import (
    CHECKPOINTS_ONLY_WHEN_ASKED,
    Told,
    check_same_run,
    metrics,
    scalars,
)

EPOCHS = 3
CALLS_IN_AN_EPOCH = 29_000  # of functions, of which 11,000 around its end; counted once, a guess will do


# --- what a run leaves -----------------------------------------------------------------------------------------------


def test_a_run_directory_holds_the_files_and_nothing_else(reference):
    expected = {"config.yaml", "metrics.jsonl", "last.ckpt", "model.safetensors", "model.json", "summary.json"}
    assert {path.name for path in reference.iterdir()} == expected | {"tensorboard", "verdicts.json"}


def test_summary(reference):
    summary = json.loads((reference / "summary.json").read_text())
    assert summary["eps"] == 0.1
    assert summary["images"] == 50
    assert 0 <= summary["natural_error"] <= summary["pgd_error"] <= summary["verified_error"] <= 1
    assert summary["steps"] == EPOCHS * STEPS_PER_EPOCH
    assert summary["images_per_second"] == metrics(reference)[-1]["images_per_second"] > 0
    assert summary["train_seconds"] > 0
    assert summary["verify_seconds"] > 0
    assert summary["versions"]["torch"] == torch.__version__
    assert load_config(summary["config"]) == load_config(reference / "config.yaml")


def test_the_seconds_of_training_are_not_those_of_verification(train, tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("certtrain.runs.callbacks.time", SimpleNamespace(monotonic=lambda: clock.now))

    def wait(seconds, before):
        clock.now += seconds
        return before

    verify_run = evaluation.verify_run
    monkeypatch.setattr(ProgressDisplay, "after_step", lambda self, trainer: wait(1, None))
    monkeypatch.setattr("certtrain.runs.train.verify_run", lambda *args, **more: wait(1000, verify_run(*args, **more)))
    assert train("training.averaging={name: ema, decay: 0.5}").code == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["train_seconds"] == EPOCHS * STEPS_PER_EPOCH


def test_metrics_have_every_number_of_every_epoch(reference):
    records = metrics(reference)
    assert [(record["epoch"], record["step"]) for record in records] == [(1, 3), (2, 6), (3, 9)]
    assert [record["lr"] for record in records] == pytest.approx([2e-3, 2e-3, 4e-4], rel=1e-12)
    eps = [record["eps"] for record in records]
    assert eps[0] == 0 < eps[1] < eps[2] == 0.1
    before, warmup, full = records
    always = {"loss", "natural_error", "images_per_second", "seconds", "layers"}
    assert before.keys() >= always | {"natural_loss", "tightness_loss", "relu_balance_loss"}
    assert warmup.keys() >= always | {"robust_loss", "verified_error", "tightness_loss", "relu_balance_loss"}
    assert full.keys() >= always | {"robust_loss", "verified_error"}
    for record in records:
        assert len(record["layers"]) == 3, "one per ReLU"
        for layer in record["layers"]:
            assert 0 < layer["tightness"] < math.inf
            assert layer["radius"] > 0
            shares = [layer[state] for state in ("active", "inactive", "unstable")]
            assert sum(shares) == pytest.approx(1)
            assert min(shares) >= 0
            assert 0 <= layer["dead"] <= layer["inactive"]
        assert 0 <= record["natural_error"] <= record.get("verified_error", 1) <= 1


def test_losses_add_up(reference):
    for record in metrics(reference):
        terms = ("natural_loss", "robust_loss", "tightness_loss", "relu_balance_loss")
        # each is a mean over the epoch's batches in which it occurs: over all of them, save where warmup begins
        if record["epoch"] != 2:
            assert record["loss"] == pytest.approx(sum(record.get(term, 0) for term in terms), rel=1e-5)


def test_tensorboard_holds_the_same_numbers(reference):
    shown, tags = scalars(reference), set()
    for record in metrics(reference):
        expected = {f"train/{key}": value for key, value in record.items() if key not in ("epoch", "layers")}
        for number, layer in enumerate(record["layers"], start=1):
            expected |= {f"relu{number}/{key}": value for key, value in layer.items()}
        for tag, value in expected.items():
            assert dict(shown[tag])[record["epoch"]] == pytest.approx(value, rel=1e-6), tag
        tags |= expected.keys()
    assert shown.keys() == tags


def test_training_the_resolved_config_again_gives_the_same_run(cli, reference, tmp_path):
    assert cli("train", reference / "config.yaml", "--out", tmp_path / "again", "--device", "cpu").code == 0
    check_same_run(tmp_path / "again", reference)


def test_another_seed_gives_another_network(train, reference, tmp_path):
    assert train("seed=1").code == 0
    assert (tmp_path / "run" / "model.safetensors").read_bytes() != (reference / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "overrides",
    [
        ["epsilon.max=0"],
        ["epsilon.warmup_epochs=0"],
        ["training.method=natural"],
        ["training.accumulation=2", "regularizers.l1=1e-4"],
        ["training.activation_checkpointing=true"],
        ["optimizer.name=SGD", "optimizer.arguments.momentum=0.9", "optimizer.clip=null"],
        ["data.validation=0.5", "data.flip=true"],
        ["training.channels_last=true", "training.precision=bf16"],
    ],
)
def test_other_settings_train_to_the_end(train, tmp_path, overrides):
    assert train(*overrides).code == 0
    assert math.isfinite(metrics(tmp_path / "run")[-1]["loss"])


def test_the_python_interface(tmp_path, reference):
    config = load_config(reference / "config.yaml")
    run = certtrain.train(config, tmp_path / "run", device="cpu")
    assert run.folder == tmp_path / "run"
    assert run.interrupted_by is None
    assert run.summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    loaded = certtrain.load_model(tmp_path / "run").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in run.model.state_dict().items())


class LossOfEpochs(certtrain.Observer):
    def __init__(self):
        self.losses = []

    def after_epoch(self, trainer, report):
        self.losses.append(report.metrics["loss"])


def test_callbacks_are_told_of_every_step_and_epoch(tmp_path, reference):
    told, losses = Told(), LossOfEpochs()
    with one_thread():
        run = certtrain.train(reference / "config.yaml", tmp_path / "run", device="cpu", callbacks=[told, losses])
    assert run.summary is not None
    steps = [("step", number) for number in range(1, EPOCHS * STEPS_PER_EPOCH + 1)]
    assert [call for call in told.calls if call[0] == "step"] == steps
    assert told.calls[STEPS_PER_EPOCH :: STEPS_PER_EPOCH + 1] == [("epoch", number) for number in range(1, EPOCHS + 1)]
    assert losses.losses == [record["loss"] for record in metrics(run.folder)]
    check_same_run(run.folder, reference)


@pytest.mark.parametrize(
    ("end", "step"),
    [(("step", 4), 4), (("step", STEPS_PER_EPOCH), STEPS_PER_EPOCH), (("epoch", 2), 2 * STEPS_PER_EPOCH)],
)
def test_a_callback_ends_the_run_which_is_resumed(tmp_path, reference, end, step):
    told = Told(end)
    with one_thread():
        run = certtrain.train(
            reference / "config.yaml", tmp_path / "run", device="cpu", callbacks=[told, LossOfEpochs()]
        )
        assert (run.summary, run.interrupted_by) == (None, None)
        assert load_checkpoint(run.folder / "last.ckpt")["trainer"]["step"] == step
        certtrain.train(out=run.folder, device="cpu", resume=True)
    check_same_run(run.folder, reference)


# --- a folder that is taken ------------------------------------------------------------------------------------------


def test_a_run_is_not_overwritten_unasked(train, run):
    before = contents(run)
    outcome = train("seed=1")
    assert outcome.code == 2
    assert "holds a run: continue it with --resume, replace it with --overwrite, or name --out" in outcome.error
    assert contents(run) == before


def test_overwrite_replaces_the_runs_own_files_alone(train, run, reference):
    strangers = {"notes.txt": b"mine", "tensorboard/plot.png": b"mine too", "figures/a.txt": b"and mine"}
    (run / "figures").mkdir()
    for name, content in strangers.items():
        (run / name).write_bytes(content)
    stale = contents(run)
    derived = set(RUN_FILES) - stale.keys()
    for name in derived:
        write_text(run / name, "of the network that was here before")
    (run / "verify-1.json").mkdir()  # a stranger, too
    assert train("seed=1", "--overwrite").code == 0
    now = contents(run)
    assert strangers.items() <= now.items()
    assert len(now) == len(stale)
    assert all(now[name] != stale[name] for name in RUN_FILES if name not in {"model.json", *derived})
    assert [record["epoch"] for record in metrics(run)] == [1, 2, 3]
    epochs = {tuple(epoch for epoch, _ in values) for values in scalars(run).values()}
    assert epochs <= {(1, 2, 3), (1, 2), (2, 3)}


@pytest.mark.parametrize("wrong", ["--device=gpu", "data.name=mnist", "model.options.width=wide", "epsilon.max=2"])
def test_overwrite_removes_nothing_before_the_new_run_can_start(train, run, tmp_path, wrong):
    before = contents(run)
    outcome = train("--overwrite", f"data.root={tmp_path / 'nowhere'}", wrong)
    assert outcome.code in (1, 2)
    assert outcome.error
    assert contents(run) == before


@pytest.mark.parametrize(
    ("rules", "asked"),
    [(RELAXATIONS, f"verification.method=[ibp, {name}]") for name in STAGES[1:]]
    + [(SOUND_RULES, "verification.arithmetic=float32")],
)
def test_what_verification_lacks_is_told_before_training(train, run, monkeypatch, rules, asked):
    before = contents(run)
    monkeypatch.delitem(rules, torch.nn.functional.relu)
    assert "has no " in train("--overwrite", asked).error
    assert contents(run) == before


@pytest.mark.parametrize("way", ["--resume", "--overwrite"])
@pytest.mark.parametrize(
    ("name", "make"),
    [*((name, os.mkdir) for name in RUN_FILES), *((name, os.mkfifo) for name in ("last.ckpt", TENSORBOARD))],
)
def test_what_lies_in_the_way_of_a_runs_files_is_found_before_one_is_removed(train, run, name, make, way):
    shutil.rmtree(run / name) if name == TENSORBOARD else (run / name).unlink(missing_ok=True)
    before = contents(run)
    make(run / name)
    outcome = train(way)
    assert str(run / name) in outcome.error
    (run / name).rmdir() if make is os.mkdir else (run / name).unlink()
    assert contents(run) == before


def test_a_folder_that_is_no_run_is_never_overwritten(train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    before = contents(tmp_path)
    for options in ([], ["--overwrite"], ["--resume"]):
        outcome = train(*options)
        assert outcome.code == (1 if "--resume" in options else 2)
        assert outcome.error
        assert contents(tmp_path) == before


def test_a_file_is_no_folder(train, tmp_path):
    (tmp_path / "run").write_text("a file")
    outcome = train("--overwrite")
    assert (outcome.code, "is a file, not a folder" in outcome.error) == (2, True)


def test_an_empty_folder_is_free(train, tmp_path, reference):
    (tmp_path / "run").mkdir()
    assert train().code == 0
    check_same_run(tmp_path / "run", reference)


# --- resuming --------------------------------------------------------------------------------------------------------


def test_resuming_a_finished_run_changes_no_result(train, run, reference):
    before = json.loads((run / "summary.json").read_text())
    assert train("--resume").code == 0
    check_same_run(run, reference)
    after = json.loads((run / "summary.json").read_text())
    for key in ("natural_error", "pgd_error", "verified_error", "steps", "images_per_second"):
        assert after[key] == before[key]


def test_resuming_where_nothing_is_starts_the_run(train, tmp_path, reference):
    assert train("--resume").code == 0
    check_same_run(tmp_path / "run", reference)


def test_a_run_of_another_configuration_is_not_resumed(train, run):
    before = contents(run)
    outcome = train("--resume", "seed=1", "optimizer.lr=0.1", "optimizer.arguments.amsgrad=true")
    assert outcome.code == 2
    assert outcome.error == (
        f"{run} holds a run of another configuration: seed is 0 there, 1 here; optimizer.lr is 0.002 there, 0.1 here; "
        "optimizer.arguments.amsgrad is absent there, True here"
    )
    assert contents(run) == before


@pytest.mark.parametrize("content", [None, b"", b"[", b"- a", b"\xff\xfe"])
def test_a_damaged_config_is_not_resumed(train, run, content):
    (run / "config.yaml").unlink()
    if content is not None:
        (run / "config.yaml").write_bytes(content)
    before = contents(run)
    outcome = train("--resume")
    assert outcome.code == 1
    assert f"the config.yaml of the run in {run} cannot be read: " in outcome.error
    assert contents(run) == before


@pytest.mark.parametrize("keep", [0, 100, 10_000, -1])
def test_a_truncated_checkpoint_is_not_resumed(train, run, keep):
    (run / "last.ckpt").write_bytes((run / "last.ckpt").read_bytes()[:keep])
    before = contents(run)
    outcome = train("--resume")
    assert outcome.code == 1
    assert "last.ckpt is corrupt or truncated" in outcome.error
    assert outcome.error.endswith("train the run anew with --overwrite, or elsewhere with --out")
    assert contents(run) == before


def test_a_checkpoint_of_another_architecture_is_not_resumed(train, cli, run, tmp_path):
    other = train_arguments(tmp_path / "other", "model.options.width=3", "training.epochs=2", "optimizer.milestones=[]")
    assert cli(*other).code == 0
    shutil.copy(tmp_path / "other" / "last.ckpt", run)
    before = contents(run)
    outcome = train("--resume")
    assert outcome.code == 1
    assert "last.ckpt is of another architecture" in outcome.error
    assert contents(run) == before


def test_a_checkpoint_from_other_data_is_not_resumed(train, cli, run, tmp_path):
    assert cli(*train_arguments(tmp_path / "other", "data.limit=40")).code == 0
    shutil.copy(tmp_path / "other" / "last.ckpt", run)
    outcome = train("--resume")
    assert outcome.code == 1
    assert "was saved with 2 steps per epoch, the training set now gives 3" in outcome.error


@pytest.mark.parametrize(
    ("sent", "step"),
    [*((signal.SIGINT, step) for step in (1, 2, 3, 5, 6, 8)), (signal.SIGTERM, 5), (signal.SIGTERM, 6)],
)
def test_a_signal_saves_and_resume_continues_exactly(train, tmp_path, reference, monkeypatch, sent, step):
    """After any step: inside an epoch, and at the end of one."""
    monkeypatch.setattr(ProgressDisplay, "after_step", signal_at(step, sent))
    run = tmp_path / "run"
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    outcome = train(CHECKPOINTS_ONLY_WHEN_ASKED)
    assert outcome.code == 128 + sent
    assert outcome.out.splitlines()[-1] == f"saved {run} at step {step}; continue with --resume"
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert load_checkpoint(run / "last.ckpt")["trainer"]["step"] == step
    with pytest.raises(CheckpointError, match=r"the run in .* is not finished"):
        certtrain.load_model(run)
    monkeypatch.undo()
    outcome = train(CHECKPOINTS_ONLY_WHEN_ASKED, "--resume")
    assert outcome.code == 0
    assert f"resuming {run} after step {step} of 9" in outcome.out
    check_same_run(run, reference)


class EndedAtOnce(BaseException):
    """As by a signal that nobody answers."""


@pytest.mark.parametrize(
    ("sent", "saved"),
    [
        ((signal.SIGTERM, signal.SIGTERM), True),
        ((signal.SIGINT, signal.SIGTERM), True),
        ((signal.SIGINT, signal.SIGINT), False),
        ((signal.SIGTERM, signal.SIGINT), False),
    ],
)
@pytest.mark.parametrize("when", ["at once", "while it is saved"])
def test_a_second_ctrl_c_ends_a_run_at_once_and_a_second_sigterm_does_not(
    train, tmp_path, monkeypatch, sent, saved, when
):
    """That may come from a batch system that signals every process, and again from the parent that passes it on."""

    def unanswered(*_):
        raise EndedAtOnce

    def saving(*arguments):
        signal.raise_signal(sent[1])
        save_checkpoint(*arguments)

    def signalled(self, trainer):
        for number in sent[:1] if when == "while it is saved" else sent:
            if trainer.step == 4:
                signal.raise_signal(number)

    monkeypatch.setattr(ProgressDisplay, "after_step", signalled)
    if when == "while it is saved":
        monkeypatch.setattr("certtrain.runs.callbacks.save_checkpoint", saving)
    before = {number: signal.signal(number, unanswered) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with nullcontext() if saved else pytest.raises(EndedAtOnce):
            assert train(CHECKPOINTS_ONLY_WHEN_ASKED).code == 128 + sent[when == "at once"]  # the last while training
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert (tmp_path / "run" / "last.ckpt").exists() == saved
    assert not saved or load_checkpoint(tmp_path / "run" / "last.ckpt")["trainer"]["step"] == 4


# --- killed ----------------------------------------------------------------------------------------------------------


def check_nothing_is_torn(run):
    """Whatever is there is whole."""
    if (run / "metrics.jsonl").exists():
        metrics(run)
    for name in ("model.json", "summary.json"):
        if (run / name).exists():
            json.loads((run / name).read_text())
    if (run / "config.yaml").exists():
        load_config(run / "config.yaml")
    if (run / "last.ckpt").exists():
        load_checkpoint(run / "last.ckpt")
    if (run / "model.safetensors").exists():
        certtrain.load_model(run)


def die_at(function, call):
    """kill -9 as this call of `function` begins."""
    module, name = {"save": (safetensors.torch, "save"), "fsync": (os, "fsync"), "replace": (os, "replace")}[function]
    original, calls = getattr(module, name), itertools.count(1)

    def replacement(*arguments, **options):
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(module, name, replacement)


@pytest.mark.slow
def test_an_epoch_that_takes_longer_than_saves_are_apart_is_saved_on_its_way(tmp_path, reference):
    """Here every step does; killed as the fifth ends, within the second epoch of three steps."""
    run, saves_at_once = tmp_path / "run", "training.checkpoint_seconds=1e-9"
    killed = start(train_arguments(run, saves_at_once), tmp_path / "log", partial(die_in_step, 5))
    assert exit_code(killed) == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert load_checkpoint(run / "last.ckpt")["trainer"]["step"] == 4
    assert exit_code(start(train_arguments(run, saves_at_once, "--resume"), tmp_path / "log")) == 0
    check_same_run(run, reference)


def die_in_step(step):
    """kill -9 before that step is noticed."""
    after_step = Recorder.after_step

    def replacement(self, trainer):
        if trainer.step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return after_step(self, trainer)

    Recorder.after_step = replacement


@pytest.mark.slow
@pytest.mark.parametrize(("function", "calls"), [("save", (4, 4)), ("fsync", (1, 11)), ("replace", (1, 6))])
def test_killed_inside_saves_and_resumed_the_run_is_the_same(tmp_path, reference, function, calls):
    """Before a byte is written, before it is flushed, and before the new file takes the place of the old."""
    run, rng, codes = tmp_path / "run", random.Random(0), []
    while 0 not in codes:
        prepare = partial(die_at, function, rng.randint(*calls))
        codes.append(exit_code(start(train_arguments(run, "--resume"), tmp_path / "log", prepare)))
        assert codes[-1] in (0, -signal.SIGKILL), (tmp_path / "log").read_text()
        check_nothing_is_torn(run)
        assert len(codes) < 30
    assert len(codes) > 2
    check_same_run(run, reference)


def die_calls_after_step(step, call):
    """kill -9 at this call, of any function, after that many steps of this process."""
    after_step, steps, calls = Recorder.after_step, itertools.count(1), itertools.count(1)

    def at_an_event(frame, event, argument):
        if event in ("call", "c_call") and next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)

    def replacement(self, trainer):
        if next(steps) == step:
            sys.setprofile(at_an_event)
        return after_step(self, trainer)

    Recorder.after_step = replacement


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_the_run_is_the_same(cli, tmp_path):
    """Moments are counted in calls by the process itself, so that they are as many however fast it is."""
    run, rng, codes = tmp_path / "run", random.Random(0), []
    longer = ["training.epochs=15", "epsilon.warmup_epochs=5"]
    while 0 not in codes:
        prepare = partial(die_calls_after_step, rng.randint(1, 3 * STEPS_PER_EPOCH), rng.randint(1, CALLS_IN_AN_EPOCH))
        codes.append(exit_code(start(train_arguments(run, *longer, "--resume"), tmp_path / "log", prepare)))
        assert codes[-1] in (0, -signal.SIGKILL), (tmp_path / "log").read_text()
        check_nothing_is_torn(run)
        assert len(codes) < 60
    assert len(codes) > 3, "none goes on for more than four of the fifteen epochs"
    assert cli(*train_arguments(tmp_path / "uninterrupted", *longer)).code == 0
    check_same_run(run, tmp_path / "uninterrupted")


def test_ctrl_c_while_the_network_is_verified_says_how_to_go_on(train, tmp_path, reference, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("certtrain.runs.train.verify_run", Mock(side_effect=KeyboardInterrupt))
        outcome = train()
    assert outcome.code == 130
    assert outcome.out.splitlines()[-1] == f"{run} is trained, but not verified; continue with --resume"
    assert train("--resume").code == 0
    check_same_run(run, reference)


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_from_outside_ends_the_run_with_its_code(tmp_path, sent):
    run, log = tmp_path / "run", tmp_path / "log"
    child = start(train_arguments(run, "training.epochs=100000", CHECKPOINTS_ONLY_WHEN_ASKED), log)
    wait_until(lambda: len(metrics(run)) > 0, child)
    os.kill(child.pid, sent)
    assert exit_code(child) == 128 + sent, log.read_text()
    step = load_checkpoint(run / "last.ckpt")["trainer"]["step"]
    assert log.read_text().splitlines()[-1] == f"saved {run} at step {step}; continue with --resume"
    assert len(metrics(run)) == step // STEPS_PER_EPOCH


# --- what goes wrong on the way --------------------------------------------------------------------------------------


def test_a_disk_that_fills_up_leaves_the_last_checkpoint(train, tmp_path, reference, monkeypatch):
    run = tmp_path / "run"
    monkeypatch.setattr(ProgressDisplay, "after_step", signal_at(4))
    assert train().code == 130
    monkeypatch.undo()
    before = contents(run)
    with disk_with_room_for(len(before["last.ckpt"]) // 2):
        outcome = train("--resume")
    assert outcome.code == 1
    assert "could not write" in outcome.error
    assert "last.ckpt" in outcome.error
    assert (run / "last.ckpt").read_bytes() == before["last.ckpt"]
    assert not list(run.glob(".*"))
    assert train("--resume").code == 0
    check_same_run(run, reference)


@pytest.mark.parametrize("room", [0, 2500])
def test_a_full_disk_is_one_line_whatever_was_being_written(train, tmp_path, room):
    """With no room at all the config is; with little, the logs, of which TensorBoard's is written by a thread."""
    with disk_with_room_for(room):
        outcome = train(CHECKPOINTS_ONLY_WHEN_ASKED)
    assert outcome.code == 1
    assert "File too large" in outcome.error
    assert not list((tmp_path / "run").glob(".*"))


def test_a_loss_that_is_not_finite_names_epoch_step_and_epsilon(train, tmp_path):
    outcome = train("optimizer.lr=1e30")
    assert outcome.code == 1
    assert re.search(r"not finite in epoch 1, step [23] of 3, at epsilon 0 ", outcome.error)
    assert not (tmp_path / "run" / "last.ckpt").exists()
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize("seconds", [0, 1e-9])
def test_after_a_loss_that_is_not_finite_the_last_good_checkpoint_stays(train, tmp_path, seconds):
    """The learning rate explodes at the end of epoch 2, when epsilon has reached its maximum."""
    run = tmp_path / "run"
    saves = f"training.checkpoint_seconds={seconds}"
    outcome = train("optimizer.milestones=[2]", "optimizer.factor=1e30", saves)
    assert outcome.code == 1
    assert re.search(r"not finite in epoch 3, step [23] of 3, at epsilon 0\.1 ", outcome.error)
    state = load_checkpoint(run / "last.ckpt")
    assert 0 <= state["trainer"]["step"] - 2 * STEPS_PER_EPOCH <= bool(seconds)
    assert all(value.isfinite().all() for value in state["trainer"]["model"].values())
    assert [record["epoch"] for record in metrics(run)] == [1, 2]
    assert not (run / "model.safetensors").exists()
