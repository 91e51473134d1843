"""What initialization, full BatchNorm and the regularizers do, at a scale that a CPU trains in minutes.

    python scripts/ablation.py growth --data CIFAR      # radius of every layer's box before any training
    python scripts/ablation.py train --data CIFAR       # five variants, three seeds each
    python scripts/ablation.py page                     # tables and plots of docs/results from the JSON

CIFAR is a folder with train.npz and test.npz (images uint8 N×H×W×C, labels).
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

import certtrain
from certtrain.bounds import BoundedModel, linf_box
from certtrain.checkpoint import write_json, write_text
from certtrain.data import load_dataset, to_float
from certtrain.errors import DivergedError
from certtrain.initialization import initialize_
from certtrain.models import build_model
from certtrain.run import versions

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
EPSILON = 8 / 255
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)

VARIANTS: dict[str, dict[str, Any]] = {
    "vanilla IBP": {},
    "+ initialization": {"initialization": "ibp"},
    "+ full BatchNorm": {"batch_norm": True},
    "+ regularizers": {"regularizers": True},
    "all": {"initialization": "ibp", "batch_norm": True, "regularizers": True},
}


def variant_config(data: Path, seed: int, initialization: str = "default", batch_norm: bool = False,
                   regularizers: bool = False) -> dict[str, Any]:  # fmt: skip
    return {
        "seed": seed,
        "data": {
            "name": "npz",
            "path": str(data),
            "limit": 5_000,
            "flip": True,
            "crop": 2,
            "mean": CIFAR10_MEAN,
            "std": CIFAR10_STD,
        },  # fmt: skip
        "model": {"name": "cnn7", "options": {"width": 8, "linear_width": 128, "batch_norm": batch_norm}},
        "epsilon": {"max": EPSILON, "start_epoch": 2, "warmup_epochs": 10},
        "training": {"epochs": 20, "batch_size": 64, "initialization": initialization, "checkpoint_seconds": 1e9},
        "optimizer": {"lr": 0.002, "milestones": [15, 18]},
        "regularizers": {"weight": 0.5 if regularizers else 0.0},
        "verification": {"limit": 1_000, "pgd_steps": 10, "pgd_restarts": 1},
    }


def train_variants(data: Path, seeds: list[int], runs: Path) -> None:
    for seed in seeds:
        for name, changes in VARIANTS.items():
            folder = runs / f"{name.strip('+ ').replace(' ', '-')}-{seed}"
            row = train_once(variant_config(data, seed, **changes), folder) | {"variant": name, "seed": seed}
            print(json.dumps(row))
            write_json(runs / f"{folder.name}.json", row)


def train_once(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One run's errors; `diverged_at` is the epsilon at which the loss was no longer finite, if that happened."""
    try:
        summary = certtrain.train(config, folder, overwrite=True).summary
    except DivergedError as error:
        return {"diverged_at": error.eps}
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    layers = last["layers"]
    return {
        **{key: summary[key] for key in ("natural_error", "pgd_error", "verified_error", "train_seconds")},
        "train_verified_error": last["verified_error"],
        "dead": sum(layer["dead"] for layer in layers) / len(layers),
        "inactive": sum(layer["inactive"] for layer in layers) / len(layers),
        "tightness": [layer["tightness"] for layer in layers],
        "diverged_at": None,
    }


def measure_growth(data: Path, images: int = 128) -> None:
    """Mean radius before every ReLU, relative to that of the input box, of untrained full-width networks."""
    split = load_dataset("npz", path=data).test
    x = to_float(split.images[:images])
    rows = []
    for batch_norm in (False, True):
        for scheme in ("default", "kaiming", "xavier", "orthogonal", "ibp"):
            torch.manual_seed(0)
            model = build_model("cnn7", (3, 32, 32), 10, mean=CIFAR10_MEAN, std=CIFAR10_STD,
                                options={"batch_norm": batch_norm})  # fmt: skip
            net = BoundedModel(initialize_(model, scheme).train(), x[:1])
            with torch.no_grad():
                bounds = net.ibp(linf_box(x, EPSILON), clean=x)
            start = bounds.affine_input.radius.mean()
            growth = [(box.radius.mean() / start).item() for box in bounds.relu_inputs]
            rows.append({"initialization": scheme, "batch_norm": batch_norm, "growth": growth})
            print(json.dumps(rows[-1]))
    write_json(RESULTS / "growth.json", {"eps": EPSILON, "images": images, "versions": versions(), "rows": rows})


def write_page(runs: Path | None) -> None:
    """Gather the runs' JSON (where given), draw the plots, and put the tables into docs/results/ablation.md."""
    if runs is not None:
        rows = [json.loads(path.read_text()) for path in sorted(runs.glob("*.json"))]
        config = variant_config(Path("CIFAR"), 0)
        write_json(RESULTS / "ablation.json", {"versions": versions(), "vanilla_config": config, "rows": rows})
    growth = json.loads((RESULTS / "growth.json").read_text())["rows"]
    rows = json.loads((RESULTS / "ablation.json").read_text())["rows"]
    plot_growth(growth)
    plot_ablation(rows)
    page = RESULTS / "ablation.md"
    text = page.read_text() if page.exists() else "<!-- growth -->\n<!-- /growth -->\n<!-- runs -->\n<!-- /runs -->\n"
    text = between(text, "growth", growth_table(growth))
    write_text(page, between(text, "runs", ablation_table(rows)))


def between(text: str, mark: str, content: str) -> str:
    head, _, rest = text.partition(f"<!-- {mark} -->\n")
    _, _, tail = rest.partition(f"<!-- /{mark} -->")
    return f"{head}<!-- {mark} -->\n{content}\n<!-- /{mark} -->{tail}"


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
        mine = [row for row in rows if row["variant"] == name]
        cells = [spread(mine, key) for key in ("natural_error", "pgd_error", "verified_error", "dead")]
        diverged = ", ".join(f"{row['diverged_at']:.4f}" for row in mine if row["diverged_at"] is not None)
        lines.append(f"| {name} | {len(mine)} | " + " | ".join(cells) + f" | {diverged or 'none'} |")
    return "\n".join(lines)


def spread(rows: list[dict[str, Any]], key: str) -> str:
    """Mean and range over the seeds that ended, in percent."""
    values = [100 * row[key] for row in rows if key in row]
    return f"{statistics.mean(values):.1f} % ({min(values):.1f}–{max(values):.1f})" if values else "–"


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
        mine = [row for row in rows if row["variant"] == name and "verified_error" in row]
        for key, colour in (("natural_error", "tab:blue"), ("pgd_error", "tab:orange"), ("verified_error", "tab:red")):
            values = [100 * row[key] for row in mine]
            label = key.replace("_", " ") if position == 0 else None
            panel.scatter([position] * len(values), values, color=colour, alpha=0.7, label=label)
    panel.set(xticks=range(len(VARIANTS)), xticklabels=list(VARIANTS), ylabel="error on test images, %")
    panel.grid(alpha=0.3)
    panel.legend()
    figure.savefig(RESULTS / "ablation.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("growth", "train", "page"))
    parser.add_argument("--data", type=Path, help="folder with train.npz and test.npz")
    parser.add_argument("--runs", type=Path, help="where the runs are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    if options.part == "page":
        write_page(options.runs)
    elif options.data is None:
        parser.error("--data is needed")
    elif options.part == "growth":
        measure_growth(options.data)
    else:
        train_variants(options.data, options.seeds, options.runs or Path("runs/ablation"))


if __name__ == "__main__":
    main()
