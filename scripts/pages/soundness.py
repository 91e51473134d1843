"""docs/soundness.md: what sound bounds and the checker cost."""

from __future__ import annotations

from typing import Any

from common import DOCS

from pages.common import put, read


def fill() -> None:
    put(DOCS / "soundness.md", soundness=soundness_table(read("soundness")["networks"]))


def soundness_table(networks: list[dict[str, Any]]) -> str:
    names = [row["bounds"] for row in networks[0]["rows"]]
    lines = ["| network | images | " + " | ".join(names) + " | points | outside | checked | s per image |"]
    lines.append("|---|---:|" + "---:|" * (len(names) + 4))
    for network in networks:
        cells = [f"{100 * row['verified_error']:.2f} % ({row['seconds']:.1f} s)" for row in network["rows"]]
        tail = f"{network['points']:,} | {network['outside']} | {network['checked']} | "
        tail += f"{network['checker_seconds_per_image']:.3f}"
        lines.append(f"| {network['network']} | {network['images']:,} | {' | '.join(cells)} | {tail} |")
    return "\n".join(lines)
