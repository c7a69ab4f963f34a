"""The pipeline with an engine whose answers are known."""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import geopandas
import numpy as np
import pyproj
import pytest
import rasterio
import shapely
from affine import Affine
from synthetic import GROUND, SHIP, SHIPS, TRANSFORM, BlobBackend, draw_ships, make_spec, write_scene

from rtmdet_geo import detect as pipeline
from rtmdet_geo.detect import describe_run, detect_scene
from rtmdet_geo.errors import (
    BandWarning,
    Cancelled,
    ConfigError,
    NodataWarning,
    NotGeoreferencedWarning,
    OutputError,
    PaddedTileWarning,
    RasterError,
    SaturatedTileWarning,
    UnknownClassError,
)
from rtmdet_geo.structures import Detections
from rtmdet_geo.vector import SCHEMA


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> BlobBackend:
    """Put the blob engine in the place of every model."""
    backend = BlobBackend()
    monkeypatch.setattr(pipeline, "open_backend", lambda path, **options: backend)
    monkeypatch.setattr(pipeline, "find_model", lambda model: Path(__file__))
    return backend


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    return write_scene(tmp_path / "port.tif", draw_ships(500, 400))


def match(features: geopandas.GeoDataFrame, ships: np.ndarray = SHIPS) -> float:
    """Return the largest distance in px from a ship's true centre to the nearest detection's centroid."""
    expected = np.stack([TRANSFORM.c + 10 * ships[:, 0], TRANSFORM.f - 10 * ships[:, 1]], axis=1)
    found = np.stack([features.geometry.centroid.x, features.geometry.centroid.y], axis=1)
    return float(np.linalg.norm(expected[:, None] - found[None], axis=2).min(axis=1).max()) / 10.0


def test_ships_come_back_at_their_world_coordinates(engine, scene, tmp_path):
    output = tmp_path / "ships.gpkg"
    result = detect_scene(scene, output)
    layer = geopandas.read_file(output)
    assert len(result) == len(layer) == len(SHIPS)
    assert match(layer) < 0.75
    assert list(layer.columns) == [*SCHEMA, "geometry"]
    assert layer.crs == pyproj.CRS("EPSG:32630")
    # 10 m pixels of UTM close to the central meridian: lengths within two pixels of rasterisation
    order = np.argsort(SHIPS[:, 2])
    np.testing.assert_allclose(np.sort(layer["length_m"]), SHIPS[order, 2] * 10 * 1.0004, atol=21)
    # the first ship lies along x: east-west; the fourth along y: north-south
    by_x = layer.iloc[np.argsort(layer.geometry.centroid.x)]
    assert by_x.iloc[0]["azimuth_deg"] == pytest.approx(90, abs=1)
    assert min(by_x.iloc[-1]["azimuth_deg"] % 180, -by_x.iloc[-1]["azimuth_deg"] % 180) < 1


def test_summary(engine, scene, tmp_path):
    summary = detect_scene(scene, tmp_path / "ships.gpkg").attrs["summary"]
    assert summary["num_detections"] == len(SHIPS)
    assert summary["num_by_class"] == {"ship": len(SHIPS)}
    assert summary["num_tiles"] == 3 * 2 == engine.num_images
    assert summary["num_empty_tiles"] == summary["num_saturated_tiles"] == 0
    assert summary["parameters"]["score_threshold"] == 0.3 and summary["parameters"]["tile_size"] == 256
    assert summary["gsd_x_m"] == pytest.approx(10, rel=2e-3)
    assert summary["model"]["name"] == "blobs" and len(summary["model"]["sha256"]) == 64
    assert summary["stretch"]["kind"] == "none"
    assert summary["versions"]["rtmdet_geo"] and summary["seconds"] > 0 and summary["run_id"]


@pytest.mark.parametrize("tile_size,overlap", [(128, 64), (192, 96), (256, 64), (512, 0)])
def test_result_does_not_depend_on_the_grid(engine, scene, tile_size, overlap):
    result = detect_scene(scene, tile_size=tile_size, overlap=overlap)
    assert len(result) == len(SHIPS)
    assert match(result) < 0.75


@pytest.mark.parametrize("gsd_m", [6.0, 15.0, 7.3])
def test_resampling_keeps_the_places(engine, scene, gsd_m):
    engine.spec = make_spec(gsd_m=gsd_m)
    result = detect_scene(scene)
    assert len(result) == len(SHIPS)
    assert match(result) < 1.5


def test_batches_give_what_single_tiles_give(engine, scene):
    one, three = detect_scene(scene, batch_size=1), detect_scene(scene, batch_size=3)
    assert one.drop(columns="run_id").equals(three.drop(columns="run_id"))


