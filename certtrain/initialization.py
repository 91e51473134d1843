"""Weight initializations; the one that keeps interval bounds from exploding, and the usual ones to compare with.

Imports nothing of certtrain's bounds: other robustness code can use it alone.
"""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.nn.utils.weight_norm import WeightNorm

from certtrain.affine_layers import (
    AFFINE_MODULES,
    AffineWeight,
    Trace,
    added_to,
    called,
    depends_on,
    input_of,
    is_product,
    is_product_of_values,
    registered_weights,
    values_of,
)
from certtrain.errors import unknown


def ibp_init_(model: nn.Module) -> nn.Module:
    """IBP initialization, in place: E[radius out] is about E[radius in], layer after layer.

    Weights of every affine layer but the classifier, the last one: N(0, σ²), σ = √(2π) / fan_in; halved in a layer
    whose input is ReLU(a sum of two branches), since the sum doubles the radius. Biases and BatchNorms stay.
    (Shi et al. 2021, section 3.1.)

    fan_in is the number of inputs that reach one output: for a transposed convolution, the mean over outputs. A layer
    is a module, or a call such as F.linear(x, self.weight), x @ self.weight or an einsum of the two. Of a parametrized
    layer the effective weight is set (weight_norm); one that cannot take it (spectral_norm, orthogonal) keeps its own,
    and a warning names it.

    Layers and sums are found by torch.fx; where a network cannot be traced, modules are taken in the order they were
    registered, none is halved, and a warning says so.

    Networks with attention (products of two values, or nn.MultiheadAttention and nn.TransformerEncoderLayer):

    A layer of σ multiplies a radius by E|w|·fan_in = 2, since a ReLU before it has halved it. One that follows none (a
    sum, a normalization, an average by attention; not the first layer) is halved for that reason.
    Attention averages values v by weights p that sum to 1. Its radius is at most the average of theirs, r, and 2|v|ρ
    for a radius ρ of the scores, as an element of softmax moves by 2p(1 - p)ρ at most. Halved projections of n features
    of mean square 1 have |q|, |k|, |v| of about 1/√n and radii r, so that a score q·k/√d of one of h heads, d = n / h,
    has ρ = √d (|q| + |k|) r = 2r/√h, and the second part is 4r/√(h n): with 4 heads of 64 features a quarter of r.
    Sums x + f(x) add up radii: of N one after the other, each of which doubled it, 2^N would be left. So the layer that
    ends a branch f is divided by N, and N sums multiply a radius by at most (1 + 1/N)^N < e.
    """
    return initialize_(model, "ibp")


def initialize_(model: nn.Module, scheme: str) -> nn.Module:
    """Initialize the weights of every affine layer but the last, in place: ibp, kaiming, xavier, orthogonal, default.

    "default" leaves the model as PyTorch made it.

    Raises:
        UsageError: there is no such scheme.
    """
    if scheme not in INITIALIZATIONS:
        raise unknown("initialization", scheme, INITIALIZATIONS)
    if scheme == "default":
        return model
    kept = []
    with torch.no_grad():
        for weight, factor in _weights_and_factors(model)[:-1]:
            if not _draw_(weight, INITIALIZATIONS[scheme], factor if scheme == "ibp" else 1.0):
                kept.append(weight.path)
    if kept:
        warnings.warn(
            f"initialization {scheme} has no effect on {', '.join(kept)}: computed by a parametrization or by the "
            "network itself, and kept as they are",
            stacklevel=2,
        )
    return model


Fill = Callable[[Tensor, float], Tensor]  # (outputs, inputs of a group, *kernel), fan_in


def _ibp_normal_(weight: Tensor, fan_in: float) -> Tensor:
    return nn.init.normal_(weight, 0.0, math.sqrt(2 * math.pi) / fan_in)


def _kaiming_normal_(weight: Tensor, fan_in: float) -> Tensor:
    return nn.init.kaiming_normal_(weight, nonlinearity="relu")


INITIALIZATIONS: dict[str, Fill] = {
    "ibp": _ibp_normal_,
    "kaiming": _kaiming_normal_,
    "xavier": lambda weight, fan_in: nn.init.xavier_normal_(weight),
    "orthogonal": lambda weight, fan_in: nn.init.orthogonal_(weight),
    "default": lambda weight, fan_in: weight,
}


def _draw_(weight: AffineWeight, fill: Fill, factor: float) -> bool:
    """Give the layer a new weight to compute with; or change nothing, where that cannot be: False."""
    owner, name = weight.owner, weight.name
    if owner is None:
        return False
    if name in owner._parameters:
        parameter = owner.get_parameter(name)
        parameter.copy_(factor * _drawn(weight, parameter, fill))
        return True
    before = {key: state.clone() for key, state in owner.state_dict().items()}
    value = factor * _drawn(weight, getattr(owner, name), fill)
    if _set_parametrized(owner, name, value) and torch.allclose(getattr(owner, name), value, rtol=1e-4, atol=1e-7):
        return True
    owner.load_state_dict(before)  # reading a spectral norm updates it
    return False


def _drawn(weight: AffineWeight, like: Tensor, fill: Fill) -> Tensor:
    """A value for a weight (out, in / groups, *kernel), of a transposed convolution (in, out / groups, *kernel)."""
    if not weight.transposed:
        value = torch.empty_like(like, memory_format=torch.contiguous_format)
        return fill(value, like[0].numel())
    inputs, outputs, *kernel = like.shape[0] // weight.groups, *like.shape[1:]
    value = like.new_empty(weight.groups * outputs, inputs, *kernel)
    fill(value, inputs * math.prod(kernel) / math.prod(weight.stride))  # a mean: strides leave gaps between inputs
    return value.unflatten(0, (weight.groups, outputs)).transpose(1, 2).reshape(like.shape)


