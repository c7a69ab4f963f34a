"""Inference engines behind one protocol: uint8 tiles in, thresholded Detections out, no NMS.

Every backend reads the same model-file contract: input ``images`` uint8 (N, C, H, W); outputs ``boxes`` (N, K, 5),
``scores`` (N, K) and ``labels`` (N, K) in fp32, top-K per level inside the graph. NMS is merge.py's alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args, runtime_checkable

from rtmdet_geo.errors import ConfigError, MissingDependencyError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from rtmdet_geo.structures import Detections, ModelSpec

BackendName = Literal["auto", "onnxruntime"]
BACKEND_NAMES: tuple[str, ...] = get_args(BackendName)


@runtime_checkable
class Backend(Protocol):
    """What detect.py needs of an inference engine.

    Attributes:
        name: what ``--backend`` calls it.
        spec: what the model file says of itself.
        fixed_tile_size: side in px that the file demands, or None when any multiple of ``spec.stride_multiple`` goes.
        num_saturated: images seen so far of which a level returned all its rows above the score threshold, so that
            candidates may be missing.
    """

    name: str
    spec: ModelSpec
    fixed_tile_size: int | None
    num_saturated: int

    def run(
        self, batches: Iterable[NDArray[np.uint8]], *, score_threshold: float, multi_label: bool = False
    ) -> Iterator[list[Detections]]:
        """Yield for each batch, in order, one Detections (frame "tile") per image.

        Args:
            batches: uint8 (N, C, H, W) each, channels as ``spec.bands``, 0-255 after the stretch.
            score_threshold: only detections with a score >= it, in [0, 1].
            multi_label: True keeps every (prior, class) pair; False only the best class of a prior.
        """
        ...

    def predict(
        self, images: NDArray[np.uint8], *, score_threshold: float, multi_label: bool = False
    ) -> list[Detections]:
        """Return one Detections per image of one batch, uint8 (N, C, H, W)."""
        ...


def open_backend(
    path: str | os.PathLike[str], *, name: str = "auto", threads: int | None = None, device: str = "auto"
) -> Backend:
    """Open a model file with the engine of that name; ``auto`` chooses by the file's suffix.

    Args:
        path: model file.
        name: one of BACKEND_NAMES.
        threads: CPU threads of the engine; None is one per usable core.
        device: "auto" or "cpu"; this version's engines run on the CPU.

    Raises:
        ConfigError: no such engine or device.
        ModelFileError: the file is missing, corrupt or foreign; the message names the part of the contract it lacks.
        MissingDependencyError: the engine's package is not installed.
    """
    if name not in BACKEND_NAMES:
        raise ConfigError(f"backend {name!r} is unknown; choose one of {', '.join(BACKEND_NAMES)}")
    if device not in ("auto", "cpu"):
        raise ConfigError(f"device {device!r} is not supported by the onnxruntime backend; choose 'auto' or 'cpu'")
    from rtmdet_geo.backends.onnxrt import OnnxRuntimeBackend

    return OnnxRuntimeBackend(path, threads=threads)


def require_package(module: str, *, extra: str | None = None) -> Any:
    """Import a module that an engine needs.

    Raises:
        MissingDependencyError: it is not installed; the message has the pip command.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = f"'rtmdet-geo[{extra}]'" if extra else module
        raise MissingDependencyError(f"{module} cannot be imported ({error}); run: pip install {package}") from error
