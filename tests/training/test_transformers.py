"""Every method's step on small vision transformers, against finite differences, other methods and boxes cut short."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from certtrain.bounds import BoundedModel, Box, linf_box
from certtrain.config.methods import METHOD_SECTIONS
from certtrain.models import build_model
from certtrain.training.losses import Metrics
from certtrain.training.method import Method, Phase, scheduled
from certtrain.training.methods import CCIBP, IBP, MTLIBP, SABR, STAPS, TAPS, Adversarial, CrownIBP, ExpIBP, Natural
from certtrain.training.regularization import Regularization
from certtrain.training.step import GradientStep
from tests.networks import randomized
from tests.test_regularizers import published_balance, published_tightness
from tests.training.test_methods import cross_entropy, product_with_scaled_gradient, tail_margins

EPS, EPS_RATIO, BATCH = 0.01, 0.25, 5
ATTACK = {"steps": 2, "start": "image"}
METHODS: dict[str, Method] = {
    "natural": Natural(),
    "adversarial": Adversarial(attack=ATTACK),
    "ibp": IBP(),
    "crown-ibp": CrownIBP(),
    "fused": CrownIBP(loss_fusion=True),
    "sabr": SABR(attack=ATTACK),
    "cc-ibp": CCIBP(attack=ATTACK),
    "mtl-ibp": MTLIBP(attack=ATTACK),
    "exp-ibp": ExpIBP(attack=ATTACK),
    "taps": TAPS(),
    "staps": STAPS(attack=ATTACK),
}
NETWORKS = {
    "pre": {"norm": "pre"},
    "post, gelu": {"norm": "post", "activation": "gelu", "pool": "token"},
    "none, gelu": {"norm": "none", "activation": "gelu", "pool": "flatten"},
    "pre, batch": {"norm": "pre", "norm_kind": "batch"},
    "post, no variance": {"norm": "post", "norm_kind": "layer-no-variance"},
}


def network(name: str, depth: int = 1) -> nn.Module:
    torch.manual_seed(0)
    options = {"width": 8, "heads": 2, "depth": depth, **NETWORKS[name]}
    return randomized(build_model("vit", (1, 4, 4), 4, options=options)).double().train()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(BATCH, 1, 4, 4, generator=generator, dtype=torch.float64)
    return images, torch.randint(0, 4, (BATCH,), generator=generator)


def gradient_step(model: nn.Module, method: Method) -> GradientStep:
    return GradientStep(BoundedModel(model, batch()[0]), method)


def step(trained: GradientStep, phase: Phase = Phase.WARMUP) -> Metrics:
    images, labels = batch()
    return trained.backward(images, labels, scheduled(EPS, EPS_RATIO, like=images, key=5), phase)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "pre") for name in METHODS),
        *((name, kind) for name in ("ibp", "crown-ibp") for kind in NETWORKS if kind != "pre"),
    ],
)
def test_the_gradient_of_a_step_is_the_losss_slope(name, kind):
    """Along a random direction, by central differences; the regularizers are in the loss."""
    model, method = network(kind), METHODS[name]
    trained, phase = gradient_step(model, method), Phase.WARMUP if method.is_robust else Phase.NATURAL
    step(trained, phase)
    weights = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    direction = torch.randn_like(weights)
    losses = []
    for distance in (1e-6, -1e-6):
        torch.nn.utils.vector_to_parameters(weights + distance * direction, model.parameters())
        losses.append(step(trained, phase)["loss"])
    # Where a plane touches a GELU is a constant to the gradient, though it moves with the weights.
    tolerance = 1e-3 if "gelu" in kind and name == "crown-ibp" else 1e-5
    torch.testing.assert_close((losses[0] - losses[1]) / 2e-6, gradient @ direction, rtol=tolerance, atol=1e-7)


@pytest.mark.parametrize("kind", ["pre", "none, gelu"])
@pytest.mark.parametrize(
    ("method", "same_as"),
    [
        (SABR(lambda_=1, attack=ATTACK), IBP()),
        (MTLIBP(alpha=1, attack=ATTACK), IBP()),
        (CCIBP(alpha=1, attack=ATTACK), IBP()),
        (CrownIBP(), IBP()),
        (STAPS(lambda_=1, attack=ATTACK), TAPS()),
    ],
    ids=lambda method: method.options.name,
)
def test_at_its_end_a_method_is_another(method, same_as, kind):
    model, other = network(kind), network(kind)
    metrics, expected = (step(gradient_step(*one), Phase.FULL) for one in ((model, method), (other, same_as)))
    torch.testing.assert_close(metrics["loss"], expected["loss"], rtol=1e-9, atol=0)
    for parameter, twin in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, twin.grad, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", NETWORKS)
def test_regularizers_look_at_what_enters_each_blocks_activation(kind):
    """Bounds of the network up to there, the rest of it cut away; the formulas in numpy."""
    model = network(kind, depth=2)
    images, _ = batch()
    box, layers, before = linf_box(images, EPS), model.get_submodule("network"), []
    for i in (1, 2):
        start = nn.Sequential(*layers[:i], UpToActivation(layers[i]))
        before.append(BoundedModel(start, images).ibp(box, clean=images).output)
    tightness, balance = published_tightness(before, box, 0.5), published_balance(before, 0.5)
    metrics = step(gradient_step(model, IBP()))
    weight = 0.5 * (1 - EPS_RATIO)
    assert metrics["tightness_loss"].item() == pytest.approx(weight * tightness, rel=1e-9)
    assert metrics["relu_balance_loss"].item() == pytest.approx(weight * balance, rel=1e-9)


class UpToActivation(nn.Module):
    """A block's attention, and its MLP's first layer."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        block, first = self.block, self.block.mlp[0]
        if block.norm_first:
            return first(block.mlp_norm(x + block.attention(block.attention_norm(x))))
        return first(block.attention_norm(x + block.attention(x)))


