"""A module, once, as a line of canonical calls.

`forward.py` records what a network's `forward` does; this file brings every spelling down to the records of
`operations`, gives names that were written in place their new meaning, and keeps apart what depends on the network's
input from what is computed from its buffers and shapes at every call.

What cannot be followed is refused: a branch on values, a write into shared memory that is read again, autocast or
no_grad inside. What can change after it (a Python attribute, a submodule, a mode) is in `structure.py`.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from certtrain.bounds.attention import attend
from certtrain.bounds.batch_norm import BatchSum
from certtrain.bounds.cuts import cuts
from certtrain.bounds.forward import ROOT, record_forward
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
from certtrain.errors import UnsupportedOperation


def _refuse_parallel(module: nn.Module, where: str) -> None:
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise UnsupportedOperation(f"{where} only spreads a network over devices: give the network inside, its .module")


def trace(model: nn.Module, batch_sum: BatchSum | None = None) -> Graph:
    """Record `model`'s forward in its present mode (train or eval).

    A softmax or log-softmax over the classes that ends the network is left out (`Graph.final_softmax`): it keeps the
    order of the logits, and margins are those of the logits.

    Raises:
        UnsupportedOperation: see the head of this file; an operation without a record; hooks on a layer.
    """
    model = getattr(model, "_orig_mod", model)  # of a compiled module
    _refuse_parallel(model, type(model).__name__)
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
        _refuse_parallel(module, self.where)
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
        final_softmax = None
        last = self.steps[output.index]
        if last.operation is not None and last.operation.function in LAST_FUNCTIONS:
            (values, dim), final_softmax = (*last.args, *last.arguments())[:2], last.operation.function
            if dim not in (1, -1):
                raise UnsupportedOperation(f"{last.where} over axis {dim}, which is not the classes', has no rule")
            output = values
        steps = self.steps[: output.index + 1]
        told = with_last_uses(steps, output.index)
        return Graph(told, output.index, _affine_tail(steps, output.index), cuts(steps), batch_sum, final_softmax)


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
