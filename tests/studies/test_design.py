"""What a study file means, and what is said of one that is wrong, without torch."""

from __future__ import annotations

import itertools

import pytest

from certtrain.config import load_config
from certtrain.config.loading import shipped_studies
from certtrain.errors import UsageError
from certtrain.studies.design import cells_of, load_study
from certtrain.studies.scaling.design import load_plan
from certtrain.studies.search import load_tuning

GRID = """
base: digits
seeds: [3, 5]
overrides: {training.epochs: 58}
configs:
  narrow: {model: {options: {width: 2}}}
  no-bn: {base: no_batch_norm}
grid:
  optimizer.lr: [0.001, 2e-3]
  training.method:
    - ibp
    - {name: sabr, lambda: 0.4}
"""
TUNING = """
base: digits
search:
  optimizer.lr: {low: 0.001, high: 0.01, log: true}
  training.batch_size: [32, 64]
trials: 4
"""


@pytest.fixture
def written(tmp_path):
    def write(text, name="study.yaml"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def test_every_combination_has_every_seed(written):
    study = load_study(written(GRID))
    expected = {
        f"{config}_lr={lr}_method={method}/seed-{seed}"
        for config, lr, method, seed in itertools.product(
            ("narrow", "no-bn"), ("0.001", "0.002"), ("ibp", "sabr,lambda=0.4"), (3, 5)
        )
    }
    assert {run.name for run in study.runs} == expected
    assert len(study.runs) == 16
    assert [len(runs) for runs in cells_of(study.runs).values()] == [2] * 8
    by_name = {run.name: run.config for run in study.runs}
    changes = {"training.epochs": 58, "model.options.batch_norm": False, "optimizer.lr": 2e-3, "seed": 5}
    method = {"training.method": {"name": "sabr", "lambda": 0.4}}
    assert by_name["no-bn_lr=0.002_method=sabr,lambda=0.4/seed-5"] == load_config("digits", changes | method)


def test_a_run_begins_with_the_network_of_its_own_seed(written):
    text = "base: digits\nseeds: [3, 5]\noverrides: {start_from: 'old/seed-{seed}'}\n"
    text += "configs: {a: {}, b: {start_from: null}}"
    starts = {run.name: run.config.start_from for run in load_study(written(text)).runs}
    assert {name: start and start.path for name, start in starts.items()} == {
        "a/seed-3": "old/seed-3",
        "a/seed-5": "old/seed-5",
        "b/seed-3": None,
        "b/seed-5": None,
    }


def test_what_is_said_last_counts(written):
    text = "base: digits\noverrides: {optimizer.lr: 0.1}\ngrid: {optimizer.lr: [0.2]}\n"
    assert load_study(written(text)).cells[0].config.optimizer.lr == 0.2
    assert load_study(written(text), ["optimizer.lr=0.3"]).cells[0].config.optimizer.lr == 0.3


def test_a_base_lies_beside_the_study(written, tmp_path, monkeypatch):
    written("base: digits\ntraining: {epochs: 59}\n", "mine.yaml")
    path = written("base: mine.yaml\n")
    monkeypatch.chdir("/")
    (cell,) = load_study(path).cells
    assert (cell.name, cell.config.training.epochs) == ("base", 59)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bas: digits", "unknown key bas: did you mean base?"),
        ("seeds: [0]", "base is missing"),
        ("base: digit", "base: unknown config file 'digit': did you mean"),
        ("base: digits\nseeds: [0, 0]", "seeds: a seed is named twice"),
        ("base: digits\nseeds: []", "seeds: an empty list"),
        ("base: digits\nseeds: [-1]", "seeds.0: "),
        ("base: digits\ngrid: {optimizer.lr: []}", "grid.optimizer.lr names no value"),
        ("base: digits\ngrid: {optimizer.rl: [1]}", "rl=1: unknown key optimizer.rl: did you mean lr?"),
        ("base: digits\ngrid: {optimizer.lr: [fast]}", "lr=fast: optimizer.lr: "),
        ("base: digits\ngrid: {optimizer.lr: [0.1, 0.10]}", "two configurations are called lr=0.1"),
        ("base: digits\nconfigs: {../up: {}}", "'../up' cannot be a folder's name"),
        ("base: digits\nconfigs: {logs: {}}", "'logs' cannot be a folder's name"),
        (
            "base: digits\ngrid: {optimizer.lr: %s, epsilon.beta: %s}" % ((list(range(1, 151)),) * 2),
            "22500 runs, more than",
        ),
        ("[]", "expected keys such as base"),
        ("base: 3", "base.0: Input should be a valid string (got 3)"),
        ("base: digits\nseeds: 3", "seeds: a list is expected (got 3)"),
        ("base: digits\ngrid: {optimizer.lr: 3}", "grid.optimizer.lr: a list is expected (got 3)"),
        ("base: digits\ngrid: {size: {wide: 3}}", "grid.size.wide: a mapping is expected, key: value (got 3)"),
        ("base: digits\nconfigs: {a: {base: 3}}", "a: base is the name of a config file, or a list of names"),
        ("base: digits\ngrid: {configuration: {x: {optimizer.lr: 0.1}}}", "grid.configuration: so the choice among"),
    ],
)
def test_a_wrong_study_is_explained(written, text, message):
    with pytest.raises(UsageError) as error:
        load_study(written(text))
    assert message in str(error.value)
    assert all(len(line) <= 300 for line in str(error.value).splitlines())


