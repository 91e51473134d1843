"""The floating-point operations of a run: every multiply-accumulate of clean pass, bounds and backward, twice."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

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
Options = tuple[tuple[str, Any], ...]  # of a model, by key, in an order


class PhaseCost(NamedTuple):
    """Epochs of a phase, and the multiply-accumulates for each image of its steps; 0 of both where there is none."""

    epochs: int
    macs_per_image: float


@dataclass(frozen=True)
class OperationCounter:
    """Counts the operations of runs on a data set of so many training images of shape (C, H, W)."""

    images: int
    image_shape: tuple[int, int, int]
    classes: int

    def __call__(self, config: Config, last_layer: bool = True) -> float:
        """Operations of all steps of the run.

        Args:
            last_layer: whether those of the classifier count, in proportion to its share of a clean pass.
        """
        counted = 1.0
        if not last_layer:
            _, share = _network(self.image_shape, self.classes, config.model.name, _options(config))
            counted = 1 - share
        phases = self.by_phase(config).values()
        return PER_MAC * self.images * sum(phase.epochs * phase.macs_per_image * counted for phase in phases)

    def by_phase(self, config: Config) -> dict[Phase, PhaseCost]:
        """Before, in and after the warmup of epsilon, in this order."""
        epochs = config.training.epochs
        begin, end = (epochs, epochs) if config.training.method.name == "natural" else config.ramp_epochs
        before = Phase.BEFORE if config.regularizers.weight else Phase.NATURAL
        lengths = {before: begin, Phase.WARMUP: end - begin, Phase.FULL: epochs - end}
        return {
            phase: PhaseCost(length, self._macs_per_image(config, phase) if length else 0)
            for phase, length in lengths.items()
        }

    def _macs_per_image(self, config: Config, phase: Phase) -> float:
        network = self.image_shape, self.classes, config.model.name, _options(config)
        return _step_macs(*network, config.training.method, config.regularizers.weight, phase)


@cache
def _step_macs(
    shape: tuple[int, int, int],
    classes: int,
    name: str,
    options: Options,
    method: MethodSection,
    regularizers: float,
    phase: Phase,
) -> float:
    """For each image of a step."""
    net, _ = _network(shape, classes, name, options)
    return step_macs(GradientStep(net, build_method(method), Regularization(regularizers)), shape, phase)


@cache
def _network(shape: tuple[int, int, int], classes: int, name: str, options: Options) -> tuple[BoundedModel, float]:
    """A network, and the classifier's share of its clean pass."""
    model = build_model(name, shape, classes, options=dict(options)).train()
    tensors = model.state_dict()
    macs = sum(tensors[name].numel() for name in classifier_tensors(model) if tensors[name].dim() == 2)
    return BoundedModel(model, torch.rand(2, *shape)), macs / clean_macs(model, shape)


def _options(config: Config) -> Options:
    return tuple(sorted((key, _hashable(value)) for key, value in config.model.options.items()))


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list) else value
