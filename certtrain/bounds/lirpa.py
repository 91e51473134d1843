"""The same questions asked of auto_LiRPA: an independent witness for our bounds, and another backend.

auto_LiRPA is optional; nothing here imports it before it is needed. The oldest release supported is 0.3, which was
written for torch 1.12 and numpy 1; what it misses in today's is supplied by `load_auto_lirpa` and nowhere else.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from certtrain.bounds.batch_norm import Coefficients
from certtrain.bounds.box import Box, refuse_empty
from certtrain.bounds.graph import Graph
from certtrain.bounds.linear import AlphaOptions
from certtrain.bounds.margins import better, check_labels, only_finite, wrong_classes
from certtrain.bounds.model import DEFAULT_ALPHA, CleanPass, Split, check_question
from certtrain.bounds.results import Bounds
from certtrain.errors import MissingDependency, UnsupportedOperation, UsageError, unknown
from certtrain.modules import copied

if TYPE_CHECKING:
    from certtrain.verification.branch_and_bound import Search

_METHODS = {"ibp": "IBP", "crown-ibp": "CROWN-IBP", "crown": "CROWN", "alpha-crown": "CROWN-Optimized"}

_BOUND_OPTIONS = {
    # The lower slope of an unstable ReLU is 1 where u > -l, else 0; 0.3 calls the option "relu".
    "activation_bound_option": "adaptive",
    "relu": "adaptive",
    # Otherwise neurons that IBP calls stable keep their IBP bounds, and "CROWN" is a mixture of the two.
    "sparse_intermediate_bounds": False,
    # 0.3 stores the slopes of alpha-crown in too small a tensor where a layer has stable neurons.
    "sparse_features_alpha": False,
    "sparse_spec_alpha": False,
    # The faster "patches" refuse an input normalised by constants of shape (C, 1, 1).
    "conv_mode": "matrix",
}


def load_auto_lirpa() -> ModuleType:
    """Import auto_LiRPA, 0.3 or newer, supplying what an old release misses in the installed torch and numpy.

    Raises:
        MissingDependency: it is not installed, or cannot be imported.
    """
    recursion = sys.getrecursionlimit()
    try:
        with warnings.catch_warnings():  # 0.3 sets a global filter
            try:
                module = importlib.import_module("auto_LiRPA")
            except ImportError:
                with _names_imported_by_0_3():
                    module = importlib.import_module("auto_LiRPA")
    except ImportError as error:
        raise MissingDependency(
            f"auto_LiRPA cannot be imported ({error}); install it with `pip install --no-deps auto_LiRPA appdirs ninja "
            "tqdm` (--no-deps because 0.3 declares an old torch, though it runs on this one)"
        ) from error
    finally:
        sys.setrecursionlimit(recursion)  # which it raises to where deep recursion ends the process, not in an error
    _patch_0_3(module)
    return module


@contextmanager
def _names_imported_by_0_3() -> Iterator[None]:
    """Supply, while auto_LiRPA is being imported, two names that numpy 2.0 and torch 1.13 dropped."""
    numpy_name = "numpy.lib.arraysetops"
    stub: Any = ModuleType(numpy_name)
    stub.isin = np.isin
    helper: Any = importlib.import_module("torch.onnx.symbolic_helper")
    lacks_numpy, lacks_opset = np.lib.NumpyVersion(np.__version__) >= "2.0.0", not hasattr(helper, "_set_opset_version")
    if lacks_numpy:
        sys.modules[numpy_name] = stub
    if lacks_opset:
        helper._set_opset_version = _set_opset_version
    try:
        yield
    finally:
        if lacks_numpy:
            del sys.modules[numpy_name]
        if lacks_opset:
            del helper._set_opset_version


def _set_opset_version(version: int) -> None:
    _torchscript_exporter("_globals").GLOBALS.export_onnx_opset_version = version


def _torchscript_exporter(module: str) -> ModuleType:
    try:
        return importlib.import_module(f"torch.onnx._internal.torchscript_exporter.{module}")
    except ImportError:  # before torch 2.9
        return importlib.import_module(f"torch.onnx.{module}")


def _patch_0_3(auto_lirpa: ModuleType) -> None:
    if not hasattr(auto_lirpa.parse_graph, "get_node_attribute") and not hasattr(torch._C.Node, "__getitem__"):
        # It reads a graph node's attributes as node[name], which torch 1.13 dropped.
        node: Any = torch._C.Node
        node.__getitem__ = _torchscript_exporter("symbolic_helper")._node_get

    members = auto_lirpa.BoundedModule._named_members
    if "remove_duplicate" not in inspect.signature(members).parameters:
        # torch 2.0 added this argument to the method of nn.Module that it overrides; it always removes duplicates.
        def named_members(self: nn.Module, *args: Any, remove_duplicate: bool = True, **kwargs: Any) -> Iterator:
            return members(self, *args, **kwargs)

        auto_lirpa.BoundedModule._named_members = named_members


class LirpaModel:
    """`BoundedModel`'s questions, answered by auto_LiRPA.

    The model is converted once, from a copy in eval mode, so that converting leaves it untouched. Each call then reads
    the model's present parameters (gradients reach them), buffers and modes. Where a BatchNorm is in training mode, its
    statistics are those of the clean activations, and one call updates its running statistics once.

    A model moved to another dtype or device must be wrapped again. 0.3 takes neither a last layer without bias nor a
    BatchNorm without weight, and needs batches of the example's size where the model flattens by `x.view(len(x), -1)`.
    """

    def __init__(self, model: nn.Module, example_input: Tensor) -> None:
        self.model = model
        self.classes = _output_size(model, example_input)
        self._lirpa = load_auto_lirpa()
        if any(isinstance(module, nn.modules.dropout._DropoutNd) for module in model.modules()):
            raise UnsupportedOperation("auto_LiRPA's bounds of Dropout are not sound: replace it by nn.Identity")
        try:
            self._net = self._lirpa.BoundedModule(
                copied(model).eval(), example_input.detach(), bound_opts=copy.deepcopy(_BOUND_OPTIONS)
            )
        except NotImplementedError as error:
            raise UnsupportedOperation(f"auto_LiRPA {self._lirpa.__version__} cannot convert this model") from error
        ops = importlib.import_module("auto_LiRPA.bound_ops")
        nodes = list(self._net.children())
        self._parameters = [n for n in nodes if isinstance(n, ops.BoundParams)]
        self._buffers = [n for n in nodes if isinstance(n, ops.BoundBuffers)]
        self._batch_norms: list[tuple[Any, Any]] = [
            (n, model.get_submodule(n.inputs[3].ori_name.rpartition(".")[0]))
            for n in nodes
            if isinstance(n, ops.BoundBatchNormalization)
        ]
        self._relus = [n for n in nodes if isinstance(n, ops.BoundRelu)]
        self._affine = next((n for n in nodes if isinstance(n, (ops.BoundConv, ops.BoundLinear))), None)

    @property
    def graph(self) -> Graph[Any]:
        """Not supported."""
        raise UsageError("backend lirpa has no record of the network's operations, by which a step is compiled")

    @property
    def rectifiers(self) -> int:
        """How many ReLUs there are."""
        return len(self._relus)

    def split(self, tail: int) -> Split:
        """Not supported."""
        raise UsageError("backend lirpa cannot cut a network in two: use backend native")

    def ibp(
        self,
        box: Box,
        clean: Tensor | None = None,
        coefficients: Mapping[int, Coefficients] | None = None,
        record: bool = False,
        arithmetic: str | None = None,
        from_center: bool = False,
        shrink: float | None = None,
    ) -> Bounds:
        """Interval bounds of the logits and of every ReLU's input.

        Args:
            box: the inputs, in pixel space.
            clean: the point whose activations give BatchNorm its statistics; needed where one is in training mode.
            coefficients, arithmetic, from_center, shrink: not supported.
            record: without effect; `margins_of` asks about the latest pass.
        """
        _refuse_coefficients(coefficients)
        _refuse_arithmetic(arithmetic)
        if shrink is not None:
            raise UsageError("backend lirpa cannot shrink boxes behind ReLUs: use backend native")
        if from_center:
            raise UsageError("backend lirpa takes BatchNorm's statistics from the clean input: pass `clean`")
        refuse_empty(box)
        logits, self._point = self._forward(box, clean)
        with _default_dtype(logits.dtype):
            output = Box(*self._net.compute_bounds(method="IBP"))
        self._latest = Bounds(
            clean=None if clean is None else logits,
            output=output,
            relu_inputs=tuple(Box(*relu.inputs[0].interval) for relu in self._relus),
            affine_input=box if self._affine is None else Box(*self._affine.inputs[0].interval),
            tail=(),
            tail_input=output,
        )
        return self._latest

    def ibp_in_segments(
        self,
        box: Box,
        coefficients: Mapping[int, Coefficients],
        observe: Callable[[Box], Any],
        segments: int | None = None,
        shrink: float | None = None,
    ) -> Bounds:
        """Not supported."""
        raise UsageError("backend lirpa cannot compute boxes again: set training.activation_checkpointing to false")

    def clean_pass(self, x: Tensor, coefficients: Mapping[int, Coefficients] | None = None) -> CleanPass:
        """Logits of `x`; no BatchNorm coefficients, which `ibp` could not take."""
        _refuse_coefficients(coefficients)
        return CleanPass(self.model(x.clone()), {})

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
    ) -> Tensor:
        """Lower bounds (B, K) of z_y - z_j, 0 at j = y; as `BoundedModel.margins`.

        Args:
            box: the inputs, in pixel space.
            labels: y, (B,).
            method: ibp, crown-ibp, crown or alpha-crown.
            clean: as in `ibp`.
            intersect: take the better of this bound and the cheaper ones.
            alpha: the steps of alpha-crown, whose bounds carry no gradient; the rates are auto_LiRPA's own.
            max_memory, arithmetic, early_stop, search: not supported.
        """
        _refuse_arithmetic(arithmetic)
        if max_memory is not None:
            raise UsageError("backend lirpa cannot keep to a max_memory: ask about fewer images at once")
        if early_stop:
            raise UsageError("backend lirpa cannot leave out images that are proved: ask without early_stop")
        if search is not None:
            raise UsageError("backend lirpa does not search: branch and bound is for backend native")
        if alpha != AlphaOptions(steps=alpha.steps):
            raise UsageError("backend lirpa optimises slopes at rates of its own: alpha can only say how many steps")
        if method not in _METHODS:
            raise unknown("bound method", method, _METHODS)
        check_question(box, labels, self.classes)
        names = list(_METHODS)
        asked = names[: names.index(method) + 1] if intersect else [method]
        optimizes = method == "alpha-crown"  # which needs gradients of its own, and leaves none
        with torch.set_grad_enabled(optimizes or torch.is_grad_enabled()):
            logits, point = self._forward(box, clean, frozen=optimizes)
            best = reduce(better, [self._margins(logits, point, labels, name, alpha.steps) for name in asked])
        best = only_finite(best, labels)
        return best.detach() if optimizes else best

    def margins_of(self, bounds: Bounds, labels: Tensor, method: str = "ibp") -> Tensor:
        """Margins (B, K) of the pass that gave `bounds`, the latest one; raw."""
        if bounds is not self._latest:
            raise UsageError("auto_LiRPA remembers its latest pass only: ask before the next one")
        check_labels(labels, *bounds.output.shape)
        return self._margins(bounds.output.like, self._point, labels, method)

    def _margins(self, logits: Tensor, point: Tensor, labels: Tensor, method: str, steps: int = 0) -> Tensor:
        others = wrong_classes(labels, logits.shape[1])
        identity = torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device)
        # Passing x makes it forget the boxes that an earlier question left; the clean activations stay.
        question = {"x": (point,), "C": identity[labels][:, None] - identity[others], "method": _METHODS[method]}
        if method == "alpha-crown":
            self._net.set_bound_opts({"optimize_bound_args": {"iteration": steps}})
        with _default_dtype(logits.dtype):
            lower, _ = self._net.compute_bounds(bound_upper=False, **question)
        return torch.zeros_like(logits).scatter(1, others, lower)

    def _forward(self, box: Box, clean: Tensor | None, frozen: bool = False) -> tuple[Tensor, Tensor]:
        """Run the clean pass, which the bounds that are asked for next build on; its logits, and its bounded input."""
        self._follow_model(frozen)
        if clean is None:
            if any(node.training for node, _ in self._batch_norms):
                raise UsageError("BatchNorm is in training mode: pass `clean`, whose activations give its statistics")
            clean = box.center
        for node, module in self._batch_norms:
            if node.training:  # its forward updates the shared running statistics, but does not count
                module.num_batches_tracked.add_(1)
                node.momentum = 1 / module.num_batches_tracked.item() if module.momentum is None else module.momentum
        if frozen:
            box, clean = box.detach(), clean.detach()
        ptb = self._lirpa.PerturbationLpNorm(norm=np.inf, x_L=box.lower, x_U=box.upper)
        point = self._lirpa.BoundedTensor(clean, ptb)
        return self._net(point), point

    def _follow_model(self, frozen: bool) -> None:
        state = self.model.state_dict(keep_vars=True)
        for node in self._parameters:
            parameter = state[node.ori_name]
            # Optimising the slopes calls backward, which must not add to the gradients of the model.
            node.param = nn.Parameter(parameter.detach(), requires_grad=False) if frozen else parameter
            node.training = node.param.requires_grad  # its forward sets requires_grad to its mode
        for node in self._buffers:
            node.buffer = state[node.ori_name]
            node.from_input = False  # 0.3 takes a buffer for a batch of inputs, and sums over the wrong axis
        for node, module in self._batch_norms:
            node.training = module.training


def _refuse_coefficients(coefficients: Mapping[int, Coefficients] | None) -> None:
    if coefficients is not None:
        raise UsageError("backend lirpa cannot work through a batch in parts: set training.accumulation to 1")


def _refuse_arithmetic(arithmetic: str | None) -> None:
    if arithmetic is not None:
        raise UsageError(f"backend lirpa has no bounds that cover the rounding of {arithmetic}: use backend native")


def _output_size(model: nn.Module, example_input: Tensor) -> int:
    with torch.no_grad():
        return copied(model).eval()(example_input).shape[-1]


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """auto_LiRPA makes some of its constants in the default dtype."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)
