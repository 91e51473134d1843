"""What the runs of a study came to, for docs/results/warmup.md: docs/results/NAME.json, and of first steps a plot.

    certtrain study warmup_optimizers --jobs 2          # trains; the same command goes on where it was
    python scripts/warmup.py runs/warmup_optimizers     # gathers what is finished, of one study or of several

With each run: its errors, whether and where it diverged, dead ReLUs, and what it forgot where it began with another
network. Of runs that wrote steps.jsonl, for each cell the mean over seeds of what the optimizer did in the first steps.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import ERRORS, RESULTS, runs_of
from matplotlib.figure import Figure
from pages.warmup import WARMUPS

from certtrain.runs.files import DIVERGED
from certtrain.runs.metrics import read_records
from certtrain.runs.provenance import versions
from certtrain.runtime.files import write_atomically, write_json

OF_STEPS = (
    "adaptive_rate_variance",
    "adaptive_rate_log_variance",
    "effective_step_size",
    "update_rms",
    "rectification",
    "dead_relus",
)
OF_RUNS = (*ERRORS, "split", "images", "steps", "train_seconds")
OF_STARTS = ("before", "along", "after", "forgetting", "learned")
BEGUN = "config.yaml"  # a file of every run that was begun


def rows_of(study: Path) -> list[dict[str, Any]]:
    """A row for each run that is finished or has diverged."""
    return [row for cell, seed, run in runs_of(study, having=BEGUN) if (row := row_of(cell, seed, run)) is not None]


def row_of(cell: str, seed: int, run: Path) -> dict[str, Any] | None:
    row: dict[str, Any] = {"cell": cell, "seed": seed, "diverged_at": None}
    if (run / "summary.json").is_file():
        summary = json.loads((run / "summary.json").read_text())
        start = summary.get("start")
        row |= {name: summary[name] for name in OF_RUNS}
        row |= {} if start is None else {"start": {name: start[name] for name in OF_STARTS if name in start}}
        layers = read_records(run / "metrics.jsonl")[-1]["layers"]
        row["dead_relus"] = statistics.fmean(layer["dead"] for layer in layers)
        return row
    if not (run / DIVERGED).is_file():
        return None
    return row | {"diverged_at": json.loads((run / DIVERGED).read_text())["eps"]}


# --- the first steps --------------------------------------------------------------------------------------------------


def first_steps_of(study: Path) -> dict[str, dict[str, list[float | None]]]:
    """By cell and quantity, a mean over seeds for each step; None where no seed has a number, as of SGD's rates."""
    records: dict[str, list[list[dict[str, Any]]]] = {}
    for cell, _, run in runs_of(study, having=BEGUN):
        if (run / "steps.jsonl").is_file():
            records.setdefault(cell, []).append(read_records(run / "steps.jsonl", "step"))
    return {
        cell: {
            name: [_mean([step[name] for step in steps]) for steps in zip(*seeds, strict=False)] for name in OF_STEPS
        }
        for cell, seeds in records.items()
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(f"{statistics.fmean(known):.4g}") if known else None


def plot(cells: Mapping[str, Mapping[str, Sequence[float | None]]]) -> bytes:
    """PNG: by quantity and warmup of epsilon (the cell's name after its last underscore), a line for each optimizer.

    A warmup that begins as another does, and differs from it only later, is not shown again.
    """
    shown = {
        "adaptive_rate_log_variance": "variance of the adaptive rate's logarithm",
        "effective_step_size": "effective step size",
        "dead_relus": "dead ReLUs",
    }
    optimizers = sorted({cell.rpartition("_")[0] for cell in cells})
    first: dict[float | None, str] = {}  # by the first step of the first optimizer
    for warmup in (warmup for warmup in WARMUPS if f"{optimizers[0]}_{warmup}" in cells):
        first.setdefault(cells[f"{optimizers[0]}_{warmup}"]["effective_step_size"][0], warmup)
    warmups = list(first.values())
    figure = Figure(figsize=(5 * len(shown), 3 * len(warmups) + 0.5), layout="constrained")
    panels = figure.subplots(len(warmups), len(shown), sharex=True, sharey="col", squeeze=False)
    for row, warmup in zip(panels, warmups, strict=True):
        for axes, (name, label) in zip(row, shown.items(), strict=True):
            for color, optimizer in enumerate(optimizers):
                values = cells.get(f"{optimizer}_{warmup}", {}).get(name, [])
                if any(value is not None for value in values):
                    line = [float("nan") if value is None else value for value in values]
                    style = "--" if color % 2 else "-"  # some lie on others
                    axes.plot(range(1, len(line) + 1), line, style, label=optimizer, color=f"C{color}")
            axes.set(title=f"ε warmup: {warmup}", ylabel=label)
            axes.set_yscale("log" if name == "effective_step_size" else "linear")
    for axes in panels[-1]:
        axes.set_xlabel("step")
    figure.legend(*panels[0][1].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", type=Path, nargs="+", metavar="STUDY", help="folder of a study's runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (default: docs/results)")
    options = parser.parse_args(arguments)
    for study in options.studies:
        rows, steps = rows_of(study), first_steps_of(study)
        if not rows:
            parser.error(f"{study} holds no finished run")
        file = options.out / f"{study.resolve().name}.json"
        write_json(file, {"versions": versions(), "rows": rows, **({"first_steps": steps} if steps else {})})
        print(f"{len(rows)} runs: wrote {file}")
        if steps:
            picture = file.with_name(f"{file.stem}_steps.png")
            content = plot(steps)
            write_atomically(picture, lambda stream, content=content: stream.write(content))
            print(f"wrote {picture}")


if __name__ == "__main__":
    main()
