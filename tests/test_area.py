"""Where to look: bounds and polygons in any CRS, what touches, what lies inside; scores by class; lengths."""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path

import geopandas
import numpy as np
import pandas as pd
import pyproj
import pytest
import rasterio
import shapely
from affine import Affine
from click.testing import CliRunner
from engines import RectangleEngine, draw_rectangles, scattered_boxes
from hypothesis import given, settings
from hypothesis import strategies as st
from rasters import write_raster
from synthetic import SHIPS, TRANSFORM, BlobBackend, draw_ships, make_spec, write_scene

from rtmdet_geo import detect as pipeline
from rtmdet_geo.area import Area, find_area
from rtmdet_geo.cli import cli
from rtmdet_geo.detect import detect_scene
from rtmdet_geo.errors import (
    AnnotationError,
    ConfigError,
    GeometryWarning,
    NodataWarning,
    NotGeoreferencedWarning,
    UnknownClassError,
)
from rtmdet_geo.raster import open_scene
from rtmdet_geo.structures import Detections, StretchSpec
from rtmdet_geo.tiles import TileGrid

CASABLANCA = Path(__file__).parent / "data" / "casablanca.tif"


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    """Five ships in 500 x 400 px of 10 m: three columns of tiles at 0, 192, 244 px, two rows at 0, 144 px."""
    return write_scene(tmp_path / "port.tif", draw_ships(500, 400))


def world(left: float, top: float, right: float, bottom: float) -> tuple[float, float, float, float]:
    """Return the bounds (west, south, east, north) of a window in px of the scene."""
    (west, north), (east, south) = to_world(TRANSFORM, [(left, top), (right, bottom)]).tolist()
    return west, south, east, north


def to_world(transform: Affine, points) -> np.ndarray:
    """Return points (N, 2) in px as points of the CRS."""
    a, b, c, d, e, f = tuple(transform)[:6]
    x, y = np.asarray(points, np.float64).T
    return np.stack([a * x + b * y + c, d * x + e * y + f], axis=1)


def write_polygons(path: Path, polygons: list, crs: str | None = "EPSG:32630", to: str | None = None) -> Path:
    """Write polygons to a file, projected if asked."""
    frame = geopandas.GeoDataFrame(geometry=polygons, crs=crs)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "'crs' was not provided")
        (frame if to is None else frame.to_crs(to)).to_file(path)
    return path


def found_ships(features: geopandas.GeoDataFrame) -> list[int]:
    """Return which of SHIPS were found, by the nearest centre; each within a px."""
    centres = np.stack([features.geometry.centroid.x, features.geometry.centroid.y], axis=1)
    truth = np.stack([TRANSFORM.c + 10 * SHIPS[:, 0], TRANSFORM.f - 10 * SHIPS[:, 1]], axis=1)
    distances = np.linalg.norm(centres[:, None] - truth[None], axis=2)
    assert (distances.min(axis=1) < 10).all()
    return sorted(distances.argmin(axis=1).tolist())


# ---------------------------------------------------------------- tiles and centres


def test_only_tiles_that_touch_are_read_and_count(scene):
    engine, calls = BlobBackend(), []
    result = detect_scene(scene, model=engine, bounds=world(0, 0, 100, 100), progress=lambda *call: calls.append(call))
    assert engine.num_images == result.attrs["summary"]["num_tiles"] == 1
    assert calls == [(0, 1), (1, 1)] and found_ships(result) == [0]
    engine = BlobBackend()
    assert found_ships(detect_scene(scene, model=engine, bounds=world(0, 0, 200, 100))) == [0]
    assert engine.num_images == 2  # 0 and 192, not 244


def test_tiles_that_only_share_an_edge_do_not_touch():
    grid = TileGrid(400, 300, 100, 0)
    assert [(tile.x, tile.y) for tile in Area(shapely.box(100, 100, 200, 200)).tiles(grid)] == [(100, 100)]
    frame = shapely.Polygon(shapely.box(0, 0, 400, 300).exterior, [shapely.box(99, 99, 301, 201).exterior.coords])
    assert [(tile.x, tile.y) for tile in Area(shapely.box(50, 150, 350, 151)).tiles(grid)] == [
        *((0, 100), (100, 100), (200, 100), (300, 100))
    ]
    assert len(Area(frame).tiles(grid)) == 10  # not the two in the hole


