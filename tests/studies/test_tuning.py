"""Searches: what is chosen, by what, and that the test set is looked at once."""

from __future__ import annotations

import errno
import json
import math
import platform
import re
import signal
import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import optuna
import pytest
import torch
from rich.console import Console

from certtrain.config import load_config
from certtrain.errors import (
    CerttrainError,
    CheckpointError,
    DataError,
    DivergedError,
    MissingDependency,
    ProcessLost,
    UnsupportedOperation,
    UsageError,
    lines_of,
)
from certtrain.runs.train import train
from certtrain.studies.design import Cell, planned
from certtrain.studies.processes import BROKEN, IN_USE, Ended
from certtrain.studies.pruning import Pruner
from certtrain.studies.runner import RunStates
from certtrain.studies.search import Pruning, Range, load_tuning
from certtrain.studies.trials import Trial, Tuned, choose, drawn, is_on_front, page_of
from certtrain.studies.trials import tested_trials as trials_before_the_test
from certtrain.studies.tuning import (
    BASE,
    SETTINGS,
    _next_trial,
    _note,
    _propose,
    open_study,
    train_trial,
    trial_name,
    tune,
)
from tests.commands import TINY, one_thread
from tests.studies.failing import raising
from tests.studies.folders import pretend_finished, write_run
from tests.studies.test_design import SPACES_AND_BASE

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
        Trial(
            number,
            "complete" if value else "pruned",
            {"optimizer.lr": (number + 1) / 10},
            value,
            number in front,
            number == 0,
        )
        for number, value in enumerate(values)
    ]


def on_digits(settings):
    return load_config("digits", settings)


def tuned(folder, objectives, *values, front):
    return Tuned(folder, objectives, 0.1, trials(*values, front=front), len(values))


def test_the_best_trial_is_chosen_and_of_a_front_both_ends_and_what_lies_between(tmp_path):
    one = tuned(tmp_path, ["verified_error"], [0.3], None, [0.1], [0.2], front=[2])
    choose(one, 3, on_digits)
    assert one.chosen == [2]
    values = [[0.5, 0.1], [0.1, 0.5], [0.2, 0.4], [0.3, 0.3], [0.4, 0.2], [0.6, 0.6]]
    for most, expected in ((1, [1]), (2, [1, 0]), (3, [1, 3, 0]), (9, [1, 2, 3, 4, 0])):
        several = tuned(tmp_path, ["natural_error", "verified_error"], *values, front=range(5))
        choose(several, most, on_digits)
        assert several.chosen == expected
    with pytest.raises(CheckpointError, match=r"no trial in .* was finished"):
        choose(tuned(tmp_path, ["verified_error"], None, front=[]), 1, on_digits)


@pytest.mark.parametrize(("most", "expected"), [(1, [0]), (2, [0, 3]), (3, [0, 2, 3]), (9, [0, 2, 3])])
def test_of_trials_with_one_configuration_one_is_chosen(tmp_path, most, expected):
    """However their settings are written, and whatever the time that they took."""
    found = tuned(
        tmp_path, ["natural_error", "train_seconds"], *([0.1, 9], [0.1, 8], [0.2, 7], [0.3, 6]), front=range(4)
    )
    for trial, method in zip(found.trials, ("ibp", {"name": "ibp"}, "crown-ibp", "natural"), strict=True):
        trial.settings = {"training.method": method}
    choose(found, most, on_digits)
    assert found.chosen == expected


