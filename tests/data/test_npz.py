import zipfile

import numpy as np
import pytest
import torch

from certtrain.data import load_dataset
from certtrain.errors import DataError


def write(folder, part, images, labels):
    np.savez(folder / f"{part}.npz", images=images, labels=labels)


def rgb(n, height=4, width=5, channels=3):
    return np.random.randint(0, 256, (n, height, width, channels), dtype=np.uint8)


def test_colour_images_come_channels_first(tmp_path):
    train, test = rgb(3), rgb(2)
    write(tmp_path, "train", train, np.array([0, 4, 2]))
    write(tmp_path, "test", test, np.array([1, 6], dtype=np.uint8))
    data = load_dataset("npz", path=tmp_path)
    assert data.image_shape == (3, 4, 5)
    for n, y, x, c in np.ndindex(train.shape):
        assert data.train.images[n, c, y, x] == train[n, y, x, c]
    assert data.train.labels.tolist() == [0, 4, 2]
    assert data.test.labels.dtype == torch.int64
    assert data.num_classes == 7, "largest label of both splits plus one; gaps are allowed"
    assert (data.mean, data.std) == ((0.0,) * 3, (1.0,) * 3)


def test_grey_images_need_no_channel_axis(tmp_path):
    train = rgb(2)[..., 0]
    write(tmp_path, "train", train, np.array([0, 1], dtype=">i2"))
    write(tmp_path, "test", train, np.array([0, 1]))
    data = load_dataset("npz", path=str(tmp_path))
    np.testing.assert_array_equal(data.train.images.numpy(), train[:, None])
    assert data.train.labels.tolist() == [0, 1]


@pytest.mark.parametrize(("train", "test", "told"), [([1, 2], [2], True), ([1, 2], [0], False), ([0, 2], [2], False)])
def test_labels_that_count_from_1_are_told(tmp_path, recwarn, train, test, told):
    for part, labels in (("train", train), ("test", test)):
        write(tmp_path, part, rgb(len(labels)), np.array(labels))
    assert load_dataset("npz", path=tmp_path).num_classes == 3
    assert ["no image has label 0" in str(warning.message) for warning in recwarn] == [True] * told


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (rgb(2).astype(np.float32), np.array([0, 1]), r"uint8 .* not float32"),
        (rgb(2)[0, 0, 0], np.array([0, 1]), r"\(3,\)"),
        (rgb(2)[None], np.array([0, 1]), r"\(1, 2, 4, 5, 3\)"),
        (rgb(2), np.array([0.0, 1.0]), "labels must be integers"),
        (rgb(2), np.array([0, -1]), "labels must not be negative, the smallest is -1"),
        (rgb(2), np.array([0, 10**12]), "a label is 1000000000000"),
        (rgb(2), np.array([0, 1, 2]), "2 images but 3 labels"),
        (rgb(2), np.array([[0], [1]]), r"\(2, 1\)"),
        (rgb(0), np.array([], dtype=np.int64), "no images"),
        (np.zeros((2, 3, 8, 8), np.uint8), np.array([0, 1]), "channels first"),
        (np.array([None, None]), np.array([0, 1]), "readable"),
    ],
)
def test_an_archive_that_breaks_the_layout_is_an_error_that_names_the_file(tmp_path, images, labels, message):
    write(tmp_path, "train", rgb(2), np.array([0, 1]))
    write(tmp_path, "test", images, labels)
    with pytest.raises(DataError, match=message) as caught:
        load_dataset("npz", path=tmp_path)
    assert str(tmp_path / "test.npz") in str(caught.value)


def test_splits_of_different_image_size_are_an_error(tmp_path):
    write(tmp_path, "train", rgb(2), np.array([0, 1]))
    write(tmp_path, "test", rgb(2, height=6), np.array([0, 1]))
    with pytest.raises(DataError, match="test images are 3x6x5, train images are 3x4x5"):
        load_dataset("npz", path=tmp_path)


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"not a zip"])
def test_a_damaged_archive_is_an_error_that_names_the_file(tmp_path, damage):
    write(tmp_path, "train", rgb(2), np.array([0, 1]))
    file = tmp_path / "train.npz"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DataError, match=r"train\.npz"):
        load_dataset("npz", path=tmp_path)


