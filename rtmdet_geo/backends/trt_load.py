"""TensorRT itself: found, of a version that we know, its messages forwarded, engines opened and described.

8.6, 10 and 11 differ in what they have. Everywhere it is asked by name (``hasattr``) what is there, never by the
version's number or an enumeration's values, which shift.
"""

from __future__ import annotations

import functools
import logging
import re
from collections import deque
from dataclasses import dataclass
from typing import Any

from rtmdet_geo.backends import require_package
from rtmdet_geo.backends.contract import OUTPUTS, Sizes
from rtmdet_geo.backends.gpus import find_gpus, tensorrt_remedy
from rtmdet_geo.errors import DeviceMemoryError, EngineError, MissingDependencyError, ModelFileError
from rtmdet_geo.structures import ModelSpec

logger = logging.getLogger(__name__)

#: Oldest version, first that is too new, and those in between that are broken (as the tensorrt extra says).
OLDEST, TOO_NEW, BROKEN = (8, 6), (12,), ((10, 2, 0),)
#: Severities of TensorRT as levels of logging; its warnings concern builders of engines, not their users.
_LEVELS = {"INTERNAL_ERROR": logging.WARNING, "ERROR": logging.WARNING, "WARNING": logging.INFO}
#: Messages that an error names at most.
_NUM_MESSAGES = 3


def load_tensorrt() -> Any:
    """Return the module ``tensorrt``.

    Raises:
        MissingDependencyError: it is not installed, or of a version that is not supported.
    """
    try:
        trt = require_package("tensorrt", extra="tensorrt")
    except MissingDependencyError as error:
        reason = " ".join(str(error.__cause__).split())
        raise MissingDependencyError(
            f"tensorrt cannot be imported ({reason}); {tensorrt_remedy(find_gpus())}"
        ) from error
    version = tuple(int(part) for part in re.findall(r"\d+", trt.__version__)[:3])
    if not OLDEST <= version < TOO_NEW or version in BROKEN:
        raise MissingDependencyError(
            f"TensorRT {trt.__version__} is not supported (8.6 to 11 are, without 10.2.0); "
            + tensorrt_remedy(find_gpus())
        )
    return trt


class Messages:
    """What TensorRT says: forwarded to logging, the last errors kept for exceptions.

    Attributes:
        native: the object that TensorRT calls.
    """

    def __init__(self, trt: Any) -> None:
        """Make TensorRT's logger; the process has one (:func:`messages`)."""
        self._errors: deque[str] = deque(maxlen=_NUM_MESSAGES)
        errors = self._errors

        class Forward(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, msg: str) -> None:
                level = _LEVELS.get(severity.name, logging.DEBUG)
                if level == logging.WARNING:
                    errors.append(" ".join(msg.split()))
                logger.log(level, "TensorRT: %s", msg)

        self.native = Forward()

    def take_errors(self) -> str:
        """Return the last errors in one line, and forget them."""
        text = "; ".join(self._errors)
        self._errors.clear()
        return text

    def make(self, what: str, factory: Any, *arguments: Any) -> Any:
        """Return a new object of TensorRT.

        Raises:
            EngineError: TensorRT makes none, which its binding turns into a TypeError.
            DeviceMemoryError: for want of memory.
        """
        try:
            return factory(*arguments)
        except TypeError as error:
            raise self.failure(f"TensorRT makes no {what}") from error

    def failure(self, what: str) -> EngineError | DeviceMemoryError:
        """Return the error for something that TensorRT did not do, with its reasons.

        Args:
            what: it did not do, such as "TensorRT cannot build ...".
        """
        reasons = self.take_errors() or "it gives no reason"
        if re.search(r"out\s?of\s?memory|failed to allocate|requested amount of gpu memory", reasons, re.IGNORECASE):
            return DeviceMemoryError(f"{what}, the device's memory is too small: {reasons}")
        return EngineError(f"{what}: {reasons}")


