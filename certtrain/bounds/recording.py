"""Does a recording compute what the module computes, and each image on its own?

The recorded steps are held against the module itself: on random images, near the example and far from it, in float64
and relative to how each logit varies, so that small ones and those with a large bias are judged as strictly as others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from certtrain.bounds.batch_norm import SETTLED_BY_CLEAN, Settle
from certtrain.bounds.graph import Call, Graph, leaves, map_leaves
from certtrain.bounds.tracing import trace
from certtrain.errors import CerttrainError, UnsupportedOperation, UsageError, one_line
from certtrain.modules import copied, generators_kept


class PointWalk:
    """Walks single points through a graph (a `graph.Transform`)."""

    settled: Mapping[Callable, Settle] = SETTLED_BY_CLEAN

    def apply(self, call: Call, args: tuple) -> Tensor:
        value = call.function(*args)
        return value.to(leaves(args, Tensor)[0].dtype)

    def clean(self, value: Tensor) -> Tensor:
        return value

    def like(self, value: Tensor) -> Tensor:
        return value


class _Keeping(PointWalk):
    """Keeps the scalings that BatchNorms and Dropouts become, in the order of the walk."""

    def __init__(self) -> None:
        self.scalings: list[tuple[Callable, tuple]] = []
        self.settled = {function: self._kept(settle) for function, settle in SETTLED_BY_CLEAN.items()}

    def _kept(self, settle: Settle) -> Settle:
        def settled(*args: Any) -> tuple[Callable, tuple]:
            self.scalings.append(settle(*args))
            return self.scalings[-1]

        return settled


class _Alone(PointWalk):
    """Walks one image of a batch, with the scalings that all of the batch gave."""

    def __init__(self, scalings: Iterable[tuple[Callable, tuple]], image: int) -> None:
        remaining = iter(scalings)

        def settled(x: Any, *ignored: Any) -> tuple[Callable, tuple]:
            function, (_, *constants) = next(remaining)
            return function, (x, *[self._own(constant, image) for constant in constants])

        self.settled = dict.fromkeys(SETTLED_BY_CLEAN, settled)

    @staticmethod
    def _own(constant: Any, image: int) -> Any:
        """A BatchNorm's coefficients are of all images, a Dropout's mask has a part for each."""
        return constant[image : image + 1] if isinstance(constant, Tensor) and len(constant) > 1 else constant


@torch.no_grad()
def check_recording(model: nn.Module, image: Tensor) -> None:
    """Hold what is recorded of a copy of the module, in its present mode, against the copy; `model` stays as it is.

    Args:
        image: (1, ...), any valid input.

    Raises:
        UnsupportedOperation: the outputs differ, or one image's depends on the others in the batch.
    """
    images, failure = probes(image), None
    for dtype, made in _candidates(model, image.dtype):
        try:
            candidate = made()
            with _seeded(0, image.device):  # Dropout's masks are drawn in one order
                expected = candidate(images.to(dtype, copy=True))  # the module may write into its input
            graph: Graph[Tensor] = trace(candidate)
            with torch.enable_grad():  # bounds are wanted with gradients and without, and the forward may ask
                other: Graph[Tensor] = trace(candidate)
            recorded = []
            for each in [graph] if _meaning(other) == _meaning(graph) else [other, graph]:
                together = _Keeping()
                with _seeded(0, image.device):
                    recorded.append(_walk(each, images.to(dtype), together))
            with _seeded(1, image.device):
                alone = _each_alone(graph, images.to(dtype), together.scalings if model.training else None)
        except CerttrainError:
            raise
        except Exception as error:  # constants of one type, shapes of one batch, a lock: the module's own, of any type
            failure = error
            continue
        break
    else:
        reason = one_line(failure)
        raise UnsupportedOperation(f"{type(model).__name__} cannot be computed on {len(images)} images ({reason})")
    if expected.numel() == 0:
        raise UnsupportedOperation(f"{type(model).__name__} returns nothing")
    tolerances = (1e-7, 1e-12) if expected.dtype == torch.float64 else (1e-3, 1e-5)
    if not all(agree(output, expected, *tolerances) for output in recorded):
        raise UnsupportedOperation(
            f"the recorded operations of {type(model).__name__} do not reproduce its output: its forward does "
            "something tracing does not see"
        )
    if alone is None or not agree(alone, expected, *tolerances):
        raise UnsupportedOperation(
            f"{type(model).__name__} returns for one image what depends on others in the batch, or on random numbers"
        )


@torch.no_grad()
def try_on_copy(model: nn.Module, images: Tensor) -> None:
    """Raises what the recorded operations raise of such images, two at least, in the module's present mode.

    They are a copy's: in training mode a walk updates running statistics, and draws.
    """
    try:
        candidate = copied(model)
    except Exception:  # a module that cannot be copied
        if _trains(model):
            raise
        candidate = model
    with _seeded(0, images.device):
        _walk(trace(candidate), images, PointWalk())


def _trains(model: nn.Module) -> bool:
    """Is any part of it in training mode, where running it may change it?"""
    return any(module.training for module in model.modules())


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """The CPU's generator and that of `device` begin at `seed`; afterwards they are as they were, as all others are."""
    with generators_kept(device):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def probes(image: Tensor) -> Tensor:
    """(3, ...): noise as wide as the image (1, ...), a corner of its range, and the image with some noise."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(3, *image.shape[1:], generator=generator, dtype=torch.float64, device="cpu").to(
        image.device, image.dtype
    )
    low, high = image.amin(), image.amax()
    width = torch.where(high > low, high - low, 1.0)
    return low + width * torch.stack([noise[0], noise[1].round(), 0.9 * (image[0] - low) / width + 0.1 * noise[2]])


def _candidates(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[torch.dtype, Callable[[], nn.Module]]]:
    """What may stand for the module, the strictest first; making it fails where it cannot be copied, or a device has no
    float64."""
    for wanted in (torch.float64, dtype):
        yield wanted, partial(_copied_to, wanted, model)
    if not _trains(model):
        yield dtype, lambda: model


def _copied_to(dtype: torch.dtype, model: nn.Module) -> nn.Module:
    return copied(model).to(dtype)


def _meaning(graph: Graph[Tensor]) -> list[tuple[Any, ...]]:
    """Equal if two recordings are surely the same; a tensor that the forward has made is another each time."""
    return [
        (step.function, step.module, step.where, map_leaves((step.args, dict(step.kwargs or {})), Tensor, id))
        for step in graph.steps
    ]


def _walk(graph: Graph[Tensor], images: Tensor, walk: PointWalk) -> Tensor:
    output = graph.run(images, walk)
    return output if graph.final_softmax is None else graph.final_softmax(output, 1)


def _each_alone(graph: Graph[Tensor], images: Tensor, scalings: list[tuple[Callable, tuple]] | None) -> Tensor | None:
    """The outputs of one image after the other, with `scalings` or their own; None if a BatchNorm asks for several."""
    try:
        walks = [PointWalk() if scalings is None else _Alone(scalings, i) for i in range(len(images))]
        return torch.cat([_walk(graph, images[i : i + 1], walk) for i, walk in enumerate(walks)])
    except UsageError:
        return None


def agree(found: Tensor, expected: Tensor, relative: float, absolute: float, rounding: Tensor | float = 0.0) -> bool:
    """Are two sets of outputs (B, ...) the same?

    Each output may differ by `relative` of how it varies over the batch, by `absolute` of the largest, and by
    `rounding`, which may be a number for each (...); what is not finite must be the same.
    """
    if found.shape != expected.shape:
        return False
    finite = expected.isfinite()
    low, high = expected.where(finite, torch.inf).amin(0), expected.where(finite, -torch.inf).amax(0)
    tolerance = relative * (high - low).clamp(min=0) + absolute * expected.where(finite, 0.0).abs().amax() + rounding
    near = finite & ((found - expected).abs() <= tolerance)
    return bool((near | (found == expected) | (found.isnan() & expected.isnan())).all())
