"""SABR and MTL-IBP beside CTRAIN's (ADA-research/CTRAIN): seconds per epoch, and verified error, on the same images.

    git clone https://github.com/ADA-research/CTRAIN CTRAIN
    git clone https://github.com/Verified-Intelligence/auto_LiRPA auto_LiRPA
    python scripts/beside_ctrain.py --ctrain CTRAIN --auto-lirpa auto_LiRPA --data CIFAR      # docs/results/ctrain.json

CIFAR is a folder with train.npz and test.npz. CTRAIN is run as it is, by its own wrappers, in this process, which must
have what it imports; after every epoch of certtrain's comes one of CTRAIN's. Both are given the same first training
images without augmentation, the same architecture, its initialization for IBP, the same schedules of epsilon and of the
learning rate, attacks that keep the worst of their points, and BatchNorm as CTRAIN has it: the attacked images'
statistics, running ones while attacking. The order of images and the random numbers stay different. Both networks are
verified by certtrain. What the file has is not measured again.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import ERRORS, RESULTS
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import certtrain
from certtrain.data import Split, load_dataset, to_float
from certtrain.data.vision import CIFAR10_MEAN, CIFAR10_STD
from certtrain.models import build_model
from certtrain.models.normalize import Normalize
from certtrain.runs.provenance import versions
from certtrain.runtime.files import write_json
from certtrain.verification.attacks import PGD

EPSILON = 8 / 255
WIDTH = {"width": 4, "linear_width": 64, "batch_norm": True}
BATCH, LR, STEPS, STEP_SIZE = 128, 0.002, {"sabr": 4, "mtl-ibp": 1}, {"sabr": 0.5, "mtl-ibp": 10.0}
COEFFICIENT = {"sabr": 0.9, "mtl-ibp": 0.5}  # lambda and alpha, as published for CIFAR-10 at 8/255
VERIFIED = 1_000  # test images


def certtrain_config(method: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    attack = {"steps": STEPS[method], "step_size": STEP_SIZE[method], "statistics": "running", "keep": "worst"}
    own = {"lambda": COEFFICIENT[method], "radius": "epsilon"} if method == "sabr" else {"alpha": COEFFICIENT[method]}
    natural, ramp = options.schedule
    return {
        "seed": seed,
        "data": {"name": "npz", "path": str(options.data), "limit": options.images, "mean": CIFAR10_MEAN,
                 "std": CIFAR10_STD},
        "model": {"name": "cnn7", "options": WIDTH},
        "epsilon": {"max": EPSILON, "start_epoch": 1 + natural, "warmup_epochs": ramp},
        "training": {"method": {"name": method, "attack": attack, **own}, "epochs": options.epochs,
                     "batch_size": BATCH, "batch_norm": {"statistics": "adversarial"}, "checkpoint_seconds": 1e9},
        "optimizer": {"lr": LR, "milestones": options.milestones},
        "verification": {"limit": 1, "pgd_steps": 0},
    }  # fmt: skip


class Alternating(certtrain.Observer):
    """Has `other` do an epoch of its own after each of certtrain's, and clocks both: wall and CPU seconds."""

    def __init__(self, other: Callable[[int], None]) -> None:
        self._other = other
        self.epochs: dict[str, list[tuple[float, float]]] = {"certtrain": [], "CTRAIN": []}
        self._started = clocks()  # the first epoch of certtrain's has in it all that comes before

    def after_epoch(self, trainer: Any, report: Any) -> None:
        self._note("certtrain")
        self._other(len(self.epochs["CTRAIN"]))
        self._note("CTRAIN")

    def _note(self, engine: str) -> None:
        wall, cpu = (now - then for now, then in zip(clocks(), self._started, strict=True))
        self.epochs[engine].append((wall, cpu))
        self._started = clocks()


def clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def loader_of(split: Split, mean: Tensor, std: Tensor) -> Any:
    """With the attributes that CTRAIN's own loaders have."""
    images = (to_float(split.images) - mean[:, None, None]) / std[:, None, None]
    loader: Any = DataLoader(TensorDataset(images, split.labels), batch_size=BATCH, shuffle=True)
    loader.mean, loader.std, loader.normalised = mean, std, True
    loader.min, loader.max = (((end - mean) / std).view(1, -1, 1, 1) for end in (0.0, 1.0))
    return loader


