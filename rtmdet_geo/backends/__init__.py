"""Inference engines behind one protocol: uint8 tiles in, thresholded Detections out, no NMS.

The engines "tensorrt" (model files, on NVIDIA GPUs), "onnxruntime" (model files, on CPU or CUDA), "openvino" (model
files, on the CPU) and "torch" (weights, on CPU or CUDA) give the same rows by the same contract, which
:mod:`rtmdet_geo.backends.contract` holds: boxes, scores and labels, of instances what their masks are made of. NMS is
merge.py's alone.
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

BackendName = Literal["auto", "tensorrt", "torch", "onnxruntime", "openvino"]
BACKEND_NAMES: tuple[str, ...] = get_args(BackendName)
#: What an engine may compute in; "auto" is its own choice.
PRECISIONS = ("auto", "fp32", "fp16", "bf16")


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
    precision: str = "auto",
    compiled: bool = False,
    candidates: int | None = None,
    batch_size: int | None = None,
    tile_size: int | None = None,
    any_size: bool = False,
) -> Backend:
    """Open a model with the engine of that name.

    Args:
        path: name of a bundled model, model file (.onnx), TensorRT engine (.engine), or weights: a file (.safetensors,
            .pth, ...) or published ones by name.
        name: one of BACKEND_NAMES. ``auto`` is torch for weights. For model files it is onnxruntime, unless the machine
            has a GPU: then TensorRT, and where that is missing torch (weights that lie beside a bundled model file) or
            onnxruntime-gpu; one line of the log says so. torch runs a bundled model file by the weights beside it.
        threads: CPU threads of the engine; None is one per usable core.
        device: "auto", "cpu", "cuda" or "cuda:N"; "auto" is a GPU where there is one that the engine can use.
        precision: "fp32", "fp16", "bf16" of the arithmetic, where the engine has the choice; "auto" is fp16 with
            TensorRT and otherwise fp32, or what a model file was exported to.
        compiled: have torch.compile make the kernels (minutes at the first batch).
        candidates: rows per level that torch keeps; None is a model file's number. COCO's protocol wants 30,000.
        batch_size: most images of a batch, which TensorRT wants to know beforehand; None is its own choice.
        tile_size: side of the tiles in px, which TensorRT wants to know beforehand; None is the model's.
        any_size: images of several sizes will come, so ``auto`` leaves out TensorRT, which builds an engine for each.

    Raises:
        ConfigError: no such engine, device or precision, the engine does not open such files, or a number is below 1.
        ModelFileError: the file is missing, corrupt or foreign (the message names the part of the contract that it
            lacks), or it is a classifier.
        WeightsError: the weights are damaged or fit none of our networks.
        MissingDependencyError: the engine's package is not installed.
        EngineError: the engine cannot be built or loaded on this machine.
    """
    _check_choice("backend", name, BACKEND_NAMES)
    _check_choice("precision", precision, PRECISIONS)
    from rtmdet_geo.backends.openers import Wish, find_weights_of, open_engine
    from rtmdet_geo.catalog import CATALOG

    if os.fspath(path) in CATALOG:
        path = CATALOG[os.fspath(path)].path
    wish = Wish(path, find_weights_of(path), threads, device, precision, compiled, candidates, batch_size, tile_size)
    return open_engine(name, wish, any_size=any_size)


def choose_batch_size(engine: Backend, batch_size: int | None) -> int:
    """Return the images of a batch: those asked for, or the engine's ``best_batch_size``; 1 where it names none.

    Raises:
        ConfigError: it is below 1.
    """
    number = getattr(engine, "best_batch_size", 1) if batch_size is None else batch_size
    if number < 1:
        raise ConfigError(f"batch_size={number} must be at least 1")
    return int(number)


def _check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{what} {value!r} is unknown; choose one of {', '.join(choices)}")


def require_package(module: str, *, extra: str | None = None) -> Any:
    """Import a module that an engine needs.

    Raises:
        MissingDependencyError: it is not installed; the message has the pip command.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:  # OSError: a shared library of the package is missing
        package = f"'rtmdet-geo[{extra}]'" if extra else module
        raise MissingDependencyError(f"{module} cannot be imported ({error}); run: pip install {package}") from error
