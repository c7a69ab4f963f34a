"""What of TensorRT's and cuda-python's interfaces the backend uses, read from the real packages into a small manifest.

`tests/golden/tensorrt_api.json` holds it for several versions. One is added where its packages can be imported::

    python tests/tensorrt_manifest.py tests/golden/tensorrt_api.json
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

#: Members of classes that the backend uses, as far as a version has them.
USED = {
    "Builder": "__init__ create_network create_builder_config create_optimization_profile build_serialized_network",
    "EngineInspector": "execution_context get_engine_information",
    "IBuilderConfig": "set_memory_pool_limit builder_optimization_level profiling_verbosity set_flag clear_flag "
    "hardware_compatibility_level add_optimization_profile create_timing_cache set_timing_cache progress_monitor",
    "ICudaEngine": "num_io_tensors get_tensor_name get_tensor_mode get_tensor_dtype get_tensor_shape "
    "get_tensor_profile_shape create_execution_context create_engine_inspector",
    "IExecutionContext": "set_input_shape infer_shapes get_tensor_shape set_tensor_address execute_async_v3",
    "ILayer": "name type num_outputs get_output precision set_output_type",
    "ILogger": "__init__ log Severity",
    "INetworkDefinition": "num_layers get_layer",
    "IOptimizationProfile": "set_shape",
    "IProgressMonitor": "__init__ phase_start step_complete phase_finish",
    "ITensor": "dtype is_shape_tensor",
    "ITimingCache": "serialize",
    "OnnxParser": "__init__ parse num_errors get_error",
    "ParserError": "__str__",
    "Runtime": "__init__ deserialize_cuda_engine",
}
ENUMERATIONS = ["BuilderFlag", "DataType", "HardwareCompatibilityLevel", "LayerInformationFormat", "LayerType"]
ENUMERATIONS += ["MemoryPoolType", "NetworkDefinitionCreationFlag", "ProfilingVerbosity", "TensorIOMode"]
CUDA_FUNCTIONS = ["cudaGetDeviceCount", "cudaGetDeviceProperties", "cudaSetDevice", "cudaDriverGetVersion"]
CUDA_FUNCTIONS += ["cudaRuntimeGetVersion", "cudaGetErrorName", "cudaGetErrorString", "cudaMalloc", "cudaFree"]
CUDA_FUNCTIONS += ["cudaMallocHost", "cudaFreeHost", "cudaMemcpyAsync", "cudaStreamCreateWithFlags"]
CUDA_FUNCTIONS += ["cudaStreamDestroy", "cudaStreamSynchronize", "cudaStreamWaitEvent", "cudaStreamBeginCapture"]
CUDA_FUNCTIONS += ["cudaStreamEndCapture", "cudaEventCreateWithFlags", "cudaEventRecord", "cudaEventSynchronize"]
CUDA_FUNCTIONS += ["cudaEventDestroy", "cudaGraphInstantiate", "cudaGraphLaunch", "cudaGraphExecDestroy"]
CUDA_FUNCTIONS += ["cudaGraphDestroy"]
CUDA_CONSTANTS = ["cudaStreamNonBlocking", "cudaEventDisableTiming", "cudaEventBlockingSync"]
CUDA_MEMBERS = {
    "cudaError_t": ["cudaSuccess", "cudaErrorMemoryAllocation", "cudaErrorInsufficientDriver", "cudaErrorNoDevice"],
    "cudaMemcpyKind": ["cudaMemcpyHostToDevice", "cudaMemcpyDeviceToHost"],
    "cudaStreamCaptureMode": ["cudaStreamCaptureModeThreadLocal"],
}
DEVICE_FIELDS = ["name", "major", "minor", "multiProcessorCount", "totalGlobalMem", "l2CacheSize"]


def signatures(member: Any) -> list[list[str]] | None:
    """Return the parameters of each overload, by the docstring that pybind11 or Cython wrote; None: no function."""
    text = getattr(member, "__doc__", None) or ""
    if not callable(member) or "(" not in text:
        return None
    lines = [re.sub(r"^\d+\. ", "", line.strip()) for line in text.splitlines()]
    calls = [line for line in lines if re.match(r"\w+\(.*\)( ->.*)?$", line)]
    calls = [line for line in calls if "*args" not in line] or calls
    return [_parameters(line[line.index("(") + 1 : line.rindex(")")]) for line in calls]


def _parameters(text: str) -> list[str]:
    """Return the names in "self: X, flags: int = 0"; a default marks its name with "="."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[(<{") - (letter in "])>}")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    names = []
    for part in filter(None, (part.strip() for part in parts)):
        name = re.split(r"[:=]", part)[0].split()[-1]
        if name != "self":
            names.append(name + ("=" if "=" in part else ""))
    return names


def describe_tensorrt(trt: Any) -> dict[str, Any]:
    """Return what a version of TensorRT has of what the backend uses."""
    classes = {}
    for name, members in USED.items():
        if hasattr(trt, name):
            owner = getattr(trt, name)
            classes[name] = {item: signatures(getattr(owner, item)) for item in members.split() if hasattr(owner, item)}
    enumerations = {name: _values(getattr(trt, name)) for name in ENUMERATIONS}
    enumerations["Severity"] = _values(trt.ILogger.Severity)
    return {"classes": classes, "enumerations": enumerations}


def _values(enumeration: Any) -> dict[str, int]:
    return {name: int(value) for name, value in enumeration.__members__.items()}


def describe_cuda(runtime: Any) -> dict[str, Any]:
    """Return what a version of cuda-python has of what the backend uses."""
    return {
        "functions": {name: signatures(getattr(runtime, name)) for name in CUDA_FUNCTIONS if hasattr(runtime, name)},
        "constants": {name: getattr(runtime, name) for name in CUDA_CONSTANTS if hasattr(runtime, name)},
        "enumerations": {
            name: {item: int(getattr(getattr(runtime, name), item)) for item in items}
            for name, items in CUDA_MEMBERS.items()
        },
        "device": [name for name in DEVICE_FIELDS if hasattr(runtime.cudaDeviceProp, name)],
    }


def main(path: Path) -> None:
    """Add the installed versions to the manifest."""
    manifest = json.loads(path.read_text()) if path.is_file() else {"tensorrt": {}, "cuda": {}}
    for name in ("tensorrt", "tensorrt_bindings"):
        try:
            trt = importlib.import_module(name)
        except ImportError:
            continue
        manifest["tensorrt"][trt.__version__] = describe_tensorrt(trt)
        break
    for name in ("cuda.bindings.runtime", "cuda.cudart"):
        try:
            runtime = importlib.import_module(name)
        except ImportError:
            continue
        version = runtime.cudaRuntimeGetVersion()[1]
        manifest["cuda"][f"{name} {version // 1000}.{version % 1000 // 10}"] = describe_cuda(runtime)
        break
    path.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
