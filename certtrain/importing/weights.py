"""Weights of networks that were trained elsewhere, put into an architecture of certtrain.

State dicts of CTBench, CTRAIN and expressive-losses, whose networks are sequences of the same layers, name them by
other positions, keep a bias before BatchNorm, which cancels it, and the input normalisation among the layers, or not at
all.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from certtrain.errors import CheckpointError, one_line
from certtrain.runs.checkpoint import restore
from certtrain.runs.tensor_file import open_tensor_file

WRAPPERS = ("state_dict", "model_state_dict", "model")  # under which a training program puts the state dict
Layer = dict[str, Tensor]  # of a state dict: what belongs to one module, by its last name


def load_weights(model: nn.Module, file: Path) -> None:
    """Load a state dict of this network, or of the same layers under other names; other precisions are converted.

    Args:
        model: of `build_model`, whose input normalisation, where the file has one too, must be the same.
        file: .safetensors, or what torch.save wrote, of which only tensors are read.

    Raises:
        CheckpointError: the file cannot be read, does not tell the order of its layers, or they are not those of
            `model`; says which.
    """
    weights = _without_prefix(_read(file))
    own = model.state_dict()
    _require_same_normalization(_layers(weights), _layers(own), file)
    if weights.keys() == own.keys():
        restore(model, {name: _in_type_of(own[name], tensor) for name, tensor in weights.items()}, file)
        return
    if not _is_sequence(model):
        raise CheckpointError(
            f"{file} has other names than the model ({_first(weights, own)}), which is no plain sequence of layers, so "
            "that none can be told by its position"
        )
    restore(model, own | dict(_by_position(model, weights, file)), file)


def _read(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise CheckpointError(f"there is no file of weights {file}")
    if file.suffix == ".safetensors":
        with open_tensor_file(file) as stored:
            return stored.read()
    try:
        with warnings.catch_warnings(action="ignore"):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} cannot be read: it is no file of torch.save, or holds more than tensors: save model.state_dict()"
        ) from error
    except Exception as error:  # of torch's reader, for a file that is cut or changed: of any type
        raise CheckpointError(f"{file} cannot be read ({one_line(error)})") from error
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content or not all(isinstance(t, Tensor) for t in content.values()):
        raise CheckpointError(f"{file} holds no state dict: expected tensors by name, also under {', '.join(WRAPPERS)}")
    return {str(name): tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in content.items()}


def _without_prefix(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what DataParallel puts before every name."""
    wrapped = all(name.startswith("module.") for name in weights)
    return {name.removeprefix("module.") if wrapped else name: tensor for name, tensor in weights.items()}


