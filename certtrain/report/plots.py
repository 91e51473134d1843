"""Plots of a run, as SVG that takes its ink from the page around it, light or dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from certtrain.errors import optional_module, printable

INK = "#010203"  # drawn as the colour of the page's text
NAMES = {"natural": "natural error", "pgd": "PGD error", "verified": "verified error"}
COLORS = {"natural": "#3f8cc8", "pgd": "#e0902c", "verified": "#d1495b"}
LOSSES = {
    "loss": ("total", COLORS["verified"], "-"),
    "natural_loss": ("natural", COLORS["natural"], "-"),
    "robust_loss": ("robust", COLORS["pgd"], "--"),
    "tightness_loss": ("tightness", "#8b95a1", "--"),
    "relu_balance_loss": ("ReLU balance", "#8b95a1", ":"),
    "l1_loss": ("L1", "#8b95a1", "-."),
}
STATES = {"active": "#2f9e77", "inactive": "#9aa5b1", "unstable": "#e0902c"}
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "certtrain",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.15,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), INK
    ),
}

Epochs = Sequence[Mapping[str, Any]]  # records of metrics.jsonl


def losses(epochs: Epochs) -> str:
    """The loss of every epoch, and its parts."""
    with _figure() as figure:
        axes = figure.subplots()
        for key, (label, color, style) in LOSSES.items():
            _line(axes, epochs, key, color=color, linestyle=style, label=label)
        _label(axes, "epoch", "loss")
        return _svg(figure)


def errors(epochs: Epochs) -> str:
    """Errors on the training images, at each epoch's epsilon."""
    with _figure() as figure:
        axes = figure.subplots()
        for key in ("natural", "verified"):
            _line(axes, epochs, f"{key}_error", color=COLORS[key], label=NAMES[key])
        _label(axes, "epoch", "error", percent=True)
        return _svg(figure)


def schedules(epochs: Epochs) -> str:
    """Epsilon and learning rate."""
    with _figure() as figure:
        upper, lower = figure.subplots(2, sharex=True)
        _line(upper, epochs, "eps", color=COLORS["verified"])
        _line(lower, epochs, "lr", color=COLORS["natural"])
        _label(upper, "", "epsilon")
        _label(lower, "epoch", "learning rate")
        figure.align_ylabels()
        return _svg(figure)


def tightness(epochs: Epochs) -> str:
    """Tightness of each ReLU: the radius of the box that enters the first layer over that of the ReLU's own box."""
    with _figure() as figure:
        axes = figure.subplots()
        shades = optional_module("matplotlib", "report").colormaps["plasma"]
        layers = _layers(epochs)
        for number, layer in enumerate(layers):
            color = shades(0.3 + 0.55 * number / max(1, len(layers) - 1))
            _line(axes, layer, "tightness", color=color, label=f"ReLU {number + 1}")
        axes.set_yscale("log")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(_whole_numbers())
        axes.set_ylabel("tightness")
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), ncols=math.ceil(len(layers) / 12), fontsize=8)
        return _svg(figure)


def relu_states(epochs: Epochs) -> str:
    """A panel for each ReLU layer: shares of its neurons that are active, unstable and inactive."""
    layers = _layers(epochs)
    columns = min((3, 4), key=lambda count: -len(layers) % count)  # with few gaps
    rows = math.ceil(len(layers) / columns)
    with _figure(width=9.6, height=0.8 + 1.5 * rows) as figure:
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
        for number, (axes, layer) in enumerate(zip(panels, layers, strict=False), start=1):
            shares = [[record[state] for record in layer] for state in STATES]
            axes.stackplot(
                [record["epoch"] for record in layer], shares, colors=STATES.values(), labels=STATES, linewidth=0
            )
            axes.set_title(f"ReLU {number}", fontsize=9)
            axes.margins(0)
            axes.tick_params(labelbottom=number > len(layers) - columns)
            axes.xaxis.set_major_locator(_whole_numbers())
            axes.yaxis.set_major_formatter("{x:.0%}")
        for axes in panels[len(layers) :]:
            axes.set_visible(False)
        figure.supxlabel("epoch", fontsize=9)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(STATES))
        return _svg(figure)


Curves = Mapping[str, tuple[Sequence[float], Sequence[float]]]  # for "pgd" and "verified", epsilons and errors


def errors_over_eps(natural: float, curves: Curves) -> str:
    """Errors against epsilon; the natural one is a line across."""
    with _figure() as figure:
        _draw_errors(figure.subplots(), natural, curves)
        return _svg(figure)


def errors_over_eps_png(natural: float, curves: Curves) -> bytes:
    """The same, as a picture on white."""
    with _figure() as figure:
        _draw_errors(figure.subplots(), natural, curves)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=150)
        return file.getvalue()


Histories = Mapping[str, Sequence[Epochs]]  # by name, the epochs of several runs


def learning_curves(histories: Histories) -> str:
    """Verified error on the training images of each epoch: the mean over the runs of a name, and their range."""
    with _figure(width=9.6, height=4.2) as figure:
        _draw_histories(figure.subplots(), histories)
        return _svg(figure)


