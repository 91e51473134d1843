"""Runs of one configuration, and of a study's: which choices it is made of, and what it is held against."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from certtrain.config import Config
from certtrain.config.loading import leaves
from certtrain.errors import UsageError, shown
from certtrain.studies.finished import FinishedRun
from certtrain.studies.grid import Grid, read_grid

PLACES = ("root", "path", "download")  # of data
MACHINE = {  # of a configuration, that do not make it another
    "seed",
    "model.path",
    *(f"{section}.{key}" for section in ("data", "replay.data") for key in PLACES),
}
START = "start_from.path"  # which may follow the seed


@dataclass(frozen=True)
class Group:
    """Runs of one configuration; choices: one for each axis of the grid that all groups are in, () without one."""

    name: str
    runs: Sequence[FinishedRun]
    choices: tuple[str, ...] = ()

    def values(self, metric: str) -> list[float]:
        """Of the runs that report it."""
        return [run.numbers[metric] for run in self.runs if metric in run.numbers]


def grouped(runs: Sequence[FinishedRun]) -> list[Group]:
    groups: list[list[FinishedRun]] = []
    alike: dict[Any, list[list[FinishedRun]]] = defaultdict(list)  # but for what they start from
    for run in runs:
        key = tuple((name, repr(value)) for name, value in _flat(run.config).items())
        group = next((group for group in alike[key] if _start([*group, run]) is not None), None)
        if group is None:
            group = []
            alike[key].append(group)
            groups.append(group)
        group.append(run)
    names = _names([group[0].folder for group in groups])
    for group in groups:
        seeds = [run.seed for run in group]
        if len(set(seeds)) < len(seeds):
            twice = [run.folder for run in group if seeds.count(run.seed) > 1]
            raise UsageError(f"{twice[0]} and {twice[1]} are the same configuration and seed: name one of them")
    return [Group(name, group) for name, group in zip(names, groups, strict=True)]


def _flat(config: Config) -> dict[str, Any]:
    """The configuration, but for where things are and for the seed."""
    values = dict(leaves(config.model_dump(mode="json")))
    return {key: value for key, value in values.items() if key not in MACHINE and key != START}


def _start(runs: Sequence[FinishedRun]) -> str | None:
    """The one path that all start from, {seed} for each one's own; "" if they start anew, None if there is no such."""
    starts = [run.config.start_from for run in runs]
    paths = [re.split(r"([0-9]+)", "" if start is None else start.path) for start in starts]
    if len({len(path) for path in paths}) > 1:
        return None
    seeds, shared = tuple(str(run.seed) for run in runs), ""
    for parts in zip(*paths, strict=True):
        if len(set(parts)) > 1 and parts != seeds:
            return None
        shared += parts[0] if len(set(parts)) == 1 else "{seed}"
    return shared


def _names(folders: Sequence[Path]) -> list[str]:
    """A short name for each: the folder's, or its parent's where it is that of a seed; where two agree, the whole."""
    short = [
        folder.resolve().parent.name if folder.name.startswith("seed-") else folder.resolve().name for folder in folders
    ]
    return [name if short.count(name) == 1 else str(folder) for name, folder in zip(short, folders, strict=True)]


def differing_settings(groups: Sequence[Group]) -> dict[str, list[Any]]:
    flat = [_flat(group.runs[0].config) for group in groups]
    if _start([run for group in groups for run in group.runs]) is None:
        flat = [values | {START: _start(group.runs) or None} for values, group in zip(flat, groups, strict=True)]
    keys = dict.fromkeys(key for values in flat for key in values)
    columns = {key: [values.get(key) for values in flat] for key in keys}
    return {key: values for key, values in columns.items() if any(value != values[0] for value in values)}


def in_a_grid(groups: Sequence[Group]) -> tuple[tuple[str, ...], list[Group]]:
    """The axes that all groups are placed on, and the groups with their choices; () and the groups where one is not."""
    grids: dict[Path, Grid | None] = {}
    axes, placed = set(), []
    for group in groups:
        folder = group.runs[0].folder.resolve()
        study, name = folder.parent.parent, folder.parent.name
        if study not in grids:
            grids[study] = read_grid(study) if folder.name.startswith("seed-") else None
        grid = grids[study]
        if grid is None or name not in grid.choices:
            return (), list(groups)
        axes.add(grid.axes)
        placed.append(replace(group, choices=grid.choices[name]))
    one_each = len({group.choices for group in placed}) == len(placed)
    return (axes.pop(), placed) if len(axes) == 1 and one_each else ((), list(groups))


def with_baselines(groups: Sequence[Group], axes: Sequence[str], baseline: str) -> list[tuple[Group, Group]]:
    """Groups, each with its baseline: the one of that name, or the one that differs by that choice alone."""
    named = {group.name: group for group in groups}
    if baseline in named:
        return [(group, named[baseline]) for group in groups if group.name != baseline]
    places = [place for place in range(len(axes)) if any(group.choices[place] == baseline for group in groups)]
    if not places:
        choices = ", ".join(dict.fromkeys(choice for group in groups for choice in group.choices))
        raise UsageError(
            f"no group is called {shown(baseline)}: there are {', '.join(named)}"
            + (f"; and it is none of the choices {choices}" if choices else "")
        )
    if len(places) > 1:
        raise UsageError(
            f"{shown(baseline)} is a choice of {' and of '.join(axes[place] for place in places)}: name a group"
        )
    (place,) = places
    by_choices = {group.choices: group for group in groups}
    partners = (
        (group, by_choices.get((*group.choices[:place], baseline, *group.choices[place + 1 :]))) for group in groups
    )
    return [(group, other) for group, other in partners if other is not None and other is not group]
