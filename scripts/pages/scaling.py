"""docs/scaling.md: what `certtrain scale` wrote, and what `certtrain plan` reads out of it."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from certtrain.studies.scaling.recommend import read_record, recommend
from pages.common import DOCS, RESULTS, estimate, put, read, with_interval


def fill() -> None:
    record = read("scaling_small")
    fits = record["fits"]["corrected"]
    put(
        DOCS / "scaling.md",
        isoflop=isoflop_table(record),
        laws=laws_table(fits),
        foretold=foretold_table(fits),
        protocols=protocols_table(record),
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
    """Runs of one width, length and seed by both protocols: epochs of warmup, verified errors, their difference."""
    runs: dict[str, dict[tuple, tuple[int, float]]] = {}
    for run in record["runs"]:
        for seed, error in zip(run["seeds"], run["verified_error"], strict=True):
            cell = run["budget"], run["width"], run["epochs"], seed
            runs.setdefault(run["protocol"], {})[cell] = run["warmup_epochs"], error
    lines = ["| FLOP | width | epochs | warmup | verified | warmup | verified | difference |", "|---:|" + "---:|" * 7]
    differences = []
    for cell in sorted(runs["kaplan"].keys() & runs["corrected"].keys()):
        (long, error), (short, other) = runs["corrected"][cell], runs["kaplan"][cell]
        differences.append(other - error)
        budget, width, epochs, _ = cell
        numbers = f"{long} | {error:.1%} | {short} | {other:.1%} | {100 * differences[-1]:+.1f}"
        lines.append(f"| {budget:.2e} | {width} | {epochs} | {numbers} |")
    lines.append(f"| mean | | | | | | | {estimate(differences, signed=True)} |")
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
