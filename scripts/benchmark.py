"""How fast a certified training step is, beside a natural one and the same step through auto_LiRPA.

    python scripts/benchmark.py                              # CNN-7 at full width, on the device at hand
    python scripts/benchmark.py --device cuda --batch 128 --rounds 30
    python scripts/benchmark.py --grow                       # also how time grows with batch, width and classes
    python scripts/benchmark.py --methods                    # instead: a step of each training method, in natural steps

One process, one run: the variants take turns, so that a machine that changes speed changes it for all of them, and each
figure is the median over the rounds; a ratio is the median of the rounds' ratios. Peak memory is what a step takes
beyond what is held between steps, on a CPU in a fresh process for each variant. The JSON in docs/results is complete
after every part; scripts/tables.py makes docs/results/benchmark.md of it. Training methods are compared in the same
way, eager steps with eager ones and compiled with compiled, each with its default options at full epsilon.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import RESULTS
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from certtrain.bounds import bounded_model
from certtrain.config.smoothing import PGPESection, RGSSection, SmoothingSection
from certtrain.data.vision import CIFAR10_MEAN, CIFAR10_STD
from certtrain.errors import MissingDependency
from certtrain.models import build_model
from certtrain.runs.build import resolve_device
from certtrain.runs.provenance import versions
from certtrain.runtime.allocation import keep_freed_memory
from certtrain.runtime.files import write_json
from certtrain.runtime.layout import layout_for
from certtrain.runtime.precision import training_precision
from certtrain.runtime.timing import now_on
from certtrain.training.method import Method, Phase, scheduled
from certtrain.training.methods import IBP, METHODS, CrownIBP
from certtrain.training.smoothing import smoothed
from certtrain.training.step import GradientStep, Statistics

GROWING = ["natural, eager", "certtrain, eager", "auto_LiRPA"]
COUNTED = ("natural, eager", "certtrain, eager")  # PyTorch's counter does not go with auto_LiRPA's tensors
Step = Callable[[], None]


@dataclass(frozen=True)
class Setting:
    device: torch.device
    width: int = 64
    classes: int = 10
    batch: int = 64
    rounds: int = 7
    phase: Phase = Phase.FULL


def makers_of(setting: Setting) -> dict[str, Callable[[], Step]]:
    """The variants by name: calling one gives its step, on a network of its own."""
    torch.manual_seed(0)
    images = torch.rand(setting.batch, 3, 32, 32, device=setting.device)
    labels = torch.randint(0, setting.classes, (setting.batch,), device=setting.device)

    def natural() -> Step:
        model, optimizer = network(setting)

        def step() -> None:
            with training_precision("float32", setting.device):  # as the others; cuDNN's own choice is TF32
                F.cross_entropy(model(images), labels).backward()
            finish(model, optimizer)

        return step

    def certified(backend: str = "native", **options: Any) -> Callable[[], Step]:
        def make() -> Step:
            precision, compiled = options.get("precision", "float32"), "compile_for" in options
            model, optimizer = network(setting, layout_for(precision, setting.device, compiled))
            gradient_step = GradientStep(bounded_model(model, images[:1], backend), **options)
            at = scheduled(8 / 255, 0.5, like=images)

            def step() -> None:
                gradient_step.backward(images, labels, at, setting.phase)
                finish(model, optimizer)

            return step

        return make

    compiled = {"compile_for": setting.batch}
    makers: dict[str, Callable[[], Step]] = {
        "natural, eager": natural,
        "certtrain, eager": certified(),
        "certtrain, compiled": certified(**compiled),
        "certtrain, compiled, bf16": certified(**compiled, precision="bf16"),
        "auto_LiRPA": certified("lirpa"),
    }
    if setting.device.type == "cuda":
        makers["certtrain, compiled, tf32"] = certified(**compiled, precision="tf32")
    return makers


def steps_of_methods(setting: Setting) -> dict[str, Step]:
    """A step of each training method, and of one with smoothing, eager and compiled."""
    torch.manual_seed(0)
    images = torch.rand(setting.batch, 3, 32, 32, device=setting.device)
    labels = torch.randint(0, setting.classes, (setting.batch,), device=setting.device)
    at = scheduled(8 / 255, 1.0, like=images)

    def of(
        compiled: bool, method: Method, smoothing: SmoothingSection | None = None, statistics: Statistics = "clean"
    ) -> Step:
        model, optimizer = network(setting, layout_for("float32", setting.device, compiled))
        compile_for = setting.batch if compiled else None
        plain = GradientStep(bounded_model(model, images[:1]), method, statistics=statistics, compile_for=compile_for)
        trained = plain if smoothing is None else smoothed(smoothing, plain)
        phase = setting.phase if method.is_robust else Phase.NATURAL

        def step() -> None:
            trained.backward(images, labels, at, phase)
            finish(model, optimizer)

        return step

    variants: dict[str, Callable[[bool], Step]] = {name: partial(of, method=kind()) for name, kind in METHODS.items()}
    variants |= {
        "ibp, center": partial(of, method=IBP(), statistics="center"),
        "crown-ibp, β = 0.5": partial(of, method=CrownIBP(beta=(1.0, 0.5))),
        "crown-ibp, β = 0.5, fused": partial(of, method=CrownIBP(beta=(1.0, 0.5), loss_fusion=True)),
        "ibp, rgs": partial(of, method=IBP(), smoothing=RGSSection()),
        "ibp, pgpe": partial(of, method=IBP(), smoothing=PGPESection()),
    }
    return {
        f"{name}, {how}": variant(compiled)
        for compiled, how in ((False, "eager"), (True, "compiled"))
        for name, variant in variants.items()
    }


def measure_methods(setting: Setting) -> list[dict[str, Any]]:
    steps = steps_of_methods(setting)
    for step in steps.values():  # warm-up, compilation included
        step()
    times = take_turns(steps, setting)
    rows = []
    for name, all_seconds in times.items():
        method, _, how = name.rpartition(", ")
        own, natural = ratio(all_seconds, times[f"natural, {how}"]), ratio(all_seconds, times["natural, eager"])
        rows.append(
            {
                "method": method,
                "compiled": how == "compiled",
                "batch": setting.batch,
                "width": setting.width,
                "seconds": statistics.median(all_seconds),
                "of_natural_alike": own,
                "of_natural_eager": natural,
                "all_seconds": all_seconds,
            }
        )
    return rows


def steps_of(setting: Setting, names: list[str] | None) -> dict[str, Step]:
    makers, steps = makers_of(setting), {}
    for name in names or makers:
        try:
            steps[name] = makers[name]()
        except MissingDependency as error:
            print(error)
    return steps


def operations_of(step: Step) -> float:
    """Floating-point operations of an eager step: those of its products."""
    with FlopCounterMode(display=False) as counter:
        step()
    return float(counter.get_total_flops())


def network(
    setting: Setting, layout: torch.memory_format = torch.contiguous_format
) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = build_model(
        "cnn7", (3, 32, 32), setting.classes, mean=CIFAR10_MEAN, std=CIFAR10_STD, options={"width": setting.width}
    )
    model.to(setting.device, memory_format=layout).train()
    return model, torch.optim.Adam(model.parameters(), lr=1e-5, fused=True)


def finish(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 10.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def seconds_of(step: Step, device: torch.device) -> float:
    started = now_on(device)
    step()
    return now_on(device) - started


def matrix_product_rate(device: torch.device) -> float:
    """Floating-point operations per second of a large float32 matrix product: the ceiling."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = torch.rand(2, size, size, device=device)
    times = [seconds_of(lambda: torch.mm(a, b), device) for _ in range(7)]
    return 2 * size**3 / statistics.median(times[2:])


