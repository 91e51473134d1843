"""The shipped configurations: each says what its name says, fits its data, and trains."""

from __future__ import annotations

import json
import re
from functools import cache

import numpy as np
import pytest

import certtrain
from certtrain.config import load_config
from certtrain.config.loading import runnable_configs, shipped_configs
from certtrain.training.cost import Size, network_size
from tests.commands import one_thread

PUBLISHED = [name for name, file in shipped_configs().items() if file.parent.name == "published"]
NAME = re.compile(
    r"(?P<data>mnist|cifar10_8_255|tinyimagenet_1_255)_(?P<model>cnn7|wide_resnet|resnext|cnn_large)"
    r"_(?P<method>vanilla_ibp|crown_ibp|short_warmup)(?P<no_bn>_no_bn)?(?:_(?P<schedule>short|long))?"
)
IMAGES = {"digits": ((1, 8, 8), 10), "mnist": ((1, 28, 28), 10), "cifar10": ((3, 32, 32), 10),
          "tinyimagenet": ((3, 64, 64), 200)}  # fmt: skip

# epochs, start, warmup, milestones, factor, batch, clip, mid, crop
SCHEDULES = {
    ("mnist", None): (70, 1, 20, (50, 60), 0.2, 256, 10, 0.25, 0),
    ("mnist", "long"): (200, 11, 50, (130, 190), 0.1, 256, None, 0, 0),
    ("cifar10", "short"): (70, 2, 20, (50, 60), 0.2, 128, 10, 0.25, 2),
    ("cifar10", None): (160, 2, 80, (120, 140), 0.2, 128, 10, 0.25, 2),
    ("cifar10", "long", "vanilla_ibp"): (3200, 321, 1600, (2600, 3040), 0.1, 1024, None, 0.25, 4),
    ("cifar10", "long", "crown_ibp"): (2000, 101, 800, (1400, 1700), 0.1, 256, 8, 0.4, 4),
    ("tinyimagenet", "short"): (80, 2, 10, (61, 71), 0.2, 128, 10, 0.25, 4),
    ("tinyimagenet", None): (80, 2, 20, (61, 71), 0.2, 128, 10, 0.25, 4),
    ("tinyimagenet", "long"): (800, 100, 400, (600, 700), 0.1, 100, 8, 0.4, 4),
}
NARROW = {
    "cnn7": ["width=2", "linear_width=4"],
    "cnn-large": ["width=2", "linear_width=4"],
    "cnn-small": ["width=2", "linear_width=4"],
    "wide-resnet": ["base_width=2", "widen_factor=1", "linear_width=4"],
    "resnext": ["stem_width=2", "bottleneck_width=1", "linear_width=4"],
    "vit": ["width=2", "heads=1", "depth=1"],
}


