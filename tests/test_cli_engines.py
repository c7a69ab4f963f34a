"""``rtmdet-geo engines``: what is here, what is missing and how to get it, without loading any of it."""

from __future__ import annotations

import importlib.metadata
import json
import sys
import types

import pytest
from fake_cuda import FakeCuda
from fake_tensorrt import VERSIONS, install
from synthetic import make_spec, small_model, small_network
from test_cli import run
from test_startup import loaded_modules

from rtmdet_geo import __version__
from rtmdet_geo.backends import BACKEND_NAMES, engines, open_backend
from rtmdet_geo.backends.engines import list_engines
from rtmdet_geo.cli.engines import format_engines
from rtmdet_geo.models.weights import save_weights

CPUINFO = """processor\t: 0
model name\t: Some(R) CPU @ 2.0GHz
flags\t\t: fpu vme avx2 avx512f avx512_bf16 amx_bf16 fsgsbase
"""


@pytest.fixture
def installed(monkeypatch) -> dict[str, str]:
    """Versions by package, instead of this environment's; to be changed by the test."""
    versions = {"onnxruntime": "1.2.3", "torch": "2.9.0+cu128", "numpy": "2.0"}

    def version(package: str) -> str:
        if package not in versions:
            raise importlib.metadata.PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(importlib.metadata, "version", version)
    return versions


