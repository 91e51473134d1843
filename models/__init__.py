"""The architectures, plain torch.nn, and `build_model`, which finds one by name."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from certtrain.errors import UsageError, unknown
from certtrain.models.feedforward import cnn7, cnn_large, cnn_small, mlp
from certtrain.models.normalize import Normalize
from certtrain.models.own import explained, imported, modules_from
from certtrain.models.residual import Residual, resnext, wide_resnet
from certtrain.models.small import cnn_2layer, cnn_3layer, cnn_4layer
from certtrain.models.transformer import vit

MODELS: dict[str, Callable[..., nn.Module]] = {
    "cnn7": cnn7,
    "cnn7-wide": partial(cnn7, width=128),
    "wide-resnet": wide_resnet,
    "resnext": resnext,
    "cnn-large": cnn_large,
    "cnn-small": cnn_small,
    "cnn-2layer": cnn_2layer,
    "cnn-3layer": cnn_3layer,
    "cnn-4layer": cnn_4layer,
    "mlp": mlp,
    "vit": vit,
}


def build_model(
    name: str,
    image_shape: Sequence[int],
    num_classes: int,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    options: Mapping[str, Any] | None = None,
    trust: bool = False,
) -> nn.Module:
    """The network `name` behind its input normalisation.

    Args:
        name: one of MODELS, or "module:callable", called as callable(image_shape, num_classes, **options).
        image_shape: (C, H, W).
        mean: per-channel normalisation of pixels in [0, 1], with `std`; None for none.
        std: as `mean`.
        options: keyword arguments of the architecture, such as width.
        trust: import the module of a "module:callable", which runs its code.

    Returns:
        nn.Sequential(normalize, network), which maps images (B, C, H, W) in [0, 1] to logits (B, num_classes). Lazy
        layers have their shapes.

    Raises:
        UsageError: there is no such network, it is not trusted, or it cannot be imported or built; says where,
            in a file of one's own.
    """
    architecture = find_model(name, trust)
    options = dict(options or {})
    with explained(f"model {name}"):
        inspect.signature(architecture).bind(tuple(image_shape), num_classes, **options)
    with modules_from(), explained(f"model {name} cannot be built"):
        network = architecture(tuple(image_shape), num_classes, **options)
    if not isinstance(network, nn.Module):
        raise UsageError(f"model {name} returned {type(network).__name__}, not a torch.nn.Module")
    _shape_lazy_layers(network, image_shape)
    if mean is None or std is None:
        return nn.Sequential(OrderedDict(network=network))
    return nn.Sequential(OrderedDict(normalize=Normalize(mean, std), network=network))


def all_options(name: str, options: Mapping[str, Any], trust: bool = False) -> dict[str, Any]:
    """`options` of the network `name`, and the defaults of those that were left out."""
    parameters = inspect.signature(find_model(name, trust)).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty} | dict(options)


def find_model(name: str, trust: bool = False) -> Callable[..., nn.Module]:
    """The architecture `name`, of MODELS, or where the caller trusts it the callable that "module:callable" names.

    Raises:
        UsageError: there is none, or it is not trusted.
    """
    if ":" not in name:
        if name not in MODELS:
            raise unknown("model", name, MODELS)
        return MODELS[name]
    if not trust:
        raise UsageError(
            f"model {name[:100]!r} is code outside certtrain, which runs when it is opened: if you know and trust it, "
            "say --trust-model (in Python trust=True)"
        )
    return imported(name)


def _shape_lazy_layers(network: nn.Module, image_shape: Sequence[int]) -> None:
    """Run a network that has lazy layers once: until then they have no weights that could be trained or loaded."""
    lazy = UninitializedBuffer | UninitializedParameter
    if any(isinstance(tensor, lazy) for tensor in (*network.parameters(), *network.buffers())):
        with torch.no_grad():
            network.eval()(torch.zeros(1, *image_shape))
        network.train()


__all__ = [
    "MODELS",
    "Normalize",
    "Residual",
    "all_options",
    "build_model",
    "cnn7",
    "cnn_2layer",
    "cnn_3layer",
    "cnn_4layer",
    "cnn_large",
    "cnn_small",
    "find_model",
    "mlp",
    "resnext",
    "vit",
    "wide_resnet",
]
