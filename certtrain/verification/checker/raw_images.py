"""Test sets read from their raw files, by other code than `certtrain.data`: numpy, Pillow, and the formats' own rules.

The checker of certificates reads images here, so that a mistake of the loader that fed the verifier shows as another
SHA-256 of the test set, and torch takes no part.
"""

from __future__ import annotations

import gzip
import io
import os
import pickle
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from certtrain.errors import DataError, unknown
from certtrain.verification.digests import split_digest

Array = np.ndarray
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
KNOWN_TEST_SETS = {"digits": "c060583c03ff4279857c5ac86ec2283c19810353ff92f5b3e202caa8f4cf53be"}
"""Name -> `digests.split_digest` of the published test set, of those that this program knows by heart."""


def read_test_set(name: str, folder: Path) -> tuple[Array, Array]:
    """The test images uint8 (N, C, H, W) and labels int64 (N,) of a data set, in the order of its files.

    Args:
        name: as in a config's data.name.
        folder: the one that train.npz and test.npz, or the class folders, lie in; of named data sets, the one that
            their folders lie in.

    Raises:
        DataError: files are missing or broken, or the data set cannot be read independently.
        UsageError: unknown name.
    """
    if name not in READERS:
        raise unknown("data set that the checker can read", name, READERS)
    try:
        images, labels = READERS[name](folder)
    except Exception as error:  # zipfile, zlib, numpy, pickle and Pillow have a dozen ways to complain of broken files
        raise DataError(f"the checker cannot read the {name} test set from {folder}: {error}") from error
    images, labels = np.ascontiguousarray(images), np.asarray(labels).astype(np.int64)
    if images.dtype != np.uint8 or images.ndim != 4 or labels.shape != images.shape[:1] or not images.size:
        raise DataError(f"the {name} test set in {folder} is {images.dtype} {images.shape} with labels {labels.shape}")
    if KNOWN_TEST_SETS.get(name) not in (None, split_digest(images, labels)):
        raise DataError(f"the {name} test set that was read is not the published one: it has another SHA-256")
    return images, labels


def _npz(folder: Path) -> tuple[Array, Array]:
    with np.load(folder / "test.npz", allow_pickle=False) as archive:
        images, labels = archive["images"], archive["labels"]
    if images.ndim == 2:  # a table: images of one pixel, whose channels are its columns
        images = images[:, np.newaxis, np.newaxis]
    return np.moveaxis(images if images.ndim == 4 else images[..., np.newaxis], -1, 1), labels


def _folder(folder: Path) -> tuple[Array, Array]:
    """Classes are numbered by the folders of the training images, which a test split may lack; what is hidden, its name
    beginning with a dot, counts for nothing.
    """
    classes = sorted(entry.name for entry in os.scandir(folder / "train") if entry.is_dir() and entry.name[0] != ".")
    test = next(part for part in (folder / "test", folder / "val") if part.is_dir() or part.name == "val")
    files, labels = [], []
    for label, name in enumerate(classes):
        found = [
            (parent, file)
            for parent, _, inside in os.walk(test / name, followlinks=True)
            for file in inside
            if file.lower().endswith(IMAGE_SUFFIXES) and not _hidden(Path(parent, file), test / name)
        ]
        files += [Path(parent) / file for parent, file in sorted(found)]
        labels += [label] * len(found)
    return _decoded(files), np.array(labels)


def _hidden(file: Path, within: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(within).parts)


def _decoded(files: Sequence[Path]) -> Array:
    from PIL import Image

    decoded = []
    for file in files:
        with Image.open(file) as image:
            decoded.append(np.array(image.convert("RGB")))
    return np.stack(decoded).transpose(0, 3, 1, 2)


def _digits(folder: Path) -> tuple[Array, Array]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    test = np.random.RandomState(0).permutation(1797)[1437:]
    return np.round(digits.data[test] / 16 * 255).astype(np.uint8).reshape(-1, 1, 8, 8), digits.target[test]


