"""Processes that train one run each: a crash, or a leak, stays in its own, and a kill costs no more than one run."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from certtrain.errors import NOT_OVER, CerttrainError, FolderInUse, lines_of
from certtrain.runtime.files import make_folder

IN_USE = NOT_OVER  # exit code: another process is at work in the run's folder
BROKEN = 70  # EX_SOFTWARE, exit code: an error that certtrain does not explain
PRELOADED = [  # once, by the process that the others are copies of
    "certtrain.studies.processes",
    "certtrain.runs.train",
    "sklearn.datasets",
    "torch._dynamo",
    "tensorboard.summary.writer.record_writer",
]
KILL_AFTER = 60.0  # seconds that a process has to end when it was asked to, at most


@dataclass(frozen=True)
class Deadline:
    """When to stop: `budget` seconds from now, less what processes then need to end; None for never."""

    at: float | None
    reserve: float = KILL_AFTER

    @classmethod
    def after(cls, budget: float | None) -> Deadline:
        if budget is None:
            return cls(None)
        reserve = min(KILL_AFTER, budget / 5)
        return cls(time.monotonic() + budget - reserve, reserve)

    @property
    def passed(self) -> bool:
        return self.at is not None and time.monotonic() >= self.at

    @property
    def budget_left(self) -> float | None:
        """What `after` would be called with now."""
        return None if self.at is None else self.at + self.reserve - time.monotonic()


@dataclass(frozen=True)
class Ended:
    """A process that is over: its exit code, 0 if all went well and minus a signal's number, and what it has to say.

    asked_to_end: by `Processes.end`, before it did.
    """

    name: str
    code: int
    message: str
    asked_to_end: bool = False

    @property
    def resumable(self) -> bool:
        """What it worked on is left as it is: it was to end, by this process or by a signal, or another is at it."""
        asking = (signal.SIGTERM, signal.SIGINT)
        return self.code == IN_USE or self._signal in asking or (self.asked_to_end and self._signal is not None)

    @property
    def crashed(self) -> bool:
        """A signal ended it that does not ask: a fault of the memory, or whoever kills."""
        return self.code < 0 and not self.resumable

    @property
    def reason(self) -> str:
        """Why it did not go well, in words."""
        return self.message or (f"ended by signal {-self.code}" if self.code < 0 else f"exit code {self.code}")

    @property
    def _signal(self) -> int | None:
        return -self.code if self.code < 0 else self.code - 128 if self.code > 128 else None


@dataclass
class _Started:
    process: Any  # of the chosen context
    slot: int
    messages: Connection
    asked_to_end: bool = False


class Processes:
    """Up to `jobs` processes at a time, which share the machine's cores and its GPUs. Use as a context manager.

    What each prints goes to a file of its own below `logs`. Ctrl-C does not reach them; when this process ends, however
    it ends, they are asked to end as by SIGTERM, which a run answers with a checkpoint.
    """

    def __init__(self, jobs: int, device: str, logs: Path, kill_after: float = KILL_AFTER) -> None:
        self._jobs, self._device, self._logs, self._kill_after = jobs, device, logs, kill_after
        self._running: dict[str, _Started] = {}
        self._context: Any = multiprocessing.get_context(_start_method())
        if _start_method() == "forkserver":
            self._context.set_forkserver_preload(PRELOADED)

    def __enter__(self) -> Processes:
        make_folder(self._logs)
        return self

    def __exit__(self, *exception: object) -> None:
        self.end()

    @property
    def names(self) -> list[str]:
        return list(self._running)

    @property
    def free(self) -> bool:
        return len(self._running) < self._jobs

    def start(self, name: str, work: Callable[..., object], *arguments: Any) -> None:
        """Call `work(*arguments, device=...)`, which can be imported, in a process of its own."""
        taken = {started.slot for started in self._running.values()}
        slot = next(slot for slot in itertools.count() if slot not in taken)
        receiver, sender = self._context.Pipe(duplex=False)
        log = self._logs / f"{name.replace('/', '--')}.log"
        share = (threads_each(self._jobs), self._device, slot)
        process = self._context.Process(target=_run, args=(work, arguments, *share, log, sender))
        process.start()
        sender.close()
        self._running[name] = _Started(process, slot, receiver)

    def wait(self, seconds: float) -> list[Ended]:
        """Those that have ended, after at most so many seconds; as soon as there is one."""
        wait([started.process.sentinel for started in self._running.values()], seconds)
        over = [name for name, started in self._running.items() if not started.process.is_alive()]
        return [self._collect(name) for name in over]

    def end(self) -> list[Ended]:
        """Ask all to end, and kill those that have not after `kill_after` seconds."""
        for started in self._running.values():
            started.asked_to_end = True
            started.process.terminate()
        until, ended = time.monotonic() + self._kill_after, []
        while self._running and time.monotonic() < until:
            ended += self.wait(min(1.0, until - time.monotonic()))
        for started in self._running.values():
            started.process.kill()
        while self._running:
            ended += self.wait(1.0)
        return ended

    def _collect(self, name: str) -> Ended:
        started = self._running.pop(name)
        started.process.join()
        try:
            message = started.messages.recv() if started.messages.poll() else ""
        except (EOFError, OSError):  # it was killed
            message = ""
        started.messages.close()
        return Ended(name, started.process.exitcode, message, started.asked_to_end)


def threads_each(jobs: int) -> int:
    """Threads for each of so many processes."""
    return max(1, len(os.sched_getaffinity(0)) // jobs if hasattr(os, "sched_getaffinity") else 1)


def _start_method() -> str:
    return "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


# --- in the process ---------------------------------------------------------------------------------------------------


def _run(
    work: Callable[..., object],
    arguments: Sequence[Any],
    threads: int,
    device: str,
    slot: int,
    log: Path,
    messages: Connection,
) -> None:
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)  # Ctrl-C is for the process that shows the table
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    _write_to(log)

    import torch

    from certtrain.runtime.allocation import keep_freed_memory

    keep_freed_memory()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)
    if device == "auto" and (gpus := torch.cuda.device_count()):
        device = f"cuda:{slot % gpus}"
    try:
        code = work(*arguments, device=device)
    except Exception as error:
        if not isinstance(error, CerttrainError):
            traceback.print_exc()
            messages.send(lines_of(f"{type(error).__name__}: {error}"))
            raise SystemExit(BROKEN) from None
        message = lines_of(error)
        print(f"error: {message}", flush=True)
        messages.send(message)
        raise SystemExit(IN_USE if isinstance(error, FolderInUse) else error.exit_code) from None
    raise SystemExit(code)


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _write_to(log: Path) -> None:
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
