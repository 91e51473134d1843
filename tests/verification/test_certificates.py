"""Certificates of a run, and the checker that proves them again without the program that wrote them."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.numpy import load_file, save_file

import certtrain
import certtrain.models
from certtrain.bounds import BoundedModel
from certtrain.cli.main import main
from certtrain.data import load_dataset, to_float
from certtrain.errors import CertificateError, CheckpointError
from certtrain.initialization import ibp_init_
from certtrain.models import build_model
from certtrain.runs.checkpoint import load_model
from certtrain.verification import checker
from certtrain.verification.certificates import read_certificates
from certtrain.verification.checker import SavedNetwork
from certtrain.verification.checker.intervals import Interval, Propagation, growth
from certtrain.verification.checker.network import KNOWN
from certtrain.verification.pixels import pixel_box
from tests.commands import one_thread
from tests.networks import randomized, save_model
from tests.verification.forging import rewrite


@pytest.fixture
def certified(run, cli, tmp_path):
    """A run, and certificates of it: at 0.004 most images are proved, and some are not."""
    file = tmp_path / "certificates.parquet"
    outcome = cli("verify", run, "--certificates", file, "--eps", "0.004,0.05", "--device", "cpu", "--limit", 360)
    assert outcome.code == 0, outcome.err
    return run, file


def test_every_certificate_holds_and_the_counts_are_the_verifiers(cli, certified):
    run, file = certified
    outcome = cli("check", file, "--model", run)
    assert outcome.code == 0, outcome.err
    rows = list(read_certificates(file).rows())
    assert {"proved", "attacked"} <= {row["verdict"] for row in rows}
    radii = json.loads((run / "verify.json").read_text())["radii"]
    for radius in radii:
        tested = [row for row in rows if row["epsilon"] == radius["eps"]]
        assert radius["arithmetic"] == "float32"
        assert radius["verified_error"] == pytest.approx(np.mean([row["verdict"] != "proved" for row in tested]))
        assert radius["pgd_error"] == pytest.approx(np.mean([row["verdict"] == "attacked" for row in tested]))
        assert radius["natural_error"] == pytest.approx(np.mean([row["prediction"] != row["label"] for row in tested]))
        proved = sum(row["verdict"] == "proved" for row in tested)
        assert f"epsilon {radius['eps']}, float32, ibp: all 360 images: {proved} proved, " in outcome.out
    assert "all 720 certificates hold\n" in outcome.out
    assert "the published one" in outcome.out
    assert "PARTIAL" not in outcome.out


def test_certificates_do_not_tell_where_things_lie(certified):
    """Neither of the machine's folders nor of the run's."""
    run, file = certified
    assert str(run.parent).encode() not in file.read_bytes()
    assert not {"root", "path"} & read_certificates(file).header.config["data"].keys()


def test_attacks_are_within_the_radius_and_misclassified(certified):
    run, file = certified
    model = certtrain.load_model(run)
    images = to_float(load_dataset("digits").test.images).double()
    attacks = [row for row in read_certificates(file).rows() if row["adversarial"] is not None]
    assert attacks
    for row in attacks:
        point = torch.tensor(row["adversarial"]).view(1, 1, 8, 8)
        assert (point.double() - images[row["index"]]).abs().max() <= row["epsilon"] + 1e-16
        assert model(point).argmax() != row["label"]


def test_partial_coverage_is_refused_or_said_aloud(run, cli, tmp_path):
    file = tmp_path / "certificates.parquet"
    cli("verify", run, "--certificates", file, "--eps", "0.004", "--limit", "30")
    outcome = cli("check", file, "--model", run)
    assert outcome.code == 1
    assert "certificates for 30 of 360 images; index 30 is missing" in outcome.error
    outcome = cli("check", file, "--model", run, "--allow-partial")
    assert outcome.code == 0
    assert "PARTIAL, 30 of 360 images" in outcome.out
    assert "of 330 images nothing is known" in outcome.out
    assert outcome.out.splitlines()[-1] == "all 30 certificates hold, but they leave images out: PARTIAL"


def test_an_altered_weight_is_caught(cli, certified):
    run, file = certified
    weights = load_file(run / "model.safetensors")
    name = next(name for name, value in weights.items() if value.ndim == 4)
    weights[name] = weights[name] * np.float32(1.01)
    save_file(weights, run / "model.safetensors")
    assert "another model" in cli("check", file, "--model", run).error
    # Nor does it help to give the file the new model's hash.
    rewrite(file, header={"model_sha256": SavedNetwork.read(run / "model.safetensors").sha256})
    assert "index 0: the margin is" in cli("check", file, "--model", run).error


@pytest.mark.usefixtures("started")
@pytest.mark.parametrize(("asked", "reason"), [
    (["--method", "alpha-crown"], "keep no slopes of alpha-crown"),
    (["verification.split=validation", "data.validation=40"], "about a test set"),
    (["data.classes=[1,2]"], "about a whole test set"),
    (["--eps", "0.1,2/255,1/10"], "name none twice"),
])  # fmt: skip
def test_what_could_not_be_checked_is_refused_by_every_rank(asked, reason, cli, run, tmp_path):
    file = tmp_path / "certificates.parquet"
    outcome = cli("verify", run, "--certificates", file, "--limit", 1, "--device", "cpu", *asked)
    assert (outcome.code, file.exists()) == (2, False)
    assert reason in outcome.error


@pytest.mark.parametrize(("written", "asked", "expected"), [
    (None, [], "float32"),
    ("bf16", [], "bf16"),
    (None, ["verification.arithmetic=bf16"], "bf16"),
    ("bf16", ["--sound", "float64"], "float64"),
    ("bf16", ["verification.arithmetic=null"], "float32"),
])  # fmt: skip
def test_certificates_are_of_the_arithmetic_that_was_asked_for(written, asked, expected, cli, run, tmp_path):
    """By the run's configuration, by a value, by an option; float32's where none of them says."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["verification"]["arithmetic"] = written
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    file = tmp_path / "c.parquet"
    assert cli("verify", run, "--certificates", file, "--limit", 2, "--device", "cpu", *asked).code == 0
    assert set(pq.read_table(file)["arithmetic"].to_pylist()) == {expected}