@pytest.mark.parametrize("trained_twice", [pytest.param(False, marks=pytest.mark.slow), True])
def test_trials_with_the_same_settings_are_tested_once(tmp_path, monkeypatch, trained_twice):
    """And what an earlier version has trained twice is not in the table."""

    def pretended(runs, folder, **_):
        assert len({run.config.to_yaml() for run in runs}) == len(runs)
        pretend_finished(SimpleNamespace(runs=[run for run in runs if not (folder / run.name).exists()]), folder)
        return RunStates(finished=[run.name for run in runs])

    monkeypatch.setattr("certtrain.studies.tuning.train_all", pretended)
    text = SEARCH.replace("{low: 0.001, high: 0.03, log: true}", "[0.01, 0.02, 0.03]").replace("trials: 2", "trials: 8")
    text += "objectives: [natural_error, verified_error]\nsampler: random\n"
    tuning = load_tuning(written(tmp_path / "search.yaml", text))
    study = open_study(tuning, tmp_path)
    rates = []
    while (proposed := _next_trial(tuning, study, tmp_path, [])) is not None:
        rates.append(proposed[1].optimizer.lr)
        study.tell(proposed[0], [rates[-1], 1 - rates[-1]])  # so that all are on the front
    assert (len(rates), set(rates)) == (8, {0.01, 0.02, 0.03})
    again = [number for number, rate in enumerate(rates) if rate in rates[:number]]
    if trained_twice:
        found = tuned(tmp_path, ["natural_error", "verified_error"], *([r, 1 - r] for r in rates), front=range(8))
        record = found.summary() | {"tested": True, "chosen": again}
        (tmp_path / "tuning.json").write_text(json.dumps(record))
        cells = [Cell(f"trial-{number}", tuning.final_config({"optimizer.lr": rates[number]})) for number in again]
        pretend_finished(SimpleNamespace(runs=[planned(cell, 4) for cell in cells]), tmp_path / "final")
    result = tune(tuning, tmp_path, console=QUIET)
    first = {rate: rates.index(rate) for rate in (0.01, 0.02, 0.03)}
    assert result.chosen == list(first.values())
    table = result.sheets()[1]
    assert {row[0] for row in table.rows} == {"base", f"trial-{first[0.01]}", f"trial-{first[0.03]}"}  # 0.02 is base's
    assert "looked at once" in page_of(tmp_path, "search")


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


MISSING = "missing"
KEYS = ("objectives", "validation", "trials", "chosen", "tested")
HARMED = [
    *({key: value} for key in KEYS for value in (MISSING, None, "x", {}, [[]])),
    *({"objectives": value} for value in ([], ["a"], ["$_$", "$"], [3])),
    *({"trials": value} for value in ([], [3], 3)),
    {"chosen": 3},
    {"validation": math.nan},
]
HARMED_TRIALS = [
    *(
        {key: value}
        for key in ("number", "state", "settings", "on_front", "is_base")
        for value in (MISSING, None, [], 1.5)
    ),
    *({"values": value} for value in (MISSING, None, [], [0.1], [0.1, 0.2, 0.3], ["x", 1], [math.nan, 0.1], 3)),
    {"on_front": False},
    {"state": "fail"},
]


