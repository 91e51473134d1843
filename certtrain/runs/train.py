"""A run: from a configuration to a directory that holds a trained, verified network."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from certtrain.bound_methods import BRANCH_AND_BOUND
from certtrain.config import Config
from certtrain.config.loading import Overrides
from certtrain.config.schema import MetricsSection
from certtrain.data import Dataset
from certtrain.errors import READER_LEFT, CheckpointError, shown
from certtrain.runs.build import assemble, build, compiles, layout_of, rehearse, resolve_device, training_batches
from certtrain.runs.callbacks import Follower, Recorder
from certtrain.runs.checkpoint import load_checkpoint, save_architecture, save_weights
from certtrain.runs.directory import clear, remove_temporaries
from certtrain.runs.evaluation import Results, rehearse_verification, summarize, verify_run
from certtrain.runs.extension import compiled_as, extend, require_same_past
from certtrain.runs.files import CHECKPOINT, CONFIG, METRICS, RAW_WEIGHTS, STEPS, SUMMARY, VERIFYING, WEIGHTS
from certtrain.runs.forgetting import Forgetting, forgetting_of, load_with_old_data
from certtrain.runs.lock import Claim
from certtrain.runs.meters import Meter, OptimizerMeter
from certtrain.runs.metrics import MetricsFile, read_records
from certtrain.runs.progress import ProgressDisplay
from certtrain.runs.provenance import made_with
from certtrain.runs.request import Request, Stored
from certtrain.runs.start import (
    Start,
    Taken,
    find_start,
    normalizing_as,
    original_network,
    save_start,
    stored_start,
    take,
)
from certtrain.runs.state import check_state, computed_by, continue_from
from certtrain.runs.tensor_file import tensors_digest
from certtrain.runs.verdicts import add_verdicts, read_verdicts, verdicts_of
from certtrain.runtime.compilation import announced
from certtrain.runtime.console import Output, tell
from certtrain.runtime.distributed import Ranks, process_group
from certtrain.runtime.files import write_json, write_text
from certtrain.runtime.layout import lay_out_, safe_convolutions
from certtrain.training.averaging import reestimate_statistics
from certtrain.training.trainer import Observer, Trainer
from certtrain.verification.verification import Verification


@dataclass(frozen=True)
class Run:
    """A finished run, or one that was ended, to be resumed.

    Attributes:
        folder: the run directory.
        model: the network, as trained so far.
        summary: what summary.json holds; None where the run is not finished.
        interrupted_by: the signal that ended it; None where it is finished, or a callback ended it.
    """

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
            `overrides` may give it more `training.epochs`, where that leaves the past as it was.
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
            resolved = resolve_device(device, ranks)
            claim, stored = Claim(request.folder), None  # the first process's is what is checked
            if ranks.is_first:
                claim, stored = request.enter(held, partial(tell, console))
        stored = ranks.broadcast(stored)
        prepared = _prepare(request, stored, resolved, trust, ranks, console, held)
        with ranks.together():
            if ranks.is_first:
                _write_head(prepared, request.overwrite, partial(tell, console))
        observer, finished = _fit(prepared, claim, ranks, console, callbacks)
        if not finished:
            ranks.barrier()  # torchrun ends all as soon as one has ended
            return Run(prepared.folder, prepared.model, None, interrupted_by=observer.signal)
        try:
            summary = _evaluate(prepared, claim, observer, ranks)
        except KeyboardInterrupt:
            tell(console, f"{prepared.folder} is trained, but not verified; continue with --resume")
            raise
        return Run(prepared.folder, prepared.model, summary)


@dataclass(frozen=True)
class Prepared:
    """A run that can start, or go on.

    shorter: what it was configured as, where that was for fewer epochs; architecture: the arguments of `build_model`.
    seconds_before: of training until its resume point; None where it has none.
    """

    folder: Path
    config: Config
    shorter: Config | None
    model: nn.Module
    architecture: Mapping[str, Any]
    dataset: Dataset
    trainer: Trainer
    seconds_before: float | None
    start: Start | None
    forgetting: Forgetting | None


def _prepare(
    request: Request,
    stored: Stored | None,
    device: torch.device,
    trust: bool,
    ranks: Ranks,
    console: Console,
    held: ExitStack,
) -> Prepared:
    """Everything that can be wrong is found here; no file is written or removed."""
    folder, config = request.folder, stored.config if stored else request.config
    assert config is not None  # a run that is continued has one stored
    shorter = stored.shorter if stored else None
    start = _find_start(folder, config, stored is not None, ranks)
    dataset, old = ranks.one_per_machine_first(partial(load_with_old_data, config, start))
    trusted = trust or request.trusts(config)
    with ranks.together():
        torch.manual_seed(config.seed)
        model, architecture = build(config, dataset, trusted, start)
    taken = None
    if start is not None and not start.is_recorded:
        taken = _take(start, config, model, ranks)
        start = taken.recorded_in(start)
    with ranks.together():
        model.to(device)
        if shorter is not None:
            config = compiled_as(shorter, config, model, dataset)
        lay_out_(model, layout_of(config, model, dataset), dataset.image_shape)
        dataset = dataset.to(device)
    trainer = assemble(config, model, dataset, ranks, start)
    rehearse(trainer, config, dataset, ranks)
    with ranks.together():
        rehearse_verification(config, model, dataset)
    forgetting = forgetting_of(config, start, dataset, old)
    resumed = None if stored is None else _resume(folder, trainer, ranks, console, held)
    if start is not None and taken is not None:
        start = _begin_with(start, taken, trainer, model, trusted, forgetting, ranks)
        tell(console, f"starting {start.told}")
        if taken.keep == "step":
            _keep_rounding(taken.state, trainer, console, held)
    with ranks.together():
        if resumed is not None and shorter is not None:
            require_same_past(shorter, config, trainer.step, trainer.steps_per_epoch)
        if ranks.is_first and (resumed is not None or not request.overwrite):  # which removes them
            read_verdicts(folder)  # can be added to
        architecture = normalizing_as(model, architecture)
    return Prepared(folder, config, shorter, model, architecture, dataset, trainer, resumed, start, forgetting)


def _begin_with(
    start: Start,
    taken: Taken,
    trainer: Trainer,
    model: nn.Module,
    trusted: bool,
    forgetting: Forgetting | None,
    ranks: Ranks,
) -> Start:
    """The trainer in the state that another run left; `start` with what its network knew."""
    with ranks.together():
        taken.continue_in(trainer)
        original = original_network(start, taken, model, trusted)
        before = forgetting.before(model, original) if forgetting and ranks.is_first else {}
    return start.model_copy(update={"before": before})


def _write_head(run: Prepared, overwrite: bool, told: Callable[[str], None]) -> None:
    """What a run has in its folder before its first step, in the place of what was there."""
    begins = run.seconds_before is None
    if begins and overwrite:
        clear(run.folder)
    remove_temporaries(run.folder)
    if run.shorter is not None:
        extend(run.folder, run.shorter, run.config, run.trainer.step, run.trainer.steps_per_epoch, told)
    elif begins:
        write_text(run.folder / CONFIG, run.config.to_yaml())
    if begins and run.start is not None:
        save_start(run.folder, run.start)
    save_architecture(run.folder, run.architecture)


def _find_start(folder: Path, config: Config, continued: bool, ranks: Ranks) -> Start | None:
    """What the run begins with, or where it has a resume point began with."""
    start = None
    with ranks.together():
        if ranks.is_first and config.start_from is not None:
            resumed = continued and (folder / CHECKPOINT).is_file()
            start = stored_start(folder) if resumed else find_start(config.start_from, folder)
    return ranks.broadcast(start)


def _take(start: Start, config: Config, model: nn.Module, ranks: Ranks) -> Taken:
    """What is taken from the network of `start`, in every process; `model` has its weights."""
    assert config.start_from is not None
    taken = None
    with ranks.together():
        if ranks.is_first:
            taken = take(start, config.start_from, config.data, model)
    taken = ranks.broadcast(taken)
    assert taken is not None
    taken.adopt(model)
    return taken


def _resume(folder: Path, trainer: Trainer, ranks: Ranks, console: Console, held: ExitStack) -> float | None:
    """Bring the trainer to the run's resume point, if it has one: seconds trained until then."""
    checkpoint = folder / CHECKPOINT
    state = None
    with ranks.together():
        if ranks.is_first and checkpoint.is_file():
            try:
                state = load_checkpoint(checkpoint, partial(check_state, trainer=trainer, source=checkpoint))
                MetricsFile(folder / METRICS, state["trainer"]["step"])  # can be read
            except CheckpointError as error:
                raise CheckpointError(
                    f"{error}: train the run anew with --overwrite, or elsewhere with --out"
                ) from error
    state = ranks.broadcast(state)
    if state is None:
        return None
    continue_from(state, trainer, checkpoint)
    tell(console, f"resuming {folder} after step {trainer.step} of {trainer.total_steps}")
    _keep_rounding(state, trainer, console, held)
    return state["seconds"]


