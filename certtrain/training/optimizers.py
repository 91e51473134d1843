"""An optimizer of torch.optim for a network, and its learning rate."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from certtrain.config.arguments import optimizer_arguments
from certtrain.config.schedules import (
    CooldownSection,
    CosineSection,
    InfiniteSection,
    InverseRootSection,
    LinearSection,
    ScheduleSection,
)
from certtrain.config.schema import OptimizerSection
from certtrain.errors import UsageError, shortened
from certtrain.schedules import Cooldown, Cosine, Infinite, InverseRoot, LearningRate, Linear, Shape, constant
from certtrain.training.muon import MuonWithAdamW, groups_for_muon


def build_optimizer(section: OptimizerSection, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that `section` names, over all parameters of `model`.

    Raises:
        UsageError: torch refuses the arguments, or the optimizer the parameters.
    """
    optimizer = getattr(torch.optim, section.name, None)
    if optimizer is None:
        raise UsageError(f"optimizer.name: torch {torch.__version__} has no {section.name}")
    arguments, groups = optimizer_arguments(optimizer, section.arguments), parameter_groups(section, model)
    if section.name == "Muon":
        optimizer, groups = MuonWithAdamW, groups_for_muon(groups, model)
    try:
        built = optimizer(groups, lr=section.lr, **arguments)
        kept_after_a_step(built)  # some check their arguments only there
        return built
    except (TypeError, ValueError, RuntimeError) as error:
        reason = shortened(str(error).partition("\n")[0], 160)
        raise UsageError(f"optimizer.arguments: {section.name}: {reason}") from error


def kept_after_a_step(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What it keeps of each parameter, by a step of its like without gradient: that is up to class and settings."""
    groups = [
        {**group, "params": [torch.zeros_like(p, requires_grad=True) for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    parameters = [parameter for group in groups for parameter in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    trial = type(optimizer)(groups)  # type: ignore[call-arg] # every subclass has defaults
    trial.step()
    return [trial.state[parameter] for parameter in parameters]


def parameter_groups(section: OptimizerSection, model: nn.Module) -> list[dict[str, Any]]:
    """One group, or two where vectors (BatchNorm's parameters, biases) are treated otherwise than weights.

    A group's `rate_factor` is for who sets its learning rate.
    """
    parameters = list(model.parameters())
    if section.decay_vectors and section.vector_factor == 1:
        return [{"params": parameters}]
    weights, vectors = ([p for p in parameters if (p.dim() > 1) == is_weight] for is_weight in (True, False))
    decay = {} if section.decay_vectors else {"weight_decay": 0.0}
    return [{"params": weights}, {"params": vectors, "rate_factor": section.vector_factor, **decay}]


def build_rate(section: OptimizerSection, steps_per_epoch: int, epochs: int, ramp_end: int) -> LearningRate:
    """The learning rate as a function of the step; ramp_end: the step at which epsilon has stopped growing."""
    first = ramp_end if section.milestones_from == "ramp" else 0
    warmup = round(section.warmup_epochs * steps_per_epoch)
    return LearningRate(
        section.lr,
        [first + epoch * steps_per_epoch for epoch in section.milestones],
        section.factor,
        warmup,
        build_shape(section.schedule, steps_per_epoch, epochs * steps_per_epoch - warmup),
        section.warmup_start,
    )


def build_shape(section: ScheduleSection, steps_per_epoch: int, steps: int) -> Shape:
    """The shape that `section` describes, of so many steps."""
    match section:
        case LinearSection():
            return Linear(steps, section.final)
        case CosineSection():
            return Cosine(steps, section.final)
        case InverseRootSection():
            return InverseRoot(max(1, round(section.timescale_epochs * steps_per_epoch)))
        case CooldownSection():
            return Cooldown(steps, round(section.length * steps), section.final)
        case InfiniteSection():
            decay, length = round(section.decay_epochs * steps_per_epoch), round(section.length * steps)
            return Infinite(steps, decay, section.level, length, section.final)
    return constant
