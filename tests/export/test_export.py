from __future__ import annotations

import csv
import sys
from fractions import Fraction

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from vnnlib.compat import read_vnnlib_simple

from certtrain.config import load_config
from certtrain.data import Dataset, Split, load_dataset
from certtrain.errors import CheckpointError, UnsupportedOperation, UsageError
from certtrain.export.onnx import export_onnx
from certtrain.export.vnnlib import export_vnnlib, outer_box, unknown_images, vnnlib_property
from certtrain.models import Normalize
from certtrain.runs.checkpoint import load_model
from tests.commands import contents
from tests.networks import Threshold, narrow_cnn7, pooling_network, randomized, residual_network

STANDARD = {"Sub", "Div", "Conv", "Gemm", "Relu", "Add", "Flatten", "AveragePool", "MaxPool", "Concat"}


def session(file):
    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])


def normalized(network):
    return nn.Sequential(Normalize((0.4, 0.5, 0.6), (0.2, 0.3, 0.25)), network)


@pytest.mark.parametrize(
    "build", [narrow_cnn7, lambda: normalized(residual_network()), lambda: normalized(pooling_network())]
)
def test_onnxruntime_computes_what_the_network_computes(build, tmp_path):
    torch.manual_seed(0)
    model = randomized(build()).train()
    export_onnx(model, (3, 16, 16), tmp_path / "model.onnx")
    assert model.training
    network = session(tmp_path / "model.onnx")
    assert [put.name for put in (*network.get_inputs(), *network.get_outputs())] == ["image", "logits"]
    for batch in (1, 7):
        images = torch.rand(batch, 3, 16, 16)
        (logits,) = network.run(["logits"], {"image": images.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(logits), model.eval()(images), atol=1e-5, rtol=1e-5)
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert {node.op_type for node in graph.node} <= STANDARD
    normalisation = {node.input[1] for node in graph.node if node.op_type in ("Sub", "Div")}
    shapes = [tuple(stored.dims) for stored in graph.initializer if stored.name in normalisation]
    assert shapes == [(1, 3, 1, 1)] * 2  # verifiers want the batch axis written out


def test_a_batch_norm_over_tokens_is_not_folded_into_the_features(tmp_path):
    """BatchNorm over the 4 rows of a matrix, though the layer before it has 4 columns as well."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(1, 2), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(16, 2))
    export_onnx(randomized(model).eval(), (1, 4, 4), tmp_path / "model.onnx")
    image = torch.rand(5, 1, 4, 4)
    (written,) = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, {"image": image.numpy()})
    torch.testing.assert_close(torch.from_numpy(written), model(image).detach(), rtol=1e-5, atol=1e-5)


class Solves(nn.Module):
    def forward(self, x):
        return torch.linalg.solve(torch.eye(4), x.flatten(1).T).T


@pytest.mark.parametrize(
    ("model", "size", "named"),
    [
        (nn.Sequential(nn.Conv2d(1, 1, 1), Solves()), 2, "solve"),
        (nn.Sequential(nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(9, 2)), 8, "adaptive_avg_pool2d"),
    ],
)
def test_what_onnx_cannot_say_is_one_line(tmp_path, model, size, named):
    with pytest.raises(UnsupportedOperation, match=f"cannot be written as ONNX: .*{named}") as error:
        export_onnx(model, (1, size, size), tmp_path / "model.onnx")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 210


@pytest.mark.parametrize("runtime", ["onnxruntime", "onnx's reference"])
def test_a_network_that_the_exporter_makes_another_of_is_not_written(tmp_path, monkeypatch, runtime):
    """PyTorch's exporter overlooks `divisor_override`."""
    if runtime != "onnxruntime":
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
    file = tmp_path / "model.onnx"
    for divisor, written in ((None, True), (4, True), (3, False)):
        model = nn.Sequential(nn.AvgPool2d(2, divisor_override=divisor), nn.Flatten(), nn.Linear(4, 3))
        if written:
            export_onnx(model, (1, 4, 4), file)
            file.unlink()
        else:
            with pytest.raises(UnsupportedOperation, match="exporter makes another of it"):
                export_onnx(model, (1, 4, 4), file)
            assert not file.exists()


# --- VNN-LIB ---------------------------------------------------------------------------------------------------------


def within(polytopes, point):
    """Does the disjunction that the parser returned hold at `point`?"""
    return any((matrix @ point <= bounds).all() for matrix, bounds in polytopes)


def test_a_property_holds_exactly_where_the_label_does_not_win(tmp_path):
    torch.manual_seed(0)
    lower, upper = outer_box(torch.rand(2, 3, 3), 0.1)
    (tmp_path / "a.vnnlib").write_text("; a comment\n" + vnnlib_property(lower, upper, label=2, classes=4))
    ((box, polytopes),) = read_vnnlib_simple(tmp_path / "a.vnnlib", 18, 4)
    for i, (low, high) in enumerate(box):
        c, h, w = np.unravel_index(i, (2, 3, 3))
        assert (float(low), float(high)) == (lower[c, h, w].item(), upper[c, h, w].item())
    logits = torch.randn(200, 4).round(decimals=1).double()  # with ties, which are counterexamples
    wrong = logits[:, [0, 1, 3]].amax(1) >= logits[:, 2]
    assert 20 < wrong.sum() < 180
    assert [within(polytopes, point) for point in logits.numpy()] == wrong.tolist()


@pytest.mark.parametrize("eps", [0.1, 2 / 255, 1e-9, 0.0])
def test_no_real_number_of_the_box_is_rounded_away(eps, tmp_path):
    pixels = (torch.arange(256) / 255).view(1, 16, 16)
    lower, upper = outer_box(pixels, eps)
    (tmp_path / "a.vnnlib").write_text(vnnlib_property(lower, upper, 0, 2))
    words = [line.strip("()").split() for line in (tmp_path / "a.vnnlib").read_text().splitlines()]
    ends = [Fraction(word[-1]) for word in words if word[0] == "assert" and word[1] != "(or"]
    for pixel, low, high in zip(pixels.flatten().tolist(), ends[::2], ends[1::2], strict=True):
        true_low = max(Fraction(0), Fraction(pixel) - Fraction(eps))
        true_high = min(Fraction(1), Fraction(pixel) + Fraction(eps))
        assert 0 <= low <= true_low
        assert true_high <= high <= 1
        ulp = Fraction(1, 2**23)
        assert true_low - low <= ulp
        assert high - true_high <= ulp
        assert {low, high} == {Fraction(float(np.float32(float(end)))) for end in (low, high)}


def one_pixel_images(values, labels):
    split = Split(torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1), torch.tensor(labels))
    return Dataset(split, split, ("dark", "bright"), mean=(0.0,), std=(1.0,))


