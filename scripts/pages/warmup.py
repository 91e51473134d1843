"""docs/results/warmup.md, from the rows that scripts/warmup.py gathered of its studies."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import RESULTS

from pages.common import estimate, put, read

Row = Mapping[str, Any]
WARMUPS = ("short", "half", "none")  # of epsilon, in the names of the cells of warmup_optimizers
REWARMED = {  # cell of rewarm -> what it began with, and how it went on
    "scratch": ("initialization", "all epochs"),
    "natural_no-rewarm": ("natural training", "last rate, no warmup"),
    "natural_peak-half": ("natural training", "half the rate, warmup ½ epoch"),
    "natural": ("natural training", "whole rate, warmup ½ epoch"),
    "natural_long": ("natural training", "whole rate, warmup 2 epochs"),
    "eps-2_end_no-rewarm": ("2/255", "ε from its end; last rate, no warmup"),
    "eps-2_end_peak-half": ("2/255", "ε from its end; half the rate, warmup ½ epoch"),
    "eps-2_end": ("2/255", "ε from its end; whole rate, warmup ½ epoch"),
    "eps-2_end_long": ("2/255", "ε from its end; whole rate, warmup 2 epochs"),
    "eps-2_end_optimizer": ("2/255", "ε from its end; whole rate at once, optimizer's state kept"),
    "eps-2_zero": ("2/255", "ε from 0; whole rate, warmup ½ epoch"),
    "eps-2_at-once": ("2/255", "ε at once; whole rate, warmup ½ epoch"),
    "five-classes": ("five classes", "no old images"),
    "five-classes_replay-0.1": ("five classes", "a tenth old images"),
    "five-classes_replay-0.5": ("five classes", "half old images"),
}


def fill() -> None:
    optimizers = read("warmup_optimizers")
    rows = {
        name: read(name)["rows"]
        for name in ("warmup_rates", "rewarm", "speedrun_choice", "speedrun_finalists", "speedrun", "speedrun_cnn7")
    }
    plot_optimizers(optimizers["rows"], RESULTS / "warmup_optimizers.png")
    tables = {
        "optimizers": optimizers_table(optimizers["rows"]),
        "details": details_table(optimizers["rows"], optimizers["first_steps"]),
        "rates": optimizers_table(rows["warmup_rates"]),
        "rewarm": rewarm_table(rows["rewarm"]),
        "choice": recipes_table(rows["speedrun_choice"]),
        "finalists": recipes_table(rows["speedrun_finalists"]),
        "speedrun": networks_table(rows["speedrun"]),
        "speedrun-cnn7": recipes_table(rows["speedrun_cnn7"]),
    }
    put(RESULTS / "warmup.md", **tables)


def optimizers_table(rows: Sequence[Row]) -> str:
    """An optimizer a row: verified error after each warmup of epsilon, what less of it costs, and what Adam does."""
    warmups = [warmup for warmup in WARMUPS if any(row["cell"].endswith(f"_{warmup}") for row in rows)]
    against_adam = any(row["cell"] == "adam_short" for row in rows)
    head = ["optimizer", *(f"verified, {warmup}" for warmup in warmups), *(f"{w} − short" for w in warmups[1:])]
    head += ["natural: none − short"]
    head += ["short − Adam's short"] if against_adam else []
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    for optimizer in optimizers_of(rows):
        short = f"{optimizer}_short"
        cells = [optimizer, *(mean_of(rows, f"{optimizer}_{warmup}", "verified_error") for warmup in warmups)]
        cells += [difference(rows, f"{optimizer}_{warmup}", short) for warmup in warmups[1:]]
        cells += [difference(rows, f"{optimizer}_none", short, "natural_error")]
        cells += [difference(rows, short, "adam_short")] if against_adam else []
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def optimizers_of(rows: Sequence[Row]) -> list[str]:
    """Names of the cells without their warmup of epsilon."""
    return sorted({row["cell"].rpartition("_")[0] for row in rows})


def details_table(rows: Sequence[Row], steps: Mapping[str, Mapping[str, Sequence[float | None]]]) -> str:
    """A cell a row: what else the runs came to, and the optimizer's first steps."""
    lines = ["| optimizer | ε warmup | seeds | diverged | natural | PGD | dead ReLUs | variance of log rate, step 1 "
             "| 10 | 100 |", "|---|---|" + "---:|" * 8]  # fmt: skip
    for optimizer, warmup in itertools.product(optimizers_of(rows), WARMUPS):
        cell = f"{optimizer}_{warmup}"
        runs = [row for row in rows if row["cell"] == cell]
        if not runs:
            continue
        diverged = sum(run["diverged_at"] is not None for run in runs)
        errors = [mean_of(rows, cell, name) for name in ("natural_error", "pgd_error", "dead_relus")]
        variances = steps.get(cell, {}).get("adaptive_rate_log_variance", [])
        shown = [variances[at] if at < len(variances) else None for at in (0, 9, 99)]
        numbers = ["–" if value is None else f"{value:.2g}" for value in shown]
        lines.append(f"| {optimizer} | {warmup} | {len(runs)} | {diverged} | " + " | ".join([*errors, *numbers]) + " |")
    return "\n".join(lines)