def test_what_cannot_be_certified_is_verified_nevertheless(cli, run, tmp_path):
    """Of logits that are no numbers there is no certificate, which is found out in the end: the errors stay."""
    weights = load_file(run / "model.safetensors")
    name = next(name for name in weights if name.endswith("running_var"))
    weights[name] = np.full_like(weights[name], np.nan)
    save_file(weights, run / "model.safetensors")
    outcome = cli("verify", run, "--certificates", tmp_path / "c.parquet", "--eps", "0.01", "--limit", 3)
    assert outcome.code == 1
    assert "logits that are no numbers" in outcome.error
    written = json.loads((run / "verify.json").read_text())
    assert (written["images"], written["eps"], written["natural_error"]) == (3, 0.01, 1)
    assert json.loads((run / "verdicts.json").read_text())[-1]["images"] == "mmm"


def write_npz(folder, count=400):
    rng = np.random.default_rng(0)
    for name in ("train", "test"):
        images = rng.integers(0, 256, (count, 8, 8, 1), np.uint8)
        np.savez(folder / f"{name}.npz", images=images, labels=rng.integers(0, 10, count))


@pytest.mark.slow
def test_the_run_does_not_say_which_images_are_meant(cli, run, tmp_path):
    """Certificates of easier images, made and checked with what the run's own config.yaml names."""
    write_npz(tmp_path)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(
        config.replace("name: digits", "name: npz").replace("path: null", f"path: {tmp_path}")
    )
    file = tmp_path / "certificates.parquet"
    outcome = cli("verify", run, "--certificates", file, "--eps", "0.004", "--limit", "400")
    assert outcome.code == 0, outcome.err
    assert "cannot read the npz test set from data" in cli("check", file, "--model", run).error
    assert "the data set npz, not digits" in cli("check", file, "--model", run, "--dataset", "digits").error
    rewrite(file, header={"data": {"name": "digits"}, "config": {"data": {"name": "digits"}}})
    assert "400 test images, digits has 360" in cli("check", file, "--model", run).error
    rewrite(file, header={"data": {"name": "npz"}, "config": {"data": {"name": "npz"}}})
    outcome = cli("check", file, "--model", run, "--data", tmp_path)
    assert outcome.code == 0, outcome.err
    assert "which this program does not know: compare it" in outcome.out
    (run / "config.yaml").unlink()
    assert cli("check", file, "--model", run, "--data", tmp_path, "--dataset", "npz").code == 0
    write_npz(tmp_path, 401)
    assert "400 test images, npz has 401" in cli("check", file, "--model", run, "--data", tmp_path).error


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused(share, cli, certified):
    run, file = certified
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    assert "truncated" in cli("check", file, "--model", run).error


def test_a_missing_file_or_another_table_is_refused(cli, run, tmp_path):
    assert "there is no file" in cli("check", tmp_path / "none.parquet", "--model", run).error
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    assert "holds no certificates" in cli("check", tmp_path / "other.parquet", "--model", run).error