def _idx(name: str) -> Callable[[Path], tuple[Array, Array]]:
    def read(folder: Path) -> tuple[Array, Array]:
        raw = folder / name / "raw"
        images, labels = _idx_array(raw / "t10k-images-idx3-ubyte"), _idx_array(raw / "t10k-labels-idx1-ubyte")
        return images[:, np.newaxis], labels

    return read


def _idx_array(file: Path) -> Array:
    """Two zero bytes, the type (8: uint8), the number of axes, their lengths as big-endian uint32, and the elements."""
    content = file.read_bytes() if file.is_file() else gzip.decompress(file.with_name(f"{file.name}.gz").read_bytes())
    zero, kind, axes = struct.unpack_from(">HBB", content)
    shape = struct.unpack_from(f">{axes}I", content, 4)
    if (zero, kind) != (0, 8):
        raise ValueError(f"{file} is no idx file of uint8")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)


def _cifar(folder: Path, binary: str, pickled: str, label: str, before_it: int) -> tuple[Array, Array]:
    """The binary version where it is there: for each image its label, behind `before_it` other bytes, and 3072 pixels;
    else the pickled one, with the labels under the key `label`.
    """
    if (folder / binary).is_file():
        rows = np.frombuffer((folder / binary).read_bytes(), np.uint8).reshape(-1, before_it + 1 + 3072)
        return rows[:, before_it + 1 :].reshape(-1, 3, 32, 32), rows[:, before_it]
    batch = _unpickled(folder / pickled)
    return batch["data"].reshape(-1, 3, 32, 32), batch[label]


def _cifar10(folder: Path) -> tuple[Array, Array]:
    return _cifar(folder, "cifar-10-batches-bin/test_batch.bin", "cifar-10-batches-py/test_batch", "labels", 0)


def _cifar100(folder: Path) -> tuple[Array, Array]:
    """Of its two labels the fine one, which in the binary version follows the coarse one."""
    return _cifar(folder, "cifar-100-binary/test.bin", "cifar-100-python/test", "fine_labels", 1)


class _ArraysOnly(pickle.Unpickler):
    """Builds arrays, and the containers that pickle knows itself; nothing else is imported or called."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return _reconstruct
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes for Python 2
            return lambda text, encoding: text.encode("latin1")
        raise pickle.UnpicklingError(f"the file names {module}.{name}, which is no array")


def _reconstruct(kind: type, shape: tuple[int, ...], typecode: Any) -> Array:
    return np.ndarray.__new__(np.ndarray, shape, typecode)


def _unpickled(file: Path) -> dict[str, Any]:
    return _ArraysOnly(io.BytesIO(file.read_bytes()), encoding="latin1").load()


def _svhn(folder: Path) -> tuple[Array, Array]:
    from scipy.io import loadmat

    content = loadmat(folder / "test_32x32.mat")
    return content["X"].transpose(3, 2, 0, 1), content["y"].ravel() % 10


def _tinyimagenet(folder: Path) -> tuple[Array, Array]:
    root = folder / "tiny-imagenet-200"
    classes = sorted((root / "wnids.txt").read_text("utf-8").split())
    lines = [line.split("\t") for line in (root / "val" / "val_annotations.txt").read_text("utf-8").splitlines()]
    images = _decoded([root / "val" / "images" / line[0] for line in lines])
    return images, np.array([classes.index(line[1]) for line in lines])


READERS: dict[str, Callable[[Path], tuple[Array, Array]]] = {
    "digits": _digits,
    "npz": _npz,
    "folder": _folder,
    "mnist": _idx("MNIST"),
    "fashion-mnist": _idx("FashionMNIST"),
    "cifar10": _cifar10,
    "cifar100": _cifar100,
    "svhn": _svhn,
    "tinyimagenet": _tinyimagenet,
}
