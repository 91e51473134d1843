"""A study as jobs of the batch system Slurm, by submitit: each is one more machine at work in the study's folder."""

from __future__ import annotations

from pathlib import Path

from certtrain.errors import UsageError, optional_module, shortened, shown
from certtrain.runtime.files import make_folder
from certtrain.studies.design import Study
from certtrain.studies.runner import train_all

TIMES = "slurm_max_num_timeout"  # how often a job whose time is over is queued again
DEFAULTS = {"timeout_min": 60, TIMES: 10_000}  # submitit's own are 5 and 3


class Worker:
    """What a job does: it trains whatever no other job is at, until nothing is left.

    SIGTERM is left to submitit, which does not heed it: a job that ended by it would be over, while one that is killed
    in the end is queued again by Slurm where that preempts it, and not where somebody cancels it.
    """

    def __init__(self, study: Study, folder: Path, jobs: int, budget: float | None, device: str) -> None:
        self.study, self.folder, self.jobs, self.budget, self.device = study, folder, jobs, budget, device

    def __call__(self) -> int:
        """The exit code of `RunStates`: 75 where others are at the rest, or the budget is spent.

        Raises:
            RuntimeError: runs have failed, or somebody ended the job: a result would count as a success.
        """
        outcome = train_all(self.study.runs, self.folder, jobs=self.jobs, budget=self.budget, device=self.device)
        if outcome.failed:
            raise RuntimeError("; ".join(f"{name}: {reason}" for name, reason in outcome.failed.items()))
        if outcome.interrupted:
            raise RuntimeError("ended by a signal: what was under way is saved, and the same study goes on with it")
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
    parameters = {"name": folder.name, "cpus_per_task": jobs, **DEFAULTS, **study.slurm}
    if not isinstance(times := parameters.pop(TIMES), int):
        raise UsageError(f"slurm.{TIMES}: a whole number is expected (got {shown(times)})")
    try:
        place = folder.resolve() / "logs" / "slurm"
        executor = submitit.AutoExecutor(place, cluster, **{TIMES: times})  # which it takes here alone
        executor.update_parameters(**parameters)
        worker = Worker(study, folder.resolve(), jobs, budget, device)
        with executor.batch():
            submitted = [executor.submit(worker) for _ in range(count)]
    except (RuntimeError, ValueError, TypeError, NameError, OSError) as error:
        raise UsageError(f"submitit: {shortened(error, 240)}") from error
    return [str(job.job_id) for job in submitted]
