"""Runs that begin with a trained network: what comes from it, what is refused, and what is measured."""

from __future__ import annotations

import json
import re
import shutil
from functools import partial

import numpy as np
import pytest
import safetensors.torch
import torch

import certtrain
from certtrain.cli import main
from certtrain.config import load_config
from certtrain.data import Split, load_dataset
from certtrain.errors import CheckpointError, DataError, UsageError
from certtrain.runs.build import assemble, build, load_data
from certtrain.runs.checkpoint import load_checkpoint, save_checkpoint
from certtrain.runs.forgetting import load_with_old_data
from certtrain.runs.inheritance import NOTHING, Inheritance, OldData
from certtrain.runs.start import Start, find_start, stored_start, take
from certtrain.schedules import SmoothedEpsilon
from tests.commands import STEPS_PER_EPOCH, TINY, contents, exit_code, one_thread, start_ranks, train_arguments
from tests.runs.comparing import Told, metrics, without_speed

NO_TABLE = "start_from.evaluate_every=null"
SLOW = pytest.mark.slow


def weights(folder):
    return safetensors.torch.load_file(folder / "model.safetensors")


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


FIVE_CLASSES = "data.classes=[0,1,2,3,4]"


@pytest.fixture(scope="session")
def five(tmp_path_factory):
    """The tiny network, trained on the digits 0 to 4."""
    folder = tmp_path_factory.mktemp("five") / "run"
    with one_thread():
        assert main(train_arguments(folder, FIVE_CLASSES)) == 0
    return folder


