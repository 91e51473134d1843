"""docs/results/training_methods.md, from what scripts/training_methods.py gathered and beside_ctrain.py measured."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

from common import ERRORS, RESULTS

from pages.common import estimate, put, read

METHODS = ("natural", "adversarial", "ibp", "crown-ibp", "sabr", "cc-ibp", "mtl-ibp", "exp-ibp", "taps", "staps")
STATISTICS = ("clean", "adversarial", "center")
Row = dict[str, Any]


def fill() -> None:
    studies, tables = read("training_methods")["studies"], {}
    for n in (2, 8):
        rows = studies[f"methods_cifar10_{n}_255"]
        tables |= {f"eps-{n}-255": methods_table(rows), f"eps-{n}-255-differences": differences_table(rows)}
    tables |= {"batch-norm": batch_norm_table(studies["batchnorm_cifar10"]), "ctrain": ctrain_table(read("ctrain"))}
    put(RESULTS / "training_methods.md", **tables)


def methods_table(rows: Sequence[Row]) -> str:
    """One radius: errors by IBP on all test images; on the first ones, after CROWN and after branch and bound."""
    lines = [
        "| method | seeds | natural | PGD | IBP | natural | PGD | IBP | CROWN | branch and bound | undecided | − ibp |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for method in METHODS:
        runs = [row for row in rows if row["name"] == method]
        cells = [estimate([run[key] for run in runs]) for key in ERRORS]
        asked = [run["searched"] for run in runs if "searched" in run]
        cells += [estimate([result[key] for result in asked]) for key in ERRORS[:2]]
        cells += [estimate([result["after"][stage] for result in asked]) for stage in ("ibp", "crown")]
        cells += [estimate([result["verified_error"] for result in asked])]
        cells += [estimate([undecided(result) for result in asked])]
        cells += ["" if method == "ibp" else paired(rows, method, "ibp", lambda row: row["searched"]["verified_error"])]
        lines.append(f"| {method} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def differences_table(rows: Sequence[Row]) -> str:
    """Of errors on all test images, from `ibp`'s, seed by seed."""
    lines = ["| method | natural − ibp | PGD − ibp | IBP − ibp |", "|---|---:|---:|---:|"]
    for method in METHODS:
        if method != "ibp":
            cells = [paired(rows, method, "ibp", itemgetter(error)) for error in ERRORS]
            lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def undecided(result: Row) -> float:
    decided = sum(result["verdicts"].get(verdict, 0) for verdict in ("proved", "attacked", "misclassified"))
    return 1 - decided / result["images"]


def batch_norm_table(rows: Sequence[Row]) -> str:
    """Verified error, and the differences from the clean batch's statistics, for each width and kind of regularizer."""
    cells = list(dict.fromkeys(row["name"].split("_", 1)[1] for row in rows))
    lines = [
        "| network | regularizers | seeds | clean | adversarial | center | adversarial − clean | center − clean |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for cell in sorted(cells):
        width, _, regularizers = cell.partition("_")
        values = [[row["verified_error"] for row in rows if row["name"] == f"{name}_{cell}"] for name in STATISTICS]
        changes = [paired(rows, f"{name}_{cell}", f"clean_{cell}", verified) for name in STATISTICS[1:]]
        seeds = len({row["seed"] for row in rows if row["name"].endswith(cell)})
        head = f"width {width[1:]} | {'yes' if regularizers == 'regularizers' else 'no'} | {seeds}"
        lines.append(f"| {head} | {' | '.join([*map(estimate, values), *changes])} |")
    for error in ("verified_error", "natural_error"):
        pooled = [estimate(by_seed(rows, name, error), signed=True) for name in STATISTICS[1:]]
        head = f"mean of all, {error.replace('_', ' ')} | | {len(complete_seeds(rows))}"
        lines.append(f"| {head} | | | | {' | '.join(pooled)} |")
    seconds = [[row["train_seconds"] for row in rows if row["name"].startswith(name)] for name in STATISTICS]
    means = [f"{statistics.fmean(values):.0f}" if values else "–" for values in seconds]
    lines.append(f"| mean of all, seconds of training | | | {' | '.join(means)} | | |")
    return "\n".join(lines)


def by_seed(rows: Sequence[Row], name: str, error: str) -> list[float]:
    """Of each seed that all runs have: the mean over the six settings of the difference from `clean`."""

    def mean(seed: int, kind: str) -> float:
        return statistics.fmean(
            row[error] for row in rows if row["seed"] == seed and row["name"].startswith(f"{kind}_")
        )

    return [mean(seed, name) - mean(seed, "clean") for seed in complete_seeds(rows)]


def complete_seeds(rows: Sequence[Row]) -> list[int]:
    cells = {row["name"].split("_", 1)[1] for row in rows}
    names = {f"{name}_{cell}" for name in STATISTICS for cell in cells}
    seeds = sorted({row["seed"] for row in rows})
    return [seed for seed in seeds if {row["name"] for row in rows if row["seed"] == seed} == names]


def verified(row: Row) -> float:
    return float(row["verified_error"])


def paired(rows: Sequence[Row], name: str, baseline: str, value: Callable[[Row], float]) -> str:
    """The mean difference, seed by seed, of the runs that have the value."""
    own, other = ({row["seed"]: row for row in rows if row["name"] == which} for which in (name, baseline))
    differences = []
    for seed in own.keys() & other.keys():
        try:
            differences.append(value(own[seed]) - value(other[seed]))
        except KeyError:  # not searched yet
            continue
    return estimate(differences, signed=True)


def ctrain_table(measured: Row) -> str:
    """Medians over epochs and seeds; the first epoch, which has the preparations in it, is left out."""
    lines = [
        "| method | engine | seeds | CPU s per epoch | CTRAIN's / certtrain's | natural | PGD | IBP | CROWN-IBP |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    rows = measured["rows"]
    for method, engine in itertools.product(dict.fromkeys(r["method"] for r in rows), ("certtrain", "CTRAIN")):
        runs = [row for row in rows if row["method"] == method]
        own = [row for row in runs if row["engine"] == engine]
        seconds = statistics.median(second for row in own for second in row["cpu_seconds"][1:])
        ratios = ratios_of(runs)
        cells = [f"{seconds:.2f}", "" if engine == "certtrain" else f"{statistics.median(ratios):.2f}"]
        keys = ("natural_error", "pgd_error", "ibp_verified_error", "verified_error")
        cells += [estimate([row[key] for row in own]) for key in keys]
        lines.append(f"| {method} | {engine} | {len(own)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def ratios_of(runs: Sequence[Row]) -> list[float]:
    """Of every epoch but the first, which the two did one after the other."""
    times = {(row["engine"], row["seed"]): row["cpu_seconds"][1:] for row in runs}
    seeds = {seed for _, seed in times}
    return [b / a for s in seeds for a, b in zip(times["certtrain", s], times["CTRAIN", s], strict=True)]
