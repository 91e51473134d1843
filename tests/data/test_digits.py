import numpy as np
from sklearn.datasets import load_digits

from certtrain.data import load_dataset


def test_digits_are_sklearns_scaled_and_split_once_and_for_all():
    data = load_dataset("digits")
    assert (len(data.train), len(data.test)) == (1437, 360)
    assert data.image_shape == (1, 8, 8)
    assert data.num_classes == 10
    assert (data.mean, data.std) == ((0.0,), (1.0,))
    # Every reported number on digits depends on this split.
    assert data.train.labels[:10].tolist() == [2, 8, 2, 6, 6, 7, 1, 9, 8, 5]
    assert data.test.labels[:10].tolist() == [7, 9, 4, 7, 0, 2, 6, 1, 3, 1]

    level = {value: round(value * 255 / 16) for value in range(17)}
    source = load_digits()
    expected = sorted(
        (int(label), bytes(level[int(value)] for value in image.ravel()))
        for image, label in zip(source.images, source.target, strict=True)
    )
    found = sorted(
        (int(label), image.numpy().tobytes())
        for part in (data.train, data.test)
        for image, label in zip(part.images, part.labels, strict=True)
    )
    assert found == expected
    assert np.bincount(data.test.labels).min() > 20


def test_what_is_done_to_loaded_digits_stays_with_them():
    """They are parsed once in a process, but each has its own."""
    harmed = load_dataset("digits")
    for part in (harmed.train, harmed.test):
        part.images.zero_()
        part.labels.zero_()
    again = load_dataset("digits")
    assert all(tensor.any() for part in (again.train, again.test) for tensor in (part.images, part.labels))
