"""Train and verify a published setting, and add what came of it to docs/results/reproduce.jsonl, a line for each seed.

    python scripts/reproduce.py digits --seeds 0 1 2 3 4
    python scripts/reproduce.py cifar10_8_255 data.root=/where/it/is
    python scripts/reproduce.py cifar10_8_255 --budget 3600      # at most an hour now; the same command goes on later

A run that was cut off, by the budget or by anything else, is continued; one that is finished is not repeated. Exit
codes: 0 when all seeds are done, 75 when the budget has run out before, 130 after Ctrl-C. scripts/tables.py writes the
README's tables from the lines.
"""

from __future__ import annotations

import argparse
import json
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from common import RESULTS

import certtrain
from certtrain.errors import NOT_OVER

# PyTorch, behind the other modules, is imported where it is needed: when the budget already counts.
if TYPE_CHECKING:
    from certtrain.config import Config

RECORD = RESULTS / "reproduce.jsonl"
LONGEST_RESERVE = 60.0  # seconds of a budget that are kept for the step under way and the checkpoint


class OutOfTimeError(Exception):
    """The budget ran out while nothing was being trained."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", help="the name of a shipped config, or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--budget", type=float, help="seconds from now after which this command has ended")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--results", type=Path, default=RECORD, help="default: docs/results/reproduce.jsonl")
    options = parser.parse_intermixed_args(arguments)
    with time_limit(options.budget):
        for seed in options.seeds:
            folder = options.runs / f"{Path(options.setting).stem}-seed{seed}"
            overrides = [*options.overrides, f"seed={seed}"]
            ended_by = reproduce(options.setting, overrides, folder, options.device, options.results)
            if ended_by is not None:
                reason = "interrupted" if ended_by == signal.SIGINT else "out of time"
                print(f"{reason}: run the same command again to continue {folder}")
                return 130 if ended_by == signal.SIGINT else NOT_OVER
    return 0


def reproduce(setting: str, overrides: list[str], folder: Path, device: str, results: Path) -> int | None:
    """One run from where it stands to a line in `results`; returns the signal that ended it before, if one did."""
    name = Path(setting).stem
    if is_recorded(results, name, folder):
        print(f"{folder} is finished and recorded in {results}")
        return None
    try:
        run = certtrain.train(setting, folder, device=device, resume=True, overrides=overrides)
    except OutOfTimeError:
        return signal.SIGTERM
    except KeyboardInterrupt:
        return signal.SIGINT
    if run.summary is None:
        return run.interrupted_by
    record(results, {"setting": name, "seconds_until": milestones(folder), **without_paths(run.summary)})
    return None


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """A training run is ended as by SIGTERM, which it answers with a checkpoint; anything else by OutOfTimeError."""

    def out_of_time(number: int, frame: FrameType | None) -> None:
        raise OutOfTimeError

    before = signal.signal(signal.SIGTERM, out_of_time)
    signal.signal(signal.SIGALRM, lambda number, frame: signal.raise_signal(signal.SIGTERM))
    if seconds is not None:
        signal.setitimer(signal.ITIMER_REAL, seconds - min(LONGEST_RESERVE, seconds / 5))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGTERM, before)


def milestones(folder: Path) -> dict[str, float]:
    """Seconds, interruptions left out, until the end of warmup, each milestone, training, and verification."""
    from certtrain.config import load_config

    config = load_config(folder / "config.yaml")
    summary = json.loads((folder / "summary.json").read_text())
    epochs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    after = {epoch["epoch"]: epoch["seconds"] for epoch in epochs}
    trained = summary["train_seconds"]
    return {
        **{name: after[epoch] for name, epoch in epochs_of_note(config).items() if epoch in after},
        "trained": trained,
        "verified": round(trained + summary["verify_seconds"], 2),
    }


def epochs_of_note(config: Config) -> dict[str, int]:
    """Finished epochs at the milestones."""
    warmup = config.epsilon.start_epoch - 1 + config.epsilon.warmup_epochs
    return {"warmup": warmup, **{f"epoch {epoch}": epoch for epoch in config.optimizer.milestones}}


def without_paths(summary: dict[str, Any]) -> dict[str, Any]:
    """The summary without where this machine keeps its data."""
    config = summary["config"]
    data = {key: value for key, value in config["data"].items() if key not in ("root", "path")}
    return summary | {"config": config | {"data": data}}


def read(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def record(results: Path, line: dict[str, Any]) -> None:
    from certtrain.runtime.files import write_text

    write_text(results, "".join(json.dumps(one) + "\n" for one in [*read(results), line]))


def is_recorded(results: Path, setting: str, folder: Path) -> bool:
    summary = folder / "summary.json"
    if not summary.exists():
        return False
    finished = {"setting": setting, **without_paths(json.loads(summary.read_text()))}
    return any(all(line.get(key) == value for key, value in finished.items()) for line in read(results))


if __name__ == "__main__":
    raise SystemExit(main())
