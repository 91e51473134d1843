"""Do Pre-LN transformers need less warmup than Post-LN ones in certified training, too?

    python scripts/transformers.py initial                # gradients and radii before training; a minute
    python scripts/transformers.py train --seeds 0 1 2    # the grid; runs that are there already are kept
    python scripts/transformers.py cost                   # of a certified step and a natural one

The first two are of digits, or with --data CIFAR, a folder with train.npz and test.npz, of 1,500 images of CIFAR-10.
Networks are small, so that a CPU trains either grid in half an hour. JSON goes to docs/results;
scripts/tables.py makes tables and plots of it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import ERRORS, RESULTS, growth_of, train_afresh
from live_bytes import LiveBytes
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from certtrain.bounds import BoundedModel, linf_box
from certtrain.data import load_dataset, to_float
from certtrain.data.vision import CIFAR10_MEAN, CIFAR10_STD
from certtrain.initialization import initialize_
from certtrain.models import build_model
from certtrain.runs.build import resolve_device
from certtrain.runs.metrics import read_records
from certtrain.runs.provenance import versions
from certtrain.runtime.files import write_json
from certtrain.training.method import Method, Phase, scheduled
from certtrain.training.methods import IBP, CrownIBP, Natural
from certtrain.training.regularization import Regularization
from certtrain.training.step import GradientStep

NORMS = ("pre", "post", "none")
LEARNING_RATE_WARMUPS = (0, 1, 5)  # epochs
EPSILON_WARMUPS = (7, 3)
DEEP = 6  # layers, where nothing is trained
STEPS: dict[str, Method] = {"natural": Natural(), "certified": IBP()}
REMEMBERED: dict[str, Method] = {**STEPS, "crown-ibp": CrownIBP()}


@dataclass(frozen=True)
class Setting:
    """A data set, and what of the network and of the run depends on it."""

    name: str
    data: dict[str, Any]
    shape: tuple[int, int, int]
    eps: float
    batch_size: int
    options: dict[str, Any] = field(default_factory=dict)

    def model_options(self, norm: str, **more: Any) -> dict[str, Any]:
        return {"norm": norm, "norm_kind": "layer", "pool": "flatten", "width": 32, **self.options, **more}

    def config(self, norm: str, lr_warmup: int, eps_warmup: int, seed: int) -> dict[str, Any]:
        return {
            "seed": seed,
            "data": self.data,
            "model": {"name": "vit", "options": self.model_options(norm)},
            "epsilon": {"max": self.eps, "start_epoch": 3, "warmup_epochs": eps_warmup},
            "training": {"epochs": 15, "batch_size": self.batch_size, "checkpoint_seconds": 1e9},
            "optimizer": {"lr": 0.002, "warmup_epochs": lr_warmup, "milestones": [11, 13]},
            "verification": {"limit": 1_000, "pgd_steps": 10, "pgd_restarts": 1},
        }


DIGITS = Setting("digits", {"name": "digits"}, (1, 8, 8), 0.05, 32)


def cifar10(folder: Path) -> Setting:
    """1,500 images, 16 patches of 8x8 pixels each."""
    data = {
        "name": "npz",
        "path": str(folder),
        "limit": 1_500,
        "flip": True,
        "crop": 2,
        "mean": CIFAR10_MEAN,
        "std": CIFAR10_STD,
    }
    return Setting("cifar10", data, (3, 32, 32), 2 / 255, 40, {"patch": 8})


def measure_initial(setting: Setting, images: int = 64, seeds: int = 3) -> None:
    """By block: gradient norm of the MLP's second layer, of both losses, and mean radius before the MLP's ReLU."""
    eps = setting.eps / 50
    train = load_dataset(setting.data["name"], path=setting.data.get("path")).train
    x, labels = to_float(train.images[:images]), train.labels[:images]
    normalization = {name: setting.data.get(name) for name in ("mean", "std")}
    rows = []
    for norm, scheme in itertools.product(NORMS, ("ibp", "xavier")):
        for seed in range(seeds):
            torch.manual_seed(seed)
            options = setting.model_options(norm, depth=DEEP)
            model = initialize_(build_model("vit", setting.shape, 10, **normalization, options=options), scheme)
            net = BoundedModel(model, x)
            layers = [block.mlp[2].weight for block in model.get_submodule("network") if hasattr(block, "mlp")]
            bounds = net.ibp(linf_box(x, eps), x)
            losses = {
                "natural": F.cross_entropy(model(x), labels),
                "certified": F.cross_entropy(-net.margins_of(bounds, labels), labels),
            }
            row: dict[str, Any] = {"norm": norm, "initialization": scheme, "seed": seed}
            for name, loss in losses.items():
                gradients = torch.autograd.grad(loss, layers, retain_graph=True)
                row[f"{name}_gradients"] = [float(gradient.norm()) for gradient in gradients]
            row["radii"] = growth_of(bounds)
            rows.append(row)
    write_json(
        RESULTS / f"transformers-initial-{setting.name}.json",
        {"images": images, "eps": eps, "depth": DEEP, "versions": versions(), "rows": rows},
    )


def train_grid(setting: Setting, seeds: list[int], runs: Path) -> None:
    for seed, eps_warmup, lr_warmup, norm in itertools.product(seeds, EPSILON_WARMUPS, LEARNING_RATE_WARMUPS, NORMS):
        folder = runs / f"{norm}-{lr_warmup}-{eps_warmup}-{seed}"
        if (folder / "row.json").exists():
            continue
        row = {"norm": norm, "lr_warmup": lr_warmup, "eps_warmup": eps_warmup, "seed": seed}
        row |= train_cell(setting.config(norm, lr_warmup, eps_warmup, seed), folder)
        print(json.dumps({key: value for key, value in row.items() if key != "epochs"}), flush=True)
        write_json(folder / "row.json", row)
    gather(setting, runs)


def gather(setting: Setting, runs: Path) -> None:
    """One JSON of the rows of all runs."""
    rows = [json.loads(done.read_text()) for done in sorted(runs.glob("*/row.json"))]
    config = setting.config("pre", 0, EPSILON_WARMUPS[0], 0)
    config["data"] = {key: value for key, value in config["data"].items() if key != "path"}
    used = versions(resolve_device("auto"))
    write_json(RESULTS / f"transformers-{setting.name}.json", {"config": config, "versions": used, "rows": rows})


def train_cell(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Errors, and the course of training; `diverged_at`: the epsilon at which the loss was no longer finite."""
    summary = train_afresh(config, folder)
    errors = {name: summary[name] for name in (*ERRORS, "diverged_at") if name in summary}
    return {**errors, "epochs": [course(epoch) for epoch in read_records(folder / "metrics.jsonl")]}


