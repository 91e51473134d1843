"""The affine layers of a network: which weights they have, in which order they run, how each uses its weight.

Layers are modules, and calls such as F.linear(x, self.weight), x @ self.weight or an einsum of the two, found by
torch.fx. Imports nothing of certtrain's bounds: other code can use this file alone.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from certtrain.per_axis import per_axis
from certtrain.unchanged import unchanged

AFFINE_MODULES = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


def affine_weights(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """The weights of the affine layers in the order they run, each a module and the name of its attribute.

    A weight that layers share is there once. What the network computes on its way is no attribute, and left out.
    """
    found: dict[Any, tuple[nn.Module, str]] = {}
    for weight in _affine_weights_of(model):
        if weight.owner is not None:
            place = weight.owner, weight.name
            parameter = weight.owner._parameters.get(weight.name)  # what a parametrization computes is not asked for:
            found.setdefault(place if parameter is None else parameter, place)  # reading a spectral norm updates it
    return list(found.values())


def classifier_tensors(model: nn.Module) -> list[str]:
    """The names, in the state dict, of what the last affine layer consists of; none where there is no such layer."""
    weights = _affine_weights_of(model)
    if not weights or weights[-1].owner is None:
        return []
    last, names = weights[-1], model.state_dict()
    if not isinstance(last.owner, AFFINE_MODULES):
        return [name for name in names if name == last.path]
    return [name for name in names if name.startswith(last.path.removesuffix(last.name))]


@dataclass(frozen=True)
class AffineWeight:
    """The weight of one affine layer, attribute `name` of `owner`, and how the layer uses it.

    `owner` is None for a weight that the network computes on its way; `path` then names the place.
    """

    path: str
    owner: nn.Module | None
    name: str
    transposed: bool = False
    groups: int = 1
    stride: tuple[int, ...] = ()


@dataclass(frozen=True)
class Trace:
    """A network as torch.fx sees it: its calls in the order they run, and its modules by path."""

    nodes: list[fx.Node]
    modules: dict[str, nn.Module]

    @classmethod
    def of(cls, model: nn.Module) -> Trace:
        """Raises whatever the network's forward raises under tracing."""
        with unchanged(model):
            return cls(list(fx.Tracer().trace(model).nodes), dict(model.named_modules()))

    def module_of(self, node: fx.Node) -> nn.Module | None:
        """The module that `node` calls, if it calls one."""
        return self.modules.get(str(node.target)) if node.op == "call_module" else None

    def layers(self) -> list[tuple[fx.Node, AffineWeight]]:
        """The weights in the order they are used, each with the first call that uses it; the classifier's is last."""
        found: dict[tuple[nn.Module | None, str], tuple[fx.Node, AffineWeight]] = {}
        place = None
        for node in self.nodes:
            for weight in _weights_of(node, self.modules):
                place = weight.owner, weight.name if weight.owner else weight.path
                found.setdefault(place, (node, weight))
        if place is not None:  # it may have been used before
            found[place] = found.pop(place)
        return list(found.values())


def registered_weights(model: nn.Module) -> list[AffineWeight]:
    """Those of modules alone, in the order they were registered: for a network that cannot be traced."""
    return [weight for path, module in model.named_modules() for weight in _own_weights(path, module)]


def called(node: fx.Node) -> Any:
    """The function, or the name of the method, that `node` calls. (A module, too, may be named "relu" or "add".)"""
    return node.target if node.op in ("call_function", "call_method") else None


def is_product(node: fx.Node) -> bool:
    """Whether a function or method multiplies: a layer's call, or a product of two values."""
    return called(node) in _OPERANDS or called(node) is torch.einsum or called(node) in _FUNCTIONS


def is_product_of_values(node: fx.Node) -> bool:
    """Whether both factors depend on the network's input, as in attention."""
    if called(node) in _ADDED_PRODUCTS:
        return all(isinstance(factor, fx.Node) and _depends_on_input(factor) for factor in _operands(node)[1:])
    return (called(node) in _OPERANDS or called(node) is torch.einsum) and len(values_of(node)) == 2


