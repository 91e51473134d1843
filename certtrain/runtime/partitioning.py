"""What a compiled step keeps for its backward pass: on CPUs bytes in place of booleans.

PyTorch's compiler chooses what of the forward pass is kept, and favours masks (where a ReLU was off), which are small.
But its code for CPUs, vectorized otherwise, writes booleans one by one, which takes several times as long as all else
of an activation. So they are turned, by way of floats, into bytes that are 0 or 1: the same values at full speed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.custom_graph_pass import CustomPartitionerFn, get_hash_for_files
from torch.fx import Graph, GraphModule, Node

_TO = torch.ops.prims.convert_element_type.default
_DIFFERS = torch.ops.aten.ne.Scalar


class BytesForMasks(CustomPartitionerFn):
    """PyTorch's partitioner of a joint graph into forward and backward, and then bytes for the masks between them."""

    def __call__(
        self, gm: GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[GraphModule, GraphModule]:
        forward, backward = min_cut_rematerialization_partition(gm, joint_inputs, **kwargs)
        keep_masks_as_bytes(forward, backward, kwargs["num_fwd_outputs"])
        return forward, backward

    def uuid(self) -> bytes:
        """What stands for this file in the keys of the compiler's cache."""
        return get_hash_for_files((__file__,))


def keep_masks_as_bytes(forward: GraphModule, backward: GraphModule, own: int) -> None:
    """Change both halves of a graph; `own`: how many results of the forward one, the first, are not for the other."""
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


def _call(graph: Graph, function: Any, node: Node, setting: Any) -> Node:
    call = graph.call_function(function, (node, setting))
    call.meta["val"] = function(node.meta["val"], setting)  # of fake tensors: computes shapes and strides alone
    return call
