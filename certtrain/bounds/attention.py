"""Attention, brought down to the operations it consists of: products, a softmax, linear layers.

scaled dot-product attention    softmax(q kᵀ / √d + mask) v
nn.MultiheadAttention           of the parts of three linear maps, one for each head; then another linear map
nn.TransformerEncoderLayer      x + attention, x + MLP, with a normalization before each (norm_first) or behind
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from certtrain.bounds.box import Box
from certtrain.bounds.operations.arithmetic import add
from certtrain.bounds.operations.preconditions import only, require_that
from certtrain.bounds.operations.record import (
    DECOMPOSITIONS,
    MODULE_DECOMPOSITIONS,
    OPERATIONS,
    Affine,
    ModuleCalls,
    Shape,
    define,
)

LEAST_SCORE = -1e30  # in the place of -inf, which has no lines; its exponential is 0 beside any other score's


def masked(scores: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Scores (..., T, S) with a constant mask: bool, True where attention is allowed, or numbers that are added.

    causal: token t attends to the first t only.
    """
    allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril() if causal else mask
    if allowed is None:
        return scores
    if allowed.dtype == torch.bool:
        return torch.where(allowed, scores, LEAST_SCORE)
    return scores + allowed.to(scores.dtype).clamp(min=LEAST_SCORE)


def masked_box(scores: Box, mask: Tensor | None, causal: bool) -> Box:
    return Box(masked(scores.lower, mask, causal), masked(scores.upper, mask, causal))


def _constant(depends: bool) -> None:
    require_that(not depends, "an attention mask that depends on the input has no rule")


def _require_constant_mask(scores: Any, mask: Any, causal: Any) -> None:
    _constant(isinstance(mask, Shape))
    require_that(mask is None or mask.dim() < scores.dims or mask.shape[0] == 1, "a mask of each image has no rule")


define(masked, lambda scores, mask, causal: (scores, mask, causal), affine=Affine.FIRST, require=_require_constant_mask)


def attend(weights: Tensor, value: Tensor) -> Tensor:
    """weights @ value, where every row of the weights is a softmax: not negative, of sum 1."""
    return weights @ value


def _require_rows(weights: Any, value: Any) -> None:
    OPERATIONS[torch.matmul].require(weights, value)
    is_vector = isinstance(value, Tensor) and value.dim() == 1
    require_that(not is_vector, "an average of a vector by softmax has no rule: give it a second axis, v[:, None]")


define(
    attend,
    lambda weights, value: (weights, value),
    operands=2,
    affine=Affine.ONE,
    require=_require_rows,
)


def attend_box(weights: Any, value: Any) -> Box:
    """Averages of the rows of `value`, by what is known of the weights and no more than their sum is 1.

    For any m, Σ_j p_j v_j = m + Σ_j p_j (v_j - m), and since no p_j is negative the sum is greatest where each v_j is,
    with the greatest p_j where that is above m, the least where it is below. With m the mean of all v_j that is less
    than from p_j·v_j alone; with m the greatest of them it is the greatest of them. (These are bounds of a linear
    program's dual. Its optimum is exact, but has another m for each element.)
    """
    p, v = (operand if isinstance(operand, Box) else Box(operand, operand) for operand in (weights, value))
    m = center_of(v)
    upper = m + _greatest(p, v.upper - m)
    lower = m - _greatest(p, m - v.lower)
    return Box(
        torch.maximum(lower, v.lower.amin(-2, keepdim=True)), torch.minimum(upper, v.upper.amax(-2, keepdim=True))
    )


def center_of(value: Box) -> Tensor:
    """(..., 1, D): the mean of the rows, that all of them are compared with."""
    return value.center.mean(-2, keepdim=True)


def _greatest(p: Box, v: Tensor) -> Tensor:
    """Σ_j p_j v_j for p_j of its interval, not negative."""
    return torch.cat([p.upper, p.lower], -1) @ torch.cat([v.clamp(min=0), v.clamp(max=0)], -2)


def _without_dropout(p: float) -> None:
    require_that(not p, f"attention that drops out (p={p}) has no rule: build it with dropout=0, or call model.eval()")


