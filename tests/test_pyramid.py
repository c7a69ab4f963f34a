"""Objects longer than tiles overlap: coarser looks at the scene find them whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from shapely.geometry import Polygon
from synthetic import TRANSFORM, BlobBackend, draw_ships, make_spec, small_model, write_scene

from rtmdet_geo.boxes import boxes_to_polygons
from rtmdet_geo.cli import cli
from rtmdet_geo.detect import detect_scene
from rtmdet_geo.errors import Cancelled, ConfigError
from rtmdet_geo.pyramid import LongObjects, make_levels
from rtmdet_geo.raster import open_scene
from rtmdet_geo.structures import StretchSpec
from rtmdet_geo.tiles import TileGrid

SIZE = 1200
TILES = {"tile_size": 128, "overlap": 32}
#: Two of 3 and 6 tiles' lengths, one just longer than the overlap; small ones, two of them beside the longest.
LONG = np.array([[600.0, 300.0, 760.0, 40.0, 0.1], [500.0, 800.0, 400.0, 30.0, -1.5], [900.0, 700.0, 50.0, 12.0, 1.2]])
SMALL = np.array([[600.0, 350.0, 24.0, 8.0, 0.1], [300.0, 236.0, 20.0, 8.0, 0.1], [1000.0, 1000.0, 22.0, 9.0, 0.7]])


def save(path: Path, ships: NDArray[np.float64]) -> Path:
    return write_scene(path, draw_ships(SIZE, SIZE, ships))


def engine() -> BlobBackend:
    return BlobBackend(make_spec(stretch=StretchSpec(kind="none"), iou_threshold=0.1))


def overlaps(found, ships: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return (found, ships) the IoU of their polygons."""
    truth = [Polygon([TRANSFORM @ tuple(point) for point in corners]) for corners in boxes_to_polygons(ships)]
    return np.array([[one.intersection(other).area / one.union(other).area for other in truth] for one in found])


def test_long_ships_are_found_once_and_whole(tmp_path):
    ships = np.concatenate([LONG, SMALL])
    scene = save(tmp_path / "a.tif", ships)
    found = detect_scene(scene, tmp_path / "a.gpkg", model=engine(), pyramid=3, **TILES)
    iou = overlaps(found.geometry, ships)
    assert len(found) == len(ships)
    assert (iou.max(axis=0) > 0.75).all()
    live = detect_scene(scene, model=engine(), pyramid=3, **TILES)
    assert live.geometry.geom_equals(found.geometry).all()


def test_without_a_pyramid_long_ships_are_in_pieces(tmp_path):
    """A negative control, and one level is not enough for the longest."""
    ships = np.concatenate([LONG, SMALL])
    scene = save(tmp_path / "a.tif", ships)
    plain = detect_scene(scene, model=engine(), **TILES)
    one = detect_scene(scene, model=engine(), pyramid=1, **TILES)
    assert len(plain) > len(one) > len(ships)
    assert overlaps(plain.geometry, LONG).max(axis=0)[0] < 0.5


def test_short_objects_are_those_of_the_finest_level(tmp_path):
    scene = save(tmp_path / "a.tif", SMALL)
    plain = detect_scene(scene, model=engine(), **TILES)
    found = detect_scene(scene, model=engine(), pyramid=8, **TILES)
    assert len(plain) == 3 and found.geometry.geom_equals(plain.geometry).all()


def test_levels_end_with_one_tile_and_keep_to_the_area(tmp_path):
    scene = save(tmp_path / "a.tif", LONG)
    with open_scene(scene, model_bands=("red", "green", "blue"), stretch=StretchSpec(kind="none")) as source:
        grid = TileGrid(source.width, source.height, 128, 32)
        levels = make_levels(source, grid, None, 8)
        assert [level.scene.width for level in levels] == [600, 300, 150, 75]
        assert [level.first_index for level in levels] == np.cumsum(
            [len(grid), *(len(level.grid) for level in levels[:-1])]
        ).tolist()
        pixels, valid = levels[1].scene.read(0, 0, 300, 300)
        assert pixels.shape == (3, 300, 300) and valid.all() and source.width == SIZE
        long_objects = LongObjects(grid)
        assert long_objects.take(0) == []
    bounds = (TRANSFORM.c, TRANSFORM.f - 3000, TRANSFORM.c + 3000, TRANSFORM.f)  # 300 px of the upper left
    run = engine()
    detect_scene(scene, model=run, pyramid=2, bounds=bounds, **TILES)
    everything = engine()
    detect_scene(scene, model=everything, pyramid=2, **TILES)
    assert run.num_images < everything.num_images / 4


def test_a_cancelled_pyramid_goes_on(tmp_path):
    ships = np.concatenate([LONG, SMALL])
    scene, output = save(tmp_path / "a.tif", ships), tmp_path / "a.gpkg"
    expected = detect_scene(scene, model=engine(), pyramid=3, **TILES)
    first, seen = engine(), []
    with pytest.raises(Cancelled):
        detect_scene(
            scene,
            output,
            model=first,
            pyramid=3,
            progress=lambda done, total: seen.append((done, total)),
            cancelled=lambda: bool(seen) and seen[-1][0] >= 30,
            **TILES,
        )
    second = engine()
    found = detect_scene(scene, output, model=second, pyramid=3, resume=True, **TILES)
    assert found.geometry.geom_equals(expected.geometry).all()
    assert second.num_images <= seen[-1][1] - 30
    with pytest.raises(ConfigError, match="pyramid"):
        detect_scene(scene, tmp_path / "b.gpkg", model=engine(), pyramid=9, **TILES)


def test_masks_need_none(tmp_path):
    scene = save(tmp_path / "a.tif", SMALL)
    masks = BlobBackend(make_spec(kind="mask", architecture="rtmdet_ins_test"))
    with pytest.raises(ConfigError, match="without a pyramid"):
        detect_scene(scene, model=masks, pyramid=1)


def test_from_the_command_line(tmp_path):
    scene = save(tmp_path / "a.tif", LONG)
    words = ["detect", str(scene), "-m", str(small_model()), "-o", str(tmp_path / "a.gpkg"), "--pyramid", "2", "--json"]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0 and '"pyramid": 2' in done.stdout
