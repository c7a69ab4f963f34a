"""CUDA devices, memory, streams, events and graphs through cuda-python, every status checked. No torch.

cuda-python is NVIDIA's own binding; its functions return a status and the results. The module is
``cuda.bindings.runtime``, before cuda-python 12.6.1 ``cuda.cudart``, with the same functions.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import logging
import re
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.backends import require_package
from rtmdet_geo.errors import ConfigError, DeviceMemoryError, EngineError, MissingDependencyError

logger = logging.getLogger(__name__)

#: Names of devices: all of one machine's GPUs, or one of them.
_DEVICE = re.compile(r"cuda(?::(\d+))?")
#: What helps where the CUDA driver does not answer.
_DRIVER_HINT = (
    "install or update the NVIDIA driver (`nvidia-smi` shows it, and the newest CUDA that it supports; cuda-python may "
    "be of no newer one), or choose the backend onnxruntime"
)


@dataclass(frozen=True, slots=True)
class Device:
    """One CUDA device.

    Attributes:
        index: of CUDA.
        label: what its maker calls it, such as "NVIDIA H100 80GB HBM3".
        compute_capability: major, minor.
        num_multiprocessors: SMs that this process may use.
        memory_bytes: in all.
        l2_bytes: size of its L2 cache.
    """

    index: int
    label: str
    compute_capability: tuple[int, int]
    num_multiprocessors: int
    memory_bytes: int
    l2_bytes: int

    @property
    def name(self) -> str:
        """What ``--device`` calls it."""
        return f"cuda:{self.index}"


@dataclass(frozen=True, slots=True)
class DeviceReport:
    """What :func:`describe_devices` found.

    Attributes:
        devices: none where the driver does not answer.
        driver: newest CUDA that the driver supports, such as "12.4"; None: unknown.
        runtime: CUDA that cuda-python was made for; None: unknown.
        problem: why there is no device, with the remedy; None: there is one.
    """

    devices: tuple[Device, ...]
    driver: str | None
    runtime: str | None
    problem: str | None


@functools.cache
def runtime() -> Any:
    """Return cuda-python's module of the CUDA runtime.

    Raises:
        MissingDependencyError: cuda-python is not installed.
    """
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        logger.debug("no cuda.bindings: %s", error)
    return require_package("cuda.cudart", extra="tensorrt")


def call(name: str, *arguments: Any) -> Any:
    """Call a function of the CUDA runtime and return its result, None where it has none.

    Raises:
        DeviceMemoryError: there is not enough memory, on the device or pinned.
        EngineError: it fails in another way.
        MissingDependencyError: cuda-python is not installed.
    """
    module = runtime()
    try:
        status, *results = getattr(module, name)(*arguments)
    except RuntimeError as error:  # how older versions say that there is no driver library
        raise EngineError(f"{name} of CUDA fails ({error}); {_DRIVER_HINT}") from error
    codes = module.cudaError_t
    if status == codes.cudaSuccess:
        return results[0] if results else None
    reason = f"{_text('cudaGetErrorName', status)}: {_text('cudaGetErrorString', status)}"
    if status == codes.cudaErrorMemoryAllocation:
        raise DeviceMemoryError(f"{name} of CUDA finds too little memory ({reason}); lower the batch size")
    if status in (codes.cudaErrorInsufficientDriver, codes.cudaErrorNoDevice):
        raise EngineError(f"no CUDA device answers ({reason}); {_driver_hint(module)}")
    raise EngineError(f"{name} of CUDA fails ({reason}); run again, and report it if it stays")


def _driver_hint(module: Any) -> str:
    """Return what helps where the driver does not answer: another cuda-python, if that is of a newer CUDA."""
    driver, own = module.cudaDriverGetVersion()[1], module.cudaRuntimeGetVersion()[1]
    if not driver or not own or own // 1000 <= driver // 1000:
        return _DRIVER_HINT
    return (
        f"the driver is of CUDA {_as_text(driver)}, cuda-python of {_as_text(own)}: run: pip install "
        f"'cuda-python<{driver // 1000 + 1}', or update the driver"
    )


def _text(name: str, status: Any) -> str:
    """Return what CUDA calls a status."""
    return str(getattr(runtime(), name)(status)[1].decode())


def list_devices() -> tuple[Device, ...]:
    """Return the CUDA devices of this machine, one at least.

    Raises:
        EngineError: there is no driver, or none of its devices answers.
        MissingDependencyError: cuda-python is not installed.
    """
    number = call("cudaGetDeviceCount")
    if not number:
        raise EngineError(f"the CUDA driver has no device; {_DRIVER_HINT}")
    return tuple(map(_describe, range(number)))


def _describe(index: int) -> Device:
    facts = call("cudaGetDeviceProperties", index)
    label = facts.name.decode(errors="replace") if isinstance(facts.name, bytes) else str(facts.name)
    return Device(
        index,
        label.rstrip("\0"),
        (facts.major, facts.minor),
        facts.multiProcessorCount,
        facts.totalGlobalMem,
        facts.l2CacheSize,
    )


def find_device(name: str) -> Device:
    """Return a CUDA device by its name.

    Args:
        name: "auto" or "cuda" (the first), or "cuda:N".

    Raises:
        ConfigError: that is no CUDA device, or none of this machine's.
        EngineError: there is no driver or no device.
        MissingDependencyError: cuda-python is not installed.
    """
    parts = _DEVICE.fullmatch("cuda" if name == "auto" else name)
    if parts is None:
        raise ConfigError(f"TensorRT runs on CUDA devices, not on {name!r}; choose auto, cuda or cuda:N")
    devices = list_devices()
    index = int(parts[1] or 0)
    if index >= len(devices):
        known = ", ".join(device.name for device in devices)
        raise ConfigError(f"device {name!r} is not here; choose one of auto, {known}")
    return devices[index]


def describe_devices() -> DeviceReport:
    """Return the CUDA devices and versions of this machine, or why there is none; raises nothing."""
    problem: str | None = None
    devices: tuple[Device, ...] = ()
    try:
        devices = list_devices()
    except (EngineError, MissingDependencyError) as error:
        problem = str(error)
    return DeviceReport(devices, _version("cudaDriverGetVersion"), _version("cudaRuntimeGetVersion"), problem)


def _version(name: str) -> str | None:
    """Return a version of CUDA as text; None: nobody answers, or 0, which is no driver."""
    try:
        number = call(name)
    except (EngineError, MissingDependencyError):
        return None
    return _as_text(number) if number else None


def _as_text(version: int) -> str:
    """Return a version of CUDA, 1000 major + 10 minor, as text."""
    return f"{version // 1000}.{version % 1000 // 10}"


def use(device: Device) -> None:
    """Make a device the calling thread's own."""
    call("cudaSetDevice", device.index)


