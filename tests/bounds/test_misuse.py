"""The ways in which networks are written that once led to false proofs: by kind, each held against the module itself.

A network is either handled, so that bounds of a box hold what the module computes on its points (and a box that is a
point gives just that), or refused by name.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from copy import deepcopy

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, nn

from certtrain.bound_methods import METHODS
from certtrain.bounds import BoundedModel, Box, linf_box
from certtrain.bounds.recording import agree
from certtrain.data import Split
from certtrain.errors import UnsupportedOperation
from certtrain.verification.attacks import PGD
from certtrain.verification.folding import fold_batch_norm
from certtrain.verification.radius import certified_radii
from certtrain.verification.verify import verify

Forward = Callable[[nn.Module, Tensor], Tensor]
IMAGES = 4


class Written(nn.Module):
    """A network (B, 4) -> (B, 4) given by its forward, with a layer, constants of every type and a number."""

    def __init__(self, forward: Forward, constant: Tensor | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.dropout, self.identity = nn.Linear(4, 4), nn.Dropout(0.5), nn.Identity()
        self.norm, self.number = nn.BatchNorm1d(4), 2.0
        self.register_buffer("c", torch.tensor([0.5, -1.0, 2.0, 3.0]) if constant is None else constant)
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def images(count: int = IMAGES) -> Tensor:
    return torch.rand(count, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def holds(model: nn.Module, net: BoundedModel | None = None) -> None:
    """Bounds of a point are the module's output; those of a box hold what it computes in it, by every method."""
    model = model if net is not None else model.double().eval()
    net, x = net or BoundedModel(model, images()), images()
    expected = deepcopy(model)(x.clone())
    point = net.ibp(linf_box(x, 0.0, clip=None)).output
    torch.testing.assert_close(point.center, expected, rtol=1e-9, atol=1e-9)
    box, labels = linf_box(x, 0.3, clip=None), torch.tensor([0, 1, 2, 3])
    output, margins = net.ibp(box).output, [net.margins(box, labels, method) for method in METHODS]
    generator = torch.Generator().manual_seed(2)
    for number in range(20):
        share = torch.rand(x.shape, generator=generator, dtype=torch.float64)
        share = share.round() if number % 2 else share
        logits = deepcopy(model)(box.lower + share * (box.upper - box.lower))
        assert output.contains(logits, 1e-9 * (1 + logits.abs().max().item())).all()
        for margin in margins:
            assert (logits.gather(1, labels[:, None]) - logits >= margin - 1e-9).all()


# --- keyword arguments ------------------------------------------------------------------------------------------------

KEYWORDS: dict[str, Forward] = {
    "linear, bias=": lambda self, x: F.linear(F.relu(x), self.layer.weight, bias=self.layer.bias),
    "linear, all": lambda self, x: F.linear(bias=self.layer.bias, input=x, weight=self.layer.weight),
    "relu, input=": lambda self, x: F.relu(input=self.layer(x)),
    "leaky_relu": lambda self, x: F.leaky_relu(negative_slope=0.3, input=self.layer(x)),
    "cat, tensors=": lambda self, x: torch.cat(tensors=[x[:, 1:], x[:, :1]], dim=1),
    "add, other=": lambda self, x: torch.add(x, other=self.c),
    "add, alpha=": lambda self, x: torch.add(input=x, other=self.c, alpha=-3),
    "method, other=": lambda self, x: x.sub(other=self.c, alpha=0.5).mul(other=self.c).div(other=self.c),
    "of a constant": lambda self, x: torch.sub(other=x, input=self.c, alpha=2),
    "mean, dim=": lambda self, x: x - torch.mean(input=x, keepdim=True, dim=-1),
    "matmul": lambda self, x: torch.matmul(other=self.layer.weight, input=x),
    "batch_norm": lambda self, x: F.batch_norm(
        x, running_var=self.norm.running_var + 1, running_mean=self.c, bias=self.c, eps=0.1
    ),
    "pad, value=": lambda self, x: F.pad(pad=(1, 1), value=-2.0, input=x)[:, 1:5],
    "flatten": lambda self, x: torch.flatten(x.unflatten(sizes=(2, 2), dim=1), start_dim=1),
    "module": lambda self, x: self.layer(input=x),
}


