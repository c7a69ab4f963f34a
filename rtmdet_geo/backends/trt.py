"""TensorRT on CUDA devices: runs model files through engines built for the GPU at hand, in fp16 unless asked otherwise.

From a model file the engine comes out of the user's cache, or is built now (:mod:`rtmdet_geo.backends.trt_build`); an
``.engine`` file is one that the user built. Copies in, runs and copies out of successive batches overlap
(:mod:`rtmdet_geo.backends.trt_run`). One process uses one GPU; several threads of it may share an engine.
"""

from __future__ import annotations

import logging
import os
import threading
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.backends import cuda, trt_cache
from rtmdet_geo.backends.contract import GPU_BATCH_SIZE, RowsBackend
from rtmdet_geo.backends.trt_build import check_precision, engine_from_cache, make_order
from rtmdet_geo.backends.trt_cache import Description, Order
from rtmdet_geo.backends.trt_load import Engine, load_tensorrt, open_engine
from rtmdet_geo.backends.trt_run import NUM_SLOTS, Lane, Ticket
from rtmdet_geo.backends.trt_watch import Progress
from rtmdet_geo.catalog import ENGINE_SUFFIX
from rtmdet_geo.errors import BatchHalvedWarning, ConfigError, DeviceMemoryError, EngineError, ModelFileError

logger = logging.getLogger(__name__)

_Outputs = tuple[NDArray[Any], ...]


