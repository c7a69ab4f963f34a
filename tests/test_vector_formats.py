"""Each file format read back by others: geometries, nulls, times, numbers, CRS; sets of files that stay whole."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pyogrio
import pytest
import shapely
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st

from rtmdet_geo import outputs
from rtmdet_geo.errors import ConfigError, OutputError
from rtmdet_geo.vector import SCHEMA, build_features, check_output, check_target_crs, write_features
from rtmdet_geo.vector_formats import DRIVERS, PARQUET_KEY, PIXEL_DRIVERS, driver_of, short_names

GDAL_LAYERS = (".gpkg", ".fgb", ".shp", ".shp.zip")
LONLAT = (".geojson", ".geojsonl", ".geojsons", ".csv")
ENDINGS = (*GDAL_LAYERS, ".parquet", *LONLAT)
METADATA = {"model": "rtmdet_r_tiny", "score_threshold": 0.3, "stretch": {"kind": "fixed"}, "attribution": "Ünited"}
SHP_SET = [f"ships{ending}" for ending in (".cpg", ".dbf", ".prj", ".shp", ".shx")]


def features(number: int = 3, crs: str | None = "EPSG:32630", masks: bool = False) -> geopandas.GeoDataFrame:
    """Rows with every kind of value and, in the second, every kind of null."""
    boxes = np.array([[100, 200, 20, 5, 0.4], [300, 400, 12, 4, -0.7], [500, 60, 9, 3, 1.5]])[:number]
    polygons = None
    if masks:
        holed = shapely.Polygon(
            [(90, 190), (120, 190), (120, 215), (90, 215)],
            holes=[[(95, 195), (100, 195), (100, 200)], [(105, 205), (110, 205), (110, 210)]],
        )
        parts = shapely.MultiPolygon([shapely.box(295, 395, 300, 399), shapely.box(303.3, 395, 309, 401.7)])
        polygons = np.array([holed, parts, shapely.box(495, 55, 505, 65)], object)[:number]
    frame = build_features(
        boxes,
        np.array([0.9, 0.61, 0.3])[:number],
        np.arange(number) % 2,
        np.arange(1, number + 1),
        np.arange(number) % 2 == 1,
        transform=Affine(10, 0, 600000, 0, -10, 4500000),
        crs=crs,
        classes=("Schiff, groß", "plane"),
        gsd_m=10.0,
        scene_id='S2A "port"',
        acquired_at="2024-05-06T07:08:09.123Z",
        sensor="Sentinel-2A",
        model="rtmdet_r_tiny",
        model_sha="ab" * 32,
        run_id="run1",
        polygons=polygons,
    )
    if number > 1:
        frame.loc[1, ["sensor", "run_id"]] = None
        frame.loc[1, "acquired_at"] = pd.NaT
        frame.loc[1, ["length_m", "gsd_m"]] = np.nan
    return frame


def written(folder: Path, ending: str, frame: geopandas.GeoDataFrame, masks: bool = False) -> Path:
    path = folder / f"ships{ending}"
    write_features(frame, path, metadata=METADATA, geometry_type="MultiPolygon" if masks else "Polygon")
    return path


def read_layer(path: Path) -> geopandas.GeoDataFrame:
    """Read a file as its users do, in the order of ``id``."""
    if path.suffix == ".parquet":
        frame = geopandas.read_parquet(path)
    elif path.suffix == ".csv":
        table = pd.read_csv(path, parse_dates=["acquired_at"])
        frame = geopandas.GeoDataFrame(table.drop(columns="WKT"), geometry=shapely.from_wkt(table["WKT"]))
    else:
        frame = geopandas.read_file(path)
    return frame.sort_values("id", ignore_index=True)


def kind_of(dtype: Any) -> str:
    """Return the letter of a dtype: "O" for texts, however pandas stores them."""
    return "O" if pd.api.types.is_string_dtype(dtype) else str(dtype.kind)


@pytest.mark.parametrize("crs", ["EPSG:32630", "EPSG:4326", None])
@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("ending", ENDINGS)
def test_what_is_written_is_read(tmp_path: Path, ending: str, masks: bool, crs: str | None) -> None:
    frame = features(crs=crs, masks=masks)
    read = read_layer(written(tmp_path, ending, frame, masks))

    expected, tolerance = frame.geometry, 0.0
    if ending in LONLAT:
        expected = frame.to_crs("EPSG:4326").geometry if crs else frame.geometry
        tolerance = 1e-9 if ending == ".csv" else 7.1e-9  # GeoJSON has 8 decimals: off by 0.5e-8 on both axes
    assert len(read) == len(expected)
    found, wanted = shapely.normalize(read.geometry.array), shapely.normalize(expected.array)
    if ending in (".gpkg", ".fgb") and masks:
        wanted = shapely.normalize([shapely.MultiPolygon(shapely.get_parts(shape).tolist()) for shape in wanted])
    assert shapely.equals_exact(found, wanted, tolerance).all()
    if ending == ".csv" or (crs is None and ending not in LONLAT):
        assert read.crs is None
    elif ending in LONLAT:
        assert read.crs == "EPSG:4326"
    else:
        assert read.crs.to_epsg() == int(crs[5:])

    names = list(frame.columns.drop("geometry"))
    stored = short_names(names) if ".shp" in ending else names
    assert list(read.columns.drop("geometry")) == stored
    for name, other in zip(names, stored, strict=True):
        assert read[other].isna().tolist() == frame[name].isna().tolist(), name
        has_value = frame[name].notna()
        values, originals = read[other][has_value], frame[name][has_value]
        if name == "acquired_at":
            values = pd.to_datetime(values, utc=True)
            assert (values == originals).all()
            continue
        if originals.dtype.kind == "f":
            np.testing.assert_allclose(
                values.astype(float), originals.astype(float), rtol=1e-7 if name == "score" else 1e-14
            )
        else:
            assert values.tolist() == originals.tolist(), name
        if len(originals) == len(frame):
            assert kind_of(read[other].dtype) == kind_of(frame[name].dtype), name


@pytest.mark.parametrize("crs", ["EPSG:32630", None])
@pytest.mark.parametrize("ending", [*GDAL_LAYERS, ".parquet", ".csv"])
def test_an_empty_layer_keeps_its_columns(tmp_path: Path, ending: str, crs: str | None) -> None:
    frame = features(0, crs=crs)
    path = written(tmp_path, ending, frame)
    names = list(SCHEMA)
    if ending == ".csv":
        assert path.read_text() == ",".join(["WKT", *SCHEMA]) + "\n"
        return
    read = read_layer(path)
    assert len(read) == 0 and list(read.columns) == [*(short_names(names) if ".shp" in ending else names), "geometry"]
    assert read.crs == crs if ending != ".shp" or crs is None else read.crs.to_epsg() == 32630
    whole = read_layer(written(tmp_path, ending.replace(".", "_2.", 1), features(3, crs=crs)))
    for name in read.columns.drop("geometry"):
        if whole[name].notna().all():
            assert kind_of(read[name].dtype) in {kind_of(whole[name].dtype), "O"}, name


@pytest.mark.parametrize("ending", [".geojsonl", ".geojsons"])
def test_a_sequence_has_a_feature_a_line(tmp_path: Path, ending: str) -> None:
    lines = written(tmp_path, ending, features()).read_text(encoding="utf-8").split("\n")
    assert len(lines) == 4 and lines.pop() == ""
    assert all(line.startswith("\x1e") == (ending == ".geojsons") for line in lines)  # RFC 8142, 2.1
    first, second, _ = (json.loads(line.lstrip("\x1e")) for line in lines)
    assert tuple(first["properties"]) == SCHEMA and second["properties"]["sensor"] is None
    write_features(features(0), tmp_path / f"ships{ending}", overwrite=True)
    assert (tmp_path / f"ships{ending}").read_bytes() == b""


def test_csv_by_hand(tmp_path: Path) -> None:
    path = written(tmp_path, ".csv", features(2, crs=None))
    with path.open(encoding="utf-8", newline="") as stream:
        first, second = csv.DictReader(stream)
    assert first["class_name"] == "Schiff, groß" and first["scene_id"] == 'S2A "port"' and first["score"] == "0.9"
    assert first["acquired_at"] == "2024-05-06T07:08:09.123Z" and first["on_edge"] == "false"
    assert second["acquired_at"] == second["sensor"] == second["length_m"] == "" and second["on_edge"] == "true"
    assert pyogrio.read_info(path)["geometry_type"] == "Unknown" and len(pyogrio.read_dataframe(path).geometry) == 2


def test_geoparquet_says_what_it_holds(tmp_path: Path) -> None:
    frame = features(masks=True)
    path = written(tmp_path, ".parquet", frame, masks=True)
    about = pq.read_schema(path).metadata
    assert json.loads(about[PARQUET_KEY.encode()]) == METADATA
    geo = json.loads(about[b"geo"])
    column = geo["columns"]["geometry"]
    assert geo["version"] == "1.1.0" and geo["primary_column"] == "geometry"
    assert column["encoding"] == "WKB" and column["geometry_types"] == ["MultiPolygon", "Polygon"]
    assert column["orientation"] == "counterclockwise" and column["crs"]["id"] == {"authority": "EPSG", "code": 32630}
    assert column["bbox"] == list(frame.total_bounds)
    assert column["covering"]["bbox"]["xmin"] == ["bbox", "xmin"]
    x, y = shapely.get_coordinates(frame.geometry[2]).mean(axis=0)
    assert geopandas.read_parquet(path, bbox=(x - 1, y - 1, x + 1, y + 1))["id"].tolist() == [3]

    frame.geometry = shapely.reverse(frame.geometry.array)  # clockwise: the file must not say otherwise
    write_features(frame, path, overwrite=True)
    assert "orientation" not in json.loads(pq.read_schema(path).metadata[b"geo"])["columns"]["geometry"]
    column = json.loads(pq.read_schema(written(tmp_path, "_0.parquet", features(0, None))).metadata[b"geo"])["columns"]
    assert column["geometry"]["crs"] is None and column["geometry"]["geometry_types"] == []


@pytest.mark.parametrize("number", [3, 0])
def test_flatgeobuf_has_metadata_and_an_index(tmp_path: Path, number: int) -> None:
    path = written(tmp_path, ".fgb", features(number))
    about = pyogrio.read_info(path)
    assert about["layer_name"] == "detections" and about["geometry_type"] == "Polygon"
    stored = about["layer_metadata"]
    assert stored["model"] == "rtmdet_r_tiny" and stored["attribution"] == "Ünited"
    assert json.loads(stored["stretch"]) == {"kind": "fixed"}
    if number:
        assert about["capabilities"]["fast_spatial_filter"]


# Shapefiles


def test_long_names_are_cut_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    written(tmp_path, ".shp", features())
    assert len(caplog.records) == 1 and caplog.records[0].levelname == "WARNING"
    assert "azimuth_deg -> azimuth_de, acquired_at -> acquired_a" in caplog.text
    assert sorted(os.listdir(tmp_path)) == SHP_SET
    assert (tmp_path / "ships.cpg").read_text() == "UTF-8"


def test_short_names_by_hand() -> None:
    names = ["azimuth_degrees", "azimuth_de", "azimuth_deg", "AZIMUTH_DEG", "id", "größenklasse"]
    assert short_names(names) == ["azimuth__1", "azimuth_de", "azimuth__2", "AZIMUTH__3", "id", "größenkl"]
    assert len("größenkl".encode()) == 10


@given(st.lists(st.text(st.characters(blacklist_categories=["Cs"]), min_size=1, max_size=14), unique=True, max_size=20))
def test_short_names_are_short_unique_and_stable(names: list[str]) -> None:
    short = short_names(names)
    assert len({name.casefold() for name in short}) == len(names) == len(short)
    assert all(len(name.encode()) <= 10 for name in short)
    assert short_names(short) == short


def test_a_shapefile_replaces_the_whole_old_set_and_no_other_file(tmp_path: Path) -> None:
    path = written(tmp_path, ".shp", features(3))
    for name in ("ships.qix", "ships.sbn"):  # indexes of the old one
        (tmp_path / name).write_bytes(b"old")
    for name in ("ships.qml", "ships.txt", "ships2.dbf"):
        (tmp_path / name).write_bytes(b"kept")
    write_features(features(2, crs=None), path, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == sorted({*SHP_SET, "ships.qml", "ships.txt", "ships2.dbf"} - {"ships.prj"})
    assert len(geopandas.read_file(path)) == 2


def test_a_part_of_a_set_is_not_overwritten_unasked(tmp_path: Path) -> None:
    (tmp_path / "ships.dbf").write_bytes(b"a table of its own")
    for action in (check_output, lambda path: write_features(features(), path)):
        with pytest.raises(OutputError, match=r"ships\.dbf.*--overwrite"):
            action(tmp_path / "ships.shp")
    assert os.listdir(tmp_path) == ["ships.dbf"]


@pytest.mark.parametrize("step", range(10))
def test_a_set_is_the_old_one_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The disk fails at every rename in turn: five set old files aside, then five give names to the new."""
    path = written(tmp_path, ".shp", features(3))
    before = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}
    rename, calls = Path.rename, []

    def failing(self: Path, target: Any) -> Path:
        calls.append(self)
        if len(calls) == step + 1:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OutputError, match="Input/output error"):
        write_features(features(2), path, overwrite=True)
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == before


