"""What a run directory holds, when one may be entered, continued or cleared, and what may be written beside it."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from certtrain.config import Config, load_config
from certtrain.config.loading import Overrides, leaves, override_keys
from certtrain.errors import CheckpointError, UsageError, shortened
from certtrain.runs.files import (
    CHECKPOINT,
    CONFIG,
    NUMBERED,
    OF_NETWORK,
    RUN_FILES,
    STUDY_FILES,
    SUMMARY,
    TENSORBOARD,
    VERIFYING,
    WEIGHTS,
    holds_runs,
    is_run,
)
from certtrain.runs.lock import writing_in
from certtrain.runtime.files import parse_json, replaceable, write_atomically, write_json

SUBJECT = ("weights_sha256", "split_sha256")  # in them and in the summary: what network they are about, what images


def default_folder(config: str | Path | Mapping[str, Any] | Config) -> Path:
    """Where a run goes that was not told where: runs/NAME after its config file."""
    if not isinstance(config, str | Path):
        raise UsageError("a run that is not read from a file needs an output folder: pass out=")
    return Path("runs") / Path(config).stem


# --- entering ---------------------------------------------------------------------------------------------------------


def run_to_continue(folder: Path, resume: bool, overwrite: bool) -> Config | None:
    """The configuration of the run in `folder` that is to be continued; None where a new one starts.

    Nothing is changed yet.

    Raises:
        UsageError: there is something, and neither `resume` nor `overwrite` was said, or it is no run.
        CheckpointError: it cannot be continued.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file, not a folder")
    occupied = folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())
    if occupied and (resume or overwrite):
        _require_replaceable(folder)
    if occupied and resume:
        stored = stored_config(folder)
        finished = [name for name in (WEIGHTS, SUMMARY) if (folder / name).exists()]
        if finished and not (folder / CHECKPOINT).is_file():
            raise CheckpointError(
                f"{folder} has a {finished[0]} but no {CHECKPOINT} to continue from: "
                "train it anew with --overwrite, or elsewhere with --out"
            )
        return stored
    if occupied and not overwrite:
        raise UsageError(f"{folder} holds a run: continue it with --resume, replace it with --overwrite, or name --out")
    if occupied and not is_run(folder):
        raise UsageError(f"{folder} is not a run directory (it has no config.yaml): it is not overwritten")
    return None


def _require_replaceable(folder: Path) -> None:
    """What lies where the run has its files must be files."""
    for name in RUN_FILES:
        replaceable(folder / name)
    events = folder / TENSORBOARD
    if os.path.lexists(events) and not events.is_dir():
        raise UsageError(f"{events} is not a folder, as a run has it: move it away")


def stored_config(folder: Path) -> Config:
    try:
        return load_config(folder / CONFIG)
    except (OSError, ValueError) as error:
        reason = shortened(error, 160)
        raise CheckpointError(f"the config.yaml of the run in {folder} cannot be read: {reason}") from error


def differences(stored: Config, asked: Config) -> dict[str, str]:
    """Of each value that differs, under its key "section.key": what it is in the run, and what was asked for."""
    run, here = (dict(leaves(config.model_dump(mode="json"))) for config in (stored, asked))
    return {
        key: f"{key} is {_shown(run, key)} there, {_shown(here, key)} here"
        for key in dict.fromkeys((*run, *here))
        if run.get(key, _shown) != here.get(key, _shown)
    }


def _shown(values: Mapping[str, Any], key: str) -> str:
    return f"{values[key]!r:.60}" if key in values else "absent"


def require_agreement(folder: Path, stored: Config, asked: Config, overrides: Overrides | None = None) -> list[str]:
    """What is asked for when the run in `folder` is continued must be what it was started with.

    Args:
        overrides: what `asked` was made with; only what these name must agree. None: all of it.

    Returns:
        A text for each difference that does not matter: a file need not repeat the overrides the run was started with.
    """
    different = differences(stored, asked)
    wrong = [text for key, text in different.items() if is_named(key, overrides)]
    if wrong:
        raise UsageError(f"{folder} holds a run of another configuration: {'; '.join(wrong)}")
    return list(different.values())


def is_named(key: str, overrides: Overrides | None) -> bool:
    """Whether overrides say something of `key`, or of a section that it is in; None says all."""
    return overrides is None or any(f"{key}.".startswith(f"{name}.") for name in override_keys(overrides))


def extended(stored: Config, asked: Config) -> Config:
    """`stored`, for as many epochs as `asked` has, where those are more."""
    epochs = asked.training.epochs
    return load_config(stored, {"training.epochs": epochs}) if epochs > stored.training.epochs else stored


# --- clearing ---------------------------------------------------------------------------------------------------------


def clear(folder: Path) -> None:
    """Remove a run's own files but config.yaml, which makes it one; anything else that lies there stays."""
    for name in RUN_FILES:
        if name != CONFIG:
            (folder / name).unlink(missing_ok=True)
    for kept in (*_kept_results(folder), *_set_aside(folder)):
        kept.unlink()
    for events in (folder / TENSORBOARD).glob("events.out.tfevents.*"):
        events.unlink()
    shutil.rmtree(folder / VERIFYING, ignore_errors=True)


def set_aside(folder: Path, epochs: int) -> list[str]:
    """Rename what is said of the network after so many epochs, since training it goes on; the new names."""
    renamed = []
    for file in (*(folder / name for name in OF_NETWORK), *_kept_results(folder)):
        if file.is_file():
            renamed.append(f"{file.stem}-{epochs}-epochs{file.suffix}")
            file.replace(folder / renamed[-1])
    return renamed


