"""An optimizer of torch.optim for a network."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from certtrain.config.schema import OptimizerSection
from certtrain.errors import UsageError


def build_optimizer(section: OptimizerSection, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that `section` names, over all parameters of `model`.

    Raises:
        UsageError: torch refuses the arguments, or the optimizer the parameters.
    """
    optimizer = getattr(torch.optim, section.name)
    fused = {"fused": True} if "fused" in inspect.signature(optimizer).parameters else {}
    try:
        return optimizer(parameter_groups(section, model), lr=section.lr, **(fused | section.arguments))
    except (TypeError, ValueError) as error:
        raise UsageError(f"optimizer {section.name}: {error}") from error


def parameter_groups(section: OptimizerSection, model: nn.Module) -> list[dict[str, Any]]:
    """One group, or two: weights of products, and the vectors (BatchNorm's parameters, biases), which do not decay."""
    parameters = list(model.parameters())
    if section.decay_vectors:
        return [{"params": parameters}]
    weights, vectors = ([p for p in parameters if (p.dim() > 1) == is_weight] for is_weight in (True, False))
    return [{"params": weights}, {"params": vectors, "weight_decay": 0.0}]
