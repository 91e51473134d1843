"""The run that a command line names: its folder, its configuration with what is changed of it, its network."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from certtrain.errors import CheckpointError, DataError, UsageError, shown
from certtrain.runs.files import CONFIG, has_traces_of_run
from certtrain.runtime.device import check_device_name

if TYPE_CHECKING:
    from torch import nn

    from certtrain.config import Config
    from certtrain.data import Dataset
    from certtrain.runtime.distributed import Ranks

CHANGEABLE = "data, verification, epsilon, seed and backend"  # of the configuration of a network that is trained


def folder_of(run: Path) -> Path:
    """The run directory, where a file in it was named."""
    return run if run.is_dir() else run.parent


def config_of(options: argparse.Namespace, run: Path, changes: Mapping[str, Any] | None = None) -> Config:
    """The configuration of the run that was named, with what the command line changes of it.

    Where weights are given beside it, `run` is the configuration itself, of which anything can be changed.

    Raises:
        CheckpointError: there is nothing at `run`, or a model without its configuration.
        UsageError: what is to be changed was settled by training.
    """
    from certtrain.config.loading import load_config

    if getattr(options, "model_weights", None) is not None:
        check_device_name(options.device)
        return load_config(run, [*options.overrides, changes or {}])
    settled = [text for text in options.overrides if re.match(r"(training|optimizer|regularizers|model)\b", text)]
    settled = [text for text in settled if not text.startswith("model.path=")]
    if settled:
        raise UsageError(f"{shown(settled[0])}: training has settled that; only {CHANGEABLE} can be changed")
    check_device_name(getattr(options, "device", "cpu"))
    file = folder_of(run) / CONFIG
    if file.is_file():
        return load_config(file, [*options.overrides, changes or {}])
    if has_traces_of_run(folder_of(run)):
        raise CheckpointError(f"{folder_of(run)} is not a run directory: it has no config.yaml")
    raise CheckpointError(f"there is no model at {run}: expected a run directory or its model.safetensors")


def open_network(options: argparse.Namespace, config: Config, ranks: Ranks | None = None) -> nn.Module:
    """The network that was named, on its device."""
    from certtrain.models.own import modules_from
    from certtrain.runs.build import resolve_device
    from certtrain.runs.checkpoint import load_model
    from certtrain.runtime.distributed import ALONE

    with modules_from(config.model.path):
        place = resolve_device(options.device, ranks or ALONE)
        return load_model(options.run, place, trust=options.trust_model)


def open_weights(options: argparse.Namespace, config: Config, dataset: Dataset, ranks: Ranks) -> nn.Module:
    """The network of a configuration with the weights that were given beside it, on its device."""
    from certtrain.importing.weights import load_weights
    from certtrain.runs.build import build, resolve_device

    model, _ = build(config, dataset)
    load_weights(model, options.model_weights)
    return model.eval().to(resolve_device(options.device, ranks))


def require_held_out(config: Config, run: Path) -> None:
    """What the run in `run` was trained on are no validation images, whatever the command line changes.

    Raises:
        UsageError: the run's images are divided otherwise than it has divided them.
    """
    from certtrain.config.loading import load_config

    trained = load_config(folder_of(run) / CONFIG)
    otherwise = config.data.divided_otherwise(config.seed, trained.data, trained.seed)
    if config.verification.split == "validation" and otherwise:
        raise UsageError(f"verification.split validation: the run was trained on some of these images: {otherwise}")


def require_data(config: Config) -> None:
    """A mistyped folder of one's own data is answered at once."""
    path = config.data.path
    if path is not None and not os.path.isdir(os.path.expanduser(path)):
        raise DataError(f"data.path: there is no folder {path}")
