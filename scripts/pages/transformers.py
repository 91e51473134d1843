"""docs/results/transformers.md, from what scripts/transformers.py measured."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from common import ERRORS, RESULTS

from certtrain.studies.statistics import mean_interval
from pages.common import of_setting, put, read, seeds_table

NORMS, COLOURS = ("pre", "post", "none"), ("tab:blue", "tab:red", "tab:green")
CONSTANT = 0.89  # verified error of a network that always says the same: of ten classes the largest has a tenth or so
TITLES = {"digits": "digits, ε = 0.05", "cifar10": "CIFAR-10, ε = 2/255"}
Row = dict[str, Any]


def fill() -> None:
    cost = read("transformers-cost")
    tables = {
        "digits-vit": seeds_table(of_setting("digits_vit")),
        "cost": cost_table(cost),
        "memory": memory_table(cost["peak_bytes_per_image"]),
        "validation": validation_table(read("transformers-validation")["groups"]),
        "stages": stages_table(read("transformers-crown")),
    }
    for name in TITLES:
        rows = read(f"transformers-{name}")["rows"]
        tables |= {f"grid-{name}": grid_table(rows), f"warmups-{name}": warmups_table(rows)}
        plot_errors(name, rows)
        plot_course(name, rows)
        plot_initial(name, read(f"transformers-initial-{name}")["rows"])
    put(RESULTS / "transformers.md", **tables)


def validation_table(groups: Sequence[Row]) -> str:
    """Of `certtrain compare --out`, on held-out training images."""
    lines = ["| network | seeds | natural error, % | PGD error, % | verified error, % |", "|---|---:|---:|---:|---:|"]
    for group in sorted(groups, key=lambda group: group["verified_error"]["mean"]):
        errors = " | ".join(mean_with_interval([100 * v for v in group[name]["values"]], most=100) for name in ERRORS)
        lines.append(f"| {group['name']} | {len(group['seeds'])} | {errors} |")
    return "\n".join(lines)


def stages_table(verified: Row) -> str:
    lines = ["| bounds | images asked about | proved | s per image |", "|---|---:|---:|---:|"]
    for stage in verified["stages"]:
        seconds = stage["seconds"] / stage["images"]
        lines.append(f"| {stage['method']} | {stage['images']} | {stage['proved']} | {seconds:.2g} |")
    return "\n".join(lines)


# --- tables -----------------------------------------------------------------------------------------------------------


def cost_table(measured: Row) -> str:
    lines = ["| norms | step | M MACs per image | ms per image | compiled |", "|---|---|---:|---:|---:|"]
    rows = {(row["norm_kind"], row["step"], row["compiled"]): row for row in measured["rows"]}
    for (kind, step, compiled), row in rows.items():
        if not compiled:
            macs = row["macs"] / measured["images"] / 1e6
            seconds = (1e3 * one["seconds"] / measured["images"] for one in (row, rows[kind, step, True]))
            lines.append(f"| {kind} | {step} | {macs:.1f} | {' | '.join(f'{ms:.2f}' for ms in seconds)} |")
    return "\n".join(lines)


def memory_table(rows: Sequence[Row]) -> str:
    steps = [key for key in rows[0] if key != "tokens"]
    lines = [f"| tokens | {' | '.join(f'{step}, MiB' for step in steps)} |", "|---:|" + "---:|" * len(steps)]
    lines += [f"| {row['tokens']} | {' | '.join(f'{row[step] / 2**20:.1f}' for step in steps)} |" for row in rows]
    return "\n".join(lines)


def grid_table(rows: Sequence[Row]) -> str:
    titles = (
        "norm",
        "epochs of ε's warmup",
        "of the learning rate's",
        "natural error, %",
        "PGD error, %",
        "verified error, %",
    )
    lines = [f"| {' | '.join(titles)} | loss not finite | no better than a constant |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|---:|")
    for (norm, eps_warmup, lr_warmup), runs in cells(rows).items():
        errors = " | ".join(mean_with_interval([100 * run.get(name, 1.0) for run in runs], most=100) for name in ERRORS)
        diverged = sum("diverged_at" in run for run in runs)
        constant = sum(run.get("verified_error", 1.0) >= CONSTANT for run in runs)
        lost = f"{diverged} of {len(runs)} | {constant} of {len(runs)}"
        lines.append(f"| {norm} | {eps_warmup} | {lr_warmup} | {errors} | {lost} |")
    return "\n".join(lines)


def warmups_table(rows: Sequence[Row]) -> str:
    """What warmup takes off the verified error: by seed, and of the other warmup's settings the mean."""
    lines = ["| norm | 5 epochs of the learning rate's warmup, less none | the longer warmup of ε, less the shorter |"]
    lines.append("|---|---:|---:|")
    for norm in NORMS:
        runs = [row for row in rows if row["norm"] == norm]
        shorter, longer = sorted({row["eps_warmup"] for row in runs})
        gains = (differences(runs, "lr_warmup", 5, 0), differences(runs, "eps_warmup", longer, shorter))
        lines.append(f"| {norm} | {' | '.join(mean_with_interval(gain, sign='+') for gain in gains)} |")
    return "\n".join(lines)


def differences(runs: Sequence[Row], key: str, value: int, baseline: int) -> list[float]:
    """Percentage points of verified error, one number for each seed."""

    def mean(seed: int, at: int) -> float:
        chosen = [run for run in runs if (run["seed"], run[key]) == (seed, at)]
        return statistics.mean(100 * run.get("verified_error", 1.0) for run in chosen)

    return [mean(seed, value) - mean(seed, baseline) for seed in sorted({run["seed"] for run in runs})]


