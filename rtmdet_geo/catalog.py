"""What models exist, where their files lie, and what a model file says of itself. No torch, no onnxruntime.

Three tables: models that come with the package (here), networks that can be built (``variants.py``), published weights
for them (``checkpoints.py``). No name is in two of them.

A model file carries its :class:`~rtmdet_geo.structures.ModelSpec` as JSON under the metadata key ``model_spec``: in an
ONNX file among ``metadata_props``, in a safetensors file in the header's ``__metadata__``. Both are read here without
loading a single weight, so ``rtmdet-geo models list`` costs milliseconds.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import json
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from rtmdet_geo.checkpoints import CHECKPOINTS, Checkpoint, download_checkpoint
from rtmdet_geo.errors import MissingDependencyError, ModelFileError, UnknownModelError
from rtmdet_geo.variants import VARIANTS

if TYPE_CHECKING:
    from rtmdet_geo.structures import ModelSpec

logger = logging.getLogger(__name__)

ASSETS = Path(__file__).parent / "assets"
#: Metadata key that holds the ModelSpec as JSON.
SPEC_KEY = "model_spec"
#: Metadata key that holds the SHA-256 of an ONNX file's graph (weights included) as JSON text.
GRAPH_SHA256_KEY = "graph_sha256"
#: Suffixes of files that hold a ModelSpec.
MODEL_SUFFIXES = (".onnx", ".safetensors")
#: Suffixes of weights: ours, and foreign files of torch.
WEIGHTS_SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
#: Of an engine of TensorRT.
ENGINE_SUFFIX = ".engine"
#: A safetensors header longer than this is taken as a sign of another file type (the format's own limit is 100 MB).
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """One model that can be asked for by name.

    Attributes:
        name: what ``--model`` takes.
        file_name: file in ``rtmdet_geo/assets``.
        summary: one line for ``rtmdet-geo models list``.
        flops: multiply-adds for one of its tiles.
    """

    name: str
    file_name: str
    summary: str
    flops: int

    @property
    def path(self) -> Path:
        """Where the file lies."""
        return ASSETS / self.file_name

    @property
    def weights_path(self) -> Path:
        """Where the same weights lie for training to start from (safetensors)."""
        return self.path.with_suffix(".safetensors")

    @property
    def params(self) -> int:
        """Trainable numbers."""
        return count_stored_parameters(self.weights_path)

    @property
    def is_available(self) -> bool:
        """Whether the file is there."""
        return self.path.is_file()


CATALOG: dict[str, CatalogEntry] = {
    "banepa_ins": CatalogEntry(
        "banepa_ins",
        "banepa_ins.onnx",
        "outlines of buildings in aerial orthophotos of 0.1 to 0.3 m a pixel",
        5_133_652_224,
    ),
    "sen2ships_r": CatalogEntry(
        "sen2ships_r",
        "sen2ships_r.onnx",
        "oriented boxes of ships in 10 m Sentinel-2 scenes (colour, with or without near infrared)",
        9_228_604_416,
    ),
}
DEFAULT_MODEL = "sen2ships_r"


def list_models() -> list[CatalogEntry]:
    """Return every entry of the catalogue, in the order of their names."""
    return [CATALOG[name] for name in sorted(CATALOG)]


def find_model(name_or_path: str | os.PathLike[str] | None = None) -> Path:
    """Return the file that a name or a path stands for, to be opened by an engine; None is the bundled default model.

    That is a model file, or weights for the torch engine. Published weights that are not in the cache are downloaded. A
    catalogue name wins over a file of the same name in the working directory; write ``./NAME`` for the file.

    Raises:
        UnknownModelError: it is no name of a model or of weights and no path; the message lists near names.
        ModelFileError: it is a path and there is no file, or the bundled file is missing.
        MissingDependencyError: published weights are asked for and torch is not installed.
        DownloadError, ChecksumError: see :func:`rtmdet_geo.cache.download`.

    Example:
        >>> find_model("sen2ships_r").name
        'sen2ships_r.onnx'
    """
    text = os.fspath(name_or_path) if name_or_path is not None else DEFAULT_MODEL
    if text in CATALOG:
        entry = CATALOG[text]
        if not entry.is_available:
            raise ModelFileError(
                f"model {text!r} should lie at {str(entry.path)!r} but does not; reinstall rtmdet-geo or pass a path"
            )
        return entry.path
    if text in CHECKPOINTS:
        if CHECKPOINTS[text].spec().kind == "classification":
            raise ModelFileError(f"{text!r} classifies whole images and finds no objects; use `rtmdet-geo classify -m`")
        if importlib.util.find_spec("torch") is None:  # said before the download
            raise MissingDependencyError(
                f"published weights such as {text!r} run in PyTorch, which is not installed; run: "
                "pip install 'rtmdet-geo[train]'"
            )
        return find_weights(text)
    path = Path(text)
    if path.is_file():
        return path
    if path.suffix.lower() in {*MODEL_SUFFIXES, *WEIGHTS_SUFFIXES} or len(path.parts) > 1 or path.is_dir():
        what = "a folder, not a model file" if path.is_dir() else "not there"
        raise ModelFileError(f"model file {text!r} is {what}; see `rtmdet-geo models list` for names")
    if text in VARIANTS:
        trained = [name for name, checkpoint in CHECKPOINTS.items() if checkpoint.variant == text]
        hint = f"published weights for it: {', '.join(trained)}" if trained else "train it (`rtmdet-geo train`)"
        raise UnknownModelError(f"{text!r} is a network to train, not a trained model; {hint}")
    near = difflib.get_close_matches(text, [*CATALOG, *CHECKPOINTS], n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known names: {', '.join(sorted(CATALOG))}"
    raise UnknownModelError(f"no model is named {text!r} and no file has that path; {hint}")


def find_weights(name_or_path: str | os.PathLike[str]) -> Path:
    """Return the weights file to start training from: a bundled model's, published weights, or the path itself.

    Published weights that are not in the cache are downloaded.

    Raises:
        ModelFileError: the file is missing, or holds no weights to start from.
        UnknownModelError: it is no name of the catalogue and no path.
        DownloadError, ChecksumError: see :func:`rtmdet_geo.cache.download`.
    """
    text = os.fspath(name_or_path)
    if text in CHECKPOINTS:
        checkpoint = CHECKPOINTS[text]
        if checkpoint.converted_path.is_file():
            return checkpoint.converted_path
        if not checkpoint.is_cached:
            logger.warning("%s is not in the cache: fetching %s", text, checkpoint.url)
        return download_checkpoint(text)
    path = CATALOG[text].weights_path if text in CATALOG else find_model(text)
    if not path.is_file() or path.suffix.lower() not in WEIGHTS_SUFFIXES:
        raise ModelFileError(
            f"{str(path)!r} is no weights file to start training from ({', '.join(WEIGHTS_SUFFIXES)}); "
            "name a catalogue model or a file"
        )
    return path


def find_spec(name_or_path: str | os.PathLike[str]) -> ModelSpec:
    """Return what weights say of themselves: bundled or published ones by name, or a file.

    Nothing is downloaded: published weights are described by the catalogue.

    Raises:
        ModelFileError: the file is missing, corrupt, or lacks a valid ``model_spec``.
        UnknownModelError: it is no name of the catalogue and no path.
    """
    text = os.fspath(name_or_path)
    return CHECKPOINTS[text].spec() if text in CHECKPOINTS else read_spec(find_weights(text))


def find_published(path: str | os.PathLike[str]) -> Checkpoint | None:
    """Return the published checkpoint that a file is by its name, downloaded or converted; None: none of them."""
    name = Path(path).name
    for checkpoint in CHECKPOINTS.values():
        if name in (checkpoint.file_name, checkpoint.converted_path.name):
            return checkpoint
    return None


def known_spec(path: str | os.PathLike[str]) -> ModelSpec | None:
    """Return what a model file or weights file is known to be without loading it; None: weights that do not say.

    Raises:
        ModelFileError: the file is missing or corrupt, or is an ONNX file without a valid ``model_spec``.
    """
    published = find_published(path)
    if published is not None:
        return published.spec()
    suffix = Path(path).suffix.lower()
    if suffix in WEIGHTS_SUFFIXES and (suffix != ".safetensors" or SPEC_KEY not in read_metadata(path)):
        return None
    return read_spec(path)


def count_stored_parameters(path: str | os.PathLike[str]) -> int:
    """Return the trainable numbers that a safetensors file holds, from its header: batch-norm statistics left out.

    Raises:
        ModelFileError: the file is missing or is no safetensors file.
    """
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    with _opened(path) as (file, size):
        header = _safetensors_header(file, size)
    return sum(
        math.prod(entry["shape"])
        for name, entry in header.items()
        if name != "__metadata__" and not name.endswith(buffers)
    )


def read_spec(path: str | os.PathLike[str]) -> ModelSpec:
    """Return the ModelSpec inside a model file (.onnx or .safetensors).

    Raises:
        ModelFileError: the file is missing, corrupt, or lacks a valid ``model_spec``.
    """
    from pydantic import ValidationError

    from rtmdet_geo.structures import ModelSpec

    text = read_metadata(path).get(SPEC_KEY)
    if text is None:
        raise ModelFileError(
            f"{os.fspath(path)!r} does not follow the model-file contract: metadata key {SPEC_KEY!r} is missing; "
            "export it with `rtmdet-geo export`"
        )
    try:
        return ModelSpec.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise ModelFileError(
            f"{os.fspath(path)!r} does not follow the model-file contract: {SPEC_KEY!r} is invalid at {where}: "
            f"{first['msg']}; export it again"
        ) from error


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return the text metadata of an ONNX or safetensors file without loading its weights.

    Raises:
        ModelFileError: the file is missing or is neither.
    """
    with _opened(path) as (file, size):
        if os.fspath(path).lower().endswith(".safetensors"):
            metadata = _safetensors_header(file, size).get("__metadata__", {})
            return {str(key): str(value) for key, value in metadata.items()}
        return _onnx_metadata(file, size)


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[tuple[BinaryIO, int]]:
    """Yield the open file and its size in bytes; failures to open or to parse it become ModelFileError."""
    try:
        with open(path, "rb") as file:
            yield file, os.fstat(file.fileno()).st_size
    except _MalformedError as error:
        raise ModelFileError(
            f"{os.fspath(path)!r} is no readable model file ({error}); it may be truncated: copy or export it again"
        ) from error
    except OSError as error:
        raise ModelFileError(f"cannot read model file {os.fspath(path)!r}: {error.strerror or error}") from error