class InTwo:
    """A transformer cut behind a block's attention: interval bounds of what is before, the modules behind."""

    def __init__(self, model: nn.Module, block: int) -> None:
        self.layers = list(model.get_submodule("network"))
        self.block = self.layers[block]
        self.before, self.behind = nn.Sequential(*self.layers[:block], Attended(self.block)), self.layers[block + 1 :]
        self.net = BoundedModel(self.before.train(), batch()[0])

    def head(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        box = self.net.ibp(Box(low, high)).output
        return box.lower, box.upper

    def tail(self, x: Tensor) -> Tensor:
        block = self.block
        x = x + block.mlp(block.mlp_norm(x)) if block.norm_first else block.mlp_norm(x + block.mlp(x))
        return nn.Sequential(*self.behind)(x)


class Attended(nn.Module):
    """The first half of a block."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        block = self.block
        if block.norm_first:
            return x + block.attention(block.attention_norm(x))
        return block.attention_norm(x + block.attention(x))


@pytest.mark.parametrize(
    ("kind", "depth", "tail"),
    [
        ("pre", 1, 1),
        ("post, no variance", 1, 1),
        pytest.param("pre", 2, 2, marks=pytest.mark.slow),
        pytest.param("post, gelu", 2, 1, marks=pytest.mark.slow),
        pytest.param("none, gelu", 2, 2, marks=pytest.mark.slow),
    ],
)
def test_taps_attacks_what_is_behind_a_blocks_attention(kind, depth, tail):
    """Class by class and image by image, and the gradient through the ends of the box there."""
    model, other = network(kind, depth), network(kind, depth)
    images, labels = batch()
    found = GradientStep(BoundedModel(model, images), TAPS(tail=tail), Regularization(0.0)).backward(
        images, labels, scheduled(EPS, like=images, key=5), Phase.FULL
    )
    box, whole = linf_box(images, EPS), BoundedModel(other, images)
    ibp = cross_entropy(-whole.margins(box, labels), labels)
    in_two = InTwo(other, 1 + depth - tail)
    taps = cross_entropy(-tail_margins(in_two, box.lower, box.upper, labels), labels)
    expected = product_with_scaled_gradient(ibp, taps, 4)
    expected.backward()
    assert found["loss"].item() == pytest.approx(expected.item(), rel=1e-9)
    for (name, parameter), twin in zip(model.named_parameters(), other.parameters(), strict=True):
        scale = twin.grad.abs().max().clamp(min=1e-3)
        assert ((parameter.grad - twin.grad).abs().max() / scale).item() < 1e-8, name


def test_every_method_is_shown_here():
    assert {method.options.name for method in METHODS.values()} == METHOD_SECTIONS.keys()
