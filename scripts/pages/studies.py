"""docs/results/studies.md: what `certtrain compare` and `certtrain tune` wrote."""

from __future__ import annotations

from typing import Any

from common import ERRORS, RESULTS

from certtrain.report.plots import standalone
from certtrain.runtime.files import write_text
from certtrain.studies.design import labels
from certtrain.studies.trials import drawn
from pages.common import put, read, shown


def fill() -> None:
    compared, search, tested = read("digits-methods"), read("tune-digits"), read("tune-digits-test")
    write_text(RESULTS / "tune-digits.svg", standalone(drawn(search)))
    put(
        RESULTS / "studies.md",
        methods=spreads_table(compared),
        paired=paired_table(compared),
        search=trials_table(search),
        test=spreads_table(tested),
        difference=paired_table(tested),
    )


def spreads_table(compared: dict[str, Any]) -> str:
    """The errors of `certtrain compare`'s groups over seeds, with the interval of the verified one's mean."""
    level = f"{compared['confidence']:.0%} interval"
    lines = [
        f"| configuration | seeds | natural error | PGD error | verified error | {level} | best | median | worst |"
    ]
    lines.append("|---|" + "---:|" * 8)
    for group in compared["groups"]:
        means = (plus_minus(group[key]) for key in ERRORS)
        verified = group["verified_error"]
        cells = (f"{100 * verified[key]:.1f} %" for key in ("min", "median", "max"))
        interval = between(verified["interval"])
        lines.append(f"| {group['name']} | {len(group['seeds'])} | {' | '.join([*means, interval, *cells])} |")
    return "\n".join(lines)


def paired_table(compared: dict[str, Any]) -> str:
    """Differences of verified error to the baseline, by seed and by image, and McNemar's p of each seed."""
    level = f"{compared['confidence']:.0%}"
    lines = [
        f"| against {compared['baseline']} | difference | {level} over seeds | {level} over images | McNemar's p |"
    ]
    lines.append("|---|" + "---:|" * 4)
    for pair in compared["paired"]:
        tests = ", ".join(f"{test['p']:.2g}" for test in pair["mcnemar"].values())
        intervals = f"{between(pair['over_seeds'])} | {between(pair['over_images'])}"
        lines.append(f"| {pair['name']} | {100 * pair['difference']:+.1f} % | {intervals} | {tests} |")
    return "\n".join(lines)


def plus_minus(spread: dict[str, Any]) -> str:
    deviation = spread["deviation"]
    return f"{100 * spread['mean']:.1f}" + ("" if deviation is None else f" ± {100 * deviation:.1f}") + " %"


def between(interval: dict[str, Any] | None) -> str:
    return "–" if interval is None else f"{100 * interval['low']:.1f} to {100 * interval['high']:.1f} %"


def trials_table(search: dict[str, Any]) -> str:
    keys = list(search["trials"][0]["settings"])
    lines = [f"| trial | natural error | verified error | {' | '.join(labels(keys))} |"]
    lines.append("|---|" + "---:|" * (2 + len(keys)))
    for trial in (trial for trial in search["trials"] if trial["values"]):
        name = f"{trial['number']}{', as shipped' * trial['is_base']}{', on the front' * trial['on_front']}"
        errors = (f"{100 * value:.1f} %" for value in trial["values"])
        settings = (
            shown(value, "{:.3g}") if isinstance(value, float) else value for value in trial["settings"].values()
        )
        lines.append(f"| {' | '.join(map(str, [name, *errors, *settings]))} |")
    return "\n".join(lines)
