"""The commands about scaling laws."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from certtrain.cli import values
from certtrain.cli.options import Subparsers, add_command, take_study
from certtrain.config.radius import format_radius
from certtrain.errors import UsageError
from certtrain.runs.files import SCALING, SCALING_PLOT
from certtrain.runtime.console import Output, tell
from certtrain.runtime.device import check_device_name

if TYPE_CHECKING:
    from certtrain.studies.scaling.contrasts import Contrast
    from certtrain.studies.scaling.design import Grid
    from certtrain.studies.scaling.recommend import Recommendation
    from certtrain.studies.scaling.record import ScalingRecord
    from certtrain.studies.scaling.results import Fitted
    from certtrain.studies.scaling.run import Scaled

RUNS = Path("runs")  # where plans have their folders, unless --out says another
TRUSTED_ORDERS = 2  # of magnitude of compute, that a law should be fitted to


def add_scale(subparsers: Subparsers) -> None:
    command = add_command(subparsers, "scale", "fit a scaling law to a grid of widths and budgets", scale_command)
    take_study(command)
    without = command.add_mutually_exclusive_group()
    without.add_argument("--show", action="store_true", help="show the runs and what they cost, and train none")
    without.add_argument("--fit", action="store_true", help="fit to the runs that are finished, and train none")


def scale_command(options: argparse.Namespace) -> int:
    from certtrain.studies.reading import study_path
    from certtrain.studies.scaling.design import load_plan

    path = study_path(options.study)
    plan = load_plan(path, options.overrides)
    check_device_name(options.device)
    folder = options.out or RUNS / path.stem

    from certtrain.errors import optional_module
    from certtrain.runtime.files import write_atomically
    from certtrain.studies.scaling.plots import picture
    from certtrain.studies.scaling.run import scale

    optional_module("matplotlib", "report")  # known now rather than after a night
    console = Output()
    given = {"jobs": options.jobs, "budget": options.budget, "device": options.device}
    given |= {"train": not (options.show or options.fit), "save": not options.show}
    scaled = scale(plan, folder, console=console, **given)
    if options.show:
        _show_grid(console, "tuning", scaled.tuning)
        _show_grid(console, "grid", scaled.grid)
        if scaled.rule is None and scaled.tuning.cells:
            tell(console, "cells of tuned protocols follow when the tuning is finished")
        return 0
    _show_progress(console, scaled, len(plan.file.seeds), f"certtrain scale {options.study}")
    for fitted in scaled.fits:
        _show_fit(console, fitted, plan.file.forecast)
    for contrast in scaled.contrasts:
        _show_contrast(console, contrast)
    if scaled.fits:
        image = picture(scaled.fits, plan.file.forecast)
        write_atomically(folder / SCALING_PLOT, lambda file: file.write(image))
        tell(console, f"wrote {folder / SCALING} and {SCALING_PLOT}")
    return scaled.outcome.exit_code


def add_plan(subparsers: Subparsers) -> None:
    command = add_command(subparsers, "plan", "width, epochs, lr for a budget, by a law", plan_command, device=False)
    command.add_argument(
        "--budget",
        type=values.operations,
        required=True,
        metavar="FLOP",
        help="floating-point operations, such as 2e15",
    )
    command.add_argument("--eps", type=values.radius, help="the radius (default: that of the law)")
    command.add_argument(
        "--law",
        type=values.path,
        help=f"scaling.json, or its folder (default: the newest {RUNS}/*/{SCALING} of the radius)",
    )
    command.add_argument("--protocol", default="corrected", metavar="NAME", help="of the plan (default: corrected)")
    command.add_argument(
        "--approach", default="isoflop", metavar="NAME", help="isoflop (default) or joint: how laws are fitted"
    )


def plan_command(options: argparse.Namespace) -> int:
    file, record = _law(options)
    eps = record.eps if options.eps is None else options.eps

    from certtrain.studies.scaling.recommend import recommend

    console, plan = Output(), record.plan
    widths = f"{plan.width} {plan.widths[0]} to {plan.widths[-1]}"
    tell(console, f"by the law in {file}, of {record.base.model.name} on {record.base.data.name}, {widths}")
    _show_recommendation(console, recommend(record, options.protocol, options.approach, options.budget, eps), eps)
    return 0


def _law(options: argparse.Namespace) -> tuple[Path, ScalingRecord]:
    """The law that was named, or else the newest of the wanted radius that `scale` has written here."""
    if options.law is not None and not options.law.exists():
        raise UsageError(f"--law: there is no {options.law}: certtrain scale PLAN.yaml fits a law into its folder")
    files = [options.law] if options.law else sorted(RUNS.glob(f"*/{SCALING}"), key=_changed, reverse=True)
    if files:
        from certtrain.studies.scaling.record import read_record

        for file in files:
            record = read_record(file)
            if options.law or options.eps is None or record.is_at(options.eps):
                return file, record
    at = "" if options.eps is None else f" at {format_radius(options.eps)}"
    raise UsageError(
        f"no law{at} in {RUNS}/*/{SCALING}: certtrain scale NAME fits one, such as scaling_cifar10_8_255; "
        f"--law FILE takes any {SCALING}"
    )


def _changed(file: Path) -> float:
    return file.stat().st_mtime


def _show_grid(console: Console, title: str, grid: Grid) -> None:
    if not grid.cells:
        return
    total = sum(cell.compute for cell in grid.cells)
    table = Table(title=f"{title}: {len(grid.cells)} cells for each seed, {total:.3g} FLOP")
    table.add_column("cell")
    for column in ("width", "epochs", "warmup", "FLOP"):
        table.add_column(column, justify="right")
    for cell in grid.cells:
        epochs, warmup = cell.config.training.epochs, cell.config.epsilon.warmup_epochs
        table.add_row(cell.name, str(cell.width), str(epochs), str(warmup), f"{cell.compute:.3g}")
    console.print(table)
    for line in grid.left_out:
        tell(console, f"left out: {line}")


def _show_progress(console: Console, scaled: Scaled, seeds: int, command: str) -> None:
    from certtrain.studies.scaling.results import finished_runs

    outcome = scaled.outcome
    for name, reason in outcome.failed.items():
        tell(console, f"failed: {name}: {reason}")
    stages = {"tuning": (scaled.tried, scaled.tuning), "grid": (scaled.results, scaled.grid)}
    for name, (results, grid) in stages.items():
        tell(console, f"{name}: {finished_runs(results)} of {len(grid.cells) * seeds} runs finished")
    if outcome.left or outcome.elsewhere:
        tell(console, f"{len(outcome.left)} runs are not finished: {command}, with the same options, goes on")


def _show_fit(console: Console, fitted: Fitted, forecast: float) -> None:
    name = f"{fitted.protocol}, {fitted.approach}"
    laws, resampled = fitted.laws, fitted.resampled
    if laws is None or resampled is None:
        tell(console, f"{name}: no laws yet: {fitted.why_not}")
        return
    for line in laws.dropped:
        tell(console, f"{name}: dropped: {line}")
    table = Table(title=f"{name}: 95 % intervals of {len(resampled.laws)} of {resampled.drawn} resamples")
    for column in ("", "exponent", f"at {forecast:.3g} FLOP"):
        table.add_column(column)
    at = resampled.at(forecast)
    for quantity, exponent in laws.exponents.items():
        value = getattr(laws, quantity)(forecast)
        table.add_row(
            "verified error" if quantity == "error" else f"optimal {quantity}",
            f"{exponent:.3f} {_interval(resampled.exponents[quantity], '.3f')}",
            f"{value:.4g} {_interval(at[quantity], '.4g')}",
        )
    console.print(table)
    tell(console, f"noise {fitted.noise}")
    for each in fitted.foretold:
        error, value, interval = each.forecast("error")
        said = f"the budgets below foretell {value:.2%} {_interval(interval, '.2%')}"
        tell(console, f"{each.optimum.budget:.3g} FLOP: {said}, measured {error:.2%}")
    _tell_a_short_range(console, *laws.range)


def _show_contrast(console: Console, contrast: Contrast) -> None:
    first, second = contrast.protocols
    name = f"{second} less {first}, {contrast.approach}, {contrast.cells} cells of both"
    if contrast.why_not:
        tell(console, f"{name}: no laws yet: {contrast.why_not}")
        return
    values = [
        f"{quantity} {exponent.difference:+.3f} {_interval(exponent.interval, '+.3f')}"
        for quantity, exponent in contrast.exponents.items()
    ]
    tell(console, f"{name}, exponents: {', '.join(values)}")


def _tell_a_short_range(console: Console, low: float, high: float) -> None:
    orders = math.log10(high / low)
    if orders < TRUSTED_ORDERS:
        measured = f"{low:.3g} to {high:.3g} FLOP, {orders:.1f} orders of magnitude"
        tell(console, f"fitted to {measured}: from less than two, what lies beyond is a guess")


def _interval(interval: Sequence[float] | None, form: str) -> str:
    return "" if interval is None else f"({interval[0]:{form}} to {interval[1]:{form}})"


def _show_recommendation(console: Console, found: Recommendation, eps: float) -> None:
    table = Table(title=f"{found.compute:.4g} FLOP at epsilon {eps:.5f}")
    for column in ("", "recommended", "95 % interval"):
        table.add_column(column)
    config, settings = found.config, found.settings
    rows = [
        ("width", str(found.width), _interval(found.width_interval, ".0f")),
        ("epochs", str(found.epochs), _interval(found.epochs_interval, "d")),
        ("warmup of epsilon, epochs", str(config.epsilon.warmup_epochs), ""),
        ("learning rate", f"{settings.lr:g}", ""),
        ("batch size", str(settings.batch_size), ""),
        ("beta2", f"{settings.beta2:g}", ""),
        ("verified error", f"{found.error:.2%}", _interval(found.error_interval, ".2%")),
    ]
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if found.doublings_beyond > 0:
        low, high = found.range
        beyond = f"{found.doublings_beyond:.1f} doublings beyond what was measured"
        tell(console, f"extrapolated: {beyond}, {low:.3g} to {high:.3g} FLOP")
        _tell_a_short_range(console, low, high)