@pytest.mark.parametrize("name", KEYWORDS)
def test_keywords_are_read(name):
    holds(Written(KEYWORDS[name]))


@pytest.mark.parametrize(
    ("forward", "named"),
    [
        (lambda self, x: x + x.mean(1, keepdim=True, dtype=torch.float16), "mean.*dtype"),
        (lambda self, x: x + torch.sum(x, 1, True, dtype=torch.int32), "sum.*dtype"),
        (lambda self, x: torch.div(x, self.c, rounding_mode="floor"), "div.*rounding_mode"),
        (lambda self, x: torch.add(x, self.c, out=torch.empty(0)), "add.*out"),
        (lambda self, x: torch.softmax(x, 1, dtype=torch.float16), "softmax.*dtype"),
        (lambda self, x: x.mean(1, True, axis=1), "mean.*arguments"),
        (lambda self, x: F.linear(x, self.c)[:, None], "linear.*one dimension only"),
        (lambda self, x: x[:, None].softmax(-1) @ self.c, "vector.*second axis"),
        (lambda self, x: F.rms_norm(x, (4,)), "without eps"),
    ],
)
def test_keywords_that_change_the_meaning_are_refused_by_name(forward, named):
    with pytest.raises(UnsupportedOperation, match=named):
        BoundedModel(Written(forward).double().eval(), images())


@pytest.mark.parametrize("cast", [
    lambda x, other: x.to(other), lambda x, other: x.type_as(other),
    lambda x, other: x.to(other.dtype), lambda x, other: x.to("cpu", other.dtype),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int32])
def test_a_cast_is_refused_however_its_type_is_said(cast, dtype):
    other = torch.ones(4, dtype=dtype)
    with pytest.raises(UnsupportedOperation, match=f"a cast to {dtype}"):
        BoundedModel(Written(lambda self, x: cast(x, self.c).to(x.dtype), other).eval(), images().float())


def test_to_moves_and_casts_as_the_module_does():
    holds(Written(lambda self, x: self.layer(x.to("cpu").to(self.c).to(x, non_blocking=True).to(device="cpu"))))


@settings(max_examples=60, deadline=None)
@given(
    function=st.sampled_from([torch.add, torch.sub, torch.mul, torch.div]),
    value_first=st.booleans(),
    by_keyword=st.integers(0, 2),
    alpha=st.sampled_from([None, 1, -2, 0.5, True]),
    constant=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.int64, torch.uint8, torch.int8]),
    method=st.booleans(),
)
def test_every_spelling_of_arithmetic(function, value_first, by_keyword, alpha, constant, method):
    """Either the module's own answer, or refused; the module itself need not run."""
    extra = {} if alpha is None or function in (torch.mul, torch.div) else {"alpha": alpha}

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        one, other = (self.layer(x), self.c) if value_first else (self.c, self.layer(x))
        if method:
            return getattr(one, function.__name__)(other, **extra)
        given_ = [(one, other), (one,), ()][by_keyword]
        named = [{}, {"other": other}, {"input": one, "other": other}][by_keyword]
        return function(*given_, **named, **extra)

    model = Written(forward, torch.tensor([5, 100, 3, 127]).to(constant)).double().eval()
    try:
        model(images())
    except RuntimeError:
        return
    if function is torch.div and not value_first:
        with pytest.raises(UnsupportedOperation, match="div"):
            holds(model)
    else:
        holds(model)


# --- the module changes its input in place ----------------------------------------------------------------------------


