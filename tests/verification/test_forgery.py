"""Forged certificates: every column, every field of the header, and every change of the set of rows is refused."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from certtrain.data import Split
from certtrain.errors import CertificateError
from certtrain.models import build_model
from certtrain.verification.attacks import PGD
from certtrain.verification.certificates import METADATA, read_certificates, schema, write_certificates
from certtrain.verification.checker import SavedNetwork, check
from certtrain.verification.checker.coverage import check_coverage
from certtrain.verification.verify import verify
from tests.commands import one_thread
from tests.networks import randomized, save_model
from tests.verification.forging import header_of, merged, rewrite, rows_of, sealed, with_columns, without, write

IMAGES, RADII = 24, (0.05, 0.1)


@dataclass(frozen=True, repr=False)
class Witness:
    """Certificates that hold, of a tiny network and test set, and whoever checks a file against those two."""

    file: Path
    network: SavedNetwork
    images: np.ndarray
    labels: np.ndarray

    @property
    def rows(self):
        return rows_of(self.file)

    @property
    def header(self):
        return header_of(self.file)

    def check(self, file, allow_partial=False):
        certificates = read_certificates(file)
        return check(certificates, self.network, "npz", self.images, self.labels, Console(quiet=True), allow_partial)

    def refuses(self, file, reason):
        with pytest.raises(CertificateError, match=reason) as caught:
            self.check(file)
        assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def witness(tmp_path_factory):
    """Every verdict occurs: proved, attacked, misclassified, and unknown, as the attack overlooks some."""
    folder = tmp_path_factory.mktemp("witness")
    torch.manual_seed(3)
    architecture = {"name": "mlp", "image_shape": [1, 3, 3], "num_classes": 3, "options": {"widths": [6]}}
    model = randomized(build_model(**architecture)).eval()
    images = torch.randint(0, 256, (IMAGES, 1, 3, 3), dtype=torch.uint8)
    with one_thread():
        labels = model(images / 255).argmax(1)
        labels[::7] = (labels[::7] + 1) % 3
        data = Split(images, labels)
        save_model(folder, model, architecture)
        results = verify(model, data, RADII, attack=Distracted(10, 2), arithmetic="float32")
    config = {"data": {"name": "npz"}, "epsilon": {"max": 0.1}, "verification": {"eps": list(RADII)}}
    weights, file = folder / "model.safetensors", folder / "certificates.parquet"
    write_certificates(file, results, data, weights, config, {"certtrain": "0"})
    found = Witness(file, SavedNetwork.read(weights), images.numpy(), labels.numpy())
    claims = found.check(file)
    assert all(sum(getattr(claim, verdict) for claim in claims) > 2 for verdict in ("proved", "attacked", "unknown"))
    return found


class Distracted(PGD):
    """PGD that overlooks every fourth image."""

    def __call__(self, model, images, labels, eps, generators=None):
        points, found = super().__call__(model, images, labels, eps, generators)
        found[::4], points[::4] = False, images[::4]
        return points, found


@pytest.fixture
def file(witness, tmp_path):
    """A copy of the file that holds, to be forged."""
    copy = tmp_path / "forged.parquet"
    copy.write_bytes(witness.file.read_bytes())
    return copy


def rows_with(witness, verdict, right=True):
    """Positions of the rows of a verdict, of images that are classified right or wrong."""
    return [
        i
        for i, row in enumerate(witness.rows)
        if row["verdict"] == verdict and (row["prediction"] == row["label"]) == right
    ]


# --- one value of one row ---------------------------------------------------------------------------------------------


def digits_moved(row):
    return row["sha256"][1:] + row["sha256"][0]


def pixel_moved(row):
    """Out of the box, within [0, 1]."""
    point = list(row["adversarial"])
    point[0] += 0.3 if point[0] < 0.5 else -0.3
    return point


# Column -> (which rows, what is written there, the line of the checker once all digests and counts agree).
COLUMNS = {
    "index, next": ({}, "index", lambda row: row["index"] + 1, "twice|another image|is missing|index 24"),
    "index, far": ({}, "index", lambda row: 10**12, "index 1000000000000, the test set has|out of order"),
    "index, negative": ({}, "index", lambda row: -3, "index -3"),
    "sha256": ({}, "sha256", digits_moved, "another image"),
    "label": ({}, "label", lambda row: (row["label"] + 1) % 3, "label ., the data set says"),
    "prediction": ({}, "prediction", lambda row: (row["prediction"] + 1) % 3, "prediction"),
    "prediction, none": ({}, "prediction", lambda row: -1, "prediction"),
    "prediction, far": ({}, "prediction", lambda row: 2**62, "prediction"),
    "epsilon, 0": ({}, "epsilon", lambda row: 0.0, "has epsilon 0.0"),
    "epsilon, next": ({}, "epsilon", lambda row: np.nextafter(row["epsilon"], 0), "has epsilon"),
    "epsilon, negative": ({}, "epsilon", lambda row: -row["epsilon"], "has epsilon -"),
    "epsilon, NaN": ({}, "epsilon", lambda row: float("nan"), "has epsilon nan"),
    "method": ({}, "method", lambda row: "crown", "has method crown"),
    "tree": ({}, "tree", lambda row: b"leaves", "a tree belongs where branch and bound has proved"),
    "arithmetic": ({}, "arithmetic", lambda row: "bf16", "has arithmetic bf16"),
    "margin, better": ({}, "margin", lambda row: row["margin"] + 1e-3, "the margin is"),
    "margin, worse": ({}, "margin", lambda row: row["margin"] - 1e-3, "the margin is"),
    "margin, NaN": ({}, "margin", lambda row: float("nan"), "the margin is"),
    "margin, infinite": ({}, "margin", lambda row: float("inf"), "the margin is"),
    "proved to unknown": ({"verdict": "proved"}, "verdict", lambda row: "unknown", "verdict unknown, but the margin"),
    "proved to attacked": ({"verdict": "proved"}, "verdict", lambda row: "attacked", "attacked, but the margin"),
    "unknown to proved": ({"verdict": "unknown"}, "verdict", lambda row: "proved", "verdict proved, but the margin"),
    "unknown to attacked": ({"verdict": "unknown"}, "verdict", lambda row: "attacked", "adversarial image belongs"),
    "attacked to proved": ({"verdict": "attacked"}, "verdict", lambda row: "proved", "verdict proved, but the margin"),
    "attacked to unknown": ({"verdict": "attacked"}, "verdict", lambda row: "unknown", "adversarial image belongs"),
    "wrong to unknown": (
        {"verdict": "attacked", "right": False}, "verdict", lambda row: "unknown", "the prediction is not the label",
    ),
    "another word": ({}, "verdict", lambda row: "open", "unknown verdict 'open'"),
    "point, outside": ({"verdict": "attacked"}, "adversarial", pixel_moved, "not within epsilon"),
    "point, too short": ({"verdict": "attacked"}, "adversarial", lambda row: row["adversarial"][1:], "not within"),
    "point, NaN": (
        {"verdict": "attacked"}, "adversarial", lambda row: [float("nan"), *row["adversarial"][1:]], "not within"
    ),
    "point, dropped": ({"verdict": "attacked"}, "adversarial", lambda row: None, "adversarial image belongs"),
    "point, none needed": ({"verdict": "proved"}, "adversarial", lambda row: [0.5] * 9, "adversarial image belongs"),
}  # fmt: skip


def test_every_column_is_forged_below():
    assert {column for _, column, _, _ in COLUMNS.values()} == set(schema().names)


@pytest.mark.parametrize("name", COLUMNS)
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_forged_value_is_refused(name, witness, file, data):
    """As it is, by the column's digest or an earlier look at it; with digests and counts put right, by proof."""
    which, column, change, reason = COLUMNS[name]
    rows = witness.rows
    position = data.draw(st.sampled_from(rows_with(witness, **which) if which else range(len(rows))))
    rows[position] = {**rows[position], column: change(rows[position])}
    write(file, rows, witness.header)
    witness.refuses(file, f"column {column} is not|has {column}|index|the header says|unknown verdict")
    header = with_columns(witness.header, rows)
    claims = [dict(claim) for claim in header["claims"]]
    for claim, part in zip(claims, (rows[:IMAGES], rows[IMAGES:]), strict=True):
        claim.update(
            {verdict: sum(r["verdict"] == verdict for r in part) for verdict in ("proved", "attacked", "unknown")}
        )
    write(file, rows, sealed({**header, "claims": claims}))
    witness.refuses(file, reason)


