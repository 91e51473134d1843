"""Whether a device computes what a CPU does: bounds, training steps, and runs that are repeated and resumed.

    python scripts/compare_devices.py --device cuda          # docs/results/devices-cuda.json

Bounds by every method, and the loss and gradient of every training method, are compared with those of the CPU in
float64, in the largest difference relative to the largest value; beside them stands what float32 on the CPU is off by,
which is what to expect. Two short runs of one seed, and one that is interrupted and resumed, are compared bit for bit.
A row that the file has is not measured again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import RESULTS
from rich.console import Console
from torch import Tensor

import certtrain
from certtrain.bound_methods import METHODS
from certtrain.bounds import BoundedModel, linf_box
from certtrain.models import build_model
from certtrain.runs.build import resolve_device
from certtrain.runs.provenance import versions
from certtrain.runtime.files import write_json
from certtrain.runtime.precision import full_precision
from certtrain.training.method import Phase, scheduled
from certtrain.training.methods import METHODS as TRAINING_METHODS
from certtrain.training.step import GradientStep

SHAPE, CLASSES, IMAGES, EPS = (3, 8, 8), 10, 8, 2 / 255

RUN = {"training.epochs": 3, "epsilon.warmup_epochs": 1, "optimizer.milestones": [], "data.limit": 256,
       "model.options.width": 4, "verification.limit": 64}  # fmt: skip


def images_and_labels(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(0)
    images = torch.rand(IMAGES, *SHAPE, generator=drawn, dtype=torch.float64)
    return images.to(device, dtype), (torch.arange(IMAGES) % CLASSES).to(device)


def network(device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_model("cnn7", SHAPE, CLASSES, options={"width": 4, "linear_width": 16}).to(device, dtype)


def bounds(method: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    images, labels = images_and_labels(device, dtype)
    with torch.no_grad(), full_precision():
        net = BoundedModel(network(device, dtype).eval(), images[:1])
        return net.margins(linf_box(images, EPS), labels, method)


def gradient(method: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Of one step in the middle of warmup, all parameters behind each other."""
    images, labels = images_and_labels(device, dtype)
    model = network(device, dtype).train()
    step = GradientStep(BoundedModel(model, images[:1]), TRAINING_METHODS[method]())
    step.backward(images, labels, scheduled(EPS, 0.5, like=images), Phase.WARMUP)
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def difference(found: Tensor, exact: Tensor) -> float:
    """The largest, relative to the largest value."""
    return float((found.cpu().double() - exact).abs().max() / exact.abs().max())


def repeated(device: str) -> dict[str, bool]:
    """Whether a run's weights are those of the same run again, and of one that is interrupted and resumed."""

    class Interruption(certtrain.Observer):
        def after_step(self, trainer: Any) -> bool:
            return trainer.step == trainer.steps_per_epoch + 1

    quiet = Console(quiet=True)
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / part for part in ("once", "again", "resumed")]
        for folder in folders:
            pause = [Interruption()] if folder.name == "resumed" else []
            run = certtrain.train("digits", folder, device=device, overrides=RUN, callbacks=pause, console=quiet)
            stopped_too(run)
        stopped_too(certtrain.train(None, folders[2], device=device, resume=True, console=quiet))
        once, *others = [(folder / "model.safetensors").read_bytes() for folder in folders]
    return {"the same run again": others[0] == once, "interrupted and resumed": others[1] == once}


def stopped_too(run: certtrain.Run) -> None:
    """Ctrl-C, which a run takes as its own, is meant for all of them."""
    if run.interrupted_by is not None:
        raise KeyboardInterrupt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="default: docs/results/devices-DEVICE.json")
    options = parser.parse_args()
    device, cpu = resolve_device(options.device), torch.device("cpu")
    out = options.out or RESULTS / f"devices-{device.type}.json"
    content: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    content |= {"versions": versions(device), "device": str(device)}
    rows = content.setdefault("rows", [])
    known = {(row["what"], row["method"]) for row in rows}
    robust = [name for name, method in TRAINING_METHODS.items() if method.is_robust]
    for what, compute, methods in (("bounds", bounds, METHODS), ("gradient", gradient, robust)):
        for method in methods:
            if (what, method) in known:
                continue
            exact = compute(method, cpu, torch.float64)
            off = {place.type: difference(compute(method, place, torch.float32), exact) for place in (cpu, device)}
            rows.append({"what": what, "method": method, "off": off[device.type], "off_on_cpu": off["cpu"]})
            print(f"{what} {method}: {device.type} {off[device.type]:.2g}, cpu {off['cpu']:.2g}")
            write_json(out, content)
    runs = content["bit_for_bit"] = repeated(options.device)
    print("bit for bit: " + ", ".join(f"{name} {same}" for name, same in runs.items()))
    write_json(out, content)


if __name__ == "__main__":
    main()