def _first(weights: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    missing, surplus = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    return "; ".join([f"it lacks {name:.60}" for name in missing[:1]] + [f"has {name:.60}" for name in surplus[:1]])


def _is_sequence(model: nn.Module) -> bool:
    return all(isinstance(module, nn.Sequential) or not list(module.children()) for module in model.modules())


def _by_position(model: nn.Module, weights: Mapping[str, Tensor], file: Path) -> Iterator[tuple[str, Tensor]]:
    """The model's state but for its normalisation, each layer's from the one at its place in the file."""
    given, wanted = _layers(weights), _layers(model.state_dict())
    given, wanted = ({name: of for name, of in layers.items() if not _normalizes(of)} for layers in (given, wanted))
    given = _in_order(given, file)
    if len(given) != len(wanted):
        raise CheckpointError(f"{file} has {len(given)} layers with weights, the model has {len(wanted)}")
    normalized = _normalized_at_once(model)
    cancelled: Tensor | None = None
    for (source, layer), (target, own) in zip(given.items(), wanted.items(), strict=True):
        # A bias that is not there is 0, and a counter means nothing in eval mode.
        neutral = {name: torch.zeros_like(own[name]) for name in own.keys() & {"bias", "num_batches_tracked"}}
        found = layer | {name: of for name, of in neutral.items() if name not in layer}
        # BatchNorm subtracts the mean of W x + b: without b, which our networks do not have there, that of W x.
        cancels = "bias" in found and "bias" not in own and found["bias"].shape == normalized.get(target)
        bias = found.pop("bias") if cancels else None
        if {name: of.shape for name, of in found.items()} != {name: of.shape for name, of in own.items()}:
            raise CheckpointError(f"{file}: {source} is {_shown(found)}, in its place the model has {_shown(own)}")
        found = {name: _in_type_of(of, found[name]) for name, of in own.items()}
        if cancelled is not None:
            found["running_mean"] = found["running_mean"] - cancelled.to(found["running_mean"].dtype)
        cancelled = bias
        yield from ((f"{target}.{name}", tensor) for name, tensor in found.items())


def _normalized_at_once(model: nn.Module) -> dict[str, torch.Size]:
    """Layers of a sequence that a BatchNorm with statistics follows at once, and the shape of these."""
    leaves = [(name, of) for name, of in model.named_modules(remove_duplicate=False) if not list(of.children())]
    return {
        name: following.running_mean.shape
        for (name, _), (_, following) in pairwise(leaves)
        if isinstance(following, nn.modules.batchnorm._BatchNorm) and following.running_mean is not None
    }


def _in_type_of(own: Tensor, tensor: Tensor) -> Tensor:
    """Weights of another precision as the network has them: float32."""
    return tensor.to(own.dtype) if own.is_floating_point() and tensor.is_floating_point() else tensor


def _layers(weights: Mapping[str, Tensor]) -> dict[str, Layer]:
    """What belongs together, in the order of the file."""
    layers: dict[str, Layer] = {}
    for name, tensor in weights.items():
        owner, _, last = name.rpartition(".")
        layers.setdefault(owner, {})[last] = tensor
    return layers


def _in_order(layers: Mapping[str, Layer], file: Path) -> dict[str, Layer]:
    """By position where names differ by that alone, else as the program that wrote the file has listed them."""
    alike = {re.sub(r"\d+", "0", name): name for name in layers}
    if len(alike) == 1:
        return dict(sorted(layers.items(), key=lambda item: [int(number) for number in re.findall(r"\d+", item[0])]))
    if alike and file.suffix == ".safetensors":  # sorted by name
        named = " and ".join(f"{name:.60}" for name in list(alike.values())[:2])
        raise CheckpointError(
            f"{file} does not tell whether {named} comes first: safetensors keep no order, "
            "save the state dict by torch.save"
        )
    return dict(layers)


def _normalizes(layer: Layer) -> bool:
    return layer.keys() == {"mean", "std"}


def _require_same_normalization(given: Mapping[str, Layer], wanted: Mapping[str, Layer], file: Path) -> None:
    """Of a file that has none it is the configuration's, as the data loaders of its program had one."""
    inside = next((layer for layer in given.values() if _normalizes(layer)), None)
    if inside is None:
        return
    neutral = {"mean": torch.tensor([0.0]), "std": torch.tensor([1.0])}
    own = next((layer for layer in wanted.values() if _normalizes(layer)), neutral)
    if not all(_same_channels(inside[name], own[name]) for name in neutral):
        named = [f"data.{name}={[round(value, 6) for value in inside[name].flatten().tolist()]}" for name in neutral]
        raise CheckpointError(f"{file} normalises its input otherwise: set {' '.join(named)}")


def _same_channels(found: Tensor, own: Tensor) -> bool:
    """Of a value for each channel, or one for all of them, in the precision that `found` has."""
    a, b = found.flatten().double(), _in_type_of(found, own).flatten().double()
    return (len(a) == len(b) or 1 in (len(a), len(b))) and bool(((a - b).abs() <= 1e-6).all())


def _shown(layer: Layer) -> str:
    return ", ".join(f"{name} {'x'.join(map(str, tensor.shape))}" for name, tensor in layer.items() if tensor.dim())
