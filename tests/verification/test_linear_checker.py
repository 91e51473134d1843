"""The checker's linear bounds against the verifier's, and trees that have been tampered with."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import struct
import zlib

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from certtrain.bounds import BoundedModel, Box
from certtrain.bounds.linear import crown_margins, tightened
from certtrain.bounds.linear.beta import Ascent, Neurons
from certtrain.errors import CertificateError
from certtrain.models import build_model
from certtrain.runs.checkpoint import load_model
from certtrain.verification.branch_and_bound import Search, branch_and_bound
from certtrain.verification.checker import SavedNetwork, linear
from certtrain.verification.checker.linear import LinearChecker, Recording
from certtrain.verification.pixels import pixel_box
from certtrain.verification.trees import Trees, covers
from certtrain.verification.verdicts import Verdict
from tests.networks import randomized, save_model

NORMALISED = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25)}
NETWORKS = {
    "mlp": ("mlp", (3, 4, 4), {"widths": [8, 6]}),
    "cnn-small": ("cnn-small", (3, 8, 8), {"width": 2, "linear_width": 8}),
    "cnn-2layer": ("cnn-2layer", (3, 9, 11), {"width": 1, "linear_width": 6}),  # whose windows leave rows over
    "cnn-3layer": ("cnn-3layer", (3, 9, 10), {"width": 1, "kernel": 5, "linear_width": 6}),
    "cnn7": ("cnn7", (3, 8, 8), {"width": 2, "linear_width": 6}),
    "wide-resnet": ("wide-resnet", (3, 8, 8), {"base_width": 2, "widen_factor": 2, "linear_width": 6}),
    "resnext": ("resnext", (3, 8, 8), {"stem_width": 3, "bottleneck_width": 2, "blocks": 2, "linear_width": 6}),
}


def saved(name, folder):
    torch.manual_seed(0)
    architecture, shape, options = NETWORKS[name]
    settings_ = {"name": architecture, "image_shape": shape, "num_classes": 5, **NORMALISED, "options": options}
    save_model(folder, randomized(build_model(**settings_)), settings_)
    return load_model(folder).eval(), SavedNetwork.read(folder / "model.safetensors")


def question(model, eps, seed=0):
    """An image, as pixels and as a box, and everything that is known of it before a search."""
    shape = (1, *model.image_shape) if hasattr(model, "image_shape") else (1, 3, 8, 8)
    pixels = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    net = BoundedModel(model, pixels.float() / 255)
    box = pixel_box(pixels, eps)
    bounds = net.recorded(box, arithmetic="float32")
    with torch.no_grad():
        label = model(pixels.float() / 255).argmax(1)
        record = tightened(bounds.recorded, 64)
        margins = crown_margins(dataclasses.replace(bounds, record=record), label)
    return box, record, label, margins


def test_a_tree_of_numbers_that_numpy_does_not_have_is_refused():
    header = json.dumps({"slopes": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}).encode()
    content = struct.pack("<Q", len(header)) + header + b"\0\0"
    with pytest.raises(CertificateError, match="cannot be read"):
        Trees.from_bytes(zlib.compress(content), 3, 4)


@pytest.fixture(params=NETWORKS)
def network(request, tmp_path):
    model, checked = saved(request.param, tmp_path)
    model.image_shape = NETWORKS[request.param][1]
    return model, checked


def checker_of(checked, box):
    found = checked.linear_bounds(box.lower[0].numpy(), box.upper[0].numpy(), "float32")
    for _ in found.tightening():
        pass
    return found


def test_boxes_and_margins_are_the_verifiers(network):
    model, checked = network
    box, record, label, margins = question(model, 0.02)
    found = checker_of(checked, box)
    sides = [record.boxes[index] for index in Neurons.of(record).values]
    assert len(found.boxes) == len(sides)
    unstable = 0
    for box, expected in zip(found.boxes.values(), sides, strict=True):
        np.testing.assert_allclose(box.lower[0], expected.lower[0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(box.upper[0], expected.upper[0], rtol=1e-5, atol=1e-5)
        unstable += int(((box.lower < 0) & (box.upper > 0)).sum())
    assert unstable > 2
    expected = margins[0].numpy()
    lower = found.margins(int(label), 5)
    lower[int(label)] = 0
    np.testing.assert_allclose(lower, expected, rtol=1e-5, atol=1e-5)


def proved_by_search(name, folder, least):
    """A network, changed until a search proves it with so many splits; box, label, and what the search found."""
    model, _ = saved(name, folder)
    model.image_shape = NETWORKS[name][1]
    search = Search(timeout=math.inf, keep_leaves=True, ascent=Ascent(steps=3), domains=8)
    for eps, share in itertools.product((0.1, 0.03), (0.2, 0.1, 0.3, 0.5)):
        box, _, label, margins = question(model, eps)
        corners = torch.rand(500, *model.image_shape, generator=torch.Generator().manual_seed(0)) > 0.5
        with torch.no_grad():
            reached = model(torch.where(corners, box.upper, box.lower).float())
            least_reached = (reached[:, label] - reached).amin(0)
            # So that what is reached is above 0 and what is known below it.
            shift = share * least_reached + (1 - share) * margins[0]
            model.network[-1].bias += shift.float() - shift[label].float()
        save_model(folder, model, json.loads((folder / "model.json").read_text())["model"])
        box, record, label, margins = question(model, eps)
        points = Box(box.lower.float(), box.upper.float())
        (outcome,) = branch_and_bound(model, record, label, margins, search, points)
        if outcome.verdict == Verdict.PROVED and sum(len(leaf.splits) for leaf in outcome.leaves) >= least:
            return SavedNetwork.read(folder / "model.safetensors"), box, label, outcome
    raise AssertionError("no such question")


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    checked, box, label, outcome = proved_by_search("mlp", tmp_path_factory.mktemp("mlp"), least=3)
    return checker_of(checked, box), outcome, int(label)


@pytest.fixture(scope="module")
def proof(searched):
    checker, outcome, label = searched
    return checker, outcome.trees(), label


@pytest.mark.parametrize("leaves", [slice(None), slice(0)])
def test_trees_are_made_of_the_leaves_wherever_the_search_was(searched, leaves):
    """Beside its own bounds on a device from which numpy reads nothing, as on a GPU."""
    outcome = dataclasses.replace(searched[1], leaves=searched[1].leaves[leaves])
    elsewhere = dataclasses.replace(outcome, lower=outcome.lower.to("meta"))
    assert elsewhere.trees().to_bytes() == outcome.trees().to_bytes()


def test_leaves_are_proved_again(searched):
    checker, outcome, label = searched
    trees = Trees.from_bytes(outcome.trees().to_bytes(), 5, checker.neurons)
    lower = checker.leaf_margins(trees, label, 5)
    assert len(trees.target) == len(outcome.leaves)
    assert (lower > 0).all()
    for target in {leaf.target for leaf in outcome.leaves}:
        expected = min(leaf.lower for leaf in outcome.leaves if leaf.target == target)
        assert lower[target] == pytest.approx(expected, rel=1e-3, abs=1e-6)


def changed(trees, name, index, value):
    array = getattr(trees, name).copy()
    array[index] = value
    return dataclasses.replace(trees, **{name: array})


def test_every_missing_leaf_is_noticed(proof):
    checker, trees, label = proof
    for leaf in range(len(trees.target)):
        kept = np.arange(len(trees.target)) != leaf
        splits = np.repeat(kept, trees.splits)
        fewer = Trees(
            undecided=trees.undecided,
            target=trees.target[kept],
            splits=trees.splits[kept],
            neuron=trees.neuron[splits],
            above=trees.above[splits],
            multiplier=trees.multiplier[splits],
            slopes=trees.slopes[kept],
        )
        if trees.target[leaf] not in fewer.target:
            continue  # a class without leaves has to be proved otherwise
        with pytest.raises(CertificateError, match="do not make up the box"):
            checker.leaf_margins(fewer, label, 5)


def test_every_flipped_or_moved_split_is_noticed(proof):
    checker, trees, label = proof
    for split in range(len(trees.neuron)):
        for forged in (
            changed(trees, "above", split, not trees.above[split]),
            changed(trees, "neuron", split, (trees.neuron[split] + 1) % checker.neurons),
        ):
            with pytest.raises(CertificateError, match="do not make up the box"):
                checker.leaf_margins(forged, label, 5)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("slopes", 1.5, "slope"),
        ("slopes", -1e-9, "slope"),
        ("slopes", np.nan, "slope"),
        ("multiplier", -1e-9, "multiplier"),
        ("multiplier", np.nan, "multiplier"),
        ("neuron", 10**9, "neuron is outside"),
        ("neuron", -1, "neuron is outside"),
        ("target", 5, "target is outside"),
        ("splits", 10**6, "do not fit"),
        ("splits", -1, "do not fit"),
    ],
)
def test_what_no_tree_has_is_refused(proof, name, value, message):
    checker, trees, _ = proof
    index = (0, 0) if name == "slopes" else 0
    with pytest.raises(CertificateError, match=message):
        Trees.from_bytes(changed(trees, name, index, value).to_bytes(), 5, checker.neurons)


def two_pixels(seed):
    """Two layers of ReLUs and the sum of both: the checker's bounds of a box, and what points of the box reach.

    Returns the checker, all that enters ReLUs (P, N), and the margins (P, 3) of class 0.
    """
    random = np.random.default_rng(seed)
    shapes = {"first": (4, 2), "second": (4, 4), "last": (3, 4)}
    weights = {f"{name}.weight": random.standard_normal(shape) for name, shape in shapes.items()}
    weights |= {f"{name}.bias": random.standard_normal(shape[0]) for name, shape in shapes.items()}
    radius, center = 10 ** random.uniform(-1, 0), random.random((1, 1, 2))
    recording = Recording(weights, "float64")
    x = recording.flatten(recording.image(center - radius, center + radius))
    first = recording.relu(recording.linear(x, "first"))
    second = recording.relu(recording.linear(first, "second"))
    recording.linear(recording.add(first, second), "last")
    checker = LinearChecker(recording)
    for _ in checker.tightening():
        pass

    def linear(values, name):
        return values @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    steps = np.linspace(-1, 1, 41)  # corners and edges, too
    points = center.ravel() + radius * np.stack(np.meshgrid(steps, steps), -1).reshape(-1, 2)
    entering = linear(points, "first")
    later = linear(np.maximum(entering, 0), "second")
    logits = linear(np.maximum(entering, 0) + np.maximum(later, 0), "last")
    return checker, np.concatenate([entering, later], 1), logits[:, :1] - logits


def any_leaf(checker, random):
    """Some undecided neurons split, with any slopes and multipliers, against class 1 or 2."""
    lower, upper = (np.concatenate([sides[end].ravel() for sides in checker.boxes.values()]) for end in (0, 1))
    undecided = np.flatnonzero((lower < 0) & (upper > 0))
    neuron = random.permutation(undecided)[: random.integers(0, 4)]
    return Trees(
        undecided=undecided,
        target=random.integers(1, 3, 1),
        splits=np.array([len(neuron)]),
        neuron=neuron,
        above=random.random(len(neuron)) < 0.5,
        multiplier=random.choice([0.1, 1, 10]) * random.random(len(neuron)),
        slopes=random.random((1, len(undecided))),
    )


def test_no_slopes_and_multipliers_prove_more_than_is_true(monkeypatch):
    """Of any leaf, whatever the rest of its tree: no point of it is below the bound, and some are hardly above."""
    monkeypatch.setattr(linear, "covers", lambda paths: True)
    apart = []
    for seed in range(20):
        checker, entering, margins = two_pixels(seed)
        random = np.random.default_rng(seed)
        for _ in range(100):
            leaf = any_leaf(checker, random)
            inside = (np.where(leaf.above, 1, -1) * entering[:, leaf.neuron] >= 0).all(1)
            if not inside.any():
                continue
            (target,) = leaf.target
            reached = margins[inside, target].min()
            lower = checker.leaf_margins(leaf, 0, 3)[target]
            assert lower <= reached + 1e-9
            if (leaf.multiplier > 0).any():
                apart.append(reached - lower)
    assert len(apart) > 500
    assert np.quantile(apart, 0.02) < 1e-2


@pytest.mark.parametrize("content", [b"", b"junk", b"x\x9c" + b"\0" * 20])
def test_junk_is_refused(content):
    with pytest.raises(CertificateError, match="cannot be read"):
        Trees.from_bytes(content, 5, 10)


@st.composite
def grown(draw):
    """Leaves of a tree, grown leaf by leaf, in any order."""
    paths = [()]
    for neuron in range(draw(st.integers(0, 6))):
        path = paths.pop(draw(st.integers(0, len(paths) - 1)))
        paths += [(*path, (neuron, True)), (*path, (neuron, False))]
    return draw(st.permutations(paths))


@given(paths=grown(), data=st.data())
@settings(max_examples=100, deadline=None)
def test_leaves_of_a_tree_cover_and_fewer_do_not(paths, data):
    assert covers(paths)
    left_out = data.draw(st.integers(0, len(paths) - 1))
    assert not covers([path for i, path in enumerate(paths) if i != left_out])
