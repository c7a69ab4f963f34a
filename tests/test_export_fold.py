"""Graphs of one size made from graphs of any size, and the operators that graphs may hold."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from synthetic import SMALLEST, make_spec, small_model

from rtmdet_geo.errors import ConfigError, ModelFileError
from rtmdet_geo.export import export_model, make_check_tiles
from rtmdet_geo.export.fold import fold_shapes
from rtmdet_geo.export.graph import fix_size, stored_spec
from rtmdet_geo.export.half import to_half
from rtmdet_geo.export.operators import OPERATORS, check_operators
from rtmdet_geo.models import get_classifier, get_model
from rtmdet_geo.models.rtmdet import SIZES
from rtmdet_geo.variants import KINDS, VARIANTS

INT64, FLOAT = TensorProto.INT64, TensorProto.FLOAT


@functools.cache
def small(kind: str, half: bool = False) -> onnx.ModelProto:
    model = onnx.load(small_model(kind))
    return to_half(model) if half else model


def run(model: onnx.ModelProto, tiles: np.ndarray) -> dict[str, np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {session.get_inputs()[0].name: tiles}
    return dict(zip([output.name for output in session.get_outputs()], session.run(None, feeds), strict=True))


def shapes_of(model: onnx.ModelProto) -> dict[str, list[int | str]]:
    return {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
@pytest.mark.parametrize("kind", SMALLEST)
def test_one_size_gives_what_any_size_gives(kind, half):
    """192 px were never traced; batch 1 and 3 of the one graph."""
    model = small(kind, half)
    before = model.SerializeToString()
    fixed = fix_size(model, 192, 192)
    assert model.SerializeToString() == before, "the argument must stay what it was"
    onnx.checker.check_model(fixed, full_check=True)
    onnx.shape_inference.infer_shapes(fixed, check_type=True, strict_mode=True, data_prop=True)
    check_operators(fixed)
    for number in (1, 3):
        tiles = make_check_tiles(number, 3, 192, seed=number)
        expected, found = run(model, tiles), run(fixed, tiles)
        for name, values in found.items():
            np.testing.assert_allclose(values, expected[name], atol=2e-6, err_msg=name)


@pytest.mark.parametrize("kind", SMALLEST)
def test_declared_sizes_and_constants(kind):
    fixed = fix_size(small(kind), 192, 192)
    rows = 24 * 24 + 12 * 12 + 6 * 6
    if kind == "classification":
        assert shapes_of(fixed) == {"images": ["batch", 3, 192, 192], "scores": ["batch", 3]}
    else:
        shapes = shapes_of(fixed)
        assert shapes["images"] == ["batch", 3, 192, 192] and shapes["boxes"] == ["batch", rows, 5]
        if kind == "mask":
            assert shapes["mask_features"] == ["batch", 8, 24, 24] and shapes["kernels"] == ["batch", rows, 169]
    stored = {tensor.name: tensor for tensor in fixed.graph.initializer}
    limits = [
        numpy_helper.to_array(stored[node.input[1]]).item() for node in fixed.graph.node if node.op_type == "TopK"
    ]
    assert limits == ([] if kind == "classification" else [24 * 24, 12 * 12, 6 * 6])
    operators = {node.op_type for node in fixed.graph.node}
    assert not operators & {"Equal", "Where"}, "constant arithmetic must be gone"
    if kind in ("rotated", "classification"):
        assert not operators & {"Shape", "ConstantOfShape"}
    for node in fixed.graph.node:
        if node.op_type == "Reshape":
            assert node.input[1] in stored, "the batch is copied by a 0, not by a chain of nodes"
        if node.op_type == "Resize":
            assert not node.input[3:] and stored_or_constant(fixed, node.input[2]).tolist()[:2] == [1, 1]
    spec, was = stored_spec(fixed), stored_spec(small(kind))
    changes = {"tile_size": 192} | ({} if kind == "classification" else {"max_detections": rows})
    assert spec == was.model_copy(update=changes)


def stored_or_constant(model: onnx.ModelProto, name: str) -> np.ndarray:
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    constants |= {node.output[0]: node.attribute[0].t for node in model.graph.node if node.op_type == "Constant"}
    return numpy_helper.to_array(constants[name])


@pytest.mark.parametrize("kind", SMALLEST)
def test_one_batch(kind):
    fixed = fix_size(small(kind), 64, 64, batch=2)
    assert {shape[0] for shape in shapes_of(fixed).values()} == {2}
    assert not {node.op_type for node in fixed.graph.node} & {"Shape"}
    only_batch = fix_size(small(kind), batch=2)
    assert shapes_of(only_batch)["images"] == [2, 3, "height", "width"]
    assert {shape[0] for shape in shapes_of(only_batch).values()} == {2}
    tiles = make_check_tiles(2, 3, 64, seed=1)
    expected = run(small(kind), tiles)
    for model in (fixed, only_batch):
        check_operators(model)
        for name, values in run(model, tiles).items():
            np.testing.assert_allclose(values, expected[name], atol=2e-6)
    with pytest.raises(ConfigError, match="takes batch 2 only, not 4"):
        fix_size(only_batch, batch=4)


@pytest.mark.parametrize(
    "kind,sizes,words",
    [
        ("rotated", {"height": 100}, "height 100 must be a positive multiple of 32"),
        ("mask", {"width": 0}, "width 0"),
        ("classification", {"batch": -1}, "batch -1 must be a positive multiple of 1"),
    ],
)
def test_refusals(kind, sizes, words):
    with pytest.raises(ConfigError, match=words):
        fix_size(small(kind), **sizes)


def test_folding_worked_by_hand():
    """x (n, 6, 4): rows of a Reshape to (n, 2, -1), and 2 x 6 + 4 = 16 as a float added to it; n stays dynamic."""
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"], name="shape"),
        helper.make_node("Gather", ["shape", "zero"], ["n"], name="n"),
        helper.make_node("Unsqueeze", ["n", "axis"], ["n1"], name="n1"),
        helper.make_node("Concat", ["n1", "rest"], ["target"], name="target", axis=0),
        helper.make_node("Reshape", ["x", "target"], ["y"], name="reshape"),
        helper.make_node("Slice", ["shape", "one", "end"], ["sides"], name="sides"),
        helper.make_node("Mul", ["sides", "factors"], ["products"], name="products"),
        helper.make_node("Gather", ["products", "zero"], ["first"], name="first"),
        helper.make_node("Gather", ["products", "index"], ["second"], name="second"),
        helper.make_node("Add", ["first", "second"], ["sum"], name="sum"),
        helper.make_node("Cast", ["sum"], ["float"], name="float", to=FLOAT),
        helper.make_node("Add", ["y", "float"], ["out"], name="out"),
    ]
    numbers = {"zero": 0, "index": 1, "axis": [0], "rest": [2, -1], "one": [1], "end": [9], "factors": [2, 1]}
    tensors = [numpy_helper.from_array(np.array(value, np.int64), name) for name, value in numbers.items()]
    graph = helper.make_graph(
        nodes,
        "hand",
        [helper.make_tensor_value_info("x", FLOAT, ["n", 6, 4])],
        [helper.make_tensor_value_info("out", FLOAT, ["n", 2, 12])],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    tiles = np.arange(48, dtype=np.float32).reshape(2, 6, 4)
    expected = run(model, tiles)["out"]
    fold_shapes(model)
    assert [node.op_type for node in model.graph.node] == ["Reshape", "Add"]
    stored = {tensor.name: numpy_helper.to_array(tensor).tolist() for tensor in model.graph.initializer}
    assert stored == {"reshape/target": [0, 2, -1], "float": 16.0}
    np.testing.assert_array_equal(run(model, tiles)["out"], expected)
    np.testing.assert_array_equal(expected, tiles.reshape(2, 2, 12) + 16)


def test_sizes_that_do_not_belong_together_are_left_alone():
    """A target that takes the batch from another input is no copy; a Resize by 1.5 keeps its sizes."""
    nodes = [
        helper.make_node("Shape", ["other"], ["n"], name="n", start=0, end=1),
        helper.make_node("Concat", ["n", "rest"], ["target"], name="target", axis=0),
        helper.make_node("Reshape", ["x", "target"], ["y"], name="reshape"),
        helper.make_node("Shape", ["x"], ["mine"], name="mine", start=0, end=2),
        helper.make_node("Concat", ["mine", "nine"], ["sizes"], name="sizes", axis=0),
        helper.make_node("Resize", ["x", "", "", "sizes"], ["z"], name="resize", mode="nearest"),
    ]
    numbers = {"rest": [-1], "nine": [9, 9]}
    values = [
        helper.make_tensor_value_info(name, FLOAT, shape)
        for name, shape in {
            "x": ["n", 1, 6, 6],
            "other": ["m", 2],
            "y": ["m", "k"],
            "z": ["n", 1, 9, 9],
        }.items()
    ]
    tensors = [numpy_helper.from_array(np.array(value, np.int64), name) for name, value in numbers.items()]
    graph = helper.make_graph(nodes, "hand", values[:2], values[2:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    before = [node.op_type for node in model.graph.node]
    fold_shapes(model)
    assert [node.op_type for node in model.graph.node] == before


# ---------------------------------------------------------------- operators


def check_variant(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the graphs of a variant whose channels are few; its layers are all there."""
    for size in SIZES:
        monkeypatch.setitem(SIZES, size, replace(SIZES[size], widen=0.125, channels=32))
    kind = KINDS[VARIANTS[name].task]
    build = get_classifier if kind == "classification" else get_model
    spec = make_spec(kind=kind, architecture=name, classes=("a", "b"), tile_size=64)
    export_model(build(name, num_classes=2), folder / "model.onnx", spec=spec, verify=False)
    model = onnx.load(folder / "model.onnx")
    for graph in (model, to_half(model), fix_size(model, 64, 64)):
        check_operators(graph)


