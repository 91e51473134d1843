"""The observers of a run: the first process saves, logs and shows; each listens for signals."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from torch import Tensor

from certtrain.errors import READER_LEFT, DivergedError
from certtrain.runs.checkpoint import save_checkpoint
from certtrain.runs.files import CHECKPOINT, METRICS, TENSORBOARD
from certtrain.runs.lock import Claim
from certtrain.runs.meters import Meter
from certtrain.runs.metrics import MetricsFile
from certtrain.runs.progress import ProgressDisplay, TensorBoard, epoch_record
from certtrain.runs.state import run_state
from certtrain.runtime.distributed import Ranks
from certtrain.training.layer_statistics import layer_statistics
from certtrain.training.step import SMALLEST_RADIUS
from certtrain.training.trainer import EpochReport, Observer, Trainer

PROBE_IMAGES = 256  # of the training set, on which each layer's statistics are taken
CALLBACK = 1  # ended the run, in the place of a signal's number: less than those of the signals that do


class Follower:
    """Calls `callbacks`, and ends the run when one of them says so or a signal has come, on this rank or another.

    All ranks end after the same step. What every process but the first does, and nothing else.
    """

    def __init__(self, ranks: Ranks, callbacks: Sequence[Observer] = ()) -> None:
        self._ranks, self._callbacks = ranks, callbacks
        self._noted, self._ended_by_callback = 0, False
        self.signal: int | None = None

    def after_step(self, trainer: Trainer) -> bool:
        self._ended_by_callback |= any([callback.after_step(trainer) for callback in self._callbacks])
        within_epoch = trainer.step % trainer.steps_per_epoch != 0  # at its end, after_epoch ends the run
        return self._ended() and within_epoch

    def after_epoch(self, trainer: Trainer, report: EpochReport) -> bool:
        self._ended_by_callback |= any([callback.after_epoch(trainer, report) for callback in self._callbacks])
        return self._ended()

    def save(self, trainer: Trainer) -> None:
        """The first process does."""

    def _ended(self) -> bool:
        reason = self._ranks.all_reduce_max(self._noted or (CALLBACK if self._ended_by_callback else 0))
        self.signal = reason if reason > CALLBACK else None
        return reason > 0

    @contextmanager
    def until_signalled(self) -> Iterator[None]:
        """Let SIGINT or SIGTERM end the run after the present step; after it, a second Ctrl-C acts as usual.

        Further SIGTERMs do nothing: batch systems and supervisors send one to each process of a tree, whose parents
        pass it on, and SIGKILL to whoever takes too long.
        """

        def note(number: int, frame: FrameType | None) -> None:
            self._noted = number
            signal.signal(signal.SIGINT, previous[signal.SIGINT])

        previous = {}
        try:
            for name in (signal.SIGINT, signal.SIGTERM):
                previous[name] = signal.signal(name, note)
        except ValueError:  # not the main thread: whoever called handles signals
            pass
        try:
            yield
        finally:
            for name, handler in previous.items():
                signal.signal(name, handler)


class Recorder(Follower):
    """The first process's observer: saves, logs and shows besides."""

    def __init__(
        self,
        claim: Claim,
        checkpoint_seconds: float,
        trainer: Trainer,
        probe: Tensor,
        display: ProgressDisplay,
        ranks: Ranks,
        seconds_before: float = 0.0,
        callbacks: Sequence[Observer] = (),
        meters: Sequence[Meter] = (),
    ) -> None:
        super().__init__(ranks, callbacks)
        self._meters = meters
        self._claim, self._display = claim, display
        self._checkpoint_seconds = checkpoint_seconds
        self._metrics = MetricsFile(claim.folder / METRICS, trainer.epoch)
        self._tensorboard = TensorBoard(claim.folder / TENSORBOARD, trainer.epoch)
        self._probe = probe[:PROBE_IMAGES]
        self._seconds_before, self._started = seconds_before, time.monotonic()
        self._saved_at = self._started
        self.images_per_second = self._metrics.last.get("images_per_second", 0.0)

    @property
    def seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._started

    @property
    def _unsaved_seconds(self) -> float:
        return time.monotonic() - self._saved_at

    def after_step(self, trainer: Trainer) -> bool:
        if self._meters:
            self._claim.require()
        for meter in self._meters:
            meter.after_step(trainer, self._probe)
        self._show(self._display.after_step, trainer)
        if trainer.step % trainer.steps_per_epoch and 0 < self._checkpoint_seconds <= self._unsaved_seconds:
            with suppress(DivergedError):  # the epoch's end says so, in all processes
                trainer.check_finite()
                self.save(trainer)
        return super().after_step(trainer)

    def _show(self, show: Callable[[Any], None], what: Any) -> None:
        """A reader who has left ends the run as a signal does, SIGPIPE in its name: it is saved."""
        try:
            show(what)
        except (BrokenPipeError, SystemExit):  # the latter is what rich's own consoles raise
            self._noted = READER_LEFT

    def after_epoch(self, trainer: Trainer, report: EpochReport) -> bool:
        self.images_per_second = report.images_per_second
        layers = layer_statistics(trainer.gradient_step.net, self._probe, max(report.eps, SMALLEST_RADIUS))
        record = epoch_record(report, layers, self.seconds)
        for meter in self._meters:
            record |= meter.after_epoch(trainer, report, layers)
        self._claim.require()
        self._metrics.add(record)
        self._tensorboard.add(record)
        self._show(self._display.after_epoch, report)
        if self._unsaved_seconds >= self._checkpoint_seconds:
            self.save(trainer)
        return super().after_epoch(trainer, report)

    def save(self, trainer: Trainer) -> None:
        self._claim.require()
        save_checkpoint(self._claim.folder / CHECKPOINT, run_state(trainer, self.seconds))
        self._saved_at = time.monotonic()
