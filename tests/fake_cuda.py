"""A stand-in for cuda-python's runtime module, with host memory behind device addresses.

It proves the calls, not the numbers of any GPU. It is as unkind as CUDA may be: nothing that was given to a stream is
done before somebody waits for it; then only what must come before is done. So a copy that does not wait for the run
before it reads rubbish, and so does who looks at a pinned buffer too early: memory is filled with NaNs when it is
allocated, and a target of a copy when the copy is given to its stream. Addresses used after they were freed, work on
another device than the calling thread's, waiting while a graph is captured, and arguments that the real functions do
not have (``golden/tensorrt_api.json``) raise AssertionError.
"""

from __future__ import annotations

import ctypes
import enum
import json
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

MANIFEST = json.loads((Path(__file__).parent / "golden" / "tensorrt_api.json").read_text())
#: Byte that all memory is made of before something is written: NaN as a float.
RUBBISH = 0xFF


@dataclass
class Gpu:
    """One device of the machine."""

    name: str = "NVIDIA Fake 4000"
    capability: tuple[int, int] = (8, 6)
    multiprocessors: int = 46
    memory: int = 8 << 30


@dataclass
class _Event:
    device: int
    recorded: _Work | None = None  # latest work of the stream that it was recorded in


@dataclass
class _Work:
    """One step of a stream, done after the one before it and after events of other streams."""

    run: Callable[[], None]
    before: list[_Work]
    is_done: bool = False


@dataclass
class _Stream:
    device: int
    last: _Work | None = None
    captured: list[Callable[[], None]] | None = None
    thread: int = 0  # that captures


@dataclass
class _Graph:
    steps: list[Callable[[], None]] = field(default_factory=list)


class Handle:
    """What the module gives out for streams, events and graphs."""

    def __init__(self, number: int) -> None:
        """Remember the number."""
        self.number = number

    def __int__(self) -> int:
        """Return the number, which is what TensorRT takes."""
        return self.number


