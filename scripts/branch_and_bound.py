"""Images settled against seconds, beside alpha-beta-CROWN on the same images with the same time limits.

    python scripts/branch_and_bound.py --data CIFAR --abcrown DIR      # docs/results/branch_and_bound.json
    python scripts/branch_and_bound.py --networks digits --images 5    # a rehearsal, without the other verifier

CIFAR is a folder with train.npz and test.npz, DIR a checkout of alpha-beta-CROWN whose Python is DIR/venv/bin/python
(or --abcrown-python). Images are the first that are classified right and that IBP does not prove. Both verifiers get
them one by one, on the CPU, with as many threads, and take turns after every few; the seconds of alpha-beta-CROWN are
its own, without its start. The networks are trained on the way (runs/compare) and kept. Every row is written as soon as
it is known, and not measured again.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import RESULTS
from compare_bounds import trained_networks
from torch import Tensor, nn

import certtrain
from certtrain.data import Split, to_float
from certtrain.export.onnx import export_onnx
from certtrain.export.vnnlib import outer_box, vnnlib_property
from certtrain.runs.provenance import versions
from certtrain.runtime.files import write_json, write_text
from certtrain.verification.attacks import PGD
from certtrain.verification.branch_and_bound import Search
from certtrain.verification.verify import verify

METHODS = ("ibp", "crown-ibp", "alpha-crown", "branch-and-bound")
IN_TURN = 8  # images after which the verifiers change over, so that a machine that changes speed does so for both
VERDICTS = {"safe": "proved", "unsafe": "attacked"}  # how alpha-beta-CROWN's begin; all others are undecided
CONFIG = """
general: {{device: cpu, root_path: {folder}, csv_name: instances.csv, results_file: {folder}/out.txt,
          conv_mode: {convolutions}}}
model: {{input_shape: {shape}}}
solver: {{batch_size: {domains}}}
bab: {{override_timeout: {timeout}}}
"""

# onnx2pytorch of PyPI lacks an argument of the fork that alpha-beta-CROWN names; these networks do not need it.
START = """
import inspect, runpy, sys
import onnx2pytorch
sys.path.insert(0, "")
convert = onnx2pytorch.ConvertModel
if "quirks" not in inspect.signature(convert.__init__).parameters:
    onnx2pytorch.ConvertModel = lambda model, quirks=None, **known: convert(model, **known)
sys.argv[0] = "abcrown.py"
runpy.run_path("abcrown.py", run_name="__main__")
"""


def left_by_ibp(model: nn.Module, data: Split, eps: float, count: int) -> list[int]:
    (result,) = verify(model, data, eps)
    return result.unknown.nonzero()[:count, 0].tolist()


def verify_by_certtrain(model: nn.Module, image: Split, eps: float, timeout: float) -> dict[str, Any]:
    (result,) = verify(model, image, eps, METHODS, attack=PGD(), search=Search(timeout=timeout))
    return {"verdict": result.verdicts[0], "seconds": result.seconds, "domains": result.domains}


def verify_by_alpha_beta_crown(
    model: nn.Module, images: Mapping[int, tuple[Tensor, int]], eps: float, classes: int, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """alpha-beta-CROWN's verdicts and seconds, of images by position in the order given.

    An image at which it crashes is asked again with convolutions as matrices, which it says is the way out.
    """
    shape = next(iter(images.values()))[0].shape
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export_onnx(model, tuple(shape), folder / "model.onnx")
        for index, (image, label) in images.items():
            write_text(folder / f"{index}.vnnlib", vnnlib_property(*outer_box(image, eps), label, classes))
        while missing := list(images)[len(found) :]:
            answers = run_alpha_beta_crown(folder, missing, shape, "patches", options)
            found += [answer for answer in answers if "crash" not in answer]
            if "crash" in answers[-1]:
                (again,) = run_alpha_beta_crown(folder, missing[len(answers) - 1 :][:1], shape, "matrix", options)
                found.append(answers[-1] | again)
    return found


def run_alpha_beta_crown(
    folder: Path, images: Sequence[int], shape: Sequence[int], convolutions: str, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """What it answers about these images, up to one at which it crashes, whose answer says how."""
    instances = [f"model.onnx,{index}.vnnlib,{options.timeout:g}\n" for index in images]
    write_text(folder / "instances.csv", "".join(instances))
    settings = {"folder": folder, "shape": [-1, *shape], "domains": 64, "timeout": options.timeout}
    write_text(folder / "config.yaml", CONFIG.format(**settings, convolutions=convolutions))
    python = options.abcrown_python or options.abcrown / "venv" / "bin" / "python"
    command = [str(python), "-c", START, "--config", str(folder / "config.yaml")]
    ended = subprocess.run(command, cwd=options.abcrown / "complete_verifier", capture_output=True, text=True)
    answers: list[dict[str, Any]] = [
        {"verdict": VERDICTS.get(said.split("-")[0], "undecided"), "said": said, "seconds": float(seconds)}
        for said, seconds in re.findall(r"^Result: (.+) in ([0-9.]+) seconds", ended.stdout, flags=re.MULTILINE)
    ]
    if len(answers) < len(images):
        error = (ended.stderr.strip().splitlines() or ["no message"])[-1]
        if "Error" not in error:
            raise SystemExit(f"alpha-beta-CROWN answered {len(answers)} of {len(images)} images:\n{ended.stderr}")
        answers.append({"verdict": "undecided", "crash": f"{convolutions}: {error}", "seconds": options.timeout})
    return answers


def table(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each network: images settled by each verifier, contradictions, and medians of seconds, of the same images."""
    found = []
    for network in dict.fromkeys(row["network"] for row in rows):
        own = [row for row in rows if row["network"] == network]
        both = [row for row in own if "alpha-beta-CROWN" in row]
        line = {"network": network, "eps": own[0]["eps"], "images": len(own), "settled": settled(own, "certtrain")}
        line["seconds"] = statistics.median(row["certtrain"]["seconds"] for row in own)
        if both:
            pairs = [(row["certtrain"], row["alpha-beta-CROWN"]) for row in both]
            line["settled_alpha_beta_crown"] = settled(both, "alpha-beta-CROWN")
            line["seconds_alpha_beta_crown"] = statistics.median(other["seconds"] for _, other in pairs)
            line["median_ratio"] = statistics.median(own["seconds"] / other["seconds"] for own, other in pairs)
            line["contradictions"] = sum({a["verdict"], b["verdict"]} == {"proved", "attacked"} for a, b in pairs)
        found.append(line)
    return found