def scaled_dot_product_attention(
    call: Any,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    return _attention(call, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)[0]


def _attention(
    call: Any,
    query: Any,
    key: Any,
    value: Any,
    mask: Any = None,
    dropout: float = 0.0,
    causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Any, Any]:
    """The result, and the weights."""
    only(enable_gqa, False, "enable_gqa")
    _without_dropout(dropout)
    if scale is None:
        size = call(operator.getitem, call(getattr, query, "shape"), -1)
        scale = call(operator.pow, size, -0.5)
    scores = call(torch.matmul, call(torch.mul, query, scale), call(Tensor.transpose, key, -2, -1))
    if mask is not None or causal:
        scores = call(masked, scores, mask, causal)
    weights = call(torch.softmax, scores, -1)
    return call(torch.matmul, weights, value), weights


def _multihead_attention(
    modules: ModuleCalls,
    m: Any,
    query: Any,
    key: Any,
    value: Any,
    key_padding_mask: Any = None,
    need_weights: bool = True,
    attn_mask: Any = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Any, Any]:
    """Output and weights, as the module returns them."""
    call = modules.call
    require_that(m.batch_first, "its first axis would be the tokens', not the images': build it with batch_first=True")
    require_that(m.bias_k is None and not m.add_zero_attn, "add_bias_kv and add_zero_attn have no rule")
    require_that(key_padding_mask is None, "key_padding_mask, a mask of each image, has no rule")
    if m.in_proj_weight is None:
        weights = [modules.parameter(m, f"{name}_proj_weight") for name in "qkv"]
    else:
        weights = _thirds(call, modules.parameter(m, "in_proj_weight"), m.embed_dim)
    bias = modules.parameter(m, "in_proj_bias")
    biases = [None] * 3 if bias is None else _thirds(call, bias, m.embed_dim)
    heads = [
        _split_heads(call, call(F.linear, x, weight, bias), m.num_heads)
        for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
    ]
    if attn_mask is not None:
        attn_mask = call(_allowed, attn_mask)
    query, key, value = heads
    mixed, attended = _attention(call, query, key, value, attn_mask, m.dropout if m.training else 0.0)
    output = modules.run(m.out_proj, call(torch.flatten, call(Tensor.transpose, mixed, 1, 2), 2, -1))
    if not need_weights:
        return output, None
    return output, call(Tensor.mean, attended, 1, False) if average_attn_weights else attended


def _allowed(mask: Tensor) -> Tensor:
    """The module's masks say True where attention is *not* allowed."""
    require_that(mask.dim() == 2, "a mask of each image has no rule")
    return ~mask if mask.dtype == torch.bool else mask


def _thirds(call: Any, parameter: Any, size: int) -> list[Any]:
    return [call(torch.narrow, parameter, 0, part * size, size) for part in range(3)]


def _split_heads(call: Any, x: Any, heads: int) -> Any:
    """(B, T, E) -> (B, heads, T, E / heads)."""
    return call(Tensor.transpose, call(Tensor.unflatten, x, -1, (heads, -1)), 1, 2)


def _encoder_layer(
    modules: ModuleCalls,
    m: Any,
    src: Any,
    src_mask: Any = None,
    src_key_padding_mask: Any = None,
    is_causal: bool = False,
) -> Any:
    def attention(x: Any) -> Any:
        return modules.run(m.dropout1, modules.run(m.self_attn, x, x, x, src_key_padding_mask, False, src_mask)[0])

    def feed_forward(x: Any) -> Any:
        hidden = modules.run(m.linear1, x)
        active = (
            modules.run(m.activation, hidden)
            if isinstance(m.activation, nn.Module)
            else modules.call(m.activation, hidden)
        )
        return modules.run(m.dropout2, modules.run(m.linear2, modules.run(m.dropout, active)))

    x = src
    for branch, norm in ((attention, m.norm1), (feed_forward, m.norm2)):
        if m.norm_first:
            x = modules.call(add, x, branch(modules.run(norm, x)), 1)
        else:
            x = modules.run(norm, modules.call(add, x, branch(x), 1))
    return x


def _encoder(
    modules: ModuleCalls,
    m: Any,
    src: Any,
    mask: Any = None,
    src_key_padding_mask: Any = None,
    is_causal: bool | None = None,
) -> Any:
    x = src
    for layer in m.layers:
        x = modules.run(layer, x, mask, src_key_padding_mask)
    return x if m.norm is None else modules.run(m.norm, x)


DECOMPOSITIONS |= {
    F.scaled_dot_product_attention: scaled_dot_product_attention,
    _allowed: lambda call, mask: _constant(depends=True),  # a constant one is no value, and never comes here
}
MODULE_DECOMPOSITIONS |= {
    nn.MultiheadAttention: _multihead_attention,
    nn.TransformerEncoderLayer: _encoder_layer,
    nn.TransformerEncoder: _encoder,
}
