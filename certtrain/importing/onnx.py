"""Networks in ONNX as torch modules that bounds can follow. onnx2torch knows the operators; shapes are settled here.

onnx2torch overlooks attributes that it does not know: what it makes is held against the file, as a runtime computes it,
here on a few inputs, of which the network may make nothing, and by `properties.decide` on those that are asked about.
"""

from __future__ import annotations

import gzip
import importlib
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from certtrain.bounds.recording import probes
from certtrain.errors import DataError, MissingDependency, UnsupportedOperation, one_line, optional_module
from certtrain.verification.deployed import Comparison, Replay, one_by_one

EXTRA = "onnx"
OLDEST, NEWEST = 9, 17  # versions of ONNX's operators that onnx2torch knows all of
FLOAT = 1  # ONNX's number of float32
PRELU = "OnnxPReLU"  # onnx2torch's module


@dataclass(frozen=True, eq=False)
class OnnxNetwork:
    """module: takes (B, *input_shape), in eval mode; run: outputs (1, ...) of one input (1, *input_shape) by
    onnxruntime, without which by the slow reference that comes with onnx.

    Where the network is dead, constant or not a number between -1 and 1, that module and file agree there says little:
    before anything is proved of other inputs, `Comparison` has to say that they agree on these, as `decide` asks it to.
    """

    module: nn.Module
    input_shape: tuple[int, ...]
    run: Replay


def import_onnx(file: Path) -> OnnxNetwork:
    """Read a network of one input and one output (.onnx, or .onnx.gz), whose first axes are the batch.

    Raises:
        MissingDependency: onnx or onnx2torch is not installed.
        DataError: the file cannot be read, or is no network of that kind, in float32.
        UnsupportedOperation: it has operators that cannot be imported, and are named, or as a module computes
            something else.
    """
    onnx, _ = optional_module("onnx", EXTRA), optional_module("onnx2torch", EXTRA)
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        model = onnx.load_model_from_string(content)
        onnx.checker.check_model(model)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file} cannot be read: {one_line(error)}") from error
    except Exception as error:  # protobuf's and onnx's own, which depend on its version
        raise DataError(f"{file} is no network in ONNX: {one_line(error)}") from error
    name, shape = _input(model, file)
    network, model = model, _in_known_version(_with_plain_constants(model))
    _require_known_operators(model, file)
    try:
        model = _with_plain_shapes(model, name, shape)
        module = _settled(_converted(model).eval().float(), model.graph.node, shape)
        run = evaluator(network, name)
        same = _computes_the_same(module, run, shape)
    except Exception as error:  # of onnx2torch or a runtime, for a network that it did not foresee: of any type
        raise UnsupportedOperation(f"{file} cannot be imported: {one_line(error)}") from error
    if not same:
        raise UnsupportedOperation(
            f"{file} cannot be imported: onnx2torch makes a network of it that computes otherwise"
        )
    return OnnxNetwork(module, shape, run)


