"""Files that are whole at every moment: written under a temporary name, flushed, renamed."""

from __future__ import annotations

import json
import os
import re
import secrets
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from certtrain.errors import CheckpointError, UsageError, first_problem, one_line

MOST_NESTED = 100  # lists and mappings within each other, of JSON that is read


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Call `write` with a temporary file, flush it to disk, and rename it to `path`.

    Whatever happens on the way, `path` holds either what it held before or the whole new content. Where `path` is a
    link, it stays one, and the file it leads to is replaced.

    Raises:
        CheckpointError: the disk is full, or the folder cannot be written to.
        UsageError: `path` is no regular file (`replaceable`).
    """
    target = replaceable(path)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")  # process ids of two machines may agree
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        _flush_folder(target.parent)
    except OSError as error:
        raise CheckpointError(f"could not write {path}: {error}; what was there before is unchanged") from error
    finally:
        with suppress(OSError):  # of what went wrong, the first thing is told
            temporary.unlink(missing_ok=True)


def replaceable(path: Path) -> Path:
    """Where `path` leads, behind links: a regular file, or a place where nothing is yet.

    Raises:
        UsageError: it is a device, a pipe, a folder: what a rename would replace, and must not.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return path.resolve()
    except OSError as error:  # a loop of links, a file where a folder should be
        raise UsageError(f"{path} cannot be written: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        raise UsageError(f"{path} is {kinds.get(stat.S_IFMT(mode), 'a device')}, not a file: it is not replaced")
    return path.resolve()


def make_folder(folder: Path) -> None:
    """Make `folder` and those above it, where they are missing.

    Raises:
        CheckpointError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot make the folder {folder}: {error.strerror}") from error


def parse_json(text: str | bytes) -> Any:
    """What JSON text of somebody else's says.

    Python's parser recurses: text that is nested too deeply ends the process where a library has raised its limit.

    Raises:
        ValueError: it is no JSON, or nested more than MOST_NESTED deep.
    """
    text = text if isinstance(text, str) else text.decode("utf-8")
    depth = 0
    for bracket in re.finditer(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', text, flags=re.DOTALL):
        first = bracket[0][0]
        depth += (first in "[{") - (first in "]}")
        if depth > MOST_NESTED:
            raise ValueError(f"it is nested more than {MOST_NESTED} deep")
    return json.loads(text)


def read_json(file: Path, checked: Callable[[Any], Any] = lambda content: content) -> Any:
    """What `checked` makes of the content of a JSON file of certtrain's.

    Args:
        checked: by default the content itself.

    Raises:
        CheckpointError: the file cannot be read, or is no JSON, or `checked` refuses what it says.
    """
    try:
        return checked(parse_json(file.read_bytes()))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{file} is missing or corrupt ({one_line(_reason(error))})") from error


def _reason(error: Exception) -> object:
    """Of what pydantic objects to only the first, with its place."""
    from pydantic import ValidationError

    return first_problem(error) if isinstance(error, ValidationError) else error


def is_number(value: Any) -> bool:
    """Whether what JSON says is a number: to Python a truth value is one too."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))


def write_once(path: Path, text: str) -> None:
    """Write `path`, where nothing is yet: of several who do so at once, on whatever machines, the text of one is kept.

    Raises:
        CheckpointError: the disk is full, or the folder cannot be written to.
    """
    if path.exists():
        return
    whole = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    write_text(whole, text)
    try:
        os.link(whole, path)  # which replaces nothing, as a rename would
    except FileExistsError:
        pass
    except OSError:  # a file system without second names
        write_text(path, text)
    finally:
        whole.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def _flush_folder(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
