"""The architectures, plain torch.nn, and `build_model`, which finds one by name."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from certtrain.errors import UsageError, unknown
from certtrain.models.feedforward import cnn7, cnn_large, cnn_small, mlp
from certtrain.models.normalize import Normalize
from certtrain.models.own import explained, imported, modules_from
from certtrain.models.residual import Residual, resnext, wide_resnet

MODELS: dict[str, Callable[..., nn.Module]] = {
    "cnn7": cnn7,
    "cnn7-wide": partial(cnn7, width=128),
    "wide-resnet": wide_resnet,
    "resnext": resnext,
    "cnn-large": cnn_large,
    "cnn-small": cnn_small,
    "mlp": mlp,
}


def build_model(
    name: str,
    image_shape: Sequence[int],
    num_classes: int,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """The network `name` behind its input normalisation.

    Args:
        name: one of MODELS, or "module:callable", called as callable(image_shape, num_classes, **options).
        image_shape: (C, H, W).
        mean, std: per-channel normalisation of pixels in [0, 1]; None for none.
        options: keyword arguments of the architecture, such as width.

    Returns:
        nn.Sequential(normalize, network), which maps images (B, C, H, W) in [0, 1] to logits (B, num_classes).

    Raises:
        UsageError: there is no such network, or it cannot be imported or built; says where, in a file of one's own.
    """
    architecture = _find(name)
    options = dict(options or {})
    with explained(f"model {name}"):
        inspect.signature(architecture).bind(tuple(image_shape), num_classes, **options)
    with modules_from(), explained(f"model {name} cannot be built"):
        network = architecture(tuple(image_shape), num_classes, **options)
    if not isinstance(network, nn.Module):
        raise UsageError(f"model {name} returned {type(network).__name__}, not a torch.nn.Module")
    if mean is None or std is None:
        return nn.Sequential(OrderedDict(network=network))
    return nn.Sequential(OrderedDict(normalize=Normalize(mean, std), network=network))


def _find(name: str) -> Callable[..., nn.Module]:
    if ":" not in name:
        if name not in MODELS:
            raise unknown("model", name, MODELS)
        return MODELS[name]
    return imported(name)


__all__ = [
    "MODELS",
    "Normalize",
    "Residual",
    "build_model",
    "cnn7",
    "cnn_large",
    "cnn_small",
    "mlp",
    "resnext",
    "wide_resnet",
]
