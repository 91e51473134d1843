"""Random networks, and random misuses of them, against every bound: for hours, and again from where it stopped.

    python scripts/fuzz.py --networks 20000 --out fuzz.json    # goes on where fuzz.json ends
    python scripts/fuzz.py --reproduce fuzz-findings/17.json   # one finding

Witness is the module itself, called on points of a box: drawn, corners and attacked ones; images together, in another
order and alone. Plain bounds must hold what it computes in float64, but for 1e-9; bounds that cover rounding must hold
what it computes in float32 (as it is, with BatchNorm folded, channels last), float64 and bfloat16, without tolerance.
What a network may do is be refused. A finding is shrunk by leaving layers out, and written to a file.
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fuzz_networks import CLASSES, IMAGE, Recipe
from points import nearest_inside
from torch import Tensor, nn

from certtrain.bound_methods import METHODS
from certtrain.bounds import BoundedModel, Box, linf_box
from certtrain.bounds.linear import AlphaOptions
from certtrain.bounds.rounding.boxes import enclosing_linf_box
from certtrain.errors import UnsupportedOperation, UsageError
from certtrain.runs.provenance import versions
from certtrain.runtime.files import write_json
from certtrain.verification.folding import fold_batch_norm

IMAGES = 3
RELATIVE = 1e-9  # of the logits
INNER = 1e-13  # of the largest number on the way, which float64 rounds
SAVED_EVERY = 50


class Finding(Exception):
    """Something that must not be; `check` names what was asked."""

    def __init__(self, check: str, detail: str) -> None:
        super().__init__(f"{check}: {detail}")
        self.check, self.detail = check, detail


@dataclass
class Counts:
    """What was asked so far; `skipped` are networks that PyTorch itself cannot run."""

    networks: int = 0
    refused: int = 0
    skipped: int = 0
    points: int = 0
    checks: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Question:
    """A box, in float32 numbers, and labels."""

    lower: Tensor
    upper: Tensor
    labels: Tensor
    generator: torch.Generator

    @classmethod
    def drawn(cls, seed: int) -> Question:
        generator = torch.Generator().manual_seed(seed)
        radius = [0.0, 1e-6, 1e-2, 0.3][seed % 4]
        x = torch.rand(IMAGES, *IMAGE, generator=generator)
        lower, upper = (x - radius * torch.rand(x.shape, generator=generator)), (x + radius)
        return cls(lower, upper, torch.randint(0, CLASSES, (IMAGES,), generator=generator), generator)

    def box(self, dtype: torch.dtype) -> Box:
        return Box(self.lower.to(dtype), self.upper.to(dtype))

    def points(self, model: nn.Module) -> list[Tensor]:
        """In float32."""
        found = [self.lower, self.upper]
        for number in range(8):
            share = torch.rand(self.lower.shape, generator=self.generator, dtype=torch.float64)
            share = share.round() if number % 2 else share
            found.append(self._inside(self.lower.double() + share * (self.upper.double() - self.lower.double())))
        for sign in (1, -1):
            with suppress(RuntimeError):  # autograd may need a value that the module overwrites
                found.append(self._attacked(model, sign))
        return found

    def _attacked(self, model: nn.Module, sign: int) -> Tensor:
        x = self._inside((self.lower.double() + self.upper.double()) / 2)
        width = self.upper - self.lower
        for step in (0.5, 0.5, 0.2):
            x = x.detach().requires_grad_()
            with torch.enable_grad():
                logits = model(x.clone())
                own = logits.gather(1, self.labels[:, None])
                others = logits.scatter(1, self.labels[:, None], -torch.inf).amax(1, keepdim=True)
                (gradient,) = torch.autograd.grad(sign * (own - others).sum(), x)
            x = self._inside((x.detach() - step * width * gradient.sign()).double())
        return x

    def _inside(self, point: Tensor) -> Tensor:
        return nearest_inside(point, self.lower, self.upper)


@torch.no_grad()
def evaluations(model: nn.Module, points: Sequence[Tensor]) -> Iterator[Tensor]:
    """Logits of each batch of points; in another order too, and of one image alone."""
    for number, point in enumerate(points):
        yield model(point.clone())
        if number % 3 == 0:
            with suppress(RuntimeError, IndexError, ValueError):  # a module for one batch size
                yield model(point.flip(0)).flip(0)
                yield torch.cat([model(point[i : i + 1].clone()) for i in range(len(point))])


def require_inside(check: str, box: Box, margins: Tensor | None, labels: Tensor, logits: Tensor, slack: float) -> None:
    """
    Raises:
        Finding: a logit outside its box, or a difference of logits below its margin, by more than `slack`.
    """
    if not logits.isfinite().all():
        return  # PyTorch itself overflows; infinite boxes are asked about elsewhere
    outside = torch.maximum(box.lower - logits, logits - box.upper)
    if not (outside <= slack).all():
        raise Finding(check, f"logits {outside.amax().item():.3g} outside their box (allowed: {slack:.3g})")
    if margins is None:
        return
    below = margins - (logits.gather(1, labels[:, None]) - logits)
    if not (below <= slack).all():
        raise Finding(check, f"a difference of logits {below.amax().item():.3g} below its margin")


def _whole_if_softmax(output: Box, net: BoundedModel) -> Box:
    """All reals where the network ends with a softmax, of whose input the bounds are."""
    if net.graph.final_softmax is None:
        return output
    return Box.around(output.center, torch.full_like(output.center, torch.inf))


class Examination:
    """One network, all questions."""

    def __init__(self, recipe: Recipe, counts: Counts) -> None:
        self.recipe, self.counts = recipe, counts
        self.question = Question.drawn(recipe.seed)

    def run(self) -> None:
        """
        Raises:
            Finding: whatever must not be.
        """
        model = self.recipe.network()
        box = self.question.box(torch.float32)
        try:
            with torch.no_grad():
                logits = deepcopy(model)(self.question.upper.clone())
        except Exception:  # not ours
            self.counts.skipped += 1
            return
        if logits.shape != (IMAGES, CLASSES):
            self.counts.skipped += 1
            return
        net = self._asked("recording", lambda: BoundedModel(model, box.center))
        if net is None:
            self.counts.refused += 1
            return
        points = self.question.points(deepcopy(model))
        self.counts.points += len(points) * IMAGES
        self._plain(model, points)
        self._sound(net, points)
        self._trained(model)

    def _asked(self, check: str, ask: Callable[[], Any]) -> Any:
        """None where it is refused."""
        self.counts.checks[check] += 1
        try:
            return ask()
        except (UnsupportedOperation, UsageError):
            self.counts.refusals[check] += 1
            return None
        except Exception as error:
            raise Finding(check, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error

    @torch.no_grad()
    def _plain(self, model: nn.Module, points: Sequence[Tensor]) -> None:
        double, labels = deepcopy(model).double(), self.question.labels
        try:
            expected = list(evaluations(deepcopy(double), [point.double() for point in points]))
        except RuntimeError:  # constants of one type
            return
        box = self.question.box(torch.float64)
        net = self._asked("recording, float64", lambda: BoundedModel(double, box.center))
        if net is None:
            return
        bounds = self._asked("ibp", lambda: net.ibp(box, record=True))
        if bounds is None:
            return
        inner = max(float(torch.maximum(b.lower.abs(), b.upper.abs()).max()) for b in bounds.record.boxes.values())
        slack = INNER * inner + RELATIVE * max(float(logits.abs().max()) for logits in expected)
        found = {"ibp": net.margins(box, labels)}
        for method, intersect in [*((method, False) for method in METHODS[1:]), ("crown", True)]:
            ask = partial(net.margins, box, labels, method, intersect=intersect, alpha=AlphaOptions(steps=2))
            found[f"{method}, {intersect=}"] = self._asked(method, ask)
        for name, margins in found.items():
            if margins is None:
                continue
            if margins.isnan().any():
                raise Finding(name, "a margin is not a number")
            for logits in expected:
                require_inside(name, _whole_if_softmax(bounds.output, net), margins, labels, logits, slack)
        self._changed(net)

    def _sound(self, net: BoundedModel, points: Sequence[Tensor]) -> None:
        labels, model = self.question.labels, net.model
        box = enclosing_linf_box(self.question.box(torch.float64).center, 0.0, clip=None)
        box = type(box)(self.question.lower.double(), self.question.upper.double())
        for arithmetic, deployed in self._deployed(model):
            bounds = self._asked(f"sound, {arithmetic}", lambda a=arithmetic: net.ibp(box, arithmetic=a))
            if bounds is None:
                continue
            margins = net.margins(box, labels, arithmetic=arithmetic)
            if margins.isnan().any() or bounds.output.lower.isnan().any() or bounds.output.upper.isnan().any():
                raise Finding(f"sound, {arithmetic}", "a bound is not a number")
            for form, network, dtype in deployed:
                inputs = [point.to(dtype) for point in points] if dtype != torch.bfloat16 else self._in_bfloat16()
                for logits in evaluations(network, inputs):
                    require_inside(f"sound, {arithmetic}, {form}", bounds.output, margins, labels, logits.double(), 0.0)

    def _in_bfloat16(self) -> list[Tensor]:
        """Points of the box, rounded: what the arithmetic does to them first."""
        return [self.question.lower.bfloat16(), self.question.upper.bfloat16()]

    def _deployed(self, model: nn.Module) -> Iterator[tuple[str, list[tuple[str, nn.Module, torch.dtype]]]]:
        forms = [("as it is", deepcopy(model), torch.float32)]
        with suppress(UnsupportedOperation):
            forms.append(("folded", fold_batch_norm(model, self.question.upper), torch.float32))
        forms.append(("channels last", _ChannelsLast(deepcopy(model)), torch.float32))
        yield "float32", forms
        yield "tf32", forms[:1]
        if runs_in(torch.float64, model, self.question.upper):
            yield "float64", [("as it is", deepcopy(model).double(), torch.float64)]
        has_norm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
        honest = all(kind in ("image", "features", "end", "flatten") for kind, *_ in self.recipe.layers)
        if not has_norm and honest and runs_in(torch.bfloat16, model, self.question.upper):
            yield "bf16", [("as it is", deepcopy(model).bfloat16(), torch.bfloat16)]

    def _trained(self, model: nn.Module) -> None:
        """In training mode, the box a point: the module's own output."""
        if any(isinstance(module, nn.modules.dropout._DropoutNd) for module in model.modules()):
            return
        double = deepcopy(model).double().train()
        x = self.question.upper.double()
        try:
            expected = deepcopy(double)(x.clone())
        except Exception:
            return
        net = self._asked("recording, training", lambda: BoundedModel(double, x))
        bounds = net and self._asked("training", lambda: net.ibp(linf_box(x, 0.0, clip=None), clean=x, record=True))
        if bounds is not None and net.graph.final_softmax is None:
            inner = max(float(b.center.abs().max()) for b in bounds.record.boxes.values())
            slack = INNER * inner + RELATIVE * float(expected.abs().max())
            slack = max(slack, 1e-6 * float(expected.abs().max()))  # variances of two values may cancel
            require_inside("training", bounds.output, None, self.question.labels, expected.detach(), slack)

    @torch.no_grad()
    def _changed(self, net: BoundedModel) -> None:
        """Parameters and buffers move after the recording; so must the bounds."""
        double, x = net.model, self.question.upper.double()
        generator = torch.Generator().manual_seed(self.recipe.seed)
        for tensor in [*double.parameters(), *double.buffers()]:
            if tensor.is_floating_point():
                tensor.mul_(1 + 0.5 * torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype))
        expected = deepcopy(double)(x.clone())
        bounds = self._asked("after a change", lambda: net.ibp(linf_box(x, 0.0, clip=None), record=True))
        if bounds is not None and net.graph.final_softmax is None:
            inner = max(float(b.center.abs().max()) for b in bounds.record.boxes.values())
            slack = INNER * inner + RELATIVE * float(expected.abs().max())
            require_inside("after a change", bounds.output, None, self.question.labels, expected, slack)


