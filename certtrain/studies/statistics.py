"""What a few seeds, and many images, say about a difference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

FEW = 20  # values, below which a bootstrap covers less than it claims: three values, resampled, never leave their range
RESAMPLES = 2000


@dataclass(frozen=True)
class ConfidenceInterval:
    """A confidence interval of a mean, and how it was had."""

    low: float
    high: float
    method: str

    def within(self, low: float, high: float) -> ConfidenceInterval:
        """What of it lies between these, which bound the quantity."""
        return ConfidenceInterval(max(low, self.low), min(high, self.high), self.method)


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> ConfidenceInterval | None:
    """Where the mean of the distribution lies that `values` are drawn from.

    None for fewer than two of them, and where all are the same, as two seeds' counts of images may be: they show no
    scatter to judge by, and an interval without width would claim that there is none.

    Of fewer than 20 values Student's t interval, exact for normal ones; of more the bias-corrected and accelerated
    bootstrap (Efron 1987).
    """
    sample = np.asarray(values, dtype=float)
    if len(sample) < 2:
        return None
    mean, spread = float(sample.mean()), float(sample.std(ddof=1))
    method = "Student's t" if len(sample) < FEW else "BCa bootstrap"
    if spread <= 1e-12 * abs(mean) or spread == 0:  # all the same
        return None
    if len(sample) < FEW:
        half = float(stats.t.ppf((1 + confidence) / 2, len(sample) - 1)) * spread / math.sqrt(len(sample))
        return ConfidenceInterval(mean - half, mean + half, method)
    return _bootstrapped(sample, confidence, method)


def image_interval(differences: np.ndarray, confidence: float = 0.95) -> ConfidenceInterval:
    """Where the mean of `differences` (N,), one of each image in [-1, 1], would lie on other images of the same kind.

    An adjusted Wald interval for matched pairs: that of these images and z² made-up ones, half of them lost and half
    won (as Agresti and Min 2005, Statistics in Medicine 24, 729, add two), by as much as those that differ. Where none
    does, it ends where Wilson's score interval of none in N does: few images may hide a small difference. Which
    networks are compared is taken as given.
    """
    z = float(stats.norm.ppf((1 + confidence) / 2))
    squares, count = np.square(differences), len(differences) + z**2
    usual = float(squares[squares > 0].mean()) if squares.any() else 1.0  # less than 1 in means over seeds
    mean = float(differences.sum()) / count
    half = z * math.sqrt(((float(squares.sum()) + z**2 * usual) / count - mean**2) / count)
    return ConfidenceInterval(mean - half, mean + half, "adjusted Wald").within(-1.0, 1.0)


def _bootstrapped(sample: np.ndarray, confidence: float, method: str) -> ConfidenceInterval:
    interval = stats.bootstrap(
        (sample,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=100,
        confidence_level=confidence,
        method="BCa",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return ConfidenceInterval(float(interval.low), float(interval.high), method)


@dataclass(frozen=True)
class McNemar:
    """Images that only the first, or only the second, of two networks proves; p: exact, two-sided."""

    only_first: int
    only_second: int
    p: float


def mcnemar(first: np.ndarray, second: np.ndarray) -> McNemar:
    """McNemar's test of two networks on the same images, (N,) bool each: whether each proves as many as the other.

    The exact form: of the images that only one of them proves, either may be the one with probability 1/2.
    """
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    split = only_first + only_second
    p = float(stats.binomtest(only_first, split, 0.5).pvalue) if split else 1.0
    return McNemar(only_first, only_second, p)
