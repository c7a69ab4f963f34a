"""torch in half precision, on CUDA graphs and compiled: what can be shown without a GPU, and the numbers with one."""

from __future__ import annotations

import functools
import inspect
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from classifiers import SIDE, write_network
from synthetic import SMALLEST, make_spec, small_network
from torch import nn

from rtmdet_geo.backends import pytorch
from rtmdet_geo.backends.pytorch import TorchBackend
from rtmdet_geo.backends.pytorch_classify import TorchClassifier
from rtmdet_geo.catalog import CATALOG
from rtmdet_geo.errors import BatchHalvedWarning, ConfigError, DeviceMemoryError, EngineError
from rtmdet_geo.export import make_check_tiles
from rtmdet_geo.models import cuda_graphs, devices
from rtmdet_geo.models.cuda_graphs import MOST_GRAPHS, CudaRunner
from rtmdet_geo.models.decode import DetectionGraph
from rtmdet_geo.models.devices import (
    choose_precision,
    cpu_has_bf16,
    exact_convolutions,
    is_out_of_memory,
    with_number,
)
from rtmdet_geo.models.inference import InferenceNetwork, _MeanInFloat32, choose_layout
from rtmdet_geo.models.weights import save_weights
from rtmdet_geo.structures import Detections

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ("rotated", "horizontal", "mask")
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@functools.cache
def shared_network(kind: str) -> nn.Module:
    """Return the small network of a kind, which no test may change."""
    return small_network(kind, num_classes=2)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> dict[str, Path]:
    """Return weights of a small two-class network of each kind."""
    folder = tmp_path_factory.mktemp("weights")
    files = {}
    for kind in KINDS:
        spec = make_spec(kind=kind, architecture=SMALLEST[kind], classes=("ship", "plane"), tile_size=128)
        files[kind] = folder / f"{kind}.safetensors"
        save_weights(shared_network(kind), files[kind], spec, half=False)
    return files


def assert_near(
    one: TorchBackend, other: TorchBackend, tiles: np.ndarray, px: float, score: float, *, score_threshold: float = 0.05
) -> None:
    """Every detection of one engine is the other's as well, and the other way round."""
    pairs = zip(*(engine.predict(tiles, score_threshold=score_threshold) for engine in (one, other)), strict=True)
    for here, there in pairs:
        for first, second in ((here, there), (there, here)):
            assert_partners(first.select(first.scores >= score_threshold + 2 * score), second, px, score)


def assert_partners(one: Detections, other: Detections, px: float, score: float) -> None:
    """Each detection of one has one in the other that is so near; angles count by how far they move the box's end."""
    assert len(one) > 10
    boxes, others = one.boxes[:, None], other.boxes[None]
    distance = np.abs(boxes[..., :4] - others[..., :4]).max(axis=2)
    turn = np.abs(boxes[..., 4] - others[..., 4])
    distance = np.maximum(distance, np.minimum(turn, np.abs(np.pi - turn)) * boxes[..., 2] / 2)
    cost = np.maximum(distance / px, np.abs(one.scores[:, None] - other.scores) / score)
    cost[one.labels[:, None] != other.labels] = np.inf
    assert cost.min(axis=1).max() < 1


# ---------------------------------------------------------------- precisions

#: Precision -> least score, and the most px and score by which detections above it may differ from fp32.
HALF = {"fp16": (0.1, 0.5, 0.01), "bf16": (0.25, 1.0, 0.02)}


