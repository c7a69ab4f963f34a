"""Checkpoints of other programs (.pth, .pt, .ckpt of torch; safetensors without ModelSpec), read without running them.

Both of torch's formats are read: the zip archive (since 1.6) and the legacy sequence of pickles before it. What the
file pickles is parsed by :mod:`rtmdet_geo.models.inert_pickle`; only the tensors of the one state_dict that is wanted
are read. Formats: torch's ``serialization.py``; the code is our own.
"""

from __future__ import annotations

import io
import logging
import math
import os
import struct
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rtmdet_geo.errors import WeightsError
from rtmdet_geo.models.inert_pickle import Placeholder, StorageReference, TensorReference, load_inert

logger = logging.getLogger(__name__)

State = dict[str, Tensor]
_References = dict[str, TensorReference]
_Item = TypeVar("_Item")
_ReadStorage = Callable[[StorageReference], Tensor]

#: First number in a legacy file (torch/serialization.py, MAGIC_NUMBER).
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16"),
        *("int64", "int32", "int16", "int8", "uint8", "bool"),
    )
}
#: Where programs keep averaged weights, in order of preference.
_AVERAGED_KEYS = ("state_dict_ema", "model_ema", "ema_model", "ema", "ema_state_dict")
#: Where programs keep weights.
_PLAIN_KEYS = ("state_dict", "model_state_dict", "model", "network", "net", "weights", "module")
#: What damaged files make Python's zip reader and safetensors raise (an encrypted archive: RuntimeError).
_DAMAGE = (OSError, SafetensorError, zipfile.BadZipFile, struct.error, EOFError, RuntimeError, ValueError)
#: What wrappers put before every name: DDP and averaged models, Lightning, torch.compile.
_WRAPPERS = ("module.", "model.", "_orig_mod.")
#: Counters and constants of training that are no weights: mmengine's and torch's averaged models, mmdet's preprocessor.
_NO_WEIGHTS = ("steps", "n_averaged")
_PREPROCESSOR = "data_preprocessor."


@dataclass(frozen=True, slots=True)
class ForeignCheckpoint:
    """What a foreign file holds.

    Attributes:
        state: tensors by name, prefixes of wrappers removed; aliases share storage if they did in the file.
        key: where in the file the state_dict was, such as "state_dict"; "" the file is one.
        classes: class names that the file states (mmengine, mmcv); empty if it does not.
    """

    state: State
    key: str
    classes: tuple[str, ...]


def read_foreign(path: str | os.PathLike[str]) -> ForeignCheckpoint:
    """Read the weights in a checkpoint of torch, or in a safetensors file, whatever program wrote it.

    Nothing in the file is executed. Where a file holds averaged (EMA) weights beside plain ones, the averaged are
    taken. mmengine swaps the two when it saves (mmengine/hooks/ema_hook.py, ``_swap_ema_state_dict``): in its files
    ``state_dict`` holds the averages and ``ema_state_dict``, known by its counter ``steps``, the plain weights.

    Raises:
        WeightsError: the file is missing or damaged, or holds no state_dict.
    """
    path = Path(path)
    try:
        if path.suffix.lower() == ".safetensors":
            return ForeignCheckpoint(_without_wrappers(load_file(path), path), "", ())
        with _opened(path) as (root, read):
            key, references = _find_state(root, path)
            references = _without_wrappers(references, path)
            state = {name: _build(reference, read, name) for name, reference in references.items()}
            return ForeignCheckpoint(state, key, _find_classes(root))
    except WeightsError as error:
        if repr(str(path)) in str(error):
            raise
        raise WeightsError(f"cannot read weights {str(path)!r}: {error}") from error
    except _DAMAGE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise WeightsError(
            f"cannot read weights {str(path)!r} ({reason}); is it a complete checkpoint? Fetch it again"
        ) from error


def fit_names(names: Collection[str], own: Collection[str]) -> dict[str, str]:
    """Return {name in the file: name in the network} for names that differ by a prefix only.

    Bare backbones and backbones below ``backbone.``, heads called ``head`` and ``bbox_head``, a bare linear layer.

    Args:
        names: of the file.
        own: of the network.

    Example:
        >>> fit_names(["stem.0.conv.weight", "neck.x"], ["backbone.stem.0.conv.weight", "neck.x"])
        {'stem.0.conv.weight': 'backbone.stem.0.conv.weight', 'neck.x': 'neck.x'}
    """
    fitted: dict[str, str] = {}
    taken = set(names)
    for name in names:
        head = name.removeprefix("head.")
        others = (f"backbone.{name}", name.removeprefix("backbone."), f"bbox_head.{head}", f"head.{name}")
        found = [other for other in others if other in own and other not in taken]
        fitted[name] = found[0] if name not in own and found else name
        taken.add(fitted[name])
    return fitted


