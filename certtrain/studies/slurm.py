"""A study as jobs of the batch system Slurm, by submitit: each is one more machine at work in the study's folder."""

from __future__ import annotations

from pathlib import Path

from certtrain.errors import UsageError, optional_module, shortened
from certtrain.runtime.files import make_folder
from certtrain.studies.design import Study
from certtrain.studies.runner import train_all


class Worker:
    """What a job does: it trains whatever no other job is at, until nothing is left."""

    def __init__(self, study: Study, folder: Path, jobs: int, budget: float | None, device: str) -> None:
        self.study, self.folder, self.jobs, self.budget, self.device = study, folder, jobs, budget, device

    def __call__(self) -> int:
        outcome = train_all(self.study.runs, self.folder, jobs=self.jobs, budget=self.budget, device=self.device)
        if outcome.failed:
            raise RuntimeError("; ".join(f"{name}: {reason}" for name, reason in outcome.failed.items()))
        return outcome.exit_code

    def checkpoint(self) -> object:
        """Called by submitit when the job's time is over, or it is preempted: queue it again, to go on."""
        return optional_module("submitit", "slurm").helpers.DelayedSubmission(self)


def submit(
    study: Study,
    folder: Path,
    count: int,
    *,
    jobs: int = 1,
    budget: float | None = None,
    device: str = "auto",
    cluster: str = "slurm",
) -> list[str]:
    """Queue `count` jobs that train `study` in `folder`, which all their machines share.

    Args:
        jobs: processes at a time in each job.
        cluster: of submitit's AutoExecutor: "slurm", or "local" and "debug" for trying it out.

    Returns:
        The jobs' ids.

    Raises:
        UsageError: there is no Slurm here, or a parameter in the study's `slurm` that submitit does not know.
        MissingDependency: submitit is not installed.
    """
    submitit = optional_module("submitit", "slurm")
    make_folder(folder)
    try:
        executor = submitit.AutoExecutor(folder=folder.resolve() / "logs" / "slurm", cluster=cluster)
        executor.update_parameters(**{"name": folder.name, "cpus_per_task": jobs, **study.slurm})
        worker = Worker(study, folder.resolve(), jobs, budget, device)
        with executor.batch():
            submitted = [executor.submit(worker) for _ in range(count)]
    except (RuntimeError, ValueError, TypeError, NameError, OSError) as error:
        raise UsageError(f"submitit: {shortened(error, 240)}") from error
    return [str(job.job_id) for job in submitted]
