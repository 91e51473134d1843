"""certtrain beside the authors' code of the short warmup, and CTRAIN's: same network, images and schedule, in turns.

    git clone https://github.com/shizhouxing/Fast-Certified-Robust-Training AUTHORS
    git clone https://github.com/ADA-research/CTRAIN CTRAIN
    python scripts/beside_authors.py --repo AUTHORS --ctrain CTRAIN --data CIFAR --width 8 --linear-width 128 \\
        --images 2500 --epochs 20 --warmup-epochs 10 --milestones 15 18 --batch-size 64 --lr 0.002 --seeds 0 1 2

CIFAR is a folder that holds torchvision's cifar-10-batches-py, or train.npz and test.npz of the same images. Each
program trains in a process of its own; an epoch's seconds are those that it reports, processor seconds and memory those
of the process, on a GPU what its torch has allocated there. The authors' code runs as it is: nothing is written to the
checkout, its logging service is replaced by one that keeps nothing, and torchvision's CIFAR-10 by the same images from
a file. It needs auto_LiRPA and the like: --python names the interpreter of an environment that has them, PYTHONPATH is
passed on. CTRAIN is a library: what its user writes is the script below, after its README, and --ctrain-python is the
interpreter of its environment.

docs/results/beside-authors-DEVICE.json is the result; the same command goes on with it, and repeats no seed that is
there. Another program joins by an entry in `programs`.
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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS
from torch import Tensor

from certtrain.data import Split, load_dataset
from certtrain.data.vision import CIFAR10_MEAN, CIFAR10_STD
from certtrain.runs.provenance import versions
from certtrain.runtime.files import write_json

EPSILON = 8 / 255
IMAGES = {"train": "train.npz", "test": "test.npz"}
NO_ATTACK = ("verification.pgd_steps=0", "verification.pgd_restarts=0")
SILENT_LOGGING = "def ignore(*args, **kwargs): pass\ninit = log = finish = ignore\n"
LAUNCHER = """
import runpy, sys
from pathlib import Path
import numpy, torchvision
from PIL import Image
from torch.utils.data import Dataset

class CIFAR10(Dataset):
    def __init__(self, root, train=True, transform=None, target_transform=None, download=False):
        with numpy.load(Path(root) / ("train.npz" if train else "test.npz")) as arrays:
            self.images, self.labels = arrays["images"], arrays["labels"]
        self.transform = transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])

torchvision.datasets.CIFAR10 = CIFAR10
sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# Python runs it at every start: how much of a card's memory torch held at most is known only in the process itself.
CUSTOMIZE = """
import atexit, os, sys

def tell():
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        with open(os.path.join(os.environ["CARD_BYTES"], str(os.getpid())), "w") as file:
            file.write(str(torch.cuda.max_memory_allocated()))

atexit.register(tell)
"""


@dataclass(frozen=True)
class Setting:
    """What the programs are asked for."""

    width: int
    linear_width: int
    epochs: int
    warmup_epochs: int
    batch_size: int
    lr: float
    milestones: Sequence[int]
    device: str


@dataclass(frozen=True)
class Measured:
    """One run of one program; errors of the network of the last epoch, the verified ones by IBP, on all test images.

    verified_error: as the program says itself; by_certtrain: of the weights it left, as `certtrain verify` says.
    """

    natural_error: float
    verified_error: float
    by_certtrain: float
    seconds: Sequence[float]  # of each epoch
    processor_seconds: float  # of the whole command
    peak_bytes: int | None  # of memory of the process; on a GPU of the card's, None where it used none


@dataclass(frozen=True)
class Program:
    """train(setting, seed, images, folder) trains on the images of a folder, and leaves what it writes in another.

    install, written: what a user types before the first run, and for this one, a line each.
    """

    train: Callable[[Setting, int, Path, Path], Measured]
    install: Sequence[str]
    written: Callable[[Setting], Sequence[str]]


# --- certtrain --------------------------------------------------------------------------------------------------------


def certtrain_overrides(setting: Setting) -> list[str]:
    return [
        f"model.options.width={setting.width}",
        f"model.options.linear_width={setting.linear_width}",
        f"epsilon.warmup_epochs={setting.warmup_epochs}",
        f"training.epochs={setting.epochs}",
        f"training.batch_size={setting.batch_size}",
        f"optimizer.lr={setting.lr}",
        f"optimizer.milestones={json.dumps(list(setting.milestones))}",
    ]