# ---------------------------------------------------------------- which tensors


def _find_state(root: Any, path: Path) -> tuple[str, _References]:
    """Return where the weights are, and references to them."""
    found = _search(root, depth=3)
    if found is not None:
        if found[0]:
            logger.info("%s: weights under %r are taken", path.name, found[0])
        return found
    if isinstance(root, dict):
        what = f"keys {', '.join(repr(key[:40]) for key in root if isinstance(key, str))[:300] or 'that are no text'}"
    else:
        what = f"an object of {root.what}, saved whole" if isinstance(root, Placeholder) else f"a {type(root).__name__}"
    raise WeightsError(f"{str(path)!r} holds no state_dict but {what}; save `model.state_dict()` with its own program")


def _search(value: Any, depth: int) -> tuple[str, _References] | None:
    if not isinstance(value, dict) or depth < 0:
        return None
    items = {key: item for key, item in value.items() if isinstance(key, str) and isinstance(item, TensorReference)}
    if any("." in key for key in items):
        return "", items
    averaged = value.get("ema_state_dict")
    is_swapped = isinstance(averaged, dict) and "steps" in averaged and "state_dict" in value  # see read_foreign
    for key in (*(() if is_swapped else _AVERAGED_KEYS), *_PLAIN_KEYS):
        found = _search(value.get(key), depth - 1)
        if found is not None:
            return f"{key}.{found[0]}" if found[0] else key, found[1]
    return None


def _without_wrappers(state: Mapping[str, _Item], path: Path) -> dict[str, _Item]:
    """Remove what is no weight, and prefixes that all names have in common."""
    kept = {name: item for name, item in state.items() if name not in _NO_WEIGHTS}
    while kept:
        prefix = next((wrapper for wrapper in _WRAPPERS if all(name.startswith(wrapper) for name in kept)), None)
        if prefix is None:
            break
        kept = {name.removeprefix(prefix): item for name, item in kept.items()}
    buffers = {f"ema_{name.replace('.', '_')}" for name in kept}  # mmcv's hook registered averages so
    kept = {name: item for name, item in kept.items() if name not in buffers and not name.startswith(_PREPROCESSOR)}
    if len(kept) < len(state):
        logger.info("%s: %d entries that are no weights are left out", path.name, len(state) - len(kept))
    return kept


def _find_classes(root: Any) -> tuple[str, ...]:
    """Return the class names that OpenMMLab's programs write into ``meta``, or nothing."""
    meta = root.get("meta") if isinstance(root, dict) else None
    if not isinstance(meta, dict):
        return ()
    for place in (meta.get("dataset_meta"), meta):
        if isinstance(place, dict):
            for key in ("classes", "CLASSES"):
                names = place.get(key)
                if isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names):
                    return tuple(names)
    return ()


# ---------------------------------------------------------------- containers


def _build(reference: TensorReference, read: _ReadStorage, name: str) -> Tensor:
    """Make a tensor, after a look that it stays within its numbers and repeats none of them."""
    storage = read(reference.storage)
    offset = reference.storage.offset + reference.offset
    shape, stride = reference.shape, reference.stride
    count = math.prod(shape)
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if count else 0
    if max((count, *shape, *stride)) >= 1 << 40 or count > storage.numel() or last >= max(storage.numel(), 1):
        raise WeightsError(f"tensor {name!r} reaches beyond its {storage.numel()} numbers; the file is damaged")
    return torch.as_strided(storage, shape, stride, offset) if count else torch.empty(shape, dtype=storage.dtype)


