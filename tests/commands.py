"""certtrain's command line, called in this process, or in a child that can be killed."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import socket
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch

from certtrain.cli import main

# A whole run in a fraction of a second: three epochs of three steps.
TINY = [
    "data.limit=96",
    "model.options.width=2",
    "model.options.linear_width=8",
    "epsilon.warmup_epochs=1",
    "training.epochs=3",
    "training.batch_size=32",
    "training.checkpoint_seconds=0",
    "optimizer.milestones=[2]",
    "verification.limit=50",
    "verification.pgd_steps=2",
]
STEPS_PER_EPOCH = 3


def train_arguments(folder, *more):
    return ["train", "digits", "--out", str(folder), "--device", "cpu", *TINY, *map(str, more)]


@dataclass
class Outcome:
    code: int
    out: str
    err: str

    @property
    def error(self):
        """The one line on stderr, without its "error: "."""
        assert self.err.startswith("error: ")
        assert self.err.endswith("\n")
        assert self.err.count("\n") == 1, self.err
        return self.err.removeprefix("error: ").rstrip()


def contents(folder):
    """Every file below `folder`, hidden ones too, and what is in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def one_thread():
    """Sums come out the same bit for bit, and small networks are fast even on cores that others use."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def disk_with_room_for(size):
    """No file may grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# A server that has imported everything forks the children, so that a fresh process costs milliseconds.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(
    ["certtrain.runs.train", "sklearn.datasets", "torch._dynamo", "tensorboard.summary.writer.record_writer"]
)


def start(arguments, log, prepare=None):
    """A child process that runs `arguments`, its output going to the file `log`; `prepare()` is called in it first."""
    child = _processes.Process(target=_run, args=(arguments, log, prepare), daemon=True)
    child.start()
    return child


def start_ranks(size, work, log):
    """Children that call `work()` as `size` processes that torchrun started; what it returns is their exit code."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [
        _processes.Process(target=_run_rank, args=(rank, size, port, work, log), daemon=True) for rank in range(size)
    ]
    for child in children:
        child.start()
    return children


def signal_at(step, sent=signal.SIGINT):
    """An `after_step` that sends the process a signal after that step."""
    return lambda self, trainer: trainer.step == step and signal.raise_signal(sent)


def into_a_pipe_that_nobody_reads():
    """A child's standard output, as `head` leaves it."""
    reader, writer = os.pipe()
    os.dup2(writer, 1)
    os.close(reader)


def exit_code(child):
    """Waits for the child: its exit code, or minus the signal that ended it."""
    child.join()
    return child.exitcode


def wait_until(condition, child):
    """Poll until `condition()` holds or the child has ended; a file that is not there (yet) counts as no."""
    while child.is_alive():
        with suppress(FileNotFoundError):
            if condition():
                return


def _run(arguments, log, prepare):
    _write_to(log)
    torch.set_num_threads(1)
    if prepare is not None:
        prepare()
    raise SystemExit(main(arguments))


def _run_rank(rank, size, port, work, log):
    _write_to(log)
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    raise SystemExit(work())


def _write_to(log):
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
