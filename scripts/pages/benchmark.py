"""docs/results/benchmark.md: steps, methods and whole programs, a table for each device that was at hand."""

from __future__ import annotations

import statistics
from typing import Any

from common import RESULTS

from pages.common import put, read, read_if_measured, shown, spread

PAGE = RESULTS / "benchmark.md"
DEVICES = "cpu", "cpu-avx2", "cpu-upstream", "cuda"


def fill() -> None:
    put(PAGE, rewrites=rewrites_table(read("compiled_steps")["rows"]))
    for device in DEVICES:
        if programs := read_if_measured(f"beside-authors-{device}"):
            put(PAGE, **{f"beside-{device}": beside_table(programs)})
        if methods := read_if_measured(f"benchmark-methods-{device}"):
            put(PAGE, **{f"methods-{device}": method_costs_table(methods)})
        if steps := read_if_measured(f"benchmark-{device}"):
            put(PAGE, **{device: benchmark_table(steps)})
            alone = read_if_measured(f"growth-{device}")  # which gpu_hour.sh measures by itself
            if growth := (alone or steps)["growth"]:
                put(PAGE, **{f"{device}-growth": benchmark_growth_table(growth)})


def measured_on(versions: dict[str, str], size: str) -> str:
    return f"{versions['device']}, PyTorch {versions['torch']}; {size}."


def rewrites_table(rows: list[dict[str, Any]]) -> str:
    lines = ["| network | batch | ms: PyTorch's graphs | bytes for masks | sums in stages, too | all in all |"]
    lines.append("|---|" + "---:|" * 5)
    for row in rows:
        times = " | ".join(f"{1e3 * row[variant]:.4g}" for variant in ("booleans", "bytes", "stages"))
        lines.append(f"| {row['network']} | {row['batch']} | {times} | {row['booleans'] / row['stages']:.2f}× |")
    return "\n".join(lines)


def beside_table(measured: dict[str, Any]) -> str:
    """A program to a row; errors are mean and range over its seeds, seconds of an epoch the median of all."""
    rows, setting = measured["rows"], measured["setting"]
    size = f"width {setting['width']}, {setting['images']:,} images, {setting['epochs']} epochs"
    lines = [measured_on(measured["versions"], size), ""]
    lines.append(
        "| program | seeds | natural error | verified, by itself | by certtrain | s per epoch | processor s | MiB "
        "| to install | to write |"
    )
    lines.append("|---|" + "---:|" * 9)
    for name, program in measured["programs"].items():
        runs = [row for row in rows if row["program"] == name]
        if not runs:
            continue
        errors = [spread(runs, key) for key in ("natural_error", "verified_error", "by_certtrain")]
        costs = [f"{statistics.median(seconds for run in runs for seconds in run['seconds']):.2f}"]
        costs += [f"{statistics.median(run['processor_seconds'] for run in runs):.0f}"]
        peaks = [run["peak_bytes"] for run in runs if run["peak_bytes"]]
        costs += [shown(max(peaks, default=0) / 2**20 or None, "{:.0f}")]
        written = sum(map(len, program["written"]))
        cells = [name, str(len(runs)), *errors, *costs, str(len(program["install"])), str(written)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def method_costs_table(measured: dict[str, Any]) -> str:
    rows = measured["rows"]
    size = f"width {rows[0]['width']}, batch {rows[0]['batch']}"
    lines = [measured_on(measured["versions"], size), ""]
    lines += [
        "| step | eager, of natural | compiled, of natural | compiled, of natural eager |",
        "|---|---:|---:|---:|",
    ]
    for eager in (row for row in rows if not row["compiled"]):
        (compiled,) = (row for row in rows if row["compiled"] and row["method"] == eager["method"])
        costs = eager["of_natural_alike"], compiled["of_natural_alike"], compiled["of_natural_eager"]
        lines.append(f"| {eager['method']} | {' | '.join(f'{cost:.2f}×' for cost in costs)} |")
    return "\n".join(lines)


def benchmark_table(measured: dict[str, Any]) -> str:
    first = measured["rows"][0]
    title = measured_on(measured["versions"], f"width {first['width']}, batch {first['batch']}")
    lines = ["| step | ms | images/s | of natural | of auto_LiRPA | of the matrix-product rate | peak memory |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    for row in measured["rows"]:
        cells = [f"{1000 * row['seconds']:.4g}", f"{row['images_per_second']:.4g}"]
        cells += [shown(row["of_natural"], "{:.2f}×"), shown(row["of_auto_lirpa"], "{:.2f}×")]
        cells += [shown(row["of_matrix_product_rate"], "{:.0%}")]
        cells += [shown(row["peak_bytes"] and row["peak_bytes"] / 2**20, "{:.0f} MiB")]
        lines.append(f"| {row['step']} | {' | '.join(cells)} |")
    return "\n".join([title, "", *lines])


def benchmark_growth_table(rows: list[dict[str, Any]]) -> str:
    steps = list(dict.fromkeys(row["step"] for row in rows))
    lines = [f"| batch | width | classes | {' | '.join(f'ms: {step}' for step in steps)} |"]
    lines.append("|---:|---:|---:|" + "---:|" * len(steps))
    for i in range(0, len(rows), len(steps)):
        size = " | ".join(str(rows[i][key]) for key in ("batch", "width", "classes"))
        lines.append(f"| {size} | " + " | ".join(f"{1000 * r['seconds']:.4g}" for r in rows[i : i + len(steps)]) + " |")
    return "\n".join(lines)
