"""The search for good settings: Optuna proposes, runs are trained on part of the training set and judged by the rest.

The test set is looked at once: by what was chosen, trained anew on the whole training set, when the search is over.
"""

from __future__ import annotations

import platform
import re
import secrets
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from certtrain.config import Config
from certtrain.config.loading import leaves
from certtrain.errors import (
    CerttrainError,
    DivergedError,
    UnsupportedOperation,
    UsageError,
    is_out_of_memory,
    lines_of,
    optional_module,
    shortened,
)
from certtrain.runs.directory import differences, stored_config
from certtrain.runs.files import CONFIG, SEARCH, SEARCH_ID, SEARCH_STORAGE
from certtrain.runs.lock import claimed, holder
from certtrain.runtime.console import tell
from certtrain.runtime.files import make_folder, write_json, write_once
from certtrain.studies.design import Cell, PlannedRun, planned
from certtrain.studies.processes import Deadline, Ended, Processes
from certtrain.studies.runner import interruptible, train_all
from certtrain.studies.search import Range, Tuning
from certtrain.studies.trials import BASE, Trial, Tuned, cell_name, choose, is_on_front, tested_trials

STUDY = "certtrain"  # its name in the storage
SETTINGS = "settings"  # user attribute of a trial: the keys it changes, and to what
ERROR = "error"  # user attribute: why it has failed
CRASHED = "crashed"  # user attribute: how a process that trained it has died
FOLDER = "folder"  # user attribute of the study: which one its trials lie in
TESTED = "tested"  # user attribute of the study: after how many trials the test set is looked at
LOOK_EVERY = 1.0  # seconds


def tune(
    tuning: Tuning,
    folder: Path,
    *,
    jobs: int = 1,
    budget: float | None = None,
    device: str = "auto",
    console: Console | None = None,
) -> Tuned:
    """Search, or go on searching, and when all trials are over test what was chosen.

    Several such calls, here and on other machines, may work on one folder and storage. A trial whose process was killed
    is continued from its checkpoint.

    Args:
        folder: of the trials' runs, the record tuning.json, and the runs that are tested.
        jobs, budget, device: as of `train_all`.

    Raises:
        UsageError: the storage holds another search, or is that of another folder; or more trials are asked for after
            the test set was looked at; or `validation` is more images than there are.
        MissingDependency: Optuna is not installed.
    """
    console = console or Console()
    deadline = Deadline.after(budget)
    make_folder(folder)
    study = open_study(tuning, folder)
    if TESTED not in study.user_attrs and (count := tested_trials(folder)) is not None:
        study.set_user_attr(TESTED, count)  # by an earlier version, or with another storage
    interrupted = False
    if _tested(tuning, study, folder) is None:
        if sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False)) < tuning.file.trials:
            _check_images(tuning)
        interrupted = _search(tuning, study, folder, jobs, deadline, device, console)
    file, tested = tuning.file, _tested(tuning, study, folder)
    result = Tuned(folder, file.objectives, file.validation, _trials(study, tested), file.trials, interrupted)
    states = [trial.state for trial in result.trials]
    if sum(state not in ("running", "waiting") for state in states) >= file.trials and "running" not in states:
        choose(result, file.final.most, tuning.final_config)
        write_json(folder / SEARCH, result.summary())
        if not interrupted and not deadline.passed:
            console.print("the search is over; now the test set, once", highlight=False)
            if tested is None:
                study.set_user_attr(TESTED, len(result.trials))  # first: whoever asks for more must not come too late
            runs = _final_runs(tuning, result)
            result.final = train_all(
                runs, folder / "final", jobs=jobs, budget=deadline.budget_left, device=device, console=console
            )
    write_json(folder / SEARCH, result.summary())
    return result


