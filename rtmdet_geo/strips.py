"""Tiles of a scene, cut from strips of it that are read once.

Tiles overlap and seldom begin where a block of the file does, so that reading them one by one decodes the same block up
to four times. Here the columns of tiles are gathered to panels, and a panel is read downwards in strips that end where
the file's blocks do; a few strips are in memory, and tiles are cut from them::

    panel 1     panel 2            panels share the pixels that their tiles share,
    +--------+                     a panel's strips are one or more blocks high:
    |=====+--|-----+  strip 0      each block is decoded once per panel
    |=====|==|=====|  strip 1
    +-----|--+-----+
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.scene import Scene
from rtmdet_geo.structures import Tile

#: Widest panel in px, of the scene or of its file, whichever are finer; a tile that is wider is a panel by itself.
PANEL_WIDTH = 8192
#: Height that strips have about, in source px: as many blocks of the file as it takes.
STRIP_HEIGHT = 256
#: Higher blocks are not held whole: several strips are read of one, and GDAL's cache is trusted to keep it meanwhile.
MAX_BLOCK_HEIGHT = 2048


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A tile and the source window it is made of, in source px."""

    tile: Tile
    x: int
    y: int
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class _Strip:
    """Source pixels (h, w) of each band and their validity (h, w) from column ``x`` and row ``y`` on, in source px."""

    x: int
    y: int
    bands: list[NDArray[np.uint8]]
    valid: NDArray[np.bool_]

    @property
    def stop(self) -> int:
        """The row below."""
        return self.y + len(self.valid)


def read_tiles(
    scene: Scene, tiles: Sequence[Tile], *, panel_width: int = PANEL_WIDTH, strip_height: int = STRIP_HEIGHT
) -> Iterator[tuple[Tile, NDArray[np.uint8], NDArray[np.bool_]]]:
    """Yield every tile with its pixels, bit for bit those of :meth:`Scene.read`.

    Panel by panel from the left, in a panel from the top, in a row of tiles from the left. What no tile of a panel
    needs is not read. In memory are the strips that a row of tiles touches: panel width x (tile height + two strips)
    px of the bands that are read, and one byte per px more. A scene that has no blocks (one in memory) is read tile by
    tile, in the order given.

    Args:
        scene: open scene.
        tiles: any of one :class:`~rtmdet_geo.tiles.TileGrid` over the scene, in any order.
        panel_width: widest panel in px.
        strip_height: least height in source px of the strips; it is rounded up to whole blocks.

    Yields:
        The tile, (C, height, width) uint8 and (height, width) bool.

    Raises:
        RasterError: the file cannot be read.
    """
    blocks = scene.block_shape if isinstance(scene, Scene) else None
    if blocks is None:
        for tile in tiles:
            yield (tile, *scene.read(tile.x, tile.y, tile.width, tile.height))
        return
    block_height = blocks[0] if blocks[0] <= MAX_BLOCK_HEIGHT else 1
    step = -(-strip_height // block_height) * block_height
    wanted = [
        _Wanted(tile, *scene.source_window(tile.x, tile.y, tile.width, tile.height))
        for tile in sorted(tiles, key=lambda tile: (tile.x, tile.y))
    ]
    for panel in _panels(wanted, panel_width):
        yield from _read_panel(scene, panel, step)


def _panels(wanted: Sequence[_Wanted], panel_width: int) -> Iterator[list[_Wanted]]:
    """Group neighbouring columns of tiles; ``wanted`` comes column by column from the left."""
    panel: list[_Wanted] = []
    for _, group in itertools.groupby(wanted, key=lambda item: item.x):
        column = list(group)
        if panel:
            first, last, new = panel[0], panel[-1], column[0]
            is_apart = new.x > last.x + last.width
            source_width, width = new.x + new.width - first.x, new.tile.x + new.tile.width - first.tile.x
            if is_apart or max(source_width, width) > panel_width:
                yield panel
                panel = []
        panel += column
    if panel:
        yield panel


def _read_panel(
    scene: Scene, panel: Sequence[_Wanted], step: int
) -> Iterator[tuple[Tile, NDArray[np.uint8], NDArray[np.bool_]]]:
    """Read a panel downwards; strips lie between multiples of ``step`` source px."""
    strips: deque[_Strip] = deque()
    hulls = _hulls(panel, step)
    for item in sorted(panel, key=lambda item: (item.tile.y, item.tile.x)):
        while strips and strips[0].stop <= item.y:
            strips.popleft()
        for number in range(item.y // step, -(-(item.y + item.height) // step)):
            if number in hulls:
                left, top, right, bottom = hulls.pop(number)
                strips.append(_Strip(left, top, *scene.read_source(left, top, right - left, bottom - top)))
        source, valid = _cut(strips, item)
        tile = item.tile
        yield (
            tile,
            *scene.from_source(source, valid, tile.x, tile.y, tile.width, tile.height, origin=(item.x, item.y)),
        )


def _hulls(panel: Sequence[_Wanted], step: int) -> dict[int, tuple[int, int, int, int]]:
    """Left, top, right and bottom in source px of what the tiles of a panel need of each strip, by its number."""
    hulls: dict[int, tuple[int, int, int, int]] = {}
    for item in panel:
        right, bottom = item.x + item.width, item.y + item.height
        for number in range(item.y // step, -(-bottom // step)):
            box = item.x, max(item.y, number * step), right, min(bottom, (number + 1) * step)
            known = hulls.get(number, box)
            hulls[number] = (
                min(known[0], box[0]),
                min(known[1], box[1]),
                max(known[2], box[2]),
                max(known[3], box[3]),
            )
    return hulls


def _cut(strips: Sequence[_Strip], item: _Wanted) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Cut the source window of a tile from the strips that cover it: (B, h, w) and (h, w), copied."""
    pixels = np.empty((len(strips[0].bands), item.height, item.width), np.uint8)
    valid = np.empty((item.height, item.width), np.bool_)
    for strip in strips:
        top, bottom = max(item.y, strip.y), min(item.y + item.height, strip.stop)
        if top >= bottom:
            continue
        target = slice(top - item.y, bottom - item.y)
        part = (slice(top - strip.y, bottom - strip.y), slice(item.x - strip.x, item.x - strip.x + item.width))
        for band, values in zip(pixels, strip.bands, strict=True):
            band[target] = values[part]
        valid[target] = strip.valid[part]
    return pixels, valid
