"""Where TensorRT's engines lie: the user's cache by a key of all that they depend on, or a file that the user named.

An engine is two files: the plan ``NAME.engine``, which TensorRT reads and which holds code for one sort of GPU, and its
description ``NAME.engine.json``, written last. A plan is opened only when the description has its SHA-256 and fits this
machine. What does not is built again in the cache; of a named file the user is told. Timing caches make later builds on
the same GPU quicker.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from rtmdet_geo import __version__
from rtmdet_geo.backends.cuda import Device
from rtmdet_geo.cache import cache_dir
from rtmdet_geo.catalog import ENGINE_SUFFIX, file_sha256
from rtmdet_geo.errors import EngineError, ModelFileError, OutputError
from rtmdet_geo.outputs import staged_output
from rtmdet_geo.structures import ModelSpec

logger = logging.getLogger(__name__)

#: How much effort TensorRT spends on a build, 0 to 5; 3 is its own default.
OPTIMIZATION_LEVEL = 3
#: Key fields that an engine shares with the machine that runs it, in words.
_MACHINE = {
    "tensorrt": "TensorRT",
    "system": "system",
    "machine": "processor family",
    "gpu": "GPU",
    "compute_capability": "compute capability",
    "multiprocessors": "multiprocessors",
}
#: What an engine for compatible GPUs need not share, by its level of compatibility.
_FREE = {
    "none": (),
    "same_compute_capability": ("gpu", "multiprocessors"),
    "ampere_plus": ("gpu", "multiprocessors", "compute_capability"),
}
#: Bytes of a SHA-256, which timing caches begin with.
_DIGEST_BYTES = 32

Key = dict[str, Any]
Precision = Literal["fp32", "fp16"]


@dataclass(frozen=True)
class Order:
    """What an engine is to be.

    Attributes:
        model_file: ``.onnx``.
        spec: what it says of itself.
        precision: of the engine's convolutions.
        image_size: height and width of the images in px.
        takes_any_size: whether the model file takes other sizes as well.
        batches: fewest and most images at once.
        workspace_bytes: device memory that a layer may use for itself.
        compatibility: key of what else it runs on, see ``HardwareCompatibilityLevel`` of TensorRT.
        device: that it is built on.
    """

    model_file: Path
    spec: ModelSpec
    precision: Precision
    image_size: tuple[int, int]
    takes_any_size: bool
    batches: tuple[int, int]
    workspace_bytes: int
    compatibility: str
    device: Device

    def key(self, version: str) -> Key:
        """Return all that the engine depends on, as it is written to its description.

        Args:
            version: of TensorRT.
        """
        image = [len(self.spec.bands), *self.image_size]
        least, most = ([number, *image] for number in self.batches)
        return {
            "model_sha256": file_sha256(self.model_file),
            "precision": self.precision,
            "profile": [least, most, most],
            "optimization_level": OPTIMIZATION_LEVEL,
            "workspace_bytes": self.workspace_bytes,
            "compatibility": self.compatibility,
            "exporter": f"rtmdet-geo {__version__}",
            "memory_bytes": self.device.memory_bytes,
            "l2_bytes": self.device.l2_bytes,
            **machine_key(self.device, version),
        }


def machine_key(device: Device, version: str) -> Key:
    """Return what an engine shares with the machine that runs it."""
    return {
        "tensorrt": version,
        "system": platform.system(),
        "machine": platform.machine(),
        "gpu": device.label,
        "compute_capability": list(device.compute_capability),
        "multiprocessors": device.num_multiprocessors,
    }


class Description(BaseModel):
    """What lies beside an engine.

    Attributes:
        spec: of the model, with precision, tile size and differences of this engine.
        key: see :meth:`Order.key`.
        max_batch: most images at once.
        compatibility: see :class:`Order`.
        layers: what TensorRT says of the built layers, see :func:`rtmdet_geo.backends.trt_check.count_layers`.
        engine_sha256: of the plan.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal[1] = 1
    spec: ModelSpec
    key: Key
    max_batch: int
    compatibility: str
    layers: dict[str, int]
    engine_sha256: str


def description_of(engine: Path) -> Path:
    """Return the place of an engine's description."""
    return engine.with_name(engine.name + ".json")


def place_of(order: Order, key: Key) -> Path:
    """Return the place of an engine in the user's cache."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return engines_folder() / f"{_slug(order.spec.name)}_{order.precision}_{digest[:20]}{ENGINE_SUFFIX}"


def stamp_of(path: Path) -> int | None:
    """Return when an engine's description, which comes last, was written, in ns; None: there is none."""
    try:
        return description_of(path).stat().st_mtime_ns
    except OSError:
        return None