def test_no_axis_takes_the_place_of_the_configs(written):
    """Nor one whose key ends like the name of theirs."""
    text = "base: digits\nconfigs: {a: {}, b: {optimizer.lr: 0.2}}\ngrid: {model.options.configuration: [1, 2]}"
    study = load_study(written(text))
    assert study.grid.axes == ("configuration", "model.options.configuration")
    assert sorted((cell.config.optimizer.lr, cell.config.model.options["configuration"]) for cell in study.cells) == [
        (0.002, 1),
        (0.002, 2),
        (0.2, 1),
        (0.2, 2),
    ]


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        ("overrides: {seed: 7}", ()),
        ("configs: {a: {seed: 1}, b: {optimizer.lr: 0.1}}", ()),
        ("grid: {seed: [1, 2]}", ()),
        ("grid: {size: {small: {seed: 0}, large: {optimizer.lr: 0.1}}}", ()),
        ("", ("seed=7",)),
        ("", ("optimizer.lr=0.1", " seed = 7")),
        ("seeds: [7]", ("seed=7",)),
    ],
)
def test_a_seed_is_named_nowhere_but_under_seeds(written, text, overrides):
    with pytest.raises(UsageError, match=r"seed: a study's seeds stand under seeds, as in seeds: \[0, 1\]"):
        load_study(written(f"base: digits\n{text}"), overrides)


@pytest.mark.parametrize(
    ("varied", "override"),
    [
        ("grid: {optimizer.lr: [0.1, 0.2]}", "optimizer.lr=0.3"),
        ("grid: {optimizer.lr: [0.1, 0.2]}", "optimizer={lr: 0.3}"),
        ("grid: {optimizer: [{lr: 0.1}, {lr: 0.2}]}", "optimizer.lr=0.3"),
        ("grid: {training.method: [ibp, {name: mtl-ibp, alpha: 0.5}]}", "training.method.alpha=0.3"),
        ("configs: {a: {}, b: {optimizer.lr: 0.2}}", "optimizer.lr=0.3"),
        ("grid: {size: {small: {optimizer.lr: 0.1}, large: {optimizer: {lr: 0.2}}}}", "optimizer.lr=0.3"),
    ],
)
def test_what_the_study_varies_is_not_set_for_all_of_it(written, varied, override):
    key = override.partition("=")[0]
    with pytest.raises(UsageError, match=f"study.yaml: {key} is what [a-z]+ varies: set it there alone"):
        load_study(written(f"base: digits\n{varied}"), [override])


@pytest.mark.parametrize(
    "text",
    [
        "configs: {a: {optimizer.lr: 0.1, training.epochs: 70}, b: {training: {epochs: 70}}}",
        "grid: {optimizer.lr: [0.1, 0.2], training.epochs: [70]}",
        "grid: {training.method: [ibp, crown-ibp]}",
    ],
)
def test_what_is_alike_in_all_configurations_is_set_for_all_of_them(written, text):
    cells = load_study(written(f"base: digits\n{text}"), ["training.epochs=80"]).cells
    assert [cell.config.training.epochs for cell in cells] == [80, 80]


