"""What became of every image that was verified, so that runs can be compared image by image: verdicts.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from certtrain.bound_methods import BRANCH_AND_BOUND
from certtrain.runs.files import VERDICTS
from certtrain.runs.lock import writing_in
from certtrain.runtime.files import read_json, write_json
from certtrain.verification.verdicts import Verdict

if TYPE_CHECKING:
    from certtrain.config import Config
    from certtrain.config.schema import VerificationSection
    from certtrain.data import Split
    from certtrain.verification.verification import Verification

LETTERS: Mapping[Verdict, str] = {
    Verdict.PROVED: "p",
    Verdict.ATTACKED: "a",
    Verdict.UNKNOWN: "u",
    Verdict.MISCLASSIFIED: "m",
}
MOST_IMAGES = 10**7

Conditions = Mapping[str, str | int | float | None]  # by keys of a configuration


def conditions_of(section: VerificationSection, backend: str, method: str) -> Conditions:
    """What answers by `method` hang on besides it, radius, arithmetic and images: the attacks, what limits a search,
    and who computes bounds. What they make no use of is left out.
    """
    attacks = [name for name in section.attack if name != "pgd" or section.pgd_restarts > 0]
    used = tuple({f"{name.partition('-')[0]}_" for name in attacks})  # pgd_steps, apgd_steps, ...
    of_attacks = {key: value for key, value in section.model_dump(mode="json").items() if key.startswith(used)}
    searches = BRANCH_AND_BOUND in method.split(",")
    of_search = section.search.model_dump(mode="json") if searches else {}
    return {
        "verification.attack": ",".join(attacks) or None,
        **{f"verification.{key}": value for key, value in of_attacks.items()},
        **{f"verification.search.{key}": value for key, value in of_search.items()},
        "backend": backend,
    }


class Verdicts(BaseModel):
    """The answer to one question: a letter per image (`LETTERS`), in the order of the split.

    sha256: of the whole split (`digests.split_digest`), of which these are the first images or all; conditions:
    `conditions_of` what was asked, which earlier versions did not write.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    split: str
    sha256: str
    eps: Annotated[float, Field(ge=0, le=1)]
    method: str
    arithmetic: str | None
    conditions: dict[str, str | int | float | None] | None = None
    images: Annotated[str, Field(pattern=r"^[paum]+$", max_length=MOST_IMAGES)]

    @property
    def question(self) -> tuple[Any, ...]:
        """Of a network there is one answer to it."""
        conditions = None if self.conditions is None else tuple(sorted(self.conditions.items()))
        return self.split, self.sha256, self.eps, self.method, self.arithmetic, conditions, len(self.images)


def verdicts_of(config: Config, data: Split, results: Sequence[Verification]) -> list[Verdicts]:
    """Those of `results`, which are about the first images of `data`, and were asked for by `config`."""
    from certtrain.verification.digests import digest_of

    sha256 = digest_of(data)
    return [
        Verdicts(
            split=config.verification.split,
            sha256=sha256,
            eps=result.eps,
            method=result.method,
            arithmetic=result.arithmetic,
            conditions=dict(conditions_of(config.verification, config.backend, result.method)),
            images=_letters(result),
        )
        for result in results
    ]


def add_verdicts(folder: Path, verdicts: Sequence[Verdicts]) -> None:
    """Write those of the run in `folder` beside those it has; of two answers to one question the later stays.

    Others that do so at once wait for each other.

    Raises:
        CheckpointError: the file that is there is corrupt.
    """
    with writing_in(folder):
        answered = {answer.question: answer for answer in (*read_verdicts(folder), *verdicts)}
        write_json(folder / VERDICTS, [answer.model_dump() for answer in answered.values()])


def read_verdicts(folder: Path) -> list[Verdicts]:
    """The verdicts of the run in `folder`; none where it has no such file.

    Raises:
        CheckpointError: it is corrupt.
    """
    file = folder / VERDICTS
    if not file.exists():
        return []
    return read_json(file, _verdicts)


def _verdicts(content: Any) -> list[Verdicts]:
    if not isinstance(content, list):
        raise ValueError("a list is expected")
    return [Verdicts.model_validate(entry) for entry in content]


def _letters(result: Verification) -> str:
    letters = [""] * len(result.correct)
    for verdict, flags in result.flags_by_verdict.items():
        for index in flags.nonzero()[:, 0].tolist():
            letters[index] = LETTERS[verdict]
    return "".join(letters)
