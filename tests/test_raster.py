"""Scenes: opening, bands, stretch, valid mask, ground sample distance, resampling."""

from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pyproj
import pytest
import rasterio
import rasterio.shutil
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.control import GroundControlPoint
from rasterio.rpc import RPC
from rasterio.transform import Affine
from rasters import invalid_blob, make_raster, pattern, write_raster

from rtmdet_geo import scene as scene_module
from rtmdet_geo.bands import choose_bands, name_bands, sensor_family, wavelength_name
from rtmdet_geo.errors import (
    BandError,
    BandWarning,
    NodataWarning,
    NotGeoreferencedWarning,
    RasterError,
    ResolutionError,
    ResolutionWarning,
)
from rtmdet_geo.georeference import check_resolution, ground_sample_distance
from rtmdet_geo.raster import describe_scene, open_scene
from rtmdet_geo.resample import axis_taps, resample
from rtmdet_geo.scene_tags import acquisition_time, iso_time, scene_stem, sensor_name
from rtmdet_geo.stretch import BandStretch, differs, percentile_stretch
from rtmdet_geo.structures import StretchSpec

FIXED = StretchSpec(kind="fixed", low=0.0, high=0.3)


def from_origin(west, north, x_size, y_size):
    """As rasterio's, which warns with affine 3."""
    return Affine(x_size, 0, west, 0, -y_size, north)


def read_all(scene):
    return scene.read(0, 0, scene.width, scene.height)


# ---------------------------------------------------------------------------------------------------------- reading


def test_8_bit_scene_passes_unchanged(tmp_path):
    path = make_raster(tmp_path / "a.tif")
    with open_scene(path) as scene:
        pixels, valid = read_all(scene)
        assert (scene.width, scene.height, scene.scale_x, scene.scale_y) == (60, 40, 1.0, 1.0)
        assert scene.scene_id == "a" and scene.is_georeferenced and scene.band_indexes == (1, 2, 3)
    with rasterio.open(path) as dataset:
        np.testing.assert_array_equal(pixels, dataset.read())
    assert valid.all() and pixels.dtype == np.uint8 and valid.dtype == np.bool_


def test_outside_the_scene_is_zero_and_invalid(tmp_path):
    with open_scene(make_raster(tmp_path / "a.tif")) as scene:
        whole, _ = read_all(scene)
        pixels, valid = scene.read(-3, 35, 10, 9)
        np.testing.assert_array_equal(pixels[:, :5, 3:], whole[:, 35:, :7])
        assert valid[:5, 3:].all() and valid.sum() == 5 * 7
        assert not pixels[:, 5:].any() and not pixels[:, :, :3].any()
        pixels, valid = scene.read(1000, 1000, 4, 5)
        assert pixels.shape == (3, 5, 4) and not pixels.any() and not valid.any()


@pytest.mark.parametrize("nodata_type", ["none", "nodata", "alpha", "mask"])
@pytest.mark.parametrize("factor", [1.0, 0.4, 0.77, 1.9, 4.2])
def test_a_pixel_does_not_depend_on_the_window(tmp_path, nodata_type, factor):
    path = make_raster(tmp_path / "a.tif", nodata_type=nodata_type, dtype="uint16", num_bands=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResolutionWarning)
        scene = open_scene(path, model_gsd_m=10.0 / factor, stretch=FIXED)
    whole, whole_valid = read_all(scene)

    @settings(deadline=None, max_examples=12)
    @given(st.integers(-5, scene.width), st.integers(-5, scene.height), st.integers(1, 40), st.integers(1, 40))
    def check(x, y, width, height):
        pixels, valid = scene.read(x, y, width, height)
        padded = np.zeros((3, height, width), np.uint8)
        padded_valid = np.zeros((height, width), bool)
        left, right = max(x, 0), min(x + width, scene.width)
        top, bottom = max(y, 0), min(y + height, scene.height)
        if left < right and top < bottom:
            padded[:, top - y : bottom - y, left - x : right - x] = whole[:, top:bottom, left:right]
            padded_valid[top - y : bottom - y, left - x : right - x] = whole_valid[top:bottom, left:right]
        np.testing.assert_array_equal(pixels, padded)
        np.testing.assert_array_equal(valid, padded_valid)

    check()
    scene.close()


def test_reading_takes_no_more_than_the_window_needs(tmp_path, monkeypatch):
    path = make_raster(tmp_path / "a.tif", width=600, height=400, bounds=(0, 4e6, 6000, 4_004_000))
    with open_scene(path, model_gsd_m=5.1) as scene:
        asked = []
        source = scene._source
        original = source.read
        monkeypatch.setattr(
            source, "read", lambda *args, **options: asked.append(args[1:5]) or original(*args, **options)
        )
        scene.read(200, 100, 64, 64)
    (_, _, width, height), *more = asked
    assert not more and width <= 64 / 1.9 + 4 and height <= 64 / 1.9 + 4


