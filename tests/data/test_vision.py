"""torchvision's data sets, from miniature copies of the official files written byte by byte."""

import hashlib
import pickle
import struct
from urllib.error import URLError

import numpy as np
import pytest
import torch
from scipy.io import savemat
from torchvision import datasets

from certtrain.data import load_dataset
from certtrain.errors import DataError

TRAIN_LABELS = [3, 0, 9, 1, 7]
TEST_LABELS = [2, 9, 0]


def pixels(*shape):
    return np.random.randint(0, 256, shape, dtype=np.uint8)


def write_idx(file, array):
    header = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    file.write_bytes(header + array.tobytes())


def write_mnist(folder):
    """Returns {part: (N, 28, 28) images}."""
    folder.mkdir(parents=True)
    written = {}
    for part, labels in (("train", TRAIN_LABELS), ("t10k", TEST_LABELS)):
        written[part] = pixels(len(labels), 28, 28)
        write_idx(folder / f"{part}-images-idx3-ubyte", written[part])
        write_idx(folder / f"{part}-labels-idx1-ubyte", np.array(labels, dtype=np.uint8))
    return written


def write_pickles(folder, contents):
    """Returns torchvision's list of (name, md5)."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = []
    for name, content in contents.items():
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        listed.append([name, hashlib.md5(data).hexdigest()])
    return listed


def write_cifar10(root, monkeypatch):
    """Returns the rows (N, 3072) of the train batches and of the test batch."""
    folder = root / "cifar-10-batches-py"
    first, second, test = pixels(2, 3072), pixels(3, 3072), pixels(3, 3072)
    train_list = write_pickles(
        folder,
        {
            "data_batch_1": {"data": first, "labels": TRAIN_LABELS[:2]},
            "data_batch_2": {"data": second, "labels": TRAIN_LABELS[2:]},
        },
    )
    test_list = write_pickles(folder, {"test_batch": {"data": test, "labels": TEST_LABELS}})
    [[name, md5]] = write_pickles(folder, {"batches.meta": {"label_names": [f"class {k}" for k in range(10)]}})
    monkeypatch.setattr(datasets.CIFAR10, "train_list", train_list)
    monkeypatch.setattr(datasets.CIFAR10, "test_list", test_list)
    monkeypatch.setattr(datasets.CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": md5})
    return np.concatenate([first, second]), test


def assert_split(split, images, labels):
    assert split.images.dtype == torch.uint8
    assert split.images.is_contiguous()
    np.testing.assert_array_equal(split.images.numpy(), images)
    assert split.labels.tolist() == labels


@pytest.mark.parametrize(
    ("name", "folder", "first_class"), [("mnist", "MNIST", "0"), ("fashion-mnist", "FashionMNIST", "T-shirt/top")]
)
def test_mnist_family_reads_idx_files(tmp_path, name, folder, first_class):
    written = write_mnist(tmp_path / folder / "raw")
    data = load_dataset(name, tmp_path)
    assert_split(data.train, written["train"][:, None], TRAIN_LABELS)
    assert_split(data.test, written["t10k"][:, None], TEST_LABELS)
    assert data.num_classes == 10
    assert data.classes[0] == first_class
    assert (data.mean, data.std) == ((0.0,), (1.0,))


def test_cifar10_reads_all_batches_in_order(tmp_path, monkeypatch):
    train, test = write_cifar10(tmp_path, monkeypatch)
    data = load_dataset("cifar10", tmp_path)
    # A row is the red plane, then green, then blue, each in row-major order.
    assert_split(data.train, np.stack([np.split(row, 3) for row in train]).reshape(-1, 3, 32, 32), TRAIN_LABELS)
    assert_split(data.test, np.stack([np.split(row, 3) for row in test]).reshape(-1, 3, 32, 32), TEST_LABELS)
    assert data.classes == tuple(f"class {k}" for k in range(10))
    assert data.mean == (0.4914, 0.4822, 0.4465)
    assert data.std == (0.2023, 0.1994, 0.2010)


def test_cifar100_reads_fine_labels(tmp_path, monkeypatch):
    folder, train, test = tmp_path / "cifar-100-python", pixels(2, 3072), pixels(1, 3072)
    train_list = write_pickles(
        folder, {"train": {"data": train, "fine_labels": [99, 4], "coarse_labels": [0, 0], "filenames": ["a", "b"]}}
    )
    test_list = write_pickles(folder, {"test": {"data": test, "fine_labels": [42], "coarse_labels": [0]}})
    [[name, md5]] = write_pickles(folder, {"meta": {"fine_label_names": [f"class {k}" for k in range(100)]}})
    monkeypatch.setattr(datasets.CIFAR100, "train_list", train_list)
    monkeypatch.setattr(datasets.CIFAR100, "test_list", test_list)
    monkeypatch.setattr(datasets.CIFAR100, "meta", {"filename": name, "key": "fine_label_names", "md5": md5})
    data = load_dataset("cifar100", tmp_path)
    assert_split(data.train, train.reshape(-1, 3, 32, 32), [99, 4])
    assert_split(data.test, test.reshape(-1, 3, 32, 32), [42])
    assert data.num_classes == 100


def test_svhn_reads_mat_files_and_calls_ten_zero(tmp_path, monkeypatch):
    written, listed = {}, {}
    for part, labels in (("train", [1, 10, 9]), ("test", [10, 5])):
        file = tmp_path / f"{part}_32x32.mat"
        written[part] = pixels(len(labels), 3, 32, 32)
        savemat(file, {"X": written[part].transpose(2, 3, 1, 0), "y": np.array(labels, dtype=np.uint8)[:, None]})
        listed[part] = ["http://nowhere.invalid", file.name, hashlib.md5(file.read_bytes()).hexdigest()]
    monkeypatch.setattr(datasets.SVHN, "split_list", listed)
    data = load_dataset("svhn", tmp_path)
    assert_split(data.train, written["train"], [1, 0, 9])
    assert_split(data.test, written["test"], [0, 5])
    assert data.num_classes == 10


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("mnist", "MNIST/raw"),
        ("fashion-mnist", "FashionMNIST/raw"),
        ("cifar10", "cifar-10-batches-py"),
        ("cifar100", "cifar-100-python"),
        ("svhn", ""),
    ],
)
def test_missing_data_says_where_it_belongs_and_how_to_get_it(tmp_path, name, place):
    with pytest.raises(DataError) as caught:
        load_dataset(name, tmp_path)
    assert str(tmp_path / place) in str(caught.value)
    assert "data.download=true" in str(caught.value)


def test_truncated_idx_file_is_a_data_error(tmp_path):
    folder = tmp_path / "MNIST" / "raw"
    write_mnist(folder)
    file = folder / "t10k-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match="MNIST"):
        load_dataset("mnist", tmp_path)


def test_idx_files_of_different_length_are_a_data_error(tmp_path):
    folder = tmp_path / "MNIST" / "raw"
    write_mnist(folder)
    write_idx(folder / "train-labels-idx1-ubyte", np.zeros(4, dtype=np.uint8))
    with pytest.raises(DataError, match="5 images but 4 labels"):
        load_dataset("mnist", tmp_path)


def test_a_batch_with_a_wrong_md5_is_not_unpickled(tmp_path, monkeypatch):
    write_cifar10(tmp_path, monkeypatch)
    file = tmp_path / "cifar-10-batches-py" / "data_batch_2"
    file.write_bytes(pickle.dumps({"data": pixels(3, 3072), "labels": TRAIN_LABELS[2:]}))
    monkeypatch.setattr(pickle, "load", lambda *_, **__: pytest.fail("unpickled a file that failed its check"))
    with pytest.raises(DataError, match="corrupted"):
        load_dataset("cifar10", tmp_path)


def test_download_is_asked_for_only_on_request(tmp_path, monkeypatch):
    asked = []

    def download(self):
        asked.append(self.root)
        if not (tmp_path / "MNIST").exists():
            write_mnist(tmp_path / "MNIST" / "raw")

    monkeypatch.setattr(datasets.MNIST, "download", download)
    with pytest.raises(DataError):
        load_dataset("mnist", tmp_path)
    assert asked == []
    assert len(load_dataset("mnist", tmp_path, download=True).train) == len(TRAIN_LABELS)
    assert set(asked) == {tmp_path}


def test_a_failed_download_is_a_data_error(tmp_path, monkeypatch):
    def download(self):
        raise URLError("no route to host")

    monkeypatch.setattr(datasets.CIFAR10, "download", download)
    with pytest.raises(DataError, match=r"could not be downloaded .* no route to host"):
        load_dataset("cifar10", tmp_path, download=True)
