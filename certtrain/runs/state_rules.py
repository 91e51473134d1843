"""Rules for values that are read from a file: what keys, types, dtypes, shapes and ranges they must have."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Rule = Callable[[Any, str], None]  # given a value and where it stands; raises Misfit


class Misfit(Exception):
    """What is wrong, and where."""


def like(template: Any) -> Rule:
    """The same keys and types; tensors of the same dtype and shape."""
    if isinstance(template, Tensor):
        return tensor(template.dtype, template.shape)
    if isinstance(template, Mapping):
        return record({key: like(value) for key, value in template.items()})
    if isinstance(template, Sequence) and not isinstance(template, str):
        return sequence([like(value) for value in template])
    if isinstance(template, float):
        return number()
    return exactly_of_type(type(template))


def record(fields: Mapping[Any, Rule], others: Rule | None = None, absent: Mapping[Any, Rule] | None = None) -> Rule:
    """A mapping with these keys, and no others unless they have a rule; those of `absent` may be absent."""
    rules = {**fields, **(absent or {})}

    def check(value: Any, where: str) -> None:
        require(isinstance(value, dict), where, "is not a mapping", value)
        for key in fields:
            require(key in value, where, f"lacks {key}")
        for key, item in value.items():
            rule = rules.get(key, others)
            require(rule is not None, where, f"has an unknown key {key!r:.40}")
            assert rule is not None
            rule(item, f"{where}.{key}".removeprefix("."))

    return check


def sequence(rules: Sequence[Rule]) -> Rule:
    def check(value: Any, where: str) -> None:
        require(isinstance(value, list) and len(value) == len(rules), where, f"is not a list of {len(rules)}", value)
        for position, (rule, item) in enumerate(zip(rules, value, strict=True)):
            rule(item, f"{where}.{position}")

    return check


def list_of(rule: Rule) -> Rule:
    def check(value: Any, where: str) -> None:
        require(isinstance(value, list), where, "is not a list", value)
        for position, item in enumerate(value):
            rule(item, f"{where}.{position}")

    return check


def mapping_to(rule: Rule) -> Rule:
    """Any names, each with such a value."""

    def check(value: Any, where: str) -> None:
        require(isinstance(value, dict), where, "is not a mapping", value)
        for key, item in value.items():
            require(isinstance(key, str), where, f"has a key {key!r:.40}")
            rule(item, f"{where}.{key}")

    return check


def optional(rule: Rule) -> Rule:
    return lambda value, where: None if value is None else rule(value, where)


def tensor(dtype: torch.dtype | None = None, shape: Sequence[int] | None = None, dimensions: int | None = None) -> Rule:
    """Of this dtype (any floating-point one, if none is given), and this shape or number of dimensions."""

    def check(value: Any, where: str) -> None:
        require(isinstance(value, Tensor), where, "is not a tensor", value)
        right = value.is_floating_point() if dtype is None else value.dtype == dtype
        require(right, where, f"is of {value.dtype}, not {dtype or 'floating-point'}")
        right = shape is None or value.shape == torch.Size(shape)
        require(right, where, f"is of shape {tuple(value.shape)}, not {tuple(shape or ())}")
        right = dimensions is None or value.dim() == dimensions
        require(right, where, f"has {value.dim()} dimensions, not {dimensions}")

    return check


def short_text(most: int = 200) -> Rule:
    def check(value: Any, where: str) -> None:
        require(isinstance(value, str) and len(value) <= most, where, f"is not a text of at most {most} letters")

    return check


def integer(low: int, high: int | None = None) -> Rule:
    def check(value: Any, where: str) -> None:
        most = 2**63 - 1 if high is None else high
        require(
            type(value) is int and low <= value <= most, where, f"is not a whole number from {low} to {most}", value
        )

    return check


def number() -> Rule:
    """A finite one."""

    def check(value: Any, where: str) -> None:
        require(type(value) in (int, float) and math.isfinite(value), where, "is not a number", value)

    return check


def exactly_of_type(kind: type) -> Rule:
    return lambda value, where: require(type(value) is kind, where, f"is not of type {kind.__name__}", value)


def anything(value: Any, where: str) -> None:
    return None


def require(holds: bool, where: str, problem: str, value: Any = None) -> None:
    """Raises Misfit unless `holds`; `value` is shown where it is short."""
    if not holds:
        shown = "" if value is None else f" ({value!r:.40})"
        raise Misfit(f"{where or 'it'} {problem}{'' if isinstance(value, Tensor | dict | list) else shown}")
