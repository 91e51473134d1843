"""What bounds that cover rounding cost, and whether anything was ever seen outside them.

    python scripts/soundness.py --data CIFAR      # docs/results/soundness.json

CIFAR is a folder with train.npz and test.npz. The networks are those of compare_bounds.py, trained on the way.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import RESULTS
from compare_bounds import trained_networks
from points import nearest_inside
from rich.console import Console
from torch import nn

import certtrain
from certtrain.bounds import BoundedModel
from certtrain.bounds.rounding.arithmetic import ARITHMETICS
from certtrain.data import Split, to_float
from certtrain.runs.provenance import versions
from certtrain.runtime.files import write_json
from certtrain.verification.certificates import read_certificates, write_certificates
from certtrain.verification.checker import SavedNetwork, check
from certtrain.verification.folding import fold_batch_norm
from certtrain.verification.pixels import pixel_box
from certtrain.verification.verification import Verification
from certtrain.verification.verify import verify


def price(model: nn.Module, data: Split, eps: float) -> list[dict[str, Any]]:
    """Verified error and seconds: plain bounds in float32 and float64, then those that cover rounding."""
    double = fold_batch_norm(model, to_float(data.images[:1])).double()  # only the arithmetic changes
    rows = []
    for name, result in (
        ("plain, float32", verify(model, data, eps)[0]),
        ("plain, float64", verify_double(double, data, eps)),
        *((f"sound, {name}", verify(model, data, eps, arithmetic=name)[0]) for name in ARITHMETICS),
    ):
        rows.append({"bounds": name, "verified_error": result.verified_error, "seconds": result.seconds})
    return rows


def verify_double(model: nn.Module, data: Split, eps: float) -> Verification:
    """IBP of the network as real mathematics, in float64."""
    started = time.perf_counter()
    net = BoundedModel(model, to_float(data.images[:1]).double())
    found = []
    with torch.no_grad():
        for part in data.parts(256):
            labels = part.labels
            margins = net.margins(pixel_box(part.images, eps), labels)
            prediction = model(to_float(part.images).double()).argmax(1)
            least = margins.scatter(1, labels[:, None], torch.inf).amin(1)
            found.append((prediction, prediction == labels, least))
    prediction, correct, least = (torch.cat(part) for part in zip(*found, strict=True))
    return Verification(
        eps=eps,
        stages=(),
        arithmetic=None,
        prediction=prediction,
        correct=correct,
        attacked=torch.zeros_like(correct),
        adversarial=data.images[:0],
        proved=correct & (least > 0),
        margin=least,
        seconds=time.perf_counter() - started,
    )


def sample(model: nn.Module, data: Split, eps: float, wanted: int) -> dict[str, Any]:
    """Logits of random points of the boxes, half of them corners, as the network and as the folded one compute them."""
    generator = torch.Generator().manual_seed(0)
    example = to_float(data.images[:1])
    net, folded = BoundedModel(model, example), fold_batch_norm(model, example)
    points = outside = 0
    with torch.no_grad():
        for part in data.parts(128):
            labels, box = part.labels, pixel_box(part.images, eps)
            bounds = net.ibp(box, arithmetic="float32")
            margins = net.margins(box, labels, arithmetic="float32")
            for round_ in range(-(-wanted // len(data))):
                share = torch.rand(part.images.shape, generator=generator, dtype=torch.float64)
                share = share.round() if round_ % 2 else share
                point = nearest_inside(box.lower + share * (box.upper - box.lower), box.lower, box.upper)
                points += len(labels)
                for deployed in (model, folded):
                    logits = deployed(point).double()
                    in_box = bounds.output.contains(logits).all(1)
                    above = (logits.gather(1, labels[:, None]) - logits >= margins).all(1)
                    outside += int((~(in_box & above)).sum())
    return {"points": points, "outside": outside}


def agreement(folder: Path, model: nn.Module, data: Split, eps: float) -> dict[str, Any]:
    """The independent checker on the verifier's certificates: one that does not hold ends the program."""
    results = verify(model, data, eps, arithmetic="float32")
    network, images, labels = SavedNetwork.read(folder / "model.safetensors"), data.images.numpy(), data.labels.numpy()
    config = {"data": {"name": "npz"}, "verification": {"eps": [eps]}}
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "certificates.parquet"
        write_certificates(file, results, data, folder / "model.safetensors", config, versions())
        started = time.perf_counter()
        check(read_certificates(file), network, "npz", images, labels, Console(quiet=True))
        seconds = (time.perf_counter() - started) / len(data)
    return {"checked": len(data), "disagreements": 0, "checker_seconds_per_image": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.npz and test.npz")
    parser.add_argument("--runs", type=Path, default=Path("runs/compare"))
    parser.add_argument("--images", type=int, default=10_000, help="of each test set, at the most")
    parser.add_argument("--checked", type=int, default=500, help="of each test set, by the checker")
    parser.add_argument("--points", type=int, default=350_000, help="of each network")
    options = parser.parse_args()
    found = []
    for name, folder, split, eps, _ in trained_networks(options.data, options.runs):
        model, data = certtrain.load_model(folder), split.take(slice(options.images))
        few = data.take(slice(options.checked))
        row = {"network": name, "eps": eps, "images": len(data), "rows": price(model, data, eps)}
        row |= sample(model, few, eps, options.points) | agreement(folder, model, few, eps)
        found.append(row)
        print(row, flush=True)
        write_json(RESULTS / "soundness.json", {"versions": versions(), "networks": found})


if __name__ == "__main__":
    main()
