"""Every method against a slow witness that is written out here from its formula, in float64; no bounds code shared."""

from __future__ import annotations

import copy
import itertools
import json
import signal
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

import certtrain
from certtrain.bounds import BoundedModel, Box, linf_box
from certtrain.bounds.linear.relaxations import RELAXATIONS
from certtrain.bounds.lirpa import LirpaModel
from certtrain.config import load_config
from certtrain.config.methods import METHOD_SECTIONS, AttackSection
from certtrain.errors import UsageError
from certtrain.runs.progress import ProgressDisplay
from certtrain.training.attack import attacked
from certtrain.training.losses import Metrics
from certtrain.training.method import Method, Phase, scheduled
from certtrain.training.methods import (
    CCIBP,
    IBP,
    LATENT_DRAWS,
    METHODS,
    MTLIBP,
    SABR,
    STAPS,
    TAPS,
    Adversarial,
    CrownIBP,
    ExpIBP,
)
from certtrain.training.noise import step_keys, uniform
from certtrain.training.regions import small_box, small_linf_box
from certtrain.training.regularization import Regularization
from certtrain.training.step import GradientStep
from certtrain.training.trainer import Trainer
from tests.commands import TINY, one_thread
from tests.networks import randomized

EPS = 0.03
BATCH = 7
ATTACK = {"steps": 3, "step_size": 0.5, "start": "image"}
NO_REGULARIZATION = Regularization(0.0)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(2, 3, 3, 2, 1),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(3 * 9, 6),
        nn.BatchNorm1d(6),
        nn.ReLU(),
        nn.Linear(6, 4),
    )
    return randomized(layers).double().train()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(BATCH, 2, 6, 6, generator=generator, dtype=torch.float64)
    return images, torch.randint(0, 4, (BATCH,), generator=generator)


# --- the witness: this network's formulas, layer by layer ------------------------------------------------------------


