"""Objects longer than the tiles' overlap, found by looking at the scene from further away.

Level k of the pyramid is the scene with 2^k times the ground sample distance, in tiles of the same size and overlap:
what is longer than an overlap there is twice as long as what was longer than one a level below. Of a level only such
long objects are taken; they join the pieces of the finest level in :class:`rtmdet_geo.merge_rows.RowMerger`, which
knows what to do with them: a piece that a tile's edge cut and that lies in a larger box gives way to it, of two that
are nearly the same the better one stays, and a whole small object beside a long one is left alone.

Masks need none of it: they are put together from their pieces (:mod:`rtmdet_geo.stitch`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from rtmdet_geo.area import Area
from rtmdet_geo.boxes import boxes_to_hboxes, rescale_boxes
from rtmdet_geo.errors import ConfigError
from rtmdet_geo.scene import Scene
from rtmdet_geo.stitch import Pieces
from rtmdet_geo.structures import Kind, Tile
from rtmdet_geo.tiles import TileGrid

#: More levels would look at a pixel for each 256 x 256.
MAX_LEVELS = 8


@dataclass(frozen=True, slots=True)
class Level:
    """One coarser look at a scene.

    Attributes:
        scene: the same open file in fewer px.
        grid: tiles over it.
        tiles: those to look at.
        first_index: what the indexes of its tiles begin with, so that those of all levels differ.
    """

    scene: Scene
    grid: TileGrid
    tiles: list[Tile]
    first_index: int


def check_pyramid(levels: int, kind: Kind) -> None:
    """Refuse a number of levels that is none, or any for masks.

    Raises:
        ConfigError: see above.
    """
    if not 0 <= levels <= MAX_LEVELS:
        raise ConfigError(f"pyramid={levels!r} must be a number of coarser levels from 0 to {MAX_LEVELS}")
    if levels and kind == "mask":
        raise ConfigError("masks are put together over tile borders without a pyramid; leave it out")


def make_levels(source: Scene, grid: TileGrid, area: Area | None, levels: int) -> list[Level]:
    """Return the coarser levels of a scene; none after the first that is one tile.

    Args:
        source: open scene.
        grid: tiles of the finest level.
        area: part of the scene to look at, in px of the finest level; None: all.
        levels: how many at most.
    """
    made: list[Level] = []
    first, last = len(grid), grid
    for number in range(1, levels + 1):
        if len(last) == 1:
            break
        scene = source.coarser(2**number)
        last = TileGrid(scene.width, scene.height, grid.tile_size, grid.overlap)
        scale = scene.width / source.width, scene.height / source.height
        made.append(Level(scene, last, list(last) if area is None else area.scaled(*scale).tiles(last), first))
        first += len(last)
    return made


@dataclass(slots=True)
class LongObjects:
    """What coarser levels found, by the tile row of the finest level in which it begins.

    Attributes:
        grid: of the finest level.
        by_row: pieces in its px.
    """

    grid: TileGrid
    by_row: dict[int, list[Pieces]] = field(default_factory=dict)

    def add(self, level: Level, rows: Iterable[Sequence[Pieces]]) -> None:
        """Take what is longer than the overlap of the next finer level.

        Args:
            level: where it was found.
            rows: what :func:`rtmdet_geo.merge.tile_survivors` left of its tiles, in its px.
        """
        scale = self.grid.width / level.grid.width, self.grid.height / level.grid.height
        for pieces in (part for row in rows for part in row):
            long = pieces.select(pieces.detections.boxes[:, 2:4].max(axis=1) > level.grid.overlap / 2)
            if not len(long.counts):
                continue
            boxes = rescale_boxes(long.detections.boxes, *scale)
            long = long._replace(
                detections=replace(long.detections, boxes=boxes), tile_ids=long.tile_ids + level.first_index
            )
            beginnings = np.searchsorted(self.grid.ys, boxes_to_hboxes(boxes)[:, 1], side="right") - 1
            for row in np.unique(beginnings.clip(0)).tolist():
                self.by_row.setdefault(row, []).append(long.select(beginnings.clip(0) == row))

    def take(self, row: int) -> list[Pieces]:
        """Return those that begin in a tile row, and forget them."""
        return self.by_row.pop(row, [])
