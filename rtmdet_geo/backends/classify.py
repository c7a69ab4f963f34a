"""Engines of classifiers behind one protocol: uint8 images in, one probability per class out.

A model file of kind "classification" has the input ``images`` uint8 (N, C, H, W) and the output ``scores``
(N, num_classes) fp32; normalisation and softmax are inside the graph. It runs in onnxruntime or OpenVINO. Weights, also
published ones by name, run in torch, which is loaded for them only.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.backends import BACKEND_NAMES, require_package
from rtmdet_geo.backends.onnxrt import open_model_file
from rtmdet_geo.catalog import CATALOG, WEIGHTS_SUFFIXES, find_model, read_spec
from rtmdet_geo.checkpoints import CHECKPOINTS, find_checkpoint
from rtmdet_geo.errors import ConfigError, ModelFileError

if TYPE_CHECKING:
    from rtmdet_geo.structures import ModelSpec

#: Engines that run classifiers' model files; the first is the base default.
FILE_ENGINES = ("onnxruntime", "openvino")
#: Probabilities of an image must sum to 1 within this.
_SUM_TOLERANCE = 1e-3


@runtime_checkable
class Classifier(Protocol):
    """What classify.py needs of an engine.

    Attributes:
        name: of the engine.
        path: file that was opened.
        spec: what the file says of itself; ``spec.tile_size`` is the side of its images in px.
    """

    name: str
    path: Path
    spec: ModelSpec

    def predict(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the probability of each class, (N, num_classes), rows summing to 1.

        Args:
            images: uint8 (N, C, side, side), channels as ``spec.bands``, side = ``spec.tile_size`` px.

        Raises:
            ConfigError: the batch has another dtype or shape.
            ModelFileError: the file returns something else than probabilities.
        """
        ...


def open_classifier(
    name_or_path: str | os.PathLike[str], *, backend: str = "auto", threads: int | None = None, device: str = "auto"
) -> Classifier:
    """Open a classifier: a model file (.onnx), a weights file, or published weights by name.

    Published weights that are not in the cache are downloaded.

    Args:
        name_or_path: such as "classes.onnx", "runs/mine/model.safetensors", "mmpretrain.pth" (see
            :func:`rtmdet_geo.models.identify.load_network`) or "cspnext_tiny_imagenet".
        backend: "onnxruntime" or "openvino" for model files, "torch" for weights; "auto" is onnxruntime for model
            files and torch for weights.
        threads: CPU threads of the engine; None is one per usable core, for weights torch's own number.
        device: "auto" or "cpu"; for weights also "cuda" or "cuda:1", and "auto" is cuda where there is one.

    Raises:
        ConfigError: ``threads`` is below 1, there is no such engine or device, or the engine does not open such files.
        UnknownModelError: no published weights have that name.
        ModelFileError: the file is missing, corrupt or foreign, or it is a detector.
        WeightsError: the weights are damaged, or fit none of our networks.
        MissingDependencyError: the engine's package is not installed.
        DownloadError, ChecksumError: see :func:`rtmdet_geo.cache.download`.
    """
    if threads is not None and threads < 1:
        raise ConfigError(f"threads must be at least 1, not {threads}")
    if backend not in BACKEND_NAMES:
        raise ConfigError(f"backend {backend!r} is unknown; choose one of {', '.join(BACKEND_NAMES)}")
    if backend not in ("auto", "torch", *FILE_ENGINES):
        raise ConfigError(f"{backend} runs no classifiers; choose one of {', '.join(FILE_ENGINES)} for a model file")
    text = os.fspath(name_or_path)
    path = Path(text)
    if text not in CHECKPOINTS:
        if text not in CATALOG and not path.exists() and not path.suffix and len(path.parts) == 1:
            find_checkpoint(text)  # raises with near names
        path = find_model(text)
    if text in CHECKPOINTS or path.suffix.lower() in WEIGHTS_SUFFIXES:
        if backend in FILE_ENGINES:
            raise ConfigError(f"{text!r} holds weights, which torch runs, not {backend}; leave the backend out")
        return _open_torch(text, threads, device)
    if backend == "torch":
        raise ConfigError(
            f"{text!r} is a model file, which {' and '.join(FILE_ENGINES)} run; torch runs weights (.safetensors, .pth)"
        )
    if device not in ("auto", "cpu"):
        raise ConfigError(f"device {device!r} is not supported for classifiers' model files; choose 'auto' or 'cpu'")
    return ModelFileClassifier(path, name=FILE_ENGINES[0] if backend == "auto" else backend, threads=threads)