@pytest.fixture
def gpus(tmp_path, monkeypatch) -> None:
    """Two GPUs, by an nvidia-smi that is first on the path."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 'NVIDIA X, 550.1, 80 MiB'\necho 'NVIDIA Y, 550.1, 80 MiB'\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")


@pytest.fixture
def no_gpu(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


def test_installed_missing_and_remedies(installed, no_gpu):
    found = {engine.name: engine for engine in list_engines().engines}
    assert set(found) == set(BACKEND_NAMES) - {"auto"}
    assert found["onnxruntime"].version == "1.2.3" and found["onnxruntime"].devices == ("cpu",)
    assert found["onnxruntime"].problem is None
    assert found["openvino"].version is None and found["openvino"].devices == ()
    assert found["openvino"].problem == "not installed; run: pip install 'rtmdet-geo[openvino]'"
    assert found["torch"].devices == ("cpu",)


def test_nothing_installed(installed, no_gpu):
    installed.clear()
    found = list_engines()
    assert [engine.version for engine in found.engines] == [None] * 4
    assert [choice.problem for choice in found.choices] == [
        "not installed; run: pip install onnxruntime",
        "not installed; run: pip install 'rtmdet-geo[train]'",
    ]
    text = run("engines").stdout
    assert "but onnxruntime: not installed; run: pip install onnxruntime\n" in text
    assert "but torch: not installed; run: pip install 'rtmdet-geo[train]'\n" in text


def test_other_builds_of_a_package(installed, no_gpu):
    installed["onnxruntime-gpu"] = installed.pop("onnxruntime")
    assert list_engines().engines[2].version == "1.2.3 (onnxruntime-gpu)"


@pytest.mark.parametrize("version,devices", [("2.9.0+cu128", ("cpu", "cuda:0", "cuda:1")), ("2.9.0+cpu", ("cpu",))])
def test_gpus(installed, gpus, version, devices):
    installed["torch"] = version
    found = list_engines()
    assert found.machine["gpus"] == ("NVIDIA X, 550.1, 80 MiB", "NVIDIA Y, 550.1, 80 MiB")
    assert found.engines[1].devices == devices


def test_a_driver_without_a_device_is_no_gpu(installed, tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'No devices were found'\nexit 6\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert list_engines().machine["gpus"] == ()


def test_auto_is_what_opens(tmp_path, one_thread):
    """The report and `open_backend` agree."""
    weights = tmp_path / "small.safetensors"
    save_weights(small_network("rotated"), weights, make_spec())
    opened = [open_backend(path, threads=1).name for path in (small_model(), weights)]
    assert [choice.engine for choice in list_engines().choices] == opened


def test_processor(tmp_path):
    source = tmp_path / "cpuinfo"
    source.write_text(CPUINFO, encoding="utf-8")
    assert engines._describe_cpu(source) == (
        "Some(R) CPU @ 2.0GHz",
        ("avx2", "avx512f", "avx512_bf16", "amx_bf16"),
    )
    source.write_text("processor\t: 0\nFeatures\t: fp asimd i8mm bf16\n", encoding="utf-8")
    assert engines._describe_cpu(source)[1] == ("asimd", "i8mm", "bf16")
    assert engines._describe_cpu(tmp_path / "none")[1] == ()


@pytest.mark.parametrize("error", [ImportError("libcore.so.3 is\nmissing"), OSError("libcore.so.3 is\nmissing")])
def test_load_shows_what_is_broken(installed, no_gpu, monkeypatch, error):
    installed["openvino"] = "2026.4.1"

    def load(module: str) -> types.ModuleType:
        if module == "openvino":
            raise error
        return sys.modules[module]

    monkeypatch.setattr("importlib.import_module", load)
    assert list_engines().engines[3].problem is None
    broken = list_engines(load=True).engines[3]
    assert broken.problem == "cannot be loaded (libcore.so.3 is missing); install it again" and broken.devices == ()


def test_load_asks_torch(installed, gpus, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert list_engines().engines[1].devices == ("cpu", "cuda:0", "cuda:1")
    assert list_engines(load=True).engines[1].devices == ("cpu", "cuda:0")


def test_command(installed, no_gpu):
    text = run("engines").stdout
    assert "for model files (.onnx): onnxruntime; " in text and "published names): torch; " in text
    assert f"rtmdet-geo    {__version__}\n" in text and "openvino      not installed\n" in text
    assert "gpus          none seen\n" in text and all(len(line) <= 120 for line in text.splitlines())
    facts = json.loads(run("engines", "--json").stdout)
    assert [engine["name"] for engine in facts["engines"]] == ["tensorrt", "torch", "onnxruntime", "openvino"]
    assert facts["machine"]["torch"] == "2.9.0+cu128" and facts["machine"]["gpus"] == []


def test_no_engine_is_loaded():
    command = [sys.executable, "-m", "rtmdet_geo.cli", "engines"]
    assert not loaded_modules(command) & {"torch", "onnxruntime", "openvino", "rasterio"}


def test_load_asks_cuda_for_tensorrts_devices(installed, gpus, monkeypatch):
    """What nvidia-smi names need not be what CUDA answers for."""
    installed |= {"tensorrt": "8.6.1", "cuda-python": "12.6.0"}
    found = list_engines()
    assert [choice.engine for choice in found.choices] == ["tensorrt", "torch"]
    assert found.engines[0].devices == ("cuda:0", "cuda:1")
    install(monkeypatch, VERSIONS[0])
    found = list_engines(load=True)
    assert found.engines[0].problem is None and found.engines[0].devices == ("cuda:0",)
    assert found.machine["cuda_devices"] == ("cuda:0 NVIDIA Fake 4000, compute capability 8.6",)
    assert (found.machine["cuda_of_driver"], found.machine["cuda_of_cuda_python"]) == ("12.4", "12.9")


def test_a_driver_that_cuda_does_not_find(installed, gpus, monkeypatch):
    installed |= {"tensorrt": "8.6.1", "cuda-python": "12.6.0"}
    install(monkeypatch, VERSIONS[0], FakeCuda(gpus=[]))
    found = list_engines(load=True)
    assert "update the NVIDIA driver" in found.engines[0].problem and found.choices[0].engine == "onnxruntime"
    assert "the GPU's best, tensorrt: " in found.choices[0].reason
    assert "cuda devices         none seen" in format_engines(found)


def test_a_version_of_tensorrt_that_is_not_supported(installed, gpus, monkeypatch):
    installed |= {"tensorrt": "10.2.0", "cuda-python": "12.6.0"}
    install(monkeypatch, VERSIONS[0]).__version__ = "10.2.0"
    engine = list_engines(load=True).engines[0]
    assert "10.2.0 is not supported" in engine.problem and engine.devices == ()


def test_tensorrt_without_the_bindings_of_cuda(installed, gpus):
    installed["tensorrt"] = "11.4.0"
    assert "cuda-python is not installed" in list_engines().engines[0].problem
