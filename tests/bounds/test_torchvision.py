"""Networks that others wrote: torchvision's, as they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from certtrain.bounds import BoundedModel, linf_box
from tests.bounds.random_networks import points_of
from tests.networks import randomized

models = pytest.importorskip("torchvision.models")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenet_v2", "shufflenet_v2_x0_5"])
def test_bounds_of_its_mobile_networks_enclose_every_point(name):
    torch.manual_seed(0)
    model: nn.Module = randomized(getattr(models, name)(weights=None, num_classes=10)).double().eval()
    x, labels = torch.rand(2, 3, 32, 32, dtype=torch.float64), torch.tensor([3, 0])
    net = BoundedModel(model, x)
    for radius in (0.0, 1e-5):
        box = linf_box(x, radius)
        with torch.no_grad():
            output, margins = net.ibp(box).output, net.margins(box, labels, "crown-ibp", intersect=False)
            for point in points_of(box, 3 if radius else 1, torch.Generator().manual_seed(0)):
                logits = model(point)
                exact = logits.gather(1, labels[:, None]) - logits
                slack = 1e-9 * (1 + logits.abs().max())
                assert output.contains(logits, slack).all()
                assert (exact >= margins - slack).all()
                if not radius:
                    torch.testing.assert_close(margins, exact, rtol=1e-6, atol=1e-6)
