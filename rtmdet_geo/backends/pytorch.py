"""torch on a CPU or a CUDA device: runs weights as they are, without export, and keeps more candidates if asked."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rtmdet_geo.backends.contract import RowsBackend, refuse_classifier, rows_per_level
from rtmdet_geo.errors import ConfigError, DeviceMemoryError
from rtmdet_geo.models.decode import DetectionGraph
from rtmdet_geo.models.devices import find_device
from rtmdet_geo.models.identify import load_network
from rtmdet_geo.models.weights import fuse_batch_norm


class TorchBackend(RowsBackend):
    """A detector's weights in torch, in fp32. See :class:`rtmdet_geo.backends.Backend` for the contract.

    It runs what a model file holds (:class:`rtmdet_geo.models.decode.DetectionGraph`), batch norms folded, and gives
    what the model file gives. With one label a prior it ranks priors instead of (prior, class) pairs, so that fewer
    tiles are saturated. On CUDA, convolutions follow ``torch.backends.cudnn.allow_tf32``.

    Args:
        weights: see :func:`rtmdet_geo.models.identify.load_network`.
        threads: CPU threads while it runs; None leaves torch's number.
        device: "cpu", "cuda", "cuda:1", or "auto" (cuda when there is one).
        candidates: rows kept per level; None is a model file's number, COCO's protocol wants 30,000.

    Raises:
        ConfigError: no such device, or fewer threads or candidates than one.
        ModelFileError: the weights are a classifier's.
        See :func:`rtmdet_geo.models.identify.load_network` for the others.
    """

    name = "torch"

    def __init__(
        self,
        weights: str | os.PathLike[str],
        *,
        threads: int | None = None,
        device: str = "auto",
        candidates: int | None = None,
    ) -> None:
        """Build the network and load the weights."""
        for what, value in (("threads", threads), ("candidates", candidates)):
            if value is not None and value < 1:
                raise ConfigError(f"{what} must be at least 1, not {value}")
        self.device = find_device(device)
        network, spec = load_network(weights)
        refuse_classifier(spec, weights)
        super().__init__(Path(weights), spec)
        self.device_name = str(self.device)
        self._threads = threads
        fused = fuse_batch_norm(network).to(self.device)
        self._graphs = {
            multi_label: DetectionGraph(fused, spec.mean, spec.std, limit=candidates, multi_label=multi_label)
            .to(self.device)
            .eval()
            for multi_label in (False, True)
        }

    def rows_per_level(self, height: int, width: int, *, multi_label: bool) -> list[tuple[int, bool]]:
        """Return the rows of each level; those of one label a prior are counted as if there were one class."""
        num_classes = len(self.spec.classes) if multi_label else 1
        return rows_per_level(self.spec.object_kind, num_classes, height, width, limit=self._graphs[multi_label].limit)

    def _forward(self, images: NDArray[np.uint8], multi_label: bool) -> tuple[NDArray[Any], ...]:
        graph = self._graphs[multi_label]
        try:
            with torch.inference_mode(), cpu_threads(self._threads):
                outputs = graph(torch.from_numpy(np.ascontiguousarray(images)).to(self.device))
                return tuple(output.cpu().numpy() for output in outputs)
        except torch.cuda.OutOfMemoryError as error:
            number, _, height, width = images.shape
            raise DeviceMemoryError(
                f"the memory of {self.device} is too small for {number} tiles of {height} x {width} px at once; lower "
                "batch_size or tile_size, or choose device 'cpu'"
            ) from error


def list_devices() -> tuple[str, ...]:
    """Return the names of the devices that torch has here, the CPU first."""
    number = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return ("cpu", *(f"cuda:{index}" for index in range(number)))


@contextmanager
def cpu_threads(number: int | None) -> Iterator[None]:
    """Give torch so many CPU threads meanwhile; the number is the whole process's."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
