"""Lines of free slope: below the function, touching it, and of the slopes that its convex envelope has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from certtrain.bounds import Box
from certtrain.bounds.linear.free_slopes import FREE_SLOPES
from certtrain.bounds.linear.relaxations import RELAXATIONS
from certtrain.bounds.operations.record import OPERATIONS, at_settings
from tests.bounds.test_operations import SETTINGS, intervals

each_function = pytest.mark.parametrize("function", FREE_SLOPES, ids=lambda function: function.__name__)


def questions(function: Callable) -> Iterator[tuple[Box, tuple[Any, ...]]]:
    """Boxes (N, 1), one interval an image."""
    x = intervals(function).map(lambda end: end.T)
    return ((x, settings) for settings in SETTINGS.get(function, [()]))


def knots(function: Callable, settings: tuple[Any, ...], x: Box) -> list[Tensor]:
    """The ends and the kinks between them."""
    kinks = at_settings(OPERATIONS[function].curve.kinks, *settings)
    kinks = [torch.as_tensor(kink, dtype=torch.float64) for kink in kinks]
    return [x.lower, *(kink.clamp(x.lower, x.upper) for kink in kinks), x.upper]


def of_no_narrow_piece(function: Callable, settings: tuple[Any, ...], x: Box) -> Tensor:
    """(N,), where the width of every piece is visible in float64, and some are there."""
    pieces = torch.stack([high - low for low, high in pairwise(knots(function, settings, x))])
    return ((pieces == 0) | (pieces.abs() > 1e-3)).all(0).flatten() & (x.upper - x.lower > 1e-3).flatten()


def points_in(x: Box) -> list[Tensor]:
    shares = torch.linspace(0, 1, 101, dtype=torch.float64)
    return [(x.lower + share * (x.upper - x.lower)).clamp(x.lower, x.upper) for share in shares]


@each_function
def test_lines_of_any_free_slope_are_below_the_function_and_touch_it(function):
    generator = torch.Generator().manual_seed(0)
    for x, settings in questions(function):
        free = FREE_SLOPES[function](x, *settings)
        shares = torch.cat([torch.tensor([0.0, 1.0]), torch.rand(6, generator=generator)]).double()
        slopes = (free.low + shares * (free.high - free.low))[:, :, None]  # (N, 8, 1)
        offsets = torch.zeros_like(slopes) if free.offset(slopes) is None else free.offset(slopes)
        least = torch.full_like(slopes, torch.inf)
        for point in [*points_in(x), *knots(function, settings, x)]:
            value, line = function(point, *settings)[:, None], slopes * point[:, None] + offsets
            gap = (value - line) / (1 + value.abs() + (slopes * point[:, None]).abs())
            assert (gap >= -1e-9).all()
            least = torch.minimum(least, gap)
        assert least.max() < 1e-9


def convex_envelope(points: list[float], values: list[float]) -> list[tuple[float, float]]:
    """The lower hull of points in increasing order. (Andrew 1979.)"""
    hull: list[tuple[float, float]] = []
    for p, v in zip(points, values, strict=True):
        while len(hull) > 1 and (hull[-1][0] - hull[-2][0]) * (v - hull[-2][1]) <= (hull[-1][1] - hull[-2][1]) * (
            p - hull[-2][0]
        ):
            hull.pop()
        hull.append((p, v))
    return hull


@each_function
def test_free_slopes_are_those_of_the_convex_envelope(function):
    for x, settings in questions(function):
        free = FREE_SLOPES[function](x, *settings)
        for i in of_no_narrow_piece(function, settings, x).nonzero().flatten().tolist()[::7]:
            points = torch.stack(knots(function, settings, x))[:, i, 0].unique()
            values = function(points[:, None], *settings)[:, 0]
            hull = convex_envelope(points.tolist(), values.tolist())
            slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(hull)]
            assert free.low[i, 0].item() == pytest.approx(slopes[0], rel=1e-6, abs=1e-6)
            assert free.high[i, 0].item() == pytest.approx(slopes[-1], rel=1e-6, abs=1e-6)


@each_function
def test_the_relaxation_is_nowhere_above_the_line_of_the_nearest_free_slope(function):
    for x, settings in questions(function):
        free, lines = FREE_SLOPES[function](x, *settings), RELAXATIONS[function](x, *settings)
        nearest = lines.lower_slope.clamp(free.low, free.high)
        offset = free.offset(nearest[:, None])
        offset = torch.zeros_like(nearest) if offset is None else offset[:, 0]
        for end in (x.lower, x.upper):
            better = nearest * end + offset - lines.below(end)
            assert (better >= -1e-6 * (1 + end.abs())).all()


def test_what_is_straight_or_bends_downwards_leaves_no_choice():
    x = Box(torch.tensor([[7.0, -9.0, 1.0, -2.0]]).double(), torch.tensor([[9.0, -7.0, 5.0, 3.0]]).double())
    for function, settings in ((F.relu6, ()), (F.relu, ()), (F.hardtanh, (-20.0, -10.0))):
        free = FREE_SLOPES[function](x, *settings)
        assert torch.equal(free.low[:, :3], free.high[:, :3])
    concave = FREE_SLOPES[F.leaky_relu](x, 2.0)
    assert torch.equal(concave.low, concave.high)


def test_offsets_of_slopes_have_a_gradient():
    """That of -slope·x at the place where the line touches."""
    free = FREE_SLOPES[torch.abs](Box(torch.tensor([[-1.0]]), torch.tensor([[2.0]])))
    slope = torch.tensor([[[-0.5], [0.5], [1.5]]], requires_grad=True)
    offset = free.offset(slope)
    assert offset is not None
    (gradient,) = torch.autograd.grad(offset.sum(), slope)
    assert offset.flatten().tolist() == [0.0, 0.0, -1.0]
    assert gradient.flatten().tolist() == [0.0, 0.0, -2.0]
