"""Certificates: what was found of each test image, in a Parquet file that a third party can check.

Columns, one row per image and radius:

index        int64          position in the test set
sha256       string         of the image's uint8 pixels, channels first
label        int64
prediction   int64          of the unperturbed image
epsilon      float64        radius, in units of [0, 1] pixels
method       string         of the bound: ibp
arithmetic   string         of the deployed network for which the bound holds: float32, tf32, bf16, float64
margin       float64        lower bound of every computed z_y - z_j, j ≠ y, over the box
verdict      string         proved: no point of the box is classified otherwise; attacked: a point is; open: not known
adversarial  list<float32>  that point, channels first; null where the unperturbed image is misclassified itself

The file's metadata, under the key "certtrain", is JSON: the format, the SHA-256 of model.safetensors, model.json, the
config and the versions of the programs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from certtrain.errors import CertificateError

if TYPE_CHECKING:
    import pyarrow as pa

    from certtrain.data import Split
    from certtrain.verification.verify import Verification

FORMAT = 1
METADATA = b"certtrain"


@dataclass(frozen=True)
class Certificates:
    """What a file of certificates holds: its metadata, and a mapping of column name to value for each row."""

    metadata: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]


def schema() -> pa.Schema:
    import pyarrow as pa

    return pa.schema(
        [
            pa.field("index", pa.int64(), nullable=False),
            pa.field("sha256", pa.string(), nullable=False),
            pa.field("label", pa.int64(), nullable=False),
            pa.field("prediction", pa.int64(), nullable=False),
            pa.field("epsilon", pa.float64(), nullable=False),
            pa.field("method", pa.string(), nullable=False),
            pa.field("arithmetic", pa.string(), nullable=False),
            pa.field("margin", pa.float64(), nullable=False),
            pa.field("verdict", pa.string(), nullable=False),
            pa.field("adversarial", pa.list_(pa.float32())),
        ]
    )


def certificate_rows(result: Verification, data: Split) -> list[dict[str, Any]]:
    """The rows of one radius; `data` is what was verified, in the same order."""
    points = iter(result.adversarial)
    images = data.images.cpu().numpy()
    rows = []
    for index, label in enumerate(data.labels.tolist()[: len(result.correct)]):
        attacked = bool(result.attacked[index])
        rows.append(
            {
                "index": index,
                "sha256": digest(images[index].tobytes()),
                "label": label,
                "prediction": int(result.prediction[index]),
                "epsilon": float(result.eps),
                "method": ",".join(stage.method for stage in result.stages),
                "arithmetic": result.arithmetic,
                "margin": float(result.margin[index]),
                "verdict": _verdict(bool(result.proved[index]), attacked or not result.correct[index]),
                "adversarial": next(points).flatten().tolist() if attacked else None,
            }
        )
    return rows


def _verdict(proved: bool, attacked: bool) -> str:
    return "proved" if proved else "attacked" if attacked else "open"


def write_certificates(
    file: Path,
    results: Sequence[Verification],
    data: Split,
    model: Path,
    config: Mapping[str, Any],
    versions: Mapping[str, str],
) -> None:
    """Write a row for each image at each radius.

    Args:
        results: of sound verification (with an arithmetic), one per radius.
        data: the images they are about.
        model: the model.safetensors that was verified; its model.json lies beside it.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from certtrain.runtime.files import write_atomically

    metadata = {
        "format": FORMAT,
        "model_sha256": digest(model.read_bytes()),
        "model": json.loads((model.parent / "model.json").read_text())["model"],
        "config": config,
        "versions": versions,
    }
    rows = [row for result in results for row in certificate_rows(result, data)]
    table = pa.Table.from_pylist(rows, schema().with_metadata({METADATA: json.dumps(metadata).encode()}))
    write_atomically(file, lambda target: pq.write_table(table, target, compression="zstd"))


def read_certificates(file: Path) -> Certificates:
    """Read what `write_certificates` wrote.

    Raises:
        CertificateError: missing, truncated, of another format, or not of these columns.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not file.is_file():
        raise CertificateError(f"there is no file of certificates {file}")
    try:
        table = pq.read_table(file)
        metadata = json.loads((table.schema.metadata or {})[METADATA])
        written = metadata["format"]
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise CertificateError(f"{file} is truncated, corrupt, or holds no certificates") from error
    if written != FORMAT:
        raise CertificateError(f"{file} has certificates of format {written}; this version reads format {FORMAT}")
    if not table.schema.equals(schema()):
        raise CertificateError(f"{file} does not have the columns of format {FORMAT}")
    return Certificates(metadata, table.to_pylist())


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
