"""Reading a configuration: files and their bases, overrides, and one line for each thing that is wrong."""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import reduce
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from certtrain.config.schema import Config
from certtrain.config.section import Section
from certtrain.errors import UsageError, unknown


def load_config(source: str | Path | Mapping[str, Any] | Config, overrides: Sequence[str] = ()) -> Config:
    """Read and check a configuration.

    Args:
        source: a YAML file, the name of one that certtrain ships (such as "digits"), a mapping, or a Config. A file or
            mapping may name others under `base`, whose values it overrules section by section.
        overrides: "section.key=value", the value written as in YAML.

    Raises:
        UsageError: one line per thing that is wrong, each naming the key, and the file where that is a base.
    """
    if isinstance(source, Config):
        source = source.model_dump(mode="json")
    layers = _with_bases(None, source) if isinstance(source, Mapping) else _layers(config_path(source))
    values = reduce(_merged, [layer for _, layer in layers], {})
    for override in overrides:
        _apply(override, values)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        lines = [_origin(_place(problem["loc"])[0], values, layers) + _describe(problem) for problem in error.errors()]
        raise UsageError("\n".join(lines)) from error


def shipped_configs() -> dict[str, Path]:
    """Name -> file of every configuration that certtrain ships, parts that are no whole run among them."""
    folder = Path(str(importlib.resources.files("certtrain.configs")))
    files = sorted(folder.rglob("*.yaml"), key=lambda file: (len(file.parts), file))
    return {file.stem: file for file in files}


def runnable_configs() -> list[str]:
    """The names of the shipped configurations that are a whole run."""
    return [name for name, file in shipped_configs().items() if file.parent.name != "parts"]


def config_path(name: str | Path) -> Path:
    """The file `name`, or else the configuration of that name that certtrain ships."""
    return Path(name) if Path(name).is_file() else _shipped(Path(name))


def _shipped(name: Path) -> Path:
    shipped = shipped_configs()
    folder = Path(str(importlib.resources.files("certtrain.configs")))
    places = {stem: "configs" / file.relative_to(folder) for stem, file in shipped.items()}
    if name.stem in shipped and name.parent in (Path(), places[name.stem].parent):
        return shipped[name.stem]
    choices = places if name == Path(name.stem) else map(str, places.values())
    raise unknown("config file", str(name), choices, "`certtrain config` lists those that can be run")


VARIANTS = ("method", "schedule")  # sections whose fields depend on their `name`, which may stand for the whole

Layer = tuple[Path | None, Mapping[str, Any]]  # values, and the file they stand in


def _layers(path: Path, asked_by: tuple[Path, ...] = ()) -> list[Layer]:
    """The file, behind those it is based on: each overrules the ones before it."""
    chain = (*asked_by, path)
    if path.resolve() in [file.resolve() for file in asked_by]:
        raise UsageError(f"configs are based on each other: {' → '.join(map(str, chain))}")
    return _with_bases(path, _read(path), chain)


def _with_bases(path: Path | None, values: Mapping[str, Any], chain: tuple[Path, ...] = ()) -> list[Layer]:
    where = f"{path}: " if path else ""
    bases = values.get("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(name, str) for name in bases):
        raise UsageError(f"{where}base is the name of a config file, or a list of names, not {bases!r}")
    layers: list[Layer] = []
    for name in bases:
        beside = path.parent / name if path else Path(name)
        try:
            file = beside if beside.is_file() else _shipped(Path(name))
        except UsageError as error:
            raise UsageError(f"{where}base: {error}") from error
        layers += _layers(file, chain)
    return [*layers, (path, {key: value for key, value in values.items() if key != "base"})]


def _merged(low: Any, high: Any, key: str = "") -> Any:
    """`high` over `low`: mappings key by key, anything else whole, and so a variant over another one."""
    low = _named(low) if key in VARIANTS else low
    if not (isinstance(low, Mapping) and isinstance(high, Mapping)):
        return high
    if key in VARIANTS and high.get("name", low.get("name")) != low.get("name"):
        return high
    return {**low, **{key: _merged(low.get(key), value, key) for key, value in high.items()}}


def _named(value: Any) -> Any:
    """A bare name as the section that it stands for."""
    return {"name": value} if isinstance(value, str) else value


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path} holds no configuration: expected sections such as data, model, training")
    return values


