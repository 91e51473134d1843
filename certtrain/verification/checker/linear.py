"""The checker's own linear bounds: CROWN, and the leaves of branch and bound, in plain numpy.

A walk through the network keeps of each layer how a linear function of its output is one of its input, and what such a
function may lose to rounding: |a|·S, S as in docs/soundness.md, (11) and (12). Going back to the image gives a bound.
One image at a time, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from certtrain.errors import CertificateError
from certtrain.verification.checker.intervals import UNIT, Interval, Propagation
from certtrain.verification.trees import Trees, covers

Array = np.ndarray
ROWS_AT_ONCE = 256
SPARE_ROUNDINGS = 24

PullBack = Callable[[Array], tuple[Array, Array]]  # (R, ...) -> (R, ...) before, constants (R,)


class Layer(NamedTuple):
    """Of one value: the values it is made of, how functions (R, ...) of it go back (None: a ReLU), its interval, E."""

    inputs: tuple[int, ...]
    pull_back: PullBack | None
    interval: Interval
    error: Array


class Sides(NamedTuple):
    """What enters a ReLU, lower <= z <= upper, and slopes of the line below; for all rows (1, ...) or each (R, ...)."""

    lower: Array
    upper: Array
    slope: Array


@dataclass(frozen=True)
class Recording(Propagation):
    """A propagation that remembers its layers; the first is the image."""

    layers: list[Layer] = field(default_factory=list)
    _numbers: dict[int, int] = field(default_factory=dict)

    def image(self, lower: Array, upper: Array) -> Interval:
        x = super().image(lower, upper)
        return self._keep(x, (), None, np.zeros_like(x.center))

    def normalize(self, x: Interval, mean: str, std: str) -> Interval:
        mean_, std_ = self.weights[mean], self.weights[std]

        def pull_back(a: Array) -> tuple[Array, Array]:
            return a / std_, -_dots(a, np.broadcast_to(mean_ / std_, x.center.shape))

        return self._affine(super().normalize(x, mean, std), x, x.radius / np.abs(std_), pull_back)

    def convolution(self, x: Interval, name: str, stride: int = 1, padding: int = 1, groups: int = 1) -> Interval:
        kernels = self.weights[f"{name}.weight"]
        bias = self.weights.get(f"{name}.bias", np.zeros(len(kernels)))
        parts = np.split(kernels, groups)
        channels, height, width = x.center.shape
        size = (height + 2 * padding, width + 2 * padding)

        def pull_back(a: Array) -> tuple[Array, Array]:
            pulled = np.zeros((len(a), channels, *size))
            rows, columns = a.shape[2:]
            for kernel, part, target in zip(parts, np.split(a, groups, 1), np.split(pulled, groups, 1), strict=True):
                for i, j in np.ndindex(*kernel.shape[2:]):
                    there = np.tensordot(part, kernel[:, :, i, j], (1, 0)).transpose(0, 3, 1, 2)
                    target[:, :, i : i + stride * rows : stride, j : j + stride * columns : stride] += there
            inside = pulled[:, :, padding : size[0] - padding, padding : size[1] - padding]
            return inside, a.sum((2, 3)) @ bias

        found = super().convolution(x, name, stride, padding, groups)
        sizes = Recording({f"{name}.weight": np.abs(kernels)}, self.arithmetic)
        spread = Propagation.convolution(
            sizes, Interval(x.radius, np.zeros_like(x.radius)), name, stride, padding, groups
        )
        return self._affine(found, x, spread.center, pull_back)

    def linear(self, x: Interval, name: str) -> Interval:
        weight = self.weights[f"{name}.weight"]
        bias = self.weights.get(f"{name}.bias", np.zeros(len(weight)))
        found = super().linear(x, name)
        return self._affine(found, x, np.abs(weight) @ x.radius, lambda a: (a @ weight, a @ bias))

    def flatten(self, x: Interval) -> Interval:
        shape = x.center.shape

        def pull_back(a: Array) -> tuple[Array, Array]:
            return a.reshape(len(a), *shape), np.zeros(len(a))

        return self._affine(super().flatten(x), x, x.radius.ravel(), pull_back)

    def batch_norm(self, x: Interval, name: str) -> Interval:
        mean, variance, weight, bias = (
            self.weights[f"{name}.{part}"].reshape(-1, *[1] * (x.center.ndim - 1))
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        scale = weight / np.sqrt(variance + 1e-5)
        shift = np.broadcast_to(bias - mean * scale, x.center.shape)
        found = super().batch_norm(x, name)
        return self._affine(found, x, x.radius * np.abs(scale), lambda a: (a * scale, _dots(a, shift)))

    def relu(self, x: Interval) -> Interval:
        found = super().relu(x)
        return self._keep(found, (self._number(x),), None, np.zeros_like(found.center))

    def add(self, x: Interval, y: Interval) -> Interval:
        found = super().add(x, y)
        error = _surplus(found, x.radius + y.radius)
        return self._keep(found, (self._number(x), self._number(y)), lambda a: (a, np.zeros(len(a))), error)

    def _affine(self, found: Interval, x: Interval, spread: Array, pull_back: PullBack) -> Interval:
        return self._keep(found, (self._number(x),), pull_back, _surplus(found, spread))

    def _keep(self, x: Interval, inputs: tuple[int, ...], pull_back: PullBack | None, error: Array) -> Interval:
        self._numbers[id(x.center)] = len(self.layers)
        self.layers.append(Layer(inputs, pull_back, x, error))
        return x

    def _number(self, x: Interval) -> int:
        return self._numbers[id(x.center)]


def _surplus(found: Interval, spread: Array) -> Array:
    """E: what of an interval's radius is rounding, its own subtraction's error included."""
    return np.maximum(found.radius - (1 - 2.0**-36) * spread, 0.0) + 2.0**-45 * found.radius


def _dots(a: Array, values: Array) -> Array:
    """(R, ...)·(...) or (R, ...) -> (R,)."""
    return np.einsum("rn,rn->r", a.reshape(len(a), -1), np.broadcast_to(values, a.shape).reshape(len(a), -1))


class LinearChecker:
    """Bounds of one image's margins.

    Args:
        recording: of a walk up to the logits.
    """

    def __init__(self, recording: Recording) -> None:
        self.layers = recording.layers
        self.relus = [k for k, layer in enumerate(self.layers) if layer.pull_back is None and layer.inputs]
        sizes = [layer.interval.center.size for layer in self.layers]
        roundings = 2 * (sum(sizes) + len(sizes) + SPARE_ROUNDINGS)
        self.gamma = roundings * 2.0**-53 / (1 - roundings * 2.0**-53) * (1 + 2.0**-40)
        ratio = self.gamma / UNIT[recording.arithmetic]
        self.slack = [self._slack(layer, ratio) for layer in self.layers]
        intervals = [self.layers[self.layers[k].inputs[0]].interval for k in self.relus]
        ends = [
            (np.nextafter(x.center - x.radius, -np.inf), np.nextafter(x.center + x.radius, np.inf)) for x in intervals
        ]
        self.boxes = {k: _of_all_rows(*end) for k, end in zip(self.relus, ends, strict=True)}

    @property
    def neurons(self) -> int:
        """How many enter ReLUs."""
        return sum(box.lower.size for box in self.boxes.values())

    def _slack(self, layer: Layer, ratio: float) -> Array:
        magnitude = layer.interval.magnitude
        if layer.pull_back is None and layer.inputs:
            magnitude = magnitude + 3 * self.layers[layer.inputs[0]].interval.magnitude
        return ((1 + self.gamma) * (1 + ratio) * layer.error + 2 * self.gamma * magnitude) * (1 + 2.0**-40)

    def margins(self, label: int, classes: int) -> Array:
        """(K,) lower bounds of z_label - z_j, infinite at the label itself."""
        rows = np.eye(classes)[label] - np.eye(classes)
        lower = self._lower(len(self.layers) - 1, rows, self.boxes, {})
        lower[label] = np.inf
        return lower

    def tightening(self) -> Iterator[None]:
        """Make boxes before ReLUs those that going back gives, where neurons are undecided, layer by layer (CROWN)."""
        for k in self.relus:
            box, value = self.boxes[k], self.layers[k].inputs[0]
            lower, upper = box.lower[0].copy(), box.upper[0].copy()
            undecided = np.flatnonzero((lower < 0) & (upper > 0))
            for part in np.array_split(undecided, -(-len(undecided) // ROWS_AT_ONCE)) if len(undecided) else ():
                rows = np.zeros((len(part), lower.size))
                rows[np.arange(len(part)), part] = 1
                rows = rows.reshape(-1, *lower.shape)
                low, high = self._lower(value, rows, self.boxes, {}), -self._lower(value, -rows, self.boxes, {})
                lower.flat[part] = np.fmax(lower.flat[part], low)
                upper.flat[part] = np.fmin(upper.flat[part], high)
            self.boxes[k] = _of_all_rows(lower, upper)
            yield

    def leaf_margins(self, trees: Trees, label: int, classes: int) -> Array:
        """(K,) lower bounds of z_label - z_j over all leaves of class j; infinite for classes without leaves.

        Raises:
            CertificateError: the leaves of a class do not make up the box.
        """
        paths: dict[int, list[list[tuple[int, bool]]]] = {}
        lower = np.full(classes, np.inf)
        leaves = list(trees.leaf_splits())
        for target, (neuron, above, _) in zip(trees.target.tolist(), leaves, strict=True):
            paths.setdefault(target, []).append(list(zip(neuron.tolist(), above.tolist(), strict=True)))
        for target, found in paths.items():
            if not covers(found):
                raise CertificateError(f"the leaves against class {target} do not make up the box")
        for start in range(0, len(leaves), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            targets = trees.target[part]
            found_lower = self._leaves_lower(leaves[part], trees.slopes[part], trees.undecided, targets, label, classes)
            np.minimum.at(lower, targets, found_lower)
        return lower

    def _leaves_lower(
        self,
        leaves: Sequence[tuple[Array, Array, Array]],
        slopes: Array,
        undecided: Array,
        targets: Array,
        label: int,
        classes: int,
    ) -> Array:
        count, sizes = len(leaves), [self.boxes[k].lower.size for k in self.relus]
        lower = np.concatenate([self.boxes[k].lower.ravel() for k in self.relus])[None].repeat(count, 0)
        upper = np.concatenate([self.boxes[k].upper.ravel() for k in self.relus])[None].repeat(count, 0)
        slope, weight = np.zeros_like(lower), np.zeros_like(lower)
        slope[:, undecided] = slopes
        for row, (neuron, above, multiplier) in enumerate(leaves):
            np.maximum.at(lower[row], neuron[above], 0.0)
            np.minimum.at(upper[row], neuron[~above], 0.0)
            np.add.at(weight[row], neuron, np.where(above, -multiplier, multiplier))
        boxes, functions = {}, {}
        ends = np.cumsum(sizes)
        for k, start, end in zip(self.relus, ends - sizes, ends, strict=True):
            shape = self.boxes[k].lower.shape[1:]
            boxes[k] = Sides(*(part[:, start:end].reshape(count, *shape) for part in (lower, upper, slope)))
            functions[self.layers[k].inputs[0]] = weight[:, start:end].reshape(count, *shape)
        rows = np.eye(classes)[label] - np.eye(classes)[targets]
        return self._lower(len(self.layers) - 1, rows, boxes, functions)

    def _lower(self, index: int, a: Array, boxes: Mapping[int, Sides], others: Mapping[int, Array]) -> Array:
        """Lower bounds (R,) of sums: functions `a` (R, ...) of the value `index`, and `others` of values before it.

        Finite, or -inf: where something overflows nothing is known.
        """
        pending = {value: part for value, part in others.items() if part.any()}
        pending[index] = pending[index] + a if index in pending else a
        total = np.zeros(len(a))
        with np.errstate(invalid="ignore", over="ignore"):
            for k in range(index, 0, -1):
                if k not in pending:
                    continue
                a, layer = pending.pop(k), self.layers[k]
                total -= _dots(np.abs(a), self.slack[k])
                pulled, constant = _through_relu(a, boxes[k]) if layer.pull_back is None else layer.pull_back(a)
                total += constant
                for value in layer.inputs:
                    pending[value] = pending[value] + pulled if value in pending else pulled
            if 0 in pending:
                a, image = pending[0], self.layers[0].interval
                radius = image.radius + 2.0**-52 * (image.center.size + 8) * image.magnitude
                total = total + _dots(a, image.center) - _dots(np.abs(a), radius)
            return np.where(np.isfinite(total), total, -np.inf)


def _of_all_rows(lower: Array, upper: Array) -> Sides:
    return Sides(lower[None], upper[None], (upper > -lower)[None].astype(np.float64))


def _through_relu(a: Array, box: Sides) -> tuple[Array, Array]:
    """Where a > 0 by a line through 0 below the ReLU, where a < 0 by the chord above it, raised against rounding."""
    lower, upper, slope = box
    unstable = (lower < 0) & (upper > 0)
    width = np.where(unstable, upper - lower, 1.0)
    chord = np.where(unstable, upper / width, lower >= 0)
    raised = np.maximum(-chord * lower, (1 - chord) * upper) + 2.0**-49 * width
    offset = np.where(unstable, raised, 0.0)
    below = np.where(unstable, slope, chord)
    return np.where(a > 0, below, chord) * a, _dots(np.minimum(a, 0), offset)
