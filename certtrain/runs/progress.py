"""What a run tells while it goes: metrics.jsonl, TensorBoard, and a progress bar or plain lines."""

from __future__ import annotations

import os
import platform
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from certtrain.errors import CheckpointError
from certtrain.runtime.console import clock
from certtrain.training.layer_statistics import LayerStatistics
from certtrain.training.trainer import EpochReport, Trainer
from certtrain.verification.results import ImageResult
from certtrain.verification.verdicts import GAVE_UP, Verdict


class TensorBoard:
    """The same numbers, and every layer's, as TensorBoard scalars over epochs.

    Written without torch's SummaryWriter, whose thread keeps epochs back that a kill then loses, and which prints a
    traceback of its own when the disk is full. A file of one's own per process; a resumed run tells TensorBoard to
    forget the epochs that it will train again.
    """

    def __init__(self, folder: Path, keep_epochs: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        self._started = max(time.time(), self._latest(folder) + 1e-6)
        self._file = folder / f"events.out.tfevents.{self._started:.6f}.{platform.node()}.{os.getpid()}"
        start = SessionLog(status=SessionLog.START)
        self._append(Event(file_version="brain.Event:2"), Event(step=keep_epochs + 1, session_log=start))

    @staticmethod
    def _latest(folder: Path) -> float:
        """The time in the last file's name: TensorBoard reads them by name, also where the clock was set back."""
        stamps = (re.match(r"events\.out\.tfevents\.(\d{1,12}(\.\d+)?)", file.name) for file in folder.glob("events.*"))
        return max((float(stamp[1]) for stamp in stamps if stamp), default=0.0)

    def add(self, record: dict[str, Any]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        scalars = {f"train/{k}": v for k, v in record.items() if isinstance(v, int | float) and k != "epoch"}
        for group, values in record.items():
            if isinstance(values, dict):
                scalars |= {f"{group}/{name}": value for name, value in values.items() if value is not None}
        for number, layer in enumerate(record["layers"], start=1):
            scalars |= {f"relu{number}/{name}": value for name, value in layer.items()}
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()])
        self._append(Event(step=record["epoch"], summary=summary))

    def _append(self, *events: Any) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        try:
            self._file.parent.mkdir(exist_ok=True)
            with open(self._file, "ab") as file:
                for event in events:
                    event.wall_time = max(time.time(), self._started)
                    RecordWriter(file).write(event.SerializeToString())
        except OSError as error:
            raise CheckpointError(f"could not write {self._file}: {error}") from error


def epoch_record(report: EpochReport, layers: list[LayerStatistics], seconds: float) -> dict[str, Any]:
    """`seconds`: of training until now, those before an interruption included."""
    return {
        "epoch": report.epoch,
        "step": report.step,
        "eps": report.eps,
        "lr": report.lr,
        **report.metrics,
        "images_per_second": round(report.images_per_second, 1),
        "seconds": round(seconds, 2),
        "layers": [vars(layer) for layer in layers],
    }


class ProgressDisplay:
    """A bar with the time remaining on a terminal, a line per epoch elsewhere. Use as a context manager."""

    def __init__(self, console: Console, total_steps: int, epochs: int, done: int = 0) -> None:
        self._console, self._epochs = console, epochs
        self._started, self._steps_before, self._total = time.monotonic(), done, total_steps
        self._bar = _bar(console)
        self._said_compiling = False
        self._task = self._bar.add_task("starting", total=total_steps, completed=done)

    def __enter__(self) -> ProgressDisplay:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def after_step(self, trainer: Trainer) -> None:
        if not self._bar.disable:
            epoch = min(trainer.epoch + 1, self._epochs)
            self._bar.update(self._task, completed=trainer.step, description=f"epoch {epoch}/{self._epochs}")

    def compiling(self) -> None:
        """The step is being compiled, while nothing else would be told; the next step takes the word away."""
        if self._bar.disable and not self._said_compiling:
            self._console.print("compiling the training step, a minute or two; later runs find it on disk")
        self._said_compiling = True
        self._bar.update(self._task, description="compiling the step")

    def compiled(self) -> None:
        self._bar.update(self._task, description="training")

    def after_epoch(self, report: EpochReport) -> None:
        m = report.metrics
        names = [name for name in ("natural", "adversarial", "robust", "verified") if f"{name}_error" in m]
        errors = [f"{name} {m[f'{name}_error']:7.2%}" for name in names]
        parts = [
            f"epoch {report.epoch:>{len(str(self._epochs))}}/{self._epochs}",
            f"eps {report.eps:.5f}",
            f"loss {m['loss']:.4f}",
            *errors,
            f"{report.images_per_second:.0f} images/s",
            f"{self._remaining(report.step)} left",
        ]
        self._console.print("  ".join(parts), highlight=False, soft_wrap=True)

    def _remaining(self, step: int) -> str:
        pace = (time.monotonic() - self._started) / max(1, step - self._steps_before)
        return clock(pace * (self._total - step))


class VerificationDisplay:
    """How many images are done, proved and attacked, and the time left, on a terminal. A context manager."""

    def __init__(self, console: Console) -> None:
        self.done = 0
        self._verdicts: Counter[Verdict] = Counter()
        self._bar = _bar(console)
        self._task = self._bar.add_task("verifying", total=None)

    def __enter__(self) -> VerificationDisplay:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def add(self, result: ImageResult, total: int) -> None:
        self.done += 1
        verdict = Verdict(result.verdict)
        self._verdicts[Verdict.UNKNOWN if verdict in GAVE_UP else verdict] += 1
        shown = (Verdict.PROVED, Verdict.ATTACKED, Verdict.UNKNOWN)
        counts = "  ".join(f"{self._verdicts[verdict]} {verdict}" for verdict in shown)
        self._bar.update(self._task, completed=self.done, total=total, description=counts)


def _bar(console: Console) -> Progress:
    """Nothing where the console is no terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
