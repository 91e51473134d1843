"""A run resumed with more epochs is the run that had them from the start, or is refused."""

from __future__ import annotations

import shutil

import pytest

import certtrain
from certtrain.config import load_config
from certtrain.errors import UsageError
from certtrain.runs.progress import ProgressDisplay
from tests.commands import STEPS_PER_EPOCH, contents, one_thread, signal_at, train_arguments
from tests.runs.comparing import check_same_run, metrics


@pytest.fixture
def longer(cli, tmp_path):
    """A run of five epochs from the start, with options."""

    def train(*options):
        assert cli(*train_arguments(tmp_path / "longer", "training.epochs=5", *options)).code == 0
        return tmp_path / "longer"

    return train


@pytest.fixture
def resume(cli, tmp_path):
    """Resume the run in `tmp_path / "run"`, by its folder."""
    return lambda *options: cli("train", "--resume", tmp_path / "run", "--device", "cpu", *options)


def check_is_the_longer(run, longer):
    """But for what is kept of the shorter one."""
    for file in [*run.glob("*-3-epochs.*")]:
        file.unlink()
    check_same_run(run, longer)
    assert load_config(run / "config.yaml") == load_config(longer / "config.yaml")


@pytest.mark.parametrize(
    "options",
    [
        ["optimizer.milestones=[0]", "optimizer.milestones_from=ramp", "data.flip=true"],
        ["training.averaging={name: swa, start_epoch: 2}", "optimizer.schedule=inverse-root"],
        pytest.param(
            ["training.averaging={name: ema, decay: 0.5}", "training.smoothing={name: rgs, samples: 2}"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["relative milestones", "swa", "ema and rgs"],
)
def test_a_finished_run_goes_on_as_if_it_had_been_longer(train, resume, longer, tmp_path, options):
    assert train(*options).code == 0
    outcome = resume("training.epochs=5")
    assert outcome.code == 0
    assert "training.epochs is 5 from now on, instead of 3" in outcome.out
    check_is_the_longer(tmp_path / "run", longer(*options))


def interrupted(command, monkeypatch, step, *options):
    with monkeypatch.context() as patch:
        patch.setattr(ProgressDisplay, "after_step", signal_at(step))
        assert command(*options).code == 130


@pytest.mark.parametrize(("step", "goes_on"), [(6, True), (8, False)])
def test_a_schedule_that_ends_with_the_run_goes_on_until_it_has_begun_to_end(
    train, resume, longer, tmp_path, monkeypatch, step, goes_on
):
    """The rate stays for 6 of 9 steps; that of the step after the seventh would have been another one."""
    options = ["optimizer.schedule={name: cooldown, length: 0.34}", "optimizer.milestones=[]"]
    interrupted(train, monkeypatch, step, *options)
    before = contents(tmp_path / "run")
    outcome = resume("training.epochs=5")
    if goes_on:
        assert outcome.code == 0
        assert "the learning rate falls as in a run of 5 epochs" in outcome.out
        check_is_the_longer(tmp_path / "run", longer(*options))
    else:
        assert (outcome.code, contents(tmp_path / "run")) == (2, before)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_where_the_past_would_have_been_another_it_is_refused(train, resume, tmp_path, schedule):
    assert train(f"optimizer.schedule={schedule}").code == 0
    before = contents(tmp_path / "run")
    outcome = resume("training.epochs=5")
    assert outcome.code == 2
    assert outcome.error == (
        f"training.epochs is 3 there, 5 here: with so many, optimizer.schedule {schedule} would have given the steps "
        "that were taken another learning rate; train anew with --out"
    )
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["training.epochs=2", "optimizer.milestones=[]"], "training.epochs is 3 there, 2 here"),
        (["training.epochs=5", "optimizer.lr=0.1"], "another configuration: optimizer.lr is 0.002 there, 0.1 here"),
    ],
)
def test_nothing_else_may_change(resume, run, asked, message):
    before = contents(run)
    outcome = resume(*asked)
    assert (outcome.code, message in outcome.error) == (2, True)
    assert contents(run) == before


def test_a_step_stays_compiled_or_not_as_it_was(resume, run, monkeypatch):
    """Whether compiling pays is a question of the run's length; what is rounded otherwise is another run."""
    monkeypatch.setattr("certtrain.runs.build.compiling_pays", lambda device, steps, _: steps > 3 * STEPS_PER_EPOCH)
    outcome = resume("training.epochs=4")
    assert outcome.code == 0
    assert "the step stays not compiled, as it was: training.compile is false from now on" in outcome.out
    assert load_config(run / "config.yaml").training.compile is False


def test_what_there_is_of_the_shorter_run_is_kept_until_all_is_replaced(cli, train, resume, run, tmp_path, monkeypatch):
    for limit in (4, 5):
        assert cli("verify", run, "--limit", limit).code == 0
    of_network = ("model.safetensors", "summary.json", "verify.json", "verify-1.json", "verdicts.json")
    of_three = {name: (run / name).read_bytes() for name in of_network}
    interrupted(resume, monkeypatch, 11, "training.epochs=5")
    assert not any((run / name).exists() for name in of_three), "the run is not finished"
    kept = {name: run / f"{name.replace('.', '-3-epochs.')}" for name in of_three}
    assert {name: file.read_bytes() for name, file in kept.items()} == of_three
    outcome = cli("verify", run, "--limit", 5, "--json", kept["model.safetensors"])
    assert outcome.code != 0
    assert kept["model.safetensors"].read_bytes() == of_three["model.safetensors"]
    assert cli("verify", kept["model.safetensors"], "--limit", 5, "--json", tmp_path / "again.json").code == 0
    assert resume().code == 0
    assert [record["epoch"] for record in metrics(run)] == [1, 2, 3, 4, 5]
    assert train("--overwrite").code == 0
    assert not list(run.glob("*-3-epochs.*"))


def test_from_python_a_whole_configuration_may_be_the_longer_one(reference, tmp_path, longer):
    run = shutil.copytree(reference, tmp_path / "run")
    config = load_config(run / "config.yaml", {"training.epochs": 5})
    with one_thread():
        certtrain.train(config, run, device="cpu", resume=True)
        check_is_the_longer(run, longer())
        with pytest.raises(UsageError, match=r"training\.epochs is 5 there, 4 here"):
            certtrain.train(out=run, device="cpu", resume=True, overrides={"training.epochs": 4})