def config_with(**verification):
    return load_config(
        {
            "data": {"name": "digits"},
            "model": {"name": "mlp"},
            "epsilon": {"max": 0.1},
            "training": {"epochs": 1},
            "verification": verification,
        }
    )


def test_unknown_images_get_a_property_and_its_counterexamples_fool_the_network(tmp_path):
    """At distances 127.5, 2.5, 22.5 (wrong) and 1.5 from the threshold, in 1/255; nothing is attacked."""
    folder = tmp_path / "open"
    data = one_pixel_images([0, 130, 150, 126], [0, 1, 0, 0])
    result = export_vnnlib(folder, config_with(pgd_restarts=0), Threshold(), data, 5 / 255, limit=None, timeout=60)
    assert unknown_images(result) == [1, 3]
    rows = list(csv.reader((folder / "instances.csv").open()))
    assert rows == [["model.onnx", "image_00001.vnnlib", "60"], ["model.onnx", "image_00003.vnnlib", "60"]]
    network = session(folder / "model.onnx")
    for (_, name, _), pixel, label in zip(rows, (130, 126), (1, 0), strict=True):
        ((((low, high),), polytopes),) = read_vnnlib_simple(folder / name, 1, 2)
        assert (float(low), float(high)) == pytest.approx(((pixel - 5) / 255, (pixel + 5) / 255), abs=1e-6)
        for value in range(pixel - 5, pixel + 6):
            (logits,) = network.run(None, {"image": np.full((1, 1, 1, 1), value / 255, dtype=np.float32)})
            assert within(polytopes, logits[0].astype(np.float64)) == ((value > 127) != label)
    again = config_with(pgd_restarts=0)
    with pytest.raises(UsageError, match="not an empty folder"):
        export_vnnlib(folder, again, Threshold(), data, 5 / 255, limit=None, timeout=60)


