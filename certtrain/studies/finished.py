"""Finished runs: what comparisons read of their folders, and whether they are about the same images."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from certtrain.config import Config
from certtrain.config.schema import VerificationSection
from certtrain.errors import CheckpointError, UsageError, shortened
from certtrain.runs.directory import are_of_run, results_in, stored_config
from certtrain.runs.files import CONFIG, METRICS, SUMMARY, VERIFIED, is_run
from certtrain.runs.metrics import read_records
from certtrain.runs.records import CurvePoint, Record, Result, Subject, checked, parsed
from certtrain.runs.verdicts import LETTERS, Conditions, Verdicts, conditions_of, read_verdicts
from certtrain.runtime.files import is_number, read_json
from certtrain.verification.verdicts import Verdict

SAME_RADIUS = 1e-9


@dataclass(frozen=True)
class FinishedRun:
    """What is read of a run directory: its result at the radius that is compared, and everything else it reports.

    conditions: of the result (`conditions_of`).
    verdicts: None where there are none of this very answer; sha256: of images and labels, None where nothing says;
    image_counts: on how many it was verified so, of which the result is of one; epochs: that have a verified error.
    """

    folder: Path
    config: Config
    result: Mapping[str, Any]
    conditions: Conditions
    numbers: Mapping[str, float]
    verdicts: Verdicts | None
    sha256: str | None
    image_counts: frozenset[int]
    epochs: Sequence[Mapping[str, Any]] = field(repr=False)

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
        return np.frombuffer(self.verdicts.images.encode(), dtype=np.uint8) == ord(LETTERS[Verdict.PROVED])


def runs_in(folder: Path) -> list[Path]:
    """The run directory itself, or those in it."""
    if is_run(folder):
        return [folder]
    if not folder.is_dir():
        raise UsageError(f"{folder} is no run directory, and no folder of them")
    files = [*folder.glob(f"*/{CONFIG}"), *folder.glob(f"*/seed-*/{CONFIG}")]
    if not files:
        raise UsageError(f"{folder} holds no runs: name run directories, or the folder of a study")
    return sorted({file.parent for file in files}, key=_natural_order)


def _natural_order(path: Path) -> list[tuple[int, str]]:
    """seed-2 before seed-10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", str(path))]


@dataclass(frozen=True)
class _Answer:
    """A result of a file, and under which conditions it was had (`conditions_of`).

    sha256: of images and labels, None where the file, of an earlier version, does not say.
    """

    result: Mapping[str, Any]
    conditions: Conditions
    sha256: str | None

    @property
    def images(self) -> int:
        return int(self.result["images"])


class _Asked(Record):
    """Of the configuration in a file of results."""

    verification: VerificationSection
    backend: str


@dataclass(frozen=True)
class _Stored:
    """What lies in a run directory: the answers of its summary, and those that `verify` has added, the newest first."""

    folder: Path
    config: Config
    summary: Mapping[str, Any]
    of_summary: Sequence[_Answer]
    added: Sequence[_Answer]

    @classmethod
    def read(cls, folder: Path) -> _Stored:
        config = stored_config(folder)
        summary = read_json(folder / SUMMARY, _mapping)
        added: list[_Answer] = []
        for file in results_in(folder, VERIFIED):
            if are_of_run(content := read_json(file, _mapping), summary):
                added += _answers(file, content, config)
        return cls(folder, config, summary, _answers(folder / SUMMARY, summary, config), added)

    def first(self, eps: Any, method: str | None) -> Mapping[str, Any]:
        """The first result at `eps` by `method` (None: any), the summary's before those that were added."""
        answers = _at([*self.of_summary, *self.added], eps, method)
        return answers[0].result if answers else self._refuse(eps, f" by {method}" if method else "")

    def answers(self, like: Mapping[str, Any], of: Path) -> list[_Answer]:
        """For the radius, bounds and arithmetic of the result `like` of the run `of`; the newest first."""
        answers = _at([*self.added, *self.of_summary], like["eps"], like["method"])
        answers = [answer for answer in answers if answer.result.get("arithmetic") == like.get("arithmetic")]
        return answers or self._refuse(like["eps"], f" by {method_in_words(like)}, as {of} was")

    def _refuse(self, eps: Any, by: str) -> NoReturn:
        results = [answer.result for answer in (*self.of_summary, *self.added)]
        if not results:
            split = self.config.verification.split
            raise UsageError(
                f"{self.folder} has no result on its {split} split: certtrain verify {self.folder} adds it"
            )
        there = ", ".join(sorted({f"{result['eps']:.5g} ({method_in_words(result)})" for result in results}))
        raise UsageError(
            f"{self.folder} was not verified at epsilon {eps}{by}, but at {there}: "
            f"certtrain verify {self.folder} --eps adds it"
        )

    def finished(self, answers: Sequence[_Answer], images: int) -> FinishedRun:
        """The run, with the newest of `answers`, which agree, on so many images, and the verdicts of that answer.

        Verdicts of an answer that was written elsewhere may be there alone: if they fit an older one, that is taken,
        so that numbers and verdicts are of one answer; if they fit none, there are none.
        """
        on_as_many = [answer for answer in answers if answer.images == images]
        verdicts = [entry for entry in read_verdicts(self.folder) if self._are_about(entry, on_as_many)]
        verdicts.sort(key=lambda entry: entry.conditions is None)  # those that say theirs before those that may fit
        pairs = [(answer, entry) for answer in on_as_many for entry in verdicts if _fits(entry, answer.result)]
        answer, own = pairs[0] if pairs else (on_as_many[0], None)
        return FinishedRun(
            folder=self.folder,
            config=self.config,
            result=answer.result,
            conditions=answer.conditions,
            numbers=_numbers(self.folder / SUMMARY, {**self.summary, **answer.result}),
            verdicts=own,
            sha256=answer.sha256 or next((entry.sha256 for entry in (own, *verdicts) if entry is not None), None),
            image_counts=frozenset(answer.images for answer in answers),
            epochs=_curve(self.folder / METRICS),
        )

    def _are_about(self, verdicts: Verdicts, answers: Sequence[_Answer]) -> bool:
        """Whether they answer the question of one of `answers`, which agree in their conditions."""
        results = [answer.result for answer in answers]
        questions = [
            (result["eps"], result["method"], result.get("arithmetic"), result["images"]) for result in results
        ]
        return (
            verdicts.split == self.config.verification.split
            and (verdicts.eps, verdicts.method, verdicts.arithmetic, len(verdicts.images)) in questions
            and verdicts.conditions in (None, answers[0].conditions)
            and all(answer.sha256 in (None, verdicts.sha256) for answer in answers)
        )


