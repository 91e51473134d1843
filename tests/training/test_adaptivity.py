"""Statistics of optimizer steps against the changes that torch makes, and against closed forms."""

from __future__ import annotations

import json
import math

import pytest
import torch

import certtrain
from certtrain.config import load_config
from certtrain.errors import UsageError
from certtrain.training.adaptivity import rectification, step_statistics
from tests.commands import one_thread
from tests.runs.comparing import Told, scalars


def optimizer_of(name, **arguments):
    """Two tensors of 12 and 3 weights, in two groups; the last of the second never has a gradient."""
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((3, 4), (3,))]
    groups = [{"params": [weight.requires_grad_()], "lr": lr} for weight, lr in zip(weights, (0.1, 0.02), strict=True)]
    return getattr(torch.optim, name)(groups, **arguments), weights


def gradients(weights, step):
    generator = torch.Generator().manual_seed(100 + step)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, dtype=torch.float64, generator=generator)
    weights[1].grad[2] = 0


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("Adam", {}),
        ("Adam", {"betas": (0.7, 0.8), "eps": 0.1, "amsgrad": True}),
        ("AdamW", {"weight_decay": 0.0, "eps": 1e-3}),
        ("RAdam", {}),
        ("RAdam", {"betas": (0.9, 0.99), "eps": 1e-2}),
        ("SGD", {"momentum": 0.9}),
    ],
)
def test_the_update_is_what_torch_did_to_the_weights(name, arguments):
    optimizer, weights = optimizer_of(name, **arguments)
    for step in range(1, 12):
        gradients(weights, step)
        before = [weight.detach().clone() for weight in weights]
        optimizer.step()
        changes = torch.cat([(w.detach() - b).flatten() for w, b in zip(weights, before, strict=True)])
        found = step_statistics(optimizer)
        assert found.update_rms == pytest.approx(changes.square().mean().sqrt().item(), rel=1e-9), step


def test_adaptive_rates_in_closed_form():
    """With the same gradient g in every step, v / (1 - β2^t) is g², and ψ is 1 / |g|."""
    optimizer, weights = optimizer_of("Adam", eps=0.0)
    sizes = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    for _ in range(5):
        weights[0].grad = torch.full((3, 4), 0.5, dtype=torch.float64)
        weights[1].grad = sizes * torch.tensor([1, -1, 0.0])
        optimizer.step()
    found = step_statistics(optimizer)
    rates = torch.tensor([2.0] * 12 + [1.0, 0.5], dtype=torch.float64)
    assert found.adaptive_rate_mean == pytest.approx(rates.mean().item())
    assert found.adaptive_rate_variance == pytest.approx(rates.var(correction=0).item())
    assert found.adaptive_rate_log_variance == pytest.approx(2 * (math.log(2) / 2) ** 2 / 14)
    assert found.untouched == pytest.approx(1 / 15)


@pytest.mark.parametrize("name", ["Adam", "RAdam", "SGD"])
def test_the_effective_step_size_of_equal_gradients(name):
    """ψ = 1 / |g|, so Adam's is lr / |g|, RAdam's that times r_t or plain lr, and SGD's lr."""
    optimizer, weights = optimizer_of(name, **({} if name == "SGD" else {"eps": 0.0}))
    for step in range(1, 8):
        for weight in weights:
            weight.grad = torch.full_like(weight, 0.25)
        optimizer.step()
        term = rectification(step, 0.999)
        factor = {"Adam": 4.0, "SGD": 1.0, "RAdam": 1.0 if term is None else 4.0 * term}[name]
        lr = 0.1 ** (12 / 15) * 0.02 ** (3 / 15)
        assert step_statistics(optimizer).effective_step_size == pytest.approx(lr * factor, rel=1e-9)


@pytest.mark.parametrize("beta2", [0.9, 0.99, 0.999])
def test_rectification_is_the_papers(beta2):
    """Algorithm 2, with the sums written out: ρ_t = ρ_∞ - 2tβ₂ᵗ / (1 - β₂ᵗ)."""
    limit = 2 / (1 - beta2) - 1
    for step in (1, 3, 5, 6, 7, 20, 1000, 100_000):
        rho = limit - 2 * step * beta2**step / (1 - beta2**step)
        if rho <= 5:
            assert rectification(step, beta2) is None
        else:
            term = (rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho)
            assert rectification(step, beta2) == pytest.approx(math.sqrt(term), rel=1e-12)
    assert rectification(10**6, beta2) == pytest.approx(1)
    assert [rectification(step, 0.999) is None for step in range(1, 8)] == [True] * 5 + [False] * 2


def test_what_is_not_kept_is_not_told():
    for arguments in ({}, {"momentum": 0.9, "nesterov": True}):
        optimizer, weights = optimizer_of("SGD", **arguments)
        gradients(weights, 1)
        optimizer.step()
        assert step_statistics(optimizer).update_rms is None
    with pytest.raises(UsageError, match="the steps of optimizer Adagrad are not measured: Adam, AdamW, RAdam, SGD"):
        step_statistics(optimizer_of("Adagrad")[0])


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_run_measures_itself_and_is_the_same(train, tmp_path, reference):
    run = tmp_path / "run"
    assert train("metrics.optimizer=true", "metrics.first_steps=5").code == 0
    assert (run / "model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()
    steps, epochs = read(run / "steps.jsonl"), read(run / "metrics.jsonl")
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5]
    for line in (*steps, *(epoch["optimizer"] for epoch in epochs)):
        assert line["effective_step_size"] > 0 < line["update_rms"]
        assert line["adaptive_rate_variance"] > 0
        assert 0 <= line["dead_relus"] <= 1
        assert 0 <= line["untouched"] < 1
    assert {key: steps[2][key] for key in epochs[0]["optimizer"]} == epochs[0]["optimizer"]
    assert [line["rectification"] is None for line in steps] == [True] * 5
    shown = scalars(run)
    assert [value for _, value in shown["optimizer/update_rms"]] == pytest.approx(
        [epoch["optimizer"]["update_rms"] for epoch in epochs]
    )
    assert len(shown["optimizer/rectification"]) == 2, "not yet after the first epoch"


def test_a_resumed_run_measures_each_step_once(train, tmp_path, reference):
    config = load_config(reference / "config.yaml", {"metrics.first_steps": 6})
    with one_thread():
        whole = certtrain.train(config, tmp_path / "whole", device="cpu")
        run = certtrain.train(config, tmp_path / "run", device="cpu", callbacks=[Told(("step", 4))])
        certtrain.train(out=run.folder, device="cpu", resume=True)
    assert read(run.folder / "steps.jsonl") == read(whole.folder / "steps.jsonl")


def test_an_optimizer_that_is_not_measured_is_refused_at_once(train, tmp_path):
    outcome = train("metrics.optimizer=true", "optimizer.name=Rprop")
    assert (outcome.code, "the steps of optimizer Rprop are not measured" in outcome.error) == (2, True)
    assert not (tmp_path / "run").exists()
