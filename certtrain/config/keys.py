"""Which keys a configuration has, what they mean, and what they may say, as the sections declare it."""

from __future__ import annotations

from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AfterValidator
from pydantic.fields import FieldInfo

from certtrain.config.reading import write_value
from certtrain.config.schema import Config, OneOf
from certtrain.config.section import Section


def fields_of(section: type[Section]) -> dict[str, FieldInfo]:
    """The fields of a section, by their keys."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


def keys_of(place: Any) -> dict[str, Any]:
    """The keys of a section, or of one that may be missing, with their types; of anything else none."""
    sections = _sections_at(place)
    if len(sections) != 1:
        return {}
    return {key: field.annotation for key, field in fields_of(sections[0]).items()}


def variants_of(place: Any) -> dict[str, type[Section]]:
    """By name, where the fields depend on the name."""
    named = {kind.model_fields["name"].default: kind for kind in _sections_at(place) if "name" in kind.model_fields}
    return {name: kind for name, kind in named.items() if isinstance(name, str)} if len(named) > 1 else {}


def sections_of(field: FieldInfo) -> list[type[Section]]:
    """The sections that can stand at a key: one, several of which the name says which it is, or none."""
    return _sections_at(field.annotation)


def _sections_at(place: Any) -> list[type[Section]]:
    return [kind for kind in (place, *get_args(place)) if isinstance(kind, type) and issubclass(kind, Section)]


def choices_of(field: FieldInfo) -> list[str]:
    """The words that a key may have as its value, as YAML has them; none where there are too many to list."""
    return [*dict.fromkeys(_words(Annotated[field.annotation, *field.metadata, None]))]


def _words(kind: Any) -> Iterator[str]:
    """Of a type annotation."""
    if get_origin(kind) is Annotated:
        names = [rule.func.choices for rule in get_args(kind)[1:] if _is_one_of(rule)]
        yield from names[0] if names else _words(get_args(kind)[0])
    elif get_origin(kind) is Literal:
        yield from map(write_value, get_args(kind))
    elif kind is bool:
        yield from ("true", "false")
    elif variants := variants_of(kind):
        yield from variants
    elif get_origin(kind) in (Union, UnionType):
        for part in get_args(kind):
            yield from _words(part)


def _is_one_of(rule: Any) -> bool:
    return isinstance(rule, AfterValidator) and isinstance(rule.func, OneOf)


def keys_called(name: str) -> list[str]:
    """Up to three keys that an override can name, and that are called so, or end so: training.epochs for epochs."""
    return [key for key, _ in dotted_fields() if f".{key}".endswith(f".{name}")][:3]


def dotted_fields(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key that an override can name, and its field; the keys of all variants, where there are several."""
    for key, field in fields_of(section).items():
        sections = sections_of(field)
        inner = {name: value for one in sections for name, value in dotted_fields(one, f"{prefix}{key}.")}
        if len(sections) > 1:
            inner[f"{prefix}{key}.name"] = field
        if len(sections) != 1 or field.default is None:
            yield prefix + key, field
        yield from inner.items()
