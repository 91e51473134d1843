"""The floating-point operations of a run: every multiply-accumulate of clean pass, bounds and backward, twice."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from certtrain.affine_layers import classifier_tensors
from certtrain.bounds import BoundedModel
from certtrain.config import Config
from certtrain.config.methods import MethodSection
from certtrain.models import build_model
from certtrain.training.cost import clean_macs, step_macs
from certtrain.training.method import Phase
from certtrain.training.methods import build_method
from certtrain.training.regularization import Regularization
from certtrain.training.step import GradientStep

PER_MAC = 2  # a multiplication and an addition


@dataclass(frozen=True)
class Counter:
    """Counts runs on a data set of so many training images of shape (C, H, W)."""

    images: int
    image_shape: tuple[int, int, int]
    classes: int

    def __call__(self, config: Config, last_layer: bool = True) -> float:
        """Operations of all steps of the run.

        Args:
            last_layer: whether those of the classifier count, in proportion to its share of a clean pass.
        """
        begin, end = config.ramp_epochs
        epochs = config.training.epochs
        before = Phase.BEFORE if config.regularizers.weight else Phase.NATURAL
        method = config.training.method
        if method.name == "natural":
            begin, end = epochs, epochs
        lengths = {before: begin, Phase.WARMUP: end - begin, Phase.FULL: epochs - end}
        options = tuple(sorted((key, _hashable(value)) for key, value in config.model.options.items()))
        macs = 0.0
        for phase, length in lengths.items():
            if length:
                whole, share = _macs(
                    self.image_shape,
                    self.classes,
                    config.model.name,
                    options,
                    method,
                    config.regularizers.weight,
                    phase,
                )
                macs += length * whole * (1.0 if last_layer else 1 - share)
        return PER_MAC * self.images * macs


@cache
def _macs(
    shape: tuple[int, int, int],
    classes: int,
    name: str,
    options: tuple[tuple[str, Any], ...],
    method: MethodSection,
    regularizers: float,
    phase: Phase,
) -> tuple[float, float]:
    """Multiply-accumulates for each image of a step, and the classifier's share of a clean pass."""
    net, share = _network(shape, classes, name, options)
    return step_macs(GradientStep(net, build_method(method), Regularization(regularizers)), shape, phase), share


@cache
def _network(
    shape: tuple[int, int, int], classes: int, name: str, options: tuple[tuple[str, Any], ...]
) -> tuple[BoundedModel, float]:
    """A network, and the classifier's share of its clean pass."""
    model = build_model(name, shape, classes, options=dict(options)).train()
    tensors = model.state_dict()
    macs = sum(tensors[name].numel() for name in classifier_tensors(model) if tensors[name].dim() == 2)
    return BoundedModel(model, torch.rand(2, *shape)), macs / clean_macs(model, shape)


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list) else value
