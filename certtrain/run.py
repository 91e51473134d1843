"""A run: from a configuration to a directory that holds a trained, verified network."""

from __future__ import annotations

import inspect
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

import certtrain
from certtrain.attacks import PGD
from certtrain.bounds import BoundedModel
from certtrain.checkpoint import load_checkpoint, restore, save_model, write_json, write_text
from certtrain.config import Config, load_config
from certtrain.data import Augmentation, Dataset, epoch_batches, load_dataset, steps_per_epoch, to_float
from certtrain.errors import CheckpointError, DataError, UsageError
from certtrain.initialization import initialize_
from certtrain.models import build_model
from certtrain.objectives import Objective
from certtrain.precision import layout_for
from certtrain.recorder import Recorder
from certtrain.reporting import ProgressDisplay
from certtrain.run_directory import check_folder, make_folder, remove_temporaries
from certtrain.schedules import SmoothedEpsilon, StepwiseRate
from certtrain.trainer import Trainer
from certtrain.verification import Verification, verify


@dataclass(frozen=True)
class Run:
    """A finished run, or one that a signal ended (`interrupted_by`, to be resumed)."""

    folder: Path
    model: nn.Module
    summary: dict[str, Any] | None
    interrupted_by: int | None = None


def train(
    config: str | Path | Mapping[str, Any] | Config,
    out: str | Path | None = None,
    *,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    overrides: Sequence[str] = (),
    console: Console | None = None,
) -> Run:
    """Train a network, verify it, and leave everything in a run directory.

    Args:
        config: a YAML file (or the name of a shipped one), a mapping, or a Config.
        out: the run directory; by default runs/NAME after the config file.
        device: "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1", ...
        resume: continue the run in `out` where it was saved last; without one there, start it.
        overwrite: replace the run in `out`.
        overrides: "section.key=value".
        console: where progress goes.

    Raises:
        UsageError: the configuration is wrong, or `out` holds a run and neither resume nor overwrite was said.
        DataError, CheckpointError, DivergedError: as they say; the last good checkpoint stays.
    """
    folder = Path(out) if out is not None else default_folder(config)
    config = load_config(config, overrides)
    console = console or Console()
    resumed = check_folder(folder, config, resume, overwrite)
    place = resolve_device(device)
    dataset = load_data(config)
    torch.manual_seed(config.seed)
    model, architecture = build(config, dataset)
    model.to(place, memory_format=_layout(config, place))
    trainer = assemble(config, model, dataset.to(place))
    if resumed:
        state = load_checkpoint(folder / "last.ckpt", place)
        restore(model, state["model"], folder / "last.ckpt")
        _require_same_length(folder, trainer, state["trainer"]["steps_per_epoch"])
        trainer.load_state_dict(state["trainer"])
        seconds_before = state["seconds"]
        _tell(console, f"resuming {folder} after step {trainer.step} of {trainer.total_steps}")
    else:
        seconds_before = 0.0
        make_folder(folder, overwrite)
        write_text(folder / "config.yaml", config.to_yaml())
        write_json(folder / "model.json", {"format": 1, "model": architecture})
    remove_temporaries(folder)
    with ProgressDisplay(console, trainer.total_steps, trainer.epochs, trainer.step) as display:
        recorder = Recorder(folder, config.training.checkpoint_seconds, trainer, display, seconds_before)
        with recorder.until_signalled():
            finished = trainer.run(recorder)
        recorder.save(trainer)
    if not finished:
        _tell(console, f"saved {folder} at step {trainer.step}; continue with --resume")
        return Run(folder, model, None, interrupted_by=recorder.signal)
    save_model(folder, model, architecture)
    results = verify_run(config, model, dataset)
    summary = summarize(config, results, recorder.seconds, trainer.step, recorder.images_per_second)
    write_json(folder / "summary.json", summary)
    return Run(folder, model, summary)


# --- pieces, in the order they are needed ----------------------------------------------------------------------------


def _tell(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def default_folder(config: str | Path | Mapping[str, Any] | Config) -> Path:
    if not isinstance(config, str | Path):
        raise UsageError("a run that is not read from a file needs an output folder: pass out=")
    return Path("runs") / Path(config).stem


def resolve_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name!r} is not to be had here: {str(error).splitlines()[0]}") from error
    return device


def load_data(config: Config) -> Dataset:
    data = config.data
    dataset = load_dataset(
        data.name, data.root, download=data.download, path=data.path, validation=data.validation, seed=config.seed
    )
    return replace(dataset, train=dataset.train.take(slice(data.limit)))


def build(config: Config, dataset: Dataset) -> tuple[nn.Module, dict[str, Any]]:
    """The initialized network, and the arguments of `build_model` that rebuild it."""
    architecture = {
        "name": config.model.name,
        "image_shape": list(dataset.image_shape),
        "num_classes": dataset.num_classes,
        "mean": list(config.data.mean or dataset.mean),
        "std": list(config.data.std or dataset.std),
        "options": dict(config.model.options),
    }
    channels = dataset.image_shape[0]
    if {len(architecture["mean"]), len(architecture["std"])} != {channels}:
        raise UsageError(f"data.mean and data.std need one number for each of the images' {channels} channels")
    try:
        model = build_model(**architecture)
    except UsageError:
        raise
    except (RuntimeError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"model {config.model.name} cannot be built: {reason}") from error
    shape = _output_shape(config.model.name, model, dataset.image_shape)
    if shape != (1, dataset.num_classes):
        raise UsageError(f"model {config.model.name} returns shape {shape}, not (1, {dataset.num_classes})")
    return initialize_(model, config.training.initialization), architecture


