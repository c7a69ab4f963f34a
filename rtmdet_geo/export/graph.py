"""What export rewrites in a traced ONNX graph: shapes, top-K for any size, fp16 weights, metadata. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from rtmdet_geo import __version__
from rtmdet_geo.catalog import GRAPH_SHA256_KEY, SPEC_KEY
from rtmdet_geo.errors import ConfigError
from rtmdet_geo.export.fold import fold_shapes, replace_graph, tensor_shapes
from rtmdet_geo.structures import ModelSpec


def declare_outputs(proto: onnx.ModelProto, shapes: Mapping[str, Sequence[int | str]]) -> None:
    """State the outputs' shapes, numbers or names; the tracer loses what it cannot infer. The checker compares them."""
    for output in proto.graph.output:
        output.CopyFrom(helper.make_tensor_value_info(output.name, TensorProto.FLOAT, shapes[output.name]))


def make_top_k_dynamic(proto: onnx.ModelProto, limit: int) -> None:
    """Let every TopK take k = min(pairs, limit) of the image at hand; the tracer wrote the traced image's k."""
    nodes = []
    graph = proto.graph
    graph.initializer.append(helper.make_tensor("top_k_limit", TensorProto.INT64, [1], [limit]))
    for node in graph.node:
        if node.op_type == "TopK":
            prefix = f"{node.name}/limit"
            pairs, k = f"{prefix}/pairs", f"{prefix}/k"
            nodes.append(helper.make_node("Shape", [node.input[0]], [pairs], name=pairs, start=1, end=2))
            nodes.append(helper.make_node("Min", [pairs, "top_k_limit"], [k], name=k))
            node.input[1] = k
        nodes.append(node)
    replace_graph(proto, nodes, graph.initializer)


class HalfWeight(NamedTuple):
    """A weight as it is stored: fp16 numbers, times a fp32 factor for each output channel where a norm was folded in.

    Attributes:
        source: name of the numbers; weights that share them have it in common.
        values: (outputs, ...) fp16.
        factors: (outputs,) fp32, or None.
    """

    source: str
    values: NDArray[np.float16]
    factors: NDArray[np.float32] | None


def store_half(proto: onnx.ModelProto, weights: Mapping[str, HalfWeight]) -> None:
    """Store weights as fp16 numbers, from which a Cast and, where there are factors, a Mul make the fp32 ones.

    Args:
        proto: graph, changed in place.
        weights: by the names of the initialisers that they replace.
    """
    graph = proto.graph
    nodes: list[onnx.NodeProto] = []
    tensors: dict[str, onnx.TensorProto] = {}
    made: set[str] = set()
    for tensor in graph.initializer:
        if tensor.name not in weights:
            tensors[tensor.name] = tensor
            continue
        source, values, factors = weights[tensor.name]
        half, scale = f"{source}/fp16", f"{tensor.name}/factors"
        full = tensor.name if factors is None else f"{source}/fp32"
        tensors.setdefault(half, numpy_helper.from_array(values, half))
        if full not in made:
            made.add(full)
            nodes.append(helper.make_node("Cast", [half], [full], name=f"{full}/cast", to=TensorProto.FLOAT))
        if factors is not None:
            tensors[scale] = numpy_helper.from_array(factors.reshape(-1, *[1] * (values.ndim - 1)), scale)
            nodes.append(helper.make_node("Mul", [full, scale], [tensor.name], name=f"{scale}/mul"))
    replace_graph(proto, [*nodes, *graph.node], list(tensors.values()))