def measure(setting: Setting, names: list[str] | None = None) -> list[dict[str, Any]]:
    steps, memory = steps_of(setting, names), {}
    operations = {name: operations_of(step) for name, step in steps.items() if name in COUNTED}
    for name, step in steps.items():  # warm-up, compilation included
        step()
        if setting.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(setting.device)
            held = torch.cuda.memory_allocated(setting.device)
        step()
        if setting.device.type == "cuda":
            memory[name] = torch.cuda.max_memory_allocated(setting.device) - held
    times = take_turns(steps, setting)
    rate = matrix_product_rate(setting.device)
    rows = []
    for name, all_seconds in times.items():
        seconds = statistics.median(all_seconds)
        work = operations.get("certtrain, eager" if name.startswith("certtrain") else name)
        rows.append(
            {
                "step": name,
                "batch": setting.batch,
                "width": setting.width,
                "classes": setting.classes,
                "seconds": seconds,
                "images_per_second": setting.batch / seconds,
                "of_natural": ratio(all_seconds, times.get("natural, eager")),
                "of_auto_lirpa": ratio(all_seconds, times.get("auto_LiRPA")),
                "of_matrix_product_rate": work and work / seconds / rate,
                "peak_bytes": memory.get(name),
                "all_seconds": all_seconds,
            }
        )
    return rows


