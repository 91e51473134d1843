"""VNN-LIB 1.0, as VNN-COMP uses it: a box of inputs, and linear constraints on outputs, with `and` and `or`.

A reader of its own: the library `vnnlib` does not keep the lines that errors are to name, and rounds numbers to the
nearest float64 where bounds must be rounded outward.
"""

from __future__ import annotations

import gzip
import itertools
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from certtrain.bounds import Box
from certtrain.errors import DataError, one_line, shown
from certtrain.verification.properties import Case

MOST_CASES = 10_000  # that a property may fall apart into
MOST_DEPTH = 50  # of brackets within brackets
MOST, LEAST = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny  # of a coefficient's size, and a number's
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")
VARIABLE = re.compile(r"([XY])_(0|[1-9][0-9]{0,8})")


class Line(list):
    """A bracketed expression, and the line of the file on which it begins."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class _Problem(Exception):
    """What is wrong with an expression."""


@dataclass
class Form:
    """constant + Σ coefficient · variable, exactly."""

    constant: Fraction = Fraction(0)
    coefficients: dict[str, Fraction] = field(default_factory=dict)

    def plus(self, other: Form, factor: Fraction = Fraction(1)) -> Form:
        sums = dict(self.coefficients)
        for name, value in other.coefficients.items():
            sums[name] = sums.get(name, Fraction(0)) + factor * value
        return Form(self.constant + factor * other.constant, {name: value for name, value in sums.items() if value})

    def times(self, factor: Fraction) -> Form:
        return Form().plus(self, factor)


Conjunction = tuple[Form, ...]  # of forms that must be at most 0


def read_property(file: Path) -> list[Case]:
    """The cases of a VNN-LIB file (.vnnlib, or .vnnlib.gz), of any of which an input may be a counterexample.

    Raises:
        DataError: it cannot be read, or is no such property; names the line.
    """
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        text = content.decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as VNN-LIB: {one_line(error)}") from error
    return parse_property(text, str(file))


def parse_property(text: str, source: str = "the property") -> list[Case]:
    """The cases of VNN-LIB text. See `read_property`."""
    declared: dict[str, int] = {}
    always: list[Form] = []
    choices: list[list[Conjunction]] = []
    number = 0
    try:
        for command in _expressions(text):
            number = command.number
            match command:
                case ["declare-const", str(name), "Real"] | ["declare-fun", str(name), [], "Real"]:
                    _declare(declared, name, number)
                case ["assert", term]:
                    alternatives = _alternatives(term, declared)
                    if len(alternatives) == 1:
                        always += alternatives[0]
                    else:
                        choices.append(alternatives)
                case ["check-sat"] | ["set-logic", _] | ["set-info", *_] | ["set-option", *_]:
                    pass
                case _:
                    raise _Problem(f"{_written(command)} is no command of VNN-LIB")
            if math.prod(map(len, choices)) > MOST_CASES:
                raise _Problem(f"the property falls apart into more than {MOST_CASES} cases")
        return _cases(declared, always, choices)
    except _Located as error:
        raise DataError(f"{source}, line {error.number}: {error}") from error
    except _Problem as error:
        raise DataError(f"{source}, line {number}: {error}") from error


class _Located(_Problem):
    """A problem on another line than that of the command."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


def _expressions(text: str) -> Iterator[Line]:
    """The bracketed expressions of a file, one after the other."""
    opened: list[Line] = []
    for number, line in enumerate(text.splitlines(), 1):
        for token in re.findall(r"[()]|[^\s()]+", line.partition(";")[0]):
            if token == "(":
                opened.append(Line(number))
                if len(opened) > MOST_DEPTH:
                    raise _Located(number, f"brackets are nested more than {MOST_DEPTH} deep")
            elif not opened:
                raise _Located(number, f"{shown(token)} stands outside of brackets")
            elif token != ")":
                opened[-1].append(token)
            elif len(opened) > 1:
                closed = opened.pop()
                opened[-1].append(closed)
            else:
                yield opened.pop()
    if opened:
        raise _Located(opened[0].number, "the bracket that is opened here is never closed")


