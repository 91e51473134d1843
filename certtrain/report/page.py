"""A run as one HTML page: what was trained, how, and what is proved of it; with nothing to be fetched."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from certtrain.config import Config
from certtrain.config.radius import format_radius
from certtrain.data import Dataset
from certtrain.errors import CheckpointError, optional_module, printable
from certtrain.report import plots
from certtrain.report.examples import Example, judge
from certtrain.report.forgetting import forgetting_table
from certtrain.runs.directory import are_of_run, results_in, stored_config
from certtrain.runs.files import METRICS, RADII, SUMMARY, VERIFIED, is_finished
from certtrain.runs.metrics import read_records
from certtrain.runs.records import Epoch, Radii, Record, Summary, Verified, checked
from certtrain.runtime.files import read_json, write_text
from certtrain.verification.verdicts import Verdict

EXAMPLES = 12  # of each verdict
MEANING = {
    Verdict.PROVED: "no perturbation within epsilon changes the prediction",
    Verdict.UNKNOWN: "classified right, neither proved nor attacked",
    Verdict.ATTACKED: "the attack found a misclassified point within epsilon",
    Verdict.MISCLASSIFIED: "wrong without any perturbation",
}
Curve = tuple[list[float], list[float]]  # epsilons, errors
SHOWN = (Verdict.PROVED, Verdict.ATTACKED, Verdict.UNKNOWN)


def write_report(run: Path, config: Config, model: nn.Module, dataset: Dataset, file: Path, limit: int) -> None:
    """Write the page of the finished run in the folder `run`; its first `limit` test images are verified again.

    Args:
        config: how they are verified, and which images; what the run itself was is read from its folder.

    Raises:
        CheckpointError: the run is not finished, or one of its files is missing or corrupt.
        MissingDependency: matplotlib or jinja2 is not installed.
    """
    page = template("page.html")
    summary, epochs = _read_summary(run), _read_epochs(run)
    trained, measured = stored_config(run), newest_results(run, summary)
    drawn = _draw(epochs) | {"errors_over_eps": plots.errors_over_eps(*error_curves(measured))}
    result, examples = judge(config, model, dataset, summary["eps"], limit, EXAMPLES)
    counts = {verdict: int(flags.sum()) for verdict, flags in result.flags_by_verdict.items()}
    text = page.render(
        _show(trained, summary),
        title=printable(run.resolve().name),
        plots=drawn,
        measured=_described(measured),
        images=len(result.correct),
        judged_split=config.verification.split,
        data=config.data.name,
        methods=", ".join(config.verification.method),
        verdicts=[(verdict, count, MEANING[verdict]) for verdict, count in counts.items()],
        gallery=[
            (verdict, counts[verdict], [_figure(example, dataset.classes, result.eps) for example in examples[verdict]])
            for verdict in SHOWN
        ],
        config=trained.to_yaml(),
    )
    write_text(file, text)


def template(name: str) -> Any:
    """One of certtrain's pages, to be rendered.

    Raises:
        MissingDependency: jinja2 is not installed.
    """
    jinja2 = optional_module("jinja2", "report")
    loader = jinja2.PackageLoader("certtrain", "report")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.get_template(name)


# --- what is read ----------------------------------------------------------------------------------------------------


def error_curves(measured: Mapping[str, Any]) -> tuple[float, dict[str, Curve]]:
    """Natural error, and PGD and verified error over epsilon, of `newest_results`."""
    if "pgd_eps" in measured:
        natural = measured["natural_error"]
        curves = {
            "pgd": (measured["pgd_eps"], measured["pgd_error"]),
            "verified": (measured["eps"], measured["verified_error"]),
        }
    else:
        radii = sorted(measured["radii"], key=lambda result: result["eps"])
        natural, eps = radii[0]["natural_error"], [result["eps"] for result in radii]
        curves = {key: (eps, [result[f"{key}_error"] for result in radii]) for key in ("pgd", "verified")}
    return natural, {key: _from_zero(natural, *curve) for key, curve in curves.items()}


def newest_results(run: Path, summary: Mapping[str, Any]) -> Mapping[str, Any]:
    """The newest of radius.json, else of verify.json, on no fewer images than the summary; else the summary."""
    for kind, name in ((Radii, RADII), (Verified, VERIFIED)):
        for file in results_in(run, name):
            content = _read_own(kind, file, summary)
            if content is not None and (content["images"] or math.inf) >= summary.get("images", 0):
                return content
    return summary


def _described(measured: Mapping[str, Any]) -> str:
    """By which bounds, and of how many images, where that was written down."""
    by = f"Bounds by {measured['method'].replace(',', ', ')}" if measured["method"] else ""
    sound = f", sound in {measured['arithmetic']}" if by and measured["arithmetic"] else ""
    images = f"{measured['images']} images" if measured["images"] else ""
    return "; ".join(filter(None, (by + sound, images)))


def _from_zero(natural: float, eps: Sequence[float], errors: Sequence[float]) -> Curve:
    return (list(eps), list(errors)) if 0 in eps else ([0.0, *eps], [natural, *errors])


def _read_summary(run: Path) -> dict[str, Any]:
    if not is_finished(run):
        raise CheckpointError(f"{run} holds no finished run (it has no {SUMMARY}): continue it with train --resume")
    return _read(Summary, run / SUMMARY)


def _read_own(kind: type[Record], file: Path, summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the file says, where it is about the run's own network and images."""
    content = _read(kind, file)
    return content if are_of_run(content, summary) else None


