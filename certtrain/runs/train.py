"""A run: from a configuration to a directory that holds a trained, verified network."""

from __future__ import annotations

import os
import platform
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

import certtrain
from certtrain.bounds import bounded_model
from certtrain.config import Config
from certtrain.config.loading import Overrides
from certtrain.config.schema import BatchNormSection
from certtrain.data import (
    Augmentation,
    Dataset,
    Split,
    batch_sizes,
    epoch_batches,
    load_dataset,
    require_two_classes,
    to_float,
)
from certtrain.errors import DataError, UsageError, shortened
from certtrain.initialization import initialize_
from certtrain.models import build_model
from certtrain.models.own import explained, modules_from
from certtrain.runs.callbacks import Follower, Recorder
from certtrain.runs.checkpoint import load_checkpoint, require_reloadable, save_architecture, save_weights
from certtrain.runs.directory import clear, remove_temporaries
from certtrain.runs.progress import MetricsFile, Output, ProgressDisplay
from certtrain.runs.request import Request
from certtrain.runs.state import check_state, continue_from
from certtrain.runtime.compilation import announced, compiling_pays
from certtrain.runtime.device import check_device_name
from certtrain.runtime.distributed import ALONE, Ranks, process_group
from certtrain.runtime.files import write_json, write_text
from certtrain.runtime.layout import lay_out_, layout_for, safe_convolutions
from certtrain.schedules import SmoothedEpsilon
from certtrain.training.averaging import reestimate_statistics
from certtrain.training.cost import clean_macs
from certtrain.training.methods import build_method
from certtrain.training.optimizers import build_optimizer, build_rate
from certtrain.training.regularization import Regularization
from certtrain.training.step import GradientStep
from certtrain.training.trainer import Batches, Observer, Trainer
from certtrain.verification.attacks import PGD
from certtrain.verification.radius import Radii, certified_radii
from certtrain.verification.verify import Verification, verify


@dataclass(frozen=True)
class Run:
    """A finished run, or one that a signal (`interrupted_by`) or a callback ended, without summary, to be resumed."""

    folder: Path
    model: nn.Module
    summary: dict[str, Any] | None
    interrupted_by: int | None = None


def train(
    config: str | Path | Mapping[str, Any] | Config | None = None,
    out: str | Path | None = None,
    *,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    overrides: Overrides = (),
    trust: bool = False,
    console: Console | None = None,
    callbacks: Sequence[Observer] = (),
) -> Run:
    """Train a network, verify it, and leave everything in a run directory.

    Args:
        config: a YAML file (or the name of a shipped one), a mapping, or a Config. To resume, the run directory
            itself will do, or none where `out` names it.
        out: the run directory; by default runs/NAME after the config file.
        device: "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1", ...
        resume: continue the run in `out` where it was saved last, as it was configured; without one there, start it.
        overwrite: replace the run in `out`.
        overrides: values that overrule the config's: a mapping such as {"optimizer.lr": 1e-3}, or a sequence of texts
            "section.key=value".
        trust: import the code that a run directory's files name as its model. What one's own `config` names is
            imported in any case.
        console: where progress goes.
        callbacks: told of every step and epoch, in each process; one that returns True ends the run, which is saved
            to be resumed. What they keep is not part of the checkpoint.

    Under torchrun every process calls this with the same arguments, and they train one network together.

    Raises:
        UsageError: the configuration is wrong, is not that of the run to resume, or `out` holds a run and neither
            resume nor overwrite was said.
        DataError, CheckpointError, DivergedError, ProcessLost: as they say; the last good checkpoint stays.
    """
    with process_group() as ranks, ExitStack() as held:
        console = console or Output(quiet=not ranks.is_first)
        with ranks.together():
            request = Request.of(config, out, resume, overwrite, overrides)
            place = resolve_device(device, ranks)
            stored = request.enter(held, partial(_tell, console)) if ranks.is_first else None
        stored = ranks.broadcast(stored)
        prepared = _prepare(request, stored, place, trust, ranks, console, held)
        observer, finished = _fit(prepared, ranks, console, callbacks)
        if not finished:
            ranks.barrier()  # torchrun ends all as soon as one has ended
            return Run(prepared.folder, prepared.model, None, interrupted_by=observer.signal)
        return Run(prepared.folder, prepared.model, _evaluate(prepared, observer, ranks))


# --- the three acts ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """A run that can start, or go on."""

    folder: Path
    config: Config
    model: nn.Module
    dataset: Dataset
    trainer: Trainer
    seconds_before: float


