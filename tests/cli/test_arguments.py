"""Arguments that are empty, quoted, huge or that contradict each other; terminals that show few characters."""

import argparse
import io
import json
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import certtrain
from certtrain.cli import main
from certtrain.cli.main import build_parser
from certtrain.cli.tables import hints, show_results
from certtrain.config import load_config
from certtrain.errors import lines_of, shortened, shown
from tests.commands import contents


@pytest.mark.parametrize("option", ["--eps", "--method", "--sound", "--certificates", "--json", "--limit", "--radius"])
def test_an_empty_option_is_an_error(cli, run, option):
    before = contents(run)
    outcome = cli("verify", run, f"{option}=")
    assert outcome.code in (1, 2)
    assert outcome.err.splitlines()[-1]
    assert contents(run) == before


@pytest.mark.parametrize("value", ["0.1'#", "'0.1'", '"0.1"', "0.1 # x", "[0.1]", "{0.1", "0.1,", "&a 0.1", "null"])
def test_radii_are_not_read_as_yaml(cli, run, value):
    outcome = cli("verify", run, f"--eps={value}")
    assert outcome.code == 2
    assert "is not a radius" in outcome.error


@pytest.mark.parametrize("value", ["ibp'", "'ibp'", "[ibp]", "ibp,", "ibp ibp", "null", "~"])
def test_methods_and_arithmetics_are_not_read_as_yaml(cli, run, value):
    assert "unknown bound method" in cli("verify", run, f"--method={value}").error
    assert "unknown attack" in cli("verify", run, f"--attack={value}").error
    assert "unknown arithmetic" in cli("verify", run, f"--sound={value}").error


