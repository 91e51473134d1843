"""What certtrain raises, and how it words an unknown name."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from difflib import get_close_matches
from types import ModuleType


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


def unknown(kind: str, name: str, choices: Iterable[str], otherwise: str | None = None) -> UsageError:
    """The error for a name that is not among `choices`, with the nearest ones.

    Where none is near, all are listed, or `otherwise` says where they are.
    """
    choices = sorted(choices)
    near = get_close_matches(name, choices, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else otherwise or f"choose from {', '.join(choices)}"
    return UsageError(f"unknown {kind} {name!r}: {hint}")


def optional_module(name: str, extra: str) -> ModuleType:
    """The module `name` of a library that only the extra `extra` installs.

    Raises:
        MissingDependency: it cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependency(f"{name} cannot be imported ({error}): pip install 'certtrain[{extra}]'") from error