@pytest.mark.parametrize(
    ("text", "overrides", "names"),
    [
        ("configs: {a: {}, b: {}}", (), "a/seed-0 and b/seed-0"),
        ("configs: {a: {}, b: {optimizer.lr: 2e-3}}", (), "a/seed-0 and b/seed-0"),  # as in the base
        ("configs: {a: {base: no_batch_norm}, b: {model.options.batch_norm: false}}", (), "a/seed-0 and b/seed-0"),
        ("configs: {a: {base: mine.yaml}, b: {}}", (), "a/seed-0 and b/seed-0"),  # but for the seed
        ("grid: {optimizer.lr: {a: {}, b: {optimizer.clip: 10}}}", (), "a/seed-0 and b/seed-0"),
        ("seeds: [3, 4]\nconfigs: {a: {start_from: 'r{seed}'}, b: {start_from: r4}}", (), "a/seed-4 and b/seed-4"),
        ("configs: {a: {}, b: {base: no_batch_norm}}", ("model.options.batch_norm=true",), "a/seed-0 and b/seed-0"),
    ],
)
def test_two_configurations_are_not_the_same(written, text, overrides, names):
    written("seed: 5\n", "mine.yaml")
    with pytest.raises(UsageError, match=f"study.yaml: {names} are the same configuration and seed"):
        load_study(written(f"base: digits\n{text}"), overrides)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TUNING + "objectives: [verified_errors]", "unknown objective 'verified_errors': did you mean verified_error"),
        (TUNING + "objectives: []", "name one or several"),
        *(
            (f"{TUNING}objectives: [{objectives}]\npruning: {{}}", "pruning is by verified_error: it must be the obj")
            for objectives in ("natural_error", "pgd_error", "train_seconds", "natural_error, verified_error")
        ),
        (TUNING + "validation: 0", "nothing to choose by but the test set"),
        (TUNING + "validation: 1.0", "validation is 1.0: a share is below 1, and a number of images whole"),
        (TUNING + "validation: 2.5", "validation is 2.5: a share is below 1, and a number of images whole"),
        (TUNING.replace("high: 0.01", "high: 0.001"), "nothing lies between"),
        (TUNING.replace("low: 0.001", "low: 0"), "log is for ranges above 0"),
        (TUNING.replace("optimizer.lr", "optimizer.rl"), "unknown key optimizer.rl: did you mean lr?"),
        (TUNING.replace("[32, 64]", "[32, few]"), "search training.batch_size='few': training.batch_size: "),
        (TUNING.replace("[32, 64]", "[32]"), "name at least two choices"),
        (TUNING + "sampler: tpee", "sampler: "),
        (TUNING.replace("[32, 64]", "3"), "search.training.batch_size: a list is expected (got 3)"),
        (TUNING.replace("high", "hihg"), "unknown key search.optimizer.lr.hihg: did you mean high?"),
        (TUNING + "final: {seed: 3}", "unknown key final.seed: did you mean seeds?"),
        (TUNING + "trails: 3", "unknown key trails: did you mean trials?"),
    ],
)
def test_a_wrong_search_is_explained(written, text, message):
    with pytest.raises(UsageError) as error:
        load_tuning(written(text))
    assert message in str(error.value)


@pytest.mark.parametrize("objectives", ["", "objectives: [verified_error]"])
def test_pruning_is_by_the_objective_itself(written, objectives):
    assert load_tuning(written(f"{TUNING}pruning: {{}}\n{objectives}")).file.pruning is not None


ASKED = {  # which key is named, where several change
    "seed: {low: 1, high: 3}": "seed",
    "backend: [native, lirpa]": "backend",
    "data.limit: [100, 200]": "data.limit",
    "data.validation: [0.1, 0.2]": "data.validation",
    "data.name: [digits, mnist]": "data.name",
    "data.classes: [[0, 1], [0, 2]]": "data.classes",
    "verification.pgd_steps: {low: 1, high: 9}": "verification.pgd_steps",
    "verification.method: [ibp, crown-ibp]": "verification.method",
    "verification.eps: [0.1, 0.2]": "verification.eps",
    "verification: [{limit: 10}, {limit: 20}]": "verification.limit",
    "epsilon: [{max: 0.1}, {max: 0.2}]": "verification.eps",
    "epsilon.max: {low: 0.1, high: 0.2}": "verification.eps",
}


