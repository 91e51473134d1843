"""A short, repeatable run of scripts/fuzz.py, and its own machinery: what a finding is, shrinking, resuming."""

from __future__ import annotations

import json
import sys
import warnings
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import nn

from certtrain.bounds import BoundedModel, interval
from certtrain.bounds.batch_norm import scale_shift
from certtrain.bounds.interval import RULES
from certtrain.bounds.operations.movement import identity
from certtrain.bounds.rounding import propagation, rules
from certtrain.errors import UnsupportedOperation

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import fuzz
import fuzz_networks
from fuzz import Counts, examined, shrunk
from fuzz_networks import LAYERS, Recipe

FIRST = 1_000_000  # far from the seeds of long runs


@pytest.fixture(autouse=True)
def quiet_and_single():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_random_networks():
    """A few, in which layers meet; each alone is examined below, and some hundred thousand by the script."""
    counts = Counts()
    findings = []
    for _ in fuzz.fuzz(FIRST, 50, counts, lambda recipe, finding: findings.append((recipe, finding))):
        pass
    assert findings == []
    assert counts.refused < 25
    assert counts.skipped < 5
    assert counts.checks["sound, float32"] - counts.refusals["sound, float32"] > 10


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted({kind for kind, _ in LAYERS}))
def test_a_network_of_each_layer(kind):
    for name in [name for k, name in LAYERS if k == kind]:
        layers = [("flatten", "flatten", 1), ("end", "linear", 2)]
        at = {"flatten": slice(0, 1), "end": slice(1, 2), "features": slice(1, 1)}.get(kind, slice(0, 0))
        layers[at] = [(kind, name, 0)]
        assert examined(Recipe(5, tuple(layers)), Counts()) is None, name


@pytest.mark.slow
def test_the_layers_contain_every_rule():
    used = {scale_shift, identity}  # what BatchNorm becomes, and what a recording leaves out
    for kind, name in LAYERS:
        layers = [("flatten", "flatten", 1), ("end", "linear", 2)]
        at = {"flatten": slice(0, 1), "end": slice(1, 2), "features": slice(1, 1)}.get(kind, slice(0, 0))
        layers[at] = [(kind, name, 0)]
        with suppress(UnsupportedOperation):
            model = Recipe(5, tuple(layers)).network()
            used |= {step.function for step in BoundedModel(model, torch.rand(1, *fuzz_networks.IMAGE)).graph.steps}
    assert {function.__name__ for function in RULES.keys() - used} == set()


def test_a_wrong_rule_is_found_shrunk_and_reproduced_from_its_file(monkeypatch, tmp_path):
    def without_offset(x, weight, bias=None, *settings):
        return interval.weighted(nn.functional.conv2d)(x, weight, None, *settings)

    monkeypatch.setitem(RULES, nn.functional.conv2d, without_offset)
    recipe = Recipe(4, (("image", "ReLU", 0), ("image", "conv", 1), ("image", "scale", 2), ("flatten", "mean", 3),
                        ("features", "linear", 4), ("end", "large logits", 5)))  # fmt: skip
    smallest, finding = shrunk(recipe, examined(recipe, Counts()))
    assert finding.check.startswith("ibp")
    assert smallest.layers == (("image", "conv", 1), ("flatten", "flatten", 0), ("end", "linear", 0))
    results = fuzz.Results(tmp_path / "fuzz.json")
    results.add(smallest, finding)
    assert fuzz.read_recipe(tmp_path / "fuzz-findings" / "4.json") == smallest


def test_a_missing_rounding_is_found(monkeypatch):
    for module, name in ((rules, "sum_error"), (rules, "elementwise_error"), (propagation, "sum_error")):
        monkeypatch.setattr(module, name, lambda *args: 0.0)
    recipes = [Recipe(seed, (("image", "conv", 0), ("flatten", "flatten", 1), ("end", "linear", 2)))
               for seed in range(0, 40, 4)]  # fmt: skip
    found = [examined(recipe, Counts()) for recipe in recipes]
    assert any(finding is not None and finding.check.startswith("sound") for finding in found)


def test_a_run_goes_on_where_it_stopped(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(fuzz, "examined", lambda recipe, counts: asked.append(recipe.seed))
    for networks in (3, 5):
        monkeypatch.setattr(
            sys, "argv", ["fuzz.py", "--networks", str(networks), "--out", str(tmp_path / "a" / "fuzz.json")]
        )
        assert fuzz.main() == 0
    assert asked == [0, 1, 2, 3, 4]
    assert json.loads((tmp_path / "a" / "fuzz.json").read_text())["next_seed"] == 5


def test_recipes_are_repeatable():
    for seed in range(20):
        one, other = (fuzz_networks.Recipe.drawn(seed) for _ in range(2))
        assert one == other
        for a, b in zip(one.network().parameters(), other.network().parameters(), strict=True):
            assert torch.equal(a, b)
