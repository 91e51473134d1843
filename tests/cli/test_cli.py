import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import certtrain
import certtrain.models
from certtrain.config import load_config
from certtrain.models import build_model
from tests.commands import TINY, contents
from tests.networks import save_model

ROOT = Path(__file__).parents[2]


def write_npz(folder, train_labels=(0, 1, 2, 3), test_labels=(0, 1), size=8):
    folder.mkdir(exist_ok=True)
    for part, labels in (("train", train_labels), ("test", test_labels)):
        images = np.random.default_rng(0).integers(0, 256, (len(labels), size, size, 1), dtype=np.uint8)
        np.savez(folder / f"{part}.npz", images=images, labels=np.array(labels))
    return ["data.name=npz", f"data.path={folder}"]


def eight_by_eight_only(image_shape, num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))


def two_classes_only(image_shape, num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 2))


# --- what the user wrote wrong: exit code 2 --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.epoch=3", "unknown key training.epoch: did you mean epochs?"),
        ("training.epochs=many", "training.epochs: "),
        ("epsilon.max=1.5", "epsilon.max: a radius lies between 0 and 1"),
        ("epsilon.max=-8/255", "epsilon.max: a radius lies between 0 and 1"),
        ("epsilon.max=8/0", "epsilon.max: '8/0' is not a radius"),
        ("optimizer.milestones=[3]", "optimizer.milestones: 3 is not before the end of the run, 3 epochs"),
        ("epsilon.warmup_epochs=3", "epsilon: warmup would end after 4 epochs"),
        ("model.name=cnn-smal", "model.name: unknown model 'cnn-smal': did you mean cnn-small"),
        ("model.name=no_such_module:net", "model no_such_module:net: No module named 'no_such_module'"),
        ("model.name=torch.nn:NoSuchNet", "model torch.nn:NoSuchNet: module 'torch.nn' has no attribute"),
        ("model={name: math:hypot}", "model math:hypot: "),
        ("model={name: tests.cli.test_cli:two_classes_only}", "returns shape (1, 2), not (1, 10)"),
        ("model.options.wdith=4", "model cnn-small: got an unexpected keyword argument 'wdith'"),
        ("model.options.width=wide", "model cnn-small: width is a whole number of at least 1, not 'wide'"),
        ("data.name=digit", "data.name: unknown data set 'digit': did you mean digits"),
        ("data.name=npz", "data set 'npz' needs the folder to read: set data.path"),
        ("data.validation=2000", "validation is 2000"),
        ("data.mean=[0.5, 0.5]", "data.mean and data.std need one number for each of the images' 1 channels"),
        ("optimizer.name=Adan", "optimizer.name: unknown optimizer 'Adan': did you mean"),
        ("optimizer.arguments.beta=1", "unknown argument of Adam 'beta': did you mean betas"),
        ("training.batch_size=1", "training.batch_size: 96 images in batches of 1 leave one alone"),
        ("training.batch_size=95", "training.batch_size: 96 images in batches of 95 leave one alone"),
        ("training", "'training' is not an override: write section.key=value"),
    ],
)
def test_a_wrong_config_is_one_line_and_leaves_no_trace(train, tmp_path, override, message):
    outcome = train(override)
    assert outcome.code == 2
    assert message in outcome.error
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["trian", "digits"],
        ["train", "digits", "--epochs", "3"],
        ["verify"],
        ["verify", "run", "--limit", "0"],
        ["verify", "run", "--limit", "few"],
        ["models", "cnn7"],
        ["models", "--input", "3x32"],
        ["models", "--input", "3x0x32"],
        ["models", "--classes", "0"],
        ["config", "digits", "--epochs", "3"],
    ],
)
def test_wrong_arguments_are_shown_with_the_usage(cli, arguments):
    outcome = cli(*arguments)
    assert outcome.code == 2
    assert outcome.err.startswith("usage: certtrain")
    assert "Traceback" not in outcome.err


def test_unknown_config_files_and_devices(cli, train):
    outcome = cli("train", "digit.yaml")
    assert (outcome.code, "did you mean configs/digits.yaml" in outcome.error) == (2, True)
    outcome = train("--device", "gpu")
    assert (outcome.code, "device 'gpu' is not to be had here" in outcome.error) == (2, True)


def test_a_config_without_a_file_needs_an_output_folder():
    with pytest.raises(certtrain.errors.UsageError, match="pass out="):
        certtrain.train({"data": {"name": "digits"}})


