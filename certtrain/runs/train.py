"""A run: from a configuration to a directory that holds a trained, verified network."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

import certtrain
from certtrain.verification.attacks import PGD
from certtrain.bounds import BoundedModel
from certtrain.runs.checkpoint import load_checkpoint, restore, save_model
from certtrain.runtime.files import write_json, write_text
from certtrain.config import Config, load_config
from certtrain.config.schema import BatchNormSection
from certtrain.data import Augmentation, Dataset, Split, batch_sizes, epoch_batches, load_dataset, to_float
from certtrain.runtime.distributed import ALONE, Ranks, joined
from certtrain.errors import CheckpointError, DataError, UsageError
from certtrain.initialization import initialize_
from certtrain.models import build_model
from certtrain.runtime.precision import layout_for
from certtrain.verification.radius import Radii, certified_radii
from certtrain.runs.callbacks import Follower, Recorder
from certtrain.runs.progress import ProgressDisplay
from certtrain.runs.directory import check_folder, make_folder, remove_temporaries
from certtrain.schedules import SmoothedEpsilon
from certtrain.training.averaging import reestimate_statistics
from certtrain.training.methods import build_method
from certtrain.training.optimizers import build_optimizer, build_rate
from certtrain.training.regularization import Regularization
from certtrain.training.step import GradientStep
from certtrain.training.trainer import Batches, Trainer
from certtrain.verification.verify import Verification, verify


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

    Under torchrun every process calls this with the same arguments, and they train one network together.

    Raises:
        UsageError: the configuration is wrong, or `out` holds a run and neither resume nor overwrite was said.
        DataError, CheckpointError, DivergedError, ProcessLost: as they say; the last good checkpoint stays.
    """
    with joined() as ranks:
        console = console or Console(quiet=not ranks.is_first)
        with ranks.together():
            folder = Path(out) if out is not None else default_folder(config)
            config = load_config(config, overrides)
            resumed = ranks.is_first and check_folder(folder, config, resume, overwrite)
            place = resolve_device(device, ranks)
        dataset = ranks.one_per_machine_first(lambda: load_data(config))
        with ranks.together():
            torch.manual_seed(config.seed)
            model, architecture = build(config, dataset)
            model.to(place, memory_format=_layout(config, place))
            dataset = dataset.to(place)
            state = load_checkpoint(folder / "last.ckpt") if resumed else None
        trainer = assemble(config, model, dataset, ranks)
        state = ranks.from_first(state)
        if state is not None:
            restore(model, state["model"], folder / "last.ckpt")
            _require_same_length(folder, trainer, state["trainer"]["steps_per_epoch"])
            trainer.load_state_dict(state["trainer"])
            _tell(console, f"resuming {folder} after step {trainer.step} of {trainer.total_steps}")
        elif ranks.is_first:
            make_folder(folder, overwrite)
            write_text(folder / "config.yaml", config.to_yaml())
            write_json(folder / "model.json", {"format": 1, "model": architecture})
        with ProgressDisplay(console, trainer.total_steps, trainer.epochs, trainer.step) as display:
            observer = Follower(ranks)
            if ranks.is_first:
                remove_temporaries(folder)
                probe, _ = next(training_batches(config, dataset)(0, 0))
                every, before = config.training.checkpoint_seconds, 0.0 if state is None else state["seconds"]
                observer = Recorder(folder, every, trainer, probe, display, ranks, before)
            with observer.until_signalled():
                finished = trainer.run(observer)
            observer.save(trainer)
        if not finished:
            _tell(console, f"saved {folder} at step {trainer.step}; continue with --resume")
            ranks.wait()  # torchrun ends all as soon as one has ended
            return Run(folder, model, None, interrupted_by=observer.signal)
        if config.training.batch_norm.population:  # by every process for itself: all have the whole training set
            size, seed = config.training.batch_size, config.seed
            batches = epoch_batches(dataset.train, size, seed=seed, epoch=config.training.epochs)
            reestimate_statistics(model, (images for images, _ in batches))
        if ranks.is_first:
            save_model(folder, model, architecture)
        results = verify_run(config, model, dataset, ranks=ranks)
        held_out = [] if dataset.validation is None else verify_run(config, model, _on_validation(dataset), ranks=ranks)
        summary = None
        if ranks.is_first:
            summary = {
                **summarize(config, results),
                "validation": [result.summary() for result in held_out],
                "train_seconds": round(observer.seconds, 2),
                "images_per_second": round(observer.images_per_second, 1),
                "steps": trainer.step,
                "processes": ranks.size,
            }
            write_json(folder / "summary.json", summary)
        return Run(folder, model, ranks.from_first(summary))


