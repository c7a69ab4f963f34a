"""Tiles cut from strips: the pixels of Scene.read to the bit, each block of the file once, few rows in memory."""

from __future__ import annotations

import itertools
import tracemalloc
import warnings
from collections import Counter

import numpy as np
import pytest
import rasterio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rasterio.control import GroundControlPoint
from rasterio.env import getenv
from rasters import make_raster, pattern, write_raster

from rtmdet_geo.errors import BandWarning, RasterError
from rtmdet_geo.gdal_options import CACHE_BYTES
from rtmdet_geo.images import array_scene
from rtmdet_geo.raster import _gdal_options, open_scene
from rtmdet_geo.strips import read_tiles
from rtmdet_geo.structures import ModelSpec, StretchSpec
from rtmdet_geo.tiles import TileGrid

#: GeoTIFF profiles by name: blocks of one row, of several, of all rows, and tiles.
LAYOUTS = {
    "rows": {"blockysize": 1},
    "odd strips": {"blockysize": 7, "compress": "deflate"},
    "one strip": {"blockysize": 200, "compress": "deflate"},
    "tiles": {"tiled": True, "blockxsize": 16, "blockysize": 32, "compress": "deflate"},
    "planes": {"tiled": True, "blockxsize": 32, "blockysize": 16, "interleave": "band"},
}


