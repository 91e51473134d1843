"""How bounds grow through the untrained networks, and what every shipped configuration computes.

    python scripts/architectures.py growth --data CIFAR    # radius of every layer's box; a minute
    python scripts/architectures.py costs                  # multiply-accumulates, counted and not measured; minutes

CIFAR is a folder with train.npz and test.npz (images uint8 N×H×W×C, labels). Both write JSON to docs/results;
scripts/tables.py makes the page of it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, growth_of

from certtrain.bounds import BoundedModel, linf_box
from certtrain.config import Config, load_config
from certtrain.config.loading import runnable_configs
from certtrain.data import load_dataset, to_float
from certtrain.data.vision import CIFAR10_MEAN, CIFAR10_STD
from certtrain.initialization import initialize_
from certtrain.models import MODELS, build_model
from certtrain.runs.provenance import versions
from certtrain.runtime.files import write_json
from certtrain.studies.scaling.cost import OperationCounter
from certtrain.training.cost import network_size

EPSILON = 8 / 255
NETWORKS = ("cnn7", "wide-resnet", "resnext")
DATA = {  # image shape, classes, training images
    "digits": ((1, 8, 8), 10, 1_437),
    "mnist": ((1, 28, 28), 10, 60_000),
    "cifar10": ((3, 32, 32), 10, 50_000),
    "tinyimagenet": ((3, 64, 64), 200, 100_000),
}


def measure_growth(data: Path, images: int = 32) -> None:
    """Mean radius before every ReLU, relative to that of the box that enters the network, without BatchNorm."""
    x = to_float(load_dataset("npz", path=data).test.images[:images])
    rows = []
    for name in NETWORKS:
        model = build_model(name, (3, 32, 32), 10, mean=CIFAR10_MEAN, std=CIFAR10_STD, options={"batch_norm": False})
        for scheme in ("default", "kaiming", "xavier", "orthogonal", "ibp"):
            torch.manual_seed(0)
            for module in model.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
            with torch.no_grad():
                bounds = BoundedModel(initialize_(model, scheme).eval(), x[:1]).ibp(linf_box(x, EPSILON))
            rows.append({"model": name, "initialization": scheme, "growth": growth_of(bounds)})
            print(json.dumps(rows[-1]), flush=True)
    content = {"eps": EPSILON, "images": images, "seed": 0, "versions": versions(), "rows": rows}
    write_json(RESULTS / "growth_residual.json", content)


def count_costs() -> None:
    sizes = [
        {"model": name, "data": data, **network_size(name, shape, classes)._asdict()}
        for name in MODELS
        for data, (shape, classes, _) in DATA.items()
    ]
    rows = []
    for name in runnable_configs():
        rows.append({"config": name, **costs_of(load_config(name))})
        print(json.dumps(rows[-1]), flush=True)
    write_json(RESULTS / "costs.json", {"versions": versions(), "models": sizes, "rows": rows})


def costs_of(config: Config) -> dict[str, Any]:
    """Multiply-accumulates of an epoch before, in and after warmup (0 where there is none), and of the whole run."""
    shape, classes, images = DATA[config.data.name]
    costs = OperationCounter(images, shape, classes).by_phase(config)
    epochs = {part: cost.epochs for part, cost in costs.items()}
    macs = {part: cost.images * cost.macs_per_image for part, cost in costs.items()}
    return {"epochs": epochs, "macs_per_epoch": macs, "macs": sum(epochs[part] * macs[part] for part in epochs)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("growth", "costs"))
    parser.add_argument("--data", type=Path, help="folder with train.npz and test.npz, for growth")
    options = parser.parse_args()
    if options.part == "costs":
        count_costs()
    elif options.data is None:
        parser.error("--data is needed")
    else:
        measure_growth(options.data)


if __name__ == "__main__":
    main()
