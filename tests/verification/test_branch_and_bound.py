"""Branch and bound against enumeration of activation patterns, and the properties its bounds must have."""

from __future__ import annotations

import itertools
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import Tensor, nn

from certtrain.bound_methods import METHODS
from certtrain.bounds import BoundedModel, Box
from certtrain.bounds.linear import AlphaOptions, alpha_margins, crown_margins, tightened
from certtrain.bounds.linear.beta import Ascent, DomainBatch, Neurons, Splits
from certtrain.bounds.margins import proved
from certtrain.bounds.results import Record
from certtrain.data import Split
from certtrain.errors import UnsupportedOperation, UsageError
from certtrain.verification import branch_and_bound as module
from certtrain.verification.branch_and_bound import Outcome, Search, branch_and_bound
from certtrain.verification.domains import Domain, Leaf
from certtrain.verification.verdicts import Verdict
from certtrain.verification.verify import verify


def small_network(
    seed: int, widths: tuple[int, ...], bias: float = 0.3, activation: type[nn.Module] = nn.ReLU
) -> nn.Sequential:
    random = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for i, (entering, leaving) in enumerate(itertools.pairwise(widths)):
        layer = nn.Linear(entering, leaving).double()
        with torch.no_grad():
            layer.weight.copy_(torch.randn(leaving, entering, generator=random, dtype=torch.float64))
            layer.bias.copy_(bias * torch.randn(leaving, generator=random, dtype=torch.float64))
        layers += [layer] if i == len(widths) - 2 else [layer, activation()]
    return nn.Sequential(*layers).eval()


def least_margins(network: nn.Sequential, box: Box, label: int) -> np.ndarray:
    """(K,) the exact minima of z_y - z_j, one linear program for each activation pattern."""
    affine = [(m.weight.detach().numpy(), m.bias.detach().numpy()) for m in network if isinstance(m, nn.Linear)]
    bounds = np.stack([box.lower[0].numpy(), box.upper[0].numpy()], 1)
    hidden = [len(bias) for _, bias in affine[:-1]]
    least = np.full(len(affine[-1][1]), np.inf)
    for pattern in itertools.product([0.0, 1.0], repeat=sum(hidden)):
        matrix, offset = np.eye(len(bounds)), np.zeros(len(bounds))
        rows, limits, start = [], [], 0
        for (weight, bias), count in zip(affine, hidden, strict=False):
            matrix, offset = weight @ matrix, weight @ offset + bias
            active = np.array(pattern[start : start + count])
            start += count
            sign = 1 - 2 * active  # z <= 0 where inactive, -z <= 0 where active
            rows.append(sign[:, None] * matrix)
            limits.append(-sign * offset)
            matrix, offset = active[:, None] * matrix, active * offset
        matrix, offset = affine[-1][0] @ matrix, affine[-1][0] @ offset + affine[-1][1]
        for j in range(len(least)):
            constraints = (np.concatenate(rows), np.concatenate(limits)) if rows else ()
            found = linprog(matrix[label] - matrix[j], *constraints, bounds=bounds)
            if found.status == 2:
                break
            least[j] = min(least[j], found.fun + offset[label] - offset[j])
    return least


def question(network: nn.Module, box: Box, label: int) -> tuple:
    net = BoundedModel(network, box.center)
    labels = torch.tensor([label])
    with torch.no_grad():
        record = tightened(net.ibp(box, record=True).recorded, 1000)
        margins = net.margins(box, labels, "crown")
    return network, record, labels, margins


