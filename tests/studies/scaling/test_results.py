"""From finished runs to laws, a record and a recommendation; the runs are made up, of a law that is known."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from certtrain.errors import CheckpointError, DivergedError, UsageError
from certtrain.runs.files import is_finished
from certtrain.studies.runner import RunStates, train_run
from certtrain.studies.scaling import recommend as recommendations
from certtrain.studies.scaling import run as running
from certtrain.studies.scaling.design import load_plan
from certtrain.studies.scaling.run import scale
from tests.commands import contents
from tests.studies.failing import raising
from tests.studies.scaling.test_design import written

IMAGES, HELD_OUT = 1000, 500
PLAN = """
base: digits
overrides: {optimizer.milestones: []}
widths: [2, 4, 8, 16, 32, 64]
first_budget: 4e9
budgets: 4
validation: 0.25
seeds: [0, 1]
protocols:
  kaplan: {warmup_epochs: 3, last_layer: false, tuned: false}
  corrected: {}
tuning: {widths: [4, 16], budget: 1e8, lr: [1e-3, 2e-3, 4e-3], batch_size: [32, 64], beta2: [0.99, 0.999]}
resamples: 20
forecast: 1e12
"""


ONCE_RESAMPLED = PLAN.replace("resamples: 20", "resamples: 1")
"""For whoever asks nothing of intervals."""


class Counted:
    """18 for each weight of a square layer, epoch and image."""

    images, image_shape, classes = IMAGES, (1, 8, 8), 10

    def __init__(self, *_):
        pass

    def __call__(self, config, last_layer=True):
        return 18 * IMAGES * config.training.epochs * config.model.options["width"] ** 2


def error_of(width, epochs):
    return min(0.9, 0.3 + 0.5 * width**-0.6 + 0.6 * epochs**-0.4)


def optimal(compute):
    """Where the derivative by the width is 0, with epochs = compute / (18 IMAGES width²)."""
    return (0.5 * 0.6 / (2 * 0.4 * 0.6) * (compute / (18 * IMAGES)) ** 0.4) ** (1 / (0.6 + 2 * 0.4))


def best_settings(width):
    """lr falls as width^-1/2; the batch grows with the width."""
    return {4: (4e-3, 32, 0.999), 16: (2e-3, 64, 0.99)}[width]


def pretend(folder, run, error, eps=0.1):
    place = folder / run.name
    place.mkdir(parents=True)
    place.joinpath("config.yaml").write_text(run.config.to_yaml())
    summary = {"eps": eps, "verified_error": error, "images": HELD_OUT, "split": "validation"}
    place.joinpath("summary.json").write_text(json.dumps(summary))


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    monkeypatch.setattr(running, "counter_of", Counted)
    monkeypatch.setattr(recommendations, "OperationCounter", Counted)


@pytest.fixture
def plan(tmp_path):
    return load_plan(written(tmp_path, PLAN))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """All runs of the plan, and what is fitted to them; only to be read."""
    place = tmp_path_factory.mktemp("scaling")
    plan, out, random = load_plan(written(place, PLAN)), place / "out", np.random.default_rng(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "counter_of", Counted)
        for cell in plan.tuning_cells(Counted()).cells:
            settings = (cell.tried.lr, cell.tried.batch_size, cell.tried.beta2)
            for run in cell.runs([0, 1]):
                pretend(out / "tuning", run, 0.5 if settings == best_settings(cell.width) else 0.6)
        for cell in plan.grid(Counted(), scale(plan, out, train=False).rule).cells:
            for run in cell.runs([0, 1]):
                pretend(out, run, error_of(cell.width, cell.config.training.epochs) + random.normal(0, 5e-4))
        return out, scale(plan, out, train=False)


@pytest.fixture
def scaled(finished):
    return finished[1]


@pytest.fixture
def folder(finished, tmp_path):
    """A copy, to be harmed."""
    return shutil.copytree(finished[0], tmp_path / "out")


@pytest.mark.slow
def test_the_tuned_rule_is_a_power_law_through_the_best(scaled):
    rule = scaled.rule
    assert {width: (s.lr, s.batch_size, s.beta2) for width, s in rule.best.items()} == {
        width: best_settings(width) for width in (4, 16)
    }
    assert rule.lr.exponent == pytest.approx(-0.5)
    assert rule(8).lr == pytest.approx(4e-3 / 2**0.5, rel=2e-3)
    assert (rule(4).batch_size, rule(16).batch_size, rule(64).batch_size, rule(2).batch_size) == (32, 64, 64, 32)
    assert (rule(4).beta2, rule(16).beta2, rule(64).beta2) == (0.999, 0.99, 0.99)


def test_before_the_tuning_is_finished_no_tuned_run_is_planned(plan, tmp_path):
    (first, *_) = plan.tuning_cells(Counted()).cells
    for run in first.runs([0, 1]):
        pretend(tmp_path / "out" / "tuning", run, 0.5)
    scaled = scale(plan, tmp_path / "out", train=False)
    assert scaled.rule is None
    assert {cell.protocol for cell in scaled.grid.cells} == {"kaplan"}


def test_laws_record_and_forecast(scaled, folder):
    content = json.loads((folder / "scaling.json").read_text())
    fitted = [(fitted.protocol, fitted.approach) for fitted in scaled.fits]
    assert fitted == [(protocol, approach) for protocol in ("kaplan", "corrected") for approach in ("isoflop", "joint")]
    assert fitted == [(protocol, approach) for protocol, fits in content["fits"].items() for approach in fits]
    for fits in content["fits"]["corrected"].values():
        _is_the_law(fits)
    assert [(each["protocols"], each["approach"]) for each in content["contrasts"]] == [
        (["kaplan", "corrected"], "isoflop"),
        (["kaplan", "corrected"], "joint"),
    ]
    runs = [row for row in content["runs"] if row["protocol"] == "corrected"]
    assert {len(row["verified_error"]) for row in runs} == {2}
    assert {(row["lr"], row["batch_size"]) for row in runs if row["width"] == 4} == {(4e-3, 32)}
    assert "root" not in content["base"]["data"]


def _is_the_law(fits):
    low, high = fits["width"]["exponent_interval"]
    assert low < fits["width"]["exponent"] < high
    assert fits["width"]["exponent"] == pytest.approx(0.4 / 1.4, abs=0.06)
    foretold = fits["forecast"]
    assert foretold["compute"] == 1e12
    assert foretold["width"]["value"] == pytest.approx(optimal(1e12), rel=0.3)
    best = error_of(optimal(1e12), 1e12 / (18 * IMAGES * optimal(1e12) ** 2))
    assert foretold["error"]["value"] == pytest.approx(best, abs=0.03)
    least, most = foretold["error"]["interval"]
    assert least <= foretold["error"]["value"] <= most
    assert fits["noise"].startswith("of seeds, pooled over cells: 0.000")
    assert len(fits["resampled"]) == fits["resamples"]["fitted"] > 15
    assert len(fits["foretold"]) >= 1
    for each in fits["foretold"]:
        assert each["error"]["value"] == pytest.approx(each["error"]["measured"], abs=0.03)


@pytest.mark.slow
def test_a_cell_counts_by_the_seeds_that_are_finished(plan, scaled, folder):
    """The mean and its noise are those of fewer seeds; without any, the cell is not there."""
    first, second = (result.cell for result in scaled.results[:2])
    for name in (f"{first.name}/seed-1", f"{second.name}/seed-0", f"{second.name}/seed-1"):
        (folder / name / "summary.json").unlink()
    after = scale(plan, folder, train=False)
    assert [result.cell.name for result in after.results] == [
        result.cell.name for result in scaled.results if result.cell.name != second.name
    ]
    assert after.results[0].by_seed == {0: scaled.results[0].by_seed[0]}
    assert after.record["runs"][0]["seeds"] == [0]
    alone, both = after.fits[0].points[:2]
    assert alone.error == scaled.results[0].by_seed[0]
    assert alone.noise == pytest.approx(both.noise * 2**0.5)


def test_the_tuning_is_finished_with_its_last_seed(scaled, folder, tmp_path):
    """Or the grid's settings would change while it is trained."""
    plan = load_plan(written(tmp_path, ONCE_RESAMPLED))
    (folder / "tuning" / scaled.tried[-1].cell.name / "seed-1" / "summary.json").unlink()
    assert scale(plan, folder, train=False).rule is None