@functools.lru_cache(maxsize=1)
def messages(trt: Any) -> Messages:
    """Return the one logger of the process; TensorRT takes no second."""
    return Messages(trt)


@dataclass(frozen=True)
class Engine:
    """An opened engine. Threads share it, each with contexts of its own.

    Attributes:
        trt: the module.
        native: TensorRT's engine.
        image_shape: C, H, W of the input.
        min_batch: fewest images at once; 1 unless the model file takes one number only.
        max_batch: most images at once.
        outputs: names of the contract's outputs, in its order.
        runtime: what opened it, which must not go before it.
    """

    trt: Any
    native: Any
    image_shape: tuple[int, int, int]
    min_batch: int
    max_batch: int
    outputs: tuple[str, ...]
    runtime: Any


def open_engine(trt: Any, plan: bytes, spec: ModelSpec) -> Engine:
    """Open an engine and check it against the contract.

    The calling thread's device is the engine's.

    Args:
        trt: see :func:`load_tensorrt`.
        plan: its bytes; they hold code that is executed, so only our own are opened, or what the user named.
        spec: what it is said to be.

    Raises:
        EngineError: TensorRT cannot read it here.
        DeviceMemoryError: the device's memory is too small for its weights.
        ModelFileError: it is not the engine that its spec describes.
    """
    log = messages(trt)
    log.take_errors()
    runtime = log.make("Runtime", trt.Runtime, log.native)
    native = runtime.deserialize_cuda_engine(plan)
    if native is None:
        raise log.failure("TensorRT cannot open the engine")
    return _describe(trt, runtime, native, spec)


def _describe(trt: Any, runtime: Any, native: Any, spec: ModelSpec) -> Engine:
    """Return the engine with its sizes, after a comparison with the contract.

    Raises:
        ModelFileError: it is another one.
    """
    names = [native.get_tensor_name(index) for index in range(native.num_io_tensors)]
    found = {name: _port(trt, native, name) for name in names}
    wanted = {"images": ("INPUT", "UINT8"), **dict.fromkeys(OUTPUTS[spec.kind], ("OUTPUT", "FLOAT"))}
    if {name: port[:2] for name, port in found.items()} != wanted:
        described = ", ".join(f"{name} {' '.join(port[:2])}" for name, port in found.items())
        raise ModelFileError(
            f"the engine's inputs and outputs are not those of kind {spec.kind!r} (it has {described}); build it again "
            "with `rtmdet-geo export`"
        )
    number, channels, height, width = found["images"][2]
    least = most = number
    if number < 0:  # a range of batch sizes
        least, _, most = (int(next(iter(shape))) for shape in native.get_tensor_profile_shape("images", 0))
    sizes = {name: found[name][2][1:] for name in OUTPUTS[spec.kind]}
    fits = all(_fits(shape, OUTPUTS[spec.kind][name], height, width) for name, shape in sizes.items())
    if channels != len(spec.bands) or not fits:
        raise ModelFileError(
            f"the engine contradicts its description: images {channels} x {height} x {width}, outputs {sizes}; build "
            "it again with `rtmdet-geo export`"
        )
    return Engine(trt, native, (channels, height, width), least, most, tuple(sizes), runtime)


def _port(trt: Any, native: Any, name: str) -> tuple[str, str, tuple[int, ...]]:
    """Return mode, type and shape of an input or output, -1 where a size is not fixed."""
    mode, dtype = native.get_tensor_mode(name), native.get_tensor_dtype(name)
    return mode.name, dtype.name, tuple(int(size) for size in native.get_tensor_shape(name))


def _fits(shape: tuple[int, ...], wanted: Sizes, height: int, width: int) -> bool:
    """Say whether an output's sizes, -1 where they follow from the input's, can be the contract's."""
    known = {"H/8": height // 8, "W/8": width // 8}
    pairs = zip(shape, (known.get(size, size) if isinstance(size, str) else size for size in wanted), strict=False)
    return len(shape) == len(wanted) and all(
        size == -1 or isinstance(want, str) or size == want for size, want in pairs
    )
