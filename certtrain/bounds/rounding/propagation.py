"""A box walks through a network in a deployed arithmetic, and margins are taken of what comes out."""

from __future__ import annotations

import operator
from dataclasses import replace
from functools import reduce
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from certtrain.bounds.attention import attend
from certtrain.bounds.batch_norm import SETTLED_BY_CLEAN
from certtrain.bounds.box import Box
from certtrain.bounds.graph import Call, Graph, Ref, Step, leaves, map_leaves
from certtrain.bounds.joint_pass import is_layer
from certtrain.bounds.margins import check_labels, only_finite
from certtrain.bounds.operations.inspections import INSPECTED_ATTRIBUTES, INSPECTING_METHODS, INSPECTIONS, MAKERS
from certtrain.bounds.operations.products import WEIGHTED
from certtrain.bounds.operations.record import OPERATIONS
from certtrain.bounds.results import Bounds
from certtrain.bounds.rounding.arithmetic import Arithmetic, arithmetic_named, inflation, rounded_up, sum_error
from certtrain.bounds.rounding.boxes import OutwardBox, down, outward, unbounded_unless, widened
from certtrain.bounds.rounding.rules import Sum, largest_of, sum_range, terms_of
from certtrain.bounds.rounding.table import EXACT, EXACT_METHODS, RULES
from certtrain.bounds.shapes import flattened, per_image
from certtrain.bounds.tracing import Method, record_of
from certtrain.errors import UnsupportedOperation
from certtrain.runtime.precision import plain_convolutions


