"""The box around stored pixels, against exact fractions and every representation of every neighbour."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from certtrain.bounds import linf_box
from certtrain.data import to_float
from certtrain.verification.pixels import perturbation_box, pixel_box

PIXELS = np.arange(256)
RADII = {
    **{f"{k}/255": (k / 255, Fraction(k, 255)) for k in range(17)},
    "2/255, written out": (0.00784313725490196, Fraction(2, 255)),
    "0.1": (0.1, Fraction(1, 10)),
    "0.3": (0.3, Fraction(3, 10)),
    "0.4": (0.4, Fraction(2, 5)),
    "1": (1.0, Fraction(1)),
}


def representations(stored: np.ndarray) -> list[np.ndarray]:
    """float64 arrays, exactly what the ways to bring stored pixels to [0, 1] compute."""
    single = stored.astype(np.float32)
    quotients = [single / np.float32(255), single * np.float32(1 / 255), single * (np.float32(1) / np.float32(255))]
    return [stored / 255, stored * (1 / 255), *(quotient.astype(np.float64) for quotient in quotients)]


def ends(eps: float) -> tuple[np.ndarray, np.ndarray]:
    box = pixel_box(torch.arange(256, dtype=torch.uint8), eps)
    return box.lower.numpy(), box.upper.numpy()


def check_box(eps: float, exact: Fraction) -> None:
    """The box of radius `eps`, written for `exact`, holds what it must, and little more."""
    lower, upper = ends(eps)
    for pixel, low, high in zip(PIXELS.tolist(), lower.tolist(), upper.tolist(), strict=True):
        least, most = max(Fraction(0), Fraction(pixel, 255) - exact), min(Fraction(1), Fraction(pixel, 255) + exact)
        assert 0 <= Fraction(low) <= least
        assert most <= Fraction(high) <= 1
        assert max(least - Fraction(low), Fraction(high) - most) <= Fraction(2) ** -21
    steps = exact * 255
    for step in range(-int(steps), int(steps) + 1):  # every stored neighbour, in every representation
        valid = (PIXELS + step >= 0) & (PIXELS + step <= 255)
        for value in representations((PIXELS + step)[valid]):
            assert (lower[valid] <= value).all()
            assert (value <= upper[valid]).all()
    for value in representations(PIXELS)[2:]:  # what float32 computes from its own representation of pixel and radius
        for moved in (value.astype(np.float32) - np.float32(eps), value.astype(np.float32) + np.float32(eps)):
            moved = moved.clip(0, 1).astype(np.float64)
            assert ((lower <= moved) & (moved <= upper)).all()


@pytest.mark.parametrize("name", RADII)
def test_every_neighbour_of_every_pixel_is_inside_in_every_representation(name):
    check_box(*RADII[name])


@settings(max_examples=30, deadline=None)
@given(st.fractions(0, 1, max_denominator=1000))
def test_any_radius_that_is_written_as_a_fraction(exact):
    check_box(float(exact), exact)


def test_the_plain_box_lacks_some_of_them():
    """So that the test above tests something: float32 quotients of p ± 8 outside float32(p/255) ± 8/255."""
    centers = PIXELS.astype(np.float32) / np.float32(255)
    outside = 0
    for step in (-8, 8):
        valid = (PIXELS + step >= 0) & (PIXELS + step <= 255)
        moved = (PIXELS + step)[valid].astype(np.float32) / np.float32(255)
        outside += (np.abs(moved.astype(np.float64) - centers[valid].astype(np.float64)) > 8 / 255).sum()
    assert outside == 72


def test_a_radius_per_image_and_the_box_of_each_question():
    images = torch.arange(96, dtype=torch.uint8).view(2, 3, 4, 4)
    eps = torch.tensor([0.1, 0.02], dtype=torch.float64).view(2, 1, 1, 1)
    both = perturbation_box(images, eps, "float32")
    for index, radius in enumerate((0.1, 0.02)):
        alone = pixel_box(images[index], radius)
        assert torch.equal(both.lower[index], alone.lower)
        assert torch.equal(both.upper[index], alone.upper)
    plain, expected = perturbation_box(images, 0.1, None), linf_box(to_float(images), 0.1)
    assert torch.equal(plain.lower, expected.lower)
    assert torch.equal(plain.upper, expected.upper)
    assert perturbation_box(images, eps, None).like.dtype == torch.float32
