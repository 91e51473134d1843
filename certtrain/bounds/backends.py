"""Who computes the bounds: the questions that any backend is asked, and the choice of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from certtrain.bounds.batch_norm import BatchSum, Coefficients
from certtrain.bounds.box import Box
from certtrain.bounds.graph import Graph
from certtrain.bounds.linear import AlphaOptions
from certtrain.bounds.lirpa import LirpaModel
from certtrain.bounds.model import DEFAULT_ALPHA, BoundedModel, CleanPass, Split
from certtrain.bounds.results import Bounds
from certtrain.errors import UsageError, unknown

if TYPE_CHECKING:
    from certtrain.verification.branch_and_bound import Search

BACKENDS = ("native", "lirpa")


class Bounder(Protocol):
    """What training and verification ask of a network; `BoundedModel` says what each question means.

    `BoundedModel` answers all of them, `lirpa.LirpaModel` some; it raises UsageError for the others.
    """

    model: nn.Module

    @property
    def classes(self) -> int: ...

    @property
    def rectifiers(self) -> int: ...

    @property
    def graph(self) -> Graph[Any]: ...

    def ibp(
        self,
        box: Box,
        clean: Tensor | None = None,
        coefficients: Mapping[int, Coefficients] | None = None,
        record: bool = False,
        arithmetic: str | None = None,
        from_center: bool = False,
        shrink: float | None = None,
    ) -> Bounds: ...

    def ibp_in_segments(
        self,
        box: Box,
        coefficients: Mapping[int, Coefficients],
        observe: Callable[[Box], Any],
        segments: int | None = None,
        shrink: float | None = None,
    ) -> Bounds: ...

    def clean_pass(self, x: Tensor, coefficients: Mapping[int, Coefficients] | None = None) -> CleanPass: ...

    def split(self, tail: int) -> Split: ...

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
    ) -> Tensor: ...

    def margins_of(self, bounds: Bounds, labels: Tensor, method: str = "ibp") -> Tensor: ...


def bounded_model(
    model: nn.Module, example_input: Tensor, backend: str = "native", batch_sum: BatchSum | None = None
) -> Bounder:
    """`model`, ready to be asked for bounds by the backend of that name.

    Args:
        model: takes one batch of inputs (B, ...), returns logits (B, K).
        example_input: any valid batch.
        backend: "native", or "lirpa" to have auto_LiRPA answer, for networks with operations that have no rule here.
        batch_sum: see `BoundedModel`; native only.

    Raises:
        UnsupportedOperation: the backend cannot take this network.
        MissingDependency: it is auto_LiRPA, which is not installed.
        UsageError: unknown backend, or one that cannot do what was asked.
    """
    if backend not in BACKENDS:
        raise unknown("backend", backend, BACKENDS)
    if backend == "native":
        return BoundedModel(model, example_input, batch_sum=batch_sum)
    if batch_sum is not None:
        raise UsageError("backend lirpa takes whole batches: train in one process")
    return LirpaModel(model, example_input)
