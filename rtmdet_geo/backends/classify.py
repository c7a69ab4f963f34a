"""Engines of classifiers behind one protocol: uint8 images in, one probability per class out.

A model file of kind "classification" has the input ``images`` uint8 (N, C, H, W) and the output ``scores``
(N, num_classes) fp32; normalisation and softmax are inside the graph. It runs in onnxruntime. Weights, also published
ones by name, run in torch, which is loaded for them only.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.backends import require_package
from rtmdet_geo.backends.onnxrt import open_model_file
from rtmdet_geo.catalog import CATALOG, WEIGHTS_SUFFIXES, find_model, read_spec
from rtmdet_geo.checkpoints import CHECKPOINTS, find_checkpoint
from rtmdet_geo.errors import ConfigError, ModelFileError

if TYPE_CHECKING:
    from rtmdet_geo.structures import ModelSpec

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
    name_or_path: str | os.PathLike[str], *, threads: int | None = None, device: str = "auto"
) -> Classifier:
    """Open a classifier: a model file (.onnx), a weights file, or published weights by name.

    Published weights that are not in the cache are downloaded.

    Args:
        name_or_path: such as "classes.onnx", "runs/mine/model.safetensors", "mmpretrain.pth" (see
            :func:`rtmdet_geo.models.identify.load_network`) or "cspnext_tiny_imagenet".
        threads: CPU threads of the engine; None is one per usable core, for weights torch's own number.
        device: "auto" or "cpu"; for weights also "cuda" or "cuda:1", and "auto" is cuda where there is one.

    Raises:
        ConfigError: ``threads`` is below 1, or there is no such device.
        UnknownModelError: no published weights have that name.
        ModelFileError: the file is missing, corrupt or foreign, or it is a detector.
        WeightsError: the weights are damaged, or fit none of our networks.
        MissingDependencyError: the engine's package is not installed.
        DownloadError, ChecksumError: see :func:`rtmdet_geo.cache.download`.
    """
    if threads is not None and threads < 1:
        raise ConfigError(f"threads must be at least 1, not {threads}")
    text = os.fspath(name_or_path)
    path = Path(text)
    if text not in CHECKPOINTS:
        if text not in CATALOG and not path.exists() and not path.suffix and len(path.parts) == 1:
            find_checkpoint(text)  # raises with near names
        path = find_model(text)
        if path.suffix.lower() not in WEIGHTS_SUFFIXES:
            return OnnxClassifier(path, threads=threads, device=device)
    return TorchClassifier(text, threads=threads, device=device)


class OnnxClassifier:
    """A model file in an onnxruntime CPU session. See :class:`Classifier`.

    Args:
        path: ``.onnx`` file of kind "classification".
        threads: intra-operator threads; None is one per core that this process may use.
        device: "auto" or "cpu".

    Raises:
        See :func:`open_classifier`.
    """

    name = "onnxruntime"

    def __init__(self, path: str | os.PathLike[str], *, threads: int | None = None, device: str = "auto") -> None:
        """Open and check the file."""
        if device not in ("auto", "cpu"):
            raise ConfigError(f"device {device!r} is not supported for model files; choose 'auto' or 'cpu'")
        self.path = Path(path)
        _refuse_detector(read_spec(self.path), self.path)
        self._session, self.spec = open_model_file(self.path, threads=threads)
        _check_sizes(self._session, self.spec, self.path)

    def predict(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return probabilities (N, num_classes); see the protocol."""
        _check_batch(images, self.spec)
        (scores,) = self._session.run(["scores"], {"images": np.ascontiguousarray(images)})
        return _checked(scores, len(images), self.spec, self.path)


class TorchClassifier:
    """Weights in torch, in fp32, batch norms folded into their convolutions. See :class:`Classifier`.

    Args:
        weights: see :func:`rtmdet_geo.models.identify.load_network`.
        threads: CPU threads while it runs; None leaves torch's number.
        device: see :func:`open_classifier`.

    Raises:
        See :func:`open_classifier`.
    """

    name = "torch"

    def __init__(self, weights: str | os.PathLike[str], *, threads: int | None = None, device: str = "auto") -> None:
        """Build the network and load the weights."""
        text = os.fspath(weights)
        if text in CHECKPOINTS:
            _refuse_detector(CHECKPOINTS[text].spec(), text)  # before a download
        require_package("torch", extra="train")
        from rtmdet_geo.models.classifier import ClassificationGraph
        from rtmdet_geo.models.devices import find_device
        from rtmdet_geo.models.identify import load_network
        from rtmdet_geo.models.weights import fuse_batch_norm

        place = find_device(device)
        network, self.spec = load_network(text)
        _refuse_detector(self.spec, text)
        self.path = _stored_weights(text)
        self._threads = threads
        self._graph = ClassificationGraph(fuse_batch_norm(network), self.spec.mean, self.spec.std).to(place).eval()

    def predict(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return probabilities (N, num_classes); see the protocol."""
        from rtmdet_geo.backends.pytorch import cpu_threads

        _check_batch(images, self.spec)
        with cpu_threads(self._threads):
            scores = self._graph.predict(images)
        return _checked(scores, len(images), self.spec, self.path)


def _stored_weights(text: str) -> Path:
    """Return the file that holds weights which were loaded by name or path."""
    if text not in CHECKPOINTS:
        return Path(text)
    checkpoint = CHECKPOINTS[text]
    return checkpoint.converted_path if checkpoint.converted_path.is_file() else checkpoint.path


def _refuse_detector(spec: ModelSpec, path: str | os.PathLike[str]) -> None:
    if spec.kind != "classification":
        raise ModelFileError(
            f"{os.fspath(path)!r} is a detector (kind {spec.kind!r}), it does not classify whole images; "
            "use it with `rtmdet-geo detect`"
        )


def _check_sizes(session: Any, spec: ModelSpec, path: Path) -> None:
    """Compare the sizes of the file's input and output with its own spec; ``open_model_file`` has checked the rest.

    Raises:
        ModelFileError: they contradict each other, or the number of images is fixed.
    """
    wanted = {"images": (len(spec.bands), spec.tile_size, spec.tile_size), "scores": (len(spec.classes),)}
    for item in (*session.get_inputs(), *(item for item in session.get_outputs() if item.name == "scores")):
        number, *sizes = item.shape  # sizes that are open have a name, or none
        is_same = all(
            not isinstance(size, int) or size == one for size, one in zip(sizes, wanted[item.name], strict=True)
        )
        if isinstance(number, int) or not is_same:
            raise ModelFileError(
                f"{str(path)!r} contradicts itself: {item.name!r} has the shape {item.shape}, its model_spec wants "
                f"(N, {', '.join(map(str, wanted[item.name]))}) with any N; export it again"
            )


def _check_batch(images: NDArray[np.uint8], spec: ModelSpec) -> None:
    shape = (len(spec.bands), spec.tile_size, spec.tile_size)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != shape or not len(images):
        raise ConfigError(
            f"a batch must be uint8 (N, {', '.join(map(str, shape))}), not {images.dtype} {images.shape}; "
            "preprocess.crop_centre makes an image fit"
        )


def _checked(scores: NDArray[np.float32], number: int, spec: ModelSpec, path: Path) -> NDArray[np.float32]:
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
