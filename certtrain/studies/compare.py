"""Runs beside each other: what they reach, how far seeds scatter, and whether a difference is one.

Runs whose configurations differ in nothing but the seed are one group.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from certtrain.config import Config
from certtrain.errors import CheckpointError, UsageError, shown
from certtrain.report.records import Result, checked
from certtrain.runs.directory import leaves, stored_config
from certtrain.runs.metrics import read_records
from certtrain.runs.verdicts import LETTERS, Verdicts, read_verdicts
from certtrain.runtime.files import parse_json
from certtrain.studies.grid import Grid, read_grid
from certtrain.studies.progress import is_finished
from certtrain.studies.statistics import Interval, McNemar, image_interval, mcnemar, mean_interval

ERRORS = ("natural_error", "pgd_error", "verified_error")
METRICS = (*ERRORS, "train_seconds")  # compared where nothing else is asked for
SAME_RADIUS = 1e-9
MACHINE = (
    "seed",
    "data.root",
    "data.path",
    "data.download",
    "model.path",
)  # of a configuration, that do not make it another


@dataclass(frozen=True)
class FinishedRun:
    """What is read of a run directory: its result at the radius that is compared, and everything else it reports."""

    folder: Path
    config: Config
    result: Mapping[str, Any]
    numbers: Mapping[str, float]
    verdicts: Verdicts | None
    epochs: Sequence[Mapping[str, Any]] = field(repr=False, default=())

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def split(self) -> str:
        return self.config.verification.split

    @property
    def proved(self) -> np.ndarray:
        """(N,) bool."""
        assert self.verdicts is not None
        return np.frombuffer(self.verdicts.images.encode(), dtype=np.uint8) == ord(LETTERS["proved"])


@dataclass(frozen=True)
class Group:
    """Runs of one configuration; choices: one for each axis of the grid that all groups are in, () without one."""

    name: str
    runs: Sequence[FinishedRun]
    choices: tuple[str, ...] = ()

    def values(self, metric: str) -> list[float]:
        """Of the runs that report it."""
        return [run.numbers[metric] for run in self.runs if metric in run.numbers]


@dataclass(frozen=True)
class Spread:
    """One metric of one group."""

    values: Sequence[float]
    interval: Interval | None

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """Of the sample; None for one value."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def summary(self) -> dict[str, Any]:
        return {
            "values": list(self.values),
            "mean": self.mean,
            "deviation": self.deviation,
            "interval": None if self.interval is None else vars(self.interval),
            "min": min(self.values),
            "median": statistics.median(self.values),
            "max": max(self.values),
        }


@dataclass(frozen=True)
class Paired:
    """A group against its baseline on the same images: verified error, its own minus the baseline's.

    over_seeds: None for one common seed; over_images: None without verdicts of each image; tests: by seed.
    """

    name: str
    baseline: str
    seeds: Sequence[int]
    difference: float
    over_seeds: Interval | None
    over_images: Interval | None
    tests: Mapping[int, McNemar]

    def summary(self) -> dict[str, Any]:
        intervals = {"over_seeds": self.over_seeds, "over_images": self.over_images}
        return {
            "name": self.name,
            "baseline": self.baseline,
            "seeds": list(self.seeds),
            "difference": self.difference,
            **{key: None if interval is None else vars(interval) for key, interval in intervals.items()},
            "mcnemar": {str(seed): vars(test) for seed, test in self.tests.items()},
        }


@dataclass(frozen=True)
class Comparison:
    """Groups at one radius on the same images.

    axes: of the grid that the groups are in, () without one; baseline: a group's name, or the choice along which groups
    are paired; settings: of each key in which the groups' configurations differ, the value in each group; unfinished:
    folders of runs that have no result yet.
    """

    eps: float
    split: str
    images: int
    confidence: float
    metrics: Sequence[str]
    groups: Sequence[Group]
    axes: Sequence[str]
    baseline: str
    paired: Sequence[Paired]
    settings: Mapping[str, Sequence[Any]]
    unfinished: Sequence[str]

    def spread(self, group: Group, metric: str) -> Spread | None:
        """None where no run of the group reports the metric."""
        values = group.values(metric)
        if not values:
            return None
        interval = mean_interval(values, self.confidence)
        if interval is not None and is_error(metric):  # which lies between 0 and 1 whatever the values are
            interval = replace(interval, low=max(0.0, interval.low), high=min(1.0, interval.high))
        return Spread(values, interval)

    def summary(self) -> dict[str, Any]:
        """For a JSON file."""
        return {
            "eps": self.eps,
            "split": self.split,
            "images": self.images,
            "confidence": self.confidence,
            "axes": list(self.axes),
            "groups": [
                {
                    "name": group.name,
                    "choices": list(group.choices),
                    "seeds": [run.seed for run in group.runs],
                    "runs": [str(run.folder) for run in group.runs],
                    **{
                        metric: spread.summary()
                        for metric in self.metrics
                        if (spread := self.spread(group, metric)) is not None
                    },
                }
                for group in self.groups
            ],
            "baseline": self.baseline,
            "paired": [pair.summary() for pair in self.paired],
            "settings": {key: list(values) for key, values in self.settings.items()},
            "unfinished": list(self.unfinished),
        }


