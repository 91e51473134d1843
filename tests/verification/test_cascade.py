"""verify with branch and bound as its last stage, on a tiny network of digits."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from certtrain.bound_methods import STAGES
from certtrain.bounds import BoundedModel, linf_box
from certtrain.bounds.linear.beta import Ascent
from certtrain.bounds.linear.relaxations import RELAXATIONS
from certtrain.bounds.margins import proved
from certtrain.bounds.rounding.table import RULES as SOUND_RULES
from certtrain.data import load_dataset, to_float
from certtrain.errors import UnsupportedOperation, UsageError
from certtrain.verification.attacks import PGD
from certtrain.verification.branch_and_bound import Search
from certtrain.verification.verdicts import Verdict
from certtrain.verification.verify import verify
from tests.commands import one_thread

EPS = 0.08
METHODS = ("ibp", "crown-ibp", "branch-and-bound")
ASKED = {"eps": EPS, "method": METHODS, "attack": PGD(2, 1), "limit": 60, "search": Search(timeout=math.inf)}


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


@pytest.fixture(scope="module")
def network(digits):
    """Trained for a second: bounds leave some of its images to the search."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 10))
    images, labels = to_float(digits.train.images), digits.train.labels
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    with one_thread():
        for _ in range(150):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def result(network, digits):
    (found,) = verify(network, digits.test, **ASKED)
    return found


def least_margin_met(network, images, labels, eps):
    """(B,): over points drawn from each image's box, corners and the interior."""
    random = torch.Generator().manual_seed(0)
    met = torch.full((len(images),), torch.inf)
    for _ in range(200):
        steps = 2 * torch.rand(images.shape, generator=random) - 1
        logits = network((images + eps * steps.sign() * steps.abs().round()).clamp(0, 1))
        others = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
        met = torch.minimum(met, logits.gather(1, labels[:, None])[:, 0] - others)
    return met


def test_every_image_is_decided_and_the_counts_agree(network, digits, result):
    (bounds,) = verify(network, digits.test, **{**ASKED, "method": METHODS[:2]})
    assert bounds.unknown.sum() >= 5, "there is something to search"
    assert not result.unknown.any()
    assert result.undecided == {}
    assert (result.proved | ~bounds.proved).all(), "a search takes no proof back"
    assert result.natural_error <= result.pgd_error == result.verified_error
    counts = result.summary()["verdicts"]
    assert sum(counts.values()) == 60
    assert counts["proved"] == int(result.proved.sum())
    assert counts["attacked"] == int(result.attacked.sum()) > int(bounds.attacked.sum()), "beyond the attack's"
    stages = {stage.method: stage for stage in result.stages}
    assert stages["branch-and-bound"].images == int(bounds.unknown.sum())
    assert sum(stage.proved for stage in result.stages) == counts["proved"]
    assert (result.margin[result.proved] > 0).all()


def test_attacked_points_are_inside_the_box_and_misclassified(network, digits, result):
    images, labels = digits.test.images[:60].double() / 255, digits.test.labels[:60]
    chosen = result.attacked
    assert len(result.adversarial) == int(chosen.sum())
    points = result.adversarial.double()
    assert ((points - to_float(digits.test.images[:60])[chosen].double()).abs() <= EPS).all()
    assert ((points - images[chosen]).abs() <= EPS + 1e-7).all()
    assert (points >= 0).all()
    assert (points <= 1).all()
    assert (network(result.adversarial).argmax(1) != labels[chosen]).all()


def test_no_drawn_point_contradicts_a_proof(network, digits, result):
    images, labels = to_float(digits.test.images[:60]), digits.test.labels[:60]
    with torch.no_grad():
        met = least_margin_met(network, images, labels, EPS)
    assert (met[result.proved] >= result.margin[result.proved] - 1e-4).all()


class Interrupted(Exception):
    pass


