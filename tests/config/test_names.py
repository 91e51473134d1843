"""The declared names are those that the modules offer, and checking one imports nothing large."""

import subprocess
import sys
from typing import get_args

import pytest
import torch

import certtrain.bounds.rounding.arithmetic
import certtrain.data
import certtrain.initialization
import certtrain.models
from certtrain.config import load_config, names, schema
from certtrain.errors import UsageError
from certtrain.runs.evaluation import build_attack
from certtrain.runtime import precision

SMALLEST = {
    "data": {"name": "digits"},
    "model": {"name": "mlp"},
    "epsilon": {"max": 0.1},
    "training": {"epochs": 10},
}


@pytest.mark.parametrize(
    ("declared", "offered"),
    [
        (names.DATASETS, certtrain.data.DATASETS),
        (names.MODELS, certtrain.models.MODELS),
        (names.INITIALIZATIONS, certtrain.initialization.INITIALIZATIONS),
        (names.ARITHMETICS, certtrain.bounds.rounding.arithmetic.ARITHMETICS),
    ],
    ids=lambda table: getattr(table, "table", ""),
)
def test_what_is_declared_is_what_there_is(declared, offered):
    assert sorted(declared.declared) == sorted(offered)
    assert getattr(sys.modules[declared.home], declared.table) is offered


def test_every_optimizer_of_torch_that_trains_a_network_by_steps_is_declared():
    weights = [torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))]
    fit = set()
    for name, kind in vars(torch.optim).items():
        if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
            continue
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        try:
            kind(weights, lr=0.01).step()
        except (TypeError, ValueError, RuntimeError):  # the base class; LBFGS; SparseAdam; Muon
            continue
        fit.add(name)
    assert set(names.OPTIMIZERS) == fit | {"Muon"}  # which is given the matrices, and AdamW the rest


def test_precisions_are_those_of_the_runtime():
    assert get_args(schema.Precision) == get_args(precision.Precision)


@pytest.mark.parametrize("name", names.ATTACKS)
def test_an_attack_is_the_one_that_was_named(name):
    assert build_attack(load_config(SMALLEST, {"verification.attack": name}).verification).name == name


def test_what_a_program_registers_can_be_named(monkeypatch):
    with pytest.raises(UsageError, match="unknown data set 'own'"):
        load_config(SMALLEST, ["data.name=own"])
    monkeypatch.setitem(certtrain.data.DATASETS, "own", lambda root, download: None)
    monkeypatch.setitem(certtrain.models.MODELS, "picky", lambda image_shape, num_classes: None)
    config = load_config(SMALLEST, ["data.name=own", "model.name=picky"])
    assert (config.data.name, config.model.name) == ("own", "picky")


@pytest.mark.slow
def test_what_is_mistyped_is_answered_without_torch(tmp_path):
    """Every command, one after the other in one process: a key, a value, an option, a device, a path."""
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").touch()
    program = f"""
import sys
from certtrain.cli import main
asked = [
    (["config", "digits"], 0),
    (["config"], 0),
    (["config", "digits", "training.epoch=3"], 2),
    (["train", "digits", "model.name=cnn-smal"], 2),
    (["train", "digits", "data.name=digit"], 2),
    (["init", "--out", "{tmp_path / "new.yaml"}"], 0),
    (["init", "digit"], 2),
    (["completion", "bash"], 0),
    (["train", "digits", "optimizer.name=adam"], 2),
    (["train", "digit.yaml"], 2),
    (["train", "digits", "--device", "meta"], 2),
    (["train", "digits", "--out", "{tmp_path / "taken"}"], 2),
    (["train", "digits", "--resume", "--overwrite"], 2),
    (["train", "digits", "data.name=npz", "data.path={tmp_path / "none"}"], 1),
    (["train", "digits", "start_from={tmp_path / "none"}"], 1),
    (["scale", "{tmp_path / "none.yaml"}"], 2),
    (["plan", "--budget", "2e15", "--law", "{tmp_path / "none"}"], 2),
    (["verify", "{tmp_path / "none"}"], 1),
    (["verify", "{tmp_path}", "--radius", "--certificates", "file"], 2),
    (["verify", "{tmp_path}", "--radius", "--results", "file"], 2),
    (["verify", "{tmp_path}", "--timeout", "-1"], 2),
    (["check", "file", "--model", "{tmp_path}"], 1),
    (["export", "{tmp_path}"], 2),
    (["report", "{tmp_path}"], 1),
    (["study", "no_such_study"], 2),
    (["study", "digits_methods", "optimizer.rl=1"], 2),
    (["study", "digits_methods", "--device", "meta"], 2),
    (["tune", "tune_digits", "data.name=digit"], 2),
    (["compare", "{tmp_path}"], 2),
    (["compare", "{tmp_path}", "--out", "table.docx"], 2),
]
for arguments, code in asked:
    try:
        got = main(arguments)
    except SystemExit as ended:
        got = ended.code
    assert got == code, (arguments, got)
    assert "torch" not in sys.modules, arguments
"""
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr


@pytest.mark.slow
@pytest.mark.parametrize("module", ["certtrain", "certtrain.cli"])
def test_the_package_is_a_program(module):
    answer = subprocess.run([sys.executable, "-m", module, "config"], capture_output=True, text=True, check=True)
    assert "digits" in answer.stdout.split()
