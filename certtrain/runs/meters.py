"""What a run measures of itself besides, where `metrics` asks for it; training is the same with and without."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from certtrain.runs.metrics import MetricsFile
from certtrain.training.adaptivity import step_statistics
from certtrain.training.layer_statistics import LayerStatistics, layer_statistics
from certtrain.training.step import SMALLEST_RADIUS
from certtrain.training.trainer import EpochReport, Trainer


class Meter:
    """Measures something; a subclass overrides what it needs. Nothing of it is in the checkpoint."""

    def after_step(self, trainer: Trainer, probe: Tensor) -> None:
        """`trainer.step` steps have been taken; probe: some training images (B, C, H, W)."""
        return

    def after_epoch(self, trainer: Trainer, report: EpochReport, layers: Sequence[LayerStatistics]) -> dict[str, Any]:
        """What is added to the record of an epoch that is over: numbers, or mappings of numbers by name."""
        return {}


class OptimizerMeter(Meter):
    """The optimizer's steps and dead ReLUs, after each epoch, and after each of the first steps in a file."""

    def __init__(self, file: Path, first_steps: int, done: int) -> None:
        self._first_steps = first_steps
        self._file = MetricsFile(file, done, "step") if first_steps else None

    def after_step(self, trainer: Trainer, probe: Tensor) -> None:
        if self._file is None or trainer.step > self._first_steps:
            return
        last = trainer.step - 1
        eps = trainer.eps(last)
        layers = layer_statistics(trainer.gradient_step.net, probe, max(eps, SMALLEST_RADIUS))
        self._file.add({"step": trainer.step, "eps": eps, "lr": trainer.lr(last), **_measured(trainer, layers)})

    def after_epoch(self, trainer: Trainer, report: EpochReport, layers: Sequence[LayerStatistics]) -> dict[str, Any]:
        return {"optimizer": _measured(trainer, layers)}


def _measured(trainer: Trainer, layers: Sequence[LayerStatistics]) -> dict[str, float | None]:
    dead = sum(layer.dead for layer in layers) / len(layers) if layers else 0.0
    return {**vars(step_statistics(trainer.optimizer)), "dead_relus": dead}