def test_centres_decide_and_the_border_is_inside():
    area = Area(shapely.Polygon([(0, 0), (10, 0), (10, 10), (0, 10)], [[(4, 4), (6, 4), (6, 6), (4, 6)]]))
    points = np.array([[1, 1], [0, 5], [5, 5], [4, 5], [10.001, 5], [10, 10]])
    assert area.holds(points).tolist() == [True, True, False, True, False, True]
    assert area.holds(np.zeros((0, 2))).tolist() == []


def test_an_object_on_the_border_is_the_same_as_without_bounds(scene):
    whole = detect_scene(scene, model=BlobBackend())
    half = detect_scene(
        scene, model=BlobBackend(), bounds=world(0, 0, 61, 400)
    )  # through the first ship, past its centre
    (row,) = half.itertuples()
    assert whole.geometry.geom_equals(row.geometry).sum() == 1
    assert len(detect_scene(scene, model=BlobBackend(), bounds=world(0, 0, 59, 400))) == 0


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    cut_x=st.floats(0.1, 0.9),
    cut_y=st.floats(0.1, 0.9),
    gsd_m=st.sampled_from([None, 10.0, 8.0]),
)
def test_a_partition_of_the_scene_finds_what_the_whole_does(seed, cut_x, cut_y, gsd_m):
    width, height = 330, 290
    image = draw_rectangles(height, width, scattered_boxes(height, width, seed))[0]
    spec = make_spec(tile_size=128, overlap=64, gsd_m=gsd_m, stretch=StretchSpec(kind="none"))
    x, y = width * cut_x, height * cut_y
    with tempfile.TemporaryDirectory() as folder:
        path = write_scene(Path(folder) / "scene.tif", image)
        whole = detect_scene(path, model=RectangleEngine(spec))
        windows = [(0, 0, x, y), (x, 0, width, y), (0, y, x, height), (x, y, width, height)]
        parts = [detect_scene(path, model=RectangleEngine(spec), bounds=world(*window)) for window in windows]
    assert len(whole) and max(len(part) for part in parts) < len(whole)

    def rows(frame: geopandas.GeoDataFrame) -> pd.DataFrame:
        plain = pd.DataFrame(frame.drop(columns=["id", "run_id", "geometry"])).assign(wkb=frame.geometry.to_wkb())
        return plain.sort_values("wkb", ignore_index=True)

    pd.testing.assert_frame_equal(rows(pd.concat(parts)), rows(whole))


def test_the_stretch_is_that_of_the_whole_scene(scene):
    spec = make_spec(stretch=StretchSpec(kind="percentile"))
    whole, part = (
        detect_scene(scene, model=BlobBackend(spec), bounds=bounds).attrs["summary"]["stretch"]
        for bounds in (None, world(0, 0, 30, 30))
    )
    assert whole == part


def test_an_area_without_data_is_named(tmp_path):
    image = draw_ships(500, 400)
    image[:, :260] = 0
    path = write_scene(tmp_path / "half.tif", image, nodata=0)
    with pytest.warns(NodataWarning, match="no valid pixel in the area asked for"):
        result = detect_scene(path, model=BlobBackend(), bounds=world(0, 0, 100, 100))
    assert result.attrs["summary"]["num_empty_tiles"] == 1


# ---------------------------------------------------------------- polygons


@pytest.mark.parametrize("to", ["EPSG:32630", "EPSG:4326", "EPSG:3857", "EPSG:2154"])
@pytest.mark.parametrize("ending", [".gpkg", ".geojson", ".shp"])
def test_holes_are_respected_in_any_crs(scene, tmp_path, to, ending):
    if (to, ending) != ("EPSG:4326", ".geojson") and ending != ".gpkg":
        to = "EPSG:4326"
    ring = shapely.box(*world(20, 20, 480, 380))
    hole = shapely.box(*world(230, 180, 270, 220))
    path = write_polygons(tmp_path / f"aoi{ending}", [ring - hole], to=to)
    result = detect_scene(scene, model=BlobBackend(), aoi=path)
    assert found_ships(result) == [0, 2, 3, 4]
    assert result.attrs["summary"]["parameters"]["aoi"] == str(path)


