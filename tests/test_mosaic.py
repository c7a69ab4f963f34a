"""Mosaics: several files side by side are bit for bit the one big file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from rasterio.transform import Affine
from rasters import make_raster, pattern, write_raster
from synthetic import BlobBackend, draw_ships, write_scene

from rtmdet_geo import detect as pipeline
from rtmdet_geo.cli import cli
from rtmdet_geo.detect import detect_scene
from rtmdet_geo.errors import RasterError
from rtmdet_geo.raster import describe_scene, open_scene
from rtmdet_geo.structures import StretchSpec

RGB = ("red", "green", "blue")
PLACE = Affine(10, 0, 500_000, 0, -10, 4_000_400)
SPEC = StretchSpec(kind="percentile", low_percent=2, high_percent=98)


def cut(folder: Path, values: np.ndarray, boxes, *, mask=None, place: Affine = PLACE, **options) -> list[Path]:
    """Write windows (x, y, width, height) of an image as files of their own."""
    folder.mkdir(exist_ok=True)
    paths = []
    for number, (x, y, width, height) in enumerate(boxes):
        window = (slice(y, y + height), slice(x, x + width))
        paths.append(
            write_raster(
                folder / f"{number}.tif",
                values[:, window[0], window[1]],
                transform=place @ Affine.translation(x, y),
                mask=None if mask is None else mask[window],
                **{"colours": RGB, **options},
            )
        )
    return paths


def read(scene):
    return scene.read(-3, -2, scene.width + 5, scene.height + 4)


QUARTERS = [(25, 0, 35, 17), (0, 0, 25, 17), (0, 17, 25, 23), (25, 17, 35, 23)]  # the corner's is not the first


@pytest.mark.parametrize("kind", ["none", "nodata", "nan", "alpha", "mask"])
@pytest.mark.parametrize("as_folder", [True, False])
def test_a_mosaic_is_the_big_file(tmp_path, kind, as_folder):
    values = pattern(3, 40, 60, "float32" if kind == "nan" else "uint16", low=10, high=3000)
    hole = np.hypot(*np.meshgrid(np.arange(60) - 25, np.arange(40) - 17)) < 9
    options: dict = {"descriptions": ("B04", "B03", "B02"), "tags": {"SENSOR": "drone"}}
    if kind in ("nodata", "nan"):
        options["nodata"] = 0 if kind == "nodata" else np.nan
        values[:, hole] = options["nodata"]
    elif kind != "none":
        options |= {"mask": ~hole, "mask_kind": kind}
    (tmp_path / "big").mkdir()
    [big] = cut(tmp_path / "big", values, [(0, 0, 60, 40)], **options)
    parts = cut(tmp_path / "area.2020", values, QUARTERS, **options)
    (tmp_path / "area.2020" / "notes.txt").write_text("no raster")
    with open_scene(big, stretch=SPEC) as one:
        expected, valid = read(one)
        record, place = one.stretch_record, one.transform
        facts = (one.mask_kind, one.sensor, one.crs, one.gsd_x_m, one.band_indexes, [band.name for band in one.bands])
    with open_scene(tmp_path / "area.2020" if as_folder else parts, stretch=SPEC) as scene:
        found = read(scene)
        np.testing.assert_array_equal(found[0], expected)
        np.testing.assert_array_equal(found[1], valid)
        assert scene.stretch_record == record and tuple(scene.transform) == pytest.approx(tuple(place), abs=1e-9)
        assert facts == (
            *(scene.mask_kind, scene.sensor, scene.crs, scene.gsd_x_m, scene.band_indexes),
            [band.name for band in scene.bands],
        )
        assert scene.scene_id == ("area.2020" if as_folder else "0")
        assert sorted(scene.files) == sorted(map(str, parts))
    assert valid.any() and (kind == "none" or not valid[2:-2, 3:-2].all())


@pytest.mark.parametrize("kind", ["none", "nodata", "alpha", "mask"])
def test_holes_are_invalid_and_invalid_pixels_hide_nothing(tmp_path, kind):
    values = np.full((3, 10, 30), 50, np.uint8)
    values[:, :, 10:20], values[:, :, 20:] = 100, 200
    lower = values.copy()
    lower[:] = 77
    options: dict = {"nodata": 0} if kind == "nodata" else {}
    mask = np.ones((10, 30), bool)
    mask[:, 8:10] = False  # of the upper part, over the lower one
    upper = values.copy()
    if kind == "nodata":
        upper[:, :, 8:10] = 0
    elif kind != "none":
        options |= {"mask_kind": kind}
    has_mask = kind in ("alpha", "mask")
    below = cut(tmp_path / "below", lower, [(5, 0, 7, 10)], mask=np.ones_like(mask) if has_mask else None, **options)
    above = cut(tmp_path / "above", upper, [(8, 0, 8, 6)], mask=mask if has_mask else None, **options)
    far = cut(tmp_path / "far", values, [(20, 0, 10, 10)], mask=np.ones_like(mask) if has_mask else None, **options)
    with open_scene([*below, *above, *far], stretch=StretchSpec(kind="none")) as scene:
        assert (scene.width, scene.height) == (25, 10)
        pixels, valid = scene.read(0, 0, 25, 10)
    # columns from 5: 5..7 lower only, 8..9 upper or lower, 10..11 upper over lower, 12..15 upper, hole, 20.. far
    top = pixels[0, 0].tolist()
    under = 50 if kind == "none" else 77
    assert top == [77] * 3 + [under] * 2 + [100] * 6 + [0] * 4 + [200] * 10
    assert pixels[0, 9].tolist() == [77] * 7 + [0] * 8 + [200] * 10
    assert valid[0].tolist() == [True] * 11 + [False] * 4 + [True] * 10
    assert valid[9].tolist() == [True] * 7 + [False] * 8 + [True] * 10


def test_parts_that_do_not_fit_together(tmp_path):
    values = pattern(3, 20, 40, "uint16", low=1, high=3000)
    [first] = cut(tmp_path / "a", values, [(0, 0, 20, 20)])
    others = {
        "differ in CRS": cut(tmp_path / "b", values, [(20, 0, 20, 20)], crs="EPSG:32631"),
        "differ in pixel size": cut(tmp_path / "c", values, [(20, 0, 20, 20)], place=Affine(12, 0, 5e5, 0, -12, 4e6)),
        "between the pixels": cut(tmp_path / "d", values, [(20, 0, 20, 20)], place=PLACE @ Affine.translation(0.3, 0)),
        "differ in bands": cut(tmp_path / "e", values[:2], [(20, 0, 20, 20)], colours=RGB[:2]),
        "dtype 'uint8' and 'uint16'": cut(tmp_path / "f", values.astype("u1"), [(20, 0, 20, 20)]),
        "nodata '0.0' and None": cut(tmp_path / "g", values, [(20, 0, 20, 20)], nodata=0),
        "no CRS": [write_raster(tmp_path / "h.tif", values, crs=None, colours=RGB)],
        "north up": cut(tmp_path / "i", values, [(20, 0, 20, 20)], place=PLACE @ Affine.rotation(5)),
        "same place": cut(tmp_path / "j", values, [(0, 0, 20, 20)]),
        "does not exist": [tmp_path / "k.tif"],
    }
    for message, [other] in others.items():
        with pytest.raises(RasterError, match=message):
            open_scene([first, other])
    (tmp_path / "empty").mkdir()
    with pytest.raises(RasterError, match="holds no rasters"):
        open_scene(tmp_path / "empty")
    with pytest.raises(RasterError, match="no files"):
        open_scene([])


def test_one_file_is_no_mosaic(tmp_path):
    path = make_raster(tmp_path / "a.tif")
    with open_scene([path]) as scene:
        assert scene.path == str(path) and scene.files == (str(path),)
    assert describe_scene(tmp_path)["width"] == 60


@pytest.mark.parametrize("as_folder", [True, False])
def test_detect_finds_in_a_mosaic_what_it_finds_in_the_big_file(tmp_path, monkeypatch, as_folder):
    monkeypatch.setattr(pipeline, "open_backend", lambda path, **options: BlobBackend())
    monkeypatch.setattr(pipeline, "find_model", lambda model: Path(__file__))
    image = draw_ships(500, 400)
    big = detect_scene(write_scene(tmp_path / "port.tif", image))
    boxes = [(0, 0, 130, 400), (130, 0, 370, 250), (130, 250, 370, 150)]
    parts = cut(tmp_path / "port", np.stack([image] * 3), boxes)
    scene = tmp_path / "port" if as_folder else parts
    output = tmp_path / "port" / "ships.gpkg"  # beside the parts
    found = detect_scene(os.fspath(scene) if as_folder else scene, output)
    assert len(found) == len(big) > 0
    for name in ("score", "length_m", "width_m"):
        np.testing.assert_allclose(found[name], big[name], rtol=1e-6)
    again = detect_scene(scene, output, overwrite=True)
    assert len(again) == len(big)


def test_several_files_are_one_scene_on_request_only(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "open_backend", lambda path, **options: BlobBackend())
    image = draw_ships(500, 400)
    parts = cut(tmp_path / "port", np.stack([image] * 3), [(0, 0, 130, 400), (130, 0, 370, 400)])
    words = ["detect", *map(str, parts), "-o", str(tmp_path / "ships.gpkg"), "--json"]
    refused = CliRunner().invoke(cli, words)
    assert refused.exit_code == 2 and "--mosaic" in refused.stderr
    done = CliRunner().invoke(cli, [*words, "--mosaic"])
    assert done.exit_code == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["width"], summary["height"], summary["num_detections"]) == (500, 400, 5)
