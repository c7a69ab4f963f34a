"""The arithmetic on shapes in an ONNX graph, computed once where the sizes are known. No torch.

A traced graph computes targets of Reshape, sizes of Resize and k of TopK from the shapes at hand, also where these are
fixed; engines want them as constants. Sizes that stay dynamic are known by name, and where a name only has to be copied
(the batch, as a rule) the constant says so: 0 in a Reshape, a factor in a Resize.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

#: Larger tensors are weights, not shapes.
_MAX_NUMBERS = 64
#: Numbers of a tensor; of dtype object where some are names of sizes, or None for sizes without a name.
_Values = NDArray[Any]
_Shape = tuple[int | str | None, ...]


def fold_shapes(proto: onnx.ModelProto) -> None:
    """Replace nodes whose results are known for every input that the graph takes by constants, in place.

    The inputs' sizes decide what is known. Shapes that the graph states of its other tensors are forgotten, and those
    of its outputs must agree with what the inputs' imply.
    """
    while True:
        del proto.graph.value_info[:]
        inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
        folded = _Pass(proto.graph, tensor_shapes(inferred.graph))
        if not folded.num_changes:
            return
        replace_graph(proto, folded.nodes, folded.tensors)


def tensor_shapes(graph: onnx.GraphProto) -> dict[str, _Shape]:
    """Return the shapes of the tensors of an inferred graph, by name: numbers, names, or None for unnamed sizes."""
    shapes: dict[str, _Shape] = {}
    for values in (graph.value_info, graph.input, graph.output):
        for value in values:
            kind = value.type.tensor_type
            if kind.HasField("shape"):
                sizes = [size.dim_value if size.HasField("dim_value") else size.dim_param for size in kind.shape.dim]
                shapes[value.name] = tuple(size if size != "" else None for size in sizes)
    shapes |= {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    return shapes


def replace_graph(proto: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], tensors: Sequence[onnx.TensorProto]) -> None:
    """Replace a graph's nodes, and its initialisers by those of ``tensors``; what no output comes from is dropped."""
    used = {value.name for value in proto.graph.output}
    kept = []
    for node in reversed(nodes):
        if used.intersection(node.output):
            used.update(node.input)
            kept.append(copy.deepcopy(node))
    nodes = kept[::-1]
    tensors = [copy.deepcopy(tensor) for tensor in tensors if tensor.name in used]
    del proto.graph.node[:], proto.graph.initializer[:]
    proto.graph.node.extend(nodes)
    proto.graph.initializer.extend(tensors)