def test_what_cannot_be_sound_is_refused(cli, run, tmp_path):
    assert "did you mean float32" in cli("verify", run, "--sound", "flaot32").error
    assert cli("verify", run, "--sound", "flaot32").code == 2
    outcome = cli("verify", run, "--certificates", tmp_path / "c.parquet", "--method", "ibp,alpha-crown")
    assert outcome.code == 2
    assert "no slopes of alpha-crown: use branch-and-bound" in outcome.error
    outcome = cli("verify", run / "last.ckpt", "--certificates", tmp_path / "c.parquet")
    assert outcome.code == 2
    assert "model.safetensors" in outcome.error


# --- the network that is proved is the one that is loaded -------------------------------------------------------------

MODELS = {
    "cnn7": {"width": 3, "linear_width": 10},
    "cnn7-wide": {"width": 2, "linear_width": 10},
    "cnn-large": {"width": 2, "linear_width": 10},
    "cnn-small": {"width": 3, "linear_width": 10},
    "cnn-2layer": {"width": 1, "linear_width": 10},
    "cnn-3layer": {"width": 1, "linear_width": 10, "kernel": 5},
    "cnn-4layer": {"width": 1, "linear_width": 10},
    "mlp": {"widths": (12, 9)},
    "wide-resnet": {"base_width": 2, "widen_factor": 2, "linear_width": 10},
    "resnext": {"stem_width": 4, "bottleneck_width": 2, "linear_width": 10, "blocks": 2},
}
TRANSFORMERS = {
    "pre, batch": {"norm_kind": "batch", "pool": "flatten", "shifted_patches": True},
    "post, no variance": {"norm": "post", "norm_kind": "layer-no-variance", "pool": "token"},
    "none": {"norm": "none"},
    "pre, layer": {"depth": 1},
    "post, layer": {"norm": "post", "depth": 1, "pool": "flatten"},
}


def test_the_checker_knows_every_network_that_is_shipped():
    assert {*MODELS, "vit"} == set(certtrain.models.MODELS) == set(KNOWN)