def settled(rows: Sequence[dict[str, Any]], verifier: str) -> int:
    return sum(row[verifier]["verdict"] in ("proved", "attacked") for row in rows)


def measure(options: argparse.Namespace) -> None:
    file: Path = options.out
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    for name, folder, split, eps, _ in trained_networks(options.data, options.runs, options.networks):
        model = certtrain.load_model(folder)
        indices = left_by_ibp(model, split.take(slice(options.among)), eps, options.images)
        known = {row["image"] for row in rows if row["network"] == name}
        missing = [index for index in indices if index not in known]
        if not missing:
            continue
        classes = int(split.labels.max()) + 1
        for start in range(0, len(missing), IN_TURN):
            part = missing[start : start + IN_TURN]
            images = {index: (to_float(split.images[index]), int(split.labels[index])) for index in part}
            others = verify_by_alpha_beta_crown(model, images, eps, classes, options) if options.abcrown else []
            for position, index in enumerate(part):
                row = {"network": name, "eps": eps, "image": index, "timeout": options.timeout}
                row["certtrain"] = verify_by_certtrain(model, split.take(slice(index, index + 1)), eps, options.timeout)
                if others:
                    row["alpha-beta-CROWN"] = others[position]
                rows.append(row)
                print(json.dumps(row), flush=True)
                found = {"table": table(rows), "rows": rows}
                write_json(file, {"versions": versions(), "threads": torch.get_num_threads()} | found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with CIFAR-10's train.npz and test.npz")
    parser.add_argument("--runs", type=Path, default=Path("runs/compare"))
    parser.add_argument("--networks", nargs="+", choices=("digits", "cifar10-2", "cifar10-8"))
    parser.add_argument("--images", type=int, default=100, help="of each network")
    parser.add_argument("--among", type=int, default=2000, help="of so many first test images")
    parser.add_argument("--timeout", type=float, default=30, help="seconds for each image")
    parser.add_argument("--abcrown", type=Path, help="a checkout of alpha-beta-CROWN")
    parser.add_argument("--abcrown-python", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS / "branch_and_bound.json")
    options = parser.parse_args()
    options.networks = options.networks or ["digits", "cifar10-2", "cifar10-8"]
    if options.data is None and options.networks != ["digits"]:
        parser.error("--data is needed for networks of CIFAR-10")
    measure(options)


if __name__ == "__main__":
    main()
