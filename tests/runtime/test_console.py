"""What is told on a console."""

from __future__ import annotations

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from certtrain.runtime.console import clock


@given(st.floats(0, 86399))
def test_a_time_is_shown_as_python_shows_it(seconds):
    assert clock(seconds) == str(timedelta(seconds=round(seconds)))


@pytest.mark.parametrize(("hours", "text"), [(24, "24:00:00"), (100, "100:00:00")])
def test_a_time_has_no_days(hours, text):
    assert clock(3600 * hours) == text
