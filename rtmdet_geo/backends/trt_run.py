"""How one thread runs an engine: copy in, run and copy out overlap, and what repeats is launched as a CUDA graph."""

from __future__ import annotations

import itertools
import logging
import threading
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.backends import cuda
from rtmdet_geo.backends.trt_load import Engine, messages
from rtmdet_geo.errors import DeviceMemoryError, EngineError

logger = logging.getLogger(__name__)

#: Batches under way at once: one is copied in, one runs, one is copied out.
NUM_SLOTS = 3


@dataclass
class _Slot:
    """Buffers and events of one batch under way.

    Attributes:
        images: pinned, (capacity, C, H, W).
        outputs: pinned, by name, (capacity, ...).
        device_images: address on the device.
        device_outputs: addresses on the device, by name.
        copied_in, ran, copied_out: happen when the step is done.
        ticket: whose results are here; None, or gone: nobody wants them, and the next batch may follow in the streams.
        graph: the run at the context's present batch size.
    """

    images: NDArray[np.uint8]
    outputs: dict[str, NDArray[np.float32]]
    device_images: int
    device_outputs: dict[str, int]
    copied_in: Any
    ran: Any
    copied_out: Any
    ticket: weakref.ref[Ticket] | None = None
    graph: cuda.Graph | None = None


class Ticket:
    """A batch under way; see :meth:`Lane.submit`."""

    def __init__(self, lane: Lane, slot: _Slot, number: int) -> None:
        """Remember where the results will be."""
        self._lane = lane
        self._slot = slot
        self._number = number
        self._results: tuple[NDArray[np.float32], ...] | None = None

    def results(self) -> tuple[NDArray[np.float32], ...]:
        """Return the outputs in the contract's order, waiting for them; they are the caller's own.

        Raises:
            EngineError: the device failed, or the lane was closed.
        """
        with self._lane.lock:
            if self._results is None:
                if self._lane.is_closed:
                    raise EngineError("the engine was closed before its results were fetched")
                cuda.wait_for(self._slot.copied_out)
                self._results = tuple(values[: self._number].copy() for values in self._slot.outputs.values())
        return self._results


