import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from certtrain.data import DATASETS, Dataset, Split, load_dataset
from certtrain.errors import DataError, UsageError


def split(n, channels=1, size=2, num_classes=3):
    images = torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, channels, size, size)
    return Split(images, torch.arange(n) % num_classes)


def dataset(n=20, **changes):
    parts = {"train": split(n), "test": split(6), "classes": ("a", "b", "c"), "mean": (0.5,), "std": (0.25,)}
    return Dataset(**parts | changes)


def numbers(part):
    return part.images[:, 0, 0, 0].tolist()


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 1, 2, 2), torch.zeros(2, dtype=torch.int64), "uint8"),
        (torch.zeros(2, 2, 2, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), r"\(N, C, H, W\)"),
        (torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.zeros(2, dtype=torch.int32), "int64"),
        (torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.zeros(2, 1, dtype=torch.int64), r"\(2, 1\)"),
        (torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), "2 images but 3 labels"),
        (torch.zeros(0, 1, 2, 2, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64), "no images"),
        (torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64, device="meta"), "meta"),
    ],
)
def test_a_split_refuses_what_does_not_fit(images, labels, message):
    with pytest.raises(DataError, match=message):
        Split(images, labels)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test": split(4, size=3)}, "test images are 1x3x3, train images are 1x2x2"),
        ({"validation": split(4, channels=3)}, "validation images are 3x2x2"),
        ({"test": split(9, num_classes=4)}, "test labels reach from 0 to 3, outside 0 to 2"),
        ({"train": Split(split(2).images, torch.tensor([0, -1]))}, "train labels reach from -1 to 0"),
        ({"mean": (0.0, 0.0)}, "1 numbers each"),
        ({"std": (0.0,)}, "std positive"),
    ],
)
def test_a_dataset_refuses_splits_that_do_not_fit(changes, message):
    with pytest.raises(DataError, match=message):
        dataset(**changes)


def test_properties():
    data = dataset(train=split(5, channels=3, size=4), test=split(2, channels=3, size=4), mean=(0,) * 3, std=(1,) * 3)
    assert data.num_classes == 3
    assert data.image_shape == (3, 4, 4)
    assert len(data.train) == 5


def test_take_by_slice_indices_and_mask():
    part = split(6)
    assert numbers(part.take(slice(2, 4))) == [2, 3]
    chosen = part.take(torch.tensor([5, 1]))
    assert numbers(chosen) == [5, 1]
    assert chosen.labels.tolist() == [2, 1]
    assert numbers(part.take(part.labels == 0)) == [0, 3]


def test_parts_hold_every_image_once_and_in_order():
    parts = [(numbers(part), part.labels.tolist()) for part in split(5).parts(2)]
    assert parts == [([0, 1], [0, 1]), ([2, 3], [2, 0]), ([4], [1])]


def test_a_split_moves_images_and_labels():
    moved = split(3).to("meta")
    assert moved.images.is_meta
    assert moved.labels.is_meta


def test_a_dataset_moves_every_split(monkeypatch):
    data = dataset().with_validation(3, seed=0)
    monkeypatch.setattr(Split, "to", lambda self, device: self.take(slice({"device": 1}[device])))
    moved = data.to("device")
    assert [len(part) for part in (moved.train, moved.test, moved.validation)] == [1, 1, 1]
    assert dataset().to("device").validation is None


@pytest.mark.parametrize(("amount", "count"), [(5, 5), (0.25, 5), (0.26, 5), (19, 19), (0.05, 1)])
def test_validation_partitions_train_in_order(amount, count):
    data = dataset(20).with_validation(amount, seed=1)
    train, validation = numbers(data.train), numbers(data.validation)
    assert len(validation) == count
    assert sorted(train + validation) == list(range(20))
    assert train == sorted(train)
    assert validation == sorted(validation)
    assert data.validation.labels.tolist() == [number % 3 for number in validation]
    assert numbers(data.test) == list(range(6))


def test_validation_follows_from_the_seed():
    cuts = [tuple(numbers(dataset(100).with_validation(0.5, seed=seed).validation)) for seed in (0, 0, 1, 2)]
    assert cuts[0] == cuts[1]
    assert len(set(cuts)) == 3


def test_no_validation_leaves_the_dataset_alone():
    data = dataset()
    assert data.with_validation(0, seed=0) is data


@pytest.mark.parametrize("amount", [-1, -0.5, 20, 21, 1.0, 1.5, 0.001, True, float("nan")])
def test_a_validation_amount_that_leaves_a_split_empty_is_an_error(amount):
    with pytest.raises(UsageError, match="validation"):
        dataset(20).with_validation(amount, seed=0)


def test_a_second_validation_split_is_an_error():
    with pytest.raises(UsageError, match="already"):
        dataset().with_validation(2, seed=0).with_validation(2, seed=0)


