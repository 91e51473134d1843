import os
import re
from fractions import Fraction

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from certtrain.config import Config, load_config
from certtrain.config.radius import format_radius, parse_radius
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
    assert (config.model.name, config.training.initialization, config.training.method.name) == ("cnn7", "ibp", "ibp")
    assert config.regularizers.weight == (0.2 if name.startswith("tiny") else 0.5)
    assert (config.regularizers.tolerance, config.regularizers.l1) == (0.5, 0)
    assert config.regularizers.tightness
    assert config.regularizers.relu_balance


def test_mnist_is_evaluated_at_four_radii():
    assert load_config("mnist").test_radii == (0.1, 0.2, 0.3, 0.4)


def test_cifar10_at_2_255_differs_from_8_255_in_the_radius_alone():
    smaller, larger = load_config("cifar10_2_255"), load_config("cifar10_8_255")
    assert smaller.epsilon.max == pytest.approx(2 / 255, rel=1e-12)
    assert smaller == larger.model_copy(update={"epsilon": smaller.epsilon})


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
        ("model.colour", "red", "unknown key model.colour: model has name, path, options"),
        ("colour", "red", "unknown key colour: a config has seed, data, model"),
        ("epochs", "5", "unknown key epochs: did you mean training.epochs\\?"),
        ("lr", "5", "unknown key lr: did you mean optimizer.lr\\?"),
        ("data.batch_size", "5", "unknown key data.batch_size: did you mean training.batch_size or verification.batch"),
        ("training.epochs", "many", "training.epochs: .*integer.*'many'"),
        ("training.epochs", "0", "training.epochs: .*greater than or equal to 1"),
        ("training.epochs", "2.5", "training.epochs: .*integer.*2.5"),
        ("data", "digits", "data: .*'digits'"),
        ("data.flip", "maybe", "data.flip: .*boolean.*'maybe'"),
        ("optimizer.lr", "fast", "optimizer.lr: .*number.*'fast'"),
        ("optimizer.lr", "-1", "optimizer.lr: .*greater than 0"),
        ("optimizer.lr", ".nan", "optimizer.lr: .*finite"),
        ("optimizer.milestones", "5", "optimizer.milestones: a list is expected .got 5"),
        ("epsilon.max", "1.5", "epsilon.max: a radius lies between 0 and 1 .*1.5"),
        ("epsilon.max", "256/255", "epsilon.max: a radius lies between 0 and 1 .*256/255"),
        ("epsilon.max", "-0.1", "epsilon.max: a radius lies between 0 and 1 .*-0.1"),
        ("epsilon.max", "8/0", "epsilon.max: '8/0' is not a radius: .*such as 8/255"),
        ("epsilon.max", "small", "epsilon.max: 'small' is not a radius"),
        ("epsilon.max", "true", "epsilon.max: True is not a radius"),
        ("epsilon.max", ".nan", "epsilon.max: a radius"),
        ("epsilon.max", "null", "epsilon.max: None is not a radius"),
        ("epsilon.max", "1 2/255", "epsilon.max: '1 2/255' is not a radius"),
        ("epsilon.max", "8/2 55", "epsilon.max: '8/2 55' is not a radius"),
        ("epsilon.max", "0. 1", "epsilon.max: '0. 1' is not a radius"),
        ("verification.eps", "2/255 8/255", "verification.eps.0: '2/255 8/255' is not a radius"),
        ("data.mean", "[125.3]", "data.mean.0: .*less than or equal to 1"),
        ("data.mean", "[-0.1]", "data.mean.0: .*greater than or equal to 0"),
        ("verification.eps", "2/255,9", "verification.eps.1: a radius lies between 0 and 1 .*9"),
        ("optimizer.milestones", "[5, 10]", "optimizer.milestones: 10 is not before the end of the run, 10 epochs"),
        ("epsilon.warmup_epochs", "11", "epsilon: warmup would end after 11 epochs .*the run has 10"),
        ("epsilon", "{max: 0.1, start_epoch: 4, warmup_epochs: 8}", "epsilon: warmup would end after 11 epochs"),
        ("model.name", "cnn8", "model.name: unknown model 'cnn8': did you mean cnn7"),
        (
            "model.name",
            "transformer",
            "model.name: unknown model 'transformer': choose from cnn-2layer, .*wide-resnet",
        ),
        ("data.name", "cifar", "data.name: unknown data set 'cifar': did you mean cifar10.*\\?"),
        ("data.classes", "[0, 3, 0]", "data.classes: .*a class is named twice"),
        ("optimizer.name", "adam", "optimizer.name: unknown optimizer 'adam': did you mean .*Adam.*\\?"),
        ("training.initialization", "kaming", "training.initialization: unknown initialization .*kaiming"),
        ("training.method", "ipb", "training.method: unknown training method 'ipb': did you mean ibp\\?"),
        ("training.loss_fusion", "true", "unknown key training.loss_fusion: it belongs to training.method crown-ibp"),
        (
            "training.method",
            "{name: ibp, loss_fusion: true}",
            "unknown key .*: it belongs to training.method crown-ibp",
        ),
        ("training.method", "{name: crown-ibp, loss_fuson: true}", "unknown key .*: did you mean loss_fusion\\?"),
        ("training.method", "{name: ibp, colour: red}", "unknown key .*: training.method ibp has name"),
        ("training.method", "{loss_fusion: true}", "training.method.name is missing"),
        ("training.method", "{name: crown-ibp, beta: [1, 2]}", "training.method.beta.1: .* less than or equal to 1"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_that_names_the_key(key, value, message):
    with pytest.raises(UsageError, match=f"^(?:{message})") as caught:
        load_config(SMALLEST, [f"{key}={value}"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["nam", "nme", "Name", "names", "nmae"])
@pytest.mark.parametrize(
    "section", ["training.method", "training.averaging", "training.smoothing", "optimizer.schedule"]
)
def test_a_misspelt_name_of_a_section_is_called_so(section, key):
    """Not missing: the mapping has no name, and hardly anything else that it could mean."""
    with pytest.raises(UsageError, match=f"^unknown key {section}.{key}: did you mean name\\?$"):
        load_config(SMALLEST, [f"{section}={{{key}: anything}}"])


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
    file = tmp_path / "own.yaml"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=r"own\.yaml") as caught:
        load_config(file)
    assert "\n" not in str(caught.value)


def test_an_unknown_config_file_comes_with_the_nearest_shipped_one():
    with pytest.raises(UsageError, match=r"unknown config file 'configs/cifar10\.yaml': did you mean .*cifar10_"):
        load_config("configs/cifar10.yaml")


# --- configs that are based on others --------------------------------------------------------------------------------


@pytest.fixture
def write(tmp_path):
    """Write files of YAML below a folder; returns the last one's path."""

    def write(**texts):
        for name, text in texts.items():
            file = tmp_path / f"{name}.yaml"
            file.write_text(text)
        return file

    return write


def test_a_base_is_overruled_section_by_section(write):
    file = write(
        first=yaml.safe_dump(SMALLEST | {"optimizer": {"lr": 0.1, "milestones": [3]}}),
        second="base: first.yaml\ntraining: {epochs: 5}\noptimizer: {milestones: [4]}\n",
        own="base: [second.yaml]\nseed: 3\ntraining: {batch_size: 7}\n",
    )
    config = load_config(file, ["optimizer.factor=0.5"])
    assert (config.seed, config.training.epochs, config.training.batch_size) == (3, 5, 7)
    assert (config.optimizer.lr, config.optimizer.milestones, config.optimizer.factor) == (0.1, (4,), 0.5)
    assert config.data.name == "digits"


def test_of_several_bases_the_last_wins_and_the_file_itself_over_all(write):
    file = write(
        one="training: {batch_size: 1, epochs: 1}\nseed: 1\n",
        two="training: {batch_size: 2}\nseed: 2\n",
        own="base: [digits, one.yaml, two.yaml]\nseed: 3\noptimizer: {milestones: []}\nepsilon: {warmup_epochs: 0}\n",
    )
    config = load_config(file, ["epsilon.start_epoch=1"])
    assert (config.training.batch_size, config.training.epochs, config.seed) == (2, 1, 3)
    assert config.model.name == "cnn-small"


def test_options_of_a_model_are_merged_and_a_null_overrules(write):
    file = write(
        first="base: digits\nmodel: {options: {width: 3}}\n",
        own="base: first.yaml\nmodel: {options: {batch_norm: false}}\noptimizer: {clip: null}\n",
    )
    config = load_config(file)
    assert config.model.options == {"width": 3, "batch_norm": False}
    assert config.optimizer.clip is None


@pytest.mark.parametrize("section", ["model.options", "optimizer.arguments"])
@pytest.mark.parametrize("key", ["method", "schedule", "averaging", "smoothing", "start_from"])
def test_ones_own_values_may_be_called_as_sections_that_have_a_name(section, key):
    def merged(*overrides):
        outer, inner = section.split(".")
        return load_config(SMALLEST, overrides).model_dump()[outer][inner][key]

    one, other = ({f"{section}.{key}": {"name": name, name: 1}} for name in ("one", "other"))
    assert merged(one, other) == {"name": "other", "one": 1, "other": 1}
    assert merged(f"{section}.{key}=text", f"{section}.{key}.inner=1") == {"inner": 1}


@pytest.mark.parametrize(
    ("section", "one", "other", "only"),
    [
        ("training.method", "sabr", "cc-ibp", {"lambda": 0.5}),
        ("training.smoothing", "rgs", "pgpe", {"samples": 3}),
        ("training.averaging", "ema", "none", {"decay": 0.5}),
        ("optimizer.schedule", "cosine", "constant", {"final": 0.1}),
    ],
)
def test_a_section_of_another_name_replaces_all_of_it(section, one, other, only):
    """Whichever way the name is written, and what only the first of them has is not kept."""
    values = {section: {"name": one, **only}}
    for name in (other, {"name": other}):
        assert load_config(SMALLEST, [values, {section: name}]) == load_config(SMALLEST, [f"{section}={other}"])


def test_a_base_is_looked_for_beside_the_file_then_among_the_shipped(write, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "cifar10_8_255").write_text("seed: 9")  # of the folder one happens to be in: not meant
    own = write(mnist="base: digits\nseed: 5\n", own="base: mnist.yaml\n")
    assert load_config(own).seed == 5
    assert load_config(write(own="base: mnist\n")).data.name == "mnist"
    assert load_config(write(own="base: cifar10_8_255\n")).seed == 0


def test_a_mapping_has_bases_too():
    assert load_config({"base": "digits", "seed": 4}) == load_config("digits", ["seed=4"])


def test_a_circle_of_bases_is_shown(write):
    file = write(one="base: two.yaml", two="base: [digits, three.yaml]", three="base: one.yaml")
    chain = " → ".join(str(file.with_name(f"{name}.yaml")) for name in ("one", "two", "three", "one"))
    with pytest.raises(UsageError, match=f"^configs are based on each other: {chain}$"):
        load_config(file.with_name("one.yaml"))
    with pytest.raises(UsageError, match=r"one\.yaml → .*one\.yaml$"):
        load_config(write(one="base: one.yaml"))


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("digts", "base: unknown config file 'digts': did you mean digits"),
        ("parts/none_of_these.yaml", "base: unknown config file 'parts/none_of_these.yaml'"),
        ("[digits, 3]", "base is the name of a config file, or a list of names, not \\['digits', 3\\]"),
        ("{a: b}", "base is the name of a config file"),
        ("null", "base is the name of a config file"),
    ],
)
def test_a_wrong_base_is_reported_with_the_file_that_asks_for_it(write, base, message):
    file = write(middle=f"base: {base}", own="base: middle.yaml")
    with pytest.raises(UsageError, match=f"^{file.with_name('middle.yaml')}: {message}") as caught:
        load_config(file)
    assert "\n" not in str(caught.value)