@pytest.mark.parametrize("eps", ["2/255,8/0", "1.1", "-1", "a'b", "small"])
def test_verify_refuses_a_wrong_radius(cli, run, eps):
    outcome = cli("verify", run, f"--eps={eps}")
    assert outcome.code == 2
    assert "eps" in outcome.error


# --- what there is: configs and models --------------------------------------------------------------------------------


def test_config_prints_the_whole_which_reads_back_the_same(cli, tmp_path):
    outcome = cli("config", "cifar10_8_255_wide_resnet_crown_ibp_long", "seed=3", "model.options.base_width=8")
    assert outcome.code == 0
    (tmp_path / "printed.yaml").write_text(outcome.out)
    config = load_config(tmp_path / "printed.yaml")
    assert config == load_config("cifar10_8_255_wide_resnet_crown_ibp_long", ["seed=3", "model.options.base_width=8"])
    assert cli("config", tmp_path / "printed.yaml").out == outcome.out


def test_config_without_a_file_lists_what_can_be_run(cli):
    names = [line.strip() for line in cli("config").out.splitlines()]
    assert {"digits", "mnist", "cifar10_8_255", "tinyimagenet_1_255_resnext_vanilla_ibp_no_bn"} < set(names)
    assert not {"parts", "crown_ibp", "wide_resnet"} & set(names)


def test_configs_are_listed_by_data_set_and_method(cli):
    problem = method = None
    for line in cli("config").out.splitlines():
        depth, text = len(line) - len(line.lstrip()), line.strip()
        if depth == 0:
            problem, method = text, None
        elif depth == 2:
            method = text
        else:
            config = load_config(text)
            data, _, radius = problem.partition(", epsilon ")
            assert (data, method) == (config.data.name, config.training.method.name)
            assert float(Fraction(radius)) == pytest.approx(max(config.test_radii), rel=1e-5)
    assert method is not None


def test_a_reader_who_leaves_early_is_no_error():
    reader = subprocess.Popen(["true"], stdin=subprocess.PIPE)
    reader.wait()
    command = [sys.executable, "-u", "-m", "certtrain.cli", "config"]
    outcome = subprocess.run(command, stdout=reader.stdin, stderr=subprocess.PIPE, text=True)
    assert (outcome.returncode, outcome.stderr) == (141, "")


def test_config_refuses_what_train_would(cli):
    assert cli("config", "digits", "training.epoch=3").error == "unknown key training.epoch: did you mean epochs?"
    outcome = cli("config", "crown_ibp")
    assert (outcome.code, outcome.err.splitlines()[0]) == (2, "error: data is missing")
    assert "`certtrain config` lists" in cli("config", "xyz").error


def test_models_lists_every_name_with_its_size_or_why_not(cli, monkeypatch):
    def picky(image_shape, num_classes):
        raise ValueError("only squares")

    monkeypatch.setitem(certtrain.models.MODELS, "picky", picky)
    outcome = cli("models", "--input", "1x28x28", "--classes", "4")
    assert outcome.code == 0
    rows = {line.split("│")[1].strip(): line for line in outcome.out.splitlines() if line.startswith("│")}
    assert certtrain.models.MODELS.keys() <= rows.keys()
    for name in ("cnn7", "wide-resnet", "resnext"):
        parameters = sum(p.numel() for p in build_model(name, (1, 28, 28), 4).parameters())
        assert f"{parameters:,}" in rows[name]
    macs = 784 * 256 + 256 * 256 + 256 * 4
    assert f"{macs:,}" in rows["mlp"]
    assert "model picky" in rows["picky"]
    assert "only" in outcome.out


# --- what failed: exit code 1 ----------------------------------------------------------------------------------------


def test_missing_data_says_where_it_belongs_and_how_to_get_it(train, tmp_path):
    outcome = train("data.name=mnist", f"data.root={tmp_path / 'here'}")
    assert outcome.code == 1
    assert str(tmp_path / "here" / "MNIST" / "raw") in outcome.error
    assert "data.download=true" in outcome.error
    outcome = train("data.name=npz", f"data.path={tmp_path / 'here'}")
    assert (outcome.code, "data.path: there is no folder" in outcome.error) == (1, True)
    (tmp_path / "here").mkdir()
    outcome = train("data.name=npz", f"data.path={tmp_path / 'here'}")
    assert (outcome.code, "train.npz is missing" in outcome.error) == (1, True)
    assert contents(tmp_path) == {}