def _prepare(
    request: Request,
    stored: Config | None,
    place: torch.device,
    trust: bool,
    ranks: Ranks,
    console: Console,
    held: ExitStack,
) -> Prepared:
    """Everything that can be wrong is found before a file is written."""
    folder, config = request.folder, stored or request.config
    assert config is not None  # a run that is continued has one stored
    checkpoint = folder / "last.ckpt"
    dataset = ranks.one_per_machine_first(lambda: load_data(config))
    with ranks.together():
        torch.manual_seed(config.seed)
        model, architecture = build(config, dataset, trust or request.trusts(config))
        lay_out_(model.to(place), _layout(config, model, dataset), dataset.image_shape)
        dataset = dataset.to(place)
    trainer = assemble(config, model, dataset, ranks)
    with ranks.together():
        resumed = ranks.is_first and stored is not None and checkpoint.is_file()
        check = partial(check_state, trainer=trainer, source=checkpoint)
        state = load_checkpoint(checkpoint, check) if resumed else None
        if state is not None:
            MetricsFile(folder / "metrics.jsonl", state["trainer"]["step"])  # can be read
    state = ranks.broadcast(state)
    if state is not None:
        continue_from(state, trainer, checkpoint)
        _tell(console, f"resuming {folder} after step {trainer.step} of {trainer.total_steps}")
        _keep_threads(state["threads"], console, held)
    with ranks.together():
        if ranks.is_first:
            if state is None and request.overwrite:
                clear(folder)
            remove_temporaries(folder)
            if state is None:
                write_text(folder / "config.yaml", config.to_yaml())
            save_architecture(folder, architecture)
    return Prepared(folder, config, model, dataset, trainer, 0.0 if state is None else state["seconds"])


def _fit(run: Prepared, ranks: Ranks, console: Console, callbacks: Sequence[Observer]) -> tuple[Follower, bool]:
    """Train to the end, or until a signal or a callback; the observer, and whether the last step was reached."""
    trainer = run.trainer
    with ProgressDisplay(console, trainer.total_steps, trainer.epochs, trainer.step) as display:
        observer = Follower(ranks, callbacks)
        if ranks.is_first:
            probe, _ = next(training_batches(run.config, run.dataset)(0, 0))
            every = run.config.training.checkpoint_seconds
            observer = Recorder(run.folder, every, trainer, probe, display, ranks, run.seconds_before, callbacks)
        compiles = _compiles(run.config, run.model, run.dataset)
        told = announced(display.compiling, display.compiled) if compiles else nullcontext()
        with observer.until_signalled(), safe_convolutions(run.model, run.dataset.image_shape), told:
            finished = trainer.run(observer)
        observer.save(trainer)
    if not finished:
        saved = f"saved {run.folder} at step {trainer.step}; continue with --resume"
        if observer.signal == signal.SIGPIPE:
            _tell_the_error_stream(ranks, f"nobody reads the output any more: {saved}")
        else:
            _tell(console, saved)
    return observer, finished


def _evaluate(run: Prepared, observer: Follower, ranks: Ranks) -> dict[str, Any]:
    """Hand out the network, verify it, and write the summary."""
    config, model, dataset = run.config, run.model, run.dataset
    if config.training.batch_norm.population:  # by every process for itself: all have the whole training set
        size, seed = config.training.batch_size, config.seed
        batches = epoch_batches(dataset.train, size, seed=seed, epoch=config.training.epochs)
        reestimate_statistics(model, (images for images, _ in batches))
    if ranks.is_first:
        save_weights(run.folder, model)
    results = verify_run(config, model, dataset, ranks=ranks)
    held_out = [] if dataset.validation is None else verify_run(config, model, _on_validation(dataset), ranks=ranks)
    summary: dict[str, Any] = {}  # the first process's, in the end everyone's
    if isinstance(observer, Recorder):
        summary = {
            **summarize(config, results),
            "validation": [result.summary() for result in held_out],
            "train_seconds": round(observer.seconds, 2),
            "images_per_second": round(observer.images_per_second, 1),
            "steps": run.trainer.step,
            "processes": ranks.world_size,
        }
        write_json(run.folder / "summary.json", summary)
    return ranks.broadcast(summary)


def _keep_threads(saved: int, console: Console, held: ExitStack) -> None:
    """Sums over other numbers of threads round otherwise: a run goes on with as many as it was saved with.

    Unless the environment names a number. The process's own number comes back when `held` ends.
    """
    here = torch.get_num_threads()
    if here == saved:
        return
    if "OMP_NUM_THREADS" in os.environ:
        _tell(console, f"saved with {saved} threads, goes on with {here} (OMP_NUM_THREADS): rounded otherwise")
        return
    _tell(console, f"goes on with {saved} threads, as it was saved, instead of {here}: rounded the same")
    held.callback(torch.set_num_threads, here)
    torch.set_num_threads(saved)


# --- pieces, in the order they are needed ----------------------------------------------------------------------------