def test_a_base_that_is_no_config_is_named(write):
    with pytest.raises(UsageError, match=r"first\.yaml is not valid YAML"):
        load_config(write(first="data: [", own="base: first.yaml"))


def test_what_is_wrong_in_a_base_is_reported_with_that_file(write):
    file = write(
        first="base: digits\ntraining: {epocs: 3}\noptimizer: {lr: fast}\n",
        second="base: first.yaml\nseed: -1\n",
        own="base: second.yaml\nmodel: {nam: mlp}\n",
    )
    with pytest.raises(UsageError) as caught:
        load_config(file, ["data.limit=1"])
    first, second = file.with_name("first.yaml"), file.with_name("second.yaml")
    assert set(str(caught.value).splitlines()) == {
        f"{first}: unknown key training.epocs: did you mean epochs?",
        f"{first}: optimizer.lr: Input should be a valid number (got 'fast')",
        f"{second}: seed: Input should be greater than or equal to 0 (got -1)",
        "unknown key model.nam: did you mean name?",
        "data.limit: Input should be greater than or equal to 2 (got 1)",
    }


def test_a_base_is_not_blamed_for_what_overrules_it(write):
    file = write(first="base: digits\nseed: 1\n", own="base: first.yaml\n")
    with pytest.raises(UsageError, match=r"^seed: "):
        load_config(file, ["seed=-2"])


