"""Certificates: what was found of each test image, in a Parquet file that a third party can check. Format 3.

Columns, one row per image and claim, in the order of the claims and of the test set:

index        int64          position in the test set
sha256       string         of the image's uint8 pixels, channels first
label        int64
prediction   int64          of the unperturbed image
epsilon      float64        radius, in units of [0, 1] pixels
method       string         of the bounds: one, or a cascade by price, of ibp, crown-ibp, crown, branch-and-bound
arithmetic   string         of the deployed network for which the bound holds: float32, tf32, bf16, float64
margin       float64        lower bound of every computed z_y - z_j, j ≠ y, over the box (docs/soundness.md, eq. 10)
verdict      string         proved: no point of the box is classified otherwise; attacked: a point is; unknown: else
adversarial  list<float32>  that point, channels first; null where the unperturbed image is misclassified itself
tree         binary         the leaves of branch and bound (`trees.Trees`); null where bounds of the whole box suffice

The file's metadata, under the key "certtrain", is JSON (`Header`):

format        3
model_sha256  of model.safetensors
model         model.json's: how to build the network
data          name of the data set, number of images of its whole test split, and their `split_digest`
claims        for each epsilon, arithmetic and method: number of images, and of each verdict among them
config        the run's configuration
versions      of the programs
columns       for each column the SHA-256 of its values (`ColumnDigests`)
sha256        of all the above

Digests show what has changed by accident or by hand; they prove nothing, since whoever writes a file computes them.
The proof is the check (`checker`).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, get_origin, get_type_hints

from certtrain.errors import CertificateError, UsageError, one_line
from certtrain.runtime.files import parse_json
from certtrain.verification.digests import digest, digest_of
from certtrain.verification.trees import MOST_PACKED
from certtrain.verification.verdicts import Verdict

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from certtrain.data import Split
    from certtrain.verification.verification import Verification

FORMAT = 3
METADATA = b"certtrain"
CLAIMED = (Verdict.PROVED, Verdict.ATTACKED, Verdict.UNKNOWN)
"""Verdicts of certificates: a misclassified image is attacked by itself, one that was given up is unknown."""
CHECKED_METHODS = ("ibp", "crown-ibp", "crown", "branch-and-bound")  # whose proofs the checker can make again
MOST_ROWS = 10_000_000
MOST_HEADER_BYTES = 2**22
MOST_ROW_BYTES = 1024  # of one value, but for adversarial points, on average and uncompressed
ROWS_AT_ONCE = 16  # so that their trees, however large, are less than the 2 GiB of an array in Parquet


@dataclass(frozen=True)
class Claim:
    """What the rows of one radius, arithmetic and method say together."""

    epsilon: float
    arithmetic: str
    method: str
    images: int
    proved: int
    attacked: int
    unknown: int

    def __str__(self) -> str:
        return f"epsilon {self.epsilon:.9g}, {self.arithmetic}, {self.method}"


@dataclass(frozen=True)
class ImageSet:
    """The images that certificates are about: the whole test split, also where only some have a row."""

    name: str
    images: int
    sha256: str


@dataclass(frozen=True)
class Header:
    """The metadata of a file of certificates, as described above."""

    format: int
    model_sha256: str
    model: Mapping[str, Any]
    data: ImageSet
    claims: tuple[Claim, ...]
    config: Mapping[str, Any]
    versions: Mapping[str, str]
    columns: Mapping[str, str]
    sha256: str = ""

    def sealed(self) -> Header:
        """With the digest of the rest."""
        content = asdict(self)
        del content["sha256"]
        return Header(**{**vars(self), "sha256": digest(json.dumps(content, sort_keys=True).encode())})

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def parse(cls, content: bytes) -> Header:
        """Raises CertificateError for a header that is not one of this format, or not what was written."""
        try:
            read = parse_json(content)
            written = read["format"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CertificateError("the header cannot be read") from error
        if written != FORMAT:
            raise CertificateError(f"certificates of format {written}; this version reads and writes format {FORMAT}")
        header = cls(
            **{
                **_fields(cls, read, "the header"),
                "data": ImageSet(**_fields(ImageSet, read.get("data"), "the header's data")),
                "claims": tuple(Claim(**_fields(Claim, claim, "a claim")) for claim in _list(read.get("claims"))),
            }
        )
        if header.sealed().sha256 != header.sha256:
            raise CertificateError("the header is not what was written: its SHA-256 differs")
        return header


def _fields(kind: type, content: Any, where: str) -> dict[str, Any]:
    """Just the fields of `kind`, each of its type."""
    if not isinstance(content, dict):
        raise CertificateError(f"{where} is missing or no mapping")
    expected = {name: _in_json(annotation) for name, annotation in get_type_hints(kind).items()}
    for name, written_as in expected.items():
        if name not in content:
            raise CertificateError(f"{where} lacks {name}")
        value = content[name]
        if not isinstance(value, written_as) or isinstance(value, bool):
            raise CertificateError(f"{where} has {name} = {str(value)[:40]}, which is no {written_as.__name__}")
    if surplus := content.keys() - expected.keys():
        raise CertificateError(f"{where} has {min(surplus)} besides")
    return content


def _in_json(annotation: Any) -> type:
    """The type of what JSON has for a field that is annotated so."""
    kind = get_origin(annotation) or annotation
    if kind in (int, float, str):
        return kind
    return list if kind is tuple else dict


def _list(content: Any) -> list[Any]:
    return content if isinstance(content, list) else []


class ColumnDigests:
    """The SHA-256 of each column's values, row by row: integers and floats as 8 bytes, little endian; strings as UTF-8,
    bytes, and lists as float32 behind their length; null as a length of -1."""

    def __init__(self) -> None:
        self._digests = {name: hashlib.sha256() for name in schema().names}

    def add(self, row: Mapping[str, Any]) -> None:
        for name, column in self._digests.items():
            column.update(_canonical(row[name]))

    def found(self) -> dict[str, str]:
        return {name: column.hexdigest() for name, column in self._digests.items()}


def _canonical(value: Any) -> bytes:
    if isinstance(value, int):
        return struct.pack("<q", value)
    if isinstance(value, float):
        return struct.pack("<d", value)
    if isinstance(value, str | bytes):
        encoded = value.encode() if isinstance(value, str) else value
        return struct.pack("<q", len(encoded)) + encoded
    if value is None:
        return struct.pack("<q", -1)
    return struct.pack("<q", len(value)) + struct.pack(f"<{len(value)}f", *value)


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
            pa.field("tree", pa.binary()),
        ]
    )


# --- writing ----------------------------------------------------------------------------------------------------------


def certificate_rows(result: Verification, data: Split) -> Iterator[dict[str, Any]]:
    """The rows of one radius; `data` is what was verified, in the same order, and may go on behind it.

    Raises:
        CertificateError: an image has no prediction, its logits being no numbers.
    """
    points = iter(result.adversarial)
    images = data.images.cpu().numpy()
    for index, label in enumerate(data.labels.tolist()[: len(result.correct)]):
        prediction, attacked = int(result.prediction[index]), bool(result.attacked[index])
        if prediction < 0:
            raise CertificateError(f"index {index}: logits that are no numbers predict nothing that could be certified")
        yield {
            "index": index,
            "sha256": digest(images[index].tobytes()),
            "label": label,
            "prediction": prediction,
            "epsilon": float(result.eps),
            "method": result.method,
            "arithmetic": result.arithmetic,
            "margin": float(result.margin[index]),
            "verdict": _verdict(bool(result.proved[index]), attacked or prediction != label),
            "adversarial": next(points).flatten().tolist() if attacked else None,
            "tree": result.trees.get(index),
        }


def _verdict(proved: bool, attacked: bool) -> Verdict:
    return Verdict.PROVED if proved else Verdict.ATTACKED if attacked else Verdict.UNKNOWN


def require_checkable(methods: Sequence[str], radii: Sequence[float]) -> None:
    """Raises UsageError for a method whose proofs leave nothing to be checked by, or a radius that is there twice."""
    for method in methods:
        if method not in CHECKED_METHODS:
            raise UsageError(
                f"certificates keep no slopes of {method}: use branch-and-bound, which begins with them; methods that "
                f"can be checked: {', '.join(CHECKED_METHODS)}"
            )
    if len(set(radii)) < len(radii):
        raise UsageError("certificates hold each radius once: name none twice")


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
        results: of sound verification (with an arithmetic), one per radius, of the first images of `data` or all; what
            branch and bound has proved can be checked where its `Search` has `keep_leaves`.
        data: the whole test split.
        model: the model.safetensors that was verified; its model.json lies beside it.
        config: of the run, with the data set's name under data.name.

    Raises:
        UsageError: a radius twice, or another thing that `require_checkable` refuses.
        CertificateError: as of `certificate_rows`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from certtrain.runtime.files import write_atomically

    def rows() -> Iterator[dict[str, Any]]:
        return (row for result in results for row in certificate_rows(result, data))

    methods = dict.fromkeys(stage.method for result in results for stage in result.stages)
    require_checkable(list(methods), [float(result.eps) for result in results])
    columns, verdicts = ColumnDigests(), Counter[tuple[float, str]]()
    for row in rows():
        columns.add(row)
        verdicts[row["epsilon"], row["verdict"]] += 1
    header = Header(
        format=FORMAT,
        model_sha256=digest(model.read_bytes()),
        model=parse_json((model.parent / "model.json").read_bytes())["model"],
        data=ImageSet(config["data"]["name"], len(data), digest_of(data)),
        claims=tuple(_claim(result, verdicts) for result in results),
        config=config,
        versions=versions,
        columns=columns.found(),
    ).sealed()
    kind = schema().with_metadata({METADATA: header.to_json()})

    def write(target: IO[bytes]) -> None:
        with pq.ParquetWriter(target, kind, compression="zstd", write_page_checksum=True) as writer:
            left = rows()
            while part := list(itertools.islice(left, ROWS_AT_ONCE)):
                writer.write_batch(pa.RecordBatch.from_pylist(part, kind))

    write_atomically(file, write)


def _claim(result: Verification, verdicts: Mapping[tuple[float, str], int]) -> Claim:
    epsilon = float(result.eps)
    counts = {verdict.value: verdicts[epsilon, verdict] for verdict in CLAIMED}
    return Claim(epsilon, str(result.arithmetic), result.method, len(result.correct), **counts)


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Certificates:
    """A file of certificates, whose rows are read as they are asked for."""

    file: Path
    header: Header

    def rows(self) -> Iterator[dict[str, Any]]:
        """Column name to value for each row, every page checked against its checksum.

        Whoever comes to the end has seen the rows that the header is about, whatever became of the file meanwhile.

        Raises:
            CertificateError: a page is corrupt; at the end, a column's digest is not the header's.
        """
        import pyarrow as pa

        digests = ColumnDigests()
        try:
            with _opened(self.file) as parquet:
                for batch in parquet.iter_batches(ROWS_AT_ONCE):
                    for row in batch.to_pylist():
                        digests.add(row)
                        yield row
        except (pa.ArrowException, OSError, ValueError, struct.error) as error:
            raise CertificateError(f"{self.file} is truncated or corrupt ({one_line(error)})") from error
        for column, found in digests.found().items():
            if self.header.columns.get(column) != found:
                raise CertificateError(
                    f"column {column} is not what was written: its SHA-256 differs from the header's"
                )

    def check_size(self, images: int, pixels: int) -> None:
        """Whether the rows can be those of so many images of so many values each, by what the file says of itself.

        Raises:
            CertificateError: there are more of them, or they are larger.
        """
        with _opened(self.file) as parquet:
            metadata = parquet.metadata
        claimed = sum(claim.images for claim in self.header.claims)
        if metadata.num_rows != claimed:
            raise CertificateError(f"the file has {metadata.num_rows} rows, its header claims {claimed}")
        most = min(MOST_ROWS, images * len(self.header.claims))
        if not 0 < metadata.num_rows <= most:
            raise CertificateError(
                f"the file has {metadata.num_rows} rows, {len(self.header.claims)} claims on {images} images have "
                f"{'at least one' if most else 'none'} and at most {most}"
            )
        for group in range(metadata.num_row_groups):
            rows = metadata.row_group(group).num_rows
            for position in range(metadata.num_columns):
                column = metadata.row_group(group).column(position)
                listed = column.path_in_schema.startswith("adversarial")
                most_bytes = MOST_PACKED if column.path_in_schema == "tree" else MOST_ROW_BYTES
                values, size = rows * (pixels if listed else 1), most_bytes + listed * 8 * pixels
                if column.num_values > values or column.total_uncompressed_size > 2**16 + rows * size:
                    raise CertificateError(f"column {column.path_in_schema} is larger than {rows} rows can be")


def read_certificates(file: Path) -> Certificates:
    """Open what `write_certificates` wrote; of the rows nothing is read yet.

    Raises:
        CertificateError: missing, truncated, of another format, not of these columns, or a header that is not sound.
    """
    import pyarrow as pa

    if not file.is_file():
        raise CertificateError(f"there is no file of certificates {file}")
    try:
        with _opened(file) as parquet:
            found = parquet.schema_arrow
    except (pa.ArrowException, OSError, ValueError) as error:
        raise CertificateError(f"{file} is truncated, corrupt, or holds no certificates") from error
    content = (found.metadata or {}).get(METADATA)
    if content is None or len(content) > MOST_HEADER_BYTES:
        raise CertificateError(f"{file} holds no certificates: it has no header, or one that is too long")
    try:
        header = Header.parse(content)
    except CertificateError as error:
        raise CertificateError(f"{file}: {error}") from error
    if not found.equals(schema()):
        raise CertificateError(f"{file} does not have the columns of format {FORMAT}")
    return Certificates(file, header)


def _opened(file: Path) -> pq.ParquetFile:
    import pyarrow.parquet as pq

    return pq.ParquetFile(
        file, page_checksum_verification=True, thrift_string_size_limit=2**24, thrift_container_size_limit=2**20
    )
