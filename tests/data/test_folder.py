import numpy as np
import pytest
from PIL import Image

from certtrain.data import load_dataset
from certtrain.errors import DataError


def write(file, size=(4, 5), grey=False):
    """A lossless image of (height, width); returns its pixels (3, H, W)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.randint(0, 256, size if grey else (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    return np.stack([pixels] * 3) if grey else pixels.transpose(2, 0, 1)


@pytest.mark.parametrize("test_name", ["test", "val"])
def test_reads_class_folders_as_rgb(tmp_path, test_name):
    expected_train = [
        write(tmp_path / "train" / "ape" / "1.png"),
        write(tmp_path / "train" / "ape" / "2.bmp"),
        write(tmp_path / "train" / "bee" / "1.PNG", grey=True),
    ]
    (tmp_path / "train" / "ape" / "notes.txt").write_text("not an image")
    expected_test = [write(tmp_path / test_name / "bee" / "x.png")]
    data = load_dataset("folder", path=tmp_path)
    assert data.classes == ("ape", "bee")
    np.testing.assert_array_equal(data.train.images.numpy(), expected_train)
    np.testing.assert_array_equal(data.test.images.numpy(), expected_test)
    assert data.train.labels.tolist() == [0, 0, 1]
    assert data.test.labels.tolist() == [1], "a class keeps its number where the test split lacks an earlier one"
    assert (data.mean, data.std) == ((0.0,) * 3, (1.0,) * 3)


def test_test_comes_before_val(tmp_path):
    write(tmp_path / "train" / "ape" / "1.png")
    write(tmp_path / "train" / "bee" / "1.png")
    expected = write(tmp_path / "test" / "ape" / "1.png")
    write(tmp_path / "val" / "ape" / "1.png")
    np.testing.assert_array_equal(load_dataset("folder", path=tmp_path).test.images[0].numpy(), expected)


def test_many_images_stay_in_order(tmp_path):
    expected = [write(tmp_path / "train" / "ape" / f"{i:03}.png", size=(2, 2)) for i in range(150)]
    expected.append(write(tmp_path / "train" / "bee" / "000.png", size=(2, 2)))
    write(tmp_path / "test" / "ape" / "1.png", size=(2, 2))
    np.testing.assert_array_equal(load_dataset("folder", path=tmp_path).train.images.numpy(), expected)


@pytest.mark.parametrize("part", ["train", "test"])
def test_the_first_image_of_another_size_is_named(tmp_path, part):
    write(tmp_path / "train" / "ape" / "000.png")
    write(tmp_path / "test" / "ape" / "000.png")
    for i in range(1, 150):
        write(tmp_path / part / "ape" / f"{i:03}.png", size=(5, 5) if i in (90, 100, 140) else (4, 5))
    with pytest.raises(DataError, match=r"090\.png has 5x5 pixels, the images before it 4x5"):
        load_dataset("folder", path=tmp_path)


def test_test_images_must_have_the_size_of_the_training_images(tmp_path):
    write(tmp_path / "train" / "ape" / "1.png")
    write(tmp_path / "test" / "ape" / "2.png", size=(3, 3))
    with pytest.raises(DataError, match=r"2\.png has 3x3"):
        load_dataset("folder", path=tmp_path)


@pytest.mark.parametrize("content", [b"", b"no image at all", None])
def test_a_broken_image_is_named(tmp_path, content):
    write(tmp_path / "train" / "ape" / "1.png", size=(30, 30))
    write(tmp_path / "test" / "ape" / "1.png", size=(30, 30))
    broken = tmp_path / "train" / "ape" / "2.png"
    write(broken, size=(30, 30))
    broken.write_bytes(broken.read_bytes()[:-500] if content is None else content)
    with pytest.raises(DataError, match=r"2\.png cannot be decoded"):
        load_dataset("folder", path=tmp_path)


def test_a_layout_without_the_needed_folders_is_an_error(tmp_path):
    with pytest.raises(DataError, match="train"):
        load_dataset("folder", path=tmp_path)
    write(tmp_path / "train" / "ape" / "1.png")
    with pytest.raises(DataError, match="has no folder test, nor val in its place"):
        load_dataset("folder", path=tmp_path)
    (tmp_path / "test" / "ape").mkdir(parents=True)
    with pytest.raises(DataError, match="ape"):
        load_dataset("folder", path=tmp_path)


def test_a_test_class_that_train_lacks_is_an_error(tmp_path):
    write(tmp_path / "train" / "ape" / "1.png")
    write(tmp_path / "test" / "cow" / "1.png")
    with pytest.raises(DataError, match="cow"):
        load_dataset("folder", path=tmp_path)
