"""A configuration as a file to begin from: every key, with its value, what it means, and its choices."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from textwrap import wrap
from typing import Any

from pydantic import BeforeValidator
from pydantic.fields import FieldInfo

from certtrain.config.keys import choices_of, fields_of, sections_of, variants_of
from certtrain.config.radius import format_radius, parse_radius
from certtrain.config.reading import write_value
from certtrain.config.schema import Config
from certtrain.config.section import Section

WIDTH = 118
MOST_COLUMN = 40  # at which comments begin, at the latest


def commented_yaml(config: Config) -> str:
    """The whole configuration as YAML that `load_config` reads back as the same, with a comment for every key.

    Comments are the schema's own docstrings; a default is named where the value is another one.
    """
    rows = list(_rows(Config, config.model_dump(mode="json"), ""))
    column = min(MOST_COLUMN, 2 + max(len(text) for text, _ in rows))
    return "".join(_lines(text, comment, column) for text, comment in rows)


def _rows(section: type[Section], values: Mapping[str, Any], indent: str, about: str = "") -> Iterator[tuple[str, str]]:
    """Text and comment of each key, sections before what is in them.

    Args:
        about: comment of the key `name`, where the section is one of several.
    """
    for key, field in fields_of(section).items():
        value, variants = values[key], variants_of(field.annotation)
        sections = [] if value is None else [variants[value["name"]]] if variants else sections_of(field)
        for inner in sections:
            yield f"{indent}{key}:", field.description or _summary(inner)
            yield from _rows(inner, value, indent + "  ", f"{_summary(inner)} {_choices(field)}" if variants else "")
        if not sections:
            text = format_radius(value) if BeforeValidator(parse_radius) in field.metadata else write_value(value)
            yield f"{indent}{key}: {text}", about if about and key == "name" else _comment(field, value)


def _comment(field: FieldInfo, value: Any) -> str:
    parts = [field.description or "", "" if field.annotation is bool else _choices(field)]
    if not field.is_required():
        default = write_value(field.get_default(call_default_factory=True))
        parts += [f"Default: {default}."] if default != write_value(value) else []
    return " ".join(part for part in parts if part)


def _choices(field: FieldInfo) -> str:
    words = choices_of(field)
    return f"One of {', '.join(words)}." if words else ""


def _summary(section: type[Section]) -> str:
    """The first paragraph of its docstring."""
    return " ".join((inspect.getdoc(section) or "").split("\n\n")[0].split())


def _lines(text: str, comment: str, column: int) -> str:
    """The text, and the comment from `column` on, in as many lines as it takes."""
    first, *rest = [f"# {line}" for line in wrap(comment, WIDTH - column, break_on_hyphens=False)] or [""]
    if len(text) + 2 > column:
        return "".join(f"{' ' * column}{line}\n" for line in (first, *rest)) + f"{text}\n"
    return f"{text:<{column}}{first}".rstrip() + "\n" + "".join(f"{' ' * column}{line}\n" for line in rest)
