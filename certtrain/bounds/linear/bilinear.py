"""Planes below and above products of two values, and backward passes through them.

On a box of centre (c, d) and radii (r, s) both x·y >= (c ± r)·y + (d ± s)·x - (c ± r)(d ± s) (McCormick 1976), and so
is every convex combination of the two: with t between -1 and 1

    x·y >= (c + t·r)·y + (d + t·s)·x - c·d - r·s - t·(c·s + r·d)
    x·y <= (c + t·r)·y + (d - t·s)·x - c·d + r·s + t·(c·s - r·d)

In the middle of the box all of them have one value, cd ∓ rs, so that none is better before it is known what follows;
t = 0, by default, or what alpha-CROWN finds, for each element of x. Sums of such planes bound sums of products.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from certtrain.bounds.attention import attend, center_of
from certtrain.bounds.box import Box
from certtrain.bounds.graph import Call, Ref
from certtrain.bounds.interval import RULES as INTERVAL_RULES
from certtrain.bounds.linear.patches import Contributions, dot, through
from certtrain.bounds.linear.relaxations import RELAXATIONS
from certtrain.bounds.operations.products import einsum
from certtrain.errors import UnsupportedOperation

Product = Callable[[Tensor, Tensor], Tensor]  # linear in each of the two
Rule = Callable[[Call, Tensor, Mapping[int, Box], Tensor | None], tuple[Contributions, Tensor]]


def planes(product: Product, a: Tensor, x: Box, y: Box, t: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Lower bounds of a·product(x, y) as linear functions of x and y.

    Args:
        a: (B, R, ...) coefficients of the product; where they are negative the planes above count.
        t: (B, 1 or R, ...), of x's shape, from -1 to 1; None for 0.

    Returns:
        Coefficients of x (B, R, ...) and of y, and constants (B, R).
    """
    size = a.abs()
    of_x = _pulled(lambda v: product(v, y.center), x.like, a)
    of_y = _pulled(lambda v: product(x.center, v), y.like, a)
    constant = -dot(a, product(x.center, y.center)) - dot(size, product(x.radius, y.radius))
    if t is not None:
        across = _pulled(lambda v: product(v, y.radius), x.like, size)
        constant = constant - dot(t * of_x, x.radius) - dot(t * across, x.center)
        of_x = of_x + t * across
        of_y = of_y + torch.func.vmap(
            lambda row, slope: _vjp(lambda v: product(slope * x.radius, v), y.like)(row), in_dims=1, out_dims=1
        )(a, t.expand(-1, a.shape[1], *[-1] * (t.dim() - 2)))
    return of_x, of_y, constant


def _vjp(function: Callable[[Tensor], Tensor], at: Tensor) -> Callable[[Tensor], Tensor]:
    pull_back = torch.func.vjp(function, torch.zeros_like(at))[1]
    return lambda row: pull_back(row)[0]


def _pulled(function: Callable[[Tensor], Tensor], at: Tensor, a: Tensor) -> Tensor:
    return torch.func.vmap(_vjp(function, at), in_dims=1, out_dims=1)(a)


def _product(call: Call, a: Tensor, boxes: Mapping[int, Box], t: Tensor | None) -> tuple[Contributions, Tensor]:
    x, y, *settings = call.args
    if call.function is torch.mul and x == y:
        return _through(torch.square, x, a, boxes)
    of_x, of_y, constant = planes(
        lambda one, other: call.function(one, other, *settings), a, boxes[x.index], boxes[y.index], t
    )
    return [(x, of_x), (y, of_y)], constant


def _average(call: Call, a: Tensor, boxes: Mapping[int, Box], t: Tensor | None) -> tuple[Contributions, Tensor]:
    """Σ_j p_j v_j = m + Σ_j p_j (v_j - m), for any m, since the p_j sum to 1: planes of p_j (v_j - m) are closer."""
    p, v = call.args
    m = center_of(boxes[v.index])
    apart = Box.around(boxes[v.index].center - m, boxes[v.index].radius)
    of_p, of_v, constant = planes(torch.matmul, a, boxes[p.index], apart, t)
    constant = constant - dot(of_v, m.expand(apart.shape)) + dot(a, m.expand(a.shape[:1] + a.shape[2:]))
    return [(p, of_p), (v, of_v)], constant


def _quotient(call: Call, a: Tensor, boxes: Mapping[int, Box], t: Tensor | None) -> tuple[Contributions, Tensor]:
    """x / y as x · (1 / y), for y above 0."""
    x, y = call.args
    if not bool((boxes[y.index].lower > 0).all()):
        raise UnsupportedOperation(f"{call.where}: a divisor that is not above 0 everywhere has no linear relaxation")
    inverse = INTERVAL_RULES[torch.reciprocal](boxes[y.index])
    if isinstance(x, Ref):
        of_x, of_inverse, constant = planes(torch.mul, a, boxes[x.index], inverse, t)
        of_divisor, rest = _through(torch.reciprocal, y, of_inverse, boxes)
        return [(x, of_x), *of_divisor], constant + rest
    of_inverse = _pulled(lambda v: x * v, inverse.like, a)
    return _through(torch.reciprocal, y, of_inverse, boxes)


def _through(
    function: Callable[..., Tensor], ref: Ref, a: Tensor, boxes: Mapping[int, Box]
) -> tuple[Contributions, Tensor]:
    """An elementwise function of one value."""
    pulled, constant = through(RELAXATIONS[function](boxes[ref.index]), a)
    return [(ref, pulled)], constant


PRODUCTS: dict[Callable, Rule] = {
    torch.mul: _product,
    torch.matmul: _product,
    einsum: _product,
    attend: _average,
    torch.div: _quotient,
}
"""Of calls that are affine in no value alone: (call, a, boxes, t) -> contributions and constants."""