def own_images(images: Path) -> list[str]:
    return ["data.name=npz", f"data.path={images}", f"data.mean={list(CIFAR10_MEAN)}", f"data.std={list(CIFAR10_STD)}"]


def train_certtrain(setting: Setting, seed: int, images: Path, folder: Path) -> Measured:
    command = [sys.executable, "-m", "certtrain", "train", "cifar10_8_255", *certtrain_overrides(setting)]
    command += [*own_images(images), f"seed={seed}", *NO_ATTACK]
    command += [f"--device={setting.device}", "--out", str(folder)]
    _, processor_seconds, peak_bytes = measured(command, folder, setting.device)
    summary = json.loads((folder / "summary.json").read_text())
    ends = [json.loads(line)["seconds"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return Measured(
        summary["natural_error"],
        summary["verified_error"],
        by_certtrain(setting, images, folder / "model.safetensors"),
        [round(after - before, 4) for before, after in itertools.pairwise([0.0, *ends])],
        processor_seconds,
        peak_bytes,
    )


def by_certtrain(setting: Setting, images: Path, weights: Path) -> float:
    with tempfile.TemporaryDirectory() as name:
        answer = Path(name) / "verify.json"
        command = [sys.executable, "-m", "certtrain", "verify", "cifar10_8_255", f"--model-weights={weights}"]
        command += [
            *certtrain_overrides(setting),
            *own_images(images),
            *NO_ATTACK,
            f"--device={setting.device}",
            f"--json={answer}",
        ]
        measured(command, Path(name), setting.device)
        return float(json.loads(answer.read_text())["radii"][0]["verified_error"])


# --- the authors' code ------------------------------------------------------------------------------------------------


def authors_options(setting: Setting) -> list[str]:
    return [
        "--method=fast",
        "--config=config/cifar.json",
        "--model=cnn_7layer_bn2",
        f"--model-params=width={setting.width},linear_size={setting.linear_width}",
        f"--batch-size={setting.batch_size}",
        f"--lr={setting.lr}",
        f"--scheduler_opts=start=2,length={setting.warmup_epochs}",
        f"--lr-decay-milestones={','.join(map(str, setting.milestones))}",
        f"--num-epochs={setting.epochs}",
    ]


def launched(
    command: Sequence[str], images: Path, folder: Path, path: Path, device: str
) -> tuple[str, float, int | None]:
    """Run a script by the interpreter that `command` names first, in `folder`, with the stand-ins and a path more."""
    (folder / "data").symlink_to(images)
    (folder / "launcher.py").write_text(LAUNCHER)
    return measured([command[0], "launcher.py", *command[1:]], folder, device, [path])


def authors(repo: Path, python: str) -> Callable[[Setting, int, Path, Path], Measured]:
    def train(setting: Setting, seed: int, images: Path, folder: Path) -> Measured:
        (folder / "stand-ins").mkdir(parents=True)
        (folder / "stand-ins" / "wandb.py").write_text(SILENT_LOGGING)
        (folder / "config").symlink_to(repo.resolve() / "config")
        command = [python, str(repo.resolve() / "train.py"), *authors_options(setting), "--dir=model"]
        command += [f"--eps={EPSILON}", f"--seed={seed}", f"--device={setting.device}"]
        command += [f"--test-interval={setting.epochs}"]
        output, processor_seconds, peak_bytes = launched(command, images, folder, folder / "stand-ins", setting.device)
        *_, tested = re.finditer(r"\bErr=([\d.]+) Rob_Err=([\d.]+)", output.partition("Test without loss fusion")[2])
        return Measured(
            float(tested[1]),
            float(tested[2]),
            by_certtrain(setting, images, folder / "model" / "ckpt_last"),
            [float(number) for number in re.findall(r"Epoch time: ([\d.]+)", output)],
            processor_seconds,
            peak_bytes,
        )

    return train


# --- CTRAIN -----------------------------------------------------------------------------------------------------------

CTRAIN_SCRIPT = """
import torch
from CTRAIN.data_loaders import load_cifar10
from CTRAIN.model_definitions import CNN7_Shi
from CTRAIN.model_wrappers import ShiIBPModelWrapper

train_loader, test_loader = load_cifar10(batch_size={batch_size}, val_split=False)
model = CNN7_Shi(in_shape=[3, 32, 32], width={width}, linear_size={linear_width})
wrapped = ShiIBPModelWrapper(
    model, [3, 32, 32], eps=8 / 255, num_epochs={epochs}, lr={lr}, warm_up_epochs=1, ramp_up_epochs={warmup_epochs},
    lr_decay_kwargs=dict(milestones={milestones}, gamma=0.2), l1_reg_weight=None, device=torch.device("{device}"),
)
wrapped.train_model(train_loader)
"""
# Its evaluation always attacks, by 30 times 100 steps; and auto_LiRPA trains copies of BatchNorm's statistics.
CTRAIN_REPORT = """
from CTRAIN.eval import eval_acc, eval_certified
eps = (wrapped.eps / test_loader.std).reshape(-1, 1, 1)
found = {"natural": eval_acc(wrapped.bounded_model, test_loader)}
found["certified"] = eval_certified(wrapped.bounded_model, test_loader, eps, method="IBP")[0]
copies = [value for name, value in wrapped.state_dict().items() if name.endswith(".buffer")]
with torch.no_grad():
    for (name, own), copy in zip([pair for pair in model.named_buffers() if "running" in pair[0]], copies, strict=True):
        own.copy_(copy)
torch.save(model.state_dict(), "model.pt")
print("FOUND", found, "SECONDS", seconds)
"""
CTRAIN_CLOCK = """
import random, time
import numpy
for part in (random.seed, numpy.random.seed, torch.manual_seed):
    part({seed})
seconds, whole = [], ShiIBPModelWrapper.train_model
def by_epochs(self, loader):
    for epoch in range(self.num_epochs):
        start = time.perf_counter()
        whole(self, loader, start_epoch=epoch, end_epoch=epoch + 1)
        seconds.append(round(time.perf_counter() - start, 4))
ShiIBPModelWrapper.train_model = by_epochs
"""


def ctrain_script(setting: Setting) -> str:
    return CTRAIN_SCRIPT.format(**asdict(setting)).strip()


def ctrain(repo: Path, python: str) -> Callable[[Setting, int, Path, Path], Measured]:
    def train(setting: Setting, seed: int, images: Path, folder: Path) -> Measured:
        folder.mkdir(parents=True)
        head, blank, rest = ctrain_script(setting).partition("\n\n")
        script = head + CTRAIN_CLOCK.format(seed=seed) + blank + rest + CTRAIN_REPORT
        (folder / "script.py").write_text(script)
        command = [python, str(folder / "script.py")]
        output, processor_seconds, peak_bytes = launched(command, images, folder, repo.resolve(), setting.device)
        natural, certified = (
            float(re.search(rf"'{name}': \D*([\d.]+)", output)[1]) for name in ("natural", "certified")
        )
        return Measured(
            round(1 - natural, 4),
            round(1 - certified, 4),
            by_certtrain(setting, images, folder / "model.pt"),
            json.loads(output.rpartition("SECONDS")[2]),
            processor_seconds,
            peak_bytes,
        )

    return train


# --- all --------------------------------------------------------------------------------------------------------------


def programs(options: argparse.Namespace) -> dict[str, Program]:
    found = {
        "authors'": Program(
            authors(options.repo, options.python),
            [
                "git clone https://github.com/shizhouxing/Fast-Certified-Robust-Training",
                "pip install -r Fast-Certified-Robust-Training/requirements.txt",
                "wandb login",
                "cd Fast-Certified-Robust-Training",
            ],
            lambda setting: [" ".join(["python train.py --dir=model", *authors_options(setting)])],
        ),
    }
    if options.ctrain is not None:
        found["CTRAIN"] = Program(
            ctrain(options.ctrain, options.ctrain_python),
            ["pip install CTRAIN", "ctrain-install-git-deps"],
            lambda setting: [*ctrain_script(setting).splitlines(), "python script.py"],
        )
    found["certtrain"] = Program(
        train_certtrain,
        ["pip install ."],  # in a checkout, as it is on no index
        lambda setting: [" ".join(["certtrain train cifar10_8_255", *certtrain_overrides(setting)])],
    )
    return found


def measured(
    command: Sequence[str], folder: Path, device: str, paths: Sequence[Path] = ()
) -> tuple[str, float, int | None]:
    """What a command prints, its processor seconds, and its greatest memory on the device in bytes (`Measured`).

    Args:
        paths: where its Python finds modules, before others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile("w+") as log, tempfile.TemporaryDirectory() as place:
        (Path(place) / "sitecustomize.py").write_text(CUSTOMIZE)
        (told := Path(place) / "card").mkdir()
        found = [place, *map(str, paths), *filter(None, [os.environ.get("PYTHONPATH")])]
        more = {"PYTHONPATH": os.pathsep.join(found), "CARD_BYTES": str(told)}
        more |= {"PYTHONDONTWRITEBYTECODE": "1"} if paths else {}  # nothing is written to a checkout
        process = subprocess.Popen(command, cwd=folder, env=os.environ | more, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        log.seek(0)
        output = log.read()
        of_card = max((int(file.read_text()) for file in told.iterdir()), default=None)
    if code := os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{' '.join(command)} ended with code {code}:\n{output[-1500:]}")
    peak = usage.ru_maxrss * 1024 if device == "cpu" else of_card
    return output, round(usage.ru_utime + usage.ru_stime, 2), peak


def save_images(data: Path, limit: int | None, folder: Path) -> tuple[int, int]:
    """Write the first `limit` training images, and all test images, and say how many."""
    name = {"name": "npz", "path": data} if (data / IMAGES["train"]).exists() else {"name": "cifar10", "root": data}
    dataset = load_dataset(**name)

    def save(split: Split, first: int | None, file: str) -> int:
        images, labels = split.images[:first], split.labels[:first]
        np.savez(folder / file, images=channels_last(images), labels=labels.numpy())
        return len(labels)

    return save(dataset.train, limit, IMAGES["train"]), save(dataset.test, None, IMAGES["test"])


def channels_last(images: Tensor) -> np.ndarray:
    return images.permute(0, 2, 3, 1).contiguous().numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo", type=Path, required=True, help="checkout of the authors' repository")
    parser.add_argument("--data", type=Path, required=True, help="folder of CIFAR-10")
    parser.add_argument("--python", default=sys.executable, help="interpreter that has what their code needs")
    parser.add_argument("--ctrain", type=Path, help="checkout of CTRAIN, to be compared as well")
    parser.add_argument("--ctrain-python", default=sys.executable, help="interpreter that has what CTRAIN needs")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--images", type=int, help="only the first so many training images")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--linear-width", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=160)
    parser.add_argument("--warmup-epochs", type=int, default=80)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.0005)
    parser.add_argument("--milestones", type=int, nargs="*", default=[120, 140])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, help="default: docs/results/beside-authors-DEVICE.json")
    options = parser.parse_args()
    setting = Setting(**{field.name: getattr(options, field.name) for field in fields(Setting)})
    file = options.out or RESULTS / f"beside-authors-{options.device}.json"
    with tempfile.TemporaryDirectory() as name:
        images = Path(name) / "images"
        images.mkdir()
        train, test = save_images(options.data, options.images, images)
        beside = programs(options)
        result: dict[str, Any] = {
            "setting": {**asdict(setting), "images": train, "test_images": test},
            "versions": versions(setting.device),
            "programs": {
                name: {"install": program.install, "written": program.written(setting)}
                for name, program in beside.items()
            },
            "rows": [],
        }
        if file.exists():
            before = json.loads(file.read_text())
            if before["setting"] != json.loads(json.dumps(result["setting"])):
                raise SystemExit(f"{file} holds another setting: {before['setting']}")
            result["rows"] = before["rows"]
        for seed, (program_name, program) in itertools.product(options.seeds, beside.items()):
            row = {"program": program_name, "seed": seed}
            if any(row.items() <= done.items() for done in result["rows"]):
                continue
            row |= asdict(program.train(setting, seed, images, Path(name) / f"{program_name}-{seed}"))
            result["rows"].append(row)
            write_json(file, result)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