@pytest.mark.parametrize("nodata_type", ["nodata", "alpha", "mask"])
def test_valid_mask(tmp_path, nodata_type):
    with open_scene(make_raster(tmp_path / "a.tif", nodata_type=nodata_type)) as scene:
        pixels, valid = read_all(scene)
        assert scene.mask_kind == nodata_type
    np.testing.assert_array_equal(valid, ~invalid_blob(40, 60))
    assert not pixels[:, ~valid].any()


def test_alpha_band_is_no_image_band(tmp_path):
    path = make_raster(tmp_path / "a.tif", num_bands=1, nodata_type="alpha", colours=("gray",))
    with pytest.warns(BandWarning, match="one band"), open_scene(path) as scene:
        assert scene.band_indexes == (1, 1, 1) and scene.mask_kind == "alpha"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_nan_and_infinity_are_invalid(tmp_path, dtype):
    values = pattern(3, 40, 60, dtype, low=0, high=0.3)
    values[0, 3, 4], values[1, 5, 6], values[2, 7, 8] = np.nan, np.inf, -np.inf
    with open_scene(write_raster(tmp_path / "a.tif", values, colours=("red", "green", "blue"))) as scene:
        pixels, valid = read_all(scene)
    assert {tuple(where) for where in np.argwhere(~valid)} == {(3, 4), (5, 6), (7, 8)}
    assert not pixels[:, ~valid].any()


def test_black_in_one_band_is_not_nodata(tmp_path):
    values = np.full((3, 4, 4), 9, np.uint8)
    values[0, 0, 0] = 0
    values[:, 1, 1] = 0
    with open_scene(write_raster(tmp_path / "a.tif", values, nodata=0, colours=("red", "green", "blue"))) as scene:
        _, valid = read_all(scene)
    assert np.argwhere(~valid).tolist() == [[1, 1]]


def test_nodata_option_overrides_the_file(tmp_path):
    path = make_raster(tmp_path / "a.tif", nodata_type="nodata")
    with rasterio.open(path, "r+") as dataset:
        values = dataset.read()
        values[:, 2, 3] = 255
        dataset.write(values)
    with open_scene(path, nodata=255) as scene:
        _, valid = read_all(scene)
    assert np.argwhere(~valid).tolist() == [[2, 3]]


@pytest.mark.parametrize(
    ("dtype", "nodata", "expected"),
    [
        ("uint8", -9999, 0), ("uint8", 0.5, 0), ("uint8", 3, 1), ("int16", -9999, 0), ("uint16", math.nan, 0),
        ("float32", 3.0, 1), ("float32", math.nan, 1), ("float32", 1e300, 0),
    ],
)  # fmt: skip
def test_nodata_values(dtype, nodata, expected):
    values = np.array([1, 3, 5], dtype)
    if dtype == "float32" and math.isnan(nodata):
        values[0] = np.nan
    assert (~differs(values, nodata)).sum() == expected


# ---------------------------------------------------------------------------------------------------------- stretch


def test_fixed_stretch_worked_by_hand(tmp_path):
    # reflectance = DN * 1e-4; 0..0.3 -> 0..255, half up: 1500 -> 127.5 -> 128; 12 -> 1.02 -> 1; 3000 and above -> 255
    values = np.array([[[0, 12, 1500, 2999, 3000, 65535]]] * 3, np.uint16)
    with open_scene(write_raster(tmp_path / "a.tif", values, colours=("red", "green", "blue")), stretch=FIXED) as scene:
        pixels, _ = read_all(scene)
        assert scene.stretch_record["bands"][0]["high_dn"] == pytest.approx(3000)
    assert pixels[0].tolist() == [[0, 1, 128, 255, 255, 255]]


def test_scale_and_offset_tags_are_honoured(tmp_path):
    values = np.array([[[1000, 2500, 4000]]] * 3, np.uint16)  # 0.0, 0.15, 0.3
    path = write_raster(
        tmp_path / "a.tif", values, scales=(1e-4,) * 3, offsets=(-0.1,) * 3, colours=("red", "green", "blue")
    )
    with open_scene(path, stretch=FIXED) as scene:
        pixels, _ = read_all(scene)
        assert scene.stretch_record["bands"][1]["offset"] == -0.1
    assert pixels[0].tolist() == [[0, 128, 255]]


def test_floats_are_physical(tmp_path):
    values = np.array([[[-0.1, 0.0, 0.15, 0.3, 9.0]]] * 3, np.float32)
    with open_scene(write_raster(tmp_path / "a.tif", values, colours=("red", "green", "blue")), stretch=FIXED) as scene:
        assert read_all(scene)[0][0].tolist() == [[0, 0, 128, 255, 255]]


