"""auto_LiRPA as a second engine: the same answers, for networks that have no rules here too."""

from __future__ import annotations

import inspect
import json
import sys

import pytest
import torch
from torch import Tensor, nn

import certtrain
from certtrain.bounds import BoundedModel, Bounder, bounded_model, linf_box
from certtrain.bounds.linear import AlphaOptions
from certtrain.bounds.lirpa import LirpaModel
from certtrain.data import load_dataset
from certtrain.errors import MissingDependency, UnsupportedOperation, UsageError
from certtrain.verification.branch_and_bound import Search
from tests.networks import narrow_cnn7, randomized


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


def with_sine(image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    features = image_shape[0] * image_shape[1] * image_shape[2]
    return nn.Sequential(
        nn.Flatten(), nn.Linear(features, 8), nn.ReLU(), Sine(), nn.Linear(8, num_classes)
    )  # fmt: skip


def test_backend_lirpa_is_auto_lirpa_and_an_unknown_one_is_refused():
    x = torch.rand(2, 4)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    assert isinstance(bounded_model(model, x), BoundedModel)
    assert isinstance(bounded_model(model, x, backend="lirpa"), LirpaModel)
    with pytest.raises(UsageError, match="lirpa"):
        bounded_model(model, x, backend="lipra")
    with pytest.raises(UsageError, match="whole batches"):
        bounded_model(model, x, "lirpa", batch_sum=lambda value: value)


@pytest.mark.parametrize(
    "question",
    [
        lambda net, x, box, labels: net.graph,
        lambda net, x, box, labels: net.split(1),
        lambda net, x, box, labels: net.clean_pass(x, {}),
        lambda net, x, box, labels: net.ibp(box, coefficients={}),
        lambda net, x, box, labels: net.ibp(box, arithmetic="float32"),
        lambda net, x, box, labels: net.ibp(box, from_center=True),
        lambda net, x, box, labels: net.ibp(box, clean=x, shrink=0.8),
        lambda net, x, box, labels: net.ibp_in_segments(box, {}, lambda box: None),
        lambda net, x, box, labels: net.margins(box, labels, arithmetic="float32"),
        lambda net, x, box, labels: net.margins(box, labels, "crown", max_memory=10**9),
        lambda net, x, box, labels: net.margins(box, labels, "alpha-crown", alpha=AlphaOptions(lr=0.1)),
    ],
)
def test_what_lirpa_cannot_answer_it_refuses_and_native_answers(question):
    x, labels = torch.rand(2, 4), torch.tensor([0, 1])
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    box = linf_box(x, 0.1)
    question(bounded_model(model, x), x, box, labels)
    with pytest.raises(UsageError, match="backend lirpa"):
        question(bounded_model(model, x, "lirpa"), x, box, labels)


def test_both_backends_take_the_same_arguments():
    questions = [name for name in vars(Bounder) if not name.startswith("_") and callable(vars(Bounder)[name])]
    assert len(questions) == 6
    for name in questions:
        expected = inspect.signature(getattr(Bounder, name))
        assert inspect.signature(getattr(BoundedModel, name)) == expected
        assert inspect.signature(getattr(LirpaModel, name)) == expected


def test_the_other_backend_does_not_search():
    model, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.rand(1, 4)
    net, labels = bounded_model(model, x, "lirpa"), torch.tensor([0])
    with pytest.raises(UsageError, match="does not search"):
        net.margins(linf_box(x, 0.1), labels, search=Search())
    with pytest.raises(UsageError, match="branch-and-bound"):
        net.margins(linf_box(x, 0.1), labels, "branch-and-bound")


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_both_backends_answer_alike(training):
    torch.manual_seed(0)
    images, labels = torch.rand(3, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 2, 4])
    box, answers = linf_box(images, 2 / 255), []
    for backend in ("native", "lirpa"):
        torch.manual_seed(1)
        model = randomized(narrow_cnn7()).double().train(training)
        net = bounded_model(model, images, backend)
        bounds = net.ibp(box, clean=images, record=True)
        found = [net.margins_of(bounds, labels, method) for method in ("ibp", "crown-ibp")]
        found += [net.margins(box, labels, method, clean=images) for method in ("ibp", "crown-ibp")]
        answers.append([*found, *(buffer.double() for buffer in model.buffers())])
    assert net.classes == 5
    for native, witness in zip(*answers, strict=True):
        torch.testing.assert_close(native, witness, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["ibp", "crown-ibp"])
