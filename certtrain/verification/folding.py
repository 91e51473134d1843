"""BatchNorm folded into the layer before it, as it can be once its statistics are fixed."""

from __future__ import annotations

from contextlib import suppress
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.nn.utils.parametrize import is_parametrized

from certtrain.bounds.forward import ROOT, record_forward
from certtrain.bounds.operations.record import MODULES, module_entry
from certtrain.bounds.recording import agree, probes
from certtrain.errors import UnsupportedOperation
from certtrain.modules import copied

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d)
_DIMENSIONS = {nn.Linear: 2, nn.Conv1d: 3, nn.Conv2d: 4, nn.ConvTranspose1d: 3, nn.ConvTranspose2d: 4}
"""Of a layer's result over which its channels are those that a BatchNorm normalises: always along the second axis."""


def fold_batch_norm(model: nn.Module, example_input: Tensor) -> nn.Module:
    """A copy of `model` in eval mode, with BatchNorms folded into the convolution or linear layer before them.

    Folded is a BatchNorm that reads a layer's result which nothing else reads, along the layer's own channels; others
    stay. (After a linear layer over tokens, (B, T, F), BatchNorm1d normalises T.) Weights and bias are computed in
    float64 and rounded once. Layers keep their names.

    Args:
        example_input: (B, ...), any valid input; it shows the dimensions of every value.

    Raises:
        UnsupportedOperation: the model's forward cannot be traced, or the folded copy computes something else.
    """
    copy = copied(model).eval()
    root, graph = record_forward(copy)
    if any(node.target == ROOT for node in graph.nodes):  # the model is a single layer
        return copy
    shapes = _Shapes(fx.GraphModule(root, graph))
    with torch.no_grad():
        shapes.run(example_input.detach()[:1].clone())
    for norm in list(graph.nodes):
        if not _is_foldable(norm, root, shapes.dims):
            continue
        (layer,) = norm.all_input_nodes
        fused = _fused(root.get_submodule(layer.target), root.get_submodule(norm.target))
        root.set_submodule(layer.target, fused)
        norm.replace_all_uses_with(layer)
        graph.erase_node(norm)
    folded = _below(root, graph)
    if not _computes_the_same(folded, model, example_input):
        raise UnsupportedOperation(f"with BatchNorm folded, {type(model).__name__} computes something else")
    return folded


class _Shapes(fx.Interpreter):
    """Runs the graph and keeps how many dimensions each value has."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.dims: dict[str, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.dims[n.name] = value.dim()
        return value


def _below(root: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """The graph as a module of its own, its layers named as in the model."""
    model = root.get_submodule(ROOT)
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            inner = node.target.removeprefix(f"{ROOT}.")
            if inner == node.target:  # a constant of the forward
                setattr(model, inner, getattr(root, inner))
            node.target = inner
    return fx.GraphModule(model, graph, type(model).__name__).eval()


@torch.no_grad()
def _computes_the_same(folded: nn.Module, model: nn.Module, example_input: Tensor) -> bool:
    """In float64 where it can be, on images near the example and far from it."""
    images = probes(example_input.detach()[:1])
    for dtype in (torch.float64, images.dtype):
        with suppress(RuntimeError):  # a forward with constants of one type
            found, expected = (copied(m).eval().to(dtype)(images.to(dtype, copy=True)) for m in (folded, model))
            return agree(found, expected, relative=1e-3, absolute=1e-6)
    return False


def _is_foldable(norm: fx.Node, root: nn.Module, dims: dict[str, int]) -> bool:
    if norm.op != "call_module" or len(norm.all_input_nodes) != 1:
        return False
    (layer,) = norm.all_input_nodes
    if layer.op != "call_module" or len(layer.users) > 1 or _reads(layer) > 1:
        return False
    before, module = root.get_submodule(str(layer.target)), root.get_submodule(str(norm.target))
    kind = _kind(before)
    return (
        _kind(module) in (nn.BatchNorm1d, nn.BatchNorm2d)
        and module.running_mean is not None
        and kind in _DIMENSIONS
        and dims.get(layer.name) == _DIMENSIONS[kind]
        and _channels(before) == module.num_features
        and not any(is_parametrized(m) or m._forward_hooks or m._forward_pre_hooks for m in (before, module))
        and not (isinstance(before, _TRANSPOSED) and before.groups > 1)  # torch's fusion does not know their layout
    )


def _kind(module: nn.Module) -> type[nn.Module] | None:
    """The class whose computation the module runs, if it has a say here."""
    if module_entry(module) is None:
        return None
    kinds = (*_DIMENSIONS, nn.BatchNorm1d, nn.BatchNorm2d)
    return next((kind for kind in kinds if isinstance(module, kind) and MODULES[kind] == module_entry(module)), None)


def _reads(layer: fx.Node) -> int:
    """How often the network calls this layer, or reads a parameter of it."""
    targets = [node.target for node in layer.graph.nodes if node.op in ("call_module", "get_attr")]
    return sum(target == layer.target or target.startswith(f"{layer.target}.") for target in targets)


def _channels(layer: Any) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def _fused(layer: Any, norm: Any) -> nn.Module:
    """Serves linear layers too, unlike `fuse_linear_bn_eval` also where the BatchNorm has no weight."""
    exact = fuse_conv_bn_eval(deepcopy(layer).double(), deepcopy(norm).double(), isinstance(layer, _TRANSPOSED))
    return exact.to(layer.weight.dtype)
