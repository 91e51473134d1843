"""Whole runs on real images, from the shipped YAML files alone; skipped where the images are not at hand."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import certtrain
from certtrain.config import Config, load_config
from certtrain.training.step import GradientStep
from tests.commands import one_thread

DATA = Path(os.environ.get("CERTTRAIN_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.is_dir(), reason=f"needs real images in {DATA} (or where CERTTRAIN_DATA says)"),
]

SMALL = [
    "model.options.width=4",
    "model.options.linear_width=32",
    "training.batch_size=64",
    "training.epochs=2",
    "epsilon.warmup_epochs=1",
    "optimizer.milestones=[]",
    "verification.limit=50",
    "verification.pgd_steps=2",
]


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cifar10")
    subprocess.run([sys.executable, str(DATA / "unpack_cifar10.py"), str(folder)], check=True, capture_output=True)
    return folder


def cifar10_arguments(folder: Path) -> list[str]:
    normalisation = ["data.mean=[0.4914,0.4822,0.4465]", "data.std=[0.2023,0.1994,0.2010]"]
    return ["data.name=npz", f"data.path={folder}", "data.limit=640", *normalisation]


@pytest.mark.parametrize("config", ["cifar10_8_255", "cifar10_2_255"])
def test_cifar10(config, cifar10, cli, tmp_path):
    outcome = cli("train", config, "--out", tmp_path / "run", *cifar10_arguments(cifar10), *SMALL)
    assert outcome.code == 0, outcome.err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["natural_error"] <= summary["pgd_error"] <= summary["verified_error"]
    epochs = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert epochs[-1]["natural_error"] < 0.9  # better than guessing among ten


def test_cifar10_by_crown_ibp_resumed_once_is_the_uninterrupted_run(cifar10, cli, tmp_path):
    arguments = [*cifar10_arguments(cifar10), *SMALL, "training.method=crown-ibp", "training.checkpoint_seconds=0"]
    assert cli("train", "cifar10_8_255", "--out", tmp_path / "whole", *arguments).code == 0
    config = load_config("cifar10_8_255", arguments)
    interrupted = interrupt_after(13, config, tmp_path / "cut")
    assert interrupted.summary is None
    outcome = cli("train", "cifar10_8_255", "--out", tmp_path / "cut", "--resume", *arguments)
    assert outcome.code == 0, outcome.err
    whole, cut = (certtrain.load_model(tmp_path / name).state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def interrupt_after(step: int, config: Config, folder: Path) -> certtrain.Run:
    """Train until a signal comes during `step`."""
    backward, count = GradientStep.backward, 0

    def counting(self, *arguments):
        nonlocal count
        count += 1
        if count == step:
            signal.raise_signal(signal.SIGTERM)
        return backward(self, *arguments)

    with pytest.MonkeyPatch.context() as patch, one_thread():
        patch.setattr(GradientStep, "backward", counting)
        return certtrain.train(config, folder, device="cpu")


def test_tinyimagenet(cli, tmp_path):
    """The official layout: 200 classes, 64 pixels, greyscale JPEGs among them."""
    root = tmp_path / "data"
    root.mkdir()
    (root / "tiny-imagenet-200").symlink_to(DATA / "tiny-imagenet-sample" / "tiny-imagenet-200")
    arguments = ["train", "tinyimagenet_1_255", f"data.root={root}", "--out", tmp_path / "run", *SMALL]
    outcome = cli(*arguments)
    assert outcome.code == 0, outcome.err
    model = certtrain.load_model(tmp_path / "run")
    assert model(torch.rand(1, 3, 64, 64)).shape == (1, 200)
    strides = [m.stride for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert strides == [(1, 1), (1, 1), (2, 2), (1, 1), (2, 2)]
