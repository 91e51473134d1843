"""A test draws the same random numbers alone, after others, and in any process."""

from __future__ import annotations

import ast
import random
from pathlib import Path

import numpy as np
import pytest
import torch

GENERATORS = {"manual_seed", "Generator", "default_rng", "RandomState", "Random"}


@pytest.mark.parametrize("_time", [1, 2])
def test_every_test_begins_with_the_same_random_numbers(_time):
    drawn = torch.rand(()), np.random.random(), random.random()
    first = torch.Generator().manual_seed(0), np.random.RandomState(0), random.Random(0)
    assert drawn == (torch.rand((), generator=first[0]), first[1].random(), first[2].random())


def test_no_module_keeps_a_generator_that_its_tests_use_up():
    for file in Path(__file__).parent.rglob("*.py"):
        for statement in ast.parse(file.read_text()).body:
            made = statement.value if isinstance(statement, ast.Assign | ast.AnnAssign) else None
            named = getattr(made.func, "attr", getattr(made.func, "id", None)) if isinstance(made, ast.Call) else None
            assert named not in GENERATORS, (
                f"{file}:{statement.lineno}: draw from torch's or NumPy's own, seeded per test"
            )
