"""What a run's configuration does not say of its schedules and its old images, since it comes from the runs before."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from certtrain.config import Config
from certtrain.config.schema import DataSection
from certtrain.errors import CheckpointError
from certtrain.runs.directory import epochs_of
from certtrain.runs.files import METRICS
from certtrain.runs.metrics import read_records
from certtrain.runs.state_rules import Misfit, anything, integer, record
from certtrain.schedules import SmoothedEpsilon


class OldData(BaseModel):
    """A run's data; seed: that run's, which decides what is held out."""

    model_config = ConfigDict(extra="forbid")

    data: DataSection
    seed: int

    @classmethod
    def of(cls, run: Config) -> OldData:
        return cls(data=run.data, seed=run.seed)


class Inheritance(BaseModel):
    """Of a run that began with another one; NOTHING of one that did not.

    initial: the radius that warmup begins at; at_once: there is no warmup.
    lr: what the learning rate is made of; None: optimizer.lr.
    old: whose training images are replayed where `replay` names no data; None: that is not known.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    initial: float = Field(0.0, ge=0, le=1)
    at_once: bool = False
    lr: float | None = Field(None, gt=0)
    old: OldData | None = None

    def ramp_epochs(self, config: Config) -> tuple[int, int]:
        """`config.ramp_epochs`, of a run that has inherited this."""
        return (0, 0) if self.at_once else config.ramp_epochs

    def radius(self, config: Config, steps_per_epoch: int) -> SmoothedEpsilon:
        """The radius that it is trained at, as a function of the step."""
        epsilon = config.epsilon
        begin, end = (epoch * steps_per_epoch for epoch in self.ramp_epochs(config))
        max_eps = epsilon.train_factor * epsilon.max
        return SmoothedEpsilon(max_eps, begin, end, epsilon.mid, epsilon.beta, self.initial)


NOTHING = Inheritance()


def last_radius(file: Path, state: Mapping[str, Any] | None, config: Config, inherited: Inheritance) -> float:
    """The radius that the weights in a run's `file` were last trained at.

    Args:
        state: what is in it, where it is a last.ckpt, which tells how far they were trained. Other weights are those
            after a last epoch: of what may have been written at another time only what never changes is looked at.
        config, inherited: the run's.

    Raises:
        CheckpointError: how many steps that were is not said.
    """
    if config.training.method.name == "natural":
        return 0.0
    if state is None:
        epochs, per_epoch = epochs_of(file, config.training.epochs), _steps_per_epoch(file.parent)
        if per_epoch is None:
            return inherited.radius(config, 1)(epochs)
        steps = epochs * per_epoch
    else:
        try:
            counts = {"step": integer(0), "steps_per_epoch": integer(1)}
            record({"trainer": record(counts, anything)}, anything)(state, "")
        except Misfit as misfit:
            raise CheckpointError(f"{file} does not say how far it was trained: {misfit}") from None
        steps, per_epoch = state["trainer"]["step"], state["trainer"]["steps_per_epoch"]
    return inherited.radius(config, per_epoch)(max(0, steps - 1))


def _steps_per_epoch(folder: Path) -> int | None:
    """Of the run in `folder`, from its first epoch's record, if there is one."""
    file = folder / METRICS
    records = read_records(file) if file.is_file() else []
    if not records:
        return None
    epoch, steps = records[0]["epoch"], records[0].get("step")
    if type(steps) is not int or epoch < 1 or steps < epoch:
        raise CheckpointError(f"{file} is missing or corrupt (the first line does not say after which step it was)")
    return steps // epoch
