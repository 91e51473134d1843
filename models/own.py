"""Networks of one's own: where their modules are looked for, and what they raise in one line that says where."""

from __future__ import annotations

import importlib
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from certtrain.errors import CerttrainError, UsageError, shortened

_SAY_ENOUGH = (RuntimeError, TypeError, ValueError, ImportError, AttributeError)  # without the name of their type

# Frames of these are not where somebody's mistake is.
_LIBRARIES = tuple(
    str(Path(path).resolve()) + os.sep
    for path in (
        *(str(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
        str(Path(str(sys.modules["certtrain"].__file__)).parent),
        str(Path(__file__).parent),
    )
)


@contextmanager
def modules_from(folder: str | None = None) -> Iterator[None]:
    """Inside, modules in `folder` and in the working directory can be imported too, after those installed."""
    wanted = [os.path.abspath(os.path.expanduser(path)) for path in (folder, ".") if path is not None]
    added = [path for path in wanted if path not in sys.path]
    sys.path.extend(added)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = [path for path in sys.path if path not in added]


def imported(name: str) -> Callable[..., Any]:
    """What "module:callable" names, from an installed module, or one in the working directory.

    Raises:
        UsageError: there is none, or its import fails, in whatever way.
    """
    module, _, attribute = name.partition(":")
    with modules_from(), explained(f"model {name}"):
        return getattr(importlib.import_module(module), attribute)


@contextmanager
def explained(doing: str, kind: type[CerttrainError] = UsageError) -> Iterator[None]:
    """Whatever is raised inside, SystemExit too, becomes one line of `kind`: what failed, why, and file and line."""
    try:
        yield
    except CerttrainError:
        raise
    except (Exception, SystemExit) as error:
        text, name = str(error).strip().partition("\n")[0], type(error).__name__
        reason = text if isinstance(error, _SAY_ENOUGH) and text else f"{name}: {text}".rstrip(": ")
        raise kind(f"{doing}: {shortened(reason, 160)}{_place(error)}") from error


def _place(error: BaseException) -> str:
    """ " (net.py:12)": the innermost line outside of libraries; nothing where there is none."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({_short(error.filename)}:{error.lineno})"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_own(frame.filename)]
    return f" ({_short(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""


def _is_own(file: str) -> bool:
    return not file.startswith("<") and not str(Path(file).resolve()).startswith(_LIBRARIES)


def _short(file: str) -> str:
    path = Path(file)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else file