class Normalised(nn.Module):
    """Of images (B, 1, 2, 2): normalised in place or not, then linear."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.in_place = nn.Linear(4, 8), nn.Linear(8, 2), in_place

    def forward(self, x: Tensor) -> Tensor:
        if self.in_place:
            x -= 0.4
            x /= 0.25
        else:
            x = (x - 0.4) / 0.25
        return self.last(F.relu(self.first(x.flatten(1))))


def split() -> Split:
    torch.manual_seed(3)
    pixels = torch.randint(0, 256, (40, 1, 2, 2), dtype=torch.uint8)
    with torch.no_grad():
        labels = Normalised(False)(pixels / 255).argmax(1)
    labels[::7] = 1 - labels[::7]
    return Split(pixels, labels)


def test_a_module_that_changes_its_input_is_verified_as_one_that_does_not():
    data, attack = split(), PGD(steps=5, restarts=2)
    for arithmetic in (None, "float32"):
        found = [
            verify(Normalised(in_place), data, [0.0, 0.02, 0.1], attack=attack, arithmetic=arithmetic)
            for in_place in (False, True)
        ]
        for one, other in zip(*found, strict=True):
            for name in ("prediction", "correct", "attacked", "adversarial", "proved"):
                assert torch.equal(getattr(one, name), getattr(other, name)), name
            torch.testing.assert_close(one.margin, other.margin)
        assert 0 < found[0][1].proved.sum() < len(data)
    radii = [certified_radii(Normalised(in_place), data, 0.2, attack=attack) for in_place in (False, True)]
    torch.testing.assert_close(radii[0].proved, radii[1].proved)
    assert radii[0].pgd_error == radii[1].pgd_error


def test_an_attack_leaves_its_images_alone():
    data, model = split(), Normalised(True)
    x = data.images / 255
    before = x.clone()
    points, found = PGD(steps=5)(model, x, data.labels, 0.1)
    assert torch.equal(x, before)
    assert ((points - before).abs() <= 0.1).all()
    assert torch.equal(model(points.clone()).argmax(1) != data.labels, found)


# --- the batch axis is moved or mixed ---------------------------------------------------------------------------------

MIXES: dict[str, tuple[Forward, str]] = {
    "sequence first": (lambda self, x: self.layer(x.transpose(0, 1).transpose(0, 1)), "transpose.*batch axis"),
    "permute": (lambda self, x: x.unsqueeze(1).permute(1, 0, 2).sum(0), "permute.*batch axis"),
    "attribute T": (lambda self, x: x.T.T, "'T'"),
    "less the mean of the batch": (lambda self, x: self.layer(x - x.mean(0)), "mean.*batch axis"),
    "less the mean of all": (lambda self, x: x - x.mean(), "mean.*batch axis"),
    "less the negative axis": (lambda self, x: x - x.sum(-2, keepdim=True), "sum.*batch axis"),
    "cat along 0": (lambda self, x: torch.cat([x, x], 0)[: x.size(0)], "cat.*batch axis"),
    "cat by default": (lambda self, x: torch.cat([x])[: x.size(0)], "cat.*batch axis"),
    "tokens folded in": (lambda self, x: self.layer(x.repeat(1, 2).reshape(-1, 4)).view(-1, 8)[:, :4], "reshape"),
    "folded and back": (lambda self, x: x.reshape(-1, 2).reshape(-1, 4), "reshape.*batch axis"),
    "flatten(0)": (lambda self, x: x.flatten(0).view(-1, 4), "flatten.*batch axis"),
    "unflatten(0)": (lambda self, x: x.unflatten(0, (1, -1))[0], "unflatten.*batch axis"),
    "flip": (lambda self, x: x.flip(0), "flip"),
    "roll": (lambda self, x: x.roll(1, 0), "roll"),
    "unpacked": (lambda self, x: torch.stack([*x]), "traced"),
    "reversed": (lambda self, x: torch.cat([x[1:], x[:1]], 0), "getitem"),
    "chunks of the batch": (lambda self, x: torch.cat([part for part in x.chunk(2, 0)], 0), "chunk.*batch axis"),
    "softmax over the batch": (lambda self, x: F.softmax(x, 0), "softmax.*axis 0"),
    "an index that starts elsewhere": (lambda self, x: x[None][:, 0], "getitem"),
    "a mask over the batch": (lambda self, x: x[..., torch.ones(4, 4) > 0].view(-1, 4), "cannot be computed on 3"),
    "broadcast along the batch": (lambda self, x: x.unsqueeze(1) + x, "broadcasting"),
    "constant for a batch": (lambda self, x: x + self.c.repeat(4, 1) * torch.arange(4.0)[:, None], "batch axis|images"),
    "constant for three": (lambda self, x: x + self.c[:3, None], "others in the batch|batch axis|images"),
    "numbered": (lambda self, x: x + torch.arange(x.size(0))[:, None], "depends on others in the batch"),
    "counted": (lambda self, x: x + torch.arange(len(x))[:, None], "len"),
    "scaled by the count": (lambda self, x: x * x.shape[0], "depends on others in the batch"),
    "batch statistics": (lambda self, x: F.batch_norm(x, None, None, training=True), "depends on others in the batch"),
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", MIXES)
def test_what_mixes_images_is_refused_by_name_in_each_mode(name, training):
    forward, named = MIXES[name]
    if training and name == "batch statistics":
        return  # what training mode is
    model = Written(forward).double().train(training)
    with pytest.raises(UnsupportedOperation, match=named):
        BoundedModel(model, images()).ibp(linf_box(images(), 0.1), clean=images())


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@settings(max_examples=25, deadline=None)
@given(
    axes=st.permutations(range(3)),
    reduced=st.integers(-3, 2),
    joined=st.integers(-3, 2),
    size=st.sampled_from([(3, 3), (4, 3), (3, 4)]),
)
def test_axes_drawn_at_random(axes, reduced, joined, size, training):
    """With as many images as tokens, shapes alone would not tell them apart."""
    tokens, features = size

    class Axes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x - x.mean(reduced, keepdim=True)
            y = torch.cat([y, x], joined).permute(*axes)
            return y.flatten(1)[:, :3]

    x = torch.rand(3, tokens, features, dtype=torch.float64)
    model = Axes().train(training)
    innocent = axes[0] == 0 and reduced % 3 != 0 and joined % 3 != 0
    if not innocent:
        with pytest.raises(UnsupportedOperation):
            BoundedModel(model, x).ibp(linf_box(x, 0.0), clean=x)
        return
    output = BoundedModel(model, x).ibp(linf_box(x, 0.0), clean=x).output
    torch.testing.assert_close(output.center, model(x))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_each_image_of_a_batch_is_its_own_with_dropout_and_batch_norm(training):
    """What training mode does share, statistics and masks, is not taken for mixing."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.ReLU(), nn.Linear(4, 3))
    BoundedModel(model.double().train(training), images()).ibp(linf_box(images(), 0.1), clean=images())


