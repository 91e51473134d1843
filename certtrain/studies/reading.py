"""Study files: YAML, read and checked without torch."""

from __future__ import annotations

import os
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from certtrain.config.loading import shipped_studies
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


def _described(problem: Any, kind: type[Section]) -> str:
    where = shortened(".".join(map(str, problem["loc"])), 120)
    if problem["type"] == "extra_forbidden":
        near = get_close_matches(where, kind.model_fields, n=1, cutoff=0.5) if len(problem["loc"]) == 1 else []
        keys = ", ".join(kind.model_fields)
        return f"unknown key {where}: " + (f"did you mean {near[0]}?" if near else f"there are {keys}")
    if problem["type"] == "missing":
        return f"{where} is missing"
    got = "" if problem["type"] == "value_error" else f" (got {shown(problem['input'])})"
    return (f"{where}: " if where else "") + problem["msg"].removeprefix("Value error, ") + got
