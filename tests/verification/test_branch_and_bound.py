"""Branch and bound against enumeration of activation patterns, and the properties its bounds must have."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import nn

from certtrain.bounds import BoundedModel, Box
from certtrain.bounds.linear import tightened
from certtrain.bounds.linear.beta import Ascent
from certtrain.verification.branch_and_bound import Search, Verdict, branch_and_bound


def small_network(seed: int, widths: tuple[int, ...], bias: float = 0.3) -> nn.Sequential:
    random = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for i, (entering, leaving) in enumerate(itertools.pairwise(widths)):
        layer = nn.Linear(entering, leaving).double()
        with torch.no_grad():
            layer.weight.copy_(torch.randn(leaving, entering, generator=random, dtype=torch.float64))
            layer.bias.copy_(bias * torch.randn(leaving, generator=random, dtype=torch.float64))
        layers += [layer] if i == len(widths) - 2 else [layer, nn.ReLU()]
    return nn.Sequential(*layers).eval()


def least_margins(network: nn.Sequential, box: Box, label: int) -> np.ndarray:
    """(K,) the exact minima of z_y - z_j, one linear program for each activation pattern."""
    affine = [(m.weight.detach().numpy(), m.bias.detach().numpy()) for m in network if isinstance(m, nn.Linear)]
    bounds = np.stack([box.lower[0].numpy(), box.upper[0].numpy()], 1)
    hidden = [len(bias) for _, bias in affine[:-1]]
    least = np.full(len(affine[-1][1]), np.inf)
    for pattern in itertools.product([0.0, 1.0], repeat=sum(hidden)):
        matrix, offset = np.eye(len(bounds)), np.zeros(len(bounds))
        rows, limits, start = [], [], 0
        for (weight, bias), count in zip(affine, hidden, strict=False):
            matrix, offset = weight @ matrix, weight @ offset + bias
            active = np.array(pattern[start : start + count])
            start += count
            sign = 1 - 2 * active  # z <= 0 where inactive, -z <= 0 where active
            rows.append(sign[:, None] * matrix)
            limits.append(-sign * offset)
            matrix, offset = active[:, None] * matrix, active * offset
        matrix, offset = affine[-1][0] @ matrix, affine[-1][0] @ offset + affine[-1][1]
        for j in range(len(least)):
            found = linprog(matrix[label] - matrix[j], np.concatenate(rows), np.concatenate(limits), bounds=bounds)
            if found.status == 2:
                break
            least[j] = min(least[j], found.fun + offset[label] - offset[j])
    return least


def question(network: nn.Module, box: Box, label: int) -> tuple:
    net = BoundedModel(network, box.center)
    labels = torch.tensor([label])
    with torch.no_grad():
        record = tightened(net.ibp(box, record=True).recorded, 1000)
        margins = net.margins(box, labels, "crown")
    return network, record, labels, margins


@given(seed=st.integers(0, 10**6), widths=st.sampled_from([(2, 4, 3), (3, 6, 2), (2, 3, 3, 3), (2, 4, 2, 2)]))
@settings(max_examples=25, deadline=None)
def test_verdicts_equal_enumeration(seed, widths):
    network = small_network(seed, widths)
    random = torch.Generator().manual_seed(seed)
    center = torch.rand(1, widths[0], generator=random, dtype=torch.float64)
    box = Box(center - 0.4, center + 0.4)
    label = int(network(center).argmax())
    least = np.delete(least_margins(network, box, label), label).min()
    search = Search(timeout=60, ascent=Ascent(steps=5), domains=8)
    (outcome,) = branch_and_bound(*question(network, box, label), search)
    if abs(least) < 1e-7:
        return
    assert outcome.verdict == (Verdict.PROVED if least > 0 else Verdict.ATTACKED), least
    if outcome.verdict == Verdict.PROVED:
        assert np.delete(outcome.lower.numpy(), label).min() <= least + 1e-9
    else:
        assert (outcome.point >= box.lower[0]).all()
        assert (outcome.point <= box.upper[0]).all()
        assert int(network(outcome.point[None]).argmax()) != label