def test_labels_out_of_range(cli, train, run, tmp_path):
    negative = write_npz(tmp_path / "negative", train_labels=(0, 1, -1, 2))
    outcome = train(*negative, "--overwrite")
    assert (outcome.code, "labels must not be negative" in outcome.error) == (1, True)
    beyond = write_npz(tmp_path / "beyond", test_labels=(0, 12))
    before = contents(run)
    outcome = cli("verify", run, *beyond)
    assert outcome.code == 1
    assert outcome.error == "the data has labels up to 12, the model only 10 classes"
    assert contents(run) == before


def test_images_of_the_wrong_size(cli, train, run, tmp_path):
    larger = write_npz(tmp_path / "larger", size=9)
    outcome = cli("verify", run, *larger)
    assert (outcome.code, "model cnn-small cannot take 1×9×9 images" in outcome.error) == (1, True)
    outcome = train(*larger, "model={name: tests.cli.test_cli:eight_by_eight_only}", "--overwrite")
    assert outcome.code == 1
    assert "model tests.cli.test_cli:eight_by_eight_only cannot take 1×9×9 images" in outcome.error


def test_a_run_of_another_architecture(cli, run):
    save_model(run, build_model("mlp", (1, 8, 8), 10), {"name": "mlp", "image_shape": [1, 8, 8], "num_classes": 10})
    outcome = cli("verify", run / "last.ckpt")
    assert outcome.code == 1
    assert "last.ckpt is of another architecture" in outcome.error


@pytest.mark.parametrize("name", ["last.ckpt", "model.safetensors"])
@pytest.mark.parametrize("keep", [0, 1, 1000, -1])
def test_verify_refuses_a_truncated_file(cli, run, name, keep):
    (run / name).write_bytes((run / name).read_bytes()[:keep])
    before = contents(run)
    outcome = cli("verify", run / name)
    assert outcome.code == 1
    assert f"{name} is corrupt or truncated" in outcome.error
    assert contents(run) == before


def test_verify_of_what_is_no_run(cli, tmp_path):
    for place in (tmp_path, tmp_path / "nowhere"):
        outcome = cli("verify", place)
        assert (outcome.code, "there is no model at" in outcome.error) == (1, True)


def test_results_that_cannot_be_written(cli, run, tmp_path):
    outcome = cli("verify", run, "--limit", 2, "--json", tmp_path / "nowhere" / "results.json")
    assert (outcome.code, "there is no folder" in outcome.error) == (2, True)


def failed(error):
    raise error


