"""Graphs that are rewritten compute what they did: bit for bit, or where sums are in another order, up to rounding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table

from certtrain.runtime.compilation import compiler_options

if not compiler_options():
    pytest.skip("the compiler of torch before 2.9 takes no partitioner", allow_module_level=True)

from certtrain.runtime.partitioning import CPUPartitioner, keep_masks_as_bytes, sum_channels_in_stages

FUNCTIONS = {
    "relu": lambda x, y: F.relu(x @ y) + y,
    "box of a relu": lambda x, y: (F.relu(x @ y + y @ x) - F.relu(x @ y - y @ x)) @ torch.eye(12),
    "leaky relu": lambda x, y: F.leaky_relu(x @ y, 0.3) + y,
    "relu6": lambda x, y: F.relu6(4 * x @ y) - y,
    "clamp": lambda x, y: (x @ y).clamp(-0.5, 0.5) + y,
    "where": lambda x, y: torch.where(x @ y > y, 2 * x, x - y) + y,
    "a condition of two": lambda x, y: torch.where((x @ y > 0) & (y @ x < 0), 2 * x + y, x),
    "masked_fill": lambda x, y: (x @ y).masked_fill(y @ x > 0, 0.0) + y,
    "a mask for two": lambda x, y: torch.where(x @ y > 0, x, y) + torch.where(x @ y > 0, y, x).sin(),
    "channels last": lambda x, y: F.relu((x @ y).view(2, 2, 3, 12).to(memory_format=torch.channels_last) + 0.1),
    "transposed": lambda x, y: F.relu((x @ y).T) + y,
    "no mask": lambda x, y: (x @ y).tanh() @ y,
}


def halves(function, inputs, partitioner, looks_at=lambda graph: None):
    """Results and gradients, as the two graphs compute them, and the types of all that the forward one returns."""
    types: list[torch.dtype] = []

    def backward(graph, arguments):
        looks_at(graph)
        return make_boxed_func(graph.forward)

    def forward(graph, arguments):
        looks_at(graph)

        def run(*args):
            found = graph(*args)
            types.extend(value.dtype for value in found if isinstance(value, Tensor))
            return found

        return make_boxed_func(run)

    backend = aot_autograd(
        fw_compiler=forward,
        bw_compiler=backward,
        partition_fn=partitioner,
        decompositions=select_decomp_table(),  # as PyTorch's compiler has it; without it a ReLU is kept whole
    )
    torch._dynamo.reset()
    leaves = [value.clone().requires_grad_() for value in inputs]
    results = torch.compile(function, backend=backend, fullgraph=True)(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    floats = [value for value in results if value.is_floating_point()]
    gradients = torch.autograd.grad([value.square().sum() for value in floats], leaves, allow_unused=True)
    return results, gradients, types


def same(one, other):
    """Bit for bit, NaN as NaN."""
    for a, b in zip(one, other, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            assert a.stride() == b.stride()
            assert torch.equal(a.nan_to_num(nan=7e7), b.nan_to_num(nan=7e7))


def inputs():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(12, 12, generator=generator), torch.randn(12, 12, generator=generator)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_masks_are_kept_as_bytes_and_nothing_else_changes(name):
    function = FUNCTIONS[name]
    results, gradients, types = halves(function, inputs(), min_cut_rematerialization_partition)
    found, found_gradients, found_types = halves(function, inputs(), CPUPartitioner(keep_masks_as_bytes))
    assert found_types == [torch.uint8 if kind == torch.bool else kind for kind in types]
    same(found, results)
    same(found_gradients, gradients)


def test_there_are_masks_in_what_is_tested():
    kept = {name: halves(f, inputs(), min_cut_rematerialization_partition)[2] for name, f in FUNCTIONS.items()}
    assert [name for name, types in kept.items() if torch.bool not in types] == ["no mask"]


def test_a_gradient_that_overflows_is_stopped_by_a_mask():
    """inf · 0 would be NaN."""
    x, y = inputs()
    found = halves(lambda x, y: (F.relu(x) * 1e38).square() + y, (x, y), CPUPartitioner(keep_masks_as_bytes))[1][0]
    assert found[x > 0].isinf().all()
    assert (found[x < 0] == 0).all()


def test_a_mask_that_is_a_result_stays_one():
    function = lambda x, y: (x > y, torch.where(x > y, x, y).sin())  # noqa: E731
    (mask, _), _, types = halves(function, inputs(), CPUPartitioner(keep_masks_as_bytes))
    assert mask.dtype == types[0] == torch.bool
    assert torch.bool not in types[2:]
    assert torch.equal(mask, inputs()[0] > inputs()[1])


SUMS = {
    "bias of images": lambda x, b: x + b,
    "bias in channels last": lambda x, b: x.contiguous(memory_format=torch.channels_last) * b,
    "batch norm": lambda x, b: F.batch_norm(x, None, None, b.flatten(), training=True),
    "sum over images": lambda x, b: x.sum((0, 2, 3)) * b.flatten(),
    "counted from the end": lambda x, b: x.sum((-1, -4, -2), keepdim=True) * b,
    "mean": lambda x, b: x.mean((3, 0, 2)) * b.flatten(),
    "mean in another type": lambda x, b: x.mean((0, 2, 3), keepdim=True, dtype=torch.float64) * b,
    "sum of a condition": lambda x, b: (x > b).sum((0, 2, 3)) + (x * b).sum(),
    "sequences": lambda x, b: x.flatten(2) * b.flatten(2),
    "volumes": lambda x, b: x.unflatten(3, (2, 2)) - b.unsqueeze(-1),
}
OTHER_SUMS = {
    "pixels": lambda x, b: x.sum((2, 3)) + b.flatten(),
    "images": lambda x, b: x.sum(0) * b[0],
    "all": lambda x, b: x.sum() * b.mean(),
    "all, by name": lambda x, b: x.sum((0, 1, 2, 3)) * b.mean((0, 1, 2, 3)),
    "rows": lambda x, b: x.sum((0, 3)) * b[0, :, 0],
    "vectors": lambda x, b: x[:, :, 0, 0] + b[0, :, 0, 0],
    "of none": lambda x, b: x.sum((), keepdim=True) * b,
}


def sums_of(graph):
    """How often each sum or mean over dimensions is taken: (dimensions summed, all dimensions)."""
    return [
        (len(node.args[1]), node.args[0].meta["val"].dim())
        for node in graph.graph.nodes
        if str(node.target) in ("aten.sum.dim_IntList", "aten.mean.dim")
    ]


def images():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, 3, 2, 4, generator=generator), torch.randn(1, 3, 1, 1, generator=generator)


@pytest.mark.parametrize("name", SUMS)
def test_sums_over_images_and_pixels_are_taken_in_stages(name):
    before, after = [], []
    halves(SUMS[name], images(), min_cut_rematerialization_partition, lambda graph: before.extend(sums_of(graph)))
    found = halves(
        SUMS[name], images(), CPUPartitioner(sum_channels_in_stages), lambda graph: after.extend(sums_of(graph))
    )
    assert any(summed == dims - 1 > 1 for summed, dims in before)
    assert not any(summed == dims - 1 > 1 for summed, dims in after)
    exact = halves(SUMS[name], [value.double() for value in images()], min_cut_rematerialization_partition)
    for part, expected in zip(found[:2], exact[:2], strict=True):
        for one, other in zip(part, expected, strict=True):
            assert one.shape == other.shape
            torch.testing.assert_close(one.double(), other.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", OTHER_SUMS)
def test_other_sums_stay_as_they_are(name):
    one, other = (
        halves(OTHER_SUMS[name], images(), partitioner)
        for partitioner in (min_cut_rematerialization_partition, CPUPartitioner(sum_channels_in_stages))
    )
    same(one[0], other[0])
    same(one[1], other[1])


def test_the_compiler_s_cache_tells_rewrites_apart():
    rewrites = [(), (keep_masks_as_bytes,), (sum_channels_in_stages,)]
    assert len({CPUPartitioner(*each).uuid() for each in rewrites}) == 3
    assert CPUPartitioner().uuid() == CPUPartitioner(keep_masks_as_bytes, sum_channels_in_stages).uuid()