class TensorRtBackend(RowsBackend):
    """A detector in TensorRT, for images of one size. See :class:`rtmdet_geo.backends.Backend` for the contract.

    Args:
        path: ``.onnx`` file that follows the model-file contract, or ``.engine`` file with its ``.engine.json``.
        device: "auto", "cuda" (both the first) or "cuda:N".
        precision: "fp16", "fp32", or "auto" (fp16; of an engine its own).
        max_batch: most images at once; larger batches are run in parts. None: 8, or an engine's own.
        tile_size: side of the images in px that an engine is built for; None is the model file's.
        image_size: height and width instead, of images that are no squares.
        progress: called while an engine is built, see :func:`rtmdet_geo.backends.trt_build.build_engine`.

    Raises:
        MissingDependencyError: TensorRT, cuda-python or onnx is not installed, or of a version that is not supported.
        ConfigError: no such device or precision, or the model file has another precision.
        ModelFileError: missing, corrupt or foreign file, or a classifier.
        EngineError: there is no driver or device, the engine cannot be built, or was built for another machine; or the
            model file is int8.
        DeviceMemoryError: the device's memory is too small.
    """

    name = "tensorrt"

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        device: str = "auto",
        precision: str = "auto",
        max_batch: int | None = None,
        tile_size: int | None = None,
        image_size: tuple[int, int] | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Open the engine, which is built before if it has to be."""
        file = Path(path)
        if not file.is_file():
            raise ModelFileError(f"model file {str(file)!r} is not there")
        if max_batch is not None and max_batch < 1:
            raise ConfigError(f"max_batch must be at least 1, not {max_batch}")
        self._trt = load_tensorrt()
        self._device = cuda.find_device(device)  # before TensorRT is asked for anything: without a driver it crashes
        self._progress = progress
        self._lock = threading.RLock()
        self._free: list[Lane] = []  # a lane serves one caller at a time
        self._order: Order | None = None
        if file.suffix == ENGINE_SUFFIX:
            opened = self._open_named(file, precision)
        else:
            self._order = make_order(
                file,
                self._device,
                precision=precision,
                max_batch=max_batch or GPU_BATCH_SIZE,
                tile_size=tile_size,
                image_size=image_size,
            )
            opened = self._open_cached(self._order)
        self._engine: Engine | None = opened[0]
        description = opened[1]
        self.max_batch = min(max_batch or opened[0].max_batch, opened[0].max_batch)
        self.image_size = opened[0].image_shape[1:]
        is_square = self.image_size[0] == self.image_size[1]
        super().__init__(file, description.spec, fixed_tile_size=self.image_size[0] if is_square else None)
        self.takes_any_size = self._order is not None and self._order.takes_any_size
        self.precision = description.spec.precision
        self.device_name = self._device.name
        self.best_batch_size = self.max_batch

    def stream(
        self, batches: Iterable[NDArray[np.uint8]], *, multi_label: bool = True
    ) -> Iterator[tuple[tuple[int, ...], _Outputs]]:
        """Yield for each batch, in order, its shape and what :meth:`raw` gives; up to three are under way at once."""
        lane: Lane | None = None
        waiting: deque[tuple[tuple[int, ...], list[Ticket]]] = deque()
        try:
            for images in batches:
                self.check_batch(images)
                try:
                    lane = lane or self._take_lane(self._part_size(images))
                    waiting.append((images.shape, self._submit(lane, images)))
                except DeviceMemoryError:
                    yield from _drain(waiting, 0)
                    if lane is not None:
                        self._give_back(lane)
                        lane = None
                    yield images.shape, self.raw(images, multi_label=multi_label)  # halves the batch and says so
                yield from _drain(waiting, NUM_SLOTS - 1)
            yield from _drain(waiting, 0)
        finally:
            if lane is not None:
                self._give_back(lane)

    def close(self) -> None:
        """Free the device's memory, what is still under way when it is done; the backend cannot be used any more."""
        with self._lock:
            self._engine = None
            while self._free:
                self._free.pop().close()

    def _forward(self, images: NDArray[np.uint8], multi_label: bool) -> _Outputs:
        """Run the engine; rows are (prior, class) pairs whatever ``multi_label`` is."""
        lane = self._take_lane(self._part_size(images))
        try:
            return _join(self._submit(lane, images))
        finally:
            self._give_back(lane)

    def _part_size(self, images: NDArray[np.uint8]) -> int:
        """Return how many of a batch's images go at once."""
        return min(self.max_batch, self._most_images or self.max_batch, len(images))

    def _submit(self, lane: Lane, images: NDArray[np.uint8]) -> list[Ticket]:
        """Start a batch, in parts where it is larger than the lane takes."""
        size = min(self._part_size(images), lane.capacity)
        return [lane.submit(images[start : start + size]) for start in range(0, len(images), size)]

    def _take_lane(self, size: int) -> Lane:
        """Return a way through the engine that nobody else uses, for batches of that size at least.

        Raises:
            DeviceMemoryError: the memory is too small, also for an engine built for so few images.
            EngineError: the engine was closed, or cannot be built for so few images.
        """
        with self._lock:
            while self._free:
                lane = self._free.pop()
                if lane.capacity >= size:
                    return lane
                lane.close()
            return self._make_lane(size)

    def _give_back(self, lane: Lane) -> None:
        """Keep a lane for whoever comes next, unless the engine is another by now."""
        with self._lock:
            if lane.engine is self._engine:
                self._free.append(lane)
            else:
                lane.close()

    def _make_lane(self, size: int) -> Lane:
        """Return a lane for batches of the largest size, or of that size at least, whichever the memory allows."""
        if self._engine is None:
            raise EngineError("the engine was closed; open the model again")
        for capacity in sorted({self.max_batch, max(size, self._engine.min_batch)}, reverse=True):
            try:
                return Lane(self._engine, self._device, capacity)
            except DeviceMemoryError as error:
                logger.info("%s", error)
                failure = error
        if self._order is None or not self._engine.min_batch <= size < self._engine.max_batch:
            raise failure
        logger.warning("too little memory for an engine of %d tiles; one of %d is used", self._engine.max_batch, size)
        order = replace(self._order, batches=(self._order.batches[0], size))
        self._engine, _ = engine_from_cache(self._trt, order, self._progress)
        self._order, self.max_batch = order, size
        return Lane(self._engine, self._device, size)

    def _open_named(self, file: Path, precision: str) -> tuple[Engine, Description]:
        """Open an engine that the user named."""
        plan, description = trt_cache.read_engine(file, self._device, self._trt.__version__)
        has = description.spec.precision
        check_precision(precision)
        if precision not in ("auto", has):
            raise EngineError(
                f"{str(file)!r} was built in {has}, not in {precision}; build another: rtmdet-geo export MODEL -o "
                f"{file.name} --precision {precision}, or leave the precision out"
            )
        cuda.use(self._device)
        try:
            return open_engine(self._trt, plan, description.spec), description
        except EngineError as error:
            raise EngineError(f"{str(file)!r}: {error}; build it again here: rtmdet-geo export") from error

    def _open_cached(self, order: Order) -> tuple[Engine, Description]:
        """Open the model file's engine; of half the batch size, said once, where memory is too small to build it."""
        try:
            return engine_from_cache(self._trt, order, self._progress)
        except DeviceMemoryError as error:
            least, most = order.batches
            if most // 2 < least:
                raise
            logger.info("%s", error)
        warnings.warn(
            f"the memory of {order.device.name} is too small to build an engine for {most} tiles at once; going on "
            "with smaller batches (a lower max_batch saves the try)",
            BatchHalvedWarning,
            stacklevel=3,
        )
        while True:
            most //= 2
            try:
                return engine_from_cache(self._trt, replace(order, batches=(least, most)), self._progress)
            except DeviceMemoryError:
                if most // 2 < least:
                    raise


def _join(tickets: list[Ticket]) -> _Outputs:
    """Return the outputs of a batch's parts as one."""
    parts = [ticket.results() for ticket in tickets]
    return parts[0] if len(parts) == 1 else tuple(np.concatenate(values) for values in zip(*parts, strict=True))


def _drain(
    waiting: deque[tuple[tuple[int, ...], list[Ticket]]], number: int
) -> Iterator[tuple[tuple[int, ...], _Outputs]]:
    """Yield the oldest batches until only so many are under way."""
    while len(waiting) > number:
        shape, tickets = waiting.popleft()
        yield shape, _join(tickets)
