"""Epsilon and learning rate as functions of the step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class SmoothedEpsilon:
    """Perturbation radius: 0, then polynomial, then linear growth to `max_eps`. (Gowal et al. 2018; auto_LiRPA.)

    0 until `start_step`; with m = start + ⌊mid·(end - start)⌋, α(s - start)^β up to m, then a straight line that
    reaches `max_eps` at `end_step`; α makes value and slope agree at m. Steps count from 0.
    """

    max_eps: float
    start_step: int
    end_step: int
    mid: float = 0.25
    beta: float = 4.0

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
            return 0.0
        bend = int((self.end_step - self.start_step) * self.mid)
        line = self.end_step - self.start_step - bend
        elapsed = step - self.start_step
        # max_eps = α·bend^β + α·β·bend^(β-1)·line; the powers are taken of ratios, so that they cannot overflow
        at_bend = self.max_eps * bend / (bend + self.beta * line)
        if elapsed < bend:
            return at_bend * (elapsed / bend) ** self.beta
        return at_bend + (self.max_eps - at_bend) * (elapsed - bend) / line


@dataclass(frozen=True)
class StepwiseRate:
    """Learning rate: `base`, times `factor` at every milestone (a step) that has been reached."""

    base: float
    milestones: Sequence[int] = ()
    factor: float = 0.2

    def __call__(self, step: int) -> float:
        return self.base * self.factor ** sum(step >= milestone for milestone in self.milestones)
