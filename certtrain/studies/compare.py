"""Runs beside each other: what they reach, how far seeds scatter, and whether a difference is one."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from certtrain.config.loading import load_verification
from certtrain.errors import UsageError, shown
from certtrain.runs.files import is_finished
from certtrain.runs.verdicts import Conditions
from certtrain.studies.finished import FinishedRun, method_in_words, read_finished, require_same_images, runs_in
from certtrain.studies.groups import Group, differing_settings, grouped, in_a_grid, with_baselines
from certtrain.studies.statistics import ConfidenceInterval, McNemar, image_interval, mcnemar, mean_interval
from certtrain.verification.cascade import check_cascade

ERRORS = ("natural_error", "pgd_error", "verified_error")
METRICS = (*ERRORS, "train_seconds")  # compared where nothing else is asked for


@dataclass(frozen=True)
class Spread:
    """One metric of one group."""

    values: Sequence[float]
    interval: ConfidenceInterval | None

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

    seeds: that both have, () where the difference is that of the means; over_seeds: None for one common seed;
    over_images: None without verdicts of each image; tests: by seed, of those that have them.
    """

    name: str
    baseline: str
    seeds: Sequence[int]
    difference: float
    over_seeds: ConfidenceInterval | None
    over_images: ConfidenceInterval | None
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
    """Groups at one radius, verified by the same bounds on the same images.

    bounds: the method, and the arithmetic that it is sound in; conditions: attacks, limits of a search, and backend
    (`conditions_of`); axes: of the grid that the groups are in, () without one; baseline: a group's name, or the choice
    along which groups are paired; settings: of each key in which the groups' configurations differ, the value in each
    group; unfinished: folders of runs that have no result yet.
    """

    eps: float
    bounds: str
    conditions: Conditions
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
        return Spread(values, interval.within(0.0, 1.0) if interval is not None and is_error(metric) else interval)

    def summary(self) -> dict[str, Any]:
        """For a JSON file."""
        return {
            "eps": self.eps,
            "bounds": self.bounds,
            "conditions": dict(self.conditions),
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
    """Compare runs on the images that they were verified on: the most that all have in common.

    Args:
        folders: run directories, or folders of them such as studies.
        eps: the radius; None: the one that the first run's summary is about.
        method: the bounds, a cascade as "ibp,crown", of results that `verify` added; None: those of the first run's
            summary.
        metrics: of summary.json, besides the errors at `eps`; () for the errors and seconds.
        baseline: the group that the others are paired with, None for the first; or one choice of a study, such as
            "ibp" in a grid of methods and networks: each group is paired with that which differs in this choice alone.

    Raises:
        UsageError: there is no finished run; bounds that `verify` does not know; a metric that none reports; a
            baseline that is none of the groups, and no choice, or one of two axes; runs that were not verified on the
            same images, at `eps`, by the same bounds in the same arithmetic, with the same attacks, search and backend.
        CheckpointError: a file is missing or corrupt.
    """
    method = None if method is None else _cascade(method)
    known = list(dict.fromkeys(run for folder in folders for run in runs_in(folder)))
    finished = [folder for folder in known if is_finished(folder)]
    if not finished:
        raise UsageError(f"none of the {len(known)} runs is finished: there is nothing to compare")
    runs = read_finished(finished, eps, method)
    require_same_images(runs)
    axes, groups = in_a_grid(grouped(runs))
    baseline = groups[0].name if baseline is None else baseline
    groups.sort(key=lambda group: group.name != baseline)
    pairs = with_baselines(groups, axes, baseline)
    chosen_metrics = _chosen_metrics(runs, metrics)
    return Comparison(
        eps=runs[0].result["eps"],
        bounds=method_in_words(runs[0].result),
        conditions=runs[0].conditions,
        split=runs[0].split,
        images=runs[0].result["images"],
        confidence=confidence,
        metrics=chosen_metrics,
        groups=groups,
        axes=axes,
        baseline=baseline,
        paired=[_paired(other, group, confidence) for group, other in pairs],
        settings=differing_settings(groups),
        unfinished=[str(folder) for folder in known if folder not in finished],
    )


def _cascade(text: str) -> str:
    """As results name it; raises UsageError for what `verify --method` does not take."""
    methods = load_verification({"verification": {"method": text}}).method
    check_cascade(methods)
    return ",".join(methods)


def _paired(baseline: Group, group: Group, confidence: float) -> Paired:
    own, other = ({run.seed: run for run in runs} for runs in (group.runs, baseline.runs))
    seeds = sorted(own.keys() & other.keys())
    errors = [own[seed].result["verified_error"] - other[seed].result["verified_error"] for seed in seeds]
    both = [seed for seed in seeds if own[seed].verdicts and other[seed].verdicts]
    tests = {seed: mcnemar(own[seed].proved, other[seed].proved) for seed in both}
    lost = [other[seed].proved.astype(float) - own[seed].proved for seed in both]
    digests = {own[seed].sha256 for seed in both}
    per_image = np.mean(lost, axis=0) if len(digests) == 1 else np.concatenate(lost) if lost else None
    whole = (group.values("verified_error"), baseline.values("verified_error"))
    over_seeds = mean_interval(errors, confidence)
    return Paired(
        group.name,
        baseline.name,
        seeds,
        statistics.fmean(errors) if errors else statistics.fmean(whole[0]) - statistics.fmean(whole[1]),
        None if over_seeds is None else over_seeds.within(-1.0, 1.0),
        None if per_image is None else image_interval(per_image, confidence),
        tests,
    )


def is_error(metric: str) -> bool:
    """Whether it is a share of images."""
    return metric.endswith("_error")


def _chosen_metrics(runs: Sequence[FinishedRun], names: Sequence[str]) -> list[str]:
    reported = dict.fromkeys(name for run in runs for name in run.numbers)
    for name in names:
        if name not in reported:
            raise UsageError(f"no run reports {shown(name)}: they report {', '.join(reported)}")
    return list(dict.fromkeys(names)) or [name for name in METRICS if name in reported]