def test_every_published_row_has_a_config():
    expected = {
        f"{data}_{model}_{method}{schedule}"
        for data in ("mnist", "cifar10_8_255", "tinyimagenet_1_255")
        for model in ("cnn7", "wide_resnet", "resnext")
        for method in ("vanilla_ibp", "crown_ibp", "short_warmup")
        for schedule in ("", "_short", "_long")
        if not (data == "mnist" and schedule == "_short") and not (method == "short_warmup" and schedule == "_long")
    }
    assert expected < set(PUBLISHED)
    assert all(NAME.fullmatch(name) for name in PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_config_says_what_its_name_says(name):
    said, config = NAME.fullmatch(name), load_config(name)
    data, model, method, schedule = (said[part] for part in ("data", "model", "method", "schedule"))
    training, epsilon, optimizer = config.training, config.epsilon, config.optimizer
    assert config.data.name == data.partition("_")[0]
    assert config.model.name == model.replace("_", "-")
    assert config.model.options == ({"batch_norm": False} if said["no_bn"] else {})
    assert training.method.name == ("crown-ibp" if method == "crown_ibp" else "ibp")
    assert getattr(training.method, "loss_fusion", False) == (method == "crown_ibp" and model != "cnn_large")
    assert training.initialization == ("ibp" if method == "short_warmup" else "default")
    weight = 0 if method != "short_warmup" else 0.2 if data.startswith("tiny") else 0.5
    assert config.regularizers.weight == weight
    if model == "cnn_large" and data != "mnist":
        expected = SCHEDULES["cifar10", "long", "vanilla_ibp"]
    else:
        key = (config.data.name, schedule)
        expected = SCHEDULES.get(key) or SCHEDULES[*key, method]
    assert expected == (training.epochs, epsilon.start_epoch, epsilon.warmup_epochs, optimizer.milestones,
                        optimizer.factor, training.batch_size, optimizer.clip, epsilon.mid,
                        config.data.crop)  # fmt: skip
    assert config.data.flip == (config.data.name != "mnist")
    of_crown_ibp = (config.data.name, schedule) == ("mnist", "long")  # mnist_dm-large_0.4.json of its authors
    assert (optimizer.name, optimizer.lr, epsilon.beta) == ("Adam", 5e-4, 1 if of_crown_ibp else 4)
    assert training.method.kappa == ((1, 0.5) if of_crown_ibp else (0, 0))
    radius = {"mnist": 0.4, "cifar10_8_255": 8 / 255, "tinyimagenet_1_255": 1 / 255}[data]
    assert max(config.test_radii) == pytest.approx(radius, rel=1e-12)
    factor = 1.1 if (config.data.name, schedule) == ("cifar10", "long") else 1
    assert epsilon.max == pytest.approx(factor * radius, rel=1e-6)


@pytest.mark.parametrize("part", ["cifar10_200_epochs", "cifar10_2000_epochs", "cifar10_3200_epochs"])
@pytest.mark.parametrize("crop", [0, 2])
def test_a_schedule_comes_with_the_augmentation_of_its_source(tmp_path, part, crop):
    """RandomCrop(32, 4) and flips in the code of arXiv 1906.06316 and 2002.12920, whatever the data had before."""
    before = tmp_path / "before.yaml"
    before.write_text(f"base: cifar10_8_255\ndata: {{flip: false, crop: {crop}}}\n")
    (tmp_path / "after.yaml").write_text(f"base: [before.yaml, {part}]\n")
    data = load_config(tmp_path / "after.yaml").data
    assert (data.flip, data.crop) == (True, 4)


@pytest.mark.parametrize("data", ["mnist", "cifar10_8_255", "tinyimagenet_1_255"])
def test_the_systematic_name_of_the_short_name(data):
    assert load_config(f"{data}_cnn7_short_warmup") == load_config(data)


@cache
def size_of(model: str, shape: tuple[int, int, int], classes: int, options: str) -> Size:
    return network_size(model, shape, classes, json.loads(options))


@pytest.mark.parametrize("name", runnable_configs())
def test_the_network_fits_the_images_and_the_file_reads_back(name, tmp_path):
    config = load_config(name)
    shape, classes = IMAGES[config.data.name]
    size = size_of(config.model.name, shape, classes, json.dumps(config.model.options))
    assert 5e4 < size.parameters < 1e8
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "config.yaml") == config


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Folders of a few random images in the shape of each data set, labelled with its first and its last class."""
    folders = {}
    for data, ((channels, height, width), classes) in IMAGES.items():
        folders[data] = folder = tmp_path_factory.mktemp(data)
        for part, count in (("train", 8), ("test", 2)):
            pixels = np.random.default_rng(0).integers(0, 256, (count, height, width, channels), dtype=np.uint8)
            np.savez(folder / f"{part}.npz", images=pixels, labels=np.arange(count) % 2 * (classes - 1))
    return folders


def apart_from_schedules() -> list[str]:
    """Of configs that differ in nothing but a schedule and its augmentation, which is asserted above, one."""
    schedules = {"training": {"epochs", "batch_size"}, "epsilon": True, "optimizer": {"milestones", "factor", "clip"},
                 "data": {"crop"}}  # fmt: skip
    first: dict[str, str] = {}
    tables = ("ctbench", "ctrain", "expressive")  # whose methods are the same at all radii
    names = [name for name in runnable_configs() if not name.startswith(tables) or "cifar10_2_255" in name]
    for name in sorted(names, key=lambda name: (name not in PUBLISHED, len(name), name)):
        first.setdefault(load_config(name).model_dump_json(exclude=schedules), name)
    return sorted(first.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", apart_from_schedules())
def test_it_trains_for_an_epoch(name, images, tmp_path):
    """As shipped, but narrow, on eight images, with the whole warmup in this one epoch."""
    config = load_config(name)
    narrow = [f"model.options.{option}" for option in NARROW[config.model.name]]
    small = ["training.epochs=1", "training.batch_size=4", "epsilon.start_epoch=1", "epsilon.warmup_epochs=1",
             "optimizer.milestones=[]", "training.averaging=none",
             "verification.pgd_steps=1", "verification.pgd_restarts=1"]  # fmt: skip
    overrides = [*narrow, *small, "data.name=npz", f"data.path={images[config.data.name]}"]
    with one_thread():
        run = certtrain.train(name, tmp_path / "run", device="cpu", overrides=overrides)
    assert run.summary["steps"] == 2
    assert load_config(tmp_path / "run" / "config.yaml") == load_config(name, overrides)
