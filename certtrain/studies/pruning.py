"""Ending trials early, by bounds on validation images."""

from __future__ import annotations

from typing import Any

import torch

from certtrain.bounds import linf_box
from certtrain.bounds.margins import proved
from certtrain.config import Config
from certtrain.data import to_float
from certtrain.modules import device_of, evaluating
from certtrain.runs.build import load_data
from certtrain.training.trainer import EpochReport, Observer, Trainer
from certtrain.verification.verify import parts_of


class Pruner(Observer):
    """Reports IBP's verified error on the validation images after each epoch, at the full radius, to an Optuna trial.

    The radius is that of the test from the first epoch on, whatever warmup is at, so that epochs of all trials are
    comparable. `pruned`: the trial's pruner has ended the run.

    Args:
        warmup_epochs: before which no run is ended; None: until the run's own epsilon has grown.
    """

    def __init__(self, trial: Any, config: Config, warmup_epochs: int | None = None) -> None:
        self._trial, self._config = trial, config
        self._warmup_epochs = config.ramp_epochs[1] if warmup_epochs is None else warmup_epochs
        self._validation = load_data(config).test  # which the configuration puts there
        self.pruned = False

    def after_epoch(self, trainer: Trainer, report: EpochReport) -> bool:
        self._trial.report(self._verified_error(trainer), report.epoch)
        self.pruned = report.epoch >= self._warmup_epochs and self._trial.should_prune()
        return self.pruned

    @torch.no_grad()
    def _verified_error(self, trainer: Trainer) -> float:
        net, eps = trainer.gradient_step.net, self._config.judged_radius
        data = self._validation.to(device_of(trainer.model))
        missing = 0
        with evaluating(trainer.model):
            for _, part in parts_of(data, self._config.verification.batch_size):
                margins = net.margins(linf_box(to_float(part.images), eps), part.labels)
                missing += int((~proved(margins)).sum())
        return missing / len(data)
