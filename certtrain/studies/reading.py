"""Study files: YAML, read and checked without torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

from pydantic import Discriminator, Tag, ValidationError

from certtrain.config.loading import shipped_studies
from certtrain.config.problems import describe
from certtrain.config.reading import read_yaml
from certtrain.config.section import Section
from certtrain.errors import UsageError, lines_of, shortened, shown, unknown

S = TypeVar("S", bound=Section)


def study_path(name: str | Path) -> Path:
    """The file `name`, or else the study of that name that certtrain ships."""
    if os.path.isfile(name):
        return Path(name)
    shipped = shipped_studies()
    if str(name) not in shipped:
        raise unknown("study file", str(name), shipped, f"there is no such file; shipped are {', '.join(shipped)}")
    return shipped[str(name)]


def read_section(kind: type[S], path: Path) -> S:
    """The content of a YAML file as a section.

    Raises:
        UsageError: one line per thing that is wrong, each naming the file and the key.
    """
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise UsageError(f"{path}: expected keys such as {', '.join(kind.model_fields)}, not {shown(values)}")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        lines = (f"{path}: {_described(problem, kind)}" for problem in error.errors())
        raise UsageError(lines_of("\n".join(lines))) from error


def list_or_mapping(of_list: Any, of_mapping: Any) -> Any:
    """The type of a value that is read as `of_mapping` where it is a mapping, and as `of_list` otherwise."""
    kinds = Annotated[of_list, Tag(_TAGS[0])] | Annotated[of_mapping, Tag(_TAGS[1])]
    return Annotated[kinds, Discriminator(lambda value: _TAGS[isinstance(value, Mapping | Section)])]


_TAGS = ("as a list", "as a mapping")  # no keys of a file


def _described(problem: Any, kind: type[Section]) -> str:
    keys = [str(part) for part in problem["loc"] if part not in _TAGS]
    return describe(problem, keys, lambda: _instead(keys, kind))


def _instead(keys: Sequence[str], kind: type[Section]) -> str:
    """What could be meant by an unknown key."""
    known = _section_at(kind, keys[:-1]).model_fields
    near = get_close_matches(shortened(keys[-1]), known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"


def _section_at(kind: type[Section], location: Sequence[str]) -> type[Section]:
    """The innermost section on the way to `location`."""
    for key in location:
        field = kind.model_fields.get(key)
        kind = next(_sections(field.annotation), kind) if field else kind
    return kind


def _sections(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for part in get_args(annotation):
        yield from _sections(part)
