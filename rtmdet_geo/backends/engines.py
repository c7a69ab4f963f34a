"""Which engines this machine has, which one `auto` takes and why, and what a report of a fault should name.

Nothing heavy is loaded unless it is asked for: versions come from the packages' metadata, GPUs from nvidia-smi.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rtmdet_geo import __version__
from rtmdet_geo.backends import require_package
from rtmdet_geo.backends.gpus import find_gpus, tensorrt_remedy
from rtmdet_geo.cores import usable_cores
from rtmdet_geo.errors import MissingDependencyError

#: Features of processors that engines use, as /proc/cpuinfo names them (x86, then Arm).
_CPU_FEATURES = (
    *("sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimdhp", "asimddp", "sve", "i8mm", "bf16"),
)
_TENSORRT_PACKAGES = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu11")
_ONNXRUNTIME_PACKAGES = ("onnxruntime-gpu", "onnxruntime", "onnxruntime-openvino", "onnxruntime-directml")
#: Any of them brings the bindings of CUDA's runtime.
_CUDA_PACKAGES = ("cuda-python", "cuda-bindings")
_WEIGHTS = "weights (.safetensors, .pth, published names)"


@dataclass(frozen=True, slots=True)
class Engine:
    """One engine on this machine.

    Attributes:
        name: what ``--backend`` calls it.
        runs: "model files" or "weights".
        version: of the installed package, with its name where that is not the engine's; None: not installed.
        devices: where it runs, as ``--device`` calls them.
        problem: why it cannot be used, with the remedy; None: nothing is known against it.
    """

    name: str
    runs: str
    version: str | None
    devices: tuple[str, ...]
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """What `auto` takes for one sort of files.

    Attributes:
        files: the sort.
        engine: name of the engine.
        reason: why it.
        problem: why it cannot be used here, with the remedy; None: it can.
    """

    files: str
    engine: str
    reason: str
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class EngineReport:
    """Everything that :func:`list_engines` found.

    Attributes:
        engines: all that the program knows, installed or not.
        choices: what `auto` takes.
        machine: name -> value: versions, processor, GPUs.
    """

    engines: tuple[Engine, ...]
    choices: tuple[Choice, ...]
    machine: dict[str, Any]


def list_engines(*, load: bool = False) -> EngineReport:
    """Look for engines, and say what `auto` takes.

    Args:
        load: import each installed engine, which shows whether it works, and ask CUDA and torch for their devices.
            torch takes seconds. Without it, TensorRT and torch are taken to have the GPUs that nvidia-smi names, unless
            torch is its CPU build.
    """
    gpus = find_gpus()
    engines: tuple[Engine, ...] = (
        _needing_gpu(_find_engine("tensorrt", _TENSORRT_PACKAGES, extra="tensorrt", gpus=gpus), gpus),
        _find_engine("torch", ("torch",), extra="train", gpus=gpus),
        _find_engine("onnxruntime", _ONNXRUNTIME_PACKAGES, gpus=gpus),
        _find_engine("openvino", ("openvino",), extra="openvino"),
    )
    machine = _describe_machine(engines, gpus)
    if load:
        engines = tuple(map(_loaded, engines))
        machine |= _describe_cuda()
    return EngineReport(engines, _choices(engines, gpus), machine)


def _find_engine(name: str, packages: Iterable[str], *, extra: str | None = None, gpus: tuple[str, ...] = ()) -> Engine:
    """Return what the metadata of an engine's packages say; the first that is there counts."""
    runs = "weights" if name == "torch" else "model files"
    found = {package: version for package in packages if (version := _version_of(package)) is not None}
    if not found:
        wanted = f"'rtmdet-geo[{extra}]'" if extra else name
        remedy = tensorrt_remedy(gpus) if name == "tensorrt" else f"run: pip install {wanted}"
        return Engine(name, runs, None, (), f"not installed; {remedy}")
    package, version = next(iter(found.items()))
    has_gpus = name == "tensorrt" or package == "onnxruntime-gpu" or (name == "torch" and not version.endswith("+cpu"))
    cuda = (f"cuda:{index}" for index in range(len(gpus) if has_gpus else 0))
    devices = (*(() if name == "tensorrt" else ("cpu",)), *cuda)
    return Engine(name, runs, version if package == name else f"{version} ({package})", devices)


def _needing_gpu(engine: Engine, gpus: tuple[str, ...]) -> Engine:
    """Say what TensorRT lacks beside its own package."""
    if not gpus:
        return replace(engine, problem="needs an NVIDIA GPU and its driver; nvidia-smi names none")
    if engine.problem is not None:
        return engine
    if all(_version_of(package) is None for package in _CUDA_PACKAGES):
        return replace(engine, problem=f"cuda-python is not installed; {tensorrt_remedy(gpus)}")
    return engine


