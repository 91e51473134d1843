"""What any network is asked: where it lies, of what type it is, in which mode, what attributes its parts have; and the
random numbers it draws."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

M = TypeVar("M", bound=nn.Module)

CPU = torch.device("cpu")


def device_of(model: nn.Module, default: torch.device = CPU) -> torch.device:
    """That of its parameters or, where it has none, of its buffers, or else `default`."""
    return next((tensor.device for tensor in chain(model.parameters(), model.buffers())), default)


def blank_images(model: nn.Module, count: int, image_shape: Sequence[int]) -> Tensor:
    """(count, C, H, W): black images on the model's device, of the type of its first floating-point tensor, if any."""
    tensors = chain(model.parameters(), model.buffers())
    dtype = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)
    return torch.zeros(count, *image_shape, device=device_of(model), dtype=dtype)


def copied(model: M) -> M:
    """A deep copy, also of a model that keeps results of its last forward, which lose their history of gradients.

    Raises what deepcopy raises of whatever else cannot be copied: an open file, a lock, a generator.
    """
    with _Detaching():
        return deepcopy(model)


class _Detaching(TorchFunctionMode):
    """Within it deepcopy, which refuses results with a history of gradients, copies their values."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is not Tensor.__deepcopy__ or args[0].is_leaf:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        return memo.setdefault(id(tensor), tensor.detach().clone())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`model` in eval mode; every module's own mode comes back after."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def generators_kept(device: torch.device) -> Iterator[None]:
    """What is drawn inside, on the CPU or on `device`, changes nothing of what is drawn after."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def attributes_of(value: Any) -> Iterator[tuple[str, Any]]:
    """The attributes of an object, wherever they are kept: those that it has now, whatever is done to it meanwhile."""
    own = getattr(value, "__dict__", None)
    yield from dict(own).items() if isinstance(own, dict) else ()
    for base in type(value).__mro__:
        slots = vars(base).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                yield name, getattr(value, name)