def test_twice_is_the_same_but_for_the_run(engine, scene):
    first, second = detect_scene(scene), detect_scene(scene)
    assert first.drop(columns="run_id").equals(second.drop(columns="run_id"))
    assert first.attrs["summary"]["run_id"] != second.attrs["summary"]["run_id"]


def test_blank_scene_gives_an_empty_layer(engine, tmp_path):
    path = write_scene(tmp_path / "sea.tif", np.full((300, 300), GROUND, np.uint8))
    result = detect_scene(path, tmp_path / "sea.gpkg")
    layer = geopandas.read_file(tmp_path / "sea.gpkg")
    assert len(result) == len(layer) == 0
    assert list(layer.columns) == [*SCHEMA, "geometry"] and layer.crs is not None


def test_all_nodata_scene_is_a_valid_empty_layer_and_runs_nothing(engine, tmp_path):
    path = write_scene(tmp_path / "void.tif", np.zeros((300, 300), np.uint8), nodata=0)
    with pytest.warns(NodataWarning, match="no valid pixel"):
        result = detect_scene(path, tmp_path / "void.gpkg")
    assert engine.num_images == 0
    assert result.attrs["summary"]["num_empty_tiles"] == result.attrs["summary"]["num_tiles"] == 4
    assert list(geopandas.read_file(tmp_path / "void.gpkg").columns) == [*SCHEMA, "geometry"]


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (31, 33), (100, 300)])
def test_scene_smaller_than_a_tile(engine, tmp_path, size):
    image = np.full(size, GROUND, np.uint8)
    path = write_scene(tmp_path / "small.tif", image)
    assert len(detect_scene(path)) == 0
    assert engine.num_images == (1 if size[1] <= 256 else 2)


def test_one_bright_pixel_scene_is_one_detection(engine, tmp_path):
    path = write_scene(tmp_path / "pixel.tif", np.full((1, 1), SHIP, np.uint8))
    (geometry,) = detect_scene(path).geometry
    assert geometry.bounds == pytest.approx((500_000, 4_499_990, 500_010, 4_500_000))


def test_detections_in_the_padding_or_without_data_are_dropped(engine, tmp_path, monkeypatch):
    image = np.full((100, 100), GROUND, np.uint8)
    image[:, 50:] = 0
    path = write_scene(tmp_path / "half.tif", image, nodata=0)
    boxes = [[20, 20, 9, 5, 0], [70, 20, 9, 5, 0], [20, 101, 9, 5, 0], [-1, 20, 9, 5, 0], [200, 20, 9, 5, 0]]
    found = Detections(np.array(boxes), np.full(5, 0.9), np.zeros(5))
    monkeypatch.setattr(engine, "_find", lambda image: found)
    (centroid,) = detect_scene(path).geometry.centroid
    assert (centroid.x, centroid.y) == pytest.approx((500_200, 4_499_800))


def test_classes_are_filtered_by_name(engine, scene):
    engine.spec = make_spec(classes=("ship", "buoy"))
    engine.labels = (0, 1)
    assert detect_scene(scene).attrs["summary"]["num_by_class"] == {"ship": 5, "buoy": 5}
    result = detect_scene(scene, classes=["buoy"])
    assert set(result["class_name"]) == {"buoy"} and len(result) == 5


@pytest.mark.parametrize(
    "error,options,words",
    [
        (UnknownClassError, {"classes": ["boat"]}, "'boat'.*ship"),
        (ConfigError, {"score_threshold": 1.5}, "score_threshold"),
        (ConfigError, {"iou_threshold": float("nan")}, "iou_threshold"),
        (ConfigError, {"tile_size": 100}, "multiple of 32"),
        (ConfigError, {"tile_size": 128, "overlap": 128}, "overlap"),
        (ConfigError, {"batch_size": 0}, "batch_size"),
        (ConfigError, {"dst_crs": "EPSG:nonsense"}, "nonsense"),
        (OutputError, {"output": "nowhere/ships.gpkg"}, "nowhere"),
        (OutputError, {"output": "ships.xyz"}, "xyz"),
    ],
)
def test_bad_values_end_before_any_tile(engine, scene, error, options, words):
    with pytest.raises(error, match=words):
        detect_scene(scene, **options)
    assert engine.num_images == 0


def test_fixed_tile_size_is_respected(engine, scene):
    engine.fixed_tile_size = 256
    with pytest.raises(ConfigError, match="256 px only"):
        detect_scene(scene, tile_size=512)
    assert len(detect_scene(scene)) == 5


