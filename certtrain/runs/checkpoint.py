"""The resume point of a run, and the weights that are handed out with what is needed to rebuild their network.

Neither holds code: both are safetensors (`tensor_file`). Of a network's description, only the names of `MODELS` are
built; other code is imported where the caller trusts whom the files are from, and not otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from certtrain.errors import CheckpointError, UsageError, one_line
from certtrain.models import MODELS, build_model, find_model
from certtrain.modules import evaluating
from certtrain.runs.files import ARCHITECTURE, CHECKPOINT, WEIGHTS
from certtrain.runs.tensor_file import DTYPES, open_tensor_file, tensor_file, tensors_digest
from certtrain.runtime.files import parse_json, read_json, write_atomically, write_json

FORMAT = 2  # of last.ckpt
MODEL_FORMAT = 1  # of model.json
LARGEST_DESCRIPTION = 2**16  # bytes of model.json

# --- the resume point -------------------------------------------------------------------------------------------------

DESCRIPTION = "certtrain"  # the key of the file's metadata; JSON of the format, the checksum and the state's structure
TENSOR, PAIRS = "$tensor", "$pairs"  # in that structure: a tensor by its name, a mapping whose keys are not all strings


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write a resume point: nested mappings and lists of tensors, numbers, strings and None; tuples become lists.

    A tensor that occurs several times is stored once.
    """
    tensors: dict[str, Tensor] = {}
    names: dict[tuple[Any, ...], str] = {}
    structure = _packed(state, tensors, names)
    checksum = tensors_digest(tensors, json.dumps(structure))
    content = tensor_file(
        tensors, {DESCRIPTION: json.dumps({"format": FORMAT, "sha256": checksum, "state": structure})}
    )
    write_atomically(path, lambda file: file.write(content))


def load_checkpoint(path: Path, check: Callable[[dict[str, Any]], object] = lambda outline: None) -> dict[str, Any]:
    """Read a resume point, every byte checked against the checksum; nothing in it is executed.

    Args:
        check: is called with the state as it will be, but for the tensors' values (they are on the meta device), before
            any is read; what it raises ends the reading.

    Raises:
        CheckpointError: there is none, it is truncated or corrupt, or another version wrote it.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    if _is_zip(path):
        raise CheckpointError(f"{path} is not a checkpoint of this version of certtrain (format {FORMAT})")
    with open_tensor_file(path) as file:
        try:
            description = parse_json(file.metadata[DESCRIPTION])
            written, checksum, structure = (description[key] for key in ("format", "sha256", "state"))
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is not a checkpoint of certtrain") from error
        if written != FORMAT:
            raise CheckpointError(f"{path} is not a checkpoint of this version of certtrain (format {FORMAT})")
        try:
            check(_unpacked(structure, file.outline))
            tensors = file.read()
            if tensors_digest(tensors, json.dumps(structure)) != checksum:
                raise CheckpointError(f"checkpoint {path} is corrupt: it does not match its checksum")
            return _unpacked(structure, tensors)
        except (_Malformed, RecursionError) as error:
            raise CheckpointError(f"checkpoint {path} is corrupt ({one_line(error)})") from error


def _is_zip(path: Path) -> bool:
    """What torch.save writes, and the first version of certtrain did."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\3\4"


class _Malformed(Exception):
    """A structure that `_packed` does not make."""


