"""A second opinion on certificates: plain numpy in float64, one image at a time, from the saved files alone.

Nothing of the program that proved them takes part: no tracing, no torch, no bound of `certtrain.bounds`. Each operation
of a network is written out, in `propagation.py` and `transformer.py`, as what it does to an interval
[center - radius, center + radius] of one image's values, in float64.

The network that is proved is the one that `certtrain.load_model` gives: model.json's architecture with the values of
model.safetensors, which must be stored as float32 (and BatchNorm's counters as int64), so that loading rounds nothing.
Other types are refused here and there. Images are those that `raw_images` reads.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from certtrain.errors import CertificateError
from certtrain.runtime.files import parse_json
from certtrain.verification.certificates import CHECKED_METHODS, CLAIMED, Certificates, Claim
from certtrain.verification.coverage import check_coverage
from certtrain.verification.digests import digest, split_digest
from certtrain.verification.linear_checker import LinearChecker, Recording
from certtrain.verification.propagation import UNIT, Array, Interval, Propagation
from certtrain.verification.transformer import encode
from certtrain.verification.trees import Trees
from certtrain.verification.verdicts import Verdict

SEARCH_AGREEMENT = 1e-5  # of margins by boxes that going back has made, in float64, by two programs
AGREEMENT = 1e-7  # relative; two derivations of one margin in float64 differ by less


# --- the architectures of certtrain.models, layer by layer ------------------------------------------------------------

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


# --- the check --------------------------------------------------------------------------------------------------------


def check(
    certificates: Certificates,
    network: SavedNetwork,
    name: str,
    images: Array,
    labels: Array,
    console: Console,
    allow_partial: bool = False,
) -> tuple[Claim, ...]:
    """Check that the certificates hold, and that they are all there; returns what they claim, which then is true.

    Args:
        name: of the data set.
        images: uint8 (N, C, H, W); labels: (N,): its whole test split, as `raw_images` reads it.
        console: where progress goes.
        allow_partial: claims may be about some images only.

    Raises:
        CertificateError: the first thing that does not hold.
    """
    check_header(certificates, network, name, images, labels)
    certificates.check_size(len(images), images[0].size)
    claims = check_coverage(certificates, len(images), allow_partial)
    total = sum(claim.images for claim in claims)
    shown = console.is_terminal
    for row in track(certificates.rows(), "checking", total, console=console, transient=True, disable=not shown):
        try:
            check_row(row, network, images, labels)
        except CertificateError:
            raise
        except Exception as error:  # of values that nobody thought of: what cannot be checked does not hold
            reason = f"{type(error).__name__}: {error}"[:200]
            raise CertificateError(f"index {row['index']}: it cannot be checked ({reason})") from error
    return claims


def check_header(certificates: Certificates, network: SavedNetwork, name: str, images: Array, labels: Array) -> None:
    """Raises CertificateError if the certificates are about another network, or other images."""
    header = certificates.header
    if header.model_sha256 != network.sha256:
        raise CertificateError("these certificates are about another model: its model.safetensors has another SHA-256")
    if header.model != network.architecture:
        raise CertificateError("these certificates are about another model: its model.json differs")
    if header.data.name != name:
        raise CertificateError(f"these certificates are about the data set {header.data.name}, not {name}")
    if header.data.images != len(images):
        raise CertificateError(f"the header says {header.data.images} test images, {name} has {len(images)}")
    if header.data.sha256 != split_digest(images, labels):
        raise CertificateError(
            f"these certificates are about other test images or labels than {name}'s: SHA-256 differs"
        )


def check_row(row: Mapping[str, Any], network: SavedNetwork, images: Array, labels: Array) -> None:
    """Does one certificate hold?

    Args:
        row: of `certificates.read_certificates`.
        images: uint8 (N, C, H, W); labels: (N,): the test set.

    Raises:
        CertificateError: what does not hold.
    """
    index, label, eps = row["index"], row["label"], row["epsilon"]
    if not 0 <= index < len(images):
        raise CertificateError(f"index {index}: the data set has {len(images)} images")
    if digest(images[index].tobytes()) != row["sha256"]:
        raise CertificateError(f"index {index}: another image than the data set's")
    if int(labels[index]) != label:
        raise CertificateError(f"index {index}: label {label}, the data set says {int(labels[index])}")
    if not 0 <= label < network.architecture["num_classes"]:
        raise CertificateError(f"index {index}: label {label} is none of the network's classes")
    methods = row["method"].split(",")
    if not set(methods) <= set(CHECKED_METHODS) or row["arithmetic"] not in UNIT:
        raise CertificateError(f"index {index}: bounds by {row['method']} in {row['arithmetic']} cannot be checked")
    searched = methods[-1] == "branch-and-bound" and row["verdict"] == Verdict.PROVED
    if row["tree"] is not None and not searched:
        raise CertificateError(f"index {index}: a tree belongs where branch and bound has proved an image")
    if not (np.isfinite(eps) and eps >= 0):
        raise CertificateError(f"index {index}: epsilon is {eps}")
    lower, upper = _pixel_box(images[index], eps)
    _check_margin(row, network, lower, upper)
    image = (images[index].astype(np.float32) / np.float32(255)).astype(np.float64)
    if not (0 <= row["prediction"] < network.architecture["num_classes"] and _predicts(network, image, row)):
        raise CertificateError(f"index {index}: the prediction is not {row['prediction']}")
    _check_verdict(row, network, image, (lower, upper))


def _check_margin(row: Mapping[str, Any], network: SavedNetwork, lower: Array, upper: Array) -> None:
    """One by intervals is the certificate's; one by going back, or by a search that stopped, is no less.

    Whatever the method, only a proved row has a margin above 0.
    """
    index, claimed, proved = row["index"], row["margin"], row["verdict"] == Verdict.PROVED
    if not (proved or claimed <= 0):
        raise CertificateError(f"index {index}: verdict {row['verdict']}, but the margin is {claimed:.9g}")
    entering = network.classifier_input(lower, upper, row["arithmetic"])
    margin = entering.margin(row["label"])
    if row["method"] == "ibp":
        agrees = _agree(claimed, margin, AGREEMENT)
    elif proved:
        if not (margin > 0 and claimed <= margin):
            margin = _margin_going_back(network, lower, upper, row, entering.margins(row["label"]))
        agrees = claimed <= margin or _agree(claimed, margin, SEARCH_AGREEMENT)
    else:
        return  # it only says that no proof was found
    if not agrees:
        raise CertificateError(f"index {index}: the margin is {margin:.9g}, the certificate says {claimed:.9g}")
    if proved != (0 < margin < np.inf):
        raise CertificateError(f"index {index}: verdict {row['verdict']}, but the margin is {margin:.9g}")


def _agree(claimed: float, margin: float, tolerance: float) -> bool:
    """Up to a relative tolerance of finite margins; an infinite one is itself alone."""
    finite = np.isfinite(claimed) and np.isfinite(margin)
    return claimed == margin or bool(finite and abs(margin - claimed) <= tolerance * max(1.0, abs(margin)))


def _margin_going_back(
    network: SavedNetwork, lower: Array, upper: Array, row: Mapping[str, Any], by_intervals: Array
) -> float:
    """The least margin by going back through intervals, then through tighter ones, and by the leaves of the tree."""
    if network.architecture["name"] == "vit":
        raise CertificateError(f"index {row['index']}: of transformers bounds by {row['method']} cannot be checked")
    label, classes = row["label"], network.architecture["num_classes"]
    bounds = network.linear_bounds(lower, upper, row["arithmetic"])
    best, claimed = np.fmax(by_intervals, bounds.margins(label, classes)), row["margin"]
    for _ in bounds.tightening():
        if (best >= claimed).all():
            break
        best = np.fmax(best, bounds.margins(label, classes))
    if row["tree"] is not None and not (best >= claimed).all():
        trees = Trees.from_bytes(row["tree"], classes, bounds.neurons)
        of_leaves = bounds.leaf_margins(trees, label, classes)
        best = np.where(np.isfinite(of_leaves), np.fmax(best, of_leaves), best)
    return float(best.min())


def _check_verdict(row: Mapping[str, Any], network: SavedNetwork, image: Array, box: tuple[Array, Array]) -> None:
    index, label, verdict, adversarial = (row[key] for key in ("index", "label", "verdict", "adversarial"))
    correct = row["prediction"] == label
    if verdict not in CLAIMED:
        raise CertificateError(f"index {index}: unknown verdict {verdict!r}")
    if verdict != Verdict.ATTACKED and not correct:
        raise CertificateError(f"index {index}: verdict {verdict}, but the prediction is not the label")
    if (adversarial is not None) != (verdict == Verdict.ATTACKED and correct):
        raise CertificateError(f"index {index}: an adversarial image belongs where a right prediction was attacked")
    if adversarial is None:
        return
    point = np.array(adversarial, dtype=np.float64)
    if point.size != image.size or not _inside(point.reshape(image.shape), *box):
        raise CertificateError(f"index {index}: the adversarial image is not within epsilon of the image")
    point = point.reshape(image.shape)
    if network.classifier_input(point, point, row["arithmetic"]).margin(label) > 0:
        raise CertificateError(f"index {index}: the adversarial image is classified as the label")


def _predicts(network: SavedNetwork, image: Array, row: Mapping[str, Any]) -> bool:
    proved = row["verdict"] == Verdict.PROVED and row["prediction"] == row["label"]  # which the margin has shown
    return proved or network.classifier_input(image, image, row["arithmetic"]).can_predict(row["prediction"])


def _pixel_box(image: Array, eps: float) -> tuple[Array, Array]:
    """Every representation of every image within `eps` of a stored one: three roundings to float32, and ours."""
    pixels = image.astype(np.float64) / 255
    reach = eps + 2.0**-22 * (pixels + eps)
    return np.maximum(pixels - reach, 0.0), np.minimum(pixels + reach, 1.0)


def _inside(point: Array, lower: Array, upper: Array) -> bool:
    return bool(((lower <= point) & (point <= upper)).all())
