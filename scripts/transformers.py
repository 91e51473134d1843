"""Do Pre-LN transformers need less warmup than Post-LN ones in certified training, too?

    python scripts/transformers.py initial              # gradients and radii before training; a minute
    python scripts/transformers.py train --seeds 0 1 2  # the grid; runs that are there already are kept
    python scripts/transformers.py cost                 # of a certified step and a natural one
    python scripts/transformers.py plot                 # of what there is

Networks are small, on digits, so that a CPU trains the grid in an hour or two. JSON and plots go to docs/results.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from ablation import RESULTS
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import certtrain
from certtrain.bounds import BoundedModel, linf_box
from certtrain.data import load_dataset, to_float
from certtrain.errors import DivergedError
from certtrain.initialization import initialize_
from certtrain.models import build_model
from certtrain.runs.provenance import versions
from certtrain.runtime.files import write_json

EPSILON = 0.05
NORMS = ("pre", "post", "none")
LEARNING_RATE_WARMUPS = (0, 1, 5)  # epochs
EPSILON_WARMUPS = (7, 3)
DEEP = 6  # layers, where nothing is trained


def options(norm: str, **more: Any) -> dict[str, Any]:
    return {"norm": norm, "norm_kind": "layer", "pool": "flatten", "width": 32, **more}


def config_of(norm: str, lr_warmup: int, eps_warmup: int, seed: int) -> dict[str, Any]:
    return {
        "seed": seed,
        "data": {"name": "digits"},
        "model": {"name": "vit", "options": options(norm)},
        "epsilon": {"max": EPSILON, "start_epoch": 3, "warmup_epochs": eps_warmup},
        "training": {"epochs": 15, "batch_size": 32, "checkpoint_seconds": 1e9},
        "optimizer": {"lr": 0.002, "warmup_epochs": lr_warmup, "milestones": [11, 13]},
        "verification": {"pgd_steps": 10, "pgd_restarts": 1},
    }


def measure_initial(images: int = 64, seeds: int = 3, eps: float = 1e-3) -> None:
    """By block: gradient norm of the MLP's second layer, of both losses, and mean radius before the MLP's ReLU."""
    train = load_dataset("digits").train
    x, labels = to_float(train.images[:images]), train.labels[:images]
    rows = []
    for norm, scheme in itertools.product(NORMS, ("ibp", "xavier")):
        for seed in range(seeds):
            torch.manual_seed(seed)
            model = initialize_(build_model("vit", (1, 8, 8), 10, options=options(norm, depth=DEEP)), scheme)
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
            start = bounds.affine_input.radius.mean()
            row["radii"] = [(box.radius.mean() / start).item() for box in bounds.relu_inputs]
            rows.append(row)
    write_json(
        RESULTS / "transformers-initial.json",
        {"images": images, "eps": eps, "depth": DEEP, "versions": versions(), "rows": rows},
    )


def train_grid(seeds: list[int], runs: Path) -> None:
    for seed, eps_warmup, lr_warmup, norm in itertools.product(seeds, EPSILON_WARMUPS, LEARNING_RATE_WARMUPS, NORMS):
        file = runs / f"{norm}-{lr_warmup}-{eps_warmup}-{seed}.json"
        if not file.exists():
            row = {"norm": norm, "lr_warmup": lr_warmup, "eps_warmup": eps_warmup, "seed": seed}
            row |= train_once(config_of(norm, lr_warmup, eps_warmup, seed), runs / file.stem)
            print(json.dumps({key: value for key, value in row.items() if key != "radii"}), flush=True)
            runs.mkdir(parents=True, exist_ok=True)
            write_json(file, row)
        rows = [json.loads(done.read_text()) for done in sorted(runs.glob("*.json"))]
        example = config_of("pre", 0, EPSILON_WARMUPS[0], 0)
        write_json(RESULTS / "transformers.json", {"config": example, "versions": versions(), "rows": rows})


def train_once(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Errors, and by epoch the mean radius before each ReLU; `diverged_at`: the epsilon at which the loss was lost."""
    try:
        summary = certtrain.train(config, folder, overwrite=True).summary
    except DivergedError as error:
        return {"diverged_at": error.eps}
    epochs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        **{name: summary[name] for name in ("natural_error", "pgd_error", "verified_error")},
        "radii": [[layer["radius"] for layer in epoch["layers"]] for epoch in epochs],
    }


