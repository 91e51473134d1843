"""Studies that are interrupted, shared, or changed."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import random
import re
import signal
import stat
import subprocess
import sys

import pytest
from rich.console import Console

from certtrain.errors import UsageError
from certtrain.runs.lock import LOCK, can_lock, claimed, holder
from certtrain.studies.compare import ERRORS, compare
from certtrain.studies.design import load_study
from certtrain.studies.processes import Ended
from certtrain.studies.progress import Display, Progress, has_diverged, look_at, time_left
from certtrain.studies.runner import RunStates, _note, interruptible, require_fit, train_all
from tests.commands import contents, wait_until
from tests.studies.folders import STUDY, pretend_finished, write_run

QUIET = Console(quiet=True)


# --- without training -------------------------------------------------------------------------------------------------


def test_finished_runs_are_not_repeated(study_file, tmp_path):
    study = load_study(study_file)
    pretend_finished(study, tmp_path / "out")
    outcome = train_all(study.runs, tmp_path / "out", console=QUIET)
    assert (set(outcome.finished), outcome.exit_code) == ({run.name for run in study.runs}, 0)


def test_a_run_that_another_process_is_at_is_left_to_it(study_file, tmp_path):
    study = load_study(study_file)
    pretend_finished(study, tmp_path / "out")
    place = tmp_path / "out" / study.runs[1].name
    (place / "summary.json").unlink()
    with claimed(place):
        outcome = train_all(study.runs, tmp_path / "out", console=QUIET)
    assert outcome.exit_code == 75
    assert f"process {os.getpid()}" in outcome.elsewhere[study.runs[1].name]
    assert len(outcome.finished) == len(study.runs) - 1


def test_a_lock_that_a_killed_process_has_left_holds_nobody_out(tmp_path):
    (tmp_path / LOCK).write_text("process 1 on another machine")
    assert holder(tmp_path) is None
    with claimed(tmp_path):
        assert f"process {os.getpid()}" in holder(tmp_path)
    assert holder(tmp_path) is None


@pytest.mark.parametrize("reason", [None, errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_that_locks_no_files_is_told(tmp_path, monkeypatch, reason):
    """Such as NFS without locks: of folders it may say otherwise."""
    lock = fcntl.flock

    def flock(file, operation):
        if reason is not None and stat.S_ISREG(os.fstat(file if isinstance(file, int) else file.fileno()).st_mode):
            raise OSError(reason, os.strerror(reason))
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    assert can_lock(tmp_path) == (reason is None)
    output = io.StringIO()
    train_all([], tmp_path, console=Console(file=output, width=200))
    assert ("is on a file system without locks" in output.getvalue()) == (reason is not None)
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]


def test_no_time_leaves_everything_for_the_next_call(study_file, tmp_path):
    study = load_study(study_file)
    outcome = train_all(study.runs, tmp_path / "out", budget=1e-9, console=QUIET)
    assert outcome.left == [run.name for run in study.runs]
    assert outcome.exit_code == 75


@pytest.mark.parametrize(
    ("code", "asked", "failed"),
    [
        (-signal.SIGKILL, True, {}),  # by us, when the time was up
        (-signal.SIGTERM, False, {}),
        (-signal.SIGKILL, False, {"a/seed-0": "ended by signal 9"}),
        (1, True, {"a/seed-0": "exit code 1"}),
    ],
)
def test_what_was_ended_for_want_of_time_has_not_failed(tmp_path, code, asked, failed):
    outcome = RunStates()
    _note(Ended("a/seed-0", code, "", asked), tmp_path, outcome, Display(QUIET, [], tmp_path, jobs=1))
    assert outcome.failed == failed


@pytest.mark.parametrize(
    ("before", "within"),
    [
        (signal.SIG_DFL, signal.default_int_handler),
        (signal.SIG_IGN, signal.SIG_IGN),
        (print, print),  # as submitit's, whose jobs are queued again only where they go on until they are killed
    ],
)
def test_sigterm_is_answered_as_ctrl_c_unless_the_caller_answers_it(before, within):
    previous = signal.signal(signal.SIGTERM, before)
    try:
        with interruptible():
            assert signal.getsignal(signal.SIGTERM) is within
        assert signal.getsignal(signal.SIGTERM) is before
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_a_study_that_was_changed_says_which_runs_no_longer_fit(study_file, tmp_path):
    study = load_study(study_file)
    pretend_finished(study, tmp_path / "out")
    study_file.write_text(STUDY.replace("0.03", "0.02").replace("pgd_steps: 2", "pgd_steps: 3"))
    changed = load_study(study_file)
    with pytest.raises(UsageError) as error:
        train_all(changed.runs, tmp_path / "out", console=QUIET)
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    for seed, line in enumerate(lines[:2]):
        assert f"lr=0.01/seed-{seed} no longer fits the study: verification.pgd_steps is 2 there, 3 here" in line
    assert lines[2].startswith("2 of 4 runs: ")
    study_file.write_text(STUDY.replace("0.03", "0.02"))
    assert require_fit(load_study(study_file).runs, tmp_path / "out") == ["lr=0.03/seed-0", "lr=0.03/seed-1"]


def test_time_left_is_that_of_the_epochs_left_at_each_cell_s_own_pace():
    def run(name, done, seconds, finished=False):
        return Progress(name, done, 10, seconds, {} if finished else None, False)

    runs = [run("a/seed-0", 10, 20.0, True), run("a/seed-1", 5, 10.0), run("b/seed-0", 2, 8.0), run("c/seed-0", 0, 0.0)]
    assert time_left(runs, 1) == pytest.approx(5 * 2 + 8 * 4 + 10 * 3)
    assert time_left(runs, 2) == pytest.approx(36)
    assert time_left(runs[3:], 1) is None


def test_the_table_shows_every_cell_whoever_trains_it(study_file, tmp_path):
    study = load_study(study_file)
    pretend_finished(study, tmp_path)
    (tmp_path / study.runs[0].name / "summary.json").unlink()
    (tmp_path / study.runs[0].name / LOCK).touch()
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=100)
    with Display(console, study.runs, tmp_path, jobs=1) as display:
        display.show([])
        display.tell("something happens")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.getvalue())
    assert "3 of 4 runs finished" in text
    first, second, *_ = (line for line in text.splitlines() if line.startswith("│ lr="))
    assert [cell.strip() for cell in first.split("│")[1:-1]] == ["lr=0.01", "1/2", "1", "0/4", "50.00%"]
    assert [cell.strip() for cell in second.split("│")[1:-1]] == ["lr=0.03", "2/2", "0", "0/4", "50.00% 50.00%"]
    assert "something happens" in text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *((name, text) for name in ("metrics.jsonl", "summary.json") for text in ("", "{", "[]", "3", '{"epoch": 1')),
        *(
            ("metrics.jsonl", f'{{"epoch": {epoch}, "seconds": 1}}')
            for epoch in ('"x"', "null", "0.5", "-1", "true", "3")
        ),
        *(
            ("metrics.jsonl", f'{{"epoch": 1, "seconds": {seconds}}}')
            for seconds in ('"x"', "null", "NaN", "Infinity", "-1", "[]", "1e308", "1" + "0" * 400)
        ),
        ("summary.json", "{}"),
        *(
            ("summary.json", f'{{"verified_error": {error}}}')
            for error in ('"x"', "null", "NaN", "1e999", "[0.5]", "2")
        ),
    ],
)
def test_files_that_do_not_say_how_far_a_run_is_count_as_none(study_file, tmp_path, name, content):
    """Such as one that is being written."""
    study = load_study(study_file)
    pretend_finished(study, tmp_path)
    for run in study.runs:
        (tmp_path / run.name / "summary.json").unlink()
        (tmp_path / run.name / name).write_text(content)
    progress = [look_at(run, tmp_path / run.name) for run in study.runs]
    assert {(run.epochs_done, run.seconds, run.finished) for run in progress} == {(0, 0.0, False)}
    with Display(Console(file=io.StringIO(), force_terminal=True), study.runs, tmp_path, jobs=1) as display:
        display.show([])


@pytest.mark.parametrize("command", ["study", "tune"])
def test_a_run_is_no_folder_for_others(cli, study_file, tmp_path, command):
    if command == "tune":
        study_file.write_text("base: digits\ntrials: 1\nsearch: {optimizer.lr: [0.1, 0.2]}")
    run = write_run(tmp_path / "run", "ppum")
    before = contents(run)
    outcome = cli(command, study_file, "--out", run)
    assert (outcome.code, outcome.error) == (2, f"{run} is a run itself, and no folder for others: name another --out")
    assert contents(run) == before


# --- with it ----------------------------------------------------------------------------------------------------------


def table(folder):
    """Everything but where it is and how long it took."""
    found = compare([folder], metrics=ERRORS).summary()
    return found | {
        "groups": [{key: value for key, value in group.items() if key != "runs"} for group in found["groups"]]
    }


@pytest.mark.slow
def test_a_study_killed_at_random_and_resumed_gives_the_same_table(study_file, tmp_path):
    """Killed are a process that trains, and the one that shows the table; the others end by themselves."""
    study, log = load_study(study_file), tmp_path / "log"
    victim = random.choice(study.runs)
    command = [sys.executable, "-m", "certtrain", "study", str(study_file), "--out", str(tmp_path / "killed")]
    command += ["--jobs", "2", "--device", "cpu"]
    with open(log, "w") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        place = tmp_path / "killed" / victim.name
        wait_until(lambda: (place / "last.ckpt").exists(), Alive(process))
        if (
            who := re.match(r"process (\d+)", (place / LOCK).read_text() if (place / LOCK).exists() else "")
        ) is not None:
            os.kill(int(who[1]), signal.SIGKILL)
        process.kill()
    for run in study.runs:  # those that are ending themselves
        while holder(tmp_path / "killed" / run.name) is not None:
            pass
    outcome = train_all(study.runs, tmp_path / "killed", jobs=2, device="cpu", console=QUIET)
    assert (outcome.exit_code, len(outcome.finished)) == (0, 4), log.read_text()
    study.grid.write(tmp_path / "whole")  # as the command did in the other folder
    assert train_all(study.runs, tmp_path / "whole", jobs=2, device="cpu", console=QUIET).exit_code == 0
    assert table(tmp_path / "killed") == table(tmp_path / "whole")
    errors = table(tmp_path / "whole")["groups"][0]["verified_error"]["values"]
    assert len(set(errors)) == 2  # the seeds differ, or nothing was compared


class Alive:
    """A subprocess, asked as one of multiprocessing is."""

    def __init__(self, process):
        self._process = process

    def is_alive(self):
        return self._process.poll() is None


@pytest.mark.slow
def test_a_run_that_fails_is_told_and_the_others_go_on(study_file, tmp_path):
    """The first learning rate makes the loss infinite."""
    study_file.write_text(STUDY.replace("[0.01, 0.03]", "[1.0e+30, 0.03]").replace("[0, 1]", "[0]"))
    study = load_study(study_file)
    outcome = train_all(study.runs, tmp_path / "out", jobs=2, device="cpu", console=QUIET)
    assert outcome.exit_code == 1
    assert outcome.finished == ["lr=0.03/seed-0"]
    assert "the loss is not finite" in outcome.failed["lr=1e+30/seed-0"]
    assert [has_diverged(tmp_path / "out" / run.name) for run in study.runs] == [True, False]
    assert "the loss is not finite" in (tmp_path / "out" / "logs" / "lr=1e+30--seed-0.log").read_text()
    assert json.loads((tmp_path / "out" / "lr=0.03" / "seed-0" / "summary.json").read_text())["seed"] == 0