def assert_as_read(scene, tiles, **options):
    """Compare with reading tile by tile; return the tiles in the order they came."""
    order = []
    for tile, pixels, valid in read_tiles(scene, tiles, **options):
        expected, expected_valid = scene.read(tile.x, tile.y, tile.width, tile.height)
        assert pixels.dtype == np.uint8 and valid.dtype == np.bool_
        np.testing.assert_array_equal(pixels, expected)
        np.testing.assert_array_equal(valid, expected_valid)
        order.append(tile)
    assert Counter(order) == Counter(tiles)
    return order


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_every_tile_is_that_of_reading_it_alone(tmp_path, data):
    draw = data.draw
    layout = draw(st.sampled_from(sorted(LAYOUTS)), label="layout")
    width, height = draw(st.integers(1, 150), label="width"), draw(st.integers(1, 120), label="height")
    dtype = draw(st.sampled_from(["uint8", "uint16", "float32"]), label="dtype")
    nodata_type = draw(st.sampled_from(["none", "nodata", "alpha", "mask"]), label="nodata")
    if dtype == "float32" and nodata_type == "alpha":
        nodata_type = "nan"
    path = make_raster(
        tmp_path / "a.tif",
        width=width,
        height=height,
        dtype=dtype,
        nodata_type=nodata_type,
        bounds=(500_000, 4_000_000, 500_000 + 10 * width, 4_000_000 + 10 * height),
        **LAYOUTS[layout],
    )
    gsd_m = draw(st.sampled_from([None, None, 4.0, 10.0 / 3, 13.0, 25.0]), label="model_gsd_m")
    bands = draw(st.sampled_from([None, [3, 1, 2], [2, 2, 2], [1, 3, 2]]), label="bands")
    stretch = StretchSpec(kind="percentile")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tiny scenes: repeated bands, no valid pixel
        scene = open_scene(path, bands=bands, stretch=stretch, model_gsd_m=gsd_m)
    with scene:
        size = draw(st.integers(1, 64), label="tile_size")
        overlap = draw(st.integers(max(0, size - 20), size - 1) if size > 40 else st.integers(0, size // 2))
        tiles = list(TileGrid(scene.width, scene.height, size, overlap))
        if draw(st.booleans(), label="subset"):
            tiles = draw(st.lists(st.sampled_from(tiles), unique=True, max_size=12), label="tiles")
        elif len(tiles) > 60:
            tiles = tiles[:: len(tiles) // 60]
        assert_as_read(
            scene,
            tiles,
            panel_width=draw(st.sampled_from([1, 40, 90, 8192]), label="panel_width"),
            strip_height=draw(st.sampled_from([1, 10, 33, 512]), label="strip_height"),
        )


def test_a_scene_placed_by_control_points(tmp_path):
    points = [(0, 0, 5.0, 50.0), (0, 140, 5.02, 50.003), (120, 0, 4.998, 49.98), (120, 140, 5.019, 49.984)]
    gcps = [GroundControlPoint(row=row, col=column, x=x, y=y) for row, column, x, y in points]
    path = write_raster(tmp_path / "g.tif", pattern(3, 120, 140, "uint8"), crs="EPSG:4326", gcps=gcps)
    with open_scene(path, bands=[1, 2, 3]) as scene:
        assert scene.block_shape is not None and scene.mask_kind == "alpha"
        assert_as_read(scene, list(TileGrid(scene.width, scene.height, 48, 11)), panel_width=80, strip_height=16)


def test_channels_that_a_constant_fills(tmp_path):
    path = make_raster(tmp_path / "a.tif", num_bands=2, colours=("red", "green"), nodata_type="mask")
    with pytest.warns(BandWarning):
        scene = open_scene(path, optional_bands={"blue": 77})
    with scene:
        assert scene.band_indexes == (1, 2, None)
        assert_as_read(scene, list(TileGrid(scene.width, scene.height, 32, 8)), strip_height=8)


def test_a_scene_in_memory_is_read_in_the_order_given():
    spec = ModelSpec(name="m", architecture="rtmdet_r_tiny", classes=("ship",), mean=(0, 0, 0), std=(1, 1, 1))
    image = np.ascontiguousarray(pattern(3, 70, 90, "uint8").transpose(1, 2, 0))
    scene = array_scene(image, ("red", "green", "blue"), spec)
    assert scene.block_shape is None
    tiles = list(TileGrid(90, 70, 32, 8))[::-1]
    assert assert_as_read(scene, tiles) == tiles


# ------------------------------------------------------------------------------------------------- what is read of it


@pytest.fixture
def counted(tmp_path, monkeypatch):
    """Return a function that opens a scene and a list of the windows (x, y, width, height) that are read of it."""

    def start(width, height, *, model_gsd_m=None, **profile):
        bounds = (500_000, 4_000_000, 500_000 + 10 * width, 4_000_000 + 10 * height)
        path = make_raster(tmp_path / "c.tif", width=width, height=height, bounds=bounds, **profile)
        scene = open_scene(path, model_gsd_m=model_gsd_m)
        windows, read = [], scene._source.read

        def counting(indexes, *window_and_shape, **options):
            windows.append(window_and_shape[:4])
            return read(indexes, *window_and_shape, **options)

        monkeypatch.setattr(scene._source, "read", counting)
        return scene, windows

    return start


def blocks_of(windows, block_height, block_width):
    """Count how often each block (row, column) is decoded."""
    return Counter(
        block
        for x, y, width, height in windows
        for block in itertools.product(
            range(y // block_height, -(-(y + height) // block_height)),
            range(x // block_width, -(-(x + width) // block_width)),
        )
    )


TILED = {"tiled": True, "blockxsize": 32, "blockysize": 32}


@pytest.mark.parametrize("strip_height", [1, 32, 40, 512])
@pytest.mark.parametrize("model_gsd_m", [None, 7.0, 15.0])
def test_each_block_is_decoded_once(counted, strip_height, model_gsd_m):
    scene, windows = counted(300, 260, model_gsd_m=model_gsd_m, **TILED)
    with scene:
        grid = TileGrid(scene.width, scene.height, 50, 13)
        list(read_tiles(scene, list(grid), strip_height=strip_height))
        times = blocks_of(windows, 32, 32)
        assert set(times.values()) == {1} and len(times) == 10 * 9
        windows.clear()
        for tile in grid:  # the negative control: tiles one by one
            scene.read(tile.x, tile.y, tile.width, tile.height)
        assert max(blocks_of(windows, 32, 32).values()) >= 4


def test_each_block_is_decoded_once_per_panel(counted):
    scene, windows = counted(300, 260, **TILED)
    with scene:
        grid = TileGrid(300, 260, 64, 16)
        assert grid.xs == (0, 48, 96, 144, 192, 236)
        order = [tile for tile, _, _ in read_tiles(scene, list(grid), panel_width=160, strip_height=64)]
    # Columns 0..2 end at px 160; columns 3..4 at 256, column 5 at 300: 144..300 is narrower than 160.
    assert [(tile.row, tile.col) for tile in order] == [
        (row, column) for columns in (range(3), range(3, 6)) for row in range(len(grid.ys)) for column in columns
    ]
    assert {(x, width) for x, _, width, _ in windows} == {(0, 160), (144, 156)}
    times = blocks_of(windows, 32, 32)
    assert {column for (_, column), number in times.items() if number == 2} == {4}  # px 128..160, in both panels
    assert max(times.values()) == 2


def test_what_no_tile_needs_is_not_read(counted):
    scene, windows = counted(300, 260, **TILED)
    with scene:
        grid = TileGrid(300, 260, 64, 0)
        wanted = [grid.tile(0, 0), grid.tile(3, 1), grid.tile(3, 4)]
        list(read_tiles(scene, wanted, strip_height=32))
        # Rows 64..192 lie between the tiles; column 4 is apart from the others: a panel by itself.
        places = [(0, 0), (0, 32), (64, 192), (64, 224), (236, 192), (236, 224)]
        assert windows == [(x, y, 64, 32) for x, y in places]
        windows.clear()
        assert list(read_tiles(scene, [])) == [] and windows == []


def test_blocks_of_great_height_are_not_held_whole(counted, monkeypatch):
    monkeypatch.setattr("rtmdet_geo.strips.MAX_BLOCK_HEIGHT", 100)
    scene, windows = counted(60, 400, blockysize=400, compress="deflate")
    with scene:
        assert scene.block_shape == (400, 60)
        list(read_tiles(scene, list(TileGrid(60, 400, 40, 8)), strip_height=64))
    assert max(height for _, _, _, height in windows) == 64


def test_memory_is_that_of_a_few_strips(counted):
    """A panel of 512 px, tiles of 128, strips of 64: 512 x 256 px of three bands and valid of a scene 4096 px high."""
    scene, _ = counted(512, 4096, **TILED | {"blockxsize": 128, "blockysize": 64})
    with scene:
        tiles = list(TileGrid(scene.width, scene.height, 128, 32))
        tracemalloc.start()
        for _tile, _pixels, _valid in read_tiles(scene, tiles, strip_height=64):
            pass
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    ring, strip, tile, list_of_tiles = 512 * 256 * 4, 512 * 64 * 8, 128 * 128 * 8, 400 * len(tiles)
    assert peak < ring + 2 * strip + 2 * tile + list_of_tiles + 2**18


def test_a_torn_file_says_so(tmp_path):
    path = make_raster(tmp_path / "t.tif", width=256, height=256, **TILED, compress="deflate")
    content = bytearray(path.read_bytes())
    content[90_000:150_000] = bytes(60_000)  # of 193 kB; the directory is at the end
    path.write_bytes(content)
    with open_scene(path) as scene, pytest.raises(RasterError, match="cannot be read at x="):
        list(read_tiles(scene, list(TileGrid(256, 256, 64, 16))))


# ----------------------------------------------------------------------------------------------------- GDAL's options


def test_gdals_cache_is_bounded_while_reading(tmp_path, monkeypatch):
    monkeypatch.delenv("GDAL_CACHEMAX", raising=False)
    path = make_raster(tmp_path / "a.tif")
    with open_scene(path) as scene:
        dataset, seen = scene._source._dataset, []

        class Watching:
            """The dataset, and GDAL's options during each read."""

            def __getattr__(self, name):
                return getattr(dataset, name)

            def read(self, *args, **options):
                seen.append(dict(getenv()))
                return dataset.read(*args, **options)

        monkeypatch.setattr(scene._source, "_dataset", Watching())
        scene.read(0, 0, 9, 9)
        with rasterio.Env(GDAL_CACHEMAX=2**26):
            scene.read(0, 0, 9, 9)
        monkeypatch.setenv("GDAL_CACHEMAX", "77")
        scene.read(0, 0, 9, 9)
    assert [options.get("GDAL_CACHEMAX") for options in seen] == [CACHE_BYTES, 2**26, None]
    assert not any("GDAL_DISABLE_READDIR_ON_OPEN" in options for options in seen)


@pytest.mark.parametrize("path", ["https://host/a.tif", "s3://bucket/a.tif", "/vsicurl/https://host/a.tif"])
def test_requests_are_repeated_and_end(path, monkeypatch):
    monkeypatch.delenv("GDAL_HTTP_MAX_RETRY", raising=False)
    options = _gdal_options(path)
    assert options["GDAL_HTTP_MAX_RETRY"] == 3 and options["GDAL_HTTP_LOW_SPEED_TIME"] == 30
    monkeypatch.setenv("GDAL_HTTP_MAX_RETRY", "9")
    assert "GDAL_HTTP_MAX_RETRY" not in _gdal_options(path)
    remote, local = _gdal_options(path), _gdal_options("/data/https/a.vrt")  # its parts may lie on a server
    assert remote.keys() - local.keys() == {"GDAL_DISABLE_READDIR_ON_OPEN"} and "GDAL_HTTP_LOW_SPEED_TIME" in local