def _output_shape(name: str, model: nn.Module, image_shape: tuple[int, int, int]) -> tuple[int, ...]:
    image = torch.zeros(1, *image_shape, device=next(model.parameters(), torch.empty(0)).device)
    try:
        with torch.no_grad():
            return tuple(model.eval()(image).shape)
    except (RuntimeError, ValueError) as error:
        size = "×".join(map(str, image_shape))
        reason = str(error).partition("\n")[0]
        raise DataError(f"model {name} cannot take {size} images: {reason}") from error


def assemble(config: Config, model: nn.Module, dataset: Dataset) -> Trainer:
    """The trainer for a configuration; model and data are on their device."""
    training, epsilon, optimizer = config.training, config.epsilon, config.optimizer
    split = dataset.train
    per_epoch = steps_per_epoch(len(split), training.batch_size)
    _check_last_batch(model, len(split), training.batch_size)
    regularizers = config.regularizers
    objective = Objective(
        BoundedModel(model, to_float(split.images[:1]), config.backend),
        method=training.method,
        loss_fusion=training.loss_fusion,
        regularization=regularizers.weight,
        tightness=regularizers.tightness,
        relu_balance=regularizers.relu_balance,
        tolerance=regularizers.tolerance,
        l1=regularizers.l1,
        accumulation=training.accumulation,
        precision=training.precision,
        compile_for=training.batch_size if _compiles(config, split.images.device) else None,
    )
    start = (epsilon.start_epoch - 1) * per_epoch
    augmentation = Augmentation(config.data.flip, config.data.crop)
    return Trainer(
        model=model,
        objective=objective,
        optimizer=build_optimizer(config, model),
        batches=lambda epoch, first: epoch_batches(
            split, training.batch_size, seed=config.seed, epoch=epoch, augmentation=augmentation, start_step=first
        ),
        steps_per_epoch=per_epoch,
        epochs=training.epochs,
        eps=SmoothedEpsilon(
            epsilon.max, start, start + epsilon.warmup_epochs * per_epoch, mid=epsilon.mid, beta=epsilon.beta
        ),
        max_eps=epsilon.max,
        lr=StepwiseRate(optimizer.lr, [m * per_epoch for m in optimizer.milestones], optimizer.factor),
        clip=optimizer.clip,
    )


def _layout(config: Config, device: torch.device) -> torch.memory_format:
    training = config.training
    if training.channels_last == "auto":
        return layout_for(training.precision, device)
    return torch.channels_last if training.channels_last else torch.contiguous_format


def _compiles(config: Config, device: torch.device) -> bool:
    training = config.training
    wanted = device.type == "cuda" if training.compile == "auto" else training.compile
    return wanted and training.accumulation == 1 and config.backend == "native"


def build_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    section = config.optimizer
    optimizer = getattr(torch.optim, section.name)
    fused = {"fused": True} if "fused" in inspect.signature(optimizer).parameters else {}
    try:
        return optimizer(model.parameters(), lr=section.lr, **(fused | section.arguments))
    except (TypeError, ValueError) as error:
        raise UsageError(f"optimizer {section.name}: {error}") from error


def verify_run(config: Config, model: nn.Module, dataset: Dataset, limit: int | None = None) -> list[Verification]:
    section = config.verification
    classes = _output_shape(config.model.name, model, dataset.image_shape)[1]
    if dataset.num_classes > classes:
        raise DataError(f"the data has labels up to {dataset.num_classes - 1}, the model only {classes} classes")
    return verify(
        model,
        dataset.test,
        config.test_radii,
        section.method,
        attack=PGD(section.pgd_steps, section.pgd_restarts, section.pgd_step_size),
        limit=section.limit if limit is None else limit,
        batch_size=section.batch_size,
        seed=config.seed,
        backend=config.backend,
    )


def summarize(
    config: Config, results: Sequence[Verification], seconds: float, steps: int, images_per_second: float
) -> dict[str, Any]:
    """summary.json; the three errors on top are those at epsilon.max, or else at the largest radius tested."""
    chosen = next((r for r in results if r.eps == config.epsilon.max), max(results, key=lambda r: r.eps))
    return {
        **chosen.summary(),
        "train_seconds": round(seconds, 2),
        "verify_seconds": round(sum(r.seconds for r in results), 2),
        "images_per_second": round(images_per_second, 1),
        "steps": steps,
        "seed": config.seed,
        "radii": [r.summary() for r in results],
        "versions": versions(),
        "config": config.model_dump(mode="json"),
    }


def versions() -> dict[str, str]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return {
        "certtrain": certtrain.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device,
    }


def _check_last_batch(model: nn.Module, images: int, batch_size: int) -> None:
    has_batch_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    if has_batch_norm and (images - 1) % batch_size == 0:
        raise UsageError(
            f"training.batch_size: {images} images in batches of {batch_size} leave one alone, "
            "which BatchNorm cannot normalise: choose another size"
        )


def _require_same_length(folder: Path, trainer: Trainer, steps_per_epoch: int) -> None:
    if steps_per_epoch != trainer.steps_per_epoch:
        raise CheckpointError(
            f"{folder / 'last.ckpt'} was saved with {steps_per_epoch} steps per epoch, "
            f"the training set now gives {trainer.steps_per_epoch}: the data has changed"
        )