def _at(answers: Sequence[_Answer], eps: Any, method: str | None) -> list[_Answer]:
    if not (is_number(eps) and 0 <= eps <= 1):  # a summary may say anything
        return []
    return [
        answer
        for answer in answers
        if abs(answer.result["eps"] - eps) <= SAME_RADIUS and method in (None, answer.result["method"])
    ]


def _fits(verdicts: Verdicts, answer: Mapping[str, Any]) -> bool:
    """Whether the verdicts come to the errors of `answer`."""
    count, counts = (
        len(verdicts.images),
        {verdict: verdicts.images.count(letter) for verdict, letter in LETTERS.items()},
    )
    wrong = counts[Verdict.MISCLASSIFIED]
    expected = {
        "natural_error": wrong,
        "pgd_error": wrong + counts[Verdict.ATTACKED],
        "verified_error": count - counts[Verdict.PROVED],
    }
    return all(round(answer[error] * count) == images for error, images in expected.items())


def read_finished(folders: Sequence[Path], eps: float | None, method: str | None) -> list[FinishedRun]:
    """The runs in `folders`, each with its answer to one question, on the most images that all were verified on.

    The question is also under which conditions: those that all runs have an answer under, of several on as many images
    the newest of the first run's. Of several answers to it the newest counts. Where no number of images is common to
    all, each run has its answer on its most (`require_same_images`).

    Args:
        eps: the radius; None: that of the first summary.
        method: the bounds, and with them the arithmetic, are those of the first run's first result at `eps`, its
            summary's before others; of those by `method`, unless that is None.

    Raises:
        UsageError: a run has no such result; or there are no conditions that all have one under.
        CheckpointError: a file is missing or corrupt.
    """
    stored = [_Stored.read(folder) for folder in folders]
    like = stored[0].first(stored[0].summary.get("eps") if eps is None else eps, method)
    answers = [run.answers(like, stored[0].folder) for run in stored]
    agreed = _agreed(answers)
    if agreed is None:
        raise UsageError(_disagreement(stored, answers))
    answers = [[answer for answer in own if answer.conditions == agreed.conditions] for own in answers]
    counts = [{answer.images for answer in own} for own in answers]
    common = all(agreed.images in here for here in counts)
    return [
        run.finished(own, agreed.images if common else max(here))
        for run, own, here in zip(stored, answers, counts, strict=True)
    ]


def _agreed(answers: Sequence[Sequence[_Answer]]) -> _Answer | None:
    """Of the first run's answers, under conditions that all runs have one under, the newest on the most images that all
    have such on, or where there are none, the newest; None where there are no such conditions."""

    def shared(key: Callable[[_Answer], Any]) -> list[_Answer]:
        return [answer for answer in answers[0] if all(key(answer) in map(key, own) for own in answers)]

    on_as_many = shared(lambda answer: (answer.images, answer.conditions))
    if on_as_many:
        return max(on_as_many, key=lambda answer: answer.images)
    return next(iter(shared(lambda answer: answer.conditions)), None)


