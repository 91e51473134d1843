"""What results look like on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from certtrain.report.forgetting import forgetting_table
from certtrain.runtime.console import tell
from certtrain.verification.verdicts import GAVE_UP

if TYPE_CHECKING:
    from certtrain.config import Config

NOTHING_PROVED = 0.95  # a verified error from which on training has come to nothing


def show_results(
    console: Console, results: Sequence[dict], validation: Sequence[dict] = (), split: str = "test"
) -> None:
    """A row for each radius, and below them those of the validation images where there are any beside `split`'s."""
    sound = f", sound in {results[0]['arithmetic']}" if results[0]["arithmetic"] else ""
    attacks = f", attacks by {results[0]['attack']}" if results[0].get("attack") else ""
    table = Table(title=f"{results[0]['images']} {split} images, bounds by {results[0]['method']}{sound}{attacks}")
    if validation:
        table.add_column("images")
    for column in ("epsilon", "natural error", "PGD error", "verified error", "seconds"):
        table.add_column(column, justify="right")
    for name, part in ((split, results), ("validation", validation)):
        for result in part:
            errors = [f"{result[key]:.2%}" for key in ("natural_error", "pgd_error", "verified_error")]
            images = [f"{result['images']} {name}"] if validation else []
            table.add_row(*images, f"{result['eps']:.5f}", *errors, f"{result['seconds']:.1f}")
    console.print(table)
    if len(results[0]["stages"]) > 1:
        _show_stages(console, results)
    for result in results:
        undecided = [f"{count} {name}" for name, count in result.get("verdicts", {}).items() if name in GAVE_UP]
        if undecided:
            tell(console, f"undecided by branch and bound at {result['eps']:.5f}: {', '.join(undecided)}")


def _show_stages(console: Console, results: Sequence[dict]) -> None:
    table = Table(title="what each method was asked, and proved")
    for column in ("epsilon", "method", "images", "proved", "seconds", "seconds per image"):
        table.add_column(column, justify="right")
    for result in results:
        for stage in result["stages"]:
            each = f"{stage['seconds'] / stage['images']:.2g}" if stage["images"] else "–"
            counts = (str(stage[key]) for key in ("images", "proved"))
            table.add_row(f"{result['eps']:.5f}", stage["method"], *counts, f"{stage['seconds']:.2f}", each)
    console.print(table)


def show_forgetting(console: Console, start: Mapping[str, Any]) -> None:
    """What the network was on the setting it comes from and on the present one, before, along the way and after."""
    head, rows = forgetting_table(start)
    table = Table(title=Text(f"on the way from {start['file']}", "table.title"))  # whose brackets are no markup
    for column in head:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def hints(config: Config, summary: Mapping[str, Any]) -> list[str]:
    """What to try where training has come to nothing: a line, or none.

    Args:
        summary: of summary.json; its errors are those at `Config.judged_radius`.
    """
    if summary["verified_error"] < NOTHING_PROVED:
        return []
    method = config.training.method
    if method.usual_prover == "nothing":
        return [f"hint: hardly anything is proved: training.method {method.name} does not train for that, ibp does"]
    smaller = f"a smaller radius (epsilon.max={config.epsilon.max / 2:.3g})"
    if summary["natural_error"] >= NOTHING_PROVED / 2:
        return [f"hint: the network has learned little: try {smaller}, more epochs, another optimizer.lr"]
    if method.usual_prover == "search" and "branch-and-bound" not in config.verification.method:
        asked = "certtrain verify RUN --method ibp,crown-ibp,alpha-crown,branch-and-bound"
        return [f"hint: hardly anything is proved by bounds alone: networks by {method.name} need a search, {asked}"]
    epsilon, epochs = config.epsilon, config.training.epochs
    warmup = min(2 * epsilon.warmup_epochs, 3 * (epochs - epsilon.start_epoch + 1) // 4)  # of those there are
    slower = f"a longer warmup (epsilon.warmup_epochs={warmup})" if warmup > epsilon.warmup_epochs else "more epochs"
    return [f"hint: hardly anything is proved: try {slower}, {smaller}, training.method=crown-ibp"]
