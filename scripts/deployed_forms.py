"""The float32 theorem against the forms in which networks are deployed.

    python scripts/deployed_forms.py      # docs/results/deployed_forms.json

Logits of the same points by the module as it is, image by image, channels last, with BatchNorm folded, compiled, and by
onnxruntime: each must lie in the sound box and no difference below its sound margin. A third of the boxes are points,
so that nothing but rounding is in them.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from common import RESULTS
from torch import Tensor, nn

from certtrain.bounds import BoundedModel
from certtrain.bounds.rounding.boxes import enclosing_linf_box, nearest_above, nearest_below
from certtrain.export.onnx import export_onnx
from certtrain.models import build_model
from certtrain.runs.provenance import versions
from certtrain.runtime.files import write_json
from certtrain.runtime.precision import full_precision
from certtrain.verification.folding import fold_batch_norm

IMAGE, CLASSES = (3, 16, 16), 5
RADII = (0.0, 1e-4, 2 / 255)
IMAGES, POINTS = 128, 4  # a round's images, and points of each image's box

NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "mlp": ("mlp", {"widths": [64, 32]}),
    "cnn-small": ("cnn-small", {"width": 4, "linear_width": 32}),
    "cnn7": ("cnn7", {"width": 4, "linear_width": 32}),
    "cnn7 without BatchNorm": ("cnn7", {"width": 4, "linear_width": 32, "batch_norm": False}),
    "wide-resnet": ("wide-resnet", {"base_width": 2, "widen_factor": 2, "linear_width": 16}),
    "resnext": ("resnext", {"stem_width": 3, "bottleneck_width": 2, "blocks": 1, "linear_width": 16}),
}

Form = Callable[[Tensor], Tensor]


def network(name: str, seed: int) -> nn.Module:
    """Random weights; BatchNorm's statistics are those of random images, its parameters random."""
    torch.manual_seed(seed)
    architecture, options = NETWORKS[name]
    model = build_model(architecture, IMAGE, CLASSES, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25), options=options)
    model.train()
    for _ in range(30):
        model(torch.rand(64, *IMAGE))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.weight.uniform_(-1.0, 1.5)
                module.bias.uniform_(-0.5, 0.5)
    return model.eval()


def _channels_last(model: nn.Module, x: Tensor) -> Tensor:
    return model(x.to(memory_format=torch.channels_last))


def _single(model: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([model(one[None]) for one in x])


def _as_onnx(model: nn.Module) -> Form:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        export_onnx(model, IMAGE, file)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"image": x.contiguous().numpy()})[0])


FORMS: dict[str, Callable[[nn.Module], Form]] = {
    "eager": lambda model: model,
    "eager, one image at a time": lambda model: partial(_single, model),
    "eager, channels last": lambda model: partial(_channels_last, model),
    "folded": lambda model: fold_batch_norm(model, torch.rand(1, *IMAGE)),
    "folded, channels last": lambda model: partial(_channels_last, fold_batch_norm(model, torch.rand(1, *IMAGE))),
    "compiled": lambda model: torch.compile(model),
    "onnxruntime": _as_onnx,
}


@dataclass
class Counts:
    """Logits by form; how many left their box, or lie closer to the label's than the margin says.

    largest_share: of the way from the exact logit to the end of its sound box that a form goes, where the box of the
        input is a point.
    """

    logits: Counter[str] = field(default_factory=Counter)
    outside: int = 0
    below: int = 0
    largest_share: float = 0.0


def boxes(rounds: int, seed: int) -> Iterator[tuple[float, Tensor, Tensor]]:
    """Radius, images and labels of each round."""
    generator = torch.Generator().manual_seed(seed)
    for number in range(rounds):
        images = torch.randint(0, 256, (IMAGES, *IMAGE), generator=generator) / 255
        yield RADII[number % len(RADII)], images, torch.randint(0, CLASSES, (IMAGES,), generator=generator)


@torch.no_grad()
def examine(name: str, rounds: int, seed: int, forms: dict[str, Callable[[nn.Module], Form]]) -> Counts:
    """The network's logits in each form against its bounds."""
    model, counts = network(name, seed), Counts()
    net, double = BoundedModel(model, torch.rand(1, *IMAGE)), deepcopy(model).double()
    deployed = {form: make(model) for form, make in forms.items()}
    generator = torch.Generator().manual_seed(seed + 1)
    for radius, images, labels in boxes(rounds, seed):
        box = enclosing_linf_box(images, radius)
        exact = double(images.double())
        output, margins = net.ibp(box, arithmetic="float32").output, net.margins(box, labels, arithmetic="float32")
        lower, upper = nearest_above(box.lower, images.dtype), nearest_below(box.upper, images.dtype)
        shares = torch.rand(POINTS, *images.shape, generator=generator)
        shares[1::2] = shares[1::2].round()
        points = (lower + shares * (upper - lower)).clamp(lower, upper) if radius else images.expand_as(shares)
        for form, compute in deployed.items():
            logits = compute(points.flatten(0, 1)).double().unflatten(0, (POINTS, IMAGES))
            counts.logits[form] += logits.numel()
            counts.outside += int((~output.contains(logits)).sum())
            own = labels.expand(POINTS, -1)[..., None]
            counts.below += int((~(logits.gather(2, own) - logits >= margins)).sum())
            if radius == 0:
                room = torch.where(logits > exact, output.upper - exact, exact - output.lower)
                counts.largest_share = max(counts.largest_share, ((logits - exact).abs() / room).max().item())
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="of each network")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "deployed_forms.json")
    options = parser.parse_args()
    rows = []
    with full_precision():
        for name in NETWORKS:
            counts = examine(name, options.rounds, options.seed, FORMS)
            rows.append({"network": name, **vars(counts)})
            print(rows[-1], flush=True)
    totals = {
        "logits": sum(sum(row["logits"].values()) for row in rows),
        "outside": sum(row["outside"] for row in rows),
        "below": sum(row["below"] for row in rows),
    }
    software = {**versions(), "onnxruntime": onnxruntime.__version__}
    settings = {"seed": options.seed, "rounds": options.rounds, "radii": RADII, "arithmetic": "float32"}
    write_json(options.out, {"versions": software, **settings, **totals, "networks": rows})
    print(totals)
    return 1 if totals["outside"] or totals["below"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
