"""Your own data as folders of image files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

import torch

from certtrain.data.dataset import Dataset, Split, identity_normalization
from certtrain.data.decoding import decode_images
from certtrain.errors import DataError

OTHERS = (".apng", ".avif", ".dib", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".pbm", ".pnm", ".tga")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def load_folder(path: Path, download: bool) -> Dataset:
    """torchvision's ImageFolder layout: `<path>/train/CLASS/*.png` (jpg, …) and `<path>/test/CLASS/…`.

    `val` stands in for a missing `test`. Classes are the folders below `train`, sorted by name; `test` may lack some
    of them and may have no others; every folder holds an image. Hidden files and folders, such as .ipynb_checkpoints,
    are passed over. A class may be a link to its folder; links to folders below that are refused. All images have one
    size and are read as RGB (`decode_images` says which); images in formats that are not read are refused, other files
    passed over. Normalisation is the identity. Nothing is downloaded.
    """
    train_folder = path / "train"
    train_classes, train_samples = _scan(train_folder)
    test_folder = next((path / name for name in ("test", "val") if (path / name).is_dir()), None)
    if test_folder is None:
        raise DataError(f"{path} has no folder test, nor val in its place")
    test_classes, test_samples = _scan(test_folder)
    if strangers := sorted(set(test_classes) - set(train_classes)):
        raise DataError(f"{test_folder} has classes that {train_folder} has not: {', '.join(strangers)}")
    index = {name: label for label, name in enumerate(train_classes)}

    train = _read(train_samples, index, "Reading training images")
    height, width = train.images.shape[2:]
    test = _read(test_samples, index, "Reading test images", size=(height, width))
    return Dataset(train, test, tuple(train_classes), **identity_normalization(3))


def _scan(folder: Path) -> tuple[list[str], list[tuple[Path, str]]]:
    """The class names below `folder`, sorted, and the image files with their class names, sorted within each."""
    try:
        with os.scandir(folder) as entries:
            classes = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
        samples = [(file, name) for name in classes for file in _images(folder / name)]
    except OSError as error:
        raise DataError(f"{folder} is not a folder of class folders with images: {error}") from error
    if not classes:
        raise DataError(f"{folder} has no class folders with images")
    return classes, samples


def _images(folder: Path) -> list[Path]:
    """Every image file below the folder of a class."""
    found = []
    for place, folders, files in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders:
            if os.path.islink(os.path.join(place, name)):  # to follow it could lead round in a circle, or through /dev
                raise DataError(f"{os.path.join(place, name)} is a link to a folder: put the images themselves there")
        files = [name for name in files if not name.startswith(".")]
        if others := sorted(name for name in files if name.lower().endswith(OTHERS)):
            raise DataError(f"{os.path.join(place, others[0])} is in a format that is not read: convert it to PNG")
        found += [Path(place, name) for name in files if name.lower().endswith(EXTENSIONS)]
    if not found:
        raise DataError(f"{folder} holds no images ({', '.join(EXTENSIONS)})")
    return sorted(found, key=lambda file: (str(file.parent), file.name))


def _raise(error: OSError) -> NoReturn:
    raise error


def _read(
    samples: list[tuple[Path, str]], index: dict[str, int], title: str, size: tuple[int, int] | None = None
) -> Split:
    images = decode_images([file for file, _ in samples], title, size)
    return Split(torch.from_numpy(images), torch.tensor([index[name] for _, name in samples]))