def test_several_polygons_and_bounds_meet(scene, tmp_path):
    path = write_polygons(
        tmp_path / "aoi.gpkg",
        [shapely.box(*world(30, 30, 90, 70)), shapely.box(*world(350, 250, 450, 350)), shapely.Polygon()],
    )
    assert found_ships(detect_scene(scene, model=BlobBackend(), aoi=path)) == [0, 3]
    assert found_ships(detect_scene(scene, model=BlobBackend(), aoi=path, bounds=world(0, 0, 200, 200))) == [0]
    with pytest.raises(ConfigError, match="nothing in common"):
        detect_scene(scene, model=BlobBackend(), aoi=path, bounds=world(200, 0, 300, 100))


def test_crossing_polygons_are_repaired_with_one_warning(scene, tmp_path):
    left, top, right, bottom = 40, 30, 420, 320
    corners = to_world(TRANSFORM, [(left, top), (right, bottom), (right, top), (left, bottom)])
    path = write_polygons(tmp_path / "bow.gpkg", [shapely.Polygon(corners), shapely.box(*world(390, 310, 410, 330))])
    with pytest.warns(GeometryWarning, match=r"bow\.gpkg': 1 of 2 polygons are not valid") as caught:
        result = detect_scene(scene, model=BlobBackend(), aoi=path)
    assert len(caught) == 1
    # the triangles left and right of the crossing at (230, 175) hold the 1st, 4th; the 2nd, 3rd, 5th are off
    assert found_ships(result) == [
        i for i, at in enumerate(to_world(TRANSFORM, SHIPS[:, :2])) if shapely.intersects_xy(bow_of(corners), *at)
    ]
    assert 0 < len(result) < 5


def bow_of(corners: np.ndarray) -> shapely.MultiPolygon:
    """Return the two triangles of a bow by hand: its strings cross in the middle of the rectangle around it."""
    middle = np.mean(corners, axis=0)
    a, b, c, d = corners
    return shapely.MultiPolygon([shapely.Polygon([a, middle, d]), shapely.Polygon([b, c, middle])])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), epsg=st.sampled_from([4326, 3035, 3857]), turn=st.floats(-180, 180))
def test_points_are_inside_where_the_polygon_says_so_in_its_own_crs(seed, epsg, turn):
    """Edges straight in degrees are curves in a scene of 100 km at 66 degrees north, turned at will."""
    generator = np.random.default_rng(seed)
    cos, sin = 100 * np.cos(np.radians(turn)), 100 * np.sin(np.radians(turn))
    transform = Affine(cos, sin, 500_000, sin, -cos, 7_300_000)
    source = PlainScene(1000, 1000, "EPSG:32633", transform)
    corners = generator.uniform(-100, 1100, (3, 2))
    to_own = pyproj.Transformer.from_crs("EPSG:32633", f"EPSG:{epsg}", always_xy=True)
    polygon = shapely.Polygon(np.stack(to_own.transform(*to_world(transform, corners).T), axis=1))
    with tempfile.TemporaryDirectory() as folder:
        aoi = write_polygons(Path(folder) / "aoi.gpkg", [polygon], crs=f"EPSG:{epsg}")
        try:
            area = find_area(source, aoi=aoi)
        except ConfigError:
            area = Area(shapely.MultiPolygon())
    points = generator.uniform(0, 1000, (2000, 2))
    own = np.stack(to_own.transform(*to_world(transform, points).T), axis=1)
    inside = shapely.contains_xy(polygon, own)
    wrong = points[area.holds(points) != inside]
    assert (shapely.distance(area.shape.boundary, shapely.points(wrong)) < 0.05).all()


class PlainScene:
    """The place of a scene, without pixels."""

    scale_x, scale_y, path = 1.0, 1.0, "plain.tif"

    def __init__(self, width: int, height: int, crs: str | None, transform: Affine) -> None:
        """Take the place."""
        self.width = self.source_width = width
        self.height = self.source_height = height
        self.crs = rasterio.crs.CRS.from_string(crs) if crs else None
        self.transform = transform


