"""Scaling laws as a picture: a row for each protocol and approach."""

from __future__ import annotations

import io
from collections.abc import Sequence
from textwrap import fill
from typing import Any

import numpy as np

from certtrain.errors import optional_module
from certtrain.studies.scaling.fits import Laws, Optimum, Point, Resampled, curves, isoflop_optimum
from certtrain.studies.scaling.results import Fitted

LINE, POINT, BAND = "#3f8cc8", "#d1495b", 0.2


def picture(fits: Sequence[Fitted], forecast: float) -> bytes:
    """PNG: IsoFLOP curves; optimal width, and epochs; the error with its forecast.

    The optima of the curves are in every panel, also where the laws were fitted to all runs.
    """
    figure = optional_module("matplotlib.figure", "report").Figure(figsize=(15, 3.6 * len(fits)), layout="constrained")
    for row, fitted in zip(figure.subplots(len(fits), 4, squeeze=False), fits, strict=True):
        optima = [isoflop_optimum(curve) for curve in curves(fitted.points).values()]
        _isoflop(row[0], fitted.points, optima)
        row[0].set_title(f"{fitted.protocol}, {fitted.approach}", loc="left")
        if fitted.laws is None or fitted.resampled is None:
            for axes in row[1:]:
                axes.set_axis_off()
            row[1].text(0, 0.5, fill(fitted.why_not, 60), fontsize=8)
            continue
        for axes, name in zip(row[1:], ("width", "epochs", "error"), strict=True):
            _law(axes, fitted.laws, fitted.resampled, optima, name, forecast)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()


def _isoflop(axes: Any, runs: Sequence[Point], optima: Sequence[Optimum]) -> None:
    shades = optional_module("matplotlib", "report").colormaps["viridis"]
    budgets = curves(runs)
    for number, (budget, points) in enumerate(budgets.items()):
        color = shades(number / max(1, len(budgets) - 1))
        widths, errors = [point.width for point in points], [point.error for point in points]
        axes.errorbar(
            widths,
            errors,
            [point.noise for point in points],
            color=color,
            marker="o",
            markersize=3,
            label=f"{budget:.2g}",
        )
    for optimum in optima:
        axes.plot(optimum.width, optimum.error, "*", color=POINT, fillstyle="none" if optimum.at_edge else "full")
    axes.set(xlabel="width", ylabel="verified error, validation images")
    _doubling(axes.xaxis, axes.set_xscale)
    if budgets:
        axes.legend(title="FLOP", fontsize=6, title_fontsize=7)


def _law(axes: Any, laws: Laws, resampled: Resampled, optima: Sequence[Optimum], name: str, forecast: float) -> None:
    computes = np.geomspace(laws.range[0], forecast, 60)
    law = getattr(laws, name)
    axes.plot(computes, [law(compute) for compute in computes], color=LINE)
    bands = [resampled.at(compute)[name] for compute in computes]
    if all(band is not None for band in bands):
        axes.fill_between(computes, *zip(*bands, strict=True), color=LINE, alpha=BAND, linewidth=0)
    for optimum in optima:
        style = "none" if optimum.at_edge else "full"
        axes.plot(optimum.compute, getattr(optimum, name), "o", color=POINT, fillstyle=style)
    axes.plot(forecast, law(forecast), "*", color=POINT, markersize=10)
    axes.axvline(forecast, color="#8b95a1", linestyle=":")
    axes.set(xscale="log", xlabel="FLOP", ylabel="verified error" if name == "error" else f"optimal {name}")
    if name != "error":
        _doubling(axes.yaxis, axes.set_yscale)


def _doubling(axis: Any, set_scale: Any) -> None:
    """A logarithmic axis of small numbers, marked at powers of two."""
    set_scale("log", base=2)
    axis.set_major_formatter("{x:g}")
