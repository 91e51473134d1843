from fractions import Fraction

import pytest
import yaml

from certtrain.config import OPTIMIZERS, Config, load_config
from certtrain.errors import UsageError

SMALLEST = {
    "data": {"name": "digits"},
    "model": {"name": "mlp"},
    "epsilon": {"max": 0.1},
    "training": {"epochs": 10},
}

# The table of published settings, column by column.
PUBLISHED = {
    "cifar10_8_255": dict(
        data="cifar10", epochs=160, eps=8 / 255, start=2, ramp=80, milestones=(120, 140), batch=128, crop=2
    ),
    "tinyimagenet_1_255": dict(
        data="tinyimagenet", epochs=80, eps=1 / 255, start=2, ramp=20, milestones=(61, 71), batch=128, crop=4
    ),
    "mnist": dict(data="mnist", epochs=70, eps=0.4, start=1, ramp=20, milestones=(50, 60), batch=256, crop=0),
}


def changed(**overrides):
    return load_config(SMALLEST, [f"{key.replace('__', '.')}={value}" for key, value in overrides.items()])


@pytest.mark.parametrize("name", PUBLISHED)
def test_shipped_configs_hold_the_published_settings(name):
    config, published = load_config(name), PUBLISHED[name]
    assert config.data.name == published["data"]
    assert config.training.epochs == published["epochs"]
    assert config.epsilon.max == pytest.approx(published["eps"], rel=1e-12)
    assert (config.epsilon.start_epoch, config.epsilon.warmup_epochs) == (published["start"], published["ramp"])
    assert (config.epsilon.mid, config.epsilon.beta) == (0.25, 4)
    assert (config.optimizer.name, config.optimizer.lr) == ("Adam", 5e-4)
    assert (config.optimizer.milestones, config.optimizer.factor) == (published["milestones"], 0.2)
    assert config.optimizer.clip == 10
    assert config.training.batch_size == published["batch"]
    assert (config.data.crop, config.data.flip) == (published["crop"], published["crop"] > 0)
    assert (config.model.name, config.training.initialization, config.training.method) == ("cnn7", "ibp", "ibp")
    assert config.regularizers.weight == (0.2 if name.startswith("tiny") else 0.5)
    assert (config.regularizers.tolerance, config.regularizers.l1) == (0.5, 0)
    assert config.regularizers.tightness
    assert config.regularizers.relu_balance


def test_mnist_is_evaluated_at_four_radii():
    assert load_config("mnist").test_radii == (0.1, 0.2, 0.3, 0.4)


def test_cifar10_at_2_255_differs_from_8_255_in_the_radius_alone():
    ours, other = load_config("cifar10_2_255"), load_config("cifar10_8_255")
    assert ours.epsilon.max == pytest.approx(2 / 255, rel=1e-12)
    assert ours == other.model_copy(update={"epsilon": ours.epsilon})


@pytest.mark.parametrize("name", [*PUBLISHED, "cifar10_2_255", "digits"])
def test_a_resolved_config_is_complete_and_reads_back_as_itself(tmp_path, name):
    config = load_config(name)
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    assert load_config(file) == config
    assert load_config(config) == config
    written = yaml.safe_load(file.read_text())
    assert written.keys() == Config.model_fields.keys()
    for section, field in Config.model_fields.items():
        if hasattr(field.annotation, "model_fields"):
            assert written[section].keys() == field.annotation.model_fields.keys()