def test_a_point_with_a_null_is_refused(witness, file):
    rows = witness.rows
    (position, *_) = rows_with(witness, "attacked")
    rows[position] = {**rows[position], "adversarial": [None, *rows[position]["adversarial"][1:]]}
    write(file, rows, witness.header)
    witness.refuses(file, "corrupt")


def test_what_nobody_thought_of_is_refused_by_the_row(witness, file, monkeypatch):
    monkeypatch.setattr(SavedNetwork, "classifier_input", lambda *_: 1 / 0)
    witness.refuses(file, "index 0: it cannot be checked .ZeroDivisionError")


def test_rows_that_change_while_they_are_checked_are_refused(witness, file, monkeypatch):
    """Counted first and proved then, in two passes: both must be of the rows that the header is about."""

    def count_and_replace(*args):
        claims = check_coverage(*args)
        rows = [row for row in witness.rows if row["verdict"] == "proved"]
        write(file, rows, witness.header)
        return claims

    monkeypatch.setattr("certtrain.verification.checker.check_coverage", count_and_replace)
    witness.refuses(file, "column index is not what was written")


def test_the_image_itself_is_no_attack(witness, file):
    rows = witness.rows
    for position in rows_with(witness, "attacked"):
        image = (witness.images[rows[position]["index"]].astype(np.float32) / np.float32(255)).ravel().tolist()
        rewrite(file, [*rows[:position], {**rows[position], "adversarial": image}, *rows[position + 1 :]])
        witness.refuses(file, "classified as the label")