@given(seed=st.integers(0, 10**6), widths=st.sampled_from([(2, 4, 3), (3, 6, 2), (2, 3, 3, 3), (2, 4, 2, 2), (2, 3)]))
@example(seed=164, widths=(2, 3, 3, 3))  # attacked, with domains neither proved nor waiting
@example(seed=364, widths=(3, 6, 2))
@example(seed=0, widths=(2, 3))  # affine, with nothing to split: proved
@example(seed=3, widths=(2, 3))  # and attacked
@settings(max_examples=25, deadline=None)
def test_verdicts_equal_enumeration(seed, widths):
    network = small_network(seed, widths)
    random = torch.Generator().manual_seed(seed)
    center = torch.rand(1, widths[0], generator=random, dtype=torch.float64)
    box = Box(center - 0.4, center + 0.4)
    label = int(network(center).argmax())
    exact = np.delete(least_margins(network, box, label), label)
    least = exact.min()
    asked = question(network, box, label)
    for seconds in (0, torch.inf):
        (outcome,) = branch_and_bound(*asked, Search(timeout=seconds, ascent=Ascent(steps=3), domains=2))
        assert (np.delete(outcome.lower.numpy(), label) <= exact + 1e-9).all()  # whatever the verdict
    if abs(least) < 1e-7:
        return
    assert outcome.verdict == (Verdict.PROVED if least > 0 else Verdict.ATTACKED), least
    if outcome.verdict == Verdict.ATTACKED:
        assert (outcome.point >= box.lower[0]).all()
        assert (outcome.point <= box.upper[0]).all()
        assert int(network(outcome.point[None]).argmax()) != label


@pytest.mark.slow
@given(seed=st.integers(0, 10**6), arithmetic=st.sampled_from([None, "float64", "float32"]))
@settings(max_examples=6, deadline=None)
def test_margins_by_search_are_below_the_minima_and_prove_what_is_true(seed, arithmetic):
    """Of three boxes, searched two at a time: the exact minima, and the bounds that the search begins with."""
    network = small_network(seed, (2, 4, 3, 3))
    random = torch.Generator().manual_seed(seed)
    center = torch.rand(3, 2, generator=random, dtype=torch.float64)
    radius = torch.tensor([0.05, 0.2, 0.4], dtype=torch.float64)[:, None]
    box, labels = Box(center - radius, center + radius), network(center).argmax(1)
    exact = torch.from_numpy(
        np.stack([least_margins(network, box.take(slice(i, i + 1)), int(y)) for i, y in enumerate(labels)])
    )
    if arithmetic == "float32":
        network = network.float()  # and the box stays in float64
    net = BoundedModel(network, center.to(next(network.parameters())))
    search = Search(timeout=torch.inf, images=2, ascent=Ascent(steps=3))
    found = net.margins(box, labels, "branch-and-bound", arithmetic=arithmetic, search=search)
    tolerance = 1e-9 if arithmetic is None else 1e-5  # float32's weights are not quite those of `exact`
    assert not found.requires_grad
    assert (found <= exact + tolerance).all()
    assert (found >= net.margins(box, labels, "alpha-crown", arithmetic=arithmetic) - 1e-12).all()
    assert (found.gather(1, labels[:, None]) == 0).all()
    least = exact.scatter(1, labels[:, None], torch.inf).amin(1)
    decided = least.abs() > 1e-4
    assert (proved(found) == (least > 0))[decided].all()


def test_a_search_is_for_branch_and_bound_of_networks_in_eval_mode_and_intersected():
    network, x = small_network(0, (2, 3, 2)), torch.zeros(1, 2, dtype=torch.float64)
    net, box, labels = BoundedModel(network, x), Box(x, x), torch.tensor([0])
    for method in METHODS:
        with pytest.raises(UsageError, match="does not"):
            net.margins(box, labels, method, search=Search())
    with pytest.raises(UsageError, match="intersected"):
        net.margins(box, labels, "branch-and-bound", intersect=False)
    network.train()
    with pytest.raises(UsageError, match="eval mode"):
        net.margins(box, labels, "branch-and-bound")


# --- what holds of every tree, whatever is split ----------------------------------------------------------------------

ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh)


def searched(seed: int, activation: type[nn.Module]) -> tuple[nn.Sequential, Box, int, Record, Outcome]:
    """Of a box that is nearly as large as points allow, on IBP's boxes: bounds alone do not prove it."""
    network = small_network(seed, (3, 5, 4, 3), activation=activation)
    random = torch.Generator().manual_seed(seed)
    center = torch.rand(1, 3, generator=random, dtype=torch.float64)
    label, directions = int(network(center).argmax()), 2 * torch.rand(2000, 3, generator=random).double().round() - 1
    growing = (0.05 * step for step in range(1, 60))
    right = itertools.takewhile(lambda r: (network(center + r * directions).argmax(1) == label).all(), growing)
    radius = 0.9 * max(right, default=0.05)
    box, labels = Box(center - radius, center + radius), torch.tensor([label])
    net = BoundedModel(network, center)
    bounds = net.ibp(box, record=True)
    search = Search(timeout=torch.inf, max_memory=140_000, ascent=Ascent(steps=3), domains=16, keep_leaves=True)
    (outcome,) = branch_and_bound(network, bounds.recorded, labels, net.margins_of(bounds, labels), search)
    return network, box, label, bounds.recorded, outcome


