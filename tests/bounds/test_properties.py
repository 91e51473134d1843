"""No point of an input box leaves its output box: random networks of every supported operation, random boxes."""

from __future__ import annotations

from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

from certtrain.bound_methods import METHODS
from certtrain.bounds import BoundedModel, Box
from certtrain.bounds.batch_norm import scale_shift
from certtrain.bounds.interval import RULES
from certtrain.bounds.operations.arithmetic import sub
from certtrain.bounds.operations.movement import identity
from tests.bounds.random_networks import FLATTENS, STEPS, Flow, attack, networks, points_of, random_box
from tests.bounds.test_operations import EXAMPLES


def check_point_is_its_own_bounds(net: BoundedModel, point: Box, logits: Tensor, labels: Tensor) -> None:
    """Of a box that is one point, bounds are the network's `logits` there, and every method's margins are theirs."""
    with torch.no_grad():
        output = net.ibp(point).output
        margins = {method: net.margins(point, labels, method, intersect=False) for method in METHODS}
    expected = logits.gather(1, labels[:, None]) - logits
    found = {"lower": (output.lower, logits), "upper": (output.upper, logits)}
    found |= {method: (value, expected) for method, value in margins.items()}
    for name, (value, exact) in found.items():
        torch.testing.assert_close(value, exact, rtol=1e-9, atol=1e-9, msg=lambda told, name=name: f"{name}: {told}")


@settings(max_examples=75, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    drawn=networks(),
    radius=st.sampled_from([1e-6, 1e-2, 0.3, 5.0]),
    labels=st.lists(st.integers(0, 3), min_size=3, max_size=3),
)
def test_no_point_leaves_its_box(drawn, radius, labels):
    model, seed = drawn
    box, labels = random_box(seed, radius), torch.tensor(labels)
    net = BoundedModel(model, box.center)
    with torch.no_grad():
        output, margins, logits = net.ibp(box).output, net.margins(box, labels), model(box.center)
    check_point_is_its_own_bounds(net, random_box(seed, 0.0), logits, labels)
    points = points_of(box, 20, torch.Generator().manual_seed(seed + 1))
    points += [attack(model, box, i, sign) for i in range(4) for sign in (1, -1)]
    for point in points:
        with torch.no_grad():
            logits = model(point)
        slack = 1e-9 * (1 + logits.abs().max().item())
        assert output.contains(logits, slack).all()
        assert (logits.gather(1, labels[:, None]) - logits >= margins - slack).all()


@pytest.mark.slow
def test_the_random_networks_can_contain_every_rule():
    """A rule that no random network can contain is one that nothing here tests; test_operations.py tests each alone."""
    example = torch.zeros(2, 2, 4, 4, dtype=torch.float64)
    used: set[Callable] = {sub, torch.div, Tensor.detach, identity}  # in `scaled`, `constants`, test_tracing
    for position in range(max(len(STEPS), len(FLATTENS))):
        step, flatten = STEPS[position % len(STEPS)](), FLATTENS[position % len(FLATTENS)]
        model = Flow(nn.Conv2d(2, 3, 3, padding=1), [step], flatten, 4).double().eval()
        model(example)
        used |= {operation.function for operation in BoundedModel(model, example).graph.steps}
    assert F.batch_norm in used  # which settles to scale_shift
    assert RULES.keys() - used - {scale_shift} <= EXAMPLES.keys()
