"""The architectures of `certtrain.models`, layer by layer, as the checker reads them from a network's files.

The network that is proved is the one that `certtrain.load_model` gives: model.json's architecture with the values of
model.safetensors, which must be stored as float32 (and BatchNorm's counters as int64), so that loading rounds nothing.
Other types are refused here and there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from certtrain.errors import CertificateError
from certtrain.runtime.files import parse_json
from certtrain.verification.checker.intervals import Array, Interval, Propagation
from certtrain.verification.checker.linear import LinearChecker, Recording
from certtrain.verification.checker.transformer import encode
from certtrain.verification.digests import digest

Window = Callable[[Array], tuple[int, int]]  # the stride and padding of a convolution, by its kernels


def _layers(p: Propagation, x: Interval, name: str, positions: Iterable[int], window: Window) -> Interval:
    """Layers in a row, by their position; what has no weights is a ReLU, or a flattening before a linear layer."""
    for position in positions:
        layer = f"{name}.{position}"
        weight = p.weights.get(f"{layer}.weight")
        if f"{layer}.branch.0.weight" in p.weights:
            x = _block(p, x, layer, window(p.weights[f"{layer}.branch.0.weight"])[0])
        elif weight is None:
            following = p.weights.get(f"{name}.{position + 1}.weight")
            flattens = x.center.ndim == 3 and following is not None and following.ndim == 2
            x = p.flatten(x) if flattens else p.relu(x)
        elif weight.ndim == 4:
            x = p.convolution(x, layer, *window(weight), groups=len(x.center) // weight.shape[1])
        elif weight.ndim == 2:
            x = p.linear(x, layer)
        else:
            x = p.batch_norm(x, layer)
    return x


def _block(p: Propagation, x: Interval, name: str, stride: int) -> Interval:
    """relu(branch + shortcut): the branch's first 3×3 convolution has the stride, and so has the shortcut's."""
    strides = itertools.chain([stride], itertools.repeat(1))
    positions = range(_last_position(p, f"{name}.branch") + 1)
    branch = _layers(
        p,
        x,
        f"{name}.branch",
        positions,
        lambda kernels: _window(next(strides) if kernels.shape[2] == 3 else 1, kernels),
    )
    positions = range(_last_position(p, f"{name}.shortcut") + 1)
    shortcut = _layers(p, x, f"{name}.shortcut", positions, lambda kernels: _window(stride, kernels))
    return p.relu(p.add(branch, shortcut))


def _window(given: int | tuple[int, int], kernels: Array) -> tuple[int, int]:
    """Of a convolution for which there is a stride only, the padding is half the kernel's size, rounded down."""
    return (given, kernels.shape[2] // 2) if isinstance(given, int) else given


def _last_position(p: Propagation, name: str) -> int:
    """Of the layers with weights below `name`; -1 without any."""
    inside = (key.removeprefix(f"{name}.") for key in p.weights if key.startswith(f"{name}."))
    return max((int(key.split(".")[0]) for key in inside), default=-1)


def _cnn7(image_shape: Sequence[int], options: Mapping[str, Any]) -> tuple[int, ...]:
    return (1, 1, 2, 1, 2 if image_shape[1] >= 64 else 1)


def _resnext(image_shape: Sequence[int], options: Mapping[str, Any]) -> tuple[int, ...]:
    per_stage = options.get("blocks") or (2 if image_shape[1] >= 64 else 1)
    return (1, *(stride for first in (1, 2, 2) for stride in (first, *[1] * (per_stage - 1))))


WINDOWS: dict[str, Callable[[Sequence[int], Mapping[str, Any]], Sequence[int | tuple[int, int]]]] = {
    "cnn7": _cnn7,
    "cnn7-wide": _cnn7,
    "cnn-large": lambda *_: (1, 1, 2, 1, 1),
    "cnn-small": lambda *_: (1, 2),
    "cnn-2layer": lambda *_: ((2, 1), (2, 1)),
    "cnn-3layer": lambda *_: ((1, 1), (1, 1), (4, 0)),
    "cnn-4layer": lambda *_: ((1, 1), (2, 1), (1, 1), (2, 1)),
    "mlp": lambda *_: (),
    "wide-resnet": lambda *_: (1, 1, 2, 2),
    "resnext": _resnext,
}
"""Of the convolutions and blocks of a network, in order: strides, or strides with paddings; see `_window`."""
KNOWN = (*WINDOWS, "vit")


def require_known(network: str) -> None:
    """Raises CertificateError for a network whose certificates the checker could not prove again."""
    if network not in KNOWN:
        raise CertificateError(f"the checker does not know the network {network}; it knows {', '.join(KNOWN)}")


@dataclass(frozen=True)
class SavedNetwork:
    """A network as its files describe it."""

    architecture: Mapping[str, Any]
    weights: Mapping[str, Array]
    sha256: str

    @classmethod
    def read(cls, file: Path) -> SavedNetwork:
        """From model.safetensors, with model.json beside it.

        Raises:
            CertificateError: they cannot be read, do not fit each other, hold values of other types than float32, or
                the checker does not know the architecture.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            content = file.read_bytes()
            architecture = parse_json((file.parent / "model.json").read_bytes())["model"]
            stored = load(content)
            name = str(architecture["name"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
            raise CertificateError(f"{file} or its model.json cannot be read ({error})") from error
        require_known(name)
        for key, value in stored.items():
            expected = np.int64 if key.endswith(".num_batches_tracked") else np.float32
            if value.dtype != expected:
                raise CertificateError(f"{file} holds {key} as {value.dtype}, not {np.dtype(expected)}")
        network = cls(architecture, {key: value.astype(np.float64) for key, value in stored.items()}, digest(content))
        network._require_fit()
        return network

    def _require_fit(self) -> None:
        """Raises CertificateError where the weights are not those of the architecture."""
        try:
            shape, classes = tuple(map(int, self.architecture["image_shape"])), self.architecture["num_classes"]
            last = self.classifier_input(np.zeros(shape), np.zeros(shape), "float32")
            rows = len(self.weights[f"{last.last_layer}.weight"])
        except (LookupError, ValueError, TypeError, AttributeError, StopIteration) as error:
            raise CertificateError(f"the weights are not those of the network in model.json ({error})") from error
        if rows != classes or classes < 2:
            raise CertificateError(f"the network has {rows} logits, model.json says {classes} classes")

    def classifier_input(self, lower: Array, upper: Array, arithmetic: str) -> ClassifierInput:
        """What can enter the last layer for any (C, H, W) image between the two."""
        return self._walk(Propagation(self.weights, arithmetic), lower, upper)

    def linear_bounds(self, lower: Array, upper: Array, arithmetic: str) -> LinearChecker:
        """Ready for bounds of what the network makes of any (C, H, W) image between the two."""
        recording = Recording(self.weights, arithmetic)
        entering = self._walk(recording, lower, upper)
        with np.errstate(invalid="ignore", over="ignore"):
            recording.linear(entering.x, entering.last_layer)
            return LinearChecker(recording)

    def _walk(self, p: Propagation, lower: Array, upper: Array) -> ClassifierInput:
        with np.errstate(invalid="ignore", over="ignore"):
            x = p.image(lower, upper)
            if "normalize.mean" in self.weights:
                x = p.normalize(x, "normalize.mean", "normalize.std")
            a, last = self.architecture, _last_position(p, "network")
            if a["name"] == "vit":
                x = encode(p, x, a.get("options") or {}, "network", last)
                return ClassifierInput(p, x, f"network.{last}", a["num_classes"])
            windows = iter(WINDOWS[a["name"]](a["image_shape"], a.get("options") or {}))
            x = _layers(p, x, "network", range(last), lambda kernels: _window(next(windows), kernels))
            return ClassifierInput(p, x, f"network.{last}", a["num_classes"])


@dataclass(frozen=True)
class ClassifierInput:
    """What enters the last layer, and so which classes may come out."""

    propagation: Propagation
    x: Interval
    last_layer: str
    classes: int

    def margin(self, label: int) -> float:
        """Lower bound of the least z_label - z_j, j ≠ label; above 0 nothing but `label` can be predicted."""
        return float(np.delete(self.margins(label), label).min())

    def can_predict(self, label: int) -> bool:
        """False where another class is certainly above `label`."""
        return all(self.margins(other)[label] <= 0 for other in range(self.classes))

    def margins(self, label: int) -> Array:
        """(K,) lower bounds of z_label - z_j."""
        with np.errstate(invalid="ignore", over="ignore"):
            return self.propagation.margins(self.x, self.last_layer, label)