@pytest.mark.parametrize("dtype", ["int16", "uint16", "int32", "uint32", "float32", "float64"])
def test_table_and_arithmetic_agree(dtype):
    band = BandStretch(-120.5, 3071.25)
    values = np.arange(-32768, 32768).astype(np.int64)
    values = (values + 32768 if dtype.startswith("u") else values).astype(dtype)
    table = band.lut(np.dtype(dtype))
    assert (table is not None) == (dtype in ("int16", "uint16"))
    exact = np.clip((values.astype(float) + 120.5) * (255 / (3071.25 + 120.5)) + 0.5, 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(band.apply(values, table), exact)


def test_stretch_none_refuses_16_bit(tmp_path):
    with pytest.raises(RasterError, match=r"uint16.*gdal_translate"):
        open_scene(make_raster(tmp_path / "a.tif", dtype="uint16"), stretch=StretchSpec(kind="none"))
    with open_scene(make_raster(tmp_path / "b.tif"), stretch=StretchSpec(kind="none")) as scene:
        assert scene.stretch_record["kind"] == "none"


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "float32"])
def test_percentiles_are_of_the_whole_valid_scene(tmp_path, dtype):
    path = make_raster(tmp_path / "a.tif", dtype=dtype, nodata_type="mask")
    spec = StretchSpec(kind="percentile", low_percent=2, high_percent=97)
    with open_scene(path, stretch=spec) as scene:
        record = scene.stretch_record
        part = scene.read(20, 10, 30, 20)[0]
        whole = read_all(scene)[0]
    np.testing.assert_array_equal(part, whole[:, 10:30, 20:50])
    with rasterio.open(path) as dataset:
        values = dataset.read(2)[~invalid_blob(40, 60)].astype(float)
    low, high = np.percentile(values, [2, 97])
    assert record["bands"][1]["low_dn"] == pytest.approx(low) and record["bands"][1]["high_dn"] == pytest.approx(high)
    assert record["decimation"] == 1
    json.dumps(record, allow_nan=False)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(-32768, 32767), min_size=1, max_size=50), st.floats(0, 49), st.floats(51, 100))
def test_counted_percentiles_equal_numpy(values, low, high):
    array = np.array(values, np.int16)
    band = percentile_stretch(StretchSpec(kind="percentile", low_percent=low, high_percent=high), array)
    expected = np.percentile(array.astype(float), [low, high])
    assert band.low == pytest.approx(expected[0], abs=1e-6)
    if expected[1] - expected[0] > 1e-6:
        assert band.high == pytest.approx(expected[1], abs=1e-6)
    assert band.high > band.low


def test_percentiles_of_large_scenes_are_decimated_and_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(scene_module, "PERCENTILE_MAX_PIXELS", 700)
    path = make_raster(tmp_path / "a.tif", dtype="uint16")
    records = []
    for _ in range(2):
        with open_scene(path, stretch=StretchSpec(kind="percentile")) as scene:
            records.append(scene.stretch_record)
    assert records[0] == records[1] and records[0]["decimation"] == 2


def test_constant_and_empty_scenes(tmp_path):
    constant = np.full((3, 5, 5), 700, np.uint16)
    colours = ("red", "green", "blue")
    spec = StretchSpec(kind="percentile")
    with open_scene(write_raster(tmp_path / "a.tif", constant, colours=colours), stretch=spec) as scene:
        assert not read_all(scene)[0].any()
    path = write_raster(tmp_path / "b.tif", constant, nodata=700, colours=colours)
    with pytest.warns(NodataWarning, match="no valid pixel"), open_scene(path, stretch=spec) as scene:
        assert not read_all(scene)[1].any()


# ------------------------------------------------------------------------------------------------------------ bands


def test_sentinel_2_order_follows_names(tmp_path):
    path = make_raster(
        tmp_path / "a.tif", num_bands=5, dtype="uint16", descriptions=("B02", "B08", "B04", "B8A", "B03")
    )
    with open_scene(path, model_bands=("red", "green", "blue", "nir")) as scene:
        assert scene.band_indexes == (3, 5, 1, 2)
        pixels, _ = read_all(scene)
    with open_scene(path, model_bands=("blue",)) as scene:
        np.testing.assert_array_equal(read_all(scene)[0][0], pixels[2])


def test_optional_band_is_filled(tmp_path, caplog):
    path = make_raster(tmp_path / "a.tif", nodata_type="mask")
    bands = ("red", "green", "blue", "nir")
    with (
        caplog.at_level("INFO"),
        pytest.warns(BandWarning, match="no nir band"),
        open_scene(path, model_bands=bands, optional_bands={"nir": 77}, model_gsd_m=7) as scene,
    ):
        pixels, valid = read_all(scene)
        assert scene.band_indexes == (1, 2, 3, None)
        assert scene.stretch_record["bands"][3] == {"name": "nir", "band": None, "fill": 77}
    assert (pixels[3][valid] == 77).all() and not pixels[3][~valid].any()
    assert "'nir'" in caplog.text and "77" in caplog.text
    with pytest.raises(BandError, match=r"no band 'nir'.*1=red.*--bidx"):
        open_scene(path, model_bands=bands)


@pytest.mark.parametrize(
    "bands", [(3, 2, 1), ("3", "2", "1"), ("B02", "B03", "B04"), ("blue", "green", "red"), ("b2", "B3", 1)]
)
def test_bidx_by_number_or_name(tmp_path, bands):
    path = make_raster(tmp_path / "a.tif", descriptions=("B04", "B03", "B02"))
    with open_scene(path, bands=bands) as scene:
        assert scene.band_indexes == (3, 2, 1)


