"""Values of unusual shapes: one number an image, sizes that are said in numbers, networks of nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from certtrain.bound_methods import BRANCH_AND_BOUND, METHODS
from certtrain.bounds import BoundedModel, linf_box
from certtrain.errors import CerttrainError, UnsupportedOperation, UsageError
from certtrain.verification.branch_and_bound import Search

X = torch.rand(6, 4, generator=torch.Generator().manual_seed(0))


class Network(nn.Module):
    def __init__(self, forward: Callable[[Network, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
        self.vector = nn.Parameter(torch.randn(4))
        self.register_buffer("row", torch.randn(3))
        self.computed = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.computed(self, x)


def stacked(*columns: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Network, Tensor], Tensor]:
    """Logits, each computed from single numbers of images and of hidden values."""
    return lambda net, x: torch.stack([column(x, net.layer(x)) for column in columns], 1)


ONE_NUMBER = {
    "mean": lambda net, x: F.relu(net.layer(x)).mean(1)[:, None] * net.row,
    "sum, unsqueezed": lambda net, x: F.relu(net.layer(x)).sum(1).unsqueeze(1) * net.row + net.last(x),
    "x @ vector": lambda net, x: (x @ net.vector)[:, None] + net.last(F.relu(x - 0.5)),
    "einsum": lambda net, x: torch.einsum("bi,bi->b", x, F.relu(x))[:, None] * net.row,
    "unbind": lambda net, x: torch.stack([F.relu(net.layer(x).unbind(1)[i] - 0.3) for i in range(3)], 1),
    "relu": stacked(lambda x, h: F.relu(h[:, 0]), lambda x, h: F.relu(h[:, 1]) - x[:, 0], lambda x, h: 2 * x[:, 1]),
    "maximum": stacked(lambda x, h: torch.maximum(x[:, 0], h[:, 1]), lambda x, h: -h[:, 1], lambda x, h: x[:, 1] / 3),
    "products": stacked(lambda x, h: x[:, 0] * h[:, 1], lambda x, h: h[:, 0].tanh(), lambda x, h: h[:, 1].pow(2)),
    "curves": stacked(lambda x, h: h[:, 0].sigmoid(), lambda x, h: F.gelu(h[:, 1]), lambda x, h: h[:, 2].abs()),
    "clamp": stacked(lambda x, h: h[:, 0].clamp(-0.2, 0.2), lambda x, h: F.leaky_relu(h[:, 1]), lambda x, h: x[:, 3]),
}


@pytest.mark.parametrize("name", ONE_NUMBER)
@pytest.mark.parametrize("options", [{}, {"early_stop": True}, {"arithmetic": "float32"}], ids=str)
def test_one_number_an_image(name, options):
    """By every method that has a rule: no point of the box has smaller margins."""
    torch.manual_seed(0)
    model = Network(ONE_NUMBER[name]).eval()
    net, box = BoundedModel(model, X), linf_box(X, 0.1)
    with torch.no_grad():
        labels = model(X).argmax(1)
        points = box.lower + (box.upper - box.lower) * torch.rand(200, *X.shape)
        logits = torch.stack([model(point) for point in points])
    least = (logits.gather(2, labels[None, :, None].expand(len(points), -1, -1)) - logits).amin(0)
    asked = 0
    for method in (*METHODS[bool(options.get("early_stop")) :], BRANCH_AND_BOUND):
        try:
            margins = net.margins(box, labels, method, **options)
        except UnsupportedOperation:
            assert options.get("arithmetic") or (name, method) == ("products", BRANCH_AND_BOUND), "all else has a rule"
            continue
        asked += 1
        assert (margins <= least + 1e-5).all()
        assert (margins > -10).all()
    assert asked or options.get("arithmetic")


SIZES = {
    "expand": lambda net, x, h: h - h.mean(1, keepdim=True).expand(x.size(0), 4),
    "expand_as": lambda net, x, h: h - h.mean(1, keepdim=True).expand_as(x),
    "view": lambda net, x, h: h.view(x.shape[0], 2, 2).mT.reshape(x.size(0), -1),
    "unflatten": lambda net, x, h: h.unflatten(1, (2, 2)).flip(2).reshape(x.shape[0], 4),
}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("images", [1, 6])
def test_a_search_has_more_domains_than_images(name, images):
    torch.manual_seed(0)
    model = Network(lambda net, x: net.last(SIZES[name](net, x, F.relu(net.layer(x))))).eval()
    x = X[:images]
    labels, box = model(x).argmax(1), linf_box(x, 0.6)
    net = BoundedModel(model, x)
    found = net.margins(box, labels, BRANCH_AND_BOUND, search=Search(timeout=torch.inf))
    assert (found >= net.margins(box, labels, "crown") - 1e-5).all()
    points = box.lower + (box.upper - box.lower) * torch.rand(500, *x.shape)
    right = torch.stack([model(point).argmax(1) == labels for point in points]).all(0)
    proved = (found > 0).sum(1) == 2
    assert (right | ~proved).all()


@pytest.mark.parametrize("segments", [None, 1, 2, 9])
@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: x,
        lambda net, x: net.last(x),
        lambda net, x: (lambda sizes: net.last(2 * F.relu(1 + F.relu(net.layer(x)))) / sizes.numel())(x.shape[1:]),
    ],
    ids=["nothing", "one layer", "sizes that are asked late"],
)
def test_segments_bound_as_the_whole_does(forward, segments):
    torch.manual_seed(0)
    net, box = BoundedModel(Network(forward).eval(), X), linf_box(X, 0.1)
    found = net.ibp_in_segments(box, {}, lambda box: None, segments).output
    expected = net.ibp(box).output
    torch.testing.assert_close((found.lower, found.upper), (expected.lower, expected.upper))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: torch.jit.trace(nn.Linear(4, 3), X), "the network is compiled by torch.jit"),
        (lambda: nn.Sequential(torch.jit.script(nn.Linear(4, 3))), "module '0' is compiled by torch.jit"),
        (lambda: torch.export.export(nn.Linear(4, 3), (X,)).module(), "the network comes from torch.export"),
        (lambda: nn.Sequential(nn.LazyLinear(3)), "module '0' has no shape yet: call the network on a batch first"),
        (lambda: Network(lambda net, x: torch.zeros(x.size(0), 3)), "fails with a stand-in for the input"),
        (lambda: Network(lambda net, x: x if x.sum() > 0 else -x), "must not branch or loop on the input"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_what_cannot_be_recorded_is_named(model, message):
    with pytest.raises(CerttrainError, match=message) as caught:
        BoundedModel(model(), X)
    assert isinstance(caught.value, UsageError | UnsupportedOperation)