def _read(kind: type[Record], file: Path) -> dict[str, Any]:
    return checked(kind, read_json(file), file)


def _read_epochs(run: Path) -> list[dict[str, Any]]:
    file = run / METRICS
    epochs = [checked(Epoch, record, file) for record in read_records(file)]
    if not epochs:
        raise CheckpointError(f"{file} is empty: there is nothing to plot")
    if len({len(epoch["layers"]) for epoch in epochs}) > 1:
        raise CheckpointError(f"{file} was written by another version, or edited: its epochs have other layers")
    return epochs


# --- what is shown ---------------------------------------------------------------------------------------------------


def _draw(epochs: plots.Epochs) -> dict[str, str]:
    drawings = (plots.errors, plots.losses, plots.schedules, plots.tightness, plots.relu_states)
    return {draw.__name__: draw(epochs) for draw in drawings}


def _show(config: Config, summary: Mapping[str, Any]) -> dict[str, Any]:
    radii = summary["radii"]
    return {
        "split": summary["split"] or config.verification.split,
        "subtitle": _subtitle(config, summary),
        "tiles": _tiles(summary),
        "results": [_result_row(result) for result in radii],
        "stages": _stage_rows(radii),
        "eps": _radius(summary["eps"]),
        "start": _start(summary["start"]),
        "versions": summary["versions"],
    }


def _start(start: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The network that the run began with, and the table of what became of that, where it was measured."""
    if start is None:
        return None
    head, rows = forgetting_table(start) if start["settings"] else ([], [])
    return {"file": start["file"], "head": head, "rows": rows}


def _subtitle(config: Config, summary: Mapping[str, Any]) -> str:
    parts = (config.model.name, config.data.name, f"trained by {config.training.method.name}", f"seed {config.seed}")
    images = f"{summary['images']} {summary['split'] or config.verification.split} images"
    return f"{', '.join(parts)}; {images}, bounds by {summary['method'].replace(',', ', ')}"


def _tiles(summary: Mapping[str, Any]) -> dict[str, str]:
    return {
        "epsilon": _radius(summary["eps"]),
        "natural error": f"{summary['natural_error']:.2%}",
        "PGD error": f"{summary['pgd_error']:.2%}",
        "verified error": f"{summary['verified_error']:.2%}",
        "training": _duration(summary["train_seconds"]),
        "images per second": f"{summary['images_per_second']:.0f}",
    }


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes // 60} h {minutes % 60} min"
        if minutes >= 60
        else f"{minutes} min {rest} s"
        if minutes
        else f"{rest} s"
    )


def _result_row(result: Mapping[str, Any]) -> tuple[str, ...]:
    errors = (f"{result[f'{key}_error']:.2%}" for key in ("natural", "pgd", "verified"))
    return (_radius(result["eps"]), *errors, str(result["images"]))


def _stage_rows(results: Iterable[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    return [
        (_radius(result["eps"]), stage["method"], stage["images"], stage["proved"], stage["seconds"])
        for result in results
        for stage in result["stages"]
    ]


def _radius(eps: float) -> str:
    """Five digits are enough for a reader."""
    text = format_radius(eps)
    return text if text.endswith("/255") else f"{eps:.5g}"


def _figure(example: Example, classes: Sequence[str], eps: float) -> dict[str, Any]:
    return {
        "index": example.index,
        "label": _name(example.label, classes),
        "prediction": _name(example.prediction, classes),
        "margin": f"{example.margin:.2g}",
        "pictures": [_data_uri(picture) for picture in _pictures(example, eps)],
    }


def _pictures(example: Example, eps: float) -> list[Tensor]:
    """The image; where it was attacked the adversarial point too, and how they differ: grey where they do not."""
    difference = example.point - example.image
    if not difference.any():
        return [example.image]
    return [example.image, example.point, 0.5 + 0.5 * difference / eps]


def _name(index: int, classes: Sequence[str]) -> str:
    return classes[index] if index < len(classes) else f"class {index}"


def _data_uri(image: Tensor) -> str:
    """A PNG of an image (C, H, W) in [0, 1]; grey unless it has three channels; of one pixel, its channels in a row."""
    if image.shape[1:] == (1, 1):
        pixels = image.view(1, -1)
    else:
        pixels = image.permute(1, 2, 0) if len(image) == 3 else image.mean(0)
    file = io.BytesIO()
    Image.fromarray((pixels.clamp(0, 1) * 255).round().to(torch.uint8).numpy()).save(file, format="png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
