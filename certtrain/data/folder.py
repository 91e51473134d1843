"""Your own data as folders of image files."""

from __future__ import annotations

from pathlib import Path

import torch

from certtrain.data.dataset import Dataset, Split, identity_normalization
from certtrain.data.decoding import decode_images
from certtrain.errors import DataError


def load_folder(path: Path, download: bool) -> Dataset:
    """torchvision's ImageFolder layout: `<path>/train/CLASS/*.png` (jpg, …) and `<path>/test/CLASS/…`.

    `val` stands in for a missing `test`. Classes are the folders below `train`, sorted by name; `test` may lack some
    of them and may have no others; every folder holds an image. All images have one size and are read as RGB.
    Normalisation is the identity. Nothing is downloaded.
    """
    train_folder = path / "train"
    test_folder = path / "test" if (path / "test").is_dir() else path / "val"
    train_classes, train_samples = _scan(train_folder)
    test_classes, test_samples = _scan(test_folder)
    if strangers := sorted(set(test_classes) - set(train_classes)):
        raise DataError(f"{test_folder} has classes that {train_folder} has not: {', '.join(strangers)}")
    index = {name: label for label, name in enumerate(train_classes)}

    train = _read(train_samples, index, "Reading training images")
    test = _read(test_samples, index, "Reading test images", size=tuple(train.images.shape[2:]))
    return Dataset(train, test, tuple(train_classes), **identity_normalization(3))


def _scan(folder: Path) -> tuple[list[str], list[tuple[Path, str]]]:
    """The class names below `folder`, sorted, and the image files with their class names."""
    from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

    try:
        classes, index = find_classes(folder)
        samples = make_dataset(folder, index, IMG_EXTENSIONS)
    except OSError as error:
        raise DataError(f"{folder} is not a folder of class folders with images: {error}") from error
    return classes, [(Path(file), classes[label]) for file, label in samples]


def _read(
    samples: list[tuple[Path, str]], index: dict[str, int], title: str, size: tuple[int, int] | None = None
) -> Split:
    images = decode_images([file for file, _ in samples], title, size)
    return Split(torch.from_numpy(images), torch.tensor([index[name] for _, name in samples]))
