"""The loop, and nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from certtrain.errors import DivergedError
from certtrain.modules import device_of
from certtrain.training.averaging import AveragedWeights
from certtrain.training.method import Scheduled, scheduled
from certtrain.training.noise import step_keys
from certtrain.training.step import Step

Batches = Callable[[int, int], Iterator[tuple[Tensor, Tensor]]]  # (epoch, first step of it) -> images, labels


@dataclass
class EpochReport:
    """One finished epoch (from 1): means of the metrics, and where the schedules stood at its end."""

    epoch: int
    step: int
    eps: float
    lr: float
    metrics: dict[str, float]
    images_per_second: float


class Observer(Protocol):
    """What is told of a run's progress; it may save, draw or log, and ends the run by returning True.

    A subclass may leave out the method that it does not need.
    """

    def after_step(self, trainer: Trainer) -> bool | None:
        """`trainer.step` steps have been taken; the weights are those after the last."""
        return False

    def after_epoch(self, trainer: Trainer, report: EpochReport) -> bool | None:
        """An epoch is over; `after_step` has been called for its last step."""
        return False


@dataclass
class Sums:
    """Running sums of an epoch's metrics, on the device: nothing waits for them until the epoch ends."""

    values: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)
    first_bad_step: Tensor | None = None

    def add(self, metrics: dict[str, Tensor], weight: int, step: int) -> None:
        for name, value in metrics.items():
            self.values[name] = self.values.get(name, 0) + value * weight
            self.weights[name] = self.weights.get(name, 0) + weight
        here = torch.where(torch.isfinite(metrics["loss"]), torch.inf, float(step))
        self.first_bad_step = here if self.first_bad_step is None else torch.minimum(self.first_bad_step, here)

    def to(self, device: torch.device) -> Sums:
        values = {name: value.to(device) for name, value in self.values.items()}
        return Sums(values, self.weights, None if self.first_bad_step is None else self.first_bad_step.to(device))

    def means(self) -> dict[str, float]:
        return {name: value.item() / self.weights[name] for name, value in self.values.items()}


