"""What several scripts need: where results are, the runs of a study, a fresh run, growth of bounds.

PyTorch is imported by none of it, so that a script may start without.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import certtrain
from certtrain.errors import DivergedError

if TYPE_CHECKING:
    from certtrain.bounds.results import Bounds

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
RESULTS = DOCS / "results"
ERRORS = ("natural_error", "pgd_error", "verified_error")


def runs_of(study: Path, having: str) -> Iterator[tuple[str, int, Path]]:
    """Cell, seed and folder of each run of a study that has the file `having`."""
    for file in sorted(study.glob(f"*/seed-*/{having}")):
        run = file.parent
        yield run.parent.name, int(run.name.removeprefix("seed-")), run


def train_afresh(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The run's summary; where it diverged nothing but `diverged_at`, the epsilon at which the loss was not finite.

    Raises:
        KeyboardInterrupt: the run was interrupted.
    """
    try:
        summary = certtrain.train(config, folder, overwrite=True).summary
    except DivergedError as error:
        return {"diverged_at": error.eps}
    if summary is None:
        raise KeyboardInterrupt
    return summary


def growth_of(bounds: Bounds) -> list[float]:
    """Mean radius before every ReLU, relative to that of the box that enters the network."""
    start = bounds.affine_input.radius.mean()
    return [(box.radius.mean() / start).item() for box in bounds.relu_inputs]
