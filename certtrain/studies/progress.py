"""How far the runs of a study are, told from their folders alone, whoever trains them; and a live table of it."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from certtrain.config.schema import MOST
from certtrain.runs.files import DIVERGED, METRICS, SUMMARY, is_finished
from certtrain.runs.lock import LOCK
from certtrain.runtime.console import clock, tell
from certtrain.runtime.files import is_number, parse_json
from certtrain.studies.design import PlannedRun, cells_of

TAIL = 1 << 16  # bytes at the end of metrics.jsonl in which the last epoch's record is looked for
REFRESH = 2.0  # seconds between two looks


@dataclass(frozen=True)
class Progress:
    """Of one run: epochs done of all, seconds of training so far, and once it is finished its summary."""

    name: str
    epochs_done: int
    epochs: int
    seconds: float
    summary: Mapping[str, Any] | None
    held: bool  # somebody is in the folder, or was killed there

    @property
    def finished(self) -> bool:
        return self.summary is not None


def look_at(run: PlannedRun, folder: Path) -> Progress:
    """How far `run` is in `folder`, its own; a file that cannot be read, or says nothing of it, counts as none."""
    summary, epochs = _json(folder / SUMMARY), run.config.training.epochs
    if summary is not None and not _within(summary.get("verified_error"), 1):
        summary = None
    record = _last_record(folder / METRICS)
    done, seconds = record.get("epoch", 0), record.get("seconds", 0.0)
    if not (isinstance(done, int) and _within(done, epochs) and _within(seconds, MOST)):
        done, seconds = 0, 0.0
    return Progress(run.name, done, epochs, seconds, summary, (folder / LOCK).exists())


def has_diverged(folder: Path) -> bool:
    """Whether the loss became NaN or infinite when the run was trained last."""
    return (folder / DIVERGED).is_file() and not is_finished(folder)


def time_left(progress: Sequence[Progress], jobs: int) -> float | None:
    """Seconds until all are trained, by `jobs` at a time; None as long as no epoch is over.

    An epoch of a cell costs what its own cost so far, or else what those of the others did on average.
    """
    cells: dict[str, list[Progress]] = {}
    for run in progress:
        cells.setdefault(run.name.rpartition("/")[0], []).append(run)
    pace = {name: _seconds_per_epoch(runs) for name, runs in cells.items()}
    known = [seconds for seconds in pace.values() if seconds is not None]
    if not known:
        return None
    average, total = sum(known) / len(known), 0.0
    for name, runs in cells.items():
        seconds = pace[name]
        left = sum(run.epochs - run.epochs_done for run in runs if not run.finished)
        total += left * (average if seconds is None else seconds)
    return total / jobs


def _seconds_per_epoch(runs: Sequence[Progress]) -> float | None:
    epochs = sum(run.epochs_done for run in runs)
    return sum(run.seconds for run in runs) / epochs if epochs else None


class Display:
    """A table of the cells that follows the folders on a terminal; elsewhere a line for each thing that happens."""

    def __init__(self, console: Console, runs: Sequence[PlannedRun], folder: Path, jobs: int) -> None:
        self._console, self._runs, self._folder, self._jobs = console, runs, folder, jobs
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._shown_at = 0.0

    def __enter__(self) -> Display:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def tell(self, line: str) -> None:
        tell(self._console, line)

    def show(self, running: Collection[str]) -> None:
        """Look again, if the last look was some seconds ago."""
        if self._console.is_terminal and time.monotonic() - self._shown_at >= REFRESH:
            self._live.update(self._table(running), refresh=True)
            self._shown_at = time.monotonic()

    def _table(self, running: Collection[str]) -> Table:
        progress = {run.name: look_at(run, self._folder / run.name) for run in self._runs}
        left = time_left(list(progress.values()), self._jobs)
        finished = sum(run.finished for run in progress.values())
        title = f"{finished} of {len(progress)} runs finished" + (f", {clock(left)} left" if left else "")
        table = Table(title=title)
        table.add_column("configuration")
        for column in ("finished", "running", "epochs", "verified error"):
            table.add_column(column, justify="right")
        for name, runs in cells_of(self._runs).items():
            of_cell = [progress[run.name] for run in runs]
            errors = [run.summary["verified_error"] for run in of_cell if run.summary]
            done, epochs = sum(run.epochs_done for run in of_cell), sum(run.epochs for run in of_cell)
            table.add_row(
                Text(name),
                f"{sum(run.finished for run in of_cell)}/{len(of_cell)}",
                str(sum(run.name in running or (run.held and not run.finished) for run in of_cell)),
                f"{done}/{epochs}",
                " ".join(f"{error:.2%}" for error in errors),
            )
        return table


def _within(value: Any, most: float) -> bool:
    """Whether it is a number from 0 to `most`."""
    return is_number(value) and 0 <= value <= most


def _json(file: Path) -> dict[str, Any] | None:
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _last_record(file: Path) -> dict[str, Any]:
    try:
        with open(file, "rb") as content:
            content.seek(max(0, content.seek(0, os.SEEK_END) - TAIL))
            lines = content.read().splitlines()
        record = parse_json(lines[-1]) if lines else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}