def epochs_of(weights: Path, epochs: int) -> int:
    """After how many epochs a run of `epochs` handed out the network in a file of its own: fewer, if set aside."""
    found = re.fullmatch(r".*-([0-9]+)-epochs", weights.stem)
    return epochs if found is None else int(found[1])


def _set_aside(folder: Path) -> list[Path]:
    return [*_named(folder, OF_NETWORK, "-N-epochs"), *_named(folder, NUMBERED, "-N-N-epochs")]


def _named(folder: Path, names: Sequence[str], ending: str) -> list[Path]:
    """Files in `folder` called as one of `names`, with an ending before the suffix, in which N is any number."""
    number = ending.replace("N", "[0-9]+")
    pattern = "|".join(f"{re.escape(name.stem)}{number}{re.escape(name.suffix)}" for name in map(Path, names))
    return [file for file in folder.iterdir() if re.fullmatch(pattern, file.name) and not file.is_dir()]


def remove_temporaries(folder: Path) -> None:
    """What a process that was killed during a save has left."""
    for name in RUN_FILES:
        for temporary in folder.glob(f".{name}.*.tmp"):
            temporary.unlink(missing_ok=True)


# --- writing beside it ------------------------------------------------------------------------------------------------


def check_output(path: Path, *used: Path, own: str | None = None) -> None:
    """See to it, before hours of work, that writing `path` will replace nothing that is needed.

    Args:
        used: other files that the command reads or writes.
        own: the name of the run's file that the command writes by itself, and so may replace.

    Raises:
        UsageError: it is a file of a run or a study, one of `used`, or no file (`replaceable`), or there is no such
            folder, or one that cannot be written to.
    """
    target = replaceable(path)
    if not target.parent.is_dir():
        raise UsageError(f"{path} cannot be written: there is no folder {target.parent}")
    if not is_writable(target.parent):
        raise UsageError(f"{path} cannot be written: nothing can be written to {target.parent}, name another place")
    for file in used:
        if target == file.resolve() or (target.exists() and _same(target, file)):
            raise UsageError(f"{path} is a file that is read or written here already: name another")
    for folder in {target.parent, *(_folder_of(file) for file in used)}:
        for kind, owned in _owned(folder):
            if owned.name != own and (target == owned.resolve() or (target.exists() and _same(target, owned))):
                raise UsageError(f"{path} is {owned.name} of the {kind} in {folder}: name another file")
    if target.parent.name == TENSORBOARD and is_run(target.parent.parent):
        raise UsageError(f"{path} is among the TensorBoard files of a run: name another file")


def _owned(folder: Path) -> Iterator[tuple[str, Path]]:
    """The files that are a run's in `folder`, and a study's, whether they are there or not yet."""
    if is_run(folder):
        for file in (*(folder / name for name in RUN_FILES), *_kept_results(folder), *_set_aside(folder)):
            yield "run", file
    if holds_runs(folder) or any((folder / name).exists() for name in STUDY_FILES):
        for name in STUDY_FILES:
            yield "study", folder / name


def is_writable(folder: Path) -> bool:
    """Whether files can be made in `folder`, and renamed."""
    return os.access(folder, os.W_OK | os.X_OK)


def _folder_of(file: Path) -> Path:
    return (file if file.is_dir() else file.parent).resolve()


def _same(file: Path, other: Path) -> bool:
    return other.exists() and os.path.samefile(file, other)


def write_results(file: Path, content: Mapping[str, Any]) -> Path | None:
    """Write a JSON file; what lies there already, and says something else, is kept under a number.

    Returns:
        Where it is kept, or None.
    """
    with writing_in(file.parent):
        kept = None
        if file.is_file() and not _say_the_same(file, content):
            numbered = (file.with_name(f"{file.stem}-{number}{file.suffix}") for number in itertools.count(1))
            kept = next(path for path in numbered if not path.exists())
            before = file.read_bytes()
            write_atomically(kept, lambda copy: copy.write(before))
        write_json(file, content)
        return kept


def results_in(folder: Path, name: str) -> list[Path]:
    """The file `name` of those that `write_results` writes, and those it has kept; the newest first."""
    kept = _named(folder, [name], "-N")
    kept.sort(key=lambda file: int(file.stem.rpartition("-")[2]), reverse=True)
    return [file for file in (folder / name, *kept) if file.is_file()]


def _kept_results(folder: Path) -> list[Path]:
    return _named(folder, NUMBERED, "-N")


def are_of_run(results: Mapping[str, Any], summary: Mapping[str, Any]) -> bool:
    """Whether `results` are about the network that a run handed out, and the images of its summary.

    `verify` is asked about its other weights, and about other images, too. Summaries of earlier versions do not say.
    """
    return all(summary.get(key) in (None, results.get(key)) for key in SUBJECT)


def _say_the_same(file: Path, content: Mapping[str, Any]) -> bool:
    try:
        before = parse_json(file.read_bytes())
    except (OSError, ValueError):
        return False
    return _without_times(before) == _without_times(json.loads(json.dumps(content)))


def _without_times(value: Any) -> Any:
    """The same question, asked again, has the same answer but for these."""
    if isinstance(value, dict):
        return {key: _without_times(item) for key, item in value.items() if key not in ("seconds", "versions")}
    return [_without_times(item) for item in value] if isinstance(value, list) else value
