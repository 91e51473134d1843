"""certtrain train | study | tune | scale | plan | compare | verify | check | export | report | config | init | ..."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

import certtrain
from certtrain.cli import commands, completion, scaling, studies, terminal, verification
from certtrain.errors import READER_LEFT, CerttrainError, ProcessLost, is_out_of_memory, lines_of, shortened, shown
from certtrain.runtime.launch import is_first_process

# Threads that wait for each other in a busy loop make small networks many times slower as soon as anything else runs on
# the machine. Read when torch is imported, which the commands do; the user's own setting wins.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

MOST = 10**9  # of a number on the command line
MOST_OPTION = 100  # of an option's name that is looked for


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 (failed), 2 (written wrong), 128 + n (ended by signal n)."""
    terminal.accept_all_characters()
    terminal.ignore_size_zero()
    options = _parse(arguments)
    try:
        code: int = options.command(options)
        sys.stdout.flush()  # what is still to be written may find that nobody reads it
        return code
    except BrokenPipeError:  # whoever read the output, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + READER_LEFT
    except (CerttrainError, OSError) as error:
        if options.debug:
            raise
        if is_first_process() or isinstance(error, ProcessLost):  # it may be the first that was lost
            print(f"error: {lines_of(error)}", file=sys.stderr)
        return error.exit_code if isinstance(error, CerttrainError) else 1
    except (MemoryError, RuntimeError) as error:
        if options.debug or not is_out_of_memory(error):
            raise
        print(
            f"error: out of memory ({shortened(str(error) or 'MemoryError', 100)}): choose a smaller "
            "verification.batch_size or training.batch_size, or keep the latter with training.accumulation or "
            "training.activation_checkpointing",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        return 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """The usage and one line, which quotes no more of a long argument than shows which one it is."""
        super().error(shortened(message, 300))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Overrides may follow options, which argparse leaves over."""
    parser = build_parser()
    completion.answer(parser)
    options, rest = parser.parse_known_args(arguments)
    if strangers := [word for word in rest if word.startswith("-") or "overrides" not in options]:
        options.parser.error(f"unrecognized arguments: {' '.join(strangers)}{_instead(options.parser, strangers[0])}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _instead(parser: argparse.ArgumentParser, word: str) -> str:
    """What could be meant by an option that a command has not."""
    from certtrain.config.keys import keys_called

    name = word.partition("=")[0][:MOST_OPTION]
    near = get_close_matches(name, parser._option_string_actions, n=3, cutoff=0.6)
    near = near or [f"{key}=..." for key in keys_called(name.lstrip("-").replace("-", "_"))]
    return f": did you mean {' or '.join(near)}?" if near else ""


def build_parser() -> argparse.ArgumentParser:
    """Every command, with its options."""
    parser = _Parser(prog="certtrain", description="Train networks whose robustness is proved.")
    parser.add_argument("--version", action="version", version=f"certtrain {certtrain.__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")

    train = _command(subparsers, "train", "train a network from a YAML config, and verify it", commands.train_command)
    _add_config(
        train, "a YAML file, or the name of a shipped one, such as digits; to resume, a run directory", default=None
    )
    train.add_argument("--out", type=_path, help="run directory (default: runs/NAME)")
    existing = train.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="continue the run in that directory")
    existing.add_argument("--overwrite", action="store_true", help="replace the run in that directory")
    _add_trust(train)

    study = _command(subparsers, "study", "train a grid of configs with several seeds", studies.study_command)
    _add_study(study)
    study.add_argument(
        "--only", action="append", default=[], metavar="PATTERN", help="configurations of that name; may be repeated"
    )
    study.add_argument(
        "--slurm", type=_positive, metavar="N", help="leave it to N jobs of the batch system Slurm, by submitit"
    )

    tune = _command(subparsers, "tune", "search for good settings on validation images", studies.tune_command)
    _add_study(tune)

    scale = _command(subparsers, "scale", "fit a scaling law to a grid of widths and budgets", scaling.scale_command)
    _add_study(scale)
    without = scale.add_mutually_exclusive_group()
    without.add_argument("--show", action="store_true", help="show the runs and what they cost, and train none")
    without.add_argument("--fit", action="store_true", help="fit to the runs that are finished, and train none")

    plan = _command(subparsers, "plan", "width, epochs, lr for a budget, by a law", scaling.plan_command, device=False)
    plan.add_argument(
        "--budget", type=_operations, required=True, metavar="FLOP", help="floating-point operations, such as 2e15"
    )
    plan.add_argument("--eps", type=_radius, help="the radius (default: that of the law)")
    plan.add_argument(
        "--law", type=_path, default=Path("runs/scaling"), help="scaling.json, or its folder (default: runs/scaling)"
    )
    plan.add_argument("--protocol", default="corrected", metavar="NAME", help="of the plan (default: corrected)")
    plan.add_argument(
        "--approach", default="isoflop", metavar="NAME", help="isoflop (default) or joint: how laws are fitted"
    )

    compare = _command(
        subparsers, "compare", "runs beside each other, with intervals and tests", studies.compare_command, device=False
    )
    compare.add_argument("runs", nargs="+", type=_path, metavar="RUN", help="run directories, or folders of them")
    compare.add_argument("--eps", type=_radius, help="the radius (default: that of the first run's summary)")
    compare.add_argument("--method", help="bounds of results that `verify` added, such as ibp,crown")
    compare.add_argument("--metric", action="append", default=[], help="instead of the errors; may be repeated")
    baseline = "what the others are paired with: a row, or a choice of the study (default: the first row)"
    compare.add_argument("--baseline", metavar="NAME", help=baseline)
    compare.add_argument("--confidence", type=_share, default=0.95, help="of intervals (default: 0.95)")
    compare.add_argument(
        "--out",
        type=_path,
        action="append",
        default=[],
        metavar="FILE",
        help="write it as .json, .md, .tex, .html or .svg (the learning curves); may be repeated",
    )

    verify = _command(
        subparsers, "verify", "natural, PGD and verified error of a trained network", verification.verify_command
    )
    _add_run(verify, "; with --vnnlib an ONNX file, with --model-weights a config")
    verify.add_argument("--eps", help="one radius or several: 2/255,8/255 (default: those of the config)")
    verify.add_argument(
        "--method",
        help="bounds, each for what those before left unknown: ibp,crown-ibp,crown,alpha-crown,branch-and-bound",
    )
    verify.add_argument(
        "--timeout",
        type=_seconds,
        metavar="SECONDS",
        help="of branch and bound, for each image, or for the property (default: 100)",
    )
    verify.add_argument(
        "--workers", type=_positive, metavar="N", help="processes that share images and CPUs (default: 1)"
    )
    verify.add_argument(
        "--results", type=_path, metavar="FILE", help="where images that are finished stand; go on from there"
    )
    verify.add_argument(
        "--attack", help="attacks, each on what those before left: pgd,apgd-ce,apgd-dlr,apgd-t (default: the config's)"
    )
    verify.add_argument("--limit", type=_positive, help="only the first N test images")
    verify.add_argument(
        "--sound", metavar="ARITHMETIC", help="bounds that cover the rounding of float32, tf32, bf16 or float64"
    )
    verify.add_argument("--certificates", type=_path, metavar="FILE", help="write a Parquet file that `check` reads")
    verify.add_argument(
        "--radius",
        nargs="?",
        const=True,
        type=_radius,
        metavar="MAX",
        help="instead: the largest radius proved for each image, up to MAX (default: twice the largest tested)",
    )
    verify.add_argument(
        "--model-weights",
        type=_path,
        metavar="FILE",
        help="a network trained elsewhere: its state dict, .pth or .safetensors, for the model of the config",
    )
    verify.add_argument(
        "--vnnlib",
        type=_path,
        metavar="FILE",
        help="instead: decide this property, and print the verdict as in VNN-COMP",
    )
    verify.add_argument("--json", type=_path, help="where to write the results (default: verify.json in the run)")

    check = _command(
        subparsers,
        "check",
        "prove certificates again, by an independent program",
        verification.check_command,
        device=False,
    )
    check.add_argument("certificates", type=_path, help="a Parquet file that `verify --certificates` wrote")
    check.add_argument("--model", type=_path, required=True, metavar="RUN", help="the run directory they are about")
    check.add_argument("--dataset", metavar="NAME", help="the data set that they must be about (default: any)")
    check.add_argument(
        "--data",
        type=_path,
        default=Path("data"),
        metavar="DIR",
        help="where its files are: the folder of test.npz or test/, or that of the named data sets (default: data)",
    )
    check.add_argument("--allow-partial", action="store_true", help="permit certificates for some of the images only")

    export = _command(subparsers, "export", "write a trained network for other tools", commands.export_command)
    _add_run(export)
    export.add_argument(
        "--onnx", nargs="?", type=_path, const=True, metavar="FILE", help="as ONNX (default: model.onnx in the run)"
    )
    export.add_argument("--vnnlib", type=_path, metavar="DIR", help="with a VNN-LIB property for each unknown image")
    export.add_argument("--eps", type=_radius, help="radius of the properties (default: epsilon.max of the config)")
    export.add_argument("--limit", type=_positive, help="only the first N test images")
    export.add_argument("--timeout", type=_positive, help="of a property, in instances.csv (default: 300)")

    report = _command(subparsers, "report", "show a run, or a study, as an HTML page", commands.report_command)
    _add_run(report)
    report.add_argument("--out", type=_path, help="where to write the page (default: report.html in the run)")
    looked_at = f"how many test images to look at (default: {commands.REPORTED})"
    report.add_argument("--limit", type=_positive, help=looked_at)

    config = _command(
        subparsers,
        "config",
        "a config with all its values, or the names of those there are",
        commands.config_command,
        device=False,
    )
    _add_config(config, "a YAML file, or the name of a shipped one; without it, their names", default=None)

    init = _command(subparsers, "init", "write a commented config to begin from", commands.init_command, device=False)
    _add_config(init, "a shipped config, or a YAML file, whose values it has (default: digits)", default="digits")
    init.add_argument("--out", type=_path, metavar="FILE", help="default: NAME.yaml in the working directory")
    init.add_argument("--overwrite", action="store_true", help="replace the file that is there")

    models = _command(
        subparsers, "models", "the networks that can be named, and their size", commands.models_command, device=False
    )
    models.add_argument("--input", type=_image_shape, default=(3, 32, 32), help="image shape (default: 3x32x32)")
    models.add_argument("--classes", type=_positive, default=10, help="number of classes (default: 10)")

    shell = _command(
        subparsers,
        "completion",
        "print a shell's completion of these commands",
        commands.completion_command,
        device=False,
    )
    shell.add_argument("shell", choices=completion.SHELLS)
    return parser


def _add_study(command: argparse.ArgumentParser) -> None:
    study = command.add_argument("study", help="a YAML file, or the name of a shipped one")
    study.completer = completion.studies  # type: ignore[attr-defined] # argcomplete's
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help="change values of every config")
    command.add_argument("--out", type=_path, help="folder of the runs (default: runs/NAME)")
    command.add_argument("--jobs", type=_positive, default=1, help="runs at a time, which share the cores (default: 1)")
    command.add_argument("--budget", type=_positive, metavar="SECONDS", help="end, all saved, after that time at most")


def _add_run(command: argparse.ArgumentParser, more: str = "") -> None:
    command.add_argument("run", type=_path, help=f"a run directory, or its model.safetensors or last.ckpt{more}")
    _add_overrides(command, "change values of the run's config")
    _add_trust(command)


def _add_config(command: argparse.ArgumentParser, text: str, default: str | None) -> None:
    config = command.add_argument("config", nargs="?", default=default, help=text)
    config.completer = completion.configs  # type: ignore[attr-defined] # argcomplete's
    _add_overrides(command, "change values of the config")


def _add_overrides(command: argparse.ArgumentParser, text: str) -> None:
    overrides = command.add_argument("overrides", nargs="*", metavar="section.key=value", help=text)
    overrides.completer = completion.overrides  # type: ignore[attr-defined] # argcomplete's


def _add_trust(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--trust-model",
        action="store_true",
        help="run the code that a run's files name as its model",
    )


def _command(
    subparsers: argparse._SubParsersAction, name: str, text: str, run: object, device: bool = True
) -> argparse.ArgumentParser:
    command = subparsers.add_parser(name, help=text, description=text)
    command.set_defaults(command=run, parser=command)
    if device:
        command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    command.add_argument("--debug", action="store_true", help="show tracebacks")
    return command


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and 1 <= int(text[:20]) <= MOST):
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a whole number between 1 and {MOST}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= MOST:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a number of seconds between 0 and {MOST}")
    return seconds


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("an empty path")
    return Path(text)


def _radius(text: str) -> float:
    from certtrain.config.schema import parse_radius

    try:
        return parse_radius(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _operations(text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,30}(\.[0-9]{1,30})?([eE][+]?[0-9]{1,2})?", text) or not 1 <= float(text) <= 1e30:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a number of operations between 1 and 1e30, as 2e15")
    return float(text)


def _share(text: str) -> float:
    if not re.fullmatch(r"0?\.[0-9]{1,9}", text) or not 0 < float(text) < 1:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a number between 0 and 1, such as 0.95")
    return float(text)


def _image_shape(text: str) -> tuple[int, ...]:
    sizes = text.lower().replace("×", "x").split("x")
    if len(sizes) != 3 or not all(re.fullmatch("[1-9][0-9]{0,3}", size) for size in sizes):
        raise argparse.ArgumentTypeError(f"{shown(text)} is not an image shape: channels x height x width, as 3x32x32")
    return tuple(map(int, sizes))
