"""torch on a CPU or a CUDA device: runs weights as they are, without export, and keeps more candidates if asked."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from rtmdet_geo.backends.contract import GPU_BATCH_SIZE, RowsBackend, refuse_classifier, rows_per_level
from rtmdet_geo.errors import ConfigError, DeviceMemoryError, EngineError, first_line
from rtmdet_geo.models.cuda_graphs import CudaRunner, Pending
from rtmdet_geo.models.decode import DetectionGraph
from rtmdet_geo.models.devices import DTYPES, choose_precision, find_device, is_out_of_memory, with_number
from rtmdet_geo.models.identify import load_network
from rtmdet_geo.models.inference import InferenceNetwork, choose_layout

#: Where the errors of torch.compile come from; a kernel that it made fails with others.
_COMPILER_MODULES = ("torch._dynamo", "torch._inductor")

_Result = TypeVar("_Result")


class TorchBackend(RowsBackend):
    """A detector's weights in torch. See :class:`rtmdet_geo.backends.Backend` for the contract.

    It runs what a model file holds (:class:`rtmdet_geo.models.decode.DetectionGraph`), batch norms folded, and gives
    what the model file gives. With one label a prior it ranks priors instead of (prior, class) pairs, so that fewer
    tiles are saturated. In fp16 and bf16 the convolutions are in half, what comes after them is in fp32; fp32 is never
    TF32. On CUDA every shape of batch is captured as a CUDA graph when it first comes, and :meth:`stream` copies
    pixels of one batch while the batch before is run.

    Args:
        weights: see :func:`rtmdet_geo.models.identify.load_network`.
        threads: CPU threads while it runs; None leaves torch's number.
        device: "cpu", "cuda", "cuda:1", or "auto" (cuda when there is one).
        candidates: rows kept per level; None is a model file's number, COCO's protocol wants 30,000.
        precision: "fp32", "fp16" (CUDA), "bf16" (CUDA, and processors that have it), or "auto" (fp32).
        compiled: let torch.compile make kernels for each shape of batch: minutes at the first, quicker after.
        cuda_graphs: False launches every kernel from Python, for comparison.

    Raises:
        ConfigError: no such device, a precision that it does not have, or fewer threads or candidates than one.
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
        precision: str = "auto",
        compiled: bool = False,
        cuda_graphs: bool = True,
    ) -> None:
        """Build the network and load the weights."""
        for what, value in (("threads", threads), ("candidates", candidates)):
            if value is not None and value < 1:
                raise ConfigError(f"{what} must be at least 1, not {value}")
        self.device = with_number(find_device(device))
        chosen = choose_precision(precision, self.device)
        network, spec = load_network(weights)
        refuse_classifier(spec, weights)
        super().__init__(Path(weights), spec)
        self.device_name = str(self.device)
        self.precision = chosen
        self._threads = threads
        dtype = DTYPES[chosen]
        running = InferenceNetwork(network, dtype, choose_layout(self.device, dtype))
        self._limits: dict[bool, int] = {}
        self._graphs: dict[bool, Callable[[torch.Tensor], tuple[torch.Tensor, ...]]] = {}
        for multi_label in (False, True):
            graph = DetectionGraph(running, spec.mean, spec.std, limit=candidates, multi_label=multi_label)
            self._limits[multi_label] = graph.limit
            graph = graph.to(self.device).eval()
            self._graphs[multi_label] = torch.compile(graph, dynamic=False) if compiled else graph
        self._runner: CudaRunner | None = None
        if self.device.type == "cuda":
            self._runner = CudaRunner(self._graphs, self.device, with_graphs=cuda_graphs)
            self.best_batch_size = GPU_BATCH_SIZE

    def rows_per_level(self, height: int, width: int, *, multi_label: bool) -> list[tuple[int, bool]]:
        """Return the rows of each level; those of one label a prior are counted as if there were one class."""
        num_classes = len(self.spec.classes) if multi_label else 1
        return rows_per_level(self.spec.object_kind, num_classes, height, width, limit=self._limits[multi_label])

    def stream(
        self, batches: Iterable[NDArray[np.uint8]], *, multi_label: bool = True
    ) -> Iterator[tuple[tuple[int, ...], tuple[NDArray[Any], ...]]]:
        """Yield for each batch, in order, its shape and outputs; on CUDA the next batch is taken and started before."""
        if self._runner is None:
            yield from super().stream(batches, multi_label=multi_label)
            return
        before: tuple[NDArray[np.uint8], Pending | None] | None = None
        for images in batches:
            self.check_batch(images)
            started = images, self._start_if_room(images, multi_label)
            if before is not None:
                yield before[0].shape, self._finish(*before, multi_label)
            before = started
        if before is not None:
            yield before[0].shape, self._finish(*before, multi_label)

    def raw_on_device(self, images: torch.Tensor, *, multi_label: bool = True) -> tuple[torch.Tensor, ...]:
        """Return the outputs of :meth:`raw` as tensors on the device, for pixels that are there already.

        NMS of them is :func:`rtmdet_geo.models.nms_torch.nms_rotated_batch`.

        Args:
            images: uint8 (N, C, H, W) on the device.
            multi_label: see :meth:`raw`.

        Raises:
            DeviceMemoryError: the device's memory is too small for so many images.
        """
        runner = self._runner
        if runner is not None:
            return self._explained(images.shape, lambda: runner.run_there(images, multi_label))
        return self._explained(images.shape, lambda: self._run_on_cpu(images, multi_label))

    def _start_if_room(self, images: NDArray[np.uint8], multi_label: bool) -> Pending | None:
        """Start a batch; None where it is too large for the device, which :meth:`raw` then divides and reports."""
        if self._most_images is not None and len(images) > self._most_images:
            return None
        try:
            return self._start(images, multi_label)
        except DeviceMemoryError:
            return None

    def _finish(
        self, images: NDArray[np.uint8], pending: Pending | None, multi_label: bool
    ) -> tuple[NDArray[Any], ...]:
        return self.raw(images, multi_label=multi_label) if pending is None else pending.wait()

    def _forward(self, images: NDArray[np.uint8], multi_label: bool) -> tuple[NDArray[Any], ...]:
        if self._runner is not None:
            return self._start(images, multi_label).wait()
        pixels = torch.from_numpy(np.ascontiguousarray(images))
        outputs = self._explained(images.shape, lambda: self._run_on_cpu(pixels, multi_label))
        return tuple(output.numpy() for output in outputs)

    def _start(self, images: NDArray[np.uint8], multi_label: bool) -> Pending:
        """Start a batch on the CUDA device."""
        runner = self._runner
        if runner is None:
            raise RuntimeError("batches are started on CUDA devices alone")
        return self._explained(images.shape, lambda: runner.submit(images, multi_label))

    def _run_on_cpu(self, images: torch.Tensor, multi_label: bool) -> tuple[torch.Tensor, ...]:
        with torch.inference_mode(), cpu_threads(self._threads):
            return tuple(self._graphs[multi_label](images))

    def _explained(self, shape: tuple[int, ...], run: Callable[[], _Result]) -> _Result:
        """Return what ``run`` does; memory that was too small is given back before that is raised.

        Raises:
            DeviceMemoryError: the device's memory is too small for images of this shape.
            EngineError: torch.compile does not work here.
        """
        try:
            return run()
        except RuntimeError as error:
            failure: DeviceMemoryError | EngineError
            if is_out_of_memory(error):
                failure = self._too_large(shape)
            elif type(error).__module__.startswith(_COMPILER_MODULES):
                failure = EngineError(
                    f"torch.compile failed on {self.device} ({first_line(error)}); it needs "
                    f"{'triton' if self._runner is not None else 'a C++ compiler such as g++'}: install it, or leave "
                    "compiled out"
                )
            else:
                raise
            failure.__cause__ = error.with_traceback(None)  # its frames hold the tensors that were in the way
        if self._runner is not None:
            self._runner.release()
        raise failure


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
