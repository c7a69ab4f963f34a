"""What the tests of the TensorRT backend share: a small model file of 96 px tiles, and tiles for it."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from synthetic import SMALLEST, make_spec, small_network

from rtmdet_geo.backends.onnxrt import OnnxRuntimeBackend
from rtmdet_geo.export import export_model
from rtmdet_geo.export.tiles import make_check_tiles
from rtmdet_geo.structures import Detections, Kind

SIDE = 96


@functools.cache
def model_file(kind: Kind = "rotated") -> Path:
    """Return an exported small network of one class whose tile size is SIDE px, made once per test process."""
    spec = make_spec(name=f"small {kind}", architecture=SMALLEST[kind], kind=kind, tile_size=SIDE)
    path = Path(tempfile.mkdtemp(prefix="rtmdet_geo_test_")) / "small.onnx"
    export_model(small_network(kind), path, spec=spec, verify=False)
    return path


@functools.cache
def tiny_file(**changes: Any) -> Path:
    """Return a model file of two convolutions, one row for each 32 x 32 px, which is read and built in no time."""
    generator = np.random.default_rng(0)

    def stored(name: str, values: Any, dtype: Any = np.float32) -> onnx.TensorProto:
        return numpy_helper.from_array(np.asarray(values, dtype), name)

    tensors = [
        *(stored("scale", [1 / 64]), stored("flat", [0, 7, -1], np.int64), stored("sides", [30.0, 30, 25, 10, 1])),
        *(
            stored("one", generator.normal(0, 0.05, (8, 3, 8, 8))),
            stored("two", generator.normal(0, 0.3, (7, 8, 4, 4))),
        ),
        *(stored("zero", [0.0]), stored("parts", [5, 1, 1], np.int64), stored("last", [2], np.int64)),
    ]
    node = helper.make_node
    nodes = [
        node("Cast", ["images"], ["float"], "/cast", to=TensorProto.FLOAT),
        node("Mul", ["float", "scale"], ["scaled"], "/scale"),
        node("Conv", ["scaled", "one"], ["low"], "/one/Conv", kernel_shape=[8, 8], strides=[8, 8]),
        node("Relu", ["low"], ["active"], "/one/Relu"),
        node("Conv", ["active", "two"], ["high"], "/two/Conv", kernel_shape=[4, 4], strides=[4, 4]),
        node("Sigmoid", ["high"], ["cells"], "/sigmoid"),
        node("Reshape", ["cells", "flat"], ["columns"], "/reshape"),
        node("Transpose", ["columns"], ["table"], "/transpose", perm=[0, 2, 1]),
        node("Split", ["table", "parts"], ["places", "score", "any"], "/split", axis=2),
        node("Mul", ["places", "sides"], ["boxes"], "/boxes"),
        node("Squeeze", ["score", "last"], ["scores"], "/scores"),
        node("Squeeze", ["any", "last"], ["some"], "/some"),
        node("Mul", ["some", "zero"], ["labels"], "/labels"),
    ]
    shapes = {"boxes": ["batch", "rows", 5], "scores": ["batch", "rows"], "labels": ["batch", "rows"]}
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    image = helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 3, "height", "width"])
    graph = helper.make_graph(nodes, "tiny", [image], outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, {"model_spec": make_spec(name="tiny", tile_size=SIDE, **changes).model_dump_json()})
    path = Path(tempfile.mkdtemp(prefix="rtmdet_geo_test_")) / "tiny.onnx"
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


@functools.cache
def tiles(number: int = 5) -> NDArray[np.uint8]:
    """Return uint8 (number, 3, SIDE, SIDE); not to be written to."""
    made = make_check_tiles(number, 3, SIDE, seed=3)
    made.flags.writeable = False
    return made


@functools.cache
def expected(path: Path) -> list[Detections]:
    """Return what onnxruntime finds on :func:`tiles` with scores of 0.3 at least."""
    return OnnxRuntimeBackend(path, threads=1).predict(tiles(), score_threshold=0.3)


def assert_near(
    found: Detections, wanted: Detections, *, px: float = 0.5, score: float = 0.01, above: float = 0.32
) -> None:
    """Every detection with a score above a limit has a partner in the other, within px and score, one to one."""
    for mine, theirs in ((found, wanted), (wanted, found)):
        for box, value, label in zip(mine.boxes, mine.scores, mine.labels, strict=True):
            if value < above:
                continue
            apart = np.abs(theirs.boxes - box)
            apart[:, 4] = np.minimum(apart[:, 4] % np.pi, np.pi - apart[:, 4] % np.pi) * box[2:4].max() / 2
            near = (apart.max(axis=1) <= px) & (np.abs(theirs.scores - value) <= score) & (theirs.labels == label)
            assert near.any()