def _packed(value: Any, tensors: dict[str, Tensor], names: dict[tuple[Any, ...], str]) -> Any:
    """`value` as JSON; its tensors are put into `tensors`, under the names that stand for them."""
    if isinstance(value, Tensor):
        memory = (value.device, value.untyped_storage().data_ptr(), value.storage_offset())
        same = (*memory, value.shape, value.stride(), value.dtype) if value.numel() else (len(names),)
        name = names.setdefault(same, str(len(names)))
        if name not in tensors:
            tensors[name] = value.detach().cpu()
        return {TENSOR: name}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {key: _packed(item, tensors, names) for key, item in value.items()}
        return {PAIRS: [[key, _packed(item, tensors, names)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [_packed(item, tensors, names) for item in value]
    return value


def _unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpacked(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {TENSOR}:
        if not isinstance(value[TENSOR], str) or value[TENSOR] not in tensors:
            raise _Malformed(f"it lacks the tensor {str(value[TENSOR])[:20]}")
        return tensors[value[TENSOR]]
    if value.keys() == {PAIRS}:
        pairs = value[PAIRS]
        if not isinstance(pairs, list) or not all(
            isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], int) for pair in pairs
        ):
            raise _Malformed("a mapping is none")
        return {key: _unpacked(item, tensors) for key, item in pairs}
    return {key: _unpacked(item, tensors) for key, item in value.items()}


# --- the network ------------------------------------------------------------------------------------------------------


class Architecture(BaseModel):
    """The arguments of `build_model`, as model.json holds them."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    name: str
    image_shape: list[int] = Field(min_length=3, max_length=3)
    num_classes: int = Field(ge=1)
    mean: list[float] | None = None
    std: list[float] | None = None
    options: dict[str, Any] = {}


def save_architecture(folder: Path, architecture: Mapping[str, Any]) -> None:
    write_json(folder / ARCHITECTURE, {"format": MODEL_FORMAT, "model": dict(architecture)})


def save_weights(file: Path, model: nn.Module) -> None:
    weights = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    content = tensor_file(weights, {"sha256": tensors_digest(weights)})
    write_atomically(file, lambda stream: stream.write(content))


def load_model(source: str | Path, device: torch.device | str = "cpu", *, trust: bool = False) -> nn.Module:
    """The trained network of a run, in eval mode.

    Args:
        source: a run directory, or its model.safetensors or last.ckpt (model.json must lie beside it).
        trust: import the code that model.json names, where it is not one of certtrain's own architectures.

    Raises:
        CheckpointError: missing, corrupt, or of another architecture.
        UsageError: it names other code, which is not trusted, or none that exists.
    """
    source = Path(source)
    folder, file = (source, source / WEIGHTS) if source.is_dir() else (source.parent, source)
    if source.is_dir() and not file.exists() and (source / CHECKPOINT).exists():
        raise CheckpointError(f"the run in {source} is not finished: resume it, or name {source / CHECKPOINT}")
    if not file.is_file():
        raise CheckpointError(f"there is no model at {source}: expected a run directory or its model.safetensors")
    architecture = load_architecture(folder)
    find_model(architecture["name"], trust)  # before anything else is read
    try:
        check = _shape_check(architecture, file)
        weights = load_weights(file, check)
        model = build_model(**architecture, trust=trust)
    except (UsageError, CheckpointError):
        raise
    except (TypeError, ValueError, RuntimeError, ArithmeticError, MemoryError) as error:
        raise CheckpointError(f"{folder / ARCHITECTURE} is missing or corrupt ({one_line(error)})") from error
    restore(model, weights, file)
    return model.eval().to(device)


def load_architecture(folder: Path) -> dict[str, Any]:
    """The arguments of `build_model` that rebuild the network of the run in `folder`.

    Raises:
        CheckpointError: model.json is missing or corrupt.
    """
    description = folder / ARCHITECTURE
    with suppress(OSError):  # it is missing: said below
        if description.stat().st_size > LARGEST_DESCRIPTION:
            raise CheckpointError(f"{description} is no description of a network: it is too long")
    return read_json(description, lambda content: Architecture.model_validate(content["model"]).model_dump())


def restore(model: nn.Module, weights: Mapping[str, Tensor], source: Path | str) -> None:
    """Load `weights` into `model`, or say what does not fit.

    Raises:
        CheckpointError: the weights are those of another architecture, or `model` does not take them as they are.
    """
    require_same_shapes(model.state_dict(), weights, source)
    try:
        model.load_state_dict(dict(weights))
    except RuntimeError as error:  # buffers that torch cannot write to, and a module's own objections
        raise CheckpointError(f"{source} cannot be loaded: {one_line(error)}") from error
    for name, tensor in model.state_dict().items():
        if not _same_bits(tensor, weights[name]):
            raise CheckpointError(f"{source} has values of {name} that the model does not keep (is it tied to others?)")


def require_reloadable(model: nn.Module, architecture: Mapping[str, Any], trust: bool) -> None:
    """Save and load a network in memory: what could not be handed out is not trained first.

    Raises:
        UsageError: some of its state is not kept by a file of tensors, or what is loaded is another function.
    """
    name, state = architecture["name"], model.state_dict()
    for key, value in state.items():
        if problem := _unsavable(value):
            raise UsageError(f"model {name} cannot be saved: {key} is {problem}")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.seed()  # nothing may depend on the random numbers of this start
            again = build_model(**architecture, trust=trust)
            restore(again, safetensors.torch.load(tensor_file(state, {})), "what was saved")
            image = torch.rand(1, *architecture["image_shape"])
    except CheckpointError as error:
        raise UsageError(f"model {name} could not be loaded once it is trained: {error}") from error
    with evaluating(model), torch.no_grad():
        expected, found = model(image), again.eval()(image)
    largest = expected.where(expected.isfinite(), 0).abs().max().item()
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * largest, equal_nan=True):
        raise UsageError(
            f"model {name} could not be loaded once it is trained: it would return other logits, since something "
            "that decides them is neither a parameter nor a persistent buffer"
        )


def _unsavable(value: Any) -> str | None:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}, not a tensor"
    if value.layout is not torch.strided or value.dtype not in DTYPES.values():
        return f"a tensor of {value.dtype} in the layout {value.layout}"
    if any(stride == 0 and size > 1 for stride, size in zip(value.stride(), value.shape, strict=True)):
        return "an expanded tensor, whose elements share memory: register a .clone() of it"
    return None


def require_same_shapes(own: Mapping[str, Any], weights: Mapping[str, Any], source: Path | str) -> None:
    """Raises CheckpointError unless names, shapes and dtypes of the two state dicts agree."""
    missing, surplus = own.keys() - weights.keys(), weights.keys() - own.keys()
    kinds = [(key, _kind(weights[key]), _kind(own[key])) for key in own if key in weights]
    wrong = [f"{key} is {found}, not {expected}" for key, found, expected in kinds if found != expected]
    if missing or surplus or wrong:
        details = [f"it lacks {min(missing, key=str)}"] if missing else []
        details += [f"it has {min(surplus, key=str)!s:.100} besides"] if surplus else []
        raise CheckpointError(f"{source} is of another architecture: {'; '.join(details + wrong[:1])}")


def _kind(value: Any) -> str:
    """Shape, and dtype where it is not the usual."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    dtype = "" if value.dtype == torch.float32 else f" of {str(value.dtype).removeprefix('torch.')}"
    return f"{tuple(value.shape)}{dtype}"


def _same_bits(a: Tensor, b: Tensor) -> bool:
    a, b = (t.detach().cpu().contiguous().view(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)


def _shape_check(architecture: Mapping[str, Any], file: Path) -> Callable[[Mapping[str, Any]], None]:
    """Compares stored weights with the network before either is given memory; foreign code's with nothing."""
    if architecture["name"] in MODELS:
        with torch.device("meta"):
            own = build_model(**architecture).state_dict()
        return lambda outline: require_same_shapes(own, outline, file)
    return lambda outline: None


def load_weights(file: Path, check: Callable[[Mapping[str, Any]], None]) -> Mapping[str, Tensor]:
    """The weights in a model.safetensors or last.ckpt.

    Args:
        check: is called with the tensors' dtypes and shapes, on the meta device, before any value is read.

    Raises:
        CheckpointError: corrupt, or no network.
    """
    if file.suffix == ".ckpt":
        return weights_of(load_checkpoint(file, lambda outline: check(weights_of(outline, file))), file)
    with open_tensor_file(file) as stored:
        check(stored.outline)
        weights = stored.read()
    if stored.metadata.get("sha256") not in (None, tensors_digest(weights)):
        raise CheckpointError(f"{file} is corrupt: its weights do not match their checksum")
    return weights


def weights_of(state: Mapping[str, Any], file: Path) -> Mapping[str, Tensor]:
    """The network in a resume point; a CheckpointError where there is none."""
    trainer = state.get("trainer") if isinstance(state, dict) else None
    weights = trainer.get("model") if isinstance(trainer, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
        raise CheckpointError(f"{file} holds no network")
    return weights