def domains_of(leaf: Leaf, record: Record, label: int, classes: int) -> DomainBatch:
    function = torch.zeros(1, classes, dtype=torch.float64)
    function[0, label], function[0, leaf.target] = 1, -1
    split = Splits(
        torch.tensor([[s.neuron for s in leaf.splits]], dtype=torch.int64),
        torch.tensor([[-1.0 if s.above else 1.0 for s in leaf.splits]], dtype=torch.float64),
        torch.tensor([[s.threshold for s in leaf.splits]], dtype=torch.float64),
    )
    return DomainBatch(record, Neurons.of(record), torch.zeros(1, dtype=torch.int64), function, split)


def neurons_at(network: nn.Sequential, points: Tensor) -> Tensor:
    """(P, N): what enters the activations."""
    found = []
    for layer in network:
        if not isinstance(layer, nn.Linear):
            found.append(points)
        points = layer(points)
    return torch.cat(found, 1)


def holds_at(leaf: Leaf, neurons: Tensor) -> Tensor:
    """(P,) bool: which points are in the leaf's domain."""
    inside = torch.ones(len(neurons), dtype=torch.bool)
    for split in leaf.splits:
        z = neurons[:, split.neuron]
        inside &= (z > split.threshold) if split.above else (z <= split.threshold)
    return inside


@pytest.mark.parametrize(
    "activation",
    [nn.ReLU, nn.LeakyReLU, *(pytest.param(smooth, marks=pytest.mark.slow) for smooth in (nn.Sigmoid, nn.Tanh))],
)
def test_leaves_cover_the_box_once_and_hold_where_they_are(activation):
    """Points of the box lie in one leaf of each tree, whose bound is below the margin there and can be had again."""
    trees = 0
    for seed in range(6):
        network, box, label, record, outcome = searched(seed, activation)
        if outcome.verdict != Verdict.PROVED or len(outcome.leaves) < 3:
            continue
        trees += 1
        random = torch.Generator().manual_seed(seed)
        points = box.lower + 2 * box.radius * torch.rand(2000, 3, generator=random, dtype=torch.float64)
        neurons, logits = neurons_at(network, points), network(points)
        for target in {leaf.target for leaf in outcome.leaves}:
            leaves = [leaf for leaf in outcome.leaves if leaf.target == target]
            inside = torch.stack([holds_at(leaf, neurons) for leaf in leaves])
            assert (inside.sum(0) == 1).all(), "a point is in no leaf, or in several"
            margin = logits[:, label] - logits[:, target]
            for leaf, own in zip(leaves, inside, strict=True):
                batch = domains_of(leaf, record, label, logits.shape[1])
                assert (leaf.multipliers >= 0).all()
                slopes = torch.zeros_like(neurons[:1]).index_copy(1, outcome.undecided, leaf.slopes[None])
                bound = float(batch.linear_bounds(slopes, leaf.multipliers[None]).least().detach())
                assert bound > 0
                assert bound <= leaf.lower + 1e-9, "a leaf's bound is its own, or its parent's if better"
                assert (margin[own] >= leaf.lower - 1e-9).all()
            least = float(outcome.lower[target])
            assert least == pytest.approx(min(leaf.lower for leaf in leaves))
    assert trees


