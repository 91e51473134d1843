"""What the runs of the study warmup_optimizers came to: docs/results/warmup.json, and a plot of it.

    certtrain study warmup_optimizers --jobs 2          # trains; the same command goes on where it was
    python scripts/warmup.py runs/warmup_optimizers     # gathers what is finished

With each run: verified error, whether and where it diverged, and of the first steps the variance of the adaptive rates,
the effective step size, the rectification term and dead ReLUs.
"""

from __future__ import annotations

import argparse
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from certtrain.runs.metrics import read_records
from certtrain.runs.provenance import versions
from certtrain.runtime.files import write_atomically, write_json

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
OF_STEPS = (
    "adaptive_rate_variance",
    "adaptive_rate_log_variance",
    "effective_step_size",
    "update_rms",
    "rectification",
    "dead_relus",
)
ERRORS = ("natural_error", "pgd_error", "verified_error")
DIVERGED = re.compile(r"the loss is not finite in epoch \d+, step .*? at epsilon ([0-9.e-]+)")


def rows_of(study: Path) -> list[dict[str, Any]]:
    """A row for each run that is finished or has diverged."""
    found = (row_of(study, file.parent) for file in sorted(study.glob("*/seed-*/config.yaml")))
    return [row for row in found if row is not None]


def row_of(study: Path, run: Path) -> dict[str, Any] | None:
    cell, seed = run.parent.name, int(run.name.removeprefix("seed-"))
    optimizer, _, epsilon = cell.rpartition("_")
    row: dict[str, Any] = {"optimizer": optimizer, "epsilon": epsilon, "seed": seed, "diverged_at": None}
    if (run / "summary.json").is_file():
        summary = json.loads((run / "summary.json").read_text())
        row |= {name: summary[name] for name in ERRORS}
    elif (eps := diverged_at(study / "logs" / f"{cell}--{run.name}.log")) is not None:
        row["diverged_at"] = eps
    else:
        return None
    epochs = read_records(run / "metrics.jsonl") if (run / "metrics.jsonl").is_file() else []
    steps = read_records(run / "steps.jsonl", "step") if (run / "steps.jsonl").is_file() else []
    row["dead_relus"] = epochs[-1]["optimizer"]["dead_relus"] if epochs else None
    row["steps"] = {name: [step[name] for step in steps] for name in OF_STEPS}
    return row


def diverged_at(log: Path) -> float | None:
    """The radius at which the loss was no longer finite, if that ended the run."""
    match = DIVERGED.search(log.read_text(errors="replace")) if log.is_file() else None
    return float(match[1]) if match else None


def summarized(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each optimizer and warmup: means and ranges over seeds."""
    cells: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["optimizer"], row["epsilon"]), []).append(row)
    return [
        {
            "optimizer": optimizer,
            "epsilon": epsilon,
            "seeds": len(runs),
            "diverged": sum(run["diverged_at"] is not None for run in runs),
            **{name: _spread([run[name] for run in runs if name in run]) for name in ERRORS},
            "dead_relus": _spread([run["dead_relus"] for run in runs if run["dead_relus"] is not None]),
        }
        for (optimizer, epsilon), runs in cells.items()
    ]


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {"mean": sum(values) / len(values), "least": min(values), "most": max(values)}


def plot(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """PNG: over the first steps, for each optimizer, the mean over its runs."""
    figure = Figure(figsize=(15, 3.6), layout="constrained")
    shown = {
        "adaptive_rate_log_variance": "variance of the adaptive rate's logarithm",
        "effective_step_size": "effective step size",
        "dead_relus": "dead ReLUs",
    }
    for axes, (name, label) in zip(figure.subplots(1, len(shown)), shown.items(), strict=True):
        for optimizer in dict.fromkeys(row["optimizer"] for row in rows):
            lines = [row["steps"][name] for row in rows if row["optimizer"] == optimizer and row["steps"][name]]
            points = [[value for value in step if value is not None] for step in zip(*lines, strict=False)]
            means = [sum(step) / len(step) for step in points if step]
            if means:
                axes.plot(range(1, len(means) + 1), means, label=optimizer)
        axes.set(xlabel="step", ylabel=label, yscale="log" if name == "effective_step_size" else "linear")
    axes.legend(fontsize=7)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="folder of the study's runs")
    parser.add_argument("--out", type=Path, default=RESULTS / "warmup.json", help="default: docs/results/warmup.json")
    options = parser.parse_args(arguments)
    rows = rows_of(options.study)
    if not rows:
        parser.error(f"{options.study} holds no finished run")
    write_json(options.out, {"versions": versions(), "summary": summarized(rows), "rows": rows})
    picture = plot(rows)
    write_atomically(options.out.with_suffix(".png"), lambda file: file.write(picture))
    print(f"{len(rows)} runs: wrote {options.out} and {options.out.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
