from __future__ import annotations

import platform
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from certtrain.bounds import BoundedModel, Bounds, Box, linf_box
from certtrain.bounds.margins import merged_margins
from certtrain.runtime import precision as precisions
from certtrain.runtime.precision import full_precision, takes_bfloat16, training_precision
from certtrain.training.averaging import reestimate_statistics
from certtrain.training.layer_statistics import layer_statistics
from certtrain.training.method import Phase, scheduled
from certtrain.training.step import GradientStep
from tests.networks import narrow_cnn7, pooling_network, residual_network


def test_full_precision_holds_inside_and_gives_back_what_was_set():
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("torch before 2.9 has one switch, tested below")
    backends = [torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.mkldnn.matmul]
    before = [backend.fp32_precision for backend in backends]
    try:
        torch.set_float32_matmul_precision("medium")
        loose = [backend.fp32_precision for backend in backends]
        assert "ieee" not in loose
        with full_precision():
            assert [backend.fp32_precision for backend in backends] == ["ieee"] * 3
        assert [backend.fp32_precision for backend in backends] == loose
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def test_full_precision_turns_autocast_off():
    a = torch.rand(4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (a @ a).dtype is torch.bfloat16
        with full_precision():
            assert (a @ a).dtype is torch.float32


class Products(nn.Module):
    """Of constants and of values, none of them by a layer; what ends it is an affine map of three calls."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.last = nn.Parameter(torch.randn(16, 6)), nn.Linear(48 * 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.relu(torch.einsum("bij,jk->bik", x.flatten(1, 2), self.matrix))
        rows = torch.softmax(rows @ rows.transpose(1, 2), -1) @ torch.relu(rows)
        return 2 * self.last(rows.flatten(1))


@pytest.mark.parametrize("network", [narrow_cnn7, pooling_network, Products])
def test_bf16_rounds_products_alone(network):
    """Everything between them, radii and margins too, stays float32, and bounds move by no more than products do."""
    torch.manual_seed(0)
    model, images, labels = network().train(), torch.rand(8, 3, 16, 16), torch.arange(8) % 3
    net, box = BoundedModel(model, images), linf_box(images, 1 / 255)

    def passed() -> tuple[Bounds, Box]:
        bounds = net.ibp(box, clean=images, record=True)
        return bounds, merged_margins(bounds.tail, bounds.tail_input, labels)

    exact, exact_margins = passed()
    with training_precision("bf16", torch.device("cpu")):
        rounded, margins = passed()
    for each in (*rounded.record.boxes.values(), *rounded.relu_inputs, margins):
        assert {each.lower.dtype, each.upper.dtype, each.center.dtype, each.radius.dtype} == {torch.float32}
    assert rounded.clean.dtype is torch.float32
    for found, expected in zip((*rounded.relu_inputs, margins), (*exact.relu_inputs, exact_margins), strict=True):
        assert not torch.equal(found.radius, expected.radius)
        torch.testing.assert_close(found.radius.mean(), expected.radius.mean(), rtol=0.02, atol=0)


@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
def test_training_precision_gives_back_what_was_set(precision):
    a = torch.rand(4, 4)
    before = torch.backends.cudnn.allow_tf32
    with training_precision(precision, torch.device("cpu")):
        assert (a @ a).dtype is (torch.bfloat16 if precision == "bf16" else torch.float32)
    assert torch.backends.cudnn.allow_tf32 == before
    assert (a @ a).dtype is torch.float32


@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
def test_what_the_compiler_asks_for_agrees_with_what_is_set(precision):
    """Torch before 2.15 asks in every compilation on a GPU, and an answer that does not agree is an error."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    with training_precision(precision, torch.device("cpu")):
        assert (matmul.allow_tf32, cudnn.allow_tf32) == ((precision == "tf32",) * 2)
        if hasattr(cudnn, "conv"):
            names = [matmul.fp32_precision, cudnn.conv.fp32_precision]
            assert names == ["tf32" if precision == "tf32" else "ieee"] * 2


@pytest.mark.parametrize("network", [narrow_cnn7, residual_network, pooling_network])
def test_channels_last_weights_bring_everything_into_their_layout_and_change_no_value(network):
    found, images, labels = [], torch.rand(8, 3, 16, 16).double(), torch.arange(8) % 5
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = network().double().train().to(memory_format=layout)
        net = BoundedModel(model, images)
        bounds = net.ibp(linf_box(images, 0.01), clean=images)
        images_between = [part for box in bounds.relu_inputs for part in (box.center, box.radius) if part.dim() == 4]
        assert all(part.is_contiguous(memory_format=layout) for part in images_between)
        metrics = GradientStep(net).backward(images, labels, scheduled(0.01, 0.5), Phase.WARMUP)
        found.append([*metrics.values(), *(p.grad for p in model.parameters()), *model.buffers()])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
@pytest.mark.parametrize("has_kernels", [True, False])
def test_products_that_a_device_only_imitates_are_warned_of(precision, has_kernels, train, monkeypatch):
    monkeypatch.setattr(precisions, "takes_bfloat16", lambda device: has_kernels)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert train(f"training.precision={precision}").code == 0
    told = ["training.precision=bf16" in str(warning.message) for warning in caught]
    assert any(told) is (precision == "bf16" and not has_kernels)


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists(), reason="needs an x86 CPU on Linux"
)
def test_whether_this_cpu_has_kernels_for_bfloat16():
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")).split()
    if {"avx512_bf16", "amx_bf16"} & {*flags}:
        assert takes_bfloat16(torch.device("cpu"))
    elif not {"avx512bw", "avx_ne_convert"} & {*flags}:
        assert not takes_bfloat16(torch.device("cpu"))


def test_gpus_before_ampere_imitate_bfloat16(monkeypatch):
    asked = {}
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: asked.update(options) or False)
    assert not takes_bfloat16(torch.device("cuda"))
    assert asked == {"including_emulation": False}


def test_statistics_are_taken_in_float32_whatever_is_switched_on():
    """Those that BatchNorm is evaluated with, and those of layers, by which epochs are compared."""
    images, found = torch.rand(8, 3, 16, 16), []
    for reduced in (False, True):
        torch.manual_seed(0)
        model = narrow_cnn7().train()
        with torch.autocast("cpu", torch.bfloat16, enabled=reduced):
            reestimate_statistics(model, [images[:5], images[5:]])
            layers = layer_statistics(BoundedModel(model, images[:1]), images, 0.01)
        found.append((dict(model.named_buffers()), layers))
    (expected, expected_layers), (buffers, layers) = found
    assert all(torch.equal(buffers[name], expected[name]) for name in expected)
    assert layers == expected_layers