@pytest.mark.parametrize("change", [*HARMED, *HARMED_TRIALS], ids=repr)
def test_a_harmed_record_of_a_search_is_named(tmp_path, change):
    """Every key of it, missing or of another type; values that do not go together."""
    record = tuned(tmp_path, ["natural_error", "verified_error"], [0.3, 0.3], [0.2, 0.2], front=[1]).summary()
    record |= {"tested": True, "chosen": [1]}
    ((key, value),) = change.items()
    place = record if change in HARMED else record["trials"][1]
    place[key] = value
    if value is MISSING:
        del place[key]
    (tmp_path / "tuning.json").write_text(json.dumps(record))
    write_run(tmp_path / "final" / "base" / "seed-0", "ppum")
    for read in (trials_before_the_test, lambda folder: page_of(folder, "search")):
        with pytest.raises(CheckpointError, match=r"tuning\.json was written by another version, or edited") as error:
            read(tmp_path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(("validation", "text"), [(0.1, "10%"), (0.125, "12.5%"), (0.001, "0.1%"), (300, "300 images")])
def test_how_much_is_held_out_is_said_exactly(tmp_path, validation, text):
    result = tuned(tmp_path, ["verified_error"], [0.3], front=[0])
    result.validation = validation
    assert f"By {text} of the training set" in result.sheets()[0].note


def test_a_search_that_was_changed_or_goes_on_after_the_test_is_refused(cli, tmp_path):
    file, out = tmp_path / "search.yaml", tmp_path / "out"
    file.write_text(SEARCH)
    out.mkdir()
    study = open_study(load_tuning(file), out)
    assert study.get_trials() == []
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


def test_a_storage_knows_that_the_test_set_was_looked_at_and_what_it_holds(cli, tmp_path):
    database = f"sqlite:///{tmp_path}/shared.db"
    file = written(tmp_path / "search.yaml", f"{SEARCH}storage: {database}")
    tuning, first = load_tuning(file), tmp_path / "first"
    first.mkdir()
    study = open_study(tuning, first)
    for error in (0.2, 0.1):
        study.tell(_next_trial(tuning, study, first, [])[0], error)
    (first / "tuning.json").write_text(json.dumps(tuned(first, ["verified_error"], [0.2], [0.1], front=[1]).summary()))
    write_run(first / "final" / "base" / "seed-4", "ppum")
    written(file, file.read_text().replace("trials: 2", "trials: 3"))
    for _ in range(2):  # of which the first tells the storage
        outcome = cli("tune", file, "--out", first)
        assert outcome.code == 2
        assert "shared.db: the test set was looked at after 2 trials" in outcome.error
        assert "name another storage (a database holds one search), and another --out" in outcome.error
        (first / "tuning.json").unlink(missing_ok=True)
    written(file, file.read_text().replace("high: 0.03", "high: 0.04"))
    outcome = cli("tune", file, "--out", tmp_path / "third")
    assert outcome.code == 2
    assert "shared.db holds another search: search.optimizer.lr differ; undo that, or name another s" in outcome.error


def test_a_search_in_a_database_has_one_folder(cli, tmp_path):
    """Wherever that is moved, and by whatever path it is seen: trials of another would seem to be left."""
    file = written(tmp_path / "search.yaml", f"{SEARCH}storage: sqlite:///{tmp_path}/shared.db")
    tuning, first = load_tuning(file), tmp_path / "first"
    first.mkdir()
    begun, _ = _next_trial(tuning, open_study(tuning, first), first, [])
    outcome = cli("tune", file, "--out", tmp_path / "second")
    assert outcome.code == 2
    assert "shared.db belongs to a search in another folder" in outcome.error
    with pytest.raises(UsageError, match=re.escape(f"another folder, {first} on {platform.node()}: go on there")):
        open_study(tuning, tmp_path / "second")
    (tmp_path / "link").symlink_to(first)
    first.rename(tmp_path / "moved")
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to(tmp_path / "moved")
    for seen in (tmp_path / "moved", tmp_path / "link"):
        assert _next_trial(tuning, open_study(tuning, seen), seen, [])[0] == begun


@pytest.mark.parametrize("sampler", ["tpe", "random"])
@pytest.mark.parametrize("when", ["opened", "asked", "proposed"])
@pytest.mark.parametrize("killed", [True, False])
def test_the_first_trial_alone_is_base_s_whoever_is_killed_or_comes_in_between(
    tmp_path, monkeypatch, sampler, when, killed
):
    tuning = load_tuning(
        written(tmp_path / "search.yaml", f"{SEARCH}sampler: {sampler}".replace("trials: 2", "trials: 4"))
    )
    kind, name = {
        "opened": (optuna.Study, "set_user_attr"),
        "asked": (optuna.Study, "ask"),
        "proposed": (optuna.Trial, "suggest_float"),
    }[when]
    done = getattr(kind, name)

    def begin():
        study = open_study(tuning, tmp_path)
        _next_trial(tuning, study, tmp_path, [trial_name(number) for number in range(4)])  # none that was begun

    def once(self, *arguments, **options):
        monkeypatch.setattr(kind, name, done)
        if killed:
            done(self, *arguments, **options)
            raise Killed
        begin()
        return done(self, *arguments, **options)

    monkeypatch.setattr(kind, name, once)
    with pytest.raises(Killed) if killed else nullcontext():
        begin()
    study = open_study(tuning, tmp_path)
    while (proposed := _next_trial(tuning, study, tmp_path, [])) is not None:
        study.tell(proposed[0], 0.5)
    rates = [trial.params["optimizer.lr"] for trial in study.trials]
    assert [trial.number for trial in study.trials if BASE in trial.user_attrs] == [0]
    assert (rates[0], len(rates), len(set(rates))) == (0.02, 4, 4)


class Killed(BaseException):
    """The process, as by SIGKILL."""


@pytest.mark.parametrize("finished", [0, 1, 2])
def test_from_the_first_look_at_the_test_set_on_nobody_adds_trials(tmp_path, monkeypatch, finished):
    """Nor another that was at work before, and whose last trial came in between; what is tested stays the same."""
    tuning = load_tuning(written(tmp_path / "search.yaml", SEARCH))
    more = load_tuning(written(tmp_path / "more.yaml", SEARCH.replace("trials: 2", "trials: 60")))
    study, other = open_study(tuning, tmp_path), open_study(more, tmp_path)
    for error in (0.2, 0.1):
        study.tell(_next_trial(tuning, study, tmp_path, [])[0], error)
    refused = pytest.raises(UsageError, match="the test set was looked at after 2 trials; choosing among 60 now")
    tested = []

    def choose_late(*arguments):
        other.tell(_next_trial(more, other, tmp_path, [])[0], 0.0)
        choose(*arguments)

    def killed(runs, folder, **_):
        with refused:
            _next_trial(more, other, tmp_path, [])
        tested.append([run.name for run in runs])
        pretend_finished(SimpleNamespace(runs=runs[:finished]), folder)
        raise Killed

    def trained(runs, folder, **_):
        tested.append([run.name for run in runs])
        pretend_finished(SimpleNamespace(runs=[run for run in runs if not (folder / run.name).exists()]), folder)
        return RunStates(finished=[run.name for run in runs])

    with monkeypatch.context() as patch:
        patch.setattr("certtrain.studies.tuning.choose", choose_late)
        patch.setattr("certtrain.studies.tuning.train_all", killed)
        with pytest.raises(Killed):
            tune(tuning, tmp_path, console=QUIET)
    (tmp_path / "tuning.json").unlink()  # the storage alone knows
    with refused:
        tune(more, tmp_path, console=QUIET)
    monkeypatch.setattr("certtrain.studies.tuning.train_all", trained)
    result = tune(tuning, tmp_path, console=QUIET)
    assert (result.exit_code, result.chosen, len(result.trials)) == (0, [1], 2)
    assert tested == [["base/seed-4", "trial-1/seed-4"]] * 2


@pytest.mark.parametrize("objectives", [1, 2, 3])
def test_the_front_is_optuna_s(objectives):
    study = optuna.create_study(directions=["minimize"] * objectives)
    values = np.random.default_rng(objectives).integers(0, 4, (30, objectives)).astype(float).tolist()  # many are equal
    for own in values:
        study.tell(study.ask(), own)
    front = [number for number, own in enumerate(values) if is_on_front(own, values)]
    assert front == [trial.number for trial in study.best_trials]


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("nonsense://me:secret@127.0.0.1:1/x", "nonsense://me:***@127.0.0.1:1/x"),
        ("nonsense://me:se/cr:et@[::1]:1/x", "nonsense://me:***@[::1]:1/x"),
        ("nonsense://me@127.0.0.1:1/x", "nonsense://me@127.0.0.1:1/x"),
    ],
)
def test_the_password_of_a_database_is_not_shown(cli, tmp_path, url, told):
    file = written(tmp_path / "search.yaml", f"{SEARCH}storage: '{url}'")
    outcome = cli("tune", file, "--out", tmp_path / "out")
    assert (outcome.code, outcome.error.startswith(f"storage {told} cannot be used: ")) == (2, True)


