"""What is left to prove about a trained network, as VNN-LIB properties for other verifiers."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor, nn

from certtrain.bounds.rounding.boxes import enclosing_linf_box, nearest_above, nearest_below
from certtrain.config import Config, load_config
from certtrain.data import Dataset, to_float
from certtrain.errors import UsageError
from certtrain.export.onnx import export_onnx
from certtrain.runs.evaluation import verify_run
from certtrain.runtime.files import make_folder, write_atomically, write_text
from certtrain.verification.verification import Verification


def export_vnnlib(
    folder: Path, config: Config, model: nn.Module, dataset: Dataset, eps: float, limit: int | None, timeout: int
) -> Verification:
    """Write the network, a property for each test image that is unknown, and instances.csv, which lists them.

    Unknown is an image that is classified right, proved neither by IBP nor by the configuration's methods, and not
    attacked by its attacks.

    Args:
        folder: new, or empty.
        eps: radius of the boxes.
        limit: only the first so many test images.
        timeout: seconds that a verifier should spend on a property, for instances.csv.

    Returns:
        What was found out about the images; those of `unknown_images` have a property.

    Raises:
        UsageError: there is something in `folder`.
        CheckpointError: nothing can be written there.
        MissingDependency, UnsupportedOperation: as of `export_onnx`.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError(f"{folder} is not an empty folder: name a new one")
    with TemporaryDirectory() as place:  # what cannot be written is known now rather than after hours of proofs
        export_onnx(model, dataset.image_shape, Path(place) / "model.onnx")
        network = (Path(place) / "model.onnx").read_bytes()
    make_folder(folder)
    methods = dict.fromkeys(("ibp", *config.verification.method))
    config = load_config(config, {"verification": {"eps": eps, "method": list(methods)}})
    (result,) = verify_run(config, model, dataset, limit)
    write_atomically(folder / "model.onnx", lambda file: file.write(network))
    rows = []
    for index in unknown_images(result):
        image, label = to_float(dataset.test.images[index]), int(dataset.test.labels[index])
        name = f"image_{index:05}.vnnlib"
        title = f"; test image {index}, label {label}, epsilon {eps!r}\n"
        write_text(folder / name, title + vnnlib_property(*outer_box(image, eps), label, dataset.num_classes))
        rows.append(f"model.onnx,{name},{timeout}\n")
    write_text(folder / "instances.csv", "".join(rows))
    return result


def unknown_images(result: Verification) -> list[int]:
    """Those that are classified right, and neither proved nor attacked."""
    return result.unknown.nonzero()[:, 0].tolist()


def vnnlib_property(lower: Tensor, upper: Tensor, label: int, classes: int) -> str:
    """VNN-LIB 1.0 text that is satisfied by the counterexamples: images of the box not classified as `label`.

    Args:
        lower, upper: float32 of any shape; element i, counted row by row, is X_i, class j is Y_j.
    """
    ends = list(zip(lower.flatten().tolist(), upper.flatten().tolist(), strict=True))
    lines = [f"(declare-const X_{i} Real)" for i in range(len(ends))]
    lines += [f"(declare-const Y_{j} Real)" for j in range(classes)]
    for i, (low, high) in enumerate(ends):
        lines += [f"(assert (>= X_{i} {_decimal(low)}))", f"(assert (<= X_{i} {_decimal(high)}))"]
    others = " ".join(f"(and (>= Y_{j} Y_{label}))" for j in range(classes) if j != label)
    return "\n".join([*lines, f"(assert (or {others}))"]) + "\n"


def outer_box(images: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Float32 ends of the box of radius `eps` around float32 `images`, rounded outward, cut to [0, 1]."""
    box = enclosing_linf_box(images, eps)
    return nearest_below(box.lower, images.dtype), nearest_above(box.upper, images.dtype)


def _decimal(value: float) -> str:
    """Every digit of a binary number; VNN-LIB knows no exponents."""
    text = f"{Decimal(value):f}"
    return text if "." in text else f"{text}.0"
