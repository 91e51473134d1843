"""Reading a configuration: files and their bases, overrides, and one line for each thing that is wrong."""

from __future__ import annotations

import importlib.resources
import os
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cache, partial, reduce
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from certtrain.config.keys import dotted_fields, keys_called, keys_of, variants_of
from certtrain.config.problems import describe
from certtrain.config.reading import NotPlainYaml, parse_yaml, read_yaml
from certtrain.config.schema import Config, VerificationSection
from certtrain.errors import UsageError, lines_of, shortened, shown, unknown

MOST_FILES = 32  # that one configuration is read from, bases of bases among them
MOST_PARTS = 16  # of an override's key
OF_PROPERTIES = ("method", "attack", "pgd_", "apgd_", "search")  # how keys begin that say how a property is decided
STUDIES = "studies"  # the folder among the shipped configurations that holds studies

Overrides = Mapping[str, Any] | Sequence[str | Mapping[str, Any]]


def load_config(
    source: str | Path | Mapping[str, Any] | Config, overrides: Overrides = (), folder: Path | None = None
) -> Config:
    """Read and check a configuration.

    Args:
        source: a YAML file, the name of one that certtrain ships (such as "digits"), a mapping, or a Config. A file or
            mapping may name others under `base`, whose values it overrules section by section: YAML files in its
            folder (of a mapping, `folder`) or below, or shipped ones.
        overrides: values that overrule it: a mapping, of sections or of dotted keys; or a sequence of such mappings and
            of texts "section.key=value", the value written as in YAML, as on the command line. A mapping is merged
            section by section, a text replaces what stands at its key.
        folder: where a mapping stands; None: in the working directory.

    A network of one's own, `model.name` "module:callable", is looked for in the folder of the file (`model.path`),
    wherever what is returned is written and read again.

    Raises:
        UsageError: one line per thing that is wrong, each naming the key, and the file where that is a base.
    """
    if isinstance(source, Config):
        source = source.model_dump(mode="json")
    layers = (
        _with_bases(None, source, [], (), folder) if isinstance(source, Mapping) else _layers(config_path(source), [])
    )
    values = _overruled(reduce(_merged, [layer for _, layer in layers], {}), overrides)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        lines = [_origin(_place(problem["loc"])[0], values, layers) + _described(problem) for problem in error.errors()]
        raise UsageError(lines_of("\n".join(lines))) from error
    return _with_model_path(config, layers, folder)


def load_verification(overrides: Overrides) -> VerificationSection:
    """The section `verification` alone, of overrides as of `load_config`: how a property is decided.

    Raises:
        UsageError: as of `load_config`, or for a key of another section, or one that is about images.
    """
    values = _overruled({}, overrides)
    if others := [key for key in values if key != "verification"]:
        raise UsageError(f"{shortened(others[0])}: only the section verification means anything here")
    try:
        section = VerificationSection.model_validate(values.get("verification", {}))
    except ValidationError as error:
        problems = [{**problem, "loc": ("verification", *problem["loc"])} for problem in error.errors()]
        raise UsageError(lines_of("\n".join(map(_described, problems)))) from error
    if unused := [key for key in section.model_fields_set if not key.startswith(OF_PROPERTIES)]:
        raise UsageError(f"verification.{min(unused)}: a property is decided without it")
    return section


def _overruled(values: dict[str, Any], overrides: Overrides) -> dict[str, Any]:
    for override in [overrides] if isinstance(overrides, Mapping) else overrides:
        values = _merged(values, _nested(override)) if isinstance(override, Mapping) else _changed(values, override)
    return values


def _with_model_path(config: Config, layers: Sequence[Layer], folder: Path | None) -> Config:
    """A network of one's own lies beside the file that names it, or where that is an override, beside the config."""
    if ":" not in config.model.name or config.model.path is not None:
        return config
    named_in = [file for file, values in layers if _at(("model", "name"), values) == config.model.name]
    file = named_in[-1] if named_in else layers[-1][0]
    place = (folder or Path()) if file is None else file.parent
    return config.model_copy(update={"model": config.model.model_copy(update={"path": str(place)})})


