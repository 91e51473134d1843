"""The scripts, imported by their path."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from certtrain.runs import evaluation
from certtrain.runs.checkpoint import load_checkpoint
from certtrain.runs.progress import ProgressDisplay
from tests.commands import TINY, contents, one_thread
from tests.studies.folders import write_run

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


def script(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name.replace('.', '/')}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def reproduce(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
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
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
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


# --- warmup -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def warmup_study(tmp_path, monkeypatch):
    """Two optimizers of three seeds, of which one has diverged and one is not finished, with two first steps each."""
    monkeypatch.syspath_prepend(SCRIPTS)  # one script imports another
    study = tmp_path / "warmup_optimizers"
    images = {"adam_short": ("ppmm", "pppm", "ppuu"), "sgd_short": ("pmmm", "ppmm", None)}
    for cell, seeds in images.items():
        for seed, verdicts in enumerate(seeds):
            run = study / cell / f"seed-{seed}"
            write_run(run, verdicts or "m", seed=seed, extra={"steps": 8})
            layers = [{"dead": 0.25}, {"dead": 0.75}]
            (run / "metrics.jsonl").write_text(json.dumps({"epoch": 1, "layers": layers}))
            step = dict.fromkeys(script("warmup").OF_STEPS) | {"effective_step_size": 1.0 + seed}
            lines = [json.dumps({"step": number, **step}) for number in (1, 2)]
            (run / "steps.jsonl").write_text("\n".join(lines))
            if verdicts is None:
                (run / "summary.json").unlink()
    (study / "sgd_short" / "seed-2" / "diverged.json").write_text(json.dumps({"eps": 0.031, "message": "not finite"}))
    write_run(study / "sgd_none" / "seed-0", "p")
    (study / "sgd_none" / "seed-0" / "summary.json").unlink()
    return study


def test_warmup_gathers_what_is_finished_or_diverged(warmup_study, tmp_path):
    script("warmup").main([str(warmup_study), "--out", str(tmp_path)])
    found = json.loads((tmp_path / "warmup_optimizers.json").read_text())
    rows = {(row["cell"], row["seed"]): row for row in found["rows"]}
    assert len(rows) == 6
    assert rows["sgd_short", 2] == {"cell": "sgd_short", "seed": 2, "diverged_at": 0.031}
    first = rows["adam_short", 0]
    assert (first["verified_error"], first["natural_error"], first["dead_relus"], first["steps"]) == (0.5, 0.5, 0.5, 8)
    assert found["first_steps"]["adam_short"]["effective_step_size"] == [2.0, 2.0]
    assert found["first_steps"]["adam_short"]["rectification"] == [None, None]
    assert (tmp_path / "warmup_optimizers_steps.png").read_bytes().startswith(b"\x89PNG")


def test_warmup_tables_have_student_intervals_and_differences_of_common_seeds(warmup_study):
    """Of 50, 25 and 50 %: the mean, and 4.3027 (Student's t of two degrees of freedom) standard errors."""
    rows, tables = script("warmup").rows_of(warmup_study), script("pages.warmup")
    assert tables.mean_of(rows, "adam_short", "verified_error") == "41.7 ± 35.9"
    half = 12.7062 * 12.5 / 2  # of one degree: times a standard error, which of two values is half their distance
    assert tables.difference(rows, "sgd_short", "adam_short") == "+25.0"  # both seeds agree
    assert tables.estimate([0.5, 0.625]) == f"56.2 ± {half:.1f}"
    assert tables.estimate([0.5]) == "50.0"
    line = tables.optimizers_table(rows).splitlines()[-1]
    assert line == "| sgd | 62.5 ± 158.8 | – | +25.0 |"
    details = tables.details_table(rows, {}).splitlines()
    assert len(details) == 2 + 2
    assert details[-1].startswith("| sgd | short | 3 | 1 | ")


def test_warmup_recipes_are_averaged_over_networks_seed_by_seed(monkeypatch):
    """Seed 0 gains 1 and 3 points, seed 1 gains 2 and 6: so 2 and 4, and 12.7062 standard errors, of 1 each."""
    errors = {"a": (50, 60, 49, 58), "b": (70, 80, 67, 74)}
    rows = [
        {"cell": f"{network}_{recipe}", "seed": seed, "natural_error": 0.5, "verified_error": error / 100, "steps": 7}
        for network, found in errors.items()
        for (recipe, seed), error in zip(itertools.product(("published", "fast"), (0, 1)), found, strict=True)
    ]
    monkeypatch.syspath_prepend(SCRIPTS)
    tables = script("pages.warmup")
    assert tables.over_networks(rows, "fast") == "-3.0 ± 12.7"
    assert tables.over_networks([row for row in rows if row["seed"] == 0], "fast") == "-2.0"
    rows.pop()  # seed 1 lacks a network
    assert tables.over_networks(rows, "fast") == "-2.0"
    table = tables.networks_table(rows).splitlines()
    assert len(table) == 2 + 2 * 2 + 1
    assert table[-1] == "| mean of all | fast |  |  |  |  | -2.0 |"


def test_warmup_names_a_folder_without_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    with pytest.raises(SystemExit):
        script("warmup").main([str(tmp_path)])
    assert "holds no finished run" in capsys.readouterr().err


# --- transformers ---------------------------------------------------------------------------------------------------


@pytest.fixture
def transformers(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)  # one script imports another
    monkeypatch.setitem(sys.modules, "transformers", None)  # and afterwards the name is free again
    return script("transformers")


@pytest.mark.parametrize("name", ["natural", "certified", pytest.param("crown-ibp", marks=pytest.mark.slow)])
def test_memory_of_a_transformers_bounds_grows_by_the_square_of_the_tokens_at_most(name, transformers):
    """As the network's own does, by its scores; every product of the scores on its own would be one more factor."""
    few, many = (transformers.peak_per_image(tokens, transformers.REMEMBERED[name]) for tokens in (64, 256))
    assert many <= 16 * few


@pytest.mark.parametrize(
    "name", sorted(".".join(file.relative_to(SCRIPTS).with_suffix("").parts) for file in SCRIPTS.rglob("*.py"))
)
def test_every_script_finds_what_it_imports(name, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.setitem(sys.modules, name, None)  # and afterwards the name is free again
    script(name)


@pytest.fixture
def hour(tmp_path, monkeypatch):
    """The hour's rehearsal, by an interpreter that writes what it is asked for, with an empty file of the data."""
    interpreter, data = tmp_path / "python", tmp_path / "data"
    interpreter.write_text(INTERPRETER)
    interpreter.chmod(0o755)
    data.mkdir()
    (data / "train.npz").touch()
    for name, value in {"PYTHON": interpreter, "RESULTS": tmp_path / "results", "ASKED": tmp_path / "asked"}.items():
        monkeypatch.setenv(name, str(value))

    def rehearse(*arguments, fails="nothing", code=0):
        command = ["bash", str(SCRIPTS / "gpu_hour.sh"), "--rehearse", str(data), *map(str, arguments)]
        names = {"FAILS": fails, "CODE": str(code)}
        return subprocess.run(command, env={**os.environ, **names}, capture_output=True, text=True)

    return rehearse


INTERPRETER = """#!/usr/bin/env bash
echo "$*" >> "$ASKED"
out=
for word in "$@"; do [[ $previous == --out ]] && out=$word; previous=$word; done
[[ -z $out ]] || echo "{}" > "$out"
[[ "$*" == *$FAILS* ]] && exit "$CODE"
exit 0
"""


@pytest.mark.parametrize(
    ("fails", "code", "ends", "asked", "whole"),
    [
        ("nothing", 0, 0, 6, ["benchmark", "devices", "growth"]),
        ("reproduce.py cifar10_8_255", 75, 0, 6, ["benchmark", "devices", "growth"]),  # out of time, to be continued
        ("reproduce.py cifar10_2_255", 1, 1, 5, ["benchmark", "devices", "growth"]),
        ("reproduce.py cifar10_8_255", 130, 130, 3, ["benchmark", "devices"]),  # Ctrl-C is meant for all of it
        ("--grow", 2, 1, 4, ["benchmark", "devices"]),
    ],
)
def test_an_hour_on_a_gpu_keeps_whole_results_and_ends_where_a_rehearsal_fails(
    hour, tmp_path, fails, code, ends, asked, whole
):
    """The interpreter fails at one thing; then again, where nothing fails."""
    log, results = tmp_path / "asked", tmp_path / "results"
    first = hour(fails=fails, code=code)
    assert (first.returncode, len(log.read_text().splitlines())) == (ends, asked), first.stderr
    assert sorted(file.name for file in results.glob("*.json")) == [f"{name}-cpu.json" for name in whole]
    again = hour()
    assert again.returncode == 0
    done = log.read_text().splitlines()[asked:]
    assert [line for line in done if "benchmark.py" in line and "--grow" not in line] == []  # not measured again
    assert sum("--grow" in line for line in done) == ("growth" not in whole)


@pytest.mark.parametrize("checkouts", [[], ["authors"], ["authors", "ctrain"]])
def test_an_hour_on_a_gpu_runs_the_codes_whose_checkouts_are_there(hour, tmp_path, checkouts):
    for name in checkouts:
        (tmp_path / name).mkdir()
    ended = hour(*(tmp_path / name for name in checkouts), "optimizer.lr=0.5")
    assert ended.returncode == 0, ended.stderr
    asked = (tmp_path / "asked").read_text().splitlines()
    beside = [line for line in asked if "scripts/beside_authors.py" in line]
    assert len(beside) == (len(checkouts) > 0)
    for option, name in (("--repo", "authors"), ("--ctrain", "ctrain")):
        assert all((f"{option} {tmp_path / name}" in line) == (name in checkouts) for line in beside)
    assert (tmp_path / "results" / "beside-authors-cpu.json").exists() == (len(checkouts) > 0)
    assert any(line.endswith("optimizer.lr=0.5") or "optimizer.lr=0.5 " in line for line in asked)


CARD = """
import sys, types
cuda = types.SimpleNamespace(is_initialized=lambda: {used}, max_memory_allocated=lambda: 3 * 2**40)
sys.modules["torch"] = types.SimpleNamespace(cuda=cuda)
import beside
print(beside.SAID)
"""


@pytest.mark.parametrize(
    ("device", "used", "peak"), [("cuda", True, 3 * 2**40), ("cuda", False, None), ("cpu", True, 0)]
)
def test_memory_of_a_card_is_what_the_programs_torch_has_allocated(tmp_path, monkeypatch, device, used, peak):
    monkeypatch.syspath_prepend(SCRIPTS)
    (tmp_path / "beside.py").write_text("SAID = 'found'")
    command = [sys.executable, "-c", CARD.format(used=used)]
    output, _, found = script("beside_authors").measured(command, tmp_path / "work", device, [tmp_path])
    assert output == "found\n"
    if device == "cpu":
        assert peak < found < 2**33  # the process's own
    else:
        assert found == peak
    with pytest.raises(SystemExit, match="ended with code 3"):
        script("beside_authors").measured([sys.executable, "-c", "raise SystemExit(3)"], tmp_path, device)
