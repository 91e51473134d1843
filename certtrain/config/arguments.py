"""`optimizer.arguments`, checked against what the optimizer takes before torch sees them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import suppress
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from certtrain.errors import UsageError, shortened, shown, unknown

LARGEST = 1e30  # beyond which float32 overflows

# Set elsewhere (params, lr), or for steps that are not those of training: uphill, differentiated, or in a CUDA graph.
_NOT_HERE = {"self", "params", "lr", "maximize", "differentiable", "capturable"}


def optimizer_arguments(optimizer: type, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for a class of torch.optim: those given, and its fused kernel where it has one.

    Raises:
        UsageError: it takes no such argument, or not such a value; names the argument and the choices.
    """
    hints = get_type_hints(optimizer.__init__)  # type: ignore[misc] # this very class's
    choices = [name for name in inspect.signature(optimizer).parameters if name not in _NOT_HERE]
    taken: dict[str, Any] = {}
    for name, value in arguments.items():
        where = f"optimizer.arguments.{shortened(name)}"
        if name not in choices:
            raise UsageError(f"{where}: {unknown(f'argument of {optimizer.__name__}', name, choices)}")
        try:
            taken[name] = _converted(value, hints[name])
        except TypeError:
            raise UsageError(f"{where}: {_described(hints[name])} is expected (got {shown(value)})") from None
    if taken.get("foreach") and taken.get("fused"):
        raise UsageError("optimizer.arguments: foreach and fused cannot both be true")
    fused = {"fused": True} if "fused" in choices and not taken.get("foreach") else {}
    return fused | taken


def _converted(value: Any, kind: Any) -> Any:
    """`value` as a `kind`, a type annotation of the optimizer's; a TypeError where it is none."""
    parts = get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        for part in parts:
            with suppress(TypeError):
                return _converted(value, part)
    elif get_origin(kind) is tuple:
        if isinstance(value, list | tuple) and len(value) == len(parts):
            return tuple(map(_converted, value, parts))
    elif kind is float:
        if type(value) in (int, float) and abs(value) < LARGEST:
            return float(value)
    elif kind in _WORDS and type(value) is kind:
        return value
    raise TypeError


_WORDS = {float: "a number", int: "a whole number", bool: "true or false", str: "text", NoneType: "null"}


def _described(kind: Any) -> str:
    parts = get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(text for text in map(_described, parts) if text)  # tensors cannot be written
    if get_origin(kind) is tuple:
        return f"a list of {' and '.join(map(_described, parts))}"
    return _WORDS.get(kind, "")
