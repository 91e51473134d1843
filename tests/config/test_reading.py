"""YAML by whoever: plain data comes out as PyYAML has it, everything else is one line in bounded work."""

import sys
import unicodedata

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from certtrain.config.reading import (
    MOST_CHARACTERS,
    MOST_DEPTH,
    MOST_NODES,
    NotPlainYaml,
    parse_yaml,
    write_value,
    write_yaml,
)

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False)
    | st.text()
    | st.sampled_from(
        ["5e-4", "1:30", "010", "2024-01-01", "1_000", "0o7", "0b1", "on", "~", "<<", "=", ".5", "1.", ""]
    )
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=12
)
OTHER_DIGITS = [c for c in map(chr, range(128, sys.maxunicode)) if unicodedata.category(c) == "Nd"]


def refused(text):
    """The message for a text that is refused."""
    with pytest.raises(NotPlainYaml) as caught:
        parse_yaml(text)
    message = str(caught.value)
    assert "\n" not in message
    assert 0 < len(message) <= 200
    return message


def value_or_message(text):
    try:
        return parse_yaml(text), ""
    except NotPlainYaml as error:
        return None, str(error)


@given(VALUES)
def test_what_another_writer_writes_is_read_as_it_was(value):
    assert parse_yaml(yaml.safe_dump(value, default_style='"')) == value  # tagged where it is no text


@given(VALUES)
def test_a_value_behind_a_key_is_one_line(value):
    line = f"key: {write_value(value)}  # said of it"
    assert len(line.splitlines()) == 1
    assert parse_yaml(line) == {"key": value}


@given(VALUES)
def test_what_is_written_is_read_back_here_and_by_readers_of_yaml_1_1(value):
    text = write_yaml(value)
    assert parse_yaml(text) == value
    assert yaml.safe_load(text) == value


@given(
    st.from_regex(
        r"\A[-+]?(\d{1,5}\.\d{0,5}|\.\d{1,5}|\d{1,5})[eE][-+]?\d{1,2}\Z|\A[-+]?\d{0,5}\.\d{1,5}\Z",
        alphabet=st.characters(codec="ascii"),
    )
)
def test_decimals_are_read_as_python_reads_them(text):
    value = parse_yaml(text)
    assert isinstance(value, float)
    assert value == float(text)


@given(st.text(st.sampled_from(OTHER_DIGITS), min_size=1), st.sampled_from(["{}", "1{}", "{}.5", "{}e3", "-{}"]))
def test_digits_of_other_scripts_are_text(digits, spelling):
    text = spelling.format(digits)
    assert parse_yaml(text) == text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("0x1F", 31),
        ("-0b11", -3),
        ("1_000", 1000),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        (".inf", float("inf")),
        ("on", True),
        ("{on: 1, 2: 3, ~: 4}", {"on": 1, "2": 3, "~": 4}),
        ("{base: &b {x: 1, y: 2}, own: {<<: *b, y: 3}}", {"base": {"x": 1, "y": 2}, "own": {"x": 1, "y": 3}}),
        ("[&a [1], *a]", [[1], [1]]),
    ],
)
def test_spellings(text, value):
    assert parse_yaml(text) == value


def merged_as_yaml_says(spec):
    """Of (own entries, specs that << merges in): own keys win, and of those merged in the ones that stand first."""
    own, parts = spec
    result = {}
    for part in (own, *map(merged_as_yaml_says, parts)):
        result = part | result
    return result


def written(spec, as_list):
    own, parts = spec
    entries = [f"{key}: {value}" for key, value in own.items()]
    texts = [written(part, as_list) for part in parts]
    merge = [f"<<: [{', '.join(texts)}]"] if as_list or len(texts) > 1 else [f"<<: {text}" for text in texts]
    return "{" + ", ".join([*entries, *merge]) + "}"


ENTRIES = st.dictionaries(st.sampled_from(["a", "b", "lr", "epochs"]), st.integers(0, 99), max_size=3)
MERGES = st.recursive(
    st.tuples(ENTRIES, st.just([])), lambda inner: st.tuples(ENTRIES, st.lists(inner, max_size=3)), max_leaves=6
)


@given(MERGES, st.booleans())
def test_what_is_merged_in_comes_after_what_is_written_and_stands_first(spec, as_list):
    assert parse_yaml(written(spec, as_list)) == merged_as_yaml_says(spec)


