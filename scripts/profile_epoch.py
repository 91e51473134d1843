"""Where an epoch's time goes, inside the training step or beside it; and how it grows with the number of images.

    python scripts/profile_epoch.py --data CIFAR      # docs/results/profile.json

Real epochs of `certtrain.train` at the scale of scripts/ablation.py, with a checkpoint after every one of them. CIFAR
is a folder with train.npz and test.npz. The library is watched from outside: a part's time is that between call and
return, less that of the parts it calls, and the parts add up to the whole. scripts/tables.py makes a table of it.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from ablation import variant_config
from common import RESULTS
from torch import nn

import certtrain
from certtrain.runs.build import epoch_batches, resolve_device
from certtrain.runs.callbacks import Recorder
from certtrain.runs.provenance import versions
from certtrain.runtime.files import write_json
from certtrain.training.step import GradientStep
from certtrain.training.trainer import Trainer

SIZES = (1280, 2560, 5120)  # whole batches
STEP = ("forward and backward", "gradient clipping", "optimizer")


class Stopwatch:
    """Seconds spent in each named part, without those of the parts inside it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._running: list[str] = []
        self._since = 0.0

    def _switch(self) -> None:
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self._switch()
            self._running.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._switch()
                self._running.pop()

        return call

    def timed_iterator(self, part: str, function: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        """For a function whose work is done as its result is iterated over."""

        def call(*args: Any, **kwargs: Any) -> Iterator[Any]:
            iterator = self.timed(part, function)(*args, **kwargs)
            return iter(self.timed(part, lambda: next(iterator, None)), None)

        return call


def profile(config: dict[str, Any]) -> dict[str, float]:
    """Seconds of a run's epochs by part."""
    watch, adam = Stopwatch(), torch.optim.Adam
    parts = [
        (Trainer, "run", "the loop itself"),
        (GradientStep, "backward", STEP[0]),
        (nn.utils, "clip_grad_norm_", STEP[1]),
        (adam, "step", STEP[2]),
        (adam, "zero_grad", STEP[2]),
        (Recorder, "after_step", "progress, signals"),
        (Recorder, "after_epoch", "layer statistics, logs"),
        (Recorder, "save", "checkpoint"),
    ]
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        stack.enter_context(patch("certtrain.runs.build.epoch_batches", watch.timed_iterator("batches", epoch_batches)))
        for owner, name, part in parts:
            stack.enter_context(patch.object(owner, name, watch.timed(part, getattr(owner, name))))
        certtrain.train(config, Path(folder) / "run")
    return dict(watch.seconds)


def seconds_by_epoch(config: dict[str, Any], images: int) -> list[float]:
    """Of epochs at full epsilon, the first left out, in which the machine warms up."""
    config = {**config, "data": {**config["data"], "limit": images}, "epsilon": {"max": 8 / 255}}
    with tempfile.TemporaryDirectory() as folder:
        certtrain.train(config, Path(folder) / "run")
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    ends = [json.loads(line)["seconds"] for line in lines]
    return [after - before for before, after in itertools.pairwise(ends)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.npz and test.npz")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--out", type=Path, default=RESULTS / "profile.json")
    options = parser.parse_args()
    config = variant_config(options.data, 0, initialization="ibp", batch_norm=True, regularizers=True)
    config["training"] |= {"epochs": options.epochs, "checkpoint_seconds": 0.0}
    config["epsilon"]["warmup_epochs"] = options.epochs // 2
    config["optimizer"]["milestones"] = []
    config["verification"] |= {"limit": 1, "pgd_steps": 0}
    seconds = profile(config)
    whole = sum(seconds.values())
    rows = [{"part": part, "seconds": taken, "share": taken / whole} for part, taken in seconds.items()]
    rows.sort(key=lambda row: -row["seconds"])
    inside = sum(row["share"] for row in rows if row["part"] in STEP)
    sizes = [{"images": size, "seconds_by_epoch": seconds_by_epoch(config, size)} for size in SIZES]
    del config["data"]["path"]
    content = {
        "versions": versions(resolve_device("auto")),
        "config": config,
        "inside_the_step": inside,
        "rows": rows,
        "sizes": sizes,
    }
    write_json(options.out, content)
    for row in rows:
        print(f"{row['part']:24} {row['seconds']:8.2f} s {row['share']:7.2%}")
    for row in sizes:
        print(f"{row['images']:6} images: " + ", ".join(f"{value:.2f}" for value in row["seconds_by_epoch"]) + " s")
    print(f"inside the step: {inside:.1%}")


if __name__ == "__main__":
    main()