# --- constants of other types -----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from([torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool, torch.float16]),
    numbers=st.lists(st.integers(-128, 255), min_size=4, max_size=4),
    use=st.sampled_from(
        [
            lambda self, x: x - self.c,
            lambda self, x: self.c - x,
            lambda self, x: x * self.c,
            lambda self, x: torch.add(x, self.c, alpha=100),
            lambda self, x: torch.sub(self.c, x, alpha=3),
            lambda self, x: x.add(self.c).sub(self.c, alpha=-2),
            lambda self, x: torch.cat([x[:, :2], self.c.expand(x.size(0), 4)], 1)[:, :4],
            lambda self, x: x / (self.c * self.c + 1),
            lambda self, x: x + self.c[0],
            lambda self, x: self.layer(x) @ torch.diag(self.c).to(x.dtype),
        ]
    ),
)
def test_constants_of_every_type(dtype, numbers, use):
    model = Written(use, torch.tensor(numbers).to(dtype)).double().eval()
    model.c = torch.tensor(numbers).to(dtype)
    try:
        finite = model(images()).isfinite().all()
    except RuntimeError:  # PyTorch subtracts no bool
        return
    if finite:
        holds(model)


@pytest.mark.parametrize(
    "index",
    [torch.tensor([3, 0, 0, 1]), torch.tensor([True, True, False, True]), torch.tensor([2], dtype=torch.uint8).long()],
    ids=["numbers", "mask", "one"],
)
def test_index_tensors(index):
    model = Written(lambda self, x: self.layer(x)[:, self.c], index)
    net = BoundedModel(model.eval(), images().float())
    x = images().float()
    bounds = net.ibp(Box(x, x), arithmetic="float32").output
    assert bounds.contains(model(x).double()).all()


# --- arguments that rules assume something about ----------------------------------------------------------------------


class OfImages(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x.view(-1, 1, 2, 2)).flatten(1)


