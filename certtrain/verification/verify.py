"""How many images are classified right, withstand an attack, and are proved."""

from __future__ import annotations

import glob
import math
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from certtrain.bounds.rounding.arithmetic import arithmetic_named
from certtrain.data import Split, to_float
from certtrain.data.dataset import require_split
from certtrain.errors import DataError, UsageError, require_counts
from certtrain.modules import device_of, evaluating
from certtrain.runtime.distributed import ALONE, Ranks
from certtrain.runtime.precision import full_precision
from certtrain.verification.answers import Answers, Portion, Question, in_parts
from certtrain.verification.attacks import Attack
from certtrain.verification.branch_and_bound import Search
from certtrain.verification.cascade import check_cascade
from certtrain.verification.results import ImageResult, ResultFile
from certtrain.verification.verdicts import GAVE_UP, Verdict
from certtrain.verification.workers import in_processes

DEFAULT_SEARCH = Search()


@dataclass
class Stage:
    """One method of a cascade: how many images it was asked about, how many of them it proved, and its price."""

    method: str
    images: int = 0
    proved: int = 0
    seconds: float = 0.0  # of all processes together

    @classmethod
    def of(cls, methods: Sequence[str], results: Sequence[ImageResult]) -> tuple[Stage, ...]:
        stages = tuple(cls(method) for method in methods)
        for result in results:
            for stage, seconds in zip(stages, result.seconds, strict=False):
                stage.images += 1
                stage.seconds += seconds
            stages[len(result.seconds) - 1].proved += result.verdict == Verdict.PROVED
        return stages


@dataclass(frozen=True, eq=False)
class Verification:
    """What was found at one epsilon; per-image tensors (N,) on the CPU, in the order of the split.

    Attributes:
        eps: the radius.
        stages: the methods of the cascade, in order.
        arithmetic: that of the deployed network for which the bounds hold, None for real mathematics.
        prediction: the class of the unperturbed image, -1 where its logits are not all numbers.
        correct: the prediction is the label.
        attacked: right, but a misclassified point was found, by an attack or by branch and bound.
        adversarial: those points (M, C, H, W), in order.
        proved: no perturbation of at most eps in any pixel changes the prediction, which is right.
        margin: smallest lower bound of z_y - z_j, j ≠ y.
        seconds: the attack included; of this call, and of the earlier ones that `results` go on from.
        attack: the names of those that were made, None where none was.
        trees: by position, what proves an image by branch and bound (`Trees`), where that was kept.
        undecided: by position, why branch and bound has given up an image.
        domains: how many it has bounded.
    """

    eps: float
    stages: tuple[Stage, ...]
    arithmetic: str | None
    prediction: Tensor
    correct: Tensor
    attacked: Tensor
    adversarial: Tensor
    proved: Tensor
    margin: Tensor
    seconds: float
    trees: Mapping[int, bytes] = field(default_factory=dict)
    attack: str | None = None
    undecided: Mapping[int, str] = field(default_factory=dict)
    domains: int = 0

    @property
    def method(self) -> str:
        """The methods of the cascade, with commas between them."""
        return ",".join(stage.method for stage in self.stages)

    @property
    def unknown(self) -> Tensor:
        """(N,) bool: classified right, neither proved nor attacked."""
        return self.correct & ~self.proved & ~self.attacked

    @property
    def flags_by_verdict(self) -> dict[Verdict, Tensor]:
        """(N,) bool of each verdict; every image has one, and those that were given up are unknown here."""
        return {
            Verdict.PROVED: self.proved,
            Verdict.UNKNOWN: self.unknown,
            Verdict.ATTACKED: self.attacked,
            Verdict.MISCLASSIFIED: ~self.correct,
        }

    @property
    def natural_error(self) -> float:
        """Share of images that are misclassified as they are."""
        return _share(~self.correct)

    @property
    def pgd_error(self) -> float:
        """Share of images that are misclassified as they are, or at an attacked point within eps."""
        return _share(~self.correct | self.attacked)

    @property
    def verified_error(self) -> float:
        """Share of images that are not proved."""
        return _share(~self.proved)

    @property
    def verdicts(self) -> list[str]:
        """Of each image, the value of its `Verdict`."""
        found = [""] * len(self.correct)
        for verdict, flags in self.flags_by_verdict.items():
            for image in flags.nonzero()[:, 0].tolist():
                found[image] = verdict.value
        for image, reason in self.undecided.items():
            found[image] = reason
        return found

    @classmethod
    def of(
        cls,
        eps: float,
        methods: Sequence[str],
        arithmetic: str | None,
        results: Sequence[ImageResult],
        images: Tensor,
        seconds: float,
        attack: str | None,
    ) -> Verification:
        """Of the results of all images, in whatever order."""
        ordered = sorted(results, key=lambda result: result.image)
        verdicts = [result.verdict for result in ordered]
        points = [result.point for result in ordered if result.point is not None]
        return cls(
            eps,
            Stage.of(methods, ordered),
            arithmetic,
            prediction=torch.tensor([result.prediction for result in ordered]),
            correct=torch.tensor([verdict != Verdict.MISCLASSIFIED for verdict in verdicts]),
            attacked=torch.tensor([verdict == Verdict.ATTACKED for verdict in verdicts]),
            adversarial=torch.stack(points) if points else torch.empty(0, *images.shape[1:]),
            proved=torch.tensor([verdict == Verdict.PROVED for verdict in verdicts]),
            margin=torch.tensor([result.margin for result in ordered], dtype=_margin_type(arithmetic)),
            seconds=seconds,
            undecided={i: verdict for i, verdict in enumerate(verdicts) if verdict in GAVE_UP},
            domains=sum(result.domains for result in ordered),
            trees={result.image: result.tree for result in ordered if result.tree is not None},
            attack=attack,
        )

    def summary(self) -> dict[str, Any]:
        """What goes into a JSON file; errors are fractions."""
        return {
            "eps": self.eps,
            "method": self.method,
            "arithmetic": self.arithmetic,
            "attack": self.attack,
            "images": len(self.correct),
            "natural_error": self.natural_error,
            "pgd_error": self.pgd_error,
            "verified_error": self.verified_error,
            "verdicts": dict(Counter(self.verdicts)),
            "domains": self.domains,
            "stages": [vars(stage) | {"seconds": round(stage.seconds, 3)} for stage in self.stages],
            "seconds": round(self.seconds, 3),
        }