class Trained:
    """Stands for train_all: runs are finished at once, but for the combinations that `fate` says something else of."""

    def __init__(self, fate):
        self.fate, self.runs = fate, []

    def __call__(self, runs, place, **_):
        outcome = RunStates()
        for run in runs:
            if is_finished(place / run.name):
                continue
            self.runs.append(run.name)
            end = self.fate(run)
            if end is None:
                pretend(place, run, error_of(run.config.model.options["width"], run.config.training.epochs))
            elif isinstance(end, Exception):
                (place / run.name).mkdir(parents=True, exist_ok=True)
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr("certtrain.runs.train.train", raising(end))
                    with pytest.raises(type(end)):
                        train_run(run.config, place / run.name, "cpu")
                outcome.failed[run.name] = str(end)
            else:
                getattr(outcome, end).append(run.name)
        return outcome


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "goes_on", "tuned"),
    [
        (None, True, True),
        (DivergedError("the loss is not finite", 0.1), True, True),
        (CheckpointError("the disk is full"), True, False),
        ("left", False, False),
    ],
)
def test_a_combination_that_diverges_has_been_tried(tmp_path, monkeypatch, end, goes_on, tuned):
    """With an error of 1; a run that failed otherwise, or is left, has not."""
    plan = load_plan(written(tmp_path, PLAN.replace("budgets: 4", "budgets: 1")))
    bad = 4e-3
    train_all = Trained(lambda run: end if run.name.startswith("tuning") and run.config.optimizer.lr == bad else None)
    monkeypatch.setattr(running, "train_all", train_all)
    scaled = scale(plan, tmp_path / "out")
    assert any(name.startswith("kaplan") for name in train_all.runs) == goes_on
    assert (scaled.rule is not None) == any(name.startswith("corrected") for name in train_all.runs) == tuned
    assert (scaled.outcome.exit_code == 0) == tuned
    if tuned and end is not None:
        assert {settings.lr for settings in scaled.rule.best.values()} == {1e-3}
        assert {error for each in scaled.tried if each.cell.tried.lr == bad for error in each.errors} == {1.0}
    train_all.runs.clear()
    assert (scale(plan, tmp_path / "out").rule is not None) == tuned
    assert (train_all.runs == []) == tuned  # what has diverged is not tried again
    assert (scale(plan, tmp_path / "out", train=False).rule is not None) == tuned


