"""The commands about many runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from certtrain.cli import values
from certtrain.cli.options import Subparsers, add_command, refuse, take_study
from certtrain.errors import UsageError
from certtrain.runs.files import REPORT, SEARCH, has_traces_of_run
from certtrain.runtime.console import Output, tell
from certtrain.runtime.device import check_device_name

if TYPE_CHECKING:
    from certtrain.studies.runner import RunStates


def add_study(subparsers: Subparsers) -> None:
    command = add_command(subparsers, "study", "train a grid of configs with several seeds", study_command)
    take_study(command)
    command.add_argument(
        "--only", action="append", default=[], metavar="PATTERN", help="configurations of that name; may be repeated"
    )
    command.add_argument(
        "--slurm", type=values.positive, metavar="N", help="leave it to N jobs of the batch system Slurm, by submitit"
    )


def study_command(options: argparse.Namespace) -> int:
    from certtrain.studies.design import load_study
    from certtrain.studies.reading import study_path

    path = study_path(options.study)
    study = load_study(path, options.overrides)
    if options.only:
        study = study.only(options.only)
    check_device_name(options.device)
    folder = _folder_of_runs(options, path)

    from certtrain.studies.runner import require_fit, train_all

    require_fit(study.runs, folder)
    study.grid.write(folder)
    if options.slurm is not None:
        from certtrain.studies.slurm import submit

        jobs = submit(study, folder, options.slurm, jobs=options.jobs, budget=options.budget, device=options.device)
        print(f"submitted {', '.join(jobs)}; certtrain compare {folder} shows what is finished")
        return 0
    console = Output()
    outcome = train_all(
        study.runs, folder, jobs=options.jobs, budget=options.budget, device=options.device, console=console
    )
    _tell_outcome(console, outcome, f"certtrain study {options.study}")
    if outcome.finished:
        _show_table(console, [folder / name for name in outcome.finished])
    return outcome.exit_code


def _folder_of_runs(options: argparse.Namespace, study: Path) -> Path:
    """Where the runs of `study` go: not into a run, where `compare` and `report` would see that one alone."""
    folder = options.out or Path("runs") / study.stem
    if has_traces_of_run(folder):
        raise UsageError(f"{folder} is a run itself, and no folder for others: name another --out")
    return folder


def _show_table(console: Console, runs: Sequence[Path]) -> None:
    from certtrain.studies.compare import compare
    from certtrain.studies.tables import sheets, show

    try:
        show(console, sheets(compare(runs)))
    except UsageError as error:  # the study may well have several radii, or data sets
        tell(console, f"there is no one table of all runs: {error}")


def _tell_outcome(console: Console, outcome: RunStates, command: str) -> None:
    lines = [f"failed: {name}: {reason}" for name, reason in outcome.failed.items()]
    lines += [f"{name} is trained by another: {who}" for name, who in outcome.elsewhere.items()]
    if outcome.left:
        lines.append(f"{len(outcome.left)} runs are not finished: {command}, with the same options, goes on")
    for line in lines:
        tell(console, line)


def add_tune(subparsers: Subparsers) -> None:
    command = add_command(subparsers, "tune", "search for good settings on validation images", tune_command)
    take_study(command)


def tune_command(options: argparse.Namespace) -> int:
    from certtrain.studies.reading import study_path
    from certtrain.studies.search import load_tuning

    path = study_path(options.study)
    tuning = load_tuning(path, options.overrides)
    check_device_name(options.device)
    folder = _folder_of_runs(options, path)

    from certtrain.studies.tables import show
    from certtrain.studies.tuning import tune

    console = Output()
    result = tune(tuning, folder, jobs=options.jobs, budget=options.budget, device=options.device, console=console)
    show(console, result.sheets())
    return result.exit_code


def add_compare(subparsers: Subparsers) -> None:
    command = add_command(
        subparsers, "compare", "runs beside each other, with intervals and tests", compare_command, device=False
    )
    command.add_argument("runs", nargs="+", type=values.path, metavar="RUN", help="run directories, or folders of them")
    command.add_argument("--eps", type=values.radius, help="the radius (default: that of the first run's summary)")
    command.add_argument("--method", help="bounds of results that `verify` added, such as ibp,crown")
    command.add_argument("--metric", action="append", default=[], help="instead of the errors; may be repeated")
    baseline = "what the others are paired with: a row, or a choice of the study (default: the first row)"
    command.add_argument("--baseline", metavar="NAME", help=baseline)
    command.add_argument("--confidence", type=values.share, default=0.95, help="of intervals (default: 0.95)")
    command.add_argument(
        "--out",
        type=values.path,
        action="append",
        default=[],
        metavar="FILE",
        help="write it as .json, .md, .tex, .html or .svg (the learning curves); may be repeated",
    )


def compare_command(options: argparse.Namespace) -> int:
    from certtrain.runs.directory import check_output
    from certtrain.studies.page import check_ending

    for file in options.out:
        check_ending(file)
        check_output(file, *options.runs)

    from certtrain.errors import optional_module
    from certtrain.studies.compare import compare
    from certtrain.studies.page import write_comparison
    from certtrain.studies.tables import sheets, show

    if any(file.suffix in (".html", ".svg") for file in options.out):
        optional_module("matplotlib", "report")
    comparison = compare(
        options.runs,
        eps=options.eps,
        method=options.method,
        metrics=options.metric,
        baseline=options.baseline,
        confidence=options.confidence,
    )
    for file in options.out:  # before anything is shown: whoever reads that may leave
        write_comparison(file, comparison, " ".join(run.resolve().name for run in options.runs))
    console = Output()
    show(console, sheets(comparison))
    for file in options.out:
        tell(console, f"wrote {file}")
    return 0


# --- a page for a study -----------------------------------------------------------------------------------------------


def report_study(options: argparse.Namespace) -> int:
    """The page of a study or a tuning, without looking at single images."""
    if options.overrides:
        raise UsageError(f"{options.run} is a study: {options.overrides[0]} cannot be changed for all of its runs")
    refuse(options, f"the report of a study, {options.run}", "limit", "device", "trust_model")

    from certtrain.runs.directory import check_output
    from certtrain.runtime.files import write_text
    from certtrain.studies.compare import compare
    from certtrain.studies.page import html

    file = options.out or options.run / REPORT
    check_output(file, options.run)
    title = options.run.resolve().name
    if (options.run / SEARCH).is_file():
        from certtrain.studies.trials import page_of

        text = page_of(options.run, title)
    else:
        text = html(compare([options.run]), title)
    write_text(file, text)
    print(f"wrote {file}")
    return 0