def take_turns(steps: dict[str, Step], setting: Setting) -> dict[str, list[float]]:
    """Seconds of each step in each round."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for _ in range(setting.rounds):
        for name in order:
            times[name].append(seconds_of(steps[name], setting.device))
        order.reverse()
    return times


def cpu_memory(setting: Setting, name: str) -> int:
    """Peak bytes of a step, found in a fresh process."""
    size = ("--width", setting.width, "--batch", setting.batch, "--device", setting.device)
    command = [sys.executable, __file__, "--memory-of", name, *map(str, size)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def own_memory(setting: Setting, name: str) -> int:
    """Bytes by which this process grows for the second step, beyond what it holds after the first (Linux only)."""
    (step,) = steps_of(setting, [name]).values()
    step()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the compiler and the first step have freed goes back
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is resident now
    before = resident_bytes("VmHWM")
    step()
    return resident_bytes("VmHWM") - before


def resident_bytes(field: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def ratio(seconds: list[float], other: list[float] | None) -> float | None:
    return statistics.median(a / b for a, b in zip(seconds, other, strict=True)) if other else None


COLUMNS = ("step", "batch", "width", "classes", "seconds", "images_per_second", "of_natural", "of_auto_lirpa",
           "of_matrix_product_rate")  # fmt: skip
METHOD_COLUMNS = ("method", "compiled", "batch", "width", "seconds", "of_natural_alike", "of_natural_eager")


def show(rows: list[dict[str, Any]], columns: Sequence[str] = COLUMNS) -> None:
    table = Table()
    for column in columns:
        table.add_column(column.replace("_", " "), justify="left" if column == columns[0] else "right")
    for row in rows:
        table.add_row(*(f"{row[c]:.3g}" if isinstance(row[c], float) else str(row[c] or "–") for c in columns))
    Console(width=None if Console().is_terminal else 160).print(table)


def growth(setting: Setting) -> list[Setting]:
    rounds, batch, width = min(3, setting.rounds), setting.batch, setting.width
    return [
        *(replace(setting, rounds=rounds, batch=part) for part in (batch // 4, batch // 2, batch)),
        *(replace(setting, rounds=rounds, batch=batch // 4, width=part) for part in (width // 4, width // 2, width)),
        *(
            replace(setting, rounds=rounds, batch=batch // 4, width=width // 4, classes=classes)
            for classes in (10, 50, 200)
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--grow", action="store_true", help="also measure growth with batch, width and classes")
    parser.add_argument("--methods", action="store_true", help="measure the training methods instead")
    parser.add_argument("--no-memory", action="store_true", help="on a CPU, leave out peak memory: a process for each")
    parser.add_argument("--memory-of", metavar="STEP", help="only print what a step takes, in bytes")
    parser.add_argument("--out", type=Path, help="default: docs/results/benchmark-DEVICE.json")
    options = parser.parse_args()
    keep_freed_memory()  # as `certtrain train` does; for all variants
    device = resolve_device(options.device)
    setting = Setting(device, options.width, batch=options.batch, rounds=options.rounds)
    if options.memory_of:
        print(own_memory(setting, options.memory_of))
        return
    if options.methods:
        rows = measure_methods(setting)
        out = options.out or RESULTS / f"benchmark-methods-{device.type}.json"
        write_json(out, {"versions": versions(device), "rows": rows})
        show(rows, METHOD_COLUMNS)
        return
    out = options.out or RESULTS / f"benchmark-{device.type}.json"
    content: dict[str, Any] = {"versions": versions(device), "rows": measure(setting), "growth": []}
    write_json(out, content)
    show(content["rows"])
    if device.type == "cpu" and not options.no_memory:
        for row in content["rows"]:
            row["peak_bytes"] = cpu_memory(setting, row["step"])
            write_json(out, content)
    if options.grow:
        for changed in growth(setting):
            content["growth"] += measure(changed, GROWING)
            write_json(out, content)
        show(content["growth"])


if __name__ == "__main__":
    main()
