"""The graphs of a compiled step, forward and backward, changed where PyTorch's compiler writes slow code for CPUs.

It vectorizes all but two things that bounds are full of: masks and sums over each channel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.custom_graph_pass import CustomPartitionerFn, get_hash_for_files
from torch.fx import Graph, GraphModule, Node

_TO = torch.ops.prims.convert_element_type.default
_DIFFERS = torch.ops.aten.ne.Scalar
_SUMS = (torch.ops.aten.sum.dim_IntList, torch.ops.aten.mean.dim)

Rewrite = Callable[[GraphModule, GraphModule, int], None]


def keep_masks_as_bytes(forward: GraphModule, backward: GraphModule, own: int) -> None:
    """Keep bytes for the backward pass in place of booleans.

    The partitioner chooses what of the forward pass is kept, and favours masks (where a ReLU was off), which are small.
    But booleans are written one by one, which takes several times as long as all else of an activation. So they are
    turned, by way of floats, into bytes that are 0 or 1: the same values at full speed.

    Args:
        own: how many results of the forward half, the first, are not for the other.
    """
    ending = forward.graph.output_node()
    (results, *rest) = ending.args
    assert isinstance(results, list | tuple)
    kept, readers = list(results), {node.name: node for node in backward.graph.find_nodes(op="placeholder")}
    masks = list(_masks(kept, own))
    if not masks:
        return
    for place, mask in masks:
        reader = readers[mask.name]  # both halves call it the same
        with forward.graph.inserting_before(ending):
            number = _call(forward.graph, _TO, mask, torch.float32)
            kept[place] = _call(forward.graph, _TO, number, torch.uint8)
        _read(backward.graph, reader, kept[place].meta["val"])
    ending.args = (type(results)(kept), *rest)
    for half in (forward, backward):
        half.graph.lint()
        half.recompile()


def _masks(results: Sequence[Any], own: int) -> Iterator[tuple[int, Node]]:
    for place, node in enumerate(results):
        value = node.meta.get("val") if place >= own and isinstance(node, Node) else None
        if isinstance(value, Tensor) and value.dtype == torch.bool and value.device.type == "cpu":
            yield place, node


def _read(graph: Graph, kept: Node, value: Tensor) -> None:
    """Give those who use what is kept, which is now bytes, the mask that these stand for."""
    users = list(kept.users)
    kept.meta["val"] = value
    kept.meta.pop("tensor_meta", None)
    with graph.inserting_after(kept):
        number = _call(graph, _TO, kept, torch.float32)
    with graph.inserting_after(number):
        mask = _call(graph, _DIFFERS, number, 0)
    for user in users:
        user.replace_input_with(kept, mask)


def sum_channels_in_stages(forward: GraphModule, backward: GraphModule, own: int) -> None:
    """Sum, or take the mean, over each image's pixels first, and then over the images.

    BatchNorm's gradients sum over both at once, for each channel. While it plans such a sum the compiler settles how
    the terms lie in memory, too early to know that all around is channels last, and they are transposed to and fro.
    """
    for half in (forward, backward):
        for node in [node for function in _SUMS for node in half.graph.find_nodes(op="call_function", target=function)]:
            if _is_of_channels(node):
                arguments: Any = node.args
                terms, _, *keepdim = arguments
                pixels = list(range(2, terms.meta["val"].dim()))
                with half.graph.inserting_before(node):
                    of_images = _call(half.graph, node.target, terms, pixels, *keepdim, **node.kwargs)
                    whole = _call(half.graph, node.target, of_images, [0], *keepdim, **node.kwargs)
                node.replace_all_uses_with(whole)
                half.graph.erase_node(node)
        half.graph.lint()
        half.recompile()


def _is_of_channels(node: Node) -> bool:
    """Whether a sum is over the images and pixels of (B, C, ...) on a CPU."""
    arguments: Any = node.args
    terms, dims, *_ = arguments
    value = terms.meta["val"]
    ndim = value.dim()
    return value.device.type == "cpu" and ndim > 2 and sorted(dim % ndim for dim in dims or ()) == [0, *range(2, ndim)]


def _call(graph: Graph, function: Any, node: Node, *settings: Any, **named: Any) -> Node:
    call = graph.call_function(function, (node, *settings), named)
    fake: Tensor = node.meta["val"]  # of which only shape, type and strides are computed
    call.meta["val"] = function(fake, *settings, **named)
    return call


class CPUPartitioner(CustomPartitionerFn):
    """PyTorch's partitioner of a joint graph into forward and backward, and then `rewrites` of both."""

    def __init__(self, *rewrites: Rewrite) -> None:
        self.rewrites = rewrites or (keep_masks_as_bytes, sum_channels_in_stages)

    def __call__(
        self, gm: GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[GraphModule, GraphModule]:
        forward, backward = min_cut_rematerialization_partition(gm, joint_inputs, **kwargs)
        for rewrite in self.rewrites:
            rewrite(forward, backward, kwargs["num_fwd_outputs"])
        return forward, backward

    def uuid(self) -> bytes:
        """What stands for this in the keys of the compiler's cache: the file, and which rewrites."""
        names = ",".join(rewrite.__name__ for rewrite in self.rewrites)
        return get_hash_for_files((__file__,), names)
