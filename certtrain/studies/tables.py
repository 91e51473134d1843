"""A comparison as tables, and tables as text for a terminal, Markdown and LaTeX."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from certtrain.errors import printable
from certtrain.studies.compare import Comparison, Paired, Spread, is_error
from certtrain.studies.groups import Group
from certtrain.studies.statistics import ConfidenceInterval

ABSENT = "–"
_LATEX = {"&": r"\&", "%": r"\%", "#": r"\#", "_": r"\_", "$": r"\$", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}"}
_LATEX |= {
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
    "±": r"$\pm$",
    "–": "--",
    "−": "$-$",
    "ε": r"$\epsilon$",
}
_LATEX |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}


@dataclass(frozen=True)
class Sheet:
    """A table of text; the first column names the rows. Names of folders and settings are any text: see `printable`."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def __post_init__(self) -> None:
        shown = {
            "title": printable(self.title),
            "columns": [printable(cell) for cell in self.columns],
            "rows": [[printable(cell) for cell in cells] for cells in self.rows],
            "note": printable(self.note),
        }
        for key, text in shown.items():
            object.__setattr__(self, key, text)


def sheets(comparison: Comparison) -> list[Sheet]:
    """Means of every metric; errors across a grid; their scatter; differences to the baseline, and of settings."""
    errors = [metric for metric in comparison.metrics if is_error(metric)]
    tables = [_means(comparison)]
    tables += [_crossed(comparison, metric) for metric in errors] if _is_crossed(comparison) else []
    tables += [_scatter(comparison, metric) for metric in errors]
    tables += [_paired(comparison)] if comparison.paired else []
    tables += [_settings(comparison)] if len(comparison.groups) > 1 else []
    if comparison.unfinished:
        tables.append(Sheet("Not finished, and not counted", ["run"], [[name] for name in comparison.unfinished]))
    return tables


def subtitle(comparison: Comparison) -> str:
    runs = sum(len(group.runs) for group in comparison.groups)
    images = f"{comparison.images} {comparison.split} images"
    attack = comparison.conditions["verification.attack"]
    attacks = f", attacks by {attack}" if attack else ""
    return f"{runs} runs, {images}, epsilon {comparison.eps:.5f}, bounds by {comparison.bounds}{attacks}"


def _means(comparison: Comparison) -> Sheet:
    def row(group: Group) -> list[str]:
        return [group.name, str(len(group.runs)), *(_mean(comparison, group, metric) for metric in comparison.metrics)]

    columns = ["configuration", "runs", *map(_heading, comparison.metrics)]
    note = f"Mean ± standard deviation over runs, which are seeds.{_others(comparison)}"
    return Sheet(f"Results: {subtitle(comparison)}", columns, [row(group) for group in comparison.groups], note)


def _others(comparison: Comparison) -> str:
    """On how many images runs were verified besides."""
    runs = [run for group in comparison.groups for run in group.runs]
    counts = Counter(count for run in runs for count in run.image_counts if count != comparison.images)
    if not counts:
        return ""
    besides = ", ".join(f"{counts[count]} of {len(runs)} runs on {count}" for count in sorted(counts))
    return f" {comparison.images} images are the most that all runs were verified on; there are also {besides}."


def _is_crossed(comparison: Comparison) -> bool:
    """Whether the groups differ along the first axis of a grid, and along the others."""
    return bool(comparison.axes) and all(
        len({group.choices[part] for group in comparison.groups}) > 1 for part in (slice(1), slice(1, None))
    )


def _crossed(comparison: Comparison, metric: str) -> Sheet:
    """The choices of the first axis as columns, those of all others as rows."""
    cells = {group.choices: _mean(comparison, group, metric) for group in comparison.groups}
    columns = list(dict.fromkeys(choice for choice, *_ in cells))
    others = dict.fromkeys(choices[1:] for choices in cells)
    rows = [["_".join(other), *(cells.get((column, *other), ABSENT) for column in columns)] for other in others]
    first, *rest = comparison.axes
    heading = _heading(metric)
    return Sheet(f"{heading[0].upper()}{heading[1:]} by {first}", [" and ".join(rest), *columns], rows)