def test_across_the_antimeridian(tmp_path):
    to_utm = pyproj.Transformer.from_crs("EPSG:4326", "EPSG:32660", always_xy=True)
    x, y = to_utm.transform(180.0, 10.0)
    utm = PlainScene(1000, 1000, "EPSG:32660", Affine(100, 0, x - 50_000, 0, -100, y + 50_000))
    degrees = PlainScene(1000, 1000, "EPSG:4326", Affine(0.001, 0, 179.5, 0, -0.001, 10.5))
    beyond = PlainScene(1000, 1000, "EPSG:4326", Affine(0.001, 0, -180.5, 0, -0.001, 10.5))
    pieces = [shapely.box(179.9, 9.9, 180, 10.1), shapely.box(-180, 9.9, -179.9, 10.1)]
    aoi = write_polygons(tmp_path / "torn.gpkg", pieces, crs="EPSG:4326")
    for scene in (utm, degrees, beyond):
        box = find_area(scene, bounds=(179.9, 9.9, -179.9, 10.1), geographic=True)
        torn = find_area(scene, aoi=aoi)
        assert shapely.symmetric_difference(box.shape, torn.shape).area < 0.05
        ground = box.shape.area / 1000**2
        assert ground == pytest.approx(0.2 * 0.2 if scene is not utm else 21.93 * 22.12 / 1e4, rel=2e-3)
    np.testing.assert_allclose(find_area(degrees, aoi=aoi).shape.bounds, (400, 400, 600, 600), atol=1e-6)


def test_an_area_larger_than_the_projection_is_cut_to_the_scene():
    scene = PlainScene(500, 400, "EPSG:32630", TRANSFORM)
    area = find_area(scene, bounds=(-180, -90, 180, 90), geographic=True)
    assert area.shape.area == pytest.approx(200_000)
    assert find_area(scene) is None


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "options,words",
    [
        ({"bounds": (0, 0, 10, 10)}, r"0 0 10 10 lies outside.*500000 4496000 505000 4500000 .*UTM zone 30N"),
        ({"bounds": (-8, 33, -7, 34), "geographic": True}, r"spans -8 33 -7 34, .*-2\.9\S* 40\.6\S* .*WGS 84"),
        ({"bounds": (10, 0, 5, 10)}, "west must be below east"),
        ({"bounds": (5, 0, 10, float("nan"))}, "four numbers"),
        ({"bounds": (5, 0, 10)}, "four numbers"),
        ({"geographic": True}, "give bounds"),
        ({"min_length_m": -1}, "min_length_m"),
        ({"max_length_m": float("nan")}, "max_length_m"),
        ({"min_length_m": 9, "max_length_m": 8}, "must not exceed"),
        ({"score_threshold": {"ship": 1.5}}, "1.5 of class 'ship'"),
    ],
)
def test_bad_values_end_before_any_tile(scene, options, words):
    engine = BlobBackend()
    with pytest.raises(ConfigError, match=words):
        detect_scene(scene, model=engine, **options)
    assert engine.num_images == 0


def test_bad_files_end_before_any_tile(scene, tmp_path):
    point = write_polygons(tmp_path / "point.gpkg", [shapely.Point(500_100, 4_499_900)])
    lost = write_polygons(tmp_path / "lost.gpkg", [shapely.box(*world(0, 0, 9, 9))], crs=None)
    far = write_polygons(tmp_path / "far.geojson", [shapely.box(10, 50, 11, 51)], crs="EPSG:4326")
    (tmp_path / "empty.geojson").write_text('{"type": "FeatureCollection", "features": []}')
    (tmp_path / "broken.gpkg").write_text("no")
    for path, error, words in (
        (point, AnnotationError, "holds Point; give polygons"),
        (lost, AnnotationError, "has no CRS; assign"),
        (far, ConfigError, r"far\.geojson' lies outside.*10 50 11 51, .*-2\.9.*WGS 84"),
        (tmp_path / "empty.geojson", AnnotationError, "no geometries"),
        (tmp_path / "broken.gpkg", AnnotationError, "cannot be read"),
        (tmp_path / "none.gpkg", AnnotationError, "does not exist"),
    ):
        with pytest.raises(error, match=words):
            detect_scene(scene, model=BlobBackend(), aoi=path)


