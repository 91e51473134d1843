"""Settings of convolutions and windows are the same however they are spelled: a number, alone in a tuple, or pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import nn

from certtrain.bounds import BoundedModel, linf_box
from certtrain.initialization import initialize_
from certtrain.runtime.layout import convolutions_of, overruns_a_buffer

Spelling = Callable[[int], int | Sequence[int]]
LABELS = torch.tensor([2, 0])


def network(s: Spelling) -> nn.Module:
    """Whose strided 1x1 convolution is one that oneDNN must not be given on some CPUs."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, s(1), s(1), s(1)),
        nn.ReLU(),
        nn.Conv2d(4, 6, 1, s(2)),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 4, 2, s(2), s(0), s(0), dilation=s(1)),
        nn.ReLU(),
        nn.AvgPool2d(s(2), s(2), s(0)),
        nn.Flatten(),
        nn.Linear(64, 3),
    ).eval()


@pytest.mark.parametrize(
    "spelling", [lambda n: (n,), lambda n: [n], lambda n: torch.Size([n]), lambda n: (n, n), np.int64]
)
def test_a_setting_means_the_same_however_it_is_spelled(spelling):
    plain, spelled = network(lambda n: n), network(spelling)
    overruns = [[overruns_a_buffer(call) for call in convolutions_of(m, (3, 8, 8))] for m in (plain, spelled)]
    assert overruns == [[False, True, False]] * 2
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for model in (plain, spelled):
        torch.manual_seed(1)
        initialize_(model, "ibp")
    for weight, expected in zip(spelled.parameters(), plain.parameters(), strict=True):
        assert torch.equal(weight, expected)
    bounded, expecting = BoundedModel(spelled, x), BoundedModel(plain, x)
    for method in ("ibp", "crown-ibp", "crown", "alpha-crown"):
        for arithmetic in (None, "float32"):
            found = bounded.margins(linf_box(x, 0.01), LABELS, method, arithmetic=arithmetic)
            assert torch.equal(found, expecting.margins(linf_box(x, 0.01), LABELS, method, arithmetic=arithmetic))


@pytest.mark.parametrize("spelling", [lambda n: (n,), lambda n: [n], lambda n: (n, n)])
def test_so_does_one_of_a_maximum(spelling):
    def maximum(s: Spelling) -> nn.Module:
        torch.manual_seed(0)
        pooling = nn.MaxPool2d(s(3), s(2), s(1), s(1))
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), pooling, nn.Flatten(), nn.Linear(36, 3)).eval()

    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found, expected = (
        [BoundedModel(model, x).margins(linf_box(x, 0.05), LABELS, method) for method in ("ibp", "crown-ibp", "crown")]
        for model in (maximum(spelling), maximum(lambda n: n))
    )
    assert all(map(torch.equal, found, expected))
