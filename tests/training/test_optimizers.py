"""Which parameters an optimizer gets, in which group; its learning rate from a configuration."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from certtrain.config.schema import OptimizerSection
from certtrain.errors import UsageError
from certtrain.runs.checkpoint import load_checkpoint
from certtrain.runs.progress import ProgressDisplay
from certtrain.training.optimizers import build_optimizer, build_rate
from tests.commands import signal_at
from tests.config.refused import check_refused
from tests.networks import narrow_cnn7

MUON_ONLY = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
MUON = pytest.param("Muon", marks=MUON_ONLY)


@pytest.mark.parametrize("name", ["AdamW", "RAdam", "NAdam", "SGD", MUON])
def test_batch_norm_and_biases_do_not_decay_where_that_is_asked_for(name):
    """A step without gradient shrinks what decays, and nothing else."""
    model = narrow_cnn7()
    section = OptimizerSection(name=name, lr=0.1, decay_vectors=False, arguments={"weight_decay": 0.5})
    optimizer = build_optimizer(section, model)
    before = {key: value.clone() for key, value in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for key, value in model.named_parameters():
        assert torch.equal(value, before[key]) == (value.dim() == 1), key


def orthogonalized(matrix: Tensor) -> Tensor:
    """Muon's quintic iteration: five times aX + (bA + cA²)X with A = XXᵀ, of the wide form divided by its norm."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


@MUON_ONLY
def test_muon_takes_hidden_matrices_and_adamw_the_rest():
    """One step: 0.2·√(larger side)·orthogonalized gradient (in bfloat16), or ± the rate; decay 0.1 of the rate."""
    model, lr = narrow_cnn7(), 0.01
    optimizer = build_optimizer(OptimizerSection(name="Muon", lr=lr), model)
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    (hidden,) = [key for key, value in before.items() if value.dim() == 2][:-1]
    for key, value in model.named_parameters():
        if key == hidden:
            step = 0.2 * max(value.shape) ** 0.5 * orthogonalized(value.grad)
            torch.testing.assert_close(value, before[key] * (1 - 0.1 * lr) - lr * step, rtol=0, atol=0.05 * lr)
        else:
            expected = before[key] * (1 - 0.01 * lr) - lr * value.grad.sign()
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-4 * lr)