def override_keys(overrides: Overrides) -> list[str]:
    """The dotted keys that `overrides` name."""
    keys: list[str] = []
    for override in [overrides] if isinstance(overrides, Mapping) else overrides:
        keys += (
            [key for key, _ in leaves(override)]
            if isinstance(override, Mapping)
            else [override.partition("=")[0].strip()]
        )
    return keys


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted keys of nested mappings, and what they say."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


@cache
def shipped_configs() -> Mapping[str, Path]:
    """Name -> file of every configuration that certtrain ships, parts that are no whole run among them."""
    folder = Path(str(importlib.resources.files("certtrain.configs")))
    files = sorted(folder.rglob("*.yaml"), key=lambda file: (len(file.parts), file))
    return MappingProxyType({file.stem: file for file in files if file.parent.name != STUDIES})


def shipped_studies() -> dict[str, Path]:
    """Name -> file of every study that certtrain ships."""
    folder = Path(str(importlib.resources.files("certtrain.configs"))) / STUDIES
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def runnable_configs() -> list[str]:
    """The names of the shipped configurations that are a whole run."""
    return [name for name, file in shipped_configs().items() if file.parent.name != "parts"]


def config_path(name: str | Path) -> Path:
    """The file `name`, or else the configuration of that name that certtrain ships."""
    return Path(name) if os.path.isfile(name) else _shipped(Path(name))  # false too of a name that no file can have


def is_config(name: str | Path) -> bool:
    """Whether `config_path` knows it."""
    try:
        config_path(name)
    except UsageError:
        return False
    return True


def _place_of(file: Path) -> Path:
    """Where a shipped configuration is, as in certtrain's repository: configs/parts/cnn7.yaml."""
    return "configs" / file.relative_to(Path(str(importlib.resources.files("certtrain.configs"))))


def _shipped(name: Path) -> Path:
    shipped = shipped_configs()
    if name.stem in shipped and name.parent in (Path(), _place_of(shipped[name.stem]).parent):
        return shipped[name.stem]
    places = {stem: _place_of(file) for stem, file in shipped.items()}
    choices = places if name == Path(name.stem) else map(str, places.values())
    raise unknown("config file", str(name), choices, "`certtrain config` lists those that can be run")


Layer = tuple[Path | None, Mapping[str, Any]]  # values, and the file they stand in


def _layers(path: Path, read: list[Path], asked_by: tuple[Path, ...] = ()) -> list[Layer]:
    """The file, behind those it is based on: each overrules the ones before it. `read` counts them."""
    chain = (*asked_by, path)
    if path.resolve() in [file.resolve() for file in asked_by]:
        raise UsageError(f"configs are based on each other: {' → '.join(map(str, chain))}")
    read.append(path)
    if len(read) > MOST_FILES:
        raise UsageError(f"{path}: base: a configuration is read from at most {MOST_FILES} files")
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise UsageError(f"{path} holds no configuration: expected sections such as data, model, training")
    return _with_bases(path, values, read, chain)


