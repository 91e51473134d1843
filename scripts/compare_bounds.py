"""What each bound proves and costs, beside auto_LiRPA on the same images in the same process; and the fused loss.

    python scripts/compare_bounds.py methods --data CIFAR     # docs/results/methods.json
    python scripts/compare_bounds.py fusion                   # docs/results/fusion.json

CIFAR is a folder with train.npz and test.npz. The networks are trained on the way (runs/compare) and kept. Every row is
written as soon as it is known; a row that the file already has is not measured again.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from ablation import variant_config
from common import RESULTS
from torch import Tensor, nn

import certtrain
from certtrain.bounds import BoundedModel, linf_box
from certtrain.bounds.lirpa import LirpaModel
from certtrain.bounds.margins import proved
from certtrain.data import Split, load_dataset, to_float
from certtrain.models import build_model
from certtrain.runs.provenance import versions
from certtrain.runtime.files import write_json
from certtrain.training.method import Phase, scheduled
from certtrain.training.methods import IBP, CrownIBP
from certtrain.training.step import GradientStep

DIGITS_IMAGES = {"ibp": 200, "crown-ibp": 200, "crown": 20, "alpha-crown": 20}
CIFAR_IMAGES = {"ibp": 200, "crown-ibp": 200, "crown": 4, "alpha-crown": 2}  # auto_LiRPA: half a minute an image


ENGINES: tuple[tuple[str, Any, bool], ...] = (
    ("certtrain", BoundedModel, False),
    ("auto_LiRPA", LirpaModel, False),
    ("certtrain, as it is used", BoundedModel, True),  # no backward pass for a neuron that a cheaper bound decides
)


def compare_methods(data: Path, runs: Path, memory: float, at_once: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (int(memory * 2**30),) * 2)
    file = RESULTS / "methods.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    known = {(row["network"], row["method"], row["engine"]) for row in rows}
    for name, folder, split, eps, counts in trained_networks(data, runs):
        model = certtrain.load_model(folder)
        for method, count in counts.items():
            images, labels = to_float(split.images[:count]), split.labels[:count]
            for engine, make, intersect in ENGINES:
                if (name, method, engine) in known:
                    continue
                row = {"network": name, "eps": eps, "method": method, "engine": engine}
                try:
                    found = measure(make(model, images[:at_once]), images, labels, eps, method, at_once, intersect)
                except RuntimeError as error:
                    if "can't allocate memory" not in str(error):
                        raise
                    found = {"images": count, "failed": f"needs more than {memory:g} GiB"}
                rows.append(row | found)
                print(json.dumps(rows[-1]), flush=True)
                write_json(file, {"versions": versions(), "rows": rows})


def trained_networks(
    data: Path | None, runs: Path, names: Sequence[str] = ("digits", "cifar10-2", "cifar10-8")
) -> list[tuple[str, Path, Split, float, dict[str, int]]]:
    found = []
    if "digits" in names:
        train_unless_finished("digits", runs / "digits")
        found.append(("digits", runs / "digits", load_dataset("digits").test, 0.1, DIGITS_IMAGES))
    for numerator in (2, 8):
        folder = runs / f"cifar10-{numerator}"
        if folder.name not in names:
            continue
        config = variant_config(data, 0, initialization="ibp", batch_norm=True, regularizers=True)
        config["epsilon"]["max"] = numerator / 255
        train_unless_finished(config, folder)
        cifar = load_dataset("npz", path=data).test
        found.append((f"CIFAR-10, {numerator}/255", folder, cifar, numerator / 255, CIFAR_IMAGES))
    return found


def train_unless_finished(config: Any, folder: Path) -> None:
    if not (folder / "summary.json").exists():
        certtrain.train(config, folder, resume=True)


def measure(
    net: Any, images: Tensor, labels: Tensor, eps: float, method: str, at_once: int, intersect: bool
) -> dict[str, Any]:
    """Verified error by one method, raw or `intersect`ed, and the median seconds per image over portions."""
    holds, seconds = [], []
    for part in range(0, len(images), at_once):
        x, y = images[part : part + at_once], labels[part : part + at_once]
        with torch.no_grad():
            started = time.perf_counter()
            margins = net.margins(linf_box(x, eps), y, method, intersect=intersect)
            seconds.append((time.perf_counter() - started) / len(x))
        holds.append(proved(margins))
    error = 1 - torch.cat(holds).double().mean().item()
    found = {"images": len(images), "at_once": at_once, "verified_error": error}
    return found | {"seconds_per_image": statistics.median(seconds)}


def compare_fusion() -> None:
    """A fresh process for each: its peak memory is its own."""
    rows = []
    for classes in (10, 200):
        for form in ("ibp", "margins", "fused"):
            command = [sys.executable, __file__, "step", "--classes", str(classes), "--form", form]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            rows.append(json.loads(output.splitlines()[-1]))
            print(json.dumps(rows[-1]), flush=True)
            write_json(RESULTS / "fusion.json", {"versions": versions(), "rows": rows})


def one_step(classes: int, form: str, batch: int = 8, repeats: int = 5) -> dict[str, Any]:
    """Median seconds of a CROWN-IBP training step, and how much memory it took beyond the model and its batch."""
    torch.manual_seed(0)
    options = {"width": 8, "linear_width": 128}
    model: nn.Module = build_model("cnn7", (3, 32, 32), classes, mean=(0.5,) * 3, std=(0.25,) * 3, options=options)
    images, labels = torch.rand(batch, 3, 32, 32), torch.randint(0, classes, (batch,))
    method = IBP() if form == "ibp" else CrownIBP(loss_fusion=form == "fused")
    step = GradientStep(BoundedModel(model.train(), images[:1]), method)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(1 + repeats):
        started = time.perf_counter()
        step.backward(images, labels, scheduled(1 / 255, 0.25), Phase.WARMUP)
        seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"classes": classes, "form": form, "batch": batch, "seconds": statistics.median(seconds[1:]),
            "peak_mebibytes": round(peak / 1024)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("methods", "fusion", "step"))
    parser.add_argument("--data", type=Path, help="folder with train.npz and test.npz")
    parser.add_argument("--runs", type=Path, default=Path("runs/compare"))
    parser.add_argument("--memory", type=float, default=16, help="address space, GiB; what needs more has failed")
    parser.add_argument("--at-once", type=int, default=10, help="images in a portion")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--form", choices=("ibp", "margins", "fused"), default="fused")
    options = parser.parse_args()
    if options.part == "fusion":
        compare_fusion()
    elif options.part == "step":
        print(json.dumps(one_step(options.classes, options.form)))
    elif options.data is None:
        parser.error("--data is needed")
    else:
        compare_methods(options.data, options.runs, options.memory, options.at_once)


if __name__ == "__main__":
    main()
