"""What a study is made of: configurations, as a list or a grid, times seeds."""

from __future__ import annotations

import fnmatch
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from certtrain.config import Config, load_config
from certtrain.config.loading import leaves, override_keys
from certtrain.config.schema import MOST_SEED, Plain, Several
from certtrain.config.section import Section
from certtrain.errors import UsageError, lines_of, shortened, shown, unknown
from certtrain.runs.files import GRID
from certtrain.studies.grid import Grid
from certtrain.studies.reading import list_or_mapping, read_section

MOST_RUNS = 10_000
CONFIGS_AXIS = "configuration"
RESERVED = {"logs", "final", "trials", GRID}  # in a study's folder, and no cell's
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=,+-]{0,119}")

Choice = dict[str, Any]  # overrides, and under `base` the configs they come after


def _several(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


def _distinct(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(seeds)) < len(seeds):
        raise ValueError("a seed is named twice")
    return seeds


Bases = Annotated[Several[str], BeforeValidator(_several)]
Seeds = Annotated[Several[Annotated[int, Field(ge=0, le=MOST_SEED)]], AfterValidator(_distinct)]


Axis: TypeAlias = list_or_mapping(list[Any], dict[str, Plain])  # type: ignore[valid-type]


class StudyFile(Section):
    """Every combination of a named configuration and a choice of each axis of the grid is trained with every seed."""

    base: Bases  # configs, as `base` of a config: beside the file or shipped
    overrides: Plain = Field(default_factory=dict)  # of every run
    configs: dict[str, Plain] = Field(default_factory=dict)  # name -> overrides; `base` among them: after the study's
    grid: dict[str, Axis] = Field(default_factory=dict)  # key -> values, or name -> choices
    seeds: Seeds = (0,)
    slurm: Plain = Field(
        default_factory=dict
    )  # of submitit's executor: timeout_min, slurm_partition, gpus_per_node, ...

    @model_validator(mode="after")
    def _not_empty(self) -> StudyFile:
        empty = [name for name, choices in self.grid.items() if not choices]
        if empty:
            raise ValueError(f"grid.{empty[0]} names no value")
        if CONFIGS_AXIS in self.grid:
            raise ValueError(f"grid.{CONFIGS_AXIS}: so the choice among configs is called: name it otherwise")
        return self


@dataclass(frozen=True)
class Cell:
    """A configuration under a name; its seed is replaced by those of the study."""

    name: str
    config: Config


@dataclass(frozen=True)
class PlannedRun:
    """A run of a study; its name is its folder below the study's."""

    name: str
    config: Config


@dataclass(frozen=True)
class Study:
    cells: tuple[Cell, ...]
    seeds: tuple[int, ...]
    slurm: Mapping[str, Any]
    grid: Grid

    @property
    def runs(self) -> list[PlannedRun]:
        """The seeds of a cell are apart, so that early on there is one of everything."""
        return [planned(cell, seed) for seed in self.seeds for cell in self.cells]

    def only(self, patterns: Sequence[str]) -> Study:
        """The configurations whose names match a pattern such as "ibp_*".

        Raises:
            UsageError: a pattern that none matches.
        """
        names = [cell.name for cell in self.cells]
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                raise unknown("configuration of the study", pattern, names)
        chosen = [cell for cell in self.cells if any(fnmatch.fnmatchcase(cell.name, pattern) for pattern in patterns)]
        return replace(self, cells=tuple(chosen))


def planned(cell: Cell, seed: int) -> PlannedRun:
    """The run of `cell` with that seed, which stands for {seed} in the path of the network that it begins with."""
    start = cell.config.start_from
    if start is not None:
        start = start.model_copy(update={"path": start.path.replace("{seed}", str(seed))})
    return PlannedRun(f"{cell.name}/seed-{seed}", cell.config.model_copy(update={"seed": seed, "start_from": start}))


def load_study(path: Path, overrides: Sequence[str] = ()) -> Study:
    """Read and check a study and each of its configurations.

    Args:
        overrides: "section.key=value", of every run, over all that the file says; none of what it varies.

    Raises:
        UsageError: one line per thing that is wrong, each naming the cell, where it is not wrong in all of them; or two
            cells are the same.
    """
    file = read_section(StudyFile, path)
    axes = _axes(file)
    _check_not_varied(overrides, axes, path)
    count = len(file.seeds)
    for choices in axes.values():
        count *= len(choices)
    if count > MOST_RUNS:
        raise UsageError(f"{path}: {count} runs, more than {MOST_RUNS}")
    cells, names, made_of = [], [], {}
    wrong: dict[str, list[str]] = {}  # line -> the cells of which it is true
    for combination in itertools.product(*axes.values()):
        parts = tuple(part for part, _ in combination)
        name = "_".join(parts) or "base"
        names.append(name)
        made_of[name] = parts
        chosen = [choice for _, choice in combination]
        try:
            cells.append(Cell(name, _config(file, path.parent, chosen, overrides)))
        except UsageError as error:
            for line in dict.fromkeys(str(error).splitlines()):
                wrong.setdefault(line, []).append(name)
    if wrong:
        everywhere = names if len(names) > 1 else None
        lines = (
            f"{path}: {'' if where == everywhere else _listed(where) + ': '}{line}" for line, where in wrong.items()
        )
        raise UsageError(lines_of("\n".join(lines)))
    _check_names(names, path)
    study = Study(tuple(cells), file.seeds, file.slurm, Grid(tuple(axes), made_of))
    _check_distinct(study.runs, path)
    return study


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _config(file: StudyFile, folder: Path, choices: Sequence[Choice], overrides: Sequence[str]) -> Config:
    bases = [*file.base, *(name for choice in choices for name in _several(choice.get("base", [])))]
    changes = [{key: value for key, value in choice.items() if key != "base"} for choice in choices]
    all_overrides: list[str | Choice] = [dict(file.overrides), *changes, *overrides]
    if "seed" in override_keys(all_overrides):
        raise UsageError("seed: a study's seeds stand under seeds, as in seeds: [0, 1], and nowhere else")
    return load_config({"base": bases}, all_overrides, folder)


def _axes(file: StudyFile) -> dict[str, list[tuple[str, Choice]]]:
    """Of each axis, by what it is called, its choices with their names."""
    axes = {CONFIGS_AXIS: list(file.configs.items())} if file.configs else {}
    for key, label in zip(file.grid, labels([CONFIGS_AXIS, *file.grid])[1:], strict=True):
        choices = file.grid[key]
        if isinstance(choices, dict):
            axes[label] = list(choices.items())
        else:
            axes[label] = [(f"{label}={value_name(value)}", {key: value}) for value in choices]
    return axes


def labels(keys: Sequence[str]) -> list[str]:
    """Of each key its last part, where no other ends alike."""
    endings = [key.rpartition(".")[2] for key in keys]
    return [ending if endings.count(ending) == 1 else key for key, ending in zip(keys, endings, strict=True)]


def value_name(value: Any) -> str:
    """A value as part of a folder's name."""
    if isinstance(value, Mapping):
        parts = [str(value["name"])] if "name" in value else []
        return ",".join([*parts, *(f"{key}={value_name(inner)}" for key, inner in value.items() if key != "name")])
    if isinstance(value, list):
        return "+".join(map(value_name, value))
    text = str(value).lower() if isinstance(value, bool) or value is None else str(value)
    return re.sub(r"[^A-Za-z0-9._+-]", "-", text)


def _check_not_varied(overrides: Sequence[str], axes: Mapping[str, Sequence[tuple[str, Choice]]], path: Path) -> None:
    """A key that differs between the choices of an axis, set for all of them, would belie the names of the runs."""
    for key in override_keys(overrides):
        for axis, choices in axes.items():
            varied = [{name: value for name, value in leaves(choice) if _overlap(name, key)} for _, choice in choices]
            if any(own != varied[0] for own in varied):
                raise UsageError(f"{path}: {shortened(key)} is what {shortened(axis)} varies: set it there alone")


def _overlap(key: str, other: str) -> bool:
    """Whether one is the other, or a section that the other is in."""
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")


def _check_distinct(runs: Sequence[PlannedRun], path: Path) -> None:
    seen: dict[str, str] = {}
    for run in runs:
        other = seen.setdefault(run.config.model_dump_json(), run.name)
        if other != run.name:
            raise UsageError(
                f"{path}: {shortened(other)} and {shortened(run.name)} are the same configuration and seed: drop one"
            )


def _check_names(names: Sequence[str], path: Path) -> None:
    seen: set[str] = set()
    for name in names:
        if not _PLAIN_NAME.fullmatch(name) or name in RESERVED:
            raise UsageError(
                f"{path}: {shown(name)} cannot be a folder's name: name the choices, as in configs: {{NAME: …}}"
            )
        if name.lower() in seen:
            raise UsageError(f"{path}: two configurations are called {shortened(name)}: name the choices")
        seen.add(name.lower())


def cells_of(runs: Iterator[PlannedRun] | Sequence[PlannedRun]) -> dict[str, list[PlannedRun]]:
    """The runs of each cell, by the cell's name."""
    cells: dict[str, list[PlannedRun]] = {}
    for run in runs:
        cells.setdefault(run.name.rpartition("/")[0], []).append(run)
    return cells