def _tell(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def _tell_the_error_stream(ranks: Ranks, line: str) -> None:
    if ranks.is_first:
        with suppress(OSError):  # it may lead to the same reader
            print(line, file=sys.stderr, flush=True)


def resolve_device(name: str, ranks: Ranks = ALONE) -> torch.device:
    check_device_name(name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = ranks.own_device(torch.device(name))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = shortened(str(error).partition("\n")[0], 160)
        raise UsageError(f"device {name!r} is not to be had here: {reason}") from error
    return device


def load_data(config: Config) -> Dataset:
    data = config.data
    dataset = load_dataset(
        data.name, data.root, download=data.download, path=data.path, validation=data.validation, seed=config.seed
    )
    dataset = replace(dataset, train=dataset.train.take(slice(data.limit)))
    require_two_classes(dataset.train)
    return dataset


def build(config: Config, dataset: Dataset, trust: bool = True) -> tuple[nn.Module, dict[str, Any]]:
    """The initialized network, and the arguments of `build_model` that rebuild it.

    Args:
        trust: the configuration may name code outside certtrain, as one's own may.
    """
    architecture: dict[str, Any] = {
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
    with modules_from(config.model.path):
        model = build_model(**architecture, trust=trust)
    shape = _output_shape(config.model.name, model, dataset.image_shape)
    if shape != (1, dataset.num_classes):
        raise UsageError(f"model {config.model.name} returns shape {shape}, not (1, {dataset.num_classes})")
    initialize_(model, config.training.initialization)
    require_reloadable(model, architecture, trust)
    return model, architecture


def _output_shape(name: str, model: nn.Module, image_shape: tuple[int, int, int]) -> tuple[int, ...]:
    image = torch.zeros(1, *image_shape, device=next(model.parameters(), torch.empty(0)).device)
    size = "×".join(map(str, image_shape))
    with explained(f"model {name} cannot take {size} images", DataError), torch.no_grad():
        output = model.eval()(image)
        if not isinstance(output, torch.Tensor):
            raise TypeError(f"it returns {type(output).__name__}, not a tensor of logits")
        return tuple(output.shape)


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
    batch_sum = None if ranks.world_size == 1 else ranks.all_reduce
    gradient_step = GradientStep(
        bounded_model(model, to_float(split.images[:1]), config.backend, batch_sum),
        build_method(training.method),
        Regularization(**config.regularizers.model_dump(exclude={"l1"})),
        statistics=training.batch_norm.statistics,
        l1=config.regularizers.l1,
        activation_checkpointing=training.activation_checkpointing,
        accumulation=training.accumulation,
        precision=training.precision,
        compile_for=training.batch_size if _compiles(config, model, dataset) else None,
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


def _layout(config: Config, model: nn.Module, dataset: Dataset) -> torch.memory_format:
    training = config.training
    if training.channels_last == "auto":
        return layout_for(training.precision, next(model.parameters()).device, _compiles(config, model, dataset))
    return torch.channels_last if training.channels_last else torch.contiguous_format


def _compiles(config: Config, model: nn.Module, dataset: Dataset) -> bool:
    training = config.training
    whole = training.accumulation == 1 and not training.activation_checkpointing
    if not whole or config.backend != "native":
        return False
    if training.compile != "auto":
        return training.compile
    steps = training.epochs * len(batch_sizes(len(dataset.train), training.batch_size))
    macs = training.epochs * len(dataset.train) * clean_macs(model, dataset.image_shape)
    return compiling_pays(next(model.parameters()).device, steps, macs)


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
    shape = _output_shape(config.model.name, model, dataset.image_shape)
    if len(shape) != 2:
        raise DataError(f"model {config.model.name} returns shape {shape} for one of these images, not (1, classes)")
    classes = shape[1]
    if dataset.num_classes > classes:
        raise DataError(f"the data has labels up to {dataset.num_classes - 1}, the model only {classes} classes")
    return dataset.test.take(slice(config.verification.limit if limit is None else limit))


def _attack(config: Config) -> PGD:
    section = config.verification
    return PGD(section.pgd_steps, section.pgd_restarts, section.pgd_step_size)


def _on_validation(dataset: Dataset) -> Dataset:
    """The validation split in the place of the test images."""
    assert dataset.validation is not None
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
    if ranks.world_size == 1:
        return
    training = config.training
    if min(sizes) < ranks.world_size:
        raise UsageError(
            f"{ranks.world_size} processes: {sum(sizes)} training images in batches of {training.batch_size} leave one "
            f"of {min(sizes)}, not enough for a share each: choose another training.batch_size, or fewer processes"
        )
    unit = ranks.world_size * training.accumulation
    if training.batch_size % unit:
        below = training.batch_size // unit * unit
        nearest = " or ".join(str(size) for size in (below, below + unit) if size)
        raise UsageError(
            f"training.batch_size: {training.batch_size} cannot be shared evenly by {ranks.world_size} processes "
            f"x {training.accumulation} parts: choose {nearest}"
        )
    tested = min(len(dataset.test), config.verification.limit or len(dataset.test))
    if tested < ranks.world_size:
        raise UsageError(f"{tested} test images for {ranks.world_size} processes: start fewer")
