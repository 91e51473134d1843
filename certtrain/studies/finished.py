"""Finished runs: what comparisons read of their folders, and whether they are about the same images."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from certtrain.config import Config
from certtrain.errors import CheckpointError, UsageError
from certtrain.report.records import Result, checked
from certtrain.runs.directory import are_of_run, results_in, stored_config
from certtrain.runs.metrics import read_records
from certtrain.runs.verdicts import LETTERS, Verdicts, read_verdicts
from certtrain.runtime.files import parse_json

SAME_RADIUS = 1e-9


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


def runs_in(folder: Path) -> list[Path]:
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


def read_finished(folder: Path, eps: float | None, method: str | None, like: FinishedRun | None = None) -> FinishedRun:
    """The run in `folder`, with its result at `eps` (None: the summary's) by `method` (None: any, the summary's first).

    Args:
        like: a run whose radius, bounds and arithmetic are asked for instead.

    Raises:
        UsageError: it has no such result.
        CheckpointError: a file is missing or corrupt.
    """
    if like is not None:
        eps, method = like.result["eps"], like.result["method"]
    config = stored_config(folder)
    summary = _json(folder / "summary.json")
    results = [*_results(folder / "summary.json", summary, config)]
    for file in results_in(folder, "verify.json"):
        if are_of_run(content := _json(file), summary):
            results += _results(file, content, config)
    at = summary.get("eps") if eps is None else eps
    asked = [
        result
        for result in results
        if isinstance(at, int | float)
        and abs(result["eps"] - at) <= SAME_RADIUS
        and method in (None, result.get("method"))
        and (like is None or result.get("arithmetic") == like.result.get("arithmetic"))
    ]
    if not asked:
        there = ", ".join(sorted({f"{result['eps']:.5g} ({bounds_of(result)})" for result in results}))
        by = f" by {bounds_of(like.result)}, as {like.folder} was" if like else f" by {method}" if method else ""
        raise UsageError(
            f"{folder} was not verified at epsilon {at}{by}, but at {there}: certtrain verify {folder} --eps adds it"
        )
    result = asked[0]
    numbers = {key: float(value) for key, value in {**summary, **result}.items() if _is_number(value)}
    question = (config.verification.split, result["eps"], result["method"], result.get("arithmetic"), result["images"])
    verdicts = [
        entry
        for entry in read_verdicts(folder)
        if (entry.split, entry.eps, entry.method, entry.arithmetic, len(entry.images)) == question
        and summary.get("split_sha256") in (None, entry.sha256)
    ]
    epochs = read_records(folder / "metrics.jsonl") if (folder / "metrics.jsonl").exists() else []
    return FinishedRun(folder, config, result, numbers, verdicts[0] if verdicts else None, epochs)


def bounds_of(result: Mapping[str, Any]) -> str:
    """What verified it, in words: the method, and the arithmetic that it is sound in."""
    arithmetic = result.get("arithmetic")
    return f"{result['method']}, sound in {arithmetic}" if arithmetic else str(result["method"])


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


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def require_same_images(runs: Sequence[FinishedRun]) -> None:
    """All must have been verified on the same images; validation splits follow from the seed: those of each seed."""
    first = runs[0]
    for run in runs[1:]:
        if (problem := _difference(first, run)) is not None:
            raise UsageError(f"{first.folder} and {run.folder} cannot be compared: {problem}")
    if first.split == "validation":
        by_seed: dict[int, FinishedRun] = {}
        for run in runs:
            other = by_seed.setdefault(run.seed, run)
            if digest(run) != digest(other):
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
    if known and digest(first) != digest(second):
        return "the images, or their labels, are others"
    if not known and one.data.path != other.data.path:
        return f"images of {one.data.path}, and of {other.data.path}"
    return None


def digest(run: FinishedRun) -> str | None:
    """Of its images and labels; None without verdicts."""
    return run.verdicts.sha256 if run.verdicts else None
