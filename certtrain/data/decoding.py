"""Image files to arrays."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from certtrain.errors import DataError

_CHUNK = 64


def decode_images(files: Sequence[Path], title: str, size: tuple[int, int] | None = None) -> np.ndarray:
    """Decode image files of one size, in parallel, with a progress bar called `title` on a terminal.

    Args:
        files: at least one; grey and palette images are converted to RGB.
        size: the (height, width) that every image must have; by default that of the first.

    Returns:
        uint8 (N, 3, H, W), in the order of `files`.

    Raises:
        DataError: names the first file that cannot be decoded or differs in size.
    """
    from rich.console import Console
    from rich.progress import track

    height, width = size or _decode(files[0]).shape[:2]
    images = np.empty((len(files), 3, height, width), dtype=np.uint8)

    def fill(start: int) -> None:
        for index, file in enumerate(files[start : start + _CHUNK], start):
            pixels = _decode(file)
            if pixels.shape[:2] != (height, width):
                here = "x".join(map(str, pixels.shape[:2]))
                raise DataError(f"{file} has {here} pixels, the images before it {height}x{width}; all must be alike")
            images[index] = pixels.transpose(2, 0, 1)

    console = Console(stderr=True)
    starts = range(0, len(files), _CHUNK)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # Pillow decodes without holding the GIL
        # `map` hands back in order, so the error that surfaces is that of the first bad file.
        done = pool.map(fill, starts)
        for _ in track(done, title, len(starts), console=console, transient=True, disable=not console.is_terminal):
            pass
    return images


def _decode(file: Path) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(file) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises SyntaxError for a broken PNG
        raise DataError(f"{file} cannot be decoded: {error}") from error