class Reversed(nn.Module):
    """Its layers are registered from the last to the first, and a matrix that no layer multiplies by at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier, self.body = nn.Linear(6, 3), nn.Linear(5, 6)
        self.weight, self.scale = nn.Parameter(torch.rand(5, 4)), nn.Parameter(torch.rand(1, 6))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.body(torch.relu(F.linear(x, self.weight))))
        return self.classifier(hidden * self.scale)


@MUON_ONLY
@pytest.mark.parametrize(
    ("model", "hidden"),
    [
        (Reversed(), {"weight", "body.weight"}),
        (nn.Sequential(nn.Linear(4, 5), nn.ReLU(), weight_norm(nn.Linear(5, 5)), nn.Linear(5, 2)), {"0.weight"}),
        (
            nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0), nn.Flatten(), nn.Linear(8, 2)),
            {f"0.{name}weight" for name in ("self_attn.in_proj_", "self_attn.out_proj.", "linear1.", "linear2.")},
        ),
    ],
    ids=["reversed", "parametrized", "attention"],
)
def test_hidden_matrices_are_what_layers_before_the_classifier_multiply_by(model, hidden):
    groups = build_optimizer(OptimizerSection(name="Muon"), model).param_groups
    taken = {id(parameter) for group in groups if group["optimizer"] == "Muon" for parameter in group["params"]}
    assert {name for name, parameter in model.named_parameters() if id(parameter) in taken} == hidden


@MUON_ONLY
def test_muon_needs_a_hidden_linear_layer():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    with pytest.raises(UsageError, match=r"optimizer\.name: Muon is for weights of hidden linear layers"):
        build_optimizer(OptimizerSection(name="Muon"), model)


@pytest.mark.parametrize("name", ["RAdam", MUON])
def test_a_resumed_run_is_the_uninterrupted_one(train, tmp_path, monkeypatch, name):
    options = [f"optimizer.name={name}", "optimizer.vector_factor=0.5", "optimizer.decay_vectors=false"]
    assert train(*options).code == 0
    whole = (tmp_path / "run" / "model.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(ProgressDisplay, "after_step", signal_at(4))
        assert train("--overwrite", *options).code == 130
    assert train("--resume").code == 0
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == whole


def test_by_default_everything_is_one_group():
    model = narrow_cnn7()
    (group,) = build_optimizer(OptimizerSection(), model).param_groups
    assert list(map(id, group["params"])) == list(map(id, model.parameters()))


@pytest.mark.parametrize("arguments", [{"momentun": 0.9}, {"betas": [2, 0.9]}])
def test_arguments_that_torch_refuses_are_a_usage_error(arguments):
    with pytest.raises(UsageError, match=r"optimizer\.arguments"):
        build_optimizer(OptimizerSection(arguments=arguments), narrow_cnn7())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1, 1, 1, 1, 1, 1, 1, 1]),
        ({"milestones": [1, 3]}, [1, 1, 0.2, 0.2, 0.2, 0.2, 0.04, 0.04]),
        ({"milestones": [1], "milestones_from": "ramp"}, [1, 1, 1, 1, 1, 1, 0.2, 0.2]),
        ({"schedule": {"name": "linear"}, "warmup_epochs": 1}, [0.5, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ({"schedule": "cooldown"}, [1, 1, 1, 1, 1, 1, 1, 0.5]),
        (
            {"schedule": {"name": "infinite", "level": 0.4, "length": 0.25}, "warmup_epochs": 1, "warmup_start": 0.5},
            [0.75, 1, 1, 0.7, 0.4, 0.4, 0.4, 0.2],
        ),
        (
            {"schedule": {"name": "inverse-root", "timescale_epochs": 2}},
            [1, 1, 1, 1, 1, *((4 / s) ** 0.5 for s in (5, 6, 7))],
        ),
    ],
)
def test_the_rate_of_a_configuration(options, expected):
    """Four epochs of two steps, of which epsilon grows in the first two."""
    rate = build_rate(OptimizerSection(lr=1.0, **options), steps_per_epoch=2, epochs=4, ramp_end=4)
    assert [rate(step) for step in range(8)] == pytest.approx(expected)


def test_a_run_follows_its_schedule_and_vectors_have_a_rate_of_their_own(train, tmp_path):
    """Three epochs of three steps: the last steps of each are 2, 5 and 8 of 9."""
    options = [
        "optimizer.lr=0.003",
        "optimizer.milestones=[]",
        "optimizer.schedule=linear",
        "optimizer.vector_factor=2",
    ]
    assert train(*options).code == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["lr"] for line in lines] == pytest.approx([0.003 * (1 - s / 9) for s in (2, 5, 8)])
    state = load_checkpoint(tmp_path / "run" / "last.ckpt")["trainer"]["optimizer"]
    weights, vectors = state["param_groups"]
    assert vectors["lr"] == pytest.approx(2 * weights["lr"])


def test_a_network_may_be_trained_at_a_larger_radius_than_it_is_tested_at(train, tmp_path):
    assert train("epsilon.train_factor=1.5").code == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["eps"] == pytest.approx(0.15)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["eps"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.schedule=cosin"], r"optimizer\.schedule: unknown schedule 'cosin': did you mean cosine"),
        (
            ["optimizer.schedule={name: cosine, length: 0.1}"],
            r"unknown key .*: it belongs to optimizer\.schedule cooldown",
        ),
        (["optimizer.schedule={name: cosine, final: 2}"], r"optimizer\.schedule\.final: .*less than or equal to 1"),
        (["optimizer.warmup_epochs=61"], r"optimizer\.warmup_epochs: 61 of 60 epochs"),
        (["optimizer.milestones_from=ramp"], r"optimizer\.milestones: 76 is not before the end"),
        (["epsilon.train_factor=11"], r"epsilon\.train_factor: 11 times max is above 1"),
    ],
)
def test_what_is_wrong_is_said(overrides, message):
    check_refused(overrides, message)
