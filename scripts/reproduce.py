"""Train and verify a setting for several seeds, and keep the summaries in docs/results/NAME.json.

    python scripts/reproduce.py digits --seeds 0 1 2 3 4
    python scripts/reproduce.py cifar10_8_255 --seeds 0 data.root=/where/it/is

A seed whose run was cut off is continued. The README's tables are written from the JSON (scripts/tables.py).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import certtrain
from certtrain.checkpoint import write_json

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", help="the name of a shipped config")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    options = parser.parse_args()
    summaries = []
    for seed in options.seeds:
        folder = options.runs / f"{options.setting}-seed{seed}"
        overrides = [*options.overrides, f"seed={seed}"]
        run = certtrain.train(options.setting, folder, device=options.device, resume=True, overrides=overrides)
        if run.summary is None:
            raise SystemExit(f"interrupted; run the same command again to continue {folder}")
        summaries.append(run.summary)
        write_json(RESULTS / f"{options.setting}.json", summaries)


if __name__ == "__main__":
    main()
