"""certtrain train | study | tune | scale | plan | compare | verify | check | export | report | config | init | ..."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from typing import NoReturn

import certtrain
from certtrain.cli import commands, completion, scaling, studies, terminal, verification
from certtrain.errors import READER_LEFT, CerttrainError, ProcessLost, is_out_of_memory, lines_of, shortened
from certtrain.runtime.launch import is_first_process, require_one_process

# Threads that wait for each other in a busy loop make small networks many times slower as soon as anything else runs on
# the machine. Read when torch is imported, which the commands do; the user's own setting wins.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

MOST_OPTION = 100  # of an option's name that is looked for


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 (failed), 2 (written wrong), 128 + n (ended by signal n)."""
    terminal.accept_all_characters()
    terminal.ignore_size_zero()
    options = _parse(arguments)
    try:
        if not options.shared:
            require_one_process(options.parser.prog)
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


COMMANDS = (  # in the order of the help
    commands.add_train,
    studies.add_study,
    studies.add_tune,
    scaling.add_scale,
    scaling.add_plan,
    studies.add_compare,
    verification.add_verify,
    verification.add_check,
    commands.add_export,
    commands.add_report,
    commands.add_config,
    commands.add_init,
    commands.add_models,
    commands.add_completion,
)


def build_parser() -> argparse.ArgumentParser:
    """Every command, with its options."""
    parser = _Parser(prog="certtrain", description="Train networks whose robustness is proved.")
    parser.add_argument("--version", action="version", version=f"certtrain {certtrain.__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in COMMANDS:
        add(subparsers)
    return parser
