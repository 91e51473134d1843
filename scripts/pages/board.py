"""docs/results/board.md: small networks by whole schedules."""

from __future__ import annotations

import statistics
from typing import Any

from common import RESULTS

from certtrain.studies.design import load_study
from certtrain.studies.reading import study_path
from pages.common import put, read
from pages.studies import paired_table, spreads_table


def fill() -> None:
    board, kept = read("board"), read("board_8_255")
    smaller, searched = read("board_2_255"), read("board_2_255_searched")
    larger = together(board, kept)["groups"]
    put(
        RESULTS / "board.md",
        board=board_table("board_cifar10_8_255", larger),
        networks=networks_table(larger),
        spreads_8_255_kept=spreads_table(kept),
        spreads=spreads_table(board),
        paired=paired_table(board),
        board_2_255=board_table("board_cifar10_2_255", smaller["groups"]),
        spreads_2_255=spreads_table(smaller),
        paired_2_255=paired_table(smaller),
        spreads_2_255_avx512=spreads_table(read("board_2_255_avx512")),
        searched_2_255=spreads_table(searched),
        paired_2_255_searched=paired_table(searched),
    )


def together(first: dict[str, Any], *others: dict[str, Any]) -> dict[str, Any]:
    """The groups of comparisons that were made apart, of the same images at one radius by the same bounds."""
    for key in ("eps", "bounds", "split", "images", "confidence"):
        if any(other[key] != first[key] for other in others):
            raise SystemExit(f"no one table of comparisons that differ in {key}")
    return {**first, "groups": [group for part in (first, *others) for group in part["groups"]]}


def board_table(study: str, compared: list[dict[str, Any]]) -> str:
    """Networks by recipes: natural and verified error, the mean over seeds, and their number."""
    found = {tuple(group["choices"]): group for group in compared}
    cells = load_study(study_path(study)).grid.choices.values()
    recipes, networks = (list(dict.fromkeys(choices)) for choices in zip(*cells, strict=True))
    lines = [f"| network | {' | '.join(recipes)} |", "|---|" + "---:|" * len(recipes)]
    for network in networks:
        groups = (found.get((recipe, network)) for recipe in recipes)
        lines.append(f"| {network} | {' | '.join(map(board_cell, groups))} |")
    return "\n".join(lines)


def networks_table(compared: list[dict[str, Any]]) -> str:
    """Of each recipe the best, median and worst of its networks, each network's the mean over its seeds."""
    lines = ["| recipe | networks | natural error: best, median, worst | verified error: best, median, worst |"]
    lines.append("|---|---:|---:|---:|")
    for recipe in dict.fromkeys(group["choices"][0] for group in compared):
        groups = [group for group in compared if group["choices"][0] == recipe]
        cells = []
        for key in ("natural_error", "verified_error"):
            means = [100 * group[key]["mean"] for group in groups]
            cells.append(", ".join(f"{of(means):.2f}" for of in (min, statistics.median, max)) + " %")
        lines.append(f"| {recipe} | {len(groups)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def board_cell(group: dict[str, Any] | None) -> str:
    if group is None:
        return "not measured"
    errors = " / ".join(f"{100 * group[key]['mean']:.2f}" for key in ("natural_error", "verified_error"))
    return f"{errors} % ({len(group['seeds'])} seed{'s' * (len(group['seeds']) > 1)})"
