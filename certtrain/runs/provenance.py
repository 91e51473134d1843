"""What a number was made with."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import certtrain
from certtrain.config import Config
from certtrain.modules import device_of
from certtrain.runs.tensor_file import tensors_digest
from certtrain.verification.digests import digest_of

if TYPE_CHECKING:
    from certtrain.data import Split


def made_with(config: Config, model: nn.Module, split: Split) -> dict[str, Any]:
    """What JSON files of results say of them, beside the numbers.

    Args:
        split: all the images that they are about, or begin with; `split_sha256` is its `split_digest`.
    """
    return {
        "seed": config.seed,
        "weights_sha256": tensors_digest(model.state_dict()),
        "split_sha256": digest_of(split),
        "versions": versions(device_of(model)),
        "config": config.model_dump(mode="json"),
    }


def versions(device: torch.device | str = "cpu") -> dict[str, str]:
    """Of the programs, and the device that computed: how sums are rounded, and what they cost, hangs on all of them."""
    threads = "" if torch.device(device).type == "cuda" else f", {torch.get_num_threads()} threads"
    return {
        "certtrain": certtrain.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": processor(device) + threads,
    }


def processor(device: torch.device | str) -> str:
    """A GPU by its name; of a CPU the instructions that PyTorch takes there, as "CPU (AVX2)"."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({torch.backends.cpu.get_cpu_capability()})"
