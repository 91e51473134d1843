"""What each kind of layer does to an interval of one image's values: the arithmetic of the checker, in numpy.

Nothing of `certtrain.bounds` takes part. The error of every sum, the deployed network's and numpy's own, is at most
e·(Σ|w||x| + |b|) with e = k·u / (1 - k·u) for k roundings of relative size u, and goes into the radius.
(docs/soundness.md)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from certtrain.errors import CertificateError

Array = np.ndarray

UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "tf32": 2.0**-22, "bf16": 2.0**-22}
OPERANDS = {"float64": 0.0, "float32": 0.0, "tf32": (1 + 2.0**-10) ** 2 - 1, "bf16": 2.0**-8}
STORED = {"float64": 0.0, "float32": 0.0, "tf32": 0.0, "bf16": 2.0**-8}
TINY = {"float64": 2.0**-1022, "float32": 2.0**-126, "tf32": 2.0**-126, "bf16": 2.0**-126}
LARGEST = {"float64": 2.0**1023, "float32": 2.0**127, "tf32": 2.0**127, "bf16": 2.0**127}
NUMPY_ROUNDINGS = 24  # around any sum of the checker's, at the most
FOLDING_ROUNDINGS = 16  # from BatchNorm's parameters to a weight it may be folded into
LARGEST_SCALE = 2.0**40  # of BatchNorm's parameters: what an underflow may be multiplied by


class Sums(NamedTuple):
    """The sums of products that made a value: their length, Σ|w| and |b| at the most, and the largest |x| they meet.

    normalized: a BatchNorm has followed already.
    """

    terms: int
    weight: float
    bias: float
    largest: float
    normalized: bool = False


class Interval(NamedTuple):
    """All values within `radius` of `center`.

    sums: those that a BatchNorm here may be folded into, where only reshaping stands between; None if there are none.
    """

    center: Array
    radius: Array
    sums: Sums | None = None

    @property
    def magnitude(self) -> Array:
        return np.abs(self.center) + self.radius


def growth(unit: float, roundings: int) -> float:
    """No less than (1 ± unit)^±roundings."""
    return (1 + 2.0**-50) / (1 - roundings * unit) if roundings * unit < 1 else np.inf


@dataclass(frozen=True)
class Propagation:
    """What each kind of layer does to an interval, in one arithmetic; layers are named as in model.safetensors."""

    weights: Mapping[str, Array]
    arithmetic: str

    def image(self, lower: Array, upper: Array) -> Interval:
        center = (lower + upper) / 2
        radius = np.nextafter(np.maximum(upper - center, center - lower), np.inf)
        x, stored = Interval(center, radius), STORED[self.arithmetic]
        return self.widened(x, stored, x.magnitude) if stored else x

    def normalize(self, x: Interval, mean: str, std: str) -> Interval:
        mean_, std_ = self.weights[mean], self.weights[std]
        shifted = self.widened(Interval(x.center - mean_, x.radius), self.elementwise(2), x.magnitude + np.abs(mean_))
        size = np.abs(std_)
        if not self.is_harmless(std_).all():
            return shifted._replace(radius=np.full_like(shifted.radius, np.inf))
        scaled = Interval(shifted.center / std_, shifted.radius / size)
        return self.widened(scaled, self.elementwise(4), shifted.magnitude / size)

    def convolution(self, x: Interval, name: str, stride: int = 1, padding: int = 1, groups: int = 1) -> Interval:
        kernels = self.weights[f"{name}.weight"]
        biases = self.weights.get(f"{name}.bias", np.zeros(len(kernels)))
        parts = []
        for kernel, bias, *image in zip(*(np.split(v, groups) for v in (kernels, biases, *x[:2])), strict=True):
            center, radius = (_patches(part, kernel.shape[2:], stride, padding) for part in image)
            parts.append(self._sums(center, radius, kernel.reshape(len(kernel), -1), bias))
        center, radius = (np.concatenate([part[i] for part in parts], axis=-1).transpose(2, 0, 1) for i in (0, 1))
        return Interval(
            center, radius, Sums(kernels[0].size, np.abs(kernels).sum(), np.abs(biases).max(), x.magnitude.max())
        )

    def linear(self, x: Interval, name: str) -> Interval:
        weight = self.weights[f"{name}.weight"]
        bias = self.weights.get(f"{name}.bias", np.zeros(len(weight)))
        sums = Sums(weight.shape[1], np.abs(weight).sum(), np.abs(bias).max(), x.magnitude.max())
        return Interval(*self._sums(x.center, x.radius, weight, bias), sums)

    def flatten(self, x: Interval) -> Interval:
        return Interval(x.center.ravel(), x.radius.ravel(), x.sums)

    def batch_norm(self, x: Interval, name: str) -> Interval:
        mean, variance, weight, bias = (
            self.weights[f"{name}.{part}"].reshape(-1, *[1] * (x.center.ndim - 1))
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        # A difference of a variance below 0 and 1e-5 has a greater relative error than is counted.
        known = (variance >= 0) & self.is_harmless(variance + 1e-5)
        scale = weight / np.sqrt(np.where(known, variance, 1.0) + 1e-5)
        known &= self.is_small(scale) & self.is_small(weight) & self.is_small(mean) & self.is_small(bias)
        mean, scale, bias = (np.where(known, each, 0.0) for each in (mean, scale, bias))
        parameters = np.abs(mean * scale) + np.abs(bias)
        moved = Interval((x.center - mean) * scale + bias, x.radius * np.abs(scale))
        # What is centred first meets the weight, or the reciprocal of the root, before it meets the other.
        entering = x.magnitude + np.abs(mean)
        fits = known & (2 * LARGEST_SCALE * entering <= LARGEST[self.arithmetic])
        moved = moved._replace(radius=np.where(fits, moved.radius + self.flushed(entering), np.inf))
        magnitude = np.abs(scale) * x.magnitude + parameters
        moved = self.widened(moved, self.elementwise(FOLDING_ROUNDINGS), magnitude)
        if x.sums is not None and x.sums.normalized:
            raise CertificateError(f"{name} follows another BatchNorm: folding both rounds more often than is counted")
        terms = 1 if x.sums is None else x.sums.terms
        moved = self.widened(moved, self.sum_error(terms), parameters)
        if x.sums is None:
            return moved
        met = x.sums.weight + x.sums.bias + np.abs(mean).max() + np.abs(bias).max()
        return self._folded(moved, x.sums, np.abs(scale).max(), parameters.max(), met)

    def _folded(self, x: Interval, sums: Sums, scale: float, parameters: float, met: float) -> Interval:
        """With what underflows of folded weights cost; everything, where a folded sum may overflow.

        met: no less than what meets the BatchNorm's weight as it is folded, perhaps before the root of its variance.
        """
        lost = 8 * sums.terms * LARGEST_SCALE * TINY[self.arithmetic] * (1 + sums.largest)
        lost = lost + self.flushed(sums.weight * sums.largest + sums.bias)
        folded = sums.weight * scale * (1 + sums.largest) + sums.bias * scale + parameters
        fits = 2 * max(folded, LARGEST_SCALE * met) <= LARGEST[self.arithmetic]
        radius = (x.radius + lost) * (1 + 2.0**-40) if fits else np.full_like(x.radius, np.inf)
        return Interval(x.center, radius, sums._replace(normalized=True))

    def relu(self, x: Interval) -> Interval:
        lower = np.maximum(np.nextafter(x.center - x.radius, -np.inf), 0)
        upper = np.maximum(np.nextafter(x.center + x.radius, np.inf), 0)
        center = (lower + upper) / 2
        return Interval(center, np.nextafter(np.maximum(upper - center, center - lower), np.inf))

    def add(self, x: Interval, y: Interval) -> Interval:
        total = Interval(x.center + y.center, x.radius + y.radius)
        return self.widened(total, self.elementwise(2), x.magnitude + y.magnitude)

    def margins(self, x: Interval, name: str, label: int) -> Array:
        """(K,): lower bounds of every z_label - z_j that the last layer can compute; 0 for the label itself."""
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        rows = weight[label] - weight
        sizes = np.abs(weight) @ x.magnitude + np.abs(bias)
        error = self.sum_error(weight.shape[1]) * (sizes[label] + sizes) + 2 * self._underflow(x.magnitude, weight)
        reach = (np.abs(rows) @ x.radius + error) * growth(UNIT["float64"], weight.shape[1] + NUMPY_ROUNDINGS)
        lower = np.nextafter(rows @ x.center + (bias[label] - bias) - reach, -np.inf)
        known = self._fits(x.magnitude, weight, bias) & ~np.isnan(lower)
        lower = np.where(known, lower, -np.inf)
        lower[label] = 0.0
        return lower

    # --- errors

    def sum_error(self, terms: int) -> float:
        a = self.arithmetic
        deployed = (1 + OPERANDS[a]) * (1 + STORED[a]) ** 2 * growth(UNIT[a], terms + 1 + FOLDING_ROUNDINGS) - 1
        return deployed + growth(UNIT["float64"], terms + 1 + NUMPY_ROUNDINGS) - 1

    def elementwise(self, roundings: int) -> float:
        deployed = (1 + STORED[self.arithmetic]) ** 2 * growth(UNIT[self.arithmetic], roundings) - 1
        return deployed + growth(UNIT["float64"], roundings + NUMPY_ROUNDINGS) - 1

    def _sums(self, center: Array, radius: Array, weight: Array, bias: Array) -> tuple[Array, Array]:
        magnitude = np.abs(center) + radius
        error = self.sum_error(weight.shape[1])
        spread = (radius + error * magnitude) @ np.abs(weight).T
        slack = error * np.abs(bias) + self._underflow(magnitude, weight)
        inflated = (spread + slack) * growth(UNIT["float64"], weight.shape[1] + NUMPY_ROUNDINGS)
        fits = self._fits(magnitude, weight, bias)
        return center @ weight.T + bias, inflated if fits else np.full_like(inflated, np.inf)

    def _underflow(self, magnitude: Array, weight: Array) -> float:
        terms = weight.shape[1]
        return 8 * TINY[self.arithmetic] * (2 * terms + 2 + np.abs(weight).sum() + terms * magnitude.max())

    def _fits(self, magnitude: Array, weight: Array, bias: Array) -> bool:
        return bool(2 * (np.abs(weight).sum() * magnitude.max() + np.abs(bias).max()) <= LARGEST[self.arithmetic])

    def widened(self, x: Interval, error: float, magnitude: Array, terms: int = 1) -> Interval:
        """Of results of sums of so many terms, whose magnitudes' mean is no more than `magnitude`."""
        underflow = 2.0**60 * TINY[self.arithmetic]
        radius = (x.radius + error * magnitude + underflow) * (1 + 2.0**-40)
        fits = 2 * terms * (magnitude + radius) <= LARGEST[self.arithmetic]
        return Interval(x.center, np.where(fits, radius, np.inf))

    def is_harmless(self, value: Array) -> Array:
        """Where quotients by it, and its root, neither overflow nor lose more in an underflow than `widened` allows."""
        return (np.abs(value) > 1 / LARGEST_SCALE) & self.is_small(value)

    def is_small(self, value: Array) -> Array:
        return np.abs(value) < LARGEST_SCALE

    def flushed(self, magnitude: Any) -> Any:
        """What factors that are too small to be normal numbers lose as they meet values."""
        return 8 * FOLDING_ROUNDINGS * LARGEST_SCALE * TINY[self.arithmetic] * magnitude


def _patches(image: Array, kernel: tuple[int, ...], stride: int, padding: int) -> Array:
    """(H', W', C·kh·kw): what each output position of a convolution sees of a (C, H, W) image."""
    padded = np.pad(image, ((0, 0), (padding, padding), (padding, padding)))
    windows = sliding_window_view(padded, kernel, axis=(1, 2))[:, ::stride, ::stride]
    return windows.transpose(1, 2, 0, 3, 4).reshape(*windows.shape[1:3], -1)