def compare(
    folders: Sequence[Path],
    *,
    eps: float | None = None,
    method: str | None = None,
    metrics: Sequence[str] = (),
    baseline: str | None = None,
    confidence: float = 0.95,
) -> Comparison:
    """Compare runs on the images that they were verified on.

    Args:
        folders: run directories, or folders of them such as studies.
        eps: the radius; None: the one that the first run's summary is about.
        method: the bounds, a cascade as "ibp,crown", of results that `verify` added; None: those of the summary first.
        metrics: of summary.json, besides the errors at `eps`; () for the errors and seconds.
        baseline: the group that the others are paired with, None for the first; or one choice of a study, such as
            "ibp" in a grid of methods and networks: each group is paired with that which differs in this choice alone.

    Raises:
        UsageError: there is no finished run; a metric that none reports; a baseline that is none of the groups, and no
            choice, or one of two axes; runs that were not verified on the same images, or at `eps`.
        CheckpointError: a file is missing or corrupt.
    """
    found = list(dict.fromkeys(run for folder in folders for run in _runs_in(folder)))
    finished = [folder for folder in found if is_finished(folder)]
    if not finished:
        raise UsageError(f"none of the {len(found)} runs is finished: there is nothing to compare")
    runs: list[FinishedRun] = []
    for folder in finished:
        runs.append(_read(folder, eps if eps is not None or not runs else runs[0].result["eps"], method))
    _require_same_images(runs)
    axes, groups = _in_a_grid(_grouped(runs))
    baseline = groups[0].name if baseline is None else baseline
    groups.sort(key=lambda group: group.name != baseline)
    pairs = _pairs(groups, axes, baseline)
    chosen_metrics = _chosen_metrics(runs, metrics)
    return Comparison(
        eps=runs[0].result["eps"],
        split=runs[0].split,
        images=runs[0].result["images"],
        confidence=confidence,
        metrics=chosen_metrics,
        groups=groups,
        axes=axes,
        baseline=baseline,
        paired=[_paired(other, group, confidence) for group, other in pairs],
        settings=_settings(groups),
        unfinished=[str(folder) for folder in found if folder not in finished],
    )


# --- reading ----------------------------------------------------------------------------------------------------------


def _runs_in(folder: Path) -> list[Path]:
    """The run directory itself, or those in it."""
    if (folder / "config.yaml").is_file():
        return [folder]
    if not folder.is_dir():
        raise UsageError(f"{folder} is no run directory, and no folder of them")
    files = [*folder.glob("*/config.yaml"), *folder.glob("*/seed-*/config.yaml")]
    if not files:
        raise UsageError(f"{folder} holds no runs: name run directories, or the folder of a study")
    return sorted({file.parent for file in files}, key=_natural_order)


def _natural_order(path: Path) -> list[tuple[int, str]]:
    """seed-2 before seed-10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", str(path))]


def _read(folder: Path, eps: float | None, method: str | None) -> FinishedRun:
    config = stored_config(folder)
    summary = _json(folder / "summary.json")
    results = [*_results(folder / "summary.json", summary, config)]
    if (folder / "verify.json").is_file():
        results += _results(folder / "verify.json", _json(folder / "verify.json"), config)
    at = summary.get("eps") if eps is None else eps
    asked = [
        result
        for result in results
        if isinstance(at, int | float)
        and abs(result["eps"] - at) <= SAME_RADIUS
        and method in (None, result.get("method"))
    ]
    if not asked:
        there = ", ".join(sorted({f"{result['eps']:.5g} ({result['method']})" for result in results}))
        wanted = f"epsilon {at}" + (f" by {method}" if method else "")
        raise UsageError(
            f"{folder} was not verified at {wanted}, but at {there}: certtrain verify {folder} --eps adds it"
        )
    result = asked[0]
    numbers = {key: float(value) for key, value in {**summary, **result}.items() if _is_number(value)}
    question = (config.verification.split, result["eps"], result["method"], result.get("arithmetic"), result["images"])
    verdicts = [
        entry
        for entry in read_verdicts(folder)
        if (entry.split, entry.eps, entry.method, entry.arithmetic, len(entry.images)) == question
    ]
    epochs = read_records(folder / "metrics.jsonl") if (folder / "metrics.jsonl").exists() else []
    return FinishedRun(folder, config, result, numbers, verdicts[0] if verdicts else None, epochs)


def _results(file: Path, content: Mapping[str, Any], config: Config) -> list[dict[str, Any]]:
    """Those about the split that the run's configuration names."""
    if content.get("split", "test") != config.verification.split:
        return []
    entries = content.get("radii")
    for entry in entries if isinstance(entries, list) else [content]:
        checked(Result, entry, file)
        if not isinstance(entry.get("method"), str):
            raise CheckpointError(f"{file} was written by another version, or edited: a result has no method")
    return entries if isinstance(entries, list) else [dict(content)]


def _json(file: Path) -> dict[str, Any]:
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("a mapping is expected")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is missing or corrupt ({error})") from error
    return content


