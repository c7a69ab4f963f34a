"""Geometries, geodesic attributes and files."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pyogrio
import pyproj
import pytest
import shapely
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st

from rtmdet_geo import outputs, vector_drivers
from rtmdet_geo.errors import ConfigError, OutputError
from rtmdet_geo.vector import SCHEMA, build_features, check_output, pixel_to_world, write_features

GEOD = pyproj.Geod(ellps="WGS84")
UTM30 = Affine(10, 0, 600000, 0, -10, 4500000)


def compose(*affines: Affine) -> Affine:
    """Return the product; affine 2 knows only ``*`` for it, and affine 3 only wants ``@``."""
    matrix = np.eye(3)
    for affine in affines:
        matrix = matrix @ [[affine.a, affine.b, affine.c], [affine.d, affine.e, affine.f], [0, 0, 1]]
    return Affine(*matrix[:2].ravel())


def apply(affine: Affine, x: float, y: float) -> tuple[float, float]:
    return affine.a * x + affine.b * y + affine.c, affine.d * x + affine.e * y + affine.f


def features(
    boxes: Any, *, transform: Affine = UTM30, crs: Any = "EPSG:32630", **options: Any
) -> geopandas.GeoDataFrame:
    boxes = np.asarray(boxes, float).reshape(-1, 5)
    number = len(boxes)
    values: dict[str, Any] = {
        "classes": ("ship", "plane"),
        "gsd_m": 10.0,
        "scene_id": "S2A",
        "acquired_at": "2024-05-06T07:08:09.123Z",
        "sensor": "Sentinel-2A",
        "model": "rtmdet_r_tiny",
        "model_sha": "ab" * 32,
        "run_id": "run1",
    }
    values.update(options)
    scores = values.pop("scores", np.linspace(0.9, 0.3, number))
    labels = values.pop("labels", np.arange(number) % 2)
    return build_features(
        boxes, scores, labels, np.ones(number, int), np.zeros(number, bool), transform=transform, crs=crs, **values
    )


def box_around(transform: Affine, crs: str, lon: float, lat: float, azimuth: float, length: float, width: float) -> Any:
    """Return the box (source px) whose axes have the given geodesic measures: the inverse way, by pyproj alone."""
    to_crs = pyproj.Transformer.from_crs("EPSG:4326", crs, always_xy=True)

    def pixel(point_azimuth: float, distance: float) -> np.ndarray:
        point_lon, point_lat, _ = GEOD.fwd(lon, lat, point_azimuth, distance)
        centre_x, _ = to_crs.transform(lon, lat)
        x, y = to_crs.transform(point_lon, point_lat)
        if crs == "EPSG:4326":
            x += 360 * round((centre_x - x) / 360)
        return np.array(apply(~transform, x, y))

    bow, stern = pixel(azimuth, length / 2), pixel(azimuth + 180, length / 2)
    port, starboard = pixel(azimuth - 90, width / 2), pixel(azimuth + 90, width / 2)
    along, across = bow - stern, starboard - port
    centre = (bow + stern) / 2
    return [*centre, math.hypot(*along), math.hypot(*across), math.atan2(along[1], along[0])]


def transform_at(crs: str, lon: float, lat: float, size_m: float, rotation_deg: float = 0) -> Affine:
    """Square pixels of about ``size_m`` ground metres near lon lat."""
    x, y = pyproj.Transformer.from_crs("EPSG:4326", crs, always_xy=True).transform(lon, lat)
    size = size_m / 111320 if crs == "EPSG:4326" else size_m
    parts = (Affine.rotation(rotation_deg), Affine.scale(size, -size), Affine.translation(-50, -50))
    return compose(Affine.translation(x, y), *parts)


def turn(first: float, second: float) -> float:
    return abs((first - second + 90) % 180 - 90)


def utm(lon: float, lat: float) -> str:
    return f"EPSG:{(32600 if lat >= 0 else 32700) + int((lon + 180) // 6) % 60 + 1}"


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["3857", "utm"]),
    st.floats(-179.9, 179.9),
    st.floats(-80, 80),
    st.floats(0, 179.99),
    st.floats(20, 400),
    st.floats(-180, 180),
)
def test_geodesic_measures_in_conformal_crs_from_equator_to_80_degrees(
    kind: str, lon: float, lat: float, azimuth: float, length: float, rotation: float
) -> None:
    crs = "EPSG:3857" if kind == "3857" else utm(lon, lat)
    transform = transform_at(crs, lon, lat, 2.0, rotation)
    frame = features([box_around(transform, crs, lon, lat, azimuth, length, length / 5)], transform=transform, crs=crs)
    row = frame.iloc[0]
    assert row.length_m == pytest.approx(length, rel=1e-3)
    assert row.width_m == pytest.approx(length / 5, rel=1e-3)
    assert row.area_m2 == pytest.approx(length**2 / 5, rel=3e-3)
    assert turn(row.azimuth_deg, azimuth) < 0.1
    assert 0 <= row.azimuth_deg < 180
    assert row.lat == pytest.approx(lat, abs=1e-5)
    assert (row.lon - lon + 180) % 360 - 180 == pytest.approx(0, abs=1e-5 / math.cos(math.radians(lat)))


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["EPSG:4326", "EPSG:3857", "utm"]),
    st.tuples(st.floats(-179.9, 179.9), st.floats(-80, 80)),
    st.tuples(st.floats(5, 60), st.floats(2, 30), st.floats(-1.57, 1.57)),
    st.tuples(st.floats(0.3, 3), st.floats(-180, 180), st.floats(-40, 40)),
)
def test_measures_agree_with_pyproj_for_any_affine(
    kind: str, place: tuple[float, float], box: tuple[float, float, float], affine: tuple[float, float, float]
) -> None:
    """Rotated, sheared, non-square pixels, geographic degrees: the axes are measured point by point."""
    crs = utm(*place) if kind == "utm" else kind
    stretch, rotation, shear = affine
    transform = compose(transform_at(crs, *place, 1.0, rotation), Affine.shear(shear, 0), Affine.scale(stretch, 1))
    w, h, angle = box
    row = features([[50, 50, w, h, angle]], transform=transform, crs=crs).iloc[0]
    to_lonlat = pyproj.Transformer.from_crs(crs, "EPSG:4326", always_xy=True)
    cosine, sine = math.cos(angle), math.sin(angle)
    measured = []
    for dx, dy in ((cosine * w / 2, sine * w / 2), (-sine * h / 2, cosine * h / 2)):
        start = to_lonlat.transform(*apply(transform, 50 - dx, 50 - dy))
        end = to_lonlat.transform(*apply(transform, 50 + dx, 50 + dy))
        centre = to_lonlat.transform(*apply(transform, 50, 50))
        _, _, distance = GEOD.inv(*start, *end)
        azimuth, _, _ = GEOD.inv(*centre, *end)
        measured.append((distance, azimuth))
    measured.sort(reverse=True)
    assert row.length_m == pytest.approx(measured[0][0], rel=1e-3)
    assert row.width_m == pytest.approx(measured[1][0], rel=1e-3)
    if measured[0][0] > measured[1][0] * 1.001:
        assert turn(row.azimuth_deg, measured[0][1]) < 0.1
    assert row.length_m >= row.width_m


def test_web_mercator_metres_are_not_ground_metres() -> None:
    transform = transform_at("EPSG:3857", 0, 60, 10)
    row = features([[50, 50, 20, 4, 0]], transform=transform, crs="EPSG:3857").iloc[0]
    assert row.length_m == pytest.approx(100.2, abs=0.5)  # 200 m in the projection, half of it at 60 degrees north
    assert row.azimuth_deg == pytest.approx(90, abs=1e-6)


def test_long_side_flips_with_non_square_pixels() -> None:
    transform = Affine(1, 0, 600000, 0, -10, 4500000)  # a pixel is 1 m wide and 10 m high
    row = features([[50, 50, 8, 2, 0]], transform=transform).iloc[0]  # 8 m east-west, 20 m north-south
    assert row.length_m == pytest.approx(20, rel=2e-3) and row.width_m == pytest.approx(8, rel=2e-3)
    assert turn(row.azimuth_deg, 0) < 1  # north but for the convergence of UTM


def test_antimeridian() -> None:
    transform = Affine(0.001, 0, 179.95, 0, -0.001, 10.05)
    frame = features([[50, 50, 40, 8, 0]], transform=transform, crs="EPSG:4326")
    row = frame.iloc[0]
    assert row.length_m == pytest.approx(GEOD.inv(179.98, 10, -179.98, 10)[2], rel=1e-4)
    assert row.lon == pytest.approx(-180) and abs(row.azimuth_deg - 90) < 0.1
    # from UTM zone 60 the longitudes jump from 180 to -180; the polygon stays in one piece
    utm60 = transform_at("EPSG:32660", 180, 10, 10)
    bounds = features([[50, 50, 40, 8, 0]], transform=utm60, crs="EPSG:32660", dst_crs="EPSG:4326").geometry.bounds
    assert (bounds.maxx - bounds.minx).iloc[0] < 0.01
    assert features([[50, 50, 40, 8, 0]], transform=utm60, crs="EPSG:32660").area_m2.iloc[0] == pytest.approx(
        32000, rel=0.01
    )


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(-1e5, 1e5), min_size=6, max_size=6), st.floats(0, 1e5), st.floats(0, 1e5))
def test_pixel_to_world_is_the_transform_exactly(values: list[float], x: float, y: float) -> None:
    transform = Affine(*values)
    np.testing.assert_array_equal(pixel_to_world(np.array([[x, y]]), transform)[0], np.array(apply(transform, x, y)))


def test_corners_are_on_pixel_corners_not_centres() -> None:
    (polygon,) = features([[2, 3, 4, 2, 0]]).geometry
    assert polygon.bounds == (600000, 4499960, 600040, 4499980)
    turned = features([[2, 3, 4, 2, math.pi / 4]]).geometry[0]  # clockwise on screen: the bow points south-east
    x, y = np.array(turned.exterior.coords.xy)
    assert x[np.argmin(y)] > 600020


@pytest.mark.parametrize(
    "transform", [UTM30, Affine(10, 0, 600000, 0, 10, 4500000), compose(UTM30, Affine.rotation(200))]
)
@pytest.mark.parametrize("dst_crs", [None, "EPSG:4326", "EPSG:3857"])
def test_exterior_is_counter_clockwise_with_four_corners(transform: Affine, dst_crs: str | None) -> None:
    frame = features([[20, 30, 9, 4, 0.5], [50, 50, 4, 2, -1.2]], transform=transform, dst_crs=dst_crs)
    assert all(shapely.is_ccw(polygon.exterior) and len(polygon.exterior.coords) == 5 for polygon in frame.geometry)
    assert frame.crs == pyproj.CRS(dst_crs or "EPSG:32630")
    plain = features([[20, 30, 9, 4, 0.5], [50, 50, 4, 2, -1.2]], transform=transform)
    np.testing.assert_array_equal(frame.drop(columns="geometry"), plain.drop(columns="geometry"))


def test_schema_order_types_and_score_order() -> None:
    frame = features(
        [[10, 10, 4, 2, 0], [20, 20, 4, 2, 0], [30, 30, 4, 2, 0]], scores=[0.3, 0.9, 0.6], labels=[0, 1, 0]
    )
    assert tuple(frame.columns) == (*SCHEMA, "geometry")
    assert frame.id.tolist() == [1, 2, 3] and frame.class_name.tolist() == ["plane", "ship", "ship"]
    np.testing.assert_allclose(frame.score, [0.9, 0.6, 0.3], rtol=1e-6)
    assert frame.on_edge.dtype == bool and frame.id.dtype == frame.n_merged.dtype == frame.class_id.dtype == np.int64
    assert frame.acquired_at.iloc[0].isoformat() == "2024-05-06T07:08:09.123000+00:00"
    empty = features([])
    assert len(empty) == 0 and (empty.dtypes == frame.dtypes).all() and tuple(empty.columns) == tuple(frame.columns)


def test_schema_is_the_documented_one() -> None:
    documented = (
        "id, class_id, class_name, score, lon, lat, azimuth_deg, length_m, width_m, area_m2, gsd_m, scene_id, "
        "acquired_at, sensor, on_edge, n_merged, model, model_sha, run_id"
    )
    assert tuple(documented.split(", ")) == SCHEMA


def test_without_crs_pixels_and_nulls() -> None:
    frame = features([[10, 20, 4, 2, 0]], crs=None, gsd_m=None, acquired_at=None, sensor=None)
    assert frame.crs is None
    assert frame.geometry[0].bounds == (8, 19, 12, 21)  # the transform is not applied; y as it is
    for name in ("lon", "lat", "azimuth_deg", "length_m", "width_m", "area_m2", "gsd_m", "acquired_at", "sensor"):
        assert frame[name].isna().all(), name
    assert not frame[["id", "score", "scene_id", "model", "on_edge"]].isna().any(axis=None)


def test_horizontal_has_no_azimuth() -> None:
    frame = features([[10, 20, 2, 4, 0]], kind="horizontal")
    assert math.isnan(frame.azimuth_deg[0]) and frame.length_m[0] > frame.width_m[0] > 0


def test_bad_values() -> None:
    with pytest.raises(ConfigError, match="EPSG:99999"):
        features([], crs="EPSG:99999")
    with pytest.raises(ConfigError, match="nonsense"):
        features([], dst_crs="nonsense")
    with pytest.raises(ConfigError, match="without coordinate reference system"):
        features([], crs=None, dst_crs="EPSG:4326")
    with pytest.raises(ValueError, match="class names"):
        features([[1, 1, 2, 2, 0]], labels=[2])
    with pytest.raises(ValueError, match="scores has shape"):
        features([[1, 1, 2, 2, 0]], scores=[1, 2])
    with pytest.raises(ConfigError, match="not defined"):
        features([[1, 1, 2, 2, 0]], transform=Affine(1, 0, 20, 0, -1, 90.2), crs="EPSG:4326", dst_crs="EPSG:3857")


def test_odd_times_are_null_and_naive_ones_utc(caplog: pytest.LogCaptureFixture) -> None:
    assert features([[1, 1, 2, 2, 0]], acquired_at="2024-05-06T07:08:09").acquired_at[0].hour == 7
    assert features([[1, 1, 2, 2, 0]], acquired_at="2024-05-06T07:08:09+02:00").acquired_at[0].hour == 5
    assert features([[1, 1, 2, 2, 0]], acquired_at="last May").acquired_at.isna().all()
    assert "last May" in caplog.text


# Files

BOXES = [[100, 200, 20, 5, 0.4], [300, 400, 12, 4, -0.7], [500, 60, 9, 3, 1.5]]
METADATA = {"model": "rtmdet_r_tiny", "score_threshold": 0.3, "stretch": {"kind": "fixed"}, "attribution": "Ünited"}


@pytest.mark.parametrize("crs", ["EPSG:32630", None])
@pytest.mark.parametrize("number", [3, 0])
@pytest.mark.parametrize("suffix", [".gpkg", ".geojson", ".json"])
def test_round_trip(tmp_path: Path, suffix: str, number: int, crs: str | None) -> None:
    frame = features(BOXES[:number], crs=crs, gsd_m=10.0 if crs else None, acquired_at=None, sensor=None)
    path = tmp_path / f"ships{suffix}"
    write_features(frame, path, metadata=METADATA)
    assert os.listdir(tmp_path) == [path.name]
    read = geopandas.read_file(path)
    assert len(read) == number
    if suffix == ".gpkg" or number:
        assert tuple(read.columns) == (*SCHEMA, "geometry")
    if not number:
        return
    if crs is None:
        assert read.crs is None or suffix != ".gpkg"  # GDAL takes every GeoJSON as longitude and latitude
        expected = frame.geometry
    else:
        assert read.crs == ("EPSG:32630" if suffix == ".gpkg" else "EPSG:4326")
        expected = frame.geometry.to_crs(read.crs)
    np.testing.assert_allclose(read.geometry.bounds, expected.bounds, atol=1e-7)
    assert all(shapely.is_ccw(polygon.exterior) for polygon in read.geometry)
    for name in SCHEMA:
        if frame[name].isna().all():
            assert read[name].isna().all(), name
        elif frame[name].dtype.kind == "f":
            np.testing.assert_allclose(read[name], frame[name], rtol=1e-6)
        else:
            assert read[name].tolist() == frame[name].tolist(), name


@pytest.mark.parametrize("number", [3, 0])
def test_geopackage_schema_is_the_same_with_and_without_features(tmp_path: Path, number: int) -> None:
    path = tmp_path / "ships.gpkg"
    write_features(features(BOXES[:number]), path, metadata=METADATA)
    information = pyogrio.read_info(path)
    assert information["layer_name"] == "detections"
    assert information["geometry_type"] == "Polygon" and information["features"] == number
    assert information["crs"] == "EPSG:32630"
    assert tuple(information["fields"]) == SCHEMA
    types = dict(zip(information["fields"], information["ogr_types"], strict=True))
    assert types["id"] == "OFTInteger64" and types["lon"] == "OFTReal" and types["acquired_at"] == "OFTDateTime"
    assert types["class_name"] == types["sensor"] == types["run_id"] == "OFTString"
    subtypes = dict(zip(information["fields"], information["ogr_subtypes"], strict=True))
    assert subtypes["on_edge"] == "OFSTBoolean"
    stored = information["layer_metadata"]
    assert stored["model"] == "rtmdet_r_tiny" and stored["attribution"] == "Ünited"
    assert json.loads(stored["score_threshold"]) == 0.3 and json.loads(stored["stretch"]) == {"kind": "fixed"}


def test_time_and_layer_name_survive(tmp_path: Path) -> None:
    path = tmp_path / "ships.gpkg"
    write_features(features(BOXES), path, layer='my "ships"')
    read = geopandas.read_file(path, layer='my "ships"')
    assert read.acquired_at[0].isoformat() == "2024-05-06T07:08:09.123000+00:00"


def test_geojson_is_wgs84_with_metadata(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    path = tmp_path / "ships.geojson"
    write_features(features(BOXES), path, metadata=METADATA)
    collection = json.loads(path.read_text(encoding="utf-8"))
    assert collection["type"] == "FeatureCollection" and collection["metadata"] == METADATA and "crs" not in collection
    properties = collection["features"][0]["properties"]
    assert tuple(properties) == SCHEMA and properties["score"] == 0.9 and properties["on_edge"] is False
    assert properties["acquired_at"] == "2024-05-06T07:08:09.123Z"
    assert "EPSG:4326" in caplog.text
    write_features(features([], crs=None), path, overwrite=True)
    assert json.loads(path.read_text(encoding="utf-8"))["features"] == []
    write_features(features(BOXES, crs=None), path, overwrite=True)
    assert json.loads(path.read_text(encoding="utf-8"))["crs"] is None


def test_driver_by_name_or_extension(tmp_path: Path) -> None:
    write_features(features(BOXES), tmp_path / "ships.dat", driver="gpkg")
    assert (tmp_path / "ships.dat").read_bytes().startswith(b"SQLite format 3")
    write_features(features(BOXES), tmp_path / "SHIPS.GPKG")
    known = r"ships\.kml.*\.csv, \.fgb, \.geojson, \.geojsonl, \.geojsons, \.gpkg, \.json, \.parquet, \.shp, \.shp\.zip"
    with pytest.raises(OutputError, match=known):
        write_features(features(BOXES), tmp_path / "ships.kml")
    with pytest.raises(
        OutputError, match="COCO, CSV, DOTA, ESRI Shapefile, FlatGeobuf, GPKG, GeoJSON, GeoJSONSeq, Parquet"
    ):
        check_output(tmp_path / "ships.gpkg", driver="DXF")


def test_refusals_before_a_long_run(tmp_path: Path) -> None:
    path = tmp_path / "ships.gpkg"
    check_output(path, False)
    assert os.listdir(tmp_path) == []
    path.write_bytes(b"old")
    with pytest.raises(OutputError, match="--overwrite"):
        check_output(path, False)
    with pytest.raises(OutputError, match="--overwrite"):
        write_features(features(BOXES), path)
    assert path.read_bytes() == b"old"
    check_output(path, True)
    write_features(features(BOXES), path, overwrite=True)
    assert len(geopandas.read_file(path)) == 3
    with pytest.raises(OutputError, match="nosuch"):
        check_output(tmp_path / "nosuch" / "ships.gpkg", False)
    (tmp_path / "folder.gpkg").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        check_output(tmp_path / "folder.gpkg", True)


def test_folder_that_is_not_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(OutputError, match="not writable"):
        check_output(tmp_path / "ships.gpkg", False)
    monkeypatch.undo()

    def refuse(**_: Any) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(outputs.tempfile, "mkdtemp", refuse)
    with pytest.raises(OutputError, match="Permission denied"):
        write_features(features(BOXES), tmp_path / "ships.gpkg")


@pytest.mark.parametrize("suffix", [".gpkg", ".geojson"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device"), RuntimeError("odd")])
def test_failure_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, error: Any
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    path = tmp_path / f"ships{suffix}"
    path.write_bytes(b"old")
    monkeypatch.setattr(pyogrio, "write_arrow", fail)
    monkeypatch.setattr(vector_drivers, "write_geojson", fail)
    expected = (
        OutputError if isinstance(error, OSError) or (suffix == ".gpkg" and error is not KeyboardInterrupt) else None
    )
    with pytest.raises(expected or (KeyboardInterrupt, RuntimeError)):
        write_features(features(BOXES), path, overwrite=True)
    assert os.listdir(tmp_path) == [path.name] and path.read_bytes() == b"old"


def test_features_lost_without_an_error_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = pyogrio.write_arrow

    def write_one(reader: Any, *args: Any, **options: Any) -> None:
        write(reader.read_all()[:1], *args, **options)

    monkeypatch.setattr(pyogrio, "write_arrow", write_one)
    with pytest.raises(OutputError, match="1 of 3 features"):
        write_features(features(BOXES), tmp_path / "ships.gpkg")
    assert os.listdir(tmp_path) == []


def test_stale_sqlite_journals_go_with_the_file_they_belong_to(tmp_path: Path) -> None:
    path = tmp_path / "ships.gpkg"
    path.write_bytes(b"old")
    (tmp_path / "ships.gpkg-wal").write_bytes(b"old")
    write_features(features(BOXES), path, overwrite=True)
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
@pytest.mark.parametrize("suffix", [".gpkg", ".geojson"])
def test_full_disk(tmp_path: Path, suffix: str) -> None:
    """A file size limit stands in for a full disk: writes fail in the middle."""
    code = f"""
        import resource, signal, sys
        import numpy as np
        from affine import Affine
        from rtmdet_geo.errors import OutputError
        from rtmdet_geo.vector import build_features, write_features
        n = 3000
        boxes = np.column_stack([np.arange(n), np.arange(n), np.full(n, 8), np.full(n, 3), np.zeros(n)])
        frame = build_features(boxes, np.ones(n), np.zeros(n, int), np.ones(n, int), np.zeros(n, bool), gsd_m=1.0,
            transform=Affine(1, 0, 6e5, 0, -1, 4e6), crs="EPSG:32630", classes=["ship"], scene_id="s")
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
        try:
            write_features(frame, {str(tmp_path / ("ships" + suffix))!r})
        except OutputError as error:
            assert "disk full" in str(error) and "\\n" not in str(error), error
            sys.exit(7)
    """
    limits = (200_000, 50_000_000) if suffix == ".geojson" else (200_000, 400_000, 50_000_000)
    for limit in limits:
        process = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code), str(limit)], capture_output=True, text=True
        )
        is_enough = limit == 50_000_000
        assert process.returncode == (0 if is_enough else 7), process.stderr
        assert os.listdir(tmp_path) == ([f"ships{suffix}"] if is_enough else [])