def _with_bases(
    path: Path | None,
    values: Mapping[str, Any],
    read: list[Path],
    chain: tuple[Path, ...] = (),
    folder: Path | None = None,
) -> list[Layer]:
    where = f"{path}: " if path else ""
    bases = values.get("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(name, str) for name in bases):
        raise UsageError(f"{where}base is the name of a config file, or a list of names, not {shown(bases)}")
    layers: list[Layer] = []
    for name in bases:
        try:
            file = _base(path.parent if path else folder or Path(), Path(name))
        except UsageError as error:
            raise UsageError(f"{where}base: {error}") from error
        layers += _layers(file, read, chain)
    return [*layers, (path, {key: value for key, value in values.items() if key != "base"})]


def _base(folder: Path, name: Path) -> Path:
    """A YAML file in `folder` or below, or else a shipped one: no other file's content can end up in a message."""
    beside = folder / name
    if name.suffix in (".yaml", ".yml") and os.path.isfile(beside):
        if not beside.resolve().is_relative_to(folder.resolve()):
            raise UsageError(f"{shortened(name)} lies outside {folder.resolve()}, the folder of what is based on it")
        return beside
    return _shipped(name)


Place = tuple[Any, ...]  # the keys that lead to a value

VARIANTS: set[Place] = {  # sections whose fields depend on their name
    tuple(key.removesuffix(".name").split(".")) for key, field in dotted_fields() if variants_of(field.annotation)
}
SHORTHANDS = dict.fromkeys(VARIANTS, "name") | {("start_from",): "path"}  # sections that may be written as one text


def _merged(low: Any, high: Any, place: Place = ()) -> Any:
    """`high` over `low`: mappings key by key, anything else whole, and so a variant over another one."""
    low = _spelt_out(low, place)
    if not (isinstance(low, Mapping) and isinstance(high, Mapping)):
        return high
    if place in VARIANTS and high.get("name", low.get("name")) != low.get("name"):
        return high
    return {**low, **{key: _merged(low.get(key), value, (*place, key)) for key, value in high.items()}}


def _spelt_out(value: Any, place: Place) -> Any:
    """A bare text as the section that it stands for."""
    return {SHORTHANDS[place]: value} if place in SHORTHANDS and isinstance(value, str) else value


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping with {"a.b": c} written as {"a": {"b": c}}."""
    nested: dict[str, Any] = {}
    for key, value in values.items():
        parts = _parts(key)
        if parts is None:
            raise UsageError(f"{shown(key)} is not the key of an override: write section.key")
        nested = _merged(nested, _replaced({}, parts, value))
    return nested


def _changed(values: Mapping[str, Any], override: str) -> dict[str, Any]:
    """The values with one replaced, by a text "section.key=value"."""
    key, separator, text = override.partition("=")
    parts = _parts(key) if separator else None
    if parts is None:
        raise UsageError(f"{shown(override)} is not an override: write section.key=value")
    if not text.strip():
        raise UsageError(f"{shown(override)}: the value is missing; write null for none")
    try:
        value = parse_yaml(text)
    except NotPlainYaml as error:
        raise UsageError(f"{shown(override)}: the value is not valid YAML: {error}") from error
    return _replaced(values, parts, value)


def _replaced(values: Any, parts: Sequence[str], value: Any, place: Place = ()) -> Any:
    if not parts:
        return value
    first, *rest = parts
    place = (*place, first)
    values = values if isinstance(values, Mapping) else {}
    inner = _spelt_out(values.get(first), place) if rest else values.get(first)
    return {**values, first: _replaced(inner, rest, value, place)}


def _parts(key: Any) -> list[str] | None:
    """["a", "b"] of "a.b", or None where it is no such key."""
    parts = key.split(".", MOST_PARTS) if isinstance(key, str) else []
    return parts if all(parts) and 0 < len(parts) <= MOST_PARTS else None


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


def _described(problem: Mapping[str, Any]) -> str:
    return describe(problem, _place(problem["loc"])[0], partial(_instead, problem["loc"]))


def _instead(location: Sequence[str | int]) -> str:
    """What could be meant by an unknown key."""
    *outer, key = location
    path, section = _place(outer)
    siblings = variants_of(_place(outer[:-1])[1])  # where the section is one of several
    inside = {name: variants_of(kind) for name, kind in keys_of(section).items()}
    for place, variants in {
        ".".join(path): siblings,
        **{".".join([*path, name]): v for name, v in inside.items()},
    }.items():
        owners = [name for name, variant in variants.items() if key in keys_of(variant)]
        if owners:
            return f"it belongs to {place} {', '.join(owners)}"
    near = get_close_matches(shortened(key), keys_of(section), n=3, cutoff=0.5) or keys_called(str(key))
    if near:
        return f"did you mean {' or '.join(near)}?"
    where = ".".join(path) + (f" {outer[-1]}" if siblings else "")
    return f"{where or 'a config'} has {', '.join(keys_of(section))}"


def _place(location: Sequence[str | int]) -> tuple[list[str], Any]:
    """The keys that lead to `location`, and the type of what is there; pydantic's has a variant's name in it, too."""
    path: list[str] = []
    place: Any = Config
    for part in location:
        if part in variants_of(place):
            place = variants_of(place)[part]
        else:
            path.append(str(part))
            place = keys_of(place).get(str(part))
    return path, place
