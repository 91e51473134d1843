from __future__ import annotations

import copy
import math
import subprocess
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import certtrain.models
from certtrain.affine_layers import AFFINE_MODULES, affine_weights, classifier_tensors
from certtrain.bounds import BoundedModel, linf_box
from certtrain.errors import UsageError
from certtrain.initialization import ibp_init_, initialize_
from certtrain.models import build_model
from tests.networks import Block


def test_weights_have_the_published_deviation_and_the_classifier_keeps_its_own():
    model = build_model("cnn7", (3, 32, 32), 10, options={"width": 16, "linear_width": 64, "batch_norm": False})
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    classifier = layers[-1].weight.clone()
    torch.manual_seed(0)
    ibp_init_(model)
    for layer in layers[:-1]:
        fan_in = layer.weight[0].numel()
        assert layer.weight.std().item() == pytest.approx(math.sqrt(2 * math.pi) / fan_in, rel=0.1)
    assert torch.equal(layers[-1].weight, classifier)


def test_the_radius_neither_grows_nor_shrinks_with_depth():
    """Fully connected, where the theory is exact; under Kaiming each layer multiplies it by about √fan_in."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *[m for _ in range(8) for m in (nn.Linear(256, 256, bias=False), nn.ReLU())], nn.Linear(256, 3)
    )
    x = torch.rand(64, 256)

    def growth() -> float:
        radii = [box.radius.mean() for box in BoundedModel(model, x).ibp(linf_box(x, 0.05)).relu_inputs]
        return ((radii[-1] / radii[0]) ** (1 / 7)).item()

    assert growth_under("ibp", model, growth) == pytest.approx(1.0, abs=0.15)
    assert growth_under("kaiming", model, growth) > 5


@pytest.mark.parametrize("layers", [2, 8])
def test_the_radius_grows_by_less_than_e_through_attention_and_residual_sums(layers):
    """However many; without norms, which would divide by deviations that the initialization has made small."""
    torch.manual_seed(0)
    options = {"norm": "none", "depth": layers, "width": 64}
    model, x = build_model("vit", (1, 8, 8), 10, options=options), torch.rand(16, 1, 8, 8)

    def growth() -> float:
        radii = [box.radius.mean() for box in BoundedModel(model, x).ibp(linf_box(x, 1e-4)).relu_inputs]
        return (radii[-1] / radii[0]).item()

    assert 1 < growth_under("ibp", model, growth) < math.e
    assert growth_under("xavier", model, growth) > 10 ** (layers / 2)


class Encoder(nn.Module):
    """Two sums within the layer, one behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3, 32), nn.Linear(32, 3)
        self.layer = nn.TransformerEncoderLayer(32, 2, 64, 0.0, batch_first=True)
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(self.stem(x))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(x.mean(1))


def test_weights_of_torchs_attention_have_their_deviations():
    model = ibp_init_(Encoder())
    expected = {  # as a multiple of √(2π) / fan_in
        "stem.weight": 1,
        "layer.self_attn.in_proj_weight": 1 / 2,
        "layer.self_attn.out_proj.weight": 1 / 6,
        "layer.linear1.weight": 1 / 2,
        "layer.linear2.weight": 1 / 3,
        "attention.in_proj_weight": 1 / 2,
        "attention.out_proj.weight": 1 / 6,
    }
    for name, factor in expected.items():
        weight = model.get_parameter(name).detach()
        assert weight.std() * weight.shape[1] / math.sqrt(2 * math.pi) == pytest.approx(factor, rel=0.2), name


