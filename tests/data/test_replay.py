"""Batches with a share of old images: what is in them, and that they follow from seed and step alone."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from certtrain.data import NO_AUGMENTATION, Augmentation, Split
from certtrain.data.replay import Mixture
from certtrain.errors import UsageError
from certtrain.runtime.distributed import Ranks


def numbered(count, first=0):
    """Images whose one pixel is their number."""
    numbers = torch.arange(first, first + count)
    return Split(numbers.to(torch.uint8).view(-1, 1, 1, 1), numbers)


NEW, OLD = numbered(37), numbered(5, first=100)


def drawn(mixture, epoch, start=0, share=lambda batch: batch, augmentation=NO_AUGMENTATION):
    batches = mixture.epoch_batches(
        NEW, OLD, seed=3, epoch=epoch, start_step=start, share=share, augmentation=augmentation
    )
    for images, labels in batches:
        assert torch.equal((images * 255).round().long().flatten(), labels)
        yield labels.tolist()


@given(size=st.integers(2, 40), share=st.floats(0.05, 0.95))
def test_every_batch_has_its_share_and_every_image_its_turn(size, share):
    if not 0 < round(share * size) < size:
        with pytest.raises(UsageError, match=r"replay\.share: .* each batch needs old ones and new ones"):
            Mixture(len(NEW), size, share)
        return
    mixture = Mixture(len(NEW), size, share)
    old_in_order = []
    for epoch in range(3):
        batches = list(drawn(mixture, epoch))
        assert [len(batch) for batch in batches[:-1]] == [size] * (len(batches) - 1)
        assert [(sum(n < 100 for n in batch), sum(n >= 100 for n in batch)) for batch in batches] == mixture.sizes
        assert sorted(n for batch in batches for n in batch if n < 100) == list(range(37))
        assert all(sum(n >= 100 for n in batch) == round(share * size) for batch in batches[:-1])
        old_in_order += [n for batch in batches for n in batch if n >= 100]
    for first in range(0, len(old_in_order) - 4, 5):
        assert sorted(old_in_order[first : first + 5]) == list(range(100, 105)), "each once before any comes again"


@pytest.mark.parametrize("size", [8, 10, 13])
def test_a_resumed_epoch_and_shares_of_ranks_are_those_of_the_whole(size):
    mixture, shift = Mixture(len(NEW), size, 0.4), Augmentation(flip=True, crop=0)
    for epoch in (0, 4):
        whole = list(drawn(mixture, epoch, augmentation=shift))
        for start in range(len(whole) + 1):
            assert list(drawn(mixture, epoch, start, augmentation=shift)) == whole[start:]
        parts = zip(*(drawn(mixture, epoch, share=Ranks(rank, 3).share) for rank in range(3)), strict=True)
        assert [list(chain(*part)) for part in parts] == whole


def test_epochs_and_seeds_draw_otherwise():
    mixture = Mixture(len(NEW), 10, 0.3)
    assert list(drawn(mixture, 0)) != list(drawn(mixture, 1))
    counts = Counter(n for epoch in range(5) for batch in drawn(mixture, epoch) for n in batch if n >= 100)
    assert max(counts.values()) - min(counts.values()) <= 1