def _fit(
    run: Prepared, claim: Claim, ranks: Ranks, console: Console, callbacks: Sequence[Observer]
) -> tuple[Follower, bool]:
    """Train to the end, or until a signal or a callback; the observer, and whether the last step was reached."""
    trainer = run.trainer
    with ProgressDisplay(console, trainer.total_steps, trainer.epochs, trainer.step) as display:
        observer = Follower(ranks, callbacks)
        if ranks.is_first:
            probe, _ = next(training_batches(run.config, run.dataset)(0, 0))
            every = run.config.training.checkpoint_seconds
            meters: list[Meter] = [] if run.forgetting is None else [run.forgetting]
            if run.config.metrics != MetricsSection():
                first_steps = run.config.metrics.first_steps
                meters.append(OptimizerMeter(run.folder / STEPS, first_steps, trainer.step))
            observer = Recorder(
                claim, every, trainer, probe, display, ranks, run.seconds_before or 0.0, callbacks, meters
            )
        compiled = compiles(run.config, run.model, run.dataset)
        told = announced(display.compiling, display.compiled) if compiled else nullcontext()
        with observer.until_signalled(), safe_convolutions(run.model, run.dataset.image_shape), told:
            finished = trainer.run(observer)
            if not finished:
                observer.save(trainer)
        if finished:
            observer.save(trainer)
    if not finished:
        saved = f"saved {run.folder} at step {trainer.step}; continue with --resume"
        if observer.signal == READER_LEFT:
            _tell_the_error_stream(ranks, f"nobody reads the output any more: {saved}")
        else:
            tell(console, saved)
    return observer, finished