def _dtype(reference: StorageReference) -> torch.dtype:
    if reference.dtype not in _DTYPES:
        raise WeightsError(f"the file holds numbers of type {reference.dtype!r}, which this version does not read")
    return _DTYPES[reference.dtype]


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, _ReadStorage]]:
    """Yield what the file pickles, and a function that reads a storage (each once, so that aliases stay aliases)."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(4)
        file.seek(0)
        root, locate = _open_zip(file, size) if start == b"PK\x03\x04" else _open_legacy(file, size)
        cache: State = {}

        def read(reference: StorageReference) -> Tensor:
            if reference.key not in cache:
                dtype = _dtype(reference)
                content = locate(reference)
                count = len(content) // dtype.itemsize
                cache[reference.key] = (
                    torch.frombuffer(content, dtype=dtype, count=count) if count else torch.empty(0, dtype=dtype)
                )
            return cache[reference.key]

        yield root, read


def _open_zip(file: IO[bytes], size: int) -> tuple[Any, Callable[[StorageReference], bytearray]]:
    """Read a zip archive: ``NAME/data.pkl`` and one file ``NAME/data/KEY`` for each storage."""
    archive = zipfile.ZipFile(file)
    names = [name for name in archive.namelist() if name.count("/") == 1]
    pickles = [name for name in names if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise WeightsError("it is a zip archive, but not one of torch: it has no data.pkl")
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}constants.pkl" in names:
        raise WeightsError("it is a TorchScript program; save its state_dict instead")

    def extract(name: str) -> bytearray:
        entry = archive.getinfo(name)
        if entry.compress_type != zipfile.ZIP_STORED or not 0 <= entry.file_size <= size:
            raise WeightsError(f"entry {name!r} is compressed or longer than the file; torch writes no such archive")
        content = bytearray(entry.file_size)
        view = memoryview(content)
        with archive.open(entry) as stream:
            while view and (number := stream.readinto(view)):  # type: ignore[attr-defined]
                view = view[number:]
        if view:
            raise WeightsError(f"entry {name!r} is cut off")
        return content

    order = bytes(extract(f"{folder}byteorder")) if f"{folder}byteorder" in names else b"little"
    if order != b"little":
        raise WeightsError(f"its numbers are in {order.decode(errors='replace')!r}-endian order, which is not read")

    def locate(reference: StorageReference) -> bytearray:
        try:
            return extract(f"{folder}data/{reference.key}")
        except KeyError as error:
            raise WeightsError(f"storage {reference.key!r} is missing; the file is damaged") from error

    return load_inert(io.BytesIO(extract(pickles[0]))), locate


def _open_legacy(file: IO[bytes], size: int) -> tuple[Any, Callable[[StorageReference], bytearray]]:
    """Read the format before 1.6: magic number, protocol, system, object, keys; then count and numbers of each key."""
    stream = cast(IO[bytes], _Bounded(file, size))
    if load_inert(stream) != _LEGACY_MAGIC:
        raise WeightsError("it is no checkpoint of torch (neither a zip archive nor the format before 1.6)")
    load_inert(stream)
    system = load_inert(stream)
    if isinstance(system, dict) and system.get("little_endian") is False:
        raise WeightsError("its numbers are in big-endian order, which is not read")
    storages: dict[str, StorageReference] = {}
    root = load_inert(stream, storages)
    places: dict[str, tuple[int, int]] = {}
    keys = load_inert(stream)
    if not isinstance(keys, list) or not all(isinstance(key, str) and key in storages for key in keys):
        raise WeightsError("its list of storages does not fit its tensors")
    for key in keys:
        (count,) = struct.unpack("<q", stream.read(8))
        length = count * _dtype(storages[key]).itemsize
        places[key] = file.tell(), length
        if count < 0 or file.tell() + length > size:
            raise WeightsError("it ends before its numbers do")
        file.seek(length, os.SEEK_CUR)

    def locate(reference: StorageReference) -> bytearray:
        if reference.key not in places:
            raise WeightsError(f"storage {reference.key!r} is missing")
        position, length = places[reference.key]
        content = bytearray(length)
        file.seek(position)
        if file.readinto(content) != length:  # type: ignore[attr-defined]
            raise WeightsError("it ends before its numbers do")
        return content

    return root, locate


class _Bounded:
    """A stream that never allocates more than is left of its file, whatever length a pickle states.

    A line, which in a pickle is a name or a number, ends after 64 KiB at most.
    """

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self._size = file, size
        self.tell = file.tell

    def read(self, length: int = -1) -> bytes:
        left = self._size - self._file.tell()
        return self._file.read(left if length < 0 else min(length, left))

    def readline(self) -> bytes:
        return self._file.readline(1 << 16)
