"""Seconds per epoch of the authors' published training code, run as it is from a checkout, beside certtrain's.

    git clone https://github.com/shizhouxing/Fast-Certified-Robust-Training AUTHORS
    python scripts/authors_epochs.py --repo AUTHORS --data CIFAR         # docs/results/authors-epochs-cuda.json

CIFAR is the folder that holds torchvision's cifar-10-batches-py. The code needs auto_LiRPA and the like: --python names
the interpreter of an environment that has them, PYTHONPATH is passed on. Nothing is written to the checkout, and its
logging service is replaced by one that keeps nothing. The epochs are the first ones of its CIFAR-10 setting at 8/255;
the first is natural training, bounds follow from the second on.

--beside adds the epochs of certtrain runs on the same machine and data: NAME=RUN, a run directory.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from ablation import RESULTS

from certtrain.runs.provenance import versions
from certtrain.runtime.files import write_json

SILENT_LOGGING = "def ignore(*args, **kwargs): pass\ninit = log = finish = ignore\n"


def authors_epochs(repo: Path, data: Path, python: str, device: str, epochs: int, more: list[str]) -> list[float]:
    """Seconds of each epoch, as the authors' log gives them; testing and saving not included."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "data").symlink_to(data.resolve())
        (folder / "config").symlink_to(repo.resolve() / "config")
        (folder / "stand-ins").mkdir()
        (folder / "stand-ins" / "wandb.py").write_text(SILENT_LOGGING)
        paths = [str(folder / "stand-ins"), *filter(None, [os.environ.get("PYTHONPATH")])]
        command = [python, str(repo.resolve() / "train.py"), "--method=fast", "--model=cnn", f"--device={device}"]
        command += ["--config=config/cifar.json", "--scheduler_opts=start=2,length=80"]
        command += [f"--num-epochs={epochs}", f"--test-interval={epochs + 1}", "--dir=model", *more]
        done = subprocess.run(
            command,
            cwd=folder,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    seconds = [float(number) for number in re.findall(r"Epoch time: ([\d.]+)", done.stdout)]
    if done.returncode != 0 or len(seconds) != epochs:
        raise SystemExit(f"the authors' code ended with code {done.returncode}:\n{done.stdout[-1500:]}")
    return seconds


def certtrain_epochs(run: Path) -> list[float]:
    """Seconds of each epoch of a certtrain run that was never interrupted, everything included."""
    ends = [json.loads(line)["seconds"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [after - before for before, after in itertools.pairwise([0.0, *ends])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo", type=Path, required=True, help="checkout of the authors' repository")
    parser.add_argument("--data", type=Path, required=True, help="folder that holds cifar-10-batches-py")
    parser.add_argument("--python", default=sys.executable, help="interpreter that has what the code needs")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--out", type=Path, help="default: docs/results/authors-epochs-DEVICE.json")
    parser.add_argument("--beside", nargs="*", default=[], metavar="NAME=RUN", help="certtrain runs to show beside")
    options, more = parser.parse_known_args()
    seconds = authors_epochs(options.repo, options.data, options.python, options.device, options.epochs, more)
    rows = [{"loop": "authors'", "seconds": seconds}]
    for name, run in (pair.split("=", 1) for pair in options.beside):
        rows.append({"loop": f"certtrain, {name}", "seconds": certtrain_epochs(Path(run))[: options.epochs]})
    file = options.out or RESULTS / f"authors-epochs-{options.device}.json"
    write_json(file, {"versions": versions(), "device": options.device, "options": more, "rows": rows})
    for row in rows:
        print(f"{row['loop']}: " + ", ".join(f"{value:.1f}" for value in row["seconds"]) + " seconds per epoch")


if __name__ == "__main__":
    main()
