"""The TensorRT backend at work, on stand-ins for TensorRT and CUDA: order, overlap, graphs, memory, threads.

The stand-ins prove the calls; the numbers are onnxruntime's (see ``fake_tensorrt.py``). Builds, checks and the cache
are in ``test_backend_tensorrt_build.py``.
"""

from __future__ import annotations

import gc
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import pytest
from fake_cuda import FakeCuda, Gpu
from fake_tensorrt import VERSIONS, install
from tensorrt_case import SIDE, assert_near, expected, model_file, tiles, tiny_file

from rtmdet_geo.backends import Backend, trt_run
from rtmdet_geo.backends.trt import TensorRtBackend
from rtmdet_geo.cache import CACHE_VARIABLE
from rtmdet_geo.errors import BatchHalvedWarning, ConfigError, DeviceMemoryError, EngineError
from rtmdet_geo.export.graph import fix_size

NEWEST = "11.4.0.106"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One folder of engines for all tests of this file, so that each is built once."""
    return tmp_path_factory.mktemp("engines")


@pytest.fixture
def machine(monkeypatch, cache):
    """The newest TensorRT on one GPU."""
    monkeypatch.setenv(CACHE_VARIABLE, str(cache))
    return install(monkeypatch, NEWEST)


@pytest.mark.parametrize("version", VERSIONS)
def test_same_objects_as_onnxruntime(monkeypatch, cache, version):
    monkeypatch.setenv(CACHE_VARIABLE, str(cache))
    trt = install(monkeypatch, version)
    engine = TensorRtBackend(model_file())
    assert isinstance(engine, Backend)
    assert (engine.name, engine.precision, engine.device_name) == ("tensorrt", "fp16", "cuda:0")
    assert engine.fixed_tile_size == SIDE and engine.best_batch_size == 8
    found = engine.predict(tiles(), score_threshold=0.3)
    for mine, wanted in zip(found, expected(model_file()), strict=True):
        assert len(wanted) > 20
        assert_near(mine, wanted)
    engine.close()
    assert trt.cuda.live() == {} and trt.cuda.reserved == 0


@pytest.mark.parametrize("kind", ["horizontal", "mask"])
def test_other_kinds_in_fp32(machine, kind):
    engine = TensorRtBackend(model_file(kind), precision="fp32", max_batch=3)
    assert engine.precision == "fp32" and engine.spec.differences["boxes_px"] < 0.05
    for mine, wanted in zip(engine.predict(tiles(), score_threshold=0.3), expected(model_file(kind)), strict=True):
        assert_near(mine, wanted, px=1e-3, score=1e-5)
        if kind == "mask":
            np.testing.assert_allclose(mine.masks.views[0].features, wanted.masks.views[0].features, atol=1e-4)


def test_a_result_does_not_depend_on_its_batch(machine):
    engine = TensorRtBackend(tiny_file())
    many = tiles(19)
    whole = engine.raw(many)  # 8 + 8 + 3
    single = [engine.raw(tile[None]) for tile in many]
    for index, values in enumerate(whole):
        assert values.shape[0] == 19
        assert_same(values, np.concatenate([outputs[index] for outputs in single]))


def test_uneven_batches_come_in_order(machine):
    engine = TensorRtBackend(tiny_file(), max_batch=4)
    many = tiles(19)
    sizes = [4, 4, 1, 3, 7]
    starts = np.cumsum([0, *sizes])
    batches = [many[start : start + size] for start, size in zip(starts, sizes, strict=False)]
    streamed = list(engine.stream(iter(batches)))
    assert [shape[0] for shape, _ in streamed] == sizes
    for batch, (shape, outputs) in zip(batches, streamed, strict=True):
        assert shape == batch.shape
        for mine, wanted in zip(outputs, engine.raw(batch), strict=True):
            assert_same(mine, wanted)


def test_three_batches_are_under_way(machine):
    """Tiles of the third batch are asked for before the first one's results are given out, those of the fourth not."""
    engine = TensorRtBackend(tiny_file(), max_batch=2)
    asked = []

    def batches():
        for number in range(6):
            asked.append(number)
            yield tiles()[:2]

    stream = engine.stream(batches())
    next(stream)
    assert asked == [0, 1, 2]
    next(stream)
    assert asked == [0, 1, 2, 3]


def test_a_stream_and_single_calls_at_once(machine):
    """Results that wait in a stream are not overwritten by others of the same thread."""
    engine = TensorRtBackend(tiny_file(), max_batch=2)
    batches = [tiles()[:2], tiles()[2:4], tiles()[4:]]
    alone = [engine.raw(batch)[0] for batch in batches]
    found = []
    for _, outputs in engine.stream(iter(batches)):
        found.append(outputs[0])
        assert_same(engine.raw(tiles()[1:2])[0], alone[0][1:])
    for mine, wanted in zip(found, alone, strict=True):
        np.testing.assert_array_equal(mine, wanted)


