"""Weight initializations; the one that keeps interval bounds from exploding, and the usual ones to compare with.

Imports nothing of certtrain's bounds: other robustness code can use this file alone.
"""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from certtrain.errors import unknown

AFFINE_MODULES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d)


def ibp_init_(model: nn.Module) -> nn.Module:
    """IBP initialization, in place: E[radius out] is about E[radius in], layer after layer.

    Weights of every affine layer but the classifier, the last one: N(0, σ²), σ = √(2π) / fan_in; halved in a layer
    whose input is ReLU(a sum of two branches), since the sum doubles the radius. Biases and BatchNorms stay.
    (Shi et al. 2021, section 3.1.)

    The sums are found by torch.fx; where a network cannot be traced, layers are taken in the order they were
    registered, none is halved, and a warning says so.
    """
    return initialize_(model, "ibp")


def initialize_(model: nn.Module, scheme: str) -> nn.Module:
    """Initialize the weights of every affine layer but the last, in place: ibp, kaiming, xavier, orthogonal, default.

    "default" leaves the model as PyTorch made it.
    """
    if scheme not in INITIALIZATIONS:
        raise unknown("initialization", scheme, INITIALIZATIONS)
    if scheme == "default":
        return model
    fill = INITIALIZATIONS[scheme]
    layers = _affine_layers(model)
    with torch.no_grad():
        for layer, after_sum in layers[:-1]:
            fill(layer.weight)
            if scheme == "ibp" and after_sum:
                layer.weight /= 2
    return model


def _ibp_normal_(weight: Tensor) -> Tensor:
    fan_in = nn.init._calculate_correct_fan(weight, "fan_in")
    return nn.init.normal_(weight, 0.0, math.sqrt(2 * math.pi) / fan_in)


def _kaiming_normal_(weight: Tensor) -> Tensor:
    return nn.init.kaiming_normal_(weight, nonlinearity="relu")


INITIALIZATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "ibp": _ibp_normal_,
    "kaiming": _kaiming_normal_,
    "xavier": nn.init.xavier_normal_,
    "orthogonal": nn.init.orthogonal_,
    "default": lambda weight: weight,
}


def _affine_layers(model: nn.Module) -> list[tuple[nn.Module, bool]]:
    """Affine modules in the order they run, each with: is its input ReLU(a sum of two branches)?"""
    try:
        nodes = fx.Tracer().trace(model).nodes
    except Exception as error:  # whatever a stranger's forward raises under tracing
        warnings.warn(f"cannot trace {type(model).__name__} ({error}): layers behind sums are not halved", stacklevel=4)
        return [(m, False) for m in model.modules() if isinstance(m, AFFINE_MODULES)]
    modules = dict(model.named_modules())
    found: dict[nn.Module, bool] = {}
    for node in nodes:
        if node.op == "call_module" and isinstance(modules[node.target], AFFINE_MODULES):
            found.setdefault(modules[node.target], _is_relu_of_sum(node.all_input_nodes[0], modules))
    return list(found.items())


_ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_RELUS = {torch.relu, torch.relu_, nn.functional.relu, nn.functional.relu_, "relu", "relu_"}
_RESHAPES = {torch.flatten, torch.reshape, "flatten", "view", "reshape", "contiguous"}
_RESHAPING_MODULES = (nn.Flatten, nn.Identity, nn.Dropout)


def _is_relu_of_sum(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    module = modules.get(node.target) if node.op == "call_module" else None
    if node.target in _RESHAPES or isinstance(module, _RESHAPING_MODULES):
        return _is_relu_of_sum(node.all_input_nodes[0], modules)
    if not (node.target in _RELUS or isinstance(module, nn.ReLU)):
        return False
    source = node.all_input_nodes[0]
    return source.target in _ADDITIONS and len(set(source.all_input_nodes)) == 2
