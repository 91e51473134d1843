"""What the operations of networks are called, and what bounds may assume of each: one record per operation.

A network spells one operation in many ways: `nn.ReLU`, `F.relu(input=x)`, `x.relu_()`. A record holds the one function
its rules are written for, every spelling with the arguments it takes, brought into one order, and the traits from which
the rest of `bounds` follows: in which operands a call is affine, whether it only moves elements, whether it grows.
Interval, linear and floating-point rules are registered in the files that hold them, under the record's function.

Every record also states its preconditions (`require`): what the rules do not cover is refused by name before a rule
sees it. To add an operation from outside, see `register_operation`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from certtrain.errors import UnsupportedOperation

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
    """Wherever it is defined: tangents lie below, chords above. `derivative(x, *settings)`: by default autograd's."""

    derivative: Callable[..., Tensor] | None = None


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


def _anything(*args: Any) -> None:
    return None


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
        interval_only: has no linear relaxation on purpose: CROWN refuses it by name.
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
    interval_only: bool = False
    rectifies: bool = False
    view: bool = False
    identity: Callable[..., bool] | None = None
    parts: bool = False
    require: Callable[..., None] = _anything

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


# --- preconditions ----------------------------------------------------------------------------------------------------


def require_that(condition: bool, reason: str) -> None:
    if not condition:
        raise UnsupportedOperation(reason)


def _off_the_batch_axis(dims: int, *axes: Any) -> None:
    """None of these axes of a value is the images'."""
    require_that(
        all(isinstance(axis, int) and axis % max(1, dims) != 0 for axis in axes),
        "it works along the batch axis, and would mix images",
    )


def batched(*dims: int) -> Callable[..., None]:
    """The value has one of these numbers of dimensions; PyTorch takes fewer for an input without a batch axis."""

    def require(x: Shape, *args: Any) -> None:
        first_alone(x, *args)
        wanted = " or ".join(map(str, dims))
        require_that(x.dims in dims, f"its input has {x.dims} dimensions, not {wanted}: where is the batch axis?")

    return require


def first_alone(x: Any, *others: Any) -> None:
    """Only the first operand is a value."""
    require_that(
        isinstance(x, Shape) and not any(isinstance(other, Shape) for other in others),
        "weights that depend on the input have no rule, nor have settings",
    )


def _aligned(*operands: Any) -> None:
    """Broadcasting leaves the batch axis of every value the first of the result."""
    values = [operand for operand in operands if isinstance(operand, Shape)]
    constants = [operand.dim() for operand in operands if isinstance(operand, Tensor)]
    most = max([value.dims for value in values] + constants)
    require_that(
        all(value.dims == most for value in values),
        "broadcasting would align the batch axis of one operand with another axis of the other",
    )


def _reduces(x: Shape, dim: Any, keepdim: bool = False) -> None:
    dims = _axes(dim)
    require_that(bool(dims), "it reduces over all axes, the batch axis among them, and would mix images")
    _off_the_batch_axis(x.dims, *dims)


def _axes(dim: Any) -> tuple[Any, ...]:
    return () if dim is None else tuple(dim) if isinstance(dim, tuple | list | torch.Size) else (dim,)


def only(value: Any, allowed: Any, name: str) -> None:
    require_that(value is allowed or value == allowed, f"{name}={value!r} has no rule")


# --- linear maps ------------------------------------------------------------------------------------------------------


def _bind_linear(input: Any, weight: Any, bias: Any = None) -> tuple[Any, ...]:
    return input, weight, bias


