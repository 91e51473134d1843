"""Epsilon, learning rate and averages as functions of the step, counted from 0."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class SmoothedEpsilon:
    """Perturbation radius: `initial`, then polynomial, then linear way to `max_eps`. (Gowal et al. 2018; auto_LiRPA.)

    `initial` until `start_step`; with m = start + ⌊mid·(end - start)⌋, initial + α(s - start)^β up to m, then a
    straight line that reaches `max_eps` at `end_step`; α makes value and slope agree at m. Steps count from 0, and m
    is the floor of a rounded product, as in auto_LiRPA. An `initial` above 0, which may also be above `max_eps`, is
    for a network that was trained at that radius before.
    """

    max_eps: float
    start_step: int
    end_step: int
    mid: float = 0.25
    beta: float = 4.0
    initial: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.start_step <= self.end_step:
            raise ValueError(f"need 0 <= start_step <= end_step, got {self.start_step} and {self.end_step}")
        if not (0 <= self.mid <= 1 and self.beta >= 1):
            raise ValueError(f"need 0 <= mid <= 1 and beta >= 1, got mid={self.mid}, beta={self.beta}")

    def ramp(self, step: int) -> float:
        """The share of the steps between start and end that are done, in [0, 1]."""
        if step >= self.end_step:
            return 1.0
        return 0.0 if step <= self.start_step else (step - self.start_step) / (self.end_step - self.start_step)

    def __call__(self, step: int) -> float:
        if step >= self.end_step:
            return self.max_eps
        if step <= self.start_step:
            return self.initial
        bend = int((self.end_step - self.start_step) * self.mid)
        line = self.end_step - self.start_step - bend
        elapsed = step - self.start_step
        way = self.max_eps - self.initial
        # way = α·bend^β + α·β·bend^(β-1)·line; the powers are taken of ratios, so that they cannot overflow
        at_bend = way * bend / (bend + self.beta * line)
        if elapsed < bend:
            return self.initial + at_bend * (elapsed / bend) ** self.beta
        return self.initial + at_bend + (way - at_bend) * (elapsed - bend) / line


Shape = Callable[[int], float]  # steps since the learning rate's warmup -> what the rate is multiplied by


def constant(step: int) -> float:
    """The rate stays as it is."""
    return 1.0


@dataclass(frozen=True)
class LearningRate:
    """`base`, times everything that applies: pure in the step, so that a resumed run needs no state of it.

    Args:
        warmup_steps: in which the rate grows linearly, to reach its full value with the last of them.
        warmup_start: the share of the full value that it grows from.
        shape: of what follows.
        milestones: steps, at each of which the rate is multiplied by `factor` from then on.
    """

    base: float
    milestones: Sequence[int] = ()
    factor: float = 0.2
    warmup_steps: int = 0
    shape: Shape = constant
    warmup_start: float = 0.0

    def __call__(self, step: int) -> float:
        rate = self.base * self.factor ** sum(step >= milestone for milestone in self.milestones)
        if step < self.warmup_steps:
            return rate * (self.warmup_start + (1 - self.warmup_start) * ((step + 1) / self.warmup_steps))
        return rate * self.shape(step - self.warmup_steps)


def _done(step: int, steps: int) -> float:
    """The share of so many steps that is done; of none, all of it."""
    return min(1.0, step / steps) if steps else 1.0


@dataclass(frozen=True)
class Linear:
    """From 1 to `final`, which the step after the last of `steps` would have."""

    steps: int
    final: float = 0.0

    def __call__(self, step: int) -> float:
        return 1 + (self.final - 1) * _done(step, self.steps)


@dataclass(frozen=True)
class Cosine:
    """From 1 to `final` along half a cosine. (Loshchilov and Hutter 2017, arXiv 1608.03983.)"""

    steps: int
    final: float = 0.0

    def __call__(self, step: int) -> float:
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * _done(step, self.steps))) / 2


@dataclass(frozen=True)
class InverseRoot:
    """√(timescale / step), 1 for the first `timescale` steps. (Zhai et al. 2022, arXiv 2106.04560.)"""

    timescale: int

    def __call__(self, step: int) -> float:
        return math.sqrt(self.timescale / max(self.timescale, step))


@dataclass(frozen=True)
class Infinite:
    """From 1 along half a cosine to `level` in `decay` steps, constant, and linearly down in the last `length`.

    Until the last `length` of `steps` it does not depend on `steps`: a run that is made longer takes up the constant
    rate where a shorter one had begun to end, and needs no warmup again. (Ibrahim et al. 2024, arXiv 2403.08763.)
    """

    steps: int
    decay: int
    level: float
    length: int
    final: float = 0.0

    def __call__(self, step: int) -> float:
        return Cosine(self.decay, self.level)(step) * Cooldown(self.steps, self.length, self.final)(step)


@dataclass(frozen=True)
class Cooldown:
    """1, and in the last `length` of `steps` linearly down to `final`. (Hägele et al. 2024, arXiv 2405.18392.)"""

    steps: int
    length: int
    final: float = 0.0

    def __call__(self, step: int) -> float:
        return Linear(self.length, self.final)(max(0, step - (self.steps - self.length))) if self.length else 1.0


@dataclass(frozen=True)
class AverageShare:
    """What share of an average the weights get after so many steps have been taken; 0 where they are not looked at.

    Args:
        first: the number of steps after which they are first taken, and are all of the average.
        every: how many steps later each time.
        decay: what is kept of the average then; None: so much that all have the same weight.
    """

    first: int
    every: int
    decay: float | None = None

    def __call__(self, steps: int) -> float:
        before, rest = divmod(steps - self.first, self.every)
        if before < 0 or rest:
            return 0.0
        return 1 / (before + 1) if before == 0 or self.decay is None else 1 - self.decay
