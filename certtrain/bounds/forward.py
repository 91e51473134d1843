"""What a network's `forward` does, hooks and subclasses' own forwards included, as torch.fx writes it down.

Beyond what fx does: in-place operators stay what they are; modules that the tables of operations have are one call, and
torch's own are unless their forward is another; parts whose number the call says can be unpacked; what is computed from
the network's own parameters and buffers is recorded however the forward came by them; and a part under autocast or
no_grad of its own is refused.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property

from certtrain.bounds.graph import leaves, map_leaves
from certtrain.bounds.operations.inspections import INSPECTING_METHODS
from certtrain.bounds.operations.record import module_decomposition, module_entry
from certtrain.errors import CerttrainError, UnsupportedOperation, one_line
from certtrain.unchanged import unchanged

ROOT = "model"


class Root(nn.Module):
    """Calls the model, so that its own hooks are recorded too; constants that fx keeps go here, not into the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        return self.model(x)


class _Proxy(fx.Proxy):
    """fx writes `x += y` down as an addition; that the old `x` is gone must be kept."""

    def _inplace(self, function: Callable, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self._inplace(operator.iadd, other)

    def __isub__(self, other: Any) -> fx.Proxy:
        return self._inplace(operator.isub, other)

    def __imul__(self, other: Any) -> fx.Proxy:
        return self._inplace(operator.imul, other)

    def __itruediv__(self, other: Any) -> fx.Proxy:
        return self._inplace(operator.itruediv, other)

    def __ipow__(self, other: Any) -> fx.Proxy:
        return self._inplace(operator.ipow, other)


def _ambient() -> tuple[bool, ...]:
    """What changes the meaning of an operation from outside."""
    return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # what is computed from a buffer is recorded, and computed again at every call

    def __init__(self) -> None:
        super().__init__()
        self._ambient = _ambient()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            module_entry(m) is not None
            or module_decomposition(m) is not None
            or (
                type(m).__module__.startswith("torch.nn")
                and not isinstance(m, nn.Sequential | nn.ModuleList)
                and "forward" not in vars(m)
            )
        )

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def iter(self, obj: Any) -> Iterator[fx.Proxy]:
        """`for part in x.chunk(3, 1)`: of tensors of a number that the call says."""
        node = obj.node
        if node.op == "call_module":  # whatever it is named
            module = self.root.get_submodule(str(node.target))
            return iter([obj[0], obj[1]]) if isinstance(module, nn.MultiheadAttention) else super().iter(obj)
        if node.target in (torch.chunk, "chunk"):
            return iter([obj[i] for i in range(node.args[1] if len(node.args) > 1 else node.kwargs["chunks"])])
        sizes = node.args[1] if len(node.args) > 1 else None
        if node.target in (torch.split, "split") and isinstance(sizes, list | tuple):
            return iter([obj[i] for i in range(len(sizes))])
        return super().iter(obj)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _ambient() != self._ambient:
            raise UnsupportedOperation(
                "a part of the network runs under torch.autocast or no_grad of its own, which bounds would not follow"
            )
        return super().create_node(*args, **kwargs)


class _OwnTensors(TorchFunctionMode):
    """Records what a forward computes from the network's parameters and buffers, however it came by them.

    fx does so for `self.weight`; `next(self.parameters())`, `self._buffers["w"]` or a state dict give it the tensor of
    today, and what is computed from that would be a constant.
    """

    def __init__(self, tracer: fx.Tracer, root: nn.Module) -> None:
        super().__init__()
        self._tracer = tracer
        self._paths = {id(tensor): path for path, tensor in chain(root.named_parameters(), root.named_buffers())}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        property_of = getattr(func, "__self__", None) if name in ("__get__", "__set__") else None
        shows = property_of is not None and property_of.__name__ not in _VALUED_PROPERTIES
        if shows or name in _SHOWING or not any(id(tensor) in self._paths for tensor in leaves((args, kwargs), Tensor)):
            return func(*args, **kwargs)
        args, kwargs = map_leaves((args, kwargs), Tensor, self._stand_in)
        if property_of is not None:
            return getattr(args[0], property_of.__name__)
        if is_tensor_method_or_property(func):
            return getattr(args[0], name)(*args[1:], **kwargs)
        return func(*args, **kwargs)

    def _stand_in(self, tensor: Tensor) -> Any:
        path = self._paths.get(id(tensor))
        return tensor if path is None else self._tracer.create_proxy("get_attr", path, (), {})


_VALUED_PROPERTIES = {"T", "mT", "H", "mH", "data", "real", "imag"}
_SHOWING = INSPECTING_METHODS | {"__len__", "__hash__", "__repr__", "__format__", "__dir__", "is_floating_point"}


def record_forward(model: nn.Module) -> tuple[Root, fx.Graph]:
    """What `model`'s forward does in its present mode, as torch.fx writes it down, and the root of its targets.

    Raises:
        UnsupportedOperation: control flow that depends on the input's values, a part under autocast or no_grad of its
            own, or whatever the forward raises.
    """
    root, tracer = Root(model), _Tracer()
    try:
        with unchanged(model), _OwnTensors(tracer, root):
            return root, tracer.trace(root)
    except CerttrainError:
        raise
    except Exception as error:  # of the user's forward, met with a stand-in for its input: of any type
        reason = one_line(error)
        asks = isinstance(error, TraceError)
        fault = "must not branch or loop on the input" if asks else "fails with a stand-in for the input"
        raise UnsupportedOperation(
            f"{type(model).__name__} cannot be traced: its forward {fault} ({reason})"
        ) from error
