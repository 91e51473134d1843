"""How this process was started, told from its environment: needs no torch."""

from __future__ import annotations

import os

LAUNCHED = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}  # as torchrun sets


def launched() -> bool:
    """Whether torchrun started this process, as one of several or alone."""
    return os.environ.keys() >= LAUNCHED


def is_first_process() -> bool:
    """`Ranks.is_first` before, or without, `process_group`."""
    return not launched() or os.environ["RANK"] == "0"