@pytest.mark.parametrize("validation", ["1437", "100000", "0.0001"])
def test_images_that_cannot_be_held_out_are_told_once_before_the_search(cli, tmp_path, validation):
    file = written(tmp_path / "search.yaml", SEARCH.replace("validation: 0.1", f"validation: {validation}"))
    outcome = cli("tune", file, "--out", tmp_path / "out")
    assert (outcome.code, f"validation is {validation}: not a share" in outcome.error) == (2, True)
    assert open_study(load_tuning(file), tmp_path / "out").get_trials() == []


STEPS = [(5, 45, 7), (5, 40, 7), (0.001, 0.01, 100.0), (0.1, 0.7, 0.2), (0.0, 1.0, 0.3), (0.0, 1.2, 0.3), (1.0, 10, 3)]


@pytest.mark.parametrize(("low", "high", "step"), STEPS)
def test_a_step_leads_to_the_end_where_optuna_keeps_it(low, high, step):
    distributions = optuna.distributions
    kind = distributions.IntDistribution if isinstance(low, int) else distributions.FloatDistribution
    with warnings.catch_warnings(record=True) as told:
        kept = kind(low, high, step=step).high == high
    assert kept == (not told)
    with nullcontext() if kept else pytest.raises(ValueError, match=f"steps of {step} from {low} do not end at {high}"):
        Range(low=low, high=high, step=step)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("space", "value", "within"), SPACES_AND_BASE)