@pytest.fixture(scope="module")
def begun(tmp_path_factory, reference):
    """A run that began with `reference`; only to be read."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    with one_thread():
        assert main(train_arguments(folder, f"start_from={reference}", NO_TABLE, "metrics.first_steps=2")) == 0
    return folder


# --- where it lies ---------------------------------------------------------------------------------------------------


def test_the_home_folder_may_be_written_short(train, tmp_path, reference, monkeypatch):
    monkeypatch.setenv("HOME", str(reference.parent))
    assert train("start_from=~/run", NO_TABLE).code == 0
    assert summary(tmp_path / "run")["start"]["sha256"] == summary(reference)["weights_sha256"]


@pytest.mark.parametrize("path", ["~nobody-of-that-name/run", "nowhere/run"])
def test_of_a_home_or_a_run_that_is_not_there_it_is_said(train, tmp_path, path):
    outcome = train(f"start_from={path}")
    message = f"start_from: there is no run directory or file {path}"
    assert (outcome.code, outcome.error) == (1, message)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        certtrain.train("digits", tmp_path / "run", device="cpu", overrides=[f"start_from={path}"])
    assert not (tmp_path / "run").exists()


# --- what is kept ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [4, 2 * STEPS_PER_EPOCH])
def test_begun_in_the_middle_of_a_run_it_is_that_run_resumed(tmp_path, reference, step):
    config = load_config(reference / "config.yaml")
    with one_thread():
        half = certtrain.train(config, tmp_path / "half", device="cpu", callbacks=[Told(("step", step))])
        start = {"start_from": {"path": str(half.folder), "keep": "step", "evaluate_every": 2}}
        run = certtrain.train(config, tmp_path / "run", device="cpu", overrides=start)
    assert (run.folder / "model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()
    records = [
        {key: value for key, value in record.items() if key not in ("old", "new")}
        for record in without_speed(metrics(run.folder))
    ]
    assert records == without_speed(metrics(reference))[step // STEPS_PER_EPOCH :]
    ends = [
        load_checkpoint(folder / "last.ckpt")["trainer"]["optimizer"]["state"] for folder in (run.folder, reference)
    ]
    for index, values in ends[0].items():
        assert all(torch.equal(value, ends[1][index][name]) for name, value in values.items())


BEGUN = {  # how a run begins with `reference`, or with `five`, from which it replays images
    "end": ["start_from={reference}", "start_from.epsilon=end", "epsilon.max=0.2", "epsilon.warmup_epochs=2"],
    "at-once": ["start_from={reference}", "start_from.epsilon=at-once", "epsilon.warmup_epochs=2",
                "optimizer.milestones_from=ramp"],
    "peak": ["start_from={reference}", "start_from.peak=4", "optimizer.lr=0.0001"],
    "replay": ["start_from={five}", "start_from.keep=optimizer", "start_from.reset_classifier=true",
               "replay.share=0.25"],
    "all": ["start_from={five}", "start_from.epsilon=end", "start_from.peak=4", "replay.share=0.25",
            "epsilon.max=0.05", "epsilon.warmup_epochs=2"],
}  # fmt: skip


@pytest.mark.parametrize("how", ["end", "at-once", *(pytest.param(s, marks=SLOW) for s in ("peak", "replay", "all"))])
@pytest.mark.parametrize("times", [1, pytest.param(2, marks=SLOW)])
def test_a_run_that_itself_began_with_another_is_continued_through_any_number_of_them(
    tmp_path, reference, five, how, times
):
    """Each goes on two steps later; what it is continued from may say nothing of the first by then."""
    options = [each.format(reference=reference, five=five) for each in BEGUN[how]]
    config = load_config(reference / "config.yaml", [*options, NO_TABLE])
    with one_thread():
        whole = certtrain.train(config, tmp_path / "whole", device="cpu")
        stopped = certtrain.train(config, tmp_path / "0", device="cpu", callbacks=[Told(("step", 3))])
        for number in range(1, times + 1):
            again = [f"start_from={{path: {stopped.folder}, keep: step, evaluate_every: null}}"]
            end = [Told(("step", 3 + 2 * number))] if number < times else []
            stopped = certtrain.train(config, tmp_path / str(number), device="cpu", overrides=again, callbacks=end)
    assert (stopped.folder / "model.safetensors").read_bytes() == (whole.folder / "model.safetensors").read_bytes()
    schedules = [[(each["eps"], each["lr"]) for each in metrics(run.folder)] for run in (stopped, whole)]
    assert schedules[0] == schedules[1][-len(schedules[0]) :]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [([], 0.04), (["optimizer.lr=0.03"], None), (["start_from.peak=0.5"], 5e-4), (["epsilon.max=0.3"], 0.04)],
)
def test_a_learning_rate_that_is_set_otherwise_is_not_the_other_runs(changes, expected):
    there = load_config("digits", ["start_from=a", "start_from.peak=4", "optimizer.lr=0.001"])
    start = Start(file="b/last.ckpt", keep="step", config=there, inherited=Inheritance(lr=0.04, initial=0.1))
    here = load_config(there, ["start_from={path: b, keep: step}", *changes])
    assert start.passes_on(here) == Inheritance(lr=expected, initial=0.1, old=OldData.of(there))


@pytest.mark.parametrize("asked", ["keep=step", "epsilon=end"])
def test_a_run_that_does_not_say_how_it_began_is_not_gone_on_with(train, tmp_path, begun, asked):
    source = shutil.copytree(begun, tmp_path / "source")
    (source / "start.json").unlink()
    outcome = train(f"start_from={source}", f"start_from.{asked}")
    assert outcome.code == 1
    assert re.search(r"began with another network, and lacks start\.json.* name its whole folder", outcome.error)
    assert train(f"start_from={source}", NO_TABLE).code == 0


def test_a_record_of_a_start_without_what_was_inherited_is_read(tmp_path, begun):
    """As it was before there was such a field: nothing."""
    values = json.loads((begun / "start.json").read_text())
    del values["inherited"]
    (tmp_path / "start.json").write_text(json.dumps(values))
    start = stored_start(tmp_path)
    assert (start.inherited, start.eps, start.sha256) == (NOTHING, values["eps"], values["sha256"])


def test_weights_and_statistics_alone_and_with_the_optimizers_state(train, tmp_path, reference):
    """A first step so small that nothing moves: what is there after it, was there before."""
    run, still = tmp_path / "run", ["optimizer.lr=1e-30", "training.epochs=1", "optimizer.milestones=[]", NO_TABLE]
    still += ["epsilon.warmup_epochs=0"]
    steps = {}
    for keep in ("weights", "optimizer"):
        assert train(f"start_from={reference}", f"start_from.keep={keep}", *still, "--overwrite").code == 0
        found, expected = weights(run), weights(reference)
        for name in expected:
            if "running" not in name and "num_batches" not in name:
                assert torch.equal(found[name], expected[name]), name
            elif "num_batches" in name:
                assert found[name] == expected[name] + STEPS_PER_EPOCH
        state = load_checkpoint(run / "last.ckpt")["trainer"]
        steps[keep] = {int(values["step"]) for values in state["optimizer"]["state"].values()}
        assert state["step"] == STEPS_PER_EPOCH
    assert steps == {"weights": {STEPS_PER_EPOCH}, "optimizer": {4 * STEPS_PER_EPOCH}}


@pytest.mark.parametrize("keep", ["weights", "optimizer"])
def test_another_number_of_classes_has_a_new_classifier(train, tmp_path, five, keep):
    run = tmp_path / "run"
    outcome = train(f"start_from={five}", f"start_from.keep={keep}", "optimizer.lr=1e-30")
    assert outcome.code == 0, outcome.err
    found, there = weights(run), weights(five)
    resized = [name for name in there if found[name].shape != there[name].shape]
    assert sorted(resized) == ["network.10.bias", "network.10.weight"]
    assert "; initialized anew: network.10.weight, network.10.bias" in outcome.out
    config = load_config(run / "config.yaml")
    torch.manual_seed(config.seed)
    fresh = build(config, load_data(config))[0].state_dict()
    for name in there:
        if "running" not in name and "num_batches" not in name:
            assert torch.equal(found[name], fresh[name] if name in resized else there[name]), name
    started = summary(run)["start"]
    assert sorted(started["reinitialized"]) == sorted(resized)
    original = summary(five)
    errors = {name: original[name] for name in ("natural_error", "verified_error")}
    assert started["before"]["old"] == errors, "with the classifier of then"
    assert [row["epoch"] for row in started["along"]] == [1, 2, 3]


def test_a_classifier_is_reset_where_that_is_asked_for(train, tmp_path, reference):
    assert (
        train(f"start_from={reference}", "start_from.reset_classifier=true", "optimizer.lr=1e-30", NO_TABLE).code == 0
    )
    found, there = weights(tmp_path / "run"), weights(reference)
    changed = [n for n in there if "running" not in n and "num_b" not in n and not torch.equal(found[n], there[n])]
    assert sorted(changed) == sorted(summary(tmp_path / "run")["start"]["reinitialized"]) != []


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Runs whose input normalisation is not the data set's, one of them stopped, and weights without their run."""
    folder = tmp_path_factory.mktemp("elsewhere")
    overrides = [*TINY, "data.mean=[0.3]", "data.std=[0.6]"]
    with one_thread():
        run = certtrain.train(
            "digits", folder / "run", device="cpu", overrides=overrides, callbacks=[Told(("step", 4))]
        )
        certtrain.train("digits", folder / "whole", device="cpu", overrides=overrides)
    (folder / "bare").mkdir()
    shutil.copy(run.folder / "last.ckpt", folder / "bare")
    shutil.copy(folder / "whole" / "model.safetensors", folder / "bare")
    return folder


