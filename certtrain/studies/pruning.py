"""Ending trials early, by bounds on validation images."""

from __future__ import annotations

from statistics import median
from typing import Any

import torch

from certtrain.bounds import linf_box
from certtrain.bounds.margins import proved
from certtrain.config import Config
from certtrain.data import to_float
from certtrain.modules import device_of, evaluating
from certtrain.runs.build import load_data
from certtrain.studies.search import Pruning
from certtrain.training.trainer import EpochReport, Observer, Trainer


class Pruner(Observer):
    """Ends a trial that is behind the others by IBP's verified error on the validation images after an epoch.

    The radius is the one that trials are judged at from the first epoch on, whatever warmup is at, so that epochs of
    all trials are comparable. `pruned`: the run was ended so.

    Args:
        trial: of Optuna, which keeps the errors, and whose study has those of the others.
        config: of the trial.
    """

    def __init__(self, trial: Any, config: Config, pruning: Pruning) -> None:
        self._trial, self._config, self._startup_trials = trial, config, pruning.startup_trials
        asked = pruning.warmup_epochs
        self._warmup_epochs = config.ramp_epochs[1] if asked is None else asked
        self._validation = load_data(config).test  # which the configuration puts there
        self.pruned = False

    def after_epoch(self, trainer: Trainer, report: EpochReport) -> bool:
        error = self._verified_error(trainer)
        self._trial.report(error, report.epoch)
        self.pruned = report.epoch >= self._warmup_epochs and self._is_behind(error, report.epoch)
        return self.pruned

    def _is_behind(self, error: float, epoch: int) -> bool:
        """Whether it is above the median at that epoch of the trials that were trained to their end.

        Optuna's own pruner would ask for the least error of all epochs, and spare a trial that has got worse.
        """
        trials = self._trial.study.get_trials(deepcopy=False)
        complete = [trial.intermediate_values for trial in trials if trial.state.name == "COMPLETE"]
        others = [errors[epoch] for errors in complete if epoch in errors]
        return len(complete) >= self._startup_trials and bool(others) and error > median(others)

    @torch.no_grad()
    def _verified_error(self, trainer: Trainer) -> float:
        net, eps = trainer.gradient_step.net, self._config.judged_radius
        data = self._validation.to(device_of(trainer.model))
        missing = 0
        with evaluating(trainer.model):
            for part in data.parts(self._config.verification.batch_size):
                margins = net.margins(linf_box(to_float(part.images), eps), part.labels)
                missing += int((~proved(margins)).sum())
        return missing / len(data)