def test_the_trial_that_is_called_base_has_its_settings(tmp_path, space, value, within):
    overrides = {"verification.eps": 0.1, space.partition(":")[0]: value}
    text = f"base: digits\ntrials: 2\nsearch: {{{space}}}\noverrides: {overrides}\nstorage: 'sqlite://'"
    tuning = load_tuning(written(tmp_path / "search.yaml", text))
    study = open_study(tuning, tmp_path)
    number, config = _next_trial(tuning, study, tmp_path, [])
    assert study.trials[number].user_attrs.get(BASE, False) == within
    assert within == (config == tuning.trial_config({}))


@pytest.mark.slow
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
    for number, (code, message) in enumerate(
        [(BROKEN, "ImportError: no such module"), (1, "the disk is full"), (1, "")]
    ):
        study.ask()
        with pytest.raises(CerttrainError, match=f"the search stops at trial {number}, .*: {message or 'exit code 1'}"):
            _note(study, Ended(f"trials/{number:04}", code, message), print)
    assert [trial.state.name for trial in study.get_trials()] == ["RUNNING"] * 3


def allocating(elements):
    with pytest.raises(RuntimeError) as error:
        torch.empty(elements)
    return error.value


OF_THE_SETTINGS = [
    DivergedError("the loss is not finite", 0.1),
    UsageError("the images are too small for the network"),
    UnsupportedOperation("no rule for Softmax"),
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory"),
    allocating(2**50),
]
OF_THE_MACHINE = [
    CheckpointError("could not write last.ckpt: no space left on device"),
    DataError("CIFAR-10 is not in data"),
    MissingDependency("no torchvision"),
    ProcessLost("rank 1"),
    OSError(errno.EIO, "input/output error"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
]


def test_a_trial_fails_by_its_settings_and_is_left_by_a_fault_of_the_machine(tmp_path, monkeypatch):
    tuning = load_tuning(written(tmp_path / "search.yaml", SEARCH))
    study, config, told = open_study(tuning, tmp_path), tuning.trial_config({}), []
    for number, error in enumerate([*OF_THE_SETTINGS, *OF_THE_MACHINE]):
        study.ask()
        monkeypatch.setattr("certtrain.runs.train.train", raising(error))
        with pytest.raises(type(error)) if error in OF_THE_MACHINE else nullcontext():
            assert train_trial(tuning, tmp_path, number, config, tmp_path / "run", "cpu") == 0
            _note(study, Ended(trial_name(number), 0, ""), told.append)
    assert told == [f"trial {number}: failed: {lines_of(error)}" for number, error in enumerate(OF_THE_SETTINGS)]
    states = [trial.state.name for trial in study.get_trials()]
    assert states == ["FAIL"] * len(OF_THE_SETTINGS) + ["RUNNING"] * len(OF_THE_MACHINE)
    with pytest.raises(UsageError, match="is not to be had here"):
        train_trial(tuning, tmp_path, len(states) - 1, config, tmp_path / "run", "cuda:99")
    assert study.trials[-1].state.name == "RUNNING"


@pytest.mark.parametrize(
    ("codes", "state"),
    [
        ([-signal.SIGKILL], "RUNNING"),
        ([-signal.SIGKILL, -signal.SIGSEGV], "FAIL"),
        ([-signal.SIGTERM, 128 + signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGINT, IN_USE], "RUNNING"),
    ],
)
def test_a_trial_on_which_processes_crash_is_not_tried_for_ever(tmp_path, codes, state):
    study = open_study(load_tuning(written(tmp_path / "search.yaml", SEARCH)), tmp_path)
    study.ask()
    told = []
    for code in codes:
        _note(study, Ended(trial_name(0), code, ""), told.append)
    assert study.trials[0].state.name == state
    crashes = [
        f"trial 0: {end}" for end in ("ended by signal 9: once more", "failed: ended by signal 11, for the second time")
    ]
    assert told == [
        line for line, code in zip(crashes, codes, strict=False) if code in (-signal.SIGKILL, -signal.SIGSEGV)
    ]


def test_a_trial_belongs_to_one_process_until_the_storage_knows_what_came_out(tmp_path, monkeypatch):
    """Between the end of the run and the news of it, and after, others do not train it again."""
    tuning = load_tuning(written(tmp_path / "search.yaml", SEARCH.replace("trials: 2", "trials: 1")))
    study = open_study(tuning, tmp_path)
    number, config = _next_trial(tuning, study, tmp_path, [])
    assert _next_trial(tuning, study, tmp_path, [])[0] == number  # nobody is at work in it
    begun, tell, offered = study.get_trials(), optuna.study.Study.tell, []

    def told_late(self, *arguments, **options):
        offered.append(_next_trial(tuning, study, tmp_path, []))
        return tell(self, *arguments, **options)

    def trained(*_, **__):
        return SimpleNamespace(summary={"verified_error": 0.25})

    monkeypatch.setattr(optuna.study.Study, "tell", told_late)
    monkeypatch.setattr("certtrain.runs.train.train", trained)
    assert train_trial(tuning, tmp_path, number, config, tmp_path / "run", "cpu") == 0
    assert offered == [None]
    monkeypatch.setattr("certtrain.runs.train.train", raising(AssertionError("trained twice")))
    assert train_trial(tuning, tmp_path, number, config, tmp_path / "run", "cpu") == 0
    with monkeypatch.context() as patch:  # another was told that it had begun just before it was over
        patch.setattr(study, "get_trials", lambda **_: begun)
        assert _next_trial(tuning, study, tmp_path, []) is None
    assert study.trials[number].values == [0.25]


class Recorded:
    """A trial of a study where others have come to these errors, by epoch."""

    def __init__(self, *others):
        self.reported, self.study = {}, optuna.create_study()
        for errors in others:
            told(self.study, "COMPLETE", errors)

    def report(self, value, step):
        self.reported[step] = value


def told(study, state, errors):
    """The trial that has these errors from the first epoch on."""
    trial = study.ask()
    for epoch, error in enumerate(errors, start=1):
        trial.report(error, epoch)
    if state != "RUNNING":
        study.tell(trial, 0.5 if state == "COMPLETE" else None, state=optuna.trial.TrialState[state])


@pytest.mark.parametrize(
    ("own", "others", "startup_trials", "ended"),
    [
        ([0.1, 0.9], [[0.3, 0.5]] * 3, 3, 2),  # it was good, and has got worse
        ([0.4, 0.1], [[0.3, 0.5]] * 3, 3, 1),
        ([0.3, 0.5], [[0.3, 0.5]] * 3, 3, None),
        ([0.4, 0.9], [[0.3, 0.5]] * 3, 4, None),
        ([0.2, 0.9], [[0.3]] * 3, 1, None),  # nothing is known of that epoch
        ([0.2, 0.9], [[0.3], [0.3], [0.3, 0.8]], 3, 2),
        ([0.31], [[0.2], [0.4]], 1, 1),
        ([0.29], [[0.2], [0.4]], 1, None),
        ([0.3, 0.9], [], 1, None),
    ],
)
def test_a_trial_is_ended_where_it_is_above_the_median_of_that_epoch(monkeypatch, own, others, startup_trials, ended):
    """Of those trials that were trained to their end: what is said of others would be of the bad ones alone."""
    trial, errors = Recorded(*others), iter(own)
    for state in ("RUNNING", "PRUNED", "FAIL"):
        told(trial.study, state, [0.0] * 2)
    config = load_config("digits", {"data.validation": 0.1, "verification.split": "validation"})
    pruner = Pruner(trial, config, Pruning(warmup_epochs=0, startup_trials=startup_trials))
    monkeypatch.setattr(pruner, "_verified_error", lambda trainer: next(errors))
    ends = [pruner.after_epoch(None, SimpleNamespace(epoch=epoch)) for epoch in range(1, len(own) + 1)]
    assert next((epoch for epoch, end in enumerate(ends, start=1) if end), None) == ended
    assert list(trial.reported.values()) == own


@pytest.mark.slow
def test_trials_are_pruned_by_bounds_on_validation_images(tmp_path):
    """What is reported after the last epoch is what verification finds; radii are the full one from the start."""
    changes = {"data.validation": 0.1, "verification": {"split": "validation", "limit": None}, "epsilon.max": 0.001}
    config = load_config("digits", [*TINY, changes, "optimizer.lr=0.05"])
    for epochs in (1, 99):
        trial = Recorded([-1.0] * 3) if epochs == 1 else Recorded()
        pruner = Pruner(trial, config, Pruning(warmup_epochs=0, startup_trials=1))
        with one_thread():
            run = train(config, tmp_path / str(epochs), device="cpu", console=QUIET, callbacks=[pruner])
        assert len(trial.reported) == min(epochs, 3)
        assert (run.summary is None) == pruner.pruned or epochs == 99
    assert run.summary["split"] == "validation"
    assert run.summary["images"] == round(0.1 * 1437)
    assert trial.reported[3] == run.summary["verified_error"] < 1


@pytest.mark.parametrize(
    ("start", "ramp", "asked", "last"), [(1, 2, None, 2), (2, 2, None, 3), (1, 2, 1, 1), (1, 0, 3, 3)]
)
def test_no_trial_is_ended_before_its_own_epsilon_has_grown(tmp_path, start, ramp, asked, last):
    """Whatever that of `base` does; or before the epoch that the file names."""
    changes = {"data.validation": 0.1, "verification": {"split": "validation"}, "training.epochs": 4}
    config = load_config("digits", [*TINY, changes, {"epsilon": {"start_epoch": start, "warmup_epochs": ramp}}])
    trial = Recorded([-1.0] * 4)  # beside which any is bad
    pruner = Pruner(trial, config, Pruning(warmup_epochs=asked, startup_trials=1))
    with one_thread():
        train(config, tmp_path / "run", device="cpu", console=QUIET, callbacks=[pruner])
    assert list(trial.reported) == list(range(1, last + 1))


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
