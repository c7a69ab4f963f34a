"""The journal of a run: what each finished tile left, on disk as soon as it is known, so that a killed run goes on.

A folder ``OUT.partial`` beside the output holds:

* ``run.json``: which run it is, scene, model and parameters. Another run cannot go on from it.
* ``tiles.bin``: one record for each finished tile, in the order in which they were done, appended and never changed. A
  record is 8 bytes (its length and CRC-32, little-endian), a line of JSON and arrays. One that a kill cut short is cut
  off, and its tile done again.
* ``lock``: held by the process that writes.

Records reach the operating system one by one, the disk once a second: SIGKILL loses the tile at hand, a power cut the
last second.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.annotations.outlines import Outline
from rtmdet_geo.cache import try_lock
from rtmdet_geo.errors import Cancelled, ConfigError, OutputError
from rtmdet_geo.stitch import Pieces, as_outlines, outlines_of
from rtmdet_geo.structures import Detections
from rtmdet_geo.tiles import TileGrid
from rtmdet_geo.vector_formats import ending_of

#: Of the files' layout; a journal of another one cannot be read.
JOURNAL_VERSION = 1
#: Seconds between two calls that wait for the disk.
SYNC_SECONDS = 1.0
_RECORD = struct.Struct("<II")


class TileRecord(NamedTuple):
    """What is left of one tile.

    Attributes:
        tile_id: index into the grid.
        is_empty: it has no valid pixel and was not run.
        num_saturated: 1 if it holds more candidates than the engine returns; engines that take several tiles at once
            count them at the first of the batch.
        pieces: survivors of NMS and border rule, or None where there are none.
    """

    tile_id: int
    is_empty: bool = False
    num_saturated: int = 0
    pieces: Pieces | None = None


def journal_folder(output: str | os.PathLike[str]) -> Path:
    """Return where the journal of a run lies that writes ``output``."""
    output = Path(output)
    return output.with_name(output.name + ".partial")


def partial_output(output: str | os.PathLike[str]) -> Path:
    """Return the name of what a cancelled run leaves: ``ships.partial.gpkg`` for ``ships.gpkg``."""
    output = Path(output)
    ending = ending_of(output)
    length = len(ending) if ending is not None else len(output.suffix)
    stem = output.name[: len(output.name) - length]
    return output.with_name(f"{stem}.partial{output.name[len(stem) :]}")


@dataclass
class Journal:
    """An open journal; :func:`open_journal` makes it.

    Attributes:
        folder: where it is.
        records: of the tiles that an earlier run finished, without their pieces.
        num_added: tiles of this run.
    """

    folder: Path
    records: list[TileRecord]
    _file: IO[bytes] = field(repr=False)
    _places: dict[int, int] = field(repr=False)  # of each tile with pieces: where its record begins
    num_added: int = 0
    _synced: float = field(default_factory=time.monotonic, repr=False)

    def add(self, record: TileRecord) -> None:
        """Append what is left of a tile.

        Raises:
            OutputError: the disk is full.
        """
        payload = _pack(record)
        try:
            place = self._file.seek(0, os.SEEK_END)
            left = memoryview(_RECORD.pack(len(payload), zlib.crc32(payload)) + payload)
            while left:  # a disk that fills up takes a part first
                left = left[self._file.write(left) :]
            self.num_added += 1
            if record.pieces is not None:
                self._places[record.tile_id] = place
            if time.monotonic() - self._synced >= SYNC_SECONDS:
                self.sync()
        except OSError as error:
            raise OutputError(
                f"cannot write {str(self.folder)!r}: {error.strerror or error}; make room, then go on with --resume"
            ) from error

    def sync(self) -> None:
        """Wait until all records are on the disk."""
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def rows(self, grid: TileGrid, first: int = 0) -> Iterator[list[Pieces]]:
        """Yield the pieces of each tile row of the grid, from the top; memory holds a row.

        Args:
            grid: of the tiles.
            first: index of its first tile in the journal.

        Raises:
            OutputError: a record is no longer what was written.
        """
        for row in range(grid.num_rows):
            indexes = (first + index for index in grid.row_indexes(row))
            yield [self._read(self._places[index]) for index in indexes if index in self._places]

    def _read(self, place: int) -> Pieces:
        self._file.seek(place)
        payload = _next_payload(self._file)
        pieces = _unpack(payload).pieces if payload is not None else None
        if pieces is None:
            raise OutputError(f"{str(self.folder)!r} was damaged while it was open; begin anew with --overwrite")
        return pieces

    @property
    def is_empty(self) -> bool:
        """Whether no tile is in it."""
        return not self.records and not self.num_added

    def part(self, first: int, number: int) -> JournalPart:
        """Return the tiles with indexes from ``first`` on as a journal of their own, with indexes from 0 on."""
        return JournalPart(self, first, number)


@dataclass(frozen=True)
class JournalPart:
    """The tiles of one grid in a journal that has those of several, one after the other.

    Attributes:
        journal: all of it.
        first: index of the grid's first tile.
        number: tiles of the grid.
    """

    journal: Journal
    first: int
    number: int

    @property
    def records(self) -> list[TileRecord]:
        """Return the records of an earlier run, see :class:`Journal`."""
        records = self.journal.records
        shifted = (record._replace(tile_id=record.tile_id - self.first) for record in records)
        return [record for record in shifted if 0 <= record.tile_id < self.number]

    def add(self, record: TileRecord) -> None:
        """See :meth:`Journal.add`."""
        self.journal.add(record._replace(tile_id=record.tile_id + self.first))

    def rows(self, grid: TileGrid) -> Iterator[list[Pieces]]:
        """See :meth:`Journal.rows`."""
        return self.journal.rows(grid, self.first)


def check_journal(output: str | os.PathLike[str], *, resume: bool, overwrite: bool) -> None:
    """Check before a long run that no unfinished one is in the way.

    Raises:
        OutputError: there is one, and neither ``resume`` nor ``overwrite`` says what to do with it.
    """
    folder = journal_folder(output)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{str(folder)!r} is a file, where the journal of the run has its folder; move it away")
    if (folder / "run.json").exists() and not (resume or overwrite):
        raise OutputError(
            f"{str(folder)!r} holds an unfinished run: go on with --resume, or begin anew with --overwrite"
        )


@contextmanager
def open_journal(output: str | os.PathLike[str], facts: Mapping[str, Any], *, resume: bool) -> Iterator[Journal]:
    """Open the journal of a run, a new one unless ``resume`` finds one; remove it when the block ends well.

    It stays where the block ends with an error, unless no tile is in it; a note of the error says so.

    Args:
        output: file that the run is to write.
        facts: what makes the run what it is, ready for JSON; a run that is gone on with must have the same.
        resume: go on with what is there.

    Raises:
        OutputError: another process writes it, or the operating system refuses.
        ConfigError: the journal is that of another run, or of another version.
    """
    folder = journal_folder(output)
    try:
        folder.mkdir(exist_ok=True)
        lock = (folder / "lock").open("ab")
    except OSError as error:
        raise OutputError(f"cannot write {str(folder)!r}: {error.strerror or error}; choose another output") from error
    with lock:
        if not try_lock(lock):
            raise OutputError(f"another process writes {os.fspath(output)!r} (its journal {str(folder)!r} is locked)")
        facts = json.loads(json.dumps({"journal_version": JOURNAL_VERSION, **facts}, default=str))
        about, tiles = folder / "run.json", folder / "tiles.bin"
        records: list[TileRecord] = []
        places: dict[int, int] = {}
        if resume and about.exists():
            _check_same(folder, _read_facts(about), facts)
            records, places = _read_records(tiles)
        else:
            _begin(about, tiles, facts)
        with tiles.open("r+b", buffering=0) as file:  # nothing is left to be written when it is closed
            journal = Journal(folder, records, file, places)
            try:
                yield journal
            except BaseException as error:
                if journal.is_empty:
                    _remove(folder)
                    raise
                journal.sync()
                if not isinstance(error, Cancelled):  # which says so itself
                    number = len(journal.records) + journal.num_added
                    error.add_note(f"{number} tiles are done, --resume goes on from them")
                raise
        _remove(folder)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _begin(about: Path, tiles: Path, facts: Mapping[str, Any]) -> None:
    """Empty the records, then say whose they are: never are there records beside another run's facts."""
    about.unlink(missing_ok=True)
    with tiles.open("wb") as stream:
        os.fsync(stream.fileno())
    staged = about.with_suffix(".new")
    with staged.open("w", encoding="utf-8") as text:
        json.dump(facts, text, indent=1, ensure_ascii=False)
        text.flush()
        os.fsync(text.fileno())
    os.replace(staged, about)