def engines_folder() -> Path:
    """Return the folder of engines and timing caches; it need not exist."""
    return cache_dir() / "engines"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def write_engine(path: Path, plan: bytes, description: Description) -> None:
    """Write an engine, its description last.

    Raises:
        OutputError: the operating system refuses.
    """
    try:
        description_of(path).unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"cannot replace {str(description_of(path))!r}: {error.strerror}") from error
    with staged_output(path) as staged:
        staged.write_bytes(plan)
    with staged_output(description_of(path)) as staged:
        staged.write_text(description.model_dump_json(indent=1), encoding="utf-8")


def read_engine(path: Path, device: Device, version: str) -> tuple[bytes, Description]:
    """Return an engine's plan and description, if they are whole and made for this machine.

    Args:
        path: of the plan.
        device: that is to run it.
        version: of TensorRT.

    Raises:
        ModelFileError: a file is missing or damaged.
        EngineError: it was built for another GPU or by another TensorRT.
    """
    description = read_description(path)
    difference = _other_machine(description, machine_key(device, version))
    if difference:
        raise EngineError(
            f"{str(path)!r} was built for another machine ({difference}); build it here: rtmdet-geo export MODEL -o "
            f"{path.name}"
        )
    plan = _read(path)
    if hashlib.sha256(plan).hexdigest() != description.engine_sha256:
        raise ModelFileError(
            f"{str(path)!r} is damaged ({len(plan)} bytes with another SHA-256 than its description has); copy it "
            "again together with its .json, or build it again"
        )
    return plan, description


def read_description(path: Path) -> Description:
    """Return what lies beside an engine, whatever machine it is for.

    Raises:
        ModelFileError: the engine or its description is missing, or the latter is damaged.
    """
    if not path.is_file():
        raise ModelFileError(f"engine {str(path)!r} is not there")
    beside = description_of(path)
    if not beside.is_file():
        raise ModelFileError(
            f"{str(beside)!r} is missing, without which nobody knows what {path.name!r} is; copy both files, or build "
            f"the engine again: rtmdet-geo export MODEL -o {path.name}"
        )
    try:
        return Description.model_validate_json(_read(beside))
    except ValidationError as error:
        raise ModelFileError(
            f"{str(beside)!r} is no description of an engine ({error.error_count()} faults); build the engine again"
        ) from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelFileError(f"cannot read {str(path)!r}: {error.strerror}; check its permissions") from error


def _other_machine(description: Description, here: Mapping[str, Any]) -> str:
    """Return in words what differs from this machine, of what must not; "" if nothing does."""
    free = _FREE.get(description.compatibility, ())
    built = description.key
    differences = [
        f"{words}: {_in_words(built.get(field))}, here {_in_words(here[field])}"
        for field, words in _MACHINE.items()
        if field not in free and built.get(field) != here[field]
    ]
    if description.compatibility == "ampere_plus" and here["compute_capability"] < [8, 0]:
        differences.append(f"compute capability: 8.0 or later, here {_in_words(here['compute_capability'])}")
    return "; ".join(differences)


def _in_words(value: Any) -> str:
    return ".".join(map(str, value)) if isinstance(value, list) else str(value)


def timing_cache_of(device: Device, version: str) -> Path:
    """Return the place of the timing cache of a sort of GPU and a version of TensorRT."""
    major, minor = device.compute_capability
    return engines_folder() / f"timings_{_slug(device.label)}_{major}.{minor}_tensorrt-{version}.cache"


def read_timings(path: Path) -> bytes:
    """Return a timing cache; b"" if there is none, or one that is damaged or cannot be read, which is logged."""
    if not path.is_file():
        return b""
    try:
        data = _read(path)
    except ModelFileError as error:
        logger.warning("%s; the timing cache is made anew", error)
        return b""
    digest, timings = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
    if hashlib.sha256(timings).digest() != digest:
        logger.warning("timing cache %s is damaged; it is made anew", path)
        return b""
    return timings


def write_timings(path: Path, timings: bytes) -> None:
    """Write a timing cache; a failure costs later builds some minutes and is logged."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with staged_output(path) as staged:
            staged.write_bytes(hashlib.sha256(timings).digest() + timings)
    except (OSError, OutputError) as error:
        logger.warning("the timing cache is not kept: %s", error)