def check_graph(path: str | os.PathLike[str]) -> None:
    """Compare an ONNX file's graph with the SHA-256 in its metadata; a file without one (a foreign one) passes.

    Raises:
        ModelFileError: they differ, or the file is missing or no ONNX file.
    """
    stated = read_metadata(path).get(GRAPH_SHA256_KEY)
    if stated is not None and stated != json.dumps(graph_sha256(path)):
        raise ModelFileError(f"{os.fspath(path)!r} is damaged: its graph is not what was exported; copy it again")


def graph_sha256(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of the graph in an ONNX file (its bytes, without the metadata) as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        for field, length in _onnx_fields(file, size):
            if field == 7:
                return hashlib.sha256(file.read(length)).hexdigest()
    raise ModelFileError(f"{os.fspath(path)!r} is no ONNX file: it holds no graph")


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _MalformedError(Exception):
    """The bytes are not what the format says."""


def _safetensors_header(file: BinaryIO, size: int) -> dict[str, dict[str, Any]]:
    """Header of a safetensors file: 8 bytes little-endian length, then JSON (safetensors README, "Format")."""
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
        raise _MalformedError("its safetensors header is cut off")
    try:
        header = json.loads(file.read(length))
    except ValueError as error:
        raise _MalformedError("its safetensors header is no JSON") from error
    if not isinstance(header, dict) or not all(isinstance(entry, dict) for entry in header.values()):
        raise _MalformedError("its safetensors header is no table")
    return header


def _onnx_metadata(file: BinaryIO, size: int) -> dict[str, str]:
    """Walk the top-level protobuf fields of a ModelProto; onnx.proto: 1 ir_version, 7 graph, 14 metadata_props."""
    metadata: dict[str, str] = {}
    seen: set[int] = set()
    for field, length in _onnx_fields(file, size):
        seen.add(field)
        if field == 14:
            key, value = _read_string_entry(file.read(length))
            metadata[key] = value
    if not {1, 7} <= seen:
        raise _MalformedError("not an ONNX file: it holds no graph" if size else "it is empty")
    return metadata


def _onnx_fields(file: BinaryIO, size: int) -> Iterator[tuple[int, int]]:
    """Yield (field, bytes) of the top-level protobuf fields, the file placed where the value begins.

    Numbers are read already and yield 0 bytes.
    """
    while file.tell() < size:
        field, wire_type = _read_key(file)
        if wire_type not in (0, 1, 2, 5):
            raise _MalformedError(f"not an ONNX file: wire type {wire_type}")
        length = {1: 8, 5: 4}.get(wire_type, 0)
        if wire_type in (0, 2):
            number = _read_varint(file)
            length = number if wire_type == 2 else 0
        end = file.tell() + length
        if end > size:
            raise _MalformedError(f"it ends {end - size} bytes too early")
        yield field, length
        file.seek(end)


def _read_string_entry(data: bytes) -> tuple[str, str]:
    """Decode a StringStringEntryProto: 1 key, 2 value."""
    import io

    stream = io.BytesIO(data)
    fields: dict[int, str] = {}
    while stream.tell() < len(data):
        field, wire_type = _read_key(stream)
        if wire_type != 2:
            raise _MalformedError("a metadata entry is no text")
        length = _read_varint(stream)
        try:
            fields[field] = stream.read(length).decode()
        except UnicodeDecodeError as error:
            raise _MalformedError("a metadata entry is no UTF-8") from error
    return fields.get(1, ""), fields.get(2, "")


def _read_key(file: BinaryIO) -> tuple[int, int]:
    key = _read_varint(file)
    return key >> 3, key & 7


def _read_varint(file: BinaryIO) -> int:
    """Base-128 varint, at most 10 bytes (protobuf encoding guide)."""
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            raise _MalformedError("it ends in the middle of a number")
        value |= (byte[0] & 0x7F) << shift
        if not byte[0] & 0x80:
            return value
    raise _MalformedError("not an ONNX file")
