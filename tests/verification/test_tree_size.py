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
import torch
from hypothesis import given, settings
from rich.console import Console
from torch import nn

from certtrain.bounds.linear.beta import Ascent
from certtrain.data import Split
from certtrain.errors import CertificateError
from certtrain.models import build_model
from certtrain.verification import branch_and_bound as searching
from certtrain.verification import trees as reading
from certtrain.verification.branch_and_bound import Search, branch_and_bound
from certtrain.verification.certificates import (
    Certificates,
    Claim,
    Header,
    ImageSet,
    read_certificates,
    schema,
    write_certificates,
)
from certtrain.verification.checker import SavedNetwork, check
from certtrain.verification.trees import MOST_BYTES, MOST_PACKED, Trees
from certtrain.verification.verdicts import Verdict
from certtrain.verification.verify import verify
from tests.commands import one_thread
from tests.networks import save_model
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


ARCHITECTURE = {"name": "mlp", "image_shape": [1, 3, 3], "num_classes": 3, "options": {"widths": [12, 12]}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The network and images, and the folder that it is saved in."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(1)
    model = build_model(**ARCHITECTURE).eval()
    images = torch.randint(0, 256, (60, 1, 3, 3), dtype=torch.uint8)
    with one_thread(), torch.no_grad():
        last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
        last.bias.sub_(model(images / 255).mean(0))  # so that there is something to search for
        save_model(folder, model, ARCHITECTURE)
        return model, Split(images, model(images / 255).argmax(1)), folder / "model.safetensors"


def verified(model, data, arithmetic="float32", kept=True):
    search = Search(timeout=math.inf, ascent=Ascent(steps=2), keep_leaves=kept)
    with one_thread():
        return verify(model, data, 0.05, ["ibp", "branch-and-bound"], arithmetic=arithmetic, search=search)


@pytest.mark.parametrize("arithmetic", [None, "float32"])
def test_trees_are_kept_for_certificates_alone(arithmetic, saved, monkeypatch):
    """Whatever they would take, nobody's search ends for their sake who has not asked for them."""
    model, data, _ = saved
    monkeypatch.setattr(searching, "MOST_BYTES", 0)
    (found,) = verified(model, data, arithmetic, kept=False)
    assert found.domains > 60
    assert set(found.verdicts) <= {Verdict.PROVED, Verdict.ATTACKED}
    assert not found.trees


def test_certificates_of_proofs_whose_trees_are_too_large_claim_less(saved, monkeypatch, tmp_path):
    """An image that is proved but for its tree has no proof that could be checked, nor a margin above 0."""
    model, data, weights = saved
    file, network = tmp_path / "certificates.parquet", SavedNetwork.read(weights)
    config = {"data": {"name": "npz"}, "epsilon": {"max": 0.05}, "verification": {"eps": [0.05]}}
    proofs = []
    for most in (MOST_BYTES, 0):
        monkeypatch.setattr(searching, "MOST_BYTES", most)
        results = verified(model, data)
        given_up = torch.tensor([verdict == Verdict.MEMORY for verdict in results[0].verdicts])
        assert (results[0].margin[given_up] <= 0).all()
        write_certificates(file, results, data, weights, config, {"certtrain": "0"})
        claims = check(
            read_certificates(file), network, "npz", data.images.numpy(), data.labels.numpy(), Console(quiet=True)
        )
        proofs.append(sum(claim.proved for claim in claims))
        assert proofs[-1] == int(results[0].proved.sum())
        assert given_up.any() == (most == 0)
    assert proofs[0] > proofs[1]


@pytest.mark.parametrize("fits", [pytest.param(True, marks=pytest.mark.slow), False])
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
