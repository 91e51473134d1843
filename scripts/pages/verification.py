"""docs/verification.md: branch and bound beside alpha-beta-CROWN, and its memory."""

from __future__ import annotations

import statistics
from typing import Any

from common import DOCS

from pages.common import put, read


def fill() -> None:
    settled, memory = settled_table(read("branch_and_bound")["rows"]), memory_table(read("search_memory"))
    put(DOCS / "verification.md", settled=settled, memory=memory)


def settled_table(rows: list[dict[str, Any]]) -> str:
    """Of each network, by what certtrain found: images, those that alpha-beta-CROWN settles too, and both times."""
    lines = [
        "| network | found | images | by alpha-beta-CROWN too | median s: certtrain | alpha-beta-CROWN "
        "| sum: certtrain | alpha-beta-CROWN |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for network, verdict in sorted({(row["network"], row["certtrain"]["verdict"]) for row in rows}):
        pairs = [
            (row["certtrain"], row["alpha-beta-CROWN"])
            for row in rows
            if (row["network"], row["certtrain"]["verdict"]) == (network, verdict)
        ]
        also = sum(other["verdict"] == verdict for _, other in pairs)
        seconds = [[side["seconds"] for side in sides] for sides in zip(*pairs, strict=True)]
        numbers = [f"{statistics.median(part):.2f}" for part in seconds] + [f"{sum(part):.0f}" for part in seconds]
        lines.append(f"| {network} | {verdict} | {len(pairs)} | {also} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def memory_table(measured: dict[str, Any]) -> str:
    lines = ["| `max_memory`, MiB | domains bounded | peak of the process, MiB |", "|---:|---:|---:|"]
    lines += [f"| {row['max_memory']} | {row['domains']:,} | {row['peak']:.0f} |" for row in measured["rows"]]
    return "\n".join([*lines, "", f"The peak grows by {measured['growth']:.2f} MiB with each MiB of `max_memory`."])
