"""`register_operation`, as docs/extending.md shows it to somebody who has read nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from certtrain.bounds import (
    BoundedModel,
    Box,
    LinearRelaxation,
    PiecewiseLinear,
    interval,
    linf_box,
    register_operation,
)
from certtrain.bounds.linear import free_slopes, relaxations
from certtrain.bounds.operations.record import FUNCTIONS, METHODS, MODULES, OPERATIONS
from certtrain.bounds.rounding.table import RULES as SOUND
from certtrain.errors import UnsupportedOperation, UsageError
from tests.bounds.random_networks import points_of

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
LABELS = torch.tensor([0, 1, 2])


@pytest.fixture(autouse=True)
def _tables_come_back():
    tables = [OPERATIONS, FUNCTIONS, METHODS, MODULES]
    tables += [interval.RULES, relaxations.RELAXATIONS, free_slopes.FREE_SLOPES, SOUND]
    before = [dict(table) for table in tables]
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


def softsign_network() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Softsign(), nn.Linear(6, 3)).double()
    return model, torch.rand(3, 4, dtype=torch.float64)


def assert_holds(model: nn.Module, x: Tensor, *methods: str) -> None:
    box = linf_box(x, 0.3, clip=None)
    net = BoundedModel(model, x)
    with torch.no_grad():
        margins = [net.margins(box, LABELS, method, intersect=False) for method in methods]
        for point in points_of(box, 50, torch.Generator().manual_seed(0)):
            logits = model(point)
            assert all((logits.gather(1, LABELS[:, None]) - logits >= found - 1e-9).all() for found in margins)


def test_the_pages_example_works_in_under_20_lines():
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) < 20
    OPERATIONS.pop(F.elu)
    MODULES.pop(nn.ELU)
    for function in (F.elu, F.elu_):
        FUNCTIONS.pop(function)
    for table in (interval.RULES, relaxations.RELAXATIONS):
        table.pop(F.elu)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ELU(0.7), nn.Linear(6, 3)).double()
    x = torch.rand(3, 4, dtype=torch.float64)
    with pytest.raises(UnsupportedOperation, match="ELU"):
        BoundedModel(model, x)
    exec(code, {})
    assert_holds(model, x, "ibp", "crown-ibp", "crown", "alpha-crown")


def test_without_a_linear_rule_crown_refuses_the_operation_by_name():
    model, x = softsign_network()
    register_operation(F.softsign, lambda input: (input,), modules={nn.Softsign: lambda m: ()}, increasing=True)
    assert_holds(model, x, "ibp")
    with pytest.raises(UnsupportedOperation, match=r"Softsign in module '1' has no linear relaxation"):
        BoundedModel(model, x).margins(linf_box(x, 0.1), LABELS, "crown-ibp")
    with pytest.raises(UnsupportedOperation, match=r"Softsign in module '1' has no sound rule"):
        BoundedModel(model, x).ibp(linf_box(x, 0.1), arithmetic="float32")


def test_rules_of_ones_own_are_used():
    model, x = softsign_network()

    def constant_lines(box: Box) -> LinearRelaxation:
        zero = torch.zeros_like(box.lower)
        return LinearRelaxation(zero, F.softsign(box.lower), zero, F.softsign(box.upper))

    register_operation(
        F.softsign,
        lambda input: (input,),
        modules={nn.Softsign: lambda m: ()},
        interval_rule=lambda box: Box(F.softsign(box.lower), F.softsign(box.upper)),
        relaxation=constant_lines,
    )
    assert_holds(model, x, "ibp", "crown-ibp", "crown")
    net, box = BoundedModel(model, x), linf_box(x, 0.3)
    torch.testing.assert_close(net.margins(box, LABELS, "crown-ibp", intersect=False), net.margins(box, LABELS))


def test_what_is_missing_is_said():
    with pytest.raises(UsageError, match="softsign needs an interval_rule"):
        register_operation(F.softsign, lambda input: (input,))
    with pytest.raises(UsageError, match="incresing"):
        register_operation(F.softsign, lambda input: (input,), incresing=True)
    assert F.softsign not in OPERATIONS


def test_a_piecewise_linear_curve_leaves_the_slope_below_free():
    """Softshrink is straight but at -0.5 and 0.5, and convex right of -0.5."""
    bind, curve = (lambda input, lambd=0.5: (input, lambd)), PiecewiseLinear(lambda lambd: (-lambd, lambd))
    register_operation(F.softshrink, bind, elementwise=True, increasing=True, curve=curve)
    free = free_slopes.FREE_SLOPES[F.softshrink](Box(torch.tensor([[-0.25]]), torch.tensor([[1.5]])), 0.5)
    assert (free.low.item(), free.high.item()) == (0.0, 1.0)
    assert free.offset(torch.tensor([[[0.5]]])).item() == pytest.approx(-0.25)
    register_operation(F.softshrink, bind, elementwise=True, increasing=True)
    assert F.softshrink not in free_slopes.FREE_SLOPES