class Witness:
    """The network with the BatchNorm statistics of one clean batch, as plain formulas of points and of intervals.

    Upper ends of intervals behind unstable ReLUs are multiplied by `shrink`.
    """

    def __init__(self, model: nn.Sequential, clean: Tensor, shrink: float = 1.0) -> None:
        self.shrink = shrink
        self.conv, self.bn1, _, _, self.linear, self.bn2, _, self.last = model
        self.one = self._statistics(self._conv(clean, self.conv.weight, self.conv.bias))
        hidden = self._hidden(clean)
        self.two = self._statistics(hidden @ self.linear.weight.T + self.linear.bias)

    @staticmethod
    def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.transpose(0, 1).flatten(1)
        return x.mean(1), ((x - x.mean(1, keepdim=True)) ** 2).mean(1)

    @staticmethod
    def _conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, 2, 1)

    def _hidden(self, x: Tensor) -> Tensor:
        scale, shift = self._scale_and_shift(self.bn1, self.one)
        x = self._conv(x, self.conv.weight, self.conv.bias) * scale[:, None, None] + shift[:, None, None]
        return x.clamp(min=0).flatten(1)

    @staticmethod
    def _scale_and_shift(bn: nn.Module, statistics: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        mean, variance = statistics
        scale = bn.weight / (variance + bn.eps).sqrt()
        return scale, bn.bias - mean * scale

    def logits(self, x: Tensor) -> Tensor:
        return self.tail(self._hidden(x))

    def margins(self, low: Tensor, high: Tensor, labels: Tensor) -> Tensor:
        """Interval arithmetic with positive and negative parts; the last layer's rows subtracted first."""
        low, high = (ends.flatten(1) for ends in self.head(low, high))
        positive, negative = self.linear.weight.clamp(min=0), self.linear.weight.clamp(max=0)
        low, high = (a @ positive.T + b @ negative.T + self.linear.bias for a, b in ((low, high), (high, low)))
        low, high = self._rectified(*self._scaled(self.bn2, self.two, low, high))
        rows = self.last.weight[labels][:, None] - self.last.weight
        bias = self.last.bias[labels][:, None] - self.last.bias
        return (rows.clamp(min=0) * low[:, None] + rows.clamp(max=0) * high[:, None]).sum(2) + bias

    def _scaled(self, bn: nn.Module, statistics: tuple[Tensor, Tensor], low: Tensor, high: Tensor) -> list[Tensor]:
        scale, shift = (v.view(-1, *[1] * (low.dim() - 2)) for v in self._scale_and_shift(bn, statistics))
        ends = torch.stack([low * scale + shift, high * scale + shift])
        return [ends.amin(0), ends.amax(0)]

    def head(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The interval behind the first ReLU, (B, 3, 3, 3)."""
        positive, negative = self.conv.weight.clamp(min=0), self.conv.weight.clamp(max=0)
        bias = self.conv.bias[:, None, None]
        low, high = (self._conv(a, positive, None) + self._conv(b, negative, None) + bias
                     for a, b in ((low, high), (high, low)))  # fmt: skip
        return self._rectified(*self._scaled(self.bn1, self.one, low, high))

    def _rectified(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Neuron by neuron: [l, u] of active ones, 0 of inactive ones, [0, shrink·u] of the others."""
        unstable = (low < 0) & (high > 0)
        return low.clamp(min=0), torch.where(unstable, self.shrink * high, high.clamp(min=0))

    def tail(self, hidden: Tensor) -> Tensor:
        scale, shift = self._scale_and_shift(self.bn2, self.two)
        hidden = (hidden.flatten(1) @ self.linear.weight.T + self.linear.bias) * scale + shift
        return hidden.clamp(min=0) @ self.last.weight.T + self.last.bias

    def attacked(self, images: Tensor, labels: Tensor, steps: int = 3, step_size: float = 0.5) -> Tensor:
        """Signed steps from the image, image by image."""
        found = []
        for image, label in zip(images, labels, strict=True):
            x = image[None]
            for _ in range(steps):
                x = x.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(-self.logits(x).log_softmax(1)[0, label], x)
                x = x + step_size * EPS * gradient.sign()
                x = torch.minimum(torch.maximum(x, image - EPS), image + EPS).clamp(0, 1)
            found.append(x.detach())
        return torch.cat(found)


class Link(torch.autograd.Function):
    """A latent point of one class; its gradient goes to the ends of the box, as the authors' code has it, c = 0.5."""

    @staticmethod
    def forward(ctx, low, high, x):
        ctx.save_for_backward(low, high, x)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        low, high, x = ctx.saved_tensors
        reach = 0.5 * (high - low)
        safe = reach.clamp(min=1e-5)
        to_high = gradient * (x >= high - reach) * (x - (high - reach)).clamp(min=5e-6) / safe
        to_low = gradient * (x <= low + reach) * ((low + reach) - x).clamp(min=5e-6) / safe
        return to_low, to_high, None


def tail_margins(net: Any, low: Tensor, high: Tensor, labels: Tensor) -> Tensor:
    """An attack on each class in the box that the head gives: 8 steps of a quarter of its width, a fifth of it after
    70 % of them."""
    low, high = net.head(low, high)
    like = torch.empty((), dtype=torch.float64)
    starts = uniform(torch.tensor(5), torch.arange(len(labels)), (4, *low.shape[1:]), like, LATENT_DRAWS)
    rows = []
    for image, label in enumerate(labels.tolist()):
        lower, upper = low[image].detach(), high[image].detach()
        margins = []
        for other in range(4):
            x = lower + starts[image, other] * (upper - lower)
            for number in range(8):
                x = x.detach().requires_grad_()
                logits = net.tail(x[None])[0]
                (gradient,) = torch.autograd.grad(logits[other] - logits[label], x)
                size = 0.25 * (upper - lower) * (0.2 if number >= 0.7 * 8 else 1)
                x = torch.minimum(torch.maximum(x + size * gradient.sign(), lower), upper)
            logits = net.tail(Link.apply(low[image], high[image], x.detach())[None])[0]
            margins.append(logits[label] - logits[other])
        rows.append(torch.stack(margins))
    return torch.stack(rows)


def product_with_scaled_gradient(ibp: Tensor, taps: Tensor, scale: float) -> Tensor:
    moving = scale * ibp.detach() * taps + taps.detach() * ibp
    return moving + (ibp * taps - moving).detach()


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.exp().sum(1).log() - logits[torch.arange(len(labels)), labels]).mean()


def ends(images: Tensor) -> tuple[Tensor, Tensor]:
    return (images - EPS).clamp(0, 1), (images + EPS).clamp(0, 1)


def witnessed(name: str, net: Witness, images: Tensor, labels: Tensor) -> Tensor:
    """The robust loss of each of METHODS_SHOWN, by its formula."""
    points = net.attacked(images, labels)
    low, high = ends(images)
    attacked_margins = (net.logits(points)[torch.arange(BATCH), labels, None]) - net.logits(points)
    ibp = cross_entropy(-net.margins(low, high, labels), labels)
    adversarial = cross_entropy(net.logits(points), labels)
    if name == "adversarial":
        return adversarial
    if name == "ibp":
        return ibp
    if name == "cc-ibp":
        return cross_entropy(-(0.3 * net.margins(low, high, labels) + 0.7 * attacked_margins), labels)
    if name == "mtl-ibp":
        return 0.3 * ibp + 0.7 * adversarial
    if name == "exp-ibp":
        return ibp**0.3 * adversarial**0.7
    if name == "exp-ibp by image":
        margins, one_by_one = net.margins(low, high, labels), [slice(i, i + 1) for i in range(BATCH)]
        return torch.stack([
            cross_entropy(-margins[i], labels[i]) ** 0.3 * cross_entropy(net.logits(points[i]), labels[i]) ** 0.7
            for i in one_by_one
        ]).mean()  # fmt: skip
    if name.startswith("taps"):
        return product_with_scaled_gradient(ibp, cross_entropy(-tail_margins(net, low, high, labels), labels), 4)
    if name in ("sabr", "staps", "sabr, shrunk", "staps, shrunk"):
        radius = 0.3 * (high - low) / 2
        center = torch.minimum(torch.maximum(points, low + radius), high - radius)
        low, high = center - radius, center + radius
        sabr = cross_entropy(-net.margins(low, high, labels), labels)
        if name.startswith("sabr"):
            return sabr
        return product_with_scaled_gradient(sabr, cross_entropy(-tail_margins(net, low, high, labels), labels), 2)
    assert name == "sabr by epsilon"
    center = torch.minimum(torch.maximum(points, images - 0.7 * EPS), images + 0.7 * EPS)
    low, high = (center - 0.3 * EPS).clamp(0, 1), (center + 0.3 * EPS).clamp(0, 1)
    return cross_entropy(-net.margins(low, high, labels), labels)


METHODS_SHOWN: dict[str, Method] = {
    "adversarial": Adversarial(attack=ATTACK),
    "ibp": IBP(),
    "cc-ibp": CCIBP(alpha=0.3, attack=ATTACK),
    "mtl-ibp": MTLIBP(alpha=0.3, attack=ATTACK),
    "exp-ibp": ExpIBP(alpha=0.3, attack=ATTACK),
    "exp-ibp by image": ExpIBP(alpha=0.3, attack=ATTACK, product="image"),
    "sabr": SABR(lambda_=0.3, attack=ATTACK),
    "sabr by epsilon": SABR(lambda_=0.3, attack=ATTACK, radius="epsilon"),
    "taps": TAPS(),
    "staps": STAPS(lambda_=0.3, attack=ATTACK, gradient_scale=2),
    "sabr, shrunk": SABR(lambda_=0.3, attack=ATTACK, shrink=0.8),
    "taps, shrunk": TAPS(shrink=0.7),
    "staps, shrunk": STAPS(lambda_=0.3, attack=ATTACK, gradient_scale=2, shrink=0.8),
}


def witness(name: str, model: nn.Sequential, kind: type[Witness] = Witness) -> Witness:
    return kind(model, batch()[0], METHODS_SHOWN[name].shrink or 1.0)


def step(model: nn.Module, method: Method, phase: Phase = Phase.FULL, ramp: float = 1.0, **options) -> Metrics:
    images, labels = batch()
    options = {"regularization": NO_REGULARIZATION, **options}
    trained = GradientStep(BoundedModel(model, images), method, **options)
    return trained.backward(images, labels, scheduled(EPS, ramp, like=images, key=5), phase)


def check_same_gradients(model: nn.Module, other: nn.Module, tolerance: float = 1e-8) -> None:
    for (name, parameter), expected in zip(model.named_parameters(), other.parameters(), strict=True):
        scale = expected.grad.abs().max().clamp(min=1e-3)
        assert ((parameter.grad - expected.grad).abs().max() / scale).item() < tolerance, name


@pytest.mark.parametrize("name", METHODS_SHOWN)
def test_loss_and_gradient_equal_the_formula(name):
    model, other = network(), network()
    metrics = step(model, METHODS_SHOWN[name])
    expected = witnessed(name, witness(name, other), *batch())
    expected.backward()
    assert metrics["loss"].item() == pytest.approx(expected.item(), rel=1e-9)
    check_same_gradients(model, other)


class LirpaWitness(Witness):
    """The same formulas of intervals that auto_LiRPA computes, through the same BatchNorm statistics."""

    def __init__(self, model: nn.Sequential, clean: Tensor, shrink: float = 1.0) -> None:
        super().__init__(model, clean, shrink)
        self.clean, self.net, self.head_net = clean, LirpaModel(model, clean), LirpaModel(model[:3], clean)

    def margins(self, low: Tensor, high: Tensor, labels: Tensor) -> Tensor:
        return self.net.margins(Box(low, high), labels, clean=self.clean)

    def head(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        box = self.head_net.ibp(Box(low, high), clean=self.clean).output
        return box.lower, box.upper


@pytest.mark.parametrize("name", [name for name, method in METHODS_SHOWN.items() if method.shrink is None])
def test_gradients_through_auto_lirpas_intervals_are_the_same(name):
    model, other = network(), network()
    metrics = step(model, METHODS_SHOWN[name])
    expected = witnessed(name, witness(name, other, LirpaWitness), *batch())
    expected.backward()
    assert metrics["loss"].item() == pytest.approx(expected.item(), rel=1e-9)
    check_same_gradients(model, other, 1e-5)


@pytest.mark.parametrize("name", METHODS_SHOWN)
@pytest.mark.parametrize(("weight", "ramp"), [({"w": 0.7}, 1.0), ({"kappa": [0.9, 0.4]}, 0.2), ({"kappa": 0.3}, 1.0)])
def test_natural_terms(name, weight, ramp):
    """A constant weight, and one that is linear in the steps of warmup: 0.9 - 0.2·0.5 = 0.8."""
    share = 0.7 if "w" in weight else 0.2 if ramp < 1 else 0.7
    model, other, method = network(), network(), METHODS_SHOWN[name]
    method = type(method)(method.Section(**{**dict(method.options), **weight}))
    metrics = step(model, method, Phase.FULL, ramp)
    images, labels = batch()
    net = witness(name, other)
    natural = cross_entropy(net.logits(images), labels)
    expected = share * witnessed(name, net, images, labels) + (1 - share) * natural
    expected.backward()
    assert metrics["loss"].item() == pytest.approx(expected.item(), rel=1e-9)
    check_same_gradients(model, other)


@pytest.mark.parametrize(
    ("method", "same_as"),
    [
        (SABR(lambda_=1, attack=ATTACK), IBP()),
        (SABR(lambda_=1, attack=ATTACK, radius="epsilon"), IBP()),
        (MTLIBP(alpha=1, attack=ATTACK), IBP()),
        (MTLIBP(alpha=0, attack=ATTACK), Adversarial(attack=ATTACK)),
        (CCIBP(alpha=1, attack=ATTACK), IBP()),
        (CCIBP(alpha=0, attack=ATTACK), Adversarial(attack=ATTACK)),
        (ExpIBP(alpha=1, attack=ATTACK), IBP()),
        (ExpIBP(alpha=0, attack=ATTACK), Adversarial(attack=ATTACK)),
        (ExpIBP(alpha=1, attack=ATTACK, product="image"), IBP()),
    ],
    ids=lambda method: f"{method.options.name} {getattr(method.options, 'alpha', '')}",
)
def test_at_its_ends_a_method_is_another(method, same_as):
    model, other = network(), network()
    metrics, expected = step(model, method), step(other, same_as)
    assert metrics["loss"].item() == pytest.approx(expected["loss"].item(), rel=1e-9)
    check_same_gradients(model, other)


@pytest.mark.parametrize(
    ("method", "same_as"),
    [("taps", "ibp"), ("staps", "sabr"), pytest.param("staps, shrunk", "sabr, shrunk", id="shrunk")],
)
def test_until_epsilon_is_full_a_tail_is_bounded_as_the_head_is(method, same_as):
    model, other = network(), network()
    metrics, expected = (
        step(net, METHODS_SHOWN[name], Phase.WARMUP, 0.25) for net, name in ((model, method), (other, same_as))
    )
    assert metrics["loss"].item() == pytest.approx(expected["loss"].item(), rel=1e-9)
    check_same_gradients(model, other)


@pytest.mark.parametrize("method", [*METHODS_SHOWN.values(), CrownIBP(), CrownIBP(beta=(1.0, 0.5))])
def test_a_method_says_whether_its_loss_is_another_one_during_warmup(method):
    """Where it is not, and nothing regularizes, warmup is the same function, and compiled once."""
    model, other = network(), network()
    warmup, full = step(model, method, Phase.WARMUP, 0.25), step(other, method, Phase.FULL, 0.25)
    differ = not all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert differ == method.differs_in_warmup
    assert (warmup.keys() != full.keys()) == method.differs_in_warmup


def test_until_epsilon_grows_no_box_is_shrunk():
    model, other = network(), network()
    options = {"phase": Phase.BEFORE, "regularization": Regularization()}
    metrics, expected = (
        step(model, METHODS_SHOWN["sabr, shrunk"], **options),
        step(other, METHODS_SHOWN["sabr"], **options),
    )
    assert metrics["loss"] == expected["loss"]
    check_same_gradients(model, other)


def test_a_network_that_cannot_be_cut_there_is_an_error():
    net = BoundedModel(network(), batch()[0])
    for tail in (1, 2):
        GradientStep(net, TAPS(tail=tail))
    with pytest.raises(UsageError, match="cannot be cut with 3 activations behind the cut; possible: 1, 2"):
        GradientStep(net, TAPS(tail=3))


def test_without_a_relu_no_box_is_shrunk():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    net = BoundedModel(model, torch.rand(1, 1, 2, 2))
    for method in (SABR(shrink=0.8), TAPS(shrink=0.8), STAPS(shrink=0.8)):
        with pytest.raises(UsageError, match=r"training\.method\.shrink: the network has no ReLU"):
            GradientStep(net, method, NO_REGULARIZATION)


@pytest.mark.parametrize("name", METHODS_SHOWN)
def test_an_attack_leaves_batch_norm_as_one_clean_pass_does(name):
    for statistics in ("clean", "running"):
        model, other, method = network(), network(), METHODS_SHOWN[name]
        if method.attack:
            attack = method.attack.model_copy(update={"statistics": statistics, "start": "uniform", "restarts": 2})
            method = type(method)(method.options.model_copy(update={"attack": attack}))
        step(model, method)
        other(batch()[0])
        for value, expected in zip(model.buffers(), other.buffers(), strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
        assert model.training


def random_start(method: Method) -> Method:
    """The same method with an attack that draws, and with a natural term."""
    attack = {} if method.attack is None else {"attack": AttackSection(steps=2, restarts=2, eps_factor=1.5)}
    return type(method)(method.options.model_copy(update=attack | {"w": 0.8}))


@pytest.mark.parametrize("options", [{"accumulation": 3}, {"activation_checkpointing": True}], ids=["parts", "again"])
@pytest.mark.parametrize("phase", [Phase.BEFORE, Phase.WARMUP, Phase.FULL])
@pytest.mark.parametrize("name", METHODS_SHOWN)
def test_in_parts_or_computed_again_a_step_is_the_same(name, phase, options):
    model, other, method = network(), network(), random_start(METHODS_SHOWN[name])
    cannot = "activation_checkpointing" in options and not method.options.supports_checkpointing
    if cannot or (name == "adversarial" and phase is Phase.BEFORE):
        pytest.skip("refused, or without a box before warmup")
    metrics = step(model, method, phase, 0.25, regularization=Regularization(), **options)
    expected = step(other, method, phase, 0.25, regularization=Regularization())
    assert metrics.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(metrics[key], value, rtol=1e-9, atol=1e-12, msg=lambda m, k=key: f"{k}: {m}")
    check_same_gradients(model, other)


def test_errors_have_the_name_of_what_they_are_errors_of():
    images, labels = batch()
    net = Witness(network(), images)
    points = net.attacked(images, labels)
    verified = ((net.margins(*ends(images), labels) > 0).sum(1) < 3).double().mean().item()
    wrong = (net.logits(points).argmax(1) != labels).double().mean().item()
    for name, method in METHODS_SHOWN.items():
        metrics = step(network(), method)
        assert metrics.get("verified_error", verified) == pytest.approx(verified), name
        assert metrics.get("adversarial_error", wrong) == pytest.approx(wrong), name
        whole_box = name.startswith(("ibp", "cc-ibp", "mtl-ibp", "exp-ibp", "taps")) and method.shrink is None
        assert ("verified_error" in metrics) == whole_box, name
        assert ("robust_error" in metrics) == name.startswith(("sabr", "cc-ibp", "taps", "staps")), name


def test_every_method_is_shown():
    assert METHODS.keys() == METHOD_SECTIONS.keys()
    assert {method.options.name for method in METHODS_SHOWN.values()} | {"natural", "crown-ibp"} == METHODS.keys()


# --- regions ---------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(share=st.floats(0, 1), eps=st.floats(0, 1), seed=st.integers(0, 99))
def test_a_small_box_lies_in_the_box_and_meets_its_point_where_it_can(share, eps, seed):
    generator = torch.Generator().manual_seed(seed)
    images, points = torch.rand(2, 40, generator=generator, dtype=torch.float64)
    box = linf_box(images, eps)
    for small in (
        small_box(box, points, share),
        small_linf_box(images, points, torch.tensor(eps, dtype=torch.float64), share),
    ):
        assert box.contains(small.lower, 1e-12).all()
        assert box.contains(small.upper, 1e-12).all()
        inside = box.contains(points)
        assert small.contains(points, 1e-12)[inside].all()
    torch.testing.assert_close(small_box(box, points, share).radius, share * box.radius)


# --- the attack ------------------------------------------------------------------------------------------------------


def moved(**options) -> Tensor:
    """By an attack on pixels of 0.5 whose loss grows with every pixel, in units of a radius of 0.1."""
    images = torch.full((3, 1, 2, 2), 0.5, dtype=torch.float64)
    eps = torch.tensor(0.1, dtype=torch.float64)
    key, positions = torch.tensor(3), torch.arange(3)
    points = attacked(
        AttackSection(**options),
        images,
        eps,
        lambda x: (torch.ones_like(x), x.flatten(1).sum(1)),
        lambda x: x.flatten(1).sum(1),
        lambda draw: uniform(key, positions, images.shape[1:], images, draw),
    )
    return (points - images) / eps


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"steps": 1, "step_size": 0.3}, 0.3),
        ({"steps": 3, "step_size": 0.2}, 0.6),
        ({"steps": 4, "step_size": 0.2, "decay_at": [0.5], "decay": 0.1}, 0.2 + 0.2 + 0.02 + 0.02),
        ({"steps": 4, "step_size": 0.2, "decay_at": [0.5, 0.75], "decay": 0.1}, 0.2 + 0.2 + 0.02 + 0.002),
        ({"steps": 8, "step_size": 0.5}, 1.0),
        ({"steps": 1, "step_size": 0.5, "eps_factor": 2.0}, 1.0),
        ({"steps": 9, "step_size": 0.5, "eps_factor": 2.0}, 1.0),
        ({"steps": 9, "step_size": 0.5, "eps_factor": 2.0, "clamp_to_box": False}, 2.0),
    ],
)
def test_steps_their_decay_and_the_radius_attacked(options, expected):
    torch.testing.assert_close(moved(start="image", **options), torch.full((3, 1, 2, 2), expected).double())