def _read_facts(about: Path) -> dict[str, Any]:
    try:
        facts = json.loads(about.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{str(about)!r} cannot be read: {error}; begin anew with --overwrite") from error
    return facts if isinstance(facts, dict) else {}


def _check_same(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Refuse to mix two runs.

    Raises:
        ConfigError: they differ; names what, and both values.
    """
    for name in {**old, **new}:
        if old.get(name) != new.get(name):
            raise ConfigError(
                f"the unfinished run in {str(folder)!r} had {name}={json.dumps(old.get(name), ensure_ascii=False)}, "
                f"this one has {json.dumps(new.get(name), ensure_ascii=False)}: say the same again, or begin anew "
                "with --overwrite"
            )


def _read_records(tiles: Path) -> tuple[list[TileRecord], dict[int, int]]:
    """Return all whole records without their pieces, and where those with pieces begin.

    What comes after the last whole one is cut off; of a tile that is there twice the first counts.
    """
    records: dict[int, TileRecord] = {}
    places: dict[int, int] = {}
    with tiles.open("r+b") as stream:
        end = 0
        while (payload := _next_payload(stream)) is not None:
            record = _unpack(payload)
            if record.tile_id not in records and record.pieces is not None:
                places[record.tile_id] = end
            records.setdefault(record.tile_id, record._replace(pieces=None))
            end = stream.tell()
        stream.truncate(end)
    return list(records.values()), places


def _next_payload(stream: IO[bytes]) -> bytes | None:
    """Return the next record's bytes, or None where none follows that is whole."""
    head = stream.read(_RECORD.size)
    if len(head) < _RECORD.size:
        return None
    length, checksum = _RECORD.unpack(head)
    if length > os.fstat(stream.fileno()).st_size - stream.tell():
        return None
    payload = stream.read(length)
    return payload if zlib.crc32(payload) == checksum else None


def _pack(record: TileRecord) -> bytes:
    """Return a record as bytes: a line of JSON that says which arrays follow, and these, C-contiguous."""
    arrays: dict[str, NDArray[Any]] = {}
    kind = None
    if record.pieces is not None:
        found = record.pieces.detections
        kind = found.kind
        arrays = {
            "boxes": found.boxes,
            "scores": found.scores,
            "labels": found.labels,
            "counts": record.pieces.counts,
            "is_cut": record.pieces.is_cut,
            "tile_ids": record.pieces.tile_ids,
        }
        outlines = outlines_of(found)
        if outlines is not None:
            arrays |= _pack_outlines(list(outlines))
    head = {
        "tile": [record.tile_id, int(record.is_empty), record.num_saturated],
        "kind": kind,
        "arrays": [(name, array.dtype.str, array.shape) for name, array in arrays.items()],
    }
    return b"\n".join([json.dumps(head).encode(), b"".join(array.tobytes() for array in arrays.values())])


def _pack_outlines(outlines: list[Outline]) -> dict[str, NDArray[Any]]:
    """Return outlines as points (M, 2), points of each ring, rings of each part and parts of each outline."""
    rings = [ring for outline in outlines for part in outline for ring in part]
    return {
        "points": np.concatenate(rings) if rings else np.zeros((0, 2)),
        "ring_lengths": np.array([len(ring) for ring in rings], np.int64),
        "part_lengths": np.array([len(part) for outline in outlines for part in outline], np.int64),
        "outline_lengths": np.array([len(outline) for outline in outlines], np.int64),
    }


def _unpack(payload: bytes) -> TileRecord:
    line, _, content = payload.partition(b"\n")
    head = json.loads(line)
    tile_id, is_empty, num_saturated = head["tile"]
    if head["kind"] is None:
        return TileRecord(tile_id, bool(is_empty), num_saturated)
    arrays: dict[str, NDArray[Any]] = {}
    start = 0
    for name, dtype, shape in head["arrays"]:
        size = math.prod(shape)
        arrays[name] = np.frombuffer(content, dtype, size, start).reshape(shape)
        start += size * arrays[name].itemsize
    masks = as_outlines(_unpack_outlines(arrays)) if "points" in arrays else None
    found = Detections(arrays["boxes"], arrays["scores"], arrays["labels"], "scene", head["kind"], masks)
    return TileRecord(
        tile_id,
        bool(is_empty),
        num_saturated,
        Pieces(found, arrays["counts"], arrays["is_cut"], arrays["tile_ids"]),
    )


def _unpack_outlines(arrays: Mapping[str, NDArray[Any]]) -> list[Outline]:
    rings = iter(np.split(arrays["points"], np.cumsum(arrays["ring_lengths"])[:-1]))
    parts = iter([tuple(next(rings) for _ in range(length)) for length in arrays["part_lengths"].tolist()])
    return [tuple(next(parts) for _ in range(length)) for length in arrays["outline_lengths"].tolist()]