def open_study(tuning: Tuning, folder: Path) -> Any:
    """The Optuna study in the folder's storage, made where there is none."""
    optuna = optional_module("optuna", "tune")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    file = tuning.file
    url = file.storage or f"sqlite:///{(folder / SEARCH_STORAGE).resolve()}"
    try:
        study = optuna.create_study(
            study_name=STUDY,
            storage=url,
            load_if_exists=True,
            directions=["minimize"] * len(file.objectives),
        )
    except Exception as error:  # of optuna, SQLAlchemy and the database's driver
        raise UsageError(f"storage {_without_password(url)} cannot be used: {shortened(error, 160)}") from error
    asked = {
        "objectives": list(file.objectives),
        "validation": file.validation,
        **{f"search.{key}": space for key, space in file.model_dump(mode="json")["search"].items()},
        **dict(leaves(tuning.trial_config({}).model_dump(mode="json"))),
    }
    stored = study.user_attrs.get("asked")
    if stored is None:
        study.set_user_attr("asked", asked)
    elif stored != asked:
        changed = [key for key in dict.fromkeys((*asked, *stored)) if stored.get(key) != asked.get(key)]
        raise UsageError(
            f"{_place(tuning, folder)} holds another search: {shortened(', '.join(changed), 120)} differ; "
            f"undo that, or {_elsewhere(tuning)}"
        )
    if file.storage is not None:
        _require_the_folder(tuning, study, folder)
    return study


def _require_the_folder(tuning: Tuning, study: Any, folder: Path) -> None:
    """A search has one folder: where a trial is found out to be left, and has its checkpoint, is asked there.

    Raises:
        UsageError: the storage is that of another folder.
    """
    write_once(folder / SEARCH_ID, secrets.token_hex(16))  # the same by whatever path the folder is seen
    own = (folder / SEARCH_ID).read_text(encoding="utf-8")
    if FOLDER not in study.user_attrs:
        study.set_user_attr(FOLDER, {"id": own, "place": f"{folder.resolve()} on {platform.node()}"})
    first = study.user_attrs[FOLDER]  # looked up again: another may have been there at the same time
    if first["id"] != own:
        raise UsageError(
            f"{_place(tuning, folder)} belongs to a search in another folder, {shortened(first['place'], 240)}: "
            f"go on there, which all machines must share, or {_elsewhere(tuning)}"
        )


def _place(tuning: Tuning, folder: Path) -> str:
    """Where the trials are kept, for a message."""
    url = tuning.file.storage
    return str(folder) if url is None else f"storage {_without_password(url)}"


def _without_password(url: str) -> str:
    return shortened(re.sub(r"(://[^:@/]*):[^@]*@", r"\1:***@", url))


def _elsewhere(tuning: Tuning) -> str:
    """What to change for a search of its own."""
    if tuning.file.storage is None:
        return "name another --out"
    return "name another storage (a database holds one search), and another --out"


def _tested(tuning: Tuning, study: Any, folder: Path) -> int | None:
    """After how many trials the test set began to be looked at, here or elsewhere; None where it has not.

    Raises:
        UsageError: more trials are asked for.
    """
    count: int | None = study.user_attrs.get(TESTED)
    if count is not None and tuning.file.trials > count:
        raise UsageError(
            f"{_place(tuning, folder)}: the test set was looked at after {count} trials; choosing among "
            f"{tuning.file.trials} now would be choosing on it: {_elsewhere(tuning)}"
        )
    return count


def _check_images(tuning: Tuning) -> None:
    """Read the data once, or every trial would fail by images that cannot be held out."""
    from certtrain.runs.build import load_data

    load_data(tuning.trial_config({}))


# --- searching --------------------------------------------------------------------------------------------------------


