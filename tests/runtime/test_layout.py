"""The memory layout that a network can take, and the convolutions that oneDNN must not be given."""

from __future__ import annotations

import json
import os
import platform
import random
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import certtrain
from certtrain.runtime import layout
from certtrain.runtime.layout import (
    Convolution,
    convolutions_of,
    lay_out_,
    layout_for,
    overruns_a_buffer,
    safe_convolutions,
)
from tests.commands import TINY, one_thread
from tests.networks import narrow_cnn7, narrow_resnext, residual_network


@pytest.mark.parametrize(
    ("device", "precision", "compiled", "expected"),
    [
        ("cpu", "bf16", False, torch.contiguous_format),
        ("cpu", "float32", True, torch.channels_last),
        ("cuda", "float32", True, torch.contiguous_format),
        ("cuda", "tf32", False, torch.channels_last),
        ("cuda", "bf16", True, torch.channels_last),
    ],
)
def test_channels_last_is_for_tensor_cores_and_compiled_steps_on_cpus(device, precision, compiled, expected):
    assert layout_for(precision, torch.device(device), compiled) is expected


class Flattening(nn.Module):
    """A convolution, and the flattening that is asked for; small enough for digits."""

    def __init__(self, flatten=lambda x: x.view(x.shape[0], -1), image_shape=(1, 8, 8), num_classes=10) -> None:
        super().__init__()
        self.flatten, (channels, height, width) = flatten, image_shape
        self.conv, self.linear = nn.Conv2d(channels, 2, 3, padding=1), nn.Linear(2 * height * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.flatten(torch.relu(self.conv(x))))


def viewing(image_shape, num_classes):
    return Flattening(image_shape=image_shape, num_classes=num_classes)


@pytest.mark.parametrize(
    ("flatten", "expected"),
    [
        (lambda x: x.view(len(x), -1), torch.contiguous_format),
        (lambda x: x.view(-1, 128), torch.contiguous_format),
        (lambda x: x.view(len(x), 16, 8).flatten(1), torch.contiguous_format),
        (lambda x: x.reshape(len(x), -1), torch.channels_last),
        (lambda x: x.flatten(1), torch.channels_last),
        (lambda x: x.contiguous().view(len(x), -1), torch.channels_last),
    ],
    ids=["view", "view-sizes", "view-partly", "reshape", "flatten", "contiguous-view"],
)
def test_a_network_gets_the_layout_that_its_own_views_take(flatten, expected):
    model, images = Flattening(flatten), torch.rand(4, 1, 8, 8)
    logits = model(images)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert lay_out_(model, torch.channels_last, (1, 8, 8)) is expected
    torch.testing.assert_close(model(images), logits)  # it would raise


def test_looking_at_a_network_leaves_it_as_it_was():
    model = nn.Sequential(narrow_cnn7().train(), nn.Linear(5, 2).eval())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    convolutions = convolutions_of(model, (3, 16, 16))
    assert [(c.channels, c.size, c.stride) for c in convolutions][2] == (3, (16, 16), (2, 2))
    assert (len(convolutions), model[0].training, model[1].training) == (5, True, False)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_network_that_views_is_trained_where_channels_last_was_asked_for(tmp_path):
    overrides = [*TINY[:1], *TINY[3:], "model.name=tests.runtime.test_layout:viewing", "model.options={}"]
    with one_thread(), pytest.warns(UserWarning, match="contiguous layout"):
        run = certtrain.train("digits", tmp_path, device="cpu", overrides=[*overrides, "training.channels_last=true"])
    assert run.summary["steps"] == 9


# --- oneDNN's 1×1 kernel ---------------------------------------------------------------------------------------------

IN_CHILD = """
import json, sys, torch
torch.set_num_threads(1)
for number, c in enumerate(json.loads(sys.argv[1])):
    convolve = getattr(torch.nn.functional, ("conv_transpose" if c["transposed"] else "conv") + "2d")
    last = torch.channels_last
    x = torch.rand(2, c["channels"][0], *c["size"]).to(memory_format=last).requires_grad_()
    weight = torch.rand(*c["weight"]).to(memory_format=last).requires_grad_()
    print("convolution", number, flush=True)
    convolve(x, weight, None, c["stride"], c["padding"], groups=c["groups"], **c["more"]).sum().backward()
print("convolution end", flush=True)
"""