# --- whoever wrote it: one short line for each thing that is wrong ----------------------------------------------------


def lines_of_error(source, overrides=()):
    with pytest.raises(UsageError) as caught:
        load_config(source, overrides)
    lines = str(caught.value).split("\n")
    assert 0 < max(map(len, lines)) <= 300
    assert all(line.isprintable() for line in lines)
    return lines


WHOLE = ["seed", "data.limit", "data.crop", "epsilon.start_epoch", "epsilon.warmup_epochs", "training.epochs",
         "training.batch_size", "training.accumulation", "verification.limit", "verification.batch_size",
         "verification.pgd_steps", "verification.pgd_restarts", "verification.apgd_steps",
         "verification.apgd_restarts", "verification.apgd_targets"]  # fmt: skip
NUMBERS = ["data.validation", "epsilon.max", "epsilon.mid", "epsilon.beta", "regularizers.weight", "regularizers.l1",
           "regularizers.tolerance", "optimizer.lr", "optimizer.factor", "optimizer.clip",
           "training.checkpoint_seconds", "verification.pgd_step_size", "verification.eps"]  # fmt: skip
LISTS = ["data.classes", "data.mean", "data.std", "verification.eps", "verification.method", "verification.attack"]


@pytest.mark.parametrize("key", WHOLE)
@pytest.mark.parametrize("value", ["true", "'3'", "3.5", "٣", "1e3", "18446744073709551616", "-1", "[3]", "{a: 3}"])
def test_only_a_whole_number_in_range_is_one(key, value):
    (line,) = lines_of_error(SMALLEST, [f"{key}={value}"])
    assert line.startswith(f"{key}: ")


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize("value", ["true", "٣", "1e400", ".inf", ".nan", "x", "{a: 3}", "1e99999999", "-1"])
def test_only_a_finite_number_is_one(key, value):
    (line,) = lines_of_error(SMALLEST, [f"{key}={value}"])
    assert key in line


