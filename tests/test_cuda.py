"""The thin layer over cuda-python, on a stand-in that is as unkind as CUDA may be."""

from __future__ import annotations

import gc
import sys
import types

import numpy as np
import pytest
from fake_cuda import MANIFEST, FakeCuda, Gpu

from rtmdet_geo.backends import cuda
from rtmdet_geo.errors import ConfigError, DeviceMemoryError, EngineError, MissingDependencyError


@pytest.fixture
def machine(monkeypatch):
    """A machine with two GPUs."""
    return use(monkeypatch, FakeCuda([Gpu(), Gpu("NVIDIA Fake 90", (9, 0), 132, 80 << 30)]))


def use(monkeypatch, fake):
    bindings = types.ModuleType("cuda.bindings")
    bindings.runtime = fake
    for name, module in (("cuda", types.ModuleType("cuda")), ("cuda.bindings", bindings)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", fake)
    cuda.runtime.cache_clear()
    return fake


@pytest.fixture(autouse=True)
def forget():
    yield
    cuda.runtime.cache_clear()


def test_devices(machine):
    one, two = cuda.list_devices()
    assert (one.name, one.label, one.compute_capability, one.num_multiprocessors) == (
        "cuda:0",
        "NVIDIA Fake 4000",
        (8, 6),
        46,
    )
    assert (two.name, two.memory_bytes, two.l2_bytes) == ("cuda:1", 80 << 30, 4 << 20)
    assert cuda.find_device("auto") == cuda.find_device("cuda") == one and cuda.find_device("cuda:1") == two
    report = cuda.describe_devices()
    assert report.devices == (one, two) and report.problem is None
    assert (report.driver, report.runtime) == ("12.4", "12.9")


@pytest.mark.parametrize("name", ["cpu", "cuda:", "cuda:-1", "gpu", "cuda:1 "])
def test_names_that_are_no_cuda_device(machine, name):
    with pytest.raises(ConfigError, match="choose auto, cuda or cuda:N"):
        cuda.find_device(name)


def test_a_device_that_is_not_here(machine):
    with pytest.raises(ConfigError, match="'cuda:2' is not here; choose one of auto, cuda:0, cuda:1"):
        cuda.find_device("cuda:2")


def test_no_driver(machine):
    machine.has_driver = False
    with pytest.raises(EngineError, match=r"cudaErrorInsufficientDriver.*update the NVIDIA driver"):
        cuda.find_device("auto")
    report = cuda.describe_devices()
    assert report.devices == () and report.driver is None and "NVIDIA driver" in report.problem


def test_driver_without_a_device(monkeypatch):
    use(monkeypatch, FakeCuda([]))
    with pytest.raises(EngineError, match="cudaErrorNoDevice"):
        cuda.find_device("auto")


def test_a_driver_of_an_older_cuda_than_cuda_pythons(machine, monkeypatch):
    monkeypatch.setattr(machine, "_cudaRuntimeGetVersion", lambda: 13000)
    machine.fail_next["cudaGetDeviceCount"] = "cudaErrorInsufficientDriver"
    remedy = r"driver is of CUDA 12\.4, cuda-python of 13\.0: run: pip install 'cuda-python<13'"
    with pytest.raises(EngineError, match=remedy):
        cuda.list_devices()


def test_older_cuda_python_without_a_driver_library(machine, monkeypatch):
    """Before 12.8 it raises instead of returning a status."""

    def missing():
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    monkeypatch.setattr(machine, "cudaGetDeviceCount", missing, raising=False)
    with pytest.raises(EngineError, match=r"dlopen libcuda\.so\.1.*NVIDIA driver"):
        cuda.list_devices()


@pytest.mark.parametrize("version", sorted(MANIFEST["cuda"]))
def test_both_places_of_the_module(monkeypatch, version):
    place = version.split()[0]
    fake = use(monkeypatch, FakeCuda(version=version))
    if place == "cuda.cudart":
        monkeypatch.setitem(sys.modules, "cuda.bindings", None)
        monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
        monkeypatch.setitem(sys.modules, "cuda.cudart", fake)
    assert cuda.runtime() is fake and len(cuda.list_devices()) == 1


def test_missing_package(monkeypatch):
    for name in ("cuda", "cuda.bindings", "cuda.bindings.runtime", "cuda.cudart"):
        monkeypatch.setitem(sys.modules, name, None)
    cuda.runtime.cache_clear()
    with pytest.raises(MissingDependencyError, match=r"pip install 'rtmdet-geo\[tensorrt\]'"):
        cuda.list_devices()
    assert "pip install" in cuda.describe_devices().problem


def test_copies_wait_for_one_another(machine):
    """In to the device, out again by another stream that waits for an event."""
    held = cuda.Holdings(cuda.find_device("auto"))
    there, back = held.pinned((4, 8), np.float32), held.pinned((4, 8), np.float32)
    one, two, arrived, done = held.stream(), held.stream(), held.event(), held.event()
    address = held.memory(there.nbytes)
    there[:] = np.arange(32).reshape(4, 8)
    cuda.copy_in(address, there, one)
    cuda.record(arrived, one)
    cuda.let_wait(two, arrived)
    cuda.copy_out(back, address, two)
    cuda.record(done, two)
    assert np.isnan(back).all()  # nobody waited yet
    cuda.wait_for(done)
    np.testing.assert_array_equal(back, there)
    held.close()
    held.close()
    assert machine.live() == {}


def test_the_stand_in_finds_a_forgotten_wait(machine):
    held = cuda.Holdings(cuda.find_device("auto"))
    there, back = held.pinned((4,), np.float32), held.pinned((4,), np.float32)
    one, two, done, address = held.stream(), held.stream(), held.event(), held.memory(16)
    there[:] = 1
    cuda.copy_in(address, there, one)
    cuda.copy_out(back, address, two)
    cuda.record(done, two)
    cuda.wait_for(done)
    assert np.isnan(back).all()


def test_the_stand_in_finds_freed_memory_and_another_device(machine):
    held = cuda.Holdings(cuda.find_device("cuda:1"))
    stream, buffer, address = held.stream(), held.pinned((4,), np.float32), held.memory(16)
    cuda.use(cuda.find_device("cuda:0"))
    with pytest.raises(AssertionError, match="stream of device 1 used on device 0"):
        cuda.copy_in(address, buffer, stream)
    cuda.use(cuda.find_device("cuda:1"))
    held.close()
    other = cuda.Holdings(cuda.find_device("cuda:1"))
    with pytest.raises(AssertionError, match="freed"):
        cuda.copy_in(address, other.pinned((4,), np.float32), other.stream())
    with pytest.raises(AssertionError, match="got 1 arguments"):
        cuda.call("cudaMemcpyAsync", 1)
    with pytest.raises(AttributeError, match="cudaMemcpy2D"):
        cuda.call("cudaMemcpy2D")


def test_what_is_forgotten_is_freed(machine):
    held = cuda.Holdings(cuda.find_device("auto"))
    held.memory(100), held.pinned((3,), np.uint8), held.stream(), held.event()
    assert machine.live() == {"memory": 1, "pinned": 1, "_Stream": 1, "_Event": 1}
    del held
    gc.collect()
    assert machine.live() == {}


def test_too_little_memory(machine):
    held = cuda.Holdings(cuda.find_device("auto"))
    machine.reserved = machine.gpus[0].memory - 10
    with pytest.raises(DeviceMemoryError, match=r"cudaMalloc.*cudaErrorMemoryAllocation.*lower the batch size"):
        held.memory(11)
    assert held.memory(10) in machine.blocks


def test_failures_of_calls(machine):
    machine.fail_next["cudaSetDevice"] = "cudaErrorIllegalAddress"
    with pytest.raises(EngineError, match=r"cudaSetDevice of CUDA fails.*what cudaErrorIllegalAddress means"):
        cuda.use(cuda.find_device("auto"))


def test_a_failure_while_freeing_is_swallowed(machine, caplog):
    """A driver may be gone when the program ends."""
    held = cuda.Holdings(cuda.find_device("auto"))
    held.memory(8)
    machine.fail_next["cudaFree"] = "cudaErrorIllegalAddress"
    with caplog.at_level("DEBUG"):
        held.close()
    assert "cudaErrorIllegalAddress" in caplog.text


def test_graphs(machine):
    """A captured copy runs at each launch, not before; a capture that fails leaves the stream as it was."""
    held = cuda.Holdings(cuda.find_device("auto"))
    there, back = held.pinned((4,), np.float32), held.pinned((4,), np.float32)
    stream, address = held.stream(), held.memory(16)

    def work() -> None:
        cuda.copy_in(address, there, stream)
        cuda.copy_out(back, address, stream)

    graph = cuda.capture(stream, work)
    held.wait()
    assert np.isnan(back).all()
    for value in (1, 2):
        there[:] = value
        graph.launch(stream)
        held.wait()
        assert (back == value).all()
    machine.fail_capture = True
    with pytest.raises(EngineError, match="cudaErrorStreamCaptureInvalidated"):
        cuda.capture(stream, work)
    with pytest.raises(ZeroDivisionError):
        cuda.capture(stream, lambda: 1 / 0)
    there[:] = 3
    work()
    held.wait()
    assert (back == 3).all()
    graph.close()
    held.close()
    assert machine.live() == {}
