"""A run: from a configuration to a directory that holds a trained, verified network."""

from __future__ import annotations

import platform
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import yaml
from rich.console import Console
from torch import nn

import certtrain
from certtrain.attacks import PGD
from certtrain.bounds import BoundedModel
from certtrain.checkpoint import (
    load_checkpoint,
    load_model,
    restore,
    save_checkpoint,
    save_model,
    write_json,
    write_text,
)
from certtrain.config import Config, load_config
from certtrain.data import Augmentation, Dataset, epoch_batches, load_dataset, steps_per_epoch, to_float
from certtrain.diagnostics import layer_statistics
from certtrain.errors import CheckpointError, DataError, UsageError
from certtrain.initialization import initialize_
from certtrain.models import build_model
from certtrain.objectives import SMALLEST_RADIUS, Objective
from certtrain.reporting import MetricsFile, ProgressDisplay, TensorBoard, epoch_record
from certtrain.schedules import SmoothedEpsilon, StepwiseRate
from certtrain.trainer import EpochReport, Trainer
from certtrain.verification import Verification, verify

PROBE_IMAGES = 256  # of the training set, on which each layer's statistics are taken


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
    resumed = _check_folder(folder, config, resume, overwrite)
    place = resolve_device(device)
    dataset = load_data(config)
    torch.manual_seed(config.seed)
    model, architecture = build(config, dataset)
    model.to(place)
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
        _make_folder(folder, overwrite)
        write_text(folder / "config.yaml", config.to_yaml())
        write_json(folder / "model.json", {"format": 1, "model": architecture})
    _remove_temporaries(folder)
    with ProgressDisplay(console, trainer.total_steps, trainer.epochs, trainer.step) as display:
        recorder = _Recorder(folder, config, trainer, display, seconds_before)
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


def build_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    section = config.optimizer
    try:
        return getattr(torch.optim, section.name)(model.parameters(), lr=section.lr, **section.arguments)
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


def _check_folder(folder: Path, config: Config, resume: bool, overwrite: bool) -> bool:
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


def _make_folder(folder: Path, overwrite: bool) -> None:
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


def _require_same_length(folder: Path, trainer: Trainer, steps_per_epoch: int) -> None:
    if steps_per_epoch != trainer.steps_per_epoch:
        raise CheckpointError(
            f"{folder / 'last.ckpt'} was saved with {steps_per_epoch} steps per epoch, "
            f"the training set now gives {trainer.steps_per_epoch}: the data has changed"
        )


RUN_FILES = (
    "config.yaml",
    "metrics.jsonl",
    "last.ckpt",
    "model.safetensors",
    "model.json",
    "summary.json",
    "verify.json",
)


def _clear(folder: Path) -> None:
    """Remove a run's own files; anything else that lies there stays."""
    for name in RUN_FILES:
        (folder / name).unlink(missing_ok=True)
    for events in (folder / "tensorboard").glob("events.out.tfevents.*"):
        events.unlink()


def _remove_temporaries(folder: Path) -> None:
    """What a process that was killed during a save has left."""
    for name in RUN_FILES:
        for temporary in folder.glob(f".{name}.*.tmp"):
            temporary.unlink(missing_ok=True)


def _check_last_batch(model: nn.Module, images: int, batch_size: int) -> None:
    has_batch_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    if has_batch_norm and (images - 1) % batch_size == 0:
        raise UsageError(
            f"training.batch_size: {images} images in batches of {batch_size} leave one alone, "
            "which BatchNorm cannot normalise: choose another size"
        )


class _Recorder:
    """The run's observer: saves, logs, shows, and ends the run when a signal has come."""

    def __init__(
        self, folder: Path, config: Config, trainer: Trainer, display: ProgressDisplay, seconds_before: float
    ) -> None:
        self._folder, self._config, self._display = folder, config, display
        self._metrics = MetricsFile(folder / "metrics.jsonl", trainer.epoch)
        self._tensorboard = TensorBoard(folder / "tensorboard", trainer.epoch)
        self._probe = next(trainer.batches(0, 0))[0][:PROBE_IMAGES]
        self._seconds_before, self._started = seconds_before, time.monotonic()
        self._saved_at = self._started
        self.signal: int | None = None
        self.images_per_second = self._metrics.last.get("images_per_second", 0.0)

    @property
    def seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._started

    def after_step(self, trainer: Trainer) -> bool:
        self._display.after_step(trainer)
        within_epoch = trainer.step % trainer.steps_per_epoch != 0  # at its end, after_epoch ends the run
        return self.signal is not None and within_epoch

    def after_epoch(self, trainer: Trainer, report: EpochReport) -> bool:
        self.images_per_second = report.images_per_second
        layers = layer_statistics(trainer.objective.net, self._probe, max(report.eps, SMALLEST_RADIUS))
        record = epoch_record(report, layers)
        self._metrics.add(record)
        self._tensorboard.add(record)
        self._display.after_epoch(report)
        if time.monotonic() - self._saved_at >= self._config.training.checkpoint_seconds:
            self.save(trainer)
        return self.signal is not None

    def save(self, trainer: Trainer) -> None:
        state = {"model": trainer.model.state_dict(), "trainer": trainer.state_dict(), "seconds": self.seconds}
        save_checkpoint(self._folder / "last.ckpt", state)
        self._saved_at = time.monotonic()

    @contextmanager
    def until_signalled(self) -> Iterator[None]:
        """Let the first SIGINT or SIGTERM end the run after the present step; a second one acts as usual."""

        def note(number: int, frame: FrameType | None) -> None:
            self.signal = number
            for name, handler in previous.items():
                signal.signal(name, handler)

        previous = {}
        try:
            for name in (signal.SIGINT, signal.SIGTERM):
                previous[name] = signal.signal(name, note)
        except ValueError:  # not the main thread: whoever called handles signals
            pass
        try:
            yield
        finally:
            for name, handler in previous.items():
                signal.signal(name, handler)


__all__ = ["Run", "load_model", "train"]
