"""certtrain: train networks whose robustness is proved.

model = certtrain.load_model("runs/NAME")
run = certtrain.train("digits")
results = certtrain.verify(model, data, eps)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from certtrain.runs.checkpoint import load_model
    from certtrain.runs.train import Run, train
    from certtrain.training.trainer import Observer
    from certtrain.verification.verification import Verification
    from certtrain.verification.verify import verify

__version__ = "0.1.0"
__all__ = ["Observer", "Run", "Verification", "load_model", "train", "verify"]

_HOMES = {
    "load_model": "certtrain.runs.checkpoint",
    "train": "certtrain.runs.train",
    "Run": "certtrain.runs.train",
    "Observer": "certtrain.training.trainer",
    "verify": "certtrain.verification.verify",
    "Verification": "certtrain.verification.verification",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that `certtrain.regularizers` alone does not load the trainer and its dependencies."""
    if name not in _HOMES:
        raise AttributeError(f"module 'certtrain' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
