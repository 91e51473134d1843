"""Has a module changed since it was recorded? What it is made of, to be compared."""

from __future__ import annotations

from collections.abc import Iterator
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
from torch import Tensor, nn

from certtrain.modules import attributes_of


def structure_of(model: nn.Module) -> tuple[Any, ...]:
    """Everything a recording has frozen: submodules, modes, hooks, which parameters and buffers there are, of what
    shape and type and where, and all other attributes, of the modules and of their classes.
    """
    return tuple(
        (
            name,
            _Same(module),
            type(module),
            module.training,
            _frozen(module._forward_hooks),
            _frozen(module._forward_pre_hooks),
            tuple((key, _kind(value)) for key, value in (module._parameters | module._buffers).items()),
            tuple((key, _frozen(value)) for key, value in vars(module).items() if key not in _LIVE),
            tuple(_class_attributes(type(module))),
        )
        for name, module in model.named_modules(remove_duplicate=False)
    )


def _kind(parameter: Tensor | None) -> Any:
    """What a forward may ask of a parameter while it is traced; its values are read at every call."""
    return None if parameter is None else (parameter.shape, parameter.dtype, parameter.device)


def _class_attributes(kind: type[nn.Module]) -> Iterator[tuple[str, Any]]:
    for base in kind.__mro__:
        if base is nn.Module:
            return
        if base.__module__.startswith("torch.nn."):
            yield "forward", _Same(vars(base).get("forward"))
        else:
            yield from ((key, _frozen(value)) for key, value in vars(base).items() if not key.startswith("__"))


_LIVE = frozenset(vars(nn.Module())) | {"training"}
_WITHOUT_STATE = (nn.Module, type, ModuleType, FunctionType, MethodType, BuiltinFunctionType)
"""Objects whose attributes are not looked into: modules are, on their own."""


class _Same:
    """Equal to what is the very same object, which stays alive, so that no other takes its place in memory."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]


def _frozen(value: Any, depth: int = 3, inside: tuple[int, ...] = ()) -> Any:
    """`value` as it is now, so far that a change shows; of objects `depth`, one inside the other, are looked into.

    inside: containers that it lies in, of which it may be one itself.
    """
    if value is None or isinstance(value, int | float | str | bool):
        return value
    if isinstance(value, Tensor):
        return _Same(value), value._version
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if id(value) in inside:
        return None
    if isinstance(value, list | tuple | set | frozenset):
        return tuple(_frozen(item, depth, (*inside, id(value))) for item in value)
    if isinstance(value, dict):
        return tuple((key, _frozen(item, depth, (*inside, id(value)))) for key, item in value.items())
    if depth and not isinstance(value, _WITHOUT_STATE):
        return _Same(value), tuple((key, _frozen(item, depth - 1)) for key, item in attributes_of(value))
    return _Same(value)
