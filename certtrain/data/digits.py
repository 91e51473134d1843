"""scikit-learn's handwritten digits: 8×8 pixels, embedded in the library, for tests and first steps."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from certtrain.data.dataset import Dataset, Split, identity_normalization

_TRAIN = 1437


def load_digits(root: Path, download: bool) -> Dataset:
    """The 1,797 digits, 1 channel, 10 classes; grey levels 0 to 16 become 0 to 255. Reads and downloads nothing.

    scikit-learn has no official split: train is the first 1,437 and test the other 360 of a fixed permutation.
    """
    images, labels = _embedded()
    # RandomState, not default_rng: numpy promises that its stream stays the same in all versions.
    order = np.random.RandomState(0).permutation(len(labels))
    everything = Split(torch.from_numpy(images[order][:, None]), torch.from_numpy(labels[order]))
    return Dataset(
        train=everything.take(slice(_TRAIN)),
        test=everything.take(slice(_TRAIN, None)),
        classes=tuple(map(str, range(10))),
        **identity_normalization(1),
    )


@lru_cache(1)
def _embedded() -> tuple[np.ndarray, np.ndarray]:
    """Images (1797, 8, 8) and labels (1797,) in scikit-learn's order, parsed once in a process."""
    from sklearn.datasets import load_digits as embedded

    digits = embedded()
    return np.rint(digits.images * 255 / 16).astype(np.uint8), digits.target.astype(np.int64)
