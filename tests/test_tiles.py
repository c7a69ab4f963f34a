"""The overlap grid: cover, inside, number = formula, cores."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rtmdet_geo.errors import ConfigError
from rtmdet_geo.tiles import TileGrid


@st.composite
def grids(draw: st.DrawFn) -> TileGrid:
    tile_size = draw(st.integers(1, 60))
    return TileGrid(
        draw(st.integers(1, 200)), draw(st.integers(1, 200)), tile_size, draw(st.integers(0, tile_size - 1))
    )


def number(length: int, tile_size: int, overlap: int) -> int:
    return 1 if length <= tile_size else math.ceil((length - tile_size) / (tile_size - overlap)) + 1


@settings(deadline=None, max_examples=60)
@given(grids())
def test_tiles_cover_stay_inside_and_number_follows_the_formula(grid: TileGrid) -> None:
    covered_x, covered_y = np.zeros(grid.width, int), np.zeros(grid.height, int)
    for x in grid.xs:
        assert 0 <= x and x + grid.tile_width <= grid.width
        covered_x[x : x + grid.tile_width] += 1
    for y in grid.ys:
        assert 0 <= y and y + grid.tile_height <= grid.height
        covered_y[y : y + grid.tile_height] += 1
    assert covered_x.min() >= 1 and covered_y.min() >= 1
    assert len(grid.xs) == number(grid.width, grid.tile_size, grid.overlap) == grid.num_cols
    assert len(grid.ys) == number(grid.height, grid.tile_size, grid.overlap) == grid.num_rows
    assert len(grid) == grid.num_cols * grid.num_rows
    for offsets in (grid.xs, grid.ys):
        assert all(right > left for left, right in itertools.pairwise(offsets))
        assert all(left + grid.tile_size - right >= grid.overlap for left, right in itertools.pairwise(offsets))


@settings(deadline=None, max_examples=40)
@given(grids())
def test_cores_cover_each_pixel_exactly_once(grid: TileGrid) -> None:
    if len(grid) > 3000:
        return
    count = np.zeros((grid.height, grid.width), int)
    for tile in grid:
        core = grid.core(tile)
        assert core.width >= 1 and core.height >= 1
        assert tile.x <= core.x and core.x + core.width <= tile.x + tile.width
        assert tile.y <= core.y and core.y + core.height <= tile.y + tile.height
        count[core.y : core.y + core.height, core.x : core.x + core.width] += 1
        assert grid.core_tile_at(core.x, core.y) == tile
        assert grid.core_tile_at(core.x + core.width - 1, core.y + core.height - 1) == tile
    assert (count == 1).all()


@settings(deadline=None, max_examples=60)
@given(grids(), st.data())
def test_a_span_no_longer_than_the_overlap_lies_whole_in_one_tile(grid: TileGrid, data: st.DataObject) -> None:
    length = data.draw(st.integers(0, min(grid.overlap, grid.width)))
    start = data.draw(st.integers(0, grid.width - length))
    assert any(x <= start and start + length <= x + grid.tile_width for x in grid.xs)


def test_hand_worked_grid() -> None:
    grid = TileGrid(2000, 900, tile_size=1024, overlap=200)
    assert grid.xs == (0, 824, 976) and grid.ys == (0,)
    assert [tile.col for tile in grid] == [0, 1, 2]
    # midlines: (0 + 1024 + 824) // 2 and (824 + 1024 + 976) // 2
    assert [(grid.core(tile).x, grid.core(tile).width) for tile in grid] == [(0, 924), (924, 488), (1412, 588)]
    assert grid[-1] == grid[2] == list(grid)[2]


def test_one_pixel_scene_and_exact_fit() -> None:
    (tile,) = TileGrid(1, 1, tile_size=1024, overlap=200)
    assert (tile.x, tile.y, tile.width, tile.height) == (0, 0, 1, 1)
    assert TileGrid(1024, 1024, 1024, 200).xs == (0,)
    assert TileGrid(1025, 1024, 1024, 200).xs == (0, 1)
    assert TileGrid(1848, 10, 1024, 200).xs == (0, 824)  # 824 + 1024 = 1848: no needless third tile


@pytest.mark.parametrize(
    "values",
    [(10, 10, 8, 8), (10, 10, 8, 9), (10, 10, 8, -1), (0, 10, 8, 2), (10, 0, 8, 2), (10, 10, 0, 0), (9.5, 9, 8, 2)],
)
def test_values_outside_their_range_are_config_errors(values: tuple[int, int, int, int]) -> None:
    with pytest.raises(ConfigError):
        TileGrid(*values)
    with pytest.raises(ValueError, match=r"grid|overlap"):
        TileGrid(*values)


def test_outside_the_grid() -> None:
    grid = TileGrid(10, 10, 8, 2)
    with pytest.raises(IndexError):
        grid[len(grid)]
    with pytest.raises(IndexError):
        grid.core_tile_at(10, 0)


def test_padding_is_as_little_as_the_network_takes():
    assert TileGrid(1065, 704, 1024, 200).padded_shape(32) == (704, 1024)
    assert TileGrid(1, 33, 1024, 200).padded_shape(32) == (64, 32)
    assert TileGrid(5000, 5000, 1024, 200).padded_shape(32) == (1024, 1024)