@pytest.mark.parametrize(
    "after", [pytest.param(0, marks=pytest.mark.slow), 1, 37, pytest.param(59, marks=pytest.mark.slow)]
)
def test_an_interrupted_verification_goes_on_to_the_same_table(network, digits, result, tmp_path, after):
    file, seen = tmp_path / "results.jsonl", []

    def interrupt(found, total):
        seen.append(found.image)
        if len(seen) > after:
            raise Interrupted

    with pytest.raises(Interrupted):
        verify(network, digits.test, **ASKED, results=file, observe=interrupt)
    again = []
    (found,) = verify(network, digits.test, **ASKED, results=file, observe=lambda one, total: again.append(one.image))
    assert not set(again) & set(seen)
    assert sorted(again + seen) == list(range(60))
    assert found.verdicts == result.verdicts
    torch.testing.assert_close(found.margin[found.proved], result.margin[found.proved], rtol=0.2, atol=1e-3)
    verify(network, digits.test, **ASKED, results=file, observe=lambda one, total: pytest.fail("all is known"))


@pytest.mark.parametrize("methods", [("branch-and-bound",), ("ibp", "branch-and-bound"), ("crown",)])
@pytest.mark.parametrize("attack", [None, PGD(2, 1)])
def test_every_cascade_goes_on_from_its_results(network, digits, tmp_path, methods, attack):
    """Also one that asks nothing of images that are misclassified, or attacked."""
    file, seen = tmp_path / "results.jsonl", []
    asked = {**ASKED, "method": methods, "attack": attack, "limit": 30}

    def interrupt(found, total):
        seen.append(found)
        if len(seen) > 20:
            raise Interrupted

    with pytest.raises(Interrupted):
        verify(network, digits.test, **asked, results=file, observe=interrupt)
    again = []
    (found,) = verify(network, digits.test, **asked, results=file, observe=lambda one, total: again.append(one))
    assert len(again) == 30 - len(seen)
    verdicts = {one.image: one.verdict for one in (*seen, *again)}
    assert found.verdicts == [verdicts[image] for image in range(30)]
    assert "misclassified" in found.verdicts


@pytest.mark.parametrize("after", [0, 7, 19, 30])
def test_seconds_are_of_all_calls(network, digits, tmp_path, monkeypatch, after):
    """By a clock that goes on by a second for each result; also of a file that does not say what each took."""
    monkeypatch.setattr("certtrain.verification.verify.time", SimpleNamespace(perf_counter=itertools.count().__next__))
    file, seen = tmp_path / "results.jsonl", []
    asked = {"eps": [EPS / 2, EPS], "method": "ibp", "limit": 20, "results": file}

    def interrupt(found, total):
        seen.append(found)
        if len(seen) > after:
            raise Interrupted

    with pytest.raises(Interrupted):
        verify(network, digits.test, **asked, observe=interrupt)
    for _ in range(2):
        assert [found.seconds for found in verify(network, digits.test, **asked)] == [20, 20]
    lines = file.read_text().splitlines()
    file.write_text("\n".join(line.replace(', "took": 1.0', "") for line in lines) + "\n")
    assert [found.seconds for found in verify(network, digits.test, **asked)] == [0, 0]


class Beside(nn.Module):
    """A network that multiplies its input by a number that its state dict does not have, or has in its own way."""

    def __init__(self, factor, extra):
        super().__init__()
        self.layer, self.extra = nn.Linear(64, 10), extra
        nn.init.constant_(self.layer.weight, 0.01)
        nn.init.zeros_(self.layer.bias)
        self.register_buffer("factor", torch.tensor(factor), persistent=False)

    def forward(self, x):
        return self.layer(x.flatten(1) * self.factor)

    def get_extra_state(self):
        return {"extra": self.extra}

    def set_extra_state(self, state):
        self.extra = state["extra"]


@pytest.mark.parametrize("other", [(2.0, 1), (1.0, 2)])
def test_results_of_a_network_with_other_buffers_or_other_extra_state_are_refused(digits, tmp_path, other):
    file = tmp_path / "results.jsonl"
    for _ in range(2):
        verify(Beside(1.0, 1), digits.test, EPS, limit=5, results=file)
    with pytest.raises(UsageError, match=r"another question: model_sha256 is .* there"):
        verify(Beside(*other), digits.test, EPS, limit=5, results=file)


def test_results_of_another_network_are_refused(network, digits, tmp_path):
    file = tmp_path / "results.jsonl"
    verify(network, digits.test, EPS, limit=5, results=file)
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(UsageError, match=r"another question: model_sha256 is .* there"):
        verify(other, digits.test, EPS, limit=5, results=file)
    with pytest.raises(UsageError, match="another question: eps is"):
        verify(network, digits.test, EPS / 2, limit=5, results=file)


