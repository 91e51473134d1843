"""Branch and bound against enumeration: random tiny networks, every activation pattern a linear program.

    python scripts/enumeration.py --networks 3000    # docs/results/enumeration.json

A network's verdict must be "proved" where the exact least margin is above 0 and "attacked" where it is below; no lower
bound may be above an exact margin. Networks whose least margin is within 1e-7 of 0 are left out.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from common import RESULTS, ROOT

from certtrain.bounds import Box
from certtrain.bounds.linear.beta import Ascent
from certtrain.runs.provenance import versions
from certtrain.runtime.files import write_json
from certtrain.verification.branch_and_bound import Search, branch_and_bound

sys.path.insert(0, str(ROOT))

from tests.verification.test_branch_and_bound import least_margins, question, small_network

WIDTHS = ((2, 4, 3), (3, 6, 2), (2, 3, 3, 3), (2, 4, 2, 2), (4, 7, 3), (2, 4, 4, 2))
RADII = (0.1, 0.2, 0.4)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=3000)
    parser.add_argument("--out", type=Path, default=RESULTS / "enumeration.json")
    options = parser.parse_args()
    verdicts, wrong, split, started = Counter[str](), [], 0, time.perf_counter()
    for seed, (widths, radius) in zip(
        range(options.networks), itertools.cycle(itertools.product(WIDTHS, RADII)), strict=False
    ):
        network = small_network(seed, widths)
        center = torch.rand(1, widths[0], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        box, label = Box(center - radius, center + radius), int(network(center).argmax())
        exact = np.delete(least_margins(network, box, label), label)
        (outcome,) = branch_and_bound(*question(network, box, label), Search(timeout=60, ascent=Ascent(steps=5)))
        if abs(exact.min()) < 1e-7:
            verdicts["left out"] += 1
            continue
        verdicts[outcome.verdict.value] += 1
        split += outcome.domains > 1
        expected = "proved" if exact.min() > 0 else "attacked"
        if outcome.verdict != expected or (np.delete(outcome.lower.numpy(), label) > exact + 1e-9).any():
            wrong.append({"seed": seed, "widths": widths, "verdict": outcome.verdict.value, "least": exact.min()})
    content = {
        "versions": versions(),
        "networks": options.networks,
        "verdicts": dict(verdicts),
        "searched": split,
        "wrong": wrong,
        "seconds": round(time.perf_counter() - started, 1),
    }
    write_json(options.out, content)
    print(content)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
