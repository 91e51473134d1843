"""metrics.jsonl: what every epoch came to, and steps.jsonl: what steps did; read without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from certtrain.errors import CheckpointError
from certtrain.runtime.files import parse_json, write_text


class MetricsFile:
    """metrics.jsonl: one line per epoch. A resumed run drops the lines of epochs that it will train again.

    Args:
        keep: the last epoch whose line stays.
        key: "epoch", or what else the lines are counted by.

    Raises:
        CheckpointError: a line is no epoch's record.
    """

    def __init__(self, path: Path, keep: int, key: str = "epoch") -> None:
        self._path = path
        old = read_records(path, key) if path.exists() else []
        self._lines = [json.dumps(record) for record in old if record[key] <= keep]

    @property
    def last(self) -> dict[str, Any]:
        """The record of the latest epoch, empty before the first."""
        return parse_json(self._lines[-1]) if self._lines else {}

    def add(self, record: dict[str, Any]) -> None:
        self._lines.append(json.dumps(record))
        write_text(self._path, "\n".join(self._lines) + "\n")


def read_records(path: Path, key: str = "epoch") -> list[dict[str, Any]]:
    """The records of metrics.jsonl, or of a file counted by another key, in order; blank lines are none.

    Raises:
        CheckpointError: it cannot be read, or a line is no epoch's record.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is missing or corrupt ({error})") from error
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict) or type(record.get(key)) is not int:
            raise CheckpointError(f"{path} is missing or corrupt (line {number} is no record of an epoch)")
        records.append(record)
    return records
