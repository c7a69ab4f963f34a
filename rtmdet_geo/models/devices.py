"""Which processor torch runs on, which precisions it has, and settings of torch that hold for the whole process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from rtmdet_geo.errors import ConfigError

#: Precisions by name; "auto" is fp32, which gives the numbers of all other engines.
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
#: Any of these says that a processor multiplies bf16 numbers itself (x86: avx512_bf16, amx_bf16; Arm: bf16).
_BF16_FEATURES = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
#: Where Linux names the processor's features, the same words as torch's.
_CPU_FILE = Path("/proc/cpuinfo")
#: The first CUDA devices with bf16 (Ampere).
_BF16_CAPABILITY = (8, 0)
#: Words in messages of torch, CUDA and cuDNN that mean that the memory is full; not all of them have a class.
_MEMORY_WORDS = ("out of memory", "can't allocate memory", "not enough memory", "CUDNN_STATUS_ALLOC_FAILED")

_exact_lock = threading.Lock()
_exact_holders = 0
_exact_settings = ExitStack()


def find_device(name: str) -> torch.device:
    """Return the device of that name: "auto" (cuda when there is one), "cpu", "cuda" or "cuda:N".

    Raises:
        ConfigError: no such device is here.
    """
    number = torch.cuda.device_count() if torch.cuda.is_available() else 0
    known = ["cpu", *(["cuda"] if number else []), *(f"cuda:{index}" for index in range(number))]
    if name == "auto":
        return torch.device("cuda" if number else "cpu")
    if name not in known:
        raise ConfigError(f"device {name!r} is not here; choose one of auto, {', '.join(known)}")
    return torch.device(name)


def with_number(device: torch.device) -> torch.device:
    """Return a device with its number: "cuda" alone is whichever the calling thread has chosen, and threads differ."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def choose_precision(name: str, device: torch.device) -> str:
    """Return the precision to compute in: a key of :data:`DTYPES`.

    Args:
        name: "auto" (fp32) or a key of :data:`DTYPES`.
        device: where the network runs.

    Raises:
        ConfigError: there is no such precision, or the device would be slower in it than in fp32.
    """
    if name == "auto":
        return "fp32"
    if name not in DTYPES:
        raise ConfigError(f"precision {name!r} is unknown to torch; choose one of auto, {', '.join(DTYPES)}")
    if device.type == "cpu" and name == "fp16":
        raise ConfigError("precision 'fp16' needs a CUDA device; on the CPU choose 'fp32', or 'bf16' where it has it")
    if device.type == "cpu" and name == "bf16" and not cpu_has_bf16():
        raise ConfigError(
            "this processor has no bf16 arithmetic (x86: avx512_bf16 or amx_bf16, Arm: bf16), so bf16 would be slower "
            "than fp32; choose precision 'fp32'"
        )
    if device.type == "cuda" and name == "bf16" and torch.cuda.get_device_capability(device) < _BF16_CAPABILITY:
        raise ConfigError(
            f"{torch.cuda.get_device_name(device)} has no bf16 arithmetic (it came with compute capability 8.0); "
            "choose precision 'fp16' or 'fp32'"
        )
    return name


def cpu_has_bf16() -> bool:
    """Say whether the processor multiplies bf16 numbers itself; torch also runs them, slowly, where it does not."""
    ask = getattr(torch.cpu, "get_capabilities", None)  # torch 2.4 does not have it
    if ask is not None:
        return any(value is True and name in _BF16_FEATURES for name, value in ask().items())
    words = _CPU_FILE.read_text(encoding="utf-8", errors="replace").split() if _CPU_FILE.is_file() else []
    return not _BF16_FEATURES.isdisjoint(words)


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error of torch means that a device's memory is too small."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or any(words in str(error) for words in _MEMORY_WORDS)


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """Let cuDNN compute fp32 convolutions in fp32 meanwhile, and choose its fastest algorithms by trying them.

    Left alone it takes TF32, which keeps 10 bits of 23 and moves boxes by more than the engines may differ. The
    settings are the whole process's: the first thread that enters makes them, the last one that leaves takes them back.
    """
    global _exact_holders
    with _exact_lock:
        if not _exact_holders:
            _exact_settings.enter_context(_set_exact())
        _exact_holders += 1
    try:
        yield
    finally:
        with _exact_lock:
            _exact_holders -= 1
            if not _exact_holders:
                _exact_settings.close()


@contextmanager
def _set_exact() -> Iterator[None]:
    """Make the settings of :func:`exact_convolutions`, and take them back."""
    cudnn = torch.backends.cudnn
    if not hasattr(cudnn, "conv"):  # torch before 2.9
        with cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
            yield
        return
    # By the new names alone: in a program that uses them, torch refuses even to be asked for the old ones.
    before = cudnn.benchmark, cudnn.conv.fp32_precision
    cudnn.benchmark, cudnn.conv.fp32_precision = True, "ieee"
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.conv.fp32_precision = before
