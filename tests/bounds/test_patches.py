"""Windows of coefficients against the whole maps they stand for."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import nn
from torch.nn.grad import conv2d_input

from certtrain.bounds import BoundedModel, LinearRelaxation, linf_box
from certtrain.bounds.linear import crown, lower_bounds
from certtrain.bounds.linear.patches import RULES, Convolution, Patches, through
from tests.networks import randomized, residual_network

MAP = torch.Size((4, 9, 7))
LIKE = torch.zeros(1, dtype=torch.float64)
PAIRS = st.tuples(st.integers(1, 3), st.integers(1, 3))


@given(
    seed=st.integers(0, 10_000),
    kernel=PAIRS,
    stride=PAIRS,
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    groups=st.sampled_from([1, 2]),
)
@settings(max_examples=60, deadline=None)
def test_pulling_back_through_a_convolution(seed, kernel, stride, padding, dilation, groups):
    random = torch.Generator().manual_seed(seed)
    settings_ = Convolution(stride, padding, dilation, groups)
    weight = torch.randn(MAP[0], 6 // groups, *kernel, generator=random, dtype=torch.float64)
    # A map of which the convolution makes one of MAP's size; the kernel may not reach its end.
    spare = torch.randint(0, min(stride), (2,), generator=random).tolist()
    size = tuple(
        (MAP[1 + i] - 1) * stride[i] - 2 * padding[i] + dilation[i] * (kernel[i] - 1) + 1 + spare[i] for i in range(2)
    )
    if min(size) < 1:
        return
    units = Patches.one_hot(torch.randint(0, MAP.numel(), (2, 5), generator=random), MAP, LIKE).with_negative()
    pulled = units.pulled_through(weight, size, settings_)
    expected = conv2d_input((20, 6, *size), weight, units.dense().flatten(0, 1), *vars(settings_).values())
    torch.testing.assert_close(pulled.dense(), expected.unflatten(0, (2, 10)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("padding", "kernel", "stays"), [("same", 3, True), ("valid", 2, True), ("same", 2, False)])
def test_windows_stay_windows_where_padding_is_named(padding, kernel, stays):
    """But for a padding that is larger at one end, as an even kernel's is."""
    x = torch.rand(2, 3, 9, 7, dtype=torch.float64)
    record = (
        BoundedModel(nn.Conv2d(3, 4, kernel, padding=padding).double(), x).ibp(linf_box(x, 0.1), record=True).record
    )
    (call,) = (call for call in record.calls if call.function is F.conv2d)
    units = Patches.one_hot(torch.tensor([[0, 30], [17, 59]]), record.boxes[call.index].shape[1:], x)
    pulled = RULES[F.conv2d](call, units, record.boxes)
    assert isinstance(pulled[0][0][1], Patches) if stays else pulled is None


@given(seed=st.integers(0, 10_000), windows=st.tuples(PAIRS, PAIRS), apart=st.booleans())
@settings(max_examples=60, deadline=None)
def test_sums_of_windows_and_what_lies_under_them(seed, windows, apart):
    random = torch.Generator().manual_seed(seed)
    corners = [torch.randint(-1, 8, (2, 3, 2), generator=random) for _ in windows]
    if not apart:  # alike in each function
        corners[1] = corners[0] + torch.tensor([1, -1])
    first, second = (
        Patches(torch.randn(2, 3, *window, 4, generator=random, dtype=torch.float64), corner, (9, 7)).masked()
        for window, corner in zip(windows, corners, strict=True)
    )
    total = first + second
    found = total if isinstance(total, torch.Tensor) else total.dense()
    assert torch.equal(found, first.dense() + second.dense())
    maps = torch.randn(2, *MAP, generator=random, dtype=torch.float64)
    scaled = first.with_values(first.values * first.at(maps.permute(0, 2, 3, 1)))
    assert torch.equal(scaled.dense(), first.dense() * maps[:, None])


@given(seed=st.integers(0, 10_000), lower_is_zero=st.booleans(), upper_is_zero=st.booleans(), windows=st.booleans())
@settings(max_examples=40, deadline=None)
def test_pulling_back_through_lines(seed, lower_is_zero, upper_is_zero, windows):
    """Element by element: by the line below where a coefficient is positive, by the one above where it is negative."""
    random = torch.Generator().manual_seed(seed)
    of_patches = torch.randn(2, 3, 3, 2, MAP[0], generator=random, dtype=torch.float64)
    a = Patches(of_patches, torch.randint(-1, 8, (2, 3, 2), generator=random), tuple(MAP[1:])).masked()
    slopes_and_offsets = torch.randn(4, 2, *MAP, generator=random, dtype=torch.float64)
    lower_slope, lower_offset, upper_slope, upper_offset = slopes_and_offsets
    lines = LinearRelaxation(
        lower_slope, None if lower_is_zero else lower_offset, upper_slope, None if upper_is_zero else upper_offset
    )
    pulled, constant = through(lines, a if windows else a.dense())
    dense = a.dense()
    for image, row in itertools.product(range(2), range(3)):
        expected, total = torch.zeros(MAP, dtype=torch.float64), 0.0
        for place in itertools.product(*map(range, MAP)):
            value = dense[(image, row, *place)].item()
            at = (image, *place)
            expected[place] = value * (lower_slope if value > 0 else upper_slope)[at]
            is_zero = lower_is_zero if value > 0 else upper_is_zero
            total += 0.0 if is_zero else value * (lower_offset if value > 0 else upper_offset)[at].item()
        found = pulled.dense() if windows else pulled
        torch.testing.assert_close(found[image, row], expected, rtol=1e-12, atol=1e-12)
        assert constant[image, row].item() == pytest.approx(total, abs=1e-10)


def test_one_hot_is_the_element_itself():
    neurons = torch.arange(MAP.numel())[None]
    assert torch.equal(Patches.one_hot(neurons, MAP, LIKE).dense().flatten(2)[0], F.one_hot(neurons[0]).double())


class Shifted(nn.Module):
    """Every operation that keeps windows windows, in one network."""

    def __init__(self) -> None:
        super().__init__()
        self.body = residual_network()
        self.register_buffer("scale", torch.linspace(0.5, 2.0, 3).view(3, 1, 1))

    def forward(self, x):
        x = -((x - 0.3 * self.scale) * self.scale) / 0.7
        return self.body(x.contiguous() + x.clone() * 0.1)


@pytest.mark.parametrize("intersect", [pytest.param(False, marks=pytest.mark.slow), True])
def test_windows_give_the_boxes_that_whole_maps_give(intersect, monkeypatch):
    torch.manual_seed(0)
    model = randomized(Shifted()).double().eval()
    images = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    record = BoundedModel(model, images).ibp(linf_box(images, 0.05), record=True).record
    with torch.no_grad():
        found = crown.tightened(record, 1000, intersect)

        def of_whole_maps(record, index, a, **lines):
            return lower_bounds(record, index, a.dense() if isinstance(a, Patches) else a)

        monkeypatch.setattr(crown, "lower_bounds", of_whole_maps)
        expected = crown.tightened(record, 10**9, intersect)
    assert found.boxes.keys() == expected.boxes.keys()
    for index, box in found.boxes.items():
        torch.testing.assert_close(box.lower, expected.boxes[index].lower, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(box.upper, expected.boxes[index].upper, rtol=1e-9, atol=1e-12)