def rewarm_table(rows: Sequence[Row]) -> str:
    """A way of going on a row, against training from scratch, and what it forgot of its old setting."""
    lines = ["| began with | how | seeds | natural | verified | verified − scratch | forgotten: natural | verified |",
             "|---|---|" + "---:|" * 6]  # fmt: skip
    present = {row["cell"] for row in rows}
    for cell in (cell for cell in REWARMED if cell in present):
        numbers = [mean_of(rows, cell, "natural_error"), mean_of(rows, cell, "verified_error")]
        numbers += [difference(rows, cell, "scratch")]
        numbers += [forgetting_of(rows, cell, name) for name in ("natural_error", "verified_error")]
        seeds = len(by_seed(rows, cell, "verified_error"))
        lines.append(f"| {' | '.join(REWARMED[cell])} | {seeds} | {' | '.join(numbers)} |")
    return "\n".join(lines)


RECIPES = ("| recipe | seeds | steps | natural | verified | verified − published |", "|---|" + "---:|" * 5)


def recipes_table(rows: Sequence[Row]) -> str:
    """A recipe a row, against the published one."""
    return "\n".join([*RECIPES, *recipe_lines(rows)])


def networks_table(rows: Sequence[Row]) -> str:
    """The same for several networks: a cell is called NETWORK_RECIPE."""
    lines = [f"| network {RECIPES[0]}", f"|---{RECIPES[1]}"]
    for network in dict.fromkeys(row["cell"].partition("_")[0] for row in rows):
        own = [{**row, "cell": row["cell"].removeprefix(f"{network}_")} for row in rows
               if row["cell"].startswith(f"{network}_")]  # fmt: skip
        lines += [f"| {network} {line}" for line in recipe_lines(own)]
    for recipe in sorted({row["cell"].partition("_")[2] for row in rows} - {"published"}):
        cells = " | ".join(["", "", "", "", over_networks(rows, recipe)])
        lines.append(f"| mean of all | {recipe} | {cells} |")
    return "\n".join(lines)


def over_networks(rows: Sequence[Row], recipe: str) -> str:
    """The difference of verified errors from the published recipe's, averaged over networks seed by seed."""
    networks = dict.fromkeys(row["cell"].partition("_")[0] for row in rows)
    pairs = [[by_seed(rows, f"{network}_{which}", "verified_error") for which in (recipe, "published")]
             for network in networks]  # fmt: skip
    seeds = set.intersection(*(set(errors) for pair in pairs for errors in pair))
    return estimate([statistics.fmean(one[seed] - other[seed] for one, other in pairs) for seed in seeds], signed=True)


def recipe_lines(rows: Sequence[Row]) -> list[str]:
    lines = []
    for cell in cells_of(rows, first="published"):
        runs = [row for row in rows if row["cell"] == cell]
        steps = ", ".join(map(str, sorted({run["steps"] for run in runs if "steps" in run})))
        errors = [mean_of(rows, cell, name) for name in ("natural_error", "verified_error")]
        numbers = " | ".join([*errors, difference(rows, cell, "published")])
        lines.append(f"| {cell.replace('_', ', ')} | {len(runs)} | {steps} | {numbers} |")
    return lines


def cells_of(rows: Sequence[Row], first: str | None = None) -> list[str]:
    names = dict.fromkeys(row["cell"] for row in rows)
    return sorted(names, key=lambda name: name != first)


def by_seed(rows: Sequence[Row], cell: str, name: str) -> dict[int, float]:
    return {row["seed"]: row[name] for row in rows if row["cell"] == cell and row.get(name) is not None}


def mean_of(rows: Sequence[Row], cell: str, name: str) -> str:
    return estimate(list(by_seed(rows, cell, name).values()))


def difference(rows: Sequence[Row], cell: str, baseline: str, error: str = "verified_error") -> str:
    """Over the seeds that both have: the same images of the same split."""
    one, other = (by_seed(rows, name, error) for name in (cell, baseline))
    return (
        estimate([one[seed] - other[seed] for seed in one if seed in other], signed=True) if cell != baseline else "–"
    )


def forgetting_of(rows: Sequence[Row], cell: str, name: str) -> str:
    found = [row["start"].get("forgetting", {}).get(name) for row in rows if row["cell"] == cell and "start" in row]
    return estimate([value for value in found if value is not None], signed=True)


def plot_optimizers(rows: Sequence[Row], file: Path) -> None:
    """Verified error by optimizer and warmup of epsilon: a dot for each seed, a bar at the mean."""
    import matplotlib.pyplot as plt

    optimizers = optimizers_of(rows)
    figure, panel = plt.subplots(figsize=(9, 4), layout="constrained")
    for number, warmup in enumerate(WARMUPS):
        for position, optimizer in enumerate(optimizers):
            values = [100 * value for value in by_seed(rows, f"{optimizer}_{warmup}", "verified_error").values()]
            place, label = position + 0.25 * (number - 1), f"ε warmup: {warmup}" if position == 0 else None
            panel.scatter([place] * len(values), values, color=f"C{number}", alpha=0.7, label=label)
            if values:
                panel.plot([place - 0.1, place + 0.1], [statistics.fmean(values)] * 2, color=f"C{number}")
    panel.set(xticks=range(len(optimizers)), xticklabels=optimizers, ylabel="verified error on validation images, %")
    panel.tick_params(axis="x", rotation=15)
    panel.grid(alpha=0.3)
    panel.legend()
    figure.savefig(file, dpi=110)
    plt.close(figure)
