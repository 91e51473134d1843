"""Searches: what is chosen, by what, and that the test set is looked at once."""

from __future__ import annotations

import json

import optuna
import pytest
from rich.console import Console

from certtrain.config import load_config
from certtrain.errors import CerttrainError, CheckpointError, UsageError
from certtrain.runs.train import train
from certtrain.studies.processes import BROKEN, Ended
from certtrain.studies.pruning import Pruner
from certtrain.studies.search import load_tuning
from certtrain.studies.trials import Trial, Tuned, choose, drawn, page_of
from certtrain.studies.tuning import SETTINGS, _note, _propose, open_study
from tests.commands import TINY, one_thread
from tests.studies.folders import write_run

QUIET = Console(quiet=True)
SEARCH = """
base: digits
overrides:
  data.limit: 96
  model.options: {width: 2, linear_width: 8}
  epsilon: {max: 0.01, start_epoch: 1, warmup_epochs: 1}
  training: {epochs: 2, batch_size: 32, checkpoint_seconds: 0}
  optimizer: {milestones: [], lr: 0.02}
  verification: {limit: 100, pgd_steps: 2}
search:
  optimizer.lr: {low: 0.001, high: 0.03, log: true}
trials: 2
validation: 0.1
final: {seeds: [4]}
"""


def written(file, text):
    file.write_text(text)
    return file


def trials(*values, front=()):
    return [
        Trial(number, "complete" if value else "pruned", {"optimizer.lr": 0.1}, value, number in front, number == 0)
        for number, value in enumerate(values)
    ]


def tuned(folder, objectives, *values, front):
    return Tuned(folder, objectives, 0.1, trials(*values, front=front), len(values))


def test_the_best_trial_is_chosen_and_of_a_front_both_ends_and_what_lies_between(tmp_path):
    one = tuned(tmp_path, ["verified_error"], [0.3], None, [0.1], [0.2], front=[2])
    choose(one, 3)
    assert one.chosen == [2]
    values = [[0.5, 0.1], [0.1, 0.5], [0.2, 0.4], [0.3, 0.3], [0.4, 0.2], [0.6, 0.6]]
    for most, expected in ((1, [1]), (2, [1, 0]), (3, [1, 3, 0]), (9, [1, 2, 3, 4, 0])):
        several = tuned(tmp_path, ["natural_error", "verified_error"], *values, front=range(5))
        choose(several, most)
        assert several.chosen == expected
    with pytest.raises(CheckpointError, match=r"no trial in .* was finished"):
        choose(tuned(tmp_path, ["verified_error"], None, front=[]), 1)


@pytest.mark.parametrize("objectives", [["verified_error"], ["natural_error", "verified_error"]])
def test_the_page_says_by_what_was_chosen_and_that_the_test_set_came_afterwards(tmp_path, objectives):
    values = [[0.3] * len(objectives), [0.2] * len(objectives)]
    record = tuned(tmp_path, objectives, *values, front=[1]).summary() | {"tested": True, "chosen": [1]}
    (tmp_path / "tuning.json").write_text(json.dumps(record))
    for name, rate in (("base", 0.002), ("trial-1", 0.1)):
        write_run(tmp_path / "final" / name / "seed-0", "ppum", **{"optimizer.lr": rate})
    page = page_of(tmp_path, "search")
    assert "By 10% of the training set, held out, of 2 trials (2 complete)." in page
    assert "The test set was looked at once, afterwards, by trial 1 and the settings before" in page
    assert page.count("<svg") == 2
    assert drawn(record).startswith("<svg")
    (tmp_path / "tuning.json").write_text(json.dumps(record | {"tested": False}))
    with pytest.raises(CheckpointError, match="is not over"):
        page_of(tmp_path, "search")