def test_a_stream_that_is_given_up(machine):
    """Batches under way whose results nobody wants disturb nothing."""
    engine = TensorRtBackend(tiny_file(), max_batch=2)
    alone = engine.raw(tiles()[:2])[0]
    for _ in range(3):
        stream = engine.stream([tiles()[2:4]] * 5)
        next(stream)
        stream.close()
        np.testing.assert_array_equal(engine.raw(tiles()[:2])[0], alone)
    assert len(machine.contexts) == 1


def test_results_are_the_callers_own(machine):
    engine = TensorRtBackend(tiny_file(), max_batch=2)
    first = engine.raw(tiles()[:2])
    kept = [values.copy() for values in first]
    for _ in range(4):
        engine.raw(tiles()[2:4])
    engine.close()
    for mine, wanted in zip(first, kept, strict=True):
        np.testing.assert_array_equal(mine, wanted)
        mine[:] = 0


def test_repeated_sizes_run_as_graphs(machine):
    engine = TensorRtBackend(tiny_file(), max_batch=4)
    alone = engine.raw(tiles()[:4])
    assert machine.cuda.graph_launches == 0  # warms up
    for _ in range(7):
        for mine, wanted in zip(engine.raw(tiles()[:4]), alone, strict=True):
            np.testing.assert_array_equal(mine, wanted)
    assert machine.cuda.graph_launches == 7
    assert machine.cuda.live()["_Graph"] == trt_run.NUM_SLOTS  # one for each set of buffers
    engine.raw(tiles()[:3])
    assert machine.cuda.graph_launches == 7 and "_Graph" not in machine.cuda.live()  # void with the new size
    for _ in range(2):
        np.testing.assert_array_equal(engine.raw(tiles()[:4])[0], alone[0])
    assert machine.cuda.graph_launches == 8


@pytest.mark.parametrize("how", ["invalid", "refused"])
def test_without_graphs(machine, caplog, how):
    """Where a run cannot be captured it is launched plainly; said once."""
    engine = TensorRtBackend(tiny_file(), max_batch=4)
    alone = engine.raw(tiles()[:4])
    if how == "invalid":
        machine.cuda.fail_capture = True
    else:
        machine.cuda.fail_next["cudaStreamBeginCapture"] = "cudaErrorInvalidValue"
    for _ in range(5):
        np.testing.assert_array_equal(engine.raw(tiles()[:4])[0], alone[0])
    assert machine.cuda.graph_launches == 0 and caplog.text.count("without CUDA graphs") == 1


def test_threads_share_the_engine(machine):
    engine = TensorRtBackend(tiny_file(), max_batch=2)
    alone = [engine.raw(tile[None])[0] for tile in tiles()]
    start = threading.Barrier(4)

    def work(seed: int) -> None:
        start.wait()
        for index in np.random.default_rng(seed).permutation(5):
            np.testing.assert_array_equal(engine.raw(tiles()[index][None])[0], alone[index])
        for index, (_, outputs) in enumerate(engine.stream(tile[None] for tile in tiles())):
            np.testing.assert_array_equal(outputs[0], alone[index])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert 1 <= len(machine.contexts) <= 4
    before = len(machine.contexts)
    with ThreadPoolExecutor(1) as pool:  # a new thread takes over what an old one has left
        pool.submit(engine.raw, tiles()).result()
    assert len(machine.contexts) == before
    engine.close()
    gc.collect()
    assert len(machine.contexts) == 0 and machine.cuda.live() == {}


def test_another_gpu(monkeypatch, tmp_path):
    """All calls name the device that was asked for, in every thread."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    trt = install(monkeypatch, "8.6.1", FakeCuda([Gpu(), Gpu("NVIDIA Fake 90", (9, 0), 132, 80 << 30)]))
    engine = TensorRtBackend(tiny_file(), device="cuda:1", max_batch=2)
    assert engine.device_name == "cuda:1"
    for _ in range(3):  # threads begin with the first device, also where they take over what another has left
        with ThreadPoolExecutor(1) as pool:
            outputs = pool.submit(engine.raw, tiles()[:2]).result()
        np.testing.assert_array_equal(outputs[0], engine.raw(tiles()[:2])[0])
    assert trt.cuda.device == 1
    devices = {item.device for item in trt.cuda.objects.values() if hasattr(item, "device")}
    assert devices == {1}


def assert_same(found, wanted):
    """onnxruntime rounds a batch's last bits by its size."""
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def free_bytes(machine, number):
    """Let others take all of the device's memory but so many bytes."""
    machine.cuda.reserved += machine.cuda.gpus[0].memory - machine.cuda.used_bytes() - number


def bytes_per_image(machine):
    engine = TensorRtBackend(tiny_file())
    engine.raw(tiles()[:1])
    number = sum(block.nbytes for block in machine.cuda.blocks.values()) // 8
    engine.close()
    return number


def test_memory_for_fewer_images_than_the_engine_takes(machine):
    """Buffers of the largest size do not fit, those of this batch do: nothing is said, nothing halved."""
    per_image = bytes_per_image(machine)
    engine = TensorRtBackend(tiny_file())
    free_bytes(machine, 8 * machine.context_bytes + 3 * per_image)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(engine.raw(tiles()[:2])[0]) == 2


