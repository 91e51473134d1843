"""Networks, weights and properties of others on the command line."""

from __future__ import annotations

import csv
import json
import re
import sys

import onnxruntime
import pytest
import safetensors.torch
import torch

from certtrain.config.schema import VerificationSection
from certtrain.data import load_dataset
from certtrain.importing.vnnlib import read_property
from certtrain.runs.checkpoint import load_model
from certtrain.verification.verify import verify
from tests.commands import TINY, contents

OF_IMAGES = {"eps": 0.1, "arithmetic": "float32", "limit": 3, "batch_size": 2, "split": "test"}
OF_PROPERTIES = {"method": "ibp", "attack": "pgd", "pgd_steps": 3, "pgd_restarts": 1, "pgd_step_size": 0.1,
                 "apgd_steps": 3, "apgd_restarts": 1, "apgd_targets": 1, "search.timeout": 1}  # fmt: skip
MODEL = [text for text in TINY if text.startswith("model.")]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_beside_a_config_are_verified_as_in_their_run(cli, run, tmp_path, suffix):
    weights, results = tmp_path / f"weights{suffix}", tmp_path / "results.json"
    state = load_model(run).state_dict()
    if suffix == ".pth":
        torch.save(state, weights)
    else:
        safetensors.torch.save_file(state, weights)
    before = contents(run)
    outcome = cli("verify", "digits", "--model-weights", weights, "--json", results, *TINY, "--device", "cpu")
    assert outcome.code == 0
    found, summary = json.loads(results.read_text()), json.loads((run / "summary.json").read_text())
    for key in ("eps", "images", "natural_error", "pgd_error", "verified_error"):
        assert found[key] == summary[key]
    assert found["model"] == str(weights)
    assert contents(run) == before


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["digits", "--model-weights", "nothing.pth", *MODEL], 1, "there is no file of weights nothing.pth"),
        (
            ["digits", "--model-weights", "w.pth"],
            1,
            "architecture: network.0.weight is (2, 1, 3, 3), not (32, 1, 3, 3)",
        ),
        (["digits", "--model-weights", "w.pth", "model.name=mlp"], 1, "layers with weights, the model has"),
        (["digits", "--model-weights", "w.pth", "--radius"], 2, "--radius cannot be combined with --model-weights"),
        (["digits", "--model-weights", "w.pth", "--certificates", "c"], 2, "cannot be combined with --model-weights"),
        (["dgits", "--model-weights", "w.pth"], 2, "did you mean digits"),
        (["net.onnx"], 2, "say which property to decide, with --vnnlib FILE"),
        (["net.onnx", "--vnnlib", "p.vnnlib"], 1, "p.vnnlib cannot be read"),
        (["net.onnx", "--vnnlib", "bad.vnnlib"], 1, "bad.vnnlib, line 2: '(<= X_0 X_0)' is about neither"),
        (["net.onnx", "--vnnlib", "good.vnnlib"], 1, "net.onnx cannot be read"),
        (["net.onnx", "--vnnlib", "good.vnnlib", "--eps", "0.1"], 2, "--eps cannot be combined with --vnnlib"),
        (["net.onnx", "--vnnlib", "good.vnnlib", "--model-weights", "w.pth"], 2, "--model-weights cannot be combined"),
        (["net.onnx", "--vnnlib", "good.vnnlib", "--method", "corwn"], 2, "did you mean crown"),
        (["net.onnx", "--vnnlib", "good.vnnlib", "data.name=mnist"], 2, "data: only the section verification means"),
        (["net.onnx", "--vnnlib", "good.vnnlib", "verification.pgd_steps=x"], 2, "verification.pgd_steps"),
        (["net.onnx", "--vnnlib", "good.vnnlib", "--workers", "2"], 2, "--workers cannot be combined with --vnnlib"),
        *[
            (["net.onnx", "--vnnlib", "good.vnnlib", f"verification.{key}={value}"], 2, f"{key}: a property is decided")
            for key, value in OF_IMAGES.items()
        ],
        *[
            (["net.onnx", "--vnnlib", "good.vnnlib", f"verification.{key}={value}"], 1, "net.onnx cannot be read")
            for key, value in OF_PROPERTIES.items()
        ],
    ],
)
def test_what_is_written_wrong(cli, run, tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    torch.save(load_model(run).state_dict(), "w.pth")
    head = "(declare-const X_0 Real)(declare-const Y_0 Real)\n"
    (tmp_path / "bad.vnnlib").write_text(f"{head}(assert (<= X_0 X_0))\n")
    (tmp_path / "good.vnnlib").write_text(f"{head}(assert (<= X_0 1))(assert (>= X_0 0))(assert (<= Y_0 1))\n")
    outcome = cli("verify", *arguments)
    assert (outcome.code, message in outcome.error) == (code, True), outcome.error
    assert outcome.out == ""
    assert len(outcome.error) <= 300


def test_properties_of_a_run_are_decided_as_its_images_are(cli, run, tmp_path):
    """What certtrain exports, read again: the network as ONNX, and as the run itself."""
    eps, folder = 0.15, tmp_path / "open"
    assert cli("export", run, "--vnnlib", folder, "--eps", eps, "--limit", 60, "verification.pgd_steps=0").code == 0
    rows = list(csv.reader((folder / "instances.csv").read_text().splitlines()))
    images = load_dataset("digits").test
    verdicts = {}
    for _, name, _ in rows[:12]:
        index = int(re.findall(r"\d+", name)[0])
        outcome = cli("verify", folder / "model.onnx", "--vnnlib", folder / name, "--device", "cpu")
        assert (outcome.code, outcome.err) == (0, "")
        verdict, _, point = outcome.out.partition("\n")
        verdicts[index] = verdict
        if verdict == "sat":
            values = {name: float(value) for name, value in re.findall(r"\(([XY]_\d+) (\S+?)\)", point)}
            x = torch.tensor([values[f"X_{i}"] for i in range(64)])
            session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
            (logits,) = session.run(None, {"image": x.view(1, 1, 8, 8).numpy()})
            assert [values[f"Y_{j}"] for j in range(10)] == logits[0].tolist()
            assert logits.argmax() != images.labels[index]
            assert any(case.holds(torch.from_numpy(logits[0])) for case in read_property(folder / name))
            assert (x - images.images[index].flatten() / 255).abs().max() <= eps + 1e-6
        else:
            assert point == ""
        (proof,) = verify(load_model(run), images.take(slice(index, index + 1)), eps, ["crown", "alpha-crown"])
        assert verdict == "unsat" or not proof.proved.any()
    assert "sat" in verdicts.values()
    again = cli("verify", run, "--vnnlib", folder / rows[0][1], "--device", "cpu").out
    assert again.partition("\n")[0] == verdicts[int(re.findall(r"\d+", rows[0][1])[0])]


def test_every_key_of_verification_is_used_for_a_property_or_refused():
    keys = {key.partition(".")[0] for key in OF_PROPERTIES}
    assert keys | OF_IMAGES.keys() == VerificationSection.model_fields.keys()
    assert not keys & OF_IMAGES.keys()


def test_without_onnx2torch_the_way_out_is_named(cli, tmp_path, monkeypatch):
    (tmp_path / "p.vnnlib").write_text(
        "(declare-const X_0 Real)(declare-const Y_0 Real)(assert (<= X_0 1))(assert (>= X_0 0))(assert (<= Y_0 1))"
    )
    monkeypatch.setitem(sys.modules, "onnx2torch", None)
    outcome = cli("verify", tmp_path / "net.onnx", "--vnnlib", tmp_path / "p.vnnlib")
    assert outcome.code == 1
    assert "pip install '.[onnx]'" in outcome.error
