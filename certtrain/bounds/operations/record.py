"""The record of an operation, the traits it may state, and the tables that all records are entered into."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

Bind = Callable[..., tuple[Any, ...]]  # a spelling's arguments, as it takes them -> canonical ones, by position


class Shape(tuple[int, ...]):
    """The sizes of a value, the images' axis first; stands for it where preconditions are checked."""

    __slots__ = ()

    @property
    def dims(self) -> int:
        return len(self)


class Affine(Enum):
    """In which operands a call is affine; the others must then be constants."""

    NO = "never"
    JOINTLY = "in all operands together"  # a sum, a concatenation
    FIRST = "in the first operand"  # x / c, a convolution of x
    ONE = "in each operand alone"  # a product

    def holds(self, values: Sequence[bool]) -> bool:
        """Is a call affine whose operands are values (True) or constants (False)?"""
        if self is Affine.JOINTLY:
            return True
        if self is Affine.FIRST:
            return values[0] and not any(values[1:])
        return self is Affine.ONE and sum(values) == 1


@dataclass(frozen=True)
class PiecewiseLinear:
    """Straight between its kinks, wherever those are.

    Args:
        kinks: in increasing order, numbers or tensors that broadcast over x; or what gives them for the settings.
    """

    kinks: Sequence[Any] | Callable[..., Sequence[Any]]


@dataclass(frozen=True)
class Convex:
    """Wherever it is defined: tangents lie below, chords above.

    Args:
        derivative: (x, *settings); by default autograd's.
        least: no value that the operation meets is below, whatever a bound says of it: lines hold from there on.
    """

    derivative: Callable[..., Tensor] | None = None
    least: float = -math.inf


@dataclass(frozen=True)
class Concave:
    """As `Convex`, turned over."""

    derivative: Callable[..., Tensor] | None = None


@dataclass(frozen=True)
class SShaped:
    """Increasing, convex left of 0, concave right of it, and symmetric: f(x) = 2 f(0) - f(-x)."""

    derivative: Callable[..., Tensor] | None = None


@dataclass(frozen=True)
class Smooth:
    """Continuous, and twice continuously differentiable but for kinks.

    Args:
        curvature: no less than |f''| anywhere, a number; or, for tighter lines on wide boxes, (near, far, *settings) ->
            no less than |f''(x)| wherever near <= |x| <= far, which are tensors.
        kinks: as of `PiecewiseLinear`.
    """

    curvature: float | Callable[..., Any]
    kinks: Sequence[Any] | Callable[..., Sequence[Any]] = ()


Curve = PiecewiseLinear | Convex | Concave | SShaped | Smooth
"""What is known of the graph of an elementwise function; its linear relaxation follows. (`linear/relaxations.py`)"""


def at_settings(trait: Any, *settings: Any) -> Any:
    """A trait that is the same for all settings, or a function of them."""
    return trait(*settings) if callable(trait) else trait


def anything(*args: Any) -> None:
    """The precondition of an operation whose rules cover all arguments."""