@pytest.mark.parametrize(
    ("bands", "message"),
    [
        ((1, 2), r"2 bands were given .* takes 3"),
        ((1, 2, 3, 1), r"4 bands were given"),
        ((1, 2, 4), r"no band 4; it has 1=red \(B04\), 2=green"),
        ((0, 1, 2), r"no band 0"),
        ((1, 2, "B09"), r"no band 'B09'"),
    ],
)
def test_wrong_bidx(tmp_path, bands, message):
    path = make_raster(tmp_path / "a.tif", descriptions=("B04", "B03", "B02"))
    with pytest.raises(BandError, match=message) as caught:
        open_scene(path, bands=bands)
    assert "\n" not in str(caught.value)


def test_duplicated_names_are_an_error(tmp_path):
    path = make_raster(tmp_path / "a.tif", num_bands=4, descriptions=("red", "B04", "green", "blue"))
    with pytest.raises(BandError, match=r"'red' more than once.*1=red, 2=red \(B04\)"):
        open_scene(path)
    with pytest.raises(BandError, match="more than once"):
        open_scene(path, bands=("Red ", "green", "red(2)"))


def test_four_unnamed_bands_are_guessed_with_a_warning(tmp_path):
    path = make_raster(tmp_path / "a.tif", num_bands=4)
    with pytest.warns(BandWarning, match=r"band 4 carries no name.*--bidx"):
        scene = open_scene(path, model_bands=("red", "green", "blue", "nir"))
    assert scene.band_indexes == (1, 2, 3, 4) and scene.stretch_record["guessed"]
    scene.close()
    with open_scene(path) as scene:  # nothing to guess for a model without nir
        assert scene.band_indexes == (1, 2, 3)
    with pytest.raises(BandError, match="5=unnamed"):
        open_scene(make_raster(tmp_path / "b.tif", num_bands=5))


def test_one_band_does_not_stand_in_for_another(tmp_path):
    path = make_raster(tmp_path / "a.tif", num_bands=1, descriptions=("B04",))
    with pytest.raises(BandError, match="no band 'nir'"):
        open_scene(path, model_bands=("nir",))
    with open_scene(path, model_bands=("red",)) as scene:
        assert scene.band_indexes == (1,)


@pytest.mark.parametrize(
    ("text", "family", "name"),
    [
        ("B04", None, "red"), ("b4", None, "red"), ("Red", None, "red"), ("RED (665 nm)", None, "red"),
        ("B08", None, "nir"),
        ("B8A", None, "nir08"), ("B8", "landsat-8", "pan"), ("B5", "landsat-8", "nir"), ("SR_B4", None, "red"),
        ("SR_B3", "landsat-7", "red"), ("Band 3", "landsat-7", "red"), ("Band 3", None, None), ("NIR", None, "nir"),
        ("Near-Infrared", None, "nir"), ("B11", None, "swir16"), ("elevation", None, None), ("", None, None),
        ("B13", None, None),
    ],
)  # fmt: skip
def test_wavelength_names(text, family, name):
    assert wavelength_name(text, family) == name


def test_counting_descriptions_say_nothing():
    assert [band.name for band in name_bands(("B1", "B2", "B3"), ("undefined",) * 3)] == [None] * 3
    assert [band.name for band in name_bands(("B1", "B2", "B3"), ("red", "green", "blue"))] == ["red", "green", "blue"]
    assert [band.name for band in name_bands(("B1", "B2", "B3"), ("undefined",) * 3, "landsat-7")] == [
        "blue",
        "green",
        "red",
    ]


def test_sensor_families():
    assert sensor_family("Sentinel-2 MSI L2A") == "sentinel-2" and sensor_family("S2B") == "sentinel-2"
    assert sensor_family(None, "LC09_L2SP_1") == "landsat-8" and sensor_family("LANDSAT_5") == "landsat-7"
    assert sensor_family("WorldView-2", "scene") is None


def test_only_optional_bands_is_no_scene():
    bands = name_bands(("swir1", "swir2"), ("undefined",) * 2)
    with pytest.raises(BandError, match="none of the model's bands"):
        choose_bands(bands, ("nir",), optional_bands={"nir": 0}, where="scene")


# --------------------------------------------------------------------------------------- ground sample distance


def expected_gsd(crs, transform, width, height):
    """By hand: longitude and latitude of the centre pixel's edge midpoints, geodesics between them."""
    to_lonlat = pyproj.Transformer.from_crs(crs, "EPSG:4326", always_xy=True)
    geod = pyproj.Geod(ellps="WGS84")
    x, y = width / 2, height / 2

    def place(px, py):
        a, b, c, d, e, f = tuple(transform)[:6]
        return to_lonlat.transform(a * px + b * py + c, d * px + e * py + f)

    return (
        geod.inv(*place(x - 0.5, y), *place(x + 0.5, y))[2],
        geod.inv(*place(x, y - 0.5), *place(x, y + 0.5))[2],
    )


