"""What each command does: it calls the library, and shows what that returns.

The library is imported inside the commands, so that `certtrain --help`, and a mistyped option, answer at once.
"""

from __future__ import annotations

import argparse
import math
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from certtrain.errors import CheckpointError, UsageError, optional_module

if TYPE_CHECKING:
    from torch import nn

    from certtrain.config import Config
    from certtrain.runtime.distributed import Ranks


def train_command(options: argparse.Namespace) -> int:
    from certtrain.runs.progress import Output
    from certtrain.runs.train import train
    from certtrain.runtime.allocation import keep_freed_memory
    from certtrain.runtime.distributed import is_first_process

    keep_freed_memory()
    console = Output(quiet=not is_first_process())
    config, overrides = options.config, options.overrides
    if options.resume and config is not None and "=" in config and not Path(config).exists():
        config, overrides = None, [config, *overrides]  # --resume --out DIR section.key=value
    run = train(
        config,
        options.out,
        device=options.device,
        resume=options.resume,
        overwrite=options.overwrite,
        overrides=overrides,
        trust=options.trust_model,
        console=console,
    )
    if run.interrupted_by == signal.SIGPIPE:
        raise BrokenPipeError
    if run.summary is None:
        return 128 + (run.interrupted_by or 0)
    show_results(console, run.summary["radii"])
    console.print(
        f"trained in {run.summary['train_seconds']:.0f} s; the network, and how it was made, is in {run.folder}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return 0


def _folder(run: Path) -> Path:
    """The run directory, where a file in it was named."""
    return run if run.is_dir() else run.parent


def _open(
    options: argparse.Namespace, overrides: Sequence[str] = (), ranks: Ranks | None = None
) -> tuple[nn.Module, Config]:
    """The network that was named, on its device, and its run's configuration."""
    from certtrain.config import load_config
    from certtrain.runs.checkpoint import load_model
    from certtrain.runs.train import resolve_device
    from certtrain.runtime.distributed import ALONE

    model = load_model(options.run, resolve_device(options.device, ranks or ALONE), trust=options.trust_model)
    file = _folder(options.run) / "config.yaml"
    if not file.is_file():
        raise CheckpointError(f"{_folder(options.run)} is not a run directory: it has no config.yaml")
    return model, load_config(file, [*options.overrides, *overrides])


def verify_command(options: argparse.Namespace) -> int:
    from certtrain.runs.directory import check_output, write_results
    from certtrain.runs.progress import Output
    from certtrain.runs.train import load_data, verify_run, versions
    from certtrain.runtime.distributed import joined
    from certtrain.runtime.files import write_json
    from certtrain.verification.certificates import write_certificates

    if options.radius is not None:
        return _verify_radii(options)
    folder = _folder(options.run)
    weights = folder / "model.safetensors" if options.run.is_dir() else options.run
    if options.certificates and weights.suffix != ".safetensors":
        raise UsageError(f"certificates are about a finished network, a model.safetensors, not {weights}")
    with joined() as ranks:
        with ranks.together():
            if ranks.is_first and options.certificates:
                check_output(options.certificates, options.run)
            if ranks.is_first and options.json:
                check_output(options.json, options.run, *filter(None, [options.certificates]), own="verify.json")
            model, config = _open(options, _verification_overrides(options), ranks)
        dataset = ranks.one_per_machine_first(lambda: load_data(config))
        results = verify_run(config, model, dataset, options.limit, ranks)
        if not ranks.is_first:
            return 0
    summaries = [result.summary() for result in results]
    show_results(Output(), summaries)
    if options.certificates:
        settings = config.model_dump(mode="json", exclude={"data": {"root", "path"}})  # where this machine keeps data
        write_certificates(options.certificates, results, dataset.test, weights, settings, versions())
        print(f"wrote {options.certificates}; certtrain check {options.certificates} --model {folder} proves it again")
    content = {**summaries[0], "model": str(options.run), "radii": summaries, "versions": versions()}
    if options.json:
        write_json(options.json, content)
    elif kept := write_results(folder / "verify.json", content):
        print(f"the earlier results, which were others, are kept in {kept}")
    return 0


def _verification_overrides(options: argparse.Namespace) -> list[str]:
    sound = options.sound or ("float32" if options.certificates else None)
    named = (("eps", options.eps), ("method", options.method), ("arithmetic", sound))
    return [f"verification.{key}='{value}'" for key, value in named if value]


def _verify_radii(options: argparse.Namespace) -> int:
    from certtrain.report.plots import errors_over_eps_png
    from certtrain.runs.directory import write_results
    from certtrain.runs.train import load_data, radii_of, versions
    from certtrain.runtime.files import write_atomically

    optional_module("matplotlib", "report")  # known now rather than after all proofs
    folder = _folder(options.run)
    model, config = _open(options, _verification_overrides(options))
    largest = 2 * max(config.test_radii) if options.radius is True else options.radius
    if largest <= 0:
        raise UsageError(f"--radius: the largest radius to try must be positive, not {largest}")
    content = radii_of(config, model, load_data(config), largest, limit=options.limit).summary()
    kept = write_results(folder / "radius.json", {**content, "model": str(options.run), "versions": versions()})
    curves = {
        "pgd": (content["pgd_eps"], content["pgd_error"]),
        "verified": (content["eps"], content["verified_error"]),
    }
    picture = errors_over_eps_png(content["natural_error"], curves)
    write_atomically(folder / "radius.png", lambda file: file.write(picture))
    shares = [f"{share:.0%} of the images: {_quantile(content['radii'], share):.5f}" for share in (0.25, 0.5, 0.75)]
    print("proved radius of at least " + ", ".join(shares))
    print(
        f"wrote {folder / 'radius.json'} and radius.png" + (f"; the earlier radii are kept in {kept}" if kept else "")
    )
    return 0


def _quantile(radii: Sequence[float], share: float) -> float:
    """The radius that this share of the images reaches; 0 where fewer are classified right."""
    ordered = sorted(radii, reverse=True)
    return max(0.0, ordered[max(0, math.ceil(share * len(ordered)) - 1)])


def check_command(options: argparse.Namespace) -> int:
    from certtrain.config import load_config
    from certtrain.runs.train import load_data
    from certtrain.verification.certificates import read_certificates
    from certtrain.verification.checker import SavedNetwork, check

    certificates = read_certificates(options.certificates)
    folder = _folder(options.model)
    network = SavedNetwork.read(folder / "model.safetensors")
    named = [f"data.name={options.dataset}"] if options.dataset else []
    test = load_data(load_config(folder / "config.yaml", [*named, *options.overrides])).test
    console = Console()
    counts = check(certificates, network, test.images.numpy(), test.labels.numpy(), console)
    verdicts = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    console.print(f"all {sum(counts.values())} certificates hold: {verdicts}", highlight=False)
    return 0


def export_command(options: argparse.Namespace) -> int:
    from certtrain.export.onnx import export_onnx
    from certtrain.export.vnnlib import export_vnnlib, open_images
    from certtrain.runs.checkpoint import load_architecture
    from certtrain.runs.directory import check_output
    from certtrain.runs.train import load_data

    if options.onnx is None and options.vnnlib is None:
        raise UsageError("say what to export: --onnx, or --vnnlib DIR")
    folder = _folder(options.run)
    if isinstance(options.onnx, Path):
        check_output(options.onnx, options.run, own="model.onnx")
    model, config = _open(options)
    if options.onnx is not None:
        file = folder / "model.onnx" if options.onnx is True else options.onnx
        export_onnx(model, load_architecture(folder)["image_shape"], file)
        print(f"wrote {file}")
    if options.vnnlib is not None:
        eps = config.epsilon.max if options.eps is None else options.eps
        result = export_vnnlib(options.vnnlib, config, model, load_data(config), eps, options.limit, options.timeout)
        count, images = len(open_images(result)), len(result.correct)
        print(f"wrote {options.vnnlib}: the network, and properties of {count} of {images} images open at {eps:.5f}")
    return 0


def report_command(options: argparse.Namespace) -> int:
    from certtrain.report.page import write_report
    from certtrain.runs.directory import check_output
    from certtrain.runs.train import load_data

    if options.out:
        check_output(options.out, options.run, own="report.html")
    model, config = _open(options)
    file = options.out or _folder(options.run) / "report.html"
    write_report(_folder(options.run), config, model, load_data(config), file, options.limit)
    print(f"wrote {file}")
    return 0


def config_command(options: argparse.Namespace) -> int:
    from certtrain.config.loading import load_config, runnable_configs

    if options.config is None:
        print("\n".join(runnable_configs()))
    else:
        print(load_config(options.config, options.overrides).to_yaml(), end="")
    return 0


def models_command(options: argparse.Namespace) -> int:
    from certtrain.models import MODELS
    from certtrain.training.cost import network_size

    table = Table(title=f"networks for {options.classes} classes of {'×'.join(map(str, options.input))} images")
    table.add_column("model")
    for column in ("parameters", "multiply-accumulates"):
        table.add_column(column, justify="right")
    for name in MODELS:
        try:
            size = network_size(name, options.input, options.classes)
            table.add_row(name, f"{size.parameters:,}", f"{size.macs:,}")
        except UsageError as error:
            table.add_row(name, "–", str(error))
    Console().print(table)
    return 0


def show_results(console: Console, results: Sequence[dict]) -> None:
    sound = f", sound in {results[0]['arithmetic']}" if results[0]["arithmetic"] else ""
    table = Table(title=f"{results[0]['images']} test images, bounds by {results[0]['method']}{sound}")
    for column in ("epsilon", "natural error", "PGD error", "verified error", "seconds"):
        table.add_column(column, justify="right")
    for result in results:
        errors = [f"{result[key]:.2%}" for key in ("natural_error", "pgd_error", "verified_error")]
        table.add_row(f"{result['eps']:.5f}", *errors, f"{result['seconds']:.1f}")
    console.print(table)
    if len(results[0]["stages"]) > 1:
        _show_stages(console, results)


def _show_stages(console: Console, results: Sequence[dict]) -> None:
    table = Table(title="what each method was asked, and proved")
    for column in ("epsilon", "method", "images", "proved", "seconds", "seconds per image"):
        table.add_column(column, justify="right")
    for result in results:
        for stage in result["stages"]:
            each = f"{stage['seconds'] / stage['images']:.2g}" if stage["images"] else "–"
            counts = (str(stage[key]) for key in ("images", "proved"))
            table.add_row(f"{result['eps']:.5f}", stage["method"], *counts, f"{stage['seconds']:.2f}", each)
    console.print(table)