@pytest.mark.parametrize(
    "arguments",
    [
        ["verify", "--radius", "--certificates", "c.parquet"],
        ["verify", "--radius", "--json", "x.json"],
        ["verify", "--radius=0.1", "--method", "crown"],
        ["verify", "--radius=0.1", "--eps", "0.1"],
        ["export", "--onnx", "--eps", "0.1"],
        ["export", "--onnx", "--limit", "3"],
        ["export", "--onnx", "--timeout", "3"],
        ["verify", "training.epochs=9"],
        ["verify", "model.options.width=9"],
        ["verify", "model={name: mlp}"],
        ["report", "optimizer.lr=1"],
        ["export", "regularizers.weight=1", "--onnx"],
    ],
)
def test_nothing_that_is_asked_for_is_dropped_silently(cli, run, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    command, *rest = arguments
    outcome = cli(command, run, *rest)
    assert outcome.code == 2
    assert "cannot be combined with" in outcome.error or "training has settled that" in outcome.error
    assert contents(tmp_path) == before


@pytest.mark.usefixtures("started")
@pytest.mark.parametrize(
    "arguments",
    [
        ["--method", "ibp,crown-ibp", "--timeout", "3"],
        ["--timeout", "3", "verification.method=crown"],
        ["--model-weights", "RUN/model.safetensors", "--certificates", "c.parquet"],
        ["--model-weights", "RUN/model.safetensors", "--radius"],
        ["--radius", "--results", "r.jsonl"],
    ],
)
def test_nor_by_any_rank(cli, run, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    outcome = cli("verify", run, *(word.replace("RUN", str(run)) for word in arguments))
    assert outcome.code == 2
    assert "cannot be combined with" in outcome.error
    assert contents(tmp_path) == before


def test_a_run_is_either_continued_or_replaced(cli, run):
    outcome = cli("train", "digits", "--out", run, "--resume", "--overwrite")
    assert outcome.code == 2
    assert "not allowed with argument --resume" in outcome.err


@pytest.mark.parametrize(
    "device", ["meta", "mps", "gpu", "", "cuda:", "cuda:-1", "cuda:x", "cuda:٣", "cpu:0:0", "xla", "x" * 9999]
)
def test_a_device_is_one_that_computes(cli, train, run, device):
    for outcome in (train(f"--device={device}", "--overwrite"), cli("verify", run, f"--device={device}")):
        assert outcome.code == 2
        assert "is not to be had here" in outcome.error
        assert len(outcome.error) <= 300


@pytest.mark.parametrize("value", ["0", "-1", "٣", "³", "1.5", "", "9" * 30, "9" * 5000, "x" * 5000, "1_0", " 1"])
@pytest.mark.parametrize("option", ["verify run --limit", "models --classes", "report run --limit"])
def test_a_count_is_a_small_whole_number(cli, option, value):
    *command, name = option.split()
    outcome = cli(*command, f"{name}={value}")
    assert outcome.code == 2
    assert "is not a whole number between 1 and" in outcome.err
    assert max(map(len, outcome.err.splitlines())) <= 400


@pytest.mark.parametrize("shape", ["3x٣x3", "3x99999x3", "3x3", "3x3x3x3", "x" * 5000, "0x1x1", "-1x1x1"])
def test_an_image_shape_is_three_small_numbers(cli, shape):
    outcome = cli("models", f"--input={shape}")
    assert (outcome.code, "is not an image shape" in outcome.err) == (2, True)


@pytest.mark.parametrize("arguments", [["x" * 9999], ["train", "--" + "x" * 9999], ["train", "x" * 9999],
                                       ["train", "digits", "x" * 9999], ["verify", "x" * 9999],
                                       ["verify", "/" + "x/" * 5000], ["check", "x" * 9999, "--model", "y" * 9999],
                                       ["train", "\x1b[31m.yaml"],
                                       ["train", "digits", "data.path=~nobody/x"]])  # fmt: skip
def test_what_is_long_or_odd_is_not_echoed_whole(cli, arguments):
    outcome = cli(*arguments)
    assert outcome.code in (1, 2)
    last = outcome.err.splitlines()[-1]
    assert len(last) <= 330
    assert last.isprintable()


# --- messages ---------------------------------------------------------------------------------------------------------


@given(st.text(), st.integers(9, 400))
def test_a_shortened_text_is_one_printable_line(text, most):
    line = shortened(text, most)
    assert len(line) <= most
    assert line.isprintable()
    if len(text) <= most and text.isprintable():
        assert line == text


def test_the_ends_of_a_long_text_stay():
    assert shortened("abcdefghijklmnopqrstuvwxyz", 10) == "abcdef…xyz"
    assert shown(["x" * 10**6] * 10**6).startswith("['xxx")
    assert len(shown({"a": {"b": {"c": {"d": 1}}}})) <= 60
    assert lines_of("a\n\nb" + "c" * 1000).splitlines() == ["a", shortened("b" + "c" * 1000, 300)]


# --- terminals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437", "utf-8"])
def test_output_fits_every_terminal(monkeypatch, encoding, tmp_path):
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert main(["models", "--input", "3x8x8"]) == 0
    assert main(["config", "digits", "data.root=é→\U0001f600"]) == 0
    assert main(["verify", str(tmp_path / "é→\udcff\U0001f600")]) == 1
    shown_text = out.buffer.getvalue().decode(encoding)
    assert "3×8×8 images" in shown_text or "3x8x8 images" in shown_text
    assert "there is no model" in err.buffer.getvalue().decode(encoding)


# --- what training tells ----------------------------------------------------------------------------------------------


def test_validation_errors_stand_beside_the_test_errors(train, tmp_path):
    outcome = train("data.validation=0.25")
    assert outcome.code == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    table = [[word.strip() for word in line.split("│")] for line in outcome.out.splitlines() if "│" in line]
    rows = {row[1]: row for row in table}
    for name, results in (("test", summary["radii"]), ("validation", summary["validation"])):
        for result in results:
            row = rows[f"{result['images']} {name}"]
            assert f"{result['natural_error']:.2%}" == row[3]
            assert f"{result['verified_error']:.2%}" == row[5]


def test_without_validation_there_is_no_column_for_it():
    console = Console(file=io.StringIO(), width=120)
    result = {"images": 9, "method": "ibp", "arithmetic": None, "attack": "pgd", "eps": 0.1, "natural_error": 0.1,
              "pgd_error": 0.2, "verified_error": 0.3, "seconds": 1.0, "stages": [{}]}  # fmt: skip
    show_results(console, [result])
    assert "validation" not in console.file.getvalue()
    assert "30.00%" in console.file.getvalue()


@pytest.mark.parametrize(
    ("method", "natural", "verified", "expected"),
    [
        ("ibp", 0.1, 0.5, ""),
        ("ibp", 0.9, 0.94, ""),
        ("ibp", 0.1, 1.0, "a longer warmup"),
        ("ibp", 0.9, 0.96, "learned little"),
        ("natural", 0.1, 1.0, "natural does not train for that"),
        ("natural", 0.1, 0.2, ""),
        ("adversarial", 0.1, 1.0, "adversarial does not train for that"),
        ("mtl-ibp", 0.1, 1.0, "mtl-ibp need a search"),
        ("staps", 0.1, 1.0, "staps need a search"),
        ("sabr", 0.9, 1.0, "learned little"),
    ],
)
def test_hardly_anything_proved_comes_with_what_to_try(method, natural, verified, expected):
    config = load_config("digits", {"training.method": method})
    lines = hints(config, {"natural_error": natural, "verified_error": verified})
    assert [expected in line for line in lines] == [True] * bool(expected)
    for override in (word.strip("(),:") for line in lines for word in line.split() if "=" in word):
        load_config("digits", [override])


def test_a_run_that_proves_nothing_says_what_to_try(train):
    assert "hint: " in train("epsilon.max=0.9").out


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["train", "digits", "--outt", "x"], "--out"),
        (["verify", "run", "--methods=ibp"], "--method"),
        (["train", "digits", "--epochs", "5"], "training.epochs=..."),
        (["train", "digits", "--training.epochs=5"], "training.epochs=..."),
        (["train", "digits", "--batch-size", "5"], "training.batch_size=... or verification.batch_size=..."),
        (["config", "digits", "--colour"], None),
    ],
)
def test_an_option_that_there_is_not_comes_with_what_could_be_meant(cli, arguments, meant):
    outcome = cli(*arguments)
    assert outcome.code == 2
    usage, line = outcome.err.rstrip().rsplit("\n", 1)
    assert usage.startswith(f"usage: certtrain {arguments[0]} ")
    assert line.startswith(f"certtrain {arguments[0]}: error: unrecognized arguments: --")
    assert line.endswith(f": did you mean {meant}?") if meant else "did you mean" not in line