class Lane:
    """One thread's way through an engine: a context, three streams, and buffers for three batches.

    A context knows one batch size at a time. Its first run at a size is launched plainly, which also warms it up; later
    ones as a CUDA graph, one for each set of buffers. A change of size makes the graphs void.

    Args:
        engine: see :func:`rtmdet_geo.backends.trt_load.open_engine`.
        device: where it runs.
        capacity: most images of a batch.

    Raises:
        DeviceMemoryError: the device's memory is too small for the context, or for buffers of that capacity.
        EngineError: TensorRT refuses.
    """

    def __init__(self, engine: Engine, device: cuda.Device, capacity: int) -> None:
        """Make the context and the buffers."""
        self.engine = engine
        self.device = device
        self.capacity = capacity
        self.lock = threading.RLock()
        self.is_closed = False
        self._log = messages(engine.trt)
        self._holdings = cuda.Holdings(device)
        try:
            self._context = self._make_context()
            self._copy_in, self._run, self._copy_out = (self._holdings.stream() for _ in range(3))
            self._num_images = 0  # batch size that the context knows
            self._is_warm = False
            self._with_graphs = True
            self._set_shape(capacity)
            shapes = {name: tuple(map(int, self._context.get_tensor_shape(name))) for name in engine.outputs}
            self._slots = [self._make_slot(shapes) for _ in range(NUM_SLOTS)]
        except BaseException:
            self.close()
            raise
        self._next = itertools.cycle(self._slots)

    def submit(self, images: NDArray[np.uint8]) -> Ticket:
        """Start a batch and return at once; the oldest batch's results are fetched where its buffers are needed.

        Args:
            images: (N, C, H, W), N at most ``capacity``; copied.

        Raises:
            EngineError: TensorRT or CUDA refuses.
            DeviceMemoryError: a run needs more memory than there is.
        """
        with self.lock:
            cuda.use(self.device)
            slot = next(self._next)
            earlier = slot.ticket() if slot.ticket is not None else None
            if earlier is not None:
                earlier.results()
            number = len(images)
            slot.images[:number] = images
            slot.images[number : self.engine.min_batch] = 0
            try:
                self._start(slot, max(number, self.engine.min_batch))
            except BaseException:
                self._holdings.wait()  # what was given to the streams uses the slot's buffers
                raise
            ticket = Ticket(self, slot, number)
            slot.ticket = weakref.ref(ticket)
            return ticket

    def close(self) -> None:
        """Wait for what is under way and free all; results not yet fetched are lost."""
        with self.lock:
            for slot in getattr(self, "_slots", ()):
                slot.graph = None
            self._holdings.close()
            self._context = None
            self.is_closed = True

    def describe(self) -> str:
        """Return TensorRT's description of the engine as JSON, with the batch size that the context knows."""
        inspector = self.engine.native.create_engine_inspector()
        inspector.execution_context = self._context
        return str(inspector.get_engine_information(self.engine.trt.LayerInformationFormat.JSON))

    def _make_context(self) -> Any:
        self._log.take_errors()
        context = self.engine.native.create_execution_context()
        if context is None:
            reasons = self._log.take_errors() or "it gives no reason"
            raise DeviceMemoryError(
                f"TensorRT cannot make a context for {self.engine.max_batch} tiles on {self.device.name}, most likely "
                f"for want of memory: {reasons}"
            )
        return context

    def _make_slot(self, shapes: dict[str, tuple[int, ...]]) -> _Slot:
        held = self._holdings
        images = held.pinned((self.capacity, *self.engine.image_shape), np.uint8)
        outputs = {name: held.pinned(shape, np.float32) for name, shape in shapes.items()}
        device_outputs = {name: held.memory(values.nbytes) for name, values in outputs.items()}
        return _Slot(
            images, outputs, held.memory(images.nbytes), device_outputs, held.event(), held.event(), held.event()
        )

    def _start(self, slot: _Slot, number: int) -> None:
        """Give a batch's three steps to their streams."""
        cuda.copy_in(slot.device_images, slot.images[:number], self._copy_in)
        cuda.record(slot.copied_in, self._copy_in)
        cuda.let_wait(self._run, slot.copied_in)
        self._launch(slot, number)
        cuda.record(slot.ran, self._run)
        cuda.let_wait(self._copy_out, slot.ran)
        for name, values in slot.outputs.items():
            cuda.copy_out(values[:number], slot.device_outputs[name], self._copy_out)
        cuda.record(slot.copied_out, self._copy_out)

    def _launch(self, slot: _Slot, number: int) -> None:
        """Give the run to its stream, as a graph where there is one or can be one."""
        if number != self._num_images:
            self._set_shape(number)
        if slot.graph is None:
            self._bind(slot)
            if self._is_warm and self._with_graphs:
                slot.graph = self._capture()
        if slot.graph is not None:
            slot.graph.launch(self._run)
        else:
            self._enqueue()
        self._is_warm = True

    def _set_shape(self, number: int) -> None:
        """Tell the context the batch size, once no run at another one is under way: graphs read what it holds."""
        self._holdings.wait()
        for slot in getattr(self, "_slots", ()):
            slot.graph = None
        self._num_images, self._is_warm = 0, False
        self._check(self._context.set_input_shape("images", (number, *self.engine.image_shape)), "set_input_shape")
        unknown = self._context.infer_shapes()
        self._check(not unknown, f"infer_shapes ({', '.join(unknown)} unknown)")
        self._num_images = number

    def _bind(self, slot: _Slot) -> None:
        """Tell the context the buffers' addresses."""
        for name, address in {"images": slot.device_images, **slot.device_outputs}.items():
            self._check(self._context.set_tensor_address(name, address), f"set_tensor_address of {name!r}")

    def _enqueue(self) -> None:
        self._check(self._context.execute_async_v3(int(self._run)), "execute_async_v3")

    def _capture(self) -> cuda.Graph | None:
        """Return the run as a graph; None where it cannot be captured, from then on."""
        try:
            return cuda.capture(self._run, self._enqueue)
        except (EngineError, DeviceMemoryError) as error:
            logger.warning("runs without CUDA graphs, which costs some time per batch: %s", error)
            self._with_graphs = False
            return None

    def _check(self, is_done: bool, what: str) -> None:
        if not is_done:
            raise self._log.failure(f"TensorRT refuses {what} on {self.device.name}")
