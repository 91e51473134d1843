from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from certtrain.data import Augmentation, Split, epoch_batches, evaluation_batches, steps_per_epoch, to_float
from certtrain.errors import UsageError


def numbered_split(n, channels=3, height=5, width=7):
    """Random images, the i-th labelled i, so that a batch tells which images it holds."""
    images = torch.randint(0, 256, (n, channels, height, width), generator=torch.Generator().manual_seed(0))
    return Split(images.to(torch.uint8), torch.arange(n))


def epoch(split, batch_size=16, *, seed=0, epoch=0, **kwargs):
    batches = list(epoch_batches(split, batch_size, seed=seed, epoch=epoch, **kwargs))
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


def naive(image, dy, dx, flip):
    """Pad with edges, crop, mirror: one image (C, H, W), uint8 numpy."""
    reach = max(abs(dy), abs(dx))
    height, width = image.shape[1:]
    padded = np.pad(image, ((0, 0), (reach, reach), (reach, reach)), mode="edge")
    cropped = padded[:, reach + dy : reach + dy + height, reach + dx : reach + dx + width]
    return cropped[:, :, ::-1] if flip else cropped


def moves(split, augmentation):
    """For each image of an epoch, the (dy, dx, flip) by which the naive implementation reproduces it."""
    reach = range(-augmentation.crop, augmentation.crop + 1)
    candidates = [(dy, dx, flip) for dy in reach for dx in reach for flip in (False, True)]
    found = {}
    for image, label in zip(*epoch(split, augmentation=augmentation), strict=True):
        got = np.rint(image.numpy() * 255).astype(np.uint8)
        source = split.images[label].numpy()
        matches = [move for move in candidates if np.array_equal(naive(source, *move), got)]
        assert len(matches) == 1, f"image {label} is {len(matches)} of the allowed variants"
        found[int(label)] = matches[0]
    return found


@given(st.integers(1, 60), st.integers(1, 70))
def test_an_epoch_shows_every_image_once_in_full_batches_and_a_rest(n, batch_size):
    sizes, seen = [], []
    for images, labels in epoch_batches(numbered_split(n, 1, 2, 2), batch_size, seed=3, epoch=4):
        sizes.append(len(images))
        seen += labels.tolist()
    assert sorted(seen) == list(range(n))
    assert len(sizes) == steps_per_epoch(n, batch_size)
    assert set(sizes[:-1]) <= {batch_size}
    assert 1 <= sizes[-1] <= batch_size


def test_images_are_the_labels_own_as_float32_in_the_unit_interval():
    split = numbered_split(50)
    images, labels = epoch(split)
    assert images.dtype == torch.float32
    np.testing.assert_array_equal(images.numpy(), split.images.numpy()[labels] / np.float32(255))


