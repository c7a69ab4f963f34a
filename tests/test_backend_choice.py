"""Which engine `open_backend` takes, what each refuses, and that a fall back is said in one line."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
from synthetic import make_spec, small_model, small_network

from rtmdet_geo.backends import choose_batch_size, gpus, open_backend, openers
from rtmdet_geo.detect import detect_scene
from rtmdet_geo.errors import ConfigError, EngineError, MissingDependencyError
from rtmdet_geo.models.weights import save_weights

SCENE = Path(__file__).parent / "data" / "casablanca.tif"


class Opened:
    """Stands for an engine; remembers how it was asked for."""

    def __init__(self, name: str, device_name: str, wish: openers.Wish) -> None:
        """Remember."""
        self.name, self.device_name, self.wish = name, device_name, wish


@pytest.fixture
def machine(monkeypatch):
    """Set which GPUs there are, and what each engine does when it is opened: a device, or an error."""

    def build(named=("NVIDIA X",), **behaviour):
        def opener(name):
            def open_it(wish):
                what = behaviour.get(name, MissingDependencyError(f"{name} is missing"))
                if isinstance(what, Exception):
                    raise what
                return Opened(name, what, wish)

            return open_it

        monkeypatch.setattr(gpus, "find_gpus", lambda: tuple(named))
        for name in ("tensorrt", "torch", "onnxruntime"):
            monkeypatch.setattr(openers, f"_open_{name}", opener(name))

    return build


def said(caplog) -> list[str]:
    """Return what a user sees without -v."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_laptop_does_not_notice_that_tensorrt_exists(machine, caplog):
    machine(named=(), onnxruntime="cpu", torch="cpu", tensorrt="cuda:0")
    assert open_backend(small_model()).name == "onnxruntime" and said(caplog) == []


def test_a_gpu_server_takes_tensorrt(machine, caplog):
    machine(onnxruntime="cpu", torch="cuda:0", tensorrt="cuda:0")
    engine = open_backend(small_model(), batch_size=16, tile_size=512, precision="fp32")
    assert engine.name == "tensorrt" and said(caplog) == []
    assert (engine.wish.batch_size, engine.wish.tile_size, engine.wish.precision) == (16, 512, "fp32")


@pytest.mark.parametrize("error", [MissingDependencyError("tensorrt is missing"), EngineError("no engine")])
def test_fall_back_to_torch_where_weights_lie_beside(machine, caplog, error):
    machine(onnxruntime="cuda:0", torch="cuda:0", tensorrt=error)
    engine = open_backend("sen2ships_r")
    assert engine.name == "torch" and engine.wish.weights.endswith("sen2ships_r.safetensors")
    assert said(caplog) == [f"{error}; going on with torch on cuda:0"]


@pytest.mark.parametrize(
    "torch", ["cpu", MissingDependencyError("torch is missing"), ConfigError("device 'cuda' is not here")]
)
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_fall_back_to_onnxruntime(machine, caplog, torch, device):
    machine(onnxruntime=device, torch=torch)
    assert open_backend("sen2ships_r").name == "onnxruntime"
    assert said(caplog) == [f"tensorrt is missing; going on with onnxruntime on {device}"]
    assert open_backend(small_model()).name == "onnxruntime"  # no weights beside it


@pytest.mark.parametrize("gpus", [(), ("NVIDIA X",)])
@pytest.mark.parametrize("wanted", [{"precision": "bf16"}, {"compiled": True}])
def test_what_torch_alone_does_is_torchs(machine, caplog, gpus, wanted):
    machine(gpus=gpus, onnxruntime="cpu", torch="cpu", tensorrt="cuda:0")
    assert open_backend("sen2ships_r", **wanted).name == "torch" and said(caplog) == []


def test_images_of_several_sizes_leave_tensorrt_out(machine, caplog):
    machine(onnxruntime="cpu", tensorrt="cuda:0")
    assert open_backend(small_model(), any_size=True).name == "onnxruntime"
    assert "images of one size" in said(caplog)[0]


def test_cpu_and_names_are_obeyed(machine):
    machine(onnxruntime="cpu", tensorrt="cuda:0")
    assert open_backend(small_model(), device="cpu").name == "onnxruntime"


