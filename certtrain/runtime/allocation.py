"""Memory: how the C library keeps it between the steps of a training run on a CPU, and what says that it is short."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_LARGEST = 2**31 - 1
_LARGEST_TENSOR = 2**30


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that the machine or its GPU has too little memory."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, by name: without torch
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # torch's on a CPU


def keep_freed_memory() -> None:
    """Reuse the memory of freed tensors instead of returning it to the system; for the whole process, glibc only.

    By itself glibc maps every allocation beyond 32 MiB anew, and the system zeroes its pages: for the activations of a
    wide network that takes as long as computing them.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_TENSOR)
        mallopt(_M_TRIM_THRESHOLD, _LARGEST)