def test_a_width_of_which_all_combinations_diverge_is_told(plan, tmp_path, monkeypatch):
    diverged = DivergedError("the loss is not finite", 0.1)
    monkeypatch.setattr(running, "train_all", Trained(lambda run: diverged if "w16" in run.name else None))
    with pytest.raises(UsageError, match="no run of width 16 proves an image"):
        scale(plan, tmp_path / "out")


@pytest.mark.parametrize("option", ["--fit", "--show"])
def test_runs_of_another_plan_are_neither_fitted_to_nor_shown(cli, folder, tmp_path, option):
    written(tmp_path, PLAN.replace("milestones: []", "milestones: [1]"))
    before = contents(folder)
    outcome = cli("scale", tmp_path / "plan.yaml", "--out", folder, option)
    assert (outcome.code, "no longer fits the study: optimizer.milestones is [] there" in outcome.err) == (2, True)
    assert contents(folder) == before


@pytest.mark.slow
def test_runs_that_were_trained_where_data_lie_elsewhere_are_fitted_to(cli, folder, tmp_path):
    written(tmp_path, ONCE_RESAMPLED)
    assert cli("scale", tmp_path / "plan.yaml", "--out", folder, "--fit", "data.root=/elsewhere").code == 0


def test_to_show_a_plan_writes_nothing(cli, folder, tmp_path):
    written(tmp_path, ONCE_RESAMPLED)
    (folder / "scaling.json").write_text("of another time")
    before = contents(folder)
    outcome = cli("scale", tmp_path / "plan.yaml", "--out", folder, "--show")
    assert (outcome.code, "cells for each seed" in outcome.out) == (0, True)
    assert contents(folder) == before


