"""Tracing a network leaves it as it was: what its forward stores on the way would be stand-ins, not tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Attributes of `model` and of all modules in it, and lists, sets and dicts in them, are put back at the end."""
    undo = [step for module in model.modules() for step in _undoing(vars(module), set())]
    try:
        yield
    finally:
        for step in undo:
            step()


def _undoing(value: Any, seen: set[int]) -> Iterator[Callable[[], None]]:
    """What gives a container, and those in it, the content of now again."""
    if not isinstance(value, dict | list | set | tuple) or id(value) in seen:
        return
    seen.add(id(value))
    if not isinstance(value, tuple):
        yield partial(_refill, value, value.copy())
    for item in value.values() if isinstance(value, dict) else value:
        yield from _undoing(item, seen)


def _refill(container: Any, content: Any) -> None:
    container.clear()
    (container.extend if isinstance(container, list) else container.update)(content)
