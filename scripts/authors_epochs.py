"""Seconds per epoch of the authors' published training code, run as it is from a checkout, beside certtrain's.

    git clone https://github.com/shizhouxing/Fast-Certified-Robust-Training AUTHORS
    python scripts/authors_epochs.py --repo AUTHORS --data CIFAR         # docs/results/authors-epochs.json

CIFAR is the folder that holds torchvision's cifar-10-batches-py. The code needs auto_LiRPA and the like: --python names
the interpreter of an environment that has them, PYTHONPATH is passed on. Nothing is written to the checkout, and its
logging service is replaced by one that keeps nothing. The epochs are the first ones of its CIFAR-10 setting at 8/255;
the first is natural training, bounds follow from the second on.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from ablation import RESULTS

from certtrain.checkpoint import write_json
from certtrain.run import versions

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo", type=Path, required=True, help="checkout of the authors' repository")
    parser.add_argument("--data", type=Path, required=True, help="folder that holds cifar-10-batches-py")
    parser.add_argument("--python", default=sys.executable, help="interpreter that has what the code needs")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--out", type=Path, default=RESULTS / "authors-epochs.json")
    options, more = parser.parse_known_args()
    seconds = authors_epochs(options.repo, options.data, options.python, options.device, options.epochs, more)
    write_json(options.out, {"versions": versions(), "device": options.device, "options": more, "seconds": seconds})
    print(f"seconds per epoch: {', '.join(map(str, seconds))}")


if __name__ == "__main__":
    main()