def fold_weights(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy whose stored weights are plain fp32 numbers: what an engine that looks for them must find.

    Files with half weights hold fp16 numbers, a Cast to fp32 and perhaps a Mul by fp32 factors; numbers that two layers
    share are stored once and named anew by an Identity. Such nodes are computed here and leave the graph; all others
    stay as they are.
    """
    folded = onnx.ModelProto()
    folded.CopyFrom(proto)
    graph = folded.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    names: dict[str, str] = {}
    nodes = []
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        values = [tensors[name] for name in node.input if name in tensors]
        if not values or len(values) < len(node.input) or not _makes_weights(node, values):
            nodes.append(node)
        elif node.op_type == "Identity":
            names[node.output[0]] = node.input[0]
        else:
            arrays = [numpy_helper.to_array(value) for value in values]
            product = arrays[0].astype(np.float32) if node.op_type == "Cast" else arrays[0] * arrays[1]
            tensors[node.output[0]] = numpy_helper.from_array(product, node.output[0])
    replace_graph(folded, nodes, list(tensors.values()))
    return folded


def _makes_weights(node: onnx.NodeProto, values: Sequence[TensorProto]) -> bool:
    """Say whether a node, whose inputs are all stored, renames them, turns fp16 into fp32, or multiplies fp32."""
    if node.op_type == "Cast":
        is_float = any(item.name == "to" and item.i == TensorProto.FLOAT for item in node.attribute)
        return is_float and values[0].data_type == TensorProto.FLOAT16
    return node.op_type == "Identity" or (
        node.op_type == "Mul" and all(value.data_type == TensorProto.FLOAT for value in values)
    )


def fix_size(
    proto: onnx.ModelProto, height: int | None = None, width: int | None = None, *, batch: int | None = None
) -> onnx.ModelProto:
    """Return a copy that takes images of one size, as engines want it that plan for one; k of every TopK is a constant.

    Args:
        proto: model file's graph; not changed.
        height: of the images in px; None leaves it as it is, like the others.
        width: likewise.
        batch: images at once.

    Returns:
        The copy; its ModelSpec, if there is one, has the tile size and the number of rows.

    Raises:
        ConfigError: the graph takes another size only, or one that is no multiple of what the model needs.
    """
    fixed = onnx.ModelProto()
    fixed.CopyFrom(proto)
    spec = stored_spec(fixed)
    image = fixed.graph.input[0].type.tensor_type.shape.dim
    multiple = spec.stride_multiple if spec is not None and spec.kind != "classification" else 1
    for axis, size, what, unit in (
        (0, batch, "batch", 1),
        (2, height, "height", multiple),
        (3, width, "width", multiple),
    ):
        if size is None:
            continue
        if size < 1 or size % unit:
            raise ConfigError(f"{what} {size} must be a positive multiple of {unit}")
        if image[axis].HasField("dim_value") and image[axis].dim_value != size:
            raise ConfigError(f"the graph takes {what} {image[axis].dim_value} only, not {size}; export it anew")
        image[axis].dim_value = size
    _fold_whole(fixed)
    if spec is not None:
        write_metadata(fixed, _of_fixed_size(spec, fixed.graph))
    return fixed


def _fold_whole(proto: onnx.ModelProto) -> None:
    """Fold the graph's shapes, then state those of its outputs as its input implies them."""
    stated = {output.name: _declared_shape(output) for output in proto.graph.output}
    for output in proto.graph.output:
        output.type.tensor_type.ClearField("shape")
    fold_shapes(proto)
    found = tensor_shapes(onnx.shape_inference.infer_shapes(proto, data_prop=True).graph)
    for name, sizes in stated.items():
        known = [new if isinstance(new, int) else old for new, old in zip(found.get(name, sizes), sizes, strict=True)]
        stated[name] = [_declared_shape(proto.graph.input[0])[0], *known[1:]]
    declare_outputs(proto, stated)


def _declared_shape(value: onnx.ValueInfoProto) -> list[int | str]:
    return [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]


def _of_fixed_size(spec: ModelSpec, graph: onnx.GraphProto) -> ModelSpec:
    """Return the spec of a graph whose square images have one size."""
    height, width = _declared_shape(graph.input[0])[2:]
    if not isinstance(height, int) or height != width:
        return spec
    changes = {"tile_size": height, "overlap": min(spec.overlap, height // 2)}
    if spec.kind != "classification":
        rows = _declared_shape(graph.output[0])[1]
        changes["max_detections"] = rows if isinstance(rows, int) else spec.max_detections
    return spec.model_copy(update=changes)


def stored_spec(proto: onnx.ModelProto) -> ModelSpec | None:
    """Return the ModelSpec in a graph's metadata; None: it has none."""
    for entry in proto.metadata_props:
        if entry.key == SPEC_KEY:
            return ModelSpec.model_validate_json(entry.value)
    return None


def write_metadata(proto: onnx.ModelProto, spec: ModelSpec) -> None:
    """Store the ModelSpec and the graph's checksum, in detectors also what the QGIS plugin Deepness reads."""
    metadata = {
        SPEC_KEY: spec.model_dump_json(),
        GRAPH_SHA256_KEY: json.dumps(hashlib.sha256(proto.graph.SerializeToString()).hexdigest()),
    }
    if spec.kind != "classification":  # Deepness has no type of model for it
        metadata |= _deepness_metadata(spec)
    helper.set_model_props(proto, metadata)
    proto.producer_name, proto.producer_version = "rtmdet-geo", __version__
    proto.doc_string = f"{spec.name}: {spec.architecture}, {', '.join(spec.classes)}"


def _deepness_metadata(spec: ModelSpec) -> dict[str, str]:
    """Return the keys of Deepness' ``model_base.py``.

    It wants the resolution in cm, the overlap in per cent, and mean and std for pixels divided by 255; our graph
    normalises by itself, so those two say "leave the pixels as they are". The key ``det_type`` is left out: its values
    name layouts of YOLO's output (Deepness' ``DetectorType``), and ours is none of them.
    """
    channels = len(spec.bands)
    metadata = {
        "model_type": json.dumps("Detector"),
        "class_names": json.dumps({str(index): name for index, name in enumerate(spec.classes)}),
        "tile_size": json.dumps(spec.tile_size),
        "tiles_overlap": json.dumps(round(100 * spec.overlap / spec.tile_size)),
        "standardization_mean": json.dumps([0.0] * channels),
        "standardization_std": json.dumps([1 / 255] * channels),
        "det_conf": json.dumps(spec.score_threshold),
        "det_iou_thresh": json.dumps(spec.iou_threshold),
    }
    if spec.gsd_m is not None:
        metadata["resolution"] = json.dumps(spec.gsd_m * 100)
    return metadata
