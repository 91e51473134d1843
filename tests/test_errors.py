"""What is said of a file that certtrain wrote, where pydantic refuses it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, ValidationError

from certtrain.errors import first_problem


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    number: int


class Outer(BaseModel):
    inner: list[Inner] = []


def problem_of(content):
    with pytest.raises(ValidationError) as error:
        Outer.model_validate(content)
    return first_problem(error.value)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (3, "Input should be "),  # no key leads to the whole file
        ({"inner": 3}, "inner: Input should be a valid list"),
        ({"inner": [{"number": 1}, {}]}, "inner.1.number: Field required"),
        ({"inner": [{"number": "1"}, {}]}, "inner.0.number: Input should be a valid integer"),
        ({"inner": [{"number": 1, "other": 2}]}, "inner.0.other: Extra inputs are not permitted"),
    ],
)
def test_the_first_problem_names_its_place(content, text):
    assert problem_of(content).startswith(text)


@given(st.text().filter(lambda key: key != "number"), st.sampled_from([1, 10**4]))
def test_whatever_a_key_is_the_problem_is_one_short_line(key, times):
    text = problem_of({"inner": [{"number": 1, key * times: 2}]})
    assert text.startswith("inner.0")
    assert len(text) <= 200
    assert text.isprintable()
