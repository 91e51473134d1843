"""TinyImageNet: read from its official archive, decoded once, then opened from a cache."""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
import zipfile
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path, PurePosixPath

import numpy as np
import torch

from certtrain.data.dataset import Dataset, Split
from certtrain.data.decoding import decode_images
from certtrain.errors import CheckpointError, DataError
from certtrain.runtime.files import write_atomically

URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
FOLDER = "tiny-imagenet-200"


def load_tinyimagenet(root: Path, download: bool) -> Dataset:
    """TinyImageNet: 100,000 + 10,000 images, 3×64×64, 200 classes, from `<root>/tiny-imagenet-200/`.

    The test split is the official validation set: the official test images have no labels. Class k is the k-th
    WordNet id of `wnids.txt` in sorted order (not in the file's order), and that id is its name. Grey images become
    RGB.

    If the folder is missing, it is extracted from `<root>/tiny-imagenet-200.zip`, or from a download. The decoded
    images are kept in `<root>/tiny-imagenet-200-cache/`, 1.3 GB, and decoded again when the image files change.
    """
    source = root / FOLDER
    if not source.is_dir():
        _install(root, download)
    try:
        classes = sorted(_text(source / "wnids.txt").split())
        train, test = _train_files(source, classes), _test_files(source, classes)
        return Dataset(
            train=_read("train", *train, root),
            test=_read("test", *test, root),
            classes=tuple(classes),
            mean=(0.4802, 0.4481, 0.3975),
            std=(0.2302, 0.2265, 0.2262),
        )
    except OSError as error:
        raise DataError(f"{source} is incomplete or unreadable: {error}") from error


def _text(file: Path) -> str:
    if not file.is_file():  # a pipe would be waited for
        raise FileNotFoundError(f"{file} is missing or no regular file")
    return file.read_text(encoding="utf-8", errors="replace")


def _train_files(source: Path, classes: Sequence[str]) -> tuple[list[Path], list[int]]:
    files, labels = [], []
    for label, wnid in enumerate(classes):
        folder = source / "train" / wnid / "images"
        found = sorted(folder.glob("*.JPEG"))
        if not found:
            raise DataError(f"{folder} has no JPEG files")
        files += found
        labels += [label] * len(found)
    return files, labels


def _test_files(source: Path, classes: Sequence[str]) -> tuple[list[Path], list[int]]:
    annotations = source / "val" / "val_annotations.txt"
    index = {wnid: label for label, wnid in enumerate(classes)}
    files, labels = [], []
    for number, line in enumerate(_text(annotations).splitlines(), 1):
        name, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        if wnid not in index:
            raise DataError(f"{annotations}, line {number}: no image name and WordNet id of wnids.txt: {line!r}")
        files.append(source / "val" / "images" / name)
        labels.append(index[wnid])
    if not files:
        raise DataError(f"{annotations} is empty")
    return files, labels


def _read(part: str, files: Sequence[Path], labels: Sequence[int], root: Path) -> Split:
    """The split, by way of a cache named after the image files' names and sizes: a stale one is not even opened."""
    listing = "".join(f"{file.relative_to(root)}\t{file.stat().st_size}\n" for file in files)
    cache = root / f"{FOLDER}-cache" / f"{part}-{hashlib.sha256(listing.encode()).hexdigest()[:16]}.npy"
    images = _read_cache(cache, len(files))
    if images is None:
        images = decode_images(files, f"Decoding TinyImageNet {part}")
        try:
            cache.parent.mkdir(exist_ok=True)
            write_atomically(cache, lambda file: np.save(file, images))
        except (OSError, CheckpointError) as error:
            warnings.warn(f"TinyImageNet will be decoded again next time, no cache written: {error}", stacklevel=2)
        else:
            for stale in cache.parent.glob(f"{part}-*.npy"):
                if stale != cache:
                    stale.unlink(missing_ok=True)
    return Split(torch.from_numpy(images), torch.tensor(labels))


def _read_cache(cache: Path, count: int) -> np.ndarray | None:
    """The cached images, mapped into memory, or None if there are none to be trusted."""
    if not cache.is_file():
        return None
    try:
        images = np.lib.format.open_memmap(cache, mode="c")  # copy on write: torch wants writable memory
    except (OSError, ValueError, EOFError):  # unreadable; damaged; truncated
        return None
    return images if images.dtype == np.uint8 and images.ndim == 4 and len(images) == count else None


def _install(root: Path, download: bool) -> None:
    """Put the extracted archive at `<root>/tiny-imagenet-200`, whole or not at all."""
    from torchvision.datasets.utils import check_integrity, download_url, extract_archive

    archive = root / f"{FOLDER}.zip"
    if not archive.is_file() and not download:
        raise DataError(
            f"TinyImageNet: there is neither {root / FOLDER} nor {archive}. Put the official archive ({URL}) there, "
            "or have it downloaded: data.download=true"
        )
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=f".{FOLDER}-") as temporary:
            if not archive.is_file():
                download_url(URL, temporary, archive.name)
                archive = Path(temporary) / archive.name
            if not check_integrity(archive, MD5):
                raise DataError(f"{archive.name} is not the official archive: its md5 is not {MD5}")
            _require_inside_folder(archive)
            extract_archive(archive, temporary)
            os.replace(Path(temporary) / FOLDER, root / FOLDER)
    except (OSError, HTTPException, RecursionError, zipfile.BadZipFile) as error:  # RecursionError: of redirects
        raise DataError(f"TinyImageNet: could not download or extract {URL} into {root}: {error}") from error


def _require_inside_folder(archive: Path) -> None:
    with zipfile.ZipFile(archive) as members:
        for name in members.namelist():
            parts = PurePosixPath(name).parts
            if not parts or parts[0] != FOLDER or ".." in parts:
                raise DataError(f"{archive.name} holds a file outside {FOLDER}/: {name}")
