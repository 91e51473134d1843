"""Random streams that follow from a seed and a position alone."""

from __future__ import annotations

import numpy as np
import torch

from certtrain.errors import UsageError


def generator(seed: int, *key: int) -> torch.Generator:
    """A CPU generator for (seed, *key): neighbouring seeds and keys give unrelated streams.

    On the CPU whatever the device of the data, so that every device sees the same epoch.
    """
    if seed < 0:
        raise UsageError(f"a seed must not be negative, got {seed}")
    # A spawn key, since SeedSequence pads plain entropy with zeros: [seed] and [seed, 0] are the same sequence.
    sequence = np.random.SeedSequence(seed, spawn_key=key)
    return torch.Generator().manual_seed(int(sequence.generate_state(1, np.uint64)[0]))
