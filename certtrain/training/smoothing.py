"""Steps on a loss smoothed by Gaussian noise on the weights: estimates of the gradient of E L(θ + σδ), δ ~ N(0, 1).

(Balauca et al. 2024, arXiv 2403.07095.) All parameters are perturbed; each evaluation of L is of the whole method, its
attack included. BatchNorm's running statistics are updated once, by the mean of what the evaluations make of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from certtrain.bounds import Bounder
from certtrain.config.smoothing import PGPESection, RGSSection, SmoothingSection
from certtrain.training.losses import Metrics
from certtrain.training.method import Phase, Scheduled
from certtrain.training.noise import normal
from certtrain.training.step import GradientStep, Step

WEIGHT_DRAWS = 2**20  # numbers of draws apart from those of attacks


class StepInputs(NamedTuple):
    """The arguments of `GradientStep.backward`."""

    images: Tensor
    labels: Tensor
    at: Scheduled
    phase: Phase
    size: int | None


class SmoothedStep(ABC):
    """The gradient of a `GradientStep`'s smoothed loss.

    Args:
        step: the step.
        std: σ, of the noise on each weight.
        count: how many draws of noise.
    """

    def __init__(self, step: GradientStep, std: float, count: int) -> None:
        self._step, self._std, self._count = step, std, count

    @property
    def net(self) -> Bounder:
        return self._step.net

    def phase(self, eps: float, ramp: float) -> Phase:
        return self._step.phase(eps, ramp)

    def backward(self, images: Tensor, labels: Tensor, at: Scheduled, phase: Phase, size: int | None = None) -> Metrics:
        """Add the estimated gradient to the parameters' `.grad`; see `GradientStep.backward`.

        Returns:
            Its metrics, means over the evaluations.
        """
        weights = Perturbed(self.net.model)
        gradients, metrics = self._estimate(weights, StepInputs(images, labels, at, phase, size))
        weights.settle(gradients)
        return {name: torch.stack([one[name] for one in metrics]).mean() for name in metrics[0]}

    def rehearse(self, images: Tensor, labels: Tensor, at: Scheduled, phase: Phase, size: int | None = None) -> None:
        """Of one evaluation; see `GradientStep.rehearse`."""
        self._step.rehearse(images, labels, at, phase, size)

    @abstractmethod
    def _estimate(self, weights: Perturbed, inputs: StepInputs) -> tuple[list[Tensor | None], list[Metrics]]:
        """A gradient for each parameter, and the metrics of each evaluation."""


class RandomizedGradientSmoothing(SmoothedStep):
    """1/n Σ ∇L(θ + σδᵢ)."""

    def _estimate(self, weights: Perturbed, inputs: StepInputs) -> tuple[list[Tensor | None], list[Metrics]]:
        metrics: list[Metrics] = []
        sums: list[Tensor | None] = [None for _ in weights.weights]
        for sample in range(self._count):
            with weights.moved(weights.noise(inputs.at.key, sample), self._std):
                metrics.append(self._step.backward(*inputs))
            sums = [_plus(a, b) for a, b in zip(sums, weights.taken_gradients(), strict=True)]
        return [total if total is None else total / self._count for total in sums], metrics


class PGPE(SmoothedStep):
    """1/n Σ δᵢ·(L(θ + σδᵢ) - L(θ - σδᵢ)) / 2σ: losses at pairs of opposite perturbations, and no way back.

    (Parameter-exploring policy gradients: Sehnke et al. 2010.)
    """

    def _estimate(self, weights: Perturbed, inputs: StepInputs) -> tuple[list[Tensor | None], list[Metrics]]:
        sums, metrics = [torch.zeros_like(weight) for weight in weights.weights], []
        for pair in range(self._count):
            noise = weights.noise(inputs.at.key, pair)
            for sign in (1, -1):
                with weights.moved(noise, sign * self._std):
                    metrics.append(self._step.evaluate(*inputs))
            slope = (metrics[-2]["loss"] - metrics[-1]["loss"]) / (2 * self._std * self._count)
            for total, direction in zip(sums, noise, strict=True):
                total.addcmul_(direction, slope.to(direction.dtype))
        return [*sums], metrics


def _plus(total: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    """None for a parameter that is not used."""
    return gradient if total is None else total if gradient is None else total + gradient


class Perturbed:
    """The parameters of `model`, to be moved and brought back, and its buffers, whose updates are averaged.

    weights: the parameters where they are brought back to.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.weights = [parameter.detach().clone() for parameter in self._parameters]
        self._buffers = list(model.buffers())
        self._before = [buffer.clone() for buffer in self._buffers]
        self._means = [buffer.clone() for buffer in self._buffers]
        self._moves = 0
        self._gradients = self.taken_gradients()

    def noise(self, key: Tensor, number: int) -> list[Tensor]:
        """Standard normal, of each parameter's shape: a function of the step's key and of which draw of it this is."""
        positions = torch.arange(len(self.weights), device=key.device)
        return [
            normal(key, position[None], weight.shape, weight, WEIGHT_DRAWS + number)[0]
            for position, weight in zip(positions, self.weights, strict=True)
        ]

    @contextmanager
    def moved(self, noise: list[Tensor], std: float) -> Iterator[None]:
        """The parameters inside are those plus std·noise, the buffers as before any move."""
        with torch.no_grad():
            for parameter, weight, direction in zip(self._parameters, self.weights, noise, strict=True):
                torch.add(weight, direction, alpha=std, out=parameter)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, weight in zip(self._parameters, self.weights, strict=True):
                    parameter.copy_(weight)
                self._moves += 1
                for buffer, before, mean in zip(self._buffers, self._before, self._means, strict=True):
                    if buffer.is_floating_point():
                        mean.lerp_(buffer, 1 / self._moves)
                    else:  # a count, the same after each
                        mean.copy_(buffer)
                    buffer.copy_(before)

    def taken_gradients(self) -> list[Tensor | None]:
        """Copies of the parameters' gradients, which are left without any; the next way back may reuse their memory."""
        gradients = [None if parameter.grad is None else parameter.grad.clone() for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None
        return gradients

    def settle(self, gradients: Sequence[Tensor | None]) -> None:
        """These are added to the gradients from before all moves; buffers become their means after each."""
        for parameter, before, gradient in zip(self._parameters, self._gradients, gradients, strict=True):
            parameter.grad = before if gradient is None else gradient if before is None else before + gradient
        with torch.no_grad():
            for buffer, mean in zip(self._buffers, self._means, strict=True):
                buffer.copy_(mean)


def smoothed(section: SmoothingSection, step: GradientStep) -> Step:
    """The step, or the one that `section` makes of it."""
    match section:
        case PGPESection():
            return PGPE(step, section.std, section.pairs)
        case RGSSection():
            return RandomizedGradientSmoothing(step, section.std, section.samples)
    return step
