"""What export rewrites in a traced ONNX graph: shapes, top-K for any size, fp16 weights, metadata. No torch."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from rtmdet_geo import __version__
from rtmdet_geo.catalog import GRAPH_SHA256_KEY, SPEC_KEY
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


def store_half(proto: onnx.ModelProto) -> None:
    """Replace fp32 initialisers of two or more axes that fp16 holds exactly by fp16 ones with a Cast to fp32."""
    graph = proto.graph
    casts, tensors = [], []
    for tensor in graph.initializer:
        values = numpy_helper.to_array(tensor)
        is_weight = values.dtype == np.float32 and values.ndim >= 2 and values.size > 1
        if is_weight and np.array_equal(values.astype(np.float16).astype(np.float32), values):
            half = f"{tensor.name}.fp16"
            tensors.append(numpy_helper.from_array(values.astype(np.float16), half))
            casts.append(helper.make_node("Cast", [half], [tensor.name], name=f"{half}/cast", to=TensorProto.FLOAT))
        else:
            tensors.append(copy.deepcopy(tensor))
    replace_graph(proto, [*casts, *graph.node], tensors)


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
    replace_graph(folded, nodes, tensors.values())
    return folded


def _makes_weights(node: onnx.NodeProto, values: Sequence[TensorProto]) -> bool:
    """Say whether a node, whose inputs are all stored, renames them, turns fp16 into fp32, or multiplies fp32."""
    if node.op_type == "Cast":
        is_float = any(item.name == "to" and item.i == TensorProto.FLOAT for item in node.attribute)
        return is_float and values[0].data_type == TensorProto.FLOAT16
    return node.op_type == "Identity" or (
        node.op_type == "Mul" and all(value.data_type == TensorProto.FLOAT for value in values)
    )


def replace_graph(proto: onnx.ModelProto, nodes: Iterable[onnx.NodeProto], tensors: Iterable[onnx.TensorProto]) -> None:
    """Replace a graph's nodes, and its initialisers by those of ``tensors``; drop constants that nothing reads."""
    nodes = [copy.deepcopy(node) for node in nodes]
    used = {name for node in nodes for name in node.input}
    nodes = [node for node in nodes if node.op_type != "Constant" or node.output[0] in used]
    tensors = [copy.deepcopy(tensor) for tensor in tensors if tensor.name in used]
    del proto.graph.node[:], proto.graph.initializer[:]
    proto.graph.node.extend(nodes)
    proto.graph.initializer.extend(tensors)


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