def added_to(node: fx.Node) -> fx.Node | None:
    """The value h that addmm(h, x, w) adds the product x @ w to, where it depends on the network's input."""
    added = _operands(node)[0] if called(node) in _ADDED_PRODUCTS else None
    return added if isinstance(added, fx.Node) and _depends_on_input(added) else None


def values_of(node: fx.Node) -> list[fx.Node]:
    """The inputs that depend on the network's."""
    return [source for source in dict.fromkeys(node.all_input_nodes) if _depends_on_input(source)]


def input_of(node: fx.Node) -> fx.Node:
    """Of a layer: what depends on the network's input, or if nothing does, the first."""
    if called(node) in _ADDED_PRODUCTS:
        return _operands(node)[1]
    return next(iter(values_of(node)), node.all_input_nodes[0])


def depends_on(node: fx.Node, source: fx.Node) -> bool:
    """Whether `node` is `source`, or computed from it."""
    return any(one is source for one in _ancestry(node))


def _depends_on_input(node: fx.Node) -> bool:
    return any(one.op == "placeholder" for one in _ancestry(node))


def _ancestry(node: fx.Node) -> Iterator[fx.Node]:
    """The node, and all that it is computed from."""
    seen, left = {node}, [node]
    while left:
        one = left.pop()
        yield one
        fresh = set(one.all_input_nodes) - seen
        seen |= fresh
        left += fresh


def _affine_weights_of(model: nn.Module) -> list[AffineWeight]:
    try:
        with warnings.catch_warnings(action="ignore"):  # by the network's own code
            trace = Trace.of(model)
    except Exception:  # whatever a stranger's forward raises under tracing
        return registered_weights(model)
    return [weight for _, weight in trace.layers()]


def _weights_of(node: fx.Node, modules: dict[str, nn.Module]) -> list[AffineWeight]:
    if called(node) in _FUNCTIONS:
        weight = _of_call(node, modules)
        return [] if weight is None else [weight]
    if is_product(node):
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


def _of_attention(path: str, module: nn.MultiheadAttention) -> list[AffineWeight]:
    return [*_own_weights(path, module), _of_module(f"{path}.out_proj", module.out_proj)]


def _own_weights(path: str, module: nn.Module) -> list[AffineWeight]:
    """Of the module itself, without those of modules in it."""
    if isinstance(module, AFFINE_MODULES):
        return [_of_module(path, module)]
    if isinstance(module, nn.MultiheadAttention):
        names = ["in_proj_weight"] if module.in_proj_weight is not None else [f"{name}_proj_weight" for name in "qkv"]
        return [AffineWeight(f"{path}.{name}", module, name) for name in names]
    return []


def _of_module(path: str, module: nn.Module) -> AffineWeight:
    weight = f"{path}.weight" if path else "weight"
    if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        stride = per_axis(module.stride, module.weight.dim() - 2)
        return AffineWeight(weight, module, "weight", True, module.groups, stride)
    return AffineWeight(weight, module, "weight")


_ADDED_PRODUCTS = {torch.addmm, "addmm", torch.baddbmm, "baddbmm"}
_OPERANDS = {  # by their names in PyTorch's documentation, the two factors last
    **dict.fromkeys([operator.matmul, torch.matmul, "matmul", "__matmul__"], ("input", "other")),
    **dict.fromkeys([torch.mm, "mm", torch.bmm, "bmm"], ("input", "mat2")),
    **dict.fromkeys([torch.addmm, "addmm"], ("input", "mat1", "mat2")),
    **dict.fromkeys([torch.baddbmm, "baddbmm"], ("input", "batch1", "batch2")),
}
_TRANSPOSED_CONVOLUTIONS = {F.conv_transpose1d: 1, F.conv_transpose2d: 2, F.conv_transpose3d: 3}
_FUNCTIONS = {F.linear, F.conv1d, F.conv2d, F.conv3d, *_TRANSPOSED_CONVOLUTIONS}


