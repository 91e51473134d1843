"""The scripts, imported by their path."""

from __future__ import annotations

import importlib.util
import json
import signal
import sys
from pathlib import Path

import pytest

from certtrain.runs import evaluation
from certtrain.runs.checkpoint import load_checkpoint
from certtrain.runs.progress import ProgressDisplay
from tests.commands import TINY, contents, one_thread

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


def script(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def reproduce(tmp_path, monkeypatch):
    main = script("reproduce").main

    def run(*more):
        places = ["--runs", tmp_path / "runs", "--results", tmp_path / "results.jsonl", "--device", "cpu"]
        with one_thread():
            return main([str(word) for word in ["digits", *TINY, *places, *more]])

    return run


def lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]


def test_reproduce_adds_a_line_for_each_seed_once(reproduce, tmp_path):
    assert reproduce("--seeds", 3, 4) == 0
    found = lines(tmp_path)
    assert [(line["setting"], line["seed"]) for line in found] == [("digits", 3), ("digits", 4)]
    for line in found:
        assert 0 <= line["natural_error"] <= line["pgd_error"] <= line["verified_error"] <= 1
        seconds = line["seconds_until"]
        assert list(seconds) == ["warmup", "epoch 2", "trained", "verified"]
        assert 0 < seconds["warmup"] <= seconds["epoch 2"] <= seconds["trained"] <= seconds["verified"]
        assert line["versions"].keys() >= {"torch", "device"}
        assert line["config"]["data"].keys().isdisjoint({"root", "path"})
    before = contents(tmp_path)
    assert reproduce("--seeds", 4) == 0
    assert contents(tmp_path) == before


def test_reproduce_ends_in_time_and_goes_on_where_it_was(reproduce, tmp_path, monkeypatch, capsys, reference):
    def time_runs_out(self, trainer):
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 900
        if trainer.step == 4:
            signal.raise_signal(signal.SIGALRM)

    folder = tmp_path / "runs" / "digits-seed0"
    with monkeypatch.context() as patch:
        patch.setattr(ProgressDisplay, "after_step", time_runs_out)
        assert reproduce("--budget", 1000) == 75
    assert f"out of time: run the same command again to continue {folder}" in capsys.readouterr().out
    assert load_checkpoint(folder / "last.ckpt")["trainer"]["step"] == 4
    assert not (tmp_path / "results.jsonl").exists()
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert reproduce("--budget", 1000) == 0
    assert len(lines(tmp_path)) == 1
    assert (folder / "model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGALRM, 75), (signal.SIGINT, 130)])
def test_reproduce_verifies_later_what_it_had_no_time_for(reproduce, tmp_path, monkeypatch, capsys, sent, code):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with monkeypatch.context() as patch:
            patch.setattr(evaluation, "verify", lambda *arguments, **options: signal.raise_signal(sent))
            assert reproduce("--budget", 1000) == code
    finally:
        signal.signal(signal.SIGINT, before)
    assert "run the same command again to continue" in capsys.readouterr().out
    assert reproduce() == 0
    assert len(lines(tmp_path)) == 1
