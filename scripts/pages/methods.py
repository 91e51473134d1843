"""docs/results/methods.md: verification methods beside auto_LiRPA."""

from __future__ import annotations

from typing import Any

from common import RESULTS

from pages.common import put, read


def fill() -> None:
    put(
        RESULTS / "methods.md",
        methods=methods_table(read("methods")["rows"]),
        fusion=fusion_table(read("fusion")["rows"]),
    )


def methods_table(rows: list[dict[str, Any]]) -> str:
    engines = ("certtrain", "auto_LiRPA", "certtrain, as it is used")
    sides = "certtrain | auto_LiRPA | as used"
    lines = [f"| network | method | images | error: {sides} | s per image: {sides} |", "|---|---|" + "---:|" * 7]
    for row in (r for r in rows if r["engine"] == engines[0]):
        by_engine = {r["engine"]: r for r in rows if same_question(r, row)}
        found = [by_engine[engine] for engine in engines]
        errors = [r.get("failed") or f"{100 * r['verified_error']:.1f} %" for r in found]
        seconds = ["–" if "failed" in r else f"{r['seconds_per_image']:.3g}" for r in found]
        lines.append(f"| {row['network']} | {row['method']} | {row['images']} | {' | '.join([*errors, *seconds])} |")
    return "\n".join(lines)


def same_question(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one[key] == other[key] for key in ("network", "method", "images"))


def fusion_table(rows: list[dict[str, Any]]) -> str:
    lines = ["| classes | loss | seconds per step | peak memory, MiB |", "|---:|---|---:|---:|"]
    lines += [f"| {r['classes']} | {r['form']} | {r['seconds']:.2f} | {r['peak_mebibytes']} |" for r in rows]
    return "\n".join(lines)