class SoundPass:
    """Walks a box through the network in a deployed arithmetic (a `graph.Transform`)."""

    settled: ClassVar = {
        function: settle for function, settle in SETTLED_BY_CLEAN.items() if function is not F.batch_norm
    }

    def __init__(self, arithmetic: Arithmetic, graph: Graph[OutwardBox]) -> None:
        self.arithmetic, self.graph = arithmetic, graph
        self._foldings = foldings_of(graph)
        self._sums: dict[int, Sum | None] = {}  # that made a value, where a linear map did
        self.entering: OutwardBox | None = None
        self._excess: dict[int, Tensor] = {}  # of a softmax: how far its sums can be from 1
        self.relu_inputs: list[OutwardBox] = []
        self.affine_input: OutwardBox | None = None
        self.classifier: tuple[Call, OutwardBox] | None = None  # with what enters it

    def apply(self, call: Call, args: tuple[Any, ...]) -> OutwardBox:
        if call.function not in RULES:
            raise UnsupportedOperation(f"{call.where} has no sound rule: its rounding errors are not known")
        args = map_leaves(args, Tensor, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
        if OPERATIONS[call.function].rectifies:
            self.relu_inputs.append(args[0])
        if is_layer(call):
            self.affine_input = self.affine_input or leaves(args, OutwardBox)[0]
        if call.function in WEIGHTED:
            self._follow_sums(call, args)
        elif call.function in EXACT:
            self._sums[call.index] = self._sums.get(call.args[0].index)
        result = self.result(call, args)
        if call.function is F.batch_norm:
            result, self._sums[call.index] = result
        elif call.function is torch.softmax:
            result, self._excess[call.index] = result
        if not call.affine:
            result = _unknown_from_unknown(call, args, result)
        self.keep(call, args, result)
        return result

    def keep(self, call: Call, args: tuple[Any, ...], result: OutwardBox) -> None:
        """For walks that look at more; `args`: with boxes in the place of values, and constants in float64."""

    def result(self, call: Call, args: tuple[Any, ...]) -> Any:
        """What the rule of an operation says, for BatchNorm and softmax with what others must know."""
        keywords: dict[str, Any] = {}
        if call.function in WEIGHTED:
            keywords["foldings"] = self._foldings.get(call.index, 1)
        elif call.function is F.batch_norm:
            keywords["preceding"] = self._sums.get(call.args[0].index)
        elif call.function is attend:
            keywords["excess"] = self._excess[call.args[0].index]
        return RULES[call.function](self.arithmetic, *args, **keywords)

    def _follow_sums(self, call: Call, args: tuple[Any, ...]) -> None:
        x, weight, bias = args[:3]
        if call.function is F.linear and call.index == self.graph.output and x.like.dim() == 2:
            self.classifier = replace(call, args=args), x
        self._sums[call.index] = Sum(
            terms_of(call.function, weight),
            self._foldings.get(call.index, 1),
            largest_of(x.magnitude),
            weight.abs().sum(),
            weight.new_zeros(()) if bias is None else bias.abs().amax(),
        )

    def clean(self, value: OutwardBox) -> None:
        return None

    def like(self, value: OutwardBox) -> Tensor:
        return value.like


def _unknown_from_unknown(call: Call, args: tuple[Any, ...], result: OutwardBox) -> OutwardBox:
    """What has overflowed may be no number, which no comparison brings back between two ends.

    Sums and products of it are unbounded by themselves. Of what is neither elementwise nor these, whole images are.
    """
    finite = [box.radius.isfinite() for box in leaves(args, OutwardBox)]
    if not OPERATIONS[call.function].elementwise:
        finite = [per_image(flattened(each, 1).all(1), result.like) for each in finite]
    known = reduce(torch.logical_and, finite)
    return unbounded_unless(known, result)


def foldings_of(graph: Graph[Any]) -> dict[int, int]:
    """How many BatchNorms follow each linear map, with nothing but moved elements in between."""
    origins: dict[int, tuple[int, int]] = {}  # of a value: the linear map that made it, and the BatchNorms since
    foldings: dict[int, int] = {}
    for index, step in enumerate(graph.steps):
        if step.function in WEIGHTED:
            origins[index] = index, 0
        elif step.function in EXACT | {F.batch_norm} and step.args and isinstance(step.args[0], Ref):
            origin = origins.get(step.args[0].index)
            if origin is not None:
                linear, since = origin[0], origin[1] + (step.function is F.batch_norm)
                origins[index] = linear, since
                foldings[linear] = max(foldings.get(linear, 0), since)
    return foldings


@torch.no_grad()
def run_sound_pass(walk: SoundPass, box: Box) -> Bounds:
    """`propagate` by a walk that may look at more.

    Args:
        walk: through the network that it was made for; not one that has run.
        box: (B, ...), as `propagate` takes it.

    Returns:
        As `propagate`. What the walk has kept is then of this box.
    """
    graph = walk.graph
    _require_stored_constants(graph)
    if graph.final_softmax is not None:
        raise UnsupportedOperation(
            "a softmax as the last operation, which may round two classes to a tie, has no sound rule"
        )
    a, entering = walk.arithmetic, outward(box)
    entering = widened(entering, rounded_up(a.stored), entering.magnitude, a) if a.stored else entering
    walk.entering = entering
    with plain_convolutions():
        output = graph.run(entering, walk)
    tail, tail_input = ((walk.classifier[0],), walk.classifier[1]) if walk.classifier else ((), output)
    return Bounds(
        clean=None,
        output=output,
        relu_inputs=tuple(walk.relu_inputs),
        affine_input=walk.affine_input or entering,
        tail=tail,
        tail_input=tail_input,
        covers_rounding=True,
    )


def propagate(graph: Graph[OutwardBox], box: Box, arithmetic: str) -> Bounds:
    """Bounds that no value computed in `arithmetic` leaves, for any input in `box`; see the head of `rounding`.

    Args:
        graph: of a network in eval mode.
        box: (B, ...), taken as it is: use `enclosing_linf_box` for one that rounding has not made smaller.
        arithmetic: a name of ARITHMETICS.

    Returns:
        Bounds, their boxes float64; `tail` holds the last linear layer if the network ends with one. Where a value
        might overflow its box is infinite, and so are all that follow.

    Raises:
        UsageError: unknown arithmetic, or a network in training mode.
        UnsupportedOperation: an operation without a rule, or a parameter that is computed from others.
    """
    return run_sound_pass(SoundPass(arithmetic_named(arithmetic), graph), box)


@torch.no_grad()
def margins_of(bounds: Bounds, labels: Tensor, arithmetic: str) -> Tensor:
    """Eq. 8: lower bounds (B, K), float64, of the computed logits' z_y - z_j; 0 in column y, -inf where none is known.

    Args:
        bounds: of `propagate`, in the same arithmetic.
        labels: (B,) int64, the classes y.
    """
    check_labels(labels, *bounds.output.shape)
    own = labels[:, None]
    if not bounds.tail:
        output = bounds.output
        lower = down(output.lower.gather(1, own) - output.upper)
    else:
        a = arithmetic_named(arithmetic)
        (classifier,), x = bounds.tail, outward(bounds.tail_input)
        _, weight, bias = classifier.args
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        terms, magnitude = weight.shape[1], x.magnitude
        underflow, fits = sum_range(a, terms, weight.abs().sum(), bias, magnitude)
        difference = weight[labels][:, None, :] - weight
        center = torch.einsum("bki,bi->bk", difference, x.center) + (bias[labels][:, None] - bias)
        reach = torch.einsum("bki,bi->bk", difference.abs(), x.radius)
        sizes = F.linear(magnitude, weight.abs(), bias.abs())
        error = sum_error(a, terms) * (sizes.gather(1, own) + sizes) + 2 * underflow[:, None]
        lower = down(center - (reach + error) * inflation(terms))
        lower = torch.where(fits[:, None], lower, -torch.inf)
    return only_finite(lower, labels)


def _require_stored_constants(graph: Graph[Any]) -> None:
    """Parameters are as they are stored: what is computed from them alone is rounded too, which no rule here covers.

    So is what is computed from tensors that the forward makes. Sizes, and numbers computed from them, are exact.
    """
    tensors: set[int] = set()
    for index, step in enumerate(graph.steps):
        if step.module is not None:
            _require_stored(step)
        if step.tracked:
            continue
        name = step.function.name if isinstance(step.function, Method) else step.function
        if (name is getattr and not step.read) or (name in MAKERS and "dtype" not in (step.kwargs or {})):
            tensors.add(index)
        elif step.read & tensors:
            if _moves_constants(step, name):
                tensors.add(index)
            elif not _is_inspection(step, name):
                raise UnsupportedOperation(f"{step.where} computes with parameters alone: it has no sound rule")
        elif not (_is_inspection(step, name) or getattr(step.function, "__module__", None) == operator.mul.__module__):
            raise UnsupportedOperation(f"{step.where} makes a tensor in the forward: it has no sound rule")


def _is_inspection(step: Step, name: Any) -> bool:
    """The result is no tensor."""
    if name is getattr:
        return step.args[1] in INSPECTED_ATTRIBUTES
    return name not in MAKERS and name in INSPECTIONS | INSPECTING_METHODS


def _moves_constants(step: Step, name: Any) -> bool:
    if name is getattr:
        return step.args[1] in ("T", "mT")
    operation = record_of(step.function)
    return name in EXACT_METHODS if operation is None else operation.function in EXACT


def _require_stored(step: Step) -> None:
    module = step.module
    assert module is not None
    names = [step.arguments()[1]] if step.function is getattr else ["weight", "bias", "running_mean", "running_var"]
    for name in names:
        is_own = name in module._parameters or name in module._buffers or name in vars(module)
        if name.startswith("_tensor_constant"):
            raise UnsupportedOperation(
                f"{step.where}: a tensor made in the forward has no sound rule; make it a buffer"
            )
        if not is_own and isinstance(getattr(module, name, None), Tensor):
            raise UnsupportedOperation(
                f"{step.where}: {name} is computed from other parameters, whose rounding no rule covers"
            )
