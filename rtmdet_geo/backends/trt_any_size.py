"""TensorRT for images of any size, as other engines take them: an engine for each size that comes.

An engine is planned for one size of its images. The network's attention averages over the whole image, so a small scene
that is filled up to that size gives other numbers than in engines that take it as it is. Scenes larger than a tile have
one size of tiles; a smaller one costs a build, once.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.backends.contract import RowsBackend
from rtmdet_geo.backends.trt import TensorRtBackend

_Outputs = tuple[NDArray[Any], ...]


def open_tensorrt(path: str | os.PathLike[str], **settings: Any) -> RowsBackend:
    """Open a model file or an engine; see :class:`rtmdet_geo.backends.trt.TensorRtBackend` for arguments and errors.

    Returns:
        An engine for the one size that the file takes, or for any size, of which that for the tile size is ready.
    """
    first = TensorRtBackend(path, **settings)
    return AnySizeTensorRtBackend(first, settings) if first.takes_any_size else first


class AnySizeTensorRtBackend(RowsBackend):
    """Engines of one model file by the size of their images. See :class:`rtmdet_geo.backends.Backend`.

    Args:
        first: engine for one of the sizes.
        settings: that it was opened with; others are opened likewise.
    """

    name = "tensorrt"

    def __init__(self, first: TensorRtBackend, settings: dict[str, Any]) -> None:
        """Keep the first engine."""
        super().__init__(first.path, first.spec)
        self.precision, self.device_name = first.precision, first.device_name
        self.best_batch_size = first.best_batch_size
        self._settings = {name: value for name, value in settings.items() if name != "tile_size"}
        self._engines = {first.image_size: first}
        self._lock = threading.Lock()

    def raw(self, images: NDArray[np.uint8], *, multi_label: bool = True) -> _Outputs:
        """Return the graph's own outputs; see the contract."""
        return self._engine_for(self._checked_size(images)).raw(images, multi_label=multi_label)

    def stream(
        self, batches: Iterable[NDArray[np.uint8]], *, multi_label: bool = True
    ) -> Iterator[tuple[tuple[int, ...], _Outputs]]:
        """Yield for each batch, in order, its shape and what :meth:`raw` gives; see the contract."""
        for size, alike in groupby(batches, key=self._checked_size):
            yield from self._engine_for(size).stream(alike, multi_label=multi_label)

    def close(self) -> None:
        """Free the device's memory; the backend cannot be used any more."""
        with self._lock:
            for engine in self._engines.values():
                engine.close()

    def _forward(self, images: NDArray[np.uint8], multi_label: bool) -> _Outputs:
        return self.raw(images, multi_label=multi_label)

    def _checked_size(self, images: NDArray[np.uint8]) -> tuple[int, int]:
        self.check_batch(images)
        return images.shape[2], images.shape[3]

    def _engine_for(self, size: tuple[int, int]) -> TensorRtBackend:
        """Return the engine for images of that height and width, which is built if it is not there."""
        with self._lock:
            if size not in self._engines:
                self._engines[size] = TensorRtBackend(self.path, image_size=size, **self._settings)
            return self._engines[size]
