"""What a run directory holds, and when one may be entered, continued or cleared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from certtrain.config import Config
from certtrain.errors import CheckpointError, UsageError

RUN_FILES = (
    "config.yaml",
    "metrics.jsonl",
    "last.ckpt",
    "model.safetensors",
    "model.json",
    "summary.json",
    "verify.json",
    "radius.json",
    "radius.png",
    "model.onnx",
    "report.html",
)


def default_folder(config: str | Path | Mapping[str, Any] | Config) -> Path:
    """Where a run goes that was not told where: runs/NAME after its config file."""
    if not isinstance(config, str | Path):
        raise UsageError("a run that is not read from a file needs an output folder: pass out=")
    return Path("runs") / Path(config).stem


def check_folder(folder: Path, config: Config, resume: bool, overwrite: bool) -> bool:
    """Whether there is a checkpoint to continue in `folder`, in which nothing is changed yet."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file, not a folder")
    occupied = folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())
    if occupied and resume:
        _require_same_config(folder, config)
        return (folder / "last.ckpt").is_file()
    if occupied and not overwrite:
        raise UsageError(f"{folder} holds a run: continue it with --resume, replace it with --overwrite, or name --out")
    if occupied and not (folder / "config.yaml").exists():
        raise UsageError(f"{folder} is not a run directory (it has no config.yaml): it is not overwritten")
    return False


def make_folder(folder: Path, overwrite: bool) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot make the folder {folder}: {error.strerror}") from error
    if overwrite:
        _clear(folder)


def _require_same_config(folder: Path, config: Config) -> None:
    try:
        before = dict(yaml.safe_load((folder / "config.yaml").read_text()))
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise CheckpointError(f"{folder} holds no run to resume: its config.yaml cannot be read") from error
    here = config.model_dump(mode="json")
    different = [key for key in here if before.get(key) != here[key]]
    if different:
        raise UsageError(f"{folder} holds a run of another configuration: {', '.join(different)} differ")


def _clear(folder: Path) -> None:
    """Remove a run's own files; anything else that lies there stays."""
    for name in RUN_FILES:
        (folder / name).unlink(missing_ok=True)
    for events in (folder / "tensorboard").glob("events.out.tfevents.*"):
        events.unlink()


def remove_temporaries(folder: Path) -> None:
    """What a process that was killed during a save has left."""
    for name in RUN_FILES:
        for temporary in folder.glob(f".{name}.*.tmp"):
            temporary.unlink(missing_ok=True)