def test_scenes_that_a_fixed_tile_size_pads_are_named(engine, scene):
    engine.fixed_tile_size = 512
    with pytest.warns(PaddedTileWarning, match=r"port\.tif' is smaller than the tiles of 512 px"):
        detect_scene(scene)


def test_existing_output_is_refused_untouched(engine, scene, tmp_path):
    output = tmp_path / "ships.gpkg"
    output.write_text("mine")
    with pytest.raises(OutputError, match="overwrite"):
        detect_scene(scene, output)
    assert output.read_text() == "mine" and engine.num_images == 0
    detect_scene(scene, output, overwrite=True)
    assert len(geopandas.read_file(output)) == 5


def test_missing_scene_and_text_file(engine, tmp_path):
    with pytest.raises(RasterError, match="does not exist"):
        detect_scene(tmp_path / "nosuch.tif")
    (tmp_path / "note.tif").write_text("no raster")
    with pytest.raises(RasterError, match=r"note\.tif"):
        detect_scene(tmp_path / "note.tif")


def test_truncated_scene_fails_in_the_middle_and_leaves_its_journal(engine, tmp_path):
    noise = np.random.default_rng(0).integers(0, 100, (600, 600), dtype=np.uint8)
    path = write_scene(tmp_path / "cut.tif", noise, compress="deflate")
    os.truncate(path, path.stat().st_size * 6 // 10)
    done: list[int] = []
    with pytest.raises(RasterError, match=r"cut\.tif"):
        detect_scene(path, tmp_path / "ships.gpkg", progress=lambda number, total: done.append(number))
    assert max(done) > 0, "the first tiles should have been read"
    assert sorted(item.name for item in tmp_path.iterdir()) == ["cut.tif", "ships.gpkg.partial"]


def test_progress_counts_every_tile(engine, tmp_path):
    image = draw_ships(500, 400)
    image[:, 300:] = 0
    path = write_scene(tmp_path / "partly.tif", image, nodata=0)
    calls: list[tuple[int, int]] = []
    summary = detect_scene(path, tile_size=128, overlap=0, progress=lambda *call: calls.append(call)).attrs["summary"]
    assert calls[0] == (0, 16) and calls[-1] == (16, 16)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert summary["num_empty_tiles"] > 0


def test_cancel_before_the_first_tile_leaves_nothing(engine, scene, tmp_path):
    with pytest.raises(Cancelled, match="stopped after"):
        detect_scene(scene, tmp_path / "ships.gpkg", cancelled=lambda: True)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["port.tif"]


def test_saturation_is_reported_once(engine, scene, monkeypatch):
    find = engine._find

    def saturated(image):
        engine.num_saturated += 1
        return find(image)

    monkeypatch.setattr(engine, "_find", saturated)
    with pytest.warns(SaturatedTileWarning, match="6 of 6 tiles") as caught:
        assert detect_scene(scene).attrs["summary"]["num_saturated_tiles"] == 6
    assert len(caught) == 1


def test_scene_without_crs_gives_pixels(engine, tmp_path):
    path = write_scene(tmp_path / "photo.tif", draw_ships(500, 400), crs=None)
    with pytest.warns(NotGeoreferencedWarning):
        features = detect_scene(path)
    assert features.crs is None and features["length_m"].isna().all()
    assert np.abs(np.sort(features.geometry.centroid.x) - np.sort(SHIPS[:, 0])).max() < 0.75
    with pytest.warns(NotGeoreferencedWarning), pytest.raises(ConfigError, match="dst-crs"):
        detect_scene(path, dst_crs="EPSG:4326")


def test_output_crs(engine, scene, tmp_path):
    detect_scene(scene, tmp_path / "ships.geojson", dst_crs="EPSG:4326")
    layer = geopandas.read_file(tmp_path / "ships.geojson").to_crs("EPSG:32630")
    assert match(layer) < 0.75
    with pytest.raises(ConfigError, match=r"always EPSG:4326.*\.gpkg"):
        detect_scene(scene, tmp_path / "utm.geojson", dst_crs="EPSG:32630")
    assert not (tmp_path / "utm.geojson").exists()


def test_preview_is_drawn_and_checked_first(engine, scene, tmp_path):
    picture = tmp_path / "ships.png"
    assert detect_scene(scene, preview=picture).attrs["summary"]["preview"] == str(picture)
    image = cv2.imread(str(picture))
    assert image.shape[0] >= 400 and image.shape[1] >= 500
    with pytest.raises(OutputError, match="overwrite"):
        detect_scene(scene, preview=picture)
    with pytest.raises(OutputError, match="png"):
        detect_scene(scene, preview=tmp_path / "ships.jpg")


def test_one_band_is_repeated_with_a_warning(engine, tmp_path):
    path = write_scene(tmp_path / "grey.tif", draw_ships(500, 400), bands=1)
    with pytest.warns(BandWarning):
        assert len(detect_scene(path)) == 5


def test_result_reads_well(engine, scene):
    result = detect_scene(scene)
    assert describe_run(result).startswith(f"{scene}: 5 detections (5 ship) in 6 tiles, ")
    assert isinstance(result, geopandas.GeoDataFrame)


@pytest.mark.parametrize("crs", ["EPSG:3857", "EPSG:4326", "EPSG:32634"])
def test_a_ship_keeps_its_measures_where_pixels_are_not_square(monkeypatch, tmp_path, crs):
    """A rectangle on the ground at 54 degrees north, 240 x 60 m, heading 30 degrees; the model wants 3 m pixels."""
    geod, lon, lat = pyproj.Geod(ellps="WGS84"), 18.5, 54.0
    offsets = np.array([[120, 30], [120, -30], [-120, -30], [-120, 30]], float)  # m ahead, m to starboard
    azimuths = 30 + np.degrees(np.arctan2(offsets[:, 1], offsets[:, 0]))
    corners = geod.fwd(np.full(4, lon), np.full(4, lat), azimuths, np.hypot(*offsets.T))[:2]
    to_scene = pyproj.Transformer.from_crs("EPSG:4326", crs, always_xy=True)
    truth = shapely.Polygon(np.column_stack(to_scene.transform(*corners)))
    pixel = 5e-5 if crs == "EPSG:4326" else 5.5
    x, y = to_scene.transform(lon, lat)
    transform = Affine(pixel, 0, x - 150.3 * pixel, 0, -pixel, y + 140.7 * pixel)
    columns, rows = np.meshgrid(np.arange(320) + 0.5, np.arange(300) + 0.5)
    inside = shapely.contains_xy(truth, transform.c + pixel * columns, transform.f - pixel * rows)
    image = np.where(inside, SHIP, GROUND).astype(np.uint8)
    profile = {"driver": "GTiff", "width": 320, "height": 300, "count": 3, "dtype": "uint8", "photometric": "RGB"}
    with rasterio.open(tmp_path / "north.tif", "w", **profile, crs=crs, transform=transform) as dataset:
        dataset.write(np.stack([image] * 3))
    backend = BlobBackend(make_spec(gsd_m=3.0))
    monkeypatch.setattr(pipeline, "open_backend", lambda path, **options: backend)
    monkeypatch.setattr(pipeline, "find_model", lambda model: Path(__file__))
    features = detect_scene(tmp_path / "north.tif")
    assert len(features) == 1
    ship, outline = features.iloc[0], features.geometry.iloc[0]
    assert outline.intersection(truth).area / outline.union(truth).area > 0.85
    assert geod.inv(ship["lon"], ship["lat"], lon, lat)[2] < 1.5
    assert ship["length_m"] == pytest.approx(240, abs=10) and ship["width_m"] == pytest.approx(60, abs=10)
    assert ship["azimuth_deg"] == pytest.approx(30, abs=1)


def test_the_scene_is_never_an_output(engine, tmp_path):
    image = tmp_path / "port.png"
    assert cv2.imwrite(str(image), draw_ships(500, 400))
    before = image.read_bytes()
    with pytest.raises(OutputError, match="the scene itself"):
        detect_scene(image, preview=image, overwrite=True)
    with pytest.raises(OutputError, match="two names"):
        detect_scene(image, tmp_path / "a.png", preview=tmp_path / "a.png", driver="GPKG")
    assert image.read_bytes() == before and len(os.listdir(tmp_path)) == 1


@pytest.mark.parametrize(("tta", "num_views"), [("flips", 4), ("scales", 3), ("all", 12)])
def test_augmentation_looks_more_often_and_finds_the_same(engine, scene, tta, num_views):
    plain = detect_scene(scene)
    images_before = engine.num_images
    result = detect_scene(scene, tta=tta)
    assert engine.num_images - images_before == num_views * images_before
    assert len(result) == len(SHIPS) and match(result) < 0.75
    assert (result["n_merged"] >= num_views * plain["n_merged"].min()).all()
    views = result.attrs["summary"]["parameters"]["tta"]
    assert len(views["flips"]) * len(views["scales"]) == num_views


def test_an_open_model_is_used_as_it_is(scene):
    engine = BlobBackend()
    assert len(detect_scene(scene, model=engine)) == len(SHIPS) and engine.num_images == 6
    with pytest.raises(ConfigError, match="open already"):
        detect_scene(scene, model=engine, threads=2)
    with pytest.raises(ConfigError, match="not int"):
        detect_scene(scene, model=3)
