"""Training all the runs of a study, by several processes and several machines that share a folder."""

from __future__ import annotations

import signal
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from certtrain.config import Config
from certtrain.errors import NOT_OVER, CheckpointError, DivergedError, UsageError, lines_of
from certtrain.runs.directory import differences, stored_config
from certtrain.runs.files import CHECKPOINT, CONFIG, DIVERGED, is_finished
from certtrain.runs.lock import can_lock, holder
from certtrain.runtime.files import make_folder, write_json
from certtrain.studies.design import PlannedRun
from certtrain.studies.processes import Deadline, Ended, Processes
from certtrain.studies.progress import Display

LOOK_EVERY = 1.0  # seconds


@dataclass
class RunStates:
    """What has become of the runs, by name: each is in one of these.

    finished: by this call or before; failed: with the reason; elsewhere: who is at work in it; left: the time was up,
    or somebody ended it, and the same call goes on.
    """

    finished: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    elsewhere: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    interrupted: bool = False

    @property
    def exit_code(self) -> int:
        """0 where all are finished, 1 where one failed, 130 after Ctrl-C, 75 where the same command may go on."""
        if self.failed:
            return 1
        return 128 + signal.SIGINT if self.interrupted else NOT_OVER if self.left or self.elsewhere else 0


def require_fit(runs: Sequence[PlannedRun], folder: Path, free: Collection[str] = ()) -> list[str]:
    """What was trained before must be what the study says now.

    Args:
        free: keys that may differ.

    Returns:
        The folders of finished or unfinished runs that the study no longer names.

    Raises:
        UsageError: a line for each run that no longer fits, with the values that differ.
    """
    wrong = []
    for run in runs:
        if not (folder / run.name / CONFIG).exists():
            continue
        try:
            changes = differences(stored_config(folder / run.name), run.config)
        except CheckpointError as error:
            wrong.append(str(error))
            continue
        if different := [text for key, text in changes.items() if key not in free]:
            wrong.append(f"{folder / run.name} no longer fits the study: {'; '.join(different)}")
    if wrong:
        remedy = f"{len(wrong)} of {len(runs)} runs: undo the change, move these folders away, or name another --out"
        raise UsageError(lines_of("\n".join([*wrong[:15], remedy])))
    named = {(folder / run.name).resolve() for run in runs}
    return sorted(
        str(file.parent.relative_to(folder))
        for file in folder.glob(f"*/seed-*/{CONFIG}")
        if file.parent.resolve() not in named
    )


def train_all(
    runs: Sequence[PlannedRun],
    folder: Path,
    *,
    jobs: int = 1,
    budget: float | None = None,
    device: str = "auto",
    console: Console | None = None,
) -> RunStates:
    """Train every run that is not finished, each in its own folder below `folder`, or go on with it.

    Any number of such calls, here and on other machines, may work on one folder: each run has one process at a time, by
    the lock on its folder, which ends with the process that holds it. A call that finds nothing left but what others
    are training returns.

    Args:
        jobs: processes at a time, which share the cores and the GPUs.
        budget: seconds after which this call has ended, unfinished runs saved.
        console: where progress goes.

    Raises:
        UsageError: runs in `folder` have another configuration.
    """
    deadline = Deadline.after(budget)
    console = console or Console()
    make_folder(folder)
    outcome = RunStates()
    with (
        Display(console, runs, folder, jobs) as display,
        Processes(jobs, device, folder / "logs", deadline.reserve) as processes,
        interruptible(),
    ):
        for stranger in require_fit(runs, folder):
            display.tell(f"{folder / stranger} is not among the runs of this call: it stays, and is not counted")
        if not can_lock(folder):
            display.tell(
                f"{folder} is on a file system without locks: nothing keeps two processes out of one run; "
                "let one machine work on it"
            )
        try:
            while not deadline.passed:
                _start_what_can_be(runs, folder, processes, outcome, display)
                if not processes.names:
                    break
                for ended in processes.wait(LOOK_EVERY):
                    _note(ended, folder, outcome, display)
                display.show(processes.names)
        except KeyboardInterrupt:
            outcome.interrupted = True
            display.tell("ending: what is under way is being saved")
        for ended in processes.end():
            _note(ended, folder, outcome, display)
    outcome.finished = [run.name for run in runs if is_finished(folder / run.name)]
    for run in runs:
        if run.name not in outcome.finished and run.name not in outcome.failed:
            who = holder(folder / run.name)
            outcome.left += [run.name] if who is None else []
            outcome.elsewhere |= {} if who is None else {run.name: who}
    return outcome


def _start_what_can_be(
    runs: Sequence[PlannedRun], folder: Path, processes: Processes, outcome: RunStates, display: Display
) -> None:
    """Asked anew each time: another machine may have finished a run, or have died in it."""
    for run in runs:
        if not processes.free:
            return
        place = folder / run.name
        started = run.name in processes.names or run.name in outcome.failed
        if started or is_finished(place) or holder(place) is not None:
            continue
        display.tell(f"{run.name}: {'goes on' if (place / CHECKPOINT).exists() else 'starts'}")
        processes.start(run.name, train_run, run.config, place)


def _note(ended: Ended, folder: Path, outcome: RunStates, display: Display) -> None:
    if is_finished(folder / ended.name):
        display.tell(f"{ended.name}: finished")
    elif not ended.resumable:
        log = folder / "logs" / f"{ended.name.replace('/', '--')}.log"
        outcome.failed[ended.name] = ended.reason
        display.tell(f"{ended.name}: failed: {ended.reason} ({log})")


@contextmanager
def interruptible() -> Iterator[None]:
    """What a batch system sends before it kills is answered as Ctrl-C is, unless the caller answers or ignores it."""
    changed = False
    with suppress(ValueError):  # not the main thread
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            changed = True
    try:
        yield
    finally:
        if changed:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def train_run(config: Config, folder: Path, device: str) -> int:
    """In a process of its own: train the run, or go on with it; the exit code.

    Raises:
        DivergedError: the folder says so, too.
    """
    from certtrain.runs.train import train

    (folder / DIVERGED).unlink(missing_ok=True)
    try:
        run = train(config, folder, resume=True, device=device, console=Console(width=120))
    except DivergedError as error:
        write_json(folder / DIVERGED, {"eps": error.eps, "message": str(error)})
        raise
    return 0 if run.summary is not None else 128 + (run.interrupted_by or 0)
