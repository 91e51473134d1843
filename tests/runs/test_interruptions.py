"""A run that is disturbed from outside goes on, or ends with everything saved and a word about it."""

from __future__ import annotations

import io
import json
import shutil
import signal
import time

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from certtrain.runs.checkpoint import load_checkpoint, save_checkpoint
from certtrain.runs.progress import ProgressDisplay
from certtrain.runs.train import train as train_here
from certtrain.runtime.console import Output
from certtrain.verification.results import ResultFile
from tests.commands import (
    STEPS_PER_EPOCH,
    TINY,
    exit_code,
    into_a_pipe_that_nobody_reads,
    one_thread,
    signal_at,
    start,
    train_arguments,
)
from tests.runs.comparing import CHECKPOINTS_ONLY_WHEN_ASKED, metrics


class Pipe(io.StringIO):
    """Its reader leaves after so many lines, as `head` does."""

    def __init__(self, lines):
        super().__init__()
        self.lines = lines

    def flush(self):
        if self.getvalue().count("\n") > self.lines:
            raise BrokenPipeError


@pytest.mark.parametrize("overwritten", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_search_of_the_runs_own_goes_on_where_it_was_cut_off(train, tmp_path, monkeypatch, overwritten):
    """Image by image, of every network and split; what it had kept is gone in the end, and with --overwrite at once."""
    searched = ["verification.method=ibp,branch-and-bound", "verification.limit=20", "data.validation=10",
                "verification.search.steps=1", "training.averaging={name: ema}"]  # fmt: skip
    whole, add, taken = train("--out", tmp_path / "whole", *searched), ResultFile.add, []

    def until_the_50th(file, result):
        if len(taken) == 50:  # of 20 + 10 of each network
            raise KeyboardInterrupt
        taken.append(result.image)
        add(file, result)

    monkeypatch.setattr(ResultFile, "add", until_the_50th)
    assert train("--out", tmp_path / "cut", *searched).code == 130
    monkeypatch.setattr(ResultFile, "add", lambda file, result: (taken.append(result.image), add(file, result)))
    assert train("--out", tmp_path / "cut", *searched, "--overwrite" if overwritten else "--resume").code == 0
    assert len(taken) == 50 + (60 if overwritten else 10)
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "cut")]
    for key in ("verdicts", "natural_error", "verified_error", "domains"):
        assert summaries[0][key] == summaries[1][key]
    assert whole.code == 0
    assert not any(path.name == ".verifying" for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("console", [Output, Console], ids=["ours", "rich's"])
def test_a_reader_who_leaves_ends_the_run_saved(tmp_path, reference, capfd, console, monkeypatch):
    run, step = tmp_path / "run", 2 * STEPS_PER_EPOCH
    options = {"device": "cpu", "overrides": [*TINY, CHECKPOINTS_ONLY_WHEN_ASKED]}
    with one_thread(), monkeypatch.context() as patch, open(tmp_path / "output", "w") as output:
        patch.setattr("sys.stdout", output)  # which rich's own then leads to nowhere
        result = train_here("digits", run, console=console(file=Pipe(1)), **options)
    assert result.interrupted_by == signal.SIGPIPE
    assert capfd.readouterr().err == (
        f"nobody reads the output any more: saved {run} at step {step}; continue with --resume\n"
    )
    assert load_checkpoint(run / "last.ckpt")["trainer"]["step"] == step
    with one_thread():
        train_here("digits", run, resume=True, console=Console(quiet=True), **options)
    assert (run / "model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()
    assert [record["epoch"] for record in metrics(run)] == [1, 2, 3]


@pytest.mark.slow
def test_the_command_ends_as_others_do_whose_reader_has_left(tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    child = start(train_arguments(run, CHECKPOINTS_ONLY_WHEN_ASKED), log, into_a_pipe_that_nobody_reads)
    code = exit_code(child)
    assert code == 128 + signal.SIGPIPE, log.read_text()
    assert log.read_text() == (
        f"nobody reads the output any more: saved {run} at step {STEPS_PER_EPOCH}; continue with --resume\n"
    )
    assert (run / "last.ckpt").exists()


# --- threads ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was stopped after four steps, taken with two threads; only to be read."""
    folder, before = tmp_path_factory.mktemp("stopped") / "run", torch.get_num_threads()
    torch.set_num_threads(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("OMP_NUM_THREADS", raising=False)
        patch.setattr(ProgressDisplay, "after_step", signal_at(4))
        train_here("digits", folder, device="cpu", overrides=TINY, console=Console(quiet=True))
    torch.set_num_threads(before)
    return folder


@pytest.fixture
def interrupted(stopped, tmp_path, monkeypatch):
    """A copy of `stopped`, to go on with, or to be harmed."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return shutil.copytree(stopped, tmp_path / "run")


def test_a_run_goes_on_with_the_threads_it_was_saved_with(cli, interrupted, monkeypatch):
    used = []
    monkeypatch.setattr(ProgressDisplay, "after_step", lambda self, trainer: used.append(torch.get_num_threads()))
    assert load_checkpoint(interrupted / "last.ckpt")["threads"] == 2
    outcome = cli("train", "--resume", interrupted, "--device", "cpu")
    assert outcome.code == 0
    assert "goes on with 2 threads, as it was saved, instead of 1" in outcome.out
    assert set(used) == {2}
    assert "2 threads" in json.loads((interrupted / "summary.json").read_text())["versions"]["device"]


@pytest.mark.parametrize(
    ("saved_by", "told"), [("this one", False), ("another processor", True), ("an older version", False)]
)
def test_that_another_processor_goes_on_is_told(cli, interrupted, saved_by, told):
    state = load_checkpoint(interrupted / "last.ckpt")
    if saved_by == "another processor":
        state["computed_by"] = "PyTorch 2.15.0 on CPU (AVX\x1b[31m)"
    elif saved_by == "an older version":
        del state["computed_by"]
    save_checkpoint(interrupted / "last.ckpt", state)
    outcome = cli("train", "--resume", interrupted, "--device", "cpu")
    assert outcome.code == 0
    here = f"PyTorch {torch.__version__} on CPU ({torch.backends.cpu.get_cpu_capability()})"
    assert (
        f"saved by 'PyTorch 2.15.0 on CPU (AVX\\x1b[31m)', goes on by {here}: rounded otherwise" in outcome.out
    ) is told
    assert ("goes on by" in outcome.out) is told


def test_a_number_of_threads_in_the_environment_is_kept_and_told(cli, interrupted, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    used = []
    monkeypatch.setattr(ProgressDisplay, "after_step", lambda self, trainer: used.append(torch.get_num_threads()))
    outcome = cli("train", "--resume", interrupted, "--device", "cpu")
    assert outcome.code == 0
    assert "saved with 2 threads, goes on with 1 (OMP_NUM_THREADS)" in outcome.out
    assert set(used) == {1}


def test_the_process_has_its_own_number_of_threads_again(interrupted):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train_here(interrupted, resume=True, device="cpu", console=Console(quiet=True))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


# --- logs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hours", [-10_000, -1, 0, 1])
def test_tensorboard_shows_every_epoch_whatever_the_clock_says(train, interrupted, monkeypatch, hours):
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 3600 * hours)
    assert train("--resume").code == 0
    monkeypatch.undo()
    shown = EventAccumulator(str(interrupted / "tensorboard")).Reload().Scalars("train/loss")
    assert [(event.step, event.value) for event in shown] == [
        (record["epoch"], pytest.approx(record["loss"], rel=1e-6)) for record in metrics(interrupted)
    ]
    assert [event.step for event in shown] == [1, 2, 3]


@pytest.mark.parametrize("blank", ["", " ", "\t", "\r"])
def test_blank_lines_of_the_metrics_are_nothing(train, interrupted, reference, blank):
    file = interrupted / "metrics.jsonl"
    file.write_text(f"{blank}\n" + file.read_text() + f"{blank}\n\n")
    assert train("--resume").code == 0
    assert [record["epoch"] for record in metrics(interrupted)] == [1, 2, 3]


@pytest.mark.parametrize(
    "line", ["{", "[]", "3", "null", "{}", '{"epoch": "1"}', '{"epoch": true}', "[" * 10**5, "\xff"]
)
def test_a_line_that_is_no_record_is_named_before_anything_is_done(train, interrupted, line):
    file = interrupted / "metrics.jsonl"
    file.write_bytes(file.read_bytes() + line.encode("latin-1") + b"\n")
    before = file.read_bytes(), (interrupted / "last.ckpt").read_bytes()
    outcome = train("--resume")
    assert (outcome.code, "metrics.jsonl is missing or corrupt" in outcome.error) == (1, True)
    assert "train the run anew with --overwrite" in outcome.error
    assert (file.read_bytes(), (interrupted / "last.ckpt").read_bytes()) == before


# --- checkpoints that do not fit --------------------------------------------------------------------------------------


def without_epochs(state):
    del state["trainer"]["sums"]


def with_a_wide_moment(state):
    state["trainer"]["optimizer"]["state"][0]["exp_avg"] = torch.zeros(1)


def with_text_for_a_step(state):
    state["trainer"]["step"] = "4"


@pytest.mark.parametrize("harm", [without_epochs, with_a_wide_moment, with_text_for_a_step])
def test_a_checkpoint_that_does_not_fit_changes_nothing(train, interrupted, harm):
    state = load_checkpoint(interrupted / "last.ckpt")
    harm(state)
    save_checkpoint(interrupted / "last.ckpt", state)
    before = (interrupted / "last.ckpt").read_bytes()
    outcome = train("--resume")
    assert (outcome.code, "last.ckpt does not fit this run: trainer" in outcome.error) == (1, True)
    assert (interrupted / "last.ckpt").read_bytes() == before
