"""What training methods came to on CIFAR-10, and BatchNorm's statistics, gathered from their studies.

    certtrain study methods_cifar10_2_255 --jobs 2        # trains; the same command goes on where it was
    certtrain study methods_cifar10_8_255 --jobs 2
    certtrain study batchnorm_cifar10 --jobs 2
    certtrain verify RUN --method ibp,crown-ibp,crown,branch-and-bound --timeout 5 --limit 200 \\
        verification.pgd_steps=40 verification.pgd_restarts=2                 # each run of the first two studies
    python scripts/training_methods.py runs                                   # docs/results/training_methods.json

`runs` is the folder of the three studies; what is finished is gathered, and scripts/tables.py makes the tables.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

from common import ERRORS, RESULTS, runs_of

from certtrain.runs.directory import are_of_run
from certtrain.runs.provenance import versions
from certtrain.runtime.files import write_json

Row = dict[str, Any]


def rows_of(study: Path) -> list[Row]:
    """A row for each finished run."""
    return [row_of(run) for _, _, run in runs_of(study, having="summary.json")]


def row_of(run: Path) -> Row:
    summary = json.loads((run / "summary.json").read_text())
    row = {"name": run.parent.name, "seed": summary["seed"], "eps": summary["eps"], "images": summary["images"],
           "train_seconds": summary["train_seconds"], **{key: summary[key] for key in ERRORS}}  # fmt: skip
    if (run / "verify.json").is_file():
        results = json.loads((run / "verify.json").read_text())
        if not are_of_run(results, summary):
            raise SystemExit(f"{run / 'verify.json'} is about another network or other images than its run")
        row["searched"] = searched(results["radii"][0])
    return row


def searched(result: Row) -> Row:
    """Errors of a cascade's images, after each of its stages."""
    proved = itertools.accumulate(stage["proved"] for stage in result["stages"])
    after = {stage["method"]: 1 - n / result["images"] for stage, n in zip(result["stages"], proved, strict=True)}
    kept = ("images", "natural_error", "pgd_error", "verified_error", "verdicts", "seconds")
    return {**{key: result[key] for key in kept}, "after": after}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder of the studies")
    parser.add_argument("--out", type=Path, default=RESULTS / "training_methods.json")
    options = parser.parse_args()
    studies = ("methods_cifar10_2_255", "methods_cifar10_8_255", "batchnorm_cifar10")
    gathered = {name: rows_of(options.runs / name) for name in studies}
    write_json(options.out, {"versions": versions(), "studies": gathered})
    print(", ".join(f"{name}: {len(rows)} runs" for name, rows in gathered.items()))


if __name__ == "__main__":
    main()