@pytest.mark.parametrize("space", ASKED)
def test_what_trials_are_judged_by_is_not_searched(written, space):
    with pytest.raises(UsageError) as error:
        load_tuning(written(TUNING.replace("search:", f"search:\n  {space}")))
    assert f": search.{space.partition(':')[0]}: {ASKED[space]} is part of what all trials are asked" in str(
        error.value
    )
    assert ("set it, or search epsilon.train_factor" in str(error.value)) == ("max" in space)


@pytest.mark.parametrize(
    "space",
    [
        "epsilon.max: {low: 0.1, high: 0.2}",
        "epsilon.train_factor: {low: 0.8, high: 1.2}",
        "data.flip: [false, true]",
        "data.crop: {low: 0, high: 2}",
    ],
)
def test_what_is_trained_at_and_on_is_searched(written, space):
    overrides = "overrides: {verification.eps: 0.1, verification.split: validation}"  # as a trial's is in any case
    text = TUNING.replace("search:", f"search:\n  {space}") + overrides
    assert space.partition(":")[0] in load_tuning(written(text)).file.search


@pytest.mark.parametrize(
    ("radii", "base", "space", "radius"),
    [  # of the test, of which trials are judged at epsilon.max, or else at the largest; None: not all at the same
        ([0.1, 0.2, 0.3, 0.4], 0.4, "epsilon.max: [0.1, 0.4]", None),
        ([0.4, 0.1], 0.4, "epsilon: [{max: 0.4}, {max: 0.1}]", None),
        ([0.1, 0.2], 0.1, "epsilon.max: [0.05, 0.15]", None),
        ([0.1, 0.2], 0.1, "epsilon.max: {low: 0.05, high: 0.15}", None),
        ([0.1, 0.2], 0.2, "epsilon.max: {low: 0.05, high: 0.15, step: 0.05}", None),
        ([0.1, 0.2], 0.2, "epsilon.max: {low: 0.05, high: 0.15}", None),
        ([0.1, 0.2], 0.2, "epsilon.max: {low: 0.05, high: 0.17, step: 0.04}", 0.2),
        ([0.1, 0.2], 0.2, "epsilon.max: {low: 0.11, high: 0.3, log: true}", 0.2),
        ([0.1, 0.2], 0.3, "epsilon.max: [0.05, 0.2, 0.3]", 0.2),
        ([0.2], 0.1, "epsilon.max: {low: 0.1, high: 0.3}", 0.2),
        ([0.1, 0.2], 0.1, "epsilon.train_factor: {low: 0.8, high: 2}", 0.1),
    ],
)
def test_all_trials_are_judged_at_one_radius(written, radii, base, space, radius):
    """Between the ends of a range as well."""
    text = TUNING.replace("search:", f"search:\n  {space}")
    text += f"overrides: {{verification.eps: {radii}, epsilon.max: {base}}}"
    if radius is None:
        with pytest.raises(UsageError, match=f"{space.partition(':')[0]}: the radius of the errors is part of what"):
            load_tuning(written(text))
    else:
        tuning = load_tuning(written(text))
        assert {tuning.trial_config(changes).judged_radius for changes in tuning.checked_changes()} == {radius}


def test_trials_cannot_reach_the_test_set_and_what_is_tested_has_all_training_images(written):
    tuning = load_tuning(written(TUNING + "overrides: {verification.split: test, data.validation: 7}"))
    trial, final = tuning.trial_config({"optimizer.lr": 0.005}), tuning.final_config({"optimizer.lr": 0.005})
    assert (trial.verification.split, trial.data.validation) == ("validation", 0.1)
    assert (final.verification.split, final.data.validation) == ("test", 0)
    assert trial.optimizer.lr == final.optimizer.lr == 0.005
    assert tuning.base_settings() == {"optimizer.lr": 0.002, "training.batch_size": "64"}


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("data.validation=0.5", "data.validation"),
        ("verification.split=test", "verification.split"),
        ("verification={limit: 10, split: test}", "verification.split"),
        ("data={name: digits, validation: 7}", "data.validation"),
    ],
)
def test_what_the_search_sets_is_not_set_on_the_command_line(written, override, key):
    with pytest.raises(UsageError, match=f"{key} is set by the search: .*; leave it out"):
        load_tuning(written(TUNING), ["optimizer.clip=1", override])


