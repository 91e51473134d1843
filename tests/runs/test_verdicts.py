"""What became of every image, as the run directory keeps it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys

import pytest
import torch

from certtrain.data import load_dataset
from certtrain.errors import CheckpointError
from certtrain.runs.checkpoint import load_model
from certtrain.runs.directory import results_in, write_results
from certtrain.runs.lock import WRITING, claimed
from certtrain.runs.verdicts import read_verdicts
from certtrain.verification.digests import split_digest
from certtrain.verification.verify import verify
from tests.commands import contents


def test_a_letter_for_each_image(reference):
    """Natural errors and IBP's proofs, found again; attacks are random."""
    (verdicts,) = read_verdicts(reference)
    summary = json.loads((reference / "summary.json").read_text())
    data = load_dataset("digits").test
    assert (verdicts.split, verdicts.eps, verdicts.method) == ("test", 0.1, "ibp")
    assert verdicts.sha256 == split_digest(data.images.numpy(), data.labels.numpy())
    (result,) = verify(load_model(reference), data, 0.1, limit=50)
    letters = [*verdicts.images]
    assert [letter == "m" for letter in letters] == (~result.correct).tolist()
    assert [letter == "p" for letter in letters] == result.proved.tolist()
    assert (letters.count("m") + letters.count("a")) / 50 == summary["pgd_error"]


def test_verify_adds_answers_and_replaces_those_to_the_same_question(cli, run):
    for _ in range(2):
        assert cli("verify", run, "--eps", "0.001,0.1").code == 0
        assert [verdicts.eps for verdicts in read_verdicts(run)] == [0.1, 0.001]
    assert cli("verify", run, "--eps", "0.001", "--method", "ibp,crown", "--limit", "20").code == 0
    assert [len(verdicts.images) for verdicts in read_verdicts(run)] == [50, 50, 20]
    assert cli("verify", run, "--eps", "0.001", "--attack", "apgd-ce").code == 0
    attacks = [(verdicts.eps, verdicts.conditions["verification.attack"]) for verdicts in read_verdicts(run)]
    assert attacks == [(0.1, "pgd"), (0.001, "pgd"), (0.001, "pgd"), (0.001, "apgd-ce")]


def test_a_finished_run_that_is_resumed_keeps_what_verify_added(cli, train, run):
    assert cli("verify", run, "--eps", "0.001").code == 0
    before = (run / "verdicts.json").read_bytes()
    assert train("--resume").code == 0
    assert (run / "verdicts.json").read_bytes() == before


@pytest.mark.parametrize("command", ["verify", "resume"])
def test_a_corrupt_file_is_found_before_the_work(cli, train, run, monkeypatch, command):
    """No answer could be added to it."""
    (run / "verdicts.json").write_text("[{}]")
    for place in ("evaluation.verify", "train._fit"):
        monkeypatch.setattr(f"certtrain.runs.{place}", lambda *args, **more: pytest.fail("too late"))
    before = contents(run)
    outcome = cli("verify", run) if command == "verify" else train("--resume")
    assert (outcome.code, "verdicts.json is missing or corrupt" in outcome.error) == (1, True)
    assert contents(run) == before


def test_the_validation_split_in_the_test_set_s_place(train, tmp_path):
    options = ["data.validation=40", "verification.split=validation"]
    outcome = train(*options)
    assert outcome.code == 0
    assert "40 validation images" in outcome.out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    (verdicts,) = read_verdicts(tmp_path / "run")
    assert (summary["split"], summary["images"], summary["validation"]) == ("validation", 40, [])
    held_out = load_dataset("digits", validation=40, seed=0).validation
    assert verdicts.sha256 == split_digest(held_out.images.numpy(), held_out.labels.numpy())
    assert not any(torch.equal(image, held_out.images[0]) for image in load_dataset("digits").test.images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["data.validation=40", "verification.split=validation"], "certificates are about a test set: not with verif"),
        (["data.classes=[0,1]"], "certificates are about a whole test set: not with data.classes"),
    ],
)
def test_certificates_are_about_the_whole_test_set_alone(cli, run, tmp_path, options, message):
    before = contents(run)
    outcome = cli("verify", run, *options, "--certificates", tmp_path / "c.parquet")
    assert (outcome.code, message in outcome.error) == (2, True)
    assert contents(run) == before


@pytest.mark.parametrize("content", ["", "{}", "[{}]", '[{"split": "test"}]', "[" * 10**5, "[1]", "\xff"])
def test_a_corrupt_file_is_named(reference, tmp_path, content):
    (tmp_path / "verdicts.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"verdicts\.json is "):
        read_verdicts(tmp_path)


WRITER = """
import sys
from pathlib import Path
from certtrain.runs.directory import write_results
from certtrain.runs.verdicts import Verdicts, add_verdicts

folder, number = Path(sys.argv[1]), int(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
for eps in [(10 * number + k) / 1000 for k in range(10)]:
    write_results(folder / "verify.json", {"eps": eps})
    add_verdicts(folder, [Verdicts(split="test", sha256="", eps=eps, method="ibp", arithmetic=None, images="p")])
"""


@pytest.mark.slow
def test_processes_that_write_at_once_lose_no_result(tmp_path):
    """Also while a run goes on there."""
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    with claimed(tmp_path):
        writers = [
            subprocess.Popen([*command, str(number)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            for number in range(3)
        ]
        for writer in writers:
            assert writer.stdout.readline() == b"ready\n"
        for writer in writers:
            writer.stdin.close()
        for writer in writers:
            with writer:
                assert writer.wait() == 0
    expected = [number / 1000 for number in range(30)]
    assert sorted(verdicts.eps for verdicts in read_verdicts(tmp_path)) == expected
    files = results_in(tmp_path, "verify.json")
    assert sorted(json.loads(file.read_text())["eps"] for file in files) == expected
    assert {file.name for file in tmp_path.iterdir()} == {"verdicts.json", *(file.name for file in files)}


@pytest.mark.parametrize("reason", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_where_there_are_no_locks_results_are_written_all_the_same(tmp_path, monkeypatch, reason):
    def refuse(*args):
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(fcntl, "flock", refuse)
    write_results(tmp_path / "verify.json", {"eps": 0.1})
    assert [file.name for file in tmp_path.iterdir()] == ["verify.json"]


def test_a_lock_that_a_killed_process_has_left_holds_nobody_out(tmp_path):
    (tmp_path / WRITING).write_text("process 1 on another machine")
    write_results(tmp_path / "verify.json", {"eps": 0.1})
    assert [file.name for file in tmp_path.iterdir()] == ["verify.json"]


def test_where_no_lock_file_can_be_made_results_are_written_all_the_same(tmp_path):
    (tmp_path / WRITING).mkdir()
    write_results(tmp_path / "verify.json", {"eps": 0.1})
    assert json.loads((tmp_path / "verify.json").read_text()) == {"eps": 0.1}