@pytest.mark.slow
def test_the_commands_fit_draw_and_recommend(cli, plan, folder, tmp_path):
    outcome = cli("scale", tmp_path / "plan.yaml", "--out", folder, "--fit")
    assert outcome.code == 0, outcome.err
    assert "tuning: 48 of 48 runs finished" in outcome.out
    for approach in ("isoflop", "joint"):
        assert f"corrected, {approach}: 95 % intervals" in outcome.out
        assert f"corrected less kaplan, {approach}, " in outcome.out
    assert (folder / "scaling.png").read_bytes().startswith(b"\x89PNG")
    outcome = cli("plan", "--budget", "2e11", "--eps", "0.1", "--law", folder)
    assert outcome.code == 0, outcome.err
    rows = dict(re.findall(r"│ ([a-z0-9 ,]+?) +│ ([^ │]+)", outcome.out))
    width = int(rows["width"])
    assert width == pytest.approx(optimal(2e11), rel=0.3)
    assert int(rows["epochs"]) == pytest.approx(2e11 / (18 * IMAGES * width**2), abs=0.6)
    assert float(rows["learning rate"]) == pytest.approx(4e-3 * (width / 4) ** -0.5, rel=0.01)
    assert int(rows["warmup of epsilon, epochs"]) == pytest.approx(30 / 60 * int(rows["epochs"]), abs=0.51)
    assert "extrapolated: 2.6 doublings beyond what was measured" in outcome.out
    assert "0.9 orders of magnitude: from less than two, what lies beyond is a guess" in outcome.out
    jointly = cli("plan", "--budget", "2e11", "--law", folder, "--approach", "joint")
    assert int(re.search(r"│ width +│ (\d+)", jointly.out)[1]) == pytest.approx(optimal(2e11), rel=0.2)
    inside = cli("plan", "--budget", "8e9", "--law", folder / "scaling.json", "--protocol", "kaplan")
    assert inside.code == 0
    assert "extrapolated" not in inside.out
    assert "guess" not in inside.out


SMALL = Path("docs/results/scaling_small.json").resolve()


def left_by_scale(tmp_path, name, age, eps):
    content = json.loads(SMALL.read_text()) | {"eps": eps}
    file = tmp_path / "runs" / name / "scaling.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(content))
    os.utime(file, (1e9 - age, 1e9 - age))


@pytest.mark.parametrize(
    ("asked", "taken"), [(["--eps", "8/255"], "b"), (["--eps", "2/255"], "c"), ([], "c"), (["--law", str(SMALL)], None)]
)
def test_the_newest_law_of_the_radius_is_taken_and_named(cli, tmp_path, monkeypatch, asked, taken):
    monkeypatch.chdir(tmp_path)
    for name, age, eps in (("a", 3, 8 / 255), ("b", 2, 8 / 255), ("c", 1, 2 / 255)):
        left_by_scale(tmp_path, name, age, eps)
    outcome = cli("plan", "--budget", "1e11", "--approach", "joint", *asked)
    assert outcome.code == 0, outcome.err
    law = SMALL if taken is None else Path("runs", taken, "scaling.json")
    lines = " ".join(outcome.out.split())
    assert f"by the law in {law}, of cnn-2layer on npz, model.options.width 1 to 12" in lines