class _Pass:
    """One walk through a graph.

    Attributes:
        nodes: those that are left.
        tensors: initialisers, with the new constants.
        num_changes: nodes replaced or rewritten.
    """

    def __init__(self, graph: onnx.GraphProto, shapes: dict[str, _Shape]) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.tensors = list(graph.initializer)
        self.num_changes = 0
        self._shapes = shapes
        self._values: dict[str, _Values] = {}
        for tensor in graph.initializer:
            self._remember(tensor.name, tensor)
        for node in graph.node:
            if node.op_type == "Constant":
                self._remember(node.output[0], node.attribute[0].t)
                self.nodes.append(node)
            else:
                self._visit(node)

    def _remember(self, name: str, tensor: onnx.TensorProto) -> None:
        """Note a small constant; fp16 ones are stored weights."""
        if np.prod(tensor.dims) <= _MAX_NUMBERS and tensor.data_type != TensorProto.FLOAT16:
            self._values[name] = numpy_helper.to_array(tensor)

    def _visit(self, node: onnx.NodeProto) -> None:
        values = self._compute(node)
        if values is not None and values.dtype != object:
            self._values[node.output[0]] = values
            self.tensors.append(numpy_helper.from_array(values, node.output[0]))
            self.num_changes += 1
            return
        if values is not None:
            self._values[node.output[0]] = values
        rewrite = {"Reshape": self._copy_sizes, "Resize": self._use_scales}.get(node.op_type)
        rewritten = rewrite(node) if rewrite is not None else None
        self.num_changes += rewritten is not None
        self.nodes.append(node if rewritten is None else rewritten)

    def _compute(self, node: onnx.NodeProto) -> _Values | None:
        """Return a node's output if it is a shape, or follows from values that are known; else None."""
        if node.op_type == "Shape":
            shape = self._shapes.get(node.input[0])
            if shape is None:
                return None
            ends = {item.name: item.i for item in node.attribute}
            return _settle(np.array(shape, object)[ends.get("start", 0) : ends.get("end", len(shape))])
        inputs = [self._values[name] for name in node.input if name in self._values]
        is_weight = node.op_type in ("QuantizeLinear", "DequantizeLinear")
        if len(inputs) < len(node.input) or not inputs or len(node.output) > 1 or is_weight:
            return None
        if all(values.dtype != object for values in inputs):
            sizes = inputs[0] if node.op_type in ("ConstantOfShape", "Range") else np.zeros(0, np.int64)
            return _run(node, inputs) if np.prod(sizes) <= _MAX_NUMBERS else None
        move = _MOVES.get(node.op_type)
        return _settle(move(node, inputs)) if move is not None else None

    def _copy_sizes(self, node: onnx.NodeProto) -> onnx.NodeProto | None:
        """Return a Reshape whose target names sizes of its own input with 0, "as in the input", in their places."""
        target, shape = self._values.get(node.input[1]), self._shapes.get(node.input[0])
        if target is None or shape is None or target.dtype != object or _attribute(node, "allowzero", 0):
            return None
        pairs = list(zip(target, (*shape, *[None] * len(target)), strict=False))
        if not all(isinstance(wanted, int) or (wanted is not None and wanted == there) for wanted, there in pairs):
            return None
        sizes = [wanted if isinstance(wanted, int) else 0 for wanted, _ in pairs]
        return self._with_constant(node, 1, np.array(sizes, np.int64), "target")

    def _use_scales(self, node: onnx.NodeProto) -> onnx.NodeProto | None:
        """Return a Resize with constant factors instead of sizes, where these are whole multiples of its input's."""
        if len(node.input) < 4 or not node.input[3]:
            return None
        target, shape = self._values.get(node.input[3]), self._shapes.get(node.input[0])
        if target is None or shape is None:
            return None
        factors = []
        for wanted, there in zip(target, shape, strict=True):
            if wanted is not None and wanted == there:
                factors.append(1)
            elif isinstance(wanted, int | np.integer) and isinstance(there, int) and wanted % there == 0:
                factors.append(int(wanted) // there)
            else:
                return None
        rewritten = self._with_constant(node, 2, np.array(factors, np.float32), "scales")
        del rewritten.input[3:]
        return rewritten

    def _with_constant(self, node: onnx.NodeProto, place: int, values: _Values, what: str) -> onnx.NodeProto:
        """Return a copy of a node that reads a new constant as its input number ``place``."""
        name = f"{node.name}/{what}"
        self.tensors.append(numpy_helper.from_array(values, name))
        rewritten = copy.deepcopy(node)
        rewritten.input[place] = name
        return rewritten


def _settle(values: _Values) -> _Values:
    """Return sizes as whole numbers if all are known."""
    is_known = all(isinstance(value, int) for value in values.ravel())
    return values.astype(np.int64) if is_known else values


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((int(item.i) for item in node.attribute if item.name == name), default)


def _run(node: onnx.NodeProto, inputs: list[_Values]) -> _Values:
    """Return a node's output for known inputs, by the reference implementation of its operator."""
    from onnx.reference import ReferenceEvaluator

    feeds = dict(zip(node.input, inputs, strict=True))
    ports = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(values.dtype), values.shape)
        for name, values in feeds.items()
    ]
    graph = helper.make_graph([node], "one", ports, [onnx.ValueInfoProto(name=node.output[0])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    outputs: Any = ReferenceEvaluator(model).run(None, feeds)
    return np.asarray(outputs[0])


def _as_objects(values: _Values) -> _Values:
    """Return whole numbers as Python's own, which may stand beside names."""
    return np.array(values.tolist(), object).reshape(values.shape)


def _slice(node: onnx.NodeProto, inputs: list[_Values]) -> _Values:
    values, start, end = inputs[0], int(inputs[1].item()), int(inputs[2].item())
    return values[start : end : int(inputs[4].item()) if len(inputs) > 4 else 1]


#: Operators that only move numbers, so that names of sizes pass through them; shapes have one axis.
_MOVES: dict[str, Callable[[onnx.NodeProto, list[_Values]], _Values]] = {
    "Cast": lambda node, inputs: inputs[0],
    "Concat": lambda node, inputs: np.concatenate([_as_objects(values) for values in inputs]),
    "Gather": lambda node, inputs: np.array(inputs[0].take(inputs[1]), object),
    "Slice": _slice,
    "Squeeze": lambda node, inputs: inputs[0].reshape(()),
    "Unsqueeze": lambda node, inputs: inputs[0].reshape(1),
}
