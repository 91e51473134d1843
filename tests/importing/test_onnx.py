from __future__ import annotations

import gzip
import sys

import numpy as np
import onnx
import onnx2torch
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from certtrain.bounds import BoundedModel, Box, linf_box
from certtrain.errors import DataError, UnsupportedOperation
from certtrain.export.onnx import export_onnx
from certtrain.importing.onnx import import_onnx
from certtrain.verification.properties import Case, decide
from tests.networks import narrow_cnn7, pooling_network, randomized, residual_network


@pytest.mark.parametrize("build", [narrow_cnn7, residual_network, pooling_network])
def test_a_network_that_was_exported_comes_back(build, tmp_path):
    torch.manual_seed(0)
    model, file = randomized(build()).eval(), tmp_path / "model.onnx"

    shape = (3, 16, 16)
    export_onnx(model, shape, file)
    found = import_onnx(file)
    assert found.input_shape == shape
    images = torch.rand(3, *shape)
    labels = model(images).argmax(1)
    torch.testing.assert_close(found.module(images), model(images), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.run(images[:1]), model(images[:1]), rtol=1e-4, atol=1e-5)
    box = linf_box(images, 1 / 255)
    for method in ("ibp", "crown"):
        expected = BoundedModel(model, images).margins(box, labels, method)
        margins = BoundedModel(found.module, images).margins(box, labels, method)
        torch.testing.assert_close(margins, expected, rtol=1e-4, atol=1e-4)