@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("name", ["sen2ships_r", "banepa_ins"])
def test_half_precision_of_trained_weights(monkeypatch, name, precision):
    """On any CPU: torch emulates what the processor lacks, so the check of that is left out."""
    monkeypatch.setattr(pytorch, "choose_precision", lambda name, device: "fp32" if name == "auto" else name)
    weights = CATALOG[name].weights_path
    exact, half = (TorchBackend(weights, device="cpu", threads=1, precision=each) for each in ("auto", precision))
    assert (exact.precision, half.precision, half.best_batch_size) == ("fp32", precision, 1)
    tiles = make_check_tiles(1, len(exact.spec.bands), 256, seed=0)
    outputs = [engine.raw(tiles) for engine in (exact, half)]
    for one, other in zip(*outputs, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
    assert np.abs(outputs[0][1] - outputs[1][1]).max() > 1e-4  # it is no fp32 in disguise
    threshold, px, score = HALF[precision]
    assert_near(exact, half, tiles, px, score, score_threshold=threshold)


@pytest.mark.parametrize("kind", KINDS)
def test_only_convolutions_are_in_half(kind):
    network = shared_network(kind)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    half = InferenceNetwork(network, torch.bfloat16)
    seen = []
    for module in half.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].dtype, output.dtype)))
    images = torch.randn(1, 3, 96, 96)
    outputs = half(images)
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)} and half.kind == kind
    tensors = [tensor for part in outputs for tensor in ([part] if isinstance(part, torch.Tensor) else part)]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    for name, value in network.state_dict().items():  # the network that was given stays as it was
        assert torch.equal(value, before[name])
    assert not any(module.inplace for module in network.modules() if isinstance(module, nn.SiLU))
    with torch.inference_mode():
        expected, found = network(images), InferenceNetwork(network)(images)
    for one, other in zip(expected.cls, found.cls, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_every_feature_map_is_in_the_layout(layout):
    network, seen = InferenceNetwork(shared_network("mask"), layout=layout), []
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.MaxPool2d | nn.Upsample | nn.SiLU):
            module.register_forward_hook(
                lambda module, inputs, output, name=name: seen.append(
                    (name, inputs[0].is_contiguous(memory_format=layout), output.is_contiguous(memory_format=layout))
                )
            )
    network(torch.randn(2, 3, 96, 160))
    assert len(seen) > 100 and not [name for name, before, after in seen if not (before and after)]


def test_layouts_of_devices():
    for device, dtype in ((CPU, torch.float32), (CPU, torch.bfloat16), (CUDA, torch.float16), (CUDA, torch.bfloat16)):
        assert choose_layout(device, dtype) == torch.channels_last
    assert choose_layout(CUDA, torch.float32) == torch.contiguous_format


def test_mean_of_many_half_numbers():
    """10,000 times 100 is a million, fp16 ends at 65,504."""
    features = torch.full((1, 2, 100, 100), 100.0, dtype=torch.float16)
    mean = _MeanInFloat32()(features)
    assert mean.dtype == torch.float16 and mean.flatten().tolist() == [100, 100]


def test_precisions_that_a_device_lacks(weights, monkeypatch):
    for name in ("fp8", "int8"):
        with pytest.raises(ConfigError, match=f"'{name}' is unknown to torch; choose one of auto, fp32, fp16, bf16"):
            TorchBackend(weights["rotated"], device="cpu", precision=name)
    with pytest.raises(ConfigError, match="'fp16' needs a CUDA device; on the CPU choose 'fp32'"):
        TorchBackend(weights["rotated"], device="cpu", precision="fp16")
    monkeypatch.setattr(devices, "cpu_has_bf16", lambda: False)
    with pytest.raises(ConfigError, match=r"no bf16 arithmetic \(x86: avx512_bf16.*choose precision 'fp32'"):
        TorchBackend(weights["rotated"], device="cpu", precision="bf16")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(ConfigError, match="Tesla T4 has no bf16 arithmetic"):
        choose_precision("bf16", CUDA)
    assert choose_precision("fp16", CUDA) == "fp16" and choose_precision("auto", CUDA) == "fp32"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert choose_precision("bf16", CUDA) == "bf16"


@pytest.mark.parametrize(
    "found,answer",
    [
        ({"avx512_f": True, "avx512_bf16": False, "amx_bf16": False, "architecture": "x86_64"}, False),
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
        ({"bf16": True, "architecture": "arm64"}, True),
    ],
)
def test_how_bf16_is_found(tmp_path, monkeypatch, found, answer):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    assert cpu_has_bf16() is answer
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # as in torch 2.4
    file = tmp_path / "cpuinfo"
    file.write_text("flags\t\t: fpu avx512f " + " ".join(name for name, value in found.items() if value is True) + "\n")
    monkeypatch.setattr(devices, "_CPU_FILE", file)
    assert cpu_has_bf16() is answer
    monkeypatch.setattr(devices, "_CPU_FILE", tmp_path / "elsewhere")
    assert cpu_has_bf16() is False


