"""beta-CROWN: bounds on domains, the parts of a box where some neurons are known to lie on one side of a threshold.

That a neuron z is at least t on a domain enters a bound as a Lagrange multiplier: there, for any β >= 0, a function f
is at least f - β (z - t), and that is bounded over the whole box. So any β >= 0, and any slopes that the relaxations
allow, give a sound bound; good ones are found by gradient ascent. (Wang et al. 2021, arXiv 2103.06624.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from certtrain.bounds.box import Box
from certtrain.bounds.graph import Call, Ref, leaves
from certtrain.bounds.linear.ascent import ProjectedAdam
from certtrain.bounds.linear.backward import LinearBounds, Lines, linear_bounds
from certtrain.bounds.linear.patches import Coefficients, dense
from certtrain.bounds.linear.relaxations import RELAXATIONS
from certtrain.bounds.operations.record import OPERATIONS, PiecewiseLinear, at_settings
from certtrain.bounds.results import Record
from certtrain.bounds.shapes import flattened, shaped
from certtrain.errors import UnsupportedOperation


@dataclass(frozen=True)
class Neurons:
    """What enters the nonlinear functions of a network, as one vector (N,) for each image.

    calls: of those functions, in order; values: what enters them, by index and without repetition; shapes: theirs.
    """

    calls: tuple[Call, ...]
    values: tuple[int, ...]
    shapes: tuple[torch.Size, ...]

    @classmethod
    def of(cls, record: Record) -> Neurons:
        """Raises UnsupportedOperation for a nonlinear operation whose inputs cannot be split."""
        calls = tuple(call for call in record.calls if not call.affine)
        for call in calls:
            if call.function not in RELAXATIONS:
                raise UnsupportedOperation(
                    f"{call.where} has no split; methods that support it: ibp, crown-ibp, crown, alpha-crown"
                )
        values = tuple(dict.fromkeys(_entering(call) for call in calls))
        return cls(calls, values, tuple(record.boxes[index].shape[1:] for index in values))

    @property
    def sizes(self) -> list[int]:
        return [shape.numel() for shape in self.shapes]

    @property
    def total(self) -> int:
        """N."""
        return sum(self.sizes)

    def parts(self, flat: Tensor) -> dict[int, Tensor]:
        """(B, N) -> by value (B, ...)."""
        parts = flat.split(self.sizes, 1)
        return {index: shaped(part, shape) for index, part, shape in zip(self.values, parts, self.shapes, strict=True)}

    def flat(self, parts: Mapping[int, Tensor], like: Tensor) -> Tensor:
        """By value (B, ...) -> (B, N), of the type of `like` (B, ...): an affine network has no neurons."""
        return torch.cat([like.new_empty(len(like), 0), *(flattened(parts[index], 1) for index in self.values)], 1)

    def boxes(self, record: Record) -> Box:
        """(B, N)."""
        boxes, like = {index: record.boxes[index] for index in self.values}, record.boxes[0].like
        return Box(
            self.flat({index: box.lower for index, box in boxes.items()}, like),
            self.flat({index: box.upper for index, box in boxes.items()}, like),
        )

    def thresholds(self, box: Box) -> tuple[Tensor, Tensor]:
        """Where each neuron of `box` (B, N) may be split: (B, N), and whether that helps: (B, N) bool.

        A kink inside the interval, after which each side is linear; of other functions the middle.
        """
        at, useful = {}, {}
        lower, upper = self.parts(box.lower), self.parts(box.upper)
        for index in self.values:
            low, high = lower[index], upper[index]
            chosen, inside = low, torch.zeros_like(low, dtype=torch.bool)
            for call in self.calls:
                if _entering(call) != index:
                    continue
                curve = OPERATIONS[call.function].curve if call.function in OPERATIONS else None
                if isinstance(curve, PiecewiseLinear):
                    candidates = [
                        torch.as_tensor(k).to(low).expand_as(low) for k in at_settings(curve.kinks, *call.args[1:])
                    ]
                else:
                    candidates = [torch.where(high - low > 1e-6, (low + high) / 2, low)]
                for point in candidates:
                    helps = (low < point) & (point < high) & ~inside
                    chosen, inside = torch.where(helps, point, chosen), inside | helps
            at[index], useful[index] = chosen, inside
        return self.flat(at, box.lower), self.flat(useful, box.lower).bool()


def _entering(call: Call) -> int:
    (ref,) = leaves(call.args, Ref)
    index: int = ref.index
    return index


def _slope_range(call: Call) -> tuple[float, float] | None:
    """The ends of the slopes that are optimised, of lines through 0 below a (leaky) ReLU; None of other functions."""
    if call.function not in (F.relu, F.leaky_relu):
        return None
    negative_slope = call.args[1] if call.function is F.leaky_relu else 0.0
    return None if negative_slope > 1 else (negative_slope, 1.0)  # concave: the line below is the chord


@dataclass(frozen=True)
class Splits:
    """What is known on each of D domains, of at most S neurons: z >= threshold, or z <= threshold.

    neuron: (D, S) int64, in 0..N-1; sign: (D, S), -1 where z >= threshold, 1 where z <= threshold, 0 for no split;
    threshold: (D, S).
    """

    neuron: Tensor
    sign: Tensor
    threshold: Tensor

    def restricted(self, box: Box) -> Box:
        """`box` (D, N) cut to the domains."""
        lower, upper = box.lower, box.upper
        low = torch.where(self.sign < 0, self.threshold, -torch.inf)
        high = torch.where(self.sign > 0, self.threshold, torch.inf)
        return Box(
            lower.scatter_reduce(1, self.neuron, low, "amax"), upper.scatter_reduce(1, self.neuron, high, "amin")
        )


@dataclass(frozen=True)
class Ascent:
    """How slopes and multipliers are optimised: steps of Adam, at rates that decay."""

    steps: int = 20
    slope_lr: float = 0.1
    multiplier_lr: float = 0.05
    decay: float = 0.98


@dataclass(frozen=True)
class DomainBounds:
    """lower: (D,) best bounds met; slopes: (D, N) and multipliers: (D, S) they were met with."""

    lower: Tensor
    slopes: Tensor
    multipliers: Tensor


class DomainBatch:
    """D domains of a few images, to be bounded together.

    Args:
        record: of B images, their boxes as tight as is known.
        neurons: of that record.
        image: (D,) int64, the domains' images.
        functions: (D, K), the linear functions of the network's output to be bounded below.
        splits: what is known on each domain.
    """

    def __init__(self, record: Record, neurons: Neurons, image: Tensor, functions: Tensor, splits: Splits) -> None:
        self.neurons, self.functions, self.splits = neurons, functions, splits
        whole = record.take(image)
        self.box = splits.restricted(neurons.boxes(whole))
        lower, upper = neurons.parts(self.box.lower), neurons.parts(self.box.upper)
        restricted = {index: Box(lower[index], upper[index]) for index in neurons.values}
        self.record = replace(whole, boxes={**whole.boxes, **restricted})
        self._lines: Lines = {}  # of the domains' boxes, whatever slopes and multipliers

    def __len__(self) -> int:
        return len(self.functions)

    def linear_bounds(
        self, slopes: Tensor, multipliers: Tensor, observe: Callable[[Call, Coefficients], None] | None = None
    ) -> LinearBounds:
        """One bound (D, 1) for each domain; `slopes` (D, N), `multipliers` (D, S), not negative."""
        by_value = self.neurons.parts(slopes)
        by_call = {call.index: by_value[_entering(call)][:, None] for call in self.neurons.calls if _slope_range(call)}
        weights = multipliers * self.splits.sign
        spread = torch.zeros_like(slopes).scatter_add(1, self.splits.neuron, weights)
        functions: dict[int, Coefficients] = {
            index: part[:, None] for index, part in self.neurons.parts(spread).items()
        }
        output = self.record.output
        functions[output] = (
            self.functions[:, None] + dense(functions[output]) if output in functions else self.functions[:, None]
        )
        found = linear_bounds(self.record, functions, by_call, self._lines, observe)
        return replace(found, constant=found.constant - (weights * self.splits.threshold).sum(1, keepdim=True))

    def initial_slopes(self) -> Tensor:
        """(D, N): CROWN's own."""
        found = {index: torch.zeros_like(self.record.boxes[index].like) for index in self.neurons.values}
        for call in self.neurons.calls:
            if _slope_range(call):
                entering = _entering(call)
                found[entering] = RELAXATIONS[call.function](self.record.boxes[entering], *call.args[1:]).lower_slope
        return self.neurons.flat(found, self.functions)

    def slope_ends(self) -> tuple[Tensor, Tensor]:
        """(N,) each: between which slopes a relaxation stays sound."""
        low, high = {}, {}
        for index in self.neurons.values:
            ends = [_slope_range(call) for call in self.neurons.calls if _entering(call) == index]
            allowed = [end for end in ends if end is not None]
            like = self.record.boxes[index].like[:1]
            low[index] = torch.full_like(like, max((end[0] for end in allowed), default=0.0))
            high[index] = torch.full_like(like, min((end[1] for end in allowed), default=0.0))
        return self.neurons.flat(low, self.functions[:1])[0], self.neurons.flat(high, self.functions[:1])[0]

    def gaps(self, coefficients: Mapping[int, Tensor]) -> Tensor:
        """(D, N): what the relaxation of each neuron may cost the bound.

        That is the largest distance between the function and the line that the sign of its coefficient selects, times
        that coefficient: for a ReLU and a negative one BaBSR's intercept score, -a·u·l / (u - l). (Bunel et al. 2020.)

        Args:
            coefficients: (D, ...), by call, of what a function returns, as `linear_bounds` has shown them.
        """
        found = {index: torch.zeros_like(self.record.boxes[index].like) for index in self.neurons.values}
        for call in self.neurons.calls:
            if call.index not in coefficients:
                continue
            entering, a = _entering(call), coefficients[call.index]
            box, settings = self.record.boxes[entering], call.args[1:]
            lines = self._lines[call.index]
            middle = torch.zeros_like(box.lower).clamp(box.lower, box.upper)
            points = [box.lower, middle, box.upper]
            values = [call.function(point, *settings) for point in points]
            below = [y - lines.below(x) for x, y in zip(points, values, strict=True)]
            above = [lines.above(x) - y for x, y in zip(points, values, strict=True)]
            gap = torch.where(a > 0, reduce(torch.maximum, below), reduce(torch.maximum, above))
            found[entering] = found[entering] + a.abs() * gap
        return self.neurons.flat(found, self.functions)

    def optimized(self, slopes: Tensor, multipliers: Tensor, ascent: Ascent) -> DomainBounds:
        """The best bounds met by gradient ascent from these slopes and multipliers; it ends when all are positive."""
        slopes, multipliers = (part.detach().clone().requires_grad_() for part in (slopes, multipliers))
        free, rates = (slopes, multipliers), (ascent.slope_lr, ascent.multiplier_lr)
        not_negative = multipliers.new_zeros(()), multipliers.new_full((), torch.inf)
        optimizer = ProjectedAdam(free, rates, [self.slope_ends(), not_negative], ascent.decay)
        best = DomainBounds(
            slopes.new_full((len(self),), -torch.inf), slopes.detach().clone(), multipliers.detach().clone()
        )
        for step in range(ascent.steps + 1):
            with torch.set_grad_enabled(step < ascent.steps):
                lower = self.linear_bounds(slopes, multipliers).least()[:, 0]
            best = _better(best, DomainBounds(lower.detach(), slopes.detach(), multipliers.detach()))
            unproved = best.lower <= 0
            if step == ascent.steps or not bool(unproved.any()) or not lower.requires_grad:
                break
            optimizer.step(torch.autograd.grad(lower[unproved].sum(), free, allow_unused=True))
        return best


def _better(x: DomainBounds, y: DomainBounds) -> DomainBounds:
    better = (y.lower > x.lower) & (y.lower < torch.inf)  # where something overflows nothing is known
    return DomainBounds(
        torch.where(better, y.lower, x.lower),
        torch.where(better[:, None], y.slopes, x.slopes),
        torch.where(better[:, None], y.multipliers, x.multipliers),
    )
