from __future__ import annotations

import gzip
import itertools
import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from vnnlib.compat import read_vnnlib_simple

from certtrain.errors import DataError
from certtrain.export.vnnlib import vnnlib_property
from certtrain.importing.vnnlib import counterexample, parse_property, read_property

DECLARED = "".join(f"(declare-const {name} Real)\n" for name in ("X_0", "X_1", "Y_0", "Y_1", "Y_2"))
UNIT = "".join(f"(assert (>= X_{i} 0))\n(assert (<= X_{i} 1.0))\n" for i in range(2))


def holds(cases, x, y):
    """Whether an input and its outputs are a counterexample."""
    point, outputs = torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    return any(
        bool(((case.box.lower <= point) & (point <= case.box.upper)).all()) and case.holds(outputs) for case in cases
    )


def literal(term, x, y):
    """The value, or the truth, of a term that was built as nested tuples: the meaning that SMT-LIB gives it."""
    if isinstance(term, str):
        return Fraction(x[int(term[2:])]) if term[0] == "X" else Fraction(y[int(term[2:])])
    if isinstance(term, int | float):
        return Fraction(term)
    name, *parts = term
    values = [literal(part, x, y) for part in parts]
    match name:
        case "and":
            return all(values)
        case "or":
            return any(values)
        case "<=":
            return values[0] <= values[1]
        case ">=":
            return values[0] >= values[1]
        case "+":
            return sum(values)
        case "-":
            return -values[0] if len(values) == 1 else values[0] - sum(values[1:])
        case "*":
            return values[0] * values[1]


def written(term):
    if isinstance(term, tuple):
        return f"({' '.join(map(written, term))})"
    return f"{term}" if not isinstance(term, int | float) or term >= 0 else f"(- {-term})"


def random_term(chooser, depth):
    if depth and chooser.random() < 0.6:
        parts = [random_term(chooser, depth - 1) for _ in range(chooser.randint(1, 3))]
        return (chooser.choice(["and", "or"]), *parts)
    relation = chooser.choice(["<=", ">="])
    if chooser.random() < 0.3:
        sides = [f"X_{chooser.randint(0, 1)}", chooser.choice([0.25, 0.5, 0.75])]
        chooser.shuffle(sides)
        return (relation, *sides)
    first = ("*", chooser.choice([-2, 3, 0.5]), f"Y_{chooser.randint(0, 2)}")
    second = ("-", chooser.choice([-1, 0, 0.25]), ("+", f"Y_{chooser.randint(0, 2)}", 0.125))
    return (relation, first, second) if "Y_" in str(second) and first[2] != second[2][1] else (relation, first, 0.5)


@pytest.mark.parametrize("seed", range(12))
def test_the_cases_mean_what_the_text_says(seed):
    """Against the meaning of the terms, in exact numbers, on a grid that has all the thresholds in it."""
    chooser = random.Random(seed)
    terms = [random_term(chooser, 3) for _ in range(2)] + [("or", (">=", "Y_0", "Y_1"), ("<=", "Y_2", -0.25))]
    text = DECLARED + UNIT + "".join(f"; a comment (\n(assert {written(term)})\n" for term in terms)
    cases = parse_property(text)
    outcomes = set()
    for x in itertools.product([-0.25, 0.0, 0.25, 0.5, 0.625, 1.0, 1.25], repeat=2):
        for _ in range(20):
            y = [chooser.choice([-1, -0.5, -0.25, 0.125, 0.25, 0.5, 1]) for _ in range(3)]
            expected = all(0 <= value <= 1 for value in x) and all(literal(term, x, y) for term in terms)
            assert holds(cases, x, y) == expected
            outcomes.add(expected)
    assert seed > 0 or outcomes == {True, False}


def test_what_certtrain_writes_reads_the_same_as_by_another_library(tmp_path):
    generator = torch.Generator().manual_seed(0)
    image, file = torch.rand(3, 4, 4, generator=generator), tmp_path / "image.vnnlib"
    lower, upper = (image - 0.01).clamp(min=0), (image + 0.01).clamp(max=1)
    file.write_text(vnnlib_property(lower, upper, label=2, classes=5))
    cases = read_property(file)
    ((box, disjuncts),) = read_vnnlib_simple(str(file), 48, 5)
    assert len(cases) == len(disjuncts) == 4
    for case, (rows, limits) in zip(cases, disjuncts, strict=True):
        assert torch.equal(case.box.lower, lower.flatten().double())
        assert torch.equal(case.box.upper, upper.flatten().double())
        np.testing.assert_array_equal(np.array(box), torch.stack([case.box.lower, case.box.upper], 1).numpy())
        np.testing.assert_array_equal(case.rows.numpy(), rows)
        np.testing.assert_array_equal(case.limits.numpy(), np.ravel(limits))
    zipped = tmp_path / "image.vnnlib.gz"
    zipped.write_bytes(gzip.compress(file.read_bytes()))
    assert torch.equal(read_property(zipped)[3].rows, cases[3].rows)


@pytest.mark.parametrize("text", ["0.1", "-0.3", "1e-7", "+.7", "123456789.123456789", "3."])
def test_ends_and_limits_are_rounded_outward(text):
    exact = Fraction(text.rstrip(".").replace("+.", "+0."))
    constraints = f"(assert (>= X_0 {text}))\n(assert (<= X_0 {text}))\n(assert (<= Y_0 {text}))\n"
    (case,) = parse_property("(declare-const X_0 Real)\n(declare-fun Y_0 () Real)\n" + constraints)
    lower, upper, limit = (Fraction(end.item()) for end in (case.box.lower, case.box.upper, case.limits))
    assert lower <= exact <= upper
    assert limit >= exact
    assert upper - lower <= abs(exact) * Fraction(2) ** -51


