"""The random numbers that an attack on some images takes."""

from __future__ import annotations

import torch

from certtrain.data.seeding import generator


def seeded(count: int, seed: int = 0) -> list[torch.Generator]:
    """One generator for each image."""
    return [generator(seed, image) for image in range(count)]
