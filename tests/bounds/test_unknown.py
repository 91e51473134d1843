"""What sound bounds must not say: of values that may be no numbers, of differences, of factors that vanish."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from certtrain.bounds import BoundedModel, Box, proved
from certtrain.bounds.rounding.boxes import OutwardBox
from certtrain.errors import UnsupportedOperation
from certtrain.verification.checker.intervals import Interval, Propagation

COMPARISONS = {
    "relu": F.relu,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1),
    "relu6": F.relu6,
    "hardtanh": F.hardtanh,
    "hardsigmoid": F.hardsigmoid,
    "clamp": lambda x: x.clamp(0, 1),
    "clamp from below": lambda x: x.clamp(min=0),
    "clamp from above": lambda x: x.clamp(max=0),
    "maximum": lambda x: torch.maximum(x, torch.zeros_like(x)),
    "minimum": lambda x: torch.minimum(x, x.flip(1)),
    "amax": lambda x: x.amax(2),
    "amin": lambda x: x.amin(2),
    "max_pool1d": lambda x: F.max_pool1d(x, 2),
    "adaptive_max_pool1d": lambda x: F.adaptive_max_pool1d(x, 1),
    "softmax": lambda x: x.softmax(2),
}


class Overflowing(nn.Module):
    """Inputs above 0.57 give inf - inf, of which a comparison is made; then logits."""

    def __init__(self, function, ends_there: bool) -> None:
        super().__init__()
        self.function, self.ends_there = function, ends_there
        self.great, self.difference = nn.Linear(2, 2, bias=False), nn.Linear(2, 4, bias=False)
        self.last = nn.Linear(function(torch.zeros(1, 2, 2)).numel(), 2)
        with torch.no_grad():
            self.great.weight.copy_(torch.tensor([[3e38, 3e38], [-3e38, -3e38]]))
            self.difference.weight.fill_(1.0)
            self.last.weight.fill_(1.0)[1] = 0.0
            self.last.bias.copy_(torch.tensor([10.0, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        h = self.function(self.difference(self.great(x)).view(-1, 2, 2)).flatten(1)
        return h if self.ends_there else self.last(h)


@pytest.mark.parametrize("ends_there", [False, True], ids=["then logits", "as logits"])
@pytest.mark.parametrize("name", COMPARISONS)
def test_what_has_overflowed_stays_unknown(name, ends_there):
    model, x = Overflowing(COMPARISONS[name], ends_there), torch.full((1, 2), 0.5)
    assert model(x + 0.1).isnan().any()
    net, box = BoundedModel(model, x), Box(x.double() - 0.2, x.double() + 0.2)
    for arithmetic in ("float32", "tf32", "bf16"):
        assert not net.ibp(box, arithmetic=arithmetic).output.radius.isfinite().any()
        assert not proved(net.margins(box, torch.tensor([0]), arithmetic=arithmetic)).any()


NORMS = [(-9.9999e-6, 1e-5), (-0.5, 0.5 + 2**-20), (-0.25, 1.0)]  # PyTorch refuses an eps below 0 itself


@pytest.mark.parametrize(("variance", "eps"), NORMS)
def test_a_batch_norm_whose_root_is_of_a_difference_is_unknown(variance, eps):
    """Of which float32 finds another root than there is."""
    norm = nn.BatchNorm1d(2, eps=eps).eval()
    norm.running_var.copy_(torch.tensor([variance, 1.0]))
    x = torch.rand(1, 2)
    output = BoundedModel(norm, x).ibp(Box(x.double(), x.double()), arithmetic="float32").output
    assert not output.radius[0, 0].isfinite()
    assert output.radius[0, 1].isfinite()
    if eps == 1e-5:  # the only one that the checker's networks have
        checked = Propagation(named(norm), "float32").batch_norm(Interval(x[0].double().numpy(), 0 * x[0].numpy()), "n")
        assert checked.radius[0] == torch.inf
        assert checked.radius[1] < 1e-5


def named(norm: nn.BatchNorm1d) -> dict:
    return {f"n.{name}": value.double().numpy() for name, value in norm.state_dict().items()}


FACTORS = [1.0, 1e-13, -1e-20, 1e-38, -1e-42, 0.0]  # the last but one is below the smallest normal number


@pytest.mark.parametrize("flushed", [False, True])
@pytest.mark.parametrize("largest", [1.0, 1e20])
def test_factors_that_nearly_vanish_are_bounded(largest, flushed):
    """Weight decay drives a channel's weight there: every formula's result, underflow flushed to zero or not."""
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(len(FACTORS)).eval()
    norm.weight.data.copy_(torch.tensor(FACTORS))
    for parameter in (norm.bias.data, norm.running_mean):
        parameter.copy_(torch.randn(len(FACTORS)))
    norm.running_var.copy_(torch.tensor([1e-4, 1.0, 1e4, 1e-4, 1.0, 1e4]))
    first = nn.Linear(3, len(FACTORS))
    x = largest * torch.randn(7, 3)
    net = BoundedModel(nn.Sequential(first, norm), x)
    box = net.ibp(OutwardBox(x.double(), x.double()), arithmetic="float32").output
    assert (box.radius <= 1e-5 * (1 + box.center.abs() + largest)).all()
    entering = first(x)
    torch.set_flush_denormal(flushed)
    try:
        for result in (*formulas(norm, entering), *folded(first, norm, x), net.model(x)):
            assert box.contains(result.detach().double()).all()
    finally:
        torch.set_flush_denormal(False)
    checked = Propagation(named(norm), "float32")
    for image, lower, upper in zip(entering, box.lower, box.upper, strict=True):
        found = checked.batch_norm(Interval(image.detach().double().numpy(), 0 * image.detach().numpy()), "n")
        assert (found.radius <= 1e-5 * (1 + abs(found.center) + largest)).all()
        assert (found.center + found.radius >= lower.numpy()).all()
        assert (found.center - found.radius <= upper.numpy()).all()


@pytest.mark.parametrize("flushed", [False, True])
@pytest.mark.parametrize("factor", FACTORS)
def test_so_are_other_products_with_them(factor, flushed):
    constant, x = torch.tensor(factor), torch.tensor([[-1e30, -1e12, -1.0, 1.0, 1e30]])
    functions = [lambda x: x * constant, lambda x: F.prelu(x, constant[None])]
    functions += [lambda x: F.leaky_relu(x, factor)] if factor >= 0 else []
    for function in functions:
        box = BoundedModel(Called(function, constant), x).ibp(Box(x.double(), x.double()), arithmetic="float32").output
        assert (box.radius <= 1e-6 * x.abs()).all()
        torch.set_flush_denormal(flushed)
        try:
            assert box.contains(function(x).double()).all()
        finally:
            torch.set_flush_denormal(False)


class Called(nn.Module):
    def __init__(self, function, constant: Tensor) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("constant", constant)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def formulas(norm: nn.BatchNorm1d, x: Tensor) -> list[Tensor]:
    mean, weight, bias = norm.running_mean, norm.weight, norm.bias
    inverse = 1 / (norm.running_var + norm.eps).sqrt()
    scale = weight * inverse
    return [x * scale + (bias - mean * scale), (x - mean) * inverse * weight + bias, (x - mean) * scale + bias]


def folded(linear: nn.Linear, norm: nn.BatchNorm1d, x: Tensor) -> list[Tensor]:
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    shift = (linear.bias - norm.running_mean) * scale + norm.bias
    return [F.linear(x, linear.weight * scale[:, None], shift)]


class Resized(nn.Module):
    """Logits are pixels of the resized image, which is stored as the convolution before it stores its results."""

    def __init__(self, channels: int, resize: nn.Module, pixels: int) -> None:
        super().__init__()
        self.first, self.resize, self.last = nn.Conv2d(1, channels, 1), resize, nn.Linear(channels * pixels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.resize(self.first(x)).flatten(1))


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("before", "after"), [(5, 7), (6, 12), (9, 9), (20, 13), (40, 100), (90, 130)])
def test_a_resized_image_has_the_pixels_that_pytorch_copies_however_it_is_stored(mode, layout, before, after):
    torch.manual_seed(0)
    resize = nn.Upsample(size=(after, before), mode=mode)
    model = Resized(4, resize, after * before).to(memory_format=layout).eval()
    x = torch.rand(1, 1, before, before).to(memory_format=layout)
    with torch.no_grad():
        logits = model(x)[0]
    wanted = logits[0] - logits
    for method in ("ibp", "crown-ibp", "crown"):
        margins = BoundedModel(model, x).margins(Box(x, x), torch.tensor([0]), method)[0]
        assert torch.allclose(margins, wanted, atol=1e-5)
    sound = BoundedModel(model, x).margins(Box(x, x), torch.tensor([0]), "ibp", arithmetic="float32")[0]
    assert bool((sound <= wanted).all())


@pytest.mark.parametrize("method", ["ibp", "crown-ibp"])
@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
@pytest.mark.parametrize("size", [(1, 164), (1, 82), (1, 7)])
def test_resizing_goes_back_to_the_pixels_that_it_copied(method, mode, size):
    """In float64 PyTorch's derivative takes others: 82 of 164 pixels are the first of two, or the second."""
    torch.manual_seed(0)
    x = torch.full((1, 1, 1, 2), 0.5, dtype=torch.float64)
    for pixel in {0, size[1] // 2 - 1, size[1] // 2, size[1] - 1}:
        last = nn.Linear(size[1], 2).double()
        with torch.no_grad():
            last.weight.zero_()
            last.weight[0, pixel] += 1.0
            last.weight[0, 0] -= 1.0
            last.bias.zero_()
        model = nn.Sequential(nn.Upsample(size=size, mode=mode), nn.Flatten(), last)
        box = Box(x - 0.1, x + 0.1)
        margin = BoundedModel(model, x).margins(box, torch.tensor([0]), method)[0, 1].item()
        corners = [
            torch.tensor([[[corner]]], dtype=torch.float64) for corner in itertools.product((0.4, 0.6), repeat=2)
        ]
        reached = min((model(corner)[0, 0] - model(corner)[0, 1]).item() for corner in corners)
        assert margin == pytest.approx(reached, abs=1e-9)


def shrunk(x: Tensor) -> Tensor:
    """By 2^-154, which no one factor may be."""
    return x * 2.0**-39 * 2.0**-39 * 2.0**-39 * 2.0**-37


ALONE = {  # letters that einsum sums in one factor before it multiplies
    "constant": lambda self, x: torch.einsum("bi,o->bo", x, self.small),
    "constant, first": lambda self, x: torch.einsum("o,bi->bo", self.small, x),
    "constant's own": lambda self, x: torch.einsum("b,oi->bo", shrunk(x)[:, 0], self.large),
    "two values": lambda self, x: torch.einsum("bi,bo->bo", x, shrunk(x)[:, :2]),
    "two values, second": lambda self, x: torch.einsum("bo,bi->bo", shrunk(x)[:, :2], x),
}


class SummedAlone(nn.Module):
    """Sixteen pixels of 2^124 each, whose sum is infinite where it is taken alone; then two logits, the first 10."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function, self.last = function, nn.Linear(2, 2)
        self.register_buffer("small", torch.full((2,), 2.0**-30))
        self.register_buffer("large", torch.full((2, 16), 2.0**124))
        with torch.no_grad():
            self.last.weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
            self.last.bias.copy_(torch.tensor([10.0, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2.0**39 * 2.0**39 * 2.0**38 * 2.0**8
        y = self.function(self, x)
        return self.last((y * 2.0**-39 * 2.0**-39 * 2.0**-20).clamp(max=1024.0))


@pytest.mark.parametrize("function", ALONE.values(), ids=ALONE.keys())
@pytest.mark.parametrize("method", ["ibp", "crown"])
def test_what_einsum_sums_alone_may_overflow(function, method):
    model, x = SummedAlone(function).eval(), torch.ones(1, 16)
    margins = BoundedModel(model, x / 2).margins(Box(x, x), torch.tensor([0]), method, arithmetic="float32")
    assert not proved(margins).any()


NORMALIZED = {
    "one group": lambda: nn.GroupNorm(1, 2),
    "two groups": lambda: nn.GroupNorm(2, 2),
    "each channel": lambda: nn.InstanceNorm1d(2, affine=True),
    "each row": lambda: nn.LayerNorm(8),
    "by its mean square": lambda: nn.RMSNorm(8, eps=1e-5),
}


class VanishingScale(nn.Module):
    """Values of some 2^58 are normalised, with weights that 1/√ would make too small for float32 if they met first."""

    def __init__(self, norm) -> None:
        super().__init__()
        self.norm, self.last = norm, nn.Linear(16, 2)
        with torch.no_grad():
            norm.weight.fill_(2.0**-72)
            if getattr(norm, "bias", None) is not None:
                norm.bias.zero_()
            self.last.weight.zero_()
            self.last.weight[0, 0] = 1.0
            self.last.bias.copy_(torch.tensor([0.0, 0.05]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x * 2.0**39 * 2.0**19) * 2.0**39 * 2.0**31
        return self.last(x.flatten(1))


@pytest.mark.parametrize("norm", NORMALIZED.values(), ids=NORMALIZED.keys())
def test_a_weight_that_vanishes_with_the_root_leaves_nothing_known(norm):
    """GroupNorm's kernel multiplies the two first; whoever fuses the others may do so, too."""
    x = torch.full((1, 2, 8), -1 / 7)
    x[..., 0] = 1.0
    model = VanishingScale(norm()).eval()
    margins = BoundedModel(model, torch.rand(1, 2, 8)).margins(Box(x, x), torch.tensor([0]), arithmetic="float32")
    torch.set_flush_denormal(True)
    try:
        weight = model.norm.weight.flatten()[0]
        factor = weight * (x * 2.0**58).square().mean().add(1e-5).rsqrt()
        assert factor == 0  # and so would the logit be
    finally:
        torch.set_flush_denormal(False)
    assert not proved(margins).any()


@pytest.mark.parametrize("equation", ["bi,oj->bo", "bij,jkl->bk"])
def test_sums_in_each_factor_alone_are_refused(equation):
    """Each would be stored before it is multiplied, in bfloat16 by PyTorch."""
    letters = equation.partition("->")[0].split(",")
    constant = torch.rand(*(2 for _ in letters[1]))

    class Sums(nn.Module):
        def forward(self, x):
            return torch.einsum(equation, x, self.constant)

    model, x = Sums(), torch.rand(1, *(2 for _ in letters[0][1:]))
    model.register_buffer("constant", constant)
    net = BoundedModel(model, x)
    assert torch.allclose(net.ibp(Box(x, x)).output.lower, model(x))
    with pytest.raises(UnsupportedOperation, match="sums in each factor alone"):
        net.ibp(Box(x, x), arithmetic="bf16")
