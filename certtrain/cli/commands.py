"""The commands about one run, or none: the options of each, and what it does: it calls the library, and shows that.

Options, paths and configurations are checked first, and only then is the library imported that needs torch, so that
whatever was mistyped is answered at once.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from rich.table import Table

from certtrain.cli import completion, values
from certtrain.cli.named_run import config_of, folder_of, open_network, require_data, require_held_out
from certtrain.cli.options import Subparsers, add_command, refuse, take_config, take_run, take_trust
from certtrain.cli.studies import report_study
from certtrain.cli.tables import hints, show_forgetting, show_results
from certtrain.errors import READER_LEFT, CheckpointError, UsageError
from certtrain.runs.files import ONNX, RAW_WEIGHTS, REPORT, has_traces_of_run, holds_runs
from certtrain.runtime.console import Output, tell
from certtrain.runtime.device import check_device_name
from certtrain.runtime.launch import is_first_process, launched

REPORTED = 200  # images that a report looks at


def add_train(subparsers: Subparsers) -> None:
    about = "train a network from a YAML config, and verify it"
    command = add_command(subparsers, "train", about, train_command, shared=True)
    take_config(command, "a YAML file, or the name of a shipped one, such as digits; to resume, a run directory")
    command.add_argument("--out", type=values.path, help="run directory (default: runs/NAME)")
    existing = command.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="continue the run in that directory")
    existing.add_argument("--overwrite", action="store_true", help="replace the run in that directory")
    take_trust(command)


def train_command(options: argparse.Namespace) -> int:
    if not launched():  # ranks fail together, inside
        _check_training(options)

    from certtrain.config.loading import load_config
    from certtrain.runs.train import train
    from certtrain.runtime.allocation import keep_freed_memory

    keep_freed_memory()
    console = Output(quiet=not is_first_process())
    config, overrides = _asked(options)
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
    if run.interrupted_by == READER_LEFT:
        raise BrokenPipeError
    if run.summary is None:
        return 128 + (run.interrupted_by or 0)
    show_results(console, run.summary["radii"], run.summary["validation"], run.summary["split"])
    if raw := run.summary.get("networks", {}).get(RAW_WEIGHTS):
        tell(console, f"the weights above are averaged; those after the last step ({RAW_WEIGHTS}):")
        show_results(console, raw["radii"], raw["validation"], run.summary["split"])
    if "settings" in run.summary.get("start", {}):
        show_forgetting(console, run.summary["start"])
    for line in hints(load_config(run.summary["config"]), run.summary):
        tell(console, line)
    tell(
        console,
        f"trained in {run.summary['train_seconds']:.0f} s; the network, and how it was made, is in {run.folder}",
    )
    return 0


def _check_training(options: argparse.Namespace) -> None:
    """Whatever can be told without torch is told now."""
    from certtrain.runs.request import Request

    config, overrides = _asked(options)
    check_device_name(options.device)
    request = Request.of(config, options.out, options.resume, options.overwrite, overrides)
    stored = request.stored()
    asked = stored.config if stored else request.config
    assert asked is not None  # a request without either is refused
    require_data(asked)
    if stored is None and asked.start_from is not None:
        path = asked.start_from.place
        if not path.exists():
            raise CheckpointError(f"start_from: there is no run directory or file {path}")


def _asked(options: argparse.Namespace) -> tuple[str | None, list[str]]:
    """The config and the overrides; with --resume --out DIR the first override may stand in the config's place."""
    config, overrides = options.config, options.overrides
    if options.resume and config is not None and "=" in config and not os.path.exists(config):
        return None, [config, *overrides]
    return config, overrides


def add_export(subparsers: Subparsers) -> None:
    command = add_command(subparsers, "export", "write a trained network for other tools", export_command)
    take_run(command)
    command.add_argument(
        "--onnx",
        nargs="?",
        type=values.path,
        const=True,
        metavar="FILE",
        help="as ONNX (default: model.onnx in the run)",
    )
    command.add_argument(
        "--vnnlib", type=values.path, metavar="DIR", help="with a VNN-LIB property for each unknown image"
    )
    command.add_argument(
        "--eps", type=values.radius, help="radius of the properties (default: epsilon.max of the config)"
    )
    command.add_argument("--limit", type=values.positive, help="only the first N test images")
    command.add_argument("--timeout", type=values.positive, help="of a property, in instances.csv (default: 300)")


def export_command(options: argparse.Namespace) -> int:
    if options.onnx is None and options.vnnlib is None:
        raise UsageError("say what to export: --onnx, or --vnnlib DIR")
    if options.vnnlib is None:
        refuse(options, "--onnx alone", "eps", "limit", "timeout")
    config = config_of(options, options.run)
    require_held_out(config, options.run)

    from certtrain.export.onnx import export_onnx
    from certtrain.export.vnnlib import export_vnnlib, unknown_images
    from certtrain.runs.build import load_data
    from certtrain.runs.checkpoint import load_architecture
    from certtrain.runs.directory import check_output

    folder = folder_of(options.run)
    file = folder / ONNX if options.onnx is True else options.onnx
    if file is not None:
        check_output(file, options.run, own=ONNX)
    model = open_network(options, config)
    if file is not None:
        export_onnx(model, load_architecture(folder)["image_shape"], file)
        print(f"wrote {file}")
    if options.vnnlib is not None:
        eps = config.epsilon.max if options.eps is None else options.eps
        timeout = 300 if options.timeout is None else options.timeout
        result = export_vnnlib(options.vnnlib, config, model, load_data(config), eps, options.limit, timeout)
        count, images = len(unknown_images(result)), len(result.correct)
        print(f"wrote {options.vnnlib}: the network, and properties of {count} of {images} images at {eps:.5f}")
    return 0