class FakeCuda(types.ModuleType):
    """The module; see above.

    Args:
        gpus: devices; none with a driver is "no device".
        version: key of the manifest's cuda-python.

    Attributes:
        has_driver: False: every call says that the driver is missing.
        fail_capture: captures are invalid.
        fail_next: name of a function -> status name that its next call returns.
        reserved: bytes of the device that others use.
        graph_launches: how many.
        calls: names of all functions called.
    """

    def __init__(self, gpus: list[Gpu] | None = None, version: str = "cuda.bindings.runtime 12.9") -> None:
        super().__init__("cuda.bindings.runtime")
        api = MANIFEST["cuda"][version]
        self._api = api["functions"]
        self.gpus = [Gpu()] if gpus is None else gpus
        self.has_driver, self.fail_capture = True, False
        self.fail_next: dict[str, str] = {}
        self.reserved = 0
        self.graph_launches = 0
        self.calls: list[str] = []
        self.lock = threading.RLock()
        self._thread = threading.local()
        self._numbers = iter(range(0x7000_0000_0000, 0x7FFF_0000_0000, 0x1000_0000))
        self.blocks: dict[int, np.ndarray] = {}  # device memory by its first address
        self.pinned: dict[int, Any] = {}
        self.objects: dict[int, Any] = {}  # streams, events, graphs
        for name, value in api["constants"].items():
            setattr(self, name, value)
        errors = {**api["enumerations"]["cudaError_t"], "cudaErrorInvalidValue": 1}
        errors |= {"cudaErrorIllegalAddress": 700, "cudaErrorStreamCaptureInvalidated": 901}
        self.cudaError_t = enum.IntEnum("cudaError_t", errors)
        for name in ("cudaMemcpyKind", "cudaStreamCaptureMode"):
            setattr(self, name, enum.IntEnum(name, api["enumerations"][name]))

    def __getattr__(self, name: str) -> Any:
        """Return a function of the real module, its arguments counted."""
        if not name.startswith("cuda") or name not in self._api:
            raise AttributeError(f"cuda-python has no {name}")
        (parameters,) = self._api[name]

        def call(*arguments: Any) -> tuple[Any, ...]:
            assert len(arguments) == len(parameters), f"{name}({', '.join(parameters)}) got {len(arguments)} arguments"
            with self.lock:
                self.calls.append(name)
                if name in self.fail_next:
                    return (self.cudaError_t[self.fail_next.pop(name)], None)
                if not self.has_driver and not name.startswith(("cudaGetError", "cudaRuntime")):
                    return (self.cudaError_t.cudaErrorInsufficientDriver, None)
                result = getattr(self, f"_{name}")(*arguments)
                if isinstance(result, self.cudaError_t):
                    return (result, None)
                return (self.cudaError_t.cudaSuccess, *(() if result is None else (result,)))

        return call

    @property
    def device(self) -> int:
        """The calling thread's device."""
        return getattr(self._thread, "device", 0)

    def live(self) -> dict[str, int]:
        """Return what was not freed, by its kind."""
        kinds = [type(item).__name__ for item in self.objects.values()]
        counts = {"memory": len(self.blocks), "pinned": len(self.pinned), **{kind: kinds.count(kind) for kind in kinds}}
        return {kind: number for kind, number in counts.items() if number}

    def used_bytes(self) -> int:
        """Return how much of the device's memory is taken."""
        return self.reserved + sum(block.nbytes for block in self.blocks.values())

    def view(self, address: int, num_bytes: int) -> np.ndarray:
        """Return the bytes at an address of the device."""
        assert address in self.blocks, f"device address {address:#x} is not allocated (freed?)"
        assert num_bytes <= self.blocks[address].nbytes, f"{num_bytes} bytes at {address:#x} are more than allocated"
        return self.blocks[address][:num_bytes]

    def give(self, stream: Any, run: Callable[[], None], *, after: _Work | None = None) -> None:
        """Append work to a stream, or to what it captures."""
        target = self._object(stream, _Stream)
        assert target.device == self.device, f"stream of device {target.device} used on device {self.device}"
        if target.captured is not None:
            assert after is None
            target.captured.append(run)
            return
        target.last = _Work(run, [work for work in (target.last, after) if work is not None])

    def is_capturing(self, stream: Any) -> bool:
        """Say whether a stream's work is being recorded."""
        return self._object(stream, _Stream).captured is not None

    def _object(self, handle: Any, kind: type) -> Any:
        item = self.objects.get(int(handle))
        assert isinstance(item, kind), f"{handle} is no live {kind.__name__[1:].lower()}"
        return item

    def _new(self, item: Any) -> Handle:
        handle = Handle(next(self._numbers))
        self.objects[handle.number] = item
        return handle

    def _do(self, work: _Work | None) -> None:
        """Do work and all that must come before it, and no more."""
        pending = [work] if work is not None else []
        while pending:
            top = pending[-1]
            before = [item for item in top.before if not item.is_done]
            if before:
                pending += before
                continue
            pending.pop()
            if not top.is_done:
                top.is_done, top.before = True, []
                top.run()

    def _no_capture(self) -> None:
        streams = [item for item in self.objects.values() if isinstance(item, _Stream)]
        mine = [stream for stream in streams if stream.thread == threading.get_ident()]
        assert all(stream.captured is None for stream in mine), "waiting or allocating while a stream captures"

    # --- the functions -----------------------------------------------------------------------------------------------

    def _cudaGetDeviceCount(self) -> Any:
        return len(self.gpus) or self.cudaError_t.cudaErrorNoDevice

    def _cudaGetDeviceProperties(self, device: int) -> Any:
        gpu = self.gpus[device]
        major, minor = gpu.capability
        fields = {"name": gpu.name.encode(), "major": major, "minor": minor, "totalGlobalMem": gpu.memory}
        return types.SimpleNamespace(**fields, multiProcessorCount=gpu.multiprocessors, l2CacheSize=4 << 20)

    def _cudaSetDevice(self, device: int) -> None:
        assert 0 <= device < len(self.gpus)
        self._thread.device = device

    def _cudaDriverGetVersion(self) -> int:
        return 12040

    def _cudaRuntimeGetVersion(self) -> int:
        return 12090

    def _cudaGetErrorName(self, error: Any) -> bytes:
        return error.name.encode()

    def _cudaGetErrorString(self, error: Any) -> bytes:
        return f"what {error.name} means".encode()

    def _cudaMalloc(self, size: int) -> Any:
        self._no_capture()
        if self.used_bytes() + size > self.gpus[self.device].memory:
            return self.cudaError_t.cudaErrorMemoryAllocation
        address = next(self._numbers)
        self.blocks[address] = np.full(size, RUBBISH, np.uint8)
        return address

    def _cudaFree(self, pointer: int) -> None:
        self._finish_all()
        assert pointer in self.blocks, f"device address {pointer:#x} is freed twice"
        del self.blocks[pointer]

    def _cudaMallocHost(self, size: int) -> int:
        self._no_capture()
        raw = (ctypes.c_uint8 * size)()
        ctypes.memset(raw, RUBBISH, size)
        address = ctypes.addressof(raw)
        self.pinned[address] = raw
        return address

    def _cudaFreeHost(self, pointer: int) -> None:
        self._finish_all()
        assert pointer in self.pinned, "pinned memory is freed twice"
        raw = self.pinned.pop(pointer)
        ctypes.memset(raw, RUBBISH, len(raw))
        self._graveyard = [*getattr(self, "_graveyard", ()), raw]  # so that a late reader gets rubbish, no crash

    def _finish_all(self) -> None:
        """Free memory only when the device is idle, as CUDA does."""
        self._no_capture()
        for item in list(self.objects.values()):
            if isinstance(item, _Stream):
                self._do(item.last)

    def _host(self, address: int, count: int) -> np.ndarray:
        for start, raw in self.pinned.items():
            if start <= address and address + count <= start + len(raw):
                return np.frombuffer(raw, np.uint8)[address - start : address - start + count]
        raise AssertionError(f"host address {address:#x} is not pinned (freed?)")

    def _cudaMemcpyAsync(self, dst: int, src: int, count: int, kind: Any, stream: Any) -> None:
        kinds = self.cudaMemcpyKind
        if kind is kinds.cudaMemcpyHostToDevice:
            self._host(src, count)
            self.view(dst, count)
            self.give(stream, lambda: np.copyto(self.view(dst, count), self._host(src, count)))
        else:
            assert kind is kinds.cudaMemcpyDeviceToHost
            self._host(dst, count)[:] = RUBBISH
            self.give(stream, lambda: np.copyto(self._host(dst, count), self.view(src, count)))

    def _cudaStreamCreateWithFlags(self, flags: int) -> Handle:
        assert flags == self.cudaStreamNonBlocking
        return self._new(_Stream(self.device))

    def _cudaStreamDestroy(self, stream: Any) -> None:
        self._do(self._object(stream, _Stream).last)
        del self.objects[int(stream)]

    def _cudaStreamSynchronize(self, stream: Any) -> None:
        self._no_capture()
        self._do(self._object(stream, _Stream).last)

    def _cudaStreamWaitEvent(self, stream: Any, event: Any, flags: int) -> None:
        assert flags == 0
        recorded = self._object(event, _Event).recorded
        self.give(stream, lambda: None, after=recorded)

    def _cudaStreamBeginCapture(self, stream: Any, mode: Any) -> None:
        assert mode is self.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        item = self._object(stream, _Stream)
        item.captured, item.thread = [], threading.get_ident()

    def _cudaStreamEndCapture(self, stream: Any) -> Any:
        item = self._object(stream, _Stream)
        steps, item.captured = item.captured, None
        assert steps is not None, "no capture to end"
        if self.fail_capture:
            return self.cudaError_t.cudaErrorStreamCaptureInvalidated
        return self._new(_Graph(steps))

    def _cudaEventCreateWithFlags(self, flags: int) -> Handle:
        assert flags == self.cudaEventDisableTiming | self.cudaEventBlockingSync
        return self._new(_Event(self.device))

    def _cudaEventRecord(self, event: Any, stream: Any) -> None:
        item = self._object(event, _Event)
        assert item.device == self._object(stream, _Stream).device == self.device
        self.give(stream, lambda: None)
        item.recorded = self._object(stream, _Stream).last

    def _cudaEventSynchronize(self, event: Any) -> None:
        self._no_capture()
        self._do(self._object(event, _Event).recorded)

    def _cudaEventDestroy(self, event: Any) -> None:
        self._object(event, _Event)
        del self.objects[int(event)]

    def _cudaGraphInstantiate(self, graph: Any, flags: int) -> Handle:
        assert flags == 0
        return self._new(_Graph(list(self._object(graph, _Graph).steps)))

    def _cudaGraphLaunch(self, graph: Any, stream: Any) -> None:
        self.graph_launches += 1
        for step in self._object(graph, _Graph).steps:
            self.give(stream, step)

    def _cudaGraphExecDestroy(self, graph: Any) -> None:
        self._object(graph, _Graph)
        del self.objects[int(graph)]

    _cudaGraphDestroy = _cudaGraphExecDestroy
