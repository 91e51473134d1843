from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from certtrain.bounds import BoundedModel, linf_box
from certtrain.data import Split
from certtrain.errors import DataError, UnsupportedOperation, UsageError
from certtrain.verification import answers
from certtrain.verification.attacks import PGD
from certtrain.verification.branch_and_bound import Search
from certtrain.verification.radius import certified_radii
from certtrain.verification.verify import verify
from tests.networks import Threshold, narrow_cnn7, randomized
from tests.verification.seeds import seeded


def pixels(values: list[int], labels: list[int]) -> Split:
    return Split(torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1), torch.tensor(labels))


def test_errors_of_a_network_whose_robustness_is_known():
    """Distances to the threshold, in 1/255: 127.5, 77.5, 7.5, 2.5 (right) and 22.5 (wrong)."""
    data = pixels([0, 50, 135, 130, 150], [0, 0, 1, 1, 0])
    small, large = verify(Threshold(), data, [5 / 255, 30 / 255], attack=PGD(10, 2))
    assert small.correct.tolist() == [True, True, True, True, False]
    assert small.proved.tolist() == [True, True, True, False, False]
    assert small.attacked.tolist() == [False, False, False, True, False]
    assert (small.natural_error, small.pgd_error, small.verified_error) == pytest.approx((0.2, 0.4, 0.4))
    assert large.proved.tolist() == [True, True, False, False, False]
    assert (large.natural_error, large.pgd_error, large.verified_error) == pytest.approx((0.2, 0.6, 0.6))
    # margins of the linear network: 2·(|x - 0.5| - ε)
    torch.testing.assert_close(
        small.margin, 2 * (torch.tensor([127.5, 77.5, 7.5, 2.5, -22.5]) - 5) / 255, atol=1e-6, rtol=0
    )


def test_margins_are_the_given_networks_whatever_is_folded_on_the_way():
    torch.manual_seed(0)
    model, images = randomized(narrow_cnn7()).eval(), torch.randint(0, 256, (9, 3, 16, 16), dtype=torch.uint8)
    labels = model(images / 255).argmax(1)
    (result,) = verify(model, Split(images, labels), 1 / 255)
    exact = images.double() / 255
    margins = BoundedModel(model.double(), exact).margins(linf_box(exact, 1 / 255), labels)
    expected = margins.scatter(1, labels[:, None], torch.inf).amin(1)
    torch.testing.assert_close(result.margin.double(), expected, rtol=1e-4, atol=1e-4)
    assert result.natural_error == 0


def test_what_is_predicted_and_attacked_is_the_given_network(monkeypatch):
    """Folding rounds: here it makes another network of it, of which bounds alone may be."""

    class Otherwise(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, x):
            return -self.network(x)

    monkeypatch.setattr(answers, "fold_batch_norm", lambda model, example: Otherwise(model).eval())
    (result,) = verify(Threshold(), pixels([0, 130, 150], [0, 1, 1]), 10 / 255, attack=PGD(10, 2))
    assert result.correct.tolist() == [True, True, True]
    assert result.attacked.tolist() == [False, True, False]
    assert Threshold()(result.adversarial).argmax(1).tolist() == [0]


def test_the_order_of_errors_and_the_limit():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (20, 3, 16, 16), dtype=torch.uint8)
    (result,) = verify(narrow_cnn7(), Split(images, torch.randint(0, 5, (20,))), 1 / 255, attack=PGD(3, 1), limit=12)
    assert len(result.correct) == 12
    assert 0 < result.natural_error <= result.pgd_error <= result.verified_error <= 1


def test_without_an_attack_the_pgd_error_is_the_natural_one():
    (result,) = verify(Threshold(), pixels([0, 130], [0, 1]), 5 / 255)
    assert result.pgd_error == result.natural_error == 0
    assert result.verified_error == 0.5


def test_verify_leaves_the_models_mode_and_statistics_alone():
    model = narrow_cnn7().train()
    before = [buffer.clone() for buffer in model.buffers()]
    verify(model, Split(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)), 0.1)
    assert model.training
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))


