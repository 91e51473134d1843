"""Named tensors in one safetensors file: no code in it, nothing compressed, every size known before a value is read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from certtrain.errors import CheckpointError, one_line

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def tensor_file(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The content of a file of `tensors`; of those that share memory, such as tied weights, each is stored."""
    stored: dict[str, Tensor] = {}
    memory: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        address = plain.untyped_storage().data_ptr()
        stored[name] = plain.clone() if address in memory else plain
        memory.add(address)
    return safetensors.torch.save(stored, dict(metadata))


@dataclass(frozen=True)
class TensorFile:
    """An open file of tensors. `outline` has them on the meta device: dtypes and shapes without memory."""

    path: Path
    metadata: Mapping[str, str]
    outline: Mapping[str, Tensor]
    content: Any

    def read(self) -> dict[str, Tensor]:
        return {name: self.content.get_tensor(name) for name in self.outline}


@contextmanager
def open_tensor_file(path: Path) -> Iterator[TensorFile]:
    """Raises CheckpointError for what is not a file of tensors, here or while it is read."""
    try:
        with safetensors.safe_open(path, "pt") as content:
            outline = {name: _outline(content, name, path) for name in content.keys()}  # noqa: SIM118 - no mapping
            yield TensorFile(path, content.metadata() or {}, outline, content)
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is corrupt or truncated ({one_line(error)})") from error


def _outline(content: Any, name: str, path: Path) -> Tensor:
    part = content.get_slice(name)
    if part.get_dtype() not in DTYPES:
        raise CheckpointError(f"{path} is not of certtrain: {name} has numbers of type {part.get_dtype()}")
    return torch.empty(part.get_shape(), dtype=DTYPES[part.get_dtype()], device="meta")


def tensors_digest(tensors: Mapping[str, Tensor], description: str = "") -> str:
    """SHA-256 of names, types, shapes and values, and of a text that belongs to them."""
    digest = hashlib.sha256(description.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
