"""A trained network's errors at the configured radii, its images' proved radii, and what summary.json says of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from certtrain.bounds.linear.beta import Ascent
from certtrain.config import Config
from certtrain.config.schema import SearchSection, VerificationSection
from certtrain.data import Dataset, Split
from certtrain.errors import DataError
from certtrain.modules import evaluating
from certtrain.runs.build import output_shape
from certtrain.runtime.distributed import ALONE, Ranks
from certtrain.runtime.precision import full_precision
from certtrain.verification.answers import Question
from certtrain.verification.attacks import APGD, PGD, Attack, Ensemble, TargetedAPGD
from certtrain.verification.branch_and_bound import Search
from certtrain.verification.radius import Radii, certified_radii
from certtrain.verification.results import ImageResult
from certtrain.verification.verification import Verification
from certtrain.verification.verify import answers_to, verify


def verify_run(
    config: Config,
    model: nn.Module,
    dataset: Dataset,
    limit: int | None = None,
    ranks: Ranks = ALONE,
    workers: int = 1,
    results: Path | None = None,
    observe: Callable[[ImageResult, int], None] | None = None,
    certificates: bool = False,
) -> list[Verification]:
    """`verify` as the configuration has it; `certificates`: with all that these need."""
    section = config.verification
    return verify(
        model,
        _test_images(config, model, dataset, limit),
        config.test_radii,
        section.method,
        attack=build_attack(config.verification),
        batch_size=section.batch_size,
        seed=config.seed,
        backend=config.backend,
        arithmetic=section.arithmetic,
        search=replace(build_search(section.search), keep_leaves=certificates),
        ranks=ranks,
        workers=workers,
        results=results,
        observe=observe,
    )


def rehearse_verification(config: Config, model: nn.Module, dataset: Dataset) -> None:
    """Try every stage of `verify_run` on an image, so that a long training does not end in an error.

    Raises:
        UsageError, DataError, UnsupportedOperation: the network will not be verified so.
    """
    section = config.verification
    methods, search = tuple(section.method), build_search(section.search)
    question = Question(methods, section.arithmetic, None, config.seed, config.backend, search)
    with evaluating(model), full_precision():
        answers_to(question, model, _test_images(config, model, dataset, limit=1))


def radii_of(
    config: Config,
    model: nn.Module,
    dataset: Dataset,
    max_eps: float,
    limit: int | None = None,
    ranks: Ranks = ALONE,
) -> Radii:
    return certified_radii(
        model,
        _test_images(config, model, dataset, limit),
        max_eps,
        attack=build_attack(config.verification),
        arithmetic=config.verification.arithmetic,
        batch_size=config.verification.batch_size,
        seed=config.seed,
        backend=config.backend,
        ranks=ranks,
    )


def _test_images(config: Config, model: nn.Module, dataset: Dataset, limit: int | None) -> Split:
    shape = output_shape(config.model.name, model, dataset.image_shape)
    if len(shape) != 2:
        raise DataError(f"model {config.model.name} returns shape {shape} for one of these images, not (1, classes)")
    classes = shape[1]
    if dataset.num_classes > classes:
        raise DataError(f"the data has labels up to {dataset.num_classes - 1}, the model only {classes} classes")
    return dataset.test.take(slice(config.verification.limit if limit is None else limit))


def build_search(section: SearchSection) -> Search:
    return Search(
        timeout=section.timeout,
        images=section.images,
        domains=section.domains,
        candidates=section.candidates,
        ascent=Ascent(steps=section.steps),
        max_memory=int(section.max_memory * 2**20),
    )


def build_attack(section: VerificationSection) -> Attack | None:
    """Those that are asked for; None where that is PGD alone, without an attempt."""
    steps, restarts = section.apgd_steps, section.apgd_restarts
    attacks: list[Attack] = [
        PGD(section.pgd_steps, section.pgd_restarts, section.pgd_step_size),
        APGD("ce", steps, restarts),
        APGD("dlr", steps, restarts),
        TargetedAPGD(steps, restarts, section.apgd_targets),
    ]
    known = {attack.name: attack for attack in attacks}
    members = tuple(known[name] for name in section.attack if name != PGD.name or section.pgd_restarts > 0)
    return Ensemble(members) if members else None


class Results(NamedTuple):
    """Of one network on the test images, and on those held out of the training set, for each radius."""

    test: list[Verification]
    validation: list[Verification]

    def summary(self) -> dict[str, Any]:
        splits = {"radii": self.test, "validation": self.validation}
        return {name: [result.summary() for result in results] for name, results in splits.items()}


def summarize(config: Config, results: Sequence[Verification]) -> dict[str, Any]:
    """Of summary.json; the three errors on top are those at `Config.judged_radius`.

    Args:
        results: at each of `config.test_radii`.
    """
    chosen = next(result for result in results if result.eps == config.judged_radius)
    return {
        **chosen.summary(),
        "split": config.verification.split,
        "verify_seconds": round(sum(r.seconds for r in results), 2),
        "radii": [r.summary() for r in results],
    }
