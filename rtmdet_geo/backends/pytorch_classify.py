"""Classifiers' weights in torch: run as they are, without export."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.backends.classify import check_batch, check_scores, refuse_detector
from rtmdet_geo.backends.pytorch import cpu_threads
from rtmdet_geo.checkpoints import CHECKPOINTS
from rtmdet_geo.models.classifier import ClassificationGraph
from rtmdet_geo.models.devices import exact_convolutions, find_device
from rtmdet_geo.models.identify import load_network
from rtmdet_geo.models.weights import fuse_batch_norm


class TorchClassifier:
    """Weights in torch, in fp32 (never TF32), batch norms folded into their convolutions.

    See :class:`rtmdet_geo.backends.classify.Classifier` for the contract.

    Args:
        weights: see :func:`rtmdet_geo.models.identify.load_network`.
        threads: CPU threads while it runs; None leaves torch's number.
        device: see :func:`rtmdet_geo.backends.classify.open_classifier`.

    Raises:
        See :func:`rtmdet_geo.backends.classify.open_classifier`.
    """

    name = "torch"

    def __init__(self, weights: str | os.PathLike[str], *, threads: int | None = None, device: str = "auto") -> None:
        """Build the network and load the weights."""
        text = os.fspath(weights)
        place = find_device(device)
        network, self.spec = load_network(text)
        refuse_detector(self.spec, text)
        self.path = _stored_weights(text)
        self._threads = threads
        self._graph = ClassificationGraph(fuse_batch_norm(network), self.spec.mean, self.spec.std).to(place).eval()

    def predict(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return probabilities (N, num_classes); see the protocol."""
        check_batch(images, self.spec)
        with cpu_threads(self._threads), exact_convolutions():
            scores = self._graph.predict(images)
        return check_scores(scores, len(images), self.spec, self.path)


def _stored_weights(text: str) -> Path:
    """Return the file that holds weights which were loaded by name or path."""
    if text not in CHECKPOINTS:
        return Path(text)
    checkpoint = CHECKPOINTS[text]
    return checkpoint.converted_path if checkpoint.converted_path.is_file() else checkpoint.path