@settings(max_examples=80, deadline=None)
@given(
    function=st.one_of(
        st.integers(-5, 5).map(lambda d: lambda x: F.avg_pool2d(x, 2, 1, 1, divisor_override=d)),
        st.tuples(st.floats(-9, 9), st.sampled_from(["constant", "reflect", "replicate", "circular"])).map(
            lambda p: lambda x: F.pad(x, (1, 0, 0, 1), p[1], p[0] if p[1] == "constant" else None)
        ),
        st.floats(-2, 2).map(lambda slope: lambda x: F.leaky_relu(x, slope)),
        st.floats(-1e9, 1e9).map(lambda alpha: lambda x: torch.sub(x, x.transpose(2, 3), alpha=alpha)),
        st.lists(st.integers(-1, 2), min_size=4, max_size=4).map(lambda pad: lambda x: F.pad(x, pad, value=3)),
        st.integers(-2, 2).map(lambda offset: lambda x: F.pad(x, (0, 0, 0, 0, 0, 0, offset, 0))),
        st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(0, 1), st.booleans(), st.booleans()).map(
            lambda p: lambda x: F.avg_pool2d(x, p[0], p[1], p[2], p[3], p[4])
        ),
        st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(0, 1), st.integers(1, 2), st.booleans()).map(
            lambda p: lambda x: F.max_pool2d(x, p[0], p[1], p[2], p[3], p[4])
        ),
    )
)
def test_arguments_are_handled_or_refused(function):
    model, x = OfImages(lambda x: function(x)), images() - 0.5
    try:
        expected = model(x)
    except (RuntimeError, ZeroDivisionError):
        return
    if expected.dim() != 2 or expected.numel() == 0 or len(expected) != len(x):
        with pytest.raises(UnsupportedOperation):
            BoundedModel(model, x)
        return
    try:
        net = BoundedModel(model, x)
        box = linf_box(x, 0.2, clip=None)
        output = net.ibp(box).output
    except UnsupportedOperation:
        return
    assert (output.radius >= 0).all()
    for number in range(10):
        share = torch.rand(x.shape, dtype=torch.float64)
        logits = model(box.lower + (share.round() if number % 2 else share) * (box.upper - box.lower))
        assert output.contains(logits, 1e-9 * (1 + logits.abs().max().item())).all()


def test_negative_divisors_and_slopes_are_refused_by_name():
    for function, named in [
        (lambda x: F.avg_pool2d(x, 2, divisor_override=-3), "divisor_override=-3"),
        (lambda x: F.leaky_relu(x, -0.5), "negative_slope=-0.5"),
        (lambda x: F.pad(x, (1, 0), value=float("nan")), "padding with nan"),
        (lambda x: torch.add(x, x, alpha=float("inf")), "alpha=inf"),
    ]:
        with pytest.raises(UnsupportedOperation, match=named):
            BoundedModel(OfImages(function), images())


@pytest.mark.parametrize("pad", [(1, 2), (1, 0, 0, 2), (0, -1, 2, 0, 1, 0), (0, 0), (0, 0, 0, 0, 0, 1)])
@pytest.mark.parametrize("more", range(4))
def test_axes_that_are_padded_by_nothing_may_be_named(pad, more):
    """All of them, the batch axis too, as in ONNX."""
    pad = (pad + (0, 0) * more)[:8]
    x = torch.rand(2, 1, 2, 2, dtype=torch.float64)
    model = OfImages(lambda x: F.pad(x, pad, value=0.3))
    output = BoundedModel(model, x).ibp(Box(x - 0.1, x + 0.1)).output
    ends = [model(end) for end in (x - 0.1, x + 0.1)]
    torch.testing.assert_close(torch.stack([output.lower, output.upper]), torch.stack(ends))
    with pytest.raises(UnsupportedOperation, match="it pads the batch axis"):
        BoundedModel(OfImages(lambda x: F.pad(x, (*pad, *[0] * (6 - len(pad)), 0, 1)[-8:])[:-1]), x)


# --- examples decide nothing by an absolute tolerance -----------------------------------------------------------------