@pytest.mark.parametrize(
    ("place", "keep"),
    [
        ("whole", "weights"),
        ("bare/model.safetensors", "weights"),
        pytest.param("run", "optimizer", marks=pytest.mark.slow),
        pytest.param("run", "step", marks=pytest.mark.slow),
        pytest.param("bare/last.ckpt", "weights", marks=pytest.mark.slow),
        pytest.param("bare/last.ckpt", "step", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    ("changes", "mean", "std"),
    [
        ([], 0.3, 0.6),
        pytest.param(["data.mean=[0.7]", "data.std=[0.25]"], 0.7, 0.25, marks=pytest.mark.slow),
        (["data.std=[0.25]"], 0.3, 0.25),
    ],
)
def test_the_input_normalisation_is_the_networks_own_unless_it_is_set(
    train, tmp_path, elsewhere, place, keep, changes, mean, std
):
    """In model.json and in the network, and after the run has been resumed, too."""
    run = tmp_path / "run"
    arguments = [f"start_from={elsewhere / place}", f"start_from.keep={keep}", *changes, "verification.limit=10"]
    arguments.append("start_from.evaluate_every=0" if place == "whole" else NO_TABLE)
    assert train(*arguments).code == 0
    for _ in range(2):
        described = json.loads((run / "model.json").read_text())["model"]
        assert (described["mean"], described["std"]) == ([mean], [std])
        normalize = certtrain.load_model(run).normalize
        assert (normalize.mean.item(), normalize.std.item()) == (float(np.float32(mean)), float(np.float32(std)))
        (run / "summary.json").unlink()
        (run / "model.safetensors").unlink()
        assert train(*arguments, "--resume").code == 0
    before = summary(run)["start"].get("before", {})
    if place == "whole":
        (expected,) = certtrain.verify(
            certtrain.load_model(elsewhere / place), load_dataset("digits").test, 0.15, limit=10
        )
        assert before["old"]["natural_error"] == expected.natural_error, "as it was then"


# --- schedules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epsilon", "expected"),
    [
        ("zero", SmoothedEpsilon(0.2, 3, 6)),
        ("end", SmoothedEpsilon(0.2, 3, 6, initial=0.1)),
        ("at-once", lambda step: 0.2),
    ],
)
def test_epsilon_begins_where_it_is_told_to(train, tmp_path, reference, epsilon, expected):
    more = ["start_from.peak=0.5", "optimizer.warmup_epochs=1", "optimizer.warmup_start=0.4", NO_TABLE]
    assert train(f"start_from={reference}", f"start_from.epsilon={epsilon}", "epsilon.max=0.2", *more).code == 0
    records = metrics(tmp_path / "run")
    assert [record["eps"] for record in records] == pytest.approx([expected(step) for step in (2, 5, 8)])
    assert [record["lr"] for record in records] == pytest.approx([1e-3, 1e-3, 2e-4]), "half of the old run's"


def test_a_natural_network_was_trained_at_no_radius(train, cli, tmp_path):
    natural = ["training.method=natural", "training.epochs=1", "optimizer.milestones=[]"]
    assert cli(*train_arguments(tmp_path / "natural", *natural)).code == 0
    assert train(f"start_from={tmp_path / 'natural'}", "start_from.epsilon=end", NO_TABLE).code == 0
    assert metrics(tmp_path / "run")[0]["eps"] == 0


def taken_from(source):
    """What a run takes that begins with `source` at the radius that it was last trained at."""
    section = {"path": str(source), "epsilon": "end", "evaluate_every": None}
    config = load_config("digits", [*TINY, {"start_from": section}])
    start = find_start(config.start_from, source.parent / "elsewhere")
    return take(start, config.start_from, config.data, build(config, load_data(config))[0])


@pytest.mark.parametrize(
    ("stopped", "initial"), [(2, 0), pytest.param(4, 0, marks=SLOW), (7, 0.1), pytest.param(6, 0.1, marks=SLOW)]
)
def test_the_radius_at_the_end_is_that_of_the_last_step_that_the_weights_were_trained_for(
    tmp_path, reference, stopped, initial
):
    """Whatever metrics.jsonl says, which is written at other times; with the radius that run itself began at."""
    options = ["epsilon.start_epoch=1", "epsilon.warmup_epochs=3", "epsilon.max=0.3"]
    options += [f"start_from={reference}", "start_from.epsilon=end", NO_TABLE] if initial else []
    config = load_config(reference / "config.yaml", options)
    with one_thread():
        run = certtrain.train(config, tmp_path / "run", device="cpu", callbacks=[Told(("step", stopped))]).folder
    schedule = SmoothedEpsilon(0.3, 0, 9, initial=initial)
    assert taken_from(run).eps == schedule(stopped - 1)
    lines = [json.dumps({"epoch": epoch, "step": 3 * epoch, "eps": schedule(3 * epoch - 1)}) for epoch in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert taken_from(run).eps == schedule(stopped - 1), "saved before its last records were"
    (run / "metrics.jsonl").unlink()
    assert taken_from(run).eps == taken_from(run / "last.ckpt").eps == schedule(stopped - 1)


@pytest.fixture(scope="module")
def trained_further(tmp_path_factory, reference):
    """A run of two epochs of warmup, and then of two more."""
    folder = tmp_path_factory.mktemp("further") / "run"
    options = ["epsilon.start_epoch=1", "epsilon.warmup_epochs=2", "epsilon.max=0.3", "optimizer.milestones=[]"]
    config = load_config(reference / "config.yaml", [*options, "training.epochs=2"])
    with one_thread():
        certtrain.train(config, folder, device="cpu")
        certtrain.train(out=folder, device="cpu", resume=True, overrides=["training.epochs=4"])
    return folder


@pytest.mark.parametrize(("name", "step"), [("model", 12), ("model-2-epochs", 6), ("last", 12)])
def test_of_a_finished_run_the_radius_is_that_of_its_last_step(tmp_path, trained_further, name, step):
    """Also of one that was trained further since, whose network is another file; without metrics, where warmup ends."""
    run = shutil.copytree(trained_further, tmp_path / "run")
    file = run / f"{name}.{'ckpt' if name == 'last' else 'safetensors'}"
    assert taken_from(file).eps == SmoothedEpsilon(0.3, 0, 6)(step - 1)
    (run / "metrics.jsonl").unlink()
    assert taken_from(file).eps == 0.3


@pytest.mark.parametrize(("epsilon", "expected"), [("zero", 0), ("end", 0.05), ("at-once", 0)])
def test_the_trainer_knows_where_warmup_begins(epsilon, expected):
    """By which weights of CROWN-IBP and of the regularizers are told how far the radius has come."""
    section = {"path": "a", "epsilon": epsilon, "evaluate_every": None}
    config = load_config("digits", [*TINY, {"start_from": section}])
    dataset, start = load_data(config), Start(file="a/last.ckpt", keep="weights", config=config, eps=0.05)
    trainer = assemble(config, build(config, dataset)[0], dataset, start=start)
    assert (trainer.initial_eps, trainer.max_eps) == (expected, config.epsilon.max)


def test_where_the_radius_has_got_is_where_warmup_begins(train, tmp_path, reference):
    """And is recorded, so that resuming needs nothing of the other run."""
    config = load_config(reference / "config.yaml", ["epsilon.start_epoch=1", "epsilon.warmup_epochs=3"])
    with one_thread():
        first = certtrain.train(config, tmp_path / "first", device="cpu", callbacks=[Told(("step", 5))]).folder
    assert train(f"start_from={first}", "start_from.epsilon=end", "epsilon.max=0.2", NO_TABLE).code == 0
    expected = SmoothedEpsilon(0.1, 0, 9)(4)
    assert metrics(tmp_path / "run")[0]["eps"] == stored_start(tmp_path / "run").eps == expected


@pytest.mark.parametrize(
    "counts", [{}, {"step": 4}, {"step": -1, "steps_per_epoch": 3}, {"step": 4, "steps_per_epoch": 0}]
)
def test_a_checkpoint_that_does_not_say_how_far_it_was_trained_is_refused(train, tmp_path, elsewhere, counts):
    source = shutil.copytree(elsewhere / "run", tmp_path / "source")
    state = load_checkpoint(source / "last.ckpt")
    kept = {key: value for key, value in state["trainer"].items() if key not in ("step", "steps_per_epoch")}
    save_checkpoint(source / "last.ckpt", {**state, "trainer": {**kept, **counts}})
    outcome = train(f"start_from={source}")
    assert (outcome.code, "last.ckpt does not say how far it was trained: trainer" in outcome.error) == (1, True)


# --- replay, and what is forgotten -----------------------------------------------------------------------------------


REPLAY = ["replay.share=0.25", "start_from.epsilon=end", "epsilon.max=0.15"]


@pytest.mark.slow
def test_replayed_from_its_runs_data_it_resumes_exactly(tmp_path, five, reference):
    """Interrupted inside an epoch, and resumed when the other run is gone but for its data."""
    source = shutil.copytree(five, tmp_path / "five")
    overrides = [f"start_from={source}", *REPLAY]
    config = load_config(reference / "config.yaml")
    with one_thread():
        whole = certtrain.train(config, tmp_path / "whole", device="cpu", overrides=overrides)
        certtrain.train(config, tmp_path / "run", device="cpu", overrides=overrides, callbacks=[Told(("step", 5))])
        shutil.rmtree(source)
        run = certtrain.train(out=tmp_path / "run", device="cpu", resume=True)
    assert (run.folder / "model.safetensors").read_bytes() == (whole.folder / "model.safetensors").read_bytes()
    assert without_speed(metrics(run.folder)) == without_speed(metrics(whole.folder))
    assert (run.summary or {})["start"] == (whole.summary or {})["start"]
    assert metrics(run.folder)[-1]["step"] == 3 * 4, "96 new images, 24 of them in a batch of 32"


@pytest.mark.slow
def test_measuring_changes_nothing_and_says_what_verify_says(train, tmp_path, five, reference):
    run, bytes_of = tmp_path / "run", {}
    for every in ("1", "0", "null"):
        arguments = [f"start_from={five}", f"start_from.evaluate_every={every}", *REPLAY, "--overwrite"]
        assert train(*arguments).code == 0
        bytes_of[every] = (run / "model.safetensors").read_bytes()
        started = summary(run)["start"]
        assert len(started.get("along", [])) == (3 if every == "1" else 0)
        assert ("after" in started) == (every != "null")
        if every == "1":
            measured = started
    assert len(set(bytes_of.values())) == 1
    model, old = certtrain.load_model(run), load_data(load_config(five / "config.yaml")).test
    new = load_dataset("digits").test
    for name, images, eps in (("old", old, 0.1), ("new", new, 0.15)):
        (found,) = certtrain.verify(model, images, eps, limit=50)
        errors = {"natural_error": found.natural_error, "verified_error": found.verified_error}
        assert measured["after"][name] == errors == measured["along"][-1][name]
    for error in ("natural_error", "verified_error"):
        before, after = measured["before"], measured["after"]
        assert measured["forgetting"][error] == after["old"][error] - before["old"][error]
        assert measured["learned"][error] == before["new"][error] - after["new"][error]


@pytest.mark.parametrize("classes", [[4, 3, 2, 1, 0], [9, 2, 0, 1, 3, 4]])
def test_old_classes_are_known_by_name_in_whatever_order_the_new_ones_are(train, tmp_path, five, classes):
    run, digits = tmp_path / "run", load_dataset("digits")
    outcome = train(f"start_from={five}", f"data.classes={classes}", "replay.share=0.5")
    assert outcome.code == 0, outcome.err
    config, start = load_config(run / "config.yaml"), stored_start(run)
    old = load_with_old_data(config, start)[0].old
    for image, label in zip(old.images, old.labels, strict=True):
        same = (digits.train.images == image).flatten(1).all(1)
        assert (digits.train.labels[same] == classes[label]).all()
        assert same.any()
    original = summary(five)
    started, errors = summary(run)["start"], {name: original[name] for name in ("natural_error", "verified_error")}
    assert started["before"]["old"] == errors
    test = load_data(load_config(five / "config.yaml")).test
    places = torch.tensor([classes.index(label) for label in test.labels])
    (found,) = certtrain.verify(certtrain.load_model(run), Split(test.images, places), 0.1, limit=50)
    assert started["after"]["old"] == {name: getattr(found, name) for name in errors}


def test_classes_that_the_new_data_lacks_are_not_replayed_nor_measured(train, tmp_path, five):
    others = [f"start_from={five}", "data.classes=[1,2,3,4,5]"]
    outcome = train(*others, "replay.share=0.5")
    assert (outcome.code, outcome.error) == (
        1,
        "replay: images of '0', which is none of the 5 classes of this run's data: choose old data by replay.data",
    )
    assert train(*others).code == 0
    assert set(summary(tmp_path / "run")["start"]["after"]["old"].values()) == {None}


def test_fewer_classes_cannot_be_asked_about_the_old_ones(train, tmp_path, reference):
    assert train(FIVE_CLASSES, f"start_from={reference}").code == 0
    started = summary(tmp_path / "run")["start"]
    nothing = {"natural_error": None, "verified_error": None}
    assert started["before"]["old"] != nothing
    assert started["after"]["old"] == nothing == started["forgetting"]


@pytest.mark.slow
def test_two_processes_replay_as_one(tmp_path, five, reference):
    arguments = train_arguments(tmp_path / "two", f"start_from={five}", "start_from.keep=optimizer", *REPLAY)
    children = start_ranks(2, partial(main, arguments), tmp_path / "log")
    assert [exit_code(child) for child in children] == [0, 0], (tmp_path / "log").read_text()
    with one_thread():
        assert main([*arguments[:3], str(tmp_path / "one"), *arguments[4:]]) == 0
    found, expected = weights(tmp_path / "two"), weights(tmp_path / "one")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)


# --- validation images ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def validated(tmp_path_factory):
    """The tiny network, trained on all but 60 of the digits."""
    folder = tmp_path_factory.mktemp("validated") / "run"
    with one_thread():
        assert main(train_arguments(folder, "data.validation=60")) == 0
    return folder


def digits_elsewhere(folder):
    """The digits as files of one's own."""
    digits = load_dataset("digits")
    for name in ("train", "test"):
        split = getattr(digits, name)
        np.savez(folder / f"{name}.npz", images=split.images[:, 0].numpy(), labels=split.labels.numpy())
    return folder


HELD_OUT, VERIFIED = "data.validation=60", "verification.split=validation"
OLD_DIGITS = ["replay.share=0.25", "replay.data.name=digits"]
OTHERS = ["data.name=npz", "data.path={others}"]


@pytest.mark.parametrize(
    ("arguments", "refused"),
    [
        (["start_from={validated}", HELD_OUT, VERIFIED], None),
        (["start_from={validated}", HELD_OUT, "data.classes=[2,1,0]"], None),
        (["start_from={validated}", "seed=1"], None),
        (["start_from={validated}", HELD_OUT, "seed=1"], "start_from"),
        (["start_from={validated}", HELD_OUT, VERIFIED, "seed=1"], "start_from"),
        (["start_from={validated}", "data.validation=50"], "start_from"),
        (["start_from={reference}", HELD_OUT], "start_from"),
        (["start_from={reference}", HELD_OUT, *OTHERS], None),
        ([*OLD_DIGITS, HELD_OUT], "replay.data"),
        ([*OLD_DIGITS, HELD_OUT, "replay.data.validation=60"], None),
        ([*OLD_DIGITS, HELD_OUT, VERIFIED, *OTHERS], None),
    ],
)
def test_nothing_that_is_held_out_has_been_trained_on(tmp_path, reference, validated, arguments, refused):
    """Nor do old images need a validation split of their own."""
    places = {"reference": reference, "validated": validated, "others": digits_elsewhere(tmp_path)}
    config = load_config("digits", [argument.format(**places) for argument in (*TINY, *arguments)])
    start = None if config.start_from is None else find_start(config.start_from, tmp_path / "run")
    if refused is None:
        data, _ = load_with_old_data(config, start)
        assert torch.equal(data.test.images, load_data(config).test.images)
        return
    with pytest.raises(
        UsageError, match=rf"^{refused}: trained on images that this run would hold out.* make them the"
    ):
        load_with_old_data(config, start)


@pytest.mark.parametrize("between", ["reference", "validated"])
def test_what_is_held_out_was_trained_on_by_no_run_before(tmp_path, reference, validated, between):
    """A run that begins with one, on other images, and this one on its; however many there are between."""
    first = {"reference": reference, "validated": validated}[between]
    others = digits_elsewhere(tmp_path)
    for place, begins_with in (("second", first), ("third", tmp_path / "second")):
        changes = ["data.name=npz", f"data.path={others}", NO_TABLE, f"start_from.path={begins_with}"]
        with one_thread():
            assert main(train_arguments(tmp_path / place, *changes)) == 0
    config = load_config("digits", [*TINY, HELD_OUT, f"start_from={tmp_path / 'third'}", NO_TABLE])
    start = find_start(config.start_from, tmp_path / "run")
    assert [run.data.name for run in (start.config, *start.earlier)] == ["npz", "npz", "digits"]
    if between == "validated":
        load_with_old_data(config, start)
        return
    with pytest.raises(UsageError, match=r"^start_from of start_from of start_from: trained on images"):
        load_with_old_data(config, start)


def test_data_of_a_user_that_there_is_not_is_said_to_be_missing():
    """~nosuch stays as it is, wherever data are looked for or compared."""
    places = ["data.name=npz", "data.path=~nosuch/x", "replay.data.name=npz", "replay.data.path=~nosuch/y"]
    config = load_config("digits", [*TINY, *places, "replay.share=0.25", HELD_OUT])
    with pytest.raises(DataError, match="~nosuch/x"):
        load_with_old_data(config, None)


# --- refused ---------------------------------------------------------------------------------------------------------


def bare(five):
    """The weights alone."""
    return five / "model.safetensors"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["start_from={run}", "model.options.width=3"], 1, r"model\.options\.width is 2 there, 3 here"),
        (["start_from={run}", "model.name=cnn7"], 1, r"model\.name is 'cnn-small' there, 'cnn7' here"),
        (
            ["start_from={bare}", "model.options.width=3"],
            1,
            r"of another architecture: network\.0\.weight is \(2, 1",
        ),
        (["start_from={run}", "data.name=npz", "data.path={large}"], 1, "takes 1×8×8 images, the data has 1×9×9"),
        (["replay.share=0.1"], 2, "replay: there is no old data: name a run in start_from, or the data in replay.data"),
        (["start_from={bare}", "replay.share=0.1"], 2, "has no config.yaml beside it, which would tell the data"),
        (["start_from={bare}", "start_from.peak=0.5"], 2, "has no config.yaml beside it"),
        (["start_from={bare}", "start_from.keep=optimizer"], 2, "holds weights alone"),
        (["start_from={run}", "start_from.keep=optimizer", "optimizer.name=SGD"], 1, "configure the same optimizer"),
        (["start_from={run}", "start_from.keep=step", "data.limit=40"], 1, "saved with 3 steps per epoch"),
        (["start_from={run}", "start_from.keep=step", "start_from.epsilon=end"], 2, "keep step goes on with all"),
        (["start_from={run}", "replay.share=0.001"], 2, r"replay\.share: 0\.001 of a batch of 32 is 0 images"),
        (["start_from={run}/nowhere"], 1, "there is no run directory or file"),
        (["start_from={large}"], 1, "holds no model.safetensors or last.ckpt"),
        (["start_from={run}", "start_from.kept=step"], 2, r"unknown key start_from\.kept: did you mean keep"),
        (["start_from={run}", "--overwrite", "--out={run}"], 2, "lies in the folder of this very run"),
    ],
)
def test_what_cannot_be_continued_is_refused_before_a_file_is_written(
    train, tmp_path, reference, arguments, code, message
):
    source = shutil.copytree(reference, tmp_path / "source")
    shutil.copytree(source, tmp_path / "bare", ignore=lambda *_: ["config.yaml", "model.json"])
    (tmp_path / "large").mkdir()
    for name in ("train", "test"):
        images, labels = np.full((4, 9, 9, 1), 255, np.uint8), np.array([0, 1, 0, 1])
        np.savez(tmp_path / "large" / f"{name}.npz", images=images, labels=labels)
    places = {"run": source, "bare": tmp_path / "bare" / "model.safetensors", "large": tmp_path / "large"}
    before = contents(tmp_path)
    outcome = train(*(argument.format(**places) for argument in arguments))
    assert outcome.code == code, outcome.err
    assert re.search(message, outcome.error), outcome.error
    assert len(outcome.error) <= 300
    assert contents(tmp_path) == before


@pytest.mark.parametrize("content", [b"", b"[", b"[]", b'{"file": "a"}', b"\xff\xfe", b"[" * 100_000, None])
def test_a_harmed_record_of_the_start_is_refused(train, tmp_path, begun, content):
    """None: values of another type."""
    run = shutil.copytree(begun, tmp_path / "run")
    values = json.loads((run / "start.json").read_text())
    (run / "start.json").write_bytes(json.dumps(values | {"eps": "all"}).encode() if content is None else content)
    before = contents(run)
    outcome = train("--resume")
    assert (outcome.code, "start.json is missing or corrupt" in outcome.error) == (1, True)
    assert len(outcome.error) <= 300
    assert contents(run) == before
    (run / "start.json").write_text(json.dumps(values))
    (run / "steps.jsonl").write_bytes(b"{}" if content is None else content or b"[")
    outcome = train("--resume")
    assert (outcome.code, "steps.jsonl is missing or corrupt" in outcome.error) == (1, True)
