"""Networks on a CUDA device without the cost of launching each kernel: captured once, replayed as a whole.

A network of this size is some hundreds of short kernels, which Python takes longer to launch than a GPU to run. A CUDA
graph holds them with the addresses of their buffers, so each shape of batch has one graph with its own input and
outputs. Everything goes through one stream, in order: copy into the graph's input, replay, copies of its outputs into
pinned memory. Pixels reach the device on a second stream, meanwhile.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rtmdet_geo.errors import first_line
from rtmdet_geo.models.devices import exact_convolutions, is_out_of_memory

logger = logging.getLogger(__name__)

#: Graphs kept per runner, the last used ones: a scene needs two, for full batches and the last one.
MOST_GRAPHS = 8
#: Runs before a capture, in which cuDNN tries its algorithms and libraries allocate what they keep.
WARM_UP_RUNS = 3


class _Captured(NamedTuple):
    """A graph and the tensors that it reads and writes."""

    graph: Any
    images: Tensor
    outputs: tuple[Tensor, ...]


class Pending:
    """A batch on its way.

    Args:
        outputs: in pinned memory, being written.
        done: recorded after the last of them.
    """

    def __init__(self, outputs: tuple[Tensor, ...], done: Any) -> None:
        self._outputs = outputs
        self._done = done

    def wait(self) -> tuple[NDArray[Any], ...]:
        """Return the outputs once they are there."""
        self._done.synchronize()
        return tuple(output.numpy() for output in self._outputs)


class CudaRunner:
    """Runs graphs on batches of pixels; any number of threads may call it.

    Args:
        functions: name -> what maps uint8 images (N, C, H, W) on the device to tensors, without looking at their values
            on the host.
        device: a CUDA device.
        with_graphs: False launches every kernel from Python.
    """

    def __init__(
        self,
        functions: Mapping[Any, Callable[[Tensor], tuple[Tensor, ...]]],
        device: torch.device,
        *,
        with_graphs: bool,
    ) -> None:
        self.device = device
        self.with_graphs = with_graphs
        self._functions = functions
        self._lock = threading.Lock()  # the order of what is launched, and one capture at a time
        self._captured: OrderedDict[tuple[Any, tuple[int, ...]], _Captured | None] = OrderedDict()
        self._copies, self._runs = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()  # graphs run one after the other, so they share their buffers

    def submit(self, images: NDArray[np.uint8], name: Any) -> Pending:
        """Start a batch and return at once; batches are run in the order of the calls.

        Args:
            images: uint8 (N, C, H, W).
            name: of the function.
        """
        with self._lock, torch.cuda.device(self.device), torch.inference_mode(), exact_convolutions():
            captured = self._find(name, images.shape)
            pinned = torch.from_numpy(np.ascontiguousarray(images)).pin_memory()
            with torch.cuda.stream(self._copies):
                arriving = pinned.to(self.device, non_blocking=True)
                arrived = self._copies.record_event()
            with torch.cuda.stream(self._runs):
                self._runs.wait_event(arrived)
                arriving.record_stream(self._runs)
                outputs = self._launch(captured, name, arriving)
                there = tuple(_pinned_like(output).copy_(output, non_blocking=True) for output in outputs)
                return Pending(there, self._runs.record_event())

    def run_there(self, images: Tensor, name: Any) -> tuple[Tensor, ...]:
        """Run pixels that are on the device already and leave the outputs there, in the order of the caller's stream.

        Args:
            images: uint8 (N, C, H, W) on the device.
            name: of the function.
        """
        with self._lock, torch.cuda.device(self.device), torch.inference_mode(), exact_convolutions():
            captured = self._find(name, tuple(images.shape))
            callers = torch.cuda.current_stream()
            self._runs.wait_event(callers.record_event())
            with torch.cuda.stream(self._runs):
                images.record_stream(self._runs)
                outputs = tuple(output.clone() for output in self._launch(captured, name, images))
                callers.wait_event(self._runs.record_event())
            for output in outputs:
                output.record_stream(callers)
            return outputs

    def release(self) -> None:
        """Drop all graphs and give unused memory back to the device."""
        with self._lock:
            self._runs.synchronize()
            self._captured.clear()
            self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.empty_cache()

    @property
    def num_graphs(self) -> int:
        """Number of graphs that are held."""
        return sum(captured is not None for captured in self._captured.values())

    def _launch(self, captured: _Captured | None, name: Any, images: Tensor) -> tuple[Tensor, ...]:
        """Run images on the current stream; what a graph returns is its own and lasts until its next run."""
        if captured is None:
            return tuple(self._functions[name](images))
        captured.images.copy_(images)
        captured.graph.replay()
        return captured.outputs

    def _find(self, name: Any, shape: tuple[int, ...]) -> _Captured | None:
        """Return the graph of a shape, captured now if need be; None: it cannot be captured, or is not to be."""
        if not self.with_graphs:
            return None
        key = (name, shape)
        if key not in self._captured:
            if len(self._captured) >= MOST_GRAPHS:
                self._runs.synchronize()  # the oldest may still run
                self._captured.popitem(last=False)
            self._captured[key] = self._capture(self._functions[name], shape)
        self._captured.move_to_end(key)
        return self._captured[key]

    def _capture(self, function: Callable[[Tensor], tuple[Tensor, ...]], shape: tuple[int, ...]) -> _Captured | None:
        """Return a new graph; None, with one line in the log, if the device or the driver cannot."""
        with torch.cuda.stream(self._runs):
            images = torch.zeros(shape, dtype=torch.uint8, device=self.device)
            for _ in range(WARM_UP_RUNS):
                function(images)
            self._runs.synchronize()
            graph = torch.cuda.CUDAGraph()
            try:
                # Other threads may use the device meanwhile: only this one's calls belong to the graph.
                with torch.cuda.graph(graph, pool=self._pool, stream=self._runs, capture_error_mode="thread_local"):
                    outputs = tuple(function(images))
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                logger.warning(
                    "no CUDA graph of batches %s on %s (%s); they run without, slower",
                    shape,
                    self.device,
                    first_line(error),
                )
                self._pool = torch.cuda.graph_pool_handle()
                return None
        return _Captured(graph, images, outputs)


def _pinned_like(tensor: Tensor) -> Tensor:
    """Return memory of the host that a device copies into on its own."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