@given(seed=st.integers(0, 10**6), activation=st.sampled_from(ACTIVATIONS))
@settings(max_examples=25, deadline=None)
def test_bounds_hold_on_their_domains_for_all_slopes_and_multipliers(seed, activation):
    """Whatever is split where, and with whatever parameters that are allowed: sound at every point of the domain."""
    network = small_network(seed, (3, 5, 4, 3), activation=activation)
    random = torch.Generator().manual_seed(seed)
    center = torch.rand(1, 3, generator=random, dtype=torch.float64)
    box = Box(center - 0.5, center + 0.5)
    _, record, _, _ = question(network, box, 0)
    points = box.lower + torch.rand(4000, 3, generator=random, dtype=torch.float64)
    neurons, logits = neurons_at(network, points), network(points)
    chosen = torch.randperm(9, generator=random)[:3]
    anchor = neurons[0, chosen] + 0.05 * torch.randn(3, generator=random, dtype=torch.float64)
    if issubclass(activation, (nn.ReLU, nn.LeakyReLU)):
        anchor = torch.zeros_like(anchor)  # only the kink makes both sides linear
    sign = torch.where(neurons[0, chosen] >= anchor, -1.0, 1.0).double()  # the first point is inside
    function = torch.randn(1, 3, generator=random, dtype=torch.float64)
    splits = Splits(chosen[None], sign[None], anchor[None])
    batch = DomainBatch(record, Neurons.of(record), torch.zeros(1, dtype=torch.int64), function, splits)
    low, high = batch.slope_ends()
    slopes = low + (high - low) * torch.rand(1, len(low), generator=random, dtype=torch.float64)
    multipliers = torch.rand(1, 3, generator=random, dtype=torch.float64)
    inside = (sign * (neurons[:, chosen] - anchor) <= 0).all(1)
    assert inside[0]
    values = logits[inside] @ function[0]
    bound = float(batch.linear_bounds(slopes, multipliers).least().detach())
    assert bound <= float(values.detach().min()) + 1e-9
    best = batch.optimized(slopes, multipliers, Ascent(steps=5))
    assert float(best.lower) >= bound - 1e-12
    assert float(best.lower) <= float(values.detach().min()) + 1e-9


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_without_splits_the_bounds_are_crowns_and_alpha_crowns(activation):
    network = small_network(3, (3, 5, 4, 3), activation=activation)
    box = Box(torch.full((1, 3), -1.0).double(), torch.full((1, 3), 1.0).double())
    label = int(network(box.center).argmin())  # so that no margin is proved, and slopes are optimised
    _, record, labels, _ = question(network, box, label)
    others = [j for j in range(3) if j != label]
    functions = torch.eye(3, dtype=torch.float64)[label] - torch.eye(3, dtype=torch.float64)[others]
    nothing = torch.zeros(2, 0, dtype=torch.float64)
    batch = DomainBatch(
        record, Neurons.of(record), torch.tensor([0, 0]), functions, Splits(nothing.long(), nothing, nothing)
    )
    bounds = replace(BoundedModel(network, box.center).ibp(box, record=True), record=record)
    crown = crown_margins(bounds, labels)[0, others]
    torch.testing.assert_close(batch.linear_bounds(batch.initial_slopes(), nothing).least()[:, 0], crown)
    assert (crown < 0).all()
    for steps in (1, 6):
        ascent = Ascent(steps=steps)
        options = AlphaOptions(steps + 1, ascent.slope_lr, ascent.decay)  # which leaves the last step's bound out
        alpha = alpha_margins(bounds, labels, options)[0, others]
        found = batch.optimized(batch.initial_slopes(), nothing, ascent).lower
        torch.testing.assert_close(found, alpha, rtol=1e-9, atol=1e-9)


def test_bounds_rise_along_every_branch(monkeypatch):
    """No domain's bound is below that of the domain it was split from, nor the root's below CROWN's."""
    seen = []
    bound = module._BatchSearch._bound

    def recorded(self, nodes):
        before = {domain.number: domain.lower for _, domain in nodes}
        bound(self, nodes)
        waiting = {domain.number: domain.lower for image in self.images for domain in image.waiting}
        seen.extend((lower, waiting[number]) for number, lower in before.items() if number in waiting)

    monkeypatch.setattr(module._BatchSearch, "_bound", recorded)
    for activation in ACTIVATIONS:
        for seed in (1, 3):
            searched(seed, activation)
    assert len(seen) > 10
    assert all(child >= parent for parent, child in seen)
    assert any(child > parent for parent, child in seen)


def test_a_memory_bound_that_does_not_hold_the_roots_is_refused():
    network = small_network(0, (3, 6, 6, 3))
    box = Box(torch.full((1, 3), -1.0).double(), torch.full((1, 3), 1.0).double())
    asked = question(network, box, int(network(box.center).argmax()))
    with pytest.raises(UsageError, match="max_memory: the first domains of 1 images take"):
        branch_and_bound(*asked, Search(max_memory=10))