class _ChannelsLast(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.to(memory_format=torch.channels_last) if _is_flat(model) else model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.to(memory_format=torch.channels_last))


def _is_flat(model: nn.Module) -> bool:
    return all(parameter.dim() != 5 for parameter in model.parameters())


@torch.no_grad()
def runs_in(dtype: torch.dtype, model: nn.Module, x: Tensor) -> bool:
    try:
        return deepcopy(model).to(dtype)(x.to(dtype, copy=True)).dtype == dtype
    except Exception:
        return False


def examined(recipe: Recipe, counts: Counts) -> Finding | None:
    counts.networks += 1
    try:
        Examination(recipe, counts).run()
    except Finding as finding:
        return finding
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return Finding(
            "error", f"{type(error).__name__}: {str(error)[:200]} ({Path(place.filename).name}, {place.name})"
        )
    return None


def shrunk(recipe: Recipe, finding: Finding) -> tuple[Recipe, Finding]:
    """The smallest recipe, found greedily, with a finding of the same check."""
    for smaller in recipe.simpler():
        other = examined(smaller, Counts())
        if other is not None and other.check.split(",")[0] == finding.check.split(",")[0]:
            return shrunk(smaller, other)
    return recipe, finding


def read_recipe(file: Path) -> Recipe:
    content = json.loads(file.read_text())["recipe"]
    return Recipe(**{**content, "layers": tuple(tuple(layer) for layer in content["layers"])})