def _search(
    tuning: Tuning, study: Any, folder: Path, jobs: int, deadline: Deadline, device: str, console: Console
) -> bool:
    """Train trials until there are enough, or the time is up; whether somebody ended it."""
    say = partial(tell, console)
    with Processes(jobs, device, folder / "logs", deadline.reserve) as processes, interruptible():
        try:
            while not deadline.passed:
                while processes.free and (trial := _next_trial(tuning, study, folder, processes.names)) is not None:
                    number, config = trial
                    say(f"trial {number}: {_shown(study.trials[number].user_attrs[SETTINGS])}")
                    processes.start(
                        trial_name(number), train_trial, tuning, folder, number, config, folder / trial_name(number)
                    )
                if not processes.names:
                    return False
                for ended in processes.wait(LOOK_EVERY):
                    _note(study, ended, say)
            return False
        except KeyboardInterrupt:
            say("ending: what is under way is being saved")
            return True


def trial_name(number: int) -> str:
    return f"trials/{number:04}"


def _next_trial(tuning: Tuning, study: Any, folder: Path, names: Sequence[str]) -> tuple[int, Config] | None:
    """A trial that was begun and has nobody at work in it, or a new one; None where there are enough.

    Raises:
        UsageError: more trials are asked for than there were when another began to look at the test set.
    """
    optuna = optional_module("optuna", "tune")
    if _tested(tuning, study, folder) is not None:
        return None
    for begun in study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.RUNNING]):
        place = folder / trial_name(begun.number)
        if trial_name(begun.number) in names or holder(_claim(folder, begun.number)) or holder(place):
            continue
        try:
            config = _propose(tuning, study, optuna.trial.Trial(study, begun._trial_id))
        except optuna.exceptions.UpdateFinishedTrialError:
            continue  # another has finished it since
        if config is None:
            continue
        if (place / CONFIG).exists() and (different := differences(stored_config(place), config)):
            raise UsageError(f"{place} no longer fits the search: {'; '.join(different.values())}")
        return begun.number, config
    while sum(trial.state != optuna.trial.TrialState.WAITING for trial in study.get_trials()) < tuning.file.trials:
        trial = study.ask()
        if (config := _propose(tuning, study, trial)) is not None:
            return trial.number, config
    return None


def _propose(tuning: Tuning, study: Any, trial: Any) -> Config | None:
    """The configuration of a trial, which keeps what it was given before; None, and it has failed, if there is none.

    The first is that of `base`, where it lies within the search.
    """
    before = tuning.base_settings() if trial.number == 0 else None
    study.sampler = _sampler(tuning, trial.number, before or {})
    settings = {key: _suggest(trial, key, tuning) for key in tuning.file.search}
    trial.set_user_attr(SETTINGS, settings)
    if trial.params == before:
        trial.set_user_attr(BASE, True)
    try:
        return tuning.trial_config(settings)
    except UsageError as error:  # each value is possible, but not all of them together
        _fail(study, trial, error)
        return None


def _fail(study: Any, trial: Any, reason: object) -> None:
    trial.set_user_attr(ERROR, lines_of(reason))
    study.tell(trial, state=optional_module("optuna", "tune").trial.TrialState.FAIL)


def _sampler(tuning: Tuning, number: int, fixed: Mapping[str, Any]) -> Any:
    """Of one trial: a generator for all of them would begin anew, and propose the same again, in every process.

    Args:
        fixed: what is not sampled, by key.
    """
    optuna = optional_module("optuna", "tune")
    seed = int(np.random.SeedSequence((tuning.file.seed, number)).generate_state(1)[0])
    if tuning.file.sampler == "random":
        sampler = optuna.samplers.RandomSampler(seed=seed)
    else:
        sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.PartialFixedSampler(fixed, sampler) if fixed else sampler


def _suggest(trial: Any, key: str, tuning: Tuning) -> Any:
    space = tuning.file.search[key]
    if not isinstance(space, Range):
        choices = tuning.choices(key)
        return choices[trial.suggest_categorical(key, list(choices))]
    if space.whole:
        return trial.suggest_int(key, space.low, space.high, log=space.log, step=int(space.step or 1))
    return trial.suggest_float(key, space.low, space.high, log=space.log, step=space.step)


