"""A module, once, as a line of canonical calls.

torch.fx records what a network's `forward` does, hooks and subclasses' own forwards included; this file brings every
spelling down to the records of `operations`, gives names that were written in place their new meaning, and keeps
apart what depends on the network's input from what is computed from its buffers and shapes at every call.

What a recording cannot follow is refused: a branch on values, a write into shared memory that is read again, autocast
or no_grad inside. What can change after it (a Python attribute, a submodule, a mode) is in `structure_of`.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property

from certtrain.bounds.attention import attend
from certtrain.bounds.batch_norm import BatchSum
from certtrain.bounds.graph import Graph, Ref, Step, leaves, map_leaves, with_last_uses
from certtrain.bounds.operations.inspections import INSPECTED_ATTRIBUTES, INSPECTING_METHODS, INSPECTIONS
from certtrain.bounds.operations.products import padding_settings, pads_first
from certtrain.bounds.operations.record import (
    DECOMPOSITIONS,
    FUNCTIONS,
    METHODS,
    OPERATIONS,
    WRITES,
    Bind,
    Operation,
    module_decomposition,
    module_entry,
)
from certtrain.bounds.operations.softmax import LAST_FUNCTIONS
from certtrain.errors import CerttrainError, UnsupportedOperation
from certtrain.unchanged import unchanged

ROOT = "model"


class Root(nn.Module):
    """Calls the model, so that its own hooks are recorded too; constants that fx keeps go here, not into the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        return self.model(x)


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

    def __ipow__(self, other: Any) -> fx.Proxy:
        return self._inplace(operator.ipow, other)


def _ambient() -> tuple[bool, ...]:
    """What changes the meaning of an operation from outside."""
    return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # what is computed from a buffer is recorded, and computed again at every call

    def __init__(self) -> None:
        super().__init__()
        self._ambient = _ambient()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            module_entry(m) is not None
            or module_decomposition(m) is not None
            or (
                type(m).__module__.startswith("torch.nn")
                and not isinstance(m, nn.Sequential | nn.ModuleList)
                and "forward" not in vars(m)
            )
        )

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def iter(self, obj: Any) -> Iterator[fx.Proxy]:
        """`for part in x.chunk(3, 1)`: of tensors of a number that the call says."""
        node = obj.node
        if node.op == "call_module":  # whatever it is named
            module = self.root.get_submodule(str(node.target))
            return iter([obj[0], obj[1]]) if isinstance(module, nn.MultiheadAttention) else super().iter(obj)
        if node.target in (torch.chunk, "chunk"):
            return iter([obj[i] for i in range(node.args[1] if len(node.args) > 1 else node.kwargs["chunks"])])
        sizes = node.args[1] if len(node.args) > 1 else None
        if node.target in (torch.split, "split") and isinstance(sizes, list | tuple):
            return iter([obj[i] for i in range(len(sizes))])
        return super().iter(obj)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _ambient() != self._ambient:
            raise UnsupportedOperation(
                "a part of the network runs under torch.autocast or no_grad of its own, which bounds would not follow"
            )
        return super().create_node(*args, **kwargs)


class _OwnTensors(TorchFunctionMode):
    """Records what a forward computes from the network's parameters and buffers, however it came by them.

    fx does so for `self.weight`; `next(self.parameters())`, `self._buffers["w"]` or a state dict give it the tensor of
    today, and what is computed from that would be a constant.
    """

    def __init__(self, tracer: fx.Tracer, root: nn.Module) -> None:
        super().__init__()
        self._tracer = tracer
        self._paths = {id(tensor): path for path, tensor in chain(root.named_parameters(), root.named_buffers())}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        property_of = getattr(func, "__self__", None) if name in ("__get__", "__set__") else None
        shows = property_of is not None and property_of.__name__ not in _VALUED_PROPERTIES
        if shows or name in _SHOWING or not any(id(tensor) in self._paths for tensor in leaves((args, kwargs), Tensor)):
            return func(*args, **kwargs)
        args, kwargs = map_leaves((args, kwargs), Tensor, self._stand_in)
        if property_of is not None:
            return getattr(args[0], property_of.__name__)
        if is_tensor_method_or_property(func):
            return getattr(args[0], name)(*args[1:], **kwargs)
        return func(*args, **kwargs)

    def _stand_in(self, tensor: Tensor) -> Any:
        path = self._paths.get(id(tensor))
        return tensor if path is None else self._tracer.create_proxy("get_attr", path, (), {})