def test_at_no_moment_are_there_parts_of_two_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, ".shp", features(3))
    rename, counts = Path.rename, []

    def watched(self: Path, target: Any) -> Path:
        moved = rename(self, target)
        counts.append(len(geopandas.read_file(path)) if path.exists() else None)
        return moved

    monkeypatch.setattr(Path, "rename", watched)
    write_features(features(2), path, overwrite=True)
    assert counts == [None] * 9 + [2]


def test_what_cannot_be_put_back_is_not_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, ".shp", features(3))
    before = path.read_bytes()
    rename = Path.rename

    def failing(self: Path, target: Any) -> Path:
        if self == path:
            return rename(self, target)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OutputError):
        write_features(features(2), path, overwrite=True)
    (left,) = tmp_path.glob(".ships.shp.*.partial/old/ships.shp")
    assert left.read_bytes() == before


def test_a_shapefile_holds_polygons_under_its_own_endings(tmp_path: Path) -> None:
    frame = features()
    frame.geometry = frame.geometry.centroid
    with pytest.raises(OutputError, match="polygons"):
        write_features(frame, tmp_path / "ships.shp", geometry_type="Unknown")
    with pytest.raises(OutputError, match=r"\.shp or \.shp\.zip"):
        check_output(tmp_path / "ships.dat", driver="esri shapefile")
    assert os.listdir(tmp_path) == []


