"""What certtrain raises, and how it words an unknown name."""

from __future__ import annotations

import importlib
import re
import reprlib
import signal
from collections.abc import Iterable
from difflib import get_close_matches
from numbers import Integral
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError

READER_LEFT: int = getattr(signal, "SIGPIPE", 13)  # the signal of a pipe that nobody reads, which Windows does not name
NOT_OVER = 75  # exit code where the same command goes on: EX_TEMPFAIL, which Windows does not name either


class CerttrainError(Exception):
    """Base of every error that certtrain explains itself; the CLI prints the message and leaves with `exit_code`."""

    exit_code = 1


class UsageError(CerttrainError, ValueError):
    """The user wrote something wrong: a config value, a name, an argument."""

    exit_code = 2


class DataError(CerttrainError):
    """A data set is missing, corrupt, or does not fit the model."""


class CheckpointError(CerttrainError):
    """A checkpoint or run directory is missing, corrupt, of another architecture, or could not be written."""


class FolderInUse(CheckpointError):
    """Another process is at work in a run directory."""


class CertificateError(CerttrainError):
    """Certificates are missing or corrupt, are about something else, or one of them does not hold."""


class DivergedError(CerttrainError):
    """The loss became NaN or infinite, at radius `eps`."""

    def __init__(self, message: str, eps: float) -> None:
        super().__init__(message)
        self.eps = eps


class ProcessLost(CerttrainError):
    """Another process of a distributed run has died or been silent for too long."""


class UnsupportedOperation(CerttrainError, NotImplementedError):
    """A network uses an operation that has no rule for the bound that was asked for."""


class MissingDependency(CerttrainError, ImportError):
    """An optional library is needed and not installed."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was too little memory, of the GPU or of the machine, as Python or torch says it."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and re.search("can't allocate memory|ALLOC_FAILED", str(error)) is not None


MOST_LINES = 20  # of a message: a long list of things that are wrong has one cause
LONGEST_LINE = 300


def shortened(text: object, most: int = 60) -> str:
    """`text` on one line of at most `most` characters, the middle left out where it is longer.

    What would move the cursor or colour the terminal is shown as an escape.
    """
    line = str(text)
    if len(line) > most:
        tail = (most - 1) // 3
        line = f"{line[: most - 1 - tail]}…{line[-tail:]}"
    escaped = printable(line)
    return escaped if len(escaped) <= most else escaped[: most - 1] + "…"


def printable(text: str) -> str:
    """`text` with escapes for what has no glyph: line breaks, control characters, bytes of a name that is no UTF-8."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(error: object, most: int = 200) -> str:
    """What another library's error says, on one line of at most `most` characters; its type where it says nothing."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def first_problem(error: ValidationError, most: int = 200) -> str:
    """What pydantic finds first, on one line of at most `most` characters: the keys that lead there, and what it is."""
    problem = error.errors()[0]
    where = ".".join(map(str, problem["loc"]))
    return shortened((f"{where}: " if where else "") + problem["msg"], most)


def shown(value: object, most: int = 60) -> str:
    """`value` as Python writes it, shortened; of what is large only as much is looked at as is shown."""
    summary = reprlib.Repr()
    summary.maxstring = summary.maxother = summary.maxlong = most
    summary.maxlevel = 2
    return shortened(summary.repr(value), most)


def lines_of(message: object) -> str:
    """A message as it is printed: a line for each thing that is wrong, none longer than LONGEST_LINE characters."""
    lines = [line for line in str(message).splitlines() if line.strip()] or [type(message).__name__]
    surplus = len(lines) - MOST_LINES
    rest = [f"and {surplus} more"] if surplus > 0 else []
    return "\n".join([*(shortened(line, LONGEST_LINE) for line in lines[:MOST_LINES]), *rest])


def unknown(kind: str, name: str, choices: Iterable[str], otherwise: str | None = None) -> UsageError:
    """The error for a name that is not among `choices`, with the nearest ones.

    Where none is near, all are listed, or `otherwise` says where they are.
    """
    choices = sorted(choices)
    near = get_close_matches(shortened(name, 200), choices, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else otherwise or f"choose from {', '.join(choices)}"
    return UsageError(f"unknown {kind} {shown(name, 200)}: {hint}")


def require_counts(**counts: object) -> None:
    """Raises UsageError for one that is no whole number of at least 1."""
    for name, value in counts.items():
        if not (isinstance(value, Integral) and int(value) >= 1):
            raise UsageError(f"{name} is a whole number of at least 1, not {shown(value)}")


def optional_module(name: str, extra: str) -> ModuleType:
    """The module `name` of a library that only the extra `extra` installs.

    Raises:
        MissingDependency: it cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        how = f"in certtrain's checkout pip install '.[{extra}]', or uv sync --extra {extra}"
        raise MissingDependency(f"{name} cannot be imported ({error}): {how}") from error