def _scatter(comparison: Comparison, metric: str) -> Sheet:
    rows, methods = [], set()
    for group in comparison.groups:
        spread = comparison.spread(group, metric)
        if spread is None:
            continue
        cells = (spread.mean, min(spread.values), _median(spread), max(spread.values))
        mean, best, median, worst = (_number(metric, value) for value in cells)
        rows.append(
            [group.name, mean + _of_how_many(group, spread), _interval(metric, spread.interval), best, median, worst]
        )
        methods |= {spread.interval.method} if spread.interval else set()
    level = f"{percentage(comparison.confidence)} interval"
    note = f"Intervals of the mean over seeds by {' or '.join(sorted(methods))}." if methods else ""
    heading = _heading(metric)
    return Sheet(
        heading[0].upper() + heading[1:], ["configuration", "mean", level, "best", "median", "worst"], rows, note
    )


def _paired(comparison: Comparison) -> Sheet:
    def row(pair: Paired) -> list[str]:
        tests = [
            f"seed {seed} {test.only_second}:{test.only_first} {_p_value(test.p)}" for seed, test in pair.tests.items()
        ]
        return [
            pair.name,
            _signed(pair.difference) + ("" if pair.seeds else " (of means)"),
            _interval("verified_error", pair.over_seeds),
            _interval("verified_error", pair.over_images),
            ", ".join(tests) or ABSENT,
        ]

    level = percentage(comparison.confidence)
    columns = ["configuration", "difference", f"{level} over seeds", f"{level} over images", "McNemar, by seed"]
    alike = "" if comparison.baseline == comparison.groups[0].name else " with all other choices alike"
    note = (
        f"Verified error minus that of {comparison.baseline}{alike}, of the same seeds on the same images; below 0 is "
        "better. McNemar: images that only the baseline proves : images that only this one proves, and the exact "
        "two-sided p of each pair of networks, not adjusted for the number of tests."
    )
    if any(pair.tests.keys() != set(pair.seeds) for pair in comparison.paired):
        note += " Over images: of the seeds with a test; the others have no verdicts of each image."
    if not all(pair.seeds for pair in comparison.paired):
        note += " Of means: no seed is in both, and the means of other seeds are subtracted."
    return Sheet(f"Against {comparison.baseline}", columns, [row(pair) for pair in comparison.paired], note)


def _settings(comparison: Comparison) -> Sheet:
    rows = [[key, *map(_setting, values)] for key, values in comparison.settings.items()]
    return Sheet("Settings that differ", ["setting", *(group.name for group in comparison.groups)], rows)


def _setting(value: Any) -> str:
    return ABSENT if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _heading(metric: str) -> str:
    return metric.replace("_", " ").replace("pgd", "PGD").replace("train seconds", "seconds of training")


def _number(metric: str, value: float) -> str:
    if is_error(metric):
        return f"{value:.2%}"
    return f"{value:.0f}" if 1e4 <= abs(value) < 1e16 else f"{value:.4g}"  # seconds of a long training, say


def percentage(share: float) -> str:
    """With as many decimals as it has."""
    return f"{100 * share:.10g}%"


def _p_value(p: float) -> str:
    return f"p={p:.2g}" if p >= 1e-300 else "p<1e-300"  # where floats end


def _mean(comparison: Comparison, group: Group, metric: str) -> str:
    spread = comparison.spread(group, metric)
    if spread is None:
        return ABSENT
    deviation = "" if spread.deviation is None else f" ± {_number(metric, spread.deviation)}"
    return _number(metric, spread.mean) + deviation + _of_how_many(group, spread)


def _of_how_many(group: Group, spread: Spread) -> str:
    """Said where not all runs report the metric."""
    count, runs = len(spread.values), len(group.runs)
    return "" if count == runs else f" ({count} of {runs} runs)"


def _median(spread: Spread) -> float:
    return float(spread.summary()["median"])


def _signed(value: float) -> str:
    return f"{value:+.2%}".replace("-", "−")


def _interval(metric: str, interval: ConfidenceInterval | None) -> str:
    if interval is None:
        return ABSENT
    return f"{_number(metric, interval.low)} to {_number(metric, interval.high)}".replace("-", "−")