# All formats


def test_every_ending_and_driver(tmp_path: Path) -> None:
    assert {ending: driver_of(f"a.b{ending}") for ending in DRIVERS} == DRIVERS
    assert driver_of("SHIPS.SHP.ZIP") == "ESRI Shapefile" and driver_of("x.dat", "flatgeobuf") == "FlatGeobuf"
    for path in ("ships.zip", "ships", "shp", "ships.parquet.gz"):
        with pytest.raises(
            OutputError, match=r"known: \.coco\.json, \.csv, \.fgb, .*\.parquet, \.shp, \.shp\.zip, \.txt"
        ):
            driver_of(path)
    for ending in (*LONLAT, ".json"):
        assert check_target_crs("EPSG:4326", f"ships{ending}") == "EPSG:4326"
        with pytest.raises(ConfigError, match="always EPSG:4326"):
            check_target_crs("EPSG:3857", f"ships{ending}")
    assert check_target_crs("EPSG:3857", "ships.fgb") == "EPSG:3857"


@pytest.mark.parametrize("driver", sorted(set(DRIVERS.values()) - {"ESRI Shapefile"} - PIXEL_DRIVERS))
def test_the_driver_given_wins_over_the_ending(tmp_path: Path, driver: str) -> None:
    for name in ("ships.dat", "ships.gpkg"):
        write_features(features(), tmp_path / name, driver=driver)
    starts = {"GPKG": b"SQLite", "FlatGeobuf": b"fgb\x03", "Parquet": b"PAR1", "CSV": b"WKT,"}
    for name in ("ships.dat", "ships.gpkg"):
        assert (tmp_path / name).read_bytes().startswith(starts.get(driver, b"{"))


