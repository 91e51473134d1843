"""Certificates, and the checker that proves them again without the program that wrote them."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import load_file, save_file

import certtrain
from certtrain.bounds import BoundedModel
from certtrain.bounds.rounding import enclosing_linf_box
from certtrain.data import load_dataset, to_float
from certtrain.errors import CertificateError
from certtrain.models import build_model
from certtrain.runs.checkpoint import save_model
from certtrain.verification.certificates import METADATA, read_certificates
from certtrain.verification.checker import SavedNetwork, check_header, check_row
from certtrain.verification.verify import verify
from tests.networks import randomized


@pytest.fixture
def certified(run, cli, tmp_path):
    """A run, and certificates of it: at 0.004 most images are proved, and some are not."""
    file = tmp_path / "certificates.parquet"
    outcome = cli("verify", run, "--certificates", file, "--eps", "0.004,0.05", "--device", "cpu")
    assert outcome.code == 0, outcome.err
    return run, file


def altered(file, **changes):
    """`file` with columns of its first row of each verdict changed."""
    table = pq.read_table(file)
    rows = table.to_pylist()
    for row in rows:
        if changes.get("of", row["verdict"]) == row["verdict"]:
            row.update({key: change(row) for key, change in changes.items() if key != "of"})
            break
    pq.write_table(pa.Table.from_pylist(rows, table.schema), file)


def test_every_certificate_holds_and_the_counts_are_the_verifiers(cli, certified):
    run, file = certified
    outcome = cli("check", file, "--model", run)
    assert outcome.code == 0, outcome.err
    rows = read_certificates(file).rows
    assert {"proved", "attacked"} <= {row["verdict"] for row in rows}
    radii = json.loads((run / "verify.json").read_text())["radii"]
    for radius in radii:
        mine = [row for row in rows if row["epsilon"] == radius["eps"]]
        assert radius["arithmetic"] == "float32"
        assert radius["verified_error"] == pytest.approx(np.mean([row["verdict"] != "proved" for row in mine]))
        assert radius["pgd_error"] == pytest.approx(np.mean([row["verdict"] == "attacked" for row in mine]))
        assert radius["natural_error"] == pytest.approx(np.mean([row["prediction"] != row["label"] for row in mine]))
    assert f"all {len(rows)} certificates hold" in outcome.out


def test_attacks_are_within_the_radius_and_misclassified(certified):
    run, file = certified
    model = certtrain.load_model(run)
    images = to_float(load_dataset("digits").test.images).double()
    attacks = [row for row in read_certificates(file).rows if row["adversarial"] is not None]
    assert attacks
    for row in attacks:
        point = torch.tensor(row["adversarial"]).view(1, 1, 8, 8)
        assert (point.double() - images[row["index"]]).abs().max() <= row["epsilon"] + 1e-16
        assert model(point).argmax() != row["label"]


ALTERATIONS = {
    "margin": {"of": "proved", "margin": lambda row: row["margin"] + 0.01},
    "margin, weaker": {"of": "proved", "margin": lambda row: row["margin"] / 2},
    "label": {"label": lambda row: (row["label"] + 1) % 10},
    "image": {"sha256": lambda row: row["sha256"][::-1]},
    "index": {"index": lambda row: 10**6},
    "another index": {"index": lambda row: row["index"] + 1},
    "epsilon": {"of": "proved", "epsilon": lambda row: row["epsilon"] / 2},
    "not a number": {"of": "proved", "margin": lambda row: float("nan")},
    "proved, not attacked": {"of": "attacked", "verdict": lambda row: "proved"},
    "open, not attacked": {"of": "attacked", "verdict": lambda row: "open"},
    "open, not proved": {"of": "proved", "verdict": lambda row: "open"},
    "attacked, not proved": {"of": "proved", "verdict": lambda row: "attacked"},
    "unknown verdict": {"of": "attacked", "verdict": lambda row: "refuted"},
    "prediction": {"of": "proved", "prediction": lambda row: (row["label"] + 1) % 10},
    "method": {"method": lambda row: "crown"},
    "arithmetic": {"of": "proved", "arithmetic": lambda row: "bf16"},
}


@pytest.mark.parametrize("name", ALTERATIONS)
def test_an_alteration_is_caught(name, cli, certified):
    run, file = certified
    altered(file, **ALTERATIONS[name])
    outcome = cli("check", file, "--model", run)
    assert outcome.code == 1
    assert "index" in outcome.error


def test_an_altered_attack_is_caught(certified):
    run, file = certified
    test = load_dataset("digits").test
    network = SavedNetwork.read(run / "model.safetensors")
    row = next(row for row in read_certificates(file).rows if row["adversarial"] is not None)
    images, labels = test.images.numpy(), test.labels.numpy()
    check_row(row, network, images, labels)
    far, unchanged = list(row["adversarial"]), to_float(test.images[row["index"]]).flatten().tolist()
    far[5] = min(far[5] + 0.2, 1.0) if far[5] < 0.5 else far[5] - 0.2
    for adversarial, reason in ((far, "within epsilon"), (unchanged, "classified as the label"), (far[:-1], "within")):
        with pytest.raises(CertificateError, match=reason):
            check_row({**row, "adversarial": adversarial}, network, images, labels)
    with pytest.raises(CertificateError, match="adversarial image"):
        check_row({**row, "adversarial": None}, network, images, labels)


def test_an_altered_pixel_is_caught(certified):
    run, file = certified
    test = load_dataset("digits").test
    images = test.images.numpy().copy()
    images[3, 0, 4, 4] ^= 1
    network, rows = SavedNetwork.read(run / "model.safetensors"), read_certificates(file).rows
    with pytest.raises(CertificateError, match="index 3: another image"):
        check_row(rows[3], network, images, test.labels.numpy())


def test_an_altered_weight_is_caught(cli, certified):
    run, file = certified
    weights = load_file(run / "model.safetensors")
    name = next(name for name, value in weights.items() if value.ndim == 4)
    weights[name] = weights[name] * np.float32(1.01)
    save_file(weights, run / "model.safetensors")
    outcome = cli("check", file, "--model", run)
    assert "another model" in outcome.error
    # Nor does it help to give the file the new model's hash.
    table = pq.read_table(file)
    metadata = json.loads(table.schema.metadata[METADATA])
    metadata["model_sha256"] = SavedNetwork.read(run / "model.safetensors").sha256
    pq.write_table(table.replace_schema_metadata({METADATA: json.dumps(metadata)}), file)
    outcome = cli("check", file, "--model", run)
    assert "margin" in outcome.error


def test_another_architecture_data_set_or_format_is_refused(cli, certified, tmp_path):
    run, file = certified
    certificates = read_certificates(file)
    network = SavedNetwork.read(run / "model.safetensors")
    network.architecture["num_classes"] += 1
    with pytest.raises(CertificateError, match=r"model\.json"):
        check_header(certificates, network)
    rng = np.random.default_rng(0)
    for name in ("train", "test"):
        np.savez(tmp_path / f"{name}.npz", images=rng.integers(0, 256, (400, 8, 8, 1), np.uint8),
                 labels=rng.integers(0, 10, 400))  # fmt: skip
    outcome = cli("check", file, "--model", run, "--dataset", "npz", f"data.path={tmp_path}")
    assert "another image" in outcome.error
    table = pq.read_table(file)
    metadata = {**json.loads(table.schema.metadata[METADATA]), "format": 99}
    pq.write_table(table.replace_schema_metadata({METADATA: json.dumps(metadata)}), file)
    assert "format 99" in cli("check", file, "--model", run).error


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused(share, cli, certified):
    run, file = certified
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    assert "truncated" in cli("check", file, "--model", run).error


def test_a_missing_file_or_another_table_is_refused(cli, certified, tmp_path):
    run, _ = certified
    assert "there is no file" in cli("check", tmp_path / "none.parquet", "--model", run).error
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    assert "holds no certificates" in cli("check", tmp_path / "other.parquet", "--model", run).error


def test_what_cannot_be_sound_is_refused(cli, run, tmp_path):
    assert "did you mean float32" in cli("verify", run, "--sound", "flaot32").error
    assert cli("verify", run, "--sound", "flaot32").code == 2
    outcome = cli("verify", run, "--certificates", tmp_path / "c.parquet", "--method", "ibp,crown")
    assert outcome.code == 2
    assert "method ibp" in outcome.error
    outcome = cli("verify", run / "last.ckpt", "--certificates", tmp_path / "c.parquet")
    assert outcome.code == 2
    assert "model.safetensors" in outcome.error


MODELS = {
    "cnn7": {"width": 3, "linear_width": 10},
    "cnn-small": {"width": 3, "linear_width": 10},
    "mlp": {"widths": (12, 9)},
    "wide-resnet": {"base_width": 2, "widen_factor": 2, "linear_width": 10},
    "resnext": {"stem_width": 4, "bottleneck_width": 2, "linear_width": 10, "blocks": 2},
}


@pytest.mark.parametrize("batch_norm", [True, False], ids=["BN", "no BN"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("arithmetic", ["float32", "tf32", "bf16", "float64"])
def test_verifier_and_checker_derive_the_same_margins(name, batch_norm, arithmetic, tmp_path):
    torch.manual_seed(0)
    architecture = {"name": name, "image_shape": [3, 8, 8], "num_classes": 4, "mean": [0.4, 0.5, 0.6],
                    "std": [0.2, 0.3, 0.25], "options": {**MODELS[name], "batch_norm": batch_norm}}  # fmt: skip
    model = randomized(build_model(**architecture)).eval()
    save_model(tmp_path, model, architecture)
    network = SavedNetwork.read(tmp_path / "model.safetensors")
    images, labels = torch.rand(3, 3, 8, 8), torch.tensor([0, 3, 1])
    box = enclosing_linf_box(images, 1 / 255)
    ours = BoundedModel(model, images).margins(box, labels, arithmetic=arithmetic)
    for row, lower, upper, label in zip(ours, box.lower.numpy(), box.upper.numpy(), labels.tolist(), strict=True):
        least = row.scatter(0, torch.tensor([label]), torch.inf).min().item()
        assert network.classifier_input(lower, upper, arithmetic).margin(label) == pytest.approx(
            least, rel=1e-8, abs=1e-8
        )


def test_the_checker_needs_neither_torch_nor_the_verifier(certified):
    run, file = certified
    program = f"""
import sys
from pathlib import Path
from certtrain.verification.certificates import read_certificates
from certtrain.verification.checker import SavedNetwork, check_header
check_header(read_certificates(Path({str(file)!r})), SavedNetwork.read(Path({str(run / "model.safetensors")!r})))
assert not any(name == "torch" or name.startswith("certtrain.bounds") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_verification_is_float32_and_restores_the_switch_when_tf32_is_on(run):
    model, data = certtrain.load_model(run), load_dataset("digits").test
    expected = verify(model, data, 0.004, limit=30, arithmetic="float32")[0].margin
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        again = verify(model, data, 0.004, limit=30, arithmetic="float32")[0].margin
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"
    assert torch.equal(again, expected)