def verify(
    model: nn.Module,
    data: Split,
    eps: float | Sequence[float],
    method: str | Sequence[str] = "ibp",
    *,
    attack: Attack | None = None,
    limit: int | None = None,
    batch_size: int = 256,
    seed: int = 0,
    backend: str = "native",
    arithmetic: str | None = None,
    search: Search = DEFAULT_SEARCH,
    ranks: Ranks = ALONE,
    workers: int = 1,
    results: Path | None = None,
    observe: Callable[[ImageResult, int], None] | None = None,
) -> list[Verification]:
    """Natural, PGD and verified error of `model` on `data`, at one epsilon or several.

    The model is put into eval mode and back. Products are taken in float32 without TF32, whatever the process's
    settings are. Only images that are classified right and not proved are attacked: a proved one cannot be.

    Args:
        model: with float32 parameters; it returns logits (B, K), K ≥ 2, of images (B, C, H, W) in [0, 1].
        data: images; it is moved to the model's device.
        eps: radius, or radii.
        method: of `BoundedModel.margins`, or several by price: each sees only the images that those before left
            unknown. The last may be "branch-and-bound", which searches those that the attack leaves as well.
        attack: None for none; the PGD error is then a lower bound, the natural error.
        limit: only the first so many images.
        backend: of `bounded_model`.
        arithmetic: prove what the deployed network computes in this floating-point arithmetic, "float32" and others of
            `bounds.rounding`, in any order of its sums, for every representation of the pixels (`pixel_box`). None: the
            network as real mathematics.
        search: how branch and bound searches, and for how long; with `keep_leaves`, of what it proves there can be
            certificates.
        ranks: the processes that share the images.
        workers: processes of this machine that this one has share its images and threads, on CPUs; the network, and
            the module that defines it, must be importable there.
        results: a file to which the result of each image is added as soon as it is known, and in which images that are
            finished already are not looked at again (`ResultFile`); rank r > 0 has FILE.r.
        observe: is told of each result of this process, and how many there will be.

    Returns:
        A Verification per radius, of all images in every process.

    Raises:
        UsageError: a radius that is negative or not finite; a limit, batch size or number of workers below 1; no
            method; a model of another type or with other outputs; an arithmetic that is unknown, or that method or
            backend cannot cover; fewer images than processes; `results` of another question.
        DataError: a label that is none of the model's classes.
        UnsupportedOperation: one that the backend has no rule for, or that branch and bound cannot split.
    """
    radii = checked_radii(eps)
    require_counts(batch_size=batch_size, workers=workers, **({} if limit is None else {"limit": limit}))
    require_split(data)
    data = data.take(slice(limit)).to(device_of(model))
    require_share(data, ranks)
    if workers > 1 and data.images.device.type != "cpu":
        raise UsageError("workers share a CPU: for several GPUs, start one process for each with torchrun")
    methods = (method,) if isinstance(method, str) else tuple(method)
    if not methods:
        raise UsageError("method: name at least one")
    question = Question(methods, arithmetic, attack, seed, backend, search)
    with evaluating(model), full_precision(), ExitStack() as opened:
        answers = answers_to(question, model, data)
        known, keep = _continued(results, answers.asked(radii), ranks, opened)
        portions = _portions_left(radii, len(data), known, ranks, batch_size, workers)
        found, seconds = _answered(answers, portions, workers, ranks, keep, observe)
    return _of_all_ranks(question, radii, data, known, found, seconds, ranks)


