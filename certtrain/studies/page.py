"""Files of a comparison: JSON, Markdown, LaTeX, an HTML page, and the learning curves as SVG, by the file's ending."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from certtrain.errors import UsageError, printable, shown
from certtrain.report import plots
from certtrain.runtime.files import write_text
from certtrain.studies.compare import Comparison
from certtrain.studies.tables import Sheet, sheets, subtitle, to_latex, to_markdown

Plot = tuple[str, str]  # heading, SVG


def check_ending(file: Path) -> None:
    """Raises UsageError for a file of no known kind."""
    if file.suffix not in WRITERS:
        raise UsageError(f"{shown(str(file))}: its ending says what is written: {', '.join(WRITERS)}")


def write_comparison(file: Path, comparison: Comparison, title: str) -> None:
    """Write `comparison` as what the ending of `file` says (`WRITERS`).

    Raises:
        MissingDependency: .html and .svg need matplotlib and jinja2.
    """
    check_ending(file)
    write_text(file, WRITERS[file.suffix](comparison, title))


def html(comparison: Comparison, title: str, more: Sequence[Sheet] = (), more_plots: Sequence[Plot] = ()) -> str:
    """One page that needs nothing else; with other tables and plots before those of the comparison."""
    from certtrain.report.page import template

    return str(
        template("study.html").render(
            title=printable(title),
            subtitle=subtitle(comparison),
            sheets=[*more, *sheets(comparison)],
            plots=[*more_plots, ("Learning curves", curves(comparison))],
        )
    )


def curves(comparison: Comparison) -> str:
    return plots.learning_curves({group.name: [run.epochs for run in group.runs] for group in comparison.groups})


WRITERS: dict[str, Callable[[Comparison, str], str]] = {
    ".json": lambda comparison, title: json.dumps(comparison.summary(), indent=2) + "\n",
    ".md": lambda comparison, title: to_markdown(sheets(comparison)),
    ".tex": lambda comparison, title: to_latex(sheets(comparison)),
    ".html": html,
    ".svg": lambda comparison, title: plots.standalone(curves(comparison)),
}
