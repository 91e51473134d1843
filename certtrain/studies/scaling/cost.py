"""The floating-point operations of a run: every multiply-accumulate of clean pass, bounds and backward, twice."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch

from certtrain.affine_layers import classifier_tensors
from certtrain.bounds import BoundedModel
from certtrain.config import Config
from certtrain.config.schema import RegularizerSection, TrainingSection
from certtrain.data.replay import Mixture
from certtrain.errors import UsageError
from certtrain.models import build_model
from certtrain.runs.build import training_step
from certtrain.training.cost import clean_macs, step_macs

PER_MAC = 2  # a multiplication and an addition
Options = tuple[tuple[str, Any], ...]  # of a model, by key, in an order
PHASES = {"before": (0.0, 0.0), "warmup": (0.5, 0.5), "full": (1.0, 1.0)}  # a radius, and a share of warmup, in each


class PhaseCost(NamedTuple):
    """Epochs of a phase, images of each, and multiply-accumulates for each image; 0 where there are no epochs."""

    epochs: int
    images: int
    macs_per_image: float


@dataclass(frozen=True)
class OperationCounter:
    """Counts the operations of runs on a data set of so many training images of shape (C, H, W).

    Whatever a configuration says about its steps is counted by taking one of them.

    Raises:
        UsageError: the steps are taken by another backend, whose operations cannot be counted.
    """

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
        return PER_MAC * sum(phase.epochs * phase.images * phase.macs_per_image * counted for phase in phases)

    def by_phase(self, config: Config) -> dict[str, PhaseCost]:
        """Before, in and after the warmup of epsilon, in this order."""
        epochs = config.training.epochs
        begin, end = (epochs, epochs) if config.training.method.name == "natural" else config.ramp_epochs
        lengths = dict(zip(PHASES, (begin, end - begin, epochs - end), strict=True))
        images = self._images_of_an_epoch(config)
        return {
            phase: PhaseCost(length, images, self._macs_per_image(config, phase) if length else 0)
            for phase, length in lengths.items()
        }

    def _images_of_an_epoch(self, config: Config) -> int:
        """The replayed ones included."""
        if config.replay is None:
            return self.images
        return sum(map(sum, Mixture(self.images, config.training.batch_size, config.replay.share).sizes))

    def _macs_per_image(self, config: Config, phase: str) -> float:
        if config.backend != "native":
            raise UsageError(f"backend {config.backend}: its operations cannot be counted; only those of native can")
        network = self.image_shape, self.classes, config.model.name, _options(config)
        training = config.training.model_copy(update={"epochs": 1, "batch_size": 1})  # of which an image's cost is none
        return _step_macs(*network, training, config.regularizers, phase)


@cache
def _step_macs(
    shape: tuple[int, int, int],
    classes: int,
    name: str,
    options: Options,
    training: TrainingSection,
    regularizers: RegularizerSection,
    phase: str,
) -> float:
    """For each image of a step."""
    step = training_step(_network(shape, classes, name, options)[0], training, regularizers)
    return step_macs(step, shape, step.phase(*PHASES[phase]))


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
