"""Bytes of tensors, counted while they are there."""

from __future__ import annotations

import torch

from tests.test_scripts import script

LiveBytes = script("live_bytes").LiveBytes


def test_memory_is_counted_while_it_is_there():
    with LiveBytes() as live:
        first = torch.zeros(1000)
        second = first + 1
        assert live.now == 8000
        part = second[1:]
        del first, second
        assert live.now == 4000
        part.add_(1)
        del part
    assert (live.now, live.peak) == (0, 8000)


def test_what_was_there_before_is_not_counted():
    there = torch.zeros(1000)
    with LiveBytes() as live:
        there.add_(1)
        part = there[10:]
        torch.relu_(part)
        assert (live.now, live.peak) == (0, 0)
        made = [part * 2, there.clone()]
        assert live.now == 3960 + 4000
        made.pop()
        assert live.now == 3960