@pytest.mark.parametrize("how", ["raw", "stream"])
def test_out_of_memory_halves_the_batch(machine, how):
    """The context fits, buffers for two images too, for four not: 8 -> 4 -> 2, said once, nothing lost."""
    per_image = bytes_per_image(machine)
    many = tiles(19)[:16]
    wanted = TensorRtBackend(tiny_file()).raw(many)
    gc.collect()
    engine = TensorRtBackend(tiny_file())
    engine._order = None  # as of a named engine, which cannot be built anew
    free_bytes(machine, 8 * machine.context_bytes + 3 * per_image)
    with pytest.warns(BatchHalvedWarning, match="cuda:0 is too small for 8 tiles of 96 x 96 px") as caught:
        if how == "raw":
            found = [engine.raw(many[:8]), engine.raw(many[8:])]
        else:
            found = [outputs for _, outputs in engine.stream([many[:8], many[8:]])]
    assert len(caught) == 1
    for index, values in enumerate(wanted):
        assert_same(np.concatenate([part[index] for part in found]), values)


def test_no_context_for_the_largest_batch_means_a_smaller_engine(machine):
    """A context is as large as its engine's largest batch, so halving builds another engine."""
    per_image = bytes_per_image(machine)
    wanted = TensorRtBackend(tiny_file()).raw(tiles(8))
    gc.collect()
    engine = TensorRtBackend(tiny_file())
    free_bytes(machine, 3 * machine.context_bytes + 9 * per_image)
    with pytest.warns(BatchHalvedWarning) as caught:
        found = engine.raw(tiles(8))
    assert len(caught) == 1 and engine.max_batch == engine._engine.max_batch == 2
    for mine, other in zip(found, wanted, strict=True):
        assert_same(mine[:5], other[:5])


def test_one_image_is_too_much(machine):
    engine = TensorRtBackend(tiny_file(), max_batch=1)
    free_bytes(machine, 100)
    with pytest.raises(DeviceMemoryError, match="context for 1 tiles on cuda:0"):
        engine.raw(tiles()[:1])
    assert machine.cuda.live() == {}


@pytest.mark.parametrize(
    ("method", "answer"), [("set_input_shape", False), ("execute_async_v3", False)], ids=["shape", "execute"]
)
def test_what_tensorrt_refuses_is_an_error(machine, method, answer):
    engine = TensorRtBackend(tiny_file(), max_batch=2)
    engine.raw(tiles()[:2])
    machine.refuse[method] = answer
    with pytest.raises(EngineError, match=f"TensorRT refuses {method} on cuda:0"):
        engine.raw(tiles()[:1])
    machine.refuse.clear()
    assert len(engine.raw(tiles()[:1])[0]) == 1
    engine.close()
    assert machine.cuda.live() == {}


def test_a_device_that_fails(machine):
    engine = TensorRtBackend(tiny_file(), max_batch=2)
    machine.cuda.fail_next["cudaEventSynchronize"] = "cudaErrorIllegalAddress"
    with pytest.raises(EngineError, match="cudaErrorIllegalAddress"):
        engine.raw(tiles()[:2])


def test_closing(machine):
    engine = TensorRtBackend(tiny_file(), max_batch=2)
    stream = engine.stream([tiles()[:2]] * 4)
    next(stream)
    engine.close()
    assert len(list(stream)) >= 2 or machine.cuda.live() == {}  # what is under way may end
    stream.close()
    gc.collect()
    assert machine.cuda.live() == {} and machine.cuda.reserved == 0
    with pytest.raises(EngineError, match="was closed"):
        engine.raw(tiles()[:2])


def test_what_is_forgotten_is_freed(machine):
    engine = TensorRtBackend(tiny_file(), max_batch=2)
    stream = engine.stream([tiles()[:2]] * 4)
    next(stream)
    del engine, stream
    gc.collect()
    assert machine.cuda.live() == {} and machine.cuda.reserved == 0 and len(machine.contexts) == 0


def test_batches_that_the_model_cannot_take(machine):
    engine = TensorRtBackend(tiny_file())
    for batch in (tiles()[:, :2], tiles().astype(np.float32), np.zeros((1, 3, 128, 128), np.uint8)):
        with pytest.raises(ConfigError):
            engine.raw(batch)
        with pytest.raises(ConfigError):
            list(engine.stream([batch]))


def test_a_model_file_of_one_batch_size(machine, tmp_path):
    """Smaller batches are filled up with empty images, whose results nobody sees."""
    path = tmp_path / "four.onnx"
    onnx.save(fix_size(onnx.load(tiny_file()), SIDE, SIDE, batch=4), path)
    engine = TensorRtBackend(path, precision="fp32")
    assert engine.best_batch_size == 4
    found = engine.predict(tiles(), score_threshold=0.3)
    for mine, wanted in zip(found, expected(tiny_file()), strict=True):
        assert_near(mine, wanted, px=1e-3, score=1e-5)
