"""How far an optimizer moves weights, and how its adaptive rates vary: what warmup is said to be for.

Functions of the optimizer's settings and state after a step; nothing is changed. (Liu et al. 2019, arXiv 1908.03265.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from certtrain.errors import UsageError

MEASURED = ("Adam", "AdamW", "RAdam", "SGD")
ADAPTIVE_FROM = 5.0  # ρ_t above which torch's RAdam adapts its step; in the paper 4


@dataclass(frozen=True)
class StepStatistics:
    """Of an optimizer's latest step, over all weights; None where it has no such thing, or does not keep it.

    effective_step_size: what the (bias-corrected) first moment is multiplied by: the learning rate, times the adaptive
    rate ψ = √(1 - β₂ᵗ) / (√v + ε) of Adam and its kin, times RAdam's rectification. The geometric mean over weights
    that a gradient has reached, since ψ spans many orders of magnitude (of a bias before BatchNorm it is huge).
    update_rms: root mean square of the weights' changes, decoupled weight decay left out.
    adaptive_rate_mean, adaptive_rate_variance: of ψ, over weights that a gradient has reached.
    adaptive_rate_log_variance: of ln ψ about its mean in each tensor: no matter the scale of a layer.
    rectification: r_t, whether or not the optimizer applies it; None while ρ_t is too small for an adaptive step.
    untouched: share of the weights that no gradient has reached, of which v is 0.
    """

    effective_step_size: float | None = None
    update_rms: float | None = None
    adaptive_rate_mean: float | None = None
    adaptive_rate_variance: float | None = None
    adaptive_rate_log_variance: float | None = None
    rectification: float | None = None
    untouched: float | None = None


def rectification(step: int, beta2: float) -> float | None:
    """RAdam's r_t after `step` steps (from 1), by which the variance of the adaptive rate is rectified.

    None while ρ_t, the length of the simple moving average that v amounts to, is at most ADAPTIVE_FROM: RAdam then
    takes steps along the momentum. (Liu et al. 2019, algorithm 2.)
    """
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * step * beta2**step / (1 - beta2**step)
    if length <= ADAPTIVE_FROM:
        return None
    return math.sqrt((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length))


def require_measured(optimizer: str) -> None:
    """Raises UsageError unless statistics of an optimizer of this name are known."""
    if optimizer not in MEASURED:
        raise UsageError(f"metrics: the steps of optimizer {optimizer} are not measured: {', '.join(MEASURED)} are")


@torch.no_grad()
def step_statistics(optimizer: torch.optim.Optimizer) -> StepStatistics:
    """What the latest step of an optimizer among MEASURED was like."""
    kind = type(optimizer).__name__
    require_measured(kind)
    moves = list(_sgd_moves(optimizer) if kind == "SGD" else _adaptive_moves(optimizer, kind == "RAdam"))
    if not moves:
        return StepStatistics()
    weights = sum(move.size for move in moves)
    updates = [move.squared_update for move in moves]
    steps = torch.cat([move.steps for move in moves])
    rates = [move.rates for move in moves if move.rates is not None]
    return StepStatistics(
        effective_step_size=steps.log().mean().exp().item() if len(steps) else None,
        update_rms=None if None in updates else math.sqrt(sum(filter(None, updates)) / weights),
        rectification=moves[0].rectification,
        **_rate_statistics(rates, weights) if rates else {},
    )


def _rate_statistics(rates: list[Tensor], weights: int) -> dict[str, float]:
    reached = torch.cat(rates)
    untouched = {"untouched": 1 - len(reached) / weights}
    if not len(reached):
        return untouched
    variance, mean = torch.var_mean(reached, correction=0)
    logarithms = torch.cat([rate.log() - rate.log().mean() for rate in rates if len(rate)])
    return untouched | {
        "adaptive_rate_mean": mean.item(),
        "adaptive_rate_variance": variance.item(),
        "adaptive_rate_log_variance": logarithms.square().mean().item(),
    }


@dataclass(frozen=True)
class _Move:
    """Of one parameter: its weights, the sum of their squared changes; step size and ψ of those that were reached."""

    size: int
    squared_update: float | None
    steps: Tensor
    rates: Tensor | None = None
    rectification: float | None = None


def _sgd_moves(optimizer: torch.optim.Optimizer) -> Iterator[_Move]:
    """Without momentum, and with Nesterov's, the change is a function of a gradient that is gone."""
    for group, parameter, state in _parameters(optimizer):
        momentum = state.get("momentum_buffer")
        squared = None
        if momentum is not None and not group["nesterov"]:
            squared = _sum_of_squares(group["lr"] * momentum.double())
        yield _Move(parameter.numel(), squared, torch.full((parameter.numel(),), group["lr"], dtype=torch.float64))


def _adaptive_moves(optimizer: torch.optim.Optimizer, rectifies: bool) -> Iterator[_Move]:
    for group, parameter, state in _parameters(optimizer):
        if "exp_avg_sq" not in state:
            continue  # no gradient yet
        step, (beta1, beta2) = int(state["step"]), group["betas"]
        second = state.get("max_exp_avg_sq", state["exp_avg_sq"]).double()
        corrected = math.sqrt(1 - beta2**step)
        # Adam adds eps to the corrected root of v, RAdam to the plain one
        rates = corrected / (second.sqrt() + group["eps"] * (1 if rectifies else corrected))
        term = rectification(step, beta2)
        factor = rates
        if rectifies:
            factor = torch.ones_like(rates) if term is None else term * rates
        size = group["lr"] * factor
        update = size * state["exp_avg"].double() / (1 - beta1**step)
        reached = second > 0
        yield _Move(parameter.numel(), _sum_of_squares(update), size[reached], rates[reached], term)


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[tuple[dict[str, Any], Tensor, Mapping[str, Any]]]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield group, parameter, optimizer.state.get(parameter, {})


def _sum_of_squares(values: Tensor) -> float:
    return values.square().sum().item()