@settings(deadline=None, max_examples=40)
@given(st.floats(0, 80), st.floats(-179, 179), st.sampled_from(["EPSG:3857", "EPSG:4326", "utm"]), st.floats(0.3, 30))
def test_gsd_against_geodesics(latitude, longitude, crs, size_m):
    if crs == "utm":
        crs = f"EPSG:{32600 + int((longitude + 180) // 6) + 1}"
    x, y = pyproj.Transformer.from_crs("EPSG:4326", crs, always_xy=True).transform(longitude, latitude)
    step = size_m / 111_320 if crs == "EPSG:4326" else size_m
    transform = from_origin(x - 50 * step, y + 40 * step, step, step)
    found = ground_sample_distance(crs, tuple(transform)[:6], 100, 80)
    assert found == pytest.approx(expected_gsd(crs, transform, 100, 80), rel=1e-6)
    if crs == "EPSG:3857":  # Mercator on a sphere: within the ellipsoid's flattening of size * cos(latitude)
        assert found == pytest.approx((size_m * math.cos(math.radians(latitude)),) * 2, rel=0.01)
    elif crs != "EPSG:4326":
        assert found == pytest.approx((size_m, size_m), rel=0.002)


def test_gsd_of_a_rotated_scene(tmp_path):
    transform = Affine(8, 3, 500_000, 6, -4, 4_000_000)  # x axis is 10 m long, y axis 5 m
    path = write_raster(
        tmp_path / "a.tif", pattern(3, 40, 60, "uint8"), transform=transform, colours=("red", "green", "blue")
    )
    with open_scene(path) as scene:
        assert (scene.gsd_x_m, scene.gsd_y_m) == pytest.approx((10.0, 5.0), rel=1e-3)
        assert scene.transform == transform


def test_gsd_where_the_crs_leads_nowhere():
    assert ground_sample_distance('LOCAL_CS["site",UNIT["metre",1]]', (1, 0, 0, 0, -1, 0), 10, 10) is None
    assert ground_sample_distance("EPSG:4326", (1, 0, 0, 0, -1, 500.0), 10, 10) is None


@pytest.mark.parametrize("width_px", [60, 61, 97])
@pytest.mark.parametrize("model_gsd_m", [5.3, 8.0, 13.7])
def test_size_and_mapping_are_exact(tmp_path, width_px, model_gsd_m):
    path = make_raster(tmp_path / "a.tif", width=width_px, bounds=(500_000, 4e6, 500_000 + 7.5 * width_px, 4_000_400))
    with open_scene(path, model_gsd_m=model_gsd_m) as scene:
        assert scene.width == round(width_px * scene.gsd_x_m / model_gsd_m)
        assert scene.height == round(40 * scene.gsd_y_m / model_gsd_m)
        assert scene.scale_x == width_px / scene.width and scene.scale_y == 40 / scene.height
        boxes = scene.to_source(np.array([[scene.width, scene.height, 6.0, 2.0, 0.0], [0, 0, 6, 2, -np.pi / 2]]))
    np.testing.assert_allclose(boxes[0], [width_px, 40, 6 * scene.scale_x, 2 * scene.scale_y, 0], rtol=1e-14)
    np.testing.assert_allclose(boxes[1, :4], [0, 0, 6 * scene.scale_y, 2 * scene.scale_x], rtol=1e-12)


def test_users_gsd_wins(tmp_path):
    path = make_raster(tmp_path / "a.tif", crs=None)
    with pytest.warns(NotGeoreferencedWarning), open_scene(path, model_gsd_m=4, gsd_m=6) as scene:
        assert (scene.width, scene.height) == (90, 60) and scene.gsd_x_m is None
    with pytest.warns(NotGeoreferencedWarning), open_scene(path, model_gsd_m=4) as scene:
        assert (scene.width, scene.height) == (60, 40)
    with open_scene(make_raster(tmp_path / "b.tif"), model_gsd_m=4, gsd_m=4) as scene:
        assert scene.width == 60 and scene.gsd_x_m == pytest.approx(10, rel=1e-3)
    for wrong in (0.0, -1.0, math.nan):
        with pytest.raises(ResolutionError, match="--gsd"):
            open_scene(tmp_path / "b.tif", model_gsd_m=4, gsd_m=wrong)


@pytest.mark.parametrize(
    ("model_gsd_m", "outcome"),
    [(10, None), (19, None), (5.1, None), (22, "warn"), (4.8, "warn"), (110, "error"), (0.9, "error")],
)
def test_resolution_limits(tmp_path, model_gsd_m, outcome):
    path = make_raster(tmp_path / "a.tif")
    if outcome == "warn":
        with pytest.warns(ResolutionWarning, match="m per pixel") as record:
            open_scene(path, model_gsd_m=model_gsd_m).close()
        assert len(record) == 1
    elif outcome == "error":
        with pytest.raises(ResolutionError, match=r"--gsd.*--model"):
            open_scene(path, model_gsd_m=model_gsd_m)
    else:
        open_scene(path, model_gsd_m=model_gsd_m).close()