def add_report(subparsers: Subparsers) -> None:
    command = add_command(subparsers, "report", "show a run, or a study, as an HTML page", report_command)
    take_run(command)
    command.add_argument("--out", type=values.path, help="where to write the page (default: report.html in the run)")
    looked_at = f"how many test images to look at (default: {REPORTED})"
    command.add_argument("--limit", type=values.positive, help=looked_at)


def report_command(options: argparse.Namespace) -> int:
    from certtrain.runs.directory import check_output, stored_config

    if options.run.is_dir() and not has_traces_of_run(options.run) and holds_runs(options.run):
        return report_study(options)
    config = config_of(options, options.run)
    if config.test_radii != stored_config(folder_of(options.run)).test_radii:
        raise UsageError("a report is at the radius of the run's summary: leave epsilon and verification.eps alone")
    require_held_out(config, options.run)
    require_data(config)

    from certtrain.report.page import write_report
    from certtrain.runs.build import load_data

    file = options.out or folder_of(options.run) / REPORT
    check_output(file, options.run, own=REPORT)
    model = open_network(options, config)
    write_report(folder_of(options.run), config, model, load_data(config), file, options.limit or REPORTED)
    print(f"wrote {file}")
    return 0


def add_config(subparsers: Subparsers) -> None:
    command = add_command(
        subparsers,
        "config",
        "a config with all its values, or the names of those there are",
        config_command,
        device=False,
    )
    take_config(command, "a YAML file, or the name of a shipped one; without it, their names")


def config_command(options: argparse.Namespace) -> int:
    from certtrain.config.loading import load_config, runnable_configs
    from certtrain.config.radius import format_radius

    if options.config is not None:
        print(load_config(options.config, options.overrides).to_yaml(), end="")
        return 0
    groups: dict[str, dict[str, list[str]]] = {}
    for name in runnable_configs():
        config = load_config(name)
        problem = f"{config.data.name}, epsilon {format_radius(config.judged_radius)}"
        groups.setdefault(problem, {}).setdefault(config.training.method.name, []).append(name)
    for problem, methods in sorted(groups.items()):
        print(problem)
        for method, names in methods.items():
            print(f"  {method}", *(f"    {name}" for name in names), sep="\n")
    return 0


def add_init(subparsers: Subparsers) -> None:
    command = add_command(subparsers, "init", "write a commented config to begin from", init_command, device=False)
    take_config(command, "a shipped config, or a YAML file, whose values it has (default: digits)", default="digits")
    command.add_argument("--out", type=values.path, metavar="FILE", help="default: NAME.yaml in the working directory")
    command.add_argument("--overwrite", action="store_true", help="replace the file that is there")


def init_command(options: argparse.Namespace) -> int:
    from certtrain.config.loading import config_path, load_config
    from certtrain.config.template import commented_yaml
    from certtrain.runtime.files import write_text

    config = load_config(options.config, options.overrides)
    file = options.out or Path(config_path(options.config).name)
    if os.path.lexists(file) and not options.overwrite:
        raise UsageError(f"{file} exists: name another with --out, or pass --overwrite")
    write_text(
        file,
        f"# Made by certtrain init {options.config}: every key may be changed or left out.\n{commented_yaml(config)}",
    )
    print(f"wrote {file}; certtrain train {file} trains it")
    return 0


def add_completion(subparsers: Subparsers) -> None:
    command = add_command(
        subparsers,
        "completion",
        "print a shell's completion of these commands",
        completion_command,
        device=False,
    )
    command.add_argument("shell", choices=completion.SHELLS)


def completion_command(options: argparse.Namespace) -> int:
    print(completion.script(options.shell))
    return 0


def add_models(subparsers: Subparsers) -> None:
    command = add_command(
        subparsers, "models", "the networks that can be named, and their size", models_command, device=False
    )
    command.add_argument("--input", type=values.image_shape, default=(3, 32, 32), help="image shape (default: 3x32x32)")
    command.add_argument("--classes", type=values.positive, default=10, help="number of classes (default: 10)")


def models_command(options: argparse.Namespace) -> int:
    from certtrain.models import MODELS, all_options
    from certtrain.training.cost import network_size

    table = Table(title=f"networks for {options.classes} classes of {'×'.join(map(str, options.input))} images")
    table.add_column("model")
    for column in ("parameters", "multiply-accumulates"):
        table.add_column(column, justify="right")
    table.add_column("model.options")
    for name in MODELS:
        try:
            size = network_size(name, options.input, options.classes)
            taken = ", ".join(f"{key}={value}" for key, value in all_options(name, {}).items())
            table.add_row(name, f"{size.parameters:,}", f"{size.macs:,}", taken)
        except UsageError as error:
            table.add_row(name, "–", str(error))
    Output().print(table)
    return 0