@pytest.mark.parametrize("ending", LONLAT)
def test_pixels_in_a_file_of_degrees_are_told(tmp_path: Path, ending: str, caplog: pytest.LogCaptureFixture) -> None:
    written(tmp_path, ending, features(crs=None))
    assert "pixel coordinates" in caplog.text and DRIVERS[ending] in caplog.text


@pytest.mark.parametrize("ending", ENDINGS)
def test_overwriting_only_when_asked(tmp_path: Path, ending: str) -> None:
    path = written(tmp_path, ending, features(3))
    before = path.read_bytes()
    with pytest.raises(OutputError, match="--overwrite"):
        write_features(features(2), path)
    assert path.read_bytes() == before
    write_features(features(2), path, overwrite=True)
    assert len(read_layer(path)) == 2


@pytest.mark.parametrize("ending", ENDINGS)
def test_failure_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    written(tmp_path, ending, features(3))
    before = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(outputs.os, "fsync", fail)  # all is written by then
    with pytest.raises(OutputError, match="disk full"):
        write_features(features(2), tmp_path / f"ships{ending}", overwrite=True)
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == before


@pytest.mark.parametrize("ending", [".fgb", ".shp", ".shp.zip"])
def test_features_lost_without_an_error_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    write = pyogrio.write_arrow

    def write_one(reader: Any, *args: Any, **options: Any) -> None:
        write(reader.read_all()[:1], *args, **options)

    monkeypatch.setattr(pyogrio, "write_arrow", write_one)
    with pytest.raises(OutputError, match="1 of 3 features"):
        written(tmp_path, ending, features())
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
@pytest.mark.parametrize("ending", [".fgb", ".parquet", ".geojsonl", ".csv", ".shp", ".shp.zip"])
def test_full_disk(tmp_path: Path, ending: str) -> None:
    """A file size limit stands in for a full disk: writes fail at several places of the file."""
    code = f"""
        import os, resource, signal, sys
        from pathlib import Path
        import numpy as np
        from affine import Affine
        from rtmdet_geo.errors import OutputError
        from rtmdet_geo.vector import build_features, write_features
        n = 3000
        random = np.random.default_rng(0)
        boxes = np.column_stack([random.random((n, 2)) * 9000, np.full(n, 8), np.full(n, 3), random.random(n)])
        frame = build_features(boxes, np.ones(n), np.zeros(n, int), np.ones(n, int), np.zeros(n, bool), gsd_m=1.0,
            transform=Affine(1, 0, 6e5, 0, -1, 4e6), crs="EPSG:32630", classes=["ship"], scene_id="s")
        target = Path({str(tmp_path / "ships")!r})
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        write_features(frame, f"{{target}}_whole{ending}")
        sizes = {{file.suffix: file.stat().st_size for file in target.parent.iterdir()}}
        whole = max(sizes.values())
        shares = [0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999]
        shares += [sizes[part] / whole - 1e-4 for part in (".shp", ".shx") if part in sizes]
        for share in shares:
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(whole * share), resource.RLIM_INFINITY))
            try:
                write_features(frame, f"{{target}}{ending}")
            except OutputError as error:
                assert "disk full" in str(error) and "\\n" not in str(error), error
            else:
                sys.exit(f"written at {{share}}")
    """
    process = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert not [name for name in os.listdir(tmp_path) if not name.startswith("ships_whole")]
