"""What a search has come to: its trials, what is chosen of them, and how that is told; tuning.json."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, FiniteFloat, model_validator

from certtrain.config import Config
from certtrain.errors import NOT_OVER, CheckpointError
from certtrain.runs.files import CONFIG, SEARCH, is_finished
from certtrain.runs.records import Count, Record, checked
from certtrain.runtime.files import read_json
from certtrain.studies.compare import compare
from certtrain.studies.design import labels
from certtrain.studies.page import html
from certtrain.studies.runner import RunStates
from certtrain.studies.tables import Sheet, percentage, sheets

BASE = "base"  # the cell of the settings that were there before, among the runs that are tested


class TrialRecord(Record):
    """Of tuning.json, a `Trial`."""

    number: Count
    state: str
    settings: dict[str, Any]
    values: list[FiniteFloat] | None
    on_front: bool
    is_base: bool


class SearchRecord(Record):
    """Of tuning.json, what is read again."""

    objectives: list[Annotated[str, Field(pattern="^[a-z_]+$")]] = Field(min_length=1)
    validation: Count | FiniteFloat
    trials: list[TrialRecord]
    chosen: list[Count]
    tested: bool

    @model_validator(mode="after")
    def _is_whole(self) -> SearchRecord:
        complete = [trial for trial in self.trials if trial.state == "complete"]
        for trial in self.trials:
            if (trial.values or trial in complete) and len(trial.values or ()) != len(self.objectives):
                raise ValueError(f"trial {trial.number} has not one value for each objective")
        if self.tested and not any(trial.on_front for trial in complete):
            raise ValueError("it was tested, and no trial is complete and on the front")
        return self


@dataclass
class Trial:
    """One proposal: its settings, and what they led to on validation images; is_base: they are those of `base`."""

    number: int
    state: str  # complete, pruned, fail, running, waiting
    settings: Mapping[str, Any]
    values: Sequence[float] | None
    on_front: bool = False
    is_base: bool = False


@dataclass
class Tuned:
    """Where a search stands. final: what became of the runs that are tested, None while the search goes on."""

    folder: Path
    objectives: Sequence[str]
    validation: Any
    trials: Sequence[Trial]
    planned_trials: int
    interrupted: bool = False
    final: RunStates | None = None
    chosen: Sequence[int] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """As of `RunStates`: 75 while the search is not over."""
        if self.final is not None:
            return self.final.exit_code
        return 128 + signal.SIGINT if self.interrupted else NOT_OVER

    def sheets(self) -> list[Sheet]:
        cells = _tested_folders(self.folder, self.chosen)
        finished = any(is_finished(run) for cell in cells for run in cell.glob("seed-*"))
        return [*_search_sheets(self.summary()), *(sheets(compare(cells)) if finished else [])]

    @property
    def _tested(self) -> bool:
        return _was_tested(self.folder)

    def summary(self) -> dict[str, Any]:
        """Of tuning.json."""
        return {
            "objectives": list(self.objectives),
            "validation": self.validation,
            "trials": [vars(trial) | {"values": list(trial.values) if trial.values else None} for trial in self.trials],
            "planned_trials": self.planned_trials,
            "chosen": list(self.chosen),
            "tested": self._tested,
        }


def is_on_front(values: Sequence[float], of: Sequence[Sequence[float]]) -> bool:
    """Whether none of the others is better in one objective and no worse in any; smaller is better."""
    return not any(
        other != values and all(theirs <= own for theirs, own in zip(other, values, strict=True)) for other in of
    )


def choose(result: Tuned, most: int, config_of: Callable[[Mapping[str, Any]], Config]) -> None:
    """The best trial; of a front, `most` that are spread along it, both ends among them.

    Args:
        config_of: the configuration that settings lead to; of trials with the same one the first stands for all.

    Raises:
        CheckpointError: no trial was finished.
    """
    front = [trial for trial in result.trials if trial.on_front]
    if not front:
        raise CheckpointError(f"no trial in {result.folder} was finished: its logs say why")
    distinct: dict[str, Trial] = {}
    for trial in sorted(front, key=lambda trial: trial.number):
        distinct.setdefault(config_of(trial.settings).model_dump_json(), trial)
    ordered = sorted(distinct.values(), key=lambda trial: (list(trial.values or ()), trial.number))
    count = 1 if len(result.objectives) == 1 else min(most, len(ordered))
    places = [round(index * (len(ordered) - 1) / max(1, count - 1)) for index in range(count)]
    result.chosen = [ordered[place].number for place in dict.fromkeys(places)]


def cell_name(number: int) -> str:
    """Of a trial that was chosen, among the runs that are tested."""
    return f"trial-{number}"


def _tested_folders(folder: Path, chosen: Sequence[int]) -> list[Path]:
    """Those of base and of the trials chosen, where they are not the same; what else lies in final/ is not compared."""
    cells = [folder / "final" / name for name in (BASE, *map(cell_name, sorted(chosen)))]
    return [cell for cell in cells if any(cell.glob(f"seed-*/{CONFIG}"))]


def tested_trials(folder: Path) -> int | None:
    """After how many trials the test set was looked at; None where it was not."""
    return len(_record(folder)["trials"]) if _was_tested(folder) else None


def _was_tested(folder: Path) -> bool:
    return any(is_finished(file.parent) for file in (folder / "final").glob(f"*/seed-*/{CONFIG}"))


def _record(folder: Path) -> dict[str, Any]:
    return checked(SearchRecord, read_json(folder / SEARCH), folder / SEARCH)


def page_of(folder: Path, title: str) -> str:
    """The HTML page of a search: the front, the trials, and what was tested.

    Raises:
        CheckpointError: tuning.json is missing or corrupt, or nothing was tested yet.
    """
    record = _record(folder)
    if not record["tested"]:
        raise CheckpointError(f"the search in {folder} is not over: certtrain tune goes on")
    comparison = compare(_tested_folders(folder, record["chosen"]))
    return html(comparison, title, _search_sheets(record), [("Search, on validation images", drawn(record))])


def drawn(record: Mapping[str, Any]) -> str:
    """The trials of tuning.json: the trade-off of the first two objectives, or the course of the only one."""
    from certtrain.report import plots

    complete = [trial for trial in record["trials"] if trial["state"] == "complete"]
    names = record["objectives"]
    if len(names) == 1:
        return plots.progress_of_trials([trial["values"][0] for trial in complete], names[0])
    points = [(trial["values"][0], trial["values"][1]) for trial in complete]
    front = [point for point, trial in zip(points, complete, strict=True) if trial["on_front"]]
    base = next((point for point, trial in zip(points, complete, strict=True) if trial["is_base"]), None)
    return plots.trade_off(points, front, names, base)


def _search_sheets(record: Mapping[str, Any]) -> list[Sheet]:
    objectives = [name.replace("_", " ") for name in record["objectives"]]
    keys = list(dict.fromkeys(key for trial in record["trials"] for key in trial["settings"]))
    states = [trial["state"] for trial in record["trials"]]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    rows = [
        [_trial_label(trial), *(f"{value:.4f}" for value in trial["values"]), *(_cell(trial, key) for key in keys)]
        for trial in record["trials"]
        if trial["values"] and (trial["on_front"] or trial["is_base"])
    ]
    validation = record["validation"]
    held_out = percentage(validation) if isinstance(validation, float) else f"{validation} images"
    chosen = ", ".join(map(str, record["chosen"]))
    tested = (
        f"The test set was looked at once, afterwards, by trial {chosen} and the settings before, trained anew on all "
        "training images."
        if record["tested"]
        else "The test set has not been looked at."
    )
    note = f"By {held_out} of the training set, held out, of {len(states)} trials ({counts}). {tested}"
    title = ("Best trial" if len(objectives) == 1 else "Pareto front") + " and base, on validation images"
    return [Sheet(title, ["trial", *objectives, *labels(keys)], rows, note)]


def _trial_label(trial: Mapping[str, Any]) -> str:
    return f"{trial['number']}" + (" (base)" if trial["is_base"] else "")


def _cell(trial: Mapping[str, Any], key: str) -> str:
    value = trial["settings"].get(key)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
