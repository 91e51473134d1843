"""Against PyTorch's own Adam."""

from __future__ import annotations

import sys
from subprocess import run

import pytest
import torch

from certtrain.bounds.linear.ascent import ProjectedAdam

QUESTION = """
import sys, torch
from torch import nn
from certtrain.bounds import BoundedModel, linf_box
torch.manual_seed(0)
net = BoundedModel(nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 3)).eval(), torch.zeros(1, 4))
net.margins(linf_box(torch.zeros(1, 4), 1.0), torch.zeros(1, dtype=torch.int64), "alpha-crown")
sys.exit("torch._dynamo" in sys.modules)
"""


def objective(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.sin() * 3).sum() - (a[:2] - b).square().sum() + b.sum()


FREE = (torch.tensor(-torch.inf), torch.tensor(torch.inf))


@pytest.mark.parametrize(
    "ends", [FREE, (torch.tensor(0.0), torch.tensor(torch.inf)), (-torch.arange(5), torch.ones(5))]
)
def test_steps_are_those_of_adam_with_a_projection(ends):
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(5, generator=generator, dtype=torch.float64).clamp(0, 0.2), torch.zeros(2).double()]
    ours, theirs = ([part.clone().requires_grad_() for part in start] for _ in range(2))
    ascent = ProjectedAdam(ours, [0.1, 0.05], [ends, FREE], 0.9)
    optimizer = torch.optim.Adam(
        [{"params": [theirs[0]], "lr": 0.1}, {"params": [theirs[1]], "lr": 0.05}], maximize=True
    )
    rates = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for _ in range(12):
        ascent.step(torch.autograd.grad(objective(*ours), ours))
        optimizer.zero_grad()
        objective(*theirs).backward()
        optimizer.step()
        rates.step()
        with torch.no_grad():
            theirs[0].clamp_(*ends)
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_a_parameter_without_a_gradient_stays():
    parts = [torch.ones(2), torch.ones(3)]
    ProjectedAdam(parts, [0.1, 0.1], [FREE] * 2, 1.0).step([torch.ones(2), None])
    assert (parts[0] > 1).all()
    assert torch.equal(parts[1], torch.ones(3))


@pytest.mark.slow
def test_bounding_an_image_does_not_load_pytorchs_compiler():
    assert run([sys.executable, "-c", QUESTION], check=False).returncode == 0