class Tokens(nn.Module):
    """Linear over tokens, (B, T, F), whose BatchNorm1d normalises T; as many tokens as features."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.norm, self.scale = nn.Linear(4, 4), nn.BatchNorm1d(4), scale
        with torch.no_grad():
            self.norm.running_mean.copy_(torch.tensor([0.5, -0.5, 1.0, 0.0]))
            self.norm.running_var.copy_(torch.tensor([0.1, 1.0, 3.0, 0.5]))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x.unflatten(1, (4, 4)))).sum(1) * self.scale


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_batch_norm_over_tokens_is_not_folded_into_features(scale):
    model, x = Tokens(scale).eval(), torch.rand(5, 16)
    folded = fold_batch_norm(model, x)
    assert sum(isinstance(module, nn.BatchNorm1d) for module in folded.modules()) == 1
    torch.testing.assert_close(folded(x), model(x), rtol=1e-5, atol=1e-6 * scale)
    data = Split((x.view(5, 1, 4, 4) * 255).to(torch.uint8), torch.zeros(5, dtype=torch.int64))
    flat = nn.Sequential(nn.Flatten(), model)
    result = verify(flat, data, 0.0)[0]
    with torch.no_grad():
        assert torch.equal(result.prediction, flat(data.images / 255).argmax(1))


def test_a_batch_norm_behind_one_that_cannot_be_folded_stays():
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.BatchNorm1d(16), nn.Linear(16, 3)).eval()
    folded = fold_batch_norm(model, torch.rand(2, 1, 4, 4))
    assert sum(isinstance(module, nn.BatchNorm1d) for module in folded.modules()) == 2


@settings(max_examples=30, deadline=None)
@given(scale=st.sampled_from([1e-6, 1e-3, 1.0, 1e6]), offset=st.sampled_from([0.0, 1.0, 100.0]))
def test_a_forward_that_lies_is_noticed_at_every_scale(scale, offset):
    """A branch that a recording takes and the module does not (a Proxy is no Tensor)."""

    class Lying(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x) * scale
            return (y * 1.001 if isinstance(x, Tensor) else y) + offset * scale

    for dtype in (torch.float32, torch.float64):
        with pytest.raises(UnsupportedOperation, match="do not reproduce"):
            BoundedModel(Lying().to(dtype).eval(), images().to(dtype))


def test_agreement_is_relative_to_the_spread_of_the_logits():
    logits = torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.float64)
    for scale in (1e-30, 1e-6, 1.0, 1e6):
        assert agree(logits * scale, logits * scale, 1e-7, 1e-12)
        assert not agree((logits + torch.tensor([0, 1e-5, 0])) * scale, logits * scale, 1e-7, 1e-12)
    assert not agree(logits[:, :2], logits, 1e-7, 1e-12)


@pytest.mark.parametrize("bias", [0.0, 1e3, -1e6])
@pytest.mark.parametrize("other", range(3))
def test_agreement_on_an_output_is_hidden_by_no_bias(bias, other):
    logits = torch.rand(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits[:, other] += bias
    assert agree(logits, logits.clone(), 1e-4, 1e-12)
    for output in range(3):
        changed = logits.clone()
        changed[0, output] += 1e-3
        assert not agree(changed, logits, 1e-4, 1e-12)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_agreement_elsewhere_is_hidden_by_nothing_that_is_not_finite(value):
    logits = torch.rand(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits[1, 2] = value
    assert agree(logits + 1e-9, logits, 1e-4, 1e-12)
    for place in [(0, 0), (0, 2), (1, 2)]:
        changed = logits.clone()
        changed[place] = 0.5
        assert not agree(changed, logits, 1e-4, 1e-12)
        assert not agree(logits, changed, 1e-4, 1e-12)


# --- several names for one tensor -------------------------------------------------------------------------------------


def aliases(draw: st.DrawFn) -> Forward:
    """x's own value gets a second name by a chain of aliases; one of the two is written into, and both are read."""
    links = {
        "view": lambda self, x: x.view(-1, 4),
        "reshape": lambda self, x: x.reshape(x.shape),
        "flatten": lambda self, x: x.unsqueeze(1).flatten(1),
        "dropout": lambda self, x: F.dropout(x, 0.5, False),
        "Dropout": lambda self, x: self.dropout(x),
        "dropout of nothing": lambda self, x: F.dropout(x, 0.0, True),
        "Identity": lambda self, x: self.identity(x),
        "detach": lambda self, x: x.detach(),
        "contiguous": lambda self, x: x.contiguous(),
        "to": lambda self, x: x.to(x.dtype),
        "slice": lambda self, x: x[:, :],
        "transposed twice": lambda self, x: x.unflatten(1, (2, 2)).transpose(1, 2).transpose(2, 1).flatten(1),
        "chunk": lambda self, x: x.chunk(1, 1)[0],
        "split": lambda self, x: x.split(4, 1)[0],
        "clone": lambda self, x: x.clone(),
        "computed": lambda self, x: x * 1,
    }
    writes = [
        lambda x: x.relu_(),
        lambda x: F.relu(x, inplace=True),
        lambda x: F.relu(x, True),
        lambda x: F.leaky_relu(x, 0.1, True),
        lambda x: torch.relu_(x),
        lambda x: x.mul_(3).add_(1),
        lambda x: x.sub_(other=0.25),
        lambda x: x.__iadd__(1.0),
        lambda x: nn.functional.dropout(x, 0.5, False, True),
    ]
    chain = [links[name] for name in draw(st.lists(st.sampled_from(sorted(links)), min_size=0, max_size=3))]
    write, base_written = draw(st.sampled_from(writes)), draw(st.booleans())
    read = draw(st.sampled_from([lambda x, y, z: x - 0.5 * y, lambda x, y, z: x, lambda x, y, z: y + 0.1 * z]))

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        x = self.layer(x)
        y = x
        for link in chain:
            y = link(self, y)
        z = write(x if base_written else y)
        return read(x, y, z)

    return forward