def _version_of(package: str) -> str | None:
    """Return a package's version by its metadata; None: it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _loaded(engine: Engine) -> Engine:
    """Import an engine; a failure becomes its problem, and who knows devices is asked for them."""
    if engine.version is None:
        return engine
    try:
        require_package(engine.name)
    except MissingDependencyError as error:
        reason = error.__cause__ or error
        text = f"cannot be loaded ({' '.join(str(reason).split())}); install it again"
        return replace(engine, devices=(), problem=text)
    if engine.name == "torch":
        from rtmdet_geo.backends.pytorch import list_devices

        return replace(engine, devices=list_devices())
    return _asked_for_gpus(engine) if engine.name == "tensorrt" else engine


def _asked_for_gpus(engine: Engine) -> Engine:
    """Return TensorRT with the GPUs that CUDA gives to it, or with what keeps it from them."""
    from rtmdet_geo.backends.cuda import describe_devices
    from rtmdet_geo.backends.trt_load import load_tensorrt

    try:
        load_tensorrt()
    except MissingDependencyError as error:  # a version that is not supported
        return replace(engine, devices=(), problem=str(error))
    found = describe_devices()
    names = tuple(device.name for device in found.devices)
    return replace(engine, devices=names, problem=engine.problem or found.problem)


def _describe_cuda() -> dict[str, Any]:
    """Return the GPUs that CUDA gives to programs, and the CUDA that driver and cuda-python are of; nothing without."""
    if all(_version_of(package) is None for package in _CUDA_PACKAGES):
        return {}
    from rtmdet_geo.backends.cuda import describe_devices

    found = describe_devices()
    names = tuple(
        f"{one.name} {one.label}, compute capability {'.'.join(map(str, one.compute_capability))}"
        for one in found.devices
    )
    return {"cuda_devices": names, "cuda_of_driver": found.driver, "cuda_of_cuda_python": found.runtime}


def _choices(engines: tuple[Engine, ...], gpus: tuple[str, ...]) -> tuple[Choice, ...]:
    """Return what :func:`rtmdet_geo.backends.open_backend` takes for ``auto``."""
    by_name = {engine.name: engine for engine in engines}
    torch = by_name["torch"]
    weights = Choice(_WEIGHTS, "torch", "no other engine runs weights without an export", torch.problem)
    name, reason = "onnxruntime", "every installation has it, and all others are compared with it"
    if gpus and by_name["tensorrt"].problem is None:
        name, reason = "tensorrt", "the fastest on this machine's GPU; in fp16"
    elif gpus:
        missing = f"the GPU's best, tensorrt: {by_name['tensorrt'].problem}"
        reason = f"{missing}; without it, the GPU runs bundled models by torch" if _has_cuda(torch) else missing
        reason += (
            ""
            if _has_cuda(by_name["onnxruntime"])
            else "; for other files on the GPU: pip uninstall onnxruntime; pip install 'onnxruntime-gpu[cuda,cudnn]'"
        )
    return (Choice("model files (.onnx)", name, reason, by_name[name].problem), weights)


def _has_cuda(engine: Engine) -> bool:
    return engine.problem is None and any(device.startswith("cuda") for device in engine.devices)


def _describe_machine(engines: tuple[Engine, ...], gpus: tuple[str, ...]) -> dict[str, Any]:
    """Return versions, processor and GPUs by name."""
    model, features = _describe_cpu()
    return {
        "rtmdet-geo": __version__,
        "python": platform.python_version(),
        "numpy": _version_of("numpy"),
        "onnx": _version_of("onnx"),
        "cuda_python": next(filter(None, map(_version_of, _CUDA_PACKAGES)), None),
        **{engine.name: engine.version for engine in engines},
        "system": platform.platform(),
        "cpu": model,
        "cpu_features": features,
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "gpus": gpus,
    }


def _describe_cpu(source: Path = Path("/proc/cpuinfo")) -> tuple[str, tuple[str, ...]]:
    """Return the processor's name and those of its features that engines use; none where the system hides them."""
    name = platform.processor() or platform.machine()
    if not source.is_file():
        return name, ()
    lines = (line.partition(":") for line in source.read_text(encoding="utf-8", errors="replace").splitlines())
    facts = {key.strip().lower(): value.strip() for key, colon, value in lines if colon}
    flags = set(facts.get("flags", facts.get("features", "")).split())
    return facts.get("model name", name), tuple(feature for feature in _CPU_FEATURES if feature in flags)