def test_a_uniform_start_lies_in_the_box_and_the_best_restart_is_taken():
    one = moved(steps=1, step_size=0.01)
    assert (one.abs() <= 1).all()
    assert one.std() > 0.2
    several = [moved(steps=1, step_size=0.01, restarts=count).flatten(1).sum(1) for count in (1, 2, 3, 8)]
    for fewer, more in itertools.pairwise(several):
        assert (fewer <= more).all()
    assert (several[0] < several[-1]).all()


@pytest.mark.parametrize(("keep", "expected"), [("last", [0.8, 0.8]), ("worst", [0.4, 0.8])])
@pytest.mark.parametrize("restarts", [1, 2])
def test_the_last_point_is_kept_or_the_worst_of_all_that_are_met(keep, expected, restarts):
    """The loss of the first image ends at 0.4 of the way, as a step function whose gradient does not show it."""
    images = torch.full((2, 1, 1, 1), 0.5, dtype=torch.float64)
    cliff = torch.tensor([0.4, 9.0])

    def visit(x: Tensor) -> tuple[Tensor, Tensor]:
        moved = (x - images).flatten() / 0.1
        return torch.ones_like(x), torch.where(moved > cliff + 1e-6, -1.0, moved)

    def draw(number: int) -> Tensor:
        return torch.full_like(images, 0.5)  # the middle of the box: the image, once more

    options = AttackSection(steps=2, step_size=0.4, start="image", keep=keep, restarts=restarts)
    points = attacked(options, images, torch.tensor(0.1, dtype=torch.float64), visit, lambda x: visit(x)[1], draw)
    moved = ((points - images) / 0.1).flatten()
    torch.testing.assert_close(moved, torch.tensor(expected).double())