def _input(model: Any, file: Path) -> tuple[str, tuple[int, ...]]:
    """The name of the one input, and its shape without the batch axis."""
    constants = {constant.name for constant in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    if len(inputs) != 1 or len(model.graph.output) != 1:
        raise DataError(f"{file} has {len(inputs)} inputs and {len(model.graph.output)} outputs, not one of each")
    for value in (inputs[0], model.graph.output[0]):
        kind = value.type.tensor_type.elem_type
        if kind != FLOAT:
            raise DataError(f"{file}: {value.name} is {_type_name(kind)}: only networks in float32 can be imported")
    batch, *sizes = [axis.dim_value for axis in inputs[0].type.tensor_type.shape.dim] or [0]
    if batch > 1 or not sizes or not all(size > 0 for size in sizes):
        shown = "x".join(str(size or "?") for size in (batch, *sizes))
        raise DataError(f"{file} takes an input of shape {shown}: expected a batch axis, of 1 or any size, and others")
    return inputs[0].name, tuple(sizes)


def _type_name(kind: int) -> str:
    name: str = importlib.import_module("onnx").TensorProto.DataType.Name(kind)
    return name.lower()


def _with_plain_constants(model: Any) -> Any:
    """Every constant as an initializer: exporters write weights that are equal as one, and Identity nodes of it."""
    plain = type(model)()
    plain.CopyFrom(model)
    graph = plain.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    outputs = {value.name for value in graph.output}
    nodes = list(graph.node)
    del graph.node[:]
    for node in nodes:
        value = None
        if node.op_type == "Identity" and not node.domain:
            value = constants.get(node.input[0])
        elif node.op_type == "Constant" and node.attribute[0].name == "value":
            value = node.attribute[0].t
        if value is None or node.output[0] in outputs:
            graph.node.append(node)
            continue
        constant = graph.initializer.add()
        constant.CopyFrom(value)
        constant.name = node.output[0]
        constants[constant.name] = constant
    return plain


def _with_plain_shapes(model: Any, name: str, input_shape: Sequence[int]) -> Any:
    """Without the 0 in a reshaping, ONNX's word for an axis as it is, wherever the sizes of one input are known."""
    onnx = importlib.import_module("onnx")
    asked = {node.input[1] for node in model.graph.node if _keeps_axes(node)}
    shapes = {
        tensor.name: onnx.numpy_helper.to_array(tensor).tolist()
        for tensor in model.graph.initializer
        if tensor.name in asked
    }
    if not any(0 in shape for shape in shapes.values()):
        return model
    single = type(model)()
    single.CopyFrom(model)
    (entry,) = (value for value in single.graph.input if value.name == name)
    for axis, size in zip(entry.type.tensor_type.shape.dim, (1, *input_shape), strict=True):
        axis.dim_value = size
    inferred = onnx.shape_inference.infer_shapes(single).graph
    sizes = {
        value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*inferred.input, *inferred.value_info)
    }
    for number, node in enumerate(single.graph.node):
        shape, before = shapes.get(node.input[1], []) if _keeps_axes(node) else [], sizes.get(node.input[0], [])
        if 0 in shape and len(before) >= len(shape) - shape[::-1].index(0):
            plain = np.array([size or before[axis] for axis, size in enumerate(shape)], np.int64)
            name = f"shape of node {number}"
            single.graph.initializer.append(onnx.numpy_helper.from_array(plain, name))
            node.input[1] = name
    return single


def _keeps_axes(node: Any) -> bool:
    """Whether 0 in the shape that a node asks for is an axis as it is."""
    return node.op_type == "Reshape" and not any(part.name == "allowzero" and part.i for part in node.attribute)


def _in_known_version(model: Any) -> Any:
    """In the newest version of ONNX's operators that onnx2torch knows all of, where the file is in none of them."""
    version = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if OLDEST <= version <= NEWEST:
        return model
    try:
        return importlib.import_module("onnx.version_converter").convert_version(model, NEWEST)
    except Exception:  # of onnx's own, for an operator that has changed too much
        return model


def _require_known_operators(model: Any, file: Path) -> None:
    from onnx2torch.node_converters import get_converter

    versions = {entry.domain: entry.version for entry in model.opset_import}
    unknown = []
    for node in model.graph.node:
        try:
            get_converter(domain=node.domain, operation_type=node.op_type, version=versions.get(node.domain, 1))
        except NotImplementedError:
            unknown.append(node.op_type)
    if unknown:
        raise UnsupportedOperation(
            f"{file} has ONNX operators that cannot be imported: {', '.join(sorted(set(unknown)))}"
        )


def _converted(model: Any) -> fx.GraphModule:
    """By onnx2torch; where that fails, an UnsupportedOperation names the operator, which onnx2torch does not."""
    from onnx2torch.node_converters import get_converter
    from onnx2torch.onnx_graph import OnnxGraph

    try:
        return importlib.import_module("onnx2torch").convert(model)
    except Exception:
        graph, versions = OnnxGraph(model.graph), {entry.domain: entry.version for entry in model.opset_import}
        for proto, node in zip(model.graph.node, graph.nodes.values(), strict=True):
            converter = get_converter(domain=node.domain, operation_type=proto.op_type, version=versions[node.domain])
            try:
                converter(node, graph)
            except Exception as error:  # of any type, for what is in none of its words
                raise UnsupportedOperation(f"{_as_written(proto)}: {one_line(error)}") from error
        raise


def _as_written(node: Any) -> str:
    return f"operator {node.op_type} ({node.name or node.output[0]:.60}) has no import as it is written"


