"""scripts/deployed_forms.py on two networks and a few points; the compiled form, which takes long to make, left out."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from certtrain.bounds.rounding import propagation, rules

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import deployed_forms
from deployed_forms import FORMS, RADII, examine

QUICK = {name: make for name, make in FORMS.items() if name != "compiled"}


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    monkeypatch.setattr(deployed_forms, "IMAGES", 16)


@pytest.mark.parametrize("name", ["mlp", "cnn-small"])
def test_no_form_leaves_the_sound_box(name):
    counts = examine(name, len(RADII), seed=7, forms=QUICK)
    assert counts.outside == counts.below == 0
    assert counts.logits == dict.fromkeys(QUICK, len(RADII) * 16 * deployed_forms.POINTS * deployed_forms.CLASSES)
    assert 0 < counts.largest_share < 1


def test_bounds_without_rounding_are_left(monkeypatch):
    for module, name in ((rules, "sum_error"), (rules, "elementwise_error"), (propagation, "sum_error")):
        monkeypatch.setattr(module, name, lambda *args: 2.0**-40)
    counts = examine("mlp", 1, seed=7, forms=QUICK)
    assert counts.outside > 0
    assert counts.below > 0