@pytest.mark.parametrize("name", ["digits", "digits.yaml", "configs/digits.yaml"])
def test_shipped_configs_are_found_from_any_folder(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert load_config(name).data.name == "digits"


def test_a_file_of_the_users_comes_before_a_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits.yaml").write_text(yaml.safe_dump(SMALLEST))
    assert load_config("digits.yaml").model.name == "mlp"


def test_overrides_are_yaml_values_and_leave_the_source_alone():
    config = changed(
        seed=3, optimizer__milestones="[4, 6]", model__options__widths="[8]", data__flip="true", optimizer__clip="null"
    )
    assert config.seed == 3
    assert config.optimizer.milestones == (4, 6)
    assert config.model.options == {"widths": [8]}
    assert config.data.flip
    assert config.optimizer.clip is None
    assert "seed" not in SMALLEST
    assert "options" not in SMALLEST["model"]


@pytest.mark.parametrize(
    ("text", "radii"),
    [
        ("2/255,8/255", [Fraction(2, 255), Fraction(8, 255)]),
        ("'2/255, 8/255'", [Fraction(2, 255), Fraction(8, 255)]),
        ("[2/255, 0.5]", [Fraction(2, 255), 0.5]),
        ("8/255", [Fraction(8, 255)]),
        ("1", [1]),
        ("null", [0.1]),
    ],
)
def test_radii_are_numbers_or_fractions_one_or_several(text, radii):
    assert changed(verification__eps=text).test_radii == tuple(map(float, radii))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("trainng", "{}", "unknown key trainng: did you mean training\\?"),
        ("training.epoch", "3", "unknown key training.epoch: did you mean epochs\\?"),
        ("model.colour", "red", "unknown key model.colour: model has name, options"),
        ("colour", "red", "unknown key colour: a config has seed, data, model"),
        ("training.epochs", "many", "training.epochs: .*integer.*'many'"),
        ("training.epochs", "0", "training.epochs: .*greater than or equal to 1"),
        ("training.epochs", "2.5", "training.epochs: .*integer.*2.5"),
        ("data", "digits", "data: .*'digits'"),
        ("data.flip", "maybe", "data.flip: .*boolean.*'maybe'"),
        ("optimizer.lr", "fast", "optimizer.lr: .*number.*'fast'"),
        ("optimizer.lr", "-1", "optimizer.lr: .*greater than 0"),
        ("optimizer.lr", ".nan", "optimizer.lr: .*finite"),
        ("optimizer.milestones", "5", "optimizer.milestones: .*tuple"),
        ("epsilon.max", "1.5", "epsilon.max: a radius lies between 0 and 1 .*1.5"),
        ("epsilon.max", "256/255", "epsilon.max: a radius lies between 0 and 1 .*256/255"),
        ("epsilon.max", "-0.1", "epsilon.max: a radius lies between 0 and 1 .*-0.1"),
        ("epsilon.max", "8/0", "epsilon.max: '8/0' is not a radius: .*such as 8/255"),
        ("epsilon.max", "small", "epsilon.max: 'small' is not a radius"),
        ("epsilon.max", "true", "epsilon.max: True is not a radius"),
        ("epsilon.max", ".nan", "epsilon.max: a radius"),
        ("epsilon.max", "null", "epsilon.max: None is not a radius"),
        ("verification.eps", "2/255,9", "verification.eps.1: a radius lies between 0 and 1 .*9"),
        ("optimizer.milestones", "[5, 10]", "optimizer.milestones: 10 is not before the end of the run, 10 epochs"),
        ("epsilon.warmup_epochs", "11", "epsilon: warmup would end after 11 epochs .*the run has 10"),
        ("epsilon", "{max: 0.1, start_epoch: 4, warmup_epochs: 8}", "epsilon: warmup would end after 11 epochs"),
        ("model.name", "cnn8", "model.name: unknown model 'cnn8': did you mean cnn7"),
        (
            "model.name",
            "transformer",
            "model.name: unknown model 'transformer': choose from cnn-large, .*wide-resnet",
        ),
        ("data.name", "cifar", "data.name: unknown data set 'cifar': did you mean cifar10.*\\?"),
        ("optimizer.name", "adam", "optimizer.name: unknown optimizer 'adam': did you mean .*Adam.*\\?"),
        ("training.initialization", "kaming", "training.initialization: unknown initialization .*kaiming"),
        ("training.method", "ipb", "training.method: .*'ibp'.*'ipb'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_that_names_the_key(key, value, message):
    with pytest.raises(UsageError, match=f"^(?:{message})") as caught:
        load_config(SMALLEST, [f"{key}={value}"])
    assert "\n" not in str(caught.value)


def test_every_error_has_a_line():
    with pytest.raises(UsageError) as caught:
        load_config({"data": {"name": "digits"}, "model": {}, "epsilon": {"max": 2}, "colour": "red"})
    lines = str(caught.value).splitlines()
    assert [line.split()[0].rstrip(":") for line in lines] == ["model.name", "epsilon.max", "training", "unknown"]


@pytest.mark.parametrize("override", ["training.epochs", "=3", "training.=3", ".epochs=3", "training.epochs=["])
def test_an_override_that_is_none_is_shown(override):
    with pytest.raises(UsageError) as caught:
        load_config(SMALLEST, [override])
    assert override in str(caught.value)


@pytest.mark.parametrize("content", [b"- a\n- b", b"data: [", b"", b"\xff\xfe\x00", b"just words"])
def test_a_file_that_holds_no_config_is_named(tmp_path, content):
    file = tmp_path / "mine.yaml"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=r"mine\.yaml") as caught:
        load_config(file)
    assert "\n" not in str(caught.value)


def test_an_unknown_config_file_comes_with_the_nearest_shipped_one():
    with pytest.raises(UsageError, match=r"unknown config file 'configs/cifar10\.yaml': did you mean .*cifar10_"):
        load_config("configs/cifar10.yaml")


def test_optimizers_that_cannot_train_a_network_by_steps_are_not_offered():
    assert {"Adam", "AdamW", "SGD", "RMSprop"} <= OPTIMIZERS.keys()
    assert not {"Optimizer", "LBFGS", "SparseAdam"} & OPTIMIZERS.keys()
