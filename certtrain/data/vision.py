"""The data sets that torchvision knows how to download and read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from certtrain.data.dataset import Dataset, Split, identity_normalization
from certtrain.errors import DataError

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR10

CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
_DIGITS = tuple(map(str, range(10)))


def load_mnist(root: Path, download: bool) -> Dataset:
    """MNIST: 60,000 + 10,000 digits, 1×28×28, from the idx files in `<root>/MNIST/raw/`."""
    from torchvision.datasets import MNIST

    return _mnist_like(MNIST, _DIGITS, root, download)


def load_fashion_mnist(root: Path, download: bool) -> Dataset:
    """Fashion-MNIST: 60,000 + 10,000 garments, 1×28×28, from the idx files in `<root>/FashionMNIST/raw/`."""
    from torchvision.datasets import FashionMNIST

    return _mnist_like(FashionMNIST, tuple(FashionMNIST.classes), root, download)


def load_cifar10(root: Path, download: bool) -> Dataset:
    """CIFAR-10: 50,000 + 10,000 images, 3×32×32, from `<root>/cifar-10-batches-py/`."""
    from torchvision.datasets import CIFAR10

    return _cifar_like(CIFAR10, root, download, mean=CIFAR10_MEAN, std=CIFAR10_STD)


def load_cifar100(root: Path, download: bool) -> Dataset:
    """CIFAR-100, fine labels: 50,000 + 10,000 images, 3×32×32, from `<root>/cifar-100-python/`."""
    from torchvision.datasets import CIFAR100

    return _cifar_like(CIFAR100, root, download, **identity_normalization(3))


def load_svhn(root: Path, download: bool) -> Dataset:
    """SVHN, cropped digits: 73,257 + 26,032 images, 3×32×32, from `<root>/{train,test}_32x32.mat`; digit 0 is class 0.

    The `extra` images are not used.
    """
    from torchvision.datasets import SVHN

    train, test = _open("SVHN", root, download, lambda part: SVHN(root, split=part, download=download))
    first, second = (_split(torch.from_numpy(raw.data), raw.labels) for raw in (train, test))
    return Dataset(first, second, classes=_DIGITS, **identity_normalization(3))


def _mnist_like(kind: Callable[..., Any], classes: tuple[str, ...], root: Path, download: bool) -> Dataset:
    name = kind.__name__
    train, test = _open(
        name, root / name / "raw", download, lambda part: kind(root, train=part == "train", download=download)
    )
    first, second = (_split(raw.data[:, None], raw.targets) for raw in (train, test))
    return Dataset(first, second, classes=classes, **identity_normalization(1))


def _cifar_like(
    kind: type[CIFAR10], root: Path, download: bool, mean: tuple[float, ...], std: tuple[float, ...]
) -> Dataset:
    # torchvision checks each file's md5 before it unpickles it.
    train, test = _open(
        kind.__name__,
        root / kind.base_folder,
        download,
        lambda part: kind(root, train=part == "train", download=download),
    )
    first, second = (_split(torch.from_numpy(raw.data).permute(0, 3, 1, 2), raw.targets) for raw in (train, test))
    return Dataset(first, second, classes=tuple(train.classes), mean=mean, std=std)


def _split(images: Tensor, labels: Any) -> Split:
    return Split(images.contiguous(), torch.as_tensor(labels, dtype=torch.int64))


def _open(name: str, folder: Path, download: bool, read: Callable[[str], Any]) -> tuple[Any, Any]:
    """read("train") and read("test"); what torchvision raises, of any type, becomes a DataError with a way out."""
    try:
        return read("train"), read("test")
    except Exception as error:
        reason = str(error).partition(". You can use download")[0] or type(error).__name__
        if download:
            raise DataError(f"{name}: could not be downloaded to or read from {folder}: {reason}") from error
        raise DataError(
            f"{name}: cannot be read from {folder}: {reason}. Put the official files there, "
            "or have them downloaded: data.download=true"
        ) from error