# --- pieces, in the order they are needed ----------------------------------------------------------------------------


def _tell(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def default_folder(config: str | Path | Mapping[str, Any] | Config) -> Path:
    if not isinstance(config, str | Path):
        raise UsageError("a run that is not read from a file needs an output folder: pass out=")
    return Path("runs") / Path(config).stem


def resolve_device(name: str, ranks: Ranks = ALONE) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = ranks.own_device(torch.device(name))
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


def training_batches(config: Config, dataset: Dataset, ranks: Ranks = ALONE) -> Batches:
    augmentation = Augmentation(config.data.flip, config.data.crop)
    return lambda epoch, first: epoch_batches(
        dataset.train,
        config.training.batch_size,
        seed=config.seed,
        epoch=epoch,
        augmentation=augmentation,
        start_step=first,
        share=ranks.share,
    )


def assemble(config: Config, model: nn.Module, dataset: Dataset, ranks: Ranks = ALONE) -> Trainer:
    """The trainer for a configuration; model and data are on their device."""
    training, epsilon, optimizer = config.training, config.epsilon, config.optimizer
    split = dataset.train
    sizes = batch_sizes(len(split), training.batch_size)
    per_epoch = len(sizes)
    _check_last_batch(model, len(split), training.batch_size)
    if training.batch_norm != BatchNormSection() and not _has_batch_norm(model):
        raise UsageError(f"training.batch_norm: model {config.model.name} has no BatchNorm")
    _check_shares(config, dataset, sizes, ranks)
    batch_sum = None if ranks.size == 1 else ranks.sum
    gradient_step = GradientStep(
        BoundedModel(model, to_float(split.images[:1]), config.backend, batch_sum),
        build_method(training.method),
        Regularization(**config.regularizers.model_dump(exclude={"l1"})),
        statistics=training.batch_norm.statistics,
        l1=config.regularizers.l1,
        activation_checkpointing=training.activation_checkpointing,
        accumulation=training.accumulation,
        precision=training.precision,
        compile_for=training.batch_size if _compiles(config, split.images.device) else None,
        ranks=ranks,
    )
    start = (epsilon.start_epoch - 1) * per_epoch
    end, max_eps = start + epsilon.warmup_epochs * per_epoch, epsilon.train_factor * epsilon.max
    radius = SmoothedEpsilon(max_eps, start, end, epsilon.mid, epsilon.beta)
    return Trainer(
        model=model,
        gradient_step=gradient_step,
        optimizer=build_optimizer(optimizer, model),
        batches=training_batches(config, dataset, ranks),
        batch_sizes=sizes,
        epochs=training.epochs,
        eps=radius,
        max_eps=max_eps,
        ramp=radius.ramp,
        lr=build_rate(optimizer, per_epoch, training.epochs, end),
        clip=optimizer.clip,
        seed=config.seed,
    )


def _layout(config: Config, device: torch.device) -> torch.memory_format:
    training = config.training
    if training.channels_last == "auto":
        return layout_for(training.precision, device, _compiles(config, device))
    return torch.channels_last if training.channels_last else torch.contiguous_format


def _compiles(config: Config, device: torch.device) -> bool:
    training = config.training
    wanted = device.type == "cuda" if training.compile == "auto" else training.compile
    whole = training.accumulation == 1 and not training.activation_checkpointing
    return wanted and whole and config.backend == "native"


def verify_run(
    config: Config, model: nn.Module, dataset: Dataset, limit: int | None = None, ranks: Ranks = ALONE
) -> list[Verification]:
    section = config.verification
    return verify(
        model,
        _test_images(config, model, dataset, limit),
        config.test_radii,
        section.method,
        attack=_attack(config),
        batch_size=section.batch_size,
        seed=config.seed,
        backend=config.backend,
        arithmetic=section.arithmetic,
        ranks=ranks,
    )


def radii_of(config: Config, model: nn.Module, dataset: Dataset, max_eps: float, limit: int | None = None) -> Radii:
    return certified_radii(
        model,
        _test_images(config, model, dataset, limit),
        max_eps,
        attack=_attack(config),
        arithmetic=config.verification.arithmetic,
        batch_size=config.verification.batch_size,
        seed=config.seed,
    )


def _test_images(config: Config, model: nn.Module, dataset: Dataset, limit: int | None) -> Split:
    classes = _output_shape(config.model.name, model, dataset.image_shape)[1]
    if dataset.num_classes > classes:
        raise DataError(f"the data has labels up to {dataset.num_classes - 1}, the model only {classes} classes")
    return dataset.test.take(slice(config.verification.limit if limit is None else limit))


def _attack(config: Config) -> PGD:
    section = config.verification
    return PGD(section.pgd_steps, section.pgd_restarts, section.pgd_step_size)


def _on_validation(dataset: Dataset) -> Dataset:
    """The validation split in the place of the test images."""
    return replace(dataset, test=dataset.validation)


def summarize(config: Config, results: Sequence[Verification]) -> dict[str, Any]:
    """Of summary.json; the three errors on top are those at epsilon.max, or else at the largest radius tested."""
    chosen = next((r for r in results if r.eps == config.epsilon.max), max(results, key=lambda r: r.eps))
    return {
        **chosen.summary(),
        "verify_seconds": round(sum(r.seconds for r in results), 2),
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


def _has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def _check_last_batch(model: nn.Module, images: int, batch_size: int) -> None:
    if _has_batch_norm(model) and (images - 1) % batch_size == 0:
        raise UsageError(
            f"training.batch_size: {images} images in batches of {batch_size} leave one alone, "
            "which BatchNorm cannot normalise: choose another size"
        )


def _check_shares(config: Config, dataset: Dataset, sizes: Sequence[int], ranks: Ranks) -> None:
    """Every process must have a share of every batch, and one of the test images."""
    if ranks.size == 1:
        return
    training = config.training
    if min(sizes) < ranks.size:
        raise UsageError(
            f"{ranks.size} processes: {sum(sizes)} training images in batches of {training.batch_size} leave one of "
            f"{min(sizes)}, not enough for a share each: choose another training.batch_size, or fewer processes"
        )
    unit = ranks.size * training.accumulation
    if training.batch_size % unit:
        below = training.batch_size // unit * unit
        nearest = " or ".join(str(size) for size in (below, below + unit) if size)
        raise UsageError(
            f"training.batch_size: {training.batch_size} cannot be shared evenly by {ranks.size} processes "
            f"x {training.accumulation} parts: choose {nearest}"
        )
    tested = min(len(dataset.test), config.verification.limit or len(dataset.test))
    if tested < ranks.size:
        raise UsageError(f"{tested} test images for {ranks.size} processes: start fewer")


def _require_same_length(folder: Path, trainer: Trainer, steps_per_epoch: int) -> None:
    if steps_per_epoch != trainer.steps_per_epoch:
        raise CheckpointError(
            f"{folder / 'last.ckpt'} was saved with {steps_per_epoch} steps per epoch, "
            f"the training set now gives {trainer.steps_per_epoch}: the data has changed"
        )
