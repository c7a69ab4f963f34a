"""fp16 model files: a rewrite of the fp32 graph, typed, so that every engine computes what the file says. No torch.

The trunk becomes fp16: every convolution, with its weights, and whatever lies between two of them (SiLU, sums,
concatenations, resizing, pooling maxima). Means over whole feature maps stay fp32 islands, because sums over thousands
of cells leave fp16's range and precision. What comes before the first convolution (normalisation) and after the last
ones (exp, decoding, sigmoid, top-K, softmax), inputs and outputs stay fp32. Casts stand at the borders, one per tensor:
the fp16 twin of a tensor ``t`` is called ``t/fp16``.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from rtmdet_geo.errors import ConfigError
from rtmdet_geo.export.fold import replace_graph
from rtmdet_geo.export.graph import fold_weights, stored_spec, write_metadata

logger = logging.getLogger(__name__)

#: Largest finite fp16 number.
FP16_MAX = 65504.0
#: Operators of the trunk that stay fp32.
ISLANDS = ("GlobalAveragePool", "ReduceMean")
#: Operators that read a tensor whatever its type is.
_ANY_TYPE = ("Cast", "Shape")
#: Inputs of an operator that are fp32 in every precision, by their place: Resize's region and scales.
_ALWAYS_FP32 = {"Resize": (1, 2)}


def to_half(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a fp32 model file's graph with its trunk in fp16; inputs and outputs stay what they are.

    Args:
        proto: graph in fp32 of any kind of model; weights may be stored as fp16. Not changed.

    Returns:
        A copy. Where ``proto`` has a ModelSpec, the copy's says ``precision="fp16"``, with no differences yet.

    Raises:
        ConfigError: there is no convolution, the graph is not fp32 (fp16 or int8 already), or a weight exceeds fp16's
            range.
    """
    half = fold_weights(proto)
    types = _element_types(half)
    _check_is_fp32(half, types)
    trunk = _find_trunk(half.graph, types)
    rewritten = _Rewriter(half.graph, types, trunk)
    replace_graph(half, rewritten.nodes, rewritten.tensors)
    del half.graph.value_info[:]
    spec = stored_spec(half)
    if spec is not None:
        write_metadata(half, spec.model_copy(update={"precision": "fp16", "differences": {}}))
    return half


