"""The operators that model files may hold: those that every engine knows. No torch.

Each is in opset 17, is read by TensorRT 8.6's ONNX parser (https://github.com/onnx/onnx-tensorrt, docs/operators.md,
release/8.6-GA) and runs in onnxruntime and OpenVINO. Of TensorRT's restrictions the graphs keep three more: weights of
convolutions are stored, k of TopK is a constant where sizes are fixed, and at most MAX_TOP_K.
"""

from __future__ import annotations

import onnx
from onnx import numpy_helper

from rtmdet_geo.errors import ModelFileError
from rtmdet_geo.export.graph import fold_weights
from rtmdet_geo.variants import MAX_TOP_K

#: What the networks compute with; what the decoding of boxes and the choice of the best rows need; what copies shapes
#: from tensor to tensor; what int8 files add.
OPERATORS: frozenset[str] = frozenset(
    (
        *("Add", "Cast", "Concat", "Conv", "Div", "Gemm", "GlobalAveragePool", "HardSigmoid", "MaxPool", "Mul"),
        *("ReduceMean", "Relu", "Resize", "Sigmoid", "Softmax", "Sub"),
        *("Clip", "Cos", "Exp", "Expand", "Flatten", "Floor", "Gather", "GatherElements", "Min", "Reshape"),
        *("Sin", "Slice", "Split", "Squeeze", "Tile", "TopK", "Transpose", "Unsqueeze"),
        *("Constant", "ConstantOfShape", "Shape"),
        *("DequantizeLinear", "QuantizeLinear"),
    )
)
OPSET = 17


def check_operators(proto: onnx.ModelProto) -> None:
    """Refuse a graph that some engine could not run.

    Raises:
        ModelFileError: another opset or an operator of another domain or outside OPERATORS (its node is named), a
            convolution whose weights are computed, a TopK that takes too many or an unknown number.
    """
    opsets = {entry.domain: entry.version for entry in proto.opset_import}
    if opsets != {"": OPSET}:
        raise ModelFileError(f"the graph is of opset {opsets}, not {OPSET} of ONNX itself; export it again")
    for node in proto.graph.node:
        if node.domain or node.op_type not in OPERATORS:
            raise ModelFileError(
                f"the graph holds operator {node.domain + '.' if node.domain else ''}{node.op_type} (node "
                f"{node.name!r}), which not every engine knows; known: {', '.join(sorted(OPERATORS))}"
            )
    graph = fold_weights(proto).graph
    _check_top_k(graph)
    made = {node.output[0]: node.op_type for node in graph.node}
    for node in graph.node:
        if node.op_type == "Conv" and made.get(node.input[1], "Constant") not in ("Constant", "DequantizeLinear"):
            raise ModelFileError(f"weights of convolution {node.name!r} are computed, not stored; export it again")


def _check_top_k(graph: onnx.GraphProto) -> None:
    constants = {tensor.name: tensor for tensor in graph.initializer}
    constants |= {node.output[0]: node.attribute[0].t for node in graph.node if node.op_type == "Constant"}
    made = {node.output[0]: node for node in graph.node}
    sizes = graph.input[0].type.tensor_type.shape.dim[2:]
    is_fixed = all(size.HasField("dim_value") for size in sizes)
    for node in graph.node:
        if node.op_type != "TopK":
            continue
        k = node.input[1]
        limits = [k] if k in constants else []
        if not limits and made[k].op_type == "Min" and not is_fixed:
            limits = [name for name in made[k].input if name in constants]
        if not limits:
            raise ModelFileError(f"k of {node.name!r} is computed without a limit; export the model again")
        most = min(int(numpy_helper.to_array(constants[name]).max()) for name in limits)
        if most > MAX_TOP_K:
            raise ModelFileError(f"{node.name!r} keeps {most} rows; TensorRT's TopK takes {MAX_TOP_K} at most")
