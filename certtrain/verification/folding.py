"""BatchNorm folded into the layer before it, as it can be once its statistics are fixed."""

from __future__ import annotations

from copy import deepcopy

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.nn.utils.parametrize import is_parametrized

from certtrain.bounds.tracing import record_forward, table_entry

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d)
_FOLDABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, *_TRANSPOSED)


def fold_batch_norm(model: nn.Module) -> fx.GraphModule:
    """A copy of `model` in eval mode, with BatchNorms folded into the convolution or linear layer before them.

    Folded is a BatchNorm that reads a layer's result which nothing else reads; others stay. Weights and bias are
    computed in float64 and rounded once. Layers keep their names. A linear layer before a BatchNorm is taken to
    return (B, features), the one shape over which the two have the same channels.

    Raises:
        UnsupportedOperation: the model's forward cannot be traced.
    """
    copy = deepcopy(model).eval()
    graph = record_forward(copy)
    for norm in list(graph.nodes):
        if not _is_foldable(norm, copy):
            continue
        (layer,) = norm.all_input_nodes
        copy.set_submodule(layer.target, _fused(copy.get_submodule(layer.target), copy.get_submodule(norm.target)))
        norm.replace_all_uses_with(layer)
        graph.erase_node(norm)
    return fx.GraphModule(copy, graph, type(model).__name__).eval()


def _is_foldable(norm: fx.Node, model: nn.Module) -> bool:
    if norm.op != "call_module" or len(norm.all_input_nodes) != 1:
        return False
    (layer,) = norm.all_input_nodes
    if layer.op != "call_module" or len(layer.users) > 1 or _reads(layer) > 1:
        return False
    before, module = model.get_submodule(layer.target), model.get_submodule(norm.target)
    return (
        table_entry(module) in (nn.BatchNorm1d, nn.BatchNorm2d)
        and module.running_mean is not None
        and table_entry(before) in _FOLDABLE
        and _channels(before) == module.num_features
        and not any(is_parametrized(m) or m._forward_hooks or m._forward_pre_hooks for m in (before, module))
        and not (isinstance(before, _TRANSPOSED) and before.groups > 1)  # torch's fusion does not know their layout
    )


def _reads(layer: fx.Node) -> int:
    """How often the network calls this layer, or reads a parameter of it."""
    targets = [node.target for node in layer.graph.nodes if node.op in ("call_module", "get_attr")]
    return sum(target == layer.target or target.startswith(f"{layer.target}.") for target in targets)


def _channels(layer: nn.Module) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def _fused(layer: nn.Module, norm: nn.Module) -> nn.Module:
    """Serves linear layers too, unlike `fuse_linear_bn_eval` also where the BatchNorm has no weight."""
    exact = fuse_conv_bn_eval(deepcopy(layer).double(), deepcopy(norm).double(), isinstance(layer, _TRANSPOSED))
    return exact.to(layer.weight.dtype)
