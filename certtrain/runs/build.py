"""The parts of a run, from its configuration: device, data, network, trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from certtrain.bounds import Bounder, bounded_model
from certtrain.config import Config
from certtrain.config.schema import (
    BatchNormSection,
    DataSection,
    MetricsSection,
    RegularizerSection,
    TrainingSection,
)
from certtrain.data import (
    NO_AUGMENTATION,
    Augmentation,
    Dataset,
    batch_sizes,
    epoch_batches,
    load_dataset,
    require_two_classes,
    to_float,
)
from certtrain.data.replay import Mixture
from certtrain.errors import DataError, UsageError, shortened
from certtrain.initialization import initialize_
from certtrain.models import build_model
from certtrain.models.own import explained, modules_from
from certtrain.modules import blank_images, device_of, evaluating
from certtrain.runs.checkpoint import require_reloadable
from certtrain.runs.inheritance import NOTHING, Inheritance
from certtrain.runs.start import Start, require_same_architecture
from certtrain.runtime.compilation import compiling_pays
from certtrain.runtime.device import check_device_name
from certtrain.runtime.distributed import ALONE, Ranks
from certtrain.runtime.layout import layout_for
from certtrain.runtime.precision import warn_if_imitated
from certtrain.schedules import LearningRate
from certtrain.training.adaptivity import require_measured
from certtrain.training.averaging import build_average
from certtrain.training.cost import clean_elements
from certtrain.training.methods import build_method
from certtrain.training.optimizers import build_optimizer, build_rate
from certtrain.training.regularization import Regularization
from certtrain.training.smoothing import smoothed
from certtrain.training.step import GradientStep, Step
from certtrain.training.trainer import Batches, Trainer


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
    """The images of a run; where the validation split is verified, it stands in the place of the test set."""
    dataset = load_splits(config.data, config.seed)
    return dataset.tested_on_validation() if config.verification.split == "validation" else dataset


def load_splits(data: DataSection, seed: int) -> Dataset:
    """All splits of the data that a section names; seed: that of the run, which decides what is held out."""
    dataset = load_dataset(
        data.name,
        data.root,
        download=data.download,
        path=data.path,
        classes=data.classes,
        validation=data.validation,
        seed=seed,
    )
    dataset = replace(dataset, train=dataset.train.take(slice(data.limit)))
    require_two_classes(dataset.train)
    return dataset


def build(
    config: Config, dataset: Dataset, trust: bool = True, start: Start | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """The initialized network, and the arguments of `build_model` that rebuild it.

    Args:
        trust: the configuration may name code outside certtrain, as one's own may.
        start: the network whose weights it will have, and whose input normalisation where `config` sets none.
    """
    architecture: dict[str, Any] = {
        "name": config.model.name,
        "image_shape": list(dataset.image_shape),
        "num_classes": dataset.num_classes,
        "mean": list(config.data.mean or dataset.mean),
        "std": list(config.data.std or dataset.std),
        "options": dict(config.model.options),
    }
    if start is not None and start.architecture is not None:
        require_same_architecture(start, architecture, trust)
    channels = dataset.image_shape[0]
    if {len(architecture["mean"]), len(architecture["std"])} != {channels}:
        raise UsageError(f"data.mean and data.std need one number for each of the images' {channels} channels")
    with modules_from(config.model.path):
        model = build_model(**architecture, trust=trust)
    shape = output_shape(config.model.name, model, dataset.image_shape)
    if shape != (1, dataset.num_classes):
        raise UsageError(f"model {config.model.name} returns shape {shape}, not (1, {dataset.num_classes})")
    initialize_(model, config.training.initialization)
    require_reloadable(model, architecture, trust)
    return model, architecture


def output_shape(name: str, model: nn.Module, image_shape: tuple[int, int, int]) -> tuple[int, ...]:
    image = blank_images(model, 1, image_shape)
    size = "×".join(map(str, image_shape))
    with explained(f"model {name} cannot take {size} images", DataError), evaluating(model), torch.no_grad():
        output = model(image)
        if not isinstance(output, torch.Tensor):
            raise TypeError(f"it returns {type(output).__name__}, not a tensor of logits")
        return tuple(output.shape)


def training_batches(config: Config, dataset: Dataset, ranks: Ranks = ALONE, augmented: bool = True) -> Batches:
    """By epoch and first step: the batches, replayed images included, of which each rank gets its share."""
    changes = Augmentation(config.data.flip, config.data.crop) if augmented else NO_AUGMENTATION
    draw = partial(epoch_batches, dataset.train, config.training.batch_size)
    if dataset.old is not None:
        draw = partial(_mixture(config, dataset).epoch_batches, dataset.train, dataset.old)
    return lambda epoch, first: draw(
        seed=config.seed, epoch=epoch, augmentation=changes, start_step=first, share=ranks.share
    )


def _mixture(config: Config, dataset: Dataset) -> Mixture:
    assert config.replay is not None
    return Mixture(len(dataset.train), config.training.batch_size, config.replay.share)


def epoch_sizes(config: Config, dataset: Dataset) -> list[int]:
    """Images in each batch of an epoch, replayed ones included."""
    if dataset.old is not None:
        return [sum(counts) for counts in _mixture(config, dataset).sizes]
    return batch_sizes(len(dataset.train), config.training.batch_size)


def assemble(
    config: Config, model: nn.Module, dataset: Dataset, ranks: Ranks = ALONE, start: Start | None = None
) -> Trainer:
    """The trainer for a configuration; model and data are on their device.

    Args:
        start: the network that the run begins with, from which learning rate and radius may come.

    Raises:
        UsageError: the parts do not go together.
    """
    training = config.training
    split = dataset.train
    sizes = epoch_sizes(config, dataset)
    per_epoch = len(sizes)
    _check_last_batch(model, sizes, training.batch_size)
    if training.batch_norm != BatchNormSection() and not _has_batch_norm(model):
        raise UsageError(f"training.batch_norm: model {config.model.name} has no BatchNorm")
    if config.metrics != MetricsSection():
        require_measured(config.optimizer.name)
    _check_shares(config, dataset, sizes, ranks)
    if ranks.is_first:
        warn_if_imitated(training.precision, split.images.device)
    batch_sum = None if ranks.world_size == 1 else ranks.all_reduce
    net = bounded_model(model, to_float(split.images[:1]), config.backend, batch_sum)
    compile_for = training.batch_size if compiles(config, model, dataset) else None
    inherited = NOTHING if start is None or config.start_from is None else start.passes_on(config)
    _check_time(config, inherited)
    radius = inherited.radius(config, per_epoch)
    return Trainer(
        model=model,
        gradient_step=training_step(net, training, config.regularizers, compile_for, ranks),
        optimizer=build_optimizer(config.optimizer, model),
        batches=training_batches(config, dataset, ranks),
        batch_sizes=sizes,
        epochs=training.epochs,
        eps=radius,
        max_eps=radius.max_eps,
        ramp=radius.ramp,
        lr=learning_rate(config, per_epoch, inherited),
        initial_eps=radius.initial,
        clip=config.optimizer.clip,
        average=build_average(training.averaging, model, per_epoch, training.epochs),
        seed=config.seed,
    )


def training_step(
    net: Bounder,
    training: TrainingSection,
    regularizers: RegularizerSection,
    compile_for: int | None = None,
    ranks: Ranks = ALONE,
) -> Step:
    """What a configuration does with each batch."""
    step = GradientStep(
        net,
        build_method(training.method),
        Regularization(**regularizers.model_dump(exclude={"l1"})),
        statistics=training.batch_norm.statistics,
        l1=regularizers.l1,
        activation_checkpointing=training.activation_checkpointing,
        accumulation=training.accumulation,
        precision=training.precision,
        compile_for=compile_for,
        ranks=ranks,
    )
    return smoothed(training.smoothing, step)


def rehearse(trainer: Trainer, config: Config, dataset: Dataset, ranks: Ranks = ALONE) -> None:
    """Try a step of each phase, in all processes together, before anything is written.

    Raises:
        UsageError, UnsupportedOperation: one cannot be taken.
    """
    few = 2 * ranks.world_size  # BatchNorm needs two
    if few == config.training.batch_size:  # those are for the compiled step
        few += ranks.world_size
    chosen = torch.tensor(ranks.share(range(few)), device=dataset.train.labels.device) % len(dataset.train)
    trainer.rehearse(to_float(dataset.train.images[chosen]), dataset.train.labels[chosen], few)


def learning_rate(config: Config, steps_per_epoch: int, inherited: Inheritance = NOTHING) -> LearningRate:
    """As a function of the step."""
    end = inherited.ramp_epochs(config)[1] * steps_per_epoch
    rate = build_rate(config.optimizer, steps_per_epoch, config.training.epochs, end)
    return rate if inherited.lr is None else replace(rate, base=inherited.lr)


def layout_of(config: Config, model: nn.Module, dataset: Dataset) -> torch.memory_format:
    training = config.training
    if training.channels_last == "auto":
        return layout_for(training.precision, device_of(model), compiles(config, model, dataset))
    return torch.channels_last if training.channels_last else torch.contiguous_format


def compiles(config: Config, model: nn.Module, dataset: Dataset) -> bool:
    training = config.training
    whole = training.accumulation == 1 and not training.activation_checkpointing
    if not whole or config.backend != "native":
        return False
    if training.compile != "auto":
        return training.compile
    steps = training.epochs * len(epoch_sizes(config, dataset))
    elements = training.epochs * len(dataset.train) * clean_elements(model, dataset.image_shape)
    return compiling_pays(device_of(model), steps, elements)


def _check_time(config: Config, inherited: Inheritance) -> None:
    """The run must be long enough for the warmup that it has, which `config` alone may not tell."""
    try:
        config.require_time_after(inherited.ramp_epochs(config)[1])
    except ValueError as error:
        raise UsageError(str(error)) from error


def _has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def _check_last_batch(model: nn.Module, sizes: Sequence[int], batch_size: int) -> None:
    if _has_batch_norm(model) and 1 in sizes:
        raise UsageError(
            f"training.batch_size: {sum(sizes)} images in batches of {batch_size} leave one alone, "
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
