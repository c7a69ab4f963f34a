"""Inference engines behind one protocol: uint8 tiles in, thresholded Detections out, no NMS.

The engines "onnxruntime" and "openvino" (model files, on the CPU) and "torch" (weights, on CPU or CUDA) give the same
rows by the same contract, which :mod:`rtmdet_geo.backends.contract` holds: boxes, scores and labels, of instances what
their masks are made of. NMS is merge.py's alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args, runtime_checkable

from rtmdet_geo.errors import ConfigError, MissingDependencyError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from rtmdet_geo.structures import Detections, ModelSpec

BackendName = Literal["auto", "onnxruntime", "openvino", "torch"]
BACKEND_NAMES: tuple[str, ...] = get_args(BackendName)


@runtime_checkable
class Backend(Protocol):
    """What detect.py needs of an inference engine.

    Attributes:
        name: what ``--backend`` calls it.
        path: file that it opened.
        device_name: where it runs, such as "cpu" or "cuda:0".
        spec: what the model file says of itself.
        fixed_tile_size: side in px that the file demands, or None when any multiple of ``spec.stride_multiple`` goes.
        num_saturated: images seen so far of which a level returned all its rows above the score threshold, so that
            candidates may be missing.
    """

    name: str
    path: Path
    device_name: str
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
    path: str | os.PathLike[str],
    *,
    name: str = "auto",
    threads: int | None = None,
    device: str = "auto",
    candidates: int | None = None,
) -> Backend:
    """Open a model with the engine of that name.

    Args:
        path: name of a bundled model, model file (.onnx), or weights: a file (.safetensors, .pth, ...) or published
            ones by name.
        name: one of BACKEND_NAMES; ``auto`` is onnxruntime for model files and torch for weights. torch runs a bundled
            model file by the weights beside it.
        threads: CPU threads of the engine; None is one per usable core.
        device: "auto", "cpu", "cuda" or "cuda:N"; model files run on the CPU, with torch "auto" is cuda where there is
            one.
        candidates: rows per level that torch keeps; None is a model file's number. COCO's protocol wants 30,000.

    Raises:
        ConfigError: no such engine or device, the engine does not open such files, or a number is below 1.
        ModelFileError: the file is missing, corrupt or foreign (the message names the part of the contract that it
            lacks), or it is a classifier.
        WeightsError: the weights are damaged or fit none of our networks.
        MissingDependencyError: the engine's package is not installed.
    """
    if name not in BACKEND_NAMES:
        raise ConfigError(f"backend {name!r} is unknown; choose one of {', '.join(BACKEND_NAMES)}")
    from rtmdet_geo.catalog import CATALOG

    if os.fspath(path) in CATALOG:
        path = CATALOG[os.fspath(path)].path
    weights = _find_weights_of(path)
    if name == "torch" or (name == "auto" and weights is not None and weights == os.fspath(path)):
        return _open_torch(path, weights, threads, device, candidates)
    engine = "onnxruntime" if name == "auto" else name
    if weights is not None and weights == os.fspath(path):
        raise ConfigError(f"{weights!r} holds weights, which torch runs, not {engine}; leave the backend out")
    if device not in ("auto", "cpu"):
        raise ConfigError(f"device {device!r} is not supported by the {engine} backend; choose 'auto' or 'cpu'")
    if candidates is not None:
        raise ConfigError("a model file's candidates per level are fixed; candidates= is for weights, which torch runs")
    if engine == "openvino":
        from rtmdet_geo.backends.openvino_rt import OpenVinoBackend

        return OpenVinoBackend(path, threads=threads)
    from rtmdet_geo.backends.onnxrt import OnnxRuntimeBackend

    return OnnxRuntimeBackend(path, threads=threads)


def _find_weights_of(path: str | os.PathLike[str]) -> str | None:
    """Return the weights that a path is, or that lie beside a bundled model file; None where there are none."""
    from rtmdet_geo.catalog import CATALOG, WEIGHTS_SUFFIXES
    from rtmdet_geo.checkpoints import CHECKPOINTS

    text = os.fspath(path)
    if text in CHECKPOINTS or text.lower().endswith(WEIGHTS_SUFFIXES):
        return text
    twins = {entry.path: entry.weights_path for entry in CATALOG.values()}
    return os.fspath(twins[Path(path)]) if Path(path) in twins else None


def _open_torch(
    path: str | os.PathLike[str], weights: str | None, threads: int | None, device: str, candidates: int | None
) -> Backend:
    if weights is None:
        raise ConfigError(
            f"{os.fspath(path)!r} is a model file, which onnxruntime and openvino run; torch runs weights "
            "(.safetensors, .pth)"
        )
    require_package("torch", extra="train")
    from rtmdet_geo.backends.pytorch import TorchBackend

    return TorchBackend(weights, threads=threads, device=device, candidates=candidates)


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