def test_training_gives_the_same_losses(train, tmp_path, method):
    losses = {}
    for backend in ("native", "lirpa"):
        assert train(f"training.method={method}", f"backend={backend}", "--overwrite").code == 0
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        losses[backend] = [json.loads(line)["loss"] for line in lines]
    assert losses["lirpa"] == pytest.approx(losses["native"], rel=2e-3)  # float32, nine steps of Adam


def test_a_network_without_rules_here_trains_and_is_verified_through_it(train, tmp_path):
    network = ["model.name=tests.bounds.test_backend:with_sine", "model.options={}"]
    refused = train(*network)
    assert refused.code == 1
    assert "sin in module 'network.3'" in refused.error
    assert "backend: lirpa" in refused.error
    assert train(*network, "backend=lirpa").code == 0
    model = certtrain.load_model(tmp_path / "run", trust=True)
    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    box = linf_box(x, 0.05)
    output = bounded_model(model, x, backend="lirpa").ibp(box).output
    for _ in range(20):
        assert output.contains(model(box.lower + torch.rand_like(x) * (box.upper - box.lower)), 1e-5).all()


def test_whatever_is_asked_of_such_a_network_is_asked_of_it(train, cli, tmp_path, monkeypatch):
    """Its radii, and its errors before and after it is trained further."""
    network = ["model.name=tests.bounds.test_backend:with_sine", "model.options={}", "backend=lirpa"]
    assert train(*network).code == 0
    first = (tmp_path / "run").rename(tmp_path / "first")
    monkeypatch.setattr("certtrain.bounds.backends.BoundedModel", None)
    outcome = cli("verify", first, "--radius", "0.02", "--limit", "20", "--device", "cpu", "--trust-model")
    assert outcome.code == 0, outcome.err
    curve = json.loads((first / "radius.json").read_text())
    model, test = certtrain.load_model(first, trust=True), load_dataset("digits").test
    for index in (0, 50, 100):
        (result,) = certtrain.verify(model, test, curve["eps"][index], limit=20, backend="lirpa")
        assert curve["verified_error"][index] == result.verified_error
    assert curve["verified_error"][100] > 0
    assert curve["pgd_error"][-1] <= curve["verified_error"][-1]
    assert train(*network, f"start_from={first}", "--trust-model").code == 0
    measured = json.loads((tmp_path / "run" / "summary.json").read_text())["start"]
    expected = json.loads((first / "summary.json").read_text())
    assert measured["before"]["old"] == {name: expected[name] for name in ("natural_error", "verified_error")}


@pytest.mark.parametrize("setting", ["training.accumulation=2", "training.method.loss_fusion=true"])
def test_what_it_cannot_do_is_said_before_training(train, setting):
    outcome = train("backend=lirpa", "training.method=crown-ibp", setting)
    assert outcome.code == 2
    assert "lirpa" in outcome.error


def test_a_missing_auto_lirpa_says_how_to_install_it(train, monkeypatch):
    monkeypatch.setitem(sys.modules, "auto_LiRPA", None)  # which makes its import fail
    with pytest.raises(MissingDependency, match="pip install"):
        bounded_model(nn.Linear(2, 2), torch.rand(1, 2), backend="lirpa")
    outcome = train("backend=lirpa")
    assert outcome.code == 1
    assert "pip install" in outcome.error


def test_dropout_is_refused_since_its_bounds_are_not_sound():
    with pytest.raises(UnsupportedOperation, match="Dropout"):
        bounded_model(nn.Sequential(nn.Linear(2, 2), nn.Dropout()), torch.rand(1, 2), backend="lirpa")