def _of_call(node: fx.Node, modules: dict[str, nn.Module]) -> AffineWeight | None:
    """Of F.linear(x, weight) or F.conv2d(x, weight)."""
    source = node.args[1] if len(node.args) > 1 else node.kwargs["weight"]
    axes = _TRANSPOSED_CONVOLUTIONS.get(called(node))
    if axes is None:  # of all others the weight's shape tells fan_in
        return _weight_at(source, modules)
    groups: Any = node.kwargs.get("groups", node.args[6] if len(node.args) > 6 else 1)
    stride: Any = node.kwargs.get("stride", node.args[3] if len(node.args) > 3 else 1)
    return _weight_at(source, modules, True, groups, per_axis(stride, axes))


def _of_product(node: fx.Node, modules: dict[str, nn.Module]) -> AffineWeight | None:
    """Of x @ weight, or x @ weight.T, where weight is (in, out) or (out, in)."""
    x, source, flipped = _factors_of_einsum(node) if called(node) is torch.einsum else (*_operands(node)[-2:], False)
    if not isinstance(x, fx.Node) or not isinstance(source, fx.Node):
        return None
    if not _depends_on_input(x) or _depends_on_input(source):
        return None
    if _is_transposition(source):
        source, flipped = source.all_input_nodes[0], not flipped
    if node.kwargs.get("alpha", 1) != 1:
        return _computed(source, modules)
    weight = _weight_at(source, modules, transposed=not flipped)
    matrix = weight is None or weight.owner is None or getattr(weight.owner, weight.name).dim() == 2
    return weight if matrix else None


def _weight_at(
    source: Any, modules: dict[str, nn.Module], transposed: bool = False, groups: int = 1, stride: tuple[int, ...] = ()
) -> AffineWeight | None:
    """The parameter that `source` is, or what is computed from some; none of a constant, such as a fixed transform."""
    if not isinstance(source, fx.Node):
        return None
    if source.op != "get_attr":
        return _computed(source, modules)
    path, _, name = str(source.target).rpartition(".")
    if name not in modules[path]._parameters:
        return None
    return AffineWeight(str(source.target), modules[path], name, transposed, groups, stride)


def _computed(source: fx.Node, modules: dict[str, nn.Module]) -> AffineWeight | None:
    attributes = [node for node in _ancestry(source) if node.op == "get_attr"]
    origins = [weight.path for node in attributes if (weight := _weight_at(node, modules)) is not None]
    return AffineWeight(f"what is computed from {', '.join(sorted(origins))}", None, "") if origins else None


def _operands(node: fx.Node) -> tuple[Any, ...]:
    """Of a product other than an einsum, in the order of `_OPERANDS`, by place or by name."""
    names = _OPERANDS[called(node)]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return tuple(given.get(name) for name in names)


def _factors_of_einsum(node: fx.Node) -> tuple[Any, Any, bool]:
    """What it multiplies, by which matrix, and whether by its transpose; Nones where it is no such product."""
    if len(node.args) != 3 or str(node.args[0]).count(",") != 1:
        return None, None, False
    equation, *operands = node.args
    terms, _, result = str(equation).replace(" ", "").partition("->")
    matrix_first = values_of(node) == [operands[1]]
    letters = terms.split(",")[0 if matrix_first else 1]
    summed = [letter not in result for letter in letters]
    if sorted(summed) != [False, True]:
        return None, None, False
    x, matrix = reversed(operands) if matrix_first else operands
    return x, matrix, summed[1]


def _is_transposition(node: fx.Node) -> bool:
    """Of a matrix, in any of the ways that leave nothing to choose."""
    return called(node) in ("t", torch.t) or (called(node) is getattr and node.args[1] in ("T", "mT"))