def several(count: int, widths: tuple[int, ...], radius: float) -> tuple:
    """`question` of boxes around random points, with their own labels."""
    network = small_network(2, widths)
    centers = torch.rand(count, widths[0], generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    labels, box, net = (
        network(centers).argmax(1),
        Box(centers - radius, centers + radius),
        BoundedModel(network, centers),
    )
    with torch.no_grad():
        bounds = net.ibp(box, record=True)
        return network, bounds.recorded, labels, net.margins_of(bounds, labels)


SEVERAL = several(3, (3, 6, 6, 3), 0.35)


@given(kept=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=3), limit=st.integers(0, 30))
@example(kept=[(0, 0), (0, 9), (1, 25)], limit=20)
@example(kept=[(0, 9), (0, 15), (0, 0)], limit=20)
@settings(deadline=None)
def test_given_up_for_memory_is_the_largest_of_those_still_searched(kept, limit):
    """Whatever domains wait and leaves are kept; whoever has nothing left to search is proved."""
    network, record, labels, margins = SEVERAL
    run = module._BatchSearch(network, record, labels, margins, Search(timeout=torch.inf), record.boxes[0])
    domain = Domain(-1.0, 0, 1, (), 0, np.zeros(0))
    for image, (waiting, leaves) in zip(run.images, kept, strict=True):
        image.roots, image.waiting, image.leaves = [], [domain] * waiting, [domain] * leaves
        image.undecided = run.images[0].undecided
    each = run._domain_bytes(run.images[0])
    run.search = replace(run.search, max_memory=limit * each)
    run._decide(run.images)
    expected = {i: sum(pair) for i, pair in enumerate(kept) if pair[0]}
    while sum(expected.values()) > limit:
        del expected[max(expected, key=expected.__getitem__)]
    for i, image in enumerate(run.images):
        remains = None if i in expected else Verdict.MEMORY
        assert image.verdict == (remains if kept[i][0] else Verdict.PROVED)
        assert len(image.leaves) == (0 if image.verdict == Verdict.MEMORY else kept[i][1])


def test_roots_are_bounded_in_parts_as_other_domains_are(monkeypatch):
    """Never more at once than was asked for, however many classes there are; and time is looked at between parts."""
    sizes = []

    class Counted(DomainBatch):
        def __init__(self, record, neurons, image, *rest):
            sizes.append(len(image))
            super().__init__(record, neurons, image, *rest)

    monkeypatch.setattr(module, "DomainBatch", Counted)
    images, classes, domains = 3, 40, 5
    asked = several(images, (3, 6, classes), 0.5)
    network, record, labels, margins = asked
    assert (margins <= 0).sum() > 2 * images * domains
    outcomes = branch_and_bound(*asked, Search(timeout=0, domains=domains, candidates=1, ascent=Ascent(steps=1)))
    assert max(sizes) <= 2 * domains
    box = record.boxes[0]
    points = box.lower[:, None] + 2 * box.radius[:, None] * torch.rand(images, 500, 3, dtype=torch.float64)
    for i, outcome in enumerate(outcomes):
        assert outcome.verdict == Verdict.TIMEOUT
        assert outcome.domains <= 2 * domains
        logits = network(points[i])
        assert (outcome.lower >= margins[i]).all()
        assert (outcome.lower <= (logits[:, labels[i], None] - logits).amin(0) + 1e-9).all()


def test_margins_that_are_no_numbers_prove_nothing():
    network, record, labels, margins = SEVERAL
    search = Search(timeout=0, ascent=Ascent(steps=2))
    unknown = torch.full_like(margins, torch.nan)
    nothing = torch.full_like(margins, -torch.inf).scatter(1, labels[:, None], 0.0)
    for found, expected in zip(
        *(branch_and_bound(network, record, labels, known, search) for known in (unknown, nothing)), strict=True
    ):
        assert found.verdict == expected.verdict
        torch.testing.assert_close(found.lower, expected.lower)


def test_an_operation_without_a_split_is_refused_by_name():
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool, self.last = nn.MaxPool1d(2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.pool(x[:, None])[:, 0])

    network = Pooled().double().eval()
    box = Box(torch.zeros(1, 4).double(), torch.ones(1, 4).double())
    with pytest.raises(UnsupportedOperation, match=r"MaxPool1d in module 'pool' has no split.*alpha-crown"):
        branch_and_bound(*question(network, box, 0), Search())


