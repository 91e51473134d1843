from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
import torch

from certtrain.bounds import Box, linf_box
from certtrain.bounds.rounding.boxes import outward


def test_linf_box_is_the_ball_cut_to_the_valid_range():
    x = torch.tensor([[0.0, 0.05, 0.5, 1.0]], dtype=torch.float64)
    box = linf_box(x, 0.1)
    torch.testing.assert_close(box.lower, torch.tensor([[0.0, 0.0, 0.4, 0.9]], dtype=torch.float64))
    torch.testing.assert_close(box.upper, torch.tensor([[0.1, 0.15, 0.6, 1.0]], dtype=torch.float64))


def test_linf_box_takes_a_radius_per_image_and_no_clip():
    x = torch.zeros(2, 3)
    box = linf_box(x, torch.tensor([[0.1], [2.0]]), clip=None)
    assert box.radius.tolist() == torch.tensor([[0.1] * 3, [2.0] * 3]).tolist()


def test_both_forms_describe_one_set():
    lower, upper = torch.tensor([-1.0, 2.0]), torch.tensor([3.0, 2.0])
    box = Box(lower, upper)
    again = Box.around(box.center, box.radius)
    assert box.center.tolist() == [1.0, 2.0]
    assert box.radius.tolist() == [2.0, 0.0]
    assert torch.equal(again.lower, lower)
    assert torch.equal(again.upper, upper)
    assert box.contains(torch.tensor([3.0, 2.0])).all()
    assert not box.contains(torch.tensor([3.1, 2.0])).all()


@pytest.mark.parametrize("look", ["lower", "upper", "center", "radius"])
@pytest.mark.parametrize("make", [Box, Box.around])
def test_a_look_without_gradients_takes_none_from_the_next(make, look):
    values = torch.tensor([[1.0, 2.0], [2.0, 4.0]], requires_grad=True)
    (expected,) = torch.autograd.grad(getattr(make(*values), look).sum(), values)
    box = make(*values)
    with torch.no_grad():
        getattr(box, look)
    (found,) = torch.autograd.grad(getattr(box, look).sum(), values)
    assert torch.equal(found, expected)


LARGEST, SMALLEST, NORMAL = torch.finfo(torch.float32).max, 2.0**-149, 2.0**-126
ENDS = [(LARGEST, LARGEST), (-LARGEST, -1e38), (-LARGEST, LARGEST), (2e38, 2.2e38), (1.0, 1 + 2**-23), (0.1, 0.7)]
SMALL_ENDS = [(SMALLEST, SMALLEST), (0.0, SMALLEST), (-SMALLEST, 3 * SMALLEST), (NORMAL - SMALLEST, NORMAL + SMALLEST)]


@pytest.mark.parametrize(("low", "high"), ENDS + SMALL_ENDS)
def test_a_center_lies_in_the_middle_of_ends_of_any_size(low, high):
    """The nearest number to it; of ends that lose their last bits when they are halved, one of the nearest two."""
    lower, upper = torch.tensor([low]), torch.tensor([high])
    exact = (Fraction(lower.item()) + Fraction(upper.item())) / 2
    center = Box(lower, upper).center
    if (low, high) in SMALL_ENDS:
        assert abs(Fraction(center.item()) - exact) <= Fraction(SMALLEST)
    else:
        assert center.item() == torch.tensor(float(exact), dtype=torch.float64).float().item()


def test_tiny_radii_survive_a_chain_of_affine_maps():
    """At centre 1000 and radius 1e-6 a float32 box of two ends has no radius left."""
    box = Box.around(torch.tensor([1000.0]), torch.tensor([1e-6]))
    assert box.map(lambda part: 2 * part).radius.item() == pytest.approx(2e-6)


LOOKS = [*itertools.permutations(["lower", "upper", "center", "radius"], 2), (), ("lower", "upper", "center", "radius")]


@pytest.mark.parametrize("looks", LOOKS)
@pytest.mark.parametrize("make", [Box, Box.around])
def test_a_box_is_the_same_after_it_was_looked_at(make, looks):
    """Its other form is rounded: what is enclosed, mapped and taken are the numbers that it was made of."""
    generator = torch.Generator().manual_seed(0)
    first, more = torch.rand(2, 100, 1, generator=generator)
    box = make(first, first + more)
    for look in looks:
        getattr(box, look)
    ends = (box.lower, box.upper) if make is Box else (box.center, box.radius)
    for same in (box, box.map(lambda part: part), box.take(slice(None)), outward(box)):
        parts = (same.lower, same.upper) if make is Box else (same.center, same.radius)
        assert all(torch.equal(part, end.to(part.dtype)) for part, end in zip(parts, ends, strict=True))


@pytest.mark.parametrize("make", [Box, Box.around])
def test_parts_of_different_shapes_are_refused(make):
    with pytest.raises(ValueError, match="shape"):
        make(torch.zeros(2), torch.zeros(3))
