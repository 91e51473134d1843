"""Your own data as two numpy archives."""

from __future__ import annotations

import math
import os
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch

from certtrain.data.dataset import Dataset, Split, identity_normalization
from certtrain.data.decoding import require_memory
from certtrain.errors import DataError, shortened

MOST_CLASSES = 100_000  # a greater label is a mistake, not a class
MOST_SHRUNK = 100  # times; real images shrink to a third, MNIST's to a tenth
DARK = 32  # of 255: a training set without a brighter pixel was scaled to 1, or to 16 as scikit-learn's digits are
LARGEST_UNCHECKED = 2**30  # bytes; drawings of a few pixels may shrink to less


def load_npz(path: Path, download: bool) -> Dataset:
    """`<path>/train.npz` and `<path>/test.npz`, each with two arrays:

    `images`: uint8 (N, H, W, C), or (N, H, W) for one channel; `labels`: non-negative integers (N,).

    A table of N rows with F features, uint8 (N, F), is taken too, as images of one pixel with F channels (F, 1, 1):
    each feature scaled to 0 … 255, so that epsilon is a share of its range, and `mean` and `std` are by feature. A
    network of linear layers, such as `mlp`, is made for those.

    There are as many classes as the largest label of both files plus one; a class may have no images. Normalisation
    is the identity. Nothing is downloaded.
    """
    train, test = _read(path / "train.npz"), _read(path / "test.npz")
    if (brightest := int(train.images.max())) < DARK:
        raise DataError(f"{path / 'train.npz'}: the largest value is {brightest}: images must be scaled to 0 … 255")
    num_classes = 1 + max(int(split.labels.max()) for split in (train, test))
    if min(int(split.labels.min()) for split in (train, test)) > 0:
        warnings.warn(f"{path}: no image has label 0, which is a class all the same: labels count from 0", stacklevel=3)
    return Dataset(
        train, test, classes=tuple(map(str, range(num_classes))), **identity_normalization(train.images.shape[1])
    )


def _check_sizes(file: Path, archive: zipfile.ZipFile) -> None:
    """Before anything is unpacked: real images do not shrink to next to nothing, and all of them are there."""
    packed = file.stat().st_size
    unpacked = sum(archive.getinfo(f"{name}.npy").file_size for name in ("images", "labels"))
    if unpacked > max(LARGEST_UNCHECKED, MOST_SHRUNK * packed):
        raise DataError(f"{file} is no data set: its {packed:,} bytes claim to unpack to {unpacked:,}")
    for name in ("images", "labels"):
        with archive.open(f"{name}.npy") as array:
            version = np.lib.format.read_magic(array)
            header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
            shape, _, dtype = header(array)
        claimed = math.prod(shape) * dtype.itemsize
        if claimed > archive.getinfo(f"{name}.npy").file_size:
            raise DataError(f"{file} is truncated: {name} of shape {shape} are {claimed:,} bytes, and there are fewer")


def _read(file: Path) -> Split:
    if not os.path.isfile(file):
        raise DataError(f"{file} is missing: the npz data set needs train.npz and test.npz in one folder")
    images, labels = _arrays(file)
    if images.dtype != np.uint8 or images.ndim not in (2, 3, 4):
        raise DataError(
            f"{file}: images must be uint8 (N, H, W, C), (N, H, W) or a table (N, F), with values scaled to 0 … 255, "
            f"not {images.dtype} {images.shape}"
        )
    if images.ndim == 4 and _look_channels_first(*images.shape[1:]):
        raise DataError(f"{file}: images of shape {images.shape} have their channels first; they must come last")
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{file}: labels must be integers, not {labels.dtype}")
    if labels.size and labels.min() < 0:
        raise DataError(f"{file}: labels must not be negative, the smallest is {labels.min()}")
    if labels.size and labels.max() >= MOST_CLASSES:
        raise DataError(f"{file}: a label is {labels.max()}; labels count the classes, of which there are fewer")
    try:
        channels_first = np.ascontiguousarray(_channels_first(images))
        return Split(torch.from_numpy(channels_first), torch.from_numpy(labels.astype(np.int64)))
    except DataError as error:
        raise DataError(f"{file}: {error}") from error


def _look_channels_first(first: int, second: int, last: int) -> bool:
    """Rather than (H, W, C): few before many, or a square behind fewer."""
    return last > 4 and (first <= 4 or first < second == last)


def _arrays(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """`images` and `labels`, of an archive that fits into memory; nothing in it is executed."""
    try:
        with zipfile.ZipFile(file) as archive:
            _check_sizes(file, archive)
            members = [archive.getinfo(f"{name}.npy") for name in ("images", "labels")]
        require_memory(sum(member.file_size for member in members), f"{file}: its arrays")
        with np.load(file, allow_pickle=False) as arrays:
            images, labels = arrays["images"], arrays["labels"]
        if not (isinstance(images, np.ndarray) and isinstance(labels, np.ndarray)):  # numpy hands out other members raw
            raise ValueError("they are no arrays")
        return images, labels
    except DataError:
        raise
    except Exception as error:  # zipfile, zlib and numpy have a dozen ways to complain of a damaged archive
        reason = shortened(str(error) or type(error).__name__, 160)
        raise DataError(f"{file} is no readable archive of `images` and `labels`: {reason}") from error


def _channels_first(images: np.ndarray) -> np.ndarray:
    """(N, C, H, W)."""
    if images.ndim == 2:
        return images[:, :, None, None]
    return images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
