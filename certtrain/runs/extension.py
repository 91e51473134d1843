"""A run that goes on for more epochs than it was started for: as if it had had them from the start, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from certtrain.config import Config
from certtrain.config.loading import load_config
from certtrain.data import Dataset
from certtrain.errors import UsageError
from certtrain.runs.build import compiles, learning_rate
from certtrain.runs.directory import set_aside
from certtrain.runs.files import CONFIG
from certtrain.runtime.files import write_text


def compiled_as(shorter: Config, longer: Config, model: nn.Module, dataset: Dataset) -> Config:
    """`longer`, with its step compiled if that of `shorter` is, and not otherwise: rounded the same."""
    compiled = compiles(shorter, model, dataset)
    if compiles(longer, model, dataset) == compiled:
        return longer
    return load_config(longer, {"training.compile": compiled})


def require_same_past(shorter: Config, longer: Config, steps: int, steps_per_epoch: int) -> None:
    """What of a run depends on its length is the learning rate, where its schedule ends with the run.

    Raises:
        UsageError: the `steps` taken by a run of `shorter` would have been others in a run of `longer`.
    """
    before, after = (learning_rate(config, steps_per_epoch) for config in (shorter, longer))
    if any(before(step) != after(step) for step in range(steps)):
        raise UsageError(
            f"training.epochs is {shorter.training.epochs} there, {longer.training.epochs} here: with so many, "
            f"optimizer.schedule {longer.optimizer.schedule.name} would have given the steps that were taken another "
            "learning rate; train anew with --out"
        )


def extend(
    folder: Path, shorter: Config, longer: Config, steps: int, steps_per_epoch: int, tell: Callable[[str], None]
) -> None:
    """Make the run in `folder`, which was of `shorter`, one of `longer`, and say what that changes."""
    epochs = shorter.training.epochs
    kept = set_aside(folder, epochs)
    write_text(folder / CONFIG, longer.to_yaml())
    tell(f"training.epochs is {longer.training.epochs} from now on, instead of {epochs}")
    if kept:
        tell(f"what there is of the network after {epochs} epochs is kept: {', '.join(kept)}")
    before, after = (learning_rate(config, steps_per_epoch) for config in (shorter, longer))
    if any(before(step) != after(step) for step in range(steps, epochs * steps_per_epoch)):
        tell(f"the learning rate falls as in a run of {longer.training.epochs} epochs")
    if shorter.training.compile != longer.training.compile:
        how = "compiled" if longer.training.compile else "not compiled"
        tell(f"the step stays {how}, as it was: training.compile is {str(longer.training.compile).lower()} from now on")
