"""Image files to arrays."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil

from certtrain.errors import DataError, shortened

if TYPE_CHECKING:
    from PIL.ImageFile import ImageFile

_CHUNK = 64
MOST_PIXELS = 1 << 24  # of an image: 4096 x 4096; more is a mistake, or a small file meant to fill the memory
FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # none that starts another program, as EPS does
MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"})  # of at most 8 bits a channel
SCALED = ("ppm", "ppm_plain")  # Pillow's decoders that are given a layout and the largest value, and scale that to 255


def decode_images(files: Sequence[Path], title: str, size: tuple[int, int] | None = None) -> np.ndarray:
    """Decode image files of one size, in parallel, with a progress bar called `title` on a terminal.

    Images are turned as their EXIF orientation says, and grey and palette images become RGB. What RGB with 8 bits
    cannot hold is refused: 16-bit and float pixels, and images that are transparent anywhere; an alpha channel that is
    opaque everywhere is dropped. So are files of several images, but for a camera's JPEG, whose others are previews.

    Args:
        files: at least one, each a regular file of one of FORMATS.
        size: the (height, width) that every image must have; by default that of the first.

    Returns:
        uint8 (N, 3, H, W), in the order of `files`.

    Raises:
        DataError: names the first file that cannot be decoded, is refused, or differs in size.
    """
    from rich.console import Console
    from rich.progress import track

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # of damaged metadata, of sizes that MOST_PIXELS refuses
        height, width = size or _decode(files[0]).shape[:2]
        require_memory(len(files) * 3 * height * width, f"{len(files)} images of {height}x{width} pixels")
        images = np.empty((len(files), 3, height, width), dtype=np.uint8)

        def fill(start: int) -> None:
            for index, file in enumerate(files[start : start + _CHUNK], start):
                pixels = _decode(file)
                if pixels.shape[:2] != (height, width):
                    here = "x".join(map(str, pixels.shape[:2]))
                    raise DataError(
                        f"{file} has {here} pixels, the images before it {height}x{width}; all must be alike"
                    )
                images[index] = pixels.transpose(2, 0, 1)

        console = Console(stderr=True)
        starts = range(0, len(files), _CHUNK)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # Pillow decodes without holding the GIL
            # `map` hands back in order, so the error that surfaces is that of the first bad file.
            done = pool.map(fill, starts)
            for _ in track(done, title, len(starts), console=console, transient=True, disable=not console.is_terminal):
                pass
    return images


def require_memory(size: int, what: str) -> None:
    """Refuse data of `size` bytes that this machine cannot hold, before the attempt.

    Raises:
        DataError: it is larger than all memory.
    """
    memory = psutil.virtual_memory().total
    if size > memory:
        raise DataError(f"{what} take {size / 2**30:.1f} GiB; this machine has {memory / 2**30:.1f}")


def _decode(file: Path) -> np.ndarray:
    """uint8 (H, W, 3)."""
    from PIL import Image, ImageOps

    if not os.path.isfile(file):  # a pipe or a device would be read without end
        raise DataError(f"{file} is missing or no regular file")
    try:
        with Image.open(file, formats=FORMATS) as image:
            _require_8_bits(image)
            if image.format != "MPO" and (frames := getattr(image, "n_frames", 1)) > 1:
                raise ValueError(f"it holds {frames} images: give each a file of its own")
            upright = ImageOps.exif_transpose(image)
            if upright.has_transparency_data and np.asarray(upright.convert("RGBA"))[..., 3].min() < 255:
                raise ValueError("parts of it are transparent: put it on a background first")
            return np.asarray(upright.convert("RGB"))
    except Exception as error:  # Pillow has a dozen ways to complain, SyntaxError for a broken PNG among them
        raise DataError(f"{file} cannot be decoded: {shortened(str(error) or type(error).__name__, 160)}") from error


def _require_8_bits(image: ImageFile) -> None:
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise ValueError(f"it claims {height}x{width} pixels, the most are {MOST_PIXELS}")
    packed = [str(tile[3]) for tile in image.tile]  # such as RGB;16B, of which only the upper bytes would be read
    largest = [tile[3][1] for tile in image.tile if tile[0] in SCALED and isinstance(tile[3], tuple)]  # not of a bitmap
    if image.mode not in MODES or any(";16" in layout for layout in packed) or max(largest, default=0) > 255:
        raise ValueError(f"its pixels have more than 8 bits, or are of another kind ({image.mode}): convert it to RGB")