@pytest.mark.parametrize("size", ["1e38", "1e-37", "-1e38"])
def test_coefficients_as_large_and_small_as_float32_are_read(size):
    """Also where they come of others that are not."""
    for text in (size, f"(* 1e200 {size} 1e-200)"):
        (case,) = parse_property(f"{DECLARED}{UNIT}(assert (<= (* {text} Y_0) (+ Y_1 (- Y_1 (* 1e400 (- Y_2 Y_2))))))")
        assert case.rows[0].tolist() == [float(size), -2, 0]
        assert case.rows.float()[0, 0].abs() > 0


def test_a_box_that_is_empty_has_no_counterexample():
    assert parse_property(DECLARED + UNIT + "(assert (>= X_0 2))\n(assert (<= Y_0 0))\n") == []


WRONG = {
    "(assert (<= (* X_0 X_1) 1))": "not linear",
    "(assert (<= X_0 X_1))": "the inputs are no box",
    "(assert (<= X_0 Y_1))": "inputs and outputs",
    "(assert (<= Y_0 (* Y_1 Y_1)))": "not linear",
    "(assert (<= 1 2))": "neither inputs nor outputs",
    "(assert (< Y_0 Y_1))": "no constraint",
    "(assert (not (<= Y_0 Y_1)))": "no constraint",
    "(assert (=> (<= Y_0 1) (<= Y_1 1)))": "no constraint",
    "(assert (<= Y_0 (/ Y_1 2)))": "no linear term",
    "(assert (<= Y_0 0x10))": "no linear term",
    "(assert (<= Y_0 1e9999))": "no linear term",
    "(assert (<= Y_0 1e999))": "beyond the range of float32",
    **{
        f"(assert {term})": "has a coefficient that is beyond the range of float32"
        for term in (
            "(<= (* 1e400 Y_0) 1)",
            "(<= (* 1e-400 Y_0) 1)",
            "(>= (* -1e39 Y_0) Y_1)",
            "(<= (* 1e-39 Y_0) 0)",
            "(or (<= Y_0 1) (<= (+ Y_1 (* 1e200 1e200 Y_0)) 1))",
            "(<= Y_1 (* 1e-30 1e-30 Y_0))",
        )
    },
    "(assert (<= Y_0 nan))": "no linear term",
    "(assert (<= Y_0 inf))": "no linear term",
    "(assert (<= Y_7 0))": "Y_7 is not declared",
    "(assert (<= Y_0))": "no constraint",
    "(assert)": "no command",
    "(assert Y_0)": "no constraint",
    "(assert (or))": "no constraint",
    "(declare-const Z_0 Real)": "neither an input",
    "(declare-const X_0 Real)": "declared twice, first on line 1",
    "(declare-const Y_3 Int)": "no command",
    "(maximize Y_0)": "no command",
    "(assert (<= Y_0 1)))": "stands outside of brackets",
    "hello": "stands outside of brackets",
    "(assert (<= Y_0 1)": "never closed",
    "(" * 60: "nested more than",
    "(assert (or " + "(and (<= Y_0 1)) " * 101 + "))\n(assert (or " + "(<= Y_0 1) " * 101 + "))": "falls apart",
}


@pytest.mark.parametrize("line", WRONG)
def test_what_is_no_box_with_linear_output_constraints_is_refused_by_its_line(line):
    text = DECLARED + UNIT + "; what follows is wrong\n" + line + "\n"
    where = 1 + text[: text.index("; what")].count("\n") + 1 + line.count("\n")
    with pytest.raises(DataError, match=WRONG[line]) as caught:
        parse_property(text, "p.vnnlib")
    assert f"p.vnnlib, line {where}: " in str(caught.value)
    assert len(str(caught.value)) <= 300


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("(declare-const X_0 Real)\n(declare-const Y_0 Real)\n(assert (<= X_0 1))\n(assert (<= Y_0 1))\n",
         "line 1: X_0 has no lower bound"),
        ("(declare-const X_0 Real)\n(declare-const X_2 Real)\n(declare-const Y_0 Real)\n(assert (<= Y_0 1))\n",
         "X_1 is not declared, X_2 is"),
        ("(declare-const X_0 Real)\n(assert (<= X_0 1))\n(assert (>= X_0 0))\n", "no Y_0 is declared"),
        (DECLARED + UNIT, "nothing is asked about the outputs"),
        ("", "no X_0 is declared"),
    ],
)  # fmt: skip
def test_a_property_that_lacks_something_is_refused(text, message):
    with pytest.raises(DataError, match=message):
        parse_property(text)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"\x1f\x8b\x00", None])
def test_a_file_that_cannot_be_read_is_named(content, tmp_path):
    for name in ("p.vnnlib", "p.vnnlib.gz"):
        file = tmp_path / name
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(DataError, match=r"p\.vnnlib"):
            read_property(file)


def test_a_counterexample_is_written_as_in_vnn_comp():
    text = counterexample(torch.tensor([[0.1, -2.0]]), torch.tensor([1e-8]))
    assert text == "((X_0 0.10000000149011612)\n(X_1 -2.0)\n(Y_0 9.99999993922529e-09))"
    assert [np.float32(line.strip("()").split()[1]) for line in text.splitlines()] == [
        np.float32(0.1), np.float32(-2), np.float32(1e-8)
    ]  # fmt: skip
