"""In which arithmetic matrix products are taken: cheaply while training, fully while proving."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

Precision = Literal["float32", "tf32", "bf16"]


@contextmanager
def training_precision(precision: Precision, device: torch.device) -> Iterator[None]:
    """Products rounded to `precision`; everything between them, radii and losses too, stays float32.

    tf32 is float32 where the device has no such units.
    """
    with (
        _products("tf32" if precision == "tf32" else "ieee", torch.backends.cuda.matmul, torch.backends.cudnn),
        torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"),
    ):
        yield


@contextmanager
def full_precision() -> Iterator[None]:
    """Float32 products as such: no TF32, no bfloat16 splits, no autocast; the process's settings come back after."""
    with (
        _products("ieee", torch.backends.cuda.matmul, torch.backends.cudnn, torch.backends.mkldnn),
        torch.autocast("cuda", enabled=False),
        torch.autocast("cpu", enabled=False),
    ):
        yield


@contextmanager
def _products(rounding: str, *backends: Any) -> Iterator[None]:
    """Set how the backends round float32 products, "ieee" or "tf32", and restore what was set."""
    switches = [switch for backend in backends for switch in _switches(backend)]
    before = [getattr(owner, name) for owner, name in switches]
    try:
        for owner, name in switches:
            setattr(owner, name, rounding if name == "fp32_precision" else rounding == "tf32")
        yield
    finally:
        for (owner, name), value in zip(switches, before, strict=True):
            setattr(owner, name, value)


def _switches(backend: Any) -> list[tuple[Any, str]]:
    """The attributes that say how a backend rounds: from torch 2.9 on a name for each operation, before that a bool."""
    owners = [backend, *(getattr(backend, part, None) for part in ("matmul", "conv"))]
    named = [(owner, "fp32_precision") for owner in owners if hasattr(owner, "fp32_precision")]
    return named or ([(backend, "allow_tf32")] if hasattr(backend, "allow_tf32") else [])
