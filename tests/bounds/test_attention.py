"""Products of two values, softmax, normalization and attention, against literal transcriptions, samples and corners."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from certtrain.bounds import BoundedModel, Box, bilinear, linf_box
from certtrain.bounds.attention import attend_box
from certtrain.bounds.graph import Call, Ref
from certtrain.bounds.interval import RULES
from certtrain.bounds.linear.backward import PARAMETRIZED
from certtrain.bounds.linear.backward import RULES as BACKWARD
from certtrain.bounds.lirpa import LirpaModel
from certtrain.bounds.normalization import normalized, normalized_box
from certtrain.bounds.softmax import log_odds, softmax
from certtrain.errors import UnsupportedOperation
from tests.bounds.random_networks import points_of
from tests.bounds.test_lirpa import needs_auto_lirpa
from tests.networks import Do


def random_box(*shape: int, radius: float = 0.5, seed: int = 0) -> Box:
    generator = torch.Generator().manual_seed(seed)
    center, width = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return Box(center - radius * width.abs(), center + radius * width.abs())


def corners_of(*boxes: Box) -> list[tuple[Tensor, ...]]:
    """Every choice of an end for every element of a few small boxes; one image each."""
    ends = [torch.stack([box.lower.flatten(), box.upper.flatten()], 1) for box in boxes]
    sizes = [len(end) for end in ends]
    choices = torch.tensor(list(itertools.product([0, 1], repeat=sum(sizes)))).split(sizes, 1)
    chosen = [end.gather(1, choice.T) for end, choice in zip(ends, choices, strict=True)]
    return [
        tuple(part[:, i].view(box.shape) for part, box in zip(chosen, boxes, strict=True))
        for i in range(chosen[0].shape[1])
    ]


class Does(nn.Module):
    """A function between a linear layer that makes its input and one that takes its output."""

    def __init__(self, function, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.function, self.shape = function, shape
        self.first, self.last = nn.Linear(5, torch.Size(shape).numel()), nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x).view(-1, *self.shape)).flatten(1))


class With(nn.Module):
    """Layers, and how they are called."""

    def __init__(self, function, **layers: nn.Module) -> None:
        super().__init__()
        self.function, self.layers = function, nn.ModuleDict(layers)
        self.register_buffer("mask", torch.ones(4, 4).tril().bool())

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def network(function, shape: tuple[int, ...], seed: int = 0) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    model, x = Does(function, shape).double(), torch.rand(3, 5, dtype=torch.float64)
    model(x)
    for parameter in model.parameters():  # affine norms start as the identity
        with torch.no_grad():
            parameter += 0.2 * torch.randn_like(parameter)
    return model.eval(), x


# --- intervals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0.0, 3.0], ids=["of both signs", "of one"])
def test_products_are_as_wide_as_their_corners(shift):
    x, y = random_box(1, 2, 2, seed=1), random_box(1, 2, 2, seed=2)
    x = Box(x.lower + shift, x.upper + shift)
    for function in (torch.mul, torch.matmul):
        values = torch.cat([function(one, other) for one, other in corners_of(x, y)])
        box = RULES[function](x, y)
        torch.testing.assert_close(box.lower, values.amin(0, True))
        torch.testing.assert_close(box.upper, values.amax(0, True))
        wide = bilinear.centered(function, x, y)
        assert (wide.lower <= box.lower + 1e-12).all()
        assert (wide.upper >= box.upper - 1e-12).all()
        assert (wide.radius <= 1.5 * box.radius).all()  # Rump's bound, of centre and radius alone
        if shift:
            torch.testing.assert_close(wide.radius, box.radius)


@pytest.mark.parametrize("equation", ["bij,bjk->bik", "bij,bkj->bki", "bij,bij->bi", "bij,bkl->bijkl"])
@pytest.mark.parametrize("most", [0, 10**9], ids=["by matrices", "by corners"])
def test_einsum_of_two_boxes_holds_its_corners(equation, most, monkeypatch):
    monkeypatch.setattr(bilinear, "MOST_CORNERS", most)
    x, y = random_box(1, 2, 2, seed=1), random_box(1, 2, 2, seed=2)
    values = torch.cat([torch.einsum(equation, one, other) for one, other in corners_of(x, y)])
    box = bilinear.einsum_product(x, y, equation)
    assert (box.lower <= values.amin(0) + 1e-12).all()
    assert (box.upper >= values.amax(0) - 1e-12).all()
    if most:
        torch.testing.assert_close(box.upper[0], values.amax(0))


def test_a_value_times_itself_is_its_square():
    x = Box(torch.tensor([-1.0, 2.0]), torch.tensor([3.0, 4.0]))
    box = bilinear.product(x, x)
    assert (box.lower.tolist(), box.upper.tolist()) == ([0.0, 4.0], [9.0, 16.0])


def test_a_quotient_by_what_may_be_zero_is_anything():
    x, y = Box(torch.ones(2), torch.ones(2)), Box(torch.tensor([-1.0, 2.0]), torch.tensor([1.0, 4.0]))
    box = bilinear.quotient(x, y)
    assert (box.lower.tolist(), box.upper.tolist()) == ([-torch.inf, 0.25], [torch.inf, 0.5])


@pytest.mark.parametrize("size", [1.0, 30.0, 1e4])
def test_softmax_is_exact_and_stable(size):
    """Against e^l / (Σ e^u - e^{u_k} + e^{l_k}), its terms summed one by one, without the k-th."""
    x = random_box(2, 4, radius=1.0)
    x = Box(size * x.lower, size * x.upper)
    box = softmax(x, 1)
    for k in range(4):
        others = [j for j in range(4) if j != k]
        lower = 1 / (1 + (x.upper[:, others] - x.lower[:, k, None]).exp().sum(1))
        upper = 1 / (1 + (x.lower[:, others] - x.upper[:, k, None]).exp().sum(1))
        torch.testing.assert_close(box.lower[:, k], lower, rtol=1e-9, atol=0)
        torch.testing.assert_close(box.upper[:, k], upper, rtol=1e-9, atol=0)
    single = softmax(Box(x.lower.float(), x.upper.float()), 1)
    torch.testing.assert_close(single.lower.double(), box.lower, rtol=1e-5 * size, atol=1e-30)


def test_softmax_of_a_dominant_logit_keeps_the_others():
    """Σ e^u - e^{u_k} is 0 in float32 here, and the lower end would be 1."""
    x = Box(torch.tensor([[-25.0, -30.0, -30.0]]), torch.tensor([[0.0, -30.0, -30.0]]))
    expected = 1 / (1 + 2 * torch.tensor(-5.0).exp())
    torch.testing.assert_close(softmax(x, 1).lower[0, 0], expected)


def test_gradients_of_softmax_are_finite():
    for lower, upper in (([0.0], [1.0]), ([-1e30, 0.0], [-1e30, 1.0])):
        ends = [torch.tensor([end]).requires_grad_() for end in (lower, upper)]
        least, most = (odds.sigmoid() for odds in log_odds(Box(*ends), 1))
        gradients = torch.autograd.grad((least + most).sum(), ends, allow_unused=True)
        assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)


def simplex_points(p: Box, count: int) -> list[Tensor]:
    """Weights of sum 1 within the box, from its lower ends up in random orders: vertices of that set."""
    found = []
    for _ in range(count):
        weights, left = p.lower.clone(), 1 - p.lower.sum(-1)
        for j in torch.randperm(p.shape[-1]).tolist():
            more = torch.minimum(left, (p.upper - p.lower)[..., j])
            weights[..., j] += more
            left = left - more
        found.append(weights)
    return found


@pytest.mark.parametrize("radius", [0.01, 0.5, 5.0])
def test_averages_by_softmax_hold_every_average_and_do_not_see_what_all_values_share(radius):
    p, v = softmax(random_box(2, 3, 4, radius=radius), 2), random_box(2, 4, 2, radius=0.2, seed=3)
    v = Box(v.lower + 5, v.upper + 5)
    box, product = attend_box(p, v), bilinear.centered(torch.matmul, p, v)
    for weights in simplex_points(p, 50):
        assert box.contains(weights @ v.lower, 1e-9).all()
        assert box.contains(weights @ v.upper, 1e-9).all()
    assert box.radius.sum() < product.radius.sum()
    assert (box.upper <= v.upper.amax(1, keepdim=True) + 1e-12).all()


def test_normalized_values_are_exact_over_a_box_of_deviations():
    """The extremes are at corners or where other deviations are 0; a box of two sides and one through 0 has both."""
    d = Box(torch.tensor([[-0.5, 0.2, -3.0]]).double(), torch.tensor([[0.7, 1.0, -2.0]]).double())
    axes = [torch.linspace(low, high, 101).double() for low, high in zip(d.lower[0], d.upper[0], strict=True)]
    grid = torch.cartesian_prod(*axes)
    values = grid / (grid.square().mean(1, keepdim=True) + 0.01).sqrt()
    box = normalized_box(d, d, d, (-1,), 0.01)
    torch.testing.assert_close(box.lower[0], values.amin(0), rtol=0, atol=2e-3)
    torch.testing.assert_close(box.upper[0], values.amax(0), rtol=0, atol=2e-3)
    assert (box.lower[0] <= values.amin(0) + 1e-12).all()
    assert (box.upper[0] >= values.amax(0) - 1e-12).all()


@pytest.mark.parametrize("radius", [1e-6, 0.1, 2.0, 50.0])
def test_layer_norm_is_no_looser_than_its_steps_one_after_the_other(radius):
    x = random_box(4, 6, radius=radius)
    box = BoundedModel(nn.LayerNorm(6, elementwise_affine=False).double(), x.center).ibp(x).output
    d = Box(x.lower - x.upper.mean(1, keepdim=True), x.upper - x.lower.mean(1, keepdim=True))
    squares = bilinear.squared(d)
    deviation = [(end.mean(1, keepdim=True) + 1e-5).sqrt() for end in (squares.lower, squares.upper)]
    steps = bilinear.quotient(d, Box(*(end.expand(d.shape) for end in deviation)))
    assert (box.lower >= steps.lower - 1e-9).all()
    assert (box.upper <= steps.upper + 1e-9).all()


# --- planes -----------------------------------------------------------------------------------------------------------


def planes_hold(call: Call, boxes: dict[int, Box], values, t: Tensor | None = None, seed: int = 0) -> None:
    """Random functionals of the result are above their linear bounds at all `values`: inputs of the call."""
    shape = RULES[call.function](*[boxes[arg.index] if isinstance(arg, Ref) else arg for arg in call.args]).shape
    a = torch.randn(shape[0], 5, *shape[1:], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if call.function in PARAMETRIZED:
        contributions, constant = PARAMETRIZED[call.function](call, a, boxes, t)
    else:
        contributions, constant = BACKWARD[call.function](call, a, boxes)
    for inputs in values:
        by_index = dict(zip(boxes, inputs, strict=True))
        exact = call.function(*[by_index[arg.index] if isinstance(arg, Ref) else arg for arg in call.args])
        bound = constant + sum((part * by_index[ref.index][:, None]).flatten(2).sum(2) for ref, part in contributions)
        assert (bound <= (a * exact[:, None]).flatten(2).sum(2) + 1e-8).all()


@pytest.mark.parametrize("t", [None, -1.0, 0.3, 1.0])
@pytest.mark.parametrize("function", [torch.mul, torch.matmul], ids=["mul", "matmul"])
def test_planes_of_products_hold_for_every_parameter(function, t):
    boxes = {1: random_box(1, 2, 2, seed=1), 2: random_box(1, 2, 2, seed=2)}
    call = Call(3, function, (Ref(1), Ref(2)), "", affine=False)
    parameter = None if t is None else torch.full((1, 1, 2, 2), t, dtype=torch.float64)
    planes_hold(call, boxes, corners_of(*boxes.values()), parameter)


@pytest.mark.parametrize("radius", [0.0, 1e-8, 0.3, 3.0, 300.0])
@pytest.mark.parametrize("function", [torch.softmax, torch.log_softmax], ids=["softmax", "log_softmax"])
def test_planes_of_softmax_hold(function, radius):
    x = random_box(3, 2, 4, radius=radius)
    x = Box(x.lower + 1000.0, x.upper + 1000.0)
    call = Call(2, function, (Ref(1), -1), "", affine=False)
    planes_hold(call, {1: x}, [(point,) for point in points_of(x, 200)])


@pytest.mark.parametrize("radius", [0.0, 1e-7, 0.1, 1.0, 30.0])
def test_planes_of_normalized_values_hold(radius):
    d = random_box(3, 5, radius=radius)
    squares = bilinear.squared(d)
    factor = Box(*((end.mean(1, keepdim=True) + 1e-3).rsqrt() for end in (squares.upper, squares.lower)))
    call = Call(3, normalized, (Ref(1), Ref(2), Ref(1), (-1,), 1e-3), "", affine=False)
    points = points_of(d, 200)
    values = [(point, (point.square().mean(1, keepdim=True) + 1e-3).rsqrt()) for point in points]
    planes_hold(call, {1: d, 2: factor}, values)


# --- networks ---------------------------------------------------------------------------------------------------------

TOKENS = (4, 6)


def encoder_layer(**settings) -> nn.Module:
    return nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, **settings)


def attention(function, **settings) -> nn.Module:
    return With(function, attention=nn.MultiheadAttention(6, 2, batch_first=True, **settings))


CASES = {
    "post": (lambda: encoder_layer(), TOKENS),
    "pre, gelu": (lambda: encoder_layer(norm_first=True, activation="gelu", bias=False), TOKENS),
    "activation as a module": (lambda: encoder_layer(activation=nn.SiLU()), TOKENS),
    "encoder": (lambda: nn.TransformerEncoder(encoder_layer(dropout=0.0), 2, norm=nn.LayerNorm(6)), TOKENS),
    "masked encoder": (
        lambda: With(lambda self, x: self.layers["e"](x, mask=~self.mask), e=nn.TransformerEncoder(encoder_layer(), 1)),
        TOKENS,
    ),
    "attention and its weights": (
        lambda: attention(lambda self, x: torch.cat(self.layers["attention"](x, x, x), -1)),
        TOKENS,
    ),
    "unpacked": (
        lambda: attention(lambda self, x: unpacked(self.layers["attention"](x, x, x, average_attn_weights=False))),
        TOKENS,
    ),
    "causal": (lambda: attention(lambda self, x: self.layers["attention"](x, x, x, attn_mask=~self.mask)[0]), TOKENS),
    "other keys": (
        lambda: attention(lambda self, x: self.layers["attention"](x, x[:, :2, :3], x[:, :2, 1:])[0], kdim=3, vdim=5),
        TOKENS,
    ),
    "sdpa, causal": (lambda: Do(lambda x: F.scaled_dot_product_attention(x, 2 * x, x, is_causal=True)), TOKENS),
    "sdpa, mask of numbers": (
        lambda: With(lambda self, x: F.scaled_dot_product_attention(x, x, x, attn_mask=self.mask.double().log())),
        TOKENS,
    ),
    "sdpa, scale": (lambda: Do(lambda x: F.scaled_dot_product_attention(x, x, x + 1, scale=0.3)), TOKENS),
    "softmax as a module": (lambda: With(lambda self, x: self.layers["s"](x @ x.mT) @ x, s=nn.Softmax(-1)), TOKENS),
    "layer norm over two axes": (lambda: nn.LayerNorm((4, 6)), TOKENS),
    "layer norm by torch": (lambda: Do(lambda x: torch.layer_norm(x, (6,))), TOKENS),
    "layer norm of sizes that are asked for": (lambda: Do(lambda x: F.layer_norm(x, x.shape[1:])), TOKENS),
    "layer norm of a size asked for": (lambda: Do(lambda x: torch.layer_norm(x, x.size()[-1:])), TOKENS),
    "layer norm of a size in a list": (lambda: Do(lambda x: F.layer_norm(x, [x.shape[-1]])), TOKENS),
    "rms norm": (lambda: nn.RMSNorm(6), TOKENS),
    "rms norm of sizes that are asked for": (lambda: Do(lambda x: F.rms_norm(x, x.shape[2:], eps=0.1)), TOKENS),
    "rms norm by torch": (lambda: Do(lambda x: torch.rms_norm(x, (6,), eps=0.1)), TOKENS),
    "group norm": (lambda: nn.GroupNorm(2, 4), (4, 2, 3)),
    "group norm of features": (lambda: nn.GroupNorm(2, 6), (6,)),
    "instance norm 1d": (lambda: nn.InstanceNorm1d(4, affine=True), TOKENS),
    "instance norm 2d": (lambda: nn.InstanceNorm2d(2), (2, 3, 3)),
    "instance norm 3d": (lambda: nn.InstanceNorm3d(1), (1, 2, 2, 3)),
    "instance norm, statistics": (lambda: nn.InstanceNorm1d(4, track_running_stats=True), TOKENS),
}


NORMALIZATIONS = {
    "layer": lambda n: nn.LayerNorm(n, eps=1.0, elementwise_affine=False),
    "rms": lambda n: nn.RMSNorm(n, eps=1.0, elementwise_affine=False),
    "group": lambda n: nn.GroupNorm(1, n, eps=1.0, affine=False),
}


@pytest.mark.parametrize("method", ["crown-ibp", "crown", "alpha-crown"])
@pytest.mark.parametrize("kind", NORMALIZATIONS)
def test_raw_lines_hold_where_a_backward_pass_takes_a_mean_of_squares_for_negative(kind, method):
    """The skip connection rewards whatever pushes the mean of squares up, below 0 at one end of CROWN's raw box."""
    torch.manual_seed(0)
    n = 50

    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.skip = NORMALIZATIONS[kind](n), nn.Linear(n, 2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x)[:, :2] + self.skip(x)

    model = Skip().double().eval()
    lower, upper = torch.full((1, n), -0.3, dtype=torch.float64), torch.full((1, n), 0.9, dtype=torch.float64)
    lower[0, :2], upper[0, :2] = torch.tensor([0.0, 0.199]), torch.tensor([0.0, 0.201])
    for sign in (1, -1):
        with torch.no_grad():
            model.skip.weight.zero_()
            model.skip.weight[1, 2:] = sign * 0.03 / n
        net, label = BoundedModel(model, lower), torch.tensor([0])
        found = net.margins(Box(lower, upper), label, method, intersect=False)[0, 1]
        points = lower + (upper - lower) * torch.rand(1000, n, dtype=torch.float64).round()
        points = torch.cat([points, lower + (upper - lower) * torch.linspace(0, 1, 200, dtype=torch.float64)[:, None]])
        with torch.no_grad():
            logits = model(points)
        assert (logits[:, 0] - logits[:, 1]).min() >= found - 1e-12