@settings(max_examples=120, deadline=None)
@given(forward=st.composite(aliases)())
def test_writes_reach_every_name_or_are_refused(forward):
    model = Written(forward).double().eval()
    with torch.no_grad():
        expected = model(images())
        try:
            net = BoundedModel(model, images())
        except UnsupportedOperation as error:
            assert "in place" in str(error)  # noqa: PT017
            return
        x = images()
        torch.testing.assert_close(net.ibp(Box(x, x)).output.center, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: _both_parts(self.layer(x)),
        lambda self, x: _view_of_a_view(self.layer(x)),
        lambda self, x: _base(self.layer(x)),
        lambda self, x: _zeros(self.layer(x)),
    ],
)
def test_writes_into_memory_that_is_read_by_another_name_are_refused(forward):
    with torch.no_grad(), pytest.raises(UnsupportedOperation, match="writes in"):
        BoundedModel(Written(forward).eval(), images().float())


def _both_parts(x: Tensor) -> Tensor:
    one, _ = x.chunk(2, 1)
    one.relu_()
    return x


def _view_of_a_view(x: Tensor) -> Tensor:
    x.view(-1, 2, 2)[:, 1].relu_()
    return x


def _base(x: Tensor) -> Tensor:
    view = x.view(-1, 2, 2)
    x.relu_()
    return view.flatten(1)


def _zeros(x: Tensor) -> Tensor:
    zeros = torch.zeros_like(x)
    zeros.add_(other=x)
    return zeros + x


def test_dropout_of_nothing_in_training_returns_its_argument():
    model = Written(lambda self, x: _relu_of(self.dropout(x * 1.0), x)).double().train()
    model.dropout.p = 0.0
    x = images()
    found = BoundedModel(model, x).ibp(Box(x, x), clean=x).output
    torch.testing.assert_close(found.center, model(x))


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: self.layer(x).detach(),
        lambda self, x: self.layer(x).detach() * 2 + 1,
        lambda self, x: F.relu(self.layer(x)).detach() - 0.5 * x,
        lambda self, x: self.layer(F.relu(torch.detach(x) + 0.1)),
    ],
)
def test_a_detached_value_is_not_a_constant(forward):
    """It has no derivative, by which a map is transposed."""
    holds(Written(forward))


def _relu_of(y: Tensor, x: Tensor) -> Tensor:
    y -= 0.5
    F.relu(y, True)
    return y + x


# --- the forward is not what was recorded -----------------------------------------------------------------------------


