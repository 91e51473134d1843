from __future__ import annotations

import base64
import copy
import io
import json
import math
import re
import shutil
import sys
from dataclasses import replace
from functools import reduce
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from certtrain.bounds import linf_box
from certtrain.config import load_config
from certtrain.data import Dataset, Split, load_dataset
from certtrain.errors import CheckpointError
from certtrain.report import plots
from certtrain.report.examples import judge
from certtrain.report.page import _read_epochs, _read_summary, _show, error_curves, newest_results, write_report
from certtrain.runs.checkpoint import load_model
from tests.commands import contents
from tests.networks import Threshold

VOID = {"meta", "br", "img"}


class Page(HTMLParser):
    """What is in a page, and the cells of its tables; asserts that every tag is closed where it belongs."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.text = [], [], [], ""
        self.tables = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name.split(":")[-1] in ("href", "src")]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("th", "td"):
            self.tables[-1][-1][-1] += data


def pixels(uri):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,")))))


def test_the_page_is_whole_needs_nothing_else_and_shows_the_run(cli, run):
    outcome = cli("report", run, "--limit", 60)
    assert (outcome.code, outcome.err) == (0, "")
    text = (run / "report.html").read_text()
    page = Page(text)
    assert "://" not in text.replace("</", "")
    assert "url(" not in re.sub(r"url\(#", "", text)
    assert "@import" not in text
    assert "script" not in page.tags
    assert page.tags.count("svg") == 6
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    summary = json.loads((run / "summary.json").read_text())
    for key in ("natural_error", "pgd_error", "verified_error"):
        assert f"{summary[key]:.2%}" in page.text
    for shown in (*summary["versions"].values(), (run / "config.yaml").read_text(), "The first 60 test images"):
        assert shown in page.text


def test_what_the_command_line_changes_is_said_of_the_images_that_are_looked_at_alone(cli, run, tmp_path):
    """The run was not trained, nor its summary made, as this report is."""
    images = load_dataset("digits").test.images[:30].permute(0, 2, 3, 1).numpy()
    for part in ("train", "test"):
        np.savez(tmp_path / f"{part}.npz", images=images, labels=np.arange(30) % 10)
    changes = ["seed=7", "verification.method=ibp,crown", "data.name=npz", f"data.path={tmp_path}"]
    assert cli("report", run, *changes).code == 0
    page, config = Page((run / "report.html").read_text()), (run / "config.yaml").read_text()
    assert config in page.text
    assert ", digits, trained by ibp, seed 0; 50 test images, bounds by ibp" in page.text
    assert "The first 30 test images of npz, bounds by ibp, crown" in page.text


@pytest.mark.parametrize("changed", ["epsilon.max=0.2", "epsilon={max: 0.2}", "verification.eps=0.2"])
def test_a_radius_that_a_report_would_not_show_is_refused(cli, run, changed):
    outcome = cli("report", run, changed)
    assert (outcome.code, (run / "report.html").exists()) == (2, False)
    assert "a report is at the radius of the run's summary" in outcome.error


def test_what_a_run_that_began_with_another_forgot_is_a_table(train, cli, tmp_path, reference):
    run, file = tmp_path / "run", str(reference / "model.safetensors")
    assert train(f"start_from={reference}", "epsilon.max=0.2", "metrics.optimizer=true").code == 0
    assert cli("report", run, "--limit", 20).code == 0
    page = Page((run / "report.html").read_text())
    assert f"It began with {file}." in page.text
    start = json.loads((run / "summary.json").read_text())["start"]
    table = next(rows for rows in page.tables if rows[0][0] == "after epoch")
    settings, errors = ("old", "new"), ("natural_error", "verified_error")
    for name, eps in zip(settings, ("0.10000", "0.20000"), strict=True):
        assert sum(f", {name}: digits, {eps}" in cell for cell in table[0]) == 2
    assert [row[0] for row in table[1:]] == ["before", "1", "2", "3", "at the end", "change"]
    measured = [start["before"], *start["along"], start["after"]]
    for row, at in zip(table[1:-1], measured, strict=True):
        assert row[1:] == [f"{at[name][error]:.2%}" for name in settings for error in errors]
    moved = [start["forgetting"][error] for error in errors] + [-start["learned"][error] for error in errors]
    assert [float(cell.rstrip("%")) / 100 for cell in table[-1][1:]] == pytest.approx(moved, abs=1e-4)


def test_a_run_that_began_with_another_and_did_not_look_back_says_so_alone(run, tmp_path):
    start = {"file": "<old>", "sha256": "0", "keep": "weights", "reinitialized": []}
    page = page_with(run, tmp_path, start)
    assert "It began with <old>." in page.text
    assert "after epoch" not in page.text


NEVER = {"natural_error": None, "verified_error": None}
SET = {"data": "digits", "images": 9, "eps": 0.1}


def test_errors_that_cannot_be_measured_are_no_numbers(run, tmp_path):
    both = {"old": NEVER, "new": {"natural_error": 0.5, "verified_error": 1.0}}
    settings = {"old": SET, "new": SET}
    page = page_with(run, tmp_path, {"file": "f", "settings": settings, "before": both, "along": [], "after": both})
    table = next(rows for rows in page.tables if rows[0][0] == "after epoch")
    assert table[1:] == [
        ["before", "–", "–", "50.00%", "100.00%"],
        ["at the end", "–", "–", "50.00%", "100.00%"],
        ["change", "–", "–", "+0.00%", "+0.00%"],
    ]


@pytest.mark.parametrize(
    "start",
    [
        3,
        {},
        {"file": "f", "settings": {"old": SET}},
        {"file": "f", "settings": {"other": SET}},
        {"file": "f", "settings": {"old": SET}, "before": {"new": NEVER}, "after": {"old": NEVER, "new": NEVER}},
        {"file": "f", "settings": {"new": SET}, "before": {"new": {"natural_error": 2.0}}, "after": {"new": NEVER}},
    ],
)
def test_a_harmed_record_of_the_beginning_is_named(run, tmp_path, start):
    with pytest.raises(CheckpointError, match=r"summary\.json was written by another version, or edited: start"):
        page_with(run, tmp_path, start)


def page_with(run, tmp_path, start):
    """The page of a run whose summary says that of its beginning."""
    copied = shutil.copytree(run, tmp_path / "copy")
    summary = json.loads((copied / "summary.json").read_text())
    (copied / "summary.json").write_text(json.dumps(summary | {"start": start}))
    config, dataset = load_config(run / "config.yaml"), load_dataset("digits")
    write_report(copied, config, load_model(run), dataset, copied / "report.html", limit=20)
    return Page((copied / "report.html").read_text())


def test_images_are_those_of_the_data_set(cli, run):
    assert cli("report", run, "--limit", 60, "--out", run / "page.html").code == 0
    text = (run / "page.html").read_text()
    figures = re.findall(r'class="example">.*?</figure>', text)
    assert len(figures) > 0
    images = load_dataset("digits").test.images
    for figure in figures:
        first = re.search(r'src="([^"]+)"', figure)[1]
        index = int(re.search(r"image (\d+)", figure)[1])
        assert np.array_equal(pixels(first), images[index, 0].numpy())


def test_class_names_are_text_not_markup(run):
    config, dataset = load_config(run / "config.yaml"), load_dataset("digits")
    names = tuple(f"<i>{number} & co" for number in range(10))
    write_report(run, config, load_model(run), replace(dataset, classes=names), run / "report.html", limit=60)
    page = Page((run / "report.html").read_text())
    assert any(name in page.text for name in names)


def threshold_images(restarts, limit=9, most=9):
    """Distances from the threshold, in 1/255: 127.5, 2.5, 22.5 (wrong), 1.5; judged at 5/255, in batches of two."""
    values = torch.tensor([0, 130, 150, 126], dtype=torch.uint8).view(-1, 1, 1, 1)
    split = Split(values, torch.tensor([0, 1, 0, 0]))
    config = load_config(
        {
            "data": {"name": "digits"},
            "model": {"name": "mlp"},
            "epsilon": {"max": 0.1},
            "training": {"epochs": 1},
            "verification": {"pgd_restarts": restarts, "batch_size": 2},
        }
    )
    dataset = Dataset(split, split, ("dark", "bright"), mean=(0.0,), std=(1.0,))
    return judge(config, Threshold(), dataset, 5 / 255, limit, most)


def test_every_image_has_the_verdict_that_is_known():
    result, examples = threshold_images(restarts=1)
    flags = torch.stack(list(result.flags_by_verdict.values()))
    assert (flags.sum(0) == 1).all()
    found = {name: [example.index for example in group] for name, group in examples.items()}
    assert found == {"proved": [0], "unknown": [], "attacked": [1, 3], "misclassified": [2]}
    for example in examples["attacked"]:
        assert example.prediction != example.label
        assert linf_box(example.image, 5 / 255).contains(example.point).all()
        assert (Threshold()(example.point[None]).argmax(1) == example.prediction).all()
    (proved,) = examples["proved"]
    assert (proved.label, proved.prediction, proved.margin) == (0, 0, pytest.approx(2 * 122.5 / 255, abs=1e-6))
    assert torch.equal(proved.image, proved.point)


def test_without_an_attack_images_are_unknown_and_only_the_first_are_shown():
    result, examples = threshold_images(restarts=0, most=1)
    assert result.attack is None
    assert result.flags_by_verdict["unknown"].tolist() == [False, True, False, True]
    assert [example.index for example in examples["unknown"]] == [1]
    result, _ = threshold_images(restarts=0, limit=1)
    assert len(result.correct) == 1


# --- plots -----------------------------------------------------------------------------------------------------------


def result_at(eps, pgd, verified):
    return {"eps": eps, "natural_error": 0.1, "pgd_error": pgd, "verified_error": verified}


def test_error_curves_come_from_the_best_source(tmp_path):
    assert error_curves(newest_results(tmp_path, {"radii": [result_at(0.2, 0.4, 0.6), result_at(0.1, 0.2, 0.3)]})) == (
        0.1,
        {"pgd": ([0.0, 0.1, 0.2], [0.1, 0.2, 0.4]), "verified": ([0.0, 0.1, 0.2], [0.1, 0.3, 0.6])},
    )
    (tmp_path / "verify.json").write_text(json.dumps({"radii": [result_at(0.3, 0.5, 0.7)]}))
    summary = {"radii": [result_at(0.1, 0.2, 0.3)]}
    assert error_curves(newest_results(tmp_path, summary))[1]["verified"] == ([0.0, 0.3], [0.1, 0.7])
    radius = {
        "natural_error": 0.05,
        "eps": [0, 0.5],
        "verified_error": [0.05, 0.9],
        "pgd_eps": [0.5],
        "pgd_error": [0.8],
    }
    (tmp_path / "radius.json").write_text(json.dumps(radius))
    assert error_curves(newest_results(tmp_path, summary)) == (
        0.05,
        {"pgd": ([0.0, 0.5], [0.05, 0.8]), "verified": ([0, 0.5], [0.05, 0.9])},
    )


@pytest.mark.parametrize("command", [["--eps", "0.05"], ["--radius", "0.2"]])
def test_curves_are_of_no_fewer_images_than_the_summary(cli, run, command):
    """A look at a few images stands in the place of the errors of all, which are kept beside it."""
    before = json.loads((run / "summary.json").read_text())
    of_all = error_curves(newest_results(run, before))
    assert cli("verify", run, *command, "--limit", 3).code == 0
    assert error_curves(newest_results(run, before)) == of_all
    assert cli("verify", run, *command).code == 0
    of_more = error_curves(newest_results(run, before))
    assert of_more != of_all
    assert cli("verify", run, *command, "--limit", 3).code == 0
    assert error_curves(newest_results(run, before)) == of_more


@pytest.mark.parametrize(
    ("command", "by"),
    [
        ([], "Bounds by ibp; 50 images."),
        (["--method", "ibp,crown", "--sound", "float32"], "Bounds by ibp, crown, sound in float32; 50 images."),
        (["--radius", "0.2", "--limit", "60"], "Bounds by ibp; 60 images."),
    ],
)
def test_a_page_says_by_which_bounds_its_curves_are(cli, run, command, by):
    if command:
        assert cli("verify", run, *command).code == 0
    assert cli("report", run, "--limit", 5).code == 0
    assert f"{by} Dots are measured" in Page((run / "report.html").read_text()).text


def test_what_was_not_recorded_is_not_drawn():
    epochs = [{"epoch": 1, "loss": 2.0, "natural_loss": 2.0}, {"epoch": 2, "loss": 1.0, "robust_loss": 1.0}]
    words = Page(plots.losses(epochs)).text.split()
    assert {"total", "natural", "robust"} <= set(words)
    assert not {"tightness", "balance", "L1"} & set(words)


@pytest.mark.parametrize("layers", [1, 5])
def test_every_layer_has_its_panel(layers):
    statistics = {"tightness": 0.5, "active": 0.3, "inactive": 0.5, "unstable": 0.2}
    epochs = [{"epoch": number, "layers": [statistics] * layers} for number in (1, 2)]
    for draw in (plots.tightness, plots.relu_states):
        found = re.findall(r"ReLU (\d+)", Page(draw(epochs)).text)
        assert [int(number) for number in found] == list(range(1, layers + 1))


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("summary.json", None, "no finished run"),
        ("summary.json", "{", "summary.json is missing or corrupt"),
        ("summary.json", "{}", "summary.json was written by another version, or edited: images: Field required"),
        ("metrics.jsonl", None, "metrics.jsonl is missing or corrupt"),
        ("metrics.jsonl", "", "metrics.jsonl is empty"),
        ("metrics.jsonl", '{"epoch": 1', "metrics.jsonl is missing or corrupt"),
        (
            "metrics.jsonl",
            '{"epoch": 1}',
            "metrics.jsonl was written by another version, or edited: layers: Field required",
        ),
        ("radius.json", "{}", "radius.json was written by another version, or edited: natural_error: Field required"),
        ("model.safetensors", None, "is not finished: resume it"),
    ],
)
def test_an_unfinished_or_damaged_run_is_one_line(cli, run, name, content, message):
    if content is None:
        (run / name).unlink()
    else:
        (run / name).write_text(content)
    before = contents(run)
    outcome = cli("report", run)
    assert outcome.code == 1
    assert message in outcome.error
    assert contents(run) == before


RESULT = {"eps": 0.1, "natural_error": 0.1, "pgd_error": 0.2, "verified_error": 0.3}
OTHER = [None, True, "text", [], {}, [[]], {"a": 1}, -1, 2.0, math.nan, math.inf, 10**400, [1, "x"], [None], "9" * 1000]


def items(value, path=()):
    """Where everything in a nested JSON value stands."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from items(item, (*path, key))


