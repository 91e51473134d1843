"""Data sets as uint8 tensors that live on the device, and the batches drawn from them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from certtrain.data.batches import (
    NO_AUGMENTATION,
    Augmentation,
    batch_sizes,
    epoch_batches,
    evaluation_batches,
    steps_per_epoch,
    to_float,
)
from certtrain.data.dataset import Dataset, Split, require_two_classes
from certtrain.data.digits import load_digits
from certtrain.data.folder import load_folder
from certtrain.data.npz import load_npz
from certtrain.data.tinyimagenet import load_tinyimagenet
from certtrain.data.vision import load_cifar10, load_cifar100, load_fashion_mnist, load_mnist, load_svhn
from certtrain.errors import UsageError, unknown

__all__ = [
    "DATASETS",
    "NO_AUGMENTATION",
    "Augmentation",
    "Dataset",
    "Split",
    "batch_sizes",
    "epoch_batches",
    "evaluation_batches",
    "load_dataset",
    "require_two_classes",
    "steps_per_epoch",
    "to_float",
]

DATASETS: dict[str, Callable[[Path, bool], Dataset]] = {
    "digits": load_digits,
    "mnist": load_mnist,
    "fashion-mnist": load_fashion_mnist,
    "cifar10": load_cifar10,
    "cifar100": load_cifar100,
    "svhn": load_svhn,
    "tinyimagenet": load_tinyimagenet,
    "npz": load_npz,
    "folder": load_folder,
}
"""Name -> loader(folder, download). Register your own loader by adding an entry."""

_OWN_PATH = frozenset({"npz", "folder"})  # read the user's own `path`; the others live below the common `root`


def load_dataset(
    name: str,
    root: str | Path = "data",
    *,
    download: bool = False,
    path: str | Path | None = None,
    classes: Sequence[int] | None = None,
    validation: float | int = 0,
    seed: int = 0,
) -> Dataset:
    """Load a data set into CPU memory.

    Args:
        name: a key of `DATASETS`.
        root: the folder in which the named data sets are kept, and into which they are downloaded.
        download: fetch the data if it is missing; without effect on data sets that have no download.
        path: the folder to read, for `npz` and `folder` only, which need it.
        classes: only the images of these, in all splits, numbered anew in this order (`Dataset.of_classes`).
        validation: images to cut off the training set, a count or a share of it (`Dataset.with_validation`).
        seed: which images those are.

    Raises:
        UsageError: unknown name or class; `path` missing or out of place; a validation split that is not smaller than
            train.
        DataError: the data is missing, corrupt, breaks the data set's layout, or is of one class only.
    """
    if name not in DATASETS:
        raise unknown("data set", name, DATASETS)
    if name in _OWN_PATH and path is None:
        raise UsageError(f"data set {name!r} needs the folder to read: set data.path")
    if name not in _OWN_PATH and path is not None:
        raise UsageError(f"data set {name!r} is read from data.root and takes no data.path")
    folder = Path(os.path.expanduser(root if path is None else path))  # which leaves ~nobody as it is
    dataset = DATASETS[name](folder, download).with_validation(validation, seed)
    if classes is not None:  # afterwards, so that the images held out are the same ones for any classes
        dataset = dataset.of_classes(classes)
    require_two_classes(dataset.train)
    return dataset