def test_attacked_images_are_not_unknown(tmp_path):
    data = one_pixel_images([0, 130], [0, 1])
    result = export_vnnlib(tmp_path / "open", config_with(), Threshold(), data, 5 / 255, limit=None, timeout=60)
    assert unknown_images(result) == []
    assert sorted(contents(tmp_path / "open")) == ["instances.csv", "model.onnx"]


@pytest.mark.parametrize("wrong", ["network", "folder"])
def test_what_cannot_be_written_is_known_before_the_proofs(wrong, tmp_path, monkeypatch):
    def refused(*asked):
        raise UnsupportedOperation("an operation that ONNX lacks")

    (tmp_path / "file").touch()
    folder = tmp_path / "open" if wrong == "network" else tmp_path / "file" / "open"
    monkeypatch.setattr("certtrain.export.vnnlib.verify_run", lambda *asked: pytest.fail("too late"))
    if wrong == "network":
        monkeypatch.setattr("certtrain.export.vnnlib.export_onnx", refused)
    with pytest.raises(UnsupportedOperation if wrong == "network" else CheckpointError):
        export_vnnlib(folder, config_with(), Threshold(), one_pixel_images([0], [0]), 0.1, limit=None, timeout=60)
    assert not folder.exists()


# --- the command -----------------------------------------------------------------------------------------------------


def test_export_of_a_run(cli, run, tmp_path):
    outcome = cli("export", run, "--onnx", "--vnnlib", tmp_path / "open", "--eps", "8/255", "--limit", 40)
    assert (outcome.code, outcome.err) == (0, "")
    assert (run / "model.onnx").read_bytes() == (tmp_path / "open" / "model.onnx").read_bytes()
    images = load_dataset("digits").test.images[:7] / 255
    (logits,) = session(run / "model.onnx").run(None, {"image": images.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), load_model(run)(images), atol=1e-5, rtol=1e-5)
    properties = list((tmp_path / "open").glob("*.vnnlib"))
    assert f"properties of {len(properties)} of 40 images" in outcome.out
    assert len(properties) > 0
    assert all(int(file.stem.removeprefix("image_")) < 40 for file in properties)
    outcome = cli("export", run, "--onnx", tmp_path / "other.onnx")
    assert (outcome.code, (tmp_path / "other.onnx").is_file()) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "say what to export: --onnx, or --vnnlib DIR"),
        (["--onnx", "/nowhere/model.onnx"], 2, "/nowhere/model.onnx cannot be written: there is no folder /nowhere"),
        (["--onnx", "--eps", "8/0"], 2, "'8/0' is not a radius"),
        (["--vnnlib", "open", "data.nmae=mnist"], 2, "did you mean name"),
    ],
)
def test_what_is_written_wrong(cli, run, tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    outcome = cli("export", run, *arguments)
    assert (outcome.code, message in outcome.err) == (code, True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("what", ["--onnx", "--vnnlib=open"])
def test_without_onnx_the_way_out_is_named(cli, run, tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "onnx", None)
    outcome = cli("export", run, what)
    assert outcome.code == 1
    assert "pip install '.[export]'" in outcome.error
    assert not (tmp_path / "open").exists()
