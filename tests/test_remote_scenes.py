"""Scenes that lie on a server: read in parts, asked for again when it fails, gone on with when it is well again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from click.testing import CliRunner
from rangeserver import RangeServer, serve
from synthetic import TRANSFORM, BlobBackend, draw_ships

from rtmdet_geo import detect as pipeline
from rtmdet_geo.cli import cli
from rtmdet_geo.detect import detect_scene
from rtmdet_geo.errors import RasterError
from rtmdet_geo.journal import journal_folder
from rtmdet_geo.raster import open_scene
from rtmdet_geo.strips import read_tiles
from rtmdet_geo.structures import StretchSpec
from rtmdet_geo.tiles import TileGrid

SIZE = 1500
SHIPS = np.array([[x, y, 40.0, 12.0, 0.3 * (x - y)] for x in range(60, SIZE, 170) for y in range(70, SIZE, 170)])


def write_cog(path: Path, image: np.ndarray, column: int = 0) -> Path:
    """Write three bands of an image and noise, so that their blocks take some bytes, ``column`` px to the east."""
    height, width = image.shape
    pixels = np.maximum(np.random.default_rng(0).integers(0, 60, (3, height, width), dtype=np.uint8), image)
    profile = {
        "driver": "COG",
        "compress": "deflate",
        "level": 1,
        "blocksize": 256,
        "overviews": "auto",
        "dtype": "uint8",
    }
    place = {"crs": "EPSG:32630", "transform": TRANSFORM @ Affine.translation(column, 0)}
    with rasterio.open(path, "w", **profile, **place, count=3, width=width, height=height) as target:
        target.write(pixels)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A COG with noise, so that its blocks take some bytes, and in a folder of its name in a bucket."""
    folder = tmp_path_factory.mktemp("served")
    write_cog(folder / "port.tif", draw_ships(SIZE, SIZE, SHIPS))
    with rasterio.open(folder / "port.tif") as written:
        assert written.overviews(1) and written.block_shapes[0] == (256, 256)
    (folder / "bucket").mkdir()
    (folder / "bucket" / "port.tif").hardlink_to(folder / "port.tif")
    return folder


@pytest.fixture(scope="module")
def server(folder) -> RangeServer:
    with serve(folder) as running:
        yield running


@pytest.fixture
def hasty(monkeypatch):
    """Set short time-outs by GDAL's own variables, as a user does."""
    options = {"MAX_RETRY": "1", "RETRY_DELAY": "0.02", "TIMEOUT": "1", "LOW_SPEED_TIME": "1", "CONNECTTIMEOUT": "1"}
    for name, value in options.items():
        monkeypatch.setenv(f"GDAL_HTTP_{name}", value)


@pytest.fixture
def engine(monkeypatch) -> BlobBackend:
    engine = BlobBackend()
    monkeypatch.setattr(pipeline, "open_backend", lambda path, **options: engine)
    monkeypatch.setattr(pipeline, "find_model", lambda model: Path(__file__))
    return engine


def rows(features) -> list[tuple]:
    """Return what must be equal to the bit; ids follow the order."""
    values = zip(features.geometry.to_wkb(), features["score"], features["length_m"], features["on_edge"], strict=True)
    return sorted(values)


def sent(server: RangeServer) -> int:
    return sum(request["sent"] for request in server.requests())


# ------------------------------------------------------------------------------------------------- a server that works


def test_a_scene_on_a_server_is_the_local_one(server, folder, engine, hasty):
    local = detect_scene(folder / "port.tif")
    assert len(local) == len(SHIPS)
    server.fail()
    found = detect_scene(f"{server.url}/port.tif")
    assert rows(found) == rows(local)
    size = (folder / "port.tif").stat().st_size
    everything = sent(server)
    assert 0.5 * size < everything < 1.05 * size  # no block twice; overviews are not asked for
    server.fail()
    corner = detect_scene(f"{server.url}/port.tif", bounds=(500_000, 4_498_000, 502_000, 4_500_000))
    assert 0 < len(corner) < len(local) and 0 < sent(server) < 0.2 * everything
    assert set(rows(corner)) <= set(rows(local))


