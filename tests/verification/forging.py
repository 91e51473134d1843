"""Certificates rewritten as a forger would: with digests and counts that agree with what was changed."""

from __future__ import annotations

import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq

from certtrain.verification.certificates import CLAIMED, METADATA, ColumnDigests, schema
from certtrain.verification.digests import digest


def header_of(file):
    return json.loads(pq.read_schema(file).metadata[METADATA])


def rows_of(file):
    return pq.read_table(file).to_pylist()


def merged(content, changes):
    return {
        **content,
        **{
            key: merged(content[key], value)
            if isinstance(value, dict) and isinstance(content.get(key), dict)
            else value
            for key, value in changes.items()
        },
    }


def without(content, *names):
    return {key: value for key, value in content.items() if key not in names}


def write(file, rows, header):
    kind = schema().with_metadata({METADATA: json.dumps(header).encode()})
    pq.write_table(pa.Table.from_pylist(rows, kind), file, compression="zstd", write_page_checksum=True)


def sealed(header):
    """With the digest of all the rest."""
    rest = without(header, "sha256")
    return {**rest, "sha256": digest(json.dumps(rest, sort_keys=True).encode())}


def with_columns(header, rows):
    """With the digests of these rows' columns."""
    digests = ColumnDigests()
    for row in rows:
        digests.add(row)
    return {**header, "columns": digests.found()}


def with_claims(header, rows):
    """With claims that count these rows, and a config that names their radii."""
    kinds = dict.fromkeys((row["epsilon"], row["arithmetic"], row["method"]) for row in rows)
    claims = []
    for kind in kinds:
        found = Counter(row["verdict"] for row in rows if (row["epsilon"], row["arithmetic"], row["method"]) == kind)
        counts = {verdict.value: found[verdict] for verdict in CLAIMED}
        claims.append(
            dict(zip(("epsilon", "arithmetic", "method"), kind, strict=True)) | {"images": found.total()} | counts
        )
    radii = {"verification": {"eps": [claim["epsilon"] for claim in claims]}}
    return {**header, "claims": claims, "config": merged(header["config"], radii)}


def rewrite(file, rows=None, header=None, claims=False):
    """Put `rows` and changed `header` fields into `file`, sealed; with `claims`, those of the rows."""
    content = merged(header_of(file), header or {})
    if rows is not None:
        content = with_columns(content, rows)
        content = with_claims(content, rows) if claims else content
    write(file, rows_of(file) if rows is None else rows, sealed(content))