@dataclass(frozen=True)
class Operation:
    """One operation.

    Args:
        function: canonical; called with the operands, then the settings, all by position.
        bind: the arguments of most spellings -> the canonical ones. An argument it does not name is refused.
        functions, methods: further spellings; with a `Bind` of their own where they take other arguments.
        writes: functions that are spellings and write into their first argument. (So do methods that end with "_".)
        modules: classes of modules -> the canonical arguments after the input, read off a module at every call.
        operands: how many leading arguments are operands: values, or constants that are brought to their type.
        affine: in which of them.
        reshaping: moves, repeats or drops elements of its first operand, and computes nothing.
        averaging: sums or averages elements of its first operand with constant weights that are not negative.
        elementwise: acts on each element of its first operand alone.
        increasing: grows, or stays, with every element of its operands.
        decreasing: of an elementwise function: falls, or stays.
        minimum: of an elementwise function: the x where it is least; it falls left of that and grows right of it.
            A number, or what gives one for the settings (-inf where it grows everywhere).
        positive: defined for values above 0 only. A box that reaches further is an error that names the operation.
        curve: of an elementwise function.
        rectifies: passes what is above 0 and (nearly) blocks what is below, so that a neuron has states that
            regularizers balance: ReLU and its smooth or leaky kin, not functions that saturate on both sides.
        view: the result may share memory with the first operand.
        identity: of its first operand, and the very same tensor, for these (canonical) arguments.
        parts: returns several tensors; the function takes, last, which one.
        require: raises UnsupportedOperation for (canonical) arguments that the rules do not cover; values are given
            as their `Shape`, so that what is no Shape is a constant.
    """

    function: Callable[..., Any]
    bind: Bind
    functions: Sequence[Callable | tuple[Callable, Bind]] = ()
    methods: Sequence[str | tuple[str, Bind]] = ()
    writes: Sequence[Callable | tuple[Callable, Bind]] = ()
    modules: Mapping[type[nn.Module], Callable[[Any], tuple[Any, ...]]] | None = None
    operands: int = 1
    affine: Affine = Affine.NO
    reshaping: bool = False
    averaging: bool = False
    elementwise: bool = False
    increasing: bool = False
    decreasing: bool = False
    minimum: float | Callable[..., float] | None = None
    positive: bool = False
    curve: Curve | None = None
    rectifies: bool = False
    view: bool = False
    identity: Callable[..., bool] | None = None
    parts: bool = False
    require: Callable[..., None] = anything

    @property
    def name(self) -> str:
        return getattr(self.function, "__name__", str(self.function)).strip("_")


OPERATIONS: dict[Callable, Operation] = {}  # by canonical function
FUNCTIONS: dict[Callable, tuple[Operation, Bind]] = {}
METHODS: dict[str, tuple[Operation, Bind]] = {}
MODULES: dict[type[nn.Module], tuple[Operation, Callable[[Any], tuple[Any, ...]]]] = {}
WRITES: set[Callable] = set()
DECOMPOSITIONS: dict[Callable | str, Callable[..., Any]] = {}
"""Spellings that are several operations: (call, *arguments) -> result, where call(function, *args) does one of them."""
MODULE_DECOMPOSITIONS: dict[type[nn.Module], Callable[..., Any]] = {}
"""The same of modules: (modules, module, *arguments) -> result; see `ModuleCalls`."""


class ModuleCalls(Protocol):
    """What the decomposition of a module is written with."""

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """One operation, by its canonical function, or the function of a decomposition."""

    def parameter(self, module: nn.Module, name: str) -> Any:
        """A parameter, read at every call; None where the module has none of that name."""

    def run(self, module: nn.Module, *args: Any) -> Any:
        """A module within the module."""


def define(function: Callable[..., Any], bind: Bind, **traits: Any) -> Operation:
    """Enter a record into the tables; see `Operation`."""
    operation = Operation(function, bind, **traits)
    OPERATIONS[function] = operation
    for spelling in (function, *operation.functions, *operation.writes):
        one, own = spelling if isinstance(spelling, tuple) else (spelling, bind)
        FUNCTIONS[one] = operation, own
    for method in operation.methods:
        name, own = method if isinstance(method, tuple) else (method, bind)
        METHODS[name] = operation, own
    for kind, read in (operation.modules or {}).items():
        MODULES[kind] = operation, read
    WRITES.update(spelling[0] if isinstance(spelling, tuple) else spelling for spelling in operation.writes)
    return operation


T = TypeVar("T")


def module_entry(module: nn.Module) -> tuple[Operation, Callable[[Any], tuple[Any, ...]]] | None:
    """The record of the computation that `module` really runs, and how to read its settings; None if it has its own."""
    return _of_class(module, MODULES)


def module_decomposition(module: nn.Module) -> Callable[..., Any] | None:
    """The operations that `module` consists of, in the same way."""
    return _of_class(module, MODULE_DECOMPOSITIONS)


def _of_class(module: nn.Module, table: Mapping[type[nn.Module], T]) -> T | None:
    """The entry of the module's class, or of a base whose `forward` it inherits, unless the instance has another."""
    for base in type(module).__mro__:
        if base in table:
            runs = ("forward", "_conv_forward")
            overridden = any(getattr(type(module), name, None) is not getattr(base, name, None) for name in runs)
            return None if overridden or any(name in vars(module) for name in runs) else table[base]
    return None