class Holdings:
    """Memory, streams and events on one device, freed together: after their work has ended, last made first.

    They are freed by :meth:`close`, or when the object is collected or the program ends.

    Args:
        device: made the calling thread's own.
    """

    def __init__(self, device: Device) -> None:
        """Hold nothing."""
        use(device)
        self._streams: list[Any] = []
        self._stack = ExitStack()
        self._finalizer = weakref.finalize(self, _free_all, runtime(), self._stack, self._streams)

    def memory(self, num_bytes: int) -> int:
        """Return the address of new memory on the device.

        Raises:
            DeviceMemoryError: there is too little.
        """
        return int(self._keep(call("cudaMalloc", num_bytes), "cudaFree"))

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """Return an array in memory that the device copies from and to by itself; not to be used once it is freed.

        Raises:
            DeviceMemoryError: there is too little.
        """
        num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        address = int(self._keep(call("cudaMallocHost", num_bytes), "cudaFreeHost"))
        raw = (ctypes.c_uint8 * num_bytes).from_address(address)
        return np.frombuffer(raw, dtype).reshape(shape)

    def stream(self) -> Any:
        """Return a new stream that waits for no other."""
        stream = self._keep(call("cudaStreamCreateWithFlags", runtime().cudaStreamNonBlocking), "cudaStreamDestroy")
        self._streams.append(stream)
        return stream

    def event(self) -> Any:
        """Return a new event; who waits for it sleeps."""
        flags = runtime().cudaEventDisableTiming | runtime().cudaEventBlockingSync
        return self._keep(call("cudaEventCreateWithFlags", flags), "cudaEventDestroy")

    def wait(self) -> None:
        """Wait until the streams have no work left."""
        for stream in self._streams:
            call("cudaStreamSynchronize", stream)

    def close(self) -> None:
        """Free all; a second call does nothing."""
        self._finalizer()

    def _keep(self, item: Any, free: str) -> Any:
        self._stack.callback(_quietly, runtime(), free, item)
        return item


