"""Work that several processes of this machine share: whoever is free takes the next part."""

from __future__ import annotations

import multiprocessing
import pickle
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar, cast

import torch

from certtrain.errors import ProcessLost, UsageError, shortened

Part = TypeVar("Part")
Result = TypeVar("Result")


def in_processes(
    work: Callable[[Part], Iterable[Result]], parts: Sequence[Part], workers: int
) -> Generator[Result, None, None]:
    """The results of `work(part)` for every part, as they come, from processes that share this one's threads.

    Raises:
        UsageError: `work` cannot be sent to another process.
        ProcessLost: one has ended before its work.
        Exception: whatever `work` raises.
    """
    threads = max(1, torch.get_num_threads() // workers)
    waiting = deque(parts)
    context = multiprocessing.get_context("spawn")
    processes = []
    try:
        busy: dict[Connection, Any] = {}
        for _ in range(min(workers, len(parts))):
            connection, other = context.Pipe()
            process = context.Process(target=_serve, args=(other, work, threads), daemon=True)
            try:
                process.start()
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                raise UsageError(
                    f"the network cannot be sent to other processes ({shortened(error, 120)}): use one worker"
                ) from error
            processes.append(process)
            other.close()
            busy[connection] = process
            connection.send(waiting.popleft())
        while busy:
            for ready in wait(list(busy)):
                connection = cast("Connection", ready)
                try:
                    kind, content = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionError):
                    busy[connection].join()
                    raise ProcessLost(
                        f"a worker has ended with exit code {busy[connection].exitcode}; -9 is often for lack of memory"
                    ) from None
                if kind == "result":
                    yield content
                elif kind == "error":
                    raise content
                elif waiting:
                    connection.send(waiting.popleft())
                else:
                    connection.close()
                    busy.pop(connection).join()
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _serve(connection: Connection, work: Callable[[Any], Iterable[Any]], threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all: the first process ends the others
    torch.set_num_threads(threads)

    def tell(kind: str, content: Any = None) -> None:
        connection.send_bytes(pickle.dumps((kind, content)))  # by value: `send` would keep a file open for each tensor

    try:
        while True:
            for result in work(connection.recv()):
                tell("result", result)
            tell("done")
    except EOFError:  # nothing is left
        return
    except Exception as error:
        tell("error", error)
