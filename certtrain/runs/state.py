"""What a resume point must hold: the state that the trainer which is to continue it would itself save."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from certtrain.errors import CheckpointError, one_line
from certtrain.modules import device_of
from certtrain.runs.checkpoint import require_same_shapes
from certtrain.runs.provenance import processor
from certtrain.runs.state_rules import (
    Misfit,
    Rule,
    anything,
    integer,
    like,
    list_of,
    mapping_to,
    number,
    optional,
    record,
    require,
    sequence,
    short_text,
    tensor,
)
from certtrain.training.optimizers import kept_after_a_step
from certtrain.training.trainer import Trainer

MOST_THREADS = 1024


def run_state(trainer: Trainer, seconds: float) -> dict[str, Any]:
    """The resume point of a run that has trained for so many seconds."""
    return {
        "trainer": trainer.state_dict(),
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        "computed_by": computed_by(trainer),
    }


def computed_by(trainer: Trainer) -> str:
    """What besides the number of threads decides how its sums are rounded."""
    return f"PyTorch {torch.__version__} on {processor(device_of(trainer.model))}"


def check_state(state: Any, trainer: Trainer, source: Path) -> None:
    """Compare `state`, whose tensors may be on the meta device, with what `trainer` would save.

    Raises:
        CheckpointError: a key is missing or unknown, or a value is of another type, dtype or shape.
    """
    try:
        weights = {"model": anything, "steps_per_epoch": integer(1)}
        record({"trainer": record(weights, others=anything)}, others=anything)(state, "")
        record({}, others=anything)(state["trainer"]["model"], "trainer.model")
        require_same_shapes(trainer.model.state_dict(), state["trainer"]["model"], source)
        if state["trainer"]["steps_per_epoch"] != trainer.steps_per_epoch:
            raise CheckpointError(
                f"{source} was saved with {state['trainer']['steps_per_epoch']} steps per epoch, "
                f"the training set now gives {trainer.steps_per_epoch}: the data has changed"
            )
        _expected(trainer)(state, "")
    except Misfit as misfit:
        raise CheckpointError(f"{source} does not fit this run: {misfit}") from None


def continue_from(state: Mapping[str, Any], trainer: Trainer, source: Path) -> None:
    """Load a checked state into `trainer`.

    The optimizer's settings remain the trainer's own, which follow from the configuration; what it keeps of a parameter
    is laid out in memory as the parameter is, which its fused kernels take for granted.

    Raises:
        CheckpointError: torch does not take it, such as a state of the random numbers that is none.
    """
    saved = state["trainer"]
    try:
        trainer.load_state_dict({**saved, "optimizer": _optimizer_state(trainer.optimizer, saved["optimizer"])})
    except RuntimeError as error:
        raise CheckpointError(f"{source} does not fit this run: {one_line(error)}") from error


def check_optimizer(state: Any, trainer: Trainer, without: Collection[str], source: Path) -> None:
    """Compare the optimizer's state in `state`, of another run, with what that of `trainer` would be.

    Args:
        without: names of parameters of which nothing will be taken.

    Raises:
        CheckpointError: it is that of another optimizer, or of other parameters.
    """
    try:
        record({"trainer": record({"optimizer": record({"state": anything}, anything)}, anything)}, anything)(state, "")
        _optimizer(trainer.optimizer)(_lacking(state["trainer"]["optimizer"], trainer, without), "optimizer")
    except Misfit as misfit:
        raise CheckpointError(
            f"start_from: the optimizer's state in {source} does not fit this run: {misfit}; configure the same "
            "optimizer, or keep weights alone"
        ) from None


def take_optimizer(state: Mapping[str, Any], trainer: Trainer, without: Collection[str]) -> None:
    """Load the optimizer's state of a checked `state` but for some parameters; the settings remain the trainer's."""
    saved = _lacking(state["trainer"]["optimizer"], trainer, without)
    trainer.optimizer.load_state_dict(_optimizer_state(trainer.optimizer, saved))


def _lacking(saved: Mapping[str, Any], trainer: Trainer, without: Collection[str]) -> dict[str, Any]:
    """The optimizer's state without that of the parameters named `without`."""
    left_out = {id(parameter) for name, parameter in trainer.model.named_parameters() if name in without}
    parameters = [parameter for group in trainer.optimizer.param_groups for parameter in group["params"]]
    indices = {index for index, parameter in enumerate(parameters) if id(parameter) in left_out}
    kept = saved["state"]
    if isinstance(kept, Mapping):
        kept = {index: values for index, values in kept.items() if index not in indices}
    return {**saved, "state": kept}


def _optimizer_state(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> dict[str, Any]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kept = {
        index: {name: _laid_out_as(parameters[index], value) for name, value in values.items()}
        for index, values in saved["state"].items()
    }
    return {"state": kept, "param_groups": optimizer.state_dict()["param_groups"]}


def _laid_out_as(parameter: Tensor, value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.dim() or value.shape != parameter.shape:
        return value
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def _expected(trainer: Trainer) -> Rule:
    fields = {key: like(value) for key, value in trainer.state_dict().items()}
    byte_states = list_of(tensor(torch.uint8, dimensions=1))
    fields |= {
        "step": integer(0, trainer.total_steps),
        "optimizer": _optimizer(trainer.optimizer),
        "sums": record(
            {
                "values": mapping_to(tensor(dimensions=0)),
                "weights": mapping_to(integer(0)),
                "first_bad_step": optional(tensor(dimensions=0)),
            }
        ),
        "random": record({"cpu": like(torch.get_rng_state()), "cuda": byte_states}),
    }
    run = {"trainer": record(fields), "seconds": number(), "threads": integer(1, MOST_THREADS)}
    return record(run, absent={"computed_by": short_text()})


def _optimizer(optimizer: torch.optim.Optimizer) -> Rule:
    """Of each parameter nothing yet, or what this optimizer keeps of it after a step."""
    groups = optimizer.state_dict()["param_groups"]
    kept = {index: like(fields) for index, fields in enumerate(kept_after_a_step(optimizer))}

    def state(value: Any, where: str) -> None:
        require(isinstance(value, dict), where, "is not a mapping", value)
        for index, fields in value.items():
            require(isinstance(index, int) and index in kept, where, f"has an unknown parameter {index!r:.40}")
            if fields != {}:
                kept[index](fields, f"{where}.{index}")

    def param_groups(value: Any, where: str) -> None:
        require(isinstance(value, list) and len(value) == len(groups), where, f"are not {len(groups)}")
        for position, (group, own) in enumerate(zip(value, groups, strict=True)):
            indices = sequence([integer(index, index) for index in own["params"]])
            record({"params": indices}, others=anything)(group, f"{where}.{position}")

    return record({"state": state, "param_groups": param_groups})
