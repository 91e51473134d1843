"""docs/results/ablation.md: what the parts of short warmup do."""

from __future__ import annotations

from typing import Any

from ablation import VARIANTS
from common import ERRORS, RESULTS

from pages.common import put, read, spread


def fill() -> None:
    growth, runs = read("growth")["rows"], read("ablation")["rows"]
    plot_growth(growth)
    plot_ablation(runs)
    put(RESULTS / "ablation.md", growth=growth_table(growth), runs=ablation_table(runs))


def growth_table(rows: list[dict[str, Any]]) -> str:
    layers = range(1, len(rows[0]["growth"]) + 1)
    lines = ["| initialization | BatchNorm | " + " | ".join(f"ReLU {i}" for i in layers) + " |"]
    lines.append("|---|---|" + "---:|" * len(layers))
    for row in rows:
        values = " | ".join(f"{value:.3g}" for value in row["growth"])
        lines.append(f"| {row['initialization']} | {'full' if row['batch_norm'] else 'none'} | {values} |")
    return "\n".join(lines)


def ablation_table(rows: list[dict[str, Any]]) -> str:
    lines = ["| variant | seeds | natural error | PGD error | verified error | dead ReLUs | diverged at ε |"]
    lines.append("|---|---:|---:|---:|---:|---:|---|")
    for name in VARIANTS:
        runs = [row for row in rows if row["variant"] == name]
        cells = [spread(runs, key) for key in (*ERRORS, "dead")]
        diverged = ", ".join(f"{row['diverged_at']:.4f}" for row in runs if row["diverged_at"] is not None)
        lines.append(f"| {name} | {len(runs)} | " + " | ".join(cells) + f" | {diverged or 'none'} |")
    return "\n".join(lines)


def plot_growth(rows: list[dict[str, Any]]) -> None:
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for panel, batch_norm in zip(panels, (False, True), strict=True):
        for row in rows:
            if row["batch_norm"] == batch_norm:
                layers = range(1, len(row["growth"]) + 1)
                panel.semilogy(layers, row["growth"], marker="o", label=row["initialization"])
        panel.set(xlabel="ReLU", title="full BatchNorm, training mode" if batch_norm else "no BatchNorm")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("mean radius / radius at the input")
    panels[0].legend(title="initialization")
    figure.savefig(RESULTS / "growth.png", dpi=110)


def plot_ablation(rows: list[dict[str, Any]]) -> None:
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(8, 4), layout="constrained")
    for position, name in enumerate(VARIANTS):
        runs = [row for row in rows if row["variant"] == name and "verified_error" in row]
        for key, colour in (("natural_error", "tab:blue"), ("pgd_error", "tab:orange"), ("verified_error", "tab:red")):
            values = [100 * row[key] for row in runs]
            label = key.replace("_", " ").replace("pgd", "PGD") if position == 0 else None
            panel.scatter([position] * len(values), values, color=colour, alpha=0.7, label=label)
    panel.set(xticks=range(len(VARIANTS)), xticklabels=list(VARIANTS), ylabel="error on test images, %")
    panel.grid(alpha=0.3)
    panel.legend()
    figure.savefig(RESULTS / "ablation.png", dpi=110)
