"""BoundedModel: a network that can be asked what it does to whole sets of inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from certtrain.bounds import interval
from certtrain.bounds.box import Box
from certtrain.bounds.interval import Bounds
from certtrain.bounds.margins import merged_margins
from certtrain.bounds.tracing import SETTLED_BY_CLEAN, Call, Coefficients, Graph, scale_shift, trace
from certtrain.errors import UnsupportedOperation, unknown


@dataclass(frozen=True)
class CleanPass:
    """The logits (B, K) of a clean batch, and the BatchNorm coefficients that batch gives, both with gradient."""

    output: Tensor
    coefficients: Mapping[int, Coefficients]


class BoundedModel:
    """A network as a map of boxes to boxes.

    It holds the network's operations, recorded once for each of train and eval mode, and none of its state:
    parameters and buffers stay the module's, and `model.train()` / `model.eval()` take effect at the next call.

    Args:
        model: takes one batch of inputs (B, ...), returns logits (B, K).
        example_input: any valid batch; the recorded operations are checked against the module on it.

    Raises:
        UnsupportedOperation: the network cannot be traced, or an operation in it has no rule.
    """

    def __init__(self, model: nn.Module, example_input: Tensor) -> None:
        self.model = model
        self._graphs: dict[bool, Graph[Any]] = {}
        self._check_on(example_input)

    @property
    def graph(self) -> Graph[Any]:
        mode = self.model.training
        if mode not in self._graphs:
            graph = trace(self.model)
            _require_rules(graph)
            self._graphs[mode] = graph
        return self._graphs[mode]

    def ibp(
        self, box: Box, clean: Tensor | None = None, coefficients: Mapping[int, Coefficients] | None = None
    ) -> Bounds:
        """Interval bounds of every output, in one joint pass of the box and the clean input.

        Args:
            box: (B, ...) inputs.
            clean: (B, ...) a point of the box. Where BatchNorm is in training mode its statistics are those of the
                clean activations, for the box as well; there it must be given, elsewhere it may be.
            coefficients: use these for the BatchNorms (from `clean_pass`) instead of statistics of `clean`.
        """
        return interval.propagate(self.graph, box, clean, coefficients)

    def clean_pass(self, x: Tensor) -> CleanPass:
        """Logits of `x` (B, ...) and the BatchNorm coefficients they were computed with."""
        clean = _CleanTransform()
        output = self.graph.run(x, clean)
        return CleanPass(output, clean.coefficients)

    def margins(self, box: Box, labels: Tensor, method: str = "ibp", clean: Tensor | None = None) -> Tensor:
        """Lower bounds of z_y - z_j over the box.

        Args:
            box: (B, ...) inputs.
            labels: (B,) int64, the classes y.
            method: "ibp".
            clean: see `ibp`.

        Returns:
            (B, K), 0 in column y; an image whose other entries are all positive is proved.
        """
        if method not in MARGINS:
            raise unknown("bound method", method, MARGINS)
        return MARGINS[method](self.ibp(box, clean), labels)

    def _check_on(self, example_input: Tensor) -> None:
        """The recorded operations must compute what the module computes; eval mode, so that nothing is updated."""
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            with torch.no_grad():
                expected = self.model(example_input.clone())
                recorded = self.clean_pass(example_input).output
        finally:
            for module, mode in modes.items():
                module.training = mode
        scale = expected.abs().max().clamp(min=1.0)
        if recorded.shape != expected.shape or not ((recorded - expected).abs() <= 1e-3 * scale).all():
            raise UnsupportedOperation(
                f"the recorded operations of {type(self.model).__name__} do not reproduce its output: "
                "its forward does something tracing does not see"
            )


def ibp_margins(bounds: Bounds, labels: Tensor) -> Tensor:
    """Margins (B, K) from the boxes of a joint pass, the last affine operations merged with z_y - z_j."""
    return merged_margins(bounds.tail, bounds.tail_input, labels)


MARGINS = {"ibp": ibp_margins}


class _CleanTransform:
    """Walks the clean input alone (a `tracing.Transform`), and keeps the BatchNorms' coefficients."""

    def __init__(self) -> None:
        self.coefficients: dict[int, Coefficients] = {}

    def apply(self, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        if call.function is scale_shift:
            self.coefficients[call.index] = args[1:]
        return call.function(*args, **kwargs)

    def clean(self, value: Tensor) -> Tensor:
        return value

    def like(self, value: Tensor) -> Tensor:
        return value


def _require_rules(graph: Graph[Any]) -> None:
    for operation in graph.operations[1:]:
        if operation.tracked and operation.function not in interval.RULES.keys() | SETTLED_BY_CLEAN.keys():
            raise UnsupportedOperation(
                f"{operation.where} has no interval rule; use backend: lirpa, or write it with supported operations "
                "(certtrain/bounds/interval.py lists them)"
            )