def _portions_left(
    radii: Sequence[float], images: int, known: Sequence[ImageResult], ranks: Ranks, batch_size: int, workers: int
) -> list[Portion]:
    """This rank's share of the images that are not finished, radius by radius."""
    done = {result.key for result in known}
    portions: list[Portion] = []
    for radius in dict.fromkeys(radii):
        left = [image for image in range(images) if (radius, image) not in done]
        size = batch_size if workers == 1 else max(1, min(batch_size, len(left) // (8 * workers)))
        portions += [(radius, part) for part in in_parts(ranks.share(left), size)]
    return portions


def _answered(
    answers: Answers,
    portions: Sequence[Portion],
    workers: int,
    ranks: Ranks,
    keep: Callable[[ImageResult], object],
    observe: Callable[[ImageResult, int], None] | None,
) -> tuple[list[ImageResult], dict[float, float]]:
    """The results of these portions, each kept and told as it comes, and the seconds that each radius took."""
    total = sum(len(part) for _, part in portions)
    found, seconds = [], dict.fromkeys((radius for radius, _ in portions), 0.0)
    stream = in_processes(answers, portions, workers) if workers > 1 else _in_turn(answers, portions)
    with closing(stream):  # an observer that raises leaves nothing of its portion switched on
        latest = time.perf_counter()
        for result in stream:
            now = time.perf_counter()
            seconds[result.eps] += now - latest
            result = replace(result, took=(now - latest) / ranks.world_size)
            latest = now
            keep(result)
            found.append(result)
            if observe is not None:
                observe(result, total)
    return found, seconds


def _of_all_ranks(
    question: Question,
    radii: Sequence[float],
    data: Split,
    known: Sequence[ImageResult],
    found: Sequence[ImageResult],
    seconds: Mapping[float, float],
    ranks: Ranks,
) -> list[Verification]:
    """What `known` files say and all ranks have found, a Verification per radius."""
    parts = ranks.all_gather((found, seconds), patient=True)
    everything = {result.key: result for result in (*known, *(result for part, _ in parts for result in part))}
    return [
        Verification.of(
            radius,
            question.methods,
            question.arithmetic,
            [result for result in everything.values() if result.eps == radius],
            data.images,
            max(spent.get(radius, 0.0) for _, spent in parts)
            + sum(result.took for result in known if result.eps == radius),
            None if question.attack is None else question.attack.name,
        )
        for radius in radii
    ]


def _in_turn(answers: Answers, portions: Sequence[Portion]) -> Generator[ImageResult, None, None]:
    for portion in portions:
        yield from answers(portion)


def _continued(
    path: Path | None, asked: Mapping[str, Any], ranks: Ranks, opened: ExitStack
) -> tuple[list[ImageResult], Callable[[ImageResult], object]]:
    """What files of results have already, those of other ranks too, and what adds to this rank's own."""
    if path is None:
        return [], lambda result: None
    with ranks.together():
        own = path if ranks.is_first else path.with_name(f"{path.name}.{ranks.rank}")
        others = [file for file in path.parent.glob(f"{glob.escape(path.name)}.*") if file.suffix[1:].isdecimal()]
        known = [result for file in (path, *sorted(others)) for result in ResultFile(file, asked).read()]
    everywhere = [result for part in ranks.all_gather(known) for result in part]  # all have read before one writes
    with ranks.together():
        file = opened.enter_context(ResultFile(own, asked))
    return everywhere, file.add


def checked_radii(eps: float | Sequence[float]) -> list[float]:
    """One radius or several as a list of floats.

    Raises:
        UsageError: none; or one that is no number, negative, infinite or NaN.
    """
    try:
        radii = [float(eps)] if isinstance(eps, int | float | Real) else [float(radius) for radius in eps]
    except (TypeError, ValueError) as error:
        raise UsageError(f"eps must be a number or several, not {eps!r}") from error
    if not radii:
        raise UsageError("eps: name at least one radius")
    for radius in radii:
        if not (math.isfinite(radius) and radius >= 0):
            raise UsageError(f"eps: a radius is a finite number and not negative, not {radius}")
    return radii


def require_share(data: Split, ranks: Ranks) -> None:
    """Raises where there are fewer images than processes."""
    if len(data) < ranks.world_size:
        raise UsageError(
            f"{len(data)} test images for {ranks.world_size} processes: take more images, or fewer processes"
        )


def answers_to(question: Question, model: nn.Module, data: Split) -> Answers:
    """What answers `question`; it is tried on the first image's own pixels. `model` is in eval mode, `data` on its
    device.

    Raises:
        UsageError, DataError, UnsupportedOperation: as of `verify`.
    """
    check_cascade(question.methods, question.backend)
    if question.arithmetic is not None:
        _require_sound(question.backend, question.arithmetic)
    check_fit(model, data)
    answers = Answers(question, model, data)
    answers.check()
    return answers


def check_fit(model: nn.Module, data: Split) -> None:
    """Whether `data` can be asked of `model`, which is in eval mode.

    Raises:
        UsageError: parameters that are not finite float32, or outputs that are not logits (B, K) in float32 with K ≥ 2.
        DataError: a label that is none of the K classes.
    """
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise UsageError(f"verification is of float32 networks; {name} is {_type_name(parameter)}: model.float()")
        if not parameter.isfinite().all():
            raise UsageError(f"the network cannot be verified: {name} has values that are infinite or NaN")
    with torch.no_grad():
        output = model(to_float(data.images[:1].to(device_of(model))))
    if not isinstance(output, Tensor) or output.dim() != 2 or len(output) != 1 or output.shape[1] < 2:
        shown = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise UsageError(f"the model must return logits (B, K) of at least two classes; one image gives {shown}")
    if output.dtype != torch.float32:
        raise UsageError(f"the model must return float32 logits, not {_type_name(output)}")
    low, high = (int(bound) for bound in data.labels.aminmax())
    if low < 0 or high >= output.shape[1]:
        raise DataError(f"labels reach from {low} to {high}, outside the model's classes 0 to {output.shape[1] - 1}")


def _type_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _require_sound(backend: str, arithmetic: str) -> None:
    arithmetic_named(arithmetic)
    if backend != "native":
        raise UsageError(f"bounds that cover the rounding of {arithmetic} are those of backend native, not {backend}")


def _margin_type(arithmetic: str | None) -> torch.dtype:
    return torch.float32 if arithmetic is None else torch.float64


def parts_of(data: Split, size: int) -> Iterator[tuple[int, Split]]:
    """`data` in its own order, `size` images at a time, each part with the position of its first."""
    return ((start, data.take(slice(start, start + size))) for start in range(0, len(data), size))


def _share(flags: Tensor) -> float:
    return flags.double().mean().item()