class Coordinates(nn.Module):
    """A map of constants beside the image, as many as there are images (CoordConv)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.grid = nn.Buffer(torch.rand(1, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(torch.cat([x, self.grid.expand(x.shape[0], -1)], 1))))


def test_constants_beside_values_are_of_any_number_of_domains():
    """The same verdicts as of the network in which they are part of the bias."""
    torch.manual_seed(0)
    model = Coordinates().double().eval()
    plain = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), deepcopy(model.last)).double().eval()
    with torch.no_grad():
        plain[0].weight.copy_(model.first.weight[:, :3])
        plain[0].bias.copy_(model.first.bias + model.first.weight[:, 3:] @ model.grid[0])
    searched = 0
    for seed in range(12):
        x = torch.rand(1, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        box = Box(x - 0.4, x + 0.4)
        label = int(plain(x).argmax())
        (found,), (expected,) = (
            branch_and_bound(*question(network, box, label), Search(timeout=torch.inf)) for network in (model, plain)
        )
        assert found.verdict == expected.verdict
        searched += found.domains > 2
    assert searched > 0


def unbounded(kind: str) -> nn.Sequential:
    """Networks of which some neuron may overflow, or is so near to it that no sound bound is finite."""
    torch.manual_seed(0)
    layers: dict[str, list[nn.Module]] = {
        "a BatchNorm's tiny weight": [nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)],
        "one layer": [nn.Flatten(), nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 2)],
        "two layers": [nn.Flatten(), nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)],
        "two layers without bends": [nn.Flatten(), nn.Linear(4, 2), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)],
    }
    network = nn.Sequential(*layers[kind]).eval()
    with torch.no_grad():
        if isinstance(norm := network[1], nn.BatchNorm2d):
            norm.weight[1] = 1e-13
        for layer in network[1:-1]:
            if isinstance(layer, nn.Linear):
                layer.weight.copy_(3e38 * (torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(1, layer.in_features // 2)))
        network[-1].bias.copy_(torch.tensor([-3.0, 0.0]))
    return network


@pytest.mark.parametrize("arithmetic", [None, "float32", "float64"])
@pytest.mark.parametrize("kind", ["a BatchNorm's tiny weight", "one layer", "two layers", "two layers without bends"])
def test_a_search_where_boxes_are_infinite_ends_with_a_verdict(kind, arithmetic):
    """Without a proof that is false: some points are misclassified in exact arithmetic."""
    network = unbounded(kind)
    images = (torch.rand(3, 1, 2, 2, generator=torch.Generator().manual_seed(1)) * 256).byte()
    with torch.no_grad():
        labels = network(images / 255).argmax(1)
        exact = deepcopy(network).double()
        offsets = torch.tensor(list(itertools.product([-0.1, 0.1], repeat=4)), dtype=torch.float64).view(16, 1, 1, 2, 2)
        fooled = (exact((images / 255 + offsets).clamp(0, 1).flatten(0, 1)).argmax(1).view(16, 3) != labels).any(0)
    search = Search(timeout=1, ascent=Ascent(steps=2))
    (found,) = verify(
        network, Split(images, labels), 0.1, ["ibp", "branch-and-bound"], arithmetic=arithmetic, search=search
    )
    assert not (found.proved & fooled).any()
    assert set(found.verdicts) <= set(Verdict)
    assert (found.margin[~found.proved] <= 0).all()


SLOW_SCORES = [pytest.param(score, marks=pytest.mark.slow) for score in (torch.inf, -torch.inf)]


@pytest.mark.parametrize("score", [torch.nan, *SLOW_SCORES])
def test_neurons_whose_scores_are_not_finite_are_split(score, monkeypatch):
    """What is searched is decided all the same, whatever the order: no verdict but those of the usual scores."""
    network, record, labels, margins = SEVERAL
    search = Search(timeout=torch.inf, ascent=Ascent(steps=2))
    usual = branch_and_bound(network, record, labels, margins, search)
    gaps = DomainBatch.gaps
    monkeypatch.setattr(DomainBatch, "gaps", lambda *args: torch.full_like(gaps(*args), score))
    found = branch_and_bound(network, record, labels, margins, search)
    assert [outcome.verdict for outcome in found] == [outcome.verdict for outcome in usual]
    assert any(outcome.domains > 4 for outcome in found)