def _apply(override: str, values: dict[str, Any]) -> None:
    key, separator, text = override.partition("=")
    if not separator or not all(key.split(".")):
        raise UsageError(f"{override!r} is not an override: write section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{override!r}: the value is not valid YAML") from error
    *sections, name = key.split(".")
    for section in sections:
        inner = _named(values.get(section)) if section in VARIANTS else values.get(section)
        values[section] = dict(inner) if isinstance(inner, Mapping) else {}
        values = values[section]
    values[name] = value


def _origin(location: Sequence[str | int], values: Mapping[str, Any], layers: Sequence[Layer]) -> str:
    """The base, as a prefix to a message, that a value was written in; nothing where it was written by who asked."""
    writer = next((layer for layer in reversed(layers) if _at(location, layer[1]) is not None), layers[-1])
    if writer is layers[-1] or _at(location, writer[1]) != _at(location, values):
        return ""
    return f"{writer[0]}: "


def _at(location: Sequence[str | int], values: Any) -> Any:
    """The value at `location` in nested mappings, or None; what lies inside a list stands for the list."""
    for part in location:
        if isinstance(values, Mapping):
            values = values.get(part)
    return values


def _describe(problem: Mapping[str, Any]) -> str:
    """One line for one of pydantic's findings."""
    location, _ = _place(problem["loc"])
    where = ".".join(location)
    if problem["type"] == "extra_forbidden":
        return f"unknown key {where}: {_instead(problem['loc'])}"
    if problem["type"] == "union_tag_not_found":
        return f"{where}.name is missing"
    if problem["type"] == "missing":
        return f"{where} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    shown = "" if problem["type"] == "value_error" else f" (got {problem['input']!r})"
    return (f"{where}: " if where else "") + message + shown


def _instead(location: Sequence[str | int]) -> str:
    """What could be meant by an unknown key."""
    *outer, key = location
    path, section = _place(outer)
    siblings = _variants(_place(outer[:-1])[1])  # where the section is one of several
    inside = {name: _variants(kind) for name, kind in _keys(section).items()}
    for place, variants in {
        ".".join(path): siblings,
        **{".".join([*path, name]): v for name, v in inside.items()},
    }.items():
        owners = [name for name, variant in variants.items() if key in _keys(variant)]
        if owners:
            return f"it belongs to {place} {', '.join(owners)}"
    near = get_close_matches(str(key), _keys(section), n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(near)}?"
    where = ".".join(path) + (f" {outer[-1]}" if siblings else "")
    return f"{where or 'a config'} has {', '.join(_keys(section))}"


def _place(location: Sequence[str | int]) -> tuple[list[str], Any]:
    """The keys that lead to `location`, and the type of what is there; pydantic's has a variant's name in it, too."""
    path: list[str] = []
    place: Any = Config
    for part in location:
        if part in _variants(place):
            place = _variants(place)[part]
        else:
            path.append(str(part))
            place = _keys(place).get(part)
    return path, place


def _variants(place: Any) -> dict[str, type[Section]]:
    """By name, where the fields depend on the name."""
    sections = [kind for kind in get_args(place) if isinstance(kind, type) and issubclass(kind, Section)]
    return {kind.model_fields["name"].default: kind for kind in sections if "name" in kind.model_fields}


def _keys(place: Any) -> dict[str, Any]:
    """The keys of a section, with their types; of anything else none."""
    if not (isinstance(place, type) and issubclass(place, Section)):
        return {}
    return {field.alias or name: field.annotation for name, field in place.model_fields.items()}
