"""Jobs of a batch system, tried with submitit's own processes in its place."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import submitit
from submitit.local.local import LocalJob

from certtrain.errors import UsageError
from certtrain.studies.design import load_study
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


def test_without_slurm_and_with_unknown_parameters_a_line_says_so(cli, study_file, tmp_path):
    study = replace(load_study(study_file), slurm={"no_such_parameter": 3})
    with pytest.raises(UsageError, match=r"submitit: .*no_such_parameter"):
        submit(study, tmp_path / "out", 1, cluster="local")
    if shutil.which("srun") is None:
        outcome = cli("study", study_file, "--out", tmp_path / "out", "--slurm", 2)
        assert (outcome.code, outcome.error.startswith("submitit: ")) == (2, True)