def attend_across(x: Tensor, **settings) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x, **settings)


def unpacked(result: tuple[Tensor, Tensor]) -> Tensor:
    output, weights = result
    return output.sum(-1) + weights.amax((1, 2))


@pytest.mark.parametrize("name", CASES)
def test_no_point_leaves_the_bounds_of_a_network(name):
    make, shape = CASES[name]
    torch.manual_seed(0)
    model, x = network(make(), shape)
    net, labels = BoundedModel(model, x), torch.tensor([0, 1, 2])
    with torch.no_grad():
        point = net.ibp(linf_box(x, 0.0)).output
        torch.testing.assert_close(point.center, model(x))
        for radius in (0.01, 0.3):
            box = linf_box(x, radius)
            output = net.ibp(box).output
            margins = [net.margins(box, labels, method, intersect=False) for method in ("crown-ibp", "crown")]
            for inside in points_of(box, 10):
                logits = model(inside)
                assert output.contains(logits, 1e-9).all()
                exact = logits.gather(1, labels[:, None]) - logits
                assert all((found <= exact + 1e-8).all() for found in margins)


def test_alpha_crown_moves_the_planes_of_products():
    model, x = network(encoder_layer(), TOKENS)
    net, labels, box = BoundedModel(model, x), torch.tensor([0, 1, 2]), linf_box(x, 0.02)
    crown, alpha = (net.margins(box, labels, method, intersect=False) for method in ("crown", "alpha-crown"))
    assert (alpha >= crown).all()
    assert (alpha > crown + 1e-4).any()
    for inside in points_of(box, 20):
        logits = model(inside)
        assert (alpha <= logits.gather(1, labels[:, None]) - logits + 1e-8).all()


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: nn.TransformerEncoderLayer(6, 2, 8), "batch_first=True"),
        (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 8), 1, None, False), "batch_first=True"),
        (
            lambda: With(lambda self, x: self.layers["a"](x, x, x)[0], a=nn.MultiheadAttention(6, 2)),
            "first axis would be the tokens'.*batch_first=True",
        ),
        (lambda: Do(lambda x: attend_across(x.transpose(0, 1)).transpose(0, 1)), "transpose.*batch axis"),
        (lambda: Do(lambda x: attend_across(x.permute(1, 0, 2)).permute(1, 0, 2)), "permute.*batch axis"),
        (lambda: attention(lambda self, x: self.layers["attention"](x, x, x, x[:, :, 0])[0]), "key_padding_mask"),
        (
            lambda: attention(lambda self, x: self.layers["attention"](x, x, x, attn_mask=x[:, :4] @ x.mT)[0]),
            "mask that depends",
        ),
        (lambda: With(lambda self, x: self.layers["e"](x, x @ x.mT), e=encoder_layer()), "mask that depends"),
        (lambda: Do(lambda x: attend_across(x, attn_mask=x @ x.mT > 0)), "gt in module"),
        (lambda: Do(lambda x: (x @ x.mT).masked_fill(x[:, None, :, 0] > 0, -1e9).softmax(-1) @ x), "gt in module"),
        (lambda: Do(lambda x: attend_across(x, attn_mask=torch.ones(3, 4, 4).bool())), "mask of each image"),
        (lambda: attention(lambda self, x: self.layers["attention"](x, x, x)[0], add_zero_attn=True), "add_zero_attn"),
        (lambda: attention(lambda self, x: self.layers["attention"](x, x, x)[0], add_bias_kv=True), "add_bias_kv"),
        (lambda: Do(lambda x: attend_across(x, attn_mask=x @ x.mT)), "mask that depends"),
        (lambda: Do(lambda x: attend_across(x, dropout_p=0.5)), r"drops out.*dropout=0"),
        (lambda: Do(lambda x: F.dropout((x @ x.mT).softmax(-1), 0.1) @ x), "random numbers"),
        (lambda: Do(lambda x: x.softmax(0) + x), "batch axis"),
        (lambda: Do(lambda x: x.softmax(-3)), "batch axis"),
        (lambda: nn.Softmax(0), "batch axis"),
        (lambda: nn.LogSoftmax(0), "batch axis"),
        (lambda: nn.Softmax(), "name it"),
        (lambda: Do(lambda x: F.softmax(x)), "name it"),
        (lambda: Do(lambda x: F.layer_norm(x, (3, 4, 6))), "batch axis"),
    ],
)
@pytest.mark.filterwarnings("ignore:Implicit dimension")
def test_what_attention_cannot_be_is_refused_by_name(make, named):
    torch.manual_seed(0)
    model = nn.Sequential(make(), nn.Flatten()).eval()
    x = torch.rand(3, *TOKENS)
    with pytest.raises(UnsupportedOperation, match=named) as caught:
        BoundedModel(model, x)
    assert len(str(caught.value)) <= 300


