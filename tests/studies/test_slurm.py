"""Jobs of a batch system, tried with submitit's own processes in its place."""

from __future__ import annotations

import os
import shutil
from contextlib import nullcontext
from dataclasses import replace

import pytest
import submitit
from submitit.local.local import LocalJob

from certtrain.errors import UsageError
from certtrain.studies.design import load_study
from certtrain.studies.runner import RunStates
from certtrain.studies.slurm import Worker, submit
from tests.studies.folders import pretend_finished


def test_jobs_work_in_the_study_s_folder_and_are_queued_again(study_file, tmp_path):
    study = load_study(study_file)
    pretend_finished(study, tmp_path / "out")
    with_parameters = replace(study, slurm={"timeout_min": 3})
    (number,) = submit(with_parameters, tmp_path / "out", 1, device="cpu", cluster="local")
    job = LocalJob(tmp_path / "out" / "logs" / "slurm", number)
    assert job.result() == 0, job.stderr()
    worker = Worker(study, tmp_path / "out", jobs=2, budget=None, device="cpu")
    again = worker.checkpoint()
    assert isinstance(again, submitit.helpers.DelayedSubmission)
    assert again.function is worker
    assert worker() == 0


@pytest.mark.parametrize(
    ("outcome", "code"),
    [
        (RunStates(), 0),
        (RunStates(elsewhere={"a/seed-0": "process 1"}), 75),
        (RunStates(left=["a/seed-0"]), 75),  # at the end of its budget
        (RunStates(failed={"a/seed-0": "exit code 1"}), None),
        (RunStates(left=["a/seed-0"], interrupted=True), None),
    ],
)
def test_a_job_that_failed_or_was_ended_has_no_result(study_file, tmp_path, monkeypatch, outcome, code):
    """Which would count as a success, after which a batch system does not try again."""
    monkeypatch.setattr("certtrain.studies.slurm.train_all", lambda *_, **__: outcome)
    worker = Worker(load_study(study_file), tmp_path, jobs=1, budget=None, device="cpu")
    with pytest.raises(RuntimeError) if code is None else nullcontext():
        assert worker() == code


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Programs of Slurm's names, of which sbatch keeps what is submitted."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in {"srun": "", "sbatch": f"cp $1 {tmp_path}/submitted; echo Submitted batch job 7"}.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return tmp_path / "submitted"


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
    ("parameters", "minutes", "times"),
    [
        ({}, 60, 10_000),
        ({"timeout_min": 240}, 240, 10_000),
        ({"slurm_time": 30, "slurm_max_num_timeout": 2}, 30, 2),
        ({"slurm_max_num_timeout": 0, "slurm_partition": "gpu"}, 60, 0),
    ],
)
def test_how_long_a_job_has_and_how_often_it_is_queued_again(
    study_file, tmp_path, slurm, count, parameters, minutes, times
):
    study = replace(load_study(study_file), slurm=parameters)
    assert len(submit(study, tmp_path / "out", count)) == count
    text = slurm.read_text()
    assert f"#SBATCH --time={minutes}\n" in text
    assert ("#SBATCH --partition=gpu\n" in text) == ("slurm_partition" in parameters)
    pickles = list((tmp_path / "out" / "logs" / "slurm").rglob("*_submitted.pkl"))
    assert len(pickles) == count
    for file in pickles:
        submission = submitit.core.utils.DelayedSubmission.load(file)
        assert (submission._timeout_min, submission._timeout_countdown) == (minutes, times)


@pytest.mark.parametrize("times", ["many", 1.5, None])
def test_how_often_is_a_whole_number(study_file, tmp_path, times):
    study = replace(load_study(study_file), slurm={"slurm_max_num_timeout": times})
    with pytest.raises(UsageError, match=r"slurm\.slurm_max_num_timeout: a whole number is expected"):
        submit(study, tmp_path / "out", 1, cluster="local")


def test_without_slurm_and_with_unknown_parameters_a_line_says_so(cli, study_file, tmp_path):
    study = replace(load_study(study_file), slurm={"no_such_parameter": 3})
    with pytest.raises(UsageError, match=r"submitit: .*no_such_parameter"):
        submit(study, tmp_path / "out", 1, cluster="local")
    if shutil.which("srun") is None:
        outcome = cli("study", study_file, "--out", tmp_path / "out", "--slurm", 2)
        assert (outcome.code, outcome.error.startswith("submitit: ")) == (2, True)