@pytest.mark.parametrize(("asked", "at"), [(["--eps", "8/255"], " at 8/255"), ([], "")])
@pytest.mark.parametrize("others", [False, True])
def test_without_a_law_it_is_said_how_to_get_one(cli, tmp_path, monkeypatch, asked, at, others):
    monkeypatch.chdir(tmp_path)
    if others and asked:
        left_by_scale(tmp_path, "a", 1, 2 / 255)
    outcome = cli("plan", "--budget", "2e15", *asked)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.error == (
        f"no law{at} in runs/*/scaling.json: certtrain scale NAME fits one, such as scaling_cifar10_8_255; "
        "--law FILE takes any scaling.json"
    )


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--budget", "2e11", "--eps", "2/255"], 2, "the law was fitted at 0.1, not at 0.00784314"),
        (["--budget", "2e11", "--protocol", "korrected"], 2, "unknown protocol 'korrected': did you mean corrected"),
        (["--budget", "2e11", "--approach", "jointly"], 2, "unknown approach 'jointly': did you mean joint"),
        (["--budget", "1e4"], 2, "FLOP are not enough for width"),
        (["--budget", "-1"], 2, "is not a number of operations"),
        (["--budget", "2e11", "--law", "nowhere"], 2, "there is no nowhere: certtrain scale PLAN.yaml fits a law"),
    ],
)
def test_what_cannot_be_recommended(cli, finished, arguments, code, message):
    outcome = cli("plan", "--law", finished[0], *arguments)
    assert outcome.code == code
    assert message in outcome.err


@pytest.mark.parametrize(
    ("overrides", "eps"),
    [
        ("", 0.1),
        ("epsilon.max: 0.2", 0.2),
        ("verification.eps: 2/255", 2 / 255),
        ("verification.eps: [0.2, 0.3], epsilon.max: 0.4", 0.3),
        ("verification.eps: [0.05, 0.1, 0.2]", 0.1),
    ],
)
def test_a_law_is_of_the_radius_at_which_the_errors_are(tmp_path, overrides, eps):
    text = PLAN.replace("milestones: []", f"milestones: []{overrides and ', '}{overrides}").replace(
        "corrected: {}", "corrected: {tuned: false}"
    )
    plan = load_plan(written(tmp_path, text))
    (run,) = plan.grid(Counted(), None).cells[0].runs([0])
    pretend(tmp_path / "out", run, 0.5, eps)
    assert scale(plan, tmp_path / "out", train=False).record["eps"] == eps
    pretend(tmp_path / "other", run, 0.5, eps / 2)
    with pytest.raises(CheckpointError, match=f"summary.json is missing or corrupt .its errors are at {eps / 2}, the"):
        scale(plan, tmp_path / "other", train=False)


@pytest.mark.parametrize("harm", ["{", "[]", '{"eps": 0.1}', None])
def test_a_corrupt_law_is_refused(cli, finished, tmp_path, harm):
    file = tmp_path / "scaling.json"
    content = json.loads((finished[0] / "scaling.json").read_text())
    content["fits"]["corrected"]["isoflop"]["width"]["exponent"] = "steep"
    file.write_text(json.dumps(content) if harm is None else harm)
    outcome = cli("plan", "--budget", "2e11", "--law", tmp_path)
    assert outcome.code == 1
    assert "scaling.json is missing or corrupt" in outcome.error


def test_one_seed_has_the_noise_of_its_images(tmp_path):
    """Binomial: √(p (1 - p) / n)."""
    text = ONCE_RESAMPLED.replace("  corrected: {}\n", "").replace("seeds: [0, 1]", "seeds: [0]")
    plan = load_plan(written(tmp_path, text))
    for cell in plan.grid(Counted(), None).cells:
        pretend(tmp_path / "out", *cell.runs([0]), error_of(cell.width, cell.config.training.epochs))
    fits = scale(plan, tmp_path / "out", train=False).fits
    assert [fitted.approach for fitted in fits] == ["isoflop", "joint"]
    for fitted in fits:
        for point in fitted.points:
            assert point.noise == pytest.approx((point.error * (1 - point.error) / HELD_OUT) ** 0.5)
        assert "there is one seed" in fitted.noise
