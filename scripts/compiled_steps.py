"""What it saves that the graphs of compiled steps are rewritten on CPUs (certtrain/runtime/partitioning.py).

    python scripts/compiled_steps.py                     # docs/results/compiled_steps.json

One thread; for each network a step (forward and backward, during warmup) is compiled as PyTorch partitions it, with
bytes for masks, and with sums in stages as well, and the three take turns. Seconds are medians over the rounds;
gradients must be the same, bit for bit where sums are.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import RESULTS
from torch import Tensor

from certtrain.bounds import BoundedModel
from certtrain.models import build_model
from certtrain.runs.provenance import versions
from certtrain.runtime import compilation
from certtrain.runtime.allocation import keep_freed_memory
from certtrain.runtime.files import write_json
from certtrain.runtime.partitioning import CPUPartitioner, Rewrite, keep_masks_as_bytes, sum_channels_in_stages
from certtrain.training.method import Phase, Scheduled
from certtrain.training.step import GradientStep

SHAPE, CLASSES = (3, 32, 32), 10
NETWORKS: dict[str, tuple[str, dict[str, Any], int, int]] = {  # model, its options, batch, rounds
    "cnn-2layer, width 2": ("cnn-2layer", {"width": 2, "linear_width": 256, "batch_norm": True}, 128, 30),
    "CNN-7, width 8": ("cnn7", {"width": 8}, 128, 8),
    "CNN-7, width 64": ("cnn7", {"width": 64}, 64, 4),
}
VARIANTS: dict[str, Sequence[Rewrite]] = {
    "booleans": (),
    "bytes": (keep_masks_as_bytes,),
    "stages": (keep_masks_as_bytes, sum_channels_in_stages),
}


def measured(name: str, options: dict[str, Any], batch: int, rounds: int) -> dict[str, Any]:
    images = torch.rand(batch, *SHAPE, generator=torch.Generator().manual_seed(0))
    images = images.to(memory_format=torch.channels_last)  # as in training
    at = Scheduled(torch.tensor(8 / 255), torch.tensor(0.5), torch.tensor(0.5), torch.tensor(0))

    def prepared(rewrites: Sequence[Rewrite]) -> tuple[torch.nn.Module, GradientStep]:
        chosen = compilation.compiler_options
        compilation.compiler_options = lambda: {"custom_partitioner_fn": CPUPartitioner(*rewrites)} if rewrites else {}
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

    variants = {variant: prepared(rewrites) for variant, rewrites in VARIANTS.items()}
    gradients: dict[str, Tensor] = {}
    for variant, (model, step) in variants.items():
        seconds(model, step)  # compiles
        parts = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
        gradients[variant] = torch.cat(parts)
    assert torch.equal(gradients["booleans"], gradients["bytes"])
    assert (gradients["stages"] - gradients["bytes"]).norm() < 1e-5 * gradients["bytes"].norm()
    times = [{variant: seconds(*prepared) for variant, prepared in variants.items()} for _ in range(rounds)]
    return {variant: statistics.median(each[variant] for each in times) for variant in variants}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "compiled_steps.json")
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
