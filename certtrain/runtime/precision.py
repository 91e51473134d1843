"""In which arithmetic matrix products are taken: cheaply while training, fully while proving."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch

T = TypeVar("T")
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


def warn_if_imitated(precision: Precision, device: torch.device) -> None:
    """Products in bfloat16 are meant to be cheap; where a device only imitates them, they are the dearest of all."""
    if precision == "bf16" and not takes_bfloat16(device):
        warnings.warn(
            "training.precision=bf16: this device has no products in bfloat16, and what imitates them is slow, on CPUs "
            "tens of times slower than float32",
            stacklevel=3,
        )


def takes_bfloat16(device: torch.device) -> bool:
    """Whether there are kernels for such products here: on GPUs from Ampere on, on CPUs with AVX-512 and their like."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@contextmanager
def full_precision() -> Iterator[None]:
    """Float32 products as such: no TF32, no bfloat16 splits, no autocast, nor NNPACK, whose convolutions are no sums of
    products (Winograd); the process's settings come back after.
    """
    with (
        torch.backends.nnpack.flags(enabled=False),
        _products("ieee", torch.backends.cuda.matmul, torch.backends.cudnn, torch.backends.mkldnn),
        torch.autocast("cuda", enabled=False),
        torch.autocast("cpu", enabled=False),
    ):
        yield


@contextmanager
def plain_convolutions() -> Iterator[None]:
    """Without cuDNN, whose convolutions need not be sums of products (Winograd, FFT), as sound bounds are."""
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


@contextmanager
def _products(rounding: str, *backends: Any) -> Iterator[None]:
    """Set how the backends round float32 products, "ieee" or "tf32", and restore what was set.

    From torch 2.9 on each operation of a backend has a name for it; before, matrix products had one, and cuDNN a bool.
    Both are set: torch's compiler still asks for the old ones, and that they do not agree with the new is an
    error (https://github.com/pytorch/pytorch/issues/166387).
    """
    cudnn: Any = torch.backends.cudnn
    asked = [owner for backend in backends for owner in _operations(backend)]
    names = [owner for backend in (torch.backends.cuda.matmul, cudnn, torch.backends.mkldnn)
             for owner in _operations(backend)]  # fmt: skip
    before = [owner.fp32_precision for owner in names]
    matmul, convolution = _or_none(torch.get_float32_matmul_precision), _or_none(lambda: cudnn.allow_tf32)
    try:
        _set_old("high" if rounding == "tf32" else "highest", rounding == "tf32")
        for owner, value in zip(names, before, strict=True):  # which the old ones have set, too
            owner.fp32_precision = rounding if any(owner is one for one in asked) else value
        yield
    finally:
        _set_old(matmul, convolution)
        for owner, value in zip(names, before, strict=True):
            owner.fp32_precision = value


def _operations(backend: Any) -> list[Any]:
    """A backend and its operations, as far as they have a `fp32_precision`."""
    owners = [backend, *(getattr(backend, part, None) for part in ("matmul", "conv", "rnn"))]
    return [owner for owner in owners if hasattr(owner, "fp32_precision")]


def _or_none(setting: Callable[[], T]) -> T | None:
    try:
        return setting()
    except RuntimeError:  # it does not agree with the names
        return None


def _set_old(matmul: str | None, convolution: bool | None) -> None:
    with warnings.catch_warnings(action="ignore"):  # of torch 2.9, that they are deprecated
        if matmul is not None:
            torch.set_float32_matmul_precision(matmul)
        if convolution is not None:
            torch.backends.cudnn.allow_tf32 = convolution