# --- as text ----------------------------------------------------------------------------------------------------------


def show(console: Console, tables: Sequence[Sheet]) -> None:
    """Each as it fits the console: upright, on its side, or its columns in as few tables as they take."""
    for sheet in tables:
        ways = [_in_parts(console, sheet), _in_parts(console, Sheet(sheet.title, *_turned(sheet), sheet.note))]
        for part in min(ways, key=len):
            console.print(_rich_table(part), markup=False)


def _in_parts(console: Console, sheet: Sheet) -> list[Sheet]:
    """Tables with the first column and as many others as fit; one column too wide is folded."""
    parts = [[0]]
    for column in range(1, len(sheet.columns)):
        wider = [*parts[-1], column]
        if len(wider) > 2 and _width(console, _of_columns(sheet, wider)) > console.width:
            parts.append([0, column])
        else:
            parts[-1] = wider
    return [
        replace(
            _of_columns(sheet, part),
            title=sheet.title if part is parts[0] else f"{sheet.title} (continued)",
            note=sheet.note if part is parts[-1] else "",
        )
        for part in parts
    ]


def _of_columns(sheet: Sheet, columns: Sequence[int]) -> Sheet:
    rows = [[row[column] for column in columns] for row in sheet.rows]
    return replace(sheet, columns=[sheet.columns[column] for column in columns], rows=rows)


def _width(console: Console, sheet: Sheet) -> int:
    """Of the columns, in characters, if there were room for all; title and note are wrapped."""
    table = _rich_table(replace(sheet, title="", note=""))
    return console.measure(table, options=console.options.update(width=10_000, markup=False)).maximum


def _turned(sheet: Sheet) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table with its rows as columns."""
    first, *columns = zip(sheet.columns, *sheet.rows, strict=True)
    return list(first), [list(column) for column in columns]


def _rich_table(sheet: Sheet) -> Table:
    # a print's markup=False reaches columns and cells, but not title and caption
    title, note = Text(sheet.title, "table.title"), Text(sheet.note, "table.caption")
    table = Table(title=title, caption=note if sheet.note else None, caption_justify="left")
    for number, column in enumerate(sheet.columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    for cells in sheet.rows:
        table.add_row(*cells)
    return table


def to_markdown(tables: Sequence[Sheet]) -> str:
    return "\n\n".join("\n".join(_markdown_lines(sheet)) for sheet in tables) + "\n"


def _markdown_lines(sheet: Sheet) -> Iterator[str]:
    yield f"**{_markdown(sheet.title)}**"
    yield ""
    yield _markdown_row(sheet.columns)
    yield "|---|" + "---:|" * (len(sheet.columns) - 1)
    yield from map(_markdown_row, sheet.rows)
    if sheet.note:
        yield ""
        yield _markdown(sheet.note)


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(_markdown, cells)) + " |"


def _markdown(text: str) -> str:
    """Within a word, an underscore is one as it is."""
    return re.sub(r"[\\`*\[<&~$|]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", text)


def to_latex(tables: Sequence[Sheet]) -> str:
    """Tables for LaTeX with the package booktabs."""
    return "\n\n".join("\n".join(_latex_lines(sheet)) for sheet in tables) + "\n"


def _latex_lines(sheet: Sheet) -> Iterator[str]:
    yield r"\begin{table}"
    yield rf"\caption{{{_latex(sheet.title)}{'. ' if sheet.note else ''}{_latex(sheet.note)}}}"
    yield rf"\begin{{tabular}}{{l{'r' * (len(sheet.columns) - 1)}}}"
    yield r"\toprule"
    yield _latex_row(sheet.columns)
    yield r"\midrule"
    yield from map(_latex_row, sheet.rows)
    yield r"\bottomrule"
    yield r"\end{tabular}"
    yield r"\end{table}"


def _latex_row(cells: Sequence[str]) -> str:
    row = " & ".join(map(_latex, cells)) + r" \\"
    return "{}" + row if row.lstrip().startswith(("[", "*")) else row  # which would belong to the command before it


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)