def fuzz(first: int, networks: int, counts: Counts, found: Callable[[Recipe, Finding], None]) -> Iterator[int]:
    """Examine the networks of these seeds; yields each that is done."""
    for seed in range(first, first + networks):
        recipe = Recipe.drawn(seed)
        finding = examined(recipe, counts)
        if finding is not None:
            found(*shrunk(recipe, finding))
        yield seed


class Results:
    """The file of what was found so far, from which the next run goes on."""

    def __init__(self, file: Path) -> None:
        self.file, self.folder = file, file.with_name(f"{file.stem}-findings")
        file.parent.mkdir(parents=True, exist_ok=True)
        self.counts, self.next, self.seconds = Counts(), 0, 0.0
        self.findings: list[dict[str, Any]] = []
        if file.exists():
            before = json.loads(file.read_text())
            totals = {name: before[name] for name in ("networks", "refused", "skipped", "points")}
            self.counts = Counts(**totals, checks=Counter(before["checks"]), refusals=Counter(before["refusals"]))
            self.next, self.seconds, self.findings = before["next_seed"], before["seconds"], before["findings"]

    def add(self, recipe: Recipe, finding: Finding) -> None:
        row = {"check": finding.check, "detail": finding.detail, "recipe": asdict(recipe)}
        self.folder.mkdir(exist_ok=True)
        write_json(self.folder / f"{recipe.seed}.json", row)
        self.findings.append(row)
        print(f"{recipe.seed}: {finding}  {recipe.layers}", flush=True)

    def save(self) -> None:
        counts = vars(self.counts)
        row = {**counts, "findings": self.findings, "next_seed": self.next, "seconds": round(self.seconds, 1)}
        write_json(self.file, {"versions": versions(), "first_seed": 0, **row})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=20_000, help="in all, those of earlier runs included")
    parser.add_argument("--out", type=Path, default=Path("docs/results/fuzz.json"))
    parser.add_argument("--reproduce", type=Path, help="examine the network of this file alone")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.reproduce:
        recipe = read_recipe(options.reproduce)
        print(recipe, recipe.network(), examined(recipe, Counts()) or "nothing found", sep="\n")
        return 0
    results = Results(options.out)
    started = time.perf_counter() - results.seconds
    for seed in fuzz(results.next, options.networks - results.next, results.counts, results.add):
        results.next, results.seconds = seed + 1, time.perf_counter() - started
        if results.next % SAVED_EVERY == 0 or results.next == options.networks:
            results.save()
    print(f"{results.counts.networks} networks, {len(results.findings)} findings")
    return 1 if results.findings else 0


if __name__ == "__main__":
    raise SystemExit(main())
