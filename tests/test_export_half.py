"""fp16 graphs: what is fp16, what is not, and that the numbers hold."""

from __future__ import annotations

import collections
import functools
import tempfile

import numpy as np
import onnx
import onnxruntime
import pytest
from classifiers import untrained_network, write_classifier
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from synthetic import SMALLEST, make_spec, small_model, small_network

from rtmdet_geo.errors import ConfigError
from rtmdet_geo.export import export_model, make_check_tiles
from rtmdet_geo.export.graph import fold_weights, stored_spec
from rtmdet_geo.export.half import to_half, with_roundings

FLOAT, FLOAT16 = TensorProto.FLOAT, TensorProto.FLOAT16
#: Operators that must not compute in fp16: means over maps, decoding, ranking, probabilities.
ISLANDS = {"GlobalAveragePool", "ReduceMean", "Exp", "Softmax", "TopK", "GatherElements", "Gemm", "Sin", "Cos", "Sub"}
ISLANDS |= {"Div", "Clip", "Min", "Relu", "Reshape", "Transpose", "Flatten"}


@functools.cache
def halves(kind: str) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """The smallest model of a kind in fp32 and in fp16; a classifier whose logits no large factors magnify."""
    if kind != "classification":
        model = onnx.load(small_model(kind))
        return model, to_half(model)
    with tempfile.TemporaryDirectory() as folder:
        spec = make_spec(kind=kind, classes=("ship", "plane", "bridge"))
        export_model(untrained_network(3), f"{folder}/model.onnx", spec=spec)
        model = onnx.load(f"{folder}/model.onnx")
    return model, to_half(model)


def inferred(model: onnx.ModelProto) -> dict[str, int]:
    """The element type of every tensor; strict."""
    graph = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True).graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for values in (graph.value_info, graph.input, graph.output):
        types |= {value.name: value.type.tensor_type.elem_type for value in values}
    return types


