"""SHA-256 of what a network computes: its modules, their attributes and code, by value, and its state.

It is the same in another process, and of a network that is loaded or built again, and another wherever a forward may
give something else. So of a function there is its bytecode, with what it reads of its closure, its file and other
modules; of an object its class and attributes. What belongs to PyTorch, numpy or Python itself has no code here but a
name, and tables in the modules of installed packages, which fill as they are used, are not looked into.
"""

from __future__ import annotations

import copyreg
import hashlib
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from enum import Enum
from functools import partial
from numbers import Number
from pathlib import PurePath
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from certtrain.modules import attributes_of

_PLAIN = (Number, str, bytes, PurePath, range, slice, torch.Size, torch.dtype, torch.layout, torch.memory_format)
_NAMED = {"torch", "numpy", *sys.stdlib_module_names}  # packages
_OPAQUE = ("torch.fx", "torch._", "logging", "threading", "weakref")  # whose objects hold what is made on the way
_LIVE = frozenset(vars(nn.Module())) | {"training"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def model_digest(model: nn.Module) -> str:
    """Of a network with its parameters and buffers, also of those that are not saved with it."""
    return _Digests().of_network(getattr(model, "_orig_mod", model)).hex()  # of a compiled one: what was compiled


class _Digests:
    """Of anything, by value; modules have names where they are met again."""

    def __init__(self) -> None:
        self.names: dict[int, str] = {}
        self.known: dict[int, tuple[Any, bytes]] = {}  # by identity, with the object, which so stays alive
        self.inside: list[int] = []

    def of_network(self, model: nn.Module) -> bytes:
        number, modules = len(self.names), list(model.named_modules(remove_duplicate=False))
        for name, module in modules:
            self.names.setdefault(id(module), f"{number} {name}")
        kept = model.state_dict()
        beside = {name: buffer for name, buffer in model.named_buffers() if name not in kept}  # persistent=False
        of_modules = [(name, self.names[id(module)], _digest(self._of_module(module))) for name, module in modules]
        return self.of((of_modules, [*(kept | beside).items()]))

    def of(self, value: Any) -> bytes:
        if id(value) in self.known:
            return self.known[id(value)][1]
        if id(value) in self.inside:
            return f"around, {len(self.inside) - self.inside.index(id(value))}".encode()
        self.inside.append(id(value))
        kind = type(value)
        found = _digest([f"{kind.__module__}.{kind.__qualname__}".encode(), *self._parts(value)])
        self.inside.pop()
        self.known[id(value)] = value, found
        return found

    def _parts(self, value: Any) -> Iterator[bytes]:
        if value is None or isinstance(value, Enum):
            yield b"" if value is None else value.name.encode()
        elif isinstance(value, Tensor):
            yield f"{value.dtype} {tuple(value.shape)}".encode()
            yield b"" if value.is_meta else _bytes_of(value)
        elif isinstance(value, np.ndarray):
            yield f"{value.dtype.str} {value.shape}".encode()
            yield self.of(value.tolist()) if value.dtype.hasobject else value.tobytes()
        elif isinstance(value, bytearray | memoryview):
            yield bytes(value)
        elif isinstance(value, _PLAIN):
            yield repr(value).encode()
        elif isinstance(value, list | tuple | deque):
            yield from map(self.of, value)
        elif isinstance(value, set | frozenset):
            yield from sorted(map(self.of, value))
        elif isinstance(value, Mapping):
            yield from map(self.of, value.items())
        elif isinstance(value, nn.Module):
            yield self.names[id(value)].encode() if id(value) in self.names else self.of_network(value)
        elif isinstance(value, type):
            yield from self._of_class(value)
        elif isinstance(value, ModuleType):
            yield value.__name__.encode()
        elif isinstance(value, MethodType):
            yield from map(self.of, (value.__func__, value.__self__))
        elif isinstance(value, FunctionType):
            yield from self._of_function(value)
        elif isinstance(value, CodeType):
            yield from map(self.of, (value.co_code, value.co_names, value.co_consts))
        elif isinstance(value, property):
            yield self.of(value.fget)
        elif isinstance(value, staticmethod | classmethod):
            yield self.of(value.__func__)
        elif isinstance(value, partial):
            yield from map(self.of, (value.func, value.args, value.keywords))
        else:
            name = str(getattr(value, "__qualname__", getattr(value, "__name__", "")))
            yield name.encode()
            if not type(value).__module__.startswith(_OPAQUE):
                state = [*attributes_of(value)]
                yield from map(self.of, (type(value), *(state if state or name else _pickled(value))))

    def _of_module(self, module: nn.Module) -> Iterator[bytes]:
        own = {key: value for key, value in vars(module).items() if key not in _LIVE}
        yield from map(self.of, (type(module), module.extra_repr(), own))
        for hooks in _HOOKS:
            yield self.of(list(vars(module)[hooks].values()))

    def _of_class(self, kind: type) -> Iterator[bytes]:
        for base in kind.__mro__:
            yield f"{base.__module__}.{base.__qualname__}".encode()
            if not _is_named(base):
                written = {key: value for key, value in vars(base).items() if not key.startswith("__")}
                yield from map(self.of, (written, vars(base).get("__call__")))

    def _of_function(self, function: FunctionType) -> Iterator[bytes]:
        yield function.__qualname__.encode()
        if _is_named(function):
            return
        cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
        yield from map(self.of, (function.__code__, function.__defaults__, function.__kwdefaults__, cells))
        yield from self._read(_names_in(function.__code__), function.__globals__, [])

    def _read(self, names: set[str], variables: dict[str, Any], passed: list[ModuleType]) -> Iterator[bytes]:
        """What there is of these names, which may be attributes of modules among them."""
        installed = _is_installed(variables)
        for name in sorted(names & variables.keys()):
            read = variables[name]
            if isinstance(read, ModuleType):
                yield from map(self.of, (name, read))
                if read not in passed and read.__name__.partition(".")[0] not in _NAMED:
                    yield from self._read(names, vars(read), [*passed, read])
            elif not installed or isinstance(read, Number | str | Tensor | tuple | type | FunctionType):
                yield from map(self.of, (name, read))


def _digest(parts: Iterator[bytes] | list[bytes]) -> bytes:
    content = hashlib.sha256()
    for part in parts:
        content.update(len(part).to_bytes(8, "little") + part)
    return content.digest()


def _bytes_of(value: Tensor) -> bytes:
    dense = value.detach().to_dense() if value.layout != torch.strided else value.detach()
    found: bytes = dense.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return found


def _is_named(value: Any) -> bool:
    return (value.__module__ or "").partition(".")[0] in _NAMED


def _is_installed(variables: Mapping[str, Any]) -> bool:
    """Are these a module's of an installed package? certtrain counts as one, also where it is worked on."""
    package = str(variables.get("__name__", "")).partition(".")[0]
    folders = PurePath(str(variables.get("__file__", ""))).parts
    return package == "certtrain" or "site-packages" in folders or "dist-packages" in folders


def _pickled(value: Any) -> tuple[Any, ...]:
    """Of an object whose attributes are not Python's: what it would be made of again, nothing where it cannot be."""
    try:
        reduce = copyreg.dispatch_table.get(type(value))
        found = value.__reduce_ex__(4) if reduce is None else reduce(value)
    except Exception:  # a lock, a file, a generator: of any type
        return ()
    return found if isinstance(found, tuple) else (found,)


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _names_in(code: CodeType) -> set[str]:
    """Of globals and attributes, those that functions inside of it read among them."""
    inner = [part for part in code.co_consts if isinstance(part, CodeType)]
    return set(code.co_names).union(*map(_names_in, inner))