@pytest.mark.parametrize("name", ["rtmdet_l", "rtmdet_ins_l", "rtmdet_r_l", "cspnext_l"])
def test_operators_of_a_large_variant_of_every_family(name, tmp_path, monkeypatch):
    """Large ones take exp of distances; the smallest are checked above."""
    check_variant(name, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_operators_of_every_variant(name, tmp_path, monkeypatch):
    check_variant(name, tmp_path, monkeypatch)


def spoiled(change) -> onnx.ModelProto:
    model = copy.deepcopy(small("rotated"))
    change(model)
    return model


def first(model: onnx.ModelProto, operator: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type == operator)


def rename(model: onnx.ModelProto) -> None:
    first(model, "Sigmoid").op_type = "NonMaxSuppression"


def other_domain(model: onnx.ModelProto) -> None:
    first(model, "Sigmoid").domain = "com.microsoft"


def other_opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 20


def too_many(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        if tensor.name == "top_k_limit":
            tensor.CopyFrom(numpy_helper.from_array(np.array([3841], np.int64), tensor.name))


def no_limit(model: onnx.ModelProto) -> None:
    first(model, "TopK").input[1] = next(node.output[0] for node in model.graph.node if node.op_type == "Shape")


def computed_weights(model: onnx.ModelProto) -> None:
    node = first(model, "Conv")
    model.graph.node.insert(0, helper.make_node("Relu", [node.input[1]], ["computed"], name="computed"))
    first(model, "Conv").input[1] = "computed"


@pytest.mark.parametrize(
    "change,words",
    [
        (rename, r"operator NonMaxSuppression \(node '.*Sigmoid'\)"),
        (other_domain, r"operator com\.microsoft\.Sigmoid"),
        (other_opset, "opset"),
        (too_many, "keeps 3841 rows; TensorRT's TopK takes 3840 at most"),
        (no_limit, "computed without a limit"),
        (computed_weights, "weights of convolution '.*' are computed"),
    ],
)
def test_what_no_engine_may_meet(change, words):
    check_operators(small("rotated"))
    with pytest.raises(ModelFileError, match=words):
        check_operators(spoiled(change))


def test_list_is_short():
    """It names what our graphs hold, not what ONNX has."""
    assert len(OPERATORS) < 42 and "NonMaxSuppression" not in OPERATORS and "Loop" not in OPERATORS
