"""Configurations that are refused."""

from __future__ import annotations

import pytest

from certtrain.config import load_config
from certtrain.errors import UsageError


def check_refused(overrides, message):
    """The digits' configuration with these is an error that says `message`, a regular expression."""
    with pytest.raises(UsageError, match=message):
        load_config("digits", overrides)
