"""Questions that have no answer are refused; an empty box, of which everything is true, above all."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from certtrain.bounds import BoundedModel, Box, bounded_model, linf_box
from certtrain.bounds.model import METHODS
from certtrain.errors import UsageError

X = torch.rand(2, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 2])


def network() -> BoundedModel:
    torch.manual_seed(0)
    return BoundedModel(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), X)


@settings(max_examples=50, deadline=None)
@given(eps=st.one_of(st.floats(max_value=-1e-300), st.just(float("nan")), st.just(float("inf"))))
def test_a_radius_is_finite_and_not_negative(eps):
    with pytest.raises(UsageError, match="radius"):
        linf_box(X, eps)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_an_empty_box_proves_nothing(method, value):
    lower = X.clone()
    lower[1, 3] = X[1, 3] + value
    with pytest.raises(UsageError, match="empty"):
        network().margins(Box(lower, X), LABELS, method)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float16, torch.bfloat16])
def test_a_box_is_of_float32_or_float64(dtype):
    x = X.to(dtype)
    with pytest.raises(UsageError, match="float"):
        network().margins(Box(x, x), LABELS)


@pytest.mark.parametrize(
    "labels",
    [torch.tensor([0, 3]), torch.tensor([-1, 0]), torch.tensor([0.0, 1.0]), torch.tensor([0]), LABELS[:, None]],
)
def test_labels_are_classes_one_for_each_image(labels):
    with pytest.raises(UsageError, match="labels"):
        network().margins(linf_box(X, 0.1), labels)


class Overflowing(nn.Module):
    """Infinite beside finite logits, and infinity less infinity inside of a box."""

    def __init__(self) -> None:
        super().__init__()
        self.identity = nn.Linear(4, 4)
        with torch.no_grad():
            self.identity.weight.copy_(torch.eye(4))

    def forward(self, x):
        x = self.identity(x)
        return torch.cat([torch.exp(1e3 * x[:, :2]), torch.relu(x[:, 2:] - 0.5)], 1)


@pytest.mark.parametrize("backend", ["native", "lirpa"])
@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_known_where_values_overflow(method, backend):
    box = linf_box(X.clamp(min=0.5), 0.1)
    margins = bounded_model(Overflowing(), X, backend).margins(box, LABELS, method).detach()
    assert not margins.isnan().any()
    assert margins[0, 1] == margins[1, 0] == margins[1, 1] == -torch.inf
    assert (margins.gather(1, LABELS[:, None]) == 0).all()