_VALUED_PROPERTIES = {"T", "mT", "H", "mH", "data", "real", "imag"}
_SHOWING = INSPECTING_METHODS | {"__len__", "__hash__", "__repr__", "__format__", "__dir__", "is_floating_point"}


def record_forward(model: nn.Module) -> tuple[Root, fx.Graph]:
    """What `model`'s forward does in its present mode, as torch.fx writes it down, and the root of its targets.

    Raises:
        UnsupportedOperation: control flow that depends on the input's values, or whatever the forward raises.
    """
    root, tracer = Root(model), _Tracer()
    try:
        with unchanged(model), _OwnTensors(tracer, root):
            return root, tracer.trace(root)
    except CerttrainError:
        raise
    except Exception as error:  # of the user's forward, met with a stand-in for its input: of any type
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        asks = isinstance(error, TraceError)
        fault = "must not branch or loop on the input" if asks else "fails with a stand-in for the input"
        raise UnsupportedOperation(
            f"{type(model).__name__} cannot be traced: its forward {fault} ({reason})"
        ) from error


def trace(model: nn.Module, batch_sum: BatchSum | None = None) -> Graph:
    """Record `model`'s forward in its present mode (train or eval).

    A softmax or log-softmax over the classes that ends the network is left out (`Graph.head`): it keeps the order of
    the logits, and margins are those of the logits.

    Raises:
        UnsupportedOperation: see the head of this file; an operation without a record; hooks on a layer.
    """
    model = getattr(model, "_orig_mod", model)  # of a compiled module
    return _Recorder(model).graph(batch_sum)


class _Parts:
    """The tensors an operation returns; each is recorded as it is asked for."""

    def __init__(self, operation: Operation, args: tuple[Any, ...], where: str) -> None:
        self.operation, self.args, self.where = operation, args, where


