"""Files that are whole at every moment: atomic writes, the resume point, and the weights that are handed out."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from certtrain.errors import CheckpointError, UsageError
from certtrain.models import build_model
from certtrain.runtime.files import write_atomically, write_json

FORMAT = 1


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write a resume point: nested dicts and lists of tensors, numbers and strings."""
    write_atomically(path, lambda file: torch.save({"format": FORMAT, **state}, file))


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a resume point, every byte checked against its checksum; nothing in it is executed.

    Raises:
        CheckpointError: there is none, it is truncated or corrupt, or another version wrote it.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is not None:
            raise CheckpointError(f"checkpoint {path} is corrupt: {broken} does not match its checksum")
        state = torch.load(path, map_location=device, weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # torch and zipfile raise a dozen types for what a damaged file can hold
        raise CheckpointError(f"checkpoint {path} is corrupt or truncated ({_one_line(error)})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of this version of certtrain (format {FORMAT})")
    return state


def restore(model: nn.Module, weights: Mapping[str, Tensor], source: Path) -> None:
    """Load `weights` into `model`, or say what does not fit.

    Raises:
        CheckpointError: the weights are those of another architecture.
    """
    own = model.state_dict()
    missing, surplus = own.keys() - weights.keys(), weights.keys() - own.keys()
    wrong = [key for key in own.keys() & weights.keys() if own[key].shape != weights[key].shape]
    if missing or surplus or wrong:
        details = [f"lacks {min(missing)}"] if missing else []
        details += [f"has {min(surplus)} besides"] if surplus else []
        details += [f"{key} is {tuple(weights[key].shape)}, not {tuple(own[key].shape)}" for key in sorted(wrong)[:1]]
        raise CheckpointError(f"{source} is of another architecture: it {'; '.join(details)}")
    model.load_state_dict(dict(weights))


def save_model(folder: Path, model: nn.Module, architecture: Mapping[str, Any]) -> None:
    """Write model.safetensors and model.json, from which `load_model` rebuilds the network."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_json(folder / "model.json", {"format": FORMAT, "model": dict(architecture)})
    content = safetensors.torch.save(weights, {"sha256": _digest(weights)})
    write_atomically(folder / "model.safetensors", lambda file: file.write(content))


def load_model(source: str | Path, device: torch.device | str = "cpu") -> nn.Module:
    """The trained network of a run, in eval mode.

    Args:
        source: a run directory, or its model.safetensors or last.ckpt (model.json must lie beside it).

    Raises:
        CheckpointError: missing, corrupt, or of another architecture.
    """
    source = Path(source)
    folder, file = (source, source / "model.safetensors") if source.is_dir() else (source.parent, source)
    if source.is_dir() and not file.exists() and (source / "last.ckpt").exists():
        raise CheckpointError(f"the run in {source} is not finished: resume it, or name {source / 'last.ckpt'}")
    if not file.is_file():
        raise CheckpointError(f"there is no model at {source}: expected a run directory or its model.safetensors")
    try:
        model = build_model(**load_architecture(folder))
    except (UsageError, CheckpointError):
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder / 'model.json'} is missing or corrupt ({_one_line(error)})") from error
    restore(model, load_checkpoint(file)["model"] if file.suffix == ".ckpt" else _load_weights(file), file)
    return model.eval().to(device)


def load_architecture(folder: Path) -> dict[str, Any]:
    """The arguments of `build_model` that rebuild the network of the run in `folder`.

    Raises:
        CheckpointError: model.json is missing or corrupt.
    """
    description = folder / "model.json"
    try:
        return dict(json.loads(description.read_text())["model"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{description} is missing or corrupt ({_one_line(error)})") from error


def _load_weights(file: Path) -> dict[str, Tensor]:
    try:
        with safetensors.safe_open(file, "pt") as content:
            weights = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 - no mapping
            expected = (content.metadata() or {}).get("sha256")
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is corrupt or truncated ({_one_line(error)})") from error
    if expected not in (None, _digest(weights)):
        raise CheckpointError(f"{file} is corrupt: its weights do not match their checksum")
    return weights


def _digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