def test_s3(server, folder, engine, hasty, monkeypatch):
    endpoint = server.url.removeprefix("http://")
    for name, value in {"S3_ENDPOINT": endpoint, "NO_SIGN_REQUEST": "YES", "HTTPS": "NO"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_VIRTUAL_HOSTING", "FALSE")
    server.fail()
    found = detect_scene("s3://bucket/port.tif")
    assert rows(found) == rows(detect_scene(folder / "port.tif"))
    paths = {request["path"] for request in server.requests() if request["sent"]}
    assert paths == {"/bucket/port.tif"}


def test_a_mosaic_of_remote_parts(server, folder, engine, hasty):
    part = write_cog(folder / "east.tif", draw_ships(300, SIZE, SHIPS[:3]), SIZE)
    local = detect_scene([folder / "port.tif", part])
    assert len(local) == len(SHIPS) + 3
    server.fail()
    assert rows(detect_scene([f"{server.url}/port.tif", f"{server.url}/east.tif"])) == rows(local)


# --------------------------------------------------------------------------------------------------- one that does not


@pytest.mark.parametrize(
    ("fault", "after"),
    [("status:500", 0), ("status:503", 1), ("cut:4000", 0), ("cut:4000", 1), ("short:4000", 1), ("stall", 1)],
)
def test_what_fails_now_and_then_is_asked_for_again(server, folder, hasty, fault, after):
    tiles = list(TileGrid(SIZE, SIZE, 256, 64))
    with open_scene(folder / "port.tif", stretch=StretchSpec(kind="none")) as scene:
        expected = [pixels for _, pixels, _ in read_tiles(scene, tiles)]
    server.fail()
    with open_scene(f"{server.url}/port.tif", stretch=StretchSpec(kind="none")) as scene:
        server.fail(fault, after=after, times=1, only="/port.tif")
        found = [pixels for _, pixels, _ in read_tiles(scene, tiles)]
    assert sum(bool(request["fault"]) for request in server.requests()) == 1
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("fault", ["status:500", "cut:4000", "stop:4000"])
def test_a_server_that_stays_ill_is_one_error_and_the_run_goes_on(server, folder, engine, hasty, tmp_path, fault):
    url, output = f"{server.url}/port.tif", tmp_path / "ships.gpkg"
    unbroken = detect_scene(folder / "port.tif")
    num_tiles, engine.num_images = engine.num_images, 0

    def fall_ill(done: int, total: int) -> None:
        if done == 0:
            server.fail(fault, after=2, only="/port.tif")

    server.fail()
    with pytest.raises(RasterError) as refusal:
        detect_scene(url, output, progress=fall_ill)
    message = str(refusal.value)
    assert url in message and "--resume" in message and "\n" not in message
    assert refusal.value.__notes__ and 0 < engine.num_images < num_tiles
    assert journal_folder(output).exists() and not output.exists()
    server.fail()
    resumed = detect_scene(url, output, resume=True)
    assert rows(resumed) == rows(unbroken)
    assert engine.num_images == num_tiles and not journal_folder(output).exists()


@pytest.mark.parametrize("fault", ["status:500", "status:404", "status:403", "stall"])
def test_a_server_that_is_ill_from_the_start(server, engine, hasty, monkeypatch, tmp_path, fault):
    monkeypatch.setenv("GDAL_HTTP_MAX_RETRY", "0")
    url, output = f"{server.url}/port.tif", tmp_path / "ships.gpkg"
    server.fail(fault)
    result = CliRunner().invoke(cli, ["detect", url, "-o", str(output)])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and url in lines[0] and "cannot be opened" in lines[0]
    assert not output.exists()
    server.fail()
    with open_scene(url, stretch=StretchSpec(kind="none")) as scene:  # it is not remembered as missing
        assert scene.width == SIZE


def test_another_file_in_its_place_is_refused(server, folder, hasty):
    write_cog(folder / "moving.tif", draw_ships(600, 600))
    server.fail()
    with open_scene(f"{server.url}/moving.tif", stretch=StretchSpec(kind="none")) as scene:
        write_cog(folder / "moving.tif", draw_ships(500, 600))
        server.fail("cut:100", times=1, only="/moving.tif")
        with pytest.raises(RasterError, match="changed while it was read"):
            scene.read(300, 300, 200, 200)