def _evaluate(run: Prepared, claim: Claim, observer: Follower, ranks: Ranks) -> dict[str, Any]:
    """Hand out the network, the averaged one if there is one, verify it, and write the summary."""
    seconds = observer.seconds if isinstance(observer, Recorder) else 0.0  # of a clock that goes on
    average, population = run.trainer.average, run.config.training.batch_norm.population
    networks: dict[str, Results] = {}
    if average is not None:
        networks[RAW_WEIGHTS] = _hand_out(run, claim, RAW_WEIGHTS, population, ranks)
        average.apply()
    results = networks[WEIGHTS] = _hand_out(run, claim, WEIGHTS, population or average is not None, ranks)
    summary: dict[str, Any] = {}  # the first process's, in the end everyone's
    if isinstance(observer, Recorder):
        claim.require()
        summary = {
            **summarize(run.config, results.test),
            **made_with(run.config, run.model, run.dataset.test),
            "validation": results.summary()["validation"],
            **({} if average is None else {"networks": {name: found.summary() for name, found in networks.items()}}),
            "train_seconds": round(seconds, 2),
            "images_per_second": round(observer.images_per_second, 1),
            "steps": run.trainer.step,
            "processes": ranks.world_size,
        }
        if run.start is not None:
            summary["start"] = _started(run, run.start)
        add_verdicts(run.folder, verdicts_of(run.config, run.dataset.test, results.test))
        write_json(run.folder / SUMMARY, summary)
        shutil.rmtree(run.folder / VERIFYING, ignore_errors=True)
    return ranks.broadcast(summary)


def _hand_out(run: Prepared, claim: Claim, file: str, population: bool, ranks: Ranks) -> Results:
    """Save and verify the network as it is, or with BatchNorm statistics of a whole epoch of training images."""
    config, model, dataset = run.config, run.model, run.dataset
    if population:  # by every process for itself: all have the whole training set
        batches = training_batches(config, dataset, augmented=False)(config.training.epochs, 0)
        reestimate_statistics(model, (images for images, _ in batches))
    if ranks.is_first:
        claim.require()
        save_weights(run.folder / file, model)
    results = _verified(run, claim, dataset, "test", ranks)
    if dataset.validation is None:
        return Results(results, [])
    return Results(results, _verified(run, claim, dataset.tested_on_validation(), "validation", ranks))


def _verified(run: Prepared, claim: Claim, dataset: Dataset, split: str, ranks: Ranks) -> list[Verification]:
    """Errors on the test images; a search, which may take hours, goes on with what one that was cut off has found."""
    results = None
    if BRANCH_AND_BOUND in run.config.verification.method:
        weights = ranks.broadcast(tensors_digest(run.model.state_dict()))
        results = run.folder / VERIFYING / f"{weights[:16]}-{split}.jsonl"
        with ranks.together():
            if ranks.is_first:
                claim.require()
                results.parent.mkdir(exist_ok=True)
    return verify_run(run.config, run.model, dataset, ranks=ranks, results=results)


def _started(run: Prepared, start: Start) -> dict[str, Any]:
    """Of summary.json: what the run began with, and what became of that."""
    origin = {"file": start.file, "sha256": start.sha256, "keep": start.keep, "reinitialized": start.reinitialized}
    if run.forgetting is None:
        return origin
    return origin | run.forgetting.summary(start, read_records(run.folder / METRICS), run.model)


def _keep_rounding(state: Mapping[str, Any], trainer: Trainer, console: Console, held: ExitStack) -> None:
    """Sums over other numbers of threads round otherwise: a run goes on with as many as it was saved with.

    Unless the environment names a number. The process's own number comes back when `held` ends. Another processor, or
    version of PyTorch, is told: its sums cannot be had here.
    """
    own = computed_by(trainer)
    if (other := state.get("computed_by", own)) != own:
        tell(console, f"saved by {shown(other, 200)}, goes on by {own}: rounded otherwise")
    saved, here = state["threads"], torch.get_num_threads()
    if here == saved:
        return
    if "OMP_NUM_THREADS" in os.environ:
        tell(console, f"saved with {saved} threads, goes on with {here} (OMP_NUM_THREADS): rounded otherwise")
        return
    tell(console, f"goes on with {saved} threads, as it was saved, instead of {here}: rounded the same")
    held.callback(torch.set_num_threads, here)
    torch.set_num_threads(saved)


def _tell_the_error_stream(ranks: Ranks, line: str) -> None:
    if ranks.is_first:
        with suppress(OSError):  # it may lead to the same reader
            print(line, file=sys.stderr, flush=True)
