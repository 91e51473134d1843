"""What initialization, full BatchNorm and the regularizers do, at a scale that a CPU trains in minutes.

    python scripts/ablation.py growth --data CIFAR      # radius of every layer's box before any training
    python scripts/ablation.py train --data CIFAR       # five variants, three seeds each

CIFAR is a folder with train.npz and test.npz (images uint8 N×H×W×C, labels). Both write JSON to docs/results;
scripts/tables.py makes tables and plots of it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from common import ERRORS, RESULTS, growth_of, train_afresh

from certtrain.bounds import BoundedModel, linf_box
from certtrain.data import load_dataset, to_float
from certtrain.data.vision import CIFAR10_MEAN, CIFAR10_STD
from certtrain.initialization import initialize_
from certtrain.models import build_model
from certtrain.runs.build import resolve_device
from certtrain.runs.provenance import versions
from certtrain.runtime.files import write_json

EPSILON = 8 / 255

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
        },
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
            row = train_variant(variant_config(data, seed, **changes), folder) | {"variant": name, "seed": seed}
            print(json.dumps(row))
            write_json(runs / f"{folder.name}.json", row)


def train_variant(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One run's errors; `diverged_at` is the epsilon at which the loss was no longer finite, if that happened."""
    summary = train_afresh(config, folder)
    if "diverged_at" in summary:
        return summary
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    layers = last["layers"]
    return {
        **{key: summary[key] for key in (*ERRORS, "train_seconds")},
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
            rows.append({"initialization": scheme, "batch_norm": batch_norm, "growth": growth_of(bounds)})
            print(json.dumps(rows[-1]))
    write_json(RESULTS / "growth.json", {"eps": EPSILON, "images": images, "versions": versions(), "rows": rows})


def gather(runs: Path) -> None:
    """One JSON of all the runs' rows."""
    rows = [json.loads(path.read_text()) for path in sorted(runs.glob("*.json"))]
    config = variant_config(Path("CIFAR"), 0)
    write_json(
        RESULTS / "ablation.json",
        {"versions": versions(resolve_device("auto")), "vanilla_config": config, "rows": rows},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("growth", "train"))
    parser.add_argument("--data", type=Path, required=True, help="folder with train.npz and test.npz")
    parser.add_argument("--runs", type=Path, default=Path("runs/ablation"), help="where the runs are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    if options.part == "growth":
        measure_growth(options.data)
    else:
        train_variants(options.data, options.seeds, options.runs)
        gather(options.runs)


if __name__ == "__main__":
    main()
