"""What would be computed on a GPU, with tensors that only say so: all of them lie there, and a step waits for nothing.

PyTorch's fake tensors have shapes, types and devices but no values; operations of tensors on two devices are errors.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from certtrain.bounds import BoundedModel, linf_box
from certtrain.models import build_model
from certtrain.training.method import Phase, scheduled
from certtrain.training.methods import METHODS
from certtrain.training.step import GradientStep

aten = torch.ops.aten


class Waits(TorchDispatchMode):
    """Operations for which the CPU waits for the GPU: values are read, or copied from one to the other."""

    def __init__(self) -> None:
        super().__init__()
        self.met: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [value for value in (*args, result) if isinstance(value, Tensor)]
        if function is aten._local_scalar_dense.default or len({tensor.device for tensor in tensors}) > 1:
            self.met.append(str(function))
        return result


@pytest.fixture
def gpu(monkeypatch) -> Iterator[FakeTensorMode]:
    monkeypatch.setattr("certtrain.bounds.model.check_recording", lambda *_: None)  # which compares values
    monkeypatch.setattr("certtrain.bounds.model.check_question", lambda *_: None)
    # Autograd's engine asks for a GPU. Of the way back there are shapes alone here: the gradient is zero.
    monkeypatch.setattr(torch.func, "grad_and_value", lambda of, has_aux: lambda x: (torch.zeros_like(x), of(x)))
    monkeypatch.setattr(torch.autograd, "grad", lambda of, inputs, **_: tuple(map(torch.zeros_like, inputs)))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        try:
            torch.empty(1, device="cuda").uniform_()
        except RuntimeError:
            pytest.skip("this torch's fake tensors ask for the GPU that they stand for, as those of 2.6 do")
        yield mode


def network(norm: bool = True):
    with torch.device("cuda"):
        model = build_model("cnn7", (3, 8, 8), 10, options={"width": 2, "linear_width": 8, "batch_norm": norm})
        return model, torch.rand(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64)


def phases(name: str) -> list[Phase]:
    return [phase for phase in Phase if (phase is Phase.NATURAL) == (name == "natural")]


@pytest.mark.parametrize(("name", "phase"), [(name, phase) for name in sorted(METHODS) for phase in phases(name)])
def test_a_step_is_on_the_gpu_and_waits_for_nothing(gpu, name, phase):
    model, images, labels = network()
    model.train()
    step = GradientStep(BoundedModel(model, images[:1]), METHODS[name]())
    at = scheduled(0.01, 0.5, like=images)
    with Waits() as waits:
        metrics = step.evaluate(images, labels, at, phase)
    assert {value.device.type for value in metrics.values()} == {"cuda"}
    assert waits.met == []


@pytest.mark.parametrize("method", ["ibp", "crown-ibp"])
def test_bounds_are_on_the_gpu(gpu, method):
    model, images, labels = network()
    net = BoundedModel(model.eval(), images[:1])
    margins = net.margins(linf_box(images, 0.01), labels, method, max_memory=2**30)
    assert (margins.device.type, margins.shape) == ("cuda", (4, 10))
