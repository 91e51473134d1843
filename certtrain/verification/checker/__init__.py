"""A second opinion on certificates: plain numpy in float64, one image at a time, from the saved files alone.

Nothing of the program that proved them takes part: no file of this package imports torch, `certtrain.bounds` or
`certtrain.data`. Each operation of a network is written out, in `intervals` and `transformer`, as what it does to an
interval [center - radius, center + radius] of one image's values, and in `linear` as what it does to a linear function
of them. `network` reads the network, `raw_images` the images, and `coverage` says whether the certificates are all
there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from certtrain.errors import CertificateError
from certtrain.verification.certificates import CHECKED_METHODS, CLAIMED, Certificates, Claim
from certtrain.verification.checker.coverage import check_coverage
from certtrain.verification.checker.intervals import UNIT, Array
from certtrain.verification.checker.network import SavedNetwork
from certtrain.verification.digests import digest, split_digest
from certtrain.verification.trees import Trees
from certtrain.verification.verdicts import Verdict

__all__ = ["SavedNetwork", "check"]

SEARCH_AGREEMENT = 1e-5  # of margins by boxes that going back has made, in float64, by two programs
AGREEMENT = 1e-7  # relative; two derivations of one margin in float64 differ by less


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
