"""docs/scaling.md: what `certtrain scale` wrote, and what `certtrain plan` reads out of it."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from common import DOCS, RESULTS

from certtrain.studies.scaling.recommend import recommend
from certtrain.studies.scaling.record import read_record
from pages.common import estimate, put, read, with_interval


def fill() -> None:
    record = read("scaling_small")
    fits = record["fits"]["corrected"]
    put(
        DOCS / "scaling.md",
        isoflop=isoflop_table(record),
        laws=laws_table(fits),
        foretold=foretold_table(fits),
        protocols=protocols_table(record),
        contrasts=contrasts_table(record["contrasts"]),
        plan=plan_table(RESULTS / "scaling_small.json"),
    )


def isoflop_table(record: dict[str, Any]) -> str:
    """A budget to a row, a width to a column: verified error, and the epochs that the budget pays."""
    runs = {(run["budget"], run["width"]): run for run in record["runs"] if run["protocol"] == "corrected"}
    budgets, widths = (sorted(set(values)) for values in zip(*runs, strict=True))
    lines = ["| FLOP | " + " | ".join(f"width {width}" for width in widths) + " |", "|---:|" + "---:|" * len(widths)]
    for budget in budgets:
        found = (runs.get((budget, width)) for width in widths)
        cells = [
            f"{100 * statistics.fmean(run['verified_error']):.1f} ({run['epochs']})" if run else "–" for run in found
        ]
        lines.append(f"| {budget:.2e} | {' | '.join(cells)} |")
    return "\n".join(lines)


def laws_table(fits: dict[str, Any]) -> str:
    """What each approach says, with intervals: exponents, and the optimum at the compute that was asked for."""
    fitted = {approach: each for approach, each in fits.items() if "why_not" not in each}
    asked = next(iter(fitted.values()))["forecast"]["compute"]
    lines = ["| | " + " | ".join(fitted) + " |", "|---|" + "---:|" * len(fitted)]
    names = {"width": "optimal width", "epochs": "optimal epochs", "error": "verified error"}
    for name, title in names.items():
        laws = [each[name] for each in fitted.values()]
        cells = [with_interval(law["exponent"], law["exponent_interval"], ".2f") for law in laws]
        cells = [
            f"{cell} above {law['floor']:.1%}" if "floor" in law else cell
            for cell, law in zip(cells, laws, strict=True)
        ]
        lines.append(f"| {title}: exponent | {' | '.join(cells)} |")
    for name, title in names.items():
        form = ".1%" if name == "error" else ".3g"
        there = [each["forecast"][name] for each in fitted.values()]
        cells = [with_interval(each["value"], each["interval"], form) for each in there]
        lines.append(f"| {title} at {asked:.3g} FLOP | {' | '.join(cells)} |")
    return "\n".join(lines)


def foretold_table(fits: dict[str, Any]) -> str:
    """The error of each budget's best width, as measured and as each approach foretells it from those below."""
    rows: dict[float, dict[str, Any]] = {}
    for approach, fitted in fits.items():
        for row in fitted.get("foretold", ()):
            rows.setdefault(row["budget"], {})[approach] = row["error"]
    lines = ["| FLOP | measured | " + " | ".join(fits) + " |", "|---:|---:|" + "---:|" * len(fits)]
    for budget, errors in sorted(rows.items()):
        measured = next(iter(errors.values()))["measured"]
        cells = [
            with_interval(errors[name]["value"], errors[name]["interval"], ".1%") if name in errors else "–"
            for name in fits
        ]
        lines.append(f"| {budget:.2e} | {measured:.1%} | {' | '.join(cells)} |")
    return "\n".join(lines)


def protocols_table(record: dict[str, Any]) -> str:
    """Cells of one width and length by both protocols, with the seeds of both: warmup, verified errors, differences."""
    runs: dict[str, dict[tuple[Any, ...], dict[str, Any]]] = {}
    for run in record["runs"]:
        runs.setdefault(run["protocol"], {})[run["budget"], run["width"], run["epochs"]] = run
    corrected, kaplan = runs["corrected"], runs["kaplan"]
    lines = ["| FLOP | width | epochs | seeds | warmup | verified | warmup | verified | difference |"]
    lines.append("|---:|" + "---:|" * 8)
    shorter, others = [], []
    for cell in sorted(corrected.keys() & kaplan.keys()):
        sides = corrected[cell], kaplan[cell]
        by_seed = [dict(zip(side["seeds"], side["verified_error"], strict=True)) for side in sides]
        seeds = sorted(by_seed[0].keys() & by_seed[1].keys())
        error, other = (statistics.fmean(errors[seed] for seed in seeds) for errors in by_seed)
        long, short = (side["warmup_epochs"] for side in sides)
        (shorter if short < long else others).append(other - error)
        numbers = f"{len(seeds)} | {long} | {error:.1%} | {short} | {other:.1%} | {100 * (other - error):+.1f}"
        lines.append(f"| {' | '.join([f'{cell[0]:.2e}', *map(str, cell[1:])])} | {numbers} |")
    means = {"mean": [*shorter, *others], "where Kaplan's warmup is shorter": shorter, "where it is not": others}
    lines += [f"| {name} | | | | | | | | {estimate(values, signed=True)} |" for name, values in means.items()]
    return "\n".join(lines)


def contrasts_table(contrasts: list[dict[str, Any]]) -> str:
    """Exponents by either protocol, from the cells of both, and the difference."""
    first, second = contrasts[0]["protocols"]
    lines = [f"| approach | exponent of | {first} | {second} | difference |", "|---|---|---:|---:|---:|"]
    for contrast in contrasts:
        for name, exponent in contrast["exponents"].items():
            values = " | ".join(f"{value:.2f}" for value in exponent["values"])
            difference = with_interval(exponent["difference"], exponent["interval"], "+.2f")
            lines.append(f"| {contrast['approach']} | {name} | {values} | {difference} |")
    return "\n".join(lines)


def plan_table(file: Path) -> str:
    """What `certtrain plan --approach joint` recommends, at the compute that was measured and tenfold."""
    record = read_record(file)
    lines = ["| FLOP | width | epochs | verified error |", "|---:|---:|---:|---:|"]
    for compute in (1e12, 1e13, 1e14):
        found = recommend(record, "corrected", "joint", compute, record.eps)
        width = with_interval(found.width, found.width_interval, ".0f")
        epochs = with_interval(found.epochs, found.epochs_interval, "d")
        error = with_interval(found.error, found.error_interval, ".1%")
        lines.append(f"| {compute:.0e} | {width} | {epochs} | {error} |")
    return "\n".join(lines)
