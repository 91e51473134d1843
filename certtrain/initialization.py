"""Weight initializations; the one that keeps interval bounds from exploding, and the usual ones to compare with.

Imports nothing of certtrain's bounds: other robustness code can use this file alone.
"""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.nn.utils.weight_norm import WeightNorm

from certtrain.errors import unknown
from certtrain.per_axis import per_axis

AFFINE_MODULES = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


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
        for weight in _affine_weights(model)[:-1]:
            if not weight.draw_(INITIALIZATIONS[scheme], weight.factor if scheme == "ibp" else 1.0):
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


def affine_weights(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """The weights of the affine layers in the order they run, each a module and the name of its attribute.

    A weight that layers share is there once. What the network computes on its way is no attribute, and left out.
    """
    found: dict[Any, tuple[nn.Module, str]] = {}
    for weight in _affine_weights_unwarned(model):
        if weight.owner is not None:
            place = weight.owner, weight.name
            parameter = weight.owner._parameters.get(weight.name)  # what a parametrization computes is not asked for:
            found.setdefault(place if parameter is None else parameter, place)  # reading a spectral norm updates it
    return list(found.values())


def classifier_tensors(model: nn.Module) -> list[str]:
    """The names, in the state dict, of what the last affine layer consists of; none where there is no such layer."""
    weights = _affine_weights_unwarned(model)
    if not weights or weights[-1].owner is None:
        return []
    last, names = weights[-1], model.state_dict()
    if not isinstance(last.owner, AFFINE_MODULES):
        return [name for name in names if name == last.path]
    return [name for name in names if name.startswith(last.path.removesuffix(last.name))]


@dataclass(frozen=True)
class _AffineWeight:
    """The weight of one affine layer, attribute `name` of `owner`, and how the layer uses it.

    `owner` is None for a weight that the network computes on its way; `path` then names the place. `factor`: of σ.
    """

    path: str
    owner: nn.Module | None
    name: str
    transposed: bool = False
    groups: int = 1
    stride: tuple[int, ...] = ()
    factor: float = 1.0

    def draw_(self, fill: Fill, factor: float) -> bool:
        """Give the layer a new weight to compute with; or change nothing, where that cannot be: False."""
        owner, name = self.owner, self.name
        if owner is None:
            return False
        if name in owner._parameters:
            parameter = owner.get_parameter(name)
            parameter.copy_(factor * self._drawn(parameter, fill))
            return True
        before = {key: state.clone() for key, state in owner.state_dict().items()}
        value = factor * self._drawn(getattr(owner, name), fill)
        if _set_parametrized(owner, name, value) and torch.allclose(getattr(owner, name), value, rtol=1e-4, atol=1e-7):
            return True
        owner.load_state_dict(before)  # reading a spectral norm updates it
        return False

    def _drawn(self, weight: Tensor, fill: Fill) -> Tensor:
        """A value for `weight` (out, in / groups, *kernel), of a transposed convolution (in, out / groups, *kernel)."""
        if not self.transposed:
            value = torch.empty_like(weight, memory_format=torch.contiguous_format)
            return fill(value, weight[0].numel())
        inputs, outputs, *kernel = weight.shape[0] // self.groups, *weight.shape[1:]
        value = weight.new_empty(self.groups * outputs, inputs, *kernel)
        fill(value, inputs * math.prod(kernel) / math.prod(self.stride))  # a mean: strides leave gaps between inputs
        return value.unflatten(0, (self.groups, outputs)).transpose(1, 2).reshape(weight.shape)


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


def _affine_weights_unwarned(model: nn.Module) -> list[_AffineWeight]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what cannot be traced, `initialize_` has warned
        return _affine_weights(model)


def _affine_weights(model: nn.Module) -> list[_AffineWeight]:
    """Of the affine layers in the order they run."""
    modules = dict(model.named_modules())
    try:
        nodes = fx.Tracer().trace(model).nodes
    except Exception as error:  # whatever a stranger's forward raises under tracing
        warnings.warn(
            f"cannot trace {type(model).__name__} ({error}): layers behind sums are not halved, and only modules of "
            "torch.nn are initialized",
            stacklevel=4,
        )
        return [weight for path, module in modules.items() for weight in _own_weights(path, module)]
    rules = _Transformer(list(nodes), modules) if _has_attention(nodes, modules) else _Residual(modules)
    found: dict[tuple[nn.Module | None, str], _AffineWeight] = {}
    for node in nodes:
        for weight in _weights_of(node, modules):
            key = (weight.owner, weight.name if weight.owner else weight.path)
            found.setdefault(key, replace(weight, factor=weight.factor * rules.factor(node, weight)))
    return list(found.values())


def _weights_of(node: fx.Node, modules: dict[str, nn.Module]) -> list[_AffineWeight]:
    if node.op == "call_function" and node.target in _FUNCTIONS:
        weight = _of_call(node, modules)
        return [] if weight is None else [weight]
    if node.op != "call_module" and node.target in _PRODUCTS | _ADDED_PRODUCTS:
        weight = _of_product(node, modules)
        return [] if weight is None else [weight]
    module, path = modules.get(str(node.target)), str(node.target)
    if node.op != "call_module" or module is None:
        return []
    if isinstance(module, nn.TransformerEncoderLayer):
        return [
            *_of_attention(f"{path}.self_attn", module.self_attn),
            *(_of_module(f"{path}.{name}", getattr(module, name)) for name in ("linear1", "linear2")),
        ]
    return _of_attention(path, module) if isinstance(module, nn.MultiheadAttention) else _own_weights(path, module)


def _of_attention(path: str, module: nn.MultiheadAttention) -> list[_AffineWeight]:
    return [*_own_weights(path, module), _of_module(f"{path}.out_proj", module.out_proj)]


def _own_weights(path: str, module: nn.Module) -> list[_AffineWeight]:
    """Of the module itself, without those of modules in it."""
    if isinstance(module, AFFINE_MODULES):
        return [_of_module(path, module)]
    if isinstance(module, nn.MultiheadAttention):
        names = ["in_proj_weight"] if module.in_proj_weight is not None else [f"{name}_proj_weight" for name in "qkv"]
        return [_AffineWeight(f"{path}.{name}", module, name) for name in names]
    return []


def _of_module(path: str, module: nn.Module) -> _AffineWeight:
    weight = f"{path}.weight" if path else "weight"
    if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        stride = per_axis(module.stride, module.weight.dim() - 2)
        return _AffineWeight(weight, module, "weight", True, module.groups, stride)
    return _AffineWeight(weight, module, "weight")


_MATRIX_PRODUCTS = {operator.matmul, torch.matmul, torch.mm, "matmul", "mm", "__matmul__"}
_ADDED_PRODUCTS = {torch.addmm, "addmm"}
_PRODUCTS = _MATRIX_PRODUCTS | {torch.bmm, "bmm", torch.einsum}
_TRANSPOSED_CONVOLUTIONS = {F.conv_transpose1d: 1, F.conv_transpose2d: 2, F.conv_transpose3d: 3}
_FUNCTIONS = {F.linear, F.conv1d, F.conv2d, F.conv3d, *_TRANSPOSED_CONVOLUTIONS}


def _of_call(node: fx.Node, modules: dict[str, nn.Module]) -> _AffineWeight | None:
    """Of F.linear(x, weight) or F.conv2d(x, weight) where weight is a parameter of a module, or computed."""
    source = node.args[1] if len(node.args) > 1 else node.kwargs["weight"]
    if not isinstance(source, fx.Node):
        return None
    if source.op != "get_attr":
        return _AffineWeight(f"what is computed from {', '.join(_parameters_behind(source))}", None, "")
    path, _, name = str(source.target).rpartition(".")
    place = (str(source.target), modules[path], name)
    if node.target not in _TRANSPOSED_CONVOLUTIONS:  # of all others the weight's shape tells fan_in
        return _AffineWeight(*place)
    groups: Any = node.kwargs.get("groups", node.args[6] if len(node.args) > 6 else 1)
    stride: Any = node.kwargs.get("stride", node.args[3] if len(node.args) > 3 else 1)
    return _AffineWeight(*place, True, groups, per_axis(stride, _TRANSPOSED_CONVOLUTIONS[node.target]))


def _of_product(node: fx.Node, modules: dict[str, nn.Module]) -> _AffineWeight | None:
    """Of x @ weight, or x @ weight.T, where weight (in, out) or (out, in) is a parameter of a module, or computed."""
    x, source, flipped = _factors(node)
    if not isinstance(x, fx.Node) or not isinstance(source, fx.Node) or _values(node) != [x]:
        return None
    if _is_transposition(source):
        source, flipped = source.all_input_nodes[0], not flipped
    if source.op != "get_attr":
        parameters = _parameters_behind(source)
        return _AffineWeight(f"what is computed from {', '.join(parameters)}", None, "") if parameters else None
    path, _, name = str(source.target).rpartition(".")
    weight = modules[path]._parameters.get(name)
    if weight is None or weight.dim() != 2:  # a constant, such as a fixed transform
        return None
    return _AffineWeight(str(source.target), modules[path], name, transposed=not flipped)


def _factors(node: fx.Node) -> tuple[Any, Any, bool]:
    """What a product multiplies, by which matrix, and whether by its transpose; Nones where it is no such product."""
    arguments = () if node.kwargs else node.args
    if len(arguments) == 3 and node.target in _ADDED_PRODUCTS:
        arguments = arguments[1:]
    if len(arguments) == 2:
        return arguments[0], arguments[1], False
    if node.target is not torch.einsum or len(arguments) != 3 or str(arguments[0]).count(",") != 1:
        return None, None, False
    equation, *operands = arguments
    terms, _, result = str(equation).replace(" ", "").partition("->")
    matrix_first = _values(node) == [operands[1]]
    letters = terms.split(",")[0 if matrix_first else 1]
    summed = [letter not in result for letter in letters]
    if sorted(summed) != [False, True]:
        return None, None, False
    x, matrix = reversed(operands) if matrix_first else operands
    return x, matrix, summed[1]


def _is_transposition(node: fx.Node) -> bool:
    """Of a matrix, in any of the ways that leave nothing to choose."""
    return node.target in ("t", torch.t) or (node.target is getattr and node.args[1] in ("T", "mT"))


def _parameters_behind(node: fx.Node) -> list[str]:
    if node.op == "get_attr":
        return [str(node.target)]
    return [name for source in node.all_input_nodes for name in _parameters_behind(source)]


_ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_RELUS = {torch.relu, torch.relu_, nn.functional.relu, nn.functional.relu_, "relu", "relu_"}
_RESHAPES = {torch.flatten, torch.reshape, "flatten", "view", "reshape", "contiguous"}
_RESHAPING_MODULES = (nn.Flatten, nn.Identity, nn.Dropout)


@dataclass(frozen=True)
class _Residual:
    """Halves what follows ReLU(a sum of two branches)."""

    modules: dict[str, nn.Module]

    def factor(self, node: fx.Node, weight: _AffineWeight) -> float:
        return 0.5 if self._is_relu_of_sum(_input_of(node)) else 1.0

    def _is_relu_of_sum(self, node: fx.Node) -> bool:
        module = self.modules.get(str(node.target)) if node.op == "call_module" else None
        if node.target in _RESHAPES or isinstance(module, _RESHAPING_MODULES):
            return self._is_relu_of_sum(node.all_input_nodes[0])
        if not (node.target in _RELUS or isinstance(module, nn.ReLU)):
            return False
        source = node.all_input_nodes[0]
        return source.target in _ADDITIONS and len(set(source.all_input_nodes)) == 2


_RECTIFIERS = _RELUS | {F.gelu, F.silu}
_RECTIFYING_MODULES = (nn.ReLU, nn.GELU, nn.SiLU)
_ATTENTION_MODULES = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def _has_attention(nodes: Iterable[fx.Node], modules: dict[str, nn.Module]) -> bool:
    return any(
        node.target is F.scaled_dot_product_attention
        or (node.target in _PRODUCTS and len(_values(node)) == 2)
        or (node.op == "call_module" and isinstance(modules[str(node.target)], _ATTENTION_MODULES))
        for node in nodes
    )


def _values(node: fx.Node) -> list[fx.Node]:
    """The inputs that depend on the network's."""
    return [source for source in dict.fromkeys(node.all_input_nodes) if _depends_on_input(source)]


def _input_of(node: fx.Node) -> fx.Node:
    """Of a layer: what depends on the network's input, or if nothing does, the first."""
    return next(iter(_values(node)), node.all_input_nodes[0])


def _depends_on_input(node: fx.Node) -> bool:
    seen, left = set(), [node]
    while left:
        one = left.pop()
        if one.op == "placeholder":
            return True
        fresh = [source for source in one.all_input_nodes if source not in seen]
        seen.update(fresh)
        left += fresh
    return False


@dataclass(frozen=True)
class _Transformer:
    """Halves what follows no ReLU, and divides what ends a branch by the number of sums."""

    nodes: list[fx.Node]
    modules: dict[str, nn.Module]

    def factor(self, node: fx.Node, weight: _AffineWeight) -> float:
        module = self._module(node)
        ends = 1 / max(1, self._sums())
        if isinstance(module, _ATTENTION_MODULES):
            last = isinstance(module, nn.TransformerEncoderLayer) or self._is_branch_end(node)
            owner = weight.path.rpartition(".")[0].rpartition(".")[2]
            return (1.0 if owner == "linear2" else 0.5) * (ends if last and owner in ("linear2", "out_proj") else 1.0)
        return (1.0 if self._is_rectified(_input_of(node)) else 0.5) * (ends if self._is_branch_end(node) else 1.0)

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.modules.get(str(node.target)) if node.op == "call_module" else None

    def _is_sum(self, node: fx.Node) -> bool:
        return node.target in _ADDITIONS and len(_values(node)) == 2

    def _sums(self) -> int:
        inside = [isinstance(self._module(node), nn.TransformerEncoderLayer) for node in self.nodes]
        return 2 * sum(inside) + sum(map(self._is_sum, self.nodes))

    def _is_rectified(self, node: fx.Node) -> bool:
        """By a ReLU or its like, whatever moves or scales stands between; or the input itself."""
        module = self._module(node)
        if node.op == "placeholder" or node.target in _RECTIFIERS or isinstance(module, _RECTIFYING_MODULES):
            return True
        products = _PRODUCTS | _ADDED_PRODUCTS | _FUNCTIONS
        opaque = node.target in products or isinstance(module, (*AFFINE_MODULES, *_ATTENTION_MODULES))
        sources = _values(node)
        if opaque or len(sources) != 1:
            return False
        return self._is_rectified(sources[0])

    def _is_branch_end(self, node: fx.Node) -> bool:
        """Does nothing but what moves elements stand between it and a sum of two values?"""
        for user in node.users:
            moves = user.target in _MOVES or isinstance(self._module(user), _RESHAPING_MODULES)
            if self._is_sum(user) or (moves and self._is_branch_end(user)):
                return True
        return False


_MOVES = _RESHAPES | {operator.getitem, torch.transpose, "transpose", "permute", "unflatten"}
