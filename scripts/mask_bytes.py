"""What it saves that compiled steps on CPUs keep bytes in place of booleans (certtrain/runtime/partitioning.py).

    python scripts/mask_bytes.py                     # docs/results/mask_bytes.json

One thread; for each network a step (forward and backward, during warmup) is compiled with PyTorch's own partition and
with certtrain's, and the two take turns. Seconds are medians over the rounds; gradients must be the same, bit for bit.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from certtrain.bounds import BoundedModel
from certtrain.models import build_model
from certtrain.runs.provenance import versions
from certtrain.runtime import compilation
from certtrain.runtime.allocation import keep_freed_memory
from certtrain.runtime.files import write_json
from certtrain.training.method import Phase, Scheduled
from certtrain.training.step import GradientStep

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
SHAPE, CLASSES = (3, 32, 32), 10
NETWORKS: dict[str, tuple[str, dict[str, Any], int, int]] = {  # model, its options, batch, rounds
    "cnn-2layer, width 2": ("cnn-2layer", {"width": 2, "linear_width": 256, "batch_norm": True}, 128, 30),
    "CNN-7, width 8": ("cnn7", {"width": 8}, 128, 8),
    "CNN-7, width 64": ("cnn7", {"width": 64}, 64, 4),
}


def measured(name: str, options: dict[str, Any], batch: int, rounds: int) -> dict[str, Any]:
    images = torch.rand(batch, *SHAPE, generator=torch.Generator().manual_seed(0))
    images = images.to(memory_format=torch.channels_last)  # as in training
    at = Scheduled(torch.tensor(8 / 255), torch.tensor(0.5), torch.tensor(0.5), torch.tensor(0))

    def prepared(bytes_for_masks: bool) -> tuple[torch.nn.Module, GradientStep]:
        chosen = compilation.compiler_options
        compilation.compiler_options = chosen if bytes_for_masks else dict
        try:
            torch.manual_seed(0)
            model = build_model(name, SHAPE, CLASSES, options=options).train().to(memory_format=torch.channels_last)
            return model, GradientStep(BoundedModel(model, torch.zeros(1, *SHAPE)), compile_for=batch)
        finally:
            compilation.compiler_options = chosen

    def seconds(model: torch.nn.Module, step: GradientStep) -> float:
        model.zero_grad(set_to_none=True)
        started = time.perf_counter()
        step.backward(images, torch.arange(batch) % CLASSES, at, Phase.WARMUP)
        return time.perf_counter() - started

    variants = {"booleans": prepared(False), "bytes": prepared(True)}
    gradients: dict[str, list[Tensor]] = {}
    for variant, (model, step) in variants.items():
        seconds(model, step)  # compiles
        gradients[variant] = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    assert all(map(torch.equal, *gradients.values()))
    times = [{variant: seconds(*prepared) for variant, prepared in variants.items()} for _ in range(rounds)]
    return {variant: statistics.median(each[variant] for each in times) for variant in variants}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "mask_bytes.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    rows = []
    for network, (name, settings, batch, rounds) in NETWORKS.items():
        rows.append({"network": network, "batch": batch, "rounds": rounds, **measured(name, settings, batch, rounds)})
        print(rows[-1], flush=True)
        write_json(options.out, {"versions": versions(), "rows": rows})


if __name__ == "__main__":
    main()