def test_to_float_covers_the_unit_interval():
    assert to_float(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist() == pytest.approx([0, 0.2, 1], abs=1e-7)


def test_crop_and_flip_agree_with_a_naive_implementation_and_are_uniform():
    n, crop = 1000, 2
    found = moves(numbered_split(n), Augmentation(flip=True, crop=crop))
    dy, dx, flip = (Counter(column) for column in zip(*found.values(), strict=True))
    # Six standard deviations of a binomial count.
    for counter, values in ((dy, 2 * crop + 1), (dx, 2 * crop + 1), (flip, 2)):
        assert len(counter) == values
        tolerance = 6 * (n / values * (1 - 1 / values)) ** 0.5
        assert all(abs(count - n / values) < tolerance for count in counter.values())
    assert len(Counter(found.values())) == 50, "shifts and flips are drawn independently: every combination occurs"


def test_flip_alone_does_not_shift_and_crop_alone_does_not_flip():
    split = numbered_split(100)
    assert set(moves(split, Augmentation(flip=True)).values()) == {(0, 0, False), (0, 0, True)}
    cropped = moves(split, Augmentation(crop=1)).values()
    assert {flip for _, _, flip in cropped} == {False}
    assert {(dy, dx) for dy, dx, _ in cropped} == {(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)}


def test_crop_may_exceed_the_image():
    split = numbered_split(40, 1, 2, 3)
    for image, label in zip(*epoch(split, augmentation=Augmentation(crop=9)), strict=True):
        source = split.images[label].numpy()
        variants = {naive(source, dy, dx, False).tobytes() for dy in range(-9, 10) for dx in range(-9, 10)}
        assert np.rint(image.numpy() * 255).astype(np.uint8).tobytes() in variants


@pytest.mark.parametrize("start_step", [0, 1, 5, 7])
def test_starting_late_yields_the_rest_of_the_same_epoch(start_step):
    split, augmentation = numbered_split(100), Augmentation(flip=True, crop=2)
    whole = list(epoch_batches(split, 16, seed=1, epoch=2, augmentation=augmentation))
    rest = list(epoch_batches(split, 16, seed=1, epoch=2, augmentation=augmentation, start_step=start_step))
    assert len(rest) == 7 - start_step
    for (images, labels), (same_images, same_labels) in zip(rest, whole[start_step:], strict=True):
        assert torch.equal(images, same_images)
        assert torch.equal(labels, same_labels)


def test_an_epoch_follows_from_seed_and_epoch_alone():
    split, augmentation = numbered_split(100), Augmentation(flip=True, crop=2)
    torch.manual_seed(0)
    images, labels = epoch(split, 16, seed=5, epoch=6, augmentation=augmentation)
    torch.manual_seed(1)
    same_images, same_labels = epoch(split, 33, seed=5, epoch=6, augmentation=augmentation)
    assert torch.equal(images, same_images)
    assert torch.equal(labels, same_labels)
    assert torch.equal(labels, epoch(split, seed=5, epoch=6)[1]), "augmentation must not change the order"


def test_epochs_leave_the_global_random_state_alone():
    before = torch.get_rng_state()
    epoch(numbered_split(10), augmentation=Augmentation(flip=True, crop=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_every_seed_and_epoch_has_its_own_order():
    split = numbered_split(100, 1, 1, 1)
    orders = {tuple(epoch(split, seed=seed, epoch=number)[1].tolist()) for seed in range(6) for number in range(6)}
    assert len(orders) == 36


def test_evaluation_keeps_the_order_and_the_rest():
    split = numbered_split(10)
    batches = list(evaluation_batches(split, 4))
    assert [len(labels) for _, labels in batches] == [4, 4, 2]
    assert torch.cat([labels for _, labels in batches]).tolist() == list(range(10))
    images = torch.cat([images for images, _ in batches])
    assert images.dtype == torch.float32
    np.testing.assert_array_equal(images.numpy(), split.images.numpy() / np.float32(255))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch size"),
        ({"seed": -1}, "seed"),
        ({"epoch": -1}, "epoch"),
        ({"start_step": -1}, "start step"),
        ({"start_step": 4}, "start step 4 is outside an epoch of 3 steps"),
    ],
)
def test_a_wrong_argument_is_an_error_at_the_call(arguments, message):
    with pytest.raises(UsageError, match=message):
        epoch_batches(numbered_split(10), **{"batch_size": 4, "seed": 0, "epoch": 0} | arguments)


def test_a_negative_crop_is_an_error():
    with pytest.raises(UsageError, match="crop"):
        Augmentation(crop=-1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_and_cpu_see_the_same_epoch():
    split, augmentation = numbered_split(100), Augmentation(flip=True, crop=2)
    images, labels = epoch(split, augmentation=augmentation)
    gpu_images, gpu_labels = epoch(split.to("cuda"), augmentation=augmentation)
    assert gpu_images.is_cuda
    # Division by 255 may round differently on the two devices; the pixels are the same.
    assert torch.equal((gpu_images.cpu() * 255).round(), (images * 255).round())
    assert torch.equal(gpu_labels.cpu(), labels)