def a_hook_on_the_root(model: nn.Module) -> None:
    model.register_forward_hook(lambda module, args, output: output * 2 + 1)


def a_hook_before_the_root(model: nn.Module) -> None:
    model.register_forward_pre_hook(lambda module, args: (args[0] * 3,))


def a_forward_of_the_instance(model: nn.Module) -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return F.relu(self.layer(x)) - 1

    model.forward = types.MethodType(forward, model)


def a_forward_of_a_layer(model: nn.Module) -> None:
    weight = torch.eye(4, dtype=torch.float64)
    model.layer.forward = lambda x: F.linear(x, weight * 2)


def an_attribute(model: nn.Module) -> None:
    model.number = -7.0


def a_layer(model: nn.Module) -> None:
    model.layer = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).double()


def weights(model: nn.Module) -> None:
    model.load_state_dict({name: value * 1.7 + 0.1 for name, value in model.state_dict().items()})


def a_buffer(model: nn.Module) -> None:
    model.c = torch.tensor([9.0, 8.0, 7.0, 6.0], dtype=torch.float64)


def a_settings_object(model: nn.Module) -> None:
    model.settings.number = 5.0


def an_array(model: nn.Module) -> None:
    model.array[0] = 11.0


def the_class(model: nn.Module) -> None:
    model.__class__ = type("Other", (Written,), {"forward": lambda self, x: self.layer(x) * 4})


def a_held_tensor(model: nn.Module) -> None:
    model.held[0] = model.held[0] + 5


def a_parametrization(model: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(model.layer)
    with torch.no_grad():
        model.layer.parametrizations.weight.original0.mul_(3)


CHANGES = [
    a_hook_on_the_root,
    a_hook_before_the_root,
    a_forward_of_the_instance,
    a_forward_of_a_layer,
    an_attribute,
    a_layer,
    weights,
    a_buffer,
    a_settings_object,
    an_array,
    the_class,
    a_held_tensor,
    a_parametrization,
]


def changeable() -> nn.Module:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        y = self.layer(x) * (1 / self.c) * self.number
        return y * self.settings.number + float(self.array[0]) + self.held[0]

    model = Written(forward).double().eval()
    model.settings, model.array = types.SimpleNamespace(number=0.5), np.array([1.0])
    model.held = [torch.ones(4, dtype=torch.float64)]
    return model


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("recorded", [False, True], ids=["before recording", "after"])
def test_bounds_follow_the_module_as_it_is_now(change, recorded):
    model = changeable()
    net = BoundedModel(model, images()) if recorded else None
    if recorded:
        net.ibp(linf_box(images(), 0.1))
    change(model)
    holds(model, net or BoundedModel(model, images()))


def test_a_tensor_that_replaces_another_at_its_address_is_noticed():
    model = changeable()
    net = BoundedModel(model, images())
    for number in range(50):
        model.held = [torch.full((4,), float(number), dtype=torch.float64)]
        x = images()
        torch.testing.assert_close(net.ibp(Box(x, x)).output.center, model(x))


def test_a_hook_that_replaces_another_is_noticed():
    model = changeable()
    first = model.register_forward_hook(lambda module, args, output: output + 1)
    net = BoundedModel(model, images())
    first.remove()
    model.register_forward_hook(lambda module, args, output: output * 2)
    holds(model, net)


def test_the_mode_of_a_single_layer_is_followed():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).double().train()
    net, x = BoundedModel(model, images()), images()
    net.ibp(Box(x, x), clean=x)
    model[1].eval()
    torch.testing.assert_close(net.ibp(Box(x, x), clean=x).output.center, model(x))
    model[1].train()
    expected = deepcopy(model)(x)
    torch.testing.assert_close(net.ibp(Box(x, x), clean=x).output.center, expected)


def _autocast(self: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return self.layer(x)


def _no_grad(self: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        x = self.layer(x)
    return x * 2


@pytest.mark.parametrize("forward", [_autocast, _no_grad, torch.no_grad()(lambda self, x: self.layer(x))])
def test_a_forward_that_changes_its_surroundings_is_refused(forward):
    with pytest.raises(UnsupportedOperation, match="autocast or no_grad"):
        BoundedModel(Written(forward).eval(), images().float())