def network(nodes, shape, constants, opset, output=(1, 3), kind=TensorProto.FLOAT):
    """An ONNX model of `nodes`, whose last result is the output."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info(nodes[-1].output[0], kind, output)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def node(kind, inputs, output, **attributes):
    return helper.make_node(kind, inputs, [output], **attributes)


WEIGHT, OTHER = (np.random.default_rng(0).standard_normal(shape, np.float32) for shape in ((12, 5), (5, 3)))
LINEAR = {"w": WEIGHT, "b": OTHER[:, 0].copy(), "v": OTHER}
SPELLINGS = {
    "reshaped to one input": (
        [node("Reshape", ["x", "shape"], "flat"), node("MatMul", ["flat", "w"], "a"), node("Add", ["a", "b"], "c"),
         node("Relu", ["c"], "d"), node("MatMul", ["d", "v"], "y")],
        {**LINEAR, "shape": np.array([1, -1])},
    ),
    "normalised, and a general product": (
        [node("Sub", ["x", "mean"], "s"), node("Div", ["s", "std"], "t"), node("Flatten", ["t"], "flat", axis=1),
         node("Gemm", ["flat", "w", "b"], "a", alpha=0.5, beta=2.0), node("Sigmoid", ["a"], "d"),
         node("MatMul", ["d", "v"], "y")],
        {**LINEAR, "mean": np.full((1, 3, 1, 1), 0.5, np.float32), "std": np.full((1, 3, 1, 1), 2, np.float32)},
    ),
    "a bias that is another one's, and weights from nodes": (
        [node("Identity", ["b"], "c"), node("Identity", ["c"], "d"),
         node("Constant", [], "w", value=numpy_helper.from_array(WEIGHT)), node("Flatten", ["x"], "flat"),
         node("Gemm", ["flat", "w", "d"], "a"), node("Relu", ["a"], "h"), node("Add", ["h", "b"], "e"),
         node("MatMul", ["e", "v"], "y")],
        {name: value for name, value in LINEAR.items() if name != "w"},
    ),
    "transposed, with the shape of a node": (
        [node("Transpose", ["x"], "t", perm=[0, 2, 3, 1]),
         node("Constant", [], "shape", value=numpy_helper.from_array(np.array([-1, 12]))),
         node("Reshape", ["t", "shape"], "flat"), node("MatMul", ["flat", "w"], "a"), node("Tanh", ["a"], "d"),
         node("MatMul", ["d", "v"], "y")],
        LINEAR,
    ),
    "reshaped with axes that stay as they are": (
        [node("Reshape", ["x", "halves"], "t"), node("Reshape", ["t", "shape"], "flat"),
         node("MatMul", ["flat", "w"], "a"), node("Relu", ["a"], "d"), node("MatMul", ["d", "v"], "y")],
        {**LINEAR, "halves": np.array([0, 0, -1]), "shape": np.array([0, -1])},
    ),
    "slopes of a channel, and one slope": (
        [node("PRelu", ["x", "slopes"], "t"), node("Flatten", ["t"], "flat"), node("MatMul", ["flat", "w"], "a"),
         node("PRelu", ["a", "slope"], "d"), node("MatMul", ["d", "v"], "y")],
        {**LINEAR, "slopes": np.array([[[0.3]], [[0.1]], [[0.7]]], np.float32), "slope": np.array([0.2], np.float32)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("opset", [7, 8, 11, 13, 17, 20])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_networks_as_others_write_them(spelling, opset, tmp_path):
    nodes, constants = SPELLINGS[spelling]
    model, file = network(nodes, (1, 3, 2, 2), constants, opset), tmp_path / "model.onnx.gz"
    file.write_bytes(gzip.compress(model.SerializeToString()))
    found = import_onnx(file)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    images = torch.rand(4, 3, 2, 2)
    expected = np.concatenate([session.run(None, {"x": image[None].numpy()})[0] for image in images])
    np.testing.assert_allclose(found.module(images).numpy(force=True), expected, rtol=1e-4, atol=1e-5)
    labels = torch.from_numpy(expected).argmax(1)
    net, box = BoundedModel(found.module, images[:1]), linf_box(images, 0.05)
    margins = net.margins(box, labels, "crown")
    for _ in range(20):
        logits = found.module(box.lower + torch.rand_like(images) * (box.upper - box.lower))
        assert (logits.gather(1, labels[:, None]) - logits >= margins - 1e-5).all()


@pytest.mark.parametrize("opset", [11, 13, 17])
@pytest.mark.parametrize("pads", [[0, 0, 1, 0, 0, 0, 0, 2], [0, 1, 0, 0, 0, 0, 0, 0], [0] * 8])
def test_a_padding_that_names_every_axis_has_bounds(pads, opset, tmp_path):
    constants, file = {"pads": np.array(pads), "value": np.float32(0.3)}, tmp_path / "m.onnx"
    shape = [size + before + after for size, before, after in zip((1, 3, 2, 2), pads[:4], pads[4:], strict=True)]
    model = network([node("Pad", ["x", "pads", "value"], "y")], (1, 3, 2, 2), constants, opset, shape)
    file.write_bytes(model.SerializeToString())
    net, x = import_onnx(file), torch.rand(1, 3, 2, 2)
    output = BoundedModel(net.module, x).ibp(Box(x - 0.1, x + 0.1)).output
    for found, end in ((output.lower, x - 0.1), (output.upper, x + 0.1)):
        torch.testing.assert_close(found, net.run(end))


@pytest.mark.parametrize("shape", [(2,), (2, 2), (3, 2, 2), (3, 1, 2)])
def test_slopes_of_single_elements_are_refused(shape, tmp_path):
    nodes = [node("PRelu", ["x", "slopes"], "y")]
    model = network(nodes, (1, 3, 2, 2), {"slopes": np.full(shape, 0.5, np.float32)}, 13, output=(1, 3, 2, 2))
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UnsupportedOperation, match="one a channel"):
        import_onnx(tmp_path / "m.onnx")


RUNTIMES = pytest.mark.parametrize("runtime", ["onnxruntime", "the reference of onnx"])


def choose(runtime, monkeypatch):
    if runtime != "onnxruntime":
        monkeypatch.setitem(sys.modules, "onnxruntime", None)


@RUNTIMES
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_what_runs_is_what_the_file_says_whatever_runs_it(spelling, runtime, tmp_path, monkeypatch):
    nodes, constants = SPELLINGS[spelling]
    model, image = network(nodes, (1, 3, 2, 2), constants, 13), torch.rand(1, 3, 2, 2)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    (expected,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": image.numpy()})
    choose(runtime, monkeypatch)
    np.testing.assert_allclose(import_onnx(tmp_path / "m.onnx").run(image).numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("size", "attributes"), [(9, {}), (8, {"output_shape": [8, 8]})])
def test_an_attribute_that_onnx2torch_overlooks_is_noticed(size, attributes, tmp_path):
    nodes = [node("ConvTranspose", ["x", "k"], "y", strides=[2, 2], **attributes)]
    kernel, file = np.random.standard_normal((3, 2, 3, 3)).astype(np.float32), tmp_path / "m.onnx"
    file.write_bytes(network(nodes, (1, 3, 4, 4), {"k": kernel}, 13, (1, 2, size, size)).SerializeToString())
    if not attributes:
        assert import_onnx(file).module(torch.rand(1, 3, 4, 4)).shape == (1, 2, size, size)
        return
    with pytest.raises(UnsupportedOperation, match=r"m\.onnx cannot be imported: .* computes otherwise"):
        import_onnx(file)


CONVERT = onnx2torch.convert


def tamper(monkeypatch, number, file):
    """Have onnx2torch add to one of the weights a hundredth of the largest beside it; returns how many there are."""

    def weights(module):
        return [tensor for tensor in module.state_dict().values() if tensor.is_floating_point()]

    def converted(model):
        module = CONVERT(model)
        if number is not None:
            tensor = weights(module)[number]
            tensor.add_(0.01 * tensor.abs().max())
        return module

    monkeypatch.setattr(onnx2torch, "convert", converted)
    return len(weights(CONVERT(onnx.load(file))))


@RUNTIMES
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_any_weight_that_is_another_one_is_noticed(spelling, runtime, tmp_path, monkeypatch):
    """By a hundredth of the largest in its tensor, whichever tensor that is."""
    nodes, constants = SPELLINGS[spelling]
    (tmp_path / "m.onnx").write_bytes(network(nodes, (1, 3, 2, 2), constants, 13).SerializeToString())
    choose(runtime, monkeypatch)
    for number in range(tamper(monkeypatch, None, tmp_path / "m.onnx")):
        tamper(monkeypatch, number, tmp_path / "m.onnx")
        with pytest.raises(UnsupportedOperation, match="computes otherwise"):
            import_onnx(tmp_path / "m.onnx")


HIDING = {
    "a root of what is below 0": ([node("Sqrt", ["x"], "a")], {}, LINEAR["b"], 0.25, 0.26),
    "a logarithm of what is below 0": ([node("Log", ["x"], "a")], {}, LINEAR["b"], 2, 3),
    "a rectifier that nothing near 0 passes": (
        [node("Sub", ["x", "k"], "s"), node("Relu", ["s"], "a")], {"k": np.float32(10)}, LINEAR["b"], 12, 12.01
    ),
    "pixels as numbers up to 255, and a bias": (
        [node("Mul", ["x", "q"], "a")], {"q": np.float32(1 / 255)}, LINEAR["b"] + 10, 254, 255
    ),
    "a large bias": ([node("Relu", ["x"], "a")], {}, np.array([1e4, -1, 2, 0, 1], np.float32), 0.4, 0.5),
    "large biases": ([node("Relu", ["x"], "a")], {}, np.full(5, -1e4, np.float32), 0.4, 0.4),
}  # fmt: skip


@RUNTIMES
@pytest.mark.parametrize("name", HIDING)
def test_nothing_is_proved_where_a_weight_is_another_one(name, runtime, tmp_path, monkeypatch):
    """Although the inputs that a network is imported with, near 0, may show nothing of it."""
    before, constants, bias, low, high = HIDING[name]
    nodes = [*before, node("Flatten", ["a"], "flat"), node("MatMul", ["flat", "w"], "c"), node("Add", ["c", "b"], "y")]
    file = tmp_path / "m.onnx"
    model = network(nodes, (1, 3, 2, 2), {"w": WEIGHT, "b": bias, **constants}, 13, (1, 5))
    file.write_bytes(model.SerializeToString())
    choose(runtime, monkeypatch)
    box = Box(torch.full((12,), low).double(), torch.full((12,), high).double())
    case = Case(box, -torch.eye(5)[:1].double(), torch.tensor([-1e5]).double())

    def verdict():
        net = import_onnx(file)
        return decide(net.module, [case], net.input_shape, ["ibp"], replay=net.run).verdict

    with np.errstate(invalid="ignore"):
        assert verdict() == "unsat"
    for number in range(tamper(monkeypatch, None, file)):
        tamper(monkeypatch, number, file)
        with pytest.raises(UnsupportedOperation, match="computes otherwise"):
            verdict()


@RUNTIMES
@pytest.mark.parametrize("build", [narrow_cnn7, residual_network, pooling_network])
def test_rounding_makes_no_network_another_one(build, runtime, tmp_path, monkeypatch):
    torch.manual_seed(0)
    shape = (3, 16, 16)
    export_onnx(randomized(build()).eval(), shape, tmp_path / "m.onnx")
    choose(runtime, monkeypatch)
    net = import_onnx(tmp_path / "m.onnx")
    classes = net.module(torch.zeros(1, *shape)).shape[1]
    for width in (0, 1e-6, 1e-2):
        low = torch.rand(768, dtype=torch.float64)
        case = Case(Box(low, low + width), -torch.eye(classes)[:1].double(), torch.tensor([-1e9]).double())
        assert decide(net.module, [case], shape, ["ibp"], replay=net.run).verdict == "unsat"


@pytest.mark.parametrize("kind", [TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.INT64])
def test_networks_of_other_precisions_are_refused_by_name(kind, tmp_path):
    model = network([node("Relu", ["x"], "y")], (1, 3), {}, 14, kind=kind)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(DataError, match=f"x is {TensorProto.DataType.Name(kind).lower()}: only networks in float32"):
        import_onnx(tmp_path / "m.onnx")


def test_operators_that_cannot_be_imported_are_named_all_at_once(tmp_path):
    nodes = [node("Shrink", ["x"], "a"), node("Mish", ["a"], "b"), node("Relu", ["b"], "y")]
    (tmp_path / "m.onnx").write_bytes(network(nodes, (1, 3), {}, 18).SerializeToString())
    with pytest.raises(
        UnsupportedOperation, match=r"m\.onnx has ONNX operators that cannot be imported: Mish, Shrink$"
    ):
        import_onnx(tmp_path / "m.onnx")


def whole(*values):
    return np.array(values)


UNFORESEEN = {
    "Resize": ([node("Resize", ["x", "", "s"], "y", mode="nearest")], {"s": np.array([1, 1, 2, 2], np.float32)}),
    "ReduceSum": ([node("ReduceSum", ["x"], "y", keepdims=1)], {}),
    "Transpose": ([node("Transpose", ["x"], "y")], {}),
    "Flatten": ([node("Flatten", ["x"], "y", axis=0)], {}),
    "Max": ([node("Neg", ["x"], "n"), node("Max", ["x", "n"], "y")], {}),
    "Gather": ([node("Gather", ["x", "i"], "y", axis=-1)], {"i": whole(-1, 0)}),
    "Slice": (
        [node("Slice", ["x", "a", "b", "c", "d"], "y")],
        {"a": whole(-1), "b": whole(-3), "c": whole(3), "d": whole(-1)},
    ),
    "Clip": ([node("Clip", ["x", "", "m"], "y")], {"m": np.float32(0.5)}),
    "Conv": ([node("Conv", ["x", "k"], "y", auto_pad="SAME_UPPER")], {"k": np.ones((3, 3, 3, 3), np.float32)}),
}  # fmt: skip


@pytest.mark.parametrize("name", ["", "/layer/it"])
@pytest.mark.parametrize("operator", UNFORESEEN)
def test_an_operator_that_is_written_as_nobody_foresaw_is_named(operator, name, tmp_path):
    """And nothing is said of what a tracer calls its values."""
    nodes, constants = UNFORESEEN[operator]
    nodes[-1].name = name
    model = network(nodes, (1, 3, 2, 2), constants, 13, None)
    model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UnsupportedOperation, match=rf"operator {operator} \({name or 'y'}\) has no import") as caught:
        import_onnx(tmp_path / "m.onnx")
    assert not {"Proxy", "executing"} & set(str(caught.value).split())
    assert "\n" not in str(caught.value)


def test_operators_without_a_rule_are_named(tmp_path):
    nodes = [node("Sign", ["x"], "a"), node("Relu", ["a"], "b"), node("Mod", ["b", "two"], "y", fmod=1)]
    model = network(nodes, (1, 3), {"two": np.array([2.0], np.float32)}, 13)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UnsupportedOperation, match=r"(?i)sign.*mod.*has no interval rule"):
        BoundedModel(import_onnx(tmp_path / "m.onnx").module, torch.rand(1, 3))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no network in ONNX"),
        (b"not a protobuf at all" * 10, "no network in ONNX"),
        (None, "cannot be read"),
        (network([node("Relu", ["x"], "y")], (3,), {}, 13).SerializeToString(), "shape 3"),
        (network([node("Relu", ["x"], "y")], (4, 3), {}, 13).SerializeToString(), "shape 4x3"),
        (network([node("Relu", ["x"], "y")], (1, "n"), {}, 13).SerializeToString(), r"shape \?x\?|shape 1x\?"),
    ],
)
def test_what_is_no_network_of_one_input_is_refused(content, message, tmp_path):
    file = tmp_path / "m.onnx"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        import_onnx(file)
    assert len(str(caught.value).removeprefix(str(file))) <= 300
    assert "\n" not in str(caught.value)


def test_a_network_of_two_inputs_is_refused(tmp_path):
    model = network([node("Add", ["x", "z"], "y")], (1, 3), {}, 13)
    model.graph.input.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, (1, 3)))
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(DataError, match="2 inputs and 1 outputs"):
        import_onnx(tmp_path / "m.onnx")


def test_the_module_has_no_training_mode_of_its_own(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    export_onnx(model, (3, 2, 2), tmp_path / "m.onnx")
    assert not import_onnx(tmp_path / "m.onnx").module.training