def test_an_attack_that_is_dropped_shows_in_the_counts(witness, file):
    rows = witness.rows
    position = rows_with(witness, "attacked")[0]
    rows[position] |= {"verdict": "unknown", "adversarial": None}
    rewrite(file, rows)
    claim = witness.header["claims"][position // IMAGES]
    witness.refuses(file, f"{claim['attacked'] - 1} attacked, the header says {claim['attacked']}")


# --- the set of rows --------------------------------------------------------------------------------------------------

SETS = {
    "the first is dropped": (lambda rows: rows[1:], "index 0 is missing"),
    "one is dropped": (lambda rows: rows[:5] + rows[6:], "index 5 is missing"),
    "the last of a radius is dropped": (lambda rows: rows[:23] + rows[24:], "index 23 is missing"),
    "one is there twice": (lambda rows: rows[:6] + rows[5:], "49 rows, 2 claims on 24 images have .* at most 48"),
    "one replaces another": (lambda rows: [*rows[:6], rows[5], *rows[7:]], "index 5 is there twice"),
    "one row again and again": (lambda rows: [rows[0]] * IMAGES, "index 0 is there twice"),
    "two are swapped": (lambda rows: [rows[1], rows[0], *rows[2:]], "index 0 comes after 1, out of order"),
    "backwards": (lambda rows: rows[IMAGES - 1 :: -1] + rows[IMAGES:], "out of order"),
    "none": (lambda rows: [], "0 rows"),
    "only the proved": (lambda rows: [row for row in rows if row["verdict"] == "proved"], "is missing"),
    "a radius between the others": (
        lambda rows: [*rows[:3], {**rows[3], "epsilon": 0.07}, *rows[4:]], "certificates for 23 of|has epsilon"
    ),
    "each row of the other radius": (
        lambda rows: [{**row, "epsilon": RADII[row["epsilon"] == RADII[0]]} for row in rows], "the margin is"
    ),
    "of another arithmetic": (lambda rows: [{**row, "arithmetic": "float64"} for row in rows], "the margin is"),
    "of another method": (lambda rows: [{**row, "method": "alpha-crown"} for row in rows], "cannot be checked"),
    "radius 0": (lambda rows: [{**row, "epsilon": 0.0} for row in rows[:IMAGES]], "the margin is"),
}  # fmt: skip


@pytest.mark.parametrize("name", SETS)
def test_another_set_of_rows_is_refused(name, witness, file):
    """As it is, and with digests, counts and configuration put right."""
    change, reason = SETS[name]
    rows = change(witness.rows)
    write(file, rows, witness.header)
    witness.refuses(file, "rows|twice|out of order|is missing|has epsilon|has arithmetic|has method")
    rewrite(file, rows)  # digests only
    witness.refuses(file, "rows|twice|out of order|is missing|has epsilon|has arithmetic|has method")
    rewrite(file, rows, claims=True)
    witness.refuses(file, reason)


def test_what_is_left_out_is_permitted_only_when_asked_for(witness, file):
    rewrite(file, witness.rows[:5] + witness.rows[6:], claims=True)
    claims = witness.check(file, allow_partial=True)
    assert [claim.images for claim in claims] == [IMAGES - 1, IMAGES]
    rewrite(file, witness.rows[:5] + witness.rows[4:], claims=True)
    with pytest.raises(CertificateError):
        witness.check(file, allow_partial=True)


# --- the header -------------------------------------------------------------------------------------------------------

HEADERS = {
    "format 1": ({"format": 1}, "format 1; this version reads and writes format 3"),
    "format": ({"format": 99}, "format 99"),
    "model_sha256": ({"model_sha256": "0" * 64}, "another model: its model.safetensors"),
    "model": ({"model": {"num_classes": 4}}, r"another model: its model\.json"),
    "data set": ({"data": {"name": "digits"}}, "about the data set digits, not npz"),
    "number of images": ({"data": {"images": IMAGES - 1}}, "23 test images, npz has 24"),
    "test set": ({"data": {"sha256": "0" * 64}}, "other test images or labels"),
    "config, data": ({"config": {"data": {"name": "digits"}}}, "config is about the data set digits"),
    "config, epsilon": ({"config": {"verification": {"eps": [0.0, 0.1]}}}, "config has the radii"),
    "config, a radius beyond all numbers": ({"config": {"verification": {"eps": [10**400]}}}, "config does not name"),
    "config, empty": ({"config": {"data": None}}, "config does not name"),
    "columns": ({"columns": {"margin": "0" * 64}}, "column margin is not what was written"),
    "type": ({"model_sha256": 5}, "model_sha256 = 5, which is no str"),
    "besides": ({"more": 1}, "has more besides"),
    "no claims": ({"claims": []}, "0 claims|claims 0"),
    "claims of another type": ({"claims": {}}, "claims"),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_a_forged_header_is_refused(name, witness, file):
    changes, reason = HEADERS[name]
    header = merged(witness.header, changes)
    write(file, witness.rows, header)
    witness.refuses(file, "the header is not what was written|format|which is no|besides|claims")
    write(file, witness.rows, sealed(header))
    witness.refuses(file, reason)


FIELDS = ("format", "model_sha256", "model", "data", "claims", "config", "versions", "columns", "sha256")


@pytest.mark.parametrize("field", FIELDS)
def test_a_header_that_lacks_something_is_refused(field, witness, file):
    assert set(FIELDS) == set(witness.header)
    header = without(witness.header, field)
    write(file, witness.rows, header if field == "sha256" else sealed(header))
    witness.refuses(file, f"cannot be read|{field}")


CLAIMS = {
    "epsilon": (0.15, "config has the radii"),
    "arithmetic": ("bf16", "has arithmetic float32"),
    "method": ("crown", "has method ibp"),
    "images": (IMAGES + 1, "rows, its header claims"),
    "proved": (IMAGES, "proved, the header says"),
    "attacked": (0, "attacked, the header says"),
    "unknown": (1000, "unknown, the header says"),
}


@pytest.mark.parametrize("field", CLAIMS)
@pytest.mark.parametrize("position", [0, 1])
def test_a_forged_claim_is_refused(field, position, witness, file):
    value, reason = CLAIMS[field]
    assert set(CLAIMS) == set(witness.header["claims"][0])
    claims = [dict(claim) for claim in witness.header["claims"]]
    claims[position][field] = value
    rewrite(file, header={"claims": claims})
    witness.refuses(file, reason)
    claims[position] = without(claims[position], field)
    rewrite(file, header={"claims": claims})
    witness.refuses(file, f"a claim lacks {field}")


def test_a_radius_that_is_claimed_twice_is_refused(witness, file):
    (first, _), rows = witness.header["claims"], witness.rows[:IMAGES] * 2
    config = {"verification": {"eps": [RADII[0]] * 2}}
    rewrite(file, rows, header={"claims": [first, first], "config": config})
    witness.refuses(file, "claimed twice")


# --- images and labels ------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.integers(0, IMAGES * 9 - 1), st.integers(1, 255))
def test_any_other_pixel_is_another_test_set(witness, place, change):
    images = witness.images.copy()
    images.reshape(-1)[place] ^= change
    with pytest.raises(CertificateError, match="other test images or labels"):
        Witness(witness.file, witness.network, images, witness.labels).check(witness.file)


def test_other_labels_fewer_images_or_another_order_are_another_test_set(witness):
    images, labels = witness.images, witness.labels
    for changed in ((images, (labels + 1) % 3), (images[::-1], labels[::-1]), (images.reshape(-1, 1, 9, 1), labels)):
        with pytest.raises(CertificateError, match="other test images or labels"):
            Witness(witness.file, witness.network, *changed).check(witness.file)
    with pytest.raises(CertificateError, match="24 test images, npz has 23"):
        Witness(witness.file, witness.network, images[:-1], labels[:-1]).check(witness.file)


# --- the file ---------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_flipped_bit_is_refused_or_changes_nothing(witness, file, data):
    content = bytearray(witness.file.read_bytes())
    start = data.draw(st.sampled_from(range(8)))  # an eighth of the file: the header is the larger part
    position = data.draw(st.integers(start * len(content) // 8, (start + 1) * len(content) // 8 - 1))
    content[position] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(content)
    with suppress(CertificateError):
        witness.check(file)
        assert (rows_of(file), header_of(file)) == (witness.rows, witness.header)  # reached where nothing was raised


@pytest.fixture
def unread(monkeypatch):
    """No row may be read: sizes are looked at before."""
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda *_, **__: pytest.fail("read rows"))


def repeated(witness, count, **columns):
    """A table of one row, `count` times."""
    row = {**witness.rows[0], "adversarial": None}
    table = pa.Table.from_pylist([row], schema()).take(pa.array(np.zeros(count, dtype=np.int64)))
    for name, values in columns.items():
        table = table.set_column(table.schema.names.index(name), schema().field(name), values)
    return table


def write_table(file, table, header):
    pq.write_table(table.replace_schema_metadata({METADATA: json.dumps(sealed(header)).encode()}), file)


@pytest.mark.parametrize("claimed", [IMAGES, 3_000_000])
def test_three_million_rows_are_refused_unread(claimed, witness, file, unread):
    (claim, _) = witness.header["claims"]
    header = {**witness.header, "claims": [{**claim, "images": claimed}]}
    write_table(file, repeated(witness, 3_000_000), header)
    assert file.stat().st_size < 2**20
    witness.refuses(file, "3000000 rows")


def test_values_that_are_too_large_are_refused_unread(witness, file, unread):
    (claim, _) = witness.header["claims"]
    header = {**witness.header, "claims": [{**claim, "images": 1}]}
    endless = pa.array([[0.0] * 10**6], type=pa.list_(pa.float32()))
    write_table(file, repeated(witness, 1, adversarial=endless), header)
    witness.refuses(file, "column adversarial.* is larger than 1 rows can be")
    write_table(file, repeated(witness, 1, method=pa.array(["x" * 10**6])), header)
    witness.refuses(file, "column method is larger")


def test_other_columns_and_headers_that_are_none_are_refused(witness, file):
    table = pq.read_table(witness.file)
    narrow = pa.schema([field.with_type(pa.int32()) if field.name == "label" else field for field in schema()])
    more = table.append_column("more", pa.array([0] * len(table)))
    for changed in (table.drop_columns(["margin"]), more, table.cast(narrow)):
        write_table(file, changed, witness.header)
        witness.refuses(file, "does not have the columns")
    for content in (
        b"",
        b"[]",
        b"null",
        b"{",
        b'"format"',
        b"[" * 10**5,
        b"\xff",
        b'{"format": [3]}',
        b'{"format": 3}',
    ):
        pq.write_table(table.replace_schema_metadata({METADATA: content}), file)
        witness.refuses(file, "the header|format")
    pq.write_table(table.replace_schema_metadata({METADATA: b" " * 2**23}), file)
    witness.refuses(file, "holds no certificates")


def test_what_has_no_prediction_is_not_certified(witness, tmp_path):
    data = Split(torch.from_numpy(witness.images), torch.from_numpy(witness.labels))
    model = build_model(**witness.network.architecture).eval()
    (result,) = verify(model, data, 0.1, arithmetic="float32")
    result.prediction[3] = -1
    config = {"data": {"name": "npz"}, "verification": {"eps": [0.1]}}
    with pytest.raises(CertificateError, match=re.escape("index 3: logits that are no numbers")):
        write_certificates(
            tmp_path / "c.parquet", [result], data, witness.file.parent / "model.safetensors", config, {}
        )
