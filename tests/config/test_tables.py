"""The shipped configurations of CTBench, CTRAIN and the expressive losses against their tables, copied cell by cell.

Of a cell: λ, α; s, steps of attacks; f, eps_factor; w; IBP/tail, modules of CTBench's network in either part, and
behind it the scale of the gradient; ε ×, train_factor; shrink; SWA, its first epoch; the L1 weight.
"""

from __future__ import annotations

import re

import pytest

from certtrain.config import load_config
from certtrain.config.loading import shipped_configs, shipped_studies
from certtrain.studies.design import load_study

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
# What CTRAIN's tuning found, by its own names: warm_up and ramp_up epochs, lr_decay_epoch 1 and 2, lr_decay_factor,
# optimizer, learning_rate, l1_reg_weight, shi_reg_weight, train_eps_factor; behind the bar kappa's start,
# what that is multiplied by, and end_beta; or λ or α, then the attack's eps factor, steps and step size.
CTRAIN = {
    ("cifar10_2_255", "ibp"): "1 75 43 35 .03781 AdamW .001389 8.706e-7 .2438 1 | .2617 .6772",
    ("cifar10_2_255", "crown-ibp"): "3 74 52 0 .01254 AdamW .0006881 6.586e-8 .128 1 | .8501 .7461 1",
    ("cifar10_2_255", "sabr"): "3 108 31 12 .1136 RAdam .001545 4.41e-6 .394 1.527 | .0294 2.934 4 1.201",
    ("cifar10_2_255", "mtl-ibp"): "5 83 12 29 .1147 RAdam .005836 1.435e-6 .4139 1.168 | .002227 2.274 7 1.635",
    ("cifar10_8_255", "ibp"): "4 163 48 18 .06508 AdamW .001071 9.513e-8 .429 1.467 | .711 .6407",
    ("cifar10_8_255", "crown-ibp"): "0 123 47 44 .06416 RAdam .002468 3.368e-7 .2146 1.675 | .9356 .6007 0",
    ("cifar10_8_255", "sabr"): "5 147 94 39 .2086 RAdam .0004976 7.865e-8 .769 1 | .5 1.345 5 2",
    ("cifar10_8_255", "mtl-ibp"): "4 111 99 59 .0115 AdamW .001154 3.594e-7 .37 1.102 | .4879 1 10 1.137",
    ("tinyimagenet_1_255", "ibp"): "1 80 31 40 .002262 RAdam 7.503e-5 1.321e-6 .6215 1.027 | .9967 .8711",
    ("tinyimagenet_1_255", "crown-ibp"): "3 59 46 5 .0003323 Adam .0002945 5.754e-6 .08813 1.031 | .964 .7885 .6899",
    ("tinyimagenet_1_255", "sabr"): "2 44 62 29 .2886 RAdam .0025 9.273e-6 .8239 1.777 | .001548 2.721 8 1.006",
    ("tinyimagenet_1_255", "mtl-ibp"): "5 87 19 36 .05478 RAdam .002527 7.295e-6 .3205 1.295 | .001 2.282 7 1.25",
}
CTRAIN_EPOCHS = {"cifar10_2_255": 160, "cifar10_8_255": 260, "tinyimagenet_1_255": 160}
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
    assert (batch_norm.statistics, batch_norm.population) == ("clean", (setting, name) != ("cifar10_2_255", "staps"))
    averaging = config.training.averaging
    if "SWA" in cell:  # which its code counts from 0, and takes every 10 steps
        assert (averaging.name, averaging.start_epoch, averaging.every_steps) == ("swa", cell["SWA"] + 1, 10)
    else:
        assert averaging.name == "none"
    if name == "crown-ibp":
        assert (method.loss_fusion, method.beta) == (True, (1, 1))
    if attack := getattr(method, "attack", None):
        assert (attack.steps, attack.restarts, attack.start, attack.statistics) == (cell["s"], 3, "uniform", "clean")
        assert (attack.decay_at, attack.keep, attack.step_of) == ((), "worst", "box")
        assert attack.step_size == (max(0.25, 2 / cell["s"]) if name == "mtl-ibp" else 0.2)
        assert attack.eps_factor == cell.get("f", 1)
        assert attack.clamp_to_box == (attack.eps_factor == 1)
    if latent := getattr(method, "latent", None):
        first, last = map(int, cell["blocks"].split("/"))
        assert first + last == len(CNN7)
        assert method.tail == CNN7[-last:].count("relu")
        assert method.gradient_scale == cell["scale"]
        assert (latent.steps, latent.restarts, latent.step_size, latent.decay) == (cell["s"], 3, None, 0.2)
        assert latent.keep == "worst"
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
    assert (attack.keep, attack.step_of) == ("worst" if attack.steps > 1 else "last", "box")


