"""`certtrain init` and `certtrain completion`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from certtrain.cli import main
from certtrain.config import load_config
from tests.commands import contents


def test_a_config_to_begin_from_is_one_that_can_be_read(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = cli("init")
    assert (outcome.code, outcome.out) == (0, "wrote digits.yaml; certtrain train digits.yaml trains it\n")
    assert load_config("digits.yaml") == load_config("digits")
    assert cli("init", "cifar10_8_255", "optimizer.lr=0.25", "--out", "mine.yaml").code == 0
    assert load_config("mine.yaml") == load_config("cifar10_8_255", ["optimizer.lr=0.25"])


@pytest.mark.parametrize("place", ["file", "folder", "dangling"])
def test_nothing_is_overwritten_unasked(cli, tmp_path, place):
    path = tmp_path / "digits.yaml"
    {"file": lambda: path.write_text("seed: 1"), "folder": path.mkdir, "dangling": lambda: path.symlink_to("no")}[
        place
    ]()
    before = contents(tmp_path)
    outcome = cli("init", "--out", path)
    assert (outcome.code, outcome.error) == (2, f"{path} exists: name another with --out, or pass --overwrite")
    assert contents(tmp_path) == before
    if place == "file":
        assert cli("init", "--out", path, "--overwrite").code == 0
        assert load_config(path) == load_config("digits")


@pytest.mark.parametrize("arguments", [["digit"], ["digits", "seed=-1"], ["--out", "no/such/folder"]])
def test_a_config_that_is_none_is_one_line_and_leaves_no_trace(cli, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    assert cli("init", *arguments).error
    assert contents(tmp_path) == {}


FOLLOWS = {
    "certtrain tr": {"train"},
    "certtrain completion ": {"bash", "zsh", "fish"},
    "certtrain train digits optimizer.l": {"optimizer.lr="},
    "certtrain train digits data.flip=": {"data.flip=true", "data.flip=false"},
    "certtrain config cifar10_8_255 training.method.name=st": {"training.method.name=staps"},
    "certtrain verify runs/x epsilon.ma": {"epsilon.max="},
    "certtrain init cifar10_2": {"cifar10_2_255"},
    "certtrain study board": {"board_cifar10_2_255", "board_cifar10_8_255"},
}
ASK = """
import functools, io, json, os, sys
import argcomplete
from certtrain.cli import completion, main
ask, found = argcomplete.autocomplete, []
for line in json.loads(sys.argv[1]):
    answer = io.StringIO()
    argcomplete.autocomplete = functools.partial(ask, exit_method=lambda code: None, output_stream=answer)
    os.environ |= {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_COMP_WORDBREAKS": "", "_ARGCOMPLETE_IFS": "|",
                   "COMP_LINE": line, "COMP_POINT": str(len(line))}
    completion.answer(sys.modules["certtrain.cli.main"].build_parser())
    found.append([word.strip() for word in answer.getvalue().split("|")])
assert "torch" not in sys.modules
print(json.dumps(found))
"""


def test_what_can_follow(tmp_path):
    """In a process of its own: argcomplete takes file descriptors that are pytest's."""
    ask = [sys.executable, "-c", ASK, json.dumps(list(FOLLOWS))]
    answer = subprocess.run(ask, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert dict(zip(FOLLOWS, map(set, json.loads(answer.stdout)), strict=True)) == FOLLOWS


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_is_one_that_the_shell_can_read(cli, shell):
    script = cli("completion", shell).out
    assert "certtrain" in script
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    assert subprocess.run([shell, "-n"], input=script, text=True, capture_output=True).returncode == 0


def test_bash_completes(tmp_path):
    ask = """source <(certtrain completion bash)
        COMP_LINE="certtrain train digits optimizer.mile" COMP_POINT=37 COMP_TYPE=9
        _python_argcomplete certtrain; echo "${COMPREPLY[@]}" """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    answer = subprocess.run(["bash", "-c", ask], env=os.environ | {"PATH": path}, capture_output=True, text=True)
    assert answer.stdout.split() == ["optimizer.milestones=", "optimizer.milestones_from="], answer.stderr


def test_an_unknown_shell_is_answered_with_those_there_are(capsys):
    with pytest.raises(SystemExit):
        main(["completion", "tcsh"])
    assert "choose from" in capsys.readouterr().err
