"""SHA-256 of what results and certificates are about."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from certtrain.data import Split


def split_digest(images: np.ndarray, labels: np.ndarray) -> str:
    """SHA-256 of a test set: a line "N C H W", the uint8 pixels, and the labels as int64, little endian."""
    content = hashlib.sha256(f"{' '.join(map(str, images.shape))}\n".encode())
    content.update(images.tobytes())
    content.update(labels.astype("<i8").tobytes())
    return content.hexdigest()


def digest_of(split: Split) -> str:
    """`split_digest` of a split whose images are tensors."""
    return split_digest(split.images.cpu().numpy(), split.labels.cpu().numpy())


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
