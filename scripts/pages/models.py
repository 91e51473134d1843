"""docs/results/models.md: sizes of networks, growth of bounds in residual ones, costs of configurations."""

from __future__ import annotations

from typing import Any

from common import RESULTS

from pages.common import put, read


def fill() -> None:
    growth, costs = read("growth_residual")["rows"], read("costs")
    plot_residual_growth(growth)
    put(
        RESULTS / "models.md",
        sizes=sizes_table(costs["models"]),
        growth=residual_growth_table(growth),
        costs=costs_table(costs["rows"]),
    )


def sizes_table(rows: list[dict[str, Any]]) -> str:
    data = list(dict.fromkeys(row["data"] for row in rows))
    lines = ["| model | " + " | ".join(f"{name}: parameters | M MACs" for name in data) + " |"]
    lines.append("|---|" + "---:|---:|" * len(data))
    for model in dict.fromkeys(row["model"] for row in rows):
        sizes = {row["data"]: row for row in rows if row["model"] == model}
        cells = (f"{sizes[name]['parameters']:,} | {sizes[name]['macs'] / 1e6:,.1f}" for name in data)
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join(lines)


def residual_growth_table(rows: list[dict[str, Any]]) -> str:
    lines = ["| model | initialization | ReLUs | first | last | factor per ReLU |", "|---|---|---:|---:|---:|---:|"]
    for row in rows:
        first, *_, last = growth = row["growth"]
        factor = (last / first) ** (1 / (len(growth) - 1))
        cells = f"{row['model']} | {row['initialization']} | {len(growth)}"
        lines.append(f"| {cells} | {first:.3g} | {last:.3g} | {factor:.2f} |")
    return "\n".join(lines)


def costs_table(rows: list[dict[str, Any]]) -> str:
    """In units of 10^12 multiply-accumulates an epoch, 10^15 a run."""
    lines = ["| config | epochs | ε = 0 | warmup | ε_max | whole run, 10¹⁵ |", "|---|---:|---:|---:|---:|---:|"]
    for row in rows:
        macs = " | ".join(brief(value / 1e12) if value else "–" for value in row["macs_per_epoch"].values())
        epochs = " + ".join(str(count) for count in row["epochs"].values())
        lines.append(f"| `{row['config']}` | {epochs} | {macs} | {brief(row['macs'] / 1e15)} |")
    return "\n".join(lines)


def brief(value: float) -> str:
    return f"{value:,.1f}" if value >= 1 else f"{value:.2g}"


def plot_residual_growth(rows: list[dict[str, Any]]) -> None:
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["model"] for row in rows))
    figure, panels = plt.subplots(1, len(names), figsize=(12, 4), sharey=True, layout="constrained")
    for panel, name in zip(panels, names, strict=True):
        for row in (row for row in rows if row["model"] == name):
            layers = range(1, len(row["growth"]) + 1)
            panel.semilogy(layers, row["growth"], marker="o", label=row["initialization"])
        panel.set(xlabel="ReLU", title=f"{name}, no BatchNorm", xticks=layers)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("mean radius / radius at the input")
    panels[0].legend(title="initialization")
    figure.savefig(RESULTS / "growth_residual.png", dpi=110)