def _note(study: Any, ended: Ended, say: Callable[[str], None]) -> None:
    """Tell what has become of a trial; one that is not over is tried again, but not where processes crash on it.

    Raises:
        CerttrainError: what went wrong is not for its settings, and the next trial would meet it, too.
    """
    optuna = optional_module("optuna", "tune")
    number = int(ended.name.rpartition("/")[2])
    trial = study.trials[number]
    if not trial.state.is_finished() and ended.crashed:
        begun = optuna.trial.Trial(study, trial._trial_id)
        if CRASHED in trial.user_attrs:
            _fail(study, begun, f"{ended.reason}, for the second time")
            trial = study.trials[number]
        else:
            begun.set_user_attr(CRASHED, ended.reason)
            say(f"trial {number}: {ended.reason}: once more")
    elif not trial.state.is_finished() and not ended.resumable:
        raise CerttrainError(f"the search stops at trial {number}, which the same command tries again: {ended.reason}")
    match trial.state.name:
        case "COMPLETE":
            say(f"trial {number}: {', '.join(f'{value:.4f}' for value in trial.values)}")
        case "PRUNED":
            say(f"trial {number}: pruned")
        case "FAIL":
            say(f"trial {number}: failed: {trial.user_attrs[ERROR]}")


def _shown(settings: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in settings.items()
    )


def train_trial(tuning: Tuning, folder: Path, number: int, config: Config, place: Path, device: str) -> int:
    """In a process of its own: train a trial, report its epochs to the pruner, and tell the storage what came out.

    What its settings lead to, a loss that is not finite or too little memory, is the trial's failure. Other errors are
    faults of the machine: the trial stays to be tried again.
    """
    optuna = optional_module("optuna", "tune")
    from certtrain.runs.build import resolve_device
    from certtrain.runs.train import train
    from certtrain.studies.pruning import Pruner

    resolve_device(device)  # or there is none, which no trial is to blame for
    study = open_study(tuning, folder)
    with claimed(_claim(folder, number)):
        if study.trials[number].state.is_finished():  # by another, since it was proposed here
            return 0
        trial = optuna.trial.Trial(study, study.trials[number]._trial_id)
        pruning = tuning.file.pruning
        pruner = None if pruning is None else Pruner(trial, config, pruning)
        callbacks = [] if pruner is None else [pruner]
        try:
            run = train(config, place, resume=True, device=device, console=Console(width=120), callbacks=callbacks)
        except Exception as error:
            if not isinstance(error, DivergedError | UsageError | UnsupportedOperation) and not is_out_of_memory(error):
                raise
            traceback.print_exc()
            _fail(study, trial, error)
            return 0
        if pruner is not None and pruner.pruned:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        elif run.summary is None:
            return 128 + (run.interrupted_by or 0)
        else:
            study.tell(trial, [run.summary[name] for name in tuning.file.objectives])
    return 0


def _claim(folder: Path, number: int) -> Path:
    """A folder that is held by whoever trains a trial until the storage knows what came out: longer than the run's."""
    return folder / "claims" / f"{number:04}"


def _trials(study: Any, count: int | None) -> list[Trial]:
    """The first `count`, those among which it is chosen; None: all."""
    trials = study.get_trials(deepcopy=False)[:count]
    values = [trial.values for trial in trials if trial.state.name == "COMPLETE"]
    return [
        Trial(
            trial.number,
            trial.state.name.lower(),
            trial.user_attrs.get(SETTINGS, {}),
            trial.values,
            trial.state.name == "COMPLETE" and is_on_front(trial.values, values),
            bool(trial.user_attrs.get(BASE)),
        )
        for trial in trials
    ]


def _final_runs(tuning: Tuning, result: Tuned) -> list[PlannedRun]:
    """What was there before, which may be what was chosen, and the others that were."""
    base = Cell(BASE, tuning.final_config({}))
    chosen = [Cell(cell_name(n), tuning.final_config(result.trials[n].settings)) for n in result.chosen]
    cells = [base, *(cell for cell in chosen if cell.config != base.config)]
    return [planned(cell, seed) for seed in tuning.file.final.seeds for cell in cells]