@dataclass
class Trainer:
    """Takes steps until the last; its whole state is in `state_dict`, and the batches follow from the step alone.

    Args:
        model, gradient_step, optimizer: what is trained, on what, and how.
        batches: the batches of an epoch, from any step of it on, or this process's share of each.
        batch_sizes: images in each batch of an epoch, over all processes.
        epochs: the length of the run.
        eps, max_eps, initial_eps: the radius as a function of the step, where it ends and where it begins.
        ramp: the share of warmup's steps that are done, as a function of the step.
        lr: the learning rate as a function of the step.
        clip: bound on the gradient's norm, None for none.
        average: of the weights, None for none.
        seed: of what steps draw at random.
    """

    model: nn.Module
    gradient_step: Step
    optimizer: torch.optim.Optimizer
    batches: Batches
    batch_sizes: Sequence[int]
    epochs: int
    eps: Callable[[int], float]
    max_eps: float
    ramp: Callable[[int], float]
    lr: Callable[[int], float]
    initial_eps: float = 0.0
    clip: float | None = None
    average: AveragedWeights | None = None
    seed: int = 0
    step: int = 0
    sums: Sums = field(default_factory=Sums)

    @property
    def steps_per_epoch(self) -> int:
        return len(self.batch_sizes)

    @property
    def total_steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def epoch(self) -> int:
        """Finished epochs."""
        return self.step // self.steps_per_epoch

    def rehearse(self, images: Tensor, labels: Tensor, size: int) -> None:
        """Try every kind of step of the run with a few images: what one cannot do is told before the first.

        Args:
            images, labels: this process's share of so many; nothing that is trained sees them.
        """
        ends = (step for first in range(0, self.total_steps, self.steps_per_epoch)
                for step in (first, first + self.steps_per_epoch - 1))  # fmt: skip
        phases = {self.gradient_step.phase(self.eps(step), self.ramp(step)): step for step in ends}
        for phase, step in phases.items():
            eps, ramp = self.eps(step), self.ramp(step)
            ratio = self._share_of_the_way(*torch.tensor([eps, ramp])).item()
            at = scheduled(eps, ratio, ramp, like=images)
            self.gradient_step.rehearse(images, labels, at, phase, size)

    def run(self, observer: Observer) -> bool:
        """Train to the last step, or until `observer` ends it; returns whether the last step was reached.

        Raises:
            DivergedError: the loss was not finite; noticed at the end of the epoch.
        """
        while self.step < self.total_steps:
            first = self.step % self.steps_per_epoch
            started, images_seen = time.perf_counter(), 0
            sizes, schedules = self.batch_sizes[first:], self._scheduled_until_the_epochs_end()
            for batch, size, at in zip(self.batches(self.epoch, first), sizes, schedules, strict=True):
                self._take_step(*batch, size, at)
                images_seen += size
                if observer.after_step(self) and self.step < self.total_steps:
                    self.check_finite()
                    return False
            self.check_finite()
            means = self.sums.means()
            speed = images_seen / (time.perf_counter() - started)
            self.sums = Sums()
            last = self.step - 1
            report = EpochReport(self.epoch, self.step, self.eps(last), self.lr(last), means, speed)
            if observer.after_epoch(self, report) and self.step < self.total_steps:
                return False
        return True

    def _scheduled_until_the_epochs_end(self) -> Iterator[Scheduled]:
        """Of every step left of the epoch, on the device: sent once, so that no step waits for it."""
        steps = range(self.step, (self.epoch + 1) * self.steps_per_epoch)
        values = torch.tensor([(self.eps(step), self.ramp(step)) for step in steps])
        eps, ramp = values.to(device_of(self.model)).unbind(1)
        eps_ratio = self._share_of_the_way(eps, ramp)
        return map(Scheduled, eps, eps_ratio, ramp, step_keys(self.seed, torch.tensor(steps)).to(eps.device))

    def _share_of_the_way(self, eps: Tensor, ramp: Tensor) -> Tensor:
        """From the first radius to the last, in [0, 1], up or down; where the two are the same, of warmup's steps."""
        if self.max_eps == self.initial_eps:
            return ramp if self.max_eps else torch.ones_like(eps)
        return ((eps - self.initial_eps) / (self.max_eps - self.initial_eps)).clamp(0.0, 1.0)

    def _take_step(self, images: Tensor, labels: Tensor, size: int, at: Scheduled) -> None:
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(self.step) * group.get("rate_factor", 1.0)
        phase = self.gradient_step.phase(self.eps(self.step), self.ramp(self.step))
        metrics = self.gradient_step.backward(images, labels, at, phase, size)
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.sums.add(metrics, size, self.step)
        self.step += 1
        if self.average is not None:
            self.average.update(self.step)

    def check_finite(self) -> None:
        """Raises DivergedError if the loss of any step of this epoch, or now a weight, is NaN or infinite."""
        bad = torch.inf if self.sums.first_bad_step is None else self.sums.first_bad_step.item()
        if bad == torch.inf and not all(torch.isfinite(p).all() for p in self.model.parameters()):
            bad = self.step - 1  # the last step's loss was finite, its gradient was not
        if bad < torch.inf:
            step = int(bad)
            raise DivergedError(
                f"the loss is not finite in epoch {step // self.steps_per_epoch + 1}, "
                f"step {step % self.steps_per_epoch + 1} of {self.steps_per_epoch}, "
                f"at epsilon {self.eps(step):.6g} (step {step} of the run)",
                eps=self.eps(step),
            )

    def state_dict(self) -> dict[str, Any]:
        average = {} if self.average is None else {"average": self.average.weights}
        device = device_of(self.model)
        return {
            **average,
            "step": self.step,
            "steps_per_epoch": self.steps_per_epoch,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "sums": vars(self.sums),
            "random": {
                "cpu": torch.get_rng_state(),
                "cuda": [torch.cuda.get_rng_state(device)] if device.type == "cuda" else [],
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state` was taken; the model's weights must have been checked to fit."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load(state["average"])
        self.step = state["step"]
        device = device_of(self.model)
        self.sums = Sums(**state["sums"]).to(device)
        torch.set_rng_state(state["random"]["cpu"].cpu())
        for generator in state["random"]["cuda"] if device.type == "cuda" else ():  # that of the run's GPU, whichever
            torch.cuda.set_rng_state(generator.cpu(), device)
