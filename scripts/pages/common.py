"""What several pages need: results, marks, and how a figure with its interval is written."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import ERRORS, RESULTS

from certtrain.runtime.files import write_text
from certtrain.studies.statistics import mean_interval


def read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def read_if_measured(name: str) -> Any:
    """None where it is not: a device may have been out of reach."""
    return read(name) if (RESULTS / f"{name}.json").exists() else None


def of_setting(name: str, file: str = "reproduce") -> list[dict[str, Any]]:
    runs = map(json.loads, (RESULTS / f"{file}.jsonl").read_text().splitlines())
    return [run for run in runs if run["setting"] == name]


def put(page: Path, **tables: str) -> None:
    """Put each table between `<!-- name -->` and `<!-- /name -->`, which the page must have."""
    text = page.read_text()
    for name, table in tables.items():
        first, last = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        head, opened, rest = text.partition(first)
        _, closed, tail = rest.partition(last)
        if not (opened and closed):
            raise SystemExit(f"{page}: no place for the table {name}: {first.strip()} … {last}")
        text = f"{head}{first}{table}\n{last}{tail}"
    write_text(page, text)


def seeds_table(summaries: list[dict[str, Any]]) -> str:
    lines = ["| seed | natural error | PGD error | verified error | seconds |", "|---:|---:|---:|---:|---:|"]
    for summary in summaries:
        errors = " | ".join(f"{100 * summary[key]:.1f} %" for key in ERRORS)
        lines.append(f"| {summary['seed']} | {errors} | {summary['train_seconds']:.0f} |")
    return "\n".join(lines)


def spread(rows: list[dict[str, Any]], key: str) -> str:
    """Mean and range over the seeds that ended, in percent."""
    values = [100 * row[key] for row in rows if key in row]
    return f"{statistics.mean(values):.1f} % ({min(values):.1f}–{max(values):.1f})" if values else "–"


def estimate(values: Sequence[float], signed: bool = False) -> str:
    """In percent: the mean, and from two values on half the width of its 95 % interval."""
    if not values:
        return "–"
    interval = mean_interval(values)
    half = "" if interval is None else f" ± {50 * (interval.high - interval.low):.1f}"
    return f"{100 * statistics.fmean(values):{'+' if signed else ''}.1f}{half}"


def with_interval(value: float, interval: Sequence[float] | None, form: str) -> str:
    return f"{value:{form}}" + (f" ({interval[0]:{form}} to {interval[1]:{form}})" if interval else "")


def shown(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)
