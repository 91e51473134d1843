"""Which rule of `rules`, `attention` and `normalization` an operation has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from certtrain.bounds.attention import attend
from certtrain.bounds.normalization import deviation, inverse_root, normalized
from certtrain.bounds.operations.arithmetic import add, sub
from certtrain.bounds.operations.joining import cat
from certtrain.bounds.operations.movement import cast
from certtrain.bounds.operations.pooling import resize
from certtrain.bounds.operations.products import WEIGHTED, einsum
from certtrain.bounds.operations.record import OPERATIONS
from certtrain.bounds.rounding import attention, normalization, rules
from certtrain.bounds.rounding.arithmetic import Arithmetic
from certtrain.bounds.rounding.boxes import OutwardBox
from certtrain.bounds.rounding.rules import Rule

EXACT = {function for function, operation in OPERATIONS.items() if operation.reshaping} - {cast}
EXACT_METHODS = {"t", "expand", "expand_as", "repeat"}
"""Of constants; values have no rule for them."""

COMPARING = (
    F.relu,
    F.relu6,
    F.max_pool1d,
    F.max_pool2d,
    F.max_pool3d,
    F.adaptive_max_pool1d,
    F.adaptive_max_pool2d,
    torch.amax,
    torch.amin,
)
"""What returns one of its elements, or a constant that every arithmetic has."""


def _unless_two_values(rule: Rule, of_two: Rule) -> Rule:
    def either(a: Arithmetic, x: Any, y: Any, *settings: Any) -> OutwardBox:
        return (of_two if isinstance(x, OutwardBox) and isinstance(y, OutwardBox) else rule)(a, x, y, *settings)

    return either


def _product(function: Callable[..., Any], terms_of: Callable[..., int]) -> Rule:
    of_two = attention.product_of_two(function, terms_of)
    return _unless_two_values(rules.product_with_constant(function, terms_of), of_two)


RULES: dict[Callable, Callable[..., Any]] = {  # each a Rule, but BatchNorm's returns its sums as well
    **{function: rules.weighted(function) for function in WEIGHTED},
    torch.matmul: _product(torch.matmul, rules.matmul_terms),
    einsum: _product(einsum, rules.einsum_terms),
    **{function: rules.exact(function) for function in EXACT},
    **{function: rules.monotone(function) for function in COMPARING},
    **{
        function: rules.averaging(function, rules.kernel_terms)
        for function in (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
    },
    **{
        function: rules.averaging(function, rules.adaptive_terms)
        for function in (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
    },
    **{function: rules.averaging(function, rules.reduced_terms) for function in (torch.Tensor.mean, torch.Tensor.sum)},
    F.batch_norm: rules.batch_norm,
    F.leaky_relu: rules.leaky_relu,
    F.prelu: rules.prelu,
    **{function: rules.clamped(function) for function in (torch.clamp, F.hardtanh)},
    torch.abs: rules.absolute,
    **{function: rules.extremum(function) for function in (torch.maximum, torch.minimum)},
    **{function: rules.root(function) for function in (torch.sqrt, torch.rsqrt, torch.reciprocal)},
    F.hardsigmoid: rules.hard(F.hardsigmoid, lambda size: (size + 3) / 6),
    F.hardswish: rules.hard(F.hardswish, lambda size: size * (size + 3) / 6),
    resize: rules.resized,
    F.pad: rules.pad,
    cast: rules.cast,
    add: rules.add,
    sub: lambda a, x, y, alpha=1: rules.add(a, x, y, -alpha),
    torch.mul: _unless_two_values(rules.mul, attention.elementwise_product),
    torch.div: _unless_two_values(rules.div, attention.no_quotient),
    torch.neg: rules.neg,
    cat: rules.concatenated,
    torch.softmax: attention.softmax_rule,
    attend: attention.attend_rule,
    torch.square: attention.square,
    deviation: normalization.deviation_rule,
    inverse_root: normalization.inverse_root_rule,
    normalized: normalization.normalized_rule,
}