def measure_cost(images: int = 64, repetitions: int = 5) -> None:
    """MACs, and processor seconds, the median of a few, of one loss and its gradient."""
    x, labels = torch.rand(images, 1, 8, 8), torch.arange(images) % 10
    rows = []
    for kind in ("layer", "layer-no-variance", "batch"):
        model = build_model("vit", (1, 8, 8), 10, options={"norm_kind": kind, "pool": "flatten"})
        net = BoundedModel(model, x)

        def natural(model: torch.nn.Module = model) -> Tensor:
            return F.cross_entropy(model(x), labels)

        def certified(net: BoundedModel = net) -> Tensor:
            return F.cross_entropy(-net.margins_of(net.ibp(linf_box(x, EPSILON), x), labels), labels)

        for name, loss in (("natural", natural), ("certified", certified)):
            with FlopCounterMode(display=False) as counter:
                loss().backward()
            seconds = []
            for _ in range(repetitions):
                start = time.process_time()
                loss().backward()
                seconds.append(time.process_time() - start)
            macs = counter.get_total_flops() // 2
            rows.append({"norm_kind": kind, "step": name, "macs": macs, "seconds": statistics.median(seconds)})
    write_json(RESULTS / "transformers-cost.json", {"images": images, "versions": versions(), "rows": rows})


def plot_initial() -> None:
    from matplotlib import pyplot

    initial = json.loads((RESULTS / "transformers-initial.json").read_text())["rows"]
    figure, panels = pyplot.subplots(1, 3, figsize=(13, 3.6))
    for panel, (name, title) in zip(
        panels,
        [
            ("natural_gradients", "gradient norm, natural loss"),
            ("certified_gradients", "gradient norm, certified loss"),
            ("radii", "radius, relative to the input's"),
        ],
        strict=True,
    ):
        for norm, scheme in itertools.product(NORMS, ("ibp", "xavier")):
            values = [row[name] for row in initial if (row["norm"], row["initialization"]) == (norm, scheme)]
            mean = Tensor(values).mean(0)
            panel.semilogy(range(1, len(mean) + 1), mean, "-o" if scheme == "ibp" else "--x", label=f"{norm}, {scheme}")
        panel.set_xlabel("block")
        panel.set_title(title)
    panels[-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(RESULTS / "transformers-initial.png", dpi=110)


def plot_grid() -> None:
    from matplotlib import pyplot

    rows = json.loads((RESULTS / "transformers.json").read_text())["rows"]
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 3.6), sharey=True)
    for panel, eps_warmup in zip(panels, EPSILON_WARMUPS, strict=True):
        for norm in NORMS:
            points = [
                (row["lr_warmup"], 100 * row.get("verified_error", 1.0))
                for row in rows
                if (row["norm"], row["eps_warmup"]) == (norm, eps_warmup)
            ]
            means = {at: [value for lr, value in points if lr == at] for at in LEARNING_RATE_WARMUPS}
            line = {at: sum(values) / len(values) for at, values in means.items() if values}
            panel.plot(line.keys(), line.values(), "-o", label=norm)
        panel.set_xlabel("epochs of warmup of the learning rate")
        panel.set_title(f"epsilon grows for {eps_warmup} epochs")
    panels[0].set_ylabel("verified error, %")
    panels[0].legend()
    figure.tight_layout()
    figure.savefig(RESULTS / "transformers.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["initial", "train", "cost", "plot"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/transformers"))
    arguments = parser.parse_args()
    if arguments.what == "initial":
        measure_initial()
    elif arguments.what == "cost":
        measure_cost()
    elif arguments.what == "train":
        train_grid(arguments.seeds, arguments.runs)
    else:
        import matplotlib

        matplotlib.use("Agg")
        plot_initial()
        if (RESULTS / "transformers.json").exists():
            plot_grid()


if __name__ == "__main__":
    main()