def test_attention_that_drops_out_is_refused_in_training_mode_alone():
    model = nn.Sequential(attention(lambda self, x: self.layers["attention"](x, x, x)[0], dropout=0.1), nn.Flatten())
    net, x = BoundedModel(model.eval(), torch.rand(2, *TOKENS)), torch.rand(2, *TOKENS)
    net.ibp(linf_box(x, 0.1))
    model.train()
    with pytest.raises(UnsupportedOperation, match=r"drops out \(p=0\.1\).*model\.eval"):
        net.ibp(linf_box(x, 0.1), clean=x)


def test_a_module_with_another_forward_is_traced_and_not_taken_for_its_base():
    class Twice(nn.LayerNorm):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model, x = network(Twice(6), TOKENS)
    torch.testing.assert_close(BoundedModel(model, x).ibp(linf_box(x, 0.0)).output.center, model(x))


def exponentials_over_their_sum(x: Tensor) -> Tensor:
    """Softmax, of operations that auto_LiRPA has planes for."""
    terms = x.exp()
    return terms / terms.sum(-1, keepdim=True)


# auto_LiRPA's interval of LayerNorm forgets the epsilon, and would be of another function with a larger one.
LAYER_NORM = nn.LayerNorm(6, eps=1e-12)


def halves_multiplied(x: Tensor) -> Tensor:
    return x[:, :2] @ x[:, 2:].transpose(1, 2)