def test_images_that_a_run_was_trained_on_are_no_validation_images(cli, train, tmp_path):
    run, asked = tmp_path / "run", "verification.split=validation"
    assert train("data.validation=40").code == 0
    before = contents(run)
    for command in (["verify"], ["verify", "--radius", "0.1"], ["report"], ["export", "--vnnlib", tmp_path / "left"]):
        for divided in ("data.validation=60", "data.validation=0.5", "seed=1", "data={name: digits, validation: 50}"):
            outcome = cli(command[0], run, asked, divided, *command[1:])
            assert (outcome.code, "the run was trained on some of these images" in outcome.error) == (2, True)
            assert contents(run) == before
    assert cli("verify", run, "seed=1", "--limit", 2).code == 0
    assert cli("verify", run, asked, "--limit", 2).code == 0
    assert json.loads((run / "verify.json").read_text())["split"] == "validation"


def parsers():
    """By the words that lead to it, the program's own and each command's."""
    parser = build_parser()
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return {(): parser, **{(name,): command for name, command in commands.choices.items()}}


@pytest.mark.parametrize("words", parsers(), ids=" ".join)
def test_help_and_version_are_shown(cli, words):
    outcome = cli(*words, "--help")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith(" ".join(("usage: certtrain", *words)))
    assert (cli("--version").code, cli("--version").out) == (0, f"certtrain {certtrain.__version__}\n")


@pytest.mark.parametrize(
    "option", sorted({option for parser in parsers().values() for option in parser._option_string_actions} - {"-h"})
)
def test_every_option_is_given_in_some_test(option):
    files = (Path(__file__).parents[1]).rglob("*.py")
    assert any(re.search(rf'"{option}(=|")', file.read_text()) for file in files)
