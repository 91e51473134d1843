"""What pydantic finds wrong, in the words of YAML: a line for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from certtrain.errors import shortened, shown

_MESSAGES = {  # where pydantic speaks of Python
    "model_type": "a section is expected, key: value",
    "model_attributes_type": "a name is expected, or a section, key: value",  # where the name says which section
    "dict_type": "a mapping is expected, key: value",
    "list_type": "a list is expected",
    "tuple_type": "a list is expected",
}


def describe(problem: Mapping[str, Any], keys: Sequence[str], instead: Callable[[], str]) -> str:
    """One line for one of pydantic's findings in a file that somebody wrote.

    Args:
        keys: those that lead to the place; pydantic's own location also has names of variants in it.
        instead: what to say of a key that is unknown: what could be meant.
    """
    where = shortened(".".join(map(shortened, keys)), 120)
    if problem["type"] == "extra_forbidden":
        return f"unknown key {where}: {instead()}"
    if problem["type"] == "union_tag_not_found":
        misspelt = get_close_matches("name", [str(key) for key in problem["input"]], n=1)
        return f"unknown key {where}.{misspelt[0]}: did you mean name?" if misspelt else f"{where}.name is missing"
    if problem["type"] == "missing":
        return f"{where} is missing"
    message = _MESSAGES.get(problem["type"]) or problem["msg"].removeprefix("Value error, ")
    got = "" if problem["type"] == "value_error" else f" (got {shown(problem['input'])})"
    return (f"{where}: " if where else "") + message + got
