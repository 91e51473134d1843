"""What a search takes of memory, beside the `max_memory` that it was given.

    python scripts/search_memory.py RUN --eps 0.3 --limits 8 16 32    # MiB; docs/results/search_memory.json

RUN is a run directory whose first test image that is classified right is searched at a radius at which it cannot be
proved, until the waiting domains take all that they may; no point is accepted as an attack. Each limit has a fresh
process, whose peak is its own. What bounding takes beside the domains is the same for all limits, so what counts is by
how much the peak grows with the limit.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import RESULTS
from torch import Tensor, nn

import certtrain
from certtrain.bounds import BoundedModel, linf_box
from certtrain.bounds.linear.beta import Ascent
from certtrain.config.loading import load_config
from certtrain.data import to_float
from certtrain.runs.build import load_data
from certtrain.runs.provenance import versions
from certtrain.runtime.files import write_json
from certtrain.verification.branch_and_bound import Search, branch_and_bound, root_margins
from certtrain.verification.verdicts import Verdict

MEBIBYTE = 2**20


class Faithful(nn.Module):
    """Predicts the same class everywhere."""

    def __init__(self, label: int, classes: int) -> None:
        super().__init__()
        self.label, self.classes = label, classes

    def forward(self, x: Tensor) -> Tensor:
        return F.one_hot(torch.full((len(x),), self.label), self.classes).float()


def search_once(run: Path, eps: float, limit: int) -> dict[str, Any]:
    model = certtrain.load_model(run).eval()
    test = load_data(load_config(str(run / "config.yaml"))).test
    predicted = model(to_float(test.images[:20])).argmax(1)
    index = int((predicted == test.labels[:20]).nonzero()[0])
    image, label = to_float(test.images[index : index + 1]), test.labels[index : index + 1]
    net = BoundedModel(model, image)
    record = net.tightened(linf_box(image, eps))
    margins = root_margins(record, label, torch.full((1, net.classes), -torch.inf))
    search = Search(torch.inf, domains=64, candidates=1, ascent=Ascent(steps=1), max_memory=limit * MEBIBYTE)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (outcome,) = branch_and_bound(Faithful(int(label), net.classes), record, label, margins, search)
    if outcome.verdict != Verdict.MEMORY:
        raise SystemExit(f"the search ended with {outcome.verdict} before {limit} MiB were full: take a larger --eps")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"max_memory": limit, "domains": outcome.domains, "undecided": len(outcome.undecided),
            "before": before / 1024, "peak": peak / 1024, "seconds": round(outcome.seconds, 1)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--eps", type=float, required=True)
    parser.add_argument("--limits", type=int, nargs="+", default=[8, 16, 32], help="MiB")
    parser.add_argument("--one", action="store_true", help="in this process, of the first limit; print it")
    parser.add_argument("--out", type=Path, default=RESULTS / "search_memory.json")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(search_once(options.run, options.eps, options.limits[0])))
        return
    rows = []
    for limit in options.limits:
        command = [
            sys.executable,
            __file__,
            str(options.run),
            "--eps",
            str(options.eps),
            "--limits",
            str(limit),
            "--one",
        ]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        rows.append(json.loads(output.splitlines()[-1]))
        print(json.dumps(rows[-1]), flush=True)
    first, last = rows[0], rows[-1]
    grown = (last["peak"] - first["peak"]) / (last["max_memory"] - first["max_memory"])
    write_json(options.out, {"eps": options.eps, "versions": versions(), "growth": grown, "rows": rows})
    print(f"the peak grows by {grown:.2f} MiB with each MiB of max_memory")


if __name__ == "__main__":
    main()