def _open_torch(text: str, threads: int | None, device: str) -> Classifier:
    if text in CHECKPOINTS:
        refuse_detector(CHECKPOINTS[text].spec(), text)  # before a download
    require_package("torch", extra="train")
    from rtmdet_geo.backends.pytorch_classify import TorchClassifier

    return TorchClassifier(text, threads=threads, device=device)


class ModelFileClassifier:
    """A model file in onnxruntime or OpenVINO, on the CPU. See :class:`Classifier`.

    Args:
        path: ``.onnx`` file of kind "classification".
        name: of the engine, one of FILE_ENGINES.
        threads: CPU threads; None is one per core that this process may use.

    Raises:
        See :func:`open_classifier`.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, name: str = FILE_ENGINES[0], threads: int | None = None
    ) -> None:
        """Open and check the file."""
        self.name = name
        self.path = Path(path)
        refuse_detector(read_spec(self.path), self.path)
        if name == "openvino":
            from rtmdet_geo.backends.openvino_rt import OpenVinoGraph

            graph = OpenVinoGraph(self.path, threads=threads)
            self.spec, self._run = graph.spec, graph.run
            sizes = {port.name: port.sizes for port in (*graph.inputs, *graph.outputs)}
        else:
            session, self.spec = open_model_file(self.path, threads=threads)
            self._run = lambda images, names: session.run(names, {"images": images})
            sizes = {port.name: port.shape for port in (*session.get_inputs(), *session.get_outputs())}
        _check_sizes(sizes, self.spec, self.path)
        number = sizes["images"][0]
        self._fixed_number = number if isinstance(number, int) else None

    def predict(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return probabilities (N, num_classes); see the protocol."""
        check_batch(images, self.spec)
        size = self._fixed_number or len(images)
        parts = []
        for start in range(0, len(images), size):
            part = images[start : start + size]
            filled = np.pad(part, ((0, size - len(part)), (0, 0), (0, 0), (0, 0)))
            (scores,) = self._run(filled, ["scores"])
            parts.append(scores[: len(part)])
        return check_scores(np.concatenate(parts), len(images), self.spec, self.path)


def refuse_detector(spec: ModelSpec, path: str | os.PathLike[str]) -> None:
    """Refuse a model that does not classify.

    Raises:
        ModelFileError: it finds objects.
    """
    if spec.kind != "classification":
        raise ModelFileError(
            f"{os.fspath(path)!r} is a detector (kind {spec.kind!r}), it does not classify whole images; "
            "use it with `rtmdet-geo detect`"
        )


def _check_sizes(found: Mapping[str, Sequence[Any]], spec: ModelSpec, path: Path) -> None:
    """Compare the sizes of a file's input and output, by name, with its own spec; the rest has been checked.

    Raises:
        ModelFileError: they contradict each other.
    """
    wanted = {"images": (len(spec.bands), spec.tile_size, spec.tile_size), "scores": (len(spec.classes),)}
    for name, shape in wanted.items():
        sizes = found[name][1:]  # those that are open have a name, or none
        if not all(not isinstance(size, int) or size == one for size, one in zip(sizes, shape, strict=True)):
            raise ModelFileError(
                f"{str(path)!r} contradicts itself: {name!r} has the shape {list(found[name])}, its model_spec wants "
                f"(N, {', '.join(map(str, shape))}); export it again"
            )


def check_batch(images: NDArray[np.uint8], spec: ModelSpec) -> None:
    """Refuse a batch that a classifier cannot take.

    Raises:
        ConfigError: another dtype or shape than uint8 (N, C, side, side), or no images.
    """
    shape = (len(spec.bands), spec.tile_size, spec.tile_size)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != shape or not len(images):
        raise ConfigError(
            f"a batch must be uint8 (N, {', '.join(map(str, shape))}), not {images.dtype} {images.shape}; "
            "preprocess.crop_centre makes an image fit"
        )


def check_scores(scores: NDArray[np.float32], number: int, spec: ModelSpec, path: Path) -> NDArray[np.float32]:
    """Return scores that are probabilities.

    Raises:
        ModelFileError: they are not.
    """
    if scores.shape != (number, len(spec.classes)):
        raise ModelFileError(
            f"{str(path)!r} returns scores of shape {scores.shape} for {number} images of {len(spec.classes)} classes; "
            "export it again"
        )
    is_sound = np.isfinite(scores).all() and (scores >= 0).all()
    if not is_sound or (np.abs(scores.sum(axis=1) - 1) > _SUM_TOLERANCE).any():
        raise ModelFileError(
            f"{str(path)!r} returns scores that are no probabilities (softmax is missing, or the file is damaged); "
            "copy or export it again"
        )
    return scores