# --- what is refused, and what is never called proved -----------------------------------------------------------------

QUESTIONS = {
    "verify": lambda model, data, eps=0.1: verify(model, data, eps),
    "verify, sound": lambda model, data, eps=0.1: verify(model, data, eps, arithmetic="float32"),
    "radius": lambda model, data, eps=0.1: certified_radii(model, data, eps),
}


class Returns(nn.Module):
    """A network of one pixel whose output is `change` of the logits of `Threshold`."""

    def __init__(self, change):
        super().__init__()
        self.threshold, self.change = Threshold(), change

    def forward(self, x):
        return self.change(self.threshold(x))


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("eps", [-1e-300, -0.1, float("nan"), float("inf"), -float("inf"), "0.1", None])
def test_a_radius_that_is_none_is_refused(question, eps):
    with pytest.raises(UsageError, match="eps"):
        QUESTIONS[question](Threshold(), pixels([0], [0]), eps)


@pytest.mark.parametrize(("ask", "name"), [
    (verify, "limit"), (verify, "batch_size"), (verify, "workers"), (certified_radii, "batch_size"),
])  # fmt: skip
@pytest.mark.parametrize("value", [0, -1, 1.5, "1"])
def test_a_number_of_images_or_workers_is_at_least_one(ask, name, value):
    with pytest.raises(UsageError, match=f"{name} is a whole number of at least 1, not {value!r}"):
        ask(Threshold(), pixels([0, 100], [0, 0]), 0.1, **{name: value})


@pytest.mark.parametrize(
    "change", [{"images": 0}, {"domains": 0}, {"candidates": -1}, {"timeout": -1}, {"timeout": math.nan}]
)
def test_a_search_that_could_not_go_on_or_end_is_refused(change):
    (name,) = change
    with pytest.raises(UsageError, match=f"{name} is a .* at least"):
        Search(**change)


def test_no_method_is_none():
    with pytest.raises(UsageError, match="name at least one"):
        verify(Threshold(), pixels([0], [0]), 0.1, [])


def test_a_radius_that_is_named_twice_is_looked_at_once():
    told = []
    one, two = verify(Threshold(), pixels([0, 100], [0, 0]), [0.1, 0.1], observe=lambda *x: told.append(x))
    assert (one.eps, one.verdicts) == (two.eps, two.verdicts)
    assert [(result.image, total) for result, total in told] == [(0, 2), (1, 2)]
    assert verify(Threshold(), pixels([0], [0]), np.float32(0.25))[0].eps == 0.25


@pytest.mark.parametrize("eps", [[], [0.1, -0.1], [0.1, "x"]])
def test_so_is_one_of_several(eps):
    with pytest.raises(UsageError, match="eps"):
        verify(Threshold(), pixels([0], [0]), eps)


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("label", [-1, 2, 10**9])
def test_a_label_outside_the_classes_is_refused(question, label):
    with pytest.raises(DataError, match="outside the model's classes 0 to 1"):
        QUESTIONS[question](Threshold(), pixels([0, 0], [0, label]))


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Threshold().half(), "linear.weight is float16"),
        (Threshold().bfloat16(), "linear.weight is bfloat16"),
        (Threshold().double(), "linear.weight is float64"),
        (Returns(lambda z: z[:, 0]), r"logits \(B, K\).*\(1,\)"),
        (Returns(lambda z: z[:, :1]), "at least two classes"),
        (Returns(lambda z: z[:, :, None]), r"\(1, 2, 1\)"),
        (Returns(lambda z: z.repeat(2, 1)), r"\(2, 2\)"),
        (Returns(lambda z: (z, z)), "tuple"),
        (Returns(lambda z: z.half()), "float16"),
        (Returns(lambda z: z.double()), "float64"),
        (Returns(lambda z: z > 0), "bool"),
        (Returns(lambda z: z.long()), "int64"),
    ],
)
def test_a_model_that_gives_no_float32_logits_is_refused(question, model, message):
    with pytest.raises(UsageError, match=message):
        QUESTIONS[question](model, pixels([0, 255], [0, 1]))


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_parameters_that_are_not_finite_are_refused(question, value):
    model = Threshold()
    with torch.no_grad():
        model.linear.bias[1] = value
    with pytest.raises(UsageError, match=r"linear\.bias has values that are infinite or NaN"):
        QUESTIONS[question](model, pixels([0], [0]))


