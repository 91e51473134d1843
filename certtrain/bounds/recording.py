"""Does a recording compute what the module computes, and each image on its own?

The recorded steps are held against the module itself: on random images, near the example and far from it, in float64
and relative to the spread of the logits, so that networks with small logits are judged as strictly as others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy

import torch
from torch import Tensor, nn

from certtrain.bounds.batch_norm import SETTLED_BY_CLEAN
from certtrain.bounds.graph import Call, Graph, leaves
from certtrain.bounds.tracing import trace
from certtrain.errors import CerttrainError, UnsupportedOperation

IMAGES = 3


class PointWalk:
    """Walks single points through a graph (a `graph.Transform`)."""

    settled = SETTLED_BY_CLEAN

    def apply(self, call: Call, args: tuple) -> Tensor:
        value = call.function(*args)
        return value.to(leaves(args, Tensor)[0].dtype)

    def clean(self, value: Tensor) -> Tensor:
        return value

    def like(self, value: Tensor) -> Tensor:
        return value


@torch.no_grad()
def check_recording(model: nn.Module, image: Tensor) -> None:
    """Hold what is recorded of a copy of the module, in its present mode, against the copy; `model` stays as it is.

    Args:
        image: (1, ...), any valid input.

    Raises:
        UnsupportedOperation: the outputs differ, or one image's depends on the others in the batch.
    """
    images, failure = probes(image), None
    for candidate, dtype in _candidates(model, image.dtype):
        try:
            with _seeded(0):  # Dropout's masks are drawn in one order
                expected = candidate(images.to(dtype, copy=True))  # the module may write into its input
            with _seeded(0):
                recorded = _walk(candidate, images.to(dtype))
            with _seeded(1):
                alone = expected[:1] if model.training else _walk(candidate, images[:1].to(dtype))
        except CerttrainError:
            raise
        except Exception as error:  # constants of one type, shapes of one batch: the module's own, of any type
            failure = error
            continue
        break
    else:
        reason = " ".join(str(failure).split())[:160]
        raise UnsupportedOperation(f"{type(model).__name__} cannot be computed on {len(images)} images ({reason})")
    tolerances = (1e-7, 1e-12) if expected.dtype == torch.float64 else (1e-3, 1e-5)
    if not agree(recorded, expected, *tolerances):
        raise UnsupportedOperation(
            f"the recorded operations of {type(model).__name__} do not reproduce its output: its forward does "
            "something tracing does not see"
        )
    if not agree(torch.cat([alone, expected[1:]]), expected, *tolerances):
        raise UnsupportedOperation(
            f"{type(model).__name__} returns for one image what depends on others in the batch, or on random numbers"
        )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def probes(image: Tensor) -> Tensor:
    """(3, ...): noise as wide as the image (1, ...), a corner of its range, and the image with some noise."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(3, *image.shape[1:], generator=generator, dtype=torch.float64).to(image.device, image.dtype)
    low, high = image.amin(), image.amax()
    width = torch.where(high > low, high - low, 1.0)
    return low + width * torch.stack([noise[0], noise[1].round(), 0.9 * (image[0] - low) / width + 0.1 * noise[2]])


def _candidates(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[nn.Module, torch.dtype]]:
    for wanted in (torch.float64, dtype):
        with suppress(Exception):  # a module that cannot be copied, a device without float64
            yield deepcopy(model).to(wanted), wanted
    if not model.training:
        yield model, dtype


def _walk(model: nn.Module, images: Tensor) -> Tensor:
    graph: Graph[Tensor] = trace(model)
    output = graph.run(images, PointWalk())
    return output if graph.head is None else graph.head(output, 1)


def agree(found: Tensor, expected: Tensor, relative: float, absolute: float) -> bool:
    """Do two sets of logits (B, K) differ by less than `relative` of their spread and `absolute` of their size?"""
    if found.shape != expected.shape:
        return False
    tolerance = relative * (expected.amax() - expected.amin()) + absolute * expected.abs().amax()
    same = ((found - expected).abs() <= tolerance) | (found == expected) | (found.isnan() & expected.isnan())
    return bool(same.all())