def test_scenes_without_crs_are_in_pixels(tmp_path):
    path = write_scene(tmp_path / "plain.tif", draw_ships(500, 400), crs=None)
    with pytest.warns(NotGeoreferencedWarning):
        result = detect_scene(path, model=BlobBackend(), bounds=(0, 100, 100, 0))  # left, bottom, right, top
    ((x, y),) = shapely.get_coordinates(result.geometry.centroid)
    assert (x, y) == pytest.approx((60, 50), abs=1)
    aoi = write_polygons(tmp_path / "aoi.gpkg", [shapely.box(0, 0, 100, 100)])
    for error, words, options in (
        (ConfigError, "no CRS that leads to metres", {"min_length_m": 5}),
        (ConfigError, "cannot be geographic", {"bounds": (0, 0, 1, 1), "geographic": True}),
        (AnnotationError, "without CRS", {"aoi": aoi}),
    ):
        with pytest.warns(NotGeoreferencedWarning), pytest.raises(error, match=words):
            detect_scene(path, model=BlobBackend(), **options)


# ---------------------------------------------------------------- scores and lengths


class ScoredEngine(BlobBackend):
    """Gives every blob to two classes, with scores .6 and .4."""

    def __init__(self) -> None:
        """Know ships and buoys."""
        super().__init__(make_spec(classes=("ship", "buoy")), labels=(0, 1))
        self.asked: float | None = None

    def run(self, batches, *, score_threshold, multi_label=False):
        """See the protocol."""
        self.asked = score_threshold
        for found in super().run(batches, score_threshold=score_threshold):
            scored = [
                Detections(each.boxes, np.where(each.labels == 0, 0.6, 0.4).astype(np.float32), each.labels)
                for each in found
            ]
            yield [each.select(each.scores >= score_threshold) for each in scored]


@pytest.mark.parametrize(
    "threshold,classes,numbers,asked",
    [
        (0.5, None, (5, 0), 0.5),
        ({"ship": 0.7}, None, (0, 5), 0.3),  # buoys have the model's own, .3
        ({"ship": 0.7, "*": 0.5}, None, (0, 0), 0.5),
        ({"*": 0.5}, None, (5, 0), 0.5),
        ({"ship": 0.6, "buoy": 0.4}, None, (5, 5), 0.4),  # 0.4 is no float32: compared as engines do
        ({"ship": 0.1, "buoy": 0.41}, None, (5, 0), 0.1),
        ({"ship": 0.1, "buoy": 0.4}, ["buoy"], (0, 5), 0.4),
    ],
)
def test_scores_by_class(scene, threshold, classes, numbers, asked):
    engine = ScoredEngine()
    summary = detect_scene(scene, model=engine, score_threshold=threshold, classes=classes).attrs["summary"]
    assert tuple(summary["num_by_class"].values()) == numbers and engine.asked == asked
    recorded = summary["parameters"]["score_threshold"]
    if isinstance(threshold, float) or set(threshold) == {"*"}:
        assert recorded == 0.5
    else:
        assert recorded == {name: threshold.get(name, threshold.get("*", 0.3)) for name in classes or ("ship", "buoy")}


def test_scores_of_unknown_classes_are_refused(scene):
    with pytest.raises(UnknownClassError, match="'boat'"):
        detect_scene(scene, model=BlobBackend(), score_threshold={"boat": 0.5})


def test_lengths_are_metres_on_the_ground(scene, tmp_path):
    whole = detect_scene(scene, model=BlobBackend())
    lengths = np.sort(whole["length_m"])  # of 30, 36, 40, 44, 50 px of 10 m
    result = detect_scene(
        scene,
        tmp_path / "some.gpkg",
        model=BlobBackend(),
        min_length_m=lengths[1],
        max_length_m=lengths[3],
        preview=tmp_path / "some.png",
    )
    np.testing.assert_array_equal(np.sort(result["length_m"]), lengths[1:4])  # ends included
    assert found_ships(result) == [0, 2, 4] and sorted(result["id"]) == [1, 2, 3]
    assert (
        len(geopandas.read_file(tmp_path / "some.gpkg", layer="detections"))
        == result.attrs["summary"]["num_detections"]
        == 3
    )
    assert list(result.columns) == list(whole.columns) and (result.dtypes == whole.dtypes).all()
    # the same pixels in Web Mercator at 40.6 degrees north are shorter on the ground, by the cosine of the latitude
    with rasterio.open(scene) as source:
        pixels = source.read()
    north = pyproj.Transformer.from_crs("EPSG:4326", "EPSG:3857", always_xy=True).transform(-3, 60)[1]
    mercator = write_raster(
        tmp_path / "m.tif",
        pixels,
        crs="EPSG:3857",
        transform=Affine(10, 0, -300_000, 0, -10, north),
        colours=("red", "green", "blue"),
    )
    assert found_count(mercator, min_length_m=260) == 0  # 50 px are 250 m there
    assert found_count(mercator, min_length_m=240) == 1
    assert found_count(mercator, max_length_m=1) == 0


