"""The user's own stretch: each kind's limits by hand, all bands alike, replayed from outputs, Sentinel-2's offset."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from rasters import make_raster, write_raster
from synthetic import BlobBackend, draw_ships, write_scene

from rtmdet_geo import detect as pipeline
from rtmdet_geo import scene as scene_module
from rtmdet_geo.detect import detect_scene
from rtmdet_geo.errors import ConfigError, NodataWarning, RasterError
from rtmdet_geo.raster import open_scene
from rtmdet_geo.sentinel2 import radiometric_offset
from rtmdet_geo.stretch_options import StretchWish, choose_stretch, parse_stretch, read_stretch
from rtmdet_geo.structures import ModelSpec, StretchSpec

RGB = ("red", "green", "blue")
PRODUCT = "S2B_MSIL2A_20230426T105619_N{}_R094_T29SPS_20230426T141124"


def limits(scene):
    return [(entry["low_dn"], entry["high_dn"]) for entry in scene.stretch_record["bands"]]


def read_all(scene):
    return scene.read(0, 0, scene.width, scene.height)


def three_bands(tmp_path: Path, **options) -> Path:
    """0 is no data; valid: red 10 20 30 40 50, green all 7, blue 100 .. 500."""
    values = np.array([[0, 10, 20, 30, 40, 50], [0, 7, 7, 7, 7, 7], [0, 100, 200, 300, 400, 500]], np.uint16)
    return write_raster(tmp_path / "a.tif", values[:, None], colours=RGB, nodata=0, **options)


# --------------------------------------------------------------------------------------------------------- spellings


@pytest.mark.parametrize(
    "text,expected",
    [
        ("model", None),
        ("none", StretchSpec(kind="none")),
        ("percentile", StretchWish("percentile", (2.0, 98.0))),
        ("percentile:0.5,99.5:joint", StretchWish("percentile", (0.5, 99.5), True)),
        (" MinMax ", StretchWish("minmax")),
        ("minmax:joint", StretchWish("minmax", (), True)),
        ("sigma", StretchWish("sigma", (2.0,))),
        ("sigma:2.5", StretchWish("sigma", (2.5,))),
        ("fixed:-5,3e3", StretchWish("fixed", (-5.0, 3000.0))),
    ],
)
def test_spellings(text, expected):
    assert parse_stretch(text) == expected


@pytest.mark.parametrize(
    "text",
    "linear|percentile:2|percentile:2,98,99|percentile:98,2|percentile:-1,98|percentile:2,101|percentile:2,nan|fixed|"
    "fixed:3,3|fixed:0,inf|fixed:0,1:joint|none:joint|model:joint|none:1|minmax:1|sigma:0|sigma:-1|sigma:x|sigma:1:2|"
    "minmax:|joint|".split("|"),
)
def test_wrong_spellings_are_refused_with_the_right_ones(text):
    with pytest.raises(ConfigError, match="stretch"):
        parse_stretch(text)


# ------------------------------------------------------------------------------------------------------------ limits


@pytest.mark.parametrize(
    "text,expected",
    [
        # percentiles between ranks 0..4: 25 % is rank 1, 75 % rank 3; a constant band maps to 0
        ("percentile:25,75", [(20, 40), (7, 8), (200, 400)]),
        ("minmax", [(10, 50), (7, 8), (100, 500)]),
        # red: mean 30, variance (400+100+0+100+400)/5 = 200; blue a tenth of which is red
        ("sigma:2", [(30 - 2 * 200**0.5, 30 + 2 * 200**0.5), (7, 8), (300 - 20 * 200**0.5, 300 + 20 * 200**0.5)]),
        ("fixed:5,305", [(5, 305)] * 3),
        # all 15 values: 5 x 7, 10 20 30 40 50, 100 200 300 400 500; 50 % is rank 7, the third of red
        ("percentile:50,100:joint", [(30, 500)] * 3),
        ("minmax:joint", [(7, 500)] * 3),
        # sum 35 + 150 + 1500 = 1685; squares 5*49 + 5500 + 550000 = 555745
        (
            "sigma:1:joint",
            [tuple(1685 / 15 + sign * (555745 / 15 - (1685 / 15) ** 2) ** 0.5 for sign in (-1, 1))] * 3,
        ),
    ],
)
def test_limits_worked_by_hand(tmp_path, text, expected):
    with open_scene(three_bands(tmp_path), stretch=parse_stretch(text)) as scene:
        np.testing.assert_allclose(limits(scene), expected, rtol=1e-12)
        record, (pixels, valid) = scene.stretch_record, read_all(scene)
    assert record["kind"] == text.split(":")[0] and record["joint"] == text.endswith("joint")
    json.dumps(record, allow_nan=False)
    assert not valid[0, 0] and valid[0, 1:].all() and not pixels[:, 0, 0].any()
    low, high = expected[0]
    by_hand = np.floor(np.clip((np.array([10, 20, 30, 40, 50]) - low) * 255 / (high - low), 0, 255) + 0.5)
    assert pixels[0, 0, 1:].tolist() == by_hand.tolist()


def test_fixed_limits_are_the_files_numbers_even_in_8_bit_scenes_and_with_tags(tmp_path):
    values = np.array([[[5, 10, 62, 110, 200]]] * 3, np.uint8)
    path = write_raster(tmp_path / "a.tif", values, colours=RGB, scales=(1e-4,) * 3, offsets=(-0.1,) * 3)
    with open_scene(path, stretch=parse_stretch("fixed:10,110")) as scene:
        assert read_all(scene)[0][0].tolist() == [[0, 0, 133, 255, 255]]  # 52 * 2.55 = 132.6


def test_statistics_are_of_the_scene_not_of_the_window(tmp_path):
    path = make_raster(tmp_path / "a.tif", dtype="float32", nodata_type="nan")
    with open_scene(path, stretch=parse_stretch("sigma:2")) as scene:
        part, whole = scene.read(30, 10, 20, 20)[0], read_all(scene)[0]
    np.testing.assert_array_equal(part, whole[:, 10:30, 30:50])


def test_none_refuses_16_bit_and_an_empty_scene_warns(tmp_path):
    with pytest.raises(RasterError, match=r"uint16.*--stretch"):
        open_scene(three_bands(tmp_path), stretch=parse_stretch("none"))
    path = write_raster(tmp_path / "b.tif", np.full((3, 4, 4), 9, np.uint16), nodata=9, colours=RGB)
    for text in ("sigma", "minmax:joint", "percentile"):
        with pytest.warns(NodataWarning, match="no valid"), open_scene(path, stretch=parse_stretch(text)) as scene:
            assert limits(scene) == [(0.0, 1.0)] * 3


def test_a_joint_stretch_looks_at_no_more_values_than_one_band(tmp_path, monkeypatch):
    monkeypatch.setattr(scene_module, "PERCENTILE_MAX_PIXELS", 60 * 40)
    path = make_raster(tmp_path / "a.tif", dtype="uint16")
    found = {}
    for text in ("minmax", "minmax:joint"):
        with open_scene(path, stretch=parse_stretch(text)) as scene:
            found[text] = scene.stretch_record["decimation"]
    assert found == {"minmax": 1, "minmax:joint": 2}


def test_old_model_files_load():
    old = '{"name": "a", "architecture": "rtmdet_test", "classes": ["x"], "mean": [0, 0, 0], "std": [1, 1, 1], '
    old += '"stretch": {"kind": "percentile", "low_percent": 1}}'
    assert ModelSpec.model_validate_json(old).stretch == StretchSpec(kind="percentile", low_percent=1)


# ------------------------------------------------------------------------------------------------------------ replay


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> BlobBackend:
    backend = BlobBackend()
    monkeypatch.setattr(pipeline, "open_backend", lambda path, **options: backend)
    monkeypatch.setattr(pipeline, "find_model", lambda model: Path(__file__))
    return backend


@pytest.mark.parametrize("ending", [".gpkg", ".fgb", ".parquet", ".geojson", ".json", "summary"])
@pytest.mark.parametrize("text", ["sigma:1.7", "percentile:3,97:joint"])
def test_replay_is_equal_to_the_bit(engine, tmp_path, ending, text):
    first = make_raster(tmp_path / "first.tif", dtype="uint16", nodata_type="nodata", seed=1)
    stored = tmp_path / ("summary.json" if ending == "summary" else f"out{ending}")
    result = detect_scene(first, None if ending == "summary" else stored, stretch=text, max_overlap=0.7)
    summary = result.attrs["summary"]
    assert summary["parameters"]["stretch"] == text and summary["stretch"]["kind"] == text.split(":")[0]
    if ending == "summary":
        stored.write_text(json.dumps(summary))
    other = make_raster(tmp_path / "other.tif", dtype="uint16", seed=2, high=6000)
    with open_scene(first, stretch=parse_stretch(text)) as scene:
        expected = limits(scene)
        tables = [scene._luts[index] for index in (1, 2, 3)]
    with open_scene(other, stretch=read_stretch(stored)) as scene:
        assert limits(scene) == expected  # no tolerance
        for table, index in zip(tables, (1, 2, 3), strict=True):
            np.testing.assert_array_equal(scene._luts[index], table)
        assert scene.stretch_record["from"] == str(stored)
    with open_scene(other, stretch=parse_stretch(text)) as scene:
        assert limits(scene) != expected
    again = detect_scene(other, tmp_path / "again.gpkg", stretch_from=stored).attrs["summary"]
    assert again["parameters"]["stretch_from"] == str(stored)
    with open_scene(first, stretch=read_stretch(tmp_path / "again.gpkg")) as scene:  # of a replay
        assert limits(scene) == expected


def test_bands_are_matched_by_name(tmp_path):
    stored = summary_of(tmp_path, [("blue", 1, 2), ("red", 5, 6), ("green", 3, 4)])
    with open_scene(make_raster(tmp_path / "a.tif", dtype="uint16"), stretch=read_stretch(stored)) as scene:
        assert limits(scene) == [(5, 6), (3, 4), (1, 2)]


def test_8_bit_values_stay_as_they_are_in_8_bit_scenes_only(engine, tmp_path):
    stored = tmp_path / "a.geojson"
    detect_scene(write_scene(tmp_path / "port.tif", draw_ships(300, 300)), stored)
    with open_scene(make_raster(tmp_path / "a.tif"), stretch=read_stretch(stored)) as scene:
        assert limits(scene) == [(None, None)] * 3
    with pytest.raises(ConfigError, match=r"uint8 values.*has uint16"):
        open_scene(make_raster(tmp_path / "b.tif", dtype="uint16"), stretch=read_stretch(stored))


def summary_of(folder: Path, bands, dtype: str = "uint16") -> Path:
    """Write a summary with (name, low, high) of some bands."""
    entries = [{"name": name, "band": 1, "dtype": dtype, "low_dn": low, "high_dn": high} for name, low, high in bands]
    path = folder / "summary.json"
    path.write_text(json.dumps({"stretch": {"kind": "minmax", "bands": entries}}))
    return path


@pytest.mark.parametrize(
    "bands,dtype,message",
    [
        ([("red", 1, 2), ("green", 1, 2)], "uint16", "stretches the bands green, red.*'blue'"),
        ([], "uint16", "stretches the bands none"),
        ([("red", 1, 2), ("green", 2, 2), ("blue", 1, 2)], "uint16", "'green'.*do not rise"),
        ([("red", 1, 2), ("green", None, 2), ("blue", 1, 2)], "uint16", "'green'.*no numbers"),
        ([("red", 1, 2), ("green", True, 2), ("blue", 1, 2)], "uint16", "'green'.*no numbers"),
        ([("red", 1, 2), ("green", 1, 2), ("blue", 1, 2)], "float32", "float32 values.*has uint16"),
        ([("red", 1, 2), ("green", 1, 2), ("blue", 1, 2)], "uint8", "uint8 values.*has uint16"),
    ],
)
def test_stored_stretches_that_do_not_fit(tmp_path, bands, dtype, message):
    stored = read_stretch(summary_of(tmp_path, bands, dtype))
    with pytest.raises(ConfigError, match=message):
        open_scene(make_raster(tmp_path / "a.tif", dtype="uint16"), stretch=stored)


def test_one_band_for_all_channels_takes_one_stretch(tmp_path):
    stored = summary_of(tmp_path, [("red", 1, 2), ("green", 1, 2), ("blue", 1, 3)])
    with pytest.raises(ConfigError, match="several channels"):
        open_scene(make_raster(tmp_path / "a.tif", dtype="uint16"), bands=[1, 1, 1], stretch=read_stretch(stored))


def test_files_without_a_stretch(tmp_path):
    import geopandas
    import shapely

    frame = geopandas.GeoDataFrame({"a": [1]}, geometry=[shapely.box(0, 0, 1, 1)], crs="EPSG:4326")
    frame.to_file(tmp_path / "a.gpkg")
    frame.to_file(tmp_path / "a.geojson")
    frame.to_parquet(tmp_path / "a.parquet")
    (tmp_path / "list.json").write_text("[1]")
    for name in ("a.gpkg", "a.geojson", "a.parquet", "list.json"):
        with pytest.raises(ConfigError, match="holds no stretch"):
            read_stretch(tmp_path / name)
    for name in ("b.gpkg", "b.fgb", "b.parquet", "b.json", "b.csv"):
        (tmp_path / name).write_bytes(b"\x93\xffno such format")
        with pytest.raises(ConfigError, match="cannot be read"):
            read_stretch(tmp_path / name)
    with pytest.raises(ConfigError, match="does not exist"):
        read_stretch(tmp_path / "c.gpkg")
    with pytest.raises(ConfigError, match="exclude each other"):
        choose_stretch(StretchSpec(), "minmax", tmp_path / "a.gpkg")
    assert choose_stretch(StretchSpec(low=0.1), "model", None) == StretchSpec(low=0.1)


# ------------------------------------------------------------------------------------------------------- Sentinel-2

L2A = {"PRODUCT_TYPE": "S2MSI2A", "PROCESSING_BASELINE": "04.00"}


@pytest.mark.parametrize(
    "path,tags,nodata,expected",
    [
        ("a.tif", L2A, 0, -1000),
        ("a.tif", L2A | {"PRODUCT_TYPE": "S2MSI1C", "PROCESSING_BASELINE": "05.11"}, 0, -1000),
        ("a.tif", L2A | {"SPECIAL_VALUE_NODATA": "0"}, None, -1000),
        ("a.tif", {"PRODUCT_URI": PRODUCT.format("0509") + ".SAFE"}, 0, -1000),
        ("a.tif", L2A | {"BOA_ADD_OFFSET": "-900"}, 0, -900),
        ("a.tif", L2A | {"BOA_ADD_OFFSET": "0"}, 0, 0),
        ("a.tif", L2A | {"RADIO_ADD_OFFSET": "{-1000,-1000,-1000}"}, 0, -1000),
        (f"/d/{PRODUCT.format('0400')}.SAFE/GRANULE/L2A_T29SPS/IMG_DATA/R10m/T29SPS_20230426T105619_B04_10m.jp2", {},
         None, -1000),
        # before 04.00, a test processor's, none, or the product's name says another than the tag
        ("a.tif", L2A | {"PROCESSING_BASELINE": "03.01"}, 0, None),
        ("a.tif", L2A | {"PROCESSING_BASELINE": "99.99"}, 0, None),
        ("a.tif", {"PRODUCT_TYPE": "S2MSI2A"}, 0, None),
        ("a.tif", {"PRODUCT_URI": PRODUCT.format("0509"), "PROCESSING_BASELINE": "02.14"}, 0, None),
        # not certain: no nodata 0, another sensor or only its name, offsets by band, an offset of the wrong sign
        ("a.tif", L2A, None, None),
        ("a.tif", L2A, 65535, None),
        ("a.tif", {"SENSOR": "Sentinel-2 MSI L2A", "PROCESSING_BASELINE": "05.09"}, 0, None),
        ("a.tif", {"PRODUCT_TYPE": "S2MSI1B", "PROCESSING_BASELINE": "04.00"}, 0, None),
        ("a.tif", L2A | {"BOA_ADD_OFFSET": "-1000 -900"}, 0, None),
        ("a.tif", L2A | {"BOA_ADD_OFFSET": "1000"}, 0, None),
        # copies outside a product's folder, and its true colour image
        (f"/d/{PRODUCT.format('0400')}_B04.tif", {}, 0, None),
        (f"/d/{PRODUCT.format('0400')}.SAFE/GRANULE/L2A/IMG_DATA/R10m/T29SPS_20230426T105619_TCI_10m.jp2", {}, 0, None),
        (f"/d/{PRODUCT.format('0301')}.SAFE/GRANULE/L2A/IMG_DATA/R10m/T29SPS_20230426T105619_B04_10m.jp2", {}, 0, None),
    ],
)  # fmt: skip
def test_sentinel2_offset(path, tags, nodata, expected):
    found = radiometric_offset(path, tags, nodata)
    assert (found[0] if found else None) == expected


def test_sentinel2_offset_is_used_by_the_models_stretch(tmp_path):
    # reflectance (DN - 1000) / 10000: 0 at 1000, 0.15 at 2500, 0.3 at 4000
    values = np.array([[[0, 999, 1000, 2500, 4000]]] * 3, np.uint16)
    path = write_raster(tmp_path / "a.tif", values, nodata=0, colours=RGB, tags=L2A)
    spec = StretchSpec(kind="fixed", low=0.0, high=0.3)
    with open_scene(path, stretch=spec) as scene:
        assert read_all(scene)[0][0].tolist() == [[0, 0, 0, 128, 255]]
        assert scene.stretch_record["offset_from"] == "PROCESSING_BASELINE 04.00"
        assert scene.stretch_record["bands"][0]["offset"] == -0.1
    with open_scene(path, stretch=parse_stretch("fixed:1000,4000")) as scene:
        assert read_all(scene)[0][0].tolist() == [[0, 0, 0, 128, 255]]
        assert scene.stretch_record["offset_from"] is None


def test_band_tags_go_before_the_baseline_and_floats_have_no_offset(tmp_path):
    values = np.array([[[0, 1500, 3000]]] * 3, np.uint16)
    tagged = write_raster(tmp_path / "a.tif", values, nodata=0, colours=RGB, tags=L2A, scales=(1e-4,) * 3)
    floats = write_raster(tmp_path / "b.tif", (values * 1e-4).astype("f4"), nodata=0, colours=RGB, tags=L2A)
    for path in (tagged, floats):
        with open_scene(path, stretch=StretchSpec(kind="fixed", low=0.0, high=0.3)) as scene:
            assert read_all(scene)[0][0, 0, 2] == 255 and scene.stretch_record["offset_from"] is None