def _disagreement(stored: Sequence[_Stored], answers: Sequence[Sequence[_Answer]]) -> str:
    """In what the first two runs differ that have no conditions in common."""
    for (first, own), (second, others) in itertools.combinations(zip(stored, answers, strict=True), 2):
        if not any(answer.conditions == other.conditions for answer in own for other in others):
            here, there = own[0].conditions, others[0].conditions
            key = next(key for key in (*here, *there) if here.get(key) != there.get(key))
            settings = " and with ".join(f"{key}={conditions.get(key)}" for conditions in (here, there))
            verified = f"verified with {settings}: certtrain verify adds results with others"
            return f"{first.folder} and {second.folder} cannot be compared: {verified}"
    return "the runs share no attacks, search limits and backend that all were verified with: certtrain verify adds one"


def method_in_words(result: Mapping[str, Any]) -> str:
    """What verified it, in words: the method, and the arithmetic that it is sound in."""
    arithmetic = result.get("arithmetic")
    return f"{result['method']}, sound in {arithmetic}" if arithmetic else str(result["method"])


def _answers(file: Path, content: Mapping[str, Any], config: Config) -> list[_Answer]:
    """Those about the split that the run's configuration names."""
    if content.get("split", "test") != config.verification.split:
        return []
    entries = content.get("radii")
    results = entries if isinstance(entries, list) else [content]
    for result in results:
        checked(Result, result, file)
        if not isinstance(result.get("method"), str):
            raise CheckpointError(f"{file} was written by another version, or edited: a result has no method")
    section, backend = _asked(file, content, config)
    sha256 = parsed(Subject, content, file).split_sha256
    return [_Answer(result, conditions_of(section, backend, result["method"]), sha256) for result in results]


def _asked(file: Path, content: Mapping[str, Any], config: Config) -> tuple[VerificationSection, str]:
    """How what `file` says was verified: by its own word, of an earlier version as the run is configured."""
    if "config" not in content:
        return config.verification, config.backend
    asked = parsed(_Asked, content["config"], file)
    return asked.verification, asked.backend


def _mapping(content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ValueError("a mapping is expected")
    return content


def _numbers(file: Path, content: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of `content`, which is of `file`.

    Raises:
        CheckpointError: one is not finite, or larger than a float.
    """
    numbers = {key: value for key, value in content.items() if is_number(value)}
    for key, value in numbers.items():
        if not abs(value) <= sys.float_info.max:
            raise CheckpointError(f"{file} was written by another version, or edited: {shortened(key)} is not finite")
    return {key: float(value) for key, value in numbers.items()}


def _curve(file: Path) -> list[dict[str, Any]]:
    """The epochs of metrics.jsonl that have a verified error, and that alone."""
    records = read_records(file) if file.exists() else []
    return [checked(CurvePoint, record, file) for record in records if "verified_error" in record]


def require_same_images(runs: Sequence[FinishedRun]) -> None:
    """All must have been verified on the same images; validation splits follow from the seed: those of each seed."""
    first = runs[0]
    for run in runs[1:]:
        if (problem := _difference(first, run)) is not None:
            raise UsageError(f"{first.folder} and {run.folder} cannot be compared: {problem}")
    _require_as_many(runs)
    known: dict[int | None, FinishedRun] = {}  # the first that says so, by seed where images follow from that
    for run in (run for run in runs if run.sha256 is not None):
        other = known.setdefault(run.seed if run.split == "validation" else None, run)
        if run.sha256 != other.sha256:
            problem = (
                "other validation images" if run.split == "validation" else "the images, or their labels, are others"
            )
            raise UsageError(f"{other.folder} and {run.folder} cannot be compared: {problem}")


def _difference(first: FinishedRun, second: FinishedRun) -> str | None:
    config, other_config = (run.config for run in (first, second))
    if config.data.name != other_config.data.name:
        return f"data set {config.data.name}, and {other_config.data.name}"
    if config.data.classes != other_config.data.classes:
        return "other classes of the data set"
    if first.split != second.split:
        return f"verified on the {first.split} split, and on the {second.split} split"
    known = first.split == "test" and first.sha256 and second.sha256
    if not known and config.data.path != other_config.data.path:
        return f"images of {config.data.path}, and of {other_config.data.path}"
    return None


def _require_as_many(runs: Sequence[FinishedRun]) -> None:
    """There must be a number of images that all were verified on; two runs that have none in common are named."""
    if len({run.result["images"] for run in runs}) == 1:
        return
    for first, second in itertools.combinations(runs, 2):
        if not first.image_counts & second.image_counts:
            numbers = (" and ".join(map(str, sorted(run.image_counts))) for run in (first, second))
            where = "verified on {} images, and on {}".format(*numbers)
            raise UsageError(f"{first.folder} and {second.folder} cannot be compared: {where}")
    raise UsageError("there is no number of images that all runs were verified on: certtrain verify --limit adds one")
