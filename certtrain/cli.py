"""certtrain train | verify | check | export | report | config | models."""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

import certtrain
from certtrain.errors import CerttrainError, CheckpointError, UsageError

if TYPE_CHECKING:
    from torch import nn

    from certtrain.config import Config
    from certtrain.data import Dataset

# Threads that wait for each other in a busy loop make small networks many times slower as soon as anything else runs on
# the machine. Read when torch is imported, which the commands do; the user's own setting wins.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 (failed), 2 (written wrong), 128 + n (ended by signal n)."""
    options = _parse(arguments)
    try:
        return options.command(options)
    except BrokenPipeError:  # whoever read the output, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (CerttrainError, OSError) as error:
        if options.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code if isinstance(error, CerttrainError) else 1
    except KeyboardInterrupt:
        return 130


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Overrides may follow options, which argparse leaves over."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if strangers := [word for word in rest if word.startswith("-") or "overrides" not in options]:
        parser.error(f"unrecognized arguments: {' '.join(strangers)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="certtrain", description="Train networks whose robustness is proved.")
    parser.add_argument("--version", action="version", version=f"certtrain {certtrain.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = _command(commands, "train", "train a network from a YAML config, and verify it", train_command)
    train.add_argument("config", help="a YAML file, or the name of a shipped one, such as digits")
    train.add_argument("overrides", nargs="*", metavar="section.key=value", help="change values of the config")
    train.add_argument("--out", type=Path, help="run directory (default: runs/NAME)")
    train.add_argument("--resume", action="store_true", help="continue the run in that directory")
    train.add_argument("--overwrite", action="store_true", help="replace the run in that directory")

    verify = _command(commands, "verify", "natural, PGD and verified error of a trained network", verify_command)
    _add_run(verify)
    verify.add_argument("--eps", help="one radius or several: 2/255,8/255 (default: those of the config)")
    verify.add_argument(
        "--method", help="bounds, each for what those before left open: ibp,crown-ibp,crown,alpha-crown"
    )
    verify.add_argument("--limit", type=_positive, help="only the first N test images")
    verify.add_argument(
        "--sound", metavar="ARITHMETIC", help="bounds that cover the rounding of float32, tf32, bf16 or float64"
    )
    verify.add_argument("--certificates", type=Path, metavar="FILE", help="write a Parquet file that `check` reads")
    verify.add_argument(
        "--radius",
        nargs="?",
        const=True,
        type=_radius,
        metavar="MAX",
        help="instead: the largest radius proved for each image, up to MAX (default: twice the largest tested)",
    )
    verify.add_argument("--json", type=Path, help="where to write the results (default: verify.json in the run)")

    check = _command(
        commands, "check", "prove certificates again, by an independent program", check_command, device=False
    )
    check.add_argument("certificates", type=Path, help="a Parquet file that `verify --certificates` wrote")
    check.add_argument("overrides", nargs="*", metavar="section.key=value", help="change values of the run's config")
    check.add_argument("--model", type=Path, required=True, metavar="RUN", help="the run directory they are about")
    check.add_argument("--dataset", metavar="NAME", help="where the images are read from (default: the run's data set)")

    export = _command(commands, "export", "write a trained network for other tools", export_command)
    _add_run(export)
    export.add_argument(
        "--onnx", nargs="?", type=Path, const=True, metavar="FILE", help="as ONNX (default: model.onnx in the run)"
    )
    export.add_argument("--vnnlib", type=Path, metavar="DIR", help="with a VNN-LIB property for each image left open")
    export.add_argument("--eps", type=_radius, help="radius of the properties (default: epsilon.max of the config)")
    export.add_argument("--limit", type=_positive, help="only the first N test images")
    export.add_argument("--timeout", type=_positive, default=300, help="of a property, in instances.csv (default: 300)")

    report = _command(commands, "report", "show a run as an HTML page", report_command)
    _add_run(report)
    report.add_argument("--out", type=Path, help="where to write the page (default: report.html in the run)")
    report.add_argument("--limit", type=_positive, default=200, help="how many test images to look at (default: 200)")

    config = _command(
        commands,
        "config",
        "a config with all its values, or the names of those there are",
        config_command,
        device=False,
    )
    config.add_argument("config", nargs="?", help="a YAML file, or the name of a shipped one; without it, their names")
    config.add_argument("overrides", nargs="*", metavar="section.key=value", help="change values of the config")

    models = _command(
        commands, "models", "the networks that can be named, and their size", models_command, device=False
    )
    models.add_argument("--input", type=_image_shape, default=(3, 32, 32), help="image shape (default: 3x32x32)")
    models.add_argument("--classes", type=_positive, default=10, help="number of classes (default: 10)")
    return parser


def _add_run(command: argparse.ArgumentParser) -> None:
    command.add_argument("run", type=Path, help="a run directory, or its model.safetensors or last.ckpt")
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help="change values of the run's config")


def _command(
    commands: argparse._SubParsersAction, name: str, text: str, run: object, device: bool = True
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text)
    command.set_defaults(command=run)
    if device:
        command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    command.add_argument("--debug", action="store_true", help="show tracebacks")
    return command


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def _radius(text: str) -> float:
    from certtrain.config import parse_radius

    try:
        return parse_radius(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _image_shape(text: str) -> tuple[int, ...]:
    sizes = text.lower().replace("×", "x").split("x")
    if len(sizes) != 3 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r} is not an image shape: write channels x height x width, as 3x32x32")
    return tuple(map(int, sizes))


def train_command(options: argparse.Namespace) -> int:
    from certtrain.run import train

    console = Console()
    run = train(
        options.config,
        options.out,
        device=options.device,
        resume=options.resume,
        overwrite=options.overwrite,
        overrides=options.overrides,
        console=console,
    )
    if run.summary is None:
        return 128 + (run.interrupted_by or 0)
    _show(console, run.summary["radii"])
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


def _open(options: argparse.Namespace, overrides: Sequence[str] = ()) -> tuple[nn.Module, Config]:
    """The network that was named, on its device, and its run's configuration."""
    from certtrain.checkpoint import load_model
    from certtrain.config import load_config
    from certtrain.run import resolve_device

    model = load_model(options.run, resolve_device(options.device))
    file = _folder(options.run) / "config.yaml"
    if not file.is_file():
        raise CheckpointError(f"{_folder(options.run)} is not a run directory: it has no config.yaml")
    return model, load_config(file, [*options.overrides, *overrides])


def verify_command(options: argparse.Namespace) -> int:
    from certtrain.certificates import write_certificates
    from certtrain.checkpoint import write_json
    from certtrain.run import load_data, verify_run, versions

    folder = _folder(options.run)
    weights = folder / "model.safetensors" if options.run.is_dir() else options.run
    if options.certificates and weights.suffix != ".safetensors":
        raise UsageError(f"certificates are about a finished network, a model.safetensors, not {weights}")
    overrides = []
    sound = options.sound or ("float32" if options.certificates else None)
    for key, value in (("eps", options.eps), ("method", options.method), ("arithmetic", sound)):
        if value:
            overrides.append(f"verification.{key}='{value}'")
    model, config = _open(options, overrides)
    dataset = load_data(config)
    if options.radius is not None:
        return _verify_radii(options, model, config, dataset)
    results = verify_run(config, model, dataset, limit=options.limit)
    if options.certificates:
        write_certificates(
            options.certificates, results, dataset.test, weights, config.model_dump(mode="json"), versions()
        )
    summaries = [result.summary() for result in results]
    _show(Console(), summaries)
    if options.certificates:
        print(f"wrote {options.certificates}; certtrain check {options.certificates} --model {folder} proves it again")
    content = {**summaries[0], "model": str(options.run), "radii": summaries, "versions": versions()}
    write_json(options.json or folder / "verify.json", content)
    return 0


def _verify_radii(options: argparse.Namespace, model: nn.Module, config: Config, dataset: Dataset) -> int:
    from certtrain.checkpoint import write_atomically, write_json
    from certtrain.plots import errors_over_eps_png
    from certtrain.run import radii_of, versions

    folder = _folder(options.run)
    largest = 2 * max(config.test_radii) if options.radius is True else options.radius
    if largest <= 0:
        raise UsageError(f"--radius: the largest radius to try must be positive, not {largest}")
    content = radii_of(config, model, dataset, largest, limit=options.limit).summary()
    write_json(folder / "radius.json", {**content, "model": str(options.run), "versions": versions()})
    curves = {
        "pgd": (content["pgd_eps"], content["pgd_error"]),
        "verified": (content["eps"], content["verified_error"]),
    }
    picture = errors_over_eps_png(content["natural_error"], curves)
    write_atomically(folder / "radius.png", lambda file: file.write(picture))
    shares = [f"{share:.0%} of the images: {_quantile(content['radii'], share):.5f}" for share in (0.25, 0.5, 0.75)]
    print("proved radius of at least " + ", ".join(shares))
    print(f"wrote {folder / 'radius.json'} and radius.png")
    return 0


def _quantile(radii: Sequence[float], share: float) -> float:
    """The radius that this share of the images reaches; 0 where fewer are classified right."""
    ordered = sorted(radii, reverse=True)
    return max(0.0, ordered[max(0, math.ceil(share * len(ordered)) - 1)])


def check_command(options: argparse.Namespace) -> int:
    from certtrain.certificates import read_certificates
    from certtrain.checker import SavedNetwork, check
    from certtrain.config import load_config
    from certtrain.run import load_data

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
    from certtrain.checkpoint import load_architecture
    from certtrain.export import export_onnx, export_vnnlib, open_images
    from certtrain.run import load_data

    if options.onnx is None and options.vnnlib is None:
        raise UsageError("say what to export: --onnx, or --vnnlib DIR")
    folder = _folder(options.run)
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
    from certtrain.html_report import write_report
    from certtrain.run import load_data

    model, config = _open(options)
    file = options.out or _folder(options.run) / "report.html"
    write_report(_folder(options.run), config, model, load_data(config), file, options.limit)
    print(f"wrote {file}")


def config_command(options: argparse.Namespace) -> int:
    from certtrain.config import load_config, runnable_configs

    if options.config is None:
        print("\n".join(runnable_configs()))
    else:
        print(load_config(options.config, options.overrides).to_yaml(), end="")
    return 0


def models_command(options: argparse.Namespace) -> int:
    from certtrain.cost import network_size
    from certtrain.errors import UsageError
    from certtrain.models import MODELS

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


def _show(console: Console, results: Sequence[dict]) -> None:
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


if __name__ == "__main__":
    sys.exit(main())