def found_count(path: Path, **options: float) -> int:
    """Return how many ships are found."""
    return len(detect_scene(path, model=BlobBackend(), **options))


# ---------------------------------------------------------------- a real scene, and the command


def test_real_scene():
    """The ships of a quarter, given in three ways, are those of the whole scene whose centres lie there."""
    with rasterio.open(CASABLANCA) as source:
        left, bottom, right, top = source.bounds
    quarter = (left, bottom, (left + right) / 2, (bottom + top) / 2 + 200)
    whole = detect_scene(CASABLANCA, threads=1)
    part = detect_scene(CASABLANCA, threads=1, bounds=quarter)
    expected = whole[whole.geometry.centroid.within(shapely.box(*quarter))]
    assert 0 < len(expected) < len(whole)
    assert part.attrs["summary"]["num_tiles"] <= whole.attrs["summary"]["num_tiles"]
    assert part.geometry.geom_equals(expected.geometry.reset_index(drop=True)).all()
    to_degrees = pyproj.Transformer.from_crs("EPSG:3857", "EPSG:4326", always_xy=True)
    west, south, east, north = to_degrees.transform_bounds(*quarter)
    with open_scene(CASABLANCA, model_gsd_m=5.0) as opened:
        metres = find_area(opened, bounds=quarter)
        degrees = find_area(opened, bounds=(west, south, east, north), geographic=True)
        assert shapely.symmetric_difference(metres.shape, degrees.shape).area < 0.01
        np.testing.assert_allclose(metres.shape.bounds[0::3], (0, opened.height), atol=1e-6)
        assert metres.shape.bounds[2] == pytest.approx(opened.width / 2)


def run(*words: object):
    """Run the real group in this process."""
    return CliRunner().invoke(cli, [str(word) for word in words], prog_name="rtmdet-geo")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> ScoredEngine:
    """Put an engine of two classes in the place of every model."""
    engine = ScoredEngine()
    monkeypatch.setattr(pipeline, "open_backend", lambda path, **options: engine)
    monkeypatch.setattr(pipeline, "find_model", lambda model: Path(__file__))
    return engine


def test_command(command, scene, tmp_path):
    west, south, east, north = world(0, 0, 300, 250)
    result = run(
        *("detect", scene, "--json", "--bounds", f"[{west}, {south}, {east}, {north}]"),
        *("--score", "0.5", "--score", "buoy=0.35", "--min-length", 420, "--max-length", 1000),
    )
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert summary["num_by_class"] == {"ship": 2, "buoy": 2}  # 44 and 50 px; 40 px are too short
    parameters = summary["parameters"]
    assert parameters["bounds"] == [west, south, east, north] and parameters["geographic"] is False
    assert parameters["score_threshold"] == {"ship": 0.5, "buoy": 0.35}
    assert (parameters["min_length_m"], parameters["max_length_m"], parameters["aoi"]) == (420, 1000, None)
    aoi = write_polygons(tmp_path / "aoi.gpkg", [shapely.box(*world(30, 30, 90, 70))])
    result = run("detect", scene, "--json", "--aoi", aoi, "--bounds", "-3.1 40 -2.9 41", "--geographic")
    assert json.loads(result.stdout)["num_detections"] == 2


@pytest.mark.parametrize(
    "words",
    [
        ("--bounds", "1,2,3"),
        ("--bounds", "a,b,c,d"),
        ("--score", "ship"),
        ("--score", "1.5"),
        ("--score", "ship=-1"),
        ("--score", "nan"),
        ("--score", "0.3", "--score", "0.4"),
        ("--score", "ship=0.3", "--score", "ship=0.4"),
        ("--min-length", "-1"),
    ],
)
def test_usage_errors(command, scene, words):
    result = run("detect", scene, "--json", *words)
    assert result.exit_code == 2 and words[0] in result.stderr


def test_outside_is_one_line(command, scene):
    result = run("detect", scene, "--json", "--bounds", "0,0,1,1")
    assert result.exit_code == 1 and "lies outside the scene" in result.stderr
    assert len(result.stderr.splitlines()) == 1
