"""BoundedModel: a network that can be asked what it does to whole sets of inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from certtrain.bound_methods import BRANCH_AND_BOUND, METHODS, STAGES
from certtrain.bounds import interval, joint_pass
from certtrain.bounds.batch_norm import SETTLED_BY_CLEAN, BatchSum, Coefficients, scale_shift
from certtrain.bounds.box import EMPTY, Box, refuse_empty
from certtrain.bounds.graph import Call, Cut, Graph
from certtrain.bounds.linear import AlphaOptions, Tightening, alpha_margins, crown_margins, tightened
from certtrain.bounds.margins import better, check_labels, merged_margins, only_finite, proved
from certtrain.bounds.memory import Footprint
from certtrain.bounds.recording import PointWalk, check_recording, try_on_copy
from certtrain.bounds.results import Bounds, Record
from certtrain.bounds.rounding import propagation as sound
from certtrain.bounds.rounding.backward import propagate_recorded
from certtrain.bounds.segments import propagate_in_segments
from certtrain.bounds.structure import structure_of
from certtrain.bounds.tracing import trace
from certtrain.errors import UnsupportedOperation, UsageError, unknown
from certtrain.modules import device_of, evaluating

if TYPE_CHECKING:
    from certtrain.verification.branch_and_bound import Search

DEFAULT_ALPHA = AlphaOptions()


@dataclass(frozen=True)
class _Recording:
    """The steps of a network in one of its modes, what it was made of then, and other shapes of an input it takes."""

    structure: tuple[Any, ...]
    graph: Graph[Any]
    shapes: set[torch.Size] = field(default_factory=set)


@dataclass(frozen=True)
class CleanPass:
    """The logits (B, K) of a clean batch, and the BatchNorm coefficients that batch gives, both with gradient."""

    output: Tensor
    coefficients: Mapping[int, Coefficients]


@dataclass(frozen=True)
class Split:
    """A network in two: everything up to the value at the cut, and the tail behind it."""

    graph: Graph[Any]
    cut: Cut

    def tail(self, x: Tensor, coefficients: Mapping[int, Coefficients]) -> Tensor:
        """The logits (B, K) that follow from values (B, ...) at the cut, with these BatchNorm coefficients."""
        values: dict[int, Any] = {self.cut.at: x}
        self.graph.advance(values, self.cut.behind, _CleanTransform(), coefficients)
        return values[self.graph.output]


class BoundedModel:
    """A network as a map of boxes to boxes.

    It holds the network's operations, recorded once for each of train and eval mode, and none of its state:
    parameters and buffers stay the module's, and `model.train()` / `model.eval()` take effect at the next call, as do
    its other attributes. What its forward reads elsewhere, such as a global, is taken as it was when it was recorded.

    Args:
        model: takes one batch of inputs (B, ...), returns logits (B, K).
        example_input: any valid batch; the recorded operations are checked against the module on it.
        batch_sum: completes sums over a batch (with gradient), where each call sees only a part of it, so that
            BatchNorm in training mode still has the statistics of all of it.

    Raises:
        UnsupportedOperation: the network cannot be traced, or an operation in it has no rule.
        UsageError: an example input that is no batch, or a layer without shapes yet.
    """

    def __init__(self, model: nn.Module, example_input: Tensor, batch_sum: BatchSum | None = None) -> None:
        if example_input.dim() == 0 or not example_input.numel():
            raise UsageError(f"example_input of shape {tuple(example_input.shape)} is no batch of at least one input")
        _require_recordable(model)
        self.model = model
        self._batch_sum = batch_sum
        self._example = example_input.detach()[:1].clone()
        self._recordings: dict[bool, _Recording] = {}
        with evaluating(model):
            self._footprint = Footprint.of(self.graph, self._example.to(device_of(model, self._example.device)))

    def __getstate__(self) -> dict[str, Any]:
        """Copied or pickled without the recordings, which read the very modules they were made of."""
        return {**vars(self), "_recordings": {}}

    @property
    def graph(self) -> Graph[Any]:
        """The network's steps in its present mode: recorded and checked once, and again where its structure changed."""
        return self._recording().graph

    def _recording(self) -> _Recording:
        mode = self.model.training
        if torch.compiler.is_compiling():  # looked at before, in Python
            return self._recordings[mode]
        structure = structure_of(self.model)
        if mode not in self._recordings or self._recordings[mode].structure != structure:
            graph = trace(self.model, self._batch_sum)
            _require_rules(graph)
            check_recording(self.model, self._example.to(device_of(self.model, self._example.device)))
            self._recordings[mode] = _Recording(structure, graph)
        return self._recordings[mode]

    @property
    def rectifiers(self) -> int:
        """How many ReLUs, and activations of their kind, there are, whose inputs are `Bounds.relu_inputs`."""
        return sum(step.operation is not None and step.operation.rectifies for step in self.graph.steps)

    @property
    def classes(self) -> int:
        """K, the number of logits; raises UsageError where the network returns something else."""
        shape = self._footprint.output
        if len(shape) != 1:
            raise UsageError(f"margins are of logits (B, K): this network returns {tuple(shape)} an image")
        return shape[0]

    def ibp(
        self,
        box: Box,
        clean: Tensor | None = None,
        coefficients: Mapping[int, Coefficients] | None = None,
        record: bool = False,
        arithmetic: str | None = None,
        from_center: bool = False,
        shrink: float | None = None,
    ) -> Bounds:
        """Interval bounds of every output, in one joint pass of the box and the clean input.

        Of a network that ends with a softmax or log-softmax over the classes they are the logits' that enter it.

        Args:
            box: (B, ...) inputs.
            clean: (B, ...) a point of the box. Where BatchNorm is in training mode its statistics are those of the
                clean activations, for the box as well; there it must be given, elsewhere it may be.
            coefficients: use these for the BatchNorms (from `clean_pass`) instead of statistics of `clean`.
            record: keep every value's box, for margins by backward passes (`crown_margins`).
            arithmetic: bound what the network computes in this floating-point arithmetic ("float32", "tf32", "bf16",
                "float64"), in any order of its sums, instead of real mathematics (`rounding.propagation`); box alone.
            from_center: BatchNorm in training mode takes its statistics from the middle of the box instead of `clean`,
                which then may, but need not, travel along.
            shrink: multiply upper ends behind unstable ReLUs by this (`joint_pass.shrunk`). The result is something to
                train on and no bound, so it is refused in eval mode, the mode that networks are verified in.

        Raises:
            UsageError: `shrink` in eval mode, inputs of a shape that the network does not take, a `clean` of another
                shape or type than the box, or a box without points (on a GPU, which would be waited for, `margins`
                alone looks for that).
        """
        self._refuse_shrinking(shrink)
        self._require_box(box)
        if arithmetic is not None:
            return sound.propagate(self.graph, box, arithmetic)
        if clean is not None and (clean.shape, clean.dtype) != (box.shape, box.like.dtype):
            raise UsageError(
                f"clean must be points of the box, {box.like.dtype} {tuple(box.shape)}: "
                f"it is {clean.dtype} {tuple(clean.shape)}"
            )
        return joint_pass.propagate(self.graph, box, clean, coefficients, record, from_center, shrink)

    def ibp_in_segments(
        self,
        box: Box,
        coefficients: Mapping[int, Coefficients],
        observe: Callable[[Box], Any],
        segments: int | None = None,
        shrink: float | None = None,
    ) -> Bounds:
        """`ibp` of the box alone in less memory, at the price of a second walk on the way back.

        Args:
            coefficients: of the BatchNorms, from `clean_pass`.
            observe: takes a box; its results stand in `relu_inputs` and `affine_input`, whose boxes would be memory.
            segments: between which values are kept; by default the root of the number of steps, which takes least.
            shrink: see `ibp`.
        """
        self._refuse_shrinking(shrink)
        self._require_box(box)
        count = segments or math.isqrt(len(self.graph.steps))
        return propagate_in_segments(self.graph, box, coefficients, observe, count, shrink)

    def _refuse_shrinking(self, shrink: float | None) -> None:
        if shrink is not None and not self.model.training:
            raise UsageError("boxes that were shrunk behind ReLUs bound nothing: shrink is for training mode alone")

    def _require_box(self, box: Box) -> None:
        refuse_empty(box)
        self._require_inputs(box.like)

    def _require_inputs(self, x: Tensor) -> None:
        """Raises UsageError where the network takes no such inputs; some take images of several sizes."""
        expected, shape = self._example.shape[1:], x.shape[1:]
        if shape == expected or torch.compiler.is_compiling():
            return
        recording = self._recording()
        if shape in recording.shapes:
            return
        try:
            try_on_copy(self.model, torch.zeros(2, *shape, dtype=x.dtype, device=x.device))
        except Exception as error:  # of any operation in it, and of any type
            message = f"inputs of shape {tuple(shape)} are none of this network's, which are {tuple(expected)}"
            raise UsageError(message) from error
        recording.shapes.add(shape)

    def clean_pass(self, x: Tensor, coefficients: Mapping[int, Coefficients] | None = None) -> CleanPass:
        """Logits of `x` (B, ...) and the BatchNorm coefficients they were computed with, `coefficients` where given."""
        self._require_inputs(x)
        clean = _CleanTransform()
        output = self.graph.run(x, clean, coefficients)
        return CleanPass(output, clean.coefficients)

    def split(self, tail: int) -> Split:
        """The network in two, with `tail` of its activations in the part behind the cut.

        Activations are the elementwise nonlinear operations, but for those within a normalization. The cut is directly
        behind one of them, as long as all that follows depends on its result alone. Where it does not, as within a
        residual branch, the cut is at the last value before the tail's first activation of which that is true.

        Raises:
            UsageError: there is no such value.
        """
        cuts = self.graph.cuts
        if tail not in cuts:
            possible = f"possible: {', '.join(map(str, sorted(cuts)))}" if cuts else "it has none"
            raise UsageError(f"the network cannot be cut with {tail} activations behind the cut; {possible}")
        return Split(self.graph, cuts[tail])

    def margins(
        self,
        box: Box,
        labels: Tensor,
        method: str = "ibp",
        clean: Tensor | None = None,
        *,
        intersect: bool = True,
        max_memory: int | None = None,
        alpha: AlphaOptions = DEFAULT_ALPHA,
        arithmetic: str | None = None,
        early_stop: bool = False,
        search: Search | None = None,
    ) -> Tensor:
        """Lower bounds of z_y - z_j over the box.

        Args:
            box: (B, ...) inputs.
            labels: (B,) int64, the classes y.
            method: by price, "ibp"; "crown-ibp", one backward pass on IBP's boxes; "crown", backward passes for the
                boxes too; "alpha-crown", slopes optimised for each image (no gradient); "branch-and-bound", a search
                on top of it that ends where an image is proved, or shown to be misclassified somewhere (no gradient).
            clean: see `ibp`.
            intersect: take the better of this bound and the cheaper ones, so that a dearer method is never looser.
            max_memory: bytes that coefficients of backward passes may take; the work is cut accordingly. Default:
                half of what the device has free. It does not count what autograd keeps for a gradient: ask under
                `torch.no_grad()` where none is wanted.
            alpha: how slopes are optimised.
            arithmetic: see `ibp`; the margins are then those of the computed logits, in float64.
            early_stop: an image whose margins are all positive is spared what is left to do for it; between the layers
                of "crown" that is looked at. Its margins are then those that prove it, not the method's best. For
                networks in eval mode, with `intersect`. Of "branch-and-bound" it spares the methods before the search.
            search: how "branch-and-bound" searches, which is for networks in eval mode, with `intersect`; by default
                for at most 100 seconds an image.

        Returns:
            (B, K), 0 in column y; an image whose other entries are all positive is proved. -inf where values overflow,
            of which nothing is known.

        Raises:
            UsageError: unknown method, a box that is empty or not of float32 or float64, labels outside the classes, a
                memory bound that does not suffice for one image, or `early_stop` or a search where it cannot be.
            UnsupportedOperation: an operation has no linear relaxation, or none that covers rounding; or it cannot be
                split.
        """
        if method not in STAGES:
            raise unknown("bound method", method, STAGES)
        check_question(box, labels, self.classes)
        if search is not None and method != BRANCH_AND_BOUND:
            raise UsageError(f"search is how {BRANCH_AND_BOUND} searches: {method} does not")
        if len(labels) == 0:
            return box.like.new_zeros(0, self.classes, dtype=None if arithmetic is None else torch.float64)
        if early_stop and (self.model.training or not intersect):
            raise UsageError("early_stop is for networks in eval mode, and for bounds that are intersected")
        if method == BRANCH_AND_BOUND:
            if self.model.training or not intersect:
                raise UsageError(f"{method} is for networks in eval mode, and for bounds that are intersected")
            return self._searched_margins(box, labels, search, alpha, early_stop, max_memory, arithmetic)
        if method == "ibp":
            bounds = self.ibp(box, clean, arithmetic=arithmetic)
            return only_finite(self._interval_margins(bounds, labels, arithmetic), labels)
        images, rows = self._footprint.batch(box.like, method, max_memory)
        whole = self.model.training or len(labels) <= images
        found = []
        with torch.set_grad_enabled(torch.is_grad_enabled() and method != "alpha-crown"):
            for part in [slice(None)] if whole else _portions(len(labels), images):
                portion = box.take(part)
                if early_stop:
                    found.append(self._early_margins(portion, labels[part], method, rows, alpha, arithmetic))
                    continue
                bounds = self.recorded(portion, None if clean is None else clean[part], arithmetic)
                cheaper = [self._interval_margins(bounds, labels[part], arithmetic)] if intersect else []
                found.append(self._backward_margins(bounds, labels[part], method, cheaper, rows, alpha))
        return only_finite(torch.cat(found), labels)

    def _searched_margins(
        self,
        box: Box,
        labels: Tensor,
        search: Search | None,
        alpha: AlphaOptions,
        early_stop: bool,
        max_memory: int | None,
        arithmetic: str | None,
    ) -> Tensor:
        from certtrain.verification.branch_and_bound import Search, searched_margins  # which imports bounds

        options: dict[str, Any] = {"max_memory": max_memory, "arithmetic": arithmetic}
        known = self.margins(box, labels, METHODS[-1], alpha=alpha, early_stop=early_stop, **options)
        points = box.map(lambda end: end.to(self._example.dtype))
        return searched_margins(self, box, labels, known, search or Search(), points, **options)

    def tightened(self, box: Box, arithmetic: str | None = None, max_memory: int | None = None) -> Record:
        """Every value's box, as tight as CROWN makes them, for searches on top (`branch_and_bound`).

        The record's calls are those of a pass with one image: where they hold constants that were expanded to a batch,
        these broadcast to any number of images.

        Args:
            box: (B, ...) inputs; arithmetic, max_memory: as of `margins`.
        """
        images, rows = self._footprint.batch(box.like, "crown", max_memory)
        portions = [box.take(part) for part in _portions(len(box.like), images)]
        with torch.no_grad():
            parts = [tightened(self.recorded(part, None, arithmetic).recorded, rows) for part in portions]
            single = self.recorded(box.take(slice(1)), None, arithmetic).recorded
        boxes = {
            index: Box(*(torch.cat([getattr(part.boxes[index], end) for part in parts]) for end in ("lower", "upper")))
            for index in single.boxes
        }
        slack = single.slack and {
            index: torch.cat([(part.slack or {})[index] for part in parts]) for index in single.slack
        }
        return replace(single, boxes=boxes, slack=slack).detach()

    def margins_of(self, bounds: Bounds, labels: Tensor, method: str = "ibp") -> Tensor:
        """Margins (B, K) from a pass already made: "ibp", or "crown-ibp" if it was recorded (raw, not intersected).

        Raises:
            UsageError: labels that are no classes (on a GPU, which would be waited for, their number and type alone are
                looked at), a pass that covers rounding, or one that was not recorded where it must be.
        """
        bounds.require_real()
        if method == "ibp":
            return merged_margins(bounds.tail, bounds.tail_input, labels).lower
        if method == "crown-ibp":
            return crown_margins(bounds, labels)
        raise unknown("bound method of a single pass", method, ("ibp", "crown-ibp"))

    def recorded(self, box: Box, clean: Tensor | None = None, arithmetic: str | None = None) -> Bounds:
        """`ibp` with everything recorded that a backward pass needs, also one that covers rounding."""
        if arithmetic is None:
            return self.ibp(box, clean, record=True)
        self._require_box(box)
        return propagate_recorded(self.graph, box, arithmetic)

    def _interval_margins(self, bounds: Bounds, labels: Tensor, arithmetic: str | None) -> Tensor:
        return self.margins_of(bounds, labels) if arithmetic is None else sound.margins_of(bounds, labels, arithmetic)

    def _backward_margins(
        self, bounds: Bounds, labels: Tensor, method: str, cheaper: list[Tensor], rows: int, alpha: AlphaOptions
    ) -> Tensor:
        """The best of `cheaper` margins, if there are any, and those of the methods up to this one; else this one's."""
        intersect = bool(cheaper)
        if method != "crown-ibp":
            if intersect:
                cheaper = [*cheaper, crown_margins(bounds, labels)]
            bounds = replace(bounds, record=tightened(bounds.recorded, rows, intersect))
        best = alpha_margins(bounds, labels, alpha) if method == "alpha-crown" else crown_margins(bounds, labels)
        return reduce(better, cheaper, best)

    def _early_margins(
        self, box: Box, labels: Tensor, method: str, rows: int, alpha: AlphaOptions, arithmetic: str | None
    ) -> Tensor:
        """Margins by methods of rising price, each for the images that are not proved yet."""
        bounds = self.recorded(box, None, arithmetic)
        margins = self._interval_margins(bounds, labels, arithmetic)
        left = torch.arange(len(labels), device=labels.device)
        tightening = Tightening(bounds.recorded, rows)
        for _ in chain([None], tightening.steps()):  # on IBP's boxes, and then after every layer's
            found = crown_margins(replace(bounds, record=tightening.record), labels[left])
            margins = margins.index_put((left,), better(margins[left], found))
            unproved = (~proved(margins[left])).nonzero()[:, 0]
            if len(unproved) < len(left):
                left = left[unproved]
                if len(left) == 0:
                    return margins
                bounds = self.recorded(box.take(left), None, arithmetic)
                tightening.take(unproved, bounds.recorded)
            if method == "crown-ibp":
                return margins
        if method == "alpha-crown":
            found = alpha_margins(replace(bounds, record=tightening.record), labels[left], alpha)
            margins = margins.index_put((left,), better(margins[left], found))
        return margins


