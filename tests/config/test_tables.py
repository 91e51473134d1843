"""The shipped configurations of CTBench and of the expressive losses against their tables, copied cell by cell.

Of a cell: λ, α; s, steps of attacks; f, eps_factor; w; IBP/tail, modules of CTBench's network in either part, and
behind it the scale of the gradient; ε ×, train_factor; shrink; SWA, its first epoch; the L1 weight.
"""

from __future__ import annotations

import re

import pytest

from certtrain.config import load_config
from certtrain.config.loading import shipped_configs

SETTINGS = ("mnist_0_1", "mnist_0_3", "cifar10_2_255", "cifar10_8_255", "tinyimagenet_1_255")
RADII = (0.1, 0.3, 2 / 255, 8 / 255, 1 / 255)
CTBENCH = {
    "ibp": ("2e-6, w .7", "2e-6, w .7", "1e-6, w .8", "0", "1e-5"),
    "crown-ibp": ("5e-6, w .7", "1e-6, w .7", "3e-6", "0", "2e-5, SWA 150"),
    "sabr": ("λ .4, s 10, 1e-6, w .7", "λ .9, s 5, 2e-6", "ε × 1.5, λ .1, shrink .8, s 5, 1e-6", "λ .9, s 5, 0",
             "λ .4, s 1, 5e-5"),
    "taps": ("10/11, 4, s 10, 2e-6, w .7", "ε × 1.3333333333333333, 13/8, 4, s 5, 0", "4/17, 4, s 8, shrink .8, 2e-6",
             "17/4, 2, s 10, 0", "17/4, 8, s 1, 5e-5, w .7"),
    "staps": ("λ .4, 17/4, 4, s 10, 5e-6, w .7", "λ .6, 17/4, 4, s 10, 1e-5", "λ .1, shrink .8, 17/4, 2, s 8, 1e-6",
              "λ .9, 17/4, 2, s 10, 0", "λ .6, 17/4, 4, s 1, 5e-5"),
    "mtl-ibp": ("α .02, s 10, 1e-5, w .7, SWA 65", "α .5, s 1, 1e-6, SWA 65",
                "α .01, f 2, s 1, 3e-6, w .9, SWA 150", "α .6, f 1, s 1, 0, SWA 225",
                "α .05, f 1.5, s 1, 5e-5, w .7, SWA 150"),
}  # fmt: skip
EXPRESSIVE = {
    "cc-ibp": ("α .1, 2e-6", "α .3, 3e-6", "α .01, 3e-6", "α .5, 0", "α .01, 5e-5"),
    "mtl-ibp": ("α .01, 1e-5", "α .08, 1e-6", "α .004, 3e-6", "α .5, 1e-7", "α .01, 5e-5"),
    "exp-ibp": (None, None, "α .095, 4e-6", "α .5, 0", "α .04, 5e-5"),
}
# epochs, milestones, epochs before the ramp, of the ramp, weight of the regularizers, batch
CTBENCH_SCHEDULES = {
    "mnist_0_1": (70, (50, 60), 0, 20, 0.5, 256),
    "mnist_0_3": (70, (50, 60), 0, 20, 0.5, 256),
    "cifar10_2_255": (160, (120, 140), 1, 80, 0.5, 128),
    "cifar10_8_255": (240, (200, 220), 1, 120, 0.5, 128),
    "tinyimagenet_1_255": (160, (120, 140), 1, 80, 0.2, 128),
}
EXPRESSIVE_SCHEDULES = CTBENCH_SCHEDULES | {"cifar10_8_255": (260, (180, 220), 1, 80, 0.5, 128)}
CNN7 = ["normalize"] + ["conv", "bn", "relu"] * 5 + ["flatten", "linear", "bn", "relu", "linear"]  # CTBench's modules
NUMBER = r"[0-9.]+(?:e-[0-9]+)?"


def read(cell: str) -> dict[str, float | str]:
    """A cell by its letters; "l1", "blocks" and "scale" for what has none."""
    values: dict[str, float | str] = {}
    for part in cell.split(", "):
        if found := re.fullmatch(rf"(λ|α|s|f|w|ε ×|shrink|SWA) ({NUMBER})", part):
            values[found[1]] = float(found[2])
        elif "/" in part:
            values["blocks"] = part
        elif "blocks" in values and "scale" not in values:
            values["scale"] = float(part)
        else:
            values["l1"] = float(part)
    return values


def cells(table):
    return [
        pytest.param(method, setting, radius, read(cell), id=f"{setting}-{method}")
        for method, row in table.items()
        for setting, radius, cell in zip(SETTINGS, RADII, row, strict=True)
        if cell is not None
    ]


