"""How large trees of branch and bound may be: what is searched, written and read agree on it."""

from __future__ import annotations

import math
import zlib
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings

from certtrain.bounds.linear.beta import Ascent
from certtrain.errors import CertificateError
from certtrain.verification import branch_and_bound as searching
from certtrain.verification import trees as reading
from certtrain.verification.branch_and_bound import Search, branch_and_bound
from certtrain.verification.certificates import Certificates, Claim, Header, ImageSet, schema
from certtrain.verification.trees import MOST_BYTES, MOST_PACKED, Trees
from certtrain.verification.verdicts import Verdict
from tests.verification.test_branch_and_bound import SEVERAL

FLOATS = st.sampled_from([np.float32, np.float64])


@given(sizes=st.tuples(*[st.integers(0, 20)] * 3), multiplier=FLOATS, slopes=FLOATS)
@settings(deadline=None)
def test_trees_take_no_more_than_is_counted(sizes, multiplier, slopes):
    undecided, leaves, splits = sizes
    shapes = {"undecided": undecided, "target": leaves, "splits": leaves, "neuron": splits, "above": splits,
              "multiplier": splits, "slopes": (leaves, undecided)}  # fmt: skip
    kinds = {"above": bool, "multiplier": multiplier, "slopes": slopes}
    trees = Trees(**{name: np.ones(shape, kinds.get(name, np.int64)) for name, shape in shapes.items()})
    assert len(zlib.decompress(trees.to_bytes())) <= Trees.most_bytes(undecided, leaves, splits)


@pytest.mark.parametrize("kept", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_search_ends_before_its_trees_are_too_large_to_be_read(kept, monkeypatch):
    network, record, labels, margins = SEVERAL
    search = Search(timeout=math.inf, ascent=Ascent(steps=2), keep_leaves=True)
    alone = branch_and_bound(network, record, labels, margins, search)
    sizes = [len(zlib.decompress(outcome.trees().to_bytes())) for outcome in alone if outcome.leaves]
    assert len(sizes) > 1
    for most in (min(sizes) - 1, 2 * max(sizes)):
        monkeypatch.setattr(searching, "MOST_BYTES", most)
        monkeypatch.setattr(reading, "MOST_BYTES", most)
        outcomes = branch_and_bound(network, record, labels, margins, replace(search, keep_leaves=kept))
        for outcome, other in zip(outcomes, alone, strict=True):
            if kept and other.leaves and most < max(sizes):
                assert outcome.verdict == Verdict.MEMORY
                with pytest.raises(CertificateError, match="larger than any search makes it"):
                    Trees.from_bytes(other.trees().to_bytes(), 3, 12)
                continue
            assert outcome.verdict == other.verdict
            Trees.from_bytes(outcome.trees().to_bytes(), 3, 12)


@pytest.mark.parametrize("fits", [True, False])
def test_trees_as_large_as_a_search_may_keep_are_not_refused_for_their_size(fits, tmp_path):
    """One row, of bytes that zlib cannot make smaller: what is read of them is not more than was searched."""
    packed = zlib.compress(np.random.default_rng(0).bytes(MOST_BYTES), 1) if fits else bytes(MOST_PACKED + 2**17)
    assert (len(packed) > MOST_PACKED) != fits
    row = dict.fromkeys(("index", "label", "prediction", "epsilon", "margin"), 0)
    row |= {**dict.fromkeys(("sha256", "method", "arithmetic", "verdict"), ""), "tree": packed}
    pq.write_table(pa.Table.from_pylist([row], schema()), tmp_path / "c.parquet", compression="zstd")
    claims = (Claim(0.1, "float32", "branch-and-bound", 1, 1, 0, 0),)
    certificates = Certificates(tmp_path / "c.parquet", Header(3, "", {}, ImageSet("d", 1, ""), claims, {}, {}, {}))
    if fits:
        certificates.check_size(1, 64)
        return
    with pytest.raises(CertificateError, match="column tree is larger than 1 rows can be"):
        certificates.check_size(1, 64)
