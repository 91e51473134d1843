"""A network as a straight line of operations, each a call of one of a few canonical functions.

torch.fx records what a network's `forward` does; this file brings the many spellings of one operation (`nn.ReLU`,
`F.relu`, `x.relu_()`) down to one canonical function (`F.relu`), so that a rule for bounds is written once, against
the functional signature. BatchNorm and Dropout, whose effect depends on the batch, become plain scalings with the
coefficients that the clean activations give them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from certtrain.errors import UnsupportedOperation, UsageError

V = TypeVar("V")
Coefficients = tuple[Tensor, Tensor]  # scale and shift of one BatchNorm
BatchSum = Callable[[Tensor], Tensor]  # of sums over a part of the batch: the sums over all of it, with gradient


def scale_shift(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """What a BatchNorm computes once its statistics are known; `scale` and `shift` broadcast over `x`."""
    return torch.addcmul(shift, x, scale)


# --- one operation ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ref:
    """Stands, among an operation's arguments, for the value of the operation at `index` of the line."""

    index: int


@dataclass(frozen=True)
class Call:
    """`function(*args, **kwargs)`, everything known but the values that depend on the input, which are `Ref`s."""

    index: int
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    where: str


@dataclass(frozen=True)
class Operation:
    """One recorded step of the network, before parameters and shapes are looked up.

    `arguments` gives the arguments after the inputs, read off the module at every call, so that the newest
    parameters are used. `tracked` says whether the value depends on the network's input (a shape does not).
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    where: str
    tracked: bool
    arguments: Callable[[], tuple[Any, ...]] = tuple
    last_uses: tuple[int, ...] = ()  # values that no later operation reads


def map_leaves(structure: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """`structure`, nested tuples, lists, dicts and slices, with every instance of `kind` in it replaced."""
    if isinstance(structure, kind):
        return function(structure)
    if isinstance(structure, tuple):
        return tuple([map_leaves(item, kind, function) for item in structure])
    if isinstance(structure, list):
        return [map_leaves(item, kind, function) for item in structure]
    if isinstance(structure, dict):
        return {key: map_leaves(item, kind, function) for key, item in structure.items()}
    if isinstance(structure, slice):
        ends = (structure.start, structure.stop, structure.step)
        return slice(*[map_leaves(item, kind, function) for item in ends])
    return structure


def leaves(structure: Any, kind: type) -> list[Any]:
    """Every instance of `kind` in nested tuples, lists, dicts and slices, in order."""
    found: list[Any] = []
    map_leaves(structure, kind, found.append)
    return found


# --- BatchNorm and Dropout: scalings whose coefficients the clean activations decide ---------------------------------


def batch_norm_coefficients(
    clean: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    batch_sum: BatchSum | None = None,
) -> Coefficients:
    """Scale and shift, each (1, C, 1, ...), of a BatchNorm.

    In training mode the statistics are those of `clean`, with gradient, and the running ones are updated as
    PyTorch does; otherwise they are the running ones. `batch_sum`: where `clean` is a part of the batch.
    """
    if not training:
        mean, var = running_mean, running_var
    elif clean is None:
        raise UsageError("BatchNorm is in training mode: its statistics are those of the clean input, pass clean=")
    else:
        mean, var, count = _batch_statistics(clean, batch_sum)
        if running_mean is not None:
            with torch.no_grad():
                running_mean.lerp_(mean.detach().to(running_mean.dtype), momentum)
                running_var.lerp_((var.detach() * (count / (count - 1))).to(running_var.dtype), momentum)
    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale if bias is None else torch.addcmul(bias, mean, scale, value=-1)
    return scale, shift


def _batch_statistics(clean: Tensor, batch_sum: BatchSum | None) -> tuple[Tensor, Tensor, int | Tensor]:
    """Mean and (biased) variance of each channel, and the number of values they were taken over."""
    count = clean.numel() // clean.shape[1]
    if batch_sum is None and count < 2:
        raise UsageError(f"BatchNorm in training mode needs more than one value per channel, got {count}")
    var, mean = torch.var_mean(clean, dim=[0, *range(2, clean.dim())], correction=0)
    if batch_sum is None:
        return mean, var, count
    # In two sums, since E[x²] - E[x]² would lose digits.
    sums = batch_sum(torch.cat([count * mean, torch.full_like(mean[:1], count)]))
    whole_count = sums[-1]
    whole_mean = sums[:-1] / whole_count
    whole_var = batch_sum(count * (var + (mean - whole_mean).square())) / whole_count
    return whole_mean, whole_var, whole_count


def _settle_batch_norm(
    x: Ref, clean: Tensor | None, dims: int, batch_sum: BatchSum | None, *args: Any, **kwargs: Any
) -> tuple[Callable, tuple]:
    scale, shift = batch_norm_coefficients(clean, *args, **kwargs, batch_sum=batch_sum)
    channelwise = (1, -1) + (1,) * (dims - 2)
    return scale_shift, (x, scale.view(channelwise), shift.view(channelwise))


def _settle_dropout(
    x: Ref,
    clean: Tensor | None,
    dims: int,
    batch_sum: BatchSum | None,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
) -> tuple[Callable, tuple]:
    if not training or p == 0:
        return torch.mul, (x, 1.0)
    if batch_sum is not None:
        raise UsageError("Dropout would draw the same for every part of a batch: train in one process, or without it")
    if clean is None:
        raise UsageError("Dropout is active in training mode: pass clean=, or call model.eval()")
    return torch.mul, (x, F.dropout(torch.ones_like(clean), p, True))


SETTLED_BY_CLEAN: dict[Callable, Callable[..., tuple[Callable, tuple]]] = {
    F.batch_norm: _settle_batch_norm,
    F.dropout: _settle_dropout,
}


# --- spellings: modules, functions and methods, brought down to canonical functions --------------------------------


def _conv(m: Any) -> tuple[Any, ...]:
    if m.padding_mode != "zeros":
        raise UnsupportedOperation(f"{type(m).__name__} with padding_mode={m.padding_mode!r}: only 'zeros' has a rule")
    return m.weight, m.bias, m.stride, m.padding, m.dilation, m.groups


def _conv_transpose(m: Any) -> tuple[Any, ...]:
    return m.weight, m.bias, m.stride, m.padding, m.output_padding, m.groups, m.dilation


def _max_pool(m: Any) -> tuple[Any, ...]:
    if m.return_indices:
        raise UnsupportedOperation(f"{type(m).__name__} with return_indices=True has no rule")
    return m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode


def _batch_norm(m: Any) -> tuple[Any, ...]:
    momentum = m.momentum
    if m.training and m.track_running_stats and m.num_batches_tracked is not None:
        with torch.no_grad():
            m.num_batches_tracked.add_(1)
        if momentum is None:  # PyTorch's cumulative average
            momentum = 1.0 / float(m.num_batches_tracked)
    from_batch = m.training or m.running_mean is None
    return m.running_mean, m.running_var, m.weight, m.bias, from_batch, momentum, m.eps


def _nothing(m: Any) -> tuple[Any, ...]:
    return ()


MODULES: dict[type[nn.Module], tuple[Callable, Callable[[Any], tuple[Any, ...]]]] = {
    nn.Linear: (F.linear, lambda m: (m.weight, m.bias)),
    nn.Conv1d: (F.conv1d, _conv),
    nn.Conv2d: (F.conv2d, _conv),
    nn.ConvTranspose1d: (F.conv_transpose1d, _conv_transpose),
    nn.ConvTranspose2d: (F.conv_transpose2d, _conv_transpose),
    nn.BatchNorm1d: (F.batch_norm, _batch_norm),
    nn.BatchNorm2d: (F.batch_norm, _batch_norm),
    nn.ReLU: (F.relu, _nothing),
    nn.LeakyReLU: (F.leaky_relu, lambda m: (m.negative_slope,)),
    nn.Sigmoid: (torch.sigmoid, _nothing),
    nn.Tanh: (torch.tanh, _nothing),
    nn.MaxPool1d: (F.max_pool1d, _max_pool),
    nn.MaxPool2d: (F.max_pool2d, _max_pool),
    nn.AvgPool1d: (F.avg_pool1d, lambda m: (m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad)),
    nn.AvgPool2d: (
        F.avg_pool2d,
        lambda m: (m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, m.divisor_override),
    ),
    nn.AdaptiveAvgPool1d: (F.adaptive_avg_pool1d, lambda m: (m.output_size,)),
    nn.AdaptiveAvgPool2d: (F.adaptive_avg_pool2d, lambda m: (m.output_size,)),
    nn.Flatten: (torch.flatten, lambda m: (m.start_dim, m.end_dim)),
    nn.Unflatten: (Tensor.unflatten, lambda m: (m.dim, m.unflattened_size)),
    nn.Identity: (Tensor.contiguous, _nothing),
    nn.Dropout: (F.dropout, lambda m: (m.p, m.training)),
}

FUNCTIONS: dict[Callable, Callable] = {
    torch.relu: F.relu,
    torch.relu_: F.relu,
    F.leaky_relu_: F.leaky_relu,
    F.sigmoid: torch.sigmoid,
    torch.sigmoid_: torch.sigmoid,
    F.tanh: torch.tanh,
    torch.tanh_: torch.tanh,
    torch.max_pool1d: F.max_pool1d,
    torch.max_pool2d: F.max_pool2d,
    torch.dropout: F.dropout,
    operator.add: torch.add,
    operator.iadd: torch.add,
    operator.sub: torch.sub,
    operator.isub: torch.sub,
    torch.subtract: torch.sub,
    operator.mul: torch.mul,
    operator.imul: torch.mul,
    torch.multiply: torch.mul,
    operator.truediv: torch.div,
    operator.itruediv: torch.div,
    torch.divide: torch.div,
    operator.neg: torch.neg,
    torch.negative: torch.neg,
    torch.concat: torch.cat,
    torch.concatenate: torch.cat,
    torch.reshape: Tensor.reshape,
    torch.permute: Tensor.permute,
    torch.transpose: Tensor.transpose,
    torch.squeeze: Tensor.squeeze,
    torch.unsqueeze: Tensor.unsqueeze,
    torch.unflatten: Tensor.unflatten,
    torch.mean: Tensor.mean,
    torch.sum: Tensor.sum,
}

METHODS: dict[str, Callable] = {
    "relu": F.relu,
    "relu_": F.relu,
    "sigmoid": torch.sigmoid,
    "sigmoid_": torch.sigmoid,
    "tanh": torch.tanh,
    "tanh_": torch.tanh,
    "add": torch.add,
    "add_": torch.add,
    "sub": torch.sub,
    "sub_": torch.sub,
    "mul": torch.mul,
    "mul_": torch.mul,
    "div": torch.div,
    "div_": torch.div,
    "neg": torch.neg,
    "neg_": torch.neg,
    "flatten": torch.flatten,
    "view": Tensor.reshape,
    "reshape": Tensor.reshape,
    "permute": Tensor.permute,
    "transpose": Tensor.transpose,
    "squeeze": Tensor.squeeze,
    "unsqueeze": Tensor.unsqueeze,
    "unflatten": Tensor.unflatten,
    "contiguous": Tensor.contiguous,
    "mean": Tensor.mean,
    "sum": Tensor.sum,
    "size": Tensor.size,
    "dim": Tensor.dim,
    "numel": Tensor.numel,
}

WEIGHTED = (F.linear, F.conv1d, F.conv2d, F.conv_transpose1d, F.conv_transpose2d)
RESHAPING = (
    torch.flatten,
    operator.getitem,
    Tensor.reshape,
    Tensor.permute,
    Tensor.transpose,
    Tensor.squeeze,
    Tensor.unsqueeze,
    Tensor.unflatten,
    Tensor.contiguous,
    Tensor.mean,
    Tensor.sum,
    F.avg_pool1d,
    F.avg_pool2d,
    F.adaptive_avg_pool1d,
    F.adaptive_avg_pool2d,
)
AFFINE = {*WEIGHTED, *RESHAPING, F.batch_norm, F.dropout, torch.add, torch.sub, torch.mul, torch.div, torch.neg}
VIEWS = {torch.flatten, Tensor.reshape, Tensor.permute, Tensor.transpose, Tensor.squeeze, Tensor.unsqueeze,
         Tensor.unflatten, Tensor.contiguous, operator.getitem}  # fmt: skip
INSPECTIONS = {Tensor.size, Tensor.dim, Tensor.numel, getattr}  # answers do not depend on the values
INSPECTED_ATTRIBUTES = {"shape", "ndim", "dtype", "device"}
INPLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv, torch.relu_, F.leaky_relu_, torch.sigmoid_,
           torch.tanh_}  # fmt: skip


def table_entry(module: nn.Module) -> type[nn.Module] | None:
    """The class in MODULES whose computation `module` really runs: itself, or a base it inherits `forward` from."""
    for base in type(module).__mro__:
        if base in MODULES:
            overridden = any(getattr(type(module), m, None) is not getattr(base, m, None)
                             for m in ("forward", "_conv_forward"))  # fmt: skip
            return None if overridden else base
    return None


# --- recording -----------------------------------------------------------------------------------------------------


class _Proxy(fx.Proxy):
    """fx writes `x += y` down as an addition; that the old `x` is gone must be kept."""

    def _inplace(self, function: Callable, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self._inplace(operator.iadd, other)

    def __isub__(self, other: Any) -> fx.Proxy:
        return self._inplace(operator.isub, other)

    def __imul__(self, other: Any) -> fx.Proxy:
        return self._inplace(operator.imul, other)

    def __itruediv__(self, other: Any) -> fx.Proxy:
        return self._inplace(operator.itruediv, other)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return table_entry(m) is not None or (
            type(m).__module__.startswith("torch.nn") and not isinstance(m, (nn.Sequential, nn.ModuleList))
        )

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)


def _location(node: fx.Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = node.target if node.op == "call_module" else (stack[-1][0] if stack else "")
    return f"in module {path!r}" if path else "in the network's forward"


def _spelling(node: fx.Node, module: nn.Module | None) -> str:
    if module is not None:
        return type(module).__name__
    if node.op == "call_method":
        return f"Tensor.{node.target}"
    return getattr(node.target, "__name__", str(node.target))


def _record(node: fx.Node, model: nn.Module, args: tuple, kwargs: dict) -> Operation:
    """The operation for one fx node; `tracked` is still to be decided."""
    if node.op == "get_attr":
        *owner, name = node.target.split(".")
        module = model.get_submodule(".".join(owner))
        return Operation(getattr, (), {}, node.target, False, lambda: (module, name))
    if node.op == "call_module":
        module = model.get_submodule(node.target)
        where = f"{_spelling(node, module)} {_location(node)}"
        if module._forward_hooks or module._forward_pre_hooks:
            raise UnsupportedOperation(f"{where} has forward hooks, which bounds would not see; remove them")
        entry = table_entry(module)
        if entry is None:
            return Operation(type(module), args, kwargs, where, True)
        function, arguments = MODULES[entry]
        return Operation(function, args, kwargs, where, True, lambda: arguments(module))
    where = f"{_spelling(node, None)} {_location(node)}"
    if node.op == "call_method":
        function = METHODS.get(node.target, getattr(Tensor, node.target, None))
    else:
        function = FUNCTIONS.get(node.target, node.target)
    if function is getattr and args[1] not in INSPECTED_ATTRIBUTES:
        raise UnsupportedOperation(f"attribute {args[1]!r} of a tensor, {_location(node)}, has no rule")
    return Operation(function, args, {k: v for k, v in kwargs.items() if k != "inplace"}, where, True)


def _is_inplace(node: fx.Node, model: nn.Module) -> bool:
    if node.op == "call_module":
        return bool(getattr(model.get_submodule(node.target), "inplace", False))
    if node.op == "call_method":
        return node.target.endswith("_") and not node.target.endswith("__")
    return node.op == "call_function" and (node.target in INPLACE or bool(node.kwargs.get("inplace")))


class Transform(Protocol[V]):
    """How a walk through the network computes values of type V: tensors, boxes, or both at once.

    `settled` are the operations that `clean` turns into plain scalings before they are applied: SETTLED_BY_CLEAN, or
    those of them that the transform has no rule of its own for.
    """

    settled: Mapping[Callable, Callable[..., tuple[Callable, tuple]]]

    def apply(self, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> V: ...
    def clean(self, value: V) -> Tensor | None: ...
    def like(self, value: V) -> Tensor: ...


@dataclass(frozen=True)
class Graph(Generic[V]):
    """The operations of a network in order; operation 0 is its input, the one at `output` its result.

    `tail` has the indices of the affine operations that end the network, one after the other. `batch_sum` adds up
    BatchNorm's sums, where the inputs are only a part of the batch.
    """

    operations: tuple[Operation, ...]
    output: int
    tail: frozenset[int]
    batch_sum: BatchSum | None = None

    def run(self, value: V, transform: Transform[V], coefficients: Mapping[int, Coefficients] | None = None) -> V:
        """Walk through the network from `value`; intermediate values are freed after their last use.

        `coefficients` (by operation index) overrides the BatchNorms' own, see `clean_pass`.
        """
        values: dict[int, Any] = {0: value}
        self.advance(values, range(1, len(self.operations)), transform, coefficients or {})
        return values[self.output]

    def advance(
        self,
        values: dict[int, Any],
        indices: range,
        transform: Transform[V],
        coefficients: Mapping[int, Coefficients],
    ) -> None:
        """A part of the walk: the operations at `indices`, which read `values` and put their results there."""
        for index in indices:
            operation = self.operations[index]
            args, kwargs = map_leaves((operation.args, operation.kwargs), Ref, lambda ref: self._constant(ref, values))
            if operation.tracked:
                call = self._settle(index, operation, args, kwargs, values, transform, coefficients)
                args, kwargs = map_leaves((call.args, call.kwargs), Ref, lambda ref: values[ref.index])
                values[index] = transform.apply(call, args, kwargs)
            else:
                args = map_leaves(args, Ref, lambda ref: transform.like(values[ref.index]))
                values[index] = operation.function(*args, *operation.arguments(), **kwargs)
            for dead in operation.last_uses:
                del values[dead]

    def _constant(self, ref: Ref, values: Mapping[int, Any]) -> Any:
        return ref if self.operations[ref.index].tracked else values[ref.index]

    def _settle(
        self,
        index: int,
        operation: Operation,
        args: tuple,
        kwargs: dict,
        values: Mapping[int, Any],
        transform: Transform[V],
        coefficients: Mapping[int, Coefficients],
    ) -> Call:
        if index in coefficients:
            return Call(index, scale_shift, (args[0], *coefficients[index]), {}, operation.where)
        args = (*args, *operation.arguments())
        settle = transform.settled.get(operation.function)
        if settle is None:
            return Call(index, operation.function, args, kwargs, operation.where)
        value = values[args[0].index]
        clean, dims = transform.clean(value), transform.like(value).dim()
        function, args = settle(args[0], clean, dims, self.batch_sum, *args[1:], **kwargs)
        return Call(index, function, args, {}, operation.where)


def record_forward(model: nn.Module) -> fx.Graph:
    """What `model`'s forward does in its present mode, as torch.fx writes it down.

    Raises:
        UnsupportedOperation: control flow that depends on the input's values.
    """
    try:
        return _Tracer().trace(model)
    except (fx.proxy.TraceError, TypeError) as error:
        raise UnsupportedOperation(
            f"{type(model).__name__} cannot be traced: its forward must not branch or loop on the input ({error})"
        ) from error


def trace(model: nn.Module, batch_sum: BatchSum | None = None) -> Graph:
    """Record `model`'s forward in its present mode (train or eval).

    Raises:
        UnsupportedOperation: control flow that depends on the input's values, an in-place write into a view, forward
            hooks, a result that is not one tensor.
    """
    nodes = list(record_forward(model).nodes)
    operations: list[Operation] = []
    current: dict[fx.Node, Ref] = {}  # what a name means now: an in-place operation gives it a new meaning
    inputs = [node for node in nodes if node.op == "placeholder"]
    if len(inputs) != 1:
        raise UnsupportedOperation(f"the network must take one tensor, its forward takes {len(inputs)} arguments")
    for position, node in enumerate(nodes):
        if node.op == "output":
            result = node.args[0]
            if not isinstance(result, fx.Node):
                raise UnsupportedOperation("the network must return one tensor")
            output = current[result].index
            return Graph(_with_last_uses(operations, output), output, _affine_tail(operations, output), batch_sum)
        if node.op == "placeholder":
            operation = Operation(Tensor.contiguous, (), {}, "input", True)
        else:
            args, kwargs = map_leaves((tuple(node.args), dict(node.kwargs)), fx.Node, current.__getitem__)
            operation = _record(node, model, args, kwargs)
        operation = replace(operation, tracked=_is_tracked(operation, operations))
        current[node] = Ref(len(operations))
        operations.append(operation)
        if node.op != "placeholder" and _is_inplace(node, model):
            _rename(node, nodes[position + 1 :], current, operations)
    raise AssertionError("fx records an output for every forward")


def _affine_tail(operations: list[Operation], output: int) -> frozenset[int]:
    indices: list[int] = []
    index = output
    while index > 0 and operations[index].function in AFFINE:
        inputs = _tracked_inputs(operations[index], operations)
        if len(inputs) != 1:
            break
        indices.append(index)
        index = inputs[0].index
    return frozenset(indices)


def _tracked_inputs(operation: Operation, operations: list[Operation]) -> list[Ref]:
    refs = leaves((operation.args, operation.kwargs), Ref)
    return [ref for ref in refs if operations[ref.index].tracked]


def _is_tracked(operation: Operation, before: list[Operation]) -> bool:
    if operation.where == "input":
        return True
    return bool(_tracked_inputs(operation, before)) and operation.function not in INSPECTIONS


def _rename(node: fx.Node, later: list[fx.Node], current: dict[fx.Node, Ref], operations: list[Operation]) -> None:
    """After an in-place operation, its first argument's name means the new value."""
    written = node.args[0]
    overwritten, new = current[written], current[node]
    if operations[overwritten.index].function in VIEWS and overwritten.index > 0:
        bases = {ref.index for ref in leaves(operations[overwritten.index].args, Ref)}
        aliases = [other for other, ref in current.items() if ref.index in bases and other.op != "get_attr"]
        if any(alias in user.all_input_nodes for alias in aliases for user in later):
            raise UnsupportedOperation(
                f"{operations[new.index].where} writes in place into a view of a tensor that is used again"
            )
    for name, ref in list(current.items()):
        if ref == overwritten:
            current[name] = new


def _with_last_uses(operations: list[Operation], output: int) -> tuple[Operation, ...]:
    last_use = {ref.index: i for i, op in enumerate(operations) for ref in leaves((op.args, op.kwargs), Ref)}
    last_use.pop(output, None)
    return tuple(
        replace(op, last_uses=tuple(index for index, last in last_use.items() if last == i))
        for i, op in enumerate(operations)
    )