def random_convolution(draw: random.Random) -> dict:
    """So small that what the kernel writes beyond its buffer still falls into the padding behind it."""
    transposed, groups = draw.random() < 0.3, draw.choice([1, 1, 1, 2])
    small, other = groups * draw.choice([1, 2, 3, 4, 5, 7, 8, 9, 12]), groups * draw.choice([1, 4, 8])
    kernel = draw.choice([(1, 1), (1, 1), (1, 1), (1, 2), (3, 3)])
    stride = draw.choice([(2, 2), (2, 2), (1, 2), (3, 3), (1, 1)])
    padding = draw.choice([0, 0, 0, 1]) if kernel == (1, 1) else kernel[0] // 2
    strided = [2, draw.choice([1, 2])]
    size = (
        strided
        if transposed
        else [n * s - (draw.random() < 0.2 and n * s > 1) for n, s in zip(strided, stride, strict=True)]
    )
    if kernel != (1, 1) or padding:
        size = [max(4, n) for n in size]
    channels = (other, small) if transposed else (small, other)
    weight = (channels[0], channels[1] // groups) if transposed else (channels[1], channels[0] // groups)
    more = {"output_padding": [s - 1 for s in stride] if draw.random() < 0.8 else 0} if transposed else {}
    return {"transposed": transposed, "groups": groups, "channels": channels, "size": size, "stride": stride,
            "padding": padding, "weight": [*weight, *kernel], "more": more}  # fmt: skip


def as_recorded(c: dict) -> Convolution:
    """By the program's own recorder, without gradients."""

    class Network(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            convolve = F.conv_transpose2d if c["transposed"] else F.conv2d
            weight = torch.zeros(*c["weight"])
            return convolve(x, weight, None, c["stride"], c["padding"], groups=c["groups"], **c["more"])

    (found,) = convolutions_of(Network(), (c["channels"][0], *c["size"]))
    return found


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="another kind of CPU")
def test_every_convolution_that_meets_the_faulty_kernel_is_recognized():
    """oneDNN itself says which kernel it takes. With too few channels for a register, that one writes too much."""
    draw = random.Random(0)
    convolutions = [random_convolution(draw) for _ in range(150)]
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "ONEDNN_VERBOSE": "1"}
    child = [sys.executable, "-c", IN_CHILD, json.dumps(convolutions)]
    told = subprocess.run(child, env=environment, capture_output=True, text=True, check=True).stdout
    parts = told.split("convolution ")[1:]
    assert parts[-1].startswith("end")
    recognized = 0
    for convolution, log in zip(convolutions, _by_number(told), strict=True):
        recorded = as_recorded(convolution)
        faulty = any("jit_1x1:avx2,backward_weights" in line for line in log) and recorded.channels < 8
        recognized += faulty
        assert not faulty or max(recorded.stride) == 1 or overruns_a_buffer(recorded), convolution
        assert not overruns_a_buffer(recorded) or recorded.channels < 8
    assert recognized or "jit_1x1:avx2,backward_weights" not in told


def _by_number(told: str) -> list[list[str]]:
    parts: list[list[str]] = []
    for line in told.splitlines():
        if line.startswith("convolution "):
            parts.append([])
        elif parts:
            parts[-1].append(line)
    return parts[:-1]


class OnPixels(nn.Module):
    """A strided 1×1 convolution that is no module."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.linear = nn.Parameter(torch.rand(8, 3, 1, 1)), nn.Linear(8 * 64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.conv2d(x, self.weight, stride=2).flatten(1))


def strided_shortcut(image_shape, num_classes):
    """On digits: its 1×1 convolution sees one channel."""
    return nn.Sequential(nn.Conv2d(image_shape[0], 8, 1, 2), nn.ReLU(), nn.Flatten(), nn.Linear(128, num_classes))


@pytest.mark.parametrize(
    ("network", "affected"),
    [(residual_network, True), (OnPixels, True), (narrow_resnext, False), (narrow_cnn7, False)],
)
@pytest.mark.parametrize("avx2", [True, False])
def test_only_affected_networks_on_affected_cpus_go_without_onednn(network, affected, avx2, monkeypatch):
    monkeypatch.setattr(layout, "onednn_takes_avx2", lambda: avx2)
    model = network()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(KeyboardInterrupt):
            interrupted_inside(safe_convolutions(model, (3, 16, 16)), enabled=not (affected and avx2))
    assert torch.backends.mkldnn.enabled
    assert len(caught) == (affected and avx2)


def interrupted_inside(context, enabled: bool) -> None:
    with context:
        assert torch.backends.mkldnn.enabled == enabled
        raise KeyboardInterrupt


def test_a_run_goes_without_onednn_where_it_must(tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "onednn_takes_avx2", lambda: True)
    overrides = [*TINY[:1], *TINY[3:], "model.name=tests.runtime.test_layout:strided_shortcut", "model.options={}"]
    with one_thread(), pytest.warns(UserWarning, match="without oneDNN"):
        run = certtrain.train("digits", tmp_path, device="cpu", overrides=overrides)
    assert run.summary["steps"] == 9
    assert torch.backends.mkldnn.enabled


@pytest.mark.parametrize(
    ("limit", "capability", "expected"),
    [("AVX2", "AVX512", True), ("avx2_vnni", "AVX512", True), ("", "AVX2", True), ("", "AVX512", False)],
)
def test_which_cpus_are_affected(limit, capability, expected, monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert layout.onednn_takes_avx2() is expected
