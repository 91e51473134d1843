"""docs/results/profile.md: where an epoch's time goes."""

from __future__ import annotations

from typing import Any

from common import RESULTS

from pages.common import put, read


def fill() -> None:
    profile = read("profile")
    put(RESULTS / "profile.md", parts=profile_table(profile["rows"]), sizes=epochs_table(profile["sizes"]))


def profile_table(rows: list[dict[str, Any]]) -> str:
    lines = ["| part | seconds | share |", "|---|---:|---:|"]
    return "\n".join(lines + [f"| {row['part']} | {row['seconds']:.2f} | {row['share']:.1%} |" for row in rows])


def epochs_table(rows: list[dict[str, Any]]) -> str:
    epochs = range(2, 2 + len(rows[0]["seconds_by_epoch"]))
    lines = ["| images | " + " | ".join(f"epoch {epoch}, s" for epoch in epochs) + " |"]
    lines.append("|---:|" + "---:|" * len(epochs))
    lines += [f"| {r['images']:,} | " + " | ".join(f"{s:.2f}" for s in r["seconds_by_epoch"]) + " |" for r in rows]
    return "\n".join(lines)