@given(data=st.data())
@settings(max_examples=120, deadline=None)
@pytest.mark.parametrize("name", ["summary.json", "verify.json", "radius.json", "metrics.jsonl"])
def test_edited_results_are_one_line_or_shown(reference, tmp_path_factory, name, data):
    """A key is gone, or a value is another; nothing but drawing follows, which the first test of a page shows."""
    lines = (reference / "metrics.jsonl").read_text().splitlines()
    whole = {
        "summary.json": [json.loads((reference / "summary.json").read_text())],
        "verify.json": [{"radii": [RESULT]}],
        "radius.json": [
            {"natural_error": 0.1, "eps": [0.1], "verified_error": [1], "pgd_eps": [0.1], "pgd_error": [0]}
        ],
        "metrics.jsonl": [json.loads(line) for line in lines],
    }
    run = tmp_path_factory.mktemp("edited")
    for file, records in copy.deepcopy(whole).items():
        if file == name:
            *inner, last = data.draw(st.sampled_from([path for path in items(records) if len(path) > 1]))
            place = reduce(lambda value, key: value[key], inner, records)
            place[last] = data.draw(st.sampled_from(OTHER))
            if data.draw(st.booleans()):
                del place[last]
        (run / file).write_text("\n".join(map(json.dumps, records)))
    try:
        summary, epochs = _read_summary(run), _read_epochs(run)
        _show(load_config(reference / "config.yaml"), summary)
        curves = [error_curves(newest_results(run, summary))]
        (run / "radius.json").unlink()
        curves.append(error_curves(newest_results(run, summary)))
    except CheckpointError as error:
        message = str(error)
    else:
        for natural, drawn in curves:
            assert math.isfinite(natural)
            assert all(len(eps) == len(errors) for eps, errors in drawn.values())
            assert all(math.isfinite(float(value)) for eps, errors in drawn.values() for value in (*eps, *errors))
        assert all(layer.keys() == {"tightness", *plots.STATES} for epoch in epochs for layer in epoch["layers"])
        return
    assert name in message
    assert "\n" not in message
    assert len(message) < 400


@pytest.mark.parametrize("library", ["matplotlib", "jinja2"])
def test_without_a_library_the_way_out_is_named(cli, run, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    outcome = cli("report", run)
    assert outcome.code == 1
    assert "pip install '.[report]'" in outcome.error
