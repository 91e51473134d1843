"""Products of two boxes: of single elements, and of matrices.

The product of two intervals lies between its values at their corners. A sum of such products, in which each factor
stands once, lies between the sums of those: that is exact, and takes memory for every single product. Where that is
too much the sums are bounded by products of whole matrices instead, see `centered`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import torch
from torch import Tensor

from certtrain.bounds.box import Box
from certtrain.bounds.operations.products import einsum, einsum_subscripts

MOST_CORNERS = 2**12  # single products of one image whose corners are looked at

Product = Callable[..., Tensor]  # (x, y, *settings): linear in each of the two


def corners(function: Product, x: Box, y: Box) -> Box:
    """Exact, of products that are not summed; `function` is one of them."""
    products = [function(one, other) for one in (x.lower, x.upper) for other in (y.lower, y.upper)]
    return Box(reduce(torch.minimum, products), reduce(torch.maximum, products))


def centered(function: Product, x: Box, y: Box) -> Box:
    """Of sums of products, by five of them: never looser than centre and radius alone.

    With centres c and d, radii r and s, and the parts of the centres within the radii, ρ = sign(c)·min(|c|, r) and σ
    likewise, x·y lies within |c|s + r(|d| + s) - |ρ||σ| of cd + ρσ. That is exact where either factor has one sign; of
    two that have not it has the end on the side of cd's sign exactly. (After Nguyen 2011, Efficient algorithms for
    verified scientific computing, section 2.4; Rump 1999 has neither ρ nor σ.)
    """
    c, r, d, s = x.center, x.radius, y.center, y.radius
    inner, other = torch.maximum(torch.minimum(c, r), -r), torch.maximum(torch.minimum(d, s), -s)
    center = function(c, d) + function(inner, other)
    radius = function(c.abs(), s) + function(r, d.abs() + s) - function(inner.abs(), other.abs())
    return Box.around(center, radius.clamp(min=0))


def product(x: Box, y: Box) -> Box:
    """Elementwise; the square where both are the very same value."""
    if x is y:
        return squared(x)
    return corners(torch.mul, x, y)


def squared(x: Box) -> Box:
    nearest = torch.zeros_like(x.lower).clamp(x.lower, x.upper)
    return Box(nearest.square(), torch.maximum(x.lower.square(), x.upper.square()))


def matrix_product(x: Box, y: Box) -> Box:
    """x @ y: exact, unless it has too many single products."""
    rows, inner, columns = x.shape[-2], x.shape[-1], y.shape[-1]
    count = torch.broadcast_shapes(x.shape[1:-2], y.shape[1:-2]).numel() * rows * inner * columns
    if count > MOST_CORNERS:
        return centered(torch.matmul, x, y)
    return corners(torch.mul, x.map(_as_rows), y.map(_as_columns)).map(_summed)


def _as_rows(x: Tensor) -> Tensor:
    return x.unsqueeze(-1)


def _as_columns(y: Tensor) -> Tensor:
    return y.unsqueeze(-3)


def _summed(products: Tensor) -> Tensor:
    return products.sum(-2)


def einsum_product(x: Box, y: Box, equation: str) -> Box:
    """As `matrix_product`, of any sum of products of one element each."""
    operands, output = einsum_subscripts(equation)
    inputs = ",".join(operands)
    every = output + "".join(sorted(set("".join(operands)) - set(output)))
    summed = tuple(range(len(output), len(every)))
    count = einsum(x.like[:1], y.like[:1], f"{inputs}->{every}").numel()
    if count > MOST_CORNERS:
        return centered(lambda one, other: einsum(one, other, equation), x, y)
    found = corners(lambda one, other: einsum(one, other, f"{inputs}->{every}"), x, y)
    return found.map(lambda products: products.sum(summed)) if summed else found


def quotient(x: Box, y: Box) -> Box:
    """x / y for y above 0 or below it; all numbers where an interval of y holds 0."""
    one_sign = (y.lower > 0) | (y.upper < 0)
    found = corners(torch.div, x, y)
    return Box(torch.where(one_sign, found.lower, -torch.inf), torch.where(one_sign, found.upper, torch.inf))