def test_a_search_that_was_changed_or_goes_on_after_the_test_is_refused(cli, tmp_path):
    file, out = tmp_path / "search.yaml", tmp_path / "out"
    file.write_text(SEARCH)
    out.mkdir()
    study = open_study(load_tuning(file), out)
    assert [trial.state for trial in study.get_trials()] == [optuna.trial.TrialState.WAITING]  # of the base
    assert study.user_attrs["asked"]["search.optimizer.lr"] == {"low": 0.001, "high": 0.03, "log": True, "step": None}
    file.write_text(SEARCH.replace("high: 0.03", "high: 0.04").replace("pgd_steps: 2", "pgd_steps: 3"))
    with pytest.raises(
        UsageError, match=r"holds another search: search\.optimizer\.lr, verification\.pgd_steps differ"
    ):
        open_study(load_tuning(file), out)
    file.write_text(SEARCH.replace("trials: 2", "trials: 3"))
    (out / "tuning.json").write_text(json.dumps(tuned(out, ["verified_error"], [0.2], [0.1], front=[1]).summary()))
    write_run(out / "final" / "base" / "seed-4", "ppum")
    outcome = cli("tune", file, "--out", out)
    assert (outcome.code, "the test set was looked at after 2 trials" in outcome.error) == (2, True)


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_processes_that_follow_each_other_propose_what_one_alone_would(tmp_path, sampler):
    tuning = load_tuning(written(tmp_path / "search.yaml", SEARCH + f"sampler: {sampler}"))

    def proposed(folder, processes):
        folder.mkdir()
        for number in range(14):  # of which the first ten are random by both samplers
            if number % (14 // processes) == 0:
                study = open_study(tuning, folder)
            trial = study.ask()
            _propose(tuning, study, trial)
            study.tell(trial, (trial.user_attrs[SETTINGS]["optimizer.lr"] - 0.01) ** 2)
        return [trial.user_attrs[SETTINGS]["optimizer.lr"] for trial in study.trials]

    alone = proposed(tmp_path / "alone", 1)
    assert proposed(tmp_path / "after each other", 7) == alone
    assert len(set(alone)) == len(alone)


@pytest.mark.parametrize("storage", ["sqlite:////no/such/folder/x.db", "nonsense", "mysql://nobody@127.0.0.1:1/x"])
def test_a_storage_that_cannot_be_used_is_one_line(cli, tmp_path, storage):
    (tmp_path / "search.yaml").write_text(SEARCH + f"storage: '{storage}'")
    outcome = cli("tune", tmp_path / "search.yaml", "--out", tmp_path / "out")
    assert (outcome.code, "cannot be used" in outcome.error) == (2, True)


def test_a_trial_that_cannot_go_well_has_failed_and_what_is_broken_stops_the_search(tmp_path):
    (tmp_path / "search.yaml").write_text(SEARCH)
    study = open_study(load_tuning(tmp_path / "search.yaml"), tmp_path)
    told = []
    for number in range(2):
        study.ask()
        _note(study, Ended(f"trials/{number:04}", 1, "the loss is not finite"), told.append)
    assert [trial.state.name for trial in study.get_trials()] == ["FAIL", "FAIL"]
    assert told == [f"trial {number}: failed: the loss is not finite" for number in range(2)]
    for code, message in ((BROKEN, "ImportError: no such module"), (1, "")):
        study.ask()
        with pytest.raises(CerttrainError, match="the search stops at trial"):
            _note(study, Ended(f"trials/{len(study.trials) - 1:04}", code, message), told.append)
    assert [trial.state.name for trial in study.get_trials()[2:]] == ["RUNNING", "RUNNING"]


class Recorded:
    """A trial that ends after so many epochs."""

    def __init__(self, epochs):
        self.epochs, self.reported = epochs, {}

    def report(self, value, step):
        self.reported[step] = value

    def should_prune(self):
        return len(self.reported) >= self.epochs


def test_trials_are_pruned_by_bounds_on_validation_images(tmp_path):
    """What is reported after the last epoch is what verification finds; radii are the full one from the start."""
    changes = {"data.validation": 0.1, "verification": {"split": "validation", "limit": None}, "epsilon.max": 0.001}
    config = load_config("digits", [*TINY, changes, "optimizer.lr=0.05"])
    for epochs in (1, 99):
        trial = Recorded(epochs)
        pruner = Pruner(trial, config)
        with one_thread():
            run = train(config, tmp_path / str(epochs), device="cpu", console=QUIET, callbacks=[pruner])
        assert len(trial.reported) == min(epochs, 3)
        assert (run.summary is None) == pruner.pruned or epochs == 99
    assert run.summary["split"] == "validation"
    assert run.summary["images"] == round(0.1 * 1437)
    assert trial.reported[3] == run.summary["verified_error"] < 1


@pytest.mark.slow
def test_a_search_ends_with_one_look_at_the_test_set(cli, tmp_path):
    file, out = tmp_path / "search.yaml", tmp_path / "out"
    file.write_text(SEARCH)
    outcome = cli("tune", file, "--out", out, "--device", "cpu", "--jobs", 2)
    assert (outcome.code, outcome.err) == (0, "")
    record = json.loads((out / "tuning.json").read_text())
    assert [trial["state"] for trial in record["trials"]] == ["complete", "complete"]
    assert record["trials"][0]["settings"] == {"optimizer.lr": 0.02}
    for trial in record["trials"]:
        summary = json.loads((out / "trials" / f"{trial['number']:04}" / "summary.json").read_text())
        assert trial["values"] == [summary["verified_error"]]
        assert (summary["split"], summary["config"]["data"]["validation"]) == ("validation", 0.1)
    best = min(record["trials"], key=lambda trial: trial["values"])
    assert record["chosen"] == [best["number"]]
    tested = {path.parent.name for path in (out / "final").glob("*/seed-4/summary.json") for path in [path.parent]}
    assert tested == {"base"} | ({"trial-1"} if best["number"] else set())
    assert json.loads((out / "final" / "base" / "seed-4" / "summary.json").read_text())["split"] == "test"
    assert "looked at once" in " ".join(outcome.out.split())
    assert cli("tune", file, "--out", out, "--device", "cpu").code == 0  # nothing is left to do
    assert cli("report", out).code == 0