class _Recorder:
    """Goes through fx's nodes in order and writes down steps.

    `current` says what a node means now: a step, its parts, or (an alias) another node's step. `memory` numbers the
    storage a node's tensor may share: a write into one of a group changes, or may change, all of it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.root, graph = record_forward(model)
        self.nodes = list(graph.nodes)
        self.steps: list[Step] = []
        self.current: dict[fx.Node, Any] = {}
        self.memory: dict[fx.Node, int] = {}
        self.where = ""

    def graph(self, batch_sum: BatchSum | None) -> Graph:
        for position, node in enumerate(self.nodes):
            self.where = f"{_spelling(node, self.root)} {_location(node)}"
            if node.op == "output":
                return self._finish(node, batch_sum)
            if node.op == "placeholder":
                self.current[node] = self._append(Step(Tensor.contiguous, (), "input", OPERATIONS[Tensor.contiguous]))
            elif node.op == "get_attr":
                self.current[node] = self._append(_attribute(self.root, str(node.target)))
            elif node.users or _writes(node, self.root):
                self._record(node, self.nodes[position + 1 :])
            self.memory.setdefault(node, len(self.memory))
        raise AssertionError("fx records an output for every forward")

    def _append(self, step: Step) -> Ref:
        self.steps.append(step)
        return Ref(len(self.steps) - 1)

    def _is_value(self, ref: Any) -> bool:
        return isinstance(ref, _Parts) or (isinstance(ref, Ref) and self.steps[ref.index].tracked)

    def _depends_on_input(self, structure: Any) -> bool:
        return any(map(self._is_value, leaves(structure, Ref) + leaves(structure, _Parts)))

    def _record(self, node: fx.Node, later: list[fx.Node]) -> None:
        args, kwargs = map_leaves((tuple(node.args), dict(node.kwargs)), fx.Node, self.current.__getitem__)
        writes = _writes(node, self.root)
        if not self._depends_on_input((args, kwargs)):
            if writes:
                raise UnsupportedOperation(f"{self.where} writes into the network's own state")
            self.current[node] = self._append(Step(_callable(node, self.root), args, self.where, kwargs=kwargs))
            return
        self.current[node] = self._value(node, args, kwargs)
        read = [other for other in node.all_input_nodes if self._is_value(self.current[other])]
        if read and self._may_share(node):
            self.memory[node] = self.memory[read[0]]
        if writes:
            self._rename(node, read[0], later)

    def _may_share(self, node: fx.Node) -> bool:
        meaning = self.current[node]
        if isinstance(meaning, tuple):
            return False
        if isinstance(meaning, _Parts) or meaning in [self.current[other] for other in node.all_input_nodes]:
            return True
        operation = self.steps[meaning.index].operation
        return operation is not None and operation.view

    def _value(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if node.op == "call_module":
            return self._run(self.root.get_submodule(str(node.target)), args, kwargs)
        target = node.target
        if target is operator.getitem and isinstance(args[0], _Parts):
            return self._part(args[0], args[1])
        if target is operator.getitem and isinstance(args[0], tuple):
            return args[0][args[1]]
        if target is getattr:
            return self._attribute_of_value(*args)
        if target in INSPECTIONS or (node.op == "call_method" and target in INSPECTING_METHODS):
            return self._append(Step(_callable(node, self.root), args, self.where, kwargs=kwargs))
        if target in DECOMPOSITIONS:
            return _bound(partial(DECOMPOSITIONS[target], self.call), args, kwargs, self.where)
        entry = _entry(node)
        if entry is None:
            return self._append(Step(_callable(node, self.root), args, self.where, _without_rule(), kwargs=kwargs))
        operation, bind = entry
        return self._operation(operation, _bound(bind, args, kwargs, self.where))

    def call(self, function: Callable, *args: Any) -> Any:
        """Record one operation, by its canonical function and arguments; what a decomposition is written with."""
        if not self._depends_on_input(args) or function in INSPECTIONS:
            return self._append(Step(function, args, self.where))
        if function in DECOMPOSITIONS:
            return DECOMPOSITIONS[function](self.call, *args)
        if function in OPERATIONS:
            return self._operation(OPERATIONS[function], args)
        if function not in FUNCTIONS:
            raise UnsupportedOperation(f"{self.where}: {getattr(function, '__name__', function)} has no rule")
        operation, bind = FUNCTIONS[function]
        return self._operation(operation, bind(*args))

    def parameter(self, module: nn.Module, name: str) -> Ref | None:
        """See `ModuleCalls`."""
        if getattr(module, name) is None:
            return None
        return self._append(_parameter(module, name, f"{name} of {self.where}"))

    def run(self, module: nn.Module, *args: Any) -> Any:
        return self._run(module, args, {})

    def _operation(self, operation: Operation, args: tuple[Any, ...], module: nn.Module | None = None,
                   arguments: Callable[[], tuple[Any, ...]] = tuple) -> Any:  # fmt: skip
        if operation.parts:
            return _Parts(operation, args, self.where)
        if operation.identity is not None and operation.identity(*args, *arguments()):
            return args[0]
        if operation.function is torch.matmul and self._is_distribution(args[0]):
            operation = OPERATIONS[attend]
        # A module's own weights are constants; they are read when they are needed, since reading a BatchNorm counts it.
        operands = (*args, *[None] * operation.operands)[: operation.operands]
        affine = operation.affine.holds([self._depends_on_input([operand]) for operand in operands])
        return self._append(Step(operation.function, args, self.where, operation, affine, arguments, module=module))

    def _is_distribution(self, ref: Any) -> bool:
        """Is it a softmax over its last axis?"""
        step = self.steps[ref.index] if isinstance(ref, Ref) else None
        if step is None or step.function is not torch.softmax:
            return False
        return (*step.args, *step.arguments())[1] == -1

    def _part(self, parts: _Parts, index: Any) -> Any:
        if not isinstance(index, int):
            raise UnsupportedOperation(f"{self.where}: parts of a tensor are taken one by one")
        args = (*parts.args, index)
        affine = parts.operation.affine.holds([True])
        return self._append(Step(parts.operation.function, args, parts.where, parts.operation, affine))

    def _run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if module._forward_hooks or module._forward_pre_hooks:
            raise UnsupportedOperation(f"{self.where} has forward hooks, which bounds would not see; remove them")
        decomposition = module_decomposition(module)
        if decomposition is not None:
            return _bound(partial(decomposition, self, module), args, kwargs, self.where)
        entry = module_entry(module)
        if entry is None:
            return self._append(Step(type(module), args, self.where, _without_rule(), kwargs=kwargs))
        operation, read = entry
        given = (*args, *kwargs.values())
        if len(given) != 1:
            raise UnsupportedOperation(f"{self.where} is called with {len(given)} arguments, its rule is for one")
        if pads_first(module):
            padding = OPERATIONS[F.pad]
            given = (self._operation(padding, given, module, lambda: padding_settings(module)),)
        return self._operation(operation, given, module, lambda: read(module))

    def _attribute_of_value(self, value: Any, name: str) -> Any:
        if name == "mT":
            return self.call(Tensor.transpose, value, -2, -1)
        if name not in INSPECTED_ATTRIBUTES:
            raise UnsupportedOperation(f"attribute {name!r} of a tensor, {self.where.partition(' ')[2]}, has no rule")
        return self._append(Step(getattr, (value, name), self.where))

    def _rename(self, node: fx.Node, written: fx.Node, later: list[fx.Node]) -> None:
        """After a write, every name of the very tensor means the new value; other names of its memory must be dead."""
        first = node.args[0] if node.args else node.kwargs.get("input")
        if node.op != "call_module" and first is not written:
            raise UnsupportedOperation(f"{self.where} writes into what does not depend on the input")
        old, new = self.current[written], self.current[node]
        group = self.memory[written]
        self.memory[node] = group
        for other in [other for other, number in self.memory.items() if number == group and other is not node]:
            if self.current[other] == old:
                self.current[other] = new
            elif any(other in user.all_input_nodes for user in later):
                raise UnsupportedOperation(
                    f"{self.where} writes in place into a view of a tensor, or a tensor with views, that is used again"
                )

    def _finish(self, node: fx.Node, batch_sum: BatchSum | None) -> Graph:
        result = node.args[0]
        if not isinstance(result, fx.Node):
            raise UnsupportedOperation("the network must return one tensor")
        output = self.current[result]
        if not self._is_value(output) or isinstance(output, _Parts):
            raise UnsupportedOperation("the network must return one tensor that depends on its input")
        head = None
        last = self.steps[output.index]
        if last.operation is not None and last.operation.function in LAST_FUNCTIONS:
            (values, dim), head = (*last.args, *last.arguments())[:2], last.operation.function
            if dim not in (1, -1):
                raise UnsupportedOperation(f"{last.where} over axis {dim}, which is not the classes', has no rule")
            output = values
        steps = self.steps[: output.index + 1]
        return Graph(
            with_last_uses(steps, output.index), output.index, _affine_tail(steps, output.index), batch_sum, head
        )


def _bound(bind: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], where: str) -> Any:
    try:
        return bind(*args, **kwargs)
    except TypeError as error:
        reason = str(error).replace("<lambda>()", "it").replace("_bind_", "").replace("_decompose_", "")
        raise UnsupportedOperation(f"{where} has no rule with these arguments: {reason}") from error
    except UnsupportedOperation as error:
        if str(error).startswith(where):  # of an operation within a decomposition
            raise
        raise UnsupportedOperation(f"{where}: {error}") from error


def _affine_tail(steps: list[Step], output: int) -> frozenset[int]:
    indices: list[int] = []
    index = output
    while index > 0 and steps[index].affine:
        inputs = {ref.index for ref in leaves(steps[index].args, Ref) if steps[ref.index].tracked}
        if len(inputs) != 1:
            break
        indices.append(index)
        (index,) = inputs
    return frozenset(indices)


def _attribute(root: nn.Module, path: str) -> Step:
    """A parameter, buffer or tensor of a module, read off it at every call."""
    *owner, name = path.split(".")
    module = root.get_submodule(".".join(owner))
    return _parameter(module, name, path.removeprefix(f"{ROOT}."))


def _parameter(module: nn.Module, name: str, where: str) -> Step:
    return Step(getattr, (), where, arguments=lambda: (module, name), module=module)


def _entry(node: fx.Node) -> tuple[Operation, Bind] | None:
    if node.op == "call_method":
        name = str(node.target)
        return METHODS.get(name) or METHODS.get(name.removesuffix("_"))
    return FUNCTIONS.get(node.target)  # type: ignore[arg-type]


def _callable(node: fx.Node, root: nn.Module) -> Callable[..., Any]:
    if node.op == "call_method":
        return Method(str(node.target))
    return root.get_submodule(str(node.target)) if node.op == "call_module" else node.target  # type: ignore[return-value]


@dataclass(frozen=True)
class Method:
    """A method of tensors, called on its first argument."""

    name: str

    def __call__(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(value, self.name)(*args, **kwargs)


def record_of(function: Callable[..., Any]) -> Operation | None:
    """The record that a function of constants is a spelling of."""
    table = METHODS if isinstance(function, Method) else FUNCTIONS
    entry = table.get(function.name if isinstance(function, Method) else function)  # type: ignore[arg-type]
    return None if entry is None else entry[0]


def _without_rule() -> Operation:
    """Stands for an operation that has no record, until its absence is reported."""
    return Operation(NO_RULE, lambda *args: args)


def NO_RULE(*args: Any) -> Any:
    raise AssertionError("an operation without a record is refused before it is walked")


def _writes(node: fx.Node, root: nn.Module) -> bool:
    if node.op == "call_module":
        return bool(getattr(root.get_submodule(str(node.target)), "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.op != "call_function":
        return False
    given = _arguments(node)
    asked = bool(given.get("inplace")) or given.get("out") is not None
    return asked or node.target in WRITES or node.target is operator.setitem


def _arguments(node: fx.Node) -> dict[str, Any]:
    """What a function is called with, by name; by keyword alone if it has no signature, as builtins have none."""
    try:
        return dict(inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return dict(node.kwargs)


def _location(node: fx.Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(node.target) if node.op == "call_module" else (stack[-1][0] if stack else "")
    path = path.removeprefix(ROOT).removeprefix(".")
    return f"in module {path!r}" if path else "in the network's forward"


def _spelling(node: fx.Node, root: nn.Module) -> str:
    if node.op == "call_module":
        return type(root.get_submodule(str(node.target))).__name__
    if node.op == "call_method":
        return f"Tensor.{node.target}"
    return getattr(node.target, "__name__", str(node.target))


# --- has the module changed since it was recorded? --------------------------------------------------------------------


def structure_of(model: nn.Module) -> tuple[Any, ...]:
    """Everything a recording has frozen: submodules, modes, hooks, which parameters and buffers there are, of what
    shape and type, and all other attributes, of the modules and of their classes.
    """
    return tuple(
        (
            name,
            _Same(module),
            type(module),
            module.training,
            _frozen(module._forward_hooks),
            _frozen(module._forward_pre_hooks),
            tuple((key, _kind(value)) for key, value in (module._parameters | module._buffers).items()),
            tuple((key, _frozen(value)) for key, value in vars(module).items() if key not in _LIVE),
            tuple(_class_attributes(type(module))),
        )
        for name, module in model.named_modules(remove_duplicate=False)
    )


def _kind(parameter: Tensor | None) -> Any:
    """What a forward may ask of a parameter while it is traced; its values are read at every call."""
    return None if parameter is None else (parameter.shape, parameter.dtype)


def _class_attributes(kind: type[nn.Module]) -> Iterator[tuple[str, Any]]:
    for base in kind.__mro__:
        if base is nn.Module:
            return
        if base.__module__.startswith("torch.nn."):
            yield "forward", _Same(vars(base).get("forward"))
        else:
            yield from ((key, _frozen(value)) for key, value in vars(base).items() if not key.startswith("__"))


_LIVE = frozenset(vars(nn.Module())) | {"training"}
_WITHOUT_STATE = (nn.Module, type, ModuleType, FunctionType, MethodType, BuiltinFunctionType)
"""Objects whose attributes are not looked into: modules are, on their own."""


class _Same:
    """Equal to what is the very same object, which stays alive, so that no other takes its place in memory."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]


def _frozen(value: Any, depth: int = 3, inside: tuple[int, ...] = ()) -> Any:
    """`value` as it is now, so far that a change shows; of objects `depth`, one inside the other, are looked into.

    inside: containers that it lies in, of which it may be one itself.
    """
    if value is None or isinstance(value, int | float | str | bool):
        return value
    if isinstance(value, Tensor):
        return _Same(value), value._version
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if id(value) in inside:
        return None
    if isinstance(value, list | tuple | set | frozenset):
        return tuple(_frozen(item, depth, (*inside, id(value))) for item in value)
    if isinstance(value, dict):
        return tuple((key, _frozen(item, depth, (*inside, id(value)))) for key, item in value.items())
    if depth and not isinstance(value, _WITHOUT_STATE):
        return _Same(value), tuple((key, _frozen(item, depth - 1)) for key, item in _state_of(value))
    return _Same(value)


def _state_of(value: Any) -> Iterator[tuple[str, Any]]:
    """The attributes of an object, wherever they are kept."""
    own = getattr(value, "__dict__", None)
    yield from own.items() if isinstance(own, dict) else ()
    for base in type(value).__mro__:
        slots = vars(base).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                yield name, getattr(value, name)