def saved_transformer(folder, kind):
    torch.manual_seed(0)
    options = {"width": 8, "heads": 2, "mlp_width": 6, "patch": 4, **TRANSFORMERS[kind]}
    architecture = {"name": "vit", "image_shape": [3, 8, 8], "num_classes": 4, "mean": [0.4, 0.5, 0.6],
                    "std": [0.2, 0.3, 0.25], "options": options}  # fmt: skip
    model = randomized(ibp_init_(build_model(**architecture)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # whose weights start as 1, and biases as 0
                parameter += 0.2 * torch.randn_like(parameter)
    save_model(folder, model, architecture)
    return folder / "model.safetensors"


def assert_same_margins(file, arithmetic, tolerance):
    """The verifier's and the checker's, of three images."""
    model, network = load_model(file), SavedNetwork.read(file)
    images, labels = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8), torch.tensor([0, 3, 1])
    box = pixel_box(images, 1 / 255)
    bounds = BoundedModel(model, to_float(images)).margins(box, labels, arithmetic=arithmetic)
    for row, lower, upper, label in zip(bounds, box.lower.numpy(), box.upper.numpy(), labels.tolist(), strict=True):
        least = row.scatter(0, torch.tensor([label]), torch.inf).min().item()
        assert network.classifier_input(lower, upper, arithmetic).margin(label) == pytest.approx(
            least, rel=tolerance, abs=tolerance
        )


@pytest.mark.parametrize("kind", TRANSFORMERS)
@pytest.mark.parametrize("arithmetic", ["float32", "bf16", "float64"])
def test_verifier_and_checker_derive_the_same_margins_of_transformers(kind, arithmetic, tmp_path):
    assert_same_margins(saved_transformer(tmp_path, kind), arithmetic, tolerance=1e-7)


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_a_transformer_that_is_proved_is_the_one_that_is_loaded(kind, tmp_path):
    file = saved_transformer(tmp_path, kind)
    model, network = load_model(file).double(), SavedNetwork.read(file)
    for image in torch.rand(3, 3, 8, 8, dtype=torch.float64):
        with torch.no_grad():
            (logits,) = model(image[None])
        found = network.classifier_input(image.numpy(), image.numpy(), "float64")
        for label in range(4):
            exact = (logits[label] - torch.cat([logits[:label], logits[label + 1 :]])).min().item()
            assert found.margin(label) <= exact
            assert found.margin(label) == pytest.approx(exact, abs=1e-6)


def test_the_checker_refuses_a_transformer_with_gelu(tmp_path):
    file = saved_transformer(tmp_path, "none")
    description = json.loads((tmp_path / "model.json").read_text())
    description["model"]["options"]["activation"] = "gelu"
    (tmp_path / "model.json").write_text(json.dumps(description))
    with pytest.raises(CertificateError, match="GELU"):
        SavedNetwork.read(file)


def saved(folder, name, batch_norm=True):
    torch.manual_seed(0)
    batch_norm = {} if name == "cnn-large" else {"batch_norm": batch_norm}
    architecture = {"name": name, "image_shape": [3, 8, 8], "num_classes": 4, "mean": [0.4, 0.5, 0.6],
                    "std": [0.2, 0.3, 0.25], "options": MODELS[name] | batch_norm}  # fmt: skip
    save_model(folder, randomized(build_model(**architecture)), architecture)
    return folder / "model.safetensors"


@pytest.mark.parametrize("batch_norm", [True, False], ids=["BN", "no BN"])
@pytest.mark.parametrize(("name", "arithmetic"), [
    *((name, "float32") for name in MODELS),
    *(("cnn-small", arithmetic) for arithmetic in ("tf32", "bf16", "float64")),
    ("wide-resnet", "bf16"),
])  # fmt: skip
def test_verifier_and_checker_derive_the_same_margins(name, batch_norm, arithmetic, tmp_path):
    assert_same_margins(saved(tmp_path, name, batch_norm), arithmetic, tolerance=1e-8)


@pytest.mark.parametrize("batch_norm", [True, False], ids=["BN", "no BN"])
@pytest.mark.parametrize("name", MODELS)
def test_the_network_that_is_proved_is_the_one_that_is_loaded(name, batch_norm, tmp_path):
    """At a point, what the checker encloses is the difference of the loaded network's logits, and little else."""
    file = saved(tmp_path, name, batch_norm)
    model, network = load_model(file).double(), SavedNetwork.read(file)
    for image in torch.rand(5, 3, 8, 8, dtype=torch.float64):
        with torch.no_grad():
            (logits,) = model(image[None])
        found = network.classifier_input(image.numpy(), image.numpy(), "float64")
        for label in range(4):
            others = torch.cat([logits[:label], logits[label + 1 :]])
            exact = (logits[label] - others).min().item()
            assert found.margin(label) <= exact
            assert found.margin(label) == pytest.approx(exact, abs=1e-7)


@pytest.mark.parametrize("dtype", ["float64", "float16", "int32", "bool"])
@pytest.mark.parametrize(
    "part", ["network.0.weight", "network.1.running_mean", "normalize.mean", "num_batches_tracked"]
)
def test_other_stored_types_are_refused_by_loader_and_checker(part, dtype, tmp_path):
    """Loading would round them, and the network that is proved would not be the one that is used."""
    file = saved(tmp_path, "cnn-small")
    weights = load_file(file)
    name = next(name for name in weights if part in name)
    weights[name] = weights[name].astype(dtype)
    save_file(weights, file)
    with pytest.raises(CheckpointError, match=f"{name} is .* of {dtype}"):
        load_model(file)
    with pytest.raises(CertificateError, match=f"{name} as {dtype}"):
        SavedNetwork.read(file)


@pytest.mark.parametrize("change", [
    lambda model: model.update(num_classes=5),
    lambda model: model.update(num_classes="4"),
    lambda model: model.update(image_shape=[3, 8, 9]),
    lambda model: model.update(image_shape=[3, 8]),
    lambda model: model.update(image_shape=None),
    lambda model: model.update(name="cnn7"),
    lambda model: model.update(name="subprocess:run"),
    lambda model: model.update(name=["cnn-small"]),
    lambda model: model.clear(),
])  # fmt: skip
def test_an_architecture_that_does_not_fit_the_weights_is_one_line(change, tmp_path):
    file = saved(tmp_path, "cnn-small")
    description = json.loads((tmp_path / "model.json").read_text())
    change(description["model"])
    (tmp_path / "model.json").write_text(json.dumps(description))
    with pytest.raises(CertificateError) as caught:
        SavedNetwork.read(file)
    assert "\n" not in str(caught.value)


def test_terms_follow_a_value_through_flattening_and_a_second_batch_norm_is_refused():
    """Behind a layer that sums 4,096 products a BatchNorm can be folded into it; folding two, more is rounded."""
    n = 4096
    weights = {"sum.weight": np.zeros((1, n))}
    for name in ("first", "second"):
        weights |= {f"{name}.{part}": np.ones(1) for part in ("running_mean", "running_var", "weight", "bias")}
    p = Propagation(weights, "float32")
    x = p.linear(Interval(np.ones(n), np.zeros(n)), "sum")
    for value in (x, p.flatten(x)):
        assert value.sums.terms == n
        grown = p.batch_norm(value, "first").radius - value.radius / np.sqrt(1 + 1e-5)
        assert (grown >= growth(2.0**-24, n) - 1).all()  # of the folded bias, |mean·scale| + |bias| > 1
    with pytest.raises(CertificateError, match="second follows another BatchNorm"):
        p.batch_norm(p.flatten(p.batch_norm(x, "first")), "second")
    assert p.relu(x).sums is p.add(x, x).sums is None


@pytest.mark.parametrize("part", ["running_var", "weight", "running_mean", "bias"])
@pytest.mark.parametrize("value", [1e30, 1e15])
def test_batch_norms_that_could_overflow_prove_nothing(part, value, tmp_path):
    file = saved(tmp_path, "cnn-small")
    weights = load_file(file)
    name = next(name for name in weights if name.endswith(f"network.1.{part}"))
    weights[name] = np.full_like(weights[name], value)
    save_file(weights, file)
    point = np.full((3, 8, 8), 0.5)
    assert SavedNetwork.read(file).classifier_input(point, point, "float32").margin(0) == -np.inf
    model = load_model(file)
    box = pixel_box(torch.full((1, 3, 8, 8), 127, dtype=torch.uint8), 0.0)
    margins = BoundedModel(model, torch.zeros(1, 3, 8, 8)).margins(box, torch.tensor([0]), arithmetic="float32")
    assert (margins[0, 1:] == -torch.inf).all()


@pytest.mark.parametrize("file", sorted(Path(checker.__file__).parent.glob("*.py")), ids=lambda file: file.stem)
def test_no_file_of_the_checker_names_what_it_is_to_be_independent_of(file):
    """Nor inside a function, which a run might not come to."""
    imported = [
        name
        for statement in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(statement, ast.Import | ast.ImportFrom)
        for name in [getattr(statement, "module", None), *(alias.name for alias in statement.names)]
    ]
    independent_of = ("torch", "certtrain.bounds", "certtrain.data")
    assert "annotations" in imported
    assert not any(f"{name}.".startswith(f"{other}.") for name in imported for other in independent_of)


@pytest.mark.slow
def test_the_checker_needs_neither_torch_nor_the_verifier(certified):
    run, file = certified
    program = f"""
import sys
from certtrain.cli import main
assert main(["check", {str(file)!r}, "--model", {str(run)!r}]) == 0
assert not any(name.startswith(("torch", "certtrain.bounds", "certtrain.data")) for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


@pytest.fixture(scope="module")
def searched(reference, tmp_path_factory):
    """A run, and certificates of images that intervals, CROWN, and branch and bound have proved."""
    run = shutil.copytree(reference, tmp_path_factory.mktemp("searched") / "run")
    file = run.parent / "certificates.parquet"
    arguments = ["--certificates", file, "--eps", "0.03", "--limit", 60, "--device", "cpu", "--timeout", 600]
    with one_thread():
        code = main(["verify", str(run), "--method", "ibp,crown,branch-and-bound", *map(str, arguments)])
    assert code == 0
    return run, file


def test_trees_of_branch_and_bound_are_proved_again(cli, searched):
    run, file = searched
    outcome = cli("check", file, "--model", run, "--allow-partial")
    assert outcome.code == 0, outcome.err
    trees = [row for row in read_certificates(file).rows() if row["tree"] is not None]
    assert trees
    assert {row["verdict"] for row in trees} == {"proved"}


def test_a_tree_that_is_missing_cut_or_longer_is_refused(cli, searched, tmp_path):
    run, file = searched
    rows = list(read_certificates(file).rows())
    place = next(i for i, row in enumerate(rows) if row["tree"] is not None)
    tree = rows[place]["tree"]
    for forged in (None, b"", tree[:-9], tree[9:], tree + b"more", tree + tree):
        copy = tmp_path / "forged.parquet"
        copy.write_bytes(file.read_bytes())
        rewrite(copy, [{**row, "tree": forged} if i == place else row for i, row in enumerate(rows)])
        outcome = cli("check", copy, "--model", run, "--allow-partial")
        assert outcome.code == 1
        assert "tree" in outcome.error or "margin" in outcome.error