def test_load_dataset_names_near_misses_and_misplaced_paths(tmp_path):
    with pytest.raises(UsageError, match="did you mean cifar10"):
        load_dataset("cifar-10", tmp_path)
    with pytest.raises(UsageError, match=r"takes no data\.path"):
        load_dataset("mnist", tmp_path, path=tmp_path)
    for name in ("npz", "folder"):
        with pytest.raises(UsageError, match=r"set data\.path"):
            load_dataset(name, tmp_path)


def test_load_dataset_uses_registered_loaders_and_cuts_validation(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setitem(DATASETS, "own", lambda *arguments: calls.append(arguments) or dataset(20))
    data = load_dataset("own", str(tmp_path), download=True, validation=4, seed=7)
    assert calls == [(tmp_path, True)]
    assert numbers(data.validation) == numbers(dataset(20).with_validation(4, seed=7).validation)


@pytest.mark.slow
def test_importing_the_package_imports_no_image_library():
    program = "import sys, certtrain.data; print({'torchvision', 'sklearn', 'PIL', 'rich'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_some_classes_are_kept_and_numbered_anew_in_the_order_they_are_named():
    data = dataset(train=split(9), test=split(4), validation=split(5), old=split(6)).of_classes([2, 0])
    assert data.classes == ("c", "a")
    assert numbers(data.train) == [0, 2, 3, 5, 6, 8]
    assert data.train.labels.tolist() == [1, 0, 1, 0, 1, 0]
    assert (numbers(data.test), data.test.labels.tolist()) == ([0, 2, 3], [1, 0, 1])
    assert (numbers(data.validation), data.validation.labels.tolist()) == ([0, 2, 3], [1, 0, 1])
    assert (numbers(data.old), data.old.labels.tolist()) == ([0, 2, 3, 5], [1, 0, 1, 0])


def test_all_classes_in_their_order_are_the_data_set():
    data, same = dataset(), dataset().of_classes([0, 1, 2])
    assert torch.equal(same.train.images, data.train.images)
    assert torch.equal(same.train.labels, data.train.labels)
    assert same.classes == data.classes


@pytest.mark.parametrize("named", [(2, 0), np.array([2, 0]), [np.uint8(2), 0], range(2, -1, -2)])
def test_classes_may_be_named_by_whole_numbers_of_any_type(named):
    expected, found = dataset().of_classes([2, 0]), dataset().of_classes(named)
    assert found.classes == expected.classes
    assert torch.equal(found.train.labels, expected.train.labels)


def test_the_images_held_out_are_the_same_ones_for_any_classes():
    whole = load_dataset("digits", validation=300, seed=5).validation
    some = load_dataset("digits", validation=300, seed=5, classes=[3, 1]).validation
    kept = (whole.labels == 3) | (whole.labels == 1)
    assert torch.equal(some.images, whole.images[kept])
    assert torch.equal(some.labels == 0, whole.labels[kept] == 3)


@pytest.mark.parametrize(
    ("classes", "error", "message"),
    [
        ([0, 10], UsageError, r"data\.classes: there is no class 10 in 0 to 9"),
        ([-1, 0], UsageError, "there is no class -1"),
        ([0, 1.5], UsageError, r"data\.classes: there is no class 1\.5 in 0 to 9"),
        ([0, 1.0], UsageError, r"data\.classes: there is no class 1\.0"),
        ([0, float("nan")], UsageError, r"data\.classes: there is no class nan"),
        ([0, "1"], UsageError, r"data\.classes: there is no class '1'"),
        ([0, None], UsageError, r"data\.classes: there is no class None"),
        ([False, True], UsageError, r"data\.classes: there is no class False"),
        ([], UsageError, r"data\.classes: \[\] must name a class, and none twice"),
        ((), UsageError, r"data\.classes: \[\] must name a class"),
        ([1, 1, 2], UsageError, r"data\.classes: \[1, 1, 2\] must name a class, and none twice"),
        ([1, np.int64(1)], UsageError, r"data\.classes: .* none twice"),
        ([4], DataError, "training images have the label 0: there is nothing to tell apart"),
    ],
)
def test_classes_that_are_not_there_or_are_alone_are_refused(classes, error, message):
    with pytest.raises(error, match=message):
        load_dataset("digits", classes=classes)


def test_a_split_without_any_of_the_classes_is_refused():
    with pytest.raises(DataError, match="no images"):
        dataset(test=Split(split(2).images, torch.tensor([0, 0]))).of_classes([1, 2])


@given(st.permutations("abcd"), st.permutations("abcdef"))
def test_renumbered_each_image_keeps_the_name_of_its_class(names, classes):
    labels = torch.tensor([3, 0, 0, 2])
    found = Split(split(4).images, labels).renumbered(names, classes)
    assert [classes[label] for label in found.labels] == [names[label] for label in labels]
    assert numbers(found) == [0, 1, 2, 3]
    lacking = [name for name in classes if name != names[2]]
    with pytest.raises(DataError, match=f"images of '{names[2]}', which is none of the 5 classes"):
        Split(split(4).images, labels).renumbered(names, lacking)
    Split(split(4).images, labels).renumbered(
        names, [name for name in classes if name != names[1]]
    )  # of which are none