@pytest.mark.parametrize("arithmetic", [None, "float32"])
def test_an_image_whose_logits_are_undefined_is_not_proved(arithmetic):
    """Bright pixels overflow, and infinity times 0 is NaN, whose argmax may be the label: no prediction even so."""
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1), nn.ReLU(), nn.Linear(1, 2)
    )
    with torch.no_grad():
        for layer, weight, bias in ((1, 3e38, None), (3, 1.0, 0.0), (5, 0.0, torch.tensor([1.0, 0.0]))):
            model[layer].weight.fill_(weight)
            if bias is not None:
                model[layer].bias.copy_(torch.as_tensor(bias))
    assert model(torch.ones(1, 1, 1, 1)).isnan().all()
    data = pixels([0, 0, 255, 255], [0, 1, 0, 1])
    (result,) = verify(model, data, 1e-3, attack=PGD(2, 2), arithmetic=arithmetic)
    assert result.prediction.tolist() == [0, 0, -1, -1]
    assert result.correct.tolist() == [True, False, False, False]
    assert not result.proved[1:].any()
    radii = certified_radii(model, data, 0.1, arithmetic=arithmetic)
    assert radii.natural_error == 0.75
    assert (radii.proved[1:] == -1).all()


def test_a_module_that_writes_into_its_input_does_not_change_the_question():
    class Writes(Threshold):
        def forward(self, x):
            logits = super().forward(x)
            x.zero_()
            return logits

    try:
        (result,) = verify(Writes(), pixels([255, 200], [1, 1]), 0.1)
    except UnsupportedOperation:  # as good an answer
        return
    assert result.correct.tolist() == [True, True]


class TestPGD:
    def test_finds_the_known_adversarial_points_and_stays_inside(self):
        images, labels = pixels([130, 120, 0, 255], [1, 0, 0, 1]).images / 255.0, torch.tensor([1, 0, 0, 1])
        points, found = PGD(steps=10, restarts=2)(Threshold(), images, labels, 10 / 255)
        assert found.tolist() == [True, True, False, False]
        assert linf_box(images, 10 / 255).contains(points).all()
        assert (Threshold()(points).argmax(1) != labels).tolist() == found.tolist()
        assert torch.equal(points[2:], images[2:])

    def test_points_stay_inside_epsilon_and_the_pixel_range_under_restarts(self):
        torch.manual_seed(0)
        images, labels = torch.rand(16, 3, 16, 16), torch.randint(0, 5, (16,))
        model = narrow_cnn7().eval()
        points, found = PGD(5, 3)(model, images, labels, 0.1, seeded(len(images)))
        assert found.any()
        assert (points - images).abs().max() <= 0.1 + 1e-7
        assert points.min() >= 0
        assert points.max() <= 1
        assert ((model(points).argmax(1) != labels) == found).all()

    def test_an_images_own_seed_decides_its_restarts(self):
        """With no steps an attack is where its restart begins, which is found where it crosses the threshold."""
        data = pixels([130] * 16, [1] * 16)
        images, labels = data.images / 255.0, data.labels

        def attacked(seed, part=slice(None)):
            return PGD(0, 2)(Threshold(), images[part], labels[part], 0.1, seeded(16, seed)[part])[0]

        assert len(attacked(1).unique()) > 4
        assert torch.equal(attacked(1), attacked(1))
        assert not torch.equal(attacked(1), attacked(2))
        assert torch.equal(attacked(1)[5:7], attacked(1, slice(5, 7))), "whatever images are beside it"
