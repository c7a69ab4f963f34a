"""onnxruntime on the CPU: opens a model file and checks it against the contract."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.backends import require_package
from rtmdet_geo.backends.contract import OUTPUTS, RowsBackend, Sizes, refuse_classifier
from rtmdet_geo.catalog import SPEC_KEY, check_graph, read_spec
from rtmdet_geo.errors import ConfigError, ModelFileError
from rtmdet_geo.structures import ModelKind, ModelSpec

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
        height, width = session.get_inputs()[0].shape[2:]
        super().__init__(
            Path(path), spec, fixed_tile_size=height if isinstance(height, int) and height == width else None
        )
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
    session = _open_session(onnxruntime, file, threads or _usable_cores())
    has_spec = SPEC_KEY in session.get_modelmeta().custom_metadata_map
    spec = read_spec(file) if has_spec else None
    missing = _missing_parts(session, spec.kind if spec is not None else "rotated")
    if not has_spec:
        missing.append(f"metadata key {SPEC_KEY!r}")
    if missing or spec is None:
        raise ModelFileError(
            f"{str(file)!r} does not follow the model-file contract; it lacks {'; '.join(missing)}; "
            "export the model with `rtmdet-geo export`"
        )
    check_graph(file)
    channels = session.get_inputs()[0].shape[1]
    if channels != len(spec.bands):
        raise ModelFileError(
            f"{str(file)!r} contradicts itself: input 'images' has {channels} channels, its {SPEC_KEY} "
            f"{len(spec.bands)} bands; export it again"
        )
    return session, spec


def _usable_cores() -> int:
    """Cores that this process may run on; onnxruntime itself would count the whole machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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


def _missing_parts(session: Any, kind: ModelKind) -> list[str]:
    """Return what the graph lacks of the contract's input and of the kind's outputs, in words."""
    missing = []
    inputs = session.get_inputs()
    image = inputs[0]
    if len(inputs) != 1 or image.name != "images" or image.type != "tensor(uint8)" or len(image.shape) != 4:
        found = ", ".join(f"{item.name} {item.type} {item.shape}" for item in inputs)
        missing.append(f"input 'images' uint8 (N, C, H, W) (it has {found})")
    outputs = {item.name: item for item in session.get_outputs()}
    for name, sizes in OUTPUTS[kind].items():
        item = outputs.get(name)
        wanted = ("N", *sizes)
        if item is None or item.type != "tensor(float)" or not _is_shape(item.shape, wanted):
            missing.append(f"output {name!r} fp32 ({', '.join(map(str, wanted))})")
    return missing


def _is_shape(shape: list[Any], wanted: Sizes) -> bool:
    """Say whether a shape, whose dynamic sizes are names, can be the wanted one."""
    known = [pair for pair in zip(shape, wanted, strict=False) if all(isinstance(size, int) for size in pair)]
    return len(shape) == len(wanted) and all(given == size for given, size in known)
