"""onnxruntime on CUDA: which device it takes, what it says where it cannot, and the numbers where there is a GPU."""

from __future__ import annotations

import logging

import numpy as np
import onnxruntime
import pytest
from synthetic import small_model

from rtmdet_geo.backends import onnxrt
from rtmdet_geo.backends.onnxrt import OnnxRuntimeBackend
from rtmdet_geo.errors import BatchHalvedWarning, ConfigError, DeviceMemoryError, EngineError
from rtmdet_geo.export import make_check_tiles

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
TILES = make_check_tiles(4, 3, 96, seed=1)


class FakeBuild:
    """The GPU build of onnxruntime in front of the CPU's: what it was asked for, and what it got."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.got = [CUDA, CPU]
        self.fails: Exception | None = None
        self.room = 100
        self.asked: list[tuple[object, ...]] = []
        self.severities: list[int] = []
        fake, real = self, onnxruntime.InferenceSession

        class Session:
            def __init__(self, path: str, options: object, *, providers: list, enable_fallback: int) -> None:
                fake.asked.append((*providers, enable_fallback))
                self.is_cuda = providers != [CPU]
                if self.is_cuda and fake.fails is not None:
                    raise fake.fails
                self.session = real(path, options, providers=[CPU])

            def __getattr__(self, name: str) -> object:
                return getattr(self.session, name)

            def get_providers(self) -> list[str]:
                return fake.got if self.is_cuda else [CPU]

            def run(self, names: list[str], inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
                if len(inputs["images"]) > fake.room:
                    raise RuntimeError(
                        "Non-zero status code returned while running Conv node. Failed to allocate memory"
                    )
                return self.session.run(names, inputs)

        def preload_dlls() -> None:
            print("Failed to load libcublasLt.so.13: no such file\nFailed to load others")

        monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["TensorrtExecutionProvider", CUDA, CPU])
        monkeypatch.setattr(onnxruntime, "preload_dlls", preload_dlls, raising=False)
        monkeypatch.setattr(onnxruntime, "set_default_logger_severity", self.severities.append)


@pytest.fixture
def gpu_build(monkeypatch) -> FakeBuild:
    return FakeBuild(monkeypatch)


@pytest.mark.parametrize("device,index", [("auto", 0), ("cuda", 0), ("cuda:3", 3)])
def test_cuda_that_works(gpu_build, capsys, device, index):
    engine = OnnxRuntimeBackend(small_model(), threads=1, device=device)
    assert engine.device_name == f"cuda:{index}" and engine.best_batch_size == 8 and engine.name == "onnxruntime"
    assert gpu_build.asked[-1] == ((CUDA, {"device_id": index, "use_tf32": 0}), CPU, 0)
    assert gpu_build.severities == [4, 2] and capsys.readouterr() == ("", "")  # stdout is data
    assert len(engine.predict(TILES, score_threshold=0.2)) == 4


def test_cpu_is_taken_when_asked_for(gpu_build):
    engine = OnnxRuntimeBackend(small_model(), threads=1, device="cpu")
    assert engine.device_name == "cpu" and engine.best_batch_size == 1
    assert gpu_build.asked == [(CPU, 0)]


@pytest.mark.parametrize(
    "failure,words",
    [
        (None, "libcublasLt"),
        (RuntimeError("CUDA failure 100: no CUDA-capable device\nmore"), r"no CUDA-capable device\)"),
    ],
)
def test_cuda_that_does_not_work(gpu_build, caplog, failure, words):
    gpu_build.got, gpu_build.fails = [CPU], failure
    for device in ("cuda", "cuda:1"):
        with pytest.raises(EngineError, match=f"cannot run on cuda:.*{words}.*onnxruntime-gpu.*device 'cpu'") as caught:
            OnnxRuntimeBackend(small_model(), threads=1, device=device)
        assert "\n" not in str(caught.value)
    with caplog.at_level(logging.WARNING):
        assert OnnxRuntimeBackend(small_model(), threads=1).device_name == "cpu"
    (record,) = caplog.records
    assert "it runs on the CPU" in record.message


def test_cpu_build(monkeypatch, caplog):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["AzureExecutionProvider", CPU])
    monkeypatch.setattr(onnxrt, "find_gpus", tuple)
    with pytest.raises(EngineError, match=r"no cuda:0 is here: nvidia-smi names no NVIDIA GPU"):
        OnnxRuntimeBackend(small_model(), threads=1, device="cuda")
    monkeypatch.setattr(onnxrt, "find_gpus", lambda: ("NVIDIA X, 580.1, 8 MiB",))
    with pytest.raises(
        EngineError, match=r"is its CPU build; run: pip uninstall onnxruntime; pip install 'onnxruntime-g"
    ):
        OnnxRuntimeBackend(small_model(), threads=1, device="cuda")
    with caplog.at_level(logging.WARNING):
        assert OnnxRuntimeBackend(small_model(), threads=1).device_name == "cpu"
    assert not caplog.records  # nothing is missing: it is what the base installation has


@pytest.mark.parametrize("device", ["tpu", "cuda:", "cuda:x", "cuda0", ""])
def test_unknown_devices(device):
    with pytest.raises(ConfigError, match="choose 'auto', 'cpu', 'cuda' or 'cuda:N'"):
        OnnxRuntimeBackend(small_model(), device=device)


def test_memory_of_the_device(gpu_build):
    engine = OnnxRuntimeBackend(small_model(), threads=1, device="cuda")
    expected = engine.raw(TILES)
    gpu_build.room = 2
    with pytest.warns(BatchHalvedWarning, match="cuda:0 is too small for 4 tiles of 96 x 96 px"):
        found = engine.raw(TILES)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-3)
    gpu_build.room = 0
    with pytest.raises(DeviceMemoryError, match=r"too small for 1 tiles.* or choose device 'cpu'$"):
        engine.raw(TILES[:1])


@pytest.mark.gpu
@pytest.mark.skipif(CUDA not in onnxruntime.get_available_providers(), reason="onnxruntime-gpu is not installed")
@pytest.mark.parametrize("kind", ["rotated", "horizontal", "mask"])
def test_gpu_equals_cpu(kind):
    one, other = (OnnxRuntimeBackend(small_model(kind), threads=1, device=device) for device in ("cpu", "cuda"))
    assert other.device_name == "cuda:0"
    for mine, theirs in zip(
        one.predict(TILES, score_threshold=0.3), other.predict(TILES, score_threshold=0.3), strict=True
    ):
        sure = mine.scores >= 0.32
        distance = np.abs(mine.boxes[sure, None, :4] - theirs.boxes[None, :, :4]).max(axis=2)
        partner = distance.argmin(axis=1)
        assert sure.sum() > 3 and distance.min(axis=1).max() < 0.05
        np.testing.assert_allclose(mine.scores[sure], theirs.scores[partner], atol=1e-3)