# ------------------------------------------------------------------------------------------------------- resampling


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 300), st.integers(1, 300))
def test_taps(source_size, size):
    first, weights, nearest = axis_taps(source_size, size, 0, size)
    assert (first >= 0).all() and (first + weights.shape[1] <= source_size).all() and (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-5)
    assert ((nearest >= first) & (nearest < first + weights.shape[1])).all()
    # A linear ramp keeps its values away from the edges: no shift.
    ratio = source_size / size
    centre = (np.arange(size) + 0.5) * ratio
    away = (centre > max(1, ratio) + 0.5) & (centre < source_size - max(1, ratio) - 0.5)
    position = first[:, None] + np.arange(weights.shape[1]) + 0.5
    ramp = (weights.astype(float) * position).sum(axis=1)
    tolerance = 1e-3 if ratio <= 1 else 0.5 / ratio + 1e-3  # a sampled tent is off by less than a tap's share
    assert np.abs(ramp - centre)[away].max(initial=0) < tolerance


def slow_resample(source, valid, size):
    """Obvious reference: one pixel at a time, float64."""
    channels, source_height, source_width = source.shape
    height, width = size
    out = np.zeros((channels, height, width))
    ratio_y, ratio_x = source_height / height, source_width / width
    radius_y, radius_x = max(1, ratio_y), max(1, ratio_x)
    for row in range(height):
        for column in range(width):
            y, x = (row + 0.5) * ratio_y, (column + 0.5) * ratio_x
            if not valid[min(int(y), source_height - 1), min(int(x), source_width - 1)]:
                continue
            weight_y = np.maximum(0, 1 - np.abs(np.arange(source_height) + 0.5 - y) / radius_y)
            weight_x = np.maximum(0, 1 - np.abs(np.arange(source_width) + 0.5 - x) / radius_x)
            weight = np.outer(weight_y, weight_x) * valid
            out[:, row, column] = (source * weight).sum(axis=(1, 2)) / weight.sum()
    return out


@pytest.mark.parametrize("size", [(20, 31), (7, 9), (41, 50), (13, 40)])
@pytest.mark.parametrize("has_hole", [False, True])
def test_resampling_against_the_slow_reference(size, has_hole):
    source = pattern(2, 20, 25, "uint8")
    valid = ~invalid_blob(20, 25) if has_hole else np.ones((20, 25), bool)
    source[:, ~valid] = 0
    taps_y, taps_x = axis_taps(20, size[0], 0, size[0]), axis_taps(25, size[1], 0, size[1])
    pixels, resampled_valid = resample(source, valid, taps_y, taps_x, 0, 0)
    expected = slow_resample(source, valid, size)
    assert np.abs(pixels - expected).max() <= 0.5 + 1e-3
    assert resampled_valid.all() != has_hole and not pixels[:, ~resampled_valid].any()


def test_nodata_does_not_bleed(tmp_path):
    values = np.full((3, 40, 60), 200, np.uint8)
    values[:, 10:20, 10:20] = 0
    path = write_raster(tmp_path / "a.tif", values, nodata=0, colours=("red", "green", "blue"))
    with open_scene(path, model_gsd_m=6.1) as scene:
        pixels, valid = read_all(scene)
    assert set(np.unique(pixels[:, valid])) == {200} and not valid.all()


# ------------------------------------------------------------------------------------------- georeference and errors


def test_no_crs_is_one_warning_and_pixels(tmp_path):
    path = make_raster(tmp_path / "a.tif", crs=None)
    with pytest.warns(NotGeoreferencedWarning, match="no CRS") as record:
        scene = open_scene(path)
        scene.read(0, 0, 9, 9)
    assert len(record) == 1
    assert scene.crs is None and scene.transform == Affine.identity() and not scene.is_georeferenced
    scene.close()


def test_ground_control_points_are_warped(tmp_path):
    values = pattern(3, 40, 60, "uint8")
    corners = [(0, 0), (0, 60), (40, 0), (40, 60)]
    points = [GroundControlPoint(row, col, 3.0 + col * 1e-4, 50.0 - row * 1e-4) for row, col in corners]
    path = write_raster(tmp_path / "a.tif", values, gcps=points, crs="EPSG:4326", colours=("red", "green", "blue"))
    with open_scene(path) as scene:
        pixels, valid = read_all(scene)
        assert scene.crs.to_epsg() == 4326 and scene.mask_kind == "alpha" and scene.band_indexes == (1, 2, 3)
        assert (scene.transform.c, scene.transform.f) == pytest.approx((3.0, 50.0), abs=1e-9)
        again, _ = scene.read(10, 10, 20, 20)
    assert valid.mean() > 0.9
    np.testing.assert_array_equal(again, pixels[:, 10:30, 10:30])
    assert describe_scene(path)["warped_from"] == "gcps"


def test_rational_polynomials_are_warped(tmp_path):
    # The simplest model: line follows -latitude, sample follows longitude.
    rpcs = RPC(
        err_bias=0, err_rand=0, height_off=0, height_scale=100, lat_off=50, lat_scale=0.002,
        long_off=3, long_scale=0.003,
        line_off=20, line_scale=20, samp_off=30, samp_scale=30,
        line_num_coeff=[0, 0, -1, *[0] * 17], line_den_coeff=[1, *[0] * 19],
        samp_num_coeff=[0, 1, *[0] * 18], samp_den_coeff=[1, *[0] * 19],
    )  # fmt: skip
    path = write_raster(
        tmp_path / "a.tif", pattern(3, 40, 60, "uint8"), crs=None, rpcs=rpcs, colours=("red", "green", "blue")
    )
    with open_scene(path) as scene:
        assert scene.crs.to_epsg() == 4326 and scene.is_georeferenced
        assert scene.gsd_y_m == pytest.approx(0.0001 * 111_230, rel=0.02)
        assert read_all(scene)[1].mean() > 0.8
    assert describe_scene(path)["warped_from"] == "rpcs"


