"""Interval bounds in less memory: backward computes again what lies between the ends of a network's segments.

What is kept for backward is then what passes from one segment to the next, and the inside of one segment at a time.
(Chen et al. 2016, arXiv 1604.06174.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils.checkpoint import checkpoint

from certtrain.bounds.batch_norm import Coefficients
from certtrain.bounds.box import Box
from certtrain.bounds.graph import Graph, map_leaves
from certtrain.bounds.joint_pass import Joint, JointPass, Observe
from certtrain.bounds.results import Bounds


def propagate_in_segments(
    graph: Graph[Joint],
    box: Box,
    coefficients: Mapping[int, Coefficients],
    observe: Observe,
    segments: int,
    shrink: float | None = None,
) -> Bounds:
    """Bounds of `box` alone; see `BoundedModel.ibp_in_segments`.

    A segment may be walked twice, and nothing in it may depend on how often: hence the BatchNorms' coefficients.

    Args:
        observe: what is kept, as `relu_inputs` and `affine_input`, of the boxes themselves: a few numbers, as a rule.
        segments: into how many parts of equally many steps the network is cut.
    """

    def walked(entering: Mapping[int, Any], indices: range) -> tuple[dict[int, Any], JointPass]:
        values = map_leaves(dict(entering), Joint, _anew)
        walk = JointPass(graph, observe=observe, shrink=shrink)
        graph.advance(values, indices, walk, coefficients)
        return values, walk

    size = max(1, -(-(len(graph.steps) - 1) // segments))
    values: dict[int, Any] = {0: Joint(None, box)}
    walks: list[JointPass] = []
    for start in range(1, len(graph.steps), size):
        indices = range(start, min(start + size, len(graph.steps)))
        values, walk = checkpoint(walked, values, indices, use_reentrant=False)
        walks.append(walk)
    result = values[graph.output].box
    first = next((walk.affine_input for walk in walks if walk.affine_input is not None), None)
    tail_input = next((walk.tail_input for walk in walks if walk.tail_input is not None), result)
    observed = tuple(seen for walk in walks for seen in walk.relu_inputs)
    tail = tuple(call for walk in walks for call in walk.tail)
    return Bounds(
        clean=None,
        output=result,
        relu_inputs=observed,
        affine_input=observe(box) if first is None else first,
        tail=tail,
        tail_input=tail_input,
    )


def _anew(value: Joint) -> Joint:
    """Without what the box has derived of itself: a second walk must derive it again."""
    return Joint(value.clean, value.box.map(lambda part: part))
