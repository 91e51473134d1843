"""What every loader returns: images and labels as tensors, checked once, on construction."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, TypedDict

import torch
from torch import Tensor

from certtrain.data.seeding import generator
from certtrain.errors import DataError, UsageError, shown


@dataclass(frozen=True, eq=False)
class Split:
    """Images and their labels.

    Attributes:
        images: uint8 (N, C, H, W), N > 0.
        labels: int64 (N,), on the same device.

    Raises:
        DataError: wrong type, shape or device, or no images.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.dim() != 4:
            raise DataError(f"images must be uint8 (N, C, H, W), not {_describe(images)}")
        if labels.dtype != torch.int64 or labels.dim() != 1:
            raise DataError(f"labels must be int64 (N,), not {_describe(labels)}")
        if len(images) != len(labels):
            raise DataError(f"{len(images)} images but {len(labels)} labels")
        if images.numel() == 0:
            raise DataError(f"no images: {_describe(images)}")
        if images.device != labels.device:
            raise DataError(f"images are on {images.device}, labels on {labels.device}")

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Split:
        """The same images and labels on `device`."""
        return Split(self.images.to(device), self.labels.to(device))

    def take(self, indices: Tensor | slice) -> Split:
        """The images at `indices` (int64 (M,) or bool (N,), on the CPU or on this split's device), or of a slice."""
        return Split(self.images[indices], self.labels[indices])

    def parts(self, size: int) -> Iterator[Split]:
        """The images in their order, `size` at a time."""
        return (self.take(slice(start, start + size)) for start in range(0, len(self), size))

    def renumbered(self, names: Sequence[str], classes: Sequence[str]) -> Split:
        """The same images; what was label i, the class `names[i]`, becomes the place of that name in `classes`.

        Raises:
            DataError: names the first class of an image that is not one of `classes`.
        """
        if tuple(names) == tuple(classes):
            return self
        place = {name: label for label, name in enumerate(classes)}
        for label in self.labels.unique().tolist():
            if names[label] not in place:
                raise DataError(f"images of {names[label]!r}, which is none of the {len(classes)} classes")
        number = torch.tensor([place.get(name, -1) for name in names], device=self.labels.device)
        return Split(self.images, number[self.labels])


@dataclass(frozen=True, eq=False)
class Dataset:
    """A classification data set.

    Attributes:
        train, test, validation: the splits; all images of one size, all labels in [0, num_classes).
        classes: a name per class.
        mean, std: per channel, in units of [0, 1] pixels: what the model's first layer normalises its input with.
        old: training images of another data set, of which every batch has a share, labelled as `classes` are numbered.

    Raises:
        DataError: the splits do not fit each other or the classes.
    """

    train: Split
    test: Split
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    validation: Split | None = None
    old: Split | None = None

    def __post_init__(self) -> None:
        splits = {"train": self.train, "test": self.test, "validation": self.validation, "replayed": self.old}
        for name, split in splits.items():
            if split is None:
                continue
            if split.images.shape[1:] != self.train.images.shape[1:]:
                raise DataError(f"{name} images are {_size(split)}, train images are {_size(self.train)}")
            low, high = (int(bound) for bound in split.labels.aminmax())
            if low < 0 or high >= self.num_classes:
                raise DataError(f"{name} labels reach from {low} to {high}, outside 0 to {self.num_classes - 1}")
        channels = self.image_shape[0]
        if len(self.mean) != channels or len(self.std) != channels or min(self.std) <= 0:
            raise DataError(f"mean {self.mean} and std {self.std} must be {channels} numbers each, std positive")

    @property
    def num_classes(self) -> int:
        """How many classes have a name; some may have no images."""
        return len(self.classes)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    def to(self, device: torch.device | str) -> Dataset:
        """The same data set with every split on `device`."""
        return self._each(lambda split: split.to(device))

    def _each(self, change: Callable[[Split], Split]) -> Dataset:
        validation, old = (None if split is None else change(split) for split in (self.validation, self.old))
        return replace(self, train=change(self.train), test=change(self.test), validation=validation, old=old)

    def of_classes(self, indices: Sequence[int]) -> Dataset:
        """Only the images of these classes, the first of which becomes class 0, the second class 1, and so on.

        Args:
            indices: of `classes`, each at most once.

        Raises:
            UsageError: there is no such class, none is named, or one twice.
            DataError: a split has no image of any of them.
        """
        indices = list(indices)
        for index in indices:
            if isinstance(index, bool) or not isinstance(index, Integral) or not 0 <= index < self.num_classes:
                raise UsageError(f"data.classes: there is no class {shown(index)} in 0 to {self.num_classes - 1}")
        if not indices or len(set(indices)) < len(indices):
            raise UsageError(f"data.classes: {shown(indices)} must name a class, and none twice")
        number = torch.full((self.num_classes,), -1)
        number[torch.tensor(indices)] = torch.arange(len(indices))

        def kept(split: Split) -> Split:
            labels = number.to(split.labels.device)[split.labels]
            return Split(split.images[labels >= 0], labels[labels >= 0])

        return replace(self._each(kept), classes=tuple(self.classes[index] for index in indices))

    def with_validation(self, amount: float | int, seed: int) -> Dataset:
        """Cut a random subset off train and make it the validation split; both keep train's order.

        Args:
            amount: a share of train in (0, 1) as a float, or a number of images as an int; 0 cuts nothing.
            seed: which images; the same seed gives the same subset.

        Raises:
            UsageError: the amount is negative or would leave train or validation empty, or there is a validation split.
        """
        if amount == 0:
            return self
        if self.validation is not None:
            raise UsageError("this data set already has a validation split")
        total = len(self.train)
        count = round(amount * total) if isinstance(amount, float) and 0 < amount < 1 else amount
        if isinstance(count, bool) or not isinstance(count, int) or not 0 < count < total:
            raise UsageError(
                f"validation is {amount!r}: not a share in (0, 1) or a number of images "
                f"that leaves both splits of {total} images non-empty"
            )
        held_out = torch.zeros(total, dtype=torch.bool)
        held_out[torch.randperm(total, generator=generator(seed), device="cpu")[:count]] = True
        return replace(self, train=self.train.take(~held_out), validation=self.train.take(held_out))

    def tested_on_validation(self) -> Dataset:
        """The validation split, which there must be, in the place of the test images."""
        assert self.validation is not None
        return replace(self, test=self.validation, validation=None)


def require_two_classes(train: Split) -> None:
    """Refuse a training set of one class: a constant network would be right everywhere, and proved to be.

    Raises:
        DataError: all labels are the same.
    """
    low, high = (int(bound) for bound in train.labels.aminmax())
    if low == high:
        raise DataError(f"all {len(train)} training images have the label {low}: there is nothing to tell apart")


class Normalization(TypedDict):
    """Of the input, by channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def identity_normalization(channels: int) -> Normalization:
    """`mean` and `std` of a `Dataset` whose pixels enter the network as they are."""
    return {"mean": (0.0,) * channels, "std": (1.0,) * channels}


def require_split(data: Any) -> None:
    """Raises UsageError for what is no `Split`: a whole data set, a loader, tensors."""
    if not isinstance(data, Split):
        raise UsageError(
            f"data must be a Split, not {type(data).__name__}: dataset.test, or Split(images, labels) of "
            "uint8 (N, C, H, W) and int64 (N,)"
        )


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _size(split: Split) -> str:
    return "x".join(map(str, split.images.shape[1:]))
