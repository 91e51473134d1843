"""certtrain train | verify."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

import certtrain
from certtrain.errors import CerttrainError, ProcessLost

# Threads that wait for each other in a busy loop make small networks many times slower as soon as anything else runs on
# the machine. Read when torch is imported, which the commands do; the user's own setting wins.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 (failed), 2 (written wrong), 128 + n (ended by signal n)."""
    options = _parse(arguments)
    try:
        return options.command(options)
    except (CerttrainError, OSError) as error:
        if options.debug:
            raise
        from certtrain.distributed import is_first_process

        if is_first_process() or isinstance(error, ProcessLost):  # it may be the first that was lost
            print(f"error: {error}", file=sys.stderr)
        return error.exit_code if isinstance(error, CerttrainError) else 1
    except KeyboardInterrupt:
        return 130


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Overrides may follow options, which argparse leaves over."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if strangers := [word for word in rest if word.startswith("-")]:
        parser.error(f"unrecognized arguments: {' '.join(strangers)}")
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
    verify.add_argument("run", type=Path, help="a run directory, or its model.safetensors or last.ckpt")
    verify.add_argument("overrides", nargs="*", metavar="section.key=value", help="change values of the run's config")
    verify.add_argument("--eps", help="one radius or several: 2/255,8/255 (default: those of the config)")
    verify.add_argument(
        "--method", help="bounds, each for what those before left open: ibp,crown-ibp,crown,alpha-crown"
    )
    verify.add_argument("--limit", type=_positive, help="only the first N test images")
    verify.add_argument("--json", type=Path, help="where to write the results (default: verify.json in the run)")
    return parser


def _command(commands: argparse._SubParsersAction, name: str, text: str, run: object) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text)
    command.set_defaults(command=run)
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    command.add_argument("--debug", action="store_true", help="show tracebacks")
    return command


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def train_command(options: argparse.Namespace) -> int:
    from certtrain.distributed import is_first_process
    from certtrain.run import train

    console = Console(quiet=not is_first_process())
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


def verify_command(options: argparse.Namespace) -> int:
    from certtrain.checkpoint import load_model, write_json
    from certtrain.config import load_config
    from certtrain.distributed import joined
    from certtrain.run import load_data, resolve_device, verify_run, versions

    folder = options.run if options.run.is_dir() else options.run.parent
    overrides = list(options.overrides)
    for key in ("eps", "method"):
        if getattr(options, key):
            overrides.append(f"verification.{key}='{getattr(options, key)}'")
    with joined() as ranks:
        with ranks.together():
            model = load_model(options.run, resolve_device(options.device, ranks))
            config = load_config(folder / "config.yaml", overrides)
        data = ranks.one_per_machine_first(lambda: load_data(config))
        results = [result.summary() for result in verify_run(config, model, data, options.limit, ranks)]
        if ranks.is_first:
            _show(Console(), results)
            content = {**results[0], "model": str(options.run), "radii": results, "versions": versions()}
            write_json(options.json or folder / "verify.json", content)
    return 0


def _show(console: Console, results: Sequence[dict]) -> None:
    table = Table(title=f"{results[0]['images']} test images, bounds by {results[0]['method']}")
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