def test_missing_and_foreign_files(tmp_path):
    (tmp_path / "text.tif").write_text("no raster")
    for path, message in [
        (tmp_path / "absent.tif", "does not exist"),
        (tmp_path / "text.tif", "cannot be opened as a raster"),
        (tmp_path, "cannot be opened as a raster"),
        ("/vsizip/absent.zip/a.tif", "cannot be opened as a raster"),
    ]:
        for function in (open_scene, describe_scene):
            with pytest.raises(RasterError, match=message) as caught:
                function(path)
            assert "\n" not in str(caught.value) and str(path) in str(caught.value)
            assert isinstance(caught.value, OSError)


def test_virtual_paths_open(tmp_path):
    path = make_raster(tmp_path / "a.tif")
    from rasterio.io import MemoryFile

    with MemoryFile(path.read_bytes(), filename="inside.tif") as memory, open_scene(memory.name) as scene:
        assert scene.scene_id == "inside"


def test_complex_values_are_refused(tmp_path):
    path = write_raster(tmp_path / "a.tif", np.ones((1, 4, 4), np.complex64))
    with pytest.warns(BandWarning), pytest.raises(RasterError, match=r"complex.*gdal_calc"):
        open_scene(path)
    assert describe_scene(path)["bands"][0]["dtype"] == "complex64"


def test_colour_tables_are_refused(tmp_path):
    path = tmp_path / "a.tif"
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        width=4,
        height=4,
        count=1,
        dtype="uint8",
        crs="EPSG:32630",
        transform=from_origin(5e5, 4e6, 10, 10),
    ) as target:
        target.write(np.ones((1, 4, 4), np.uint8))
        target.write_colormap(1, {1: (9, 8, 7)})
    with pytest.warns(BandWarning), pytest.raises(RasterError, match="expand rgb"):
        open_scene(path)


def test_a_truncated_file_names_file_and_window(tmp_path):
    path = tmp_path / "a.tif"  # a copied GeoTIFF has its directory in front
    rasterio.shutil.copy(
        make_raster(tmp_path / "whole.tif", width=600, height=600), path, tiled=True, blockxsize=64, blockysize=64
    )
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with open_scene(path) as scene:
        scene.read(0, 0, 64, 64)
        with pytest.raises(RasterError, match=r"a\.tif.*x=500 y=500, 100 x 90 px") as caught:
            scene.read(500, 500, 100, 90)
    assert "\n" not in str(caught.value)


def test_mixed_dtypes(tmp_path):
    parts = [write_raster(tmp_path / f"{name}.tif", np.full((1, 4, 6), value, dtype)) for name, value, dtype in
             [("r", 1500, "uint16"), ("g", 0.15, "float32"), ("b", 77, "uint8")]]  # fmt: skip
    bands = "".join(
        f'<VRTRasterBand dataType="{kind}" band="{i}"><ColorInterp>{colour}</ColorInterp><SimpleSource>'
        f"<SourceFilename>{part}</SourceFilename><SourceBand>1</SourceBand></SimpleSource></VRTRasterBand>"
        for i, (kind, colour, part) in enumerate(
            zip(("UInt16", "Float32", "Byte"), ("Red", "Green", "Blue"), parts, strict=True), 1
        )
    )
    path = tmp_path / "a.vrt"
    place = "<SRS>EPSG:32630</SRS><GeoTransform>500000,10,0,4000000,0,-10</GeoTransform>"
    path.write_text(f'<VRTDataset rasterXSize="6" rasterYSize="4">{place}{bands}</VRTDataset>')
    with open_scene(path) as scene:
        assert read_all(scene)[0][:, 0, 0].tolist() == [128, 128, 77]


# ---------------------------------------------------------------------------------------------------- tags and facts


def test_times():
    assert iso_time("2023:04:26 00:00:00") == "2023-04-26T00:00:00"
    assert iso_time("2020-01-02T03:04:05.1234567Z") == "2020-01-02T03:04:05.123456+00:00"
    assert iso_time('"2020-01-02"') == "2020-01-02T00:00:00"
    assert iso_time("yesterday") is None and iso_time("") is None and iso_time("2023:13:45 00:00:00") is None
    landsat = {"DATE_ACQUIRED": "2020-01-02", "SCENE_CENTER_TIME": '"15:40:38.4Z"'}
    assert acquisition_time(landsat) == "2020-01-02T15:40:38.400000+00:00"
    assert (
        acquisition_time({"TIFFTAG_DATETIME": "2023:01:01 00:00:00", "ACQUISITIONDATETIME": "2022-05-06 07:08:09"})
        == "2022-05-06T07:08:09"
    )
    assert acquisition_time({}) is None
    assert sensor_name({"Sensor": " 'S2A' "}) == "S2A" and sensor_name({"other": "x"}) is None


