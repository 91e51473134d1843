"""What commands have in common: how one is made, options that several take, and those that do not go together."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeAlias

from certtrain.cli import completion, values
from certtrain.errors import UsageError

Subparsers: TypeAlias = argparse._SubParsersAction


def add_command(
    subparsers: Subparsers,
    name: str,
    text: str,
    run: Callable[[argparse.Namespace], int],
    device: bool = True,
    shared: bool = False,
) -> argparse.ArgumentParser:
    """The parser of a command, with what every command takes.

    Args:
        run: the command; returns the exit code.
        device: whether it computes.
        shared: whether processes that torchrun starts share its work; several are refused otherwise.
    """
    command = subparsers.add_parser(name, help=text, description=text)
    command.set_defaults(command=run, parser=command, shared=shared)
    if device:
        command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    command.add_argument("--debug", action="store_true", help="show tracebacks")
    return command


# --- options that several take ----------------------------------------------------------------------------------------


def take_study(command: argparse.ArgumentParser) -> None:
    """A file that many runs are made from, and how they are trained."""
    study = command.add_argument("study", help="a YAML file, or the name of a shipped one")
    study.completer = completion.studies  # type: ignore[attr-defined] # argcomplete's
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help="change values of every config")
    command.add_argument("--out", type=values.path, help="folder of the runs (default: runs/NAME)")
    command.add_argument(
        "--jobs", type=values.positive, default=1, help="runs at a time, which share the cores (default: 1)"
    )
    command.add_argument(
        "--budget", type=values.positive, metavar="SECONDS", help="end, all saved, after that time at most"
    )


def take_run(command: argparse.ArgumentParser, more: str = "") -> None:
    command.add_argument("run", type=values.path, help=f"a run directory, or its model.safetensors or last.ckpt{more}")
    _take_overrides(command, "change values of the run's config")
    take_trust(command)


def take_config(command: argparse.ArgumentParser, text: str, default: str | None = None) -> None:
    config = command.add_argument("config", nargs="?", default=default, help=text)
    config.completer = completion.configs  # type: ignore[attr-defined] # argcomplete's
    _take_overrides(command, "change values of the config")


def _take_overrides(command: argparse.ArgumentParser, text: str) -> None:
    overrides = command.add_argument("overrides", nargs="*", metavar="section.key=value", help=text)
    overrides.completer = completion.overrides  # type: ignore[attr-defined] # argcomplete's


def take_trust(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--trust-model",
        action="store_true",
        help="run the code that a run's files name as its model",
    )


# --- options that do not go together ----------------------------------------------------------------------------------


def refuse(options: argparse.Namespace, asked: str, *names: str) -> None:
    """None of the options may stand beside `asked`, which has no use for them."""
    given = [f"--{name.replace('_', '-')}" for name in names if _is_said(getattr(options, name))]
    if given:
        raise UsageError(f"{' and '.join(given)} cannot be combined with {asked}")


def _is_said(value: object) -> bool:
    """Without a word, an option is None, a switch False, and the device "auto"."""
    return value is not None and value is not False and value != "auto"
