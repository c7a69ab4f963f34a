"""onnxruntime on the CPU: opens a model file and checks it against the contract."""

from __future__ import annotations

import logging
import os
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
from rtmdet_geo.cores import usable_cores
from rtmdet_geo.errors import ConfigError, ModelFileError
from rtmdet_geo.structures import ModelSpec

logger = logging.getLogger(__name__)


class OnnxRuntimeBackend(RowsBackend):
    """A detector's model file in an onnxruntime CPU session. See :class:`rtmdet_geo.backends.Backend` for the contract.

    Args:
        path: ``.onnx`` file that follows the model-file contract.
        threads: intra-operator threads; None is one per core that this process may use.

    Raises:
        ModelFileError: missing, corrupt or foreign file, or a classifier.
        ConfigError: fewer threads than one.
        MissingDependencyError: onnxruntime is not installed.
    """

    name = "onnxruntime"

    def __init__(self, path: str | os.PathLike[str], *, threads: int | None = None) -> None:
        """Open and check the file."""
        session, spec = open_model_file(path, threads=threads)
        refuse_classifier(spec, path)
        super().__init__(Path(path), spec, fixed_tile_size=fixed_side(_ports(session.get_inputs())[0]))
        self._session = session
        self._names = list(OUTPUTS[spec.kind])

    def _forward(self, images: NDArray[np.uint8], multi_label: bool) -> tuple[NDArray[Any], ...]:
        """Run the session; rows are (prior, class) pairs whatever ``multi_label`` is."""
        return tuple(self._session.run(self._names, {"images": images}))


def open_model_file(path: str | os.PathLike[str], *, threads: int | None = None) -> tuple[Any, ModelSpec]:
    """Open a model file of any kind and check it against the contract.

    Args:
        path: ``.onnx`` file.
        threads: intra-operator threads; None is one per core that this process may use.

    Returns:
        The onnxruntime ``InferenceSession``, and what the file says of itself.

    Raises:
        ModelFileError: missing, corrupt or foreign file; the message names the parts of the contract that it lacks.
        ConfigError: fewer threads than one.
        MissingDependencyError: onnxruntime is not installed.
    """
    file = Path(path)
    onnxruntime = require_package("onnxruntime")
    if threads is not None and threads < 1:
        raise ConfigError(f"threads must be at least 1, not {threads}")
    session = _open_session(onnxruntime, file, threads or usable_cores())
    return session, check_model_file(file, _ports(session.get_inputs()), _ports(session.get_outputs()))


def _ports(items: list[Any]) -> list[Port]:
    """Return onnxruntime's descriptions of inputs or outputs in the contract's words."""
    types = {"tensor(uint8)": "uint8", "tensor(float)": "fp32"}
    return [Port(item.name, types.get(item.type, item.type), tuple(item.shape)) for item in items]


def _open_session(onnxruntime: Any, path: Path, threads: int) -> Any:
    if not path.is_file():
        raise ModelFileError(f"model file {str(path)!r} is not there")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors only: optimiser remarks are none of the user's business
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common base but Exception
        logger.debug("onnxruntime cannot open %s", path, exc_info=True)
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelFileError(
            f"{str(path)!r} is no readable ONNX file ({reason}); it may be truncated: copy or export it again"
        ) from error
