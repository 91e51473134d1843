"""The files in the folders of runs and studies: what each is called, and what it means that one is there.

Known without torch. `certtrain.verification`, which knows nothing of runs, spells model.json itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
STEPS = "steps.jsonl"
START = "start.json"
CHECKPOINT = "last.ckpt"
DIVERGED = "diverged.json"  # at which epsilon
WEIGHTS = "model.safetensors"  # of the network that a run hands out: the averaged one, where weights are averaged
RAW_WEIGHTS = "model-raw.safetensors"  # those after the last step, where the others are an average
ARCHITECTURE = "model.json"
SUMMARY = "summary.json"
VERIFIED = "verify.json"
VERDICTS = "verdicts.json"
RADII = "radius.json"
RADII_PLOT = "radius.png"
ONNX = "model.onnx"
REPORT = "report.html"

TENSORBOARD = "tensorboard"  # a folder
VERIFYING = ".verifying"  # a folder, while the run's own verification searches: what is known of each image


class RunFile(NamedTuple):
    """of_network: it says something of the trained network, and is set aside where training that goes on.

    numbered: an earlier one that says something else is kept under a number (`directory.write_results`).
    """

    name: str
    of_network: bool = False
    numbered: bool = False


_FILES = (
    RunFile(CONFIG),
    RunFile(METRICS),
    RunFile(STEPS),
    RunFile(START),
    RunFile(CHECKPOINT),
    RunFile(DIVERGED),
    RunFile(WEIGHTS, of_network=True),
    RunFile(RAW_WEIGHTS, of_network=True),
    RunFile(ARCHITECTURE),
    RunFile(SUMMARY, of_network=True),
    RunFile(VERIFIED, of_network=True, numbered=True),
    RunFile(VERDICTS, of_network=True),
    RunFile(RADII, of_network=True, numbered=True),
    RunFile(RADII_PLOT, of_network=True),
    RunFile(ONNX, of_network=True),
    RunFile(REPORT, of_network=True),
)
RUN_FILES = tuple(file.name for file in _FILES)
OF_NETWORK = tuple(file.name for file in _FILES if file.of_network)
NUMBERED = tuple(file.name for file in _FILES if file.numbered)

GRID = "study.json"
SEARCH = "tuning.json"
SEARCH_STORAGE = "optuna.db"
SEARCH_ID = "search.id"  # by which a database elsewhere knows the folder
SCALING = "scaling.json"
SCALING_PLOT = "scaling.png"
STUDY_FILES = (GRID, SEARCH, SEARCH_STORAGE, SEARCH_ID, SCALING, SCALING_PLOT)  # of studies, searches, scaling laws


# --- what is in a folder ----------------------------------------------------------------------------------------------


def is_run(folder: Path) -> bool:
    """Whether it is a run directory: its files are protected, and it can be compared. The config is its first file."""
    return (folder / CONFIG).is_file()


def is_started(folder: Path) -> bool:
    """Whether its config.yaml is that of a run, and not one that somebody wrote: a run has its network beside it."""
    return is_run(folder) and (folder / ARCHITECTURE).is_file()


def is_finished(folder: Path) -> bool:
    """The summary is what a run writes last."""
    return (folder / SUMMARY).is_file()


def has_traces_of_run(folder: Path) -> bool:
    """Whether something of a run is there, be it one that was copied in part: no place for other runs."""
    return any((folder / name).exists() for name in (CONFIG, ARCHITECTURE, WEIGHTS, CHECKPOINT))


def holds_runs(folder: Path) -> bool:
    """Whether it is the folder of a study, or of a search."""
    patterns = (f"*/{CONFIG}", f"*/seed-*/{CONFIG}", f"trials/*/{CONFIG}")
    return any(any(folder.glob(pattern)) for pattern in patterns)