NO_MEMORY = {
    "numpy": lambda: np.empty(2**62, dtype=np.uint8),
    "torch": lambda: torch.empty(2**62, dtype=torch.uint8),
    "a list": lambda: [0] * 2**62,
    "a GPU": lambda: failed(torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 9 GiB.")),
    "cuBLAS": lambda: failed(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling")),
}


@pytest.mark.parametrize("library", NO_MEMORY)
def test_too_little_memory_is_one_line_that_says_what_takes_less(cli, monkeypatch, library):
    monkeypatch.setattr("certtrain.cli.commands.models_command", lambda options: NO_MEMORY[library]())
    outcome = cli("models")
    assert outcome.code == 1
    assert outcome.error.startswith("out of memory (")
    assert len(outcome.error) <= 300
    named = re.findall(r"(training|verification)\.(\w+)", outcome.error)
    assert named
    for section, key in named:
        assert key in getattr(load_config("digits"), section).model_dump()
    with pytest.raises((MemoryError, RuntimeError)):
        cli("models", "--debug")


def test_another_error_of_torch_is_a_mistake_of_the_program(cli, monkeypatch):
    monkeypatch.setattr("certtrain.cli.commands.models_command", lambda options: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError):
        cli("models")


def test_debug_shows_the_traceback(train):
    with pytest.raises(certtrain.errors.UsageError):
        train("epsilon.max=2", "--debug")


# --- what works ------------------------------------------------------------------------------------------------------


def test_overrides_and_options_come_in_any_order(cli, tmp_path):
    first, *others = TINY
    outcome = cli("train", first, "--out", tmp_path / "run", "digits")
    assert outcome.code == 2, "the first word is the config"
    outcome = cli("train", "digits", first, "--out", tmp_path / "run", *others, "--device", "cpu", "seed=5")
    assert outcome.code == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["seed"] == 5


def check_results(results, images):
    assert results["images"] == images
    assert 0 <= results["natural_error"] <= results["pgd_error"] <= results["verified_error"] <= 1
    assert [results[key] * images % 1 for key in ("natural_error", "pgd_error", "verified_error")] == [0, 0, 0]


def test_verify_at_several_radii(cli, run, tmp_path):
    before = contents(run)
    file = tmp_path / "results.json"
    outcome = cli("verify", run, "--eps", "2/255,8/255", "--limit", 32, "--json", file, "--device", "cpu")
    assert outcome.code == 0
    results = json.loads(file.read_text())
    assert [radius["eps"] for radius in results["radii"]] == [2 / 255, 8 / 255]
    for radius in results["radii"]:
        check_results(radius, images=32)
    check_results(results, images=32)
    small, large = results["radii"]
    assert small["natural_error"] == large["natural_error"]
    assert small["verified_error"] <= large["verified_error"]
    for value in (small, large):
        assert f"{value['verified_error']:.2%}" in outcome.out
    after = contents(run)
    assert after.pop("verdicts.json") != before.pop("verdicts.json")  # of each image, which verify adds to
    assert after == before


def test_verify_by_several_attacks(cli, run):
    asked = ["verify", run, "--eps", 0.2, "verification.apgd_steps=5", "verification.apgd_targets=2"]
    errors = {}
    for attack in ("pgd", "apgd-t", "pgd,apgd-ce,apgd-t"):
        outcome = cli(*asked, "--attack", attack)
        assert outcome.code == 0
        assert f"attacks by {attack}" in " ".join(outcome.out.split())
        results = json.loads((run / "verify.json").read_text())
        assert results["attack"] == attack
        check_results(results, images=results["images"])
        errors[attack] = results["pgd_error"]
    assert errors["pgd,apgd-ce,apgd-t"] >= max(errors.values())


def test_verify_repeats_what_training_found(cli, run):
    assert cli("verify", run).code == 0
    summary, results = (json.loads((run / name).read_text()) for name in ("summary.json", "verify.json"))
    for key in ("eps", "images", "natural_error", "pgd_error", "verified_error"):
        assert results[key] == summary[key]
    assert cli("verify", run / "last.ckpt").code == 0
    from_checkpoint = json.loads((run / "verify.json").read_text())
    assert from_checkpoint["verified_error"] == results["verified_error"]


@pytest.mark.slow
def test_the_script_trains_and_a_pipe_gets_plain_lines(tmp_path):
    trained = subprocess.run(
        [sys.executable, ROOT / "scripts" / "train.py", "digits", *TINY],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (trained.returncode, trained.stderr) == (0, "")
    assert [line.split()[:2] for line in trained.stdout.splitlines()[:3]] == [["epoch", f"{n}/3"] for n in (1, 2, 3)]
    assert not {"\x1b", "\r"} & set(trained.stdout)
    assert (tmp_path / "runs" / "digits" / "summary.json").is_file()


@pytest.mark.parametrize(("eps", "code"), [("8/255", 0), ("8/0", 2)])
def test_the_script_verifies(run, monkeypatch, capsys, eps, code):
    monkeypatch.setattr(sys, "argv", ["verify.py", str(run), "--limit", "20", "--eps", eps])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts" / "verify.py"), run_name="__main__")
    assert ended.value.code == code
    assert (run / "verify.json").exists() == (code == 0)
    assert capsys.readouterr().err.count("\n") == (code != 0)


# --- the package -----------------------------------------------------------------------------------------------------


def test_an_editable_install_finds_the_top_level_models():
    assert Path(certtrain.models.__file__) == ROOT / "models" / "__init__.py"


@pytest.mark.slow
def test_the_wheel_holds_models_and_configs(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    source, out = tmp_path / "source", tmp_path / "out"
    for name in ("certtrain", "models", "configs"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    out.mkdir()
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, out], cwd=source, capture_output=True, check=True)
    (wheel,) = out.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "certtrain").rglob("*.py")}
    expected |= {f"certtrain/models/{path.name}" for path in (ROOT / "models").glob("*.py")}
    expected |= {f"certtrain/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    assert expected | {"certtrain/report/page.html"} <= names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"certtrain"}


def test_a_model_without_its_run_is_told_apart_from_a_config(run, cli):
    (run / "config.yaml").unlink()
    outcome = cli("verify", run)
    assert outcome.code == 1
    assert outcome.error == f"{run} is not a run directory: it has no config.yaml"