@pytest.mark.parametrize("key", LISTS)
@pytest.mark.parametrize("value", ["[]", "''", "{}", "[[]]", "[true]", "[null]"])
def test_a_list_has_something_in_it(key, value):
    (line,) = lines_of_error(SMALLEST, [f"{key}={value}"])
    assert line.startswith(f"{key}")


@pytest.mark.parametrize("section", ["data", "model", "epsilon", "training", "optimizer", "verification"])
@pytest.mark.parametrize("value", ["3", "[1]", "text", "null"])
def test_a_section_is_a_mapping(section, value):
    assert lines_of_error(SMALLEST, [f"{section}={value}"])[0].startswith(f"{section}: a section is expected")


@given(st.text(st.characters(exclude_characters="."), min_size=1), st.sampled_from([1, 10**4]))
def test_whatever_a_key_or_a_value_is_the_line_stays_short(text, times):
    long = text * times
    lines_of_error({**SMALLEST, "x" + long: 1, "seed": long})
    lines_of_error({**SMALLEST, "data": {"name": long}, "epsilon": {"max": long}, "verification": {"method": long}})
    lines_of_error({**SMALLEST, "training": {"epochs": [long] * 1000, "x" + long: {}}})
    lines_of_error("x" + long.replace("\0", ""))


SECTIONS = {name: getattr(field.annotation, "model_fields", {}) for name, field in Config.model_fields.items()}
KEYS = [*(f"{name}.{key}" for name, keys in SECTIONS.items() for key in keys), *SECTIONS, "base", "data.x", "x"]
ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.complex_numbers(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.integers() | st.none(), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(st.sampled_from(KEYS), ANYTHING)
def test_whatever_stands_anywhere_is_a_config_or_one_short_line_for_each_mistake(key, value):
    section, _, name = key.rpartition(".")
    changed = {section: {**SMALLEST.get(section, {}), name: value}} if section else {name: value}
    try:
        config = load_config({**SMALLEST, **changed})
    except UsageError as error:
        lines = str(error).split("\n")
    else:
        lines = [""]
        assert load_config(yaml.safe_load(config.to_yaml())) == config
    assert max(map(len, lines)) <= 300


def test_a_thousand_mistakes_are_not_a_thousand_lines():
    lines = lines_of_error({**SMALLEST, "verification": {"eps": ["x"] * 1000}})
    assert lines[-1] == "and 980 more"
    assert len(lines) == 21


@pytest.mark.parametrize(
    "content", ["{", "- a: [\n", "secret: hunter2\n  more: x", "hunter2", "a: *hunter2x\n", "&a [*a]"]
)
def test_a_file_that_is_no_config_is_not_shown(write, content):
    (line,) = lines_of_error(write(other=content, own="base: other.yaml"))
    assert "other.yaml" in line
    assert "hunter2\n" not in line
    assert "secret" not in line


def test_a_base_is_a_yaml_file_in_the_folder_of_what_is_based_on_it_or_shipped(write, tmp_path):
    folder = tmp_path / "configs"
    (folder / "parts").mkdir(parents=True)
    (tmp_path / "secret.yaml").write_text("password: hunter2")
    (folder / "link.yaml").symlink_to(tmp_path / "secret.yaml")
    (folder / "notes.txt").write_text("password: hunter2")
    (folder / "parts" / "part.yaml").write_text("seed: 7")
    own = folder / "own.yaml"
    for base in [tmp_path / "secret.yaml", "../secret.yaml", "parts/../../secret.yaml", "link.yaml", "notes.txt",
                 "/etc/passwd", "/dev/stdin", "/proc/self/environ", folder, "parts", ".", "~/x.yaml"]:  # fmt: skip
        own.write_text(yaml.safe_dump({"base": str(base)}))
        (line,) = lines_of_error(own)
        assert "password" not in line
        assert "base: " in line
    own.write_text("base: [digits, parts/part.yaml]")
    assert load_config(own).seed == 7


@pytest.mark.parametrize("kind", ["chain", "fan"])
def test_bases_are_counted(write, kind):
    """A chain of 1,000 files; and 8 files each based eight times on the one before it, 16 million to read."""
    write(f0="seed: 1\n")
    count, width = (1000, 1) if kind == "chain" else (8, 8)
    for number in range(1, count):
        file = write(**{f"f{number}": f"base: [{', '.join([f'f{number - 1}.yaml'] * width)}]"})
    (line,) = lines_of_error(file)
    assert "at most 32 files" in line


def test_what_is_no_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    (tmp_path / "device.yaml").symlink_to("/dev/zero")
    for name in ("pipe", "loop", "device"):
        lines_of_error(tmp_path / f"{name}.yaml")
        (tmp_path / "own.yaml").write_text(f"base: {name}.yaml")
        lines_of_error(tmp_path / "own.yaml")
    (tmp_path / "large.yaml").write_bytes(b"a: [" + b"1, " * 10**6 + b"]")
    assert "more than" in lines_of_error(tmp_path / "large.yaml")[0]


# --- overrides as values ----------------------------------------------------------------------------------------------


def test_a_mapping_of_overrides_is_merged_by_section_or_by_dotted_key():
    base = {**SMALLEST, "model": {"name": "mlp", "options": {"widths": [4]}}}
    nested = load_config(base, {"model": {"options": {"batch_norm": False}}, "optimizer": {"lr": 0.5}})
    dotted = load_config(base, {"model.options.batch_norm": False, "optimizer.lr": 0.5})
    assert nested == dotted
    assert nested.model.options == {"widths": [4], "batch_norm": False}
    assert load_config(base, ["seed=1", {"seed": 2}, "optimizer.lr=0.5"]).seed == 2
    assert base["model"]["options"] == {"widths": [4]}


@given(st.text(max_size=30))
def test_a_text_in_a_mapping_stays_that_text(text):
    """Quotes, braces, what looks like a number: no value is read as YAML on its way."""
    assert load_config(SMALLEST, {"data.root": text}).data.root == text
    assert load_config(SMALLEST, {"model": {"options": {"x": text}}}).model.options == {"x": text}


@pytest.mark.parametrize("key", ["training.method", "training.averaging", "training.smoothing", "optimizer.schedule"])
@pytest.mark.parametrize("value", ["3", "[1]", "null", "{name: 3}", "{name: null}", "{name: [a]}"])
def test_a_section_told_by_its_name_is_a_name_or_a_mapping(key, value):
    (line,) = lines_of_error(SMALLEST, [f"{key}={value}"])
    assert re.match(f"{key}: (a name is expected, or a section|unknown .*: (choose from|did you mean) )", line)


@pytest.mark.parametrize("key", ["", ".", "a.", ".a", 3, None, "a" + ".a" * 100])
def test_a_key_of_an_override_names_a_place(key):
    assert "is not the key of an override" in lines_of_error(SMALLEST, {key: 1})[0]


@pytest.mark.parametrize("text", ["seed=", "seed= ", "verification.eps=", "seed" + ".a" * 100 + "=1", "x" * 10**5])
def test_an_override_without_a_key_or_a_value_is_one_line(text):
    assert len(lines_of_error(SMALLEST, [text])) == 1


@given(st.floats(0, 1))
def test_a_radius_is_read_as_the_number_that_is_written(radius):
    assert parse_radius(repr(radius)) == radius
    assert parse_radius(f" {radius:.17e} ") == radius


@given(st.integers(0, 10**18), st.integers(1, 10**18))
def test_a_fraction_is_rounded_once(numerator, denominator):
    numerator, denominator = sorted((numerator, denominator))
    assert parse_radius(f"{numerator} / {denominator}") == float(Fraction(numerator, denominator))


@given(st.one_of(st.floats(0, 1), st.integers(0, 255).map(lambda steps: steps / 255)))
def test_a_radius_that_is_written_is_read_as_the_same(radius):
    assert parse_radius(format_radius(radius)) == radius
    assert load_config(SMALLEST, [f"epsilon.max={format_radius(radius)}"]).epsilon.max == radius


@pytest.mark.parametrize("steps", range(1, 255))
def test_a_radius_is_written_in_steps_of_pixels_where_no_short_decimal_is_it(steps):
    tenths = Fraction(10 * steps, 255)  # 255 is 3 · 5 · 17: where more digits would do, there is no finite decimal
    text = f"0.{tenths}" if tenths.denominator == 1 else f"{steps}/255"
    assert format_radius(steps / 255) == text


@pytest.mark.parametrize(("radius", "text"), [(0.0, "0.0"), (0.1, "0.1"), (1.0, "1.0"), (1e-3, "0.001")])
def test_a_short_decimal_is_written_as_it_is(radius, text):
    assert format_radius(radius) == text


# --- a network of one's own -------------------------------------------------------------------------------------------


def test_the_folder_of_the_file_that_names_a_network_is_kept(write, tmp_path, monkeypatch):
    file = write(own="base: digits\nmodel: {name: 'net:plain'}\n", over="base: digits\n")
    assert load_config(file.with_name("own.yaml")).model.path == str(tmp_path)
    assert load_config(file, ["model.name=net:plain"]).model.path == str(tmp_path)
    assert load_config(file, ["model.name=net:plain", "model.path=elsewhere"]).model.path == "elsewhere"
    assert load_config(file).model.path is None
    monkeypatch.chdir(tmp_path)
    assert load_config("own.yaml").model.path == "."


@pytest.mark.parametrize("source", ["mapping", "mapping in a folder", "file", "file in a folder", "override", "Config"])
def test_a_configuration_is_the_same_when_a_run_has_stored_it(write, tmp_path, monkeypatch, source):
    """Wherever the run lies: a network of one's own is not looked for there."""
    monkeypatch.chdir(tmp_path)
    file = write(own="base: digits\nmodel: {name: 'net:plain'}\n")
    mapping = {"base": "digits", "model": {"name": "net:plain"}}
    config = {
        "mapping": lambda: load_config(mapping),
        "mapping in a folder": lambda: load_config(mapping, folder=tmp_path / "configs"),
        "file": lambda: load_config(file.name),
        "file in a folder": lambda: load_config(file),
        "override": lambda: load_config("digits", ["model={name: 'net:plain'}"]),
        "Config": lambda: load_config(load_config(mapping)),
    }[source]()
    stored = tmp_path / "runs" / "x" / "config.yaml"
    stored.parent.mkdir(parents=True)
    stored.write_text(config.to_yaml())
    assert load_config(stored) == config


@pytest.mark.parametrize("spelling", ["./images", "other/../images", "{here}/images"])
def test_one_folder_is_one_source_however_it_is_spelled(tmp_path, monkeypatch, spelling):
    monkeypatch.chdir(tmp_path)
    asked = [load_config(SMALLEST, {"data": {"name": "npz", "path": path.format(here=tmp_path)}}).data.source
             for path in ("images", spelling, "others")]  # fmt: skip
    assert asked[0] == asked[1] != asked[2]