def _bind_conv(
    input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> tuple[Any, ...]:
    return input, weight, bias, stride, padding, dilation, groups


def _bind_conv_transpose(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> tuple[Any, ...]:
    return input, weight, bias, stride, padding, output_padding, groups, dilation


def pads_first(module: nn.Module) -> bool:
    """Is it a convolution that pads its input, with other values than zeros, and convolves without padding then?"""
    return getattr(module, "padding_mode", "zeros") != "zeros"


def padding_settings(module: Any) -> tuple[Any, ...]:
    """How: the arguments of `F.pad` after the input."""
    return tuple(module._reversed_padding_repeated_twice), module.padding_mode, None


def _conv_settings(m: Any) -> tuple[Any, ...]:
    return m.weight, m.bias, m.stride, 0 if pads_first(m) else m.padding, m.dilation, m.groups


def _conv_transpose_settings(m: Any) -> tuple[Any, ...]:
    return m.weight, m.bias, m.stride, m.padding, m.output_padding, m.groups, m.dilation


def _linear_input(x: Any, *weights: Any) -> None:
    first_alone(x, *weights)
    require_that(x.dims >= 2, "its input has one dimension only: where is the batch axis?")


define(
    F.linear,
    _bind_linear,
    operands=3,
    affine=Affine.FIRST,
    require=_linear_input,
    modules={nn.Linear: lambda m: (m.weight, m.bias)},
)
_function: Callable[..., Any]
_torch: Callable[..., Any]
_alias: Callable[..., Any]
_module: type[nn.Module]

for _function, _torch, _module, _dims in (
    (F.conv1d, torch.conv1d, nn.Conv1d, 3),
    (F.conv2d, torch.conv2d, nn.Conv2d, 4),
    (F.conv3d, torch.conv3d, nn.Conv3d, 5),
):
    define(
        _function,
        _bind_conv,
        functions=(_torch,),
        operands=3,
        affine=Affine.FIRST,
        require=batched(_dims),
        modules={_module: _conv_settings},
    )
for _function, _torch, _module, _dims in (
    (F.conv_transpose1d, torch.conv_transpose1d, nn.ConvTranspose1d, 3),
    (F.conv_transpose2d, torch.conv_transpose2d, nn.ConvTranspose2d, 4),
):
    define(
        _function,
        _bind_conv_transpose,
        functions=(_torch,),
        operands=3,
        affine=Affine.FIRST,
        require=batched(_dims),
        modules={_module: _conv_transpose_settings},
    )

WEIGHTED = (F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d)
"""Layers of the form W x + b."""


def _matrix_operands(x: Any, y: Any) -> None:
    if isinstance(x, Shape):
        require_that(x.dims >= 2, "the batch axis of its left operand would be summed over")
        other = y.dims if isinstance(y, Shape) else y.dim()
        require_that(other <= max(x.dims, 2), "the batch axis of its left operand would not be the result's first")
        require_that(x.dims > 2 or other <= 2, "the batch axis of its left operand would not be the result's first")
    if isinstance(y, Shape):
        require_that(y.dims >= 3, "the batch axis of its right operand would be summed over")
        other = x.dims if isinstance(x, Shape) else x.dim()
        require_that(other <= y.dims, "the batch axis of its right operand would not be the result's first")
    if isinstance(x, Shape) and isinstance(y, Shape):
        require_that(x.dims == y.dims, "the batch axes of its operands would not meet")


define(
    torch.matmul,
    lambda input, other: (input, other),
    functions=(
        operator.matmul,
        (torch.bmm, lambda input, mat2: (input, mat2)),
        (torch.mm, lambda input, mat2: (input, mat2)),
    ),
    methods=("matmul", ("bmm", lambda input, mat2: (input, mat2)), ("mm", lambda input, mat2: (input, mat2))),
    operands=2,
    affine=Affine.ONE,
    require=_matrix_operands,
)


def einsum(x: Any, y: Any, equation: str) -> Tensor:
    return torch.einsum(equation, x, y)


def _bind_einsum(equation: str, *operands: Any) -> tuple[Any, ...]:
    operands = tuple(operands[0]) if len(operands) == 1 and isinstance(operands[0], list | tuple) else operands
    require_that(len(operands) == 2, f"einsum of {len(operands)} operands has no rule, of two it has")
    return (*operands, equation)


def _einsum_operands(x: Any, y: Any, equation: str) -> None:
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    require_that(bool(arrow) and "." not in equation, f"einsum {equation!r}: write it with -> and without ...")
    images = {term[0] for term, operand in zip(terms, (x, y), strict=True) if isinstance(operand, Shape)}
    elsewhere = [term for term, operand in zip(terms, (x, y), strict=True) if not isinstance(operand, Shape)]
    elsewhere += [term[1:] for term, operand in zip(terms, (x, y), strict=True) if isinstance(operand, Shape)]
    require_that(
        images == set(output[:1]) and not any(letter in term for letter in images for term in elsewhere),
        f"einsum {equation!r}: the batch axis must be the first of every value and of the result, and nowhere else",
    )


define(
    einsum,
    lambda *args: args,
    functions=((torch.einsum, _bind_einsum),),
    operands=2,
    affine=Affine.ONE,
    require=_einsum_operands,
)


def _affine_product(call: Any, input: Any, left: Any, right: Any, beta: Any, alpha: Any) -> Any:
    """beta·input + alpha·(left @ right); factors of 1, the rule, are left out."""
    product = call(torch.matmul, left, right)
    product = product if alpha == 1 else call(torch.mul, product, alpha)
    return call(add, product, input if beta == 1 else call(torch.mul, input, beta), 1)


def _decompose_addmm(call: Any, input: Any, mat1: Any, mat2: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    return _affine_product(call, input, mat1, mat2, beta, alpha)


def _decompose_baddbmm(call: Any, input: Any, batch1: Any, batch2: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    return _affine_product(call, input, batch1, batch2, beta, alpha)


DECOMPOSITIONS |= {torch.addmm: _decompose_addmm, "addmm": _decompose_addmm}
DECOMPOSITIONS |= {torch.baddbmm: _decompose_baddbmm, "baddbmm": _decompose_baddbmm}


# --- arithmetic -------------------------------------------------------------------------------------------------------


def add(x: Any, y: Any, alpha: float = 1) -> Any:
    return x + y if alpha == 1 else x + alpha * y


def sub(x: Any, y: Any, alpha: float = 1) -> Any:
    return x - y if alpha == 1 else x - alpha * y


def _bind_sum(input: Any, other: Any, *, alpha: float = 1, out: None = None) -> tuple[Any, ...]:
    only(out, None, "out")
    return input, other, alpha


def _bind_two(input: Any, other: Any, *, out: None = None) -> tuple[Any, ...]:
    only(out, None, "out")
    return input, other


def _bind_quotient(input: Any, other: Any, *, rounding_mode: str | None = None, out: None = None) -> tuple[Any, ...]:
    only(rounding_mode, None, "rounding_mode")
    return _bind_two(input, other, out=out)


def _positional(x: Any, y: Any) -> tuple[Any, ...]:
    """Of `x + y` and its like, whose functions in `operator` take no keywords."""
    return x, y


def _summands(x: Any, y: Any, alpha: Any) -> None:
    require_that(isinstance(alpha, int | float) and math.isfinite(alpha), f"alpha={alpha!r} is no finite number")
    _aligned(x, y)


def _factors(x: Any, y: Any) -> None:
    _aligned(x, y)


def _operators(name: str) -> tuple[tuple[Callable, Bind], ...]:
    bind: Bind = lambda x, y: (x, y, 1) if name in ("add", "sub") else (x, y)  # noqa: E731
    return (getattr(operator, name), bind), (getattr(operator, f"i{name}"), bind)


define(
    add,
    _bind_sum,
    functions=(torch.add, *_operators("add")),
    methods=("add", "add_", "__radd__"),
    operands=2,
    affine=Affine.JOINTLY,
    require=_summands,
)
define(
    sub,
    _bind_sum,
    functions=(torch.sub, torch.subtract, *_operators("sub")),
    methods=("sub", "sub_", "subtract", "subtract_"),
    operands=2,
    affine=Affine.JOINTLY,
    require=_summands,
)
define(
    torch.mul,
    _bind_two,
    functions=(torch.multiply, *_operators("mul")),
    methods=("mul", "mul_", "multiply", "multiply_"),
    operands=2,
    affine=Affine.ONE,
    require=_factors,
)
define(
    torch.div,
    _bind_quotient,
    functions=(torch.divide, torch.true_divide, *_operators("truediv")),
    methods=("div", "div_", "divide", "divide_", "true_divide"),
    operands=2,
    affine=Affine.FIRST,
    require=_factors,
)
define(
    torch.neg,
    lambda input: (input,),
    functions=(torch.negative, (operator.neg, lambda x: (x,))),
    methods=("neg", "neg_", "negative"),
    affine=Affine.FIRST,
)
WRITES |= {operator.iadd, operator.isub, operator.imul, operator.itruediv}


# --- pooling ----------------------------------------------------------------------------------------------------------


def _bind_max_pool(
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> tuple[Any, ...]:
    only(return_indices, False, "return_indices")
    return input, kernel_size, stride or None, padding, dilation, ceil_mode


def _max_pool_settings(m: Any) -> tuple[Any, ...]:
    only(m.return_indices, False, f"{type(m).__name__} with return_indices")
    return m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode


def _bind_avg_pool1d(
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> tuple[Any, ...]:
    return input, kernel_size, stride or kernel_size, padding, ceil_mode, count_include_pad


def _bind_avg_pool2d(
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> tuple[Any, ...]:
    return input, kernel_size, stride or kernel_size, padding, ceil_mode, count_include_pad, divisor_override


def _average(dims: int) -> Callable[..., None]:
    has_batch = batched(dims)

    def require(
        x: Any, kernel_size: Any, stride: Any, padding: Any, ceil_mode: Any, include_pad: Any, divisor: Any = None
    ) -> None:
        has_batch(x, kernel_size, stride, padding)
        require_that(
            divisor is None or (isinstance(divisor, int) and 0 < divisor <= 2**40),
            f"divisor_override={divisor!r} has no rule: it must be from 1 to 2^40",
        )

    return require


def _bind_adaptive(input: Any, output_size: Any) -> tuple[Any, ...]:
    return input, output_size


define(
    F.max_pool1d,
    _bind_max_pool,
    functions=(torch.max_pool1d,),
    modules={nn.MaxPool1d: _max_pool_settings},
    increasing=True,
    require=batched(3),
)
define(
    F.max_pool2d,
    _bind_max_pool,
    functions=(torch.max_pool2d,),
    modules={nn.MaxPool2d: _max_pool_settings},
    increasing=True,
    require=batched(4),
)
define(
    F.max_pool3d,
    _bind_max_pool,
    functions=(torch.max_pool3d,),
    modules={nn.MaxPool3d: _max_pool_settings},
    increasing=True,
    require=batched(5),
)


def _bind_adaptive_max(input: Any, output_size: Any, return_indices: bool = False) -> tuple[Any, ...]:
    only(return_indices, False, "return_indices")
    return input, output_size


def _adaptive_max_settings(m: Any) -> tuple[Any, ...]:
    only(m.return_indices, False, f"{type(m).__name__} with return_indices")
    return (m.output_size,)


for _function, _module, _dims in (
    (F.adaptive_max_pool1d, nn.AdaptiveMaxPool1d, 3),
    (F.adaptive_max_pool2d, nn.AdaptiveMaxPool2d, 4),
):
    define(
        _function,
        _bind_adaptive_max,
        modules={_module: _adaptive_max_settings},
        increasing=True,
        require=batched(_dims),
    )


def _bind_extremum(input: Any, dim: Any = (), keepdim: bool = False, *, out: None = None) -> tuple[Any, ...]:
    only(out, None, "out")
    return input, dim, keepdim


for _function in (torch.amax, torch.amin):
    define(_function, _bind_extremum, methods=(_function.__name__,), increasing=True, require=_reduces)


def _one_value(x: Any, y: Any) -> None:
    require_that(
        all(isinstance(operand, Shape | Tensor) for operand in (x, y)), "it compares with something that is no tensor"
    )
    _aligned(x, y)


for _function in (torch.maximum, torch.minimum):
    define(_function, _bind_two, methods=(_function.__name__,), operands=2, increasing=True, require=_one_value)


def _of_two(function: Callable) -> Callable[..., Any]:
    """`torch.max(x, y)`; of one tensor, along an axis or over all, it returns other things."""

    def decomposition(call: Any, input: Any, *others: Any, other: Any = None, **settings: Any) -> Any:
        found = [*others, *([] if other is None else [other])]
        two = len(found) == 1 and not isinstance(found[0], int) and not settings
        require_that(two, "of one tensor it has no rule: write amax or amin, and name the axes")
        return call(function, input, found[0])

    return decomposition


DECOMPOSITIONS |= {torch.max: _of_two(torch.maximum), "max": _of_two(torch.maximum)}
DECOMPOSITIONS |= {torch.min: _of_two(torch.minimum), "min": _of_two(torch.minimum)}
define(
    F.avg_pool1d,
    _bind_avg_pool1d,
    affine=Affine.FIRST,
    averaging=True,
    require=_average(3),
    modules={nn.AvgPool1d: lambda m: (m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad)},
)
for _function, _module, _dims in ((F.avg_pool2d, nn.AvgPool2d, 4), (F.avg_pool3d, nn.AvgPool3d, 5)):
    define(
        _function,
        _bind_avg_pool2d,
        affine=Affine.FIRST,
        averaging=True,
        require=_average(_dims),
        modules={
            _module: lambda m: (
                m.kernel_size,
                m.stride,
                m.padding,
                m.ceil_mode,
                m.count_include_pad,
                m.divisor_override,
            )
        },
    )
define(
    F.adaptive_avg_pool1d,
    _bind_adaptive,
    functions=(torch.adaptive_avg_pool1d,),
    affine=Affine.FIRST,
    averaging=True,
    require=batched(3),
    modules={nn.AdaptiveAvgPool1d: lambda m: (m.output_size,)},
)
for _function, _module, _dims in (
    (F.adaptive_avg_pool2d, nn.AdaptiveAvgPool2d, 4),
    (F.adaptive_avg_pool3d, nn.AdaptiveAvgPool3d, 5),
):
    define(
        _function,
        _bind_adaptive,
        affine=Affine.FIRST,
        averaging=True,
        require=batched(_dims),
        modules={_module: lambda m: (m.output_size,)},
    )


def _bind_reduction(
    input: Any, dim: Any = None, keepdim: bool = False, *, dtype: None = None, out: None = None
) -> tuple[Any, ...]:
    only(dtype, None, "dtype")
    only(out, None, "out")
    return input, dim, keepdim


define(
    Tensor.mean,
    _bind_reduction,
    functions=(torch.mean,),
    methods=("mean",),
    affine=Affine.FIRST,
    averaging=True,
    require=_reduces,
)
define(
    Tensor.sum,
    _bind_reduction,
    functions=(torch.sum,),
    methods=("sum",),
    affine=Affine.FIRST,
    averaging=True,
    require=_reduces,
)


# --- BatchNorm and Dropout, which `batch_norm.py` turns into scalings -------------------------------------------------


def _bind_batch_norm(
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Any, ...]:
    return input, running_mean, running_var, weight, bias, training, momentum, eps


def _batch_norm_settings(m: Any) -> tuple[Any, ...]:
    momentum = m.momentum
    if m.training and m.track_running_stats and m.num_batches_tracked is not None:
        with torch.no_grad():
            m.num_batches_tracked.add_(1)
        if momentum is None:  # PyTorch's cumulative average
            momentum = 1.0 / float(m.num_batches_tracked)
    from_batch = m.training or m.running_mean is None
    return m.running_mean, m.running_var, m.weight, m.bias, from_batch, momentum, m.eps


def _channels(x: Any, *settings: Any) -> None:
    first_alone(x, *settings)
    require_that(x.dims >= 2, "its input has one dimension only: where is the batch axis?")


def _bind_dropout(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> tuple[Any, ...]:
    return input, p, training


define(
    F.batch_norm,
    _bind_batch_norm,
    affine=Affine.FIRST,
    require=_channels,
    modules={
        nn.BatchNorm1d: _batch_norm_settings,
        nn.BatchNorm2d: _batch_norm_settings,
        nn.BatchNorm3d: _batch_norm_settings,
        nn.SyncBatchNorm: _batch_norm_settings,
    },
)
define(
    F.dropout,
    _bind_dropout,
    functions=((torch.dropout, lambda input, p, train: (input, p, train)),),
    affine=Affine.FIRST,
    modules={nn.Dropout: lambda m: (m.p, m.training)},
    identity=lambda x, p, training: not training or p == 0,
)
for _function, _module, _dims in (
    (F.dropout1d, nn.Dropout1d, 3),
    (F.dropout2d, nn.Dropout2d, 4),
    (F.dropout3d, nn.Dropout3d, 5),
):
    define(
        _function,
        _bind_dropout,
        affine=Affine.FIRST,
        modules={_module: lambda m: (m.p, m.training)},
        identity=lambda x, p, training: not training or p == 0,
        require=batched(_dims),
    )


def identity(x: Tensor) -> Tensor:
    return x


define(
    identity,
    lambda input: (input,),
    affine=Affine.FIRST,
    reshaping=True,
    view=True,
    identity=lambda x: True,
    modules={nn.Identity: lambda m: ()},
)


# --- moving elements --------------------------------------------------------------------------------------------------


def _sizes(*sizes: Any) -> tuple[Any, ...]:
    """`view(2, 3)` and `view((2, 3))` are the same."""
    return tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], tuple | list | torch.Size) else sizes


def _moves(
    function: Callable, bind: Bind, require: Callable[..., None] = _anything, view: bool = True, **spellings: Any
) -> None:
    define(function, bind, affine=Affine.FIRST, reshaping=True, view=view, require=require, **spellings)


def _over(*positions: int) -> Callable[..., None]:
    """The settings at these positions (from 0) name axes, none of them the images'."""

    def require(x: Any, *settings: Any) -> None:
        first_alone(x, *settings)
        _off_the_batch_axis(x.dims, *[axis for position in positions for axis in _axes(settings[position])])

    return require


def _flattens(x: Any, start_dim: int, end_dim: int) -> None:
    require_that(start_dim % x.dims != 0 or end_dim % x.dims == 0, "it folds the batch axis into another")


def _permutes(x: Any, dims: Any) -> None:
    require_that(dims[0] % x.dims == 0, "it moves the batch axis")


def _squeezes(x: Any, dim: Any) -> None:
    require_that(dim is not None, "it drops every axis of length 1, the batch axis of a single image too: say which")
    _off_the_batch_axis(x.dims, *_axes(dim))


def _unsqueezes(x: Any, dim: int) -> None:
    _off_the_batch_axis(x.dims + 1, dim)


def _indexes(x: Any, index: Any) -> None:
    """The first axis is taken whole, and stays the first."""
    items = index if isinstance(index, tuple) else (index,)
    require_that(not any(isinstance(item, Shape) for item in items), "an index that depends on the input has no rule")
    explicit = sum(_indexed_axes(item) for item in items)
    first = items[0] if items else Ellipsis
    whole = (first is Ellipsis and explicit < x.dims) or (isinstance(first, slice) and first == slice(None))
    require_that(whole, "it takes some of the images only, or adds an axis before theirs: write x[:, ...]")
    advanced = [position for position, item in enumerate(items) if isinstance(item, Tensor | list)]
    adjacent = not advanced or advanced[-1] - advanced[0] == len(advanced) - 1
    require_that(adjacent, "index tensors with a slice between them move their axes to the front")


def _indexed_axes(item: Any) -> int:
    """How many axes of the indexed value one item of an index takes: a mask as many as it has."""
    if isinstance(item, Tensor) and item.dtype in (torch.bool, torch.uint8):
        return item.dim()
    return int(item is not None and item is not Ellipsis)


def _bind_pad(input: Any, pad: Any, mode: str = "constant", value: float | None = None) -> tuple[Any, ...]:
    return input, tuple(pad), mode, value


def _pads(x: Any, pad: Any, mode: str, value: Any) -> None:
    first_alone(x, pad, value)
    require_that(len(pad) // 2 < x.dims, "it pads the batch axis")
    require_that(value is None or math.isfinite(value), f"padding with {value!r} has no rule")


def reshape(x: Tensor, shape: Any) -> Tensor:
    return x.reshape(_sizes(*shape) if isinstance(shape, tuple | list) else shape)


def cast(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """As real mathematics nothing: values keep the type they are computed in."""
    return x


def _bind_to(input: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """`x.to(dtype)`, `x.to(device)`, `x.to(device, dtype)`; where to a value is moved does not matter."""
    named = [kwargs.pop("dtype", None), *[arg for arg in args if isinstance(arg, torch.dtype)]]
    for ignored in ("device", "non_blocking", "copy", "memory_format"):
        kwargs.pop(ignored, None)
    require_that(not kwargs, f"to({', '.join(kwargs)}=...) has no rule")
    return input, next((dtype for dtype in named if dtype is not None), None)


def _casts(x: Any, dtype: Any) -> None:
    require_that(dtype in (None, torch.float32, torch.float64), f"a cast to {dtype} has no rule")


_moves(
    cast,
    lambda x, dtype=None: (x, dtype),
    _casts,
    methods=(
        ("to", _bind_to),
        ("float", lambda input: (input, torch.float32)),
        ("cpu", lambda input: (input, None)),
        ("double", lambda input: (input, torch.float64)),
        ("half", lambda input: (input, torch.float16)),
        ("bfloat16", lambda input: (input, torch.bfloat16)),
        ("long", lambda input: (input, torch.int64)),
        ("int", lambda input: (input, torch.int32)),
        ("bool", lambda input: (input, torch.bool)),
        ("cuda", lambda input, *device: (input, None)),
    ),
)
DECOMPOSITIONS["type_as"] = lambda call, input, other: call(cast, input, call(getattr, other, "dtype"))
_moves(
    torch.flatten,
    lambda input, start_dim=0, end_dim=-1: (input, start_dim, end_dim),
    _flattens,
    methods=("flatten",),
    modules={nn.Flatten: lambda m: (m.start_dim, m.end_dim)},
)
_moves(
    reshape,
    lambda input, *shape: (input, _sizes(*shape)),
    methods=("view", "reshape"),
    functions=((torch.reshape, lambda input, shape: (input, shape)),),
)
DECOMPOSITIONS["view_as"] = lambda call, input, other: call(reshape, input, call(getattr, other, "shape"))
DECOMPOSITIONS["reshape_as"] = DECOMPOSITIONS["view_as"]
_moves(
    Tensor.permute,
    lambda input, *dims: (input, _sizes(*dims)),
    _permutes,
    methods=("permute",),
    functions=((torch.permute, lambda input, dims: (input, dims)),),
)
_moves(
    Tensor.transpose,
    lambda input, dim0, dim1: (input, dim0, dim1),
    _over(0, 1),
    functions=(torch.transpose, (torch.swapaxes, lambda input, axis0, axis1: (input, axis0, axis1)), torch.swapdims),
    methods=("transpose", ("swapaxes", lambda input, axis0, axis1: (input, axis0, axis1)), "swapdims"),
)
_moves(
    Tensor.squeeze, lambda input, dim=None: (input, dim), _squeezes, functions=(torch.squeeze,), methods=("squeeze",)
)
_moves(
    Tensor.unsqueeze, lambda input, dim: (input, dim), _unsqueezes, functions=(torch.unsqueeze,), methods=("unsqueeze",)
)
_moves(
    Tensor.unflatten,
    lambda input, dim, sizes: (input, dim, tuple(sizes)),
    _over(0),
    functions=(torch.unflatten,),
    methods=("unflatten",),
    modules={nn.Unflatten: lambda m: (m.dim, tuple(m.unflattened_size))},
)
_moves(Tensor.contiguous, lambda input, memory_format=None: (input,), methods=("contiguous",))
_moves(
    Tensor.clone, lambda input, memory_format=None: (input,), view=False, methods=("clone",), functions=(torch.clone,)
)
_moves(Tensor.detach, lambda input: (input,), methods=("detach",), functions=(torch.detach,))
_moves(operator.getitem, lambda x, index: (x, index), _indexes, methods=("__getitem__",))
define(F.pad, _bind_pad, affine=Affine.FIRST, increasing=True, require=_pads)


def differentiable(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same map where derivatives are taken to transpose it: `detach` would have none, as if it were a constant."""
    return identity if function is Tensor.detach else function


for _suffix in ("1d", "2d", "3d"):  # of modules that call it; what they pad with they hold themselves
    MODULES |= {
        getattr(nn, f"{_kind}{_suffix}"): (OPERATIONS[F.pad], _settings)
        for _kind, _settings in (
            ("ZeroPad", lambda m: (tuple(m.padding), "constant", 0.0)),
            ("ConstantPad", lambda m: (tuple(m.padding), "constant", m.value)),
            ("ReflectionPad", lambda m: (tuple(m.padding), "reflect", None)),
            ("ReplicationPad", lambda m: (tuple(m.padding), "replicate", None)),
            ("CircularPad", lambda m: (tuple(m.padding), "circular", None)),
        )
    }


def narrow(x: Tensor, dim: int, start: int, length: int) -> Tensor:
    return x.narrow(dim, start, length)


def _rolls(x: Any, shifts: Any, dims: Any) -> None:
    require_that(
        dims is not None and dims != (), "it rolls over all axes together, and would mix images: name the axes"
    )
    _over(1)(x, shifts, dims)


def _repeats(x: Any, repeats: tuple[Any, ...]) -> None:
    first_alone(x, *repeats)
    require_that(len(repeats) <= x.dims, "it adds an axis before the images'")
    require_that(len(repeats) < x.dims or repeats[0] == 1, "it repeats the images")


def _expands(x: Any, sizes: Any) -> None:
    first_alone(x, *sizes)
    require_that(len(sizes) == x.dims and sizes[0] in (-1, x[0]), "it adds an axis before the images', or more images")


def expand(x: Tensor, sizes: Any) -> Tensor:
    return x.expand(_sizes(*sizes))


def _moves_axes(x: Any, source: Any, destination: Any) -> None:
    first_alone(x, source, destination)
    for axes in (_axes(source), _axes(destination)):
        _off_the_batch_axis(x.dims, *axes)


_moves(
    narrow,
    lambda input, dim, start, length: (input, dim, start, length),
    _over(0),
    functions=(torch.narrow,),
    methods=("narrow",),
)
_moves(
    torch.select,
    lambda input, dim, index: (input, dim, index),
    _over(0),
    methods=("select",),
)


def _bind_index_select(input: Any, dim: Any, index: Any, *, out: None = None) -> tuple[Any, ...]:
    only(out, None, "out")
    return input, dim, index


_moves(
    torch.index_select,
    _bind_index_select,
    _over(0),
    view=False,
    methods=("index_select",),
)
_moves(
    torch.flip,
    lambda input, dims: (input, dims),
    _over(0),
    view=False,
    methods=(("flip", lambda input, *dims: (input, _sizes(*dims))),),
)
_moves(
    torch.roll,
    lambda input, shifts, dims=None: (input, shifts, dims),
    _rolls,
    view=False,
    methods=("roll",),
)
_moves(
    Tensor.repeat,
    lambda input, *repeats: (input, _sizes(*repeats)),
    _repeats,
    view=False,
    methods=("repeat",),
)
_moves(
    torch.tile,
    lambda input, dims: (input, dims),
    _repeats,
    view=False,
    methods=(("tile", lambda input, *dims: (input, _sizes(*dims))),),
)
_moves(expand, lambda input, *sizes: (input, _sizes(*sizes)), _expands, methods=("expand",))
DECOMPOSITIONS["expand_as"] = lambda call, input, other: call(expand, input, call(getattr, other, "shape"))
_moves(
    torch.movedim,
    lambda input, source, destination: (input, source, destination),
    _moves_axes,
    functions=(torch.moveaxis,),
    methods=("movedim", "moveaxis"),
)
_moves(
    F.pixel_shuffle,
    lambda input, upscale_factor: (input, upscale_factor),
    batched(4),
    view=False,
    functions=(torch.pixel_shuffle,),
    modules={nn.PixelShuffle: lambda m: (m.upscale_factor,)},
)
_moves(
    F.pixel_unshuffle,
    lambda input, downscale_factor: (input, downscale_factor),
    batched(4),
    view=False,
    functions=(torch.pixel_unshuffle,),
    modules={nn.PixelUnshuffle: lambda m: (m.downscale_factor,)},
)
_moves(
    F.channel_shuffle,
    lambda input, groups: (input, groups),
    batched(3, 4, 5),
    view=False,
    functions=(torch.channel_shuffle,),
    modules={nn.ChannelShuffle: lambda m: (m.groups,)},
)


# --- resizing: every new pixel is an average of old ones --------------------------------------------------------------

RESIZING = {"nearest", "nearest-exact", "linear", "bilinear", "trilinear", "area"}
COPYING = {"nearest", "nearest-exact"}  # the average of one


def _bind_interpolate(
    input: Any,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> tuple[Any, ...]:
    only(antialias, False, "antialias")
    return input, size, scale_factor, mode, align_corners, recompute_scale_factor


def _interpolates(x: Any, size: Any, scale_factor: Any, mode: Any, *settings: Any) -> None:
    batched(3, 4, 5)(x, size, scale_factor)
    require_that(mode in RESIZING, f"mode={mode!r} has no rule, {', '.join(sorted(RESIZING))} have")


define(
    F.interpolate,
    _bind_interpolate,
    functions=(
        (
            F.upsample,
            lambda input, size=None, scale_factor=None, mode="nearest", align_corners=None: _bind_interpolate(
                input, size, scale_factor, mode, align_corners
            ),
        ),
    ),
    affine=Affine.FIRST,
    averaging=True,
    require=_interpolates,
    modules={nn.Upsample: lambda m: (m.size, m.scale_factor, m.mode, m.align_corners, m.recompute_scale_factor)},
)


# --- several tensors into one -----------------------------------------------------------------------------------------


def _bind_cat(tensors: Any, dim: int = 0, *, out: None = None) -> tuple[Any, ...]:
    only(out, None, "out")
    return list(tensors), dim


def _joins(parts: Any, dim: int) -> None:
    _aligned(*parts)
    values = [part for part in parts if isinstance(part, Shape)]
    _off_the_batch_axis(values[0].dims, dim)


def cat(parts: Sequence[Any], dim: int = 0) -> Tensor:
    return torch.cat(list(parts), dim)


define(
    cat,
    _bind_cat,
    functions=(torch.cat, (torch.concat, _bind_cat), (torch.concatenate, _bind_cat)),
    affine=Affine.JOINTLY,
    require=_joins,
)


def _decompose_stack(call: Any, tensors: Any, dim: int = 0, *, out: None = None) -> Any:
    only(out, None, "out")
    return call(cat, [call(Tensor.unsqueeze, tensor, dim) for tensor in tensors], dim)


DECOMPOSITIONS[torch.stack] = _decompose_stack


# --- one tensor into several: the recorder asks for each part on its own ----------------------------------------------


def chunk(x: Tensor, chunks: int, dim: int, part: int) -> Tensor:
    return x.chunk(chunks, dim)[part]


def split(x: Tensor, sizes: Any, dim: int, part: int) -> Tensor:
    return x.split(sizes, dim)[part]


def unbind(x: Tensor, dim: int, part: int) -> Tensor:
    return x.unbind(dim)[part]


_moves(
    chunk,
    lambda input, chunks, dim=0: (input, chunks, dim),
    _over(1),
    functions=(torch.chunk,),
    methods=("chunk",),
    parts=True,
)
_moves(
    split,
    lambda tensor, split_size_or_sections, dim=0: (tensor, split_size_or_sections, dim),
    _over(1),
    functions=(torch.split,),
    methods=(("split", lambda self, split_size, dim=0: (self, split_size, dim)),),
    parts=True,
)
_moves(unbind, lambda input, dim=0: (input, dim), _over(0), functions=(torch.unbind,), methods=("unbind",), parts=True)


# --- softmax; one that ends the network keeps the order of its logits -------------------------------------------------


def _distributes(x: Any, dim: Any) -> None:
    first_alone(x, dim)
    require_that(dim is not None, "it goes over an axis that PyTorch guesses: name it, dim=-1 say")
    _off_the_batch_axis(x.dims, dim)


def _bind_softmax(input: Any, dim: int | None = None, _stacklevel: int = 3, dtype: None = None) -> tuple[Any, ...]:
    only(dtype, None, "dtype")
    return input, dim


for _function, _alias, _module in (
    (torch.softmax, F.softmax, nn.Softmax),
    (torch.log_softmax, F.log_softmax, nn.LogSoftmax),
):
    define(
        _function,
        _bind_softmax,
        functions=(_alias,),
        methods=(_function.__name__,),
        modules={_module: lambda m: (m.dim,)},
        require=_distributes,
    )
LAST_FUNCTIONS = (torch.softmax, torch.log_softmax)


# --- what does not depend on the values -------------------------------------------------------------------------------

MAKERS: set[Callable | str] = {
    torch.zeros_like,
    torch.ones_like,
    torch.full_like,
    Tensor.new_zeros,
    Tensor.new_ones,
    Tensor.new_full,
    "new_zeros",
    "new_ones",
    "new_full",
}
"""Of tensors that hold one number."""
INSPECTIONS: set[Callable] = {
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    getattr,
    Tensor.stride,
    Tensor.is_contiguous,
    *(maker for maker in MAKERS if callable(maker)),
}
INSPECTING_METHODS = {
    "size",
    "dim",
    "numel",
    "stride",
    "is_contiguous",
    *(maker for maker in MAKERS if isinstance(maker, str)),
}
INSPECTED_ATTRIBUTES = {"shape", "ndim", "dtype", "device"}


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