def is_error(metric: str) -> bool:
    """Whether it is a share of images."""
    return metric.endswith("_error")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _chosen_metrics(runs: Sequence[FinishedRun], asked: Sequence[str]) -> list[str]:
    reported = dict.fromkeys(name for run in runs for name in run.numbers)
    for name in asked:
        if name not in reported:
            raise UsageError(f"no run reports {shown(name)}: they report {', '.join(reported)}")
    return list(dict.fromkeys(asked)) or [name for name in METRICS if name in reported]


# --- what is comparable -----------------------------------------------------------------------------------------------


def _require_same_images(runs: Sequence[FinishedRun]) -> None:
    """All must have been verified on the same images; validation splits follow from the seed: those of each seed."""
    first = runs[0]
    for run in runs[1:]:
        if (problem := _difference(first, run)) is not None:
            raise UsageError(f"{first.folder} and {run.folder} cannot be compared: {problem}")
    if first.split == "validation":
        by_seed: dict[int, FinishedRun] = {}
        for run in runs:
            other = by_seed.setdefault(run.seed, run)
            if _digest(run) != _digest(other):
                raise UsageError(f"{other.folder} and {run.folder} cannot be compared: other validation images")


def _difference(first: FinishedRun, second: FinishedRun) -> str | None:
    one, other = (run.config for run in (first, second))
    if one.data.name != other.data.name:
        return f"data set {one.data.name}, and {other.data.name}"
    if one.data.classes != other.data.classes:
        return "other classes of the data set"
    if first.split != second.split:
        return f"verified on the {first.split} split, and on the {second.split} split"
    if first.result["images"] != second.result["images"]:
        return f"verified on {first.result['images']} images, and on {second.result['images']}"
    known = first.split == "test" and first.verdicts and second.verdicts
    if known and _digest(first) != _digest(second):
        return "the images, or their labels, are others"
    if not known and one.data.path != other.data.path:
        return f"images of {one.data.path}, and of {other.data.path}"
    return None


def _digest(run: FinishedRun) -> str | None:
    return run.verdicts.sha256 if run.verdicts else None


# --- groups -----------------------------------------------------------------------------------------------------------


def _grouped(runs: Sequence[FinishedRun]) -> list[Group]:
    members: dict[Any, list[FinishedRun]] = {}
    for run in runs:
        key = tuple((name, repr(value)) for name, value in _flat(run.config).items())
        members.setdefault(key, []).append(run)
    names = _names([group[0].folder for group in members.values()])
    for group in members.values():
        seeds = [run.seed for run in group]
        if len(set(seeds)) < len(seeds):
            twice = [run.folder for run in group if seeds.count(run.seed) > 1]
            raise UsageError(f"{twice[0]} and {twice[1]} are the same configuration and seed: name one of them")
    return [Group(name, group) for name, group in zip(names, members.values(), strict=True)]


def _flat(config: Config) -> dict[str, Any]:
    """The configuration, but for where things are and for the seed."""
    values = dict(leaves(config.model_dump(mode="json")))
    return {key: value for key, value in values.items() if key not in MACHINE}


def _names(folders: Sequence[Path]) -> list[str]:
    """A short name for each: the folder's, or its parent's where it is that of a seed; where two agree, the whole."""
    short = [
        folder.resolve().parent.name if folder.name.startswith("seed-") else folder.resolve().name for folder in folders
    ]
    return [name if short.count(name) == 1 else str(folder) for name, folder in zip(short, folders, strict=True)]


def _settings(groups: Sequence[Group]) -> dict[str, list[Any]]:
    flat = [_flat(group.runs[0].config) for group in groups]
    keys = dict.fromkeys(key for values in flat for key in values)
    columns = {key: [values.get(key) for values in flat] for key in keys}
    return {key: values for key, values in columns.items() if any(value != values[0] for value in values)}


def _in_a_grid(groups: Sequence[Group]) -> tuple[tuple[str, ...], list[Group]]:
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


def _pairs(groups: Sequence[Group], axes: Sequence[str], baseline: str) -> list[tuple[Group, Group]]:
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


def _paired(baseline: Group, group: Group, confidence: float) -> Paired:
    own, other = ({run.seed: run for run in runs} for runs in (group.runs, baseline.runs))
    seeds = sorted(own.keys() & other.keys())
    errors = [own[seed].result["verified_error"] - other[seed].result["verified_error"] for seed in seeds]
    both = [seed for seed in seeds if own[seed].verdicts and other[seed].verdicts]
    tests = {seed: mcnemar(own[seed].proved, other[seed].proved) for seed in both}
    lost = [other[seed].proved.astype(float) - own[seed].proved for seed in both]
    digests = {_digest(own[seed]) for seed in both}
    per_image = np.mean(lost, axis=0) if len(digests) == 1 else np.concatenate(lost) if lost else None
    whole = (group.values("verified_error"), baseline.values("verified_error"))
    return Paired(
        group.name,
        baseline.name,
        seeds,
        statistics.fmean(errors) if errors else statistics.fmean(whole[0]) - statistics.fmean(whole[1]),
        mean_interval(errors, confidence),
        None if per_image is None else image_interval(per_image, confidence),
        tests,
    )
