"""The last resort of branch and bound: a domain on which the network is affine, as a linear program."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor

from certtrain.bounds.linear.backward import linear_bounds
from certtrain.bounds.linear.beta import DomainBatch
from certtrain.bounds.linear.patches import Coefficients, dense


@dataclass(frozen=True)
class ExactLeaf:
    """point: (...) where the function is least on the domain, None where that is empty; multipliers: (S,), the dual
    solution, which proves as much as there is to prove; None where the solver failed, or had nothing to solve."""

    point: Tensor | None
    multipliers: Tensor | None


def exact_leaf(batch: DomainBatch, slopes: Tensor) -> ExactLeaf:
    """Minimise the function of a batch of one domain, whose neurons are all decided, by HiGHS.

    Where the domain is empty the multipliers are those that show it: of the least violation t with which all
    constraints can be met, scaled until they lift the bound above 0. Where values overflow there is no program.
    """
    zero = slopes.new_zeros(1, batch.splits.neuron.shape[1])
    objective = batch.linear_bounds(slopes, zero)
    cost = _row(objective.coefficients, batch)
    constraints, offsets = _constraints(batch)
    box = batch.record.boxes[0]
    bounds = np.stack([_numpy(box.lower[0]).ravel(), _numpy(box.upper[0]).ravel()], 1)
    if not all(np.isfinite(part).all() for part in (cost, constraints, offsets, bounds)):
        return ExactLeaf(None, None)
    found = linprog(cost, constraints, -offsets, bounds=bounds, method="highs")
    if found.status == 0:
        point = torch.from_numpy(found.x).to(box.like).view(box.shape[1:]).clamp(box.lower[0], box.upper[0])
        return ExactLeaf(point, _multipliers(found, 1.0, slopes))
    violated = linprog(
        np.append(np.zeros_like(cost), 1.0),
        np.hstack([constraints, -np.ones((len(constraints), 1))]),
        -offsets,
        bounds=[*bounds.tolist(), (0, None)],
        method="highs",
    )
    if violated.status != 0 or violated.fun <= 0:
        return ExactLeaf(None, None)
    lowest = float(objective.least())
    return ExactLeaf(None, _multipliers(violated, 2 * (1 + abs(lowest)) / violated.fun, slopes))


def _constraints(batch: DomainBatch) -> tuple[np.ndarray, np.ndarray]:
    """Rows and offsets of the splits: row·x + offset <= 0."""
    rows, offsets = [], []
    neuron, sign, threshold = (part[0] for part in (batch.splits.neuron, batch.splits.sign, batch.splits.threshold))
    for i in range(len(neuron)):
        one = torch.zeros_like(batch.box.lower).index_fill(1, neuron[i : i + 1], float(sign[i]))
        functions: dict[int, Coefficients] = {index: part[:, None] for index, part in batch.neurons.parts(one).items()}
        found = linear_bounds(batch.record, functions)
        rows.append(_row(found.coefficients, batch))
        offsets.append(float(found.constant) - float(sign[i] * threshold[i]))
    width = batch.record.boxes[0].shape[1:].numel()
    return np.array(rows).reshape(-1, width), np.array(offsets)


def _row(coefficients: Coefficients | None, batch: DomainBatch) -> np.ndarray:
    if coefficients is None:
        return np.zeros(batch.record.boxes[0].shape[1:].numel())
    return _numpy(dense(coefficients)[0, 0]).ravel()


def _multipliers(solution: object, scale: float, like: Tensor) -> Tensor:
    dual = -np.asarray(solution.ineqlin.marginals) * scale  # type: ignore[attr-defined]
    return torch.from_numpy(dual).to(like).clamp(min=0)


def _numpy(values: Tensor) -> np.ndarray:
    return values.detach().double().cpu().numpy()