def test_a_flipped_byte_is_an_error(tmp_path):
    write(tmp_path, "train", rgb(50), np.zeros(50, dtype=np.int64))
    file = tmp_path / "train.npz"
    data = bytearray(file.read_bytes())
    data[1000] ^= 0xFF
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"train\.npz"):
        load_dataset("npz", path=tmp_path)


def test_missing_files_and_arrays_are_named(tmp_path):
    with pytest.raises(DataError, match=r"train\.npz is missing"):
        load_dataset("npz", path=tmp_path)
    np.savez(tmp_path / "train.npz", images=rgb(1))
    with pytest.raises(DataError, match="labels"):
        load_dataset("npz", path=tmp_path)


def bomb(file, claimed, written):
    """An archive whose images claim a shape, and have so many zeros."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, shape, dtype in (("images", claimed, "|u1"), ("labels", claimed[:1], "<i8")):
            with archive.open(f"{name}.npy", "w") as array:
                np.lib.format.write_array_header_1_0(array, {"descr": dtype, "fortran_order": False, "shape": shape})
                for _ in range(written >> 20):
                    array.write(bytes(2**20))


@pytest.mark.parametrize(
    ("claimed", "written", "message"),
    [
        ((2**40, 8, 8), 2**20, r"is truncated: images of shape"),
        ((2**62, 2**62, 2**62), 2**20, r"is truncated: images of shape"),
        ((2**20, 8, 8), 2**26, r"is no data set: its .* bytes claim to unpack to 134,"),
    ],
)
def test_an_archive_that_is_larger_unpacked_than_any_images_is_not_unpacked(
    tmp_path, monkeypatch, claimed, written, message
):
    monkeypatch.setattr("certtrain.data.npz.LARGEST_UNCHECKED", 2**24)
    monkeypatch.setattr(np, "load", lambda *arguments, **options: pytest.fail("it was read"))
    bomb(tmp_path / "train.npz", claimed, written)
    with pytest.raises(DataError, match=message) as caught:
        load_dataset("npz", path=tmp_path)
    assert str(tmp_path / "train.npz") in str(caught.value)


def test_drawings_that_shrink_well_are_read(tmp_path):
    for part in ("train", "test"):
        np.savez_compressed(
            tmp_path / f"{part}.npz", images=np.full((500, 28, 28), 255, np.uint8), labels=np.arange(500)
        )
    assert (tmp_path / "train.npz").stat().st_size < 500 * 28 * 28 / 100
    assert len(load_dataset("npz", path=tmp_path).train) == 500


@pytest.mark.parametrize(
    ("shape", "refused"),
    [
        ((6, 32, 32), True),  # six spectral channels
        ((12, 16, 16), True),
        ((3, 8, 9), True),
        ((2, 3, 3), False),
        ((8, 9, 3), False),
        ((32, 32, 6), False),
        ((5, 9, 7), False),
        ((9, 9, 9), False),
    ],
)
def test_channels_that_come_first_are_refused_however_many(tmp_path, shape, refused):
    images = np.random.default_rng(0).integers(0, 256, (4, *shape), dtype=np.uint8)
    for part in ("train", "test"):
        np.savez(tmp_path / f"{part}.npz", images=images, labels=[0, 1, 0, 1])
    if refused:
        with pytest.raises(DataError, match=r"train\.npz: .* channels first"):
            load_dataset("npz", path=tmp_path)
    else:
        assert load_dataset("npz", path=tmp_path).image_shape == (shape[2], *shape[:2])


@pytest.mark.parametrize(("brightest", "refused"), [(1, True), (16, True), (64, False), (255, False)])
@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 3), (20,)])
def test_pixels_that_were_scaled_to_1_or_to_16_are_refused(tmp_path, brightest, refused, shape):
    images = np.random.default_rng(0).integers(0, brightest, (4, *shape), dtype=np.uint8, endpoint=True)
    images[0] = brightest
    for part, of in (("train", images), ("test", images // 255)):  # few test images may be dark
        np.savez(tmp_path / f"{part}.npz", images=of, labels=[0, 1, 0, 1])
    if refused:
        with pytest.raises(DataError, match=rf"train\.npz: the largest value is {brightest}: "):
            load_dataset("npz", path=tmp_path)
    else:
        assert load_dataset("npz", path=tmp_path).train.images.max() == brightest