def _set_parametrized(owner: nn.Module, name: str, value: Tensor) -> bool:
    """By the parametrization's right inverse, or the hook of the older torch.nn.utils.weight_norm."""
    if parametrize.is_parametrized(owner, name):
        try:
            setattr(owner, name, value)
        except Exception:  # no right inverse, or a value outside its range: whatever its author raises
            return False
        return True
    for hook in owner._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and hook.name == name:
            getattr(owner, f"{name}_g").copy_(torch.norm_except_dim(value, 2, hook.dim))
            getattr(owner, f"{name}_v").copy_(value)
            setattr(owner, name, hook.compute_weight(owner))
            return True
    return False


def _weights_and_factors(model: nn.Module) -> list[tuple[AffineWeight, float]]:
    """Of the affine layers in the order they run, and by what their deviation is multiplied."""
    try:
        trace = Trace.of(model)
    except Exception as error:  # whatever a stranger's forward raises under tracing
        warnings.warn(
            f"cannot trace {type(model).__name__} ({error}): layers behind sums are not halved, and only modules of "
            "torch.nn are initialized",
            stacklevel=4,
        )
        return [(weight, 1.0) for weight in registered_weights(model)]
    rules = _Transformer(trace) if _has_attention(trace) else _Residual(trace)
    return [(weight, rules.factor(node, weight)) for node, weight in trace.layers()]


_ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_RELUS = {torch.relu, torch.relu_, nn.functional.relu, nn.functional.relu_, "relu", "relu_"}
_RESHAPES = {torch.flatten, torch.reshape, "flatten", "view", "reshape", "contiguous"}
_RESHAPING_MODULES = (nn.Flatten, nn.Identity, nn.Dropout)


@dataclass(frozen=True)
class _Residual:
    """Halves what follows ReLU(a sum of two branches)."""

    trace: Trace

    def factor(self, node: fx.Node, weight: AffineWeight) -> float:
        return 0.5 if self._is_relu_of_sum(input_of(node)) else 1.0

    def _is_relu_of_sum(self, node: fx.Node) -> bool:
        module = self.trace.module_of(node)
        if called(node) in _RESHAPES or isinstance(module, _RESHAPING_MODULES):
            return self._is_relu_of_sum(node.all_input_nodes[0])
        if not (called(node) in _RELUS or isinstance(module, nn.ReLU)):
            return False
        return len(_summands(node.all_input_nodes[0])) == 2


def _summands(node: fx.Node) -> list[fx.Node]:
    """The values that a sum adds up. Of addmm(h, x, w): h, and the product, which has no node but the sum's."""
    if (added := added_to(node)) is not None:
        return [added, node]
    values = values_of(node) if called(node) in _ADDITIONS else []
    return values if len(values) == 2 else []


_RECTIFIERS = _RELUS | {F.gelu, F.silu}
_RECTIFYING_MODULES = (nn.ReLU, nn.GELU, nn.SiLU)
_ATTENTION_MODULES = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def _has_attention(trace: Trace) -> bool:
    return any(
        called(node) is F.scaled_dot_product_attention
        or is_product_of_values(node)
        or isinstance(trace.module_of(node), _ATTENTION_MODULES)
        for node in trace.nodes
    )


@dataclass(frozen=True)
class _Transformer:
    """Halves what follows no ReLU, and divides what ends a branch by the number of sums."""

    trace: Trace

    def factor(self, node: fx.Node, weight: AffineWeight) -> float:
        module = self.trace.module_of(node)
        ends = 1 / max(1, self._sums())
        if isinstance(module, _ATTENTION_MODULES):
            last = isinstance(module, nn.TransformerEncoderLayer) or self._is_branch_end(node)
            owner = weight.path.rpartition(".")[0].rpartition(".")[2]
            return (1.0 if owner == "linear2" else 0.5) * (ends if last and owner in ("linear2", "out_proj") else 1.0)
        return (1.0 if self._is_rectified(input_of(node)) else 0.5) * (ends if self._is_branch_end(node) else 1.0)

    def _sums(self) -> int:
        inside = [isinstance(self.trace.module_of(node), nn.TransformerEncoderLayer) for node in self.trace.nodes]
        return 2 * sum(inside) + sum(len(_summands(node)) == 2 for node in self.trace.nodes)

    def _is_rectified(self, node: fx.Node) -> bool:
        """By a ReLU or its like, whatever moves or scales stands between; or the input itself."""
        module = self.trace.module_of(node)
        if node.op == "placeholder" or called(node) in _RECTIFIERS or isinstance(module, _RECTIFYING_MODULES):
            return True
        opaque = is_product(node) or isinstance(module, (*AFFINE_MODULES, *_ATTENTION_MODULES))
        sources = values_of(node)
        if opaque or len(sources) != 1:
            return False
        return self._is_rectified(sources[0])

    def _is_branch_end(self, node: fx.Node) -> bool:
        """Does nothing but what moves elements stand between it and a sum with a value that it has no part in?"""
        sums = [summands for user in (node, *node.users) if node in (summands := _summands(user))]
        if any(not depends_on(other, node) for summands in sums for other in summands if other is not node):
            return True
        return any(self._moves(user) and self._is_branch_end(user) for user in node.users)

    def _moves(self, node: fx.Node) -> bool:
        return called(node) in _MOVES or isinstance(self.trace.module_of(node), _RESHAPING_MODULES)


_MOVES = _RESHAPES | {operator.getitem, torch.transpose, "transpose", "permute", "unflatten"}
