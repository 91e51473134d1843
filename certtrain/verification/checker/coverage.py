"""Whether certificates are all there: a proof of some images says nothing about the rest of a test set."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from certtrain.errors import CertificateError
from certtrain.verification.certificates import CLAIMED, Certificates, Claim, Header

Row = Mapping[str, Any]


def check_coverage(certificates: Certificates, images: int, allow_partial: bool = False) -> tuple[Claim, ...]:
    """Whether the rows are those that the header claims: the claims one after another, each image of theirs once.

    Nothing is proved here; the rows are only counted, and compared with the header.

    Args:
        images: in the whole test split.
        allow_partial: a claim may leave images out.

    Returns:
        The header's claims.

    Raises:
        CertificateError: what is missing, surplus, out of place, or not what was written.
    """
    header = certificates.header
    _check_header(header, images)
    rows = certificates.rows()
    for claim in header.claims:
        missing = _check_claim(claim, itertools.islice(rows, claim.images), images)
        if missing is not None and not allow_partial:
            raise CertificateError(
                f"{claim}: certificates for {claim.images} of {images} images; index {missing} is missing "
                "(--allow-partial says what holds for the others)"
            )
    if next(rows, None) is not None:
        raise CertificateError("there are more rows than the header claims")
    return header.claims


def _check_header(header: Header, images: int) -> None:
    if not header.claims:
        raise CertificateError("the header claims nothing")
    kinds = Counter((claim.epsilon, claim.arithmetic, claim.method) for claim in header.claims)
    for claim in header.claims:
        if kinds[claim.epsilon, claim.arithmetic, claim.method] > 1:
            raise CertificateError(f"{claim}: claimed twice")
        if not 0 < claim.images <= images:
            raise CertificateError(f"{claim}: {claim.images} images are claimed, the test set has {images}")
    name, radii = _configured(header)
    if name != header.data.name:
        raise CertificateError(f"the header's config is about the data set {name}, its data says {header.data.name}")
    if radii != sorted(claim.epsilon for claim in header.claims):
        raise CertificateError(f"the header's config has the radii {radii}, its claims have others")


def _configured(header: Header) -> tuple[str, list[float]]:
    """The data set and the radii that the run's configuration names."""
    try:
        name, radii = header.config["data"]["name"], header.config["verification"]["eps"]
        return name, sorted(map(float, radii or [header.config["epsilon"]["max"]]))
    except (LookupError, TypeError, ValueError, OverflowError) as error:
        raise CertificateError("the header's config does not name the data set and the radii") from error


def _check_claim(claim: Claim, rows: Iterator[Row], images: int) -> int | None:
    """The first image that a claim leaves out, None if it leaves out none."""
    last, missing, found = -1, None, Counter[str]()
    for row in rows:
        index = row["index"]
        for field in ("epsilon", "arithmetic", "method"):
            if row[field] != getattr(claim, field):
                raise CertificateError(f"{claim}: index {index} has {field} {row[field]}")
        if index == last:
            raise CertificateError(f"{claim}: index {index} is there twice")
        if index < last:
            raise CertificateError(f"{claim}: index {index} comes after {last}, out of order or twice")
        if index >= images:
            raise CertificateError(f"{claim}: index {index}, the test set has {images} images")
        if missing is None and index > last + 1:
            missing = last + 1
        found[row["verdict"]] += 1
        last = index
    if strangers := found.keys() - set(CLAIMED):
        raise CertificateError(f"{claim}: unknown verdict {min(strangers)!r}")
    for verdict in CLAIMED:
        if found[verdict] != getattr(claim, verdict):
            raise CertificateError(f"{claim}: {found[verdict]} {verdict}, the header says {getattr(claim, verdict)}")
    if found.total() != claim.images:
        raise CertificateError(f"{claim}: {found.total()} rows, the header claims {claim.images}")
    return last + 1 if missing is None and last + 1 < images else missing
