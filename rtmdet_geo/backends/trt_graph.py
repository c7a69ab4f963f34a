"""A model file as TensorRT is to read it: one tile size, plain weights, types as precise as asked for. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rtmdet_geo.backends import require_package
from rtmdet_geo.backends.contract import Port
from rtmdet_geo.catalog import read_metadata
from rtmdet_geo.errors import ModelFileError


def read_ports(path: Path) -> tuple[list[Port], list[Port]]:
    """Return a model file's inputs and outputs in the contract's words.

    Raises:
        ModelFileError: it is no readable ONNX file.
        MissingDependencyError: onnx is not installed.
    """
    graph = _load(path).graph
    return [_port(value) for value in graph.input], [_port(value) for value in graph.output]


def read_graph(
    path: Path, precision: str, image_size: tuple[int, int], batch: int | None = None
) -> tuple[bytes, dict[str, str]]:
    """Return a model file's graph for a build, and the operators of its nodes in fp16, by their names.

    Args:
        path: that was checked against the contract.
        precision: "fp16" makes the trunk of a fp32 file so; a fp16 file stays what it is.
        image_size: height and width of the images in px.
        batch: images at once, where there is one number only; with it all shapes are constants.

    Raises:
        ConfigError: the graph takes images of another size only, or it cannot be computed in fp16.
        ModelFileError: it is no readable ONNX file.
        MissingDependencyError: onnx is not installed.
    """
    proto = _load(path)
    from onnx import TensorProto, shape_inference

    from rtmdet_geo.export.graph import fix_size, fold_weights, stored_spec
    from rtmdet_geo.export.half import to_half

    spec = stored_spec(proto)
    proto = fix_size(proto, *image_size, batch=batch)
    if spec is None or spec.precision == "fp32":
        proto = to_half(proto) if precision == "fp16" else fold_weights(proto)
    inferred = shape_inference.infer_shapes(proto).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*inferred.value_info, *inferred.output)}
    half_nodes = {
        node.name: node.op_type
        for node in proto.graph.node
        if node.op_type != "Cast" and types.get(node.output[0]) == TensorProto.FLOAT16
    }
    return proto.SerializeToString(), half_nodes


def _load(path: Path) -> Any:
    onnx = require_package("onnx", extra="tensorrt")
    read_metadata(path)  # says in our words that it is no ONNX file
    try:
        return onnx.load(path)
    except Exception as error:  # protobuf's exceptions differ from version to version
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelFileError(
            f"{str(path)!r} is no readable ONNX file ({reason}); it may be truncated: copy or export it again"
        ) from error


def _port(value: Any) -> Port:
    """Return one input or output; of the types only those of the contract have names."""
    tensor = value.type.tensor_type
    sizes = [size.dim_value if size.HasField("dim_value") else size.dim_param or None for size in tensor.shape.dim]
    names = {2: "uint8", 1: "fp32"}  # TensorProto.UINT8, TensorProto.FLOAT
    return Port(value.name, names.get(tensor.elem_type, f"type {tensor.elem_type}"), tuple(sizes))