def run(model: onnx.ModelProto, tiles: np.ndarray) -> dict[str, np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(
        zip([output.name for output in session.get_outputs()], session.run(None, {"images": tiles}), strict=True)
    )


@pytest.mark.parametrize("kind", SMALLEST)
def test_trunk_is_half_and_islands_are_not(kind):
    full, half = halves(kind)
    onnx.checker.check_model(half, full_check=True)
    types = inferred(half)
    stored = {tensor.name: tensor for tensor in half.graph.initializer}
    convolutions = [node for node in half.graph.node if node.op_type == "Conv"]
    assert len(convolutions) == sum(node.op_type == "Conv" for node in full.graph.node) > 30
    for node in convolutions:
        assert {stored[name].data_type for name in node.input[1:]} == {FLOAT16}, node.name
        assert {types[node.input[0]], types[node.output[0]]} == {FLOAT16}, node.name
    for node in half.graph.node:
        if node.op_type in ISLANDS:
            assert FLOAT16 not in {types.get(name) for name in (*node.input, *node.output)}, node.name
    activations = [node for node in half.graph.node if node.op_type in ("Sigmoid", "HardSigmoid")]
    in_fp32 = [node for node in activations if types[node.output[0]] == FLOAT]
    assert len(in_fp32) == (1 if kind == "classification" else 3)  # scores of three levels; after the last convolution
    for value in (*half.graph.input, *half.graph.output):
        assert value.type.tensor_type.elem_type in (TensorProto.UINT8, FLOAT)


@pytest.mark.parametrize("kind", SMALLEST)
def test_casts_are_few_and_nothing_is_left_over(kind):
    """One a tensor and direction: into the trunk the images and four means, out of it four maps and the outputs."""
    full, half = halves(kind)
    names = [node.name for node in half.graph.node]
    assert len(set(names)) == len(names)
    made = {name for node in half.graph.node for name in node.output}
    read = {value.name for value in half.graph.output} | {name for node in half.graph.node for name in node.input}
    assert made <= read and {tensor.name for tensor in half.graph.initializer} <= read
    casts = collections.Counter()
    for node in half.graph.node:
        if node.op_type == "Cast" and node.name not in {other.name for other in full.graph.node}:
            casts[node.attribute[0].i] += 1
    last = {"rotated": 9, "horizontal": 6, "mask": 9, "classification": 1}[kind]  # mask features have a Cast already
    assert casts == {FLOAT16: 5, FLOAT: 4 + last}


@pytest.mark.parametrize("kind", SMALLEST)
def test_numbers_hold(kind):
    full, half = halves(kind)
    tiles = make_check_tiles(2, 3, 128, seed=1)
    rounded = with_roundings(half)
    onnx.checker.check_model(rounded, full_check=True)
    types = inferred(rounded)
    assert {types[node.input[0]] for node in rounded.graph.node if node.op_type == "Conv"} == {FLOAT}
    expected, found = run(full, tiles), run(rounded, tiles)
    assert {name: value.dtype for name, value in found.items()} == dict.fromkeys(expected, np.dtype(np.float32))
    difference = np.abs(found["scores"] - expected["scores"])
    assert 0 < difference.max() < 0.02 and expected["scores"].std() > 0.05
    if kind == "mask":
        largest = np.abs(expected["mask_features"]).max()
        assert 0 < np.abs(found["mask_features"] - expected["mask_features"]).max() < 0.02 * largest


@pytest.mark.parametrize("kind", SMALLEST)
def test_spec_says_so(kind):
    full, half = halves(kind)
    was, now = stored_spec(full), stored_spec(half)
    assert was.precision == "fp32" and now == was.model_copy(update={"precision": "fp16", "differences": {}})
    assert {entry.key for entry in half.metadata_props} == {entry.key for entry in full.metadata_props}


@pytest.mark.parametrize("kind", ["mask", "classification"])
def test_stored_half_weights_are_folded(kind, tmp_path):
    classes = ("ship", "plane", "bridge") if kind == "classification" else ("ship",)
    spec = make_spec(kind=kind, classes=classes)
    export_model(small_network(kind, num_classes=len(classes)), tmp_path / "h.onnx", spec=spec, half_weights=True)
    model = onnx.load(tmp_path / "h.onnx")
    assert FLOAT16 in {tensor.data_type for tensor in model.graph.initializer}
    before = model.SerializeToString()
    plain = fold_weights(model)
    types = {tensor.name: tensor.data_type for tensor in plain.graph.initializer}
    assert FLOAT16 not in types.values()
    assert all(types[node.input[1]] == FLOAT for node in plain.graph.node if node.op_type == "Conv")
    tiles = make_check_tiles(1, 3, 96, seed=2)
    expected = run(model, tiles)
    for name, values in run(plain, tiles).items():
        np.testing.assert_array_equal(values, expected[name])
    types = inferred(to_half(model))
    assert model.SerializeToString() == before, "the argument must stay what it was"
    assert FLOAT16 in types.values()


def small_graph(weight: np.ndarray) -> onnx.ModelProto:
    """images fp32 -> 1 x 1 convolution -> Relu -> the same convolution; a weight stored as fp16 x fp32 factor."""
    nodes = [
        helper.make_node("Cast", ["stored"], ["plain"], name="cast", to=FLOAT),
        helper.make_node("Mul", ["plain", "factor"], ["weight"], name="factor"),
        helper.make_node("Conv", ["images", "weight"], ["a"], name="first"),
        helper.make_node("Relu", ["a"], ["b"], name="relu"),
        helper.make_node("Conv", ["b", "weight"], ["c"], name="second"),
        helper.make_node("Add", ["c", "b"], ["out"], name="sum"),
    ]
    tensors = [
        numpy_helper.from_array(np.full((1, 1, 1, 1), 0.5, np.float16), "stored"),
        numpy_helper.from_array(weight.astype(np.float32).reshape(1, 1, 1, 1), "factor"),
    ]
    values = [helper.make_tensor_value_info(name, FLOAT, ["batch", 1, "h", "w"]) for name in ("images", "out")]
    graph = helper.make_graph(nodes, "small", values[:1], values[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_worked_by_hand():
    """weight .5 x 3: 2 -> 3 -> 4.5 + 3; the tensor between both convolutions also leaves the trunk, by one Cast."""
    model = small_graph(np.array(3.0))
    assert [node.op_type for node in fold_weights(model).graph.node] == ["Conv", "Relu", "Conv", "Add"]
    half = to_half(model)
    assert [node.op_type for node in half.graph.node] == ["Cast", "Conv", "Relu", "Conv", "Cast", "Cast", "Add"]
    assert [tensor.name for tensor in half.graph.initializer] == ["weight/fp16"]
    assert run(half, np.full((1, 1, 1, 1), 2, np.float32))["out"].item() == 7.5
    assert stored_spec(half) is None


def test_every_number_is_rounded_where_it_is_made():
    """1 + 2^-10 times 3 ties between steps of 2^-9 and becomes 3.00390625; 3 times that, of 2^-7: 9.015625."""
    full = small_graph(np.array(6.0))
    half = to_half(full)
    before, number = half.SerializeToString(), np.full((1, 1, 1, 1), 1 + 2**-10, np.float32)
    rounded = with_roundings(half)
    assert half.SerializeToString() == before, "the argument must stay what it was"
    (reference,) = ReferenceEvaluator(half).run(None, {"images": number})
    assert run(rounded, number)["out"].item() == reference.item() == 9.015625 + 3.00390625
    large = np.full((1, 1, 1, 1), 30000, np.float32)
    assert run(rounded, large)["out"].item() == np.inf > run(full, large)["out"].item() == 360000


def test_refusals(tmp_path, caplog):
    with pytest.raises(ConfigError, match=r"weight 'weight' reaches 70000, beyond fp16's 65504"):
        to_half(small_graph(np.array(140000.0)))
    with pytest.raises(ConfigError, match="no convolution"):
        to_half(onnx.load(write_classifier(tmp_path / "greys.onnx")))
    with pytest.raises(ConfigError, match="fp16 or int8 already"):
        to_half(halves("rotated")[1])
    with caplog.at_level("INFO"):
        to_half(small_graph(np.array(1e-9)))
    assert "weight: 1 of 1 weights are below fp16's smallest number" in caplog.text
