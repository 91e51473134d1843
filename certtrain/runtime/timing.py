"""What work on a device took."""

from __future__ import annotations

import time

import torch


def now_on(device: torch.device) -> float:
    """Seconds of a clock, read when `device` has done all that it was asked: a GPU is told what to do ahead of time."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