def cells(rows: Sequence[Row]) -> dict[tuple[str, int, int], list[Row]]:
    found: dict[tuple[str, int, int], list[Row]] = {}
    for row in sorted(rows, key=lambda row: (NORMS.index(row["norm"]), -row["eps_warmup"], row["lr_warmup"])):
        found.setdefault((row["norm"], row["eps_warmup"], row["lr_warmup"]), []).append(row)
    return found


def mean_with_interval(values: Sequence[float], sign: str = "", most: float = math.inf) -> str:
    """Mean and 95 % interval of it; values that are shares lie from 0 to `most`."""
    interval = mean_interval(values)
    between = ""
    if interval is not None:
        low, high = (min(max(end, 0.0), most) if most < math.inf else end for end in (interval.low, interval.high))
        between = f" ({low:{sign}.1f} to {high:{sign}.1f})"
    return f"{statistics.mean(values):{sign}.1f}{between}"


# --- plots ------------------------------------------------------------------------------------------------------------


def plot_initial(name: str, rows: Sequence[Row]) -> None:
    import matplotlib.pyplot as plt

    titles = {
        "natural_gradients": "gradient norm, natural loss",
        "certified_gradients": "gradient norm, certified loss",
        "radii": "radius, relative to the input's",
    }
    figure, panels = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    for panel, (key, title) in zip(panels, titles.items(), strict=True):
        for (norm, colour), scheme in itertools.product(zip(NORMS, COLOURS, strict=True), ("ibp", "xavier")):
            runs = [row[key] for row in rows if (row["norm"], row["initialization"]) == (norm, scheme)]
            style = "-o" if scheme == "ibp" else "--x"
            panel.semilogy(range(1, len(runs[0]) + 1), means(runs), style, color=colour, label=f"{norm}, {scheme}")
        panel.set(xlabel="block", title=title)
        panel.grid(alpha=0.3)
    panels[-1].legend(fontsize=7)
    figure.suptitle(TITLES[name].partition(",")[0])
    figure.savefig(RESULTS / f"transformers-initial-{name}.png", dpi=110)
    plt.close(figure)


def plot_errors(name: str, rows: Sequence[Row]) -> None:
    """Verified and natural error against the learning rate's warmup, each run a dot, lines through their means."""
    import matplotlib.pyplot as plt

    eps_warmups = sorted({row["eps_warmup"] for row in rows}, reverse=True)
    figure, panels = plt.subplots(1, len(eps_warmups), figsize=(11, 3.8), sharey=True, layout="constrained")
    for panel, eps_warmup in zip(panels, eps_warmups, strict=True):
        for norm, colour in zip(NORMS, COLOURS, strict=True):
            runs = [row for row in rows if (row["norm"], row["eps_warmup"]) == (norm, eps_warmup)]
            for key, style in (("verified_error", "-"), ("natural_error", ":")):
                by_warmup = {at: [100 * r.get(key, 1.0) for r in runs if r["lr_warmup"] == at] for at in warmups(runs)}
                for at, values in by_warmup.items():
                    panel.scatter([at] * len(values), values, color=colour, s=12, alpha=0.5)
                line = [statistics.mean(values) for values in by_warmup.values()]
                panel.plot(list(by_warmup), line, style, color=colour, label=f"{norm}, {key.partition('_')[0]}")
        panel.set(xlabel="epochs of the learning rate's warmup", title=f"ε grows for {eps_warmup} epochs")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("error on test images, %")
    panels[0].legend(fontsize=7)
    figure.suptitle(TITLES[name])
    figure.savefig(RESULTS / f"transformers-errors-{name}.png", dpi=110)
    plt.close(figure)


def plot_course(name: str, rows: Sequence[Row]) -> None:
    """Along training, the mean of all seeds: verified error on training images, and radii before both ReLUs."""
    import matplotlib.pyplot as plt

    settings = list(itertools.product(sorted({row["eps_warmup"] for row in rows}, reverse=True), warmups(rows)))
    shown = (settings[0], settings[-1], settings[len(settings) // 2])
    quantities: dict[str, Callable[[Row], float | None]] = {
        "verified error on training images, %": lambda epoch: epoch["verified_error"] and 100 * epoch["verified_error"],
        "radius before the first ReLU / the input's": lambda epoch: 1 / epoch["tightness"][0],
        "radius before the last ReLU / the input's": lambda epoch: 1 / epoch["tightness"][-1],
    }
    figure, panels = plt.subplots(1, 3, figsize=(13, 4.8), layout="constrained")
    for panel, (title, quantity) in zip(panels, quantities.items(), strict=True):
        for (norm, colour), (setting, style) in itertools.product(
            zip(NORMS, COLOURS, strict=True), zip(shown, ("-", "--", ":"), strict=True)
        ):
            runs = [r["epochs"] for r in rows if (r["norm"], r["eps_warmup"], r["lr_warmup"]) == (norm, *setting)]
            courses = [[quantity(epoch) for epoch in run] for run in runs]
            course = [mean_of_known(values) for values in itertools.zip_longest(*courses)]
            label = f"{norm}; ε {setting[0]}, learning rate {setting[1]}"
            panel.plot(range(1, len(course) + 1), course, style, color=colour, label=label)
        panel.set(xlabel="epoch", title=title, yscale="log" if "radius" in title else "linear")
        panel.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, title="epochs of warmup")
    figure.suptitle(TITLES[name])
    figure.savefig(RESULTS / f"transformers-course-{name}.png", dpi=110)
    plt.close(figure)


def warmups(rows: Sequence[Row]) -> list[int]:
    return sorted({row["lr_warmup"] for row in rows})


def means(runs: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.mean(values) for values in zip(*runs, strict=True)]


def mean_of_known(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else float("nan")
