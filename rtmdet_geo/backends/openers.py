"""How each engine is opened, and which one ``auto`` takes; see :func:`rtmdet_geo.backends.open_backend`."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rtmdet_geo.backends import Backend, require_package
from rtmdet_geo.catalog import CATALOG, ENGINE_SUFFIX, WEIGHTS_SUFFIXES, read_spec
from rtmdet_geo.checkpoints import CHECKPOINTS
from rtmdet_geo.errors import ConfigError, EngineError, MissingDependencyError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Wish:
    """What ``open_backend`` was asked for; ``weights`` are what torch would run for the path, if there are any."""

    path: str | os.PathLike[str]
    weights: str | None
    threads: int | None
    device: str
    precision: str
    compiled: bool
    candidates: int | None
    batch_size: int | None
    tile_size: int | None

    @property
    def is_weights(self) -> bool:
        """Whether the path itself is weights."""
        return self.weights is not None and self.weights == os.fspath(self.path)

    def refuse(self, engine: str, *, devices: bool) -> None:
        """Refuse what the engine of a model file does not do.

        Raises:
            ConfigError: the file is weights, or a setting is torch's alone.
        """
        if engine != "tensorrt":
            refuse_plan(self.path, engine)
        if self.is_weights:
            raise ConfigError(f"{self.weights!r} holds weights, which torch runs, not {engine}; leave the backend out")
        if not devices and self.device not in ("auto", "cpu"):
            raise ConfigError(
                f"device {self.device!r} is not supported by the {engine} backend; choose 'auto' or 'cpu'"
            )
        if self.candidates is not None:
            raise ConfigError(
                "a model file's candidates per level are fixed; candidates= is for weights, which torch runs"
            )
        if self.compiled:
            raise ConfigError(f"only torch compiles its kernels, not {engine}; leave --compile out")

    def refuse_precision(self, engine: str) -> None:
        """Refuse a precision that is not the model file's own.

        Raises:
            ConfigError: it is another one.
        """
        if self.precision == "auto":
            return
        own = read_spec(self.path).precision
        if self.precision != own:
            other = "run weights with torch"
            if self.precision != "bf16":
                other = f"make such a file with `rtmdet-geo export --precision {self.precision}`"
            raise ConfigError(
                f"{engine} runs {os.fspath(self.path)!r} in its own precision, {own}, not {self.precision}; leave "
                f"--precision out, or {other}"
            )


def refuse_plan(path: str | os.PathLike[str], engine: str) -> None:
    """Refuse an engine of TensorRT.

    Raises:
        ConfigError: the path ends so.
    """
    if Path(path).suffix.lower() == ENGINE_SUFFIX:
        raise ConfigError(
            f"{os.fspath(path)!r} is an engine of TensorRT, which {engine} cannot read; give its model file"
        )


def open_engine(name: str, wish: Wish, *, any_size: bool) -> Backend:
    """Open what was wished for, with the engine of that name or the one that ``auto`` takes."""
    if name != "auto":
        return _OPENERS[name](wish)
    if wish.is_weights:
        return _open_torch(wish)
    if Path(wish.path).suffix.lower() == ENGINE_SUFFIX:
        return _open_tensorrt(wish)
    return _open_model_file(wish, any_size=any_size)


def _open_model_file(wish: Wish, *, any_size: bool) -> Backend:
    """Open a model file with the best engine of this machine; a fall back from a GPU's best is said in one line."""
    from rtmdet_geo.backends.gpus import find_gpus

    if wish.weights is not None and (wish.compiled or wish.precision == "bf16"):
        return _open_torch(wish)  # nothing else does that
    if wish.device == "cpu" or wish.candidates is not None or not find_gpus():
        return _open_onnxruntime(wish)
    reason = "TensorRT builds an engine for images of one size each"
    if not any_size:
        try:
            return _open_tensorrt(wish)
        except (MissingDependencyError, EngineError) as error:
            reason = str(error)
    engine = _open_torch_on_gpu(wish) or _open_onnxruntime(wish)
    logger.warning("%s; going on with %s on %s", reason, engine.name, engine.device_name)
    return engine


def _open_torch_on_gpu(wish: Wish) -> Backend | None:
    """Open the weights that lie beside a model file; None where there are none, or torch has no GPU."""
    if wish.weights is None:
        return None
    try:
        engine = _open_torch(wish)
    except (MissingDependencyError, ConfigError) as error:
        logger.info("%s", error)
        return None
    return engine if engine.device_name != "cpu" else None


def _open_tensorrt(wish: Wish) -> Backend:
    wish.refuse("tensorrt", devices=True)
    from rtmdet_geo.backends.trt_any_size import open_tensorrt

    return open_tensorrt(
        wish.path,
        device=wish.device,
        precision=wish.precision,
        max_batch=wish.batch_size,
        tile_size=wish.tile_size,
    )


def _open_onnxruntime(wish: Wish) -> Backend:
    wish.refuse("onnxruntime", devices=True)
    wish.refuse_precision("onnxruntime")
    from rtmdet_geo.backends.onnxrt import OnnxRuntimeBackend

    return OnnxRuntimeBackend(wish.path, threads=wish.threads, device=wish.device)


def _open_openvino(wish: Wish) -> Backend:
    wish.refuse("openvino", devices=False)
    wish.refuse_precision("openvino")
    from rtmdet_geo.backends.openvino_rt import OpenVinoBackend

    return OpenVinoBackend(wish.path, threads=wish.threads)


def _open_torch(wish: Wish) -> Backend:
    refuse_plan(wish.path, "torch")
    if wish.weights is None:
        raise ConfigError(
            f"{os.fspath(wish.path)!r} is a model file, which tensorrt, onnxruntime and openvino run; torch runs "
            "weights (.safetensors, .pth)"
        )
    require_package("torch", extra="train")
    from rtmdet_geo.backends.pytorch import TorchBackend

    return TorchBackend(
        wish.weights,
        threads=wish.threads,
        device=wish.device,
        candidates=wish.candidates,
        precision=wish.precision,
        compiled=wish.compiled,
    )


_OPENERS: dict[str, Callable[[Wish], Backend]] = {
    "tensorrt": _open_tensorrt,
    "torch": _open_torch,
    "onnxruntime": _open_onnxruntime,
    "openvino": _open_openvino,
}


def find_weights_of(path: str | os.PathLike[str]) -> str | None:
    """Return the weights that a path is, or that lie beside a bundled model file; None where there are none."""
    text = os.fspath(path)
    if text in CHECKPOINTS or text.lower().endswith(WEIGHTS_SUFFIXES):
        return text
    twins = {entry.path: entry.weights_path for entry in CATALOG.values()}
    return os.fspath(twins[Path(path)]) if Path(path) in twins else None