def is_exact() -> bool:
    """Whether cuDNN's fp32 convolutions are in fp32."""
    cudnn = torch.backends.cudnn
    return cudnn.conv.fp32_precision == "ieee" if hasattr(cudnn, "conv") else not cudnn.allow_tf32


def test_exact_convolutions_hold_until_the_last_thread_leaves():
    assert not is_exact()
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with exact_convolutions():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with exact_convolutions():
        thread.start()
        assert inside.wait(10) and is_exact() and torch.backends.cudnn.benchmark
    assert is_exact()  # the other thread is still at it
    leave.set()
    thread.join()
    assert not is_exact() and not torch.backends.cudnn.benchmark and torch.backends.cudnn.allow_tf32
    with exact_convolutions():
        assert is_exact()


def test_exact_convolutions_before_torch_2_9(monkeypatch):
    monkeypatch.delattr(type(torch.backends.cudnn), "conv", raising=False)
    with exact_convolutions():
        assert not torch.backends.cudnn.allow_tf32 and torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.allow_tf32 and not torch.backends.cudnn.benchmark


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="torch before 2.9 has the old names alone")
def test_programs_that_set_the_precision_by_its_new_names():
    """A process of its own, because torch does not get back to where it began."""
    program = """
import torch
from rtmdet_geo.models.devices import exact_convolutions
cudnn = torch.backends.cudnn
for module, value in [(torch.backends, "tf32"), (torch.backends, "ieee"), (cudnn, "tf32"), (cudnn.conv, "ieee")]:
    module.fp32_precision = value
    before = cudnn.conv.fp32_precision
    with exact_convolutions():
        inside = cudnn.conv.fp32_precision
    print(inside, before == cudnn.conv.fp32_precision)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == 4 * "ieee True\n", done.stderr


def test_classifiers_are_exact_too(tmp_path):
    engine = TorchClassifier(write_network(tmp_path / "c.safetensors"), threads=1, device="cpu")
    seen = []
    engine._graph.register_forward_hook(lambda *_: seen.append(is_exact()))
    engine.predict(np.zeros((1, 3, SIDE, SIDE), np.uint8))
    assert seen == [True] and not is_exact()


def test_cuda_without_a_number_is_the_one_that_this_thread_has_chosen(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert with_number(torch.device("cuda")) == torch.device("cuda:1")
    assert with_number(CUDA) == CUDA and with_number(CPU) == CPU


@pytest.mark.parametrize(
    "error,answer",
    [
        (torch.cuda.OutOfMemoryError("x"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"), False),
    ],
)
def test_errors_of_memory(error, answer):
    assert is_out_of_memory(error) is answer


# ---------------------------------------------------------------- graphs


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_never_asks_for_values(kind, multi_label):
    """On the meta device tensors have shapes and no values: what looks at one, as no CUDA graph may, fails there."""
    graph = DetectionGraph(InferenceNetwork(shared_network(kind)), (0.0,) * 3, (1.0,) * 3, multi_label=multi_label)
    images = torch.empty((2, 3, 128, 96), dtype=torch.uint8, device="meta")
    outputs = graph.to("meta")(images)
    assert all(output.device.type == "meta" and len(output) == 2 for output in outputs)
    for looks in (lambda: images.nonzero(), lambda: images.sum().item(), lambda: images[images > 3]):
        with pytest.raises((NotImplementedError, RuntimeError)):
            looks()


class FakeCuda:
    """Stands in for torch.cuda on a machine without: the order of calls, not the numbers of a device."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fails: Exception | None = None
        self.last: tuple[torch.Tensor, tuple[torch.Tensor, ...]] | None = None
        self.num_runs = self.num_replays = self.num_emptied = 0
        fake, graph_call, pool_call = self, inspect.signature(torch.cuda.graph), torch.cuda.graph_pool_handle

        class Stream:
            def __init__(self, device: torch.device) -> None:
                assert device.type == "cpu"

            def record_event(self) -> Stream:
                return self

            def wait_event(self, event: object) -> None:
                assert isinstance(event, Stream)

            def synchronize(self) -> None:
                pass

        class Context:
            def __init__(self, *arguments: object) -> None:
                pass

            def __enter__(self) -> None:
                pass

            def __exit__(self, *_: object) -> None:
                pass

        class Graph:
            def replay(self) -> None:
                fake.num_replays += 1
                images, outputs = self.captured
                for output, value in zip(outputs, fake.function(images), strict=True):
                    output.copy_(value)

        class Capture(Context):
            def __init__(self, *arguments: object, **named: object) -> None:
                call = graph_call.bind(*arguments, **named).arguments  # the real signature
                assert call["capture_error_mode"] == "thread_local" and call["pool"] == "pool"
                self.graph = call["cuda_graph"]

            def __exit__(self, *_: object) -> None:
                if fake.fails is not None:
                    raise fake.fails
                self.graph.captured = fake.last

        assert not inspect.signature(pool_call).parameters
        for name, value in {
            "Stream": Stream,
            "stream": Context,
            "device": Context,
            "CUDAGraph": Graph,
            "graph": Capture,
            "graph_pool_handle": lambda: "pool",
            "empty_cache": self._empty,
            "current_stream": lambda: Stream(CPU),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
        monkeypatch.setattr(cuda_graphs, "_pinned_like", torch.empty_like)

    def _empty(self) -> None:
        self.num_emptied += 1

    def function(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return sums and the images one higher."""
        self.num_runs += 1
        outputs = images.sum(dim=(1, 2, 3)), images + 1
        self.last = images, outputs
        return outputs


@pytest.fixture
def fake_cuda(monkeypatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


def pixels(number: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 200, (number, 3, 32, 32), dtype=np.uint8)


def test_each_shape_is_captured_once_and_replayed(fake_cuda):
    runner = CudaRunner({"a": fake_cuda.function}, CPU, with_graphs=True)
    for number, seed in ((2, 0), (2, 1), (1, 2), (2, 3)):
        images = pixels(number, seed)
        sums, higher = runner.submit(images, "a").wait()
        assert sums.tolist() == images.sum(axis=(1, 2, 3)).tolist()
        np.testing.assert_array_equal(higher, images + 1)
    assert runner.num_graphs == 2 and fake_cuda.num_replays == 4
    assert fake_cuda.num_runs == 2 * (cuda_graphs.WARM_UP_RUNS + 1) + 4  # captures, and what the stand-in replays


def test_results_of_a_batch_outlive_the_next(fake_cuda):
    runner = CudaRunner({"a": fake_cuda.function}, CPU, with_graphs=True)
    pending = [runner.submit(pixels(2, seed), "a") for seed in range(3)]
    for seed, one in enumerate(pending):
        np.testing.assert_array_equal(one.wait()[1], pixels(2, seed) + 1)


def test_few_graphs_are_kept_the_last_used(fake_cuda):
    runner = CudaRunner({"a": fake_cuda.function}, CPU, with_graphs=True)
    for number in range(1, MOST_GRAPHS + 1):
        runner.submit(pixels(number), "a")
    runner.submit(pixels(1), "a")
    runner.submit(pixels(MOST_GRAPHS + 1), "a")
    assert runner.num_graphs == MOST_GRAPHS
    before = fake_cuda.num_runs
    runner.submit(pixels(1), "a")  # kept: used since
    assert fake_cuda.num_runs == before + 1
    runner.submit(pixels(2), "a")  # the oldest: gone
    assert fake_cuda.num_runs > before + 2
    runner.release()
    assert runner.num_graphs == 0 and fake_cuda.num_emptied == 1


def test_capture_that_fails_is_said_once_and_runs_without(fake_cuda, caplog):
    runner = CudaRunner({"a": fake_cuda.function}, CPU, with_graphs=True)
    fake_cuda.fails = RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")
    for seed in range(3):
        np.testing.assert_array_equal(runner.submit(pixels(2, seed), "a").wait()[1], pixels(2, seed) + 1)
    assert runner.num_graphs == fake_cuda.num_replays == 0
    (record,) = caplog.records
    assert "no CUDA graph" in record.message and "when stream is capturing)" in record.message
    fake_cuda.fails = torch.cuda.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.cuda.OutOfMemoryError):
        runner.submit(pixels(3), "a")


def test_pixels_and_outputs_that_stay_on_the_device(fake_cuda):
    for with_graphs in (True, False):
        runner = CudaRunner({"a": fake_cuda.function}, CPU, with_graphs=with_graphs)
        found = [runner.run_there(torch.from_numpy(pixels(2, seed)), "a") for seed in range(3)]
        for seed, outputs in enumerate(found):  # each its own, not the graph's
            np.testing.assert_array_equal(outputs[1].numpy(), pixels(2, seed) + 1)
        assert runner.num_graphs == with_graphs


def test_raw_on_device_is_raw(weights):
    engine = TorchBackend(weights["rotated"], device="cpu", threads=1)
    images = make_check_tiles(2, 3, 96, seed=0)
    there = engine.raw_on_device(torch.from_numpy(images), multi_label=False)
    for one, other in zip(there, engine.raw(images, multi_label=False), strict=True):
        np.testing.assert_array_equal(one.numpy(), other)


def on_fake_cuda(fake: FakeCuda, file: Path, most: int = 100) -> tuple[TorchBackend, list[int]]:
    """Return an engine whose network runs behind the stand-in, with memory for so many images, and its batches."""
    engine, sizes = TorchBackend(file, device="cpu", threads=1), []
    graph = engine._graphs[False]

    def function(images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if len(images) > most:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(images))
        return tuple(graph(images))

    engine._runner = CudaRunner({False: function}, CPU, with_graphs=False)
    return engine, sizes


def test_stream_starts_the_next_batch_before(fake_cuda, weights):
    engine, sizes = on_fake_cuda(fake_cuda, weights["rotated"])
    batches = [pixels(number, number) for number in (2, 1, 3)]
    taken = []

    def give():
        for images in batches:
            taken.append(len(images))
            yield images

    results = engine.stream(give(), multi_label=False)
    shape, outputs = next(results)
    assert shape == (2, 3, 32, 32) and taken == sizes == [2, 1]
    found = [outputs, *(outputs for _, outputs in results)]
    assert sizes == [2, 1, 3]
    plain = TorchBackend(weights["rotated"], device="cpu", threads=1)
    for images, outputs in zip(batches, found, strict=True):
        for one, other in zip(outputs, plain.raw(images, multi_label=False), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4)
    assert list(engine.stream([])) == []
    with pytest.raises(ConfigError, match="uint8"):
        list(engine.stream([np.zeros((1, 3, 32, 32), np.float32)]))


def test_stream_of_batches_that_are_too_large(fake_cuda, weights):
    engine, sizes = on_fake_cuda(fake_cuda, weights["rotated"], most=2)
    with pytest.warns(BatchHalvedWarning, match="too small for 5 tiles") as warned:
        found = list(engine.stream([pixels(1, 1), pixels(5, 5), pixels(4, 4)], multi_label=False))
    assert len(warned) == 1 and [len(outputs[0]) for _, outputs in found] == [1, 5, 4]
    assert sizes == [1, 2, 1, 2, 2, 2] and fake_cuda.num_emptied > 0
    small, _ = on_fake_cuda(fake_cuda, weights["rotated"], most=0)
    with pytest.raises(DeviceMemoryError, match="too small for 1 tiles of 32 x 32 px"):
        list(small.stream([pixels(1)], multi_label=False))


# ---------------------------------------------------------------- torch.compile


def test_no_compiler(weights, monkeypatch):
    from torch._inductor.exc import InvalidCxxCompiler

    def no_compiler(images):
        raise InvalidCxxCompiler

    asked = []
    monkeypatch.setattr(torch, "compile", lambda graph, **options: asked.append(options) or no_compiler)
    engine = TorchBackend(weights["rotated"], device="cpu", compiled=True)
    assert asked == [{"dynamic": False}] * 2
    with pytest.raises(
        EngineError, match=r"torch.compile failed on cpu \(.*needs a C\+\+ compiler such as g\+\+: inst"
    ):
        engine.predict(pixels(1), score_threshold=0.3)


def test_other_errors_stay_what_they_are(weights, monkeypatch):
    engine = TorchBackend(weights["rotated"], device="cpu")

    def broken(images):
        raise RuntimeError("something else")

    monkeypatch.setattr(engine, "_graphs", {False: broken})
    with pytest.raises(RuntimeError, match="something else"):
        engine.predict(pixels(1), score_threshold=0.3)


@pytest.mark.slow
def test_compiled_gives_the_same(weights):
    tiles = make_check_tiles(2, 3, 128, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own: of its imports and of the processor
        compiled = TorchBackend(weights["rotated"], device="cpu", threads=1, compiled=True)
        assert_near(TorchBackend(weights["rotated"], device="cpu", threads=1), compiled, tiles, px=0.05, score=1e-3)


# ---------------------------------------------------------------- on a CUDA device


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_gpu_equals_cpu(weights, kind, cuda_graphs):
    cpu = TorchBackend(weights[kind], device="cpu", threads=1)
    gpu = TorchBackend(weights[kind], device="cuda", cuda_graphs=cuda_graphs)
    assert gpu.precision == "fp32" and gpu.best_batch_size == 8 and gpu.device_name == "cuda:0"
    tiles = make_check_tiles(8, 3, 128, seed=1)
    assert_near(cpu, gpu, tiles, px=0.05, score=1e-3)
    assert gpu._runner is not None and gpu._runner.num_graphs == (1 if cuda_graphs else 0)
    for index in range(8):  # batch 1 equals batch 8
        assert_near(cpu, gpu, tiles[index : index + 1], px=0.05, score=1e-3)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("name", ["sen2ships_r", "banepa_ins"])
def test_half_precision_on_a_gpu(name, precision):
    if precision == "bf16" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU has no bf16")
    weights = CATALOG[name].weights_path
    cpu, gpu = TorchBackend(weights, device="cpu"), TorchBackend(weights, device="cuda", precision=precision)
    tiles = make_check_tiles(4, len(cpu.spec.bands), 256, seed=0)
    threshold, px, score = HALF[precision]
    assert_near(cpu, gpu, tiles, px, score, score_threshold=threshold)
    for index in range(4):
        assert_near(cpu, gpu, tiles[index : index + 1], px, score, score_threshold=threshold)


@pytest.mark.gpu
@needs_gpu
def test_compiled_on_a_gpu(weights):
    tiles = make_check_tiles(2, 3, 128, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        compiled = TorchBackend(weights["rotated"], device="cuda", compiled=True)
        assert_near(TorchBackend(weights["rotated"], device="cpu"), compiled, tiles, px=0.05, score=1e-3)
    assert compiled._runner is not None and compiled._runner.num_graphs == 1


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_pixels_that_are_on_a_gpu(weights, cuda_graphs):
    engine = TorchBackend(weights["rotated"], device="cuda", cuda_graphs=cuda_graphs)
    batches = [make_check_tiles(4, 3, 128, seed=seed) for seed in range(4)]
    found = [engine.raw_on_device(torch.from_numpy(images).cuda()) for images in batches]
    for images, outputs in zip(batches, found, strict=True):
        for one, other in zip(outputs, engine.raw(images), strict=True):
            assert one.is_cuda
            np.testing.assert_allclose(one.cpu().numpy(), other, atol=1e-3)


@pytest.mark.gpu
@needs_gpu
def test_gpu_streams_in_order_from_several_threads(weights):
    engine = TorchBackend(weights["rotated"], device="cuda")
    batches = [make_check_tiles(number, 3, 128, seed=seed) for seed, number in enumerate((4, 4, 1, 4, 2, 4) * 3)]
    expected = [engine.raw(images) for images in batches]
    found: dict[int, list] = {}

    def work(name: int) -> None:
        found[name] = list(engine.stream(batches))

    threads = [threading.Thread(target=work, args=(name,)) for name in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results in found.values():
        assert [shape for shape, _ in results] == [images.shape for images in batches]
        for (_, outputs), wanted in zip(results, expected, strict=True):
            for one, other in zip(outputs, wanted, strict=True):
                np.testing.assert_allclose(one, other, atol=1e-3)
    assert len(found) == 3


@pytest.mark.gpu
@needs_gpu
def test_gpu_memory_that_is_too_small(weights):
    """A cap on this process's memory stands for a small GPU."""
    tiles = make_check_tiles(16, 3, 512, seed=0)
    expected = TorchBackend(weights["rotated"], device="cpu", threads=4).raw(tiles[:2], multi_label=False)
    engine = TorchBackend(weights["rotated"], device="cuda")
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    try:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 400 * 2**20) / total)
        with pytest.warns(BatchHalvedWarning):
            found = engine.raw(np.concatenate([tiles] * 4), multi_label=False)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert len(found[0]) == 64
    np.testing.assert_allclose(np.sort(found[1][0]), np.sort(expected[1][0]), atol=1e-3)
