"""Every tile of a scene through an engine: settings that are checked first, then read, run, filter, reduce, forget."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.backends import Backend, choose_batch_size
from rtmdet_geo.errors import Cancelled, ConfigError, UnknownClassError
from rtmdet_geo.journal import JournalPart, TileRecord
from rtmdet_geo.merge import MASK_THRESHOLD, MAX_OVERLAP, tile_survivors
from rtmdet_geo.prefetch import Prefetch
from rtmdet_geo.scene import Scene
from rtmdet_geo.stitch import Pieces
from rtmdet_geo.strips import read_tiles
from rtmdet_geo.structures import Detections, ModelSpec, Tile
from rtmdet_geo.tiles import TileGrid
from rtmdet_geo.views import pad

#: In least scores by class: all classes that are not named.
OTHER_CLASSES = "*"


@dataclass(frozen=True, slots=True)
class TileSettings:
    """How tiles are cut and what is kept of what an engine finds in them; :meth:`of` checks them.

    Attributes:
        tile_size: side in px of the model's resolution.
        overlap: px that neighbours share.
        batch_size: tiles per call of the engine.
        score_threshold: least score of any class, in [0, 1].
        iou_threshold: of NMS, in [0, 1].
        mask_threshold: probability in (0, 1) above which a pixel belongs to a mask.
        max_overlap: share of the smaller of two masks of a class from which on they are one object, in (0, 1].
        class_ids: labels to keep; None: all.
        multi_label: several classes for one place are several detections.
        class_aware: only detections of one class suppress each other.
        class_scores: least score of each class of the model, in the order of labels; None: one for all.
    """

    tile_size: int
    overlap: int
    batch_size: int
    score_threshold: float
    iou_threshold: float
    mask_threshold: float
    max_overlap: float
    class_ids: tuple[int, ...] | None
    multi_label: bool
    class_aware: bool = True
    class_scores: tuple[float, ...] | None = None

    @classmethod
    def of(
        cls,
        engine: Backend,
        *,
        score_threshold: float | Mapping[str, float] | None = None,
        iou_threshold: float | None = None,
        mask_threshold: float = MASK_THRESHOLD,
        max_overlap: float = MAX_OVERLAP,
        tile_size: int | None = None,
        overlap: int | None = None,
        batch_size: int | None = None,
        classes: Sequence[str] | None = None,
        multi_label: bool = False,
        class_aware: bool = True,
    ) -> TileSettings:
        """Fill in what the model says for what is None, and check every value.

        Raises:
            ConfigError: a value is outside its range, or the engine cannot do it.
            UnknownClassError: ``classes`` or ``score_threshold`` names what the model does not know.
        """
        spec = engine.spec
        labels = _labels(spec, classes)
        score, class_scores = _scores(spec, score_threshold, labels)
        iou = spec.iou_threshold if iou_threshold is None else iou_threshold
        if not (math.isfinite(iou) and 0 <= iou <= 1):
            raise ConfigError(f"iou_threshold={iou!r} must be in [0, 1]")
        if not 0 < mask_threshold < 1:
            raise ConfigError(f"mask_threshold={mask_threshold!r} must be in (0, 1)")
        if not 0 < max_overlap <= 1:
            raise ConfigError(f"max_overlap={max_overlap!r} must be above 0 and at most 1")
        size = (engine.fixed_tile_size or spec.tile_size) if tile_size is None else tile_size
        if size < spec.stride_multiple or size % spec.stride_multiple:
            raise ConfigError(f"tile_size={size} px must be a multiple of {spec.stride_multiple}")
        if engine.fixed_tile_size is not None and size != engine.fixed_tile_size:
            raise ConfigError(
                f"model {spec.name!r} takes tiles of {engine.fixed_tile_size} px only; leave tile_size out"
            )
        shared = min(spec.overlap, size // 2) if overlap is None else overlap
        if not 0 <= shared < size:
            raise ConfigError(f"overlap={shared} px must be at least 0 and below tile_size={size} px")
        images = choose_batch_size(engine, batch_size)
        return cls(
            size,
            shared,
            images,
            score,
            iou,
            mask_threshold,
            max_overlap,
            labels,
            multi_label,
            class_aware,
            class_scores,
        )

    def class_names(self, spec: ModelSpec) -> list[str]:
        """Return the names of the classes that are kept."""
        return [spec.classes[label] for label in self.class_ids] if self.class_ids is not None else list(spec.classes)

    def is_enough(self, detections: Detections) -> NDArray[np.bool_]:
        """Return (N,) bool: the score is the least one of its class or more."""
        if self.class_scores is None:
            return detections.scores >= np.float32(self.score_threshold)
        least = np.asarray(self.class_scores, np.float32)  # as engines compare: scores are float32
        return detections.scores >= least[detections.labels]

    def score_record(self, spec: ModelSpec) -> float | dict[str, float]:
        """Return the least score of every class that is kept, ready for JSON: one number, or one for each name."""
        if self.class_scores is None:
            return self.score_threshold
        return {name: self.class_scores[spec.classes.index(name)] for name in self.class_names(spec)}


def _scores(
    spec: ModelSpec, score_threshold: float | Mapping[str, float] | None, labels: tuple[int, ...] | None
) -> tuple[float, tuple[float, ...] | None]:
    """Return the least score of any class that is kept, and that of each class where they differ."""
    single = (
        spec.score_threshold if score_threshold is None or isinstance(score_threshold, Mapping) else score_threshold
    )
    by_class = {OTHER_CLASSES: single, **(score_threshold if isinstance(score_threshold, Mapping) else {})}
    for name, value in by_class.items():
        if not (math.isfinite(value) and 0 <= value <= 1):
            where = "" if name == OTHER_CLASSES else f" of class {name!r}"
            raise ConfigError(f"score_threshold={value!r}{where} must be in [0, 1]")
    others = by_class.pop(OTHER_CLASSES)
    _labels(spec, list(by_class))
    scores = [by_class.get(name, others) for name in spec.classes]
    kept = [scores[label] for label in (range(len(scores)) if labels is None else labels)]
    return min(kept, default=others), tuple(scores) if by_class else None


def _labels(spec: ModelSpec, classes: Sequence[str] | None) -> tuple[int, ...] | None:
    if classes is None:
        return None
    classes = [classes] if isinstance(classes, str) else classes
    unknown = [name for name in classes if name not in spec.classes]
    if unknown:
        raise UnknownClassError(
            f"model {spec.name!r} knows no class {unknown[0]!r}; it knows {', '.join(spec.classes)}"
        )
    return tuple(spec.classes.index(name) for name in classes)


@dataclass(slots=True)
class TileResults:
    """What is left of all tiles.

    Attributes:
        num_tiles: tiles done.
        num_empty_tiles: those without a valid pixel, which were not run.
        num_saturated: those that hold more candidates than the engine returns.
        pieces: survivors of NMS and border rule of each tile that has any, by its index; not of those in a journal.
        done: indexes of the tiles done.
    """

    num_tiles: int = 0
    num_empty_tiles: int = 0
    num_saturated: int = 0
    pieces: dict[int, Pieces] = field(default_factory=dict)
    done: set[int] = field(default_factory=set)

    def add(self, record: TileRecord) -> None:
        """Count a tile, and keep what is left of it."""
        self.num_tiles += 1
        self.num_empty_tiles += record.is_empty
        self.num_saturated += record.num_saturated
        self.done.add(record.tile_id)
        if record.pieces is not None:
            self.pieces[record.tile_id] = record.pieces

    @property
    def parts(self) -> list[Pieces]:
        """Return the pieces of all tiles, in the order in which they were done."""
        return list(self.pieces.values())

    def rows(self, grid: TileGrid) -> Iterator[list[Pieces]]:
        """Yield the pieces of each tile row of the grid, from the top, as a journal does."""
        for row in range(grid.num_rows):
            yield [self.pieces[index] for index in grid.row_indexes(row) if index in self.pieces]


class LiveResults(TileResults):
    """Results that hand on the pieces of each tile row once it and all above it are done, and forget them."""

    def __init__(self, grid: TileGrid, tiles: Iterable[Tile], each: Callable[[list[Pieces]], None]) -> None:
        """Wait for the first row.

        Args:
            grid: see :func:`run_tiles`.
            tiles: those that will be done.
            each: takes the pieces of one row; called for all rows of the grid, from the top.
        """
        super().__init__()
        self._grid, self._each, self._next_row = grid, each, 0
        self._left = [0] * grid.num_rows
        for tile in tiles:
            self._left[tile.row] += 1
        self._hand_on()

    def add(self, record: TileRecord) -> None:
        """Count a tile, and hand on what became whole by it."""
        super().add(record)
        self._left[self._grid[record.tile_id].row] -= 1
        self._hand_on()

    def _hand_on(self) -> None:
        while self._next_row < self._grid.num_rows and not self._left[self._next_row]:
            row, self._next_row = self._next_row, self._next_row + 1
            indexes = self._grid.row_indexes(row)
            self._each([self.pieces.pop(index) for index in indexes if index in self.pieces])


def run_tiles(
    source: Scene,
    grid: TileGrid,
    engine: Backend,
    settings: TileSettings,
    *,
    tiles: Sequence[Tile] | None = None,
    results: TileResults | None = None,
    journal: JournalPart | None = None,
    progress: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> TileResults:
    """Read, run and reduce tiles; pixels and raw candidates of a few batches are in memory at a time.

    Reading and the engine have a thread each, so that neither waits for the other nor for the NMS of what was found.
    ``progress`` and ``cancelled`` are called in the caller's thread.

    Args:
        source: open scene.
        grid: tiles over it.
        tiles: those of the grid to look at; None: all. No other one is read, or counts.
        engine: what runs them.
        settings: checked by :meth:`TileSettings.of`.
        results: to add to; it keeps what was done if the run is cancelled. None: a new one.
        journal: tiles of its records are not run again; each other one is written to it, and its pieces are there
            only.
        progress: called with (tiles done, tiles in all).
        cancelled: asked before each tile.

    Raises:
        Cancelled: the caller's wish.
        OutputError: the journal cannot be written.
    """
    results = TileResults() if results is None else results
    for record in journal.records if journal is not None else ():
        results.add(record)
    wanted: Sequence[Tile] = list(grid) if tiles is None else tiles
    total = len(wanted)
    wanted = [tile for tile in wanted if grid.index(tile) not in results.done]
    # As little padding as the engine takes: channel attention averages over the whole input, grey included.
    fixed = engine.fixed_tile_size
    shape = (fixed, fixed) if fixed is not None else grid.padded_shape(engine.spec.stride_multiple)
    in_flight: deque[tuple[Tile, NDArray[np.bool_]]] = deque()  # read, in order, with their valid pixels

    def done(record: TileRecord) -> None:
        if journal is not None:
            journal.add(record)
            record = record._replace(pieces=None)
        results.add(record)
        if progress is not None:
            progress(results.num_tiles, total)

    def skip_empty() -> None:
        if cancelled is not None and cancelled():
            raise Cancelled(f"stopped after {results.num_tiles} of {total} tiles; nothing was written")
        while in_flight and not in_flight[0][1].any():
            tile, _ = in_flight.popleft()
            done(TileRecord(grid.index(tile), is_empty=True))

    def reduce(tile: Tile, valid: NDArray[np.bool_], detections: Detections, num_saturated: int) -> None:
        detections = _filter(detections, valid, settings)
        survivors = None
        if len(detections):
            survivors = tile_survivors(
                detections,
                tile,
                grid,
                iou_threshold=settings.iou_threshold,
                class_aware=settings.class_aware,
                mask_threshold=settings.mask_threshold,
                input_shape=shape,
                valid=valid,
            )
        done(TileRecord(grid.index(tile), num_saturated=num_saturated, pieces=survivors))

    if progress is not None:
        progress(results.num_tiles, total)
    read = _read_batches(source, wanted, shape, settings.batch_size, in_flight)
    with Prefetch(read, size=2, name="tiles") as batches:
        run = _run_batches(engine, batches, settings)
        with Prefetch(run, size=2, waiting=skip_empty, name="engine") as found:
            try:
                for detections, num_saturated in chain.from_iterable(found):
                    skip_empty()
                    reduce(*in_flight.popleft(), detections, num_saturated)
            finally:
                batches.stop()  # or the engine would go on to its next batch
    skip_empty()
    return results


def _run_batches(
    engine: Backend, batches: Iterable[NDArray[np.uint8]], settings: TileSettings
) -> Iterator[list[tuple[Detections, int]]]:
    """Yield for each batch its tiles' detections, the first one's with the number of tiles that were saturated."""
    before = engine.num_saturated
    for found in engine.run(batches, score_threshold=settings.score_threshold, multi_label=settings.multi_label):
        number, before = engine.num_saturated - before, engine.num_saturated
        yield [(detections, number if index == 0 else 0) for index, detections in enumerate(found)]


def _read_batches(
    source: Scene,
    tiles: Sequence[Tile],
    shape: tuple[int, int],
    batch_size: int,
    in_flight: deque[tuple[Tile, NDArray[np.bool_]]],
) -> Iterator[NDArray[np.uint8]]:
    """Yield uint8 (N, C, *shape) of tiles with valid pixels, and note every tile and its valid pixels in order."""
    images: list[NDArray[np.uint8]] = []
    for tile, pixels, valid in read_tiles(source, tiles):
        in_flight.append((tile, valid))
        if not valid.any():  # costs nothing more
            continue
        images.append(pad(pixels, shape))
        if len(images) == batch_size:
            yield images[0][None] if batch_size == 1 else np.stack(images)
            images = []
    if images:
        yield np.stack(images)


def _filter(detections: Detections, valid: NDArray[np.bool_], settings: TileSettings) -> Detections:
    """Keep what is of a wanted class, scores enough and has its centre on a valid pixel (valid: (h, w), tile px)."""
    height, width = valid.shape
    columns, rows = np.floor(detections.boxes[:, 0]), np.floor(detections.boxes[:, 1])
    keep = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    keep[keep] = valid[rows[keep].astype(np.intp), columns[keep].astype(np.intp)]
    if settings.class_ids is not None:
        keep &= np.isin(detections.labels, settings.class_ids)
    return detections.select(keep & settings.is_enough(detections))
