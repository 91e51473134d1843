"""How many images are classified right, withstand an attack, and are proved."""

from __future__ import annotations

import glob
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from certtrain.data import Split
from certtrain.data.dataset import require_split
from certtrain.errors import UsageError, require_counts
from certtrain.modules import device_of, evaluating
from certtrain.runtime.distributed import ALONE, Ranks
from certtrain.runtime.precision import full_precision
from certtrain.verification.answers import Answers, Portion, Question, in_parts
from certtrain.verification.attacks import Attack
from certtrain.verification.branch_and_bound import Search
from certtrain.verification.cascade import check_cascade
from certtrain.verification.checks import check_fit, checked_radii, require_share, require_sound
from certtrain.verification.results import ImageResult, ResultFile
from certtrain.verification.verification import Stage, Verification
from certtrain.verification.workers import in_processes

__all__ = ["Stage", "Verification", "answers_to", "verify"]

DEFAULT_SEARCH = Search()


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


def answers_to(question: Question, model: nn.Module, data: Split) -> Answers:
    """What answers `question`; it is tried on the first image's own pixels. `model` is in eval mode, `data` on its
    device.

    Raises:
        UsageError, DataError, UnsupportedOperation: as of `verify`.
    """
    check_cascade(question.methods, question.backend)
    if question.arithmetic is not None:
        require_sound(question.backend, question.arithmetic)
    check_fit(model, data)
    answers = Answers(question, model, data)
    answers.check()
    return answers
