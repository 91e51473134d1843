"""Regularizers against the published formulas, evaluated naively in numpy; also on boxes of auto_LiRPA."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from certtrain.bounds import Box, linf_box
from certtrain.bounds.lirpa import LirpaModel
from certtrain.errors import UsageError
from certtrain.regularizers import Moments, l1_penalty, moments, relu_balance_loss, relu_balance_of, tightness_loss
from tests.networks import narrow_cnn7, randomized


def boxes(seed: int = 0) -> list[Box]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for shape, shift in (((4, 3, 5), 0.0), ((4, 7), 0.7), ((4, 2, 2), -1.5)):
        center = shift + torch.randn(shape, generator=generator, dtype=torch.float64)
        found.append(Box.around(center, torch.rand(shape, generator=generator, dtype=torch.float64)))
    return found


def published_tightness(relu_inputs: list[Box], input_box: Box, tol: float) -> float:
    r0 = input_box.radius.detach().numpy().mean()
    return float(np.mean([max(0.0, tol - r0 / box.radius.detach().numpy().mean()) / tol for box in relu_inputs]))


def published_balance(relu_inputs: list[Box], tol: float) -> float:
    values = []
    for box in relu_inputs:
        lower, upper = box.lower.detach().numpy(), box.upper.detach().numpy()
        c = (lower + upper) / 2
        active, inactive = c[lower > 0], c[upper < 0]
        if not len(active) or not len(inactive):
            values.append(0.0)
            continue
        rho = active.sum() / -inactive.sum()
        nu = ((active - c.mean()) ** 2).sum() / ((inactive - c.mean()) ** 2).sum()
        values.append((max(0, tol - min(rho, 1 / rho)) + max(0, tol - min(nu, 1 / nu))) / tol)
    return float(np.mean(values))


@pytest.mark.parametrize("tol", [0.5, 0.9])
def test_losses_equal_the_published_formulas(tol):
    relu_inputs = boxes()
    input_box = Box.around(torch.zeros(4, 3).double(), torch.full((4, 3), 0.1, dtype=torch.float64))
    assert tightness_loss(relu_inputs, input_box, tol).item() == pytest.approx(
        published_tightness(relu_inputs, input_box, tol), rel=1e-7
    )
    expected = published_balance(relu_inputs, tol)
    assert 0 < expected < 2
    assert relu_balance_loss(relu_inputs, tol).item() == pytest.approx(expected, rel=1e-9)


def test_tightness_by_hand():
    """Radii 1 at the input, 4 and 1 before the ReLUs: (0.5 - 0.25)/0.5 and 0."""

    def of(radius):
        return Box.around(torch.zeros(2, 2), torch.full((2, 2), radius))

    assert tightness_loss([of(4.0), of(1.0)], of(1.0)).item() == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("lower", "upper"),
    [
        ([0.5, 1.0], [1.0, 2.0]),
        ([-2.0, -3.0], [-1.0, -0.5]),
        ([-1.0, -1.0], [1.0, 1.0]),
        ([0.0, 0.0], [0.0, 0.0]),
    ],
    ids=["none inactive", "none active", "all unstable", "all zero"],
)
def test_a_layer_without_both_states_contributes_nothing_and_no_gradient(lower, upper):
    lower, upper = (torch.tensor([values], requires_grad=True) for values in (lower, upper))
    other = boxes()[0]
    loss = relu_balance_loss([Box(lower, upper), other])
    assert loss.item() == pytest.approx(relu_balance_loss([other]).item() / 2)
    (gradient,) = torch.autograd.grad(loss, lower)
    assert (gradient == 0).all()


def test_gradients_equal_finite_differences():
    leaves = [(box.lower.clone().requires_grad_(), box.upper.clone().requires_grad_()) for box in boxes()]
    input_box = Box.around(torch.zeros(2, dtype=torch.float64), torch.full((2,), 0.1, dtype=torch.float64))

    def loss(*ends):
        made = [Box(lower, upper) for lower, upper in zip(ends[::2], ends[1::2], strict=True)]
        return tightness_loss(made, input_box) + relu_balance_loss(made)

    assert torch.autograd.gradcheck(loss, [end for pair in leaves for end in pair], eps=1e-7)


def test_moments_of_parts_add_up_and_carry_the_parts_gradient():
    box = boxes()[0]
    lower = box.lower.clone().requires_grad_()
    whole = relu_balance_of([moments(Box(lower, box.upper))], 0.9)
    (expected,) = torch.autograd.grad(whole, lower)
    parts = [Box(lower[i : i + 2], box.upper[i : i + 2]) for i in (0, 2)]
    total = Moments.plus(*(moments(part.detach()) for part in parts))
    for part in parts:
        value = relu_balance_of([moments(part).completed_by(total)], 0.9)
        assert value.item() == pytest.approx(whole.item())
        value.backward()
    torch.testing.assert_close(lower.grad, expected)


def test_they_take_boxes_that_auto_lirpa_computed():
    model = randomized(narrow_cnn7()).double().eval()
    x = torch.rand(4, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    bounds = LirpaModel(model, x).ibp(linf_box(x, 8 / 255))
    loss = tightness_loss(bounds.relu_inputs, bounds.affine_input)
    assert loss.item() == pytest.approx(published_tightness(list(bounds.relu_inputs), bounds.affine_input, 0.5))
    balance = relu_balance_loss(bounds.relu_inputs)
    assert balance.item() == pytest.approx(published_balance(list(bounds.relu_inputs), 0.5))
    (loss + balance).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert any((p.grad != 0).any() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    "regularizer", [lambda: tightness_loss([], boxes()[0]), lambda: relu_balance_loss([]), lambda: l1_penalty(iter(()))]
)
def test_of_nothing_they_are_no_number(regularizer):
    with pytest.raises(UsageError, match="a regularizer needs at least one"):
        regularizer()


def test_l1_penalty_sums_absolute_values():
    assert l1_penalty([torch.tensor([1.0, -2.0]), torch.tensor([[-0.5]])]).item() == 3.5


@pytest.mark.parametrize("tol", [0, 0.0, -0.5, float("nan")])
@pytest.mark.parametrize(
    "regularizer", [lambda tol: tightness_loss(boxes(), boxes()[0], tol), lambda tol: relu_balance_loss(boxes(), tol)]
)
def test_a_tolerance_is_above_0(regularizer, tol):
    with pytest.raises(UsageError, match="tol must be above 0"):
        regularizer(tol)