def check_schedule(config, setting, radius, schedules):
    training, optimizer, epsilon = config.training, config.optimizer, config.epsilon
    assert config.data.name == setting.partition("_")[0]
    assert (config.model.name, config.model.options) == ("cnn7", {})
    assert epsilon.max == pytest.approx(radius)
    assert config.test_radii == (epsilon.max,)
    assert (epsilon.mid, epsilon.beta, training.initialization) == (0.25, 4, "ibp")
    assert (optimizer.name, optimizer.lr, optimizer.factor, optimizer.clip) == ("Adam", 5e-4, 0.2, 10)
    found = (training.epochs, optimizer.milestones, epsilon.start_epoch - 1, epsilon.warmup_epochs,
             config.regularizers.weight, training.batch_size)  # fmt: skip
    assert found == schedules[setting]


def check_method(method, name, cell):
    """What the letters of a cell stand for, and that nothing else is set that they could stand for."""
    assert method.name == name
    assert method.w == cell.get("w", 1)
    assert getattr(method, "alpha", None) == cell.get("α")
    assert getattr(method, "lambda_", None) == cell.get("λ")
    assert getattr(method, "shrink", 1) == cell.get("shrink", 1)


@pytest.mark.parametrize(("name", "setting", "radius", "cell"), cells(CTBENCH))
def test_a_network_of_ctbench_is_trained_as_its_table_says(name, setting, radius, cell):
    config = load_config(f"ctbench_{setting}_{name.replace('-', '_')}")
    check_schedule(config, setting, radius, CTBENCH_SCHEDULES)
    method, batch_norm = config.training.method, config.training.batch_norm
    check_method(method, name, cell)
    assert config.regularizers.l1 == cell["l1"]
    assert config.epsilon.train_factor == cell.get("ε ×", 2 if setting == "mnist_0_1" else 1)
    assert (batch_norm.statistics, batch_norm.population) == ("clean", True)
    averaging = config.training.averaging
    assert (averaging.name, getattr(averaging, "start_epoch", None)) == (
        ("swa", cell["SWA"]) if "SWA" in cell else ("none", None)
    )
    if name == "crown-ibp":
        assert (method.loss_fusion, method.beta) == (True, (1, 1))
    if attack := getattr(method, "attack", None):
        assert (attack.steps, attack.restarts, attack.start, attack.statistics) == (cell["s"], 3, "uniform", "clean")
        assert attack.decay_at == ()
        assert attack.step_size == (max(0.25, 2 / cell["s"]) if name == "mtl-ibp" else 0.2)
        assert attack.eps_factor == cell.get("f", 1)
        assert attack.clamp_to_box == (attack.eps_factor == 1)
    if latent := getattr(method, "latent", None):
        first, last = map(int, cell["blocks"].split("/"))
        assert first + last == len(CNN7)
        assert method.tail == CNN7[-last:].count("relu")
        assert method.gradient_scale == cell["scale"]
        assert (latent.steps, latent.restarts, latent.step_size, latent.decay) == (cell["s"], 3, None, 0.2)
        assert latent.decay_at == ((0.7,) if cell["s"] >= 10 else ())


@pytest.mark.parametrize(("name", "setting", "radius", "cell"), cells(EXPRESSIVE))
def test_a_network_of_the_expressive_losses_is_trained_as_its_table_says(name, setting, radius, cell):
    config = load_config(f"expressive_{setting}_{name.replace('-', '_')}")
    check_schedule(config, setting, radius, EXPRESSIVE_SCHEDULES)
    method, batch_norm = config.training.method, config.training.batch_norm
    check_method(method, name, cell)
    assert config.training.averaging.name == "none"
    assert config.regularizers.l1 == cell["l1"]
    assert config.epsilon.train_factor == {"mnist_0_1": 2, "mnist_0_3": 1.334}.get(setting, 1)
    assert (batch_norm.statistics, batch_norm.population) == ("adversarial", False)
    attack = method.attack
    expected = (8, 0.25, 2.1, False) if setting == "cifar10_2_255" else (1, 10, 1, True)
    assert (attack.steps, attack.step_size, attack.eps_factor, attack.clamp_to_box) == expected
    assert (attack.restarts, attack.start, attack.statistics, attack.decay_at) == (1, "uniform", "running", ())


def test_there_is_no_other_one():
    shipped = {name for name, file in shipped_configs().items() if file.parent.name in ("ctbench", "expressive")}
    tables = {"ctbench": CTBENCH, "expressive": EXPRESSIVE}
    assert shipped == {
        f"{program}_{setting}_{name.replace('-', '_')}"
        for program, table in tables.items()
        for name, row in table.items()
        for setting, cell in zip(SETTINGS, row, strict=True)
        if cell is not None
    }
