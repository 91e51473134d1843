"""One process at a time in a run directory."""

from __future__ import annotations

import errno
import os
import platform
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from certtrain.errors import CheckpointError, FolderInUse, UsageError
from certtrain.runtime.files import make_folder

try:
    import fcntl
except ImportError:  # Windows: nobody is kept out
    fcntl = None  # type: ignore[assignment] # a module in every other case

LOCK = ".lock"
WRITING = ".writing"
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # of file systems that cannot lock


@dataclass(frozen=True)
class Claim:
    """A claimed folder; `descriptor` has it open wherever it is moved, None where systems open no folders."""

    folder: Path
    descriptor: int | None = None

    @property
    def holds(self) -> bool:
        """Whether what is at `folder` now is the folder that was claimed."""
        return self.descriptor is None or _is_still(self.descriptor, self.folder, follow=True)

    def require(self) -> None:
        """To be asked before something is written: what is there now may be another run's.

        Raises:
            CheckpointError: the folder has been moved or removed.
        """
        if not self.holds:
            raise CheckpointError(
                f"{self.folder} was moved or removed while a run went on in it: nothing more is written there; "
                "continue the run where its folder is now with --resume"
            )


@contextmanager
def claimed(folder: Path) -> Iterator[Claim]:
    """Keep other processes that claim `folder` out of it; made where it is missing, removed again if it stays empty.

    What holds is the operating system's lock on the file `.lock`, which ends with the process that took it, however
    that ends; a file that a killed one has left holds nobody out. The file says who holds it. A folder that is moved
    takes its lock along: what another process makes in its place is left alone.

    Raises:
        FolderInUse: another process is in it.
        CheckpointError: it cannot be made or locked.
        UsageError: it is a file.
    """
    new = _make_if_missing(folder)
    while (descriptor := _locked(folder)) is None:
        new = _make_if_missing(folder)
    claim = Claim(folder, _opened(folder))
    try:
        yield claim
    finally:
        with suppress(OSError):
            new &= claim.holds
            if claim.holds:
                (folder / LOCK).unlink()  # while it is held: who has opened it meanwhile looks again
        for opened in (descriptor, claim.descriptor):
            if opened is not None:
                os.close(opened)
        if new:
            with suppress(OSError):  # there is something in it
                folder.rmdir()


@contextmanager
def writing_in(folder: Path) -> Iterator[None]:
    """Have others that change files of `folder` by this wait until these are read and written, whoever claims it.

    Where the file system knows no locks, nobody waits; where nothing can be written, what is tried there says so.
    """
    try:
        descriptor = _locked(folder, WRITING, wait=True)
    except CheckpointError:
        descriptor = None
    try:
        yield
    finally:
        if descriptor is not None:
            with suppress(OSError):
                (folder / WRITING).unlink()  # while it is held, as of LOCK
            os.close(descriptor)


def _opened(folder: Path) -> int | None:
    try:
        return os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return None


def _make_if_missing(folder: Path) -> bool:
    """Looked at once: another process may make it, or remove it, at any moment."""
    try:
        if not stat.S_ISDIR(folder.stat().st_mode):
            raise UsageError(f"{folder} is a file, not a folder")
    except OSError:
        make_folder(folder)
        return True
    return False


def _locked(folder: Path, name: str = LOCK, wait: bool = False) -> int | None:
    """The open, locked lock file of `folder`; closing it gives the lock back. None where the folder is gone again.

    wait: until whoever has it gives it back.
    """
    file = folder / name
    while True:
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CheckpointError(f"{folder} cannot be written to: {error.strerror}") from error
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise CheckpointError(f"{file} is not a file of certtrain: remove it")
            _lock(descriptor, folder, wait)
            if _is_still(descriptor, file):
                with suppress(OSError):  # a full disk: the lock holds all the same
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}, {time.ctime()}".encode(), 0)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # whoever held it has removed it in between


def _lock(descriptor: int, folder: Path, wait: bool = False) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError as error:
        raise FolderInUse(
            f"another run goes on in {folder} ({_name_in(descriptor)}): wait for it, end it, or name another folder "
            "with --out"
        ) from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise CheckpointError(f"{folder} cannot be locked: {error.strerror}") from error


def holder(folder: Path) -> str | None:
    """Who is at work in `folder`, as the lock file says; None where nobody is.

    Asked of the operating system: a lock file that a killed process has left, here or on another machine, does not
    count. For a moment this keeps others out itself, who may then be told that somebody is in it.
    """
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    except OSError:
        return None
    try:
        _lock(descriptor, folder)
    except FolderInUse:
        return _name_in(descriptor)
    finally:
        os.close(descriptor)
    return None


def can_lock(folder: Path) -> bool:
    """Whether the file system of `folder`, which exists, knows locks; some that machines share do not.

    Asked of a file as those that are locked: of a folder, a file system may answer otherwise.

    Raises:
        CheckpointError: nothing can be written there.
    """
    if fcntl is None:
        return False
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return False
        raise CheckpointError(f"{folder} cannot be written to: {error.strerror}") from error
    return True


def _name_in(descriptor: int) -> str:
    return " ".join(os.pread(descriptor, 200, 0).decode(errors="replace").split()) or "another process"


def _is_still(descriptor: int, file: Path, follow: bool = False) -> bool:
    """Whether what is open is what lies at `file` now; `follow`: behind a link."""
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat(follow_symlinks=follow))
    except (FileNotFoundError, NotADirectoryError):
        return False
