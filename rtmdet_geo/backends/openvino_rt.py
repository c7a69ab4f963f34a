"""OpenVINO on the CPU: runs the same model files as onnxruntime, in fp32 on every processor, or in int8."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.backends import require_package
from rtmdet_geo.backends.contract import (
    OUTPUTS,
    Port,
    RowsBackend,
    check_model_file,
    fixed_batch,
    fixed_side,
    refuse_classifier,
)
from rtmdet_geo.catalog import read_metadata
from rtmdet_geo.cores import usable_cores
from rtmdet_geo.errors import ConfigError, ModelFileError

logger = logging.getLogger(__name__)


class OpenVinoBackend(RowsBackend):
    """A detector's model file in OpenVINO's CPU plugin. See :class:`rtmdet_geo.backends.Backend` for the contract.

    Args:
        path: ``.onnx`` file that follows the model-file contract.
        threads: CPU threads; None is one per core that this process may use.

    Raises:
        ModelFileError: missing, corrupt or foreign file, one that OpenVINO cannot run, or a classifier.
        ConfigError: fewer threads than one.
        MissingDependencyError: openvino is not installed.
    """

    name = "openvino"

    def __init__(self, path: str | os.PathLike[str], *, threads: int | None = None) -> None:
        """Open and check the file."""
        self._graph = OpenVinoGraph(path, threads=threads)
        spec = self._graph.spec
        refuse_classifier(spec, path)
        (images,) = self._graph.inputs
        super().__init__(Path(path), spec, fixed_tile_size=fixed_side(images), fixed_batch_size=fixed_batch(images))
        self.precision = self._graph.precision
        self._names = list(OUTPUTS[spec.kind])

    def _forward(self, images: NDArray[np.uint8], multi_label: bool) -> tuple[NDArray[Any], ...]:
        """Run the graph; rows are (prior, class) pairs whatever ``multi_label`` is."""
        return self._graph.run(images, self._names)


class OpenVinoGraph:
    """A model file of any kind, checked against the contract, in OpenVINO's CPU plugin.

    Left alone, OpenVINO computes in bf16 or fp16 where the processor has them. Here it computes in fp32, so that boxes
    and scores are onnxruntime's, and of int8 model files the convolutions in int8.

    The first batch decides on a shape for which a fp32 graph is compiled alone: that is 3 per cent quicker than one for
    any shape, and ready sooner. Batches of other shapes share a second one, for any shape. Those two differ by less
    than 1e-5; of int8 they would round differently, so there is one for any shape only.

    Args:
        path: ``.onnx`` file.
        threads: CPU threads; None is one per core that this process may use.

    Attributes:
        spec: what the file says of itself.
        inputs: of the graph.
        outputs: of the graph.
        precision: that convolutions are computed in, "fp32" or "int8".

    Raises:
        ModelFileError: missing, corrupt or foreign file, or one that OpenVINO cannot read.
        ConfigError: fewer threads than one.
        MissingDependencyError: openvino is not installed.
    """

    def __init__(self, path: str | os.PathLike[str], *, threads: int | None = None) -> None:
        """Read and check the file."""
        openvino = require_package("openvino", extra="openvino")
        if threads is not None and threads < 1:
            raise ConfigError(f"threads must be at least 1, not {threads}")
        self._path = Path(path)
        self._core = openvino.Core()
        self._graph = _read_graph(self._core, self._path)
        self.inputs, self.outputs = _ports(self._graph.inputs), _ports(self._graph.outputs)
        self.spec = check_model_file(self._path, self.inputs, self.outputs)
        self.precision = "int8" if self.spec.precision == "int8" else "fp32"
        if self.precision == "int8":
            _keep_roundings_of_convolutions(self._graph)
        self._threads = threads or usable_cores()
        self._compiled: dict[tuple[int, ...] | None, Any] = {}  # by the shape that it takes; None takes any
        self._lock = threading.Lock()  # a compiled graph has one set of buffers for its calls

    def run(self, images: NDArray[np.uint8], names: Sequence[str]) -> tuple[NDArray[Any], ...]:
        """Return the outputs of these names for a batch of uint8 (N, C, H, W); threads take turns.

        Raises:
            ModelFileError: OpenVINO cannot run the graph.
        """
        with self._lock:
            outputs = self._compile_for(images.shape)({"images": np.ascontiguousarray(images)})
            return tuple(outputs[name] for name in names)

    def _compile_for(self, shape: tuple[int, ...]) -> Any:
        """Return a compiled graph that takes this shape."""
        is_first = not self._compiled and self.precision == "fp32"
        key = shape if is_first or shape in self._compiled else None
        if key not in self._compiled:
            graph = self._graph.clone()
            if key is not None:
                graph.reshape(list(key))
            self._compiled[key] = _compile(self._core, graph, self._path, self._threads)
        return self._compiled[key]


def _read_graph(core: Any, path: Path) -> Any:
    """Return OpenVINO's graph of an ONNX file.

    Raises:
        ModelFileError: there is no such file, it is damaged, or OpenVINO does not know one of its operators.
    """
    if not path.is_file():
        raise ModelFileError(f"model file {str(path)!r} is not there")
    read_metadata(path)  # OpenVINO would try its readers of all other formats on what is no ONNX file
    try:
        return core.read_model(str(path))
    except RuntimeError as error:
        raise ModelFileError(_why_not(path, "read", error)) from error


def _keep_roundings_of_convolutions(graph: Any) -> None:
    """Take out of an int8 graph all roundings but those of numbers that a convolution reads.

    The file rounds after every operator, for onnxruntime's kernels want that. OpenVINO computes a convolution and what
    follows it in one kernel, and rounding in between would break that apart: it takes a third longer.
    """
    for node in graph.get_ordered_ops():
        source = _find_rounded(node)
        readers = {reader.get_node().get_type_name() for reader in node.output(0).get_target_inputs()}
        if source is not None and not readers & {"Convolution", "GroupConvolution"}:
            node.output(0).replace(source)
    graph.validate_nodes_and_infer_types()


def _find_rounded(node: Any) -> Any:
    """Return what goes into QuantizeLinear if a node is the end of its DequantizeLinear, else None."""
    for kind in ("Multiply", "Subtract", "Convert", "Convert", "FakeQuantize"):  # from the end to the beginning
        if node.get_type_name() == kind:
            output = node.input_value(0)
            node = output.get_node()
        elif kind != "Subtract":  # left out where the zero point is 0
            return None
    return output


def _compile(core: Any, graph: Any, path: Path, threads: int) -> Any:
    """Return the graph compiled for the CPU, what is not int8 in fp32.

    Raises:
        ModelFileError: OpenVINO cannot run it.
    """
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",  # not what the processor is quickest with
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,  # all threads work on one batch
        "ENABLE_CPU_PINNING": False,  # two programs would choose the same cores
    }
    try:
        return core.compile_model(graph, "CPU", settings)
    except RuntimeError as error:
        raise ModelFileError(_why_not(path, "compile", error)) from error


def _why_not(path: Path, what: str, error: RuntimeError) -> str:
    """Return OpenVINO's failure in one line; the last line of its own message is the reason."""
    logger.debug("openvino cannot %s %s", what, path, exc_info=error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[-1] if lines else type(error).__name__
    return (
        f"OpenVINO cannot {what} {str(path)!r} ({reason}); it may be truncated: copy or export it again, or run it "
        "with the backend onnxruntime"
    )


def _ports(items: list[Any]) -> list[Port]:
    """Return OpenVINO's descriptions of inputs or outputs in the contract's words."""
    types = {"u8": "uint8", "f32": "fp32"}
    ports = []
    for item in items:
        shape = [] if item.partial_shape.rank.is_dynamic else item.partial_shape
        sizes = tuple(size.get_length() if size.is_static else "?" for size in shape)
        type_name = item.element_type.get_type_name()
        ports.append(Port(item.any_name, types.get(type_name, type_name), sizes))
    return ports