def _declare(declared: dict[str, int], name: str, number: int) -> None:
    if not VARIABLE.fullmatch(name):
        raise _Problem(f"{shown(name)} is neither an input X_i nor an output Y_j")
    if name in declared:
        raise _Problem(f"{name} is declared twice, first on line {declared[name]}")
    declared[name] = number


def _alternatives(term: object, declared: dict[str, int]) -> list[Conjunction]:
    """A term as a disjunction of conjunctions."""
    match term:
        case ["or", *parts] if parts:
            return [conjunction for part in parts for conjunction in _alternatives(part, declared)]
        case ["and", *parts] if parts:
            each = [_alternatives(part, declared) for part in parts]
            if math.prod(map(len, each)) > MOST_CASES:
                raise _Problem(f"the property falls apart into more than {MOST_CASES} cases")
            return [sum(chosen, ()) for chosen in itertools.product(*each)]
        case ["<=", left, right]:
            return [(_constraint(_form(left, declared), _form(right, declared), term),)]
        case [">=", left, right]:
            return [(_constraint(_form(right, declared), _form(left, declared), term),)]
    problem = f"{_written(term)} is no constraint: expected <= or >= of two linear terms, or `and` and `or` of such"
    raise _Located(term.number, problem) if isinstance(term, Line) else _Problem(problem)


def _constraint(small: Form, large: Form, term: object) -> Form:
    form = small.plus(large, Fraction(-1))
    kinds = {name[0] for name in form.coefficients}
    number = term.number if isinstance(term, Line) else 0
    if len(kinds) != 1:
        both = "inputs and outputs" if kinds else "neither inputs nor outputs"
        raise _Located(number, f"{_written(term)} is about {both}: not a box with linear output constraints")
    if kinds == {"X"} and len(form.coefficients) > 1:
        raise _Located(number, f"{_written(term)} relates inputs to each other: the inputs are no box")
    if kinds == {"Y"} and not all(LEAST <= abs(value) <= MOST for value in form.coefficients.values()):
        raise _Located(number, f"{_written(term)} has a coefficient that is beyond the range of float32")
    return form


def _form(term: object, declared: dict[str, int]) -> Form:
    match term:
        case str(word) if VARIABLE.fullmatch(word):
            if word not in declared:
                raise _Problem(f"{word} is not declared")
            return Form(coefficients={word: Fraction(1)})
        case str(word) if NUMBER.fullmatch(word):
            return Form(Fraction(word))
        case ["+", *parts] if parts:
            return _total(_form(part, declared) for part in parts)
        case ["-", part]:
            return _form(part, declared).times(Fraction(-1))
        case ["-", first, *parts] if parts:
            return _form(first, declared).plus(_total(_form(part, declared) for part in parts), Fraction(-1))
        case ["*", *parts] if parts:
            product = Form(Fraction(1))
            for factor in (_form(part, declared) for part in parts):
                if factor.coefficients and product.coefficients:
                    raise _Problem(f"{_written(term)} is not linear")
                scaled, by = (product, factor) if product.coefficients else (factor, product)
                product = scaled.times(by.constant)
            return product
    raise _Problem(f"{_written(term)} is no linear term of X_i, Y_j and numbers")


def _total(forms: Iterable[Form]) -> Form:
    total = Form()
    for form in forms:
        total = total.plus(form)
    return total


def _written(term: object) -> str:
    """A term as it stands in the file, shortened."""

    def text(part: object) -> str:
        return f"({' '.join(map(text, part))})" if isinstance(part, list) else str(part)

    return shown(text(term), 80)


# --- from constraints to tensors --------------------------------------------------------------------------------------