def with_roundings(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of a fp16 graph that computes in fp32 and rounds every fp16 number where it is made.

    It gives what a GPU gives, which multiplies fp16 numbers and sums them in fp32. onnxruntime has no fp16 arithmetic
    on most CPUs and computes the trunk in fp32 from end to end: it would never see a number beyond fp16's range.
    """
    rounded = onnx.ModelProto()
    rounded.CopyFrom(proto)
    halves = {name for name, kind in _element_types(rounded).items() if kind == TensorProto.FLOAT16}
    nodes: list[onnx.NodeProto] = []
    widened: set[str] = set()
    for node in rounded.graph.node:
        if node.op_type not in _ANY_TYPE:
            for place, name in enumerate(node.input):
                if name in halves and name not in widened:
                    widened.add(name)
                    nodes.append(_cast(name, f"{name}/fp32", TensorProto.FLOAT))
                node.input[place] = f"{name}/fp32" if name in halves else name
        nodes.append(node)
        if node.op_type != "Cast":
            for place, name in enumerate(node.output):
                if name in halves:
                    node.output[place] = f"{name}/exact"
                    nodes.append(_cast(f"{name}/exact", name, TensorProto.FLOAT16))
    replace_graph(rounded, nodes, list(rounded.graph.initializer))
    del rounded.graph.value_info[:]
    return rounded


def _element_types(proto: onnx.ModelProto) -> dict[str, int]:
    """Return the element type of every tensor, by name."""
    graph = onnx.shape_inference.infer_shapes(proto).graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for values in (graph.value_info, graph.input, graph.output):
        types |= {value.name: value.type.tensor_type.elem_type for value in values}
    return types


def _check_is_fp32(proto: onnx.ModelProto, types: dict[str, int]) -> None:
    operators = {node.op_type for node in proto.graph.node}
    if "Conv" not in operators:
        raise ConfigError("the graph holds no convolution, so there is nothing to compute in fp16; keep it fp32")
    if TensorProto.FLOAT16 in types.values() or operators & {"QuantizeLinear", "DequantizeLinear"}:
        raise ConfigError("the graph is fp16 or int8 already; make fp16 files from weights or from a fp32 model file")


def _find_trunk(graph: onnx.GraphProto, types: dict[str, int]) -> set[int]:
    """Return the indices of the nodes that are to be fp16.

    These are convolutions, and nodes that fp32 numbers reach from a convolution and from which they reach one. Shapes,
    which also go from one to another, are whole numbers.
    """

    def floats(names: Iterable[str]) -> list[str]:
        return [name for name in names if types.get(name) == TensorProto.FLOAT]

    below: set[str] = set()  # tensors that a convolution has gone into
    after = set()
    for index, node in enumerate(graph.node):
        if node.op_type == "Conv" or below.intersection(floats(node.input)):
            below.update(floats(node.output))
            after.add(index)
    above: set[str] = set()  # tensors that go into a convolution
    before = set()
    for index, node in reversed(list(enumerate(graph.node))):
        if node.op_type == "Conv" or above.intersection(floats(node.output)):
            above.update(floats(node.input))
            before.add(index)
    return {
        index
        for index in after & before
        if graph.node[index].op_type not in ISLANDS and floats(graph.node[index].output)
    }


class _Rewriter:
    """The graph's nodes and stored tensors with the trunk in fp16.

    Attributes:
        nodes: in their order, Casts where they are first needed.
        tensors: initialisers; some are needed no longer.
    """

    def __init__(self, graph: onnx.GraphProto, types: dict[str, int], trunk: set[int]) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.tensors = list(graph.initializer)
        self._types = types
        self._stored = {tensor.name: tensor for tensor in graph.initializer}
        self._stored |= {node.output[0]: node.attribute[0].t for node in graph.node if node.op_type == "Constant"}
        self._half: set[str] = set()  # tensors of which there is a twin
        self._full = {name for node in graph.node for name in node.output if name}
        self._full -= {name for index in trunk for name in graph.node[index].output}
        self._full |= {value.name for value in graph.input} | set(self._stored)
        for index, node in enumerate(graph.node):
            self.nodes.append(self._in_half(node) if index in trunk else self._in_full(node))
        for output in graph.output:
            self._as_full(output.name)

    def _in_half(self, node: onnx.NodeProto) -> onnx.NodeProto:
        node = copy.deepcopy(node)
        keep = _ALWAYS_FP32.get(node.op_type, ())
        for place, name in enumerate(node.input):
            if self._types.get(name) == TensorProto.FLOAT and place not in keep:
                node.input[place] = self._as_half(name)
        for place, name in enumerate(node.output):
            self._half.add(name)
            node.output[place] = _twin(name)
        return node

    def _in_full(self, node: onnx.NodeProto) -> onnx.NodeProto:
        node = copy.deepcopy(node)
        for place, name in enumerate(node.input):
            if node.op_type in _ANY_TYPE and name in self._half - self._full:
                node.input[place] = _twin(name)
            else:
                self._as_full(name)
        return node

    def _as_half(self, name: str) -> str:
        """Return the name of a fp32 tensor's twin, which is made if there is none yet."""
        if name not in self._half:
            self._half.add(name)
            if name in self._stored:
                self.tensors.append(_round(self._stored[name], name))
            else:
                self.nodes.append(_cast(name, _twin(name), TensorProto.FLOAT16))
        return _twin(name)

    def _as_full(self, name: str) -> None:
        """Make the fp32 tensor of that name from its twin if there is no other."""
        if name in self._half and name not in self._full:
            self._full.add(name)
            self.nodes.append(_cast(_twin(name), name, TensorProto.FLOAT))


def _twin(name: str) -> str:
    return f"{name}/fp16"


def _cast(source: str, target: str, to: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"{target}/cast", to=to)


def _round(tensor: onnx.TensorProto, name: str) -> onnx.TensorProto:
    """Return a stored fp32 tensor in fp16."""
    values = numpy_helper.to_array(tensor)
    largest = float(np.abs(values).max(initial=0.0))
    if not largest <= FP16_MAX:
        raise ConfigError(f"weight {name!r} reaches {largest:g}, beyond fp16's {FP16_MAX:g}; export in fp32")
    rounded = values.astype(np.float16)
    flushed = int(((rounded == 0) & (values != 0)).sum())
    if flushed:
        logger.info("%s: %d of %d weights are below fp16's smallest number and become 0", name, flushed, values.size)
    return numpy_helper.from_array(rounded, _twin(name))
