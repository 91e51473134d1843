from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from certtrain.bounds import BoundedModel, Box, linf_box
from certtrain.verification.attacks import APGD, PGD, Ensemble, TargetedAPGD, inscribed_linf_box
from certtrain.verification.attacks.apgd import auto_pgd, checkpoints
from certtrain.verification.attacks.attack import uniform_in
from certtrain.verification.attacks.losses import (
    cross_entropy,
    difference_of_logits_ratio,
    targeted_difference_of_logits_ratio,
)
from tests.verification.seeds import seeded

ATTACKS = {attack.name: attack for attack in (PGD(20, 2), APGD("ce", 20), APGD("dlr", 20), TargetedAPGD(20))}
MEMBERS = tuple(ATTACKS.values())


def linear_network(classes: int, scale: float = 1.0) -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, classes))
    with torch.no_grad():
        model[1].weight.mul_(scale)
        model[1].bias.mul_(scale)
    return model.eval()


def small_network() -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4 * 4, 5, bias=False))
    return model.eval()


def least_margins(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, eps: float) -> torch.Tensor:
    """Of a linear network, in closed form: (B, K), the least z_y - z_j over the box."""
    weight, bias = model[1].weight.detach().double(), model[1].bias.detach().double()
    x = images.flatten(1).double()
    low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    rows = weight[labels][:, None] - weight
    ends = torch.where(rows > 0, low[:, None], high[:, None])
    return (rows * ends).sum(2) + bias[labels][:, None] - bias


class Undefined(nn.Module):
    """Two classes, by the mean; NaN in one logit or both where a pixel is more than 0.05 from 0.5."""

    def __init__(self, places):
        super().__init__()
        self.places = places

    def forward(self, x):
        mean = x.flatten(1).mean(1)
        logits = torch.stack([mean, 0.1 - mean], 1)
        undefined = ((x - 0.5).abs().flatten(1).amax(1) > 0.05)[:, None] & torch.tensor(self.places)
        return logits.masked_fill(undefined, torch.nan)