def _free_all(module: Any, stack: ExitStack, streams: list[Any]) -> None:
    for stream in streams:
        _quietly(module, "cudaStreamSynchronize", stream)
    stack.close()


def _quietly(module: Any, name: str, item: Any) -> None:
    """Free something; that a driver is gone already at the end of the program harms nobody."""
    status = getattr(module, name)(item)[0]
    if status != module.cudaError_t.cudaSuccess:
        logger.debug("%s of CUDA fails: %r", name, status)


def copy_in(target: int, source: NDArray[Any], stream: Any) -> None:
    """Copy a contiguous pinned array to the device, in the stream's order."""
    kind = runtime().cudaMemcpyKind.cudaMemcpyHostToDevice
    call("cudaMemcpyAsync", target, source.ctypes.data, source.nbytes, kind, stream)


def copy_out(target: NDArray[Any], source: int, stream: Any) -> None:
    """Copy from the device to a contiguous pinned array, in the stream's order; read it after an event."""
    kind = runtime().cudaMemcpyKind.cudaMemcpyDeviceToHost
    call("cudaMemcpyAsync", target.ctypes.data, source, target.nbytes, kind, stream)


def record(event: Any, stream: Any) -> None:
    """Let the event happen when the stream has come so far."""
    call("cudaEventRecord", event, stream)


def let_wait(stream: Any, event: Any) -> None:
    """Let what is given to the stream from now on wait for the event."""
    call("cudaStreamWaitEvent", stream, event, 0)


def wait_for(event: Any) -> None:
    """Wait until the event has happened.

    Raises:
        EngineError: work before it failed.
    """
    call("cudaEventSynchronize", event)


class Graph:
    """Work that was recorded once and is launched as one; see :func:`capture`."""

    def __init__(self, executable: Any) -> None:
        """Own an executable graph."""
        self._executable = executable
        self._finalizer = weakref.finalize(self, _quietly, runtime(), "cudaGraphExecDestroy", executable)

    def launch(self, stream: Any) -> None:
        """Give the work to the stream."""
        call("cudaGraphLaunch", self._executable, stream)

    def close(self) -> None:
        """Free it; CUDA lets launched work end first."""
        self._finalizer()


def capture(stream: Any, work: Callable[[], None]) -> Graph:
    """Record what ``work`` gives to the stream, without running it.

    Raises:
        EngineError, DeviceMemoryError: the work cannot be recorded; the stream is as before.
    """
    mode = runtime().cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    call("cudaStreamBeginCapture", stream, mode)
    try:
        work()
    except BaseException:
        _quietly(runtime(), "cudaStreamEndCapture", stream)
        raise
    graph = call("cudaStreamEndCapture", stream)
    try:
        return Graph(call("cudaGraphInstantiate", graph, 0))
    finally:
        _quietly(runtime(), "cudaGraphDestroy", graph)
