"""NVIDIA GPUs of this machine as the driver's own tool names them, and what to install for them. Loads nothing."""

from __future__ import annotations

import re
import subprocess

#: Seconds that nvidia-smi may take; it waits for a driver that hangs.
_SECONDS = 20
#: Oldest drivers for CUDA 12 and 13 (NVIDIA's CUDA Compatibility, minor version compatibility).
_CUDA_12_DRIVER, _CUDA_13_DRIVER = 525, 580


def find_gpus() -> tuple[str, ...]:
    """Return name, driver and memory of the GPUs that nvidia-smi names; none without it or its driver."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(line.strip() for line in done.stdout.splitlines() if line.strip())


def tensorrt_remedy(gpus: tuple[str, ...]) -> str:
    """Return what to do to have TensorRT for these GPUs, see :func:`find_gpus`."""
    if not gpus:
        return (
            "it runs on NVIDIA GPUs only, and nvidia-smi names none: leave the backend out; where there is one, run: "
            "pip install 'rtmdet-geo[tensorrt]'"
        )
    found = re.search(r", (\d+)\.", gpus[0])
    driver = int(found[1]) if found else _CUDA_13_DRIVER
    if driver >= _CUDA_13_DRIVER:
        return "run: pip install 'rtmdet-geo[tensorrt]'"
    if driver >= _CUDA_12_DRIVER:
        return f"run: pip install tensorrt-cu12 'cuda-python<13' onnx (driver {driver} knows CUDA 12)"
    return f"its driver, {driver}, is too old: update it to {_CUDA_12_DRIVER} or later"
