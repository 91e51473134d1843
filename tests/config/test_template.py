"""`certtrain init`: a file that says all there is to say, and reads back as what it was made from."""

from __future__ import annotations

import re

import pytest

from certtrain.config import load_config
from certtrain.config.keys import choices_of, dotted_fields, keys_of, sections_of
from certtrain.config.loading import runnable_configs
from certtrain.config.methods import METHOD_SECTIONS
from certtrain.config.reading import parse_yaml
from certtrain.config.schedules import SCHEDULES
from certtrain.config.template import commented_yaml
from certtrain.errors import UsageError

CHOSEN = {"training.method", "optimizer.schedule", "training.smoothing", "training.averaging"}
OPTIONAL = {"start_from", "replay"}  # sections that are null where they are not asked for
VARIANTS = ["training.smoothing=pgpe", "training.smoothing=rgs", "training.averaging=ema"]
VARIANTS += [f"training.method={name}" for name in METHOD_SECTIONS] + [
    f"optimizer.schedule={name}" for name in SCHEDULES
]


@pytest.mark.parametrize("changes", [[], *([change] for change in VARIANTS)], ids="".join)
def test_it_reads_back_as_the_same(changes):
    config = load_config("cifar10_8_255", [*changes, "data.root='# no comment: \\n'", "model.options={a: [1, {b: ö}]}"])
    assert load_config(parse_yaml(commented_yaml(config))) == config


@pytest.mark.slow
def test_so_does_every_shipped_config():
    for name in runnable_configs():
        config = load_config(name)
        assert load_config(parse_yaml(commented_yaml(config))) == config


def comments(text):
    """What is said of each key, by its dotted name."""
    found, path = {}, []
    for line in text.splitlines():
        key, comment = re.fullmatch(r"( *\w+:)?.*?(?: *# (.*))?", line).groups()
        if key:
            path = [*path[: key.count("  ")], key.strip(" :")]
        found[".".join(path)] = f"{found.get('.'.join(path), '')} {comment or ''}".strip()
    return found


@pytest.mark.parametrize("method", METHOD_SECTIONS)
def test_every_key_is_there_with_what_it_means_and_what_it_can_say(method):
    config = load_config("digits", [f"training.method={method}"])
    said = comments(commented_yaml(config))
    keys = {
        key for key, _ in dotted_fields() if not key.startswith(tuple(f"{section}." for section in CHOSEN | OPTIONAL))
    }
    assert said.keys() >= keys | {f"training.method.{key}" for key in keys_of(METHOD_SECTIONS[method])}
    assert all(said.values()), [key for key, comment in said.items() if not comment]
    assert "Default: 128." in said["training.batch_size"]
    assert "Default" not in said["training.precision"]
    for name in METHOD_SECTIONS:
        assert name in said["training.method.name"]


def test_every_field_of_every_section_says_what_it_means():
    silent = [key for key, field in dotted_fields() if not field.description]
    assert silent == []


def refusal(override):
    """What `load_config` says against it; nothing where it is taken."""
    try:
        load_config("digits", [override])
    except UsageError as error:
        return str(error)
    return ""


def test_choices_are_what_the_schema_takes():
    """A choice is taken, or refused for what another key says; anything else is refused for itself."""
    fields = {key: field for key, field in dotted_fields() if choices_of(field) and "training.method." not in key}
    assert fields.keys() >= {"training.method", "verification.arithmetic", "data.name", "training.compile"}
    for key, field in fields.items():
        for value in choices_of(field):
            assert not re.search("unknown|expected|Input should", refusal(f"{key}={value}")), (key, value)
        assert re.search("unknown|expected|Input should", refusal(f"{key}=none_of_these")), key


def test_what_is_chosen_by_name():
    assert {
        key for key, field in dotted_fields() if len(sections_of(field)) > 1 and not key.endswith(".name")
    } == CHOSEN
