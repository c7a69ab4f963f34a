"""onnxruntime on the CPU or a CUDA device: opens a model file and checks it against the contract."""

from __future__ import annotations

import contextlib
import io
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.backends import require_package
from rtmdet_geo.backends.contract import (
    GPU_BATCH_SIZE,
    OUTPUTS,
    Port,
    RowsBackend,
    check_model_file,
    fixed_batch,
    fixed_side,
    refuse_classifier,
)
from rtmdet_geo.backends.gpus import find_gpus
from rtmdet_geo.cores import usable_cores
from rtmdet_geo.errors import ConfigError, EngineError, ModelFileError, first_line
from rtmdet_geo.structures import ModelSpec

logger = logging.getLogger(__name__)


_CUDA = "CUDAExecutionProvider"
_CPU = "CPUExecutionProvider"
#: Words in messages of onnxruntime that mean that a GPU's memory is full; there is no class of errors for it.
_MEMORY_WORDS = (
    "Failed to allocate memory",
    "out of memory",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
_REMEDY = (
    "run: pip uninstall onnxruntime; pip install 'onnxruntime-gpu[cuda,cudnn]' (the driver must know its version of "
    "CUDA), or choose device 'cpu'"
)


class OnnxRuntimeBackend(RowsBackend):
    """A detector's model file in an onnxruntime session. See :class:`rtmdet_geo.backends.Backend` for the contract.

    On a GPU it computes what the file holds in fp32 in fp32, never in TF32. On a CPU without fp16 arithmetic, which
    most are, onnxruntime computes fp16 files in fp32, by weights that are rounded.

    Args:
        path: ``.onnx`` file that follows the model-file contract.
        threads: intra-operator threads; None is one per core that this process may use.
        device: "cpu", "cuda", "cuda:N", or "auto": cuda where onnxruntime-gpu is installed and works.

    Raises:
        ModelFileError: missing, corrupt or foreign file, or a classifier.
        ConfigError: fewer threads than one, or there is no such sort of device.
        EngineError: a CUDA device was asked for, and onnxruntime cannot use it.
        MissingDependencyError: onnxruntime is not installed.
    """

    name = "onnxruntime"

    def __init__(self, path: str | os.PathLike[str], *, threads: int | None = None, device: str = "auto") -> None:
        """Open and check the file."""
        index = _cuda_index(device)
        session, spec = open_model_file(path, threads=threads)
        refuse_classifier(spec, path)
        (images,) = ports_of(session.get_inputs())
        super().__init__(Path(path), spec, fixed_tile_size=fixed_side(images), fixed_batch_size=fixed_batch(images))
        if index is not None:
            on_gpu = _open_cuda(Path(path), threads or usable_cores(), index, is_asked_for=device != "auto")
            if on_gpu is not None:
                session = on_gpu
                self.device_name = f"cuda:{index}"
                self.best_batch_size = fixed_batch(images) or GPU_BATCH_SIZE
        self.precision = spec.precision
        self._session = session
        self._names = list(OUTPUTS[spec.kind])

    def _forward(self, images: NDArray[np.uint8], multi_label: bool) -> tuple[NDArray[Any], ...]:
        """Run the session; rows are (prior, class) pairs whatever ``multi_label`` is."""
        try:
            return tuple(self._session.run(self._names, {"images": images}))
        except Exception as error:  # onnxruntime's exceptions have no common base but Exception
            if not any(words in str(error) for words in _MEMORY_WORDS):
                raise
            raise self._too_large(images.shape) from error


def _cuda_index(device: str) -> int | None:
    """Return the number of the CUDA device to try; None: the CPU is asked for.

    Raises:
        ConfigError: no such sort of device.
    """
    kind, colon, number = device.partition(":")
    if device == "cpu":
        return None
    if device in ("auto", "cuda") or (kind == "cuda" and colon and number.isdecimal()):
        return int(number or 0)
    raise ConfigError(f"device {device!r} is unknown to onnxruntime; choose 'auto', 'cpu', 'cuda' or 'cuda:N'")


def _open_cuda(path: Path, threads: int, index: int, *, is_asked_for: bool) -> Any | None:
    """Return a session of a file that was opened before, on a CUDA device; None: there is none, and none is asked for.

    Raises:
        EngineError: it is asked for, and onnxruntime cannot use it.
    """
    onnxruntime = require_package("onnxruntime")
    if _CUDA not in onnxruntime.get_available_providers():
        if is_asked_for and not find_gpus():
            raise EngineError(f"no cuda:{index} is here: nvidia-smi names no NVIDIA GPU; choose device 'auto' or 'cpu'")
        if is_asked_for:
            raise EngineError(f"this onnxruntime ({onnxruntime.__version__}) is its CPU build; {_REMEDY}")
        return None
    missing = _preload(onnxruntime)
    onnxruntime.set_default_logger_severity(4)  # it writes red lines to stderr; the reason is told below
    try:
        session = _new_session(onnxruntime, str(path), threads, [(_CUDA, {"device_id": index, "use_tf32": 0}), _CPU])
        # Without its libraries or a driver it opens all the same, on the CPU.
        reason = "" if _CUDA in session.get_providers() else missing
    except Exception as error:  # onnxruntime's exceptions have no common base but Exception
        logger.debug("onnxruntime cannot open %s on cuda:%d", path, index, exc_info=True)
        reason = first_line(error)
    finally:
        onnxruntime.set_default_logger_severity(2)  # warnings: its default, which cannot be asked for
    if not reason:
        return session
    if is_asked_for:
        raise EngineError(f"onnxruntime {onnxruntime.__version__} cannot run on cuda:{index} ({reason}); {_REMEDY}")
    logger.warning("onnxruntime-gpu is installed but cannot run on cuda:%d (%s); it runs on the CPU", index, reason)
    return None


def _preload(onnxruntime: Any) -> str:
    """Load CUDA and cuDNN from installed packages, and return what is likely to be missing if it does not work."""
    preload = getattr(onnxruntime, "preload_dlls", None)  # from 1.21 on
    printed = io.StringIO()
    if preload is not None:
        with contextlib.redirect_stdout(printed):
            preload()
        logger.debug("onnxruntime.preload_dlls: %s", printed.getvalue())
    failed = [line.strip() for line in printed.getvalue().splitlines() if line.startswith("Failed to load")]
    return failed[0] if failed else "its CUDA libraries, the driver or the device do not work"


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
    session = open_session(onnxruntime, file, threads or usable_cores())
    return session, check_model_file(file, ports_of(session.get_inputs()), ports_of(session.get_outputs()))


def open_graph(graph: bytes) -> Any:
    """Return the onnxruntime ``InferenceSession`` of a serialised graph, on the CPU; nothing is checked."""
    return _new_session(require_package("onnxruntime"), graph, usable_cores(), [_CPU])


def ports_of(items: list[Any]) -> list[Port]:
    """Return onnxruntime's descriptions of inputs or outputs in the contract's words."""
    types = {"tensor(uint8)": "uint8", "tensor(float)": "fp32"}
    return [Port(item.name, types.get(item.type, item.type), tuple(item.shape)) for item in items]


def open_session(onnxruntime: Any, path: Path, threads: int) -> Any:
    """Return a session on the CPU for an ONNX file of any sort.

    Raises:
        ModelFileError: there is no such file, or onnxruntime cannot open it.
    """
    if not path.is_file():
        raise ModelFileError(f"model file {str(path)!r} is not there")
    try:
        return _new_session(onnxruntime, str(path), threads, [_CPU])
    except Exception as error:  # onnxruntime's exceptions have no common base but Exception
        logger.debug("onnxruntime cannot open %s", path, exc_info=True)
        raise ModelFileError(
            f"{str(path)!r} is no readable ONNX file ({first_line(error)}); it may be truncated: copy or export it "
            "again"
        ) from error


def _new_session(onnxruntime: Any, source: str | bytes, threads: int, providers: list[Any]) -> Any:
    """Return the session of a file's path, or of a serialised graph."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors only: optimiser remarks are none of the user's business
    # Threads that wait sleep instead of spinning: no slower alone, a fifth quicker where tiles are read meanwhile.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Without the fallback a GPU that fails is an error; with it onnxruntime prints and goes on, on the CPU.
    return onnxruntime.InferenceSession(source, options, providers=providers, enable_fallback=0)
