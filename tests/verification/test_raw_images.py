"""The checker's own readers give what `certtrain.data` gives, from miniature copies of each format."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from scipy.io import savemat

from certtrain.data import DATASETS, load_dataset
from certtrain.errors import DataError, UsageError
from certtrain.verification.checker.raw_images import READERS, read_test_set
from certtrain.verification.digests import split_digest
from tests.data import test_folder, test_npz, test_tinyimagenet, test_vision


def write_npz(folder, monkeypatch, grey=False):
    for part, count in (("train", 3), ("test", 5)):
        images = test_npz.rgb(count)
        labels = np.arange(count, dtype=">i2") % 3
        test_npz.write(folder, part, images[..., 0] if grey else images, labels)


def write_table(folder, monkeypatch):
    for part, count in (("train", 3), ("test", 5)):
        test_npz.write(folder, part, test_npz.rgb(count)[:, 0, :, 0], np.arange(count) % 3)


def write_folder(folder, monkeypatch, test="test"):
    for place in ("train/ape/1.png", "train/bee/b/2.png", "train/bee/a.png", "train/cow/1.png"):
        test_folder.write(folder / place)
    for place in ("bee/10.png", "bee/9.PNG", "bee/a/1.bmp", "bee/A/1.bmp", "ape/z.png"):
        test_folder.write(folder / test / place, grey="ape" in place)
    (folder / test / "bee" / "notes.txt").write_text("no image")


def write_folder_with_hidden_things(folder, monkeypatch):
    """What editors and file managers leave behind, a linked class, and names in other scripts."""
    for part in ("train", "test"):
        for place in (".ipynb_checkpoints/1.png", "a cat/._1.png", "a cat/1.png", "a cat/.cache/2.png", "été/.y/1.png",
                      "été/x/1.png", ".trash/1.png"):  # fmt: skip
            test_folder.write(folder / part / place)
        test_folder.write(folder / f"{part} elsewhere" / "1.png")
        (folder / part / "linked").symlink_to(folder / f"{part} elsewhere")


def write_cifar100(folder, monkeypatch):
    content = {"data": test_vision.pixels(2, 3072), "fine_labels": [99, 4], "coarse_labels": [0, 0]}
    files = test_vision.write_pickles(folder / "cifar-100-python", {"train": content, "test": content})
    names = {"fine_label_names": [f"class {k}" for k in range(100)]}
    [[name, md5]] = test_vision.write_pickles(folder / "cifar-100-python", {"meta": names})
    monkeypatch.setattr(test_vision.datasets.CIFAR100, "train_list", files[:1])
    monkeypatch.setattr(test_vision.datasets.CIFAR100, "test_list", files[1:])
    monkeypatch.setattr(
        test_vision.datasets.CIFAR100, "meta", {"filename": name, "key": "fine_label_names", "md5": md5}
    )


def write_svhn(folder, monkeypatch):
    listed = {}
    for part, labels in (("train", [1, 2]), ("test", [10, 5, 1])):
        file = folder / f"{part}_32x32.mat"
        images = test_vision.pixels(len(labels), 3, 32, 32)
        savemat(file, {"X": images.transpose(2, 3, 1, 0), "y": np.array(labels, dtype=np.uint8)[:, None]})
        listed[part] = ["http://nowhere.invalid", file.name, test_vision.hashlib.md5(file.read_bytes()).hexdigest()]
    monkeypatch.setattr(test_vision.datasets.SVHN, "split_list", listed)


def write_nothing(folder, monkeypatch):
    pass


SAMPLES = {
    "digits": ("digits", write_nothing),
    "npz": ("npz", write_npz),
    "npz, grey": ("npz", lambda folder, monkeypatch: write_npz(folder, monkeypatch, grey=True)),
    "npz, table": ("npz", write_table),
    "folder": ("folder", write_folder),
    "folder with hidden things": ("folder", write_folder_with_hidden_things),
    "folder with val": ("folder", lambda folder, monkeypatch: write_folder(folder, monkeypatch, "val")),
    "mnist": ("mnist", lambda folder, _: test_vision.write_mnist(folder / "MNIST" / "raw")),
    "fashion-mnist": ("fashion-mnist", lambda folder, _: test_vision.write_mnist(folder / "FashionMNIST" / "raw")),
    "cifar10": ("cifar10", test_vision.write_cifar10),
    "cifar100": ("cifar100", write_cifar100),
    "svhn": ("svhn", write_svhn),
    "tinyimagenet": (
        "tinyimagenet",
        lambda folder, _: test_tinyimagenet.write_archive_folder(folder / "tiny-imagenet-200"),
    ),
}


@pytest.mark.parametrize("sample", SAMPLES)
def test_both_readers_see_the_same(sample, tmp_path, monkeypatch):
    name, write = SAMPLES[sample]
    write(tmp_path, monkeypatch)
    own = {"path": tmp_path} if name in ("npz", "folder") else {"root": tmp_path}
    expected = load_dataset(name, **own).test
    images, labels = read_test_set(name, tmp_path)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images, expected.images.numpy())
    np.testing.assert_array_equal(labels, expected.labels.numpy())
    assert split_digest(images, labels) == split_digest(expected.images.numpy(), expected.labels.numpy())


def test_every_data_set_has_a_reader_and_a_sample():
    assert READERS.keys() == DATASETS.keys() == {name for name, _ in SAMPLES.values()}


@pytest.mark.parametrize(("name", "place", "before"), [
    ("cifar10", "cifar-10-batches-bin/test_batch.bin", 0), ("cifar100", "cifar-100-binary/test.bin", 1)
])  # fmt: skip
def test_cifar_binaries(name, place, before, tmp_path):
    images, labels = test_vision.pixels(4, 3, 32, 32), np.array([3, 0, 9, 1], np.uint8)
    (tmp_path / place).parent.mkdir()
    with open(tmp_path / place, "wb") as file:
        for image, label in zip(images, labels, strict=True):
            file.write(bytes([77] * before + [label]) + image.tobytes())
    read, found = read_test_set(name, tmp_path)
    np.testing.assert_array_equal(read, images)
    assert found.tolist() == labels.tolist()


def test_digest_sees_every_pixel_label_and_the_shape():
    images, labels = test_vision.pixels(3, 1, 4, 4), np.array([0, 1, 2])
    seen = {split_digest(images, labels)}
    for place in np.ndindex(images.shape):
        other = images.copy()
        other[place] ^= 1
        seen.add(split_digest(other, labels))
    seen |= {split_digest(images, np.roll(labels, k)) for k in (1, 2)}
    seen |= {split_digest(images.reshape(3, *shape), labels) for shape in ((4, 1, 4), (1, 2, 8), (1, 8, 2))}
    assert len(seen) == 1 + images.size + 2 + 3


@pytest.mark.parametrize("name", [name for name in READERS if name != "digits"])
def test_missing_files_are_an_error_that_names_the_data_set(name, tmp_path):
    with pytest.raises(DataError, match=f"cannot read the {name} test set"):
        read_test_set(name, tmp_path)
    with pytest.raises(UsageError, match="data set that the checker can read"):
        read_test_set("my own", tmp_path)


class Harmful:
    def __reduce__(self):
        return os.system, ("echo harm",)


@pytest.mark.parametrize("content", [Harmful(), {"data": Harmful()}, np.array([Harmful()], dtype=object)])
def test_a_pickle_cannot_call_anything(content, tmp_path, monkeypatch):
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps(content))
    monkeypatch.setattr(os, "system", lambda _: pytest.fail("called"))
    with pytest.raises(DataError, match="which is no array"):
        read_test_set("cifar10", tmp_path)


@pytest.mark.slow
def test_no_code_is_shared_with_the_verifiers_loaders():
    program = """
import sys
from pathlib import Path
from certtrain.verification.checker.raw_images import read_test_set
read_test_set("digits", Path("."))
assert not any(name.startswith(("torch", "certtrain.data")) for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
