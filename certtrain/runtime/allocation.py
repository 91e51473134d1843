"""How the C library keeps memory between the steps of a training run on a CPU."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_LARGEST = 2**31 - 1
_LARGEST_TENSOR = 2**30


def keep_freed_memory() -> None:
    """Reuse the memory of freed tensors instead of returning it to the system; for the whole process, glibc only.

    By itself glibc maps every allocation beyond 32 MiB anew, and the system zeroes its pages: for the activations of a
    wide network that takes as long as computing them.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_TENSOR)
        mallopt(_M_TRIM_THRESHOLD, _LARGEST)