def growth_under(scheme: str, model: nn.Module, growth) -> float:
    initialize_(model, scheme)
    return growth()


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.block = Block(4, 4, 1)
        self.after = nn.Conv2d(4, 4, 3, padding=1)
        self.hidden, self.head = nn.Linear(4 * 16, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.block(torch.relu(self.stem(x)))
        return self.head(torch.relu(self.hidden(torch.relu(self.after(h) + h).flatten(1))))


def test_weights_behind_a_relu_of_a_sum_are_halved():
    """Found on the traced network: `after` and, through the flatten, `hidden`, but neither stem nor block."""
    model = Residual()
    plain = {name: torch.empty_like(p) for name, p in model.named_parameters()}
    torch.manual_seed(3)
    for name in ("stem", "block.conv1", "block.conv2", "after", "hidden"):
        weight = plain[f"{name}.weight"]
        nn.init.normal_(weight, 0.0, math.sqrt(2 * math.pi) / weight[0].numel())
    torch.manual_seed(3)
    ibp_init_(model)
    weights = dict(model.named_parameters())
    for name, factor in {"stem": 1, "block.conv1": 1, "block.conv2": 1, "after": 0.5, "hidden": 0.5}.items():
        torch.testing.assert_close(weights[f"{name}.weight"], factor * plain[f"{name}.weight"])


@pytest.mark.parametrize("batch_norm", [False, True], ids=["no-bn", "full-bn"])
@pytest.mark.parametrize(
    ("name", "shape", "options", "halved"),
    [
        # The first block looks at the ReLU of one convolution, all later ones and the linear layer at that of a sum.
        (
            "wide-resnet",
            (3, 32, 32),
            {},
            {"block2.branch.conv1", "block2.shortcut", "block3.branch.conv1", "block3.shortcut", "linear"},
        ),
        (
            "resnext",
            (3, 32, 32),
            {},
            {"block2.branch.conv1", "block2.shortcut", "block3.branch.conv1", "block3.shortcut", "linear"},
        ),
        (
            "resnext",  # of TinyImageNet: in every stage a second block, whose shortcut is an identity
            (3, 64, 64),
            {},
            {f"block{i}.branch.conv1" for i in (2, 3, 4, 5, 6)} | {"block3.shortcut", "block5.shortcut", "linear"},
        ),
        ("cnn7", (3, 32, 32), {}, set()),
    ],
    ids=["wide-resnet", "resnext", "resnext-64", "cnn7"],
)
def test_exactly_the_layers_behind_a_sum_are_halved(name, shape, options, halved, batch_norm):
    model = build_model(name, shape, 10, options=options | {"linear_width": 64, "batch_norm": batch_norm})
    torch.manual_seed(0)
    ibp_init_(model)
    found = set()
    for layer_name, layer in named_affine_layers(model.network)[:-1]:
        weight = layer.weight.detach().double()
        ratio = (weight.std() / (math.sqrt(2 * math.pi) / weight[0].numel())).item()
        assert min(abs(ratio - 1), abs(ratio - 0.5)) < 6 / math.sqrt(weight.numel())
        if ratio < 0.75:
            found.add(layer_name)
    assert found == halved


def named_affine_layers(network: nn.Sequential) -> list[tuple[str, nn.Module]]:
    """Convolutions and linear layers, from the stem to the classifier, called after their place in the network."""
    found, block = [], 0
    for module in network:
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            found.append(("linear" if isinstance(module, nn.Linear) else "conv", module))
        elif isinstance(module, certtrain.models.Residual):
            block += 1
            convolutions = [m for m in module.branch if isinstance(m, nn.Conv2d)]
            found += [(f"block{block}.branch.conv{i}", m) for i, m in enumerate(convolutions, start=1)]
            found += [(f"block{block}.shortcut", m) for m in module.shortcut.modules() if isinstance(m, nn.Conv2d)]
    return found


@pytest.mark.parametrize(("name", "relus"), [("wide-resnet", 8), ("resnext", 11)])
def test_the_radius_of_residual_networks_neither_grows_nor_shrinks_with_depth(name, relus):
    """Without BatchNorm; before the ReLU of a sum it is that of two branches. Under Kaiming it explodes."""
    torch.manual_seed(0)
    model = build_model(name, (3, 16, 16), 10, options={"batch_norm": False})
    x = torch.rand(2, 3, 16, 16)

    def growth() -> list[float]:
        boxes = BoundedModel(model, x).ibp(linf_box(x, 1 / 255)).relu_inputs
        assert len(boxes) == relus
        return [(box.radius.mean() / boxes[0].radius.mean()).item() for box in boxes]

    initialize_(model, "ibp")
    assert all(0.4 < value < 2.5 for value in growth())
    initialize_(model, "kaiming")
    assert growth()[-1] > 1e4


def test_a_network_that_cannot_be_traced_is_initialized_with_a_warning():
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(50, 50), nn.Linear(50, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(torch.relu(self.one(x))) if x.sum() > 0 else self.two(x)

    model = Branching()
    with pytest.warns(UserWarning, match="cannot trace"):
        ibp_init_(model)
    assert model.one.weight.std().item() == pytest.approx(math.sqrt(2 * math.pi) / 50, rel=0.1)
    model.attention = nn.MultiheadAttention(50, 2)
    with pytest.warns(UserWarning, match="cannot trace"):
        ibp_init_(model)
    assert model.attention.in_proj_weight.std().item() == pytest.approx(math.sqrt(2 * math.pi) / 50, rel=0.1)


def test_orthogonal_xavier_and_default():
    layer = nn.Linear(8, 8)
    model = nn.Sequential(layer, nn.ReLU(), nn.Linear(8, 2))
    before = layer.weight.clone()
    assert torch.equal(initialize_(model, "default")[0].weight, before)
    initialize_(model, "orthogonal")
    torch.testing.assert_close(layer.weight @ layer.weight.T, torch.eye(8), atol=1e-5, rtol=0)
    torch.manual_seed(0)
    big = nn.Sequential(nn.Linear(300, 100), nn.Linear(100, 2))
    assert initialize_(big, "xavier")[0].weight.std().item() == pytest.approx(math.sqrt(2 / 400), rel=0.05)


def test_unknown_scheme_suggests_the_nearest():
    with pytest.raises(UsageError, match="kaiming"):
        initialize_(nn.Linear(2, 2), "kaming")


@pytest.mark.slow
@pytest.mark.parametrize("module", ["certtrain.initialization", "certtrain.regularizers"])
def test_initialization_and_regularizers_load_neither_trainer_nor_data(module):
    program = f"import sys, {module}; print([m for m in sys.modules if m.startswith('certtrain') or m == 'pydantic'])"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "certtrain" in loaded
    for heavy in ("trainer", "certtrain.data", "certtrain.runs.train", "pydantic", "certtrain.models"):
        assert heavy not in loaded


# --- every kind of affine layer --------------------------------------------------------------------------------------


class Functional(nn.Module):
    """The same layer, but its weight is a parameter of one's own that a function is called with."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.plain_weight = nn.Parameter(layer.weight.detach().clone())
        dimensions = self.plain_weight.dim() - 2
        if not dimensions:
            self.function, self.arguments = F.linear, {}
            return
        transposed = layer.transposed
        self.function = getattr(F, f"conv{'_transpose' * transposed}{dimensions}d")
        self.arguments = {"stride": layer.stride, "groups": layer.groups, "dilation": layer.dilation}

    @property
    def weight(self) -> Tensor:
        return self.plain_weight

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, weight=self.plain_weight, **self.arguments)


WRAPPERS = {
    "plain": lambda layer: layer,
    "weight-norm": parametrizations.weight_norm,
    "weight-norm-hook": nn.utils.weight_norm,
    "functional": Functional,
}


@st.composite
def layers(draw) -> nn.Module:
    kind = draw(st.sampled_from(AFFINE_MODULES))
    few = st.integers(1, 3)
    if kind is nn.Linear:
        return nn.Linear(draw(st.integers(20, 60)), draw(st.integers(20, 60)), bias=False)
    groups = draw(few)
    sizes = {"kernel_size": draw(few), "stride": draw(few), "dilation": draw(st.integers(1, 2)), "groups": groups}
    return kind(groups * draw(st.integers(6, 12)), groups * draw(st.integers(6, 12)), bias=False, **sizes)


def inputs_of_an_output(layer: nn.Module) -> float:
    """Mean number of inputs that a change of moves an output, by trying, away from the edges of images."""
    layer = copy.deepcopy(layer).double()
    nn.init.ones_(layer.weight)
    if isinstance(layer, nn.Linear):
        return layer(torch.ones(layer.in_features).double())[0].item()
    dimensions = layer.weight.dim() - 2
    reached = layer(torch.ones(1, layer.in_channels, *[14] * dimensions).double())[0, 0]  # a sum of ones
    if not layer.transposed:
        return reached[(0,) * dimensions].item()
    edge = layer.dilation[0] * layer.kernel_size[0]
    middle = slice(edge, edge + layer.stride[0])
    return reached[(middle,) * dimensions].mean().item()


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("wrapper", WRAPPERS)
@given(layer=layers())
@settings(deadline=None, max_examples=40)
def test_the_effective_weight_has_the_deviation_of_the_inputs_that_reach_an_output(wrapper, layer):
    fan_in = inputs_of_an_output(layer)
    wrapped = WRAPPERS[wrapper](layer)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ibp_init_(nn.Sequential(wrapped, nn.ReLU(), nn.Linear(7, 2)))
    effective = effective_weight(wrapped)
    ratio = effective.std().item() * fan_in / math.sqrt(2 * math.pi)
    assert ratio == pytest.approx(1, abs=5 / math.sqrt(2 * effective.numel()))


def effective_weight(layer: nn.Module) -> Tensor:
    """What the layer multiplies by, from unit inputs if it is linear: hooks have run then."""
    if isinstance(layer, nn.Linear):
        return layer(torch.eye(layer.in_features)).detach()
    for hook in layer._forward_pre_hooks.values():
        hook(layer, None)
    return layer.weight.detach()


class Masked(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * torch.ones(6))


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (lambda: parametrizations.spectral_norm(nn.Linear(6, 6)), "hidden.weight"),
        (lambda: parametrizations.orthogonal(nn.Linear(6, 6)), "hidden.weight"),
        (lambda: nn.utils.spectral_norm(nn.Linear(6, 6)), "hidden.weight"),
        (lambda: Masked(6, 6), "computed from hidden.weight"),
    ],
    ids=["spectral-norm", "orthogonal", "spectral-norm-hook", "masked"],
)
def test_a_weight_that_cannot_be_set_is_named_and_kept(layer, name):
    model = nn.Sequential(OrderedDict(first=nn.Linear(4, 6), hidden=layer(), last=nn.Linear(6, 2)))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.warns(UserWarning, match=rf"no effect on .*{name}"):
        ibp_init_(model)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, state[key])}
    assert changed == {"first.weight"}


class Product(nn.Module):
    """A layer that is written as a product; `weight` (out, in) is what it multiplies by."""

    def __init__(self, inputs: int, outputs: int, product: Callable[[Tensor, Tensor], Tensor], flipped: bool) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.rand((outputs, inputs) if flipped else (inputs, outputs)))
        self.fixed = nn.Parameter(torch.ones(outputs), requires_grad=False)
        self.product, self.flipped = product, flipped

    @property
    def weight(self) -> Tensor:
        return self.matrix if self.flipped else self.matrix.T

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.matrix) + self.fixed


PRODUCTS = {
    "x @ w": (lambda x, w: x @ w, False),
    "x.matmul(w)": (lambda x, w: x.matmul(w), False),
    "torch.mm(x, w)": (torch.mm, False),
    "torch.matmul(x, other=w)": (lambda x, w: torch.matmul(x, other=w), False),
    "x.mm(mat2=w)": (lambda x, w: x.mm(mat2=w), False),
    "x @ w.T": (lambda x, w: x @ w.T, True),
    "x @ w.mT": (lambda x, w: x @ w.mT, True),
    "torch.matmul(x, w.t())": (lambda x, w: torch.matmul(x, w.t()), True),
    "torch.addmm(b, x, w)": (lambda x, w: torch.addmm(torch.ones(w.shape[1]), x, w), False),
    "torch.addmm(h, x, w)": (lambda x, w: torch.addmm(x[:, :1], x, w), False),
    "torch.addmm(mat2=w, mat1=x, input=b, beta=2)": (
        lambda x, w: torch.addmm(mat2=w, mat1=x, input=torch.ones(w.shape[1]), beta=2),
        False,
    ),
    "b.addmm(x, w.T)": (lambda x, w: torch.ones(w.shape[0]).addmm(x, w.T), True),
    "einsum(bi,io->bo)": (lambda x, w: torch.einsum("bi,io->bo", x, w), False),
    "einsum(bi, oi -> bo)": (lambda x, w: torch.einsum("bi, oi -> bo", x, w), True),
    "einsum(oi,bi->bo)": (lambda x, w: torch.einsum("oi,bi->bo", w, x), True),
    "einsum(bi,io->bo) of w.T": (lambda x, w: torch.einsum("bi,io->bo", x, w.T), True),
}


@pytest.mark.parametrize("spelling", PRODUCTS)
def test_a_layer_that_is_written_as_a_product_is_one(spelling):
    product, flipped = PRODUCTS[spelling]
    torch.manual_seed(0)
    hidden, last = Product(400, 300, product, flipped), Product(300, 10, product, flipped)
    model = nn.Sequential(hidden, nn.ReLU(), last)
    assert affine_weights(model) == [(hidden, "matrix"), (last, "matrix")]
    before = last.weight.clone()
    ibp_init_(model)
    assert hidden.weight.std().item() == pytest.approx(math.sqrt(2 * math.pi) / 400, rel=0.02)
    assert abs(hidden.weight.mean().item()) < 1e-4
    assert torch.equal(last.weight, before)
    assert classifier_tensors(model) == ["2.matrix"]


def test_products_with_constants_and_of_two_values_are_no_layers():
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("transform", torch.eye(6))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.transform + x @ torch.ones(6, 6)

    first, last = nn.Linear(6, 6), nn.Linear(6, 2)
    model = nn.Sequential(first, Mixing(), nn.ReLU(), last)
    assert affine_weights(model) == [(first, "weight"), (last, "weight")]
    assert torch.equal(ibp_init_(model)[1].transform, torch.eye(6))


@pytest.mark.parametrize(
    "fixed",
    [
        lambda net, z: F.linear(z, net.matrix),
        lambda net, z: z @ net.matrix,
        lambda net, z: torch.einsum("bi,oi->bo", z, net.matrix),
        lambda net, z: F.linear(z, 2 * net.matrix),
        lambda net, z: F.linear(z, torch.eye(3)),
        lambda net, z: F.conv1d(z[:, None], net.matrix[None, :1]),
    ],
)
def test_a_fixed_transform_of_the_logits_is_no_classifier(fixed):
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)
            self.register_buffer("matrix", torch.eye(3))

        def forward(self, x: Tensor) -> Tensor:
            return fixed(self, self.last(self.first(x).relu()))

    model = Fixed()
    first, last = model.first.weight.detach().clone(), model.last.weight.detach().clone()
    assert affine_weights(model) == [(model.first, "weight"), (model.last, "weight")]
    assert classifier_tensors(model) == ["last.weight", "last.bias"]
    ibp_init_(model)
    assert torch.equal(model.last.weight, last)
    assert not torch.equal(model.first.weight, first)


def test_a_layer_that_is_used_first_and_last_is_the_classifier():
    shared, hidden = nn.Linear(6, 6), nn.Linear(6, 6)
    model = nn.Sequential(shared, nn.ReLU(), hidden, nn.ReLU(), shared)
    before = shared.weight.detach().clone()
    assert affine_weights(model) == [(hidden, "weight"), (shared, "weight")]
    ibp_init_(model)
    assert torch.equal(shared.weight, before)
    assert classifier_tensors(model) == ["0.weight", "0.bias"]


@pytest.mark.parametrize("layer", [lambda m: m.first(m.tokens), lambda m: F.linear(m.tokens, m.first.weight)])
@pytest.mark.parametrize("attends", [False, True])
def test_a_layer_of_what_is_learned_is_one_too(layer, attends):
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.first, self.last = (
                nn.Parameter(torch.rand(1, 300)),
                nn.Linear(300, 300),
                nn.Linear(300, 2),
            )

        def forward(self, x: Tensor) -> Tensor:
            h = x + layer(self)
            return self.last((h @ h.mT @ h if attends else h).relu())

    model = Tokens()
    assert affine_weights(model) == [(model.first, "weight"), (model.last, "weight")]
    ibp_init_(model)
    assert model.first.weight.std().item() == pytest.approx(
        math.sqrt(2 * math.pi) / 300 * (0.5 if attends else 1), rel=0.02
    )


def deviation(layer: nn.Module) -> float:
    """Of a square weight, as a multiple of √(2π) / fan_in."""
    weight = layer.get_parameter("weight").detach()
    return (weight.std() * len(weight) / math.sqrt(2 * math.pi)).item()


def test_a_layer_whose_product_is_added_to_a_value_is_a_branch_and_its_sum():
    class Skipping(nn.Module):
        def __init__(self, attends: bool) -> None:
            super().__init__()
            for name in ("stem", "branch", "hidden", "last"):
                self.add_module(name, nn.Linear(300, 300, bias=False))
            self.attends = attends

        def forward(self, x: Tensor) -> Tensor:
            h = self.stem(x).relu()
            if self.attends:
                h = torch.baddbmm(h[None], torch.bmm(h[None], h.T[None]), h[None])[0]
            return self.last(self.hidden(torch.addmm(h, h, self.branch.weight.T).relu()))

    torch.manual_seed(0)
    model = Skipping(attends=False)
    assert affine_weights(model) == [
        (model.get_submodule(name), "weight") for name in ("stem", "branch", "hidden", "last")
    ]
    ibp_init_(model)
    assert [deviation(model.get_submodule(name)) for name in ("stem", "branch", "hidden")] == pytest.approx(
        [1, 1, 0.5], rel=0.02
    )
    model = Skipping(attends=True)
    ibp_init_(model)  # behind no ReLU, at the end of the second of two branches; `hidden` is behind a ReLU
    assert [deviation(model.get_submodule(name)) for name in ("stem", "branch", "hidden")] == pytest.approx(
        [1, 0.25, 1], rel=0.02
    )


def test_a_product_that_is_multiplied_once_more_cannot_be_set():
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x, self.weight.T, alpha=2)

    model = nn.Sequential(Scaled(6, 6), nn.ReLU(), nn.Linear(6, 2))
    before = model[0].weight.detach().clone()
    with pytest.warns(UserWarning, match=r"no effect on what is computed from 0\.weight"):
        ibp_init_(model)
    assert torch.equal(model[0].weight, before)


def test_a_sum_with_what_is_learned_is_none_of_two_branches():
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Linear(300, 300), nn.Linear(300, 300), nn.Linear(300, 2)
            self.shift = nn.Parameter(torch.zeros(300))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.second((self.first(x) + self.shift).relu()).relu())

    torch.manual_seed(0)
    assert deviation(ibp_init_(Biased()).second) == pytest.approx(1, rel=0.02)


def test_what_a_sum_of_attention_goes_on_from_is_no_branch():
    class Attending(nn.Module):
        def __init__(self, moves: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.stem, self.values, self.last = nn.Linear(300, 300), nn.Linear(300, 300), nn.Linear(300, 2)
            self.moves = moves

        def forward(self, x: Tensor) -> Tensor:
            h = self.moves(self.stem(x))
            mixed = torch.softmax(h @ h.mT, -1) @ h
            return self.last(h + mixed + self.moves(self.values(mixed)))

    torch.manual_seed(0)
    for moves in (lambda h: h, lambda h: h.reshape(1, -1, 300)):
        model = ibp_init_(Attending(moves))
        assert deviation(model.stem) == pytest.approx(1, rel=0.02)
        assert deviation(model.values) == pytest.approx(0.25, rel=0.02)


@pytest.mark.parametrize(("name", "behind"), [("relu", nn.Identity()), ("addmm", nn.ReLU())])
def test_a_module_is_what_it_is_and_not_what_it_is_called(name, behind):
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(300, 300), nn.Linear(300, 300), nn.Linear(300, 300)
            self.last = nn.Linear(300, 2)
            self.add_module(name, nn.Tanh())
            self.behind = behind

        def forward(self, x: Tensor) -> Tensor:
            h = self.behind(self.get_submodule(name)(self.first(x) + self.second(x)))
            return self.last(self.third(h).relu())

    torch.manual_seed(0)
    model = Named()
    assert affine_weights(model) == [
        (layer, "weight") for layer in (model.first, model.second, model.third, model.last)
    ]
    assert deviation(ibp_init_(model).third) == pytest.approx(1, rel=0.02)


def test_a_product_that_is_added_to_a_value_is_no_attention():
    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Linear(300, 300), nn.Linear(300, 300), nn.Linear(300, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.second(self.first(x))
            return self.last(torch.addmm(h, h.relu(), torch.ones(300, 300)))

    model = Skipping()
    ibp_init_(model)
    for layer in (model.first, model.second):  # halved behind no ReLU, if this were a transformer
        assert layer.weight.std().item() == pytest.approx(math.sqrt(2 * math.pi) / 300, rel=0.02)


def test_the_last_layer_is_the_classifier_even_if_it_is_a_call():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), Functional(nn.Linear(6, 2)))
    before = model[2].weight.detach().clone()
    ibp_init_(model)
    assert torch.equal(model[2].weight, before)