def course(epoch: dict[str, Any]) -> dict[str, Any]:
    """Of one epoch: errors on training images, and the input's mean radius relative to that before each ReLU."""
    errors = {name: epoch.get(name) for name in ("eps", "natural_error", "verified_error")}
    return {**errors, "tightness": [layer["tightness"] for layer in epoch["layers"]]}


def measure_cost(images: int = 64, repetitions: int = 5) -> None:
    """Processor seconds of a step, the median of a few, on one thread, and MACs; memory by the number of tokens."""
    torch.set_num_threads(1)
    rows = []
    for kind, (name, method) in itertools.product(("layer", "layer-no-variance", "batch"), STEPS.items()):
        gradients = []
        for compiled in (False, True):
            torch.manual_seed(0)
            model = build_model("vit", (1, 8, 8), 10, options={"norm_kind": kind, "pool": "flatten"})
            step = step_of(model, (1, 8, 8), images, method, images if compiled else None)
            with FlopCounterMode(display=False) if not compiled else nullcontext() as counter:
                step()  # compiles, too
            gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
            seconds = []
            for _ in range(repetitions):
                start = time.process_time()
                step()
                seconds.append(time.process_time() - start)
            macs = rows[-1]["macs"] if counter is None else counter.get_total_flops() // 2
            row = {"norm_kind": kind, "step": name, "compiled": compiled, "macs": macs}
            rows.append(row | {"seconds": statistics.median(seconds)})
        eager, found = gradients
        rows[-1]["gradient_differs_by"] = float((found - eager).norm() / eager.norm())
    memory = [
        {"tokens": tokens, **{name: peak_per_image(tokens, method) for name, method in REMEMBERED.items()}}
        for tokens in (16, 64, 256, 576)
    ]
    result = {"images": images, "versions": versions(), "rows": rows, "peak_bytes_per_image": memory}
    write_json(RESULTS / "transformers-cost.json", result)


def step_of(
    model: nn.Module, shape: tuple[int, int, int], images: int, method: Method, compile_for: int | None = None
) -> Callable[[], object]:
    """Computes the gradient of `method`'s loss on random images, at half of the radius."""
    x, labels = torch.rand(images, *shape), torch.arange(images) % 10
    step = GradientStep(BoundedModel(model, x), method, Regularization(0.0), compile_for=compile_for)
    at, phase = scheduled(DIGITS.eps / 2, 0.5), Phase.WARMUP if method.is_robust else Phase.NATURAL
    return lambda: step.backward(x, labels, at, phase)


def peak_per_image(tokens: int, method: Method, images: int = 1) -> float:
    """Most bytes that all tensors which a step makes take at a time, gradients of parameters among them."""
    side = 2 * math.isqrt(tokens)
    model = build_model("vit", (1, side, side), 10, options={"patch": 2})
    step = step_of(model, (1, side, side), images, method)
    with LiveBytes() as live:
        step()
    return live.peak / images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["initial", "train", "cost"])
    parser.add_argument("--data", type=Path, metavar="CIFAR", help="folder with train.npz and test.npz")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/transformers"))
    arguments = parser.parse_args()
    setting = cifar10(arguments.data) if arguments.data else DIGITS
    if arguments.what == "initial":
        measure_initial(setting)
    elif arguments.what == "cost":
        measure_cost()
    else:
        train_grid(setting, arguments.seeds, arguments.runs / setting.name)


if __name__ == "__main__":
    main()