def test_what_lies_beside_it_is(written):
    tuning = load_tuning(written(TUNING), ["verification={limit: 10}", "data.classes=[0, 1]"])
    trial = tuning.trial_config({})
    assert (trial.verification.limit, trial.data.classes, trial.verification.split) == (10, (0, 1), "validation")


SPACES_AND_BASE = [  # a space, what the base has there, and whether that is in the search
    ("epsilon.max: {low: 0, high: 1}", 0.1, False),  # whole numbers
    ("epsilon.max: {low: 0, high: 1}", 1.0, True),
    ("epsilon.max: {low: 0.0, high: 1}", 0.1, True),
    ("epsilon.max: {low: 0, high: 0.05}", 0.1, False),
    ("optimizer.lr: {low: 0.001, high: 0.009, step: 0.0004}", 0.002, False),
    ("optimizer.lr: {low: 0.001, high: 0.009, step: 0.0004}", 0.0022, True),
    ("optimizer.lr: {low: 0.1, high: 0.7, step: 0.2}", 0.3, True),  # of which 0.3 - 0.1 is no multiple in binary
    ("epsilon.warmup_epochs: {low: 5, high: 40, step: 7}", 20, False),
    ("epsilon.warmup_epochs: {low: 5, high: 40, step: 7}", 26, True),
]


@pytest.mark.parametrize(("space", "value", "within"), SPACES_AND_BASE)
def test_base_is_a_trial_where_all_it_has_is_searched(written, space, value, within):
    key = space.partition(":")[0]
    overrides = {"verification.eps": 0.1, key: value}
    tuning = load_tuning(written(f"base: digits\ntrials: 2\nsearch: {{{space}}}\noverrides: {overrides}"))
    settings = tuning.base_settings()
    assert settings == ({key: value} if within else None)
    assert settings is None or tuning.trial_config(settings) == tuning.trial_config({})


def test_verification_of_a_split_that_is_not_there_is_refused():
    with pytest.raises(UsageError, match=r"verification.split validation: data\.validation"):
        load_config("digits", {"verification.split": "validation"})


def test_what_is_wrong_everywhere_is_told_once(written):
    text = "base: digits\nconfigs: {a: {}, b: {backend: x}, c: {backend: x}}\noverrides: {optimizer.rl: 1}"
    with pytest.raises(UsageError) as error:
        load_study(written(text))
    everywhere, in_two = str(error.value).splitlines()
    assert "study.yaml: unknown key optimizer.rl" in everywhere
    assert "study.yaml: b and 1 more: backend" in in_two


def test_some_configurations_of_a_study_can_be_chosen(written):
    configs = "{ibp: {}, ibp-wide: {model.options.width: 64}, crown: {training.method: crown-ibp}}"
    study = load_study(written(f"base: digits\nseeds: [0, 1]\nconfigs: {configs}"))
    chosen = study.only(["ibp*", "crown"]).only(["ibp*"])
    assert [run.name for run in chosen.runs] == ["ibp/seed-0", "ibp-wide/seed-0", "ibp/seed-1", "ibp-wide/seed-1"]
    with pytest.raises(UsageError, match="unknown configuration of the study 'crwon': did you mean crown"):
        study.only(["ibp", "crwon"])


RUNS = {  # of shipped studies: configurations, times the grid, times seeds
    "batchnorm_cifar10": 3 * 3 * 2 * 3,
    "board_cifar10_2_255": 4 * 11 * 3,
    "board_cifar10_8_255": 4 * 11 * 3,
    "digits_methods": 4 * 3,
    "methods_cifar10_2_255": 10 * 3,
    "methods_cifar10_8_255": 10 * 3,
    "rewarm": 15 * 3,
    "rewarm_sources": 3 * 3,
    "speedrun": 3 * 2 * 3,
    "speedrun_choice": 11 * 2,
    "speedrun_cnn7": 2 * 3,
    "speedrun_finalists": 6,
    "vit_digits": 3 * 3,
    "warmup_optimizers": 7 * 3 * 3,
    "warmup_rates": 8 * 2 * 3,
}


@pytest.mark.parametrize("name", shipped_studies())
def test_what_is_shipped_can_be_read(name):
    path = shipped_studies()[name]
    if name.startswith("tune"):
        load_tuning(path)
    elif name.startswith("scaling"):
        load_plan(path)
    else:
        assert len(load_study(path).runs) == RUNS[name]