def test_what_fails_last_is_what_is_said(machine):
    machine(onnxruntime=EngineError("onnxruntime has no CUDA"), torch=ConfigError("no"))
    with pytest.raises(EngineError, match="onnxruntime has no CUDA"):
        open_backend("sen2ships_r", device="cuda")


def test_engines_files_are_tensorrts(machine):
    machine(named=(), tensorrt=EngineError("no GPU"))
    with pytest.raises(EngineError, match="no GPU"):
        open_backend("ships.engine")


@pytest.mark.parametrize(
    "words,settings",
    [
        ("backend 'fast' is unknown; choose one of auto, tensorrt, torch, onnxruntime, openvino", {"name": "fast"}),
        ("precision 'int4' is unknown; choose one of auto, fp32, fp16, bf16", {"precision": "int4"}),
        ("onnxruntime runs .* in its own precision, fp32, not fp16; .*export --precision fp16", {"precision": "fp16"}),
        ("openvino runs .* own precision, fp32, not bf16; .*with torch", {"name": "openvino", "precision": "bf16"}),
        ("only torch compiles its kernels, not onnxruntime", {"compiled": True}),
        ("only torch compiles its kernels, not openvino", {"name": "openvino", "compiled": True}),
        ("device 'cuda' is not supported by the openvino backend", {"name": "openvino", "device": "cuda"}),
        ("candidates per level are fixed", {"candidates": 30000}),
        ("is a model file, which tensorrt, onnxruntime and openvino run", {"name": "torch"}),
    ],
)
def test_what_an_engine_does_not_do(words, settings):
    with pytest.raises(ConfigError, match=words):
        open_backend(small_model(), **settings)


def test_its_own_precision_may_be_said():
    assert open_backend(small_model(), precision="fp32", threads=1).name == "onnxruntime"


@pytest.mark.parametrize("name", ["tensorrt", "onnxruntime", "openvino"])
def test_weights_are_torchs(tmp_path, name):
    path = tmp_path / "small.safetensors"
    save_weights(small_network("rotated"), path, make_spec())
    with pytest.raises(ConfigError, match=f"holds weights, which torch runs, not {name}"):
        open_backend(path, name=name)


def test_tensorrt_by_name_names_the_remedy():
    with pytest.raises(MissingDependencyError, match=r"pip install 'rtmdet-geo\[tensorrt\]'"):
        open_backend(small_model(), name="tensorrt")


@pytest.mark.parametrize("name", ["torch", "onnxruntime", "openvino"])
def test_engines_of_tensorrt_are_not_for_others(name, tmp_path):
    with pytest.raises(ConfigError, match=rf"ships\.engine' is an engine of TensorRT, which {name} cannot read"):
        open_backend(tmp_path / "ships.engine", name=name)


@pytest.mark.parametrize(
    "line,words",
    [
        ((), "nvidia-smi names none: leave the backend out"),
        (("NVIDIA L4, 580.65.06, 23034 MiB",), r"^run: pip install 'rtmdet-geo\[tensorrt\]'$"),
        (
            ("NVIDIA L4, 550.54.15, 23034 MiB",),
            "pip install tensorrt-cu12 'cuda-python<13' onnx .driver 550 knows CUDA 12",
        ),
        (("Tesla T4, 470.10, 15 MiB",), "470, is too old: update it to 525"),
    ],
)
def test_what_to_install(line, words):
    assert re.search(words, gpus.tensorrt_remedy(line))


def test_batch_sizes(one_thread):
    class Likes:
        best_batch_size = 8

    assert choose_batch_size(Likes(), None) == 8 and choose_batch_size(Likes(), 3) == 3
    assert choose_batch_size(object(), None) == 1
    with pytest.raises(ConfigError, match="batch_size=0 must be at least 1"):
        choose_batch_size(Likes(), 0)


def test_a_run_records_its_engine(one_thread):
    parameters = detect_scene(SCENE, threads=1).attrs["summary"]["parameters"]
    assert [parameters[name] for name in ("backend", "device", "precision", "batch_size")] == [
        *("onnxruntime", "cpu", "fp32", 1)
    ]
