"""Where a network can be cut in two: at a value that all behind it depends on alone.

It may be anywhere in a network of layers one after the other; in one with branches (residual sums, attention) it is
where they have come together. Behind it, other values are read only if they do not depend on the network's input.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from certtrain.bounds.graph import Cut, Step
from certtrain.bounds.normalization import normalized


def cuts(steps: Sequence[Step]) -> dict[int, Cut]:
    """The cuts of the network that ends with the last of `steps`, by the number of activations behind them.

    Of several with the same number it is the one directly behind an activation, if there is one, and else the last.
    """
    used = _needed(steps)
    activations = used & _activations(steps)
    flowing = _of_input(steps)
    last_read = {value: reader for reader in sorted(used) for value in steps[reader].read & flowing}
    chosen: dict[int, int] = {}
    left, crossing = len(activations), 0  # activations behind a value; the last step that reads anything before it
    for index in sorted(used & flowing):
        left -= index in activations
        if crossing <= index and steps[index].tracked and chosen.get(left) not in activations:
            chosen[left] = index
        crossing = max(crossing, last_read.get(index, 0))
    return {left: Cut(at, tuple(sorted(_needed(steps, given=at)))) for left, at in chosen.items() if left}


def _needed(steps: Sequence[Step], given: int | None = None) -> set[int]:
    """The steps that the last one cannot do without, where the value at `given` is there already."""
    needed = {len(steps) - 1}
    for index in reversed(range(len(steps))):
        if index in needed:
            needed |= steps[index].read - {given}
    return needed


def _of_input(steps: Sequence[Step]) -> set[int]:
    """The values that depend on the network's input, be it on its shape alone, which the tail's is not."""
    found: set[int] = set()
    for index, step in enumerate(steps):
        if step.tracked or step.read & found:
            found.add(index)
    return found


def _activations(steps: Sequence[Step]) -> set[int]:
    """The elementwise operations but those within a normalization, by which it finds what it divides by."""
    elementwise = {i for i, step in enumerate(steps) if step.operation is not None and step.operation.elementwise}
    return elementwise.difference(*(_divisor(steps, step) for step in steps if step.function is normalized))


def _divisor(steps: Sequence[Step], normalization: Step) -> Iterator[int]:
    """The steps from the deviations to the factor that they are multiplied by, from behind."""
    deviations, factor = normalization.args[:2]
    while factor != deviations:
        yield factor.index
        factor = steps[factor.index].args[0]
