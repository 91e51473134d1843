"""Where a network lies, of what type its images are, and its mode, whatever tensors it has."""

import pytest
import torch
from torch import nn

from certtrain.modules import blank_images, device_of
from certtrain.runs.build import output_shape


class Constants(nn.Module):
    """A network whose numbers are `kind`."""

    def __init__(self, kind, device="cpu", dtype=torch.float32):
        super().__init__()
        self.flatten = nn.Flatten()
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64, device=device) if kind != "none" else None)
        value = torch.zeros(4, 2, device=device, dtype=dtype)
        if kind == "parameters":
            self.value = nn.Parameter(value)
        else:
            self.register_buffer("value", value if kind == "buffers" else None)

    def forward(self, x):
        x = self.flatten(x)
        return x if self.value is None else x @ self.value


@pytest.mark.parametrize(("kind", "device"), [("parameters", "meta"), ("buffers", "meta"), ("none", "cpu")])
def test_the_device_is_that_of_whatever_tensors_a_network_has(kind, device):
    model = Constants(kind, "meta")
    assert device_of(model).type == blank_images(model, 2, (1, 2, 2)).device.type == device


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["parameters", "buffers", "none"])
@pytest.mark.parametrize("training", [False, True])
def test_blank_images_go_through_and_leave_the_mode(kind, dtype, training):
    model = Constants(kind, dtype=dtype).train(training)
    images = blank_images(model, 2, (1, 2, 2))
    assert images.shape == (2, 1, 2, 2)
    assert model(images).dtype == (torch.float32 if kind == "none" else dtype)
    assert output_shape("constants", model, (1, 2, 2)) == (1, 4 if kind == "none" else 2)
    assert model.training == model.flatten.training == training
