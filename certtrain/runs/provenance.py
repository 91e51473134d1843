"""What a number was made with."""

from __future__ import annotations

import platform

import torch

import certtrain


def versions() -> dict[str, str]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return {
        "certtrain": certtrain.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device,
    }