class _Settling(fx.Tracer):
    """Walks through onnx2torch's modules with the file's constants as values, so that shapes are plain numbers.

    PRelu's, which asks for the shape of its input, is left as it is.

    Args:
        nodes: of the file, by the names of onnx2torch's modules.
    """

    def __init__(self, nodes: Mapping[str, Any]) -> None:
        super().__init__()
        self.nodes = nodes

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except UnsupportedOperation:
            raise
        except Exception as error:  # of any type: what the module asks of a value that is none yet
            raise UnsupportedOperation(_as_written(self.nodes[self.path_of_module(m).partition(".")[0]])) from error

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m).__name__ == PRELU or super().is_leaf_module(m, module_qualified_name)

    def to_bool(self, obj: fx.Proxy) -> bool:
        if obj.node.target == "is_floating_point":  # whether a division is one of integers
            return True
        return super().to_bool(obj)


class _Shapes(fx.Interpreter):
    """Runs a graph and keeps the shape of every tensor in it."""

    def __init__(self, module: fx.GraphModule, nodes: Mapping[str, Any]) -> None:
        super().__init__(module)
        self.extra_traceback = False  # nothing is added to an error's message
        self.nodes = nodes
        self.of: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        try:
            value = super().run_node(n)
        except Exception as error:  # of any type: what a call of torch makes of arguments that are not its
            source = next(iter(n.meta.get("nn_module_stack", ())), "")
            if source not in self.nodes:
                raise
            raise UnsupportedOperation(_as_written(self.nodes[source])) from error
        if isinstance(value, Tensor):
            self.of[n] = tuple(value.shape)
        return value


def _settled(module: fx.GraphModule, nodes: Sequence[Any], input_shape: Sequence[int]) -> nn.Module:
    """The module in plain calls of torch, for any batch: a reshaping of one input has its batch axis left open.

    Args:
        nodes: of the file, of each of which onnx2torch has made a module that it calls, in this order.
    """
    called = [node.target for node in module.graph.nodes if node.op == "call_module"]
    sources = dict(zip(called, nodes, strict=True))
    tracer = _Settling(sources)
    graph = tracer.trace(module)
    settled = fx.GraphModule(tracer.root, graph)
    shapes = _Shapes(settled, sources)
    with torch.no_grad():
        shapes.run(torch.zeros(1, *input_shape))
    for node in settled.graph.nodes:
        if node.target is torch.reshape:
            before, after = shapes.of[node.args[0]], shapes.of[node]
            if before[:1] == after[:1] == (1,):
                node.args = (node.args[0], (-1, *after[1:]))
        elif node.op == "call_module" and type(settled.get_submodule(node.target)).__name__ == PRELU:
            x, slope = node.args
            if not _is_by_channel(shapes.of[slope], shapes.of[x]):
                raise UnsupportedOperation(
                    f"PRelu has slopes {shapes.of[slope]}: one, or one a channel, can be followed"
                )
            with settled.graph.inserting_before(node):
                flat = settled.graph.call_function(torch.reshape, (slope, (-1,)))
                rectified = settled.graph.call_function(functional.prelu, (x, flat))
            node.replace_all_uses_with(rectified)
            settled.graph.erase_node(node)
    settled.recompile()
    return settled.eval()


def _is_by_channel(slope: Sequence[int], x: Sequence[int]) -> bool:
    """Whether slopes of this shape, stretched as ONNX does, differ along the second axis of an input alone."""
    stretched = (*(1 for _ in x[len(slope) :]), *slope)
    return all(size == 1 or axis == 1 for axis, size in enumerate(stretched))


def evaluator(model: Any, name: str) -> Replay:
    """What a model in ONNX computes of its input `name`, by onnxruntime or else by onnx's own reference."""
    try:
        onnxruntime = optional_module("onnxruntime", EXTRA)
    except MissingDependency:
        session = importlib.import_module("onnx.reference").ReferenceEvaluator(model)
    else:
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> Tensor:
        (output,) = session.run(None, {name: np.ascontiguousarray(x.detach().cpu().float().numpy())})
        return torch.from_numpy(np.array(output))

    return run


def _computes_the_same(module: nn.Module, run: Replay, input_shape: Sequence[int]) -> bool:
    """As the file, on single inputs of either sign."""
    inputs = probes(torch.linspace(-1, 1, math.prod(input_shape)).view(1, *input_shape))
    return Comparison(module).agrees(inputs, one_by_one(run, inputs))
