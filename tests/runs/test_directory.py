"""Who may write into a run directory, and what may be written beside it."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import signal
import socket
from contextlib import ExitStack, suppress

import pytest

import certtrain
from certtrain.errors import CheckpointError, FolderInUse, UsageError
from certtrain.runs import evaluation
from certtrain.runs.directory import clear, write_results
from certtrain.runs.files import RUN_FILES
from certtrain.runs.lock import LOCK, claimed
from certtrain.training.trainer import Observer
from tests.commands import TINY, contents, one_thread, train_arguments


def forked(work):
    """A child process that calls `work()` and nothing else; its id."""
    child = os.fork()
    if child == 0:
        with suppress(BaseException):
            work()
        os._exit(0)
    return child


# --- one process at a time --------------------------------------------------------------------------------------------


def test_a_folder_is_claimed_once_and_given_back(tmp_path):
    folder = tmp_path / "runs" / "new"
    with claimed(folder):
        holder = re.escape(f"process {os.getpid()} on {platform.node()}")
        with pytest.raises(CheckpointError, match=f"another run goes on in .* \\({holder}"), claimed(folder):
            pass
        (folder / "file").touch()
    with claimed(folder):
        pass
    assert set(contents(folder)) == {"file"}


def test_a_new_folder_that_stays_empty_is_removed(tmp_path):
    with pytest.raises(ZeroDivisionError), claimed(tmp_path / "run"):
        raise ZeroDivisionError
    assert not (tmp_path / "run").exists()
    (tmp_path / "empty").mkdir()
    with claimed(tmp_path / "empty"):
        pass
    assert (tmp_path / "empty").is_dir()


def test_a_killed_process_holds_nothing(tmp_path):
    ready, told = os.pipe()

    def hold():
        with claimed(tmp_path):
            os.write(told, b".")
            signal.pause()

    child = forked(hold)
    assert os.read(ready, 1) == b"."
    with pytest.raises(CheckpointError, match=f"process {child} on"), claimed(tmp_path):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / LOCK).exists()
    with claimed(tmp_path):
        pass
    assert not (tmp_path / LOCK).exists()


def test_of_many_processes_one_at_a_time_is_in(tmp_path):
    """Each reads a number and writes the next: any two at once would lose a count."""
    counter, processes, rounds = tmp_path / "counter", 6, 25
    counter.write_text("0")

    def count():
        done = 0
        while done < rounds:
            with suppress(FolderInUse), claimed(tmp_path / "run"):  # nothing else may go wrong
                number = int(counter.read_text())
                counter.write_text(str(number + 1))
                done += 1

    children = [forked(count) for _ in range(processes)]
    for child in children:
        os.waitpid(child, 0)
    assert counter.read_text() == str(processes * rounds)


def moved(folder):
    folder.rename(folder.with_name("moved"))


@pytest.mark.parametrize("happens", [moved, shutil.rmtree])
@pytest.mark.parametrize("then", ["is not there", "is another", "is another, and claimed"])
def test_a_claim_is_of_the_folder_and_not_of_its_name(tmp_path, happens, then):
    folder = tmp_path / "run"
    with claimed(folder) as claim, ExitStack() as another:
        claim.require()
        happens(folder)
        if then == "is another":
            folder.mkdir()
        if then == "is another, and claimed":
            other = another.enter_context(claimed(folder))
        with pytest.raises(CheckpointError, match="moved or removed"):
            claim.require()
        another_one = another.pop_all()
    with another_one:
        assert folder.exists() == (then != "is not there")
        if then == "is another, and claimed":
            other.require()
            with pytest.raises(FolderInUse), claimed(folder):
                pass


def test_a_claim_holds_behind_a_link(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    with claimed(tmp_path / "link") as claim:
        claim.require()
    assert not (tmp_path / "run" / LOCK).exists()


@pytest.mark.parametrize(
    ("moment", "step", "measured"),
    [
        ("after_step", 4, []),
        ("after_step", 4, ["metrics.first_steps=9"]),
        ("after_step", 9, []),
        ("after_epoch", 6, []),
        ("after_epoch", 9, []),
        ("verified", 9, []),
    ],
)
def test_a_run_writes_nothing_where_its_folder_is_no_more(reference, tmp_path, monkeypatch, moment, step, measured):
    """Another run has been trained in its place; the moved one goes on where it is."""
    folder, elsewhere, there = tmp_path / "run", tmp_path / "elsewhere", {}

    def replace(at, now):
        if (at, now) == (moment, step) and not there:
            folder.rename(elsewhere)
            shutil.copytree(reference, folder)
            there.update(contents(folder))

    class Mover(Observer):
        def after_step(self, trainer):
            replace("after_step", trainer.step)

        def after_epoch(self, trainer, report):
            replace("after_epoch", trainer.step)

    verify_run = evaluation.verify_run
    monkeypatch.setattr(
        "certtrain.runs.train.verify_run",
        lambda *given, **more: (verify_run(*given, **more), replace("verified", 9))[0],
    )
    with pytest.raises(CheckpointError, match="moved or removed"), one_thread():
        certtrain.train("digits", folder, device="cpu", overrides=[*TINY, "seed=1", *measured], callbacks=[Mover()])
    assert contents(folder) == there
    with one_thread():
        assert certtrain.train(elsewhere, resume=True, device="cpu").summary["seed"] == 1


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_lock_that_is_no_file_is_not_written_to(tmp_path, kind):
    (tmp_path / "precious").write_text("precious")
    lock = tmp_path / "run" / LOCK
    lock.parent.mkdir()
    {"link": lambda: lock.symlink_to("../precious"), "pipe": lambda: os.mkfifo(lock), "folder": lock.mkdir}[kind]()
    with pytest.raises(CheckpointError), claimed(tmp_path / "run"):
        pass
    assert (tmp_path / "precious").read_text() == "precious"


@pytest.mark.parametrize("options", [[], ["--resume"], ["--overwrite", "seed=1"]])
@pytest.mark.parametrize("there", [False, True])
def test_a_run_does_not_enter_where_another_goes_on(train, reference, tmp_path, options, there, request):
    run = request.getfixturevalue("run") if there else tmp_path / "run"
    with claimed(run):
        before = contents(run)
        outcome = train(*options)
        if there and not options:  # it would not do without the other run either
            assert (outcome.code, "holds a run" in outcome.error) == (2, True)
        else:
            assert (outcome.code, "another run goes on in" in outcome.error) == (1, True)
        assert contents(run) == before
    assert (run / "config.yaml").exists() == there


# --- what commands write ----------------------------------------------------------------------------------------------

WRITERS = {
    "verify --json": (["verify"], ["--limit", "1", "--json"], "verify.json"),
    "verify --certificates": (["verify"], ["--limit", "1", "--certificates"], None),
    "export --onnx": (["export"], ["--onnx"], "model.onnx"),
    "report --out": (["report"], ["--limit", "1", "--out"], "report.html"),
}


def refused_paths(run, tmp_path, own):
    """Paths that a command must not write to."""
    yield from (run / name for name in RUN_FILES if name != own)
    yield next((run / "tensorboard").iterdir())
    (tmp_path / "link").symlink_to(run / "model.safetensors")
    yield tmp_path / "link"
    os.link(run / "last.ckpt", tmp_path / "hard link")
    yield tmp_path / "hard link"
    (tmp_path / "folder link").symlink_to(run)
    yield tmp_path / "folder link" / "summary.json"
    os.mkfifo(tmp_path / "pipe")
    yield tmp_path / "pipe"
    with socket.socket(socket.AF_UNIX) as sock:
        os.chdir(tmp_path)
        sock.bind("socket")
    yield tmp_path / "socket"
    yield run
    yield tmp_path
    yield tmp_path / "nowhere" / "file"
    yield run / "config.yaml" / "file"


@pytest.mark.parametrize("writer", WRITERS)
def test_no_command_replaces_what_is_not_its_own(cli, run, tmp_path, monkeypatch, writer):
    monkeypatch.chdir(tmp_path)
    command, options, own = WRITERS[writer]
    for path in refused_paths(run, tmp_path, own):
        before = {name: content for name, content in contents(tmp_path).items()}
        outcome = cli(*command, run, *options, path)
        assert outcome.code == 2, path
        assert str(path) in outcome.error
        assert contents(tmp_path) == before, path


@pytest.mark.parametrize("writer", WRITERS)
def test_a_network_is_not_replaced_by_what_is_said_of_it(cli, run, tmp_path, writer):
    command, options, _ = WRITERS[writer]
    named = (run / "model.safetensors").rename(run / "renamed.safetensors")
    before = contents(run)
    outcome = cli(*command, named, *options, named)
    assert (outcome.code, "is read or written here already" in outcome.error) == (2, True)
    assert contents(run) == before


def test_two_results_need_two_files(cli, run, tmp_path):
    outcome = cli("verify", run, "--json", tmp_path / "file", "--certificates", tmp_path / "file")
    assert (outcome.code, "is read or written here already" in outcome.error) == (2, True)
    assert not (tmp_path / "file").exists()


def test_a_results_file_of_ones_own_is_replaced(cli, run, tmp_path):
    (tmp_path / "results.json").write_text("before")
    for file in (tmp_path / "results.json", run / "verify.json"):
        assert cli("verify", run, "--limit", 3, "--json", file).code == 0
        assert json.loads(file.read_text())["images"] == 3


def test_results_that_say_something_else_are_kept(cli, run):
    assert cli("verify", run, "--limit", 5).code == 0
    first = (run / "verify.json").read_bytes()
    outcome = cli("verify", run, "--limit", 5)
    assert (outcome.code, "kept in" in outcome.out) == (0, False), "the same again, but for times"
    assert not list(run.glob("verify-*"))
    outcome = cli("verify", run, "--limit", 5, "--eps", "0.01,0.02")
    assert f"the earlier results, which were others, are kept in {run / 'verify-1.json'}" in outcome.out.replace(
        "\n", ""
    )
    kept = json.loads((run / "verify-1.json").read_text())
    assert [radius["verified_error"] for radius in kept["radii"]] == [json.loads(first)["verified_error"]]
    assert cli("verify", run, "--limit", 6).code == 0
    assert [radius["eps"] for radius in json.loads((run / "verify-2.json").read_text())["radii"]] == [0.01, 0.02]


def test_what_cannot_be_read_is_kept_too(tmp_path):
    file = tmp_path / "verify.json"
    for number, before in enumerate((b"\xff not JSON", b"{}"), start=1):
        file.write_bytes(before)
        assert write_results(file, {"number": number}) == tmp_path / f"verify-{number}.json"
        assert (tmp_path / f"verify-{number}.json").read_bytes() == before
    assert write_results(file, {"number": 2, "seconds": 5}) is None


def test_a_new_run_clears_what_the_program_has_named_and_nothing_else(train, run):
    own = {"verify-1.json", "radius-12.json", "verify-3-epochs.json", "verify-2-3-epochs.json", "model-3-epochs.onnx"}
    others = {"verify-me.txt", "verify-final.json", "radius-x-epochs.json", "model-of-3-epochs.onnx", "verify-1.json~"}
    for name in own | others:
        (run / name).touch()
    assert train("--overwrite", "seed=1").code == 0
    assert (own | others) & set(contents(run)) == others


def test_a_run_that_is_killed_while_it_replaces_another_can_be_repeated(train, run, monkeypatch):
    def killed(folder):
        clear(folder)
        raise KeyboardInterrupt

    for again in ("--overwrite", "--resume"):
        with monkeypatch.context() as patch:
            patch.setattr("certtrain.runs.train.clear", killed)
            assert train("--overwrite").code == 130
        assert set(contents(run)) == {"config.yaml"}
        assert train(again).code == 0


# --- where nothing can be written -------------------------------------------------------------------------------------


@pytest.fixture
def read_only(run, monkeypatch):
    """The run in a folder that may not be written to, as the system says of those who are not root."""
    run.chmod(0o555)
    monkeypatch.setattr(os, "access", lambda path, mode: not mode << 6 & ~os.stat(path).st_mode)
    yield run
    run.chmod(0o755)


@pytest.mark.parametrize(
    "words",
    ["verify", "verify --radius", "verify --certificates RUN/c", "export --onnx", "export --onnx RUN/x.onnx", "report"],
)
def test_it_is_said_before_the_work(cli, read_only, monkeypatch, words):
    for module in ("commands", "verification"):
        monkeypatch.setattr(f"certtrain.cli.{module}.open_network", lambda *args: pytest.fail("too late"))
    command, *options = words.replace("RUN", str(read_only)).split()
    outcome = cli(command, read_only, *options)
    assert (outcome.code, f"nothing can be written to {read_only}" in outcome.error) == (2, True)


def test_results_that_go_elsewhere_do_not_need_the_folder(cli, read_only, tmp_path):
    before = contents(read_only)
    outcome = cli("verify", read_only, "--limit", 2, "--json", tmp_path / "results.json")
    assert outcome.code == 0
    assert "its verdicts.json does not have these images' verdicts" in outcome.out
    assert json.loads((tmp_path / "results.json").read_text())["images"] == 2
    assert contents(read_only) == before


# --- continuing -------------------------------------------------------------------------------------------------------


def test_a_run_is_continued_without_its_config_or_overrides(cli, run, reference, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = (run / "model.safetensors").read_bytes()
    for words in (
        ["train", run, "--resume"],
        ["train", "--resume", run],
        ["train", "--resume", "--out", run],
        ["train", "--resume", run / "config.yaml"],
        ["train", "digits", "--resume", "--out", run],
        ["train", run / ".", "--resume", "optimizer.lr=0.002", "--out", run],
        ["train", "--resume", "--out", run, "optimizer.lr=2e-3", "model.options={width: 2, linear_width: 8}"],
    ):
        (run / "model.safetensors").unlink()
        outcome = cli(*words, "--device", "cpu")
        assert outcome.code == 0, outcome.err
        assert f"resuming {run} after step 9 of 9" in outcome.out
        assert (run / "model.safetensors").read_bytes() == before
    assert (run / "config.yaml").read_bytes() == (reference / "config.yaml").read_bytes()


@pytest.mark.parametrize("name", ["digits", "digits.yaml", "configs/digits.yaml"])
def test_a_shipped_config_has_the_same_names_whether_a_run_is_started_or_continued(cli, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    _, _, *options = train_arguments(tmp_path / "run")
    for more in ([], ["--resume"]):
        outcome = cli("train", name, *options, *more)
        assert (outcome.code, outcome.err) == (0, "")


def test_a_shipped_config_is_meant_where_a_folder_has_its_name(cli, run, tmp_path, monkeypatch):
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)
    assert cli("train", "digits", "--resume", "--out", run, "--device", "cpu").code == 0
    outcome = cli("train", "digits", "--out", run)
    assert (outcome.code, "holds a run: continue it with --resume" in outcome.error) == (2, True)


def test_a_config_that_says_otherwise_is_told_about(cli, run):
    outcome = cli("train", "digits", "--resume", "--out", run, "--device", "cpu")
    assert "as the run was started: training.epochs is 3 there, 60 here" in outcome.out.splitlines()


@pytest.mark.parametrize("words", [["optimizer.lr=0.1"], ["optimizer={lr: 0.1}"], ["optimizer.lr=0.1", "seed=0"]])
def test_an_override_that_differs_names_key_and_values(cli, run, words):
    before = contents(run)
    for start in (["train", run], ["train", "digits", "--out", run], ["train", "--out", run]):
        outcome = cli(*start, "--resume", *words, "--device", "cpu")
        assert outcome.code == 2
        assert "holds a run of another configuration: optimizer.lr is 0.002 there, 0.1 here" in outcome.error
        assert contents(run) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train"], "name a config"),
        (["train", "--resume"], "name a config"),
        (["train", "RUN"], "to continue the run in it say --resume"),
        (["train", "RUN", "--overwrite"], "to continue the run in it say --resume"),
        (["train", "RUN", "--resume", "--out", "OTHER"], "is continued where it is"),
        (["train", "--resume", "--out", "OTHER"], "there is no run in"),
        (["train", "EMPTY", "--resume"], "there is no run in"),
    ],
)
def test_what_cannot_be_continued_is_said(cli, run, tmp_path, words, message):
    (tmp_path / "empty").mkdir()
    places = {"RUN": run, "OTHER": tmp_path / "other", "EMPTY": tmp_path / "empty"}
    before = contents(tmp_path)
    outcome = cli(*(places.get(word, word) for word in words))
    assert (outcome.code, message in outcome.error) == (2, True)
    assert contents(tmp_path) == before
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("left", [["model.safetensors"], ["summary.json"], ["model.safetensors", "summary.json"]])
def test_a_finished_network_is_not_trained_over(train, run, left):
    for name in {"last.ckpt", "model.safetensors", "summary.json"} - set(left):
        (run / name).unlink()
    before = contents(run)
    outcome = train("--resume")
    assert (outcome.code, "but no last.ckpt to continue from" in outcome.error) == (1, True)
    assert contents(run) == before


def test_a_run_that_was_killed_before_its_first_save_starts_again(train, run, reference):
    for name in ("last.ckpt", "model.safetensors", "summary.json"):
        (run / name).unlink()
    assert train("--resume").code == 0
    assert (run / "model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()


def test_a_configuration_in_code_must_agree_as_a_whole(run):
    from certtrain.config import load_config
    from certtrain.runs.train import train

    config = load_config(run / "config.yaml", ["seed=3"])
    with pytest.raises(UsageError, match=r"seed is 0 there, 3 here"):
        train(config, run, resume=True, device="cpu")