@needs_auto_lirpa
@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (halves_multiplied, (4, 3)),
        (lambda x: x[:, :2] * x[:, 2:], (4, 3)),
        (lambda x: x.softmax(-1) * 2, (4,)),
        (LAYER_NORM, (6,)),
        (LAYER_NORM, TOKENS),
    ],
    ids=["matmul", "mul", "softmax", "layer norm", "layer norm of tokens"],
)
@pytest.mark.parametrize("radius", [0.01, 0.2])
def test_intervals_are_never_looser_than_auto_lirpas(function, shape, radius):
    model, x = network(copy.deepcopy(function), shape)
    box = linf_box(x, radius)
    ours, other = BoundedModel(model, x).ibp(box).output, LirpaModel(model, x).ibp(box).output
    assert (ours.lower >= other.lower - 1e-9).all()
    assert (ours.upper <= other.upper + 1e-9).all()


@needs_auto_lirpa
@pytest.mark.parametrize(
    ("function", "same", "shape", "method"),
    [
        (halves_multiplied, halves_multiplied, (4, 3), "crown-ibp"),
        (lambda x: x.softmax(-1), exponentials_over_their_sum, (4,), "crown"),
        (LAYER_NORM, LAYER_NORM, (6,), "crown"),
        (LAYER_NORM, LAYER_NORM, TOKENS, "crown"),
    ],
    ids=["matmul", "softmax", "layer norm", "layer norm of tokens"],
)
@pytest.mark.parametrize("radius", [0.01, 0.2])
def test_planes_are_on_average_no_looser_than_auto_lirpas(function, same, shape, method, radius):
    gains, labels = [], torch.tensor([0, 1, 2])
    for seed in range(4):
        (model, x), (twin, _) = (network(copy.deepcopy(either), shape, seed) for either in (function, same))
        twin.load_state_dict(model.state_dict())
        found = [
            net.margins(linf_box(x, radius), labels, method, intersect=False).mean()
            for net in (BoundedModel(model, x), LirpaModel(twin, x))
        ]
        gains.append(found[0] - found[1])
    assert torch.stack(gains).mean() >= 0
