"""Training batches of which a share are old images, against forgetting what was learned from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from certtrain.data.batches import NO_AUGMENTATION, Augmentation, Shuffled, batch_sizes
from certtrain.data.dataset import Split
from certtrain.data.seeding import generator
from certtrain.errors import UsageError

OLD = 1  # in the key of the old images' random stream, beside that of the new ones


@dataclass(frozen=True)
class Mixture:
    """Batches of `batch_size` images, a share of them from an old training set; an epoch is one of the new one's.

    Old images come in random order, each once before any comes again, from epoch to epoch. All follows from the seed
    and the step, so that no state is to be saved.

    Raises:
        UsageError: a batch would have no old image, or no new one.
    """

    images: int  # in the new training set
    batch_size: int
    share: float

    def __post_init__(self) -> None:
        if not 0 < self.old_per_batch < self.batch_size:
            raise UsageError(
                f"replay.share: {self.share:g} of a batch of {self.batch_size} is {self.old_per_batch} images: "
                "each batch needs old ones and new ones"
            )

    @property
    def old_per_batch(self) -> int:
        """Old images in a full batch."""
        return round(self.share * self.batch_size)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """New and old images in each batch of an epoch; an incomplete one has old images in proportion."""
        full = self.batch_size - self.old_per_batch
        return [(new, round(self.old_per_batch * new / full)) for new in batch_sizes(self.images, full)]

    def epoch_batches(
        self,
        new: Split,
        old: Split,
        *,
        seed: int,
        epoch: int,
        augmentation: Augmentation = NO_AUGMENTATION,
        start_step: int = 0,
        share: Callable[[range], range] = lambda batch: batch,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch of training batches, in each the new images before the old ones (`certtrain.data.epoch_batches`).

        Yields:
            images float32 (B, C, H, W) in [0, 1] and labels int64 (B,), on the splits' device.
        """
        sizes = self.sizes
        news, olds = (sum(counts) for counts in zip((0, 0), *sizes[:start_step], strict=True))
        olds += epoch * sum(count for _, count in sizes)
        recent = Shuffled(new, generator(seed, epoch), augmentation)
        passes = _Passes(old, seed, augmentation)
        for fresh, replayed in sizes[start_step:]:
            here = share(range(fresh + replayed))
            parts = [recent[range(news + min(here.start, fresh), news + min(here.stop, fresh))]]
            parts += passes.parts(olds + max(here.start - fresh, 0), olds + max(here.stop - fresh, 0))
            images, labels = zip(*parts, strict=True)
            yield torch.cat(images), torch.cat(labels)
            news, olds = news + fresh, olds + replayed


class _Passes:
    """A split, again and again, shuffled anew each time, as one endless sequence."""

    def __init__(self, split: Split, seed: int, augmentation: Augmentation) -> None:
        self._split, self._seed, self._augmentation = split, seed, augmentation
        self._pass: tuple[int, Shuffled] | None = None  # the latest, and its number

    def parts(self, start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels at positions [start, stop), a part for each pass that they belong to."""
        n = len(self._split)
        while start < stop:
            number, first = divmod(start, n)
            if self._pass is None or self._pass[0] != number:
                stream = generator(self._seed, number, OLD)
                self._pass = number, Shuffled(self._split, stream, self._augmentation)
            last = min(first + stop - start, n)
            yield self._pass[1][range(first, last)]
            start += last - first
