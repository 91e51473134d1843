"""Train what a plan says, as far as time allows, and fit laws to what there is."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from certtrain.runs.build import load_data
from certtrain.runs.files import SCALING, is_finished
from certtrain.runs.provenance import versions
from certtrain.runtime.files import make_folder, write_json
from certtrain.studies.design import PlannedRun
from certtrain.studies.groups import MACHINE
from certtrain.studies.progress import has_diverged
from certtrain.studies.runner import RunStates, require_fit, train_all
from certtrain.studies.scaling.contrasts import Contrast, contrasts
from certtrain.studies.scaling.cost import OperationCounter
from certtrain.studies.scaling.design import TUNING, Grid, Plan, Planned
from certtrain.studies.scaling.record import record
from certtrain.studies.scaling.results import Fitted, Measured, finished_runs, fit, measured
from certtrain.studies.scaling.tuned import TunedRule, tuned_rule


@dataclass
class Scaled:
    """Where a plan stands: what became of the last runs, the cells, those that are finished, the laws of each protocol
    and how those differ."""

    outcome: RunStates
    tuning: Grid
    grid: Grid
    tried: Sequence[Measured]
    results: Sequence[Measured]
    rule: TunedRule | None
    fits: Sequence[Fitted]
    contrasts: Sequence[Contrast]
    record: dict[str, Any]


def counter_of(plan: Plan) -> OperationCounter:
    """Counts runs on the plan's data, without the images that are held out."""
    dataset = load_data(plan.config(plan.file.widths[0], plan.base.training.epochs))
    return OperationCounter(len(dataset.train), dataset.image_shape, dataset.num_classes)


def scale(
    plan: Plan,
    folder: Path,
    *,
    jobs: int = 1,
    budget: float | None = None,
    device: str = "auto",
    console: Console | None = None,
    train: bool = True,
    save: bool = True,
) -> Scaled:
    """Train the runs of a plan that are not finished, by `jobs` at a time, and write scaling.json to `folder`.

    Each cell is a folder of run directories, as a study's; a call that was ended goes on where it was. What is to be
    tuned comes first, since the grid follows from it; settings that diverge have been tried, with an error of 1.

    Args:
        budget: seconds, as of `certtrain.studies.runner.train_all`.
        train: False to fit to what is there.
        save: False to write no scaling.json.

    Raises:
        UsageError: the plan cannot be carried out, or `folder` holds other runs.
    """
    training = _Training(plan.file.seeds, jobs, None if budget is None else time.monotonic() + budget, device, console)
    count = counter_of(plan)
    plan.grid(count, None)  # what is wrong with it is said first

    tuning = plan.tuning_cells(count)
    tried = training.measured(tuning.cells, folder / TUNING, train, tries=True)
    all_tried = bool(tried) and finished_runs(tried) == len(tuning.cells) * len(plan.file.seeds)
    rule = tuned_rule(tried) if all_tried else None
    grid = plan.grid(count, rule)
    results = training.measured(grid.cells, folder, train)
    protocols = dict.fromkeys(result.cell.protocol for result in results)
    fits = [fitted for protocol in protocols for fitted in fit(plan, results, protocol)]
    differ = contrasts(results, plan.file.resamples)
    content = record(
        plan=plan,
        count=count,
        rule=rule,
        tuning=tried,
        grid=results,
        fits=fits,
        contrasts=differ,
        left_out=grid.left_out,
        versions=versions(),
    )
    if save and (results or tried):
        make_folder(folder)
        write_json(folder / SCALING, content)
    return Scaled(training.outcome, tuning, grid, tried, results, rule, fits, differ, content)


@dataclass
class _Training:
    """Trains some cells after others, as far as the time goes.

    deadline: of `time.monotonic`; outcome: what became of the last runs, with the failed ones of all.
    """

    seeds: Sequence[int]
    jobs: int
    deadline: float | None
    device: str
    console: Console | None
    outcome: RunStates = field(default_factory=RunStates)

    def measured(self, cells: Sequence[Planned], place: Path, train: bool, tries: bool = False) -> list[Measured]:
        """The cells that are finished, with `train` after they were trained; of tries also those that have diverged."""
        runs = [run for seed in self.seeds for cell in cells for run in cell.runs([seed])]
        require_fit(runs, place, free=MACHINE)
        over = all(is_finished(place / run.name) or (tries and has_diverged(place / run.name)) for run in runs)
        if train and not over and not self._has_stopped:
            self._train(runs, place, tries)
        return measured(cells, self.seeds, place, diverged=tries)

    @property
    def _has_stopped(self) -> bool:
        """Cells before these are not over, and nothing is to be begun after them."""
        return bool(self.outcome.left or self.outcome.elsewhere or self.outcome.interrupted)

    def _train(self, runs: Sequence[PlannedRun], place: Path, tries: bool) -> None:
        left = None if self.deadline is None else max(0.0, self.deadline - time.monotonic())
        outcome = train_all(runs, place, jobs=self.jobs, budget=left, device=self.device, console=self.console)
        failed = {name: why for name, why in outcome.failed.items() if not (tries and has_diverged(place / name))}
        self.outcome = replace(outcome, failed=self.outcome.failed | failed)
