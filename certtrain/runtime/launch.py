"""How this process was started, told from its environment: needs no torch."""

from __future__ import annotations

import os

from certtrain.errors import UsageError

LAUNCHED = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}  # as torchrun sets


def launched() -> bool:
    """Whether torchrun started this process, as one of several or alone."""
    return os.environ.keys() >= LAUNCHED


def processes() -> int:
    """How many processes torchrun has started together with this one; 1 where it has started none."""
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def require_one_process(what: str) -> None:
    """Raises where several processes would do the same work, into the same files."""
    if processes() > 1:
        raise UsageError(f"{what} is for one process, and torchrun has started {processes()}: start it without")


def is_first_process() -> bool:
    """`Ranks.is_first` before, or without, `process_group`."""
    return not launched() or os.environ["RANK"] == "0"
