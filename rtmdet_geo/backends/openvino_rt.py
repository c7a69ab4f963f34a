"""OpenVINO on the CPU: runs the same model files as onnxruntime, in fp32 on every processor."""

from __future__ import annotations

import logging
import os
import threading
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
    fixed_side,
    refuse_classifier,
)
from rtmdet_geo.catalog import read_metadata
from rtmdet_geo.cores import usable_cores
from rtmdet_geo.errors import ConfigError, ModelFileError

logger = logging.getLogger(__name__)


class OpenVinoBackend(RowsBackend):
    """A detector's model file in OpenVINO's CPU plugin. See :class:`rtmdet_geo.backends.Backend` for the contract.

    Left alone, OpenVINO computes in bf16 or fp16 where the processor has them. Here it computes in fp32, so that boxes
    and scores are onnxruntime's.

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
        """Open, check and compile the file."""
        file = Path(path)
        openvino = require_package("openvino", extra="openvino")
        if threads is not None and threads < 1:
            raise ConfigError(f"threads must be at least 1, not {threads}")
        core = openvino.Core()
        graph = _read_graph(core, file)
        inputs, outputs = _ports(graph.inputs), _ports(graph.outputs)
        spec = check_model_file(file, inputs, outputs)
        refuse_classifier(spec, path)
        super().__init__(file, spec, fixed_tile_size=fixed_side(inputs[0]))
        self._names = list(OUTPUTS[spec.kind])
        self._compiled = _compile(core, graph, file, threads or usable_cores())
        self._lock = threading.Lock()  # a compiled graph has one set of buffers for its calls

    def _forward(self, images: NDArray[np.uint8], multi_label: bool) -> tuple[NDArray[Any], ...]:
        """Run the graph; rows are (prior, class) pairs whatever ``multi_label`` is."""
        with self._lock:
            outputs = self._compiled({"images": np.ascontiguousarray(images)})
        return tuple(outputs[name] for name in self._names)


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


def _compile(core: Any, graph: Any, path: Path, threads: int) -> Any:
    """Return the graph compiled for the CPU, in fp32.

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