@pytest.mark.slow
def test_workers_find_the_same(network, digits, result, tmp_path):
    (found,) = verify(network, digits.test, **ASKED, workers=2, results=tmp_path / "results.jsonl")
    assert found.verdicts == result.verdicts
    assert torch.equal(found.correct, result.correct)


def test_a_network_that_cannot_be_sent_to_workers_is_refused(digits):
    class Local(nn.Sequential):
        pass

    with pytest.raises(UsageError, match="cannot be sent to other processes"):
        verify(Local(nn.Flatten(), nn.Linear(64, 10)), digits.test, EPS, limit=4, workers=2)


@pytest.mark.parametrize(
    ("search", "reason"),
    [
        (Search(timeout=0), "timeout"),
        # Room for the roots and little more, of which leaves take some; and no ascent, which would need fewer.
        (Search(timeout=math.inf, images=1, max_memory=8 * 1700, ascent=Ascent(steps=0)), "memory"),
    ],
    ids=["timeout", "memory"],
)
def test_time_and_memory_end_a_search_and_are_told(network, digits, result, search, reason):
    (ended,) = verify(network, digits.test, **{**ASKED, "arithmetic": "float32", "search": search})
    assert set(ended.undecided.values()) == {reason}
    assert ended.summary()["verdicts"][reason] == len(ended.undecided)
    assert (ended.unknown.nonzero()[:, 0].tolist()) == sorted(ended.undecided)
    assert not (ended.proved & ended.unknown).any()
    for found, decided in zip(ended.verdicts, result.verdicts, strict=True):
        assert found in (reason, decided)
        assert found in tuple(Verdict)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": ("branch-and-bound", "ibp")}, "as the last"),
        ({"method": ("branch-and-bound", "branch-and-bound")}, "as the last"),
        ({"backend": "lirpa"}, "backend native"),
        ({"search": Search(max_memory=1)}, "max_memory: the first domains"),
    ],
)
def test_what_branch_and_bound_cannot_do_is_refused(network, digits, options, message):
    with pytest.raises(UsageError, match=message):
        verify(network, digits.test, **{**ASKED, **options})


def test_an_operation_without_a_split_is_refused_before_anything_is_computed(digits):
    model = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 10))
    with pytest.raises(UnsupportedOperation, match="MaxPool2d in module '0' has no split"):
        verify(model, digits.test, **{**ASKED, "observe": lambda one, total: pytest.fail("too late")})


@pytest.mark.parametrize(
    "lacking",
    [{"method": ("ibp", name)} for name in STAGES[1:]] + [{"method": "ibp", "arithmetic": "float32"}],
    ids=str,
)
def test_what_a_later_stage_lacks_is_told_before_anything_is_computed(network, digits, tmp_path, monkeypatch, lacking):
    monkeypatch.delitem(SOUND_RULES if "arithmetic" in lacking else RELAXATIONS, nn.functional.relu)
    asked = {**ASKED, **lacking, "results": tmp_path / "results"}
    with pytest.raises(UnsupportedOperation, match=r"ReLU in module '[24]' has no"):
        verify(network, digits.test, **asked)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("method", ["crown", "alpha-crown"])
def test_early_stop_proves_the_same_images_with_bounds_that_hold(network, digits, method):
    images, labels = to_float(digits.test.images[:60]), digits.test.labels[:60]
    net, box = BoundedModel(network, images), linf_box(images, EPS)
    full = net.margins(box, labels, method).detach()
    early = net.margins(box, labels, method, early_stop=True).detach()
    with torch.no_grad():
        met = least_margin_met(network, images, labels, EPS)
    assert (early.scatter(1, labels[:, None], torch.inf).amin(1) <= met + 1e-4).all()
    assert (proved(early) >= proved(full)).all()
    unproved = ~proved(early)
    assert 0 < int(unproved.sum()) < 60
    if method == "crown":  # all layers were done for these: no worse than the method, and better where a layer was
        assert (early[unproved] >= full[unproved] - 1e-4).all()


def test_early_stop_is_refused_where_it_has_no_meaning(network, digits):
    images, labels = to_float(digits.test.images[:2]), digits.test.labels[:2]
    net = BoundedModel(network, images)
    with pytest.raises(UsageError, match="early_stop"):
        net.margins(linf_box(images, EPS), labels, "crown", early_stop=True, intersect=False)
