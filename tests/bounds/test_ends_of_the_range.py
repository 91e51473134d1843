"""Sound bounds where something on the way may overflow or cancel, beside PyTorch's own float32 kernels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from certtrain.bounds import BoundedModel, Box
from certtrain.bounds.rounding.boxes import enclosing_linf_box


def sound_box(model: nn.Module, x: Tensor) -> Box:
    """Of a single point, by a network recorded at a harmless one."""
    return (
        BoundedModel(model.eval(), torch.rand_like(x))
        .ibp(enclosing_linf_box(x, 0.0, None), arithmetic="float32")
        .output
    )


@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize("mean", [1.0, 30.0, 1000.0])
@pytest.mark.parametrize("noise", [1.0, 0.1, 0.03, 0.01, 0.001])
def test_group_norm_of_channels_last_images_stays_inside(groups, mean, noise):
    """PyTorch takes their variance as the mean of squares less the squared mean, where digits are lost."""
    torch.manual_seed(0)
    layer = nn.GroupNorm(groups, 8)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(8))
        layer.bias.copy_(torch.randn(8))
    x = mean * (1 + noise * torch.rand(4, 8, 4, 4))
    box = sound_box(nn.Sequential(layer), x)
    with torch.no_grad():
        for form in (torch.contiguous_format, torch.channels_last):
            assert box.contains(layer(x.contiguous(memory_format=form)).double()).all()
    assert (box.radius < torch.inf).all() or noise < 0.1


def test_layer_norm_says_nothing_of_images_that_it_could_lose_digits_of_by_squares_alone():
    """Its kernels take the variance in two passes, or by Welford's recurrence: its box need not be as wide."""
    x = 30 + 0.3 * torch.rand(4, 64)
    by_passes = sound_box(nn.Sequential(nn.LayerNorm(64, elementwise_affine=False)), x)
    by_squares = sound_box(nn.Sequential(nn.GroupNorm(1, 64, affine=False)), x)
    assert (by_passes.radius < by_squares.radius / 3).all()


NORMS = {
    "layer": lambda: nn.LayerNorm(4),
    "rms": lambda: nn.RMSNorm(4, eps=1e-5),
    "group": lambda: nn.GroupNorm(2, 4),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("exponent", [0, 6, 11, 12, 17, 20, 25, 30])
def test_squares_that_overflow_leave_nothing_known(norm, exponent):
    """The network's inputs and outputs fit into float32, and a variance in between does not; nor is anything claimed of
    values above 2^40."""
    x = torch.tensor([[1.0, -2.0, 3.0, 0.5]]) * 10.0**exponent
    layer = NORMS[norm]()
    box = sound_box(nn.Sequential(layer), x)
    with torch.no_grad():
        computed = layer(x).double()
    as_in_real_mathematics = sound_box(nn.Sequential(layer), x / 10.0**exponent)
    exact = as_in_real_mathematics.contains(computed, 1e-3)
    assert (exact | (box.radius == torch.inf)).all()
    assert (box.radius < torch.inf).all() == (exponent < 12)


@pytest.mark.parametrize("size", [1.0, 2.0**60, 2.0**90, 2.0**122])
@pytest.mark.parametrize("before", ["nothing", "a linear layer"])
def test_what_a_batch_norm_computes_on_the_way_may_overflow(size, before):
    """Centred, then divided by a root of 1e-9, and multiplied by 2^-39 last; or folded in that order."""
    norm = nn.BatchNorm1d(2, eps=1e-12)
    with torch.no_grad():
        norm.running_var.fill_(1e-9)
        norm.weight.fill_(2.0**-39)
    linear = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.eye(2) * (size if before != "nothing" else 1))
    x = torch.tensor([[1.0, 0.5]]) * (size if before == "nothing" else 1)
    box = sound_box(nn.Sequential(*([linear] if before != "nothing" else []), norm), x)
    with torch.no_grad():
        h = x if before == "nothing" else linear(x)
        root = torch.sqrt(norm.running_var + norm.eps)
        for computed in ((h - norm.running_mean) / root * norm.weight + norm.bias, norm.eval()(h)):
            assert (box.contains(computed.double()) | (box.radius == torch.inf)).all()
    assert (box.radius < torch.inf).all() == (size <= 2.0**60)


OVER_A_LETTER_OF_ONE = {
    "bij,i->bi": (lambda x, c: (x, c), lambda row: row),
    "bi,bij->bi": (lambda x, c: (x[:, :, 0], x), lambda row: row[0] * row),
    "bij,bi->bi": (lambda x, c: (x, x[:, :, 0]), lambda row: row * row[0]),
}


@pytest.mark.parametrize("equation", OVER_A_LETTER_OF_ONE)
def test_long_sums_over_letters_that_one_operand_alone_has(equation):
    """In float32, one product after the other."""
    operands, products = OVER_A_LETTER_OF_ONE[equation]

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c = nn.Buffer(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum(equation, *operands(x, self.c))

    x = torch.full((1, 2, 4096), 1 + 2.0**-12)
    total = torch.zeros(())
    for term in products(x[0, 0]):
        total = total + term
    assert sound_box(Network(), x).contains(total.double().expand(1, 2)).all()