def check_question(box: Box, labels: Tensor, classes: int) -> None:
    """A wrong one would be answered all the same: an empty box has every property.

    Raises:
        UsageError: a box of another type than float32 and float64, an empty one, labels that are no classes, or a
            network of fewer than two, whose every answer would be right.
    """
    if classes < 2:
        raise UsageError("one logit has no margins: a binary network needs two, torch.cat([0 * z, z], 1) of its z")
    if box.like.dtype not in (torch.float32, torch.float64):
        raise UsageError(f"bounds are computed in float32 or float64, not for a box of {box.like.dtype}")
    if not (box.lower <= box.upper).all():
        raise UsageError(EMPTY)
    check_labels(labels, len(box.like), classes, look=True)


def _portions(count: int, size: int) -> list[slice]:
    return [slice(i, i + size) for i in range(0, count, size)]


def _require_recordable(model: nn.Module) -> None:
    for name, module in model.named_modules():
        where = f"module {name!r}" if name else "the network"
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedOperation(f"{where} is compiled by torch.jit: give the module that it was made from")
        if "eval" in vars(module):  # which raises there
            raise UnsupportedOperation(f"{where} comes from torch.export: give the module that it was made from")
        if any(map(is_lazy, chain(module._parameters.values(), module._buffers.values()))):
            raise UsageError(f"{where} has no shape yet: call the network on a batch first")


class _CleanTransform(PointWalk):
    """Walks the clean input alone, and keeps the BatchNorms' coefficients."""

    def __init__(self) -> None:
        self.coefficients: dict[int, Coefficients] = {}

    def apply(self, call: Call, args: tuple[Any, ...]) -> Tensor:
        if call.function is scale_shift:
            self.coefficients[call.index] = args[1:]
        return super().apply(call, args)


def _require_rules(graph: Graph[Any]) -> None:
    known = interval.RULES.keys() | SETTLED_BY_CLEAN.keys()
    without = [step.where for step in graph.steps[1:] if step.tracked and step.function not in known]
    if without:
        named = without[0] if len(without) == 1 else f"{', '.join(without[:3])} (of {len(without)} such operations)"
        raise UnsupportedOperation(
            f"{named} has no interval rule; use backend: lirpa, or add one (register_operation, docs/extending.md)"
        )
