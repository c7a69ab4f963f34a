"""One scene in other files: JPEG 2000, masks beside, inside or as a band; read by several threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import rasterio
from click.testing import CliRunner
from rasterio.enums import ColorInterp
from synthetic import SHIPS, TRANSFORM, BlobBackend, draw_ships, write_scene

from rtmdet_geo import detect as pipeline
from rtmdet_geo.cli import cli
from rtmdet_geo.detect import detect_scene
from rtmdet_geo.raster import open_scene
from rtmdet_geo.strips import read_tiles
from rtmdet_geo.structures import StretchSpec
from rtmdet_geo.tiles import TileGrid

NONE = StretchSpec(kind="none")


@pytest.fixture
def engine(monkeypatch) -> BlobBackend:
    engine = BlobBackend()
    monkeypatch.setattr(pipeline, "open_backend", lambda path, **options: engine)
    monkeypatch.setattr(pipeline, "find_model", lambda model: Path(__file__))
    return engine


@pytest.fixture
def image() -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, 60, (400, 500), dtype=np.uint8)
    return np.maximum(noise, draw_ships(500, 400))


def write_jp2(path: Path, image: np.ndarray) -> Path:
    """Write three bands of an image without loss, in blocks."""
    profile = {"driver": "JP2OpenJPEG", "QUALITY": 100, "REVERSIBLE": "YES", "YCBCR420": "NO", "BLOCKXSIZE": 128}
    place = {"crs": "EPSG:32630", "transform": TRANSFORM, "width": image.shape[1], "height": image.shape[0]}
    with rasterio.open(path, "w", **profile, BLOCKYSIZE=128, **place, count=3, dtype="uint8") as target:
        target.write(np.stack([image] * 3))
    return path


def rows(features) -> list[tuple]:
    return sorted(zip(features.geometry.to_wkb(), features["score"], features["length_m"], strict=True))


def test_jpeg_2000_gives_what_the_tif_gives(engine, image, tmp_path):
    tif = detect_scene(write_scene(tmp_path / "a.tif", image))
    jp2 = write_jp2(tmp_path / "b.jp2", image)
    with open_scene(jp2, stretch=NONE) as scene:
        assert scene.block_shape[0] == 128 and (scene.read(0, 0, 500, 400)[0][0] == image).all()
    assert rows(detect_scene(jp2)) == rows(tif) and len(tif) == len(SHIPS)


@pytest.mark.parametrize("kind", ["jp2", "striped", "tiled"])
def test_several_threads_may_read_one_scene(image, tmp_path, kind):
    if kind == "jp2":
        path = write_jp2(tmp_path / "a.jp2", image)
    else:
        path = write_scene(tmp_path / "a.tif", image, compress="deflate")
        if kind == "striped":
            with rasterio.open(path) as tiled:
                profile = {name: tiled.profile[name] for name in ("count", "dtype", "crs", "transform", "compress")}
            with rasterio.open(tmp_path / "b.tif", "w", width=500, height=400, photometric="RGB", **profile) as target:
                target.write(np.stack([image] * 3))
            path = tmp_path / "b.tif"
    tiles = list(TileGrid(500, 400, 128, 32))
    with open_scene(path, stretch=NONE) as scene, ThreadPoolExecutor(4) as threads:
        expected = {tile: pixels for tile, pixels, _ in read_tiles(scene, tiles)}
        jobs = [(tile, threads.submit(scene.read, tile.x, tile.y, tile.width, tile.height)) for tile in tiles * 4]
        for tile, job in jobs:
            np.testing.assert_array_equal(job.result()[0], expected[tile])


@pytest.mark.parametrize("kind", ["none", "beside", "inside", "alpha"])
def test_nothing_is_found_where_the_mask_says_no(engine, image, tmp_path, kind):
    path = write_scene(tmp_path / "a.tif", image, bands=4 if kind == "alpha" else 3)
    mask = np.full(image.shape, 255, np.uint8)
    mask[150:250, 200:300] = 0  # of the second ship's place
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=kind == "inside"), rasterio.open(path, "r+") as target:
        if kind == "alpha":
            target.colorinterp = [*(ColorInterp.red, ColorInterp.green, ColorInterp.blue), ColorInterp.alpha]
            target.write(mask, 4)
        elif kind != "none":
            target.write_mask(mask)
    assert (tmp_path / "a.tif.msk").exists() == (kind == "beside")
    found = detect_scene(path)
    columns = (found.geometry.centroid.x - TRANSFORM.c) / 10
    is_there = np.isclose(columns, SHIPS[1, 0], atol=1).any()
    assert len(found) == len(SHIPS) - (kind != "none") and is_there == (kind == "none")


def test_several_scenes_on_the_command_line_are_one_mosaic(engine, image, tmp_path):
    whole = write_scene(tmp_path / "whole.tif", image)
    parts = []
    for number, columns in enumerate((slice(0, 240), slice(240, 500))):
        part = write_scene(tmp_path / f"{number}.tif", image[:, columns])
        with rasterio.open(part, "r+") as target:
            target.transform = TRANSFORM @ rasterio.Affine.translation(columns.start, 0)
        parts.append(str(part))
    refusal = CliRunner().invoke(cli, ["detect", *parts, "--json"])
    assert refusal.exit_code == 2 and "--mosaic" in refusal.stderr
    done = CliRunner().invoke(cli, ["detect", *parts, "--mosaic", "-o", str(tmp_path / "ships.geojson")])
    assert done.exit_code == 0, done.stderr
    assert f"{len(detect_scene(whole))} detections" in done.stdout
