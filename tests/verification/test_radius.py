from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from certtrain.data import Split, load_dataset
from certtrain.errors import UsageError
from certtrain.verification.attacks import PGD
from certtrain.verification.radius import certified_radii
from certtrain.verification.verify import verify
from tests.networks import Threshold


@pytest.fixture
def pixels():
    images = torch.tensor([0, 64, 100, 127, 140, 200, 255], dtype=torch.uint8).view(-1, 1, 1, 1)
    labels = torch.tensor([0, 0, 0, 0, 1, 0, 1])
    return Split(images, labels)


@pytest.mark.parametrize("arithmetic", [None, "float32"])
def test_the_radius_is_the_distance_to_the_decision(pixels, arithmetic):
    radii = certified_radii(Threshold(), pixels, 0.3, attack=PGD(steps=10), arithmetic=arithmetic)
    distance = (pixels.images.flatten().double() / 255 - 0.5).abs()
    expected = distance.clamp(max=0.3)
    expected[5] = -1.0  # on the wrong side
    assert (radii.proved <= expected + 1e-7).all()
    torch.testing.assert_close(radii.proved, expected, rtol=0, atol=0.3 / 2**13)
    assert radii.natural_error == pytest.approx(1 / 7)
    for eps, error in zip(radii.pgd_eps, radii.pgd_error, strict=True):
        assert error == pytest.approx(((distance < eps) | (expected < 0)).double().mean().item())
        assert error <= radii.verified_error(eps + 1e-4)


def test_what_is_right_but_not_provable_is_no_natural_error():
    """|x| - |x| is 0, but of intervals 200 eps: label 0 wins by 0.1, and no bound shows it where that is more."""

    class Loose(nn.Module):
        def __init__(self):
            super().__init__()
            self.both = nn.Linear(1, 2, bias=False)
            self.both.weight.data.copy_(torch.tensor([[100.0], [-100.0]]))
            self.register_buffer("lead", torch.tensor([0.1, 0.0]))

        def forward(self, x):
            halves = torch.relu(self.both(x.flatten(1)))
            zero = halves - halves
            return zero + self.lead

    data = Split(torch.tensor([100, 100], dtype=torch.uint8).view(-1, 1, 1, 1), torch.tensor([0, 1]))
    radii = certified_radii(Loose(), data, 0.3, arithmetic="float32")
    assert radii.correct.tolist() == [True, False]
    assert radii.natural_error == radii.summary()["natural_error"] == 0.5
    assert radii.proved.tolist() == pytest.approx([0.1 / 200, -1], abs=0.3 / 2**13)
    assert (radii.verified_error(0.0), radii.verified_error(0.001)) == (0.5, 1.0)
    tight = certified_radii(Loose(), data, 0.3, arithmetic="bf16")
    assert tight.proved.tolist() == [-1, -1]
    assert (tight.natural_error, tight.verified_error(0.0)) == (0.5, 1.0)


def test_the_curve_is_what_verification_says(run, cli):
    outcome = cli("verify", run, "--radius", "0.02", "--limit", "60", "--device", "cpu")
    assert outcome.code == 0, outcome.err
    curve = json.loads((run / "radius.json").read_text())
    assert curve["images"] == 60
    assert (run / "radius.png").read_bytes().startswith(b"\x89PNG")
    assert curve["verified_error"] == sorted(curve["verified_error"])
    import certtrain
    from certtrain.data import load_dataset

    model, test = certtrain.load_model(run), load_dataset("digits").test
    for index in (0, 25, 50, 100):
        (result,) = verify(model, test, curve["eps"][index], limit=60)
        assert curve["verified_error"][index] == pytest.approx(result.verified_error, abs=1e-9)


def test_rounding_is_covered_by_the_native_backend_alone(pixels):
    with pytest.raises(UsageError, match="those of backend native, not lirpa"):
        certified_radii(Threshold(), pixels, 0.3, arithmetic="float32", backend="lirpa")


@pytest.mark.parametrize("eps", ["0", "-1", "x"])
def test_a_radius_that_is_none_is_refused(run, cli, eps):
    outcome = cli("verify", run, f"--radius={eps}")
    assert outcome.code == 2


@pytest.mark.parametrize("ask", [verify, certified_radii])
@pytest.mark.parametrize(
    "data",
    [load_dataset("digits"), (torch.zeros(1, 1, 1, 1), torch.zeros(1)), [], None],
    ids=lambda d: type(d).__name__,
)
def test_what_is_no_split_is_said_to_be_none(ask, data):
    with pytest.raises(UsageError, match=r"data must be a Split, not \w+: dataset.test, or Split\("):
        ask(Threshold(), data, 0.1)