@pytest.mark.parametrize("value", ["1", "[1]", "[[{a: 1}]]", "{[a]: 1}", "{a: 1, a: 2}", "[{a: 1}, {b: 1, b: 2}]"])
def test_what_cannot_be_merged_in_is_refused(value):
    assert ", line 1" in refused("{<<: " + value + "}")


TAGS = ["int", "float", "bool", "null", "timestamp", "binary", "set", "omap", "pairs", "python/object/apply:os.getcwd",
        "python/tuple", "seq", "map", "merge", "value", "yaml", "anything"]  # fmt: skip


@pytest.mark.parametrize("tag", [*(f"!!{tag}" for tag in TAGS), "!own", "!<tag:example.org,2000:x>"])
@pytest.mark.parametrize("place", ["{} x", "a: {} x", "- 1\n- {} x", "a: {{b: [{} x]}}", "{} x: 1"])
def test_a_value_that_is_not_what_its_tag_says_is_named_with_its_line(tag, place):
    value, message = value_or_message(place.format(tag))
    assert ", line " in message or value == {"x": 1}, "a key is text"


@given(st.sampled_from(["a", "'a'", '"a"', "!!str a", '"\\x61"']), st.sampled_from(["a", "'a'", '"\\u0061"', "a "]))
def test_a_key_that_occurs_twice_is_named_however_it_is_spelled(first, second):
    assert refused(f"x: 1\ny:\n  {first}: 1\n  b: 2\n  {second}: 3\n") == "duplicate key a, line 5"


@given(st.integers(2, 9), st.integers(2, 40), st.sampled_from(["[{}]", "{{{}}}"]))
def test_aliases_that_multiply_are_refused(width, levels, kind):
    """Each list, or mapping, repeats the one before: width ** levels values in a few lines."""
    lines = ["- &a0 x"]
    for level in range(1, levels):
        items = [f"*a{level - 1}" if kind == "[{}]" else f"k{i}: *a{level - 1}" for i in range(width)]
        lines.append(f"- &a{level} " + kind.format(", ".join(items)))
    text = "\n".join(lines)
    if width ** (levels - 1) > MOST_NODES:
        assert refused(text).startswith(f"more than {MOST_NODES} values, line ")
    elif levels * (2 * width + 2) ** (levels - 1) < MOST_NODES:
        assert parse_yaml(text) == yaml.safe_load(text)


@pytest.mark.parametrize("text", ["&a [*a]", "&a {b: *a}", "&a {<<: *a}", "&a {*a : 1}", "x: &a [1, {y: [*a]}]"])
def test_an_alias_of_what_it_stands_in_is_refused(text):
    assert "refers to itself" in refused(text)


@settings(max_examples=40)
@given(
    st.integers(MOST_DEPTH + 1, 1000), st.sampled_from(["[", "{a: ", "- ", "? ", "[[{x: ", "!!seq [", "!!map {a: ["])
)
def test_nesting_is_refused_where_it_gets_deep(depth, opening):
    assert "in each other" in refused(opening * depth)


def test_as_much_as_a_config_may_need_is_read():
    assert parse_yaml("[" * MOST_DEPTH + "]" * MOST_DEPTH) is not None
    assert len(parse_yaml("\n".join(f"- {i}" for i in range(MOST_NODES - 1)))) == MOST_NODES - 1
    assert "more than" in refused("\n".join(f"- {i}" for i in range(MOST_NODES)))
    assert "more than" in refused("#" * (MOST_CHARACTERS + 1))


@pytest.mark.parametrize("text", ["1e400", "-1e400", "1" * 5000, "0x" + "f" * 5000, "1" * 50 + ".5"])
def test_numbers_beyond_all_range_are_refused(text):
    assert "number" in refused(text)


ODD_TEXT = st.text(st.sampled_from("[]{}:,-?&*!|>'\"%@`#<~ \n\t\0\x1b\x85\u2028\ufeffaé0.e+"), max_size=60)


@given(ODD_TEXT | st.text(max_size=60) | st.text(st.sampled_from("&*a[]{}:,! \n<"), max_size=40))
def test_any_text_is_a_value_or_one_line(text):
    _, message = value_or_message(text)
    assert len(message) <= 200
    assert message == "" or message.isprintable()