def test_steps_are_shares_of_the_radius_or_of_what_the_cut_box_leaves_of_it():
    images = torch.tensor([0.0, 0.02, 0.5, 0.97, 1.0], dtype=torch.float64).view(1, 1, 1, 5)
    for step_of, widths in (("radius", [0.1] * 5), ("box", [0.05, 0.06, 0.1, 0.065, 0.05])):
        options = AttackSection(steps=1, step_size=0.25, start="image", step_of=step_of)
        points = attacked(
            options,
            images,
            torch.tensor(0.1, dtype=torch.float64),
            lambda x: (torch.where(x < 0.6, 1.0, -1.0).double(), x.flatten(1).sum(1)),
            lambda x: x.flatten(1).sum(1),
            lambda number: images,
        )
        torch.testing.assert_close((points - images).abs().flatten(), 0.25 * torch.tensor(widths).double())


@given(
    share=st.sampled_from([0.0015, 0.0294, 0.4]), eps=st.sampled_from([1e-6, 1e-5, 0.01, 0.3]), seed=st.integers(0, 99)
)
def test_a_small_box_of_a_small_radius_is_not_rounded_away(share, eps, seed):
    """In float32, held against float64; pixels at the ends of the range among them."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(4, 6, generator=generator).round(decimals=1)
    points = (images + eps * (2 * torch.rand(4, 6, generator=generator) - 1)).clamp(0, 1)
    box = small_linf_box(images, points, torch.tensor(eps), share)
    images, points = images.double(), points.double()
    center = torch.minimum(torch.maximum(points, images - (1 - share) * eps), images + (1 - share) * eps)
    low, high = (center - share * eps).clamp(min=0), (center + share * eps).clamp(max=1)
    torch.testing.assert_close(box.radius.double(), (high - low) / 2, rtol=1e-3, atol=1e-7 if eps > 1e-4 else 1e-12)
    torch.testing.assert_close(box.center.double(), (high + low) / 2, rtol=0, atol=2e-7)


def test_random_numbers_are_uniform_and_belong_to_an_image_and_a_step():
    keys, positions, like = step_keys(7, torch.arange(50)), torch.arange(64), torch.empty(())
    drawn = torch.stack([uniform(key, positions, (3, 4, 4), like, draw) for key in keys for draw in (0, 1)])
    assert drawn.shape == (100, 64, 3, 4, 4)
    assert 0 <= drawn.min() < 1e-3
    assert 1 - 1e-3 < drawn.max() < 1
    counts = torch.histc(drawn.flatten(), 20, 0, 1)
    assert ((counts / drawn.numel() * 20 - 1).abs() < 0.02).all()
    rows = drawn.flatten(0, 1).flatten(1)
    correlations = torch.corrcoef(rows[:1500]) - torch.eye(1500)
    assert correlations.abs().mean() < 0.13  # of independent rows of 48 numbers: √(2 / 48π)
    part = uniform(keys[3], positions[10:20], (3, 4, 4), like)
    assert torch.equal(part, uniform(keys[3], positions, (3, 4, 4), like)[10:20])
    assert len({*step_keys(0, torch.arange(1000)).tolist(), *step_keys(1, torch.arange(1000)).tolist()}) == 2000


# --- whole runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "smoothing"),
    [
        *(
            pytest.param(name, "none", marks=[] if name in ("ibp", "sabr", "taps") else pytest.mark.slow)
            for name in sorted(METHODS)
        ),
        ("ibp", "{name: pgpe, pairs: 2}"),
        pytest.param("sabr", "rgs", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(name, smoothing, tmp_path, monkeypatch):
    few = {part: {"steps": 2} for part in ("attack", "latent") if part in METHOD_SECTIONS[name].model_fields}
    options = [f"training.method={json.dumps({'name': name, **few})}", f"training.smoothing={smoothing}"]
    config = load_config("digits", [*TINY, *options])

    def interrupt(self: ProgressDisplay, trainer: Trainer) -> None:
        if trainer.step == 5:
            signal.raise_signal(signal.SIGTERM)

    with one_thread():
        certtrain.train(config, tmp_path / "whole", device="cpu")
        with monkeypatch.context() as patch:
            patch.setattr(ProgressDisplay, "after_step", interrupt)
            assert certtrain.train(config, tmp_path / "cut", device="cpu").summary is None
        certtrain.train(config, tmp_path / "cut", device="cpu", resume=True)
    whole, cut = ((tmp_path / run / "model.safetensors").read_bytes() for run in ("whole", "cut"))
    assert whole == cut


# --- written wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("{name: sabr, lambda: 1.1}", r"training\.method\.lambda: .*less than or equal to 1"),
        ("{name: sabr, lambda: -0.1}", r"training\.method\.lambda: .*greater than or equal to 0"),
        ("{name: mtl-ibp, alpha: 2}", r"training\.method\.alpha: "),
        ("{name: ibp, w: 1.5}", r"training\.method\.w: "),
        ("{name: ibp, kappa: [1.5, 0]}", r"training\.method\.kappa\.0: "),
        ("{name: ibp, kappa: [0.5, -1]}", r"training\.method\.kappa\.1: "),
        ("{name: ibp, kappa: 0.5, w: 0.5}", r"training\.method: w and kappa both weigh the clean loss"),
        ("{name: sabr, shrink: 0}", r"training\.method\.shrink: .*greater than 0"),
        ("{name: staps, shrink: 1.1}", r"training\.method\.shrink: .*less than or equal to 1"),
        ("{name: ibp, shrink: 0.8}", r"unknown key .*shrink: it belongs to training\.method sabr, taps, staps"),
        ("{name: sabr, attack: {steps: 0}}", r"training\.method\.attack\.steps: .*greater than or equal to 1"),
        ("{name: sabr, attack: {stps: 3}}", r"unknown key training\.method\.attack\.stps: did you mean steps "),
        ("{name: sabr, alpha: 0.5}", r"unknown key .*alpha: it belongs to training\.method cc-ibp, mtl-ibp, exp-ibp"),
        ("{name: ibp, attack: {steps: 3}}", r"unknown key .*attack: it belongs to training\.method adversarial, sabr"),
        ("{name: natural, w: 0.5}", r"unknown key training\.method\.w: it belongs to training\.method adversarial"),
        ("sbar", r"training\.method: unknown training method 'sbar': did you mean sabr\?"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(method, message):
    with pytest.raises(UsageError, match=f"^{message}") as caught:
        load_config("digits", [f"training.method={method}"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", METHOD_SECTIONS)
def test_a_bare_name_means_a_methods_defaults_and_reads_back(name, tmp_path):
    config = load_config("digits", [f"training.method={name}"])
    assert config.training.method == METHOD_SECTIONS[name]()
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "config.yaml") == load_config(config) == config


def test_fields_are_merged_by_name_and_another_method_starts_anew(tmp_path):
    (tmp_path / "base.yaml").write_text("base: digits\ntraining: {method: {name: mtl-ibp, alpha: 0.1, w: 0.7}}\n")
    (tmp_path / "same.yaml").write_text("base: base.yaml\ntraining: {method: {alpha: 0.2}}\n")
    (tmp_path / "other.yaml").write_text("base: base.yaml\ntraining: {method: {name: sabr, lambda: 0.2}}\n")
    method = load_config(tmp_path / "same.yaml", ["training.method.attack.steps=3"]).training.method
    assert (method.name, method.alpha, method.w, method.attack.steps) == ("mtl-ibp", 0.2, 0.7, 3)
    method = load_config(tmp_path / "other.yaml").training.method
    assert (method.name, method.lambda_, method.w) == ("sabr", 0.2, 1.0)
    assert load_config(tmp_path / "base.yaml", ["training.method=cc-ibp"]).training.method.alpha == 0.5


def test_options_are_checked_in_python_too():
    with pytest.raises(ValidationError, match="lambda"):
        SABR(lambda_=2)


# --- what cannot be trained is refused before it is -------------------------------------------------------------------


class Dropping(nn.Module):
    def __init__(self, p: float, kind: str) -> None:
        super().__init__()
        self.head, self.middle, self.tail = nn.Linear(12, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.norm, self.p, self.drop = nn.BatchNorm1d(8), p, nn.Dropout(p) if kind == "module" else None

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.norm(self.head(x.flatten(1))))
        hidden = F.dropout(hidden, self.p, self.training) if self.drop is None else self.drop(hidden)
        return self.tail(F.relu(self.middle(hidden)))


def takes(name: str, options: dict[str, Any]) -> bool:
    """Whether the configuration lets a method have these options."""
    section = METHODS[name].Section()
    if "activation_checkpointing" in options:
        return section.supports_checkpointing
    return section.needs_no_clean_pass or "statistics" not in options


WAYS: list[dict[str, Any]] = [{}, {"accumulation": 2}, {"activation_checkpointing": True}, {"statistics": "center"}]


@pytest.mark.parametrize(("p", "kind"), [(0.5, "module"), (0.5, "function"), (0.0, "module")])
@pytest.mark.parametrize(
    ("name", "options"), [(name, options) for name in METHODS for options in WAYS if takes(name, options)], ids=str
)
def test_with_dropout_a_step_is_refused_at_once_or_can_be_taken_in_every_phase(name, options, kind, p):
    torch.manual_seed(0)
    images, labels = torch.rand(6, 3, 2, 2), torch.randint(0, 4, (6,))
    net = BoundedModel(Dropping(p, kind).train(), images)
    method = METHODS[name]()
    joined = method.asks_for_logits or name in ("ibp", "crown-ibp") or "statistics" in options
    joined &= not options.keys() & {"accumulation", "activation_checkpointing"}
    if p and method.has_region and not joined:
        with pytest.raises(UsageError, match=r"Dropout is not for training\."):
            GradientStep(net, method, **options)
        return
    trained = GradientStep(net, method, **options)
    for eps in (0.0, 0.05, 0.1):
        at = scheduled(eps, eps / 0.1, like=images)
        assert trained.backward(images, labels, at, trained.phase(eps, eps / 0.1))["loss"].isfinite()


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("name", ["natural", "crown-ibp", "exp-ibp"])
def test_a_rehearsal_leaves_nothing(name, parts):
    images, labels = torch.rand(6, 3, 2, 2), torch.randint(0, 4, (6,))
    model = Dropping(0.5 if parts == 1 else 0.0, "module").eval()
    trained = GradientStep(BoundedModel(model, images), METHODS[name](), accumulation=parts)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    for eps in (0.0, 0.05, 0.1):
        trained.rehearse(images, labels, scheduled(eps, eps / 0.1, like=images), trained.phase(eps, eps / 0.1))
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("warmup", [0, 1])
@pytest.mark.parametrize(
    "more", [[], ["training.accumulation=2"], ["training.smoothing=rgs"], ["training.batch_size=2"]]
)
def test_what_a_later_phase_cannot_do_is_told_before_anything_is_written(train, tmp_path, monkeypatch, warmup, more):
    """Epsilon is 0 in the first epoch, where nobody asks for a linear relaxation."""
    monkeypatch.delitem(RELAXATIONS, F.relu)
    method = "training.method={name: crown-ibp, beta: 1}"
    outcome = train(method, f"epsilon.warmup_epochs={warmup}", *more)
    assert "has no linear relaxation" in outcome.error
    assert not (tmp_path / "run").exists()