def ctrain_wrapper(method: str, network: nn.Module, options: argparse.Namespace) -> Any:
    wrappers = importlib.import_module("CTRAIN.model_wrappers")
    natural, ramp = options.schedule
    shared: dict[str, Any] = {
        "model": network,
        "input_shape": [3, 32, 32],
        "eps": EPSILON,
        "num_epochs": options.epochs,
        "lr": LR,
        "warm_up_epochs": natural,
        "ramp_up_epochs": ramp,
        "lr_decay_kwargs": {"milestones": options.milestones, "gamma": 0.2},
        "l1_reg_weight": None,
        "pgd_steps": STEPS[method],
        "pgd_alpha": STEP_SIZE[method],
        "pgd_decay_milestones": (),
        "pgd_early_stopping": False,
        "device": torch.device("cpu"),
    }
    if method == "sabr":
        return wrappers.SABRModelWrapper(sabr_subselection_ratio=COEFFICIENT[method], **shared)
    return wrappers.MTLIBPModelWrapper(mtl_ibp_alpha=COEFFICIENT[method], **shared)


@torch.no_grad()
def take_statistics(network: nn.Module, wrapper: Any, images: Tensor) -> None:
    """auto_LiRPA trains the network's own parameters, and copies of BatchNorm's running statistics."""
    copies = (tensor for name, tensor in wrapper.state_dict().items() if name.endswith(".buffer"))
    own = (tensor for name, tensor in network.named_buffers() if "running" in name)
    for tensor, copied in zip(own, copies, strict=True):
        tensor.copy_(copied)
    network.eval(), wrapper.eval()
    torch.testing.assert_close(network(images), wrapper.bounded_model(images))


def one_pair(method: str, seed: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    dataset = load_dataset("npz", path=options.data)
    mean, std = torch.tensor(CIFAR10_MEAN), torch.tensor(CIFAR10_STD)
    torch.manual_seed(seed)
    network = build_model("cnn7", (3, 32, 32), 10, options=WIDTH).train()
    wrapper = ctrain_wrapper(method, network, options)
    loader = loader_of(dataset.train.take(slice(options.images)), mean, std)

    def epoch(number: int) -> None:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            wrapper.train_model(loader, start_epoch=number, end_epoch=number + 1)

    alternating = Alternating(epoch)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        run = certtrain.train(certtrain_config(method, seed, options), Path(folder) / "run", callbacks=[alternating])
    take_statistics(network, wrapper, loader.dataset.tensors[0][:BATCH])
    networks = {"certtrain": run.model, "CTRAIN": nn.Sequential(Normalize(CIFAR10_MEAN, CIFAR10_STD), network)}
    rows = []
    for name, trained in networks.items():
        found = certtrain.verify(trained.eval(), dataset.test, EPSILON, ["ibp", "crown-ibp"], limit=VERIFIED,
                                 attack=PGD(40, 2, 0.25))[0]  # fmt: skip
        rows.append({"method": method, "seed": seed, "engine": name, 
                     "seconds": [wall for wall, _ in alternating.epochs[name]],
                     "cpu_seconds": [cpu for _, cpu in alternating.epochs[name]],
                     **{key: getattr(found, key) for key in ERRORS},
                     "ibp_verified_error": 1 - found.stages[0].proved / VERIFIED})  # fmt: skip
        brief = {key: value for key, value in rows[-1].items() if not key.endswith("seconds")}
        print(brief, f"{statistics.median(rows[-1]['cpu_seconds'][1:]):.2f} CPU seconds an epoch", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ctrain", type=Path, required=True, help="checkout of CTRAIN")
    parser.add_argument("--auto-lirpa", type=Path, help="checkout of auto_LiRPA; default: the installed one")
    parser.add_argument("--data", type=Path, required=True, help="folder with train.npz and test.npz")
    parser.add_argument("--images", type=int, default=2_560)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--schedule", type=int, nargs=2, default=(1, 4), help="natural epochs, and those of the ramp")
    parser.add_argument("--milestones", type=int, nargs="+", default=[7, 9])
    parser.add_argument("--methods", nargs="+", choices=tuple(STEPS), default=list(STEPS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS / "ctrain.json")
    options = parser.parse_args()
    sys.path[:0] = [str(path) for path in (options.auto_lirpa, options.ctrain) if path is not None]
    torch.set_num_threads(1)
    settings = {"images": options.images, "epochs": options.epochs, "schedule": list(options.schedule),
                "milestones": options.milestones, "batch": BATCH, "network": {"name": "cnn7", **WIDTH},
                "verified": VERIFIED, "eps": EPSILON}  # fmt: skip
    rows = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    done = {(row["method"], row["seed"]) for row in rows}
    for seed in options.seeds:
        for method in (name for name in options.methods if (name, seed) not in done):
            rows += one_pair(method, seed, options)
            write_json(options.out, {"versions": versions(), "settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