PUBLISHED_IN = EXPRESSIVE | {name: CTBENCH[name] for name in ("sabr", "taps", "staps")}


@pytest.mark.parametrize("setting", ["cifar10_2_255", "cifar10_8_255"])
@pytest.mark.parametrize("kind", ["board", "methods"])
def test_a_study_has_the_coefficients_of_the_tables_that_it_names(kind, setting):
    position, found = SETTINGS.index(setting), set()
    for cell in load_study(shipped_studies()[f"{kind}_{setting}"]).cells:
        config, method = cell.config, cell.config.training.method
        if method.name not in PUBLISHED_IN:
            continue
        found.add(method.name)
        published = read(PUBLISHED_IN[method.name][position])
        check_method(method, method.name, published)
        factors = config.epsilon.max, config.epsilon.train_factor, getattr(method, "gradient_scale", None)
        assert factors == (pytest.approx(RADII[position]), published.get("ε ×", 1), published.get("scale"))
        if method.name in EXPRESSIVE:
            factor = 2.1 if setting == "cifar10_2_255" else 1
            assert (method.attack.eps_factor, method.attack.clamp_to_box) == (factor, factor == 1)
    assert found == ({"mtl-ibp"} if kind == "board" else set(PUBLISHED_IN))


def number(text: str) -> float | str:
    return float(text) if re.fullmatch(NUMBER, text) else text


@pytest.mark.parametrize(("setting", "name"), CTRAIN)
def test_a_network_of_ctrain_is_trained_as_its_tuning_found(setting, name):
    shared, own = ([*map(number, part.split())] for part in CTRAIN[setting, name].split("|"))
    natural, ramp, first, second, factor, optimizer_name, lr, l1, regularizers, train_factor = shared
    config = load_config(f"ctrain_{setting}_{name.replace('-', '_')}")
    training, optimizer, epsilon, epochs = config.training, config.optimizer, config.epsilon, CTRAIN_EPOCHS[setting]
    assert epsilon.max == pytest.approx(dict(zip(SETTINGS, RADII, strict=True))[setting])
    assert (epsilon.start_epoch - 1, epsilon.warmup_epochs, epsilon.train_factor) == (natural, ramp, train_factor)
    milestones = (natural + ramp + first, natural + ramp + first + second)
    assert optimizer.milestones == tuple(milestone for milestone in milestones if milestone < epochs)
    assert (optimizer.name, optimizer.lr, optimizer.factor, optimizer.clip) == (optimizer_name, lr, factor, 10)
    assert (config.regularizers.weight, config.regularizers.l1) == (regularizers, l1)
    assert (training.epochs, training.batch_size, training.initialization) == (epochs, 512, "ibp")
    method, statistics = training.method, training.batch_norm.statistics
    assert method.name == name
    if name in ("ibp", "crown-ibp"):
        kappa, share, *end_beta = own
        assert method.kappa == pytest.approx((kappa, kappa * share), rel=2e-4)
        assert statistics == "clean"
        if name == "crown-ibp":
            assert (method.beta, method.loss_fusion) == ((1, *end_beta), setting == "tinyimagenet_1_255")
    else:
        coefficient, eps_factor, steps, step_size = own
        assert (method.alpha if name == "mtl-ibp" else method.lambda_) == coefficient
        assert getattr(method, "radius", "epsilon") == "epsilon"
        attack = method.attack
        assert (attack.steps, attack.step_size, attack.eps_factor, attack.restarts) == (steps, step_size, eps_factor, 1)
        assert attack.clamp_to_box == (eps_factor == 1)
        assert (attack.statistics, statistics, attack.keep) == ("running", "adversarial", "worst")


def test_there_is_no_other_one():
    programs = ("ctbench", "ctrain", "expressive")
    shipped = {name for name, file in shipped_configs().items() if file.parent.name in programs}
    tables = {"ctbench": CTBENCH, "expressive": EXPRESSIVE}
    assert shipped == {
        f"{program}_{setting}_{name.replace('-', '_')}"
        for program, table in tables.items()
        for name, row in table.items()
        for setting, cell in zip(SETTINGS, row, strict=True)
        if cell is not None
    } | {f"ctrain_{setting}_{name.replace('-', '_')}" for setting, name in CTRAIN}