def _draw_histories(axes: Any, histories: Histories) -> None:
    shades = optional_module("matplotlib", "report").colormaps["turbo"]
    lines = {}
    for number, (name, runs) in enumerate(histories.items()):
        errors: dict[int, list[float]] = {}
        for record in (record for epochs in runs for record in epochs if "verified_error" in record):
            errors.setdefault(record["epoch"], []).append(record["verified_error"])
        if not errors:
            continue
        color = shades(0.1 + 0.8 * number / max(1, len(histories) - 1))
        epochs = sorted(errors)
        means = [sum(errors[epoch]) / len(errors[epoch]) for epoch in epochs]
        ranges = [[edge(errors[epoch]) for epoch in epochs] for edge in (min, max)]
        axes.fill_between(epochs, *ranges, color=color, alpha=0.2, linewidth=0)
        (lines[name],) = axes.plot(epochs, means, color=color, marker="o" if len(epochs) == 1 else "")
    _label(axes, "epoch", "verified error of training images", percent=True)
    if lines:
        _name(axes, lines)


def _name(axes: Any, lines: Mapping[str, Any]) -> None:
    """A legend beside the axes, of names that are any text: neither mathematics nor, with an underscore, left out."""
    numbers = [str(number) for number in range(len(lines))]
    legend = axes.legend(lines.values(), numbers, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    for text, name in zip(legend.get_texts(), lines, strict=True):
        text.set(text=printable(name), parse_math=False)


Point = tuple[float, float]


def trade_off(points: Sequence[Point], front: Sequence[Point], names: Sequence[str], base: Point | None = None) -> str:
    """Two objectives of many trials, those that none surpasses joined, and where the search began, if it is known.

    Both are better when smaller.
    """
    with _figure() as figure:
        axes = figure.subplots()
        axes.scatter(*zip(*points, strict=True), s=14, color=COLORS["natural"], label="trial")
        best = sorted(front)
        axes.step(*zip(*best, strict=True), where="post", color=COLORS["verified"], marker="o", label="Pareto front")
        if base is not None:
            axes.scatter(*base, s=90, facecolors="none", edgecolors="black", label="settings before")
        axes.set_xlabel(names[0].replace("_", " "))
        axes.set_ylabel(names[1].replace("_", " "))
        axes.legend()
        return _svg(figure)


def progress_of_trials(values: Sequence[float], name: str) -> str:
    """One objective of each trial, in order, and the best so far."""
    with _figure() as figure:
        axes = figure.subplots()
        trials = range(len(values))
        axes.scatter(trials, values, s=14, color=COLORS["natural"], label="trial")
        best = [min(values[: number + 1]) for number in trials]
        axes.step(trials, best, where="post", color=COLORS["verified"], label="best so far")
        axes.set_xlabel("finished trial")
        axes.set_ylabel(name.replace("_", " "))
        axes.legend()
        return _svg(figure)


def _draw_errors(axes: Any, natural: float, curves: Curves) -> None:
    axes.axhline(natural, color=COLORS["natural"], label=NAMES["natural"])
    for key, (eps, values) in curves.items():
        measured = {"marker": "o", "markersize": 4, "linestyle": ":"} if len(eps) < 20 else {}
        axes.plot(eps, values, color=COLORS[key], label=NAMES[key], **measured)
    _label(axes, "epsilon", "error", percent=True)


def _layers(epochs: Epochs) -> list[Epochs]:
    """The records of each layer over the epochs."""
    return [
        [{"epoch": record["epoch"], **layer} for record, layer in zip(epochs, layers, strict=True)]
        for layers in zip(*(record["layers"] for record in epochs), strict=True)
    ]


def _whole_numbers() -> Any:
    return optional_module("matplotlib.ticker", "report").MaxNLocator(steps=[1, 2, 5, 10], integer=True)


def _line(axes: Any, records: Epochs, key: str, **style: Any) -> None:
    """The values of `key` over epochs; an epoch that has none is left out."""
    points = [(record["epoch"], record[key]) for record in records if key in record]
    if points:
        axes.plot(*zip(*points, strict=True), marker="o" if len(points) == 1 else "", **style)


def _label(axes: Any, x: str, y: str, percent: bool = False) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_ylim(bottom=0)
    if x == "epoch":
        axes.xaxis.set_major_locator(_whole_numbers())
    if percent:
        axes.yaxis.set_major_formatter("{x:.0%}")
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend()


@contextmanager
def _figure(width: float = 5.6, height: float = 3.2) -> Iterator[Any]:
    """An empty figure (inches), drawn in our style while the context lasts."""
    matplotlib = optional_module("matplotlib", "report")
    figures = optional_module("matplotlib.figure", "report")
    with matplotlib.rc_context(STYLE):
        yield figures.Figure(figsize=(width, height), layout="constrained")


def _svg(figure: Any) -> str:
    """An <svg> element without links, for a page."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"| (width|height)="[\d.]+pt"', "", text)
    return text.replace(INK, "currentColor")


def standalone(svg: str) -> str:
    """An <svg> element of a page as a file of its own, which must name its namespaces."""
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return svg.replace("<svg", f"<svg {namespaces}", 1)