def _cases(declared: dict[str, int], always: Sequence[Form], choices: Sequence[list[Conjunction]]) -> list[Case]:
    inputs, outputs = (_count(declared, letter) for letter in "XY")
    low, high = _narrowed({}, {}, always)
    common = [form for form in always if not _is_input(form)]
    shared = cache(partial(_box, low, high, inputs, declared))
    cases = []
    for chosen in itertools.product(*choices):
        forms = [form for conjunction in chosen for form in conjunction]
        narrowed = any(map(_is_input, forms))
        box = _box(*_narrowed(low, high, forms), inputs, declared) if narrowed else shared()
        if box is None:  # empty: there are no such inputs
            continue
        constraints = [*common, *(form for form in forms if not _is_input(form))]
        if not constraints:
            raise _Problem("nothing is asked about the outputs")
        cases.append(_case(box, constraints, outputs))
    return cases


def _count(declared: dict[str, int], letter: str) -> int:
    numbers = [int(name[2:]) for name in declared if name[0] == letter]
    count = max(numbers, default=-1) + 1
    if not numbers:
        raise _Problem(f"no {letter}_0 is declared")
    if len(numbers) < count:
        missing = next(i for i in range(count) if f"{letter}_{i}" not in declared)
        raise _Problem(f"{letter}_{missing} is not declared, {letter}_{count - 1} is")
    return count


def _is_input(form: Form) -> bool:
    return next(iter(form.coefficients)).startswith("X")


Ends = dict[str, Fraction]


def _narrowed(low: Ends, high: Ends, forms: Iterable[Form]) -> tuple[Ends, Ends]:
    """The ends of every input's interval, cut by constraints a·x + c ≤ 0."""
    low, high = dict(low), dict(high)
    for form in filter(_is_input, forms):
        ((name, coefficient),) = form.coefficients.items()
        end = -form.constant / coefficient
        if coefficient > 0:
            high[name] = min(end, high.get(name, end))
        else:
            low[name] = max(end, low.get(name, end))
    return low, high


def _box(low: Ends, high: Ends, inputs: int, declared: dict[str, int]) -> Box | None:
    """Rounded outward to float64; None where it is empty."""
    names = [f"X_{i}" for i in range(inputs)]
    for name in names:
        for ends, word in ((low, "lower"), (high, "upper")):
            if name not in ends:
                raise _Located(declared[name], f"{name} has no {word} bound: the inputs are no box")
    if any(low[name] > high[name] for name in names):
        return None
    lower = [_rounded(low[name], -math.inf) for name in names]
    upper = [_rounded(high[name], math.inf) for name in names]
    return Box(torch.tensor(lower, dtype=torch.float64), torch.tensor(upper, dtype=torch.float64))


def _rounded(exact: Fraction, towards: float) -> float:
    if abs(exact) > MOST:
        raise _Problem(f"{float(exact) if abs(exact) < 10**300 else 'a number'} is beyond the range of float32")
    nearest = float(exact)
    beyond = Fraction(nearest) < exact if towards > 0 else Fraction(nearest) > exact
    return math.nextafter(nearest, towards) if beyond else nearest


def _case(box: Box, constraints: Sequence[Form], outputs: int) -> Case:
    rows, limits = torch.zeros(len(constraints), outputs, dtype=torch.float64), []
    for i, form in enumerate(constraints):
        for name, coefficient in form.coefficients.items():
            rows[i, int(name[2:])] = float(coefficient)
        limits.append(_rounded(-form.constant, math.inf))
    return Case(box, rows, torch.tensor(limits, dtype=torch.float64))


def counterexample(point: Tensor, outputs: Tensor) -> str:
    """A point and its outputs as VNN-COMP's result files have them."""
    values = [(f"{letter}_{i}", value) for letter, part in (("X", point), ("Y", outputs))
              for i, value in enumerate(part.flatten().tolist())]  # fmt: skip
    lines = [f"({name} {value!r})" for name, value in values]
    return "(" + "\n".join(lines) + ")"
