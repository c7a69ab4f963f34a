"""The overlap grid that covers a scene with tiles. Integers only.

One axis of length L, tiles of side T that overlap by O pixels advance by S = T - O::

    number = 1 if L <= T else ceil((L - T) / S) + 1
    offset = i * S, the last tile shifted inward to L - T (it then overlaps its neighbour by O or more)

Every object no longer than O pixels along both axes lies whole in at least one tile;
:mod:`rtmdet_geo.merge` relies on it.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field

from rtmdet_geo.errors import ConfigError
from rtmdet_geo.structures import Tile


def _axis_offsets(length: int, tile_size: int, stride: int) -> tuple[int, ...]:
    """Return the rising tile offsets in px along one axis of ``length`` px."""
    if length <= tile_size:
        return (0,)
    number = -(-(length - tile_size) // stride) + 1
    return (*(index * stride for index in range(number - 1)), length - tile_size)


def _axis_cuts(offsets: tuple[int, ...], tile_size: int, length: int) -> tuple[int, ...]:
    """Return the borders of the core cells: 0, the midlines of the overlaps, ``length``."""
    midlines = ((left + tile_size + right) // 2 for left, right in itertools.pairwise(offsets))
    return (0, *midlines, length)


@dataclass(frozen=True)
class TileGrid:
    """Tiles over a scene, row by row from the top-left corner. Iterable, indexable, hashable.

    Attributes:
        width, height: size of the scene in resampled px, at least 1.
        tile_size: side of a tile in px. A scene that is smaller along an axis gives one tile clipped to the scene.
        overlap: px that neighbours share at least, 0 <= overlap < tile_size.
        xs, ys: rising offsets of the columns and rows in px.

    Raises:
        ConfigError: a value is outside its range.

    Example:
        >>> grid = TileGrid(width=2000, height=900, tile_size=1024, overlap=200)
        >>> grid.xs, grid.ys, len(grid)
        ((0, 824, 976), (0,), 3)
        >>> grid[2]
        Tile(row=0, col=2, x=976, y=0, width=1024, height=900)
    """

    width: int
    height: int
    tile_size: int
    overlap: int
    xs: tuple[int, ...] = field(init=False, repr=False, compare=False)
    ys: tuple[int, ...] = field(init=False, repr=False, compare=False)
    _x_cuts: tuple[int, ...] = field(init=False, repr=False, compare=False)
    _y_cuts: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check the ranges and lay out both axes."""
        for name, low in (("width", 1), ("height", 1), ("tile_size", 1), ("overlap", 0)):
            value = getattr(self, name)
            if int(value) != value or value < low:
                raise ConfigError(f"{name}={value!r} of the tile grid must be a whole number of px, at least {low}")
            object.__setattr__(self, name, int(value))
        if self.overlap >= self.tile_size:
            raise ConfigError(
                f"overlap={self.overlap} px must be smaller than tile_size={self.tile_size} px; "
                "lower the overlap or raise the tile size"
            )
        stride = self.tile_size - self.overlap
        for axis, length in (("x", self.width), ("y", self.height)):
            offsets = _axis_offsets(length, self.tile_size, stride)
            object.__setattr__(self, f"{axis}s", offsets)
            object.__setattr__(self, f"_{axis}_cuts", _axis_cuts(offsets, self.tile_size, length))

    @property
    def num_cols(self) -> int:
        """Return the number of tile columns."""
        return len(self.xs)

    @property
    def num_rows(self) -> int:
        """Return the number of tile rows."""
        return len(self.ys)

    @property
    def tile_width(self) -> int:
        """Return the width of every tile in px: tile_size, or the scene's width where that is smaller."""
        return min(self.tile_size, self.width)

    @property
    def tile_height(self) -> int:
        """Return the height of every tile in px: tile_size, or the scene's height where that is smaller."""
        return min(self.tile_size, self.height)

    def padded_shape(self, multiple: int) -> tuple[int, int]:
        """Return height and width in px of every tile, each raised to a multiple (a network's coarsest stride)."""
        return -(-self.tile_height // multiple) * multiple, -(-self.tile_width // multiple) * multiple

    def __len__(self) -> int:
        """Return the number of tiles."""
        return len(self.xs) * len(self.ys)

    def __getitem__(self, index: int) -> Tile:
        """Return tile ``index`` in row-major order.

        Raises:
            IndexError: no such tile.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"tile {index} of a grid of {len(self)}")
        row, col = divmod(index % len(self), len(self.xs))
        return self.tile(row, col)

    def __iter__(self) -> Iterator[Tile]:
        """Yield all tiles in row-major order."""
        return (self.tile(row, col) for row in range(len(self.ys)) for col in range(len(self.xs)))

    def tile(self, row: int, col: int) -> Tile:
        """Return the tile in tile row ``row`` and tile column ``col``."""
        return Tile(row, col, self.xs[col], self.ys[row], self.tile_width, self.tile_height)

    def index(self, tile: Tile) -> int:
        """Return the index of one of the grid's tiles in row-major order; ``grid[grid.index(tile)] == tile``."""
        return tile.row * len(self.xs) + tile.col

    def row_indexes(self, row: int) -> range:
        """Return the indexes of the tiles of tile row ``row``."""
        return range(row * len(self.xs), (row + 1) * len(self.xs))

    def core(self, tile: Tile) -> Tile:
        """Return the part of ``tile`` that is its own: cut at the midlines of the overlaps.

        The cores of all tiles cover each pixel of the scene exactly once; each lies inside its tile.
        """
        left, right = self._x_cuts[tile.col : tile.col + 2]
        top, bottom = self._y_cuts[tile.row : tile.row + 2]
        return Tile(tile.row, tile.col, left, top, right - left, bottom - top)

    def core_tile_at(self, x: int, y: int) -> Tile:
        """Return the tile whose core holds pixel column ``x``, row ``y``.

        Raises:
            IndexError: the pixel is outside the scene.
        """
        if not (0 <= x < self.width and 0 <= y < self.height):
            raise IndexError(f"pixel x={x}, y={y} is outside the scene of {self.width} x {self.height} px")
        return self.tile(bisect_right(self._y_cuts, y) - 1, bisect_right(self._x_cuts, x) - 1)
