"""Batches: shuffled and augmented on the device for training, in order for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from certtrain.data.dataset import Split
from certtrain.data.seeding import generator
from certtrain.errors import UsageError


@dataclass(frozen=True)
class Augmentation:
    """Random changes to training images.

    Attributes:
        flip: mirror left to right with probability one half.
        crop: shift by up to ± this many pixels in each direction, each shift equally likely; what moves in from
            outside repeats the edge. The shift comes before the flip.
    """

    flip: bool = False
    crop: int = 0

    def __post_init__(self) -> None:
        if self.crop < 0:
            raise UsageError(f"augmentation: crop must not be negative, got {self.crop}")


NO_AUGMENTATION = Augmentation()


def to_float(images: Tensor) -> Tensor:
    """uint8 pixels of any shape as float32 in [0, 1]."""
    largest = torch.full((), 255.0, device=images.device)  # a tensor: CUDA multiplies by a number's rounded inverse
    return images.to(torch.float32).div_(largest)


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Batches in an epoch of `n` images; the last, incomplete one counts."""
    if batch_size < 1:
        raise UsageError(f"batch size must be positive, got {batch_size}")
    return -(-n // batch_size)


def batch_sizes(n: int, batch_size: int) -> list[int]:
    """Images in each batch of an epoch of `n`."""
    return [min(batch_size, n - first) for first in range(0, n, batch_size)]


def epoch_batches(
    split: Split,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    augmentation: Augmentation = NO_AUGMENTATION,
    start_step: int = 0,
    share: Callable[[range], range] = lambda batch: batch,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of training batches: every image once, in random order; the last, incomplete batch is kept.

    Order and augmentation follow from (seed, epoch) alone, on every device and for every batch size; starting at
    `start_step` = k yields what an uninterrupted epoch yields from its k-th batch on. With `share`, which picks
    consecutive positions from a batch's, only those of its images are yielded.

    Yields:
        images float32 (B, C, H, W) in [0, 1] and labels int64 (B,), on the split's device.

    Raises:
        UsageError: a batch size below 1, a negative seed or epoch, or a start step outside the epoch.
    """
    n = len(split)
    steps = steps_per_epoch(n, batch_size)
    if epoch < 0:
        raise UsageError(f"epoch must not be negative, got {epoch}")
    if not 0 <= start_step <= steps:
        raise UsageError(f"start step {start_step} is outside an epoch of {steps} steps")
    shuffled = Shuffled(split, generator(seed, epoch), augmentation)
    return (
        shuffled[share(range(step * batch_size, min((step + 1) * batch_size, n)))] for step in range(start_step, steps)
    )


class Shuffled:
    """A split in random order and augmented, as `stream` says: `shuffled[positions]` are images and labels.

    All is drawn and sent to the split's device at once: no step depends on an earlier one, or waits for the host.
    """

    def __init__(self, split: Split, stream: torch.Generator, augmentation: Augmentation = NO_AUGMENTATION) -> None:
        n, device = len(split), split.images.device
        self._split, self._augmentation = split, augmentation
        self._order = torch.randperm(n, generator=stream, device=stream.device).to(device)
        self._flips = (torch.rand(n, generator=stream, device=stream.device) < 0.5).to(device)
        crop = augmentation.crop
        self._shifts = torch.randint(-crop, crop + 1, (n, 2), generator=stream, device=stream.device).to(device)

    def __getitem__(self, positions: range) -> tuple[Tensor, Tensor]:
        here = slice(positions.start, positions.stop)
        chosen = self._order[here]
        if self._augmentation == NO_AUGMENTATION:
            images = self._split.images[chosen]
        else:
            flip = self._flips[here] if self._augmentation.flip else torch.zeros_like(self._flips[here])
            images = _moved(self._split.images, chosen, self._shifts[here], flip)
        return to_float(images), self._split.labels[chosen]


def evaluation_batches(split: Split, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The split in its own order, once; the last, incomplete batch is kept.

    Yields:
        images float32 (B, C, H, W) in [0, 1] and labels int64 (B,), on the split's device.
    """
    steps = steps_per_epoch(len(split), batch_size)
    parts = (slice(step * batch_size, (step + 1) * batch_size) for step in range(steps))
    return ((to_float(split.images[part]), split.labels[part]) for part in parts)


def _moved(images: Tensor, chosen: Tensor, shifts: Tensor, flip: Tensor) -> Tensor:
    """images[chosen], the b-th moved by shifts[b] = (dy, dx) with repeated edges, then mirrored where flip[b]."""
    _, channels, height, width = images.shape
    device = images.device
    # Reading at a coordinate clamped to the image is what padding with repeated edges and cropping amounts to.
    rows = (torch.arange(height, device=device) + shifts[:, :1]).clamp(0, height - 1)
    columns = (torch.arange(width, device=device) + shifts[:, 1:]).clamp(0, width - 1)
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    places = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)  # one for all channels: a third of the time
    pixels = images[chosen].flatten(2).gather(2, places[:, None].expand(-1, channels, -1))
    return pixels.unflatten(2, (height, width))