def test_stems():
    assert scene_stem("/vsis3/bucket/x.y.tif") == "x.y" and scene_stem("https://host/a.tif?key=/b.png") == "a"


def test_describe(tmp_path):
    tags = {"TIFFTAG_DATETIME": "2023:04:26 00:00:00", "SENSOR": "Sentinel-2 MSI L2A"}
    path = make_raster(
        tmp_path / "a.tif",
        num_bands=4,
        dtype="uint16",
        nodata_type="nodata",
        tags=tags,
        descriptions=("B04", "B03", "B02", "B08"),
    )
    facts = describe_scene(path)
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert [band["name"] for band in facts["bands"]] == ["red", "green", "blue", "nir"]
    assert facts["crs"] == "EPSG:32630" and facts["bounds"] == [500_000, 4_000_000, 500_600, 4_000_400]
    assert facts["acquired_at"] == "2023-04-26T00:00:00" and facts["sensor"] == tags["SENSOR"]
    assert facts["valid_mask"] == "nodata" and facts["bands"][0]["nodata"] == 0
    assert facts["gsd_x_m"] == pytest.approx(10, rel=1e-3)
    nan = describe_scene(make_raster(tmp_path / "b.tif", dtype="float32", nodata_type="nan"))
    json.dumps(nan, allow_nan=False)
    assert nan["bands"][0]["nodata"] == "nan"


# -------------------------------------------------------------------------------------------------------- real data


def test_real_scenes_open_or_say_why(data_dir):
    paths = [path for path in sorted((data_dir / "geotiff").iterdir()) if path.suffix != ".md"]
    assert paths
    opened = 0
    for path in paths:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", BandWarning)
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            try:
                with open_scene(path) as scene:
                    pixels, valid = read_all(scene)
                    part, _ = scene.read(3, 2, 5, 4)
            except (RasterError, BandError) as error:
                assert "\n" not in str(error) and str(path) in str(error)
                assert path.suffix in (".csv", ".geojson") or "--bidx" in str(error)
                continue
        assert valid.any() and pixels.shape == (3, scene.height, scene.width)
        np.testing.assert_array_equal(part, pixels[:, 2:6, 3:8])
        opened += 1
    assert opened >= 10


def test_real_port_in_metres(data_dir):
    with (
        pytest.warns(ResolutionWarning),
        open_scene(
            data_dir / "sen2ships" / "busan.tif",
            model_bands=("red", "green", "blue", "nir"),
            model_gsd_m=4,
            stretch=FIXED,
        ) as scene,
    ):
        assert scene.band_indexes == (1, 2, 3, 4) and scene.acquired_at == "2022-05-14T00:00:00"
        assert 8.1 < scene.gsd_x_m < 8.3  # 10 m of Mercator at 35 degrees north
        assert abs(scene.width * 4 - scene.source_width * scene.gsd_x_m) <= 2


def test_a_resolution_the_model_was_trained_on_needs_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_resolution("scene", 8.3, 8.3, 4.0, (5.8, 10.0))
        check_resolution("scene", 10.05, 10.05, 4.0, (5.8, 10.0))
    with pytest.warns(ResolutionWarning, match="12 m per pixel"):
        check_resolution("scene", 12.0, 12.0, 4.0, (5.8, 10.0))
    with pytest.raises(ResolutionError):
        check_resolution("scene", 41.0, 41.0, 4.0, (5.8, 50.0))


@pytest.mark.parametrize("dtype", ["uint16", "float32", "uint8"])
def test_haze_is_subtracted_by_the_scenes_own_dark_level(tmp_path, dtype):
    """The same ground under a constant veil gives the same pixels; the window asked for plays no part."""
    ground = np.random.default_rng(0).integers(0, 200, (3, 64, 80))
    unit = {"uint16": 10, "float32": 1e-3, "uint8": 1}[dtype]
    spec = StretchSpec(kind="fixed", low=0.0, high=0.3, dark_percent=1.0)
    seen = []
    for name, veil in (("clear", 0), ("hazy", 50)):
        path = write_raster(tmp_path / f"{name}.tif", ((ground + veil) * unit).astype(dtype))
        with open_scene(path, stretch=spec) as scene:
            seen.append(scene.read(0, 0, 80, 64)[0])
            np.testing.assert_array_equal(scene.read(40, 20, 30, 30)[0], seen[-1][:, 20:50, 40:70])
            assert scene.stretch_record["dark_percent"] == 1.0
            limits = [(band["low_dn"], band["high_dn"]) for band in scene.stretch_record["bands"]]
            assert all(
                low == pytest.approx(np.percentile(ground[band] + veil, 1) * unit)
                for band, (low, _) in enumerate(limits)
            )
    difference = seen[0].astype(int) - seen[1]
    assert abs(difference).max() <= (1 if dtype == "float32" else 0)
    assert seen[0].max() > 100