@pytest.mark.parametrize("places", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("name", ATTACKS)
def test_a_point_without_a_prediction_is_misclassified_whatever_the_label_is(name, label, places):
    images, labels = torch.full((1, 1, 2, 2), 0.5), torch.tensor([label])
    model = Undefined(places).eval()
    if label == 0:
        assert model(images).argmax(1) == labels
    points, found = ATTACKS[name](model, images, labels, 0.1, seeded(1))
    assert found.item()
    assert label == 1 or model(points).isnan().any()


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("classes", [2, 3, 4])
@pytest.mark.parametrize("name", ATTACKS)
def test_what_can_be_found_in_a_linear_network_is_known(name, classes, scale):
    """APGD-T steps towards each class by itself, and of two classes all losses grow towards the other one.

    Elsewhere a step towards the nearest class can be one away from another, so that only too much would be wrong, and
    the gradient of the cross-entropy of large logits is 0.
    """
    model, eps = linear_network(classes, scale), 0.1
    images = torch.rand(60, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    labels = model(images).argmax(1)
    margins = least_margins(model, images, labels, eps).scatter(1, labels[:, None], torch.inf).amin(1)
    clear = margins.abs() > 1e-5 * scale
    points, found = ATTACKS[name](model, images, labels, eps, seeded(60))
    assert clear.sum() > 55
    assert 5 < (margins < 0).sum() < 55
    assert not found[clear & (margins > 0)].any()
    if name == "apgd-t" or (classes == 2 and not (name == "apgd-ce" and scale > 1)):
        assert found[clear & (margins < 0)].all()
    assert (model(points).argmax(1) != labels).tolist() == found.tolist()
    box = inscribed_linf_box(images, eps)
    assert ((points >= box.lower) & (points <= box.upper)).all()
    assert torch.equal(points[~found], images[~found])


@pytest.mark.parametrize("eps", [0.005, 0.02])
def test_an_ensemble_finds_what_any_of_its_members_finds(eps):
    torch.manual_seed(0)
    images, model = torch.rand(24, 3, 8, 8), small_network()
    labels = model(images).argmax(1)
    alone = [attack(model, images, labels, eps, seeded(24))[1] for attack in MEMBERS]
    points, found = Ensemble(MEMBERS)(model, images, labels, eps, seeded(24))
    assert torch.equal(found, torch.stack(alone).any(0))
    assert 0 < found.sum() < 24
    assert (model(points).argmax(1) != labels)[found].all()
    proved = (BoundedModel(model, images).margins(linf_box(images, eps), labels) >= 0).all(1)
    assert not (found & proved).any()


def test_an_image_is_attacked_as_it_would_be_alone():
    """In double precision, where what else is in a batch does not change sums by enough to matter."""
    torch.manual_seed(0)
    images, model, attack = torch.rand(12, 3, 8, 8).double(), small_network().double(), Ensemble(MEMBERS)
    labels = model(images).argmax(1)
    points, found = attack(model, images, labels, 0.02, seeded(12))
    parts = [attack(model, images[i : i + 5], labels[i : i + 5], 0.02, seeded(12)[i : i + 5]) for i in (0, 5, 10)]
    assert 0 < found.sum() < 12
    assert torch.equal(found, torch.cat([part[1] for part in parts]))
    torch.testing.assert_close(points, torch.cat([part[0] for part in parts]), rtol=0, atol=1e-9)
    other, _ = attack(model, images, labels, 0.05, seeded(12, seed=1))
    assert not torch.equal(points, other)


def masked_network(scale: float) -> nn.Module:
    """A robust-looking network: its logits are so far apart that the softmax is exactly 1, and no gradient is left."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 5))
    with torch.no_grad():
        model[3].weight.mul_(scale)
        model[3].bias.mul_(scale)
    return model.eval()


def test_the_logits_ratio_succeeds_where_the_cross_entropy_has_no_gradient():
    images = torch.rand(60, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    labels = masked_network(1.0)(images).argmax(1)
    found = {
        (name, scale): ATTACKS[name](masked_network(scale), images, labels, 0.25, seeded(60))[1]
        for name in ("apgd-ce", "apgd-dlr", "apgd-t")
        for scale in (1.0, 1e6)
    }
    assert found["apgd-ce", 1e6].sum() < found["apgd-ce", 1.0].sum() / 2
    for name in ("apgd-dlr", "apgd-t"):
        assert found[name, 1e6].sum() >= found["apgd-ce", 1.0].sum()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e38])
@pytest.mark.parametrize("name", ATTACKS)
def test_logits_that_are_no_numbers_move_no_point_out_of_the_box(name, value):
    class Broken(nn.Module):
        def forward(self, x):
            logits = x.flatten(1)[:, :3]
            return torch.where(logits.sum(1, keepdim=True) > 1.5, logits * value, logits)

    images = torch.rand(20, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    points, _ = ATTACKS[name](Broken(), images, Broken()(images).argmax(1), 0.1, seeded(20))
    box = inscribed_linf_box(images, 0.1)
    assert ((points >= box.lower) & (points <= box.upper)).all()


# --- against the paper, written out -----------------------------------------------------------------------------------


def test_losses_are_the_papers():
    torch.manual_seed(0)
    for classes in (4, 5, 10):
        logits = torch.randn(8, classes, dtype=torch.float64)
        labels = torch.randint(0, classes, (8,))
        targets = (labels + 1 + torch.randint(0, classes - 1, (8,))) % classes
        for i, (z, y, t) in enumerate(zip(logits.tolist(), labels.tolist(), targets.tolist(), strict=True)):
            ordered = sorted(z, reverse=True)
            largest = max(value for j, value in enumerate(z) if j != y)
            expected = {
                cross_entropy: -z[y] + math.log(sum(math.exp(value) for value in z)),
                difference_of_logits_ratio: -(z[y] - largest) / (ordered[0] - ordered[2]),
            }
            for loss, value in expected.items():
                assert loss(logits, labels)[i].item() == pytest.approx(value, abs=1e-9)
            ratio = -(z[y] - z[t]) / (ordered[0] - (ordered[2] + ordered[3]) / 2)
            assert targeted_difference_of_logits_ratio(logits, labels, targets)[i].item() == pytest.approx(ratio)


def test_checkpoints_are_the_papers():
    assert sorted(checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert sorted(checkpoints(50)) == [11, 21, 29, 35, 40, 44, 47, 50]  # the last at 49.5


def algorithm_1(f, gradient, x0, lower, upper, eps, iterations, marks):
    """Croce & Hein 2020, Algorithm 1, for one point, whose x_max it returns with the step sizes it had."""

    def project(x):
        return torch.minimum(torch.maximum(x, lower), upper)

    eta, alpha, rho = 2 * eps, 0.75, 0.75
    x = [x0, project(x0 + eta * gradient(x0).sign())]
    f_max, x_max = max((f(x[0]), 0), (f(x[1]), 1))
    x_max = x[x_max]
    values, etas, maxima, w = [f(x[0]), f(x[1])], {0: eta}, {0: f(x[0])}, 0
    for k in range(1, iterations):
        z = project(x[k] + eta * gradient(x[k]).sign())
        new = project(x[k] + alpha * (z - x[k]) + (1 - alpha) * (x[k] - x[k - 1]))
        x.append(new)
        values.append(f(new))
        if f(new) > f_max:
            f_max, x_max = f(new), new
        if k + 1 in marks:
            mark = k + 1
            rises = sum(values[i + 1] > values[i] for i in range(w, mark))
            unchanged = etas.get("before", eta) == eta and maxima[w] == f_max
            etas["before"] = eta
            if rises < rho * (mark - w) or unchanged:
                eta = eta / 2
                x[-1], values[-1] = x_max, f_max
            maxima[mark], w = f_max, mark
    return x_max, eta


def test_auto_pgd_takes_the_papers_steps():
    """On a loss with ridges, so that steps overshoot; and no class but the label, so that nothing ends the search."""
    torch.manual_seed(3)
    inner = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    with torch.no_grad():
        inner[0].weight.mul_(6)
        inner[2].weight.mul_(3)

    class Hidden(nn.Module):
        def forward(self, x):
            value = inner(x.flatten(1))
            return torch.cat([value.abs() + 100, value], 1)

    def f(x):
        return inner(x.flatten()[None]).item()

    def gradient(x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(inner(x.flatten()[None]).sum(), x)[0]

    images = torch.rand(8, 1, 2, 3, dtype=torch.float64)
    eps, steps = 0.3, 60
    box = Box((images - eps).clamp(min=0), (images + eps).clamp(max=1))
    start = box.lower + torch.rand_like(images) * (box.upper - box.lower)
    labels = torch.zeros(8, dtype=torch.int64)
    points = auto_pgd(Hidden(), start, labels, box, eps, lambda logits: logits[:, 1], steps)
    marks = {-(-percent * steps // 100) for percent in (22, 41, 57, 70, 80, 87, 93, 99)}
    halvings = set()
    for i in range(8):
        expected, eta = algorithm_1(f, gradient, start[i], box.lower[i], box.upper[i], eps, steps, marks)
        assert f(points[i]) == pytest.approx(f(expected), abs=1e-9)
        torch.testing.assert_close(points[i], expected, rtol=0, atol=1e-9)
        halvings.add(eta)
    assert len(halvings) > 1


@pytest.mark.parametrize("attack", MEMBERS, ids=ATTACKS)
@pytest.mark.parametrize("shape", [(12,), (3, 4), (3, 2, 2), (3, 1, 2, 2)])
def test_inputs_have_any_number_of_axes(attack, shape):
    x = torch.rand(5, *shape)
    model = linear_network(5)
    labels = model(x).argmax(1)
    points, found = attack(model, x, labels, 0.3, seeded(5))
    assert points.shape == x.shape
    assert ((points - x).abs() <= 0.3 + 1e-6).all()
    assert found.any()
    assert torch.equal(model(points).argmax(1) != labels, found)


def test_what_is_drawn_lies_where_its_generator_does():
    """Whatever PyTorch's default device is."""
    box = inscribed_linf_box(torch.rand(3, 3, 2, 2), 0.1)
    expected = uniform_in(box, seeded(3), torch.arange(3))
    with torch.device("meta"):
        found = uniform_in(box, seeded(3), torch.arange(3, device="cpu"))
    assert torch.equal(found, expected)
