"""Layers against layers: hand-worked ones, any CRS, a slow reference, and what an analyst may get wrong."""

from __future__ import annotations

import csv
import json
import logging
import math
from pathlib import Path

import geopandas
import numpy as np
import pyogrio
import pyproj
import pytest
import shapely
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from rtmdet_geo.boxes import boxes_to_polygons
from rtmdet_geo.cli import cli
from rtmdet_geo.errors import (
    AnnotationError,
    ConfigError,
    DatasetNotFoundError,
    OutputError,
    UnknownClassError,
)
from rtmdet_geo.evaluation.gis import evaluate_layers
from rtmdet_geo.evaluation.rotated import Truth, precision_recall
from rtmdet_geo.structures import Detections

SHIPS = Path(__file__).parent / "data" / "casablanca_ships.geojson"
GEOD = pyproj.Geod(ellps="WGS84")
NORTH = (10.0, 60.0)


def rectangle(place, azimuth=0.0, length=100.0, width=100.0, *, east=0.0, north=0.0):
    """A rectangle laid out with geodesics, its centre so many metres east and north of a place; degrees."""
    if east or north:
        place = GEOD.fwd(*place, math.degrees(math.atan2(east, north)), math.hypot(east, north))[:2]
    corners = []
    for along, across in ((1, 1), (1, -1), (-1, -1), (-1, 1)):
        x, y = across * width / 2, along * length / 2
        corners.append(GEOD.fwd(*place, azimuth + math.degrees(math.atan2(x, y)), math.hypot(x, y))[:2])
    points = np.array(corners)
    points[:, 0] -= 360 * np.round((points[:, 0] - points[0, 0]) / 360)
    return shapely.Polygon(points)


def layer(shapes, names=None, scores=None, crs="EPSG:4326"):
    columns = {"class_name": names if names is not None else ["ship"] * len(shapes)}
    if scores is not None:
        columns["score"] = scores
    return geopandas.GeoDataFrame(columns, geometry=geopandas.GeoSeries(shapes, crs="EPSG:4326")).to_crs(crs)


def check_same(one, other, places=1e-6):
    assert one.figures.keys() == other.figures.keys()
    for name, value in one.figures.items():
        assert other.figures[name] == pytest.approx(value, abs=places, rel=places, nan_ok=True), name


CRSS = ["EPSG:4326", "EPSG:3857", "EPSG:32632", "EPSG:32633", "EPSG:3035", "EPSG:3413"]


@pytest.mark.parametrize(("crs", "other"), [*zip(CRSS, CRSS[1:] + CRSS[:1], strict=True)])
def test_two_squares_half_over_each_other_at_60_degrees_north(crs, other):
    """100 m squares 50 m apart share a third; in EPSG:3857 they measure 200 m."""
    found, truth = layer([rectangle(NORTH)], scores=[0.9], crs=crs), layer([rectangle(NORTH, east=50)], crs=other)
    report = evaluate_layers(found, truth, iou=0.3333)
    assert report.figures["AP33.33"] == 1
    assert report.figures["error_m"] == pytest.approx(50, abs=1e-4)
    assert report.figures["length_error_m"] < 1e-2
    assert math.isnan(report.figures["azimuth_error_deg"])  # a square has no direction
    assert evaluate_layers(found, truth, iou=0.3334).figures["AP33.34"] == 0
    assert evaluate_layers(found, truth, match="distance", distance_m=50.001).figures["AP 50.001 m"] == 1
    assert evaluate_layers(found, truth, match="distance", distance_m=49.999).figures["AP 49.999 m"] == 0


@pytest.mark.parametrize("place", [NORTH, (180.0, -17.0), (-179.9999, 0.0), (25.0, 89.99), (0.0, -80.0)])
def test_direction_and_sides_are_compared_on_the_ground(place):
    """Long axes at 175 and 5 degrees are 10 degrees apart."""
    found = layer([rectangle(place, 175, 120, 22)], scores=[0.5])
    truth = layer([rectangle(place, 5, 100, 20)])
    figures = evaluate_layers(found, truth, iou=0.3).figures
    assert figures["hits"] == 1
    assert figures["azimuth_error_deg"] == pytest.approx(10, abs=1e-3)
    assert figures["length_bias_m"] == pytest.approx(20, abs=1e-3)
    assert figures["width_bias_m"] == pytest.approx(2, abs=1e-3)
    assert figures["error_m"] == pytest.approx(0, abs=1e-3)


def test_layers_meet_across_the_antimeridian():
    """The same square, its longitudes once beyond 180 degrees and once below -180."""
    square = rectangle((180.0, 10.0))
    turned = shapely.transform(square, lambda points: points - [360, 0])
    parts = shapely.transform(square, lambda points: np.where(points > 180, points - [360, 0], points))
    for other in (turned, parts, rectangle((-180.0, 10.0), east=0.01)):
        assert evaluate_layers(layer([square], scores=[1]), layer([other]), iou=0.99).figures["AP99"] == 1


def three_ships():
    """Three labelled ships; predictions: a hit, a false alarm, the second of the same ship, a hit."""
    truth = [rectangle(NORTH, 30, 100, 20, east=500 * index) for index in range(3)]
    found = [truth[0], rectangle(NORTH, 30, 100, 20, north=900), truth[0], truth[1]]
    return layer(found, scores=[0.9, 0.8, 0.75, 0.7]), layer(truth)


def test_figures_worked_out_by_hand():
    found, truth = three_ships()
    report = evaluate_layers(found, truth)
    figures = report.figures
    # precision 1, 1/2, 1/3, 1/2 at recall 1/3, 1/3, 1/3, 2/3
    assert figures["AP50"] == pytest.approx(1 / 3 + 1 / 3 * 1 / 2)
    assert (figures["hits"], figures["false_alarms"], figures["missed"]) == (2, 2, 1)
    assert figures["precision"] == 0.5 and figures["recall"] == pytest.approx(2 / 3)
    assert figures["f1"] == pytest.approx(4 / 7) and figures["best_f1"] == pytest.approx(4 / 7)
    assert figures["best_score"] == 0.7
    assert evaluate_layers(found, truth, score=0.8).figures["f1"] == pytest.approx(2 / 5)
    assert report.confusion.matrix.tolist() == [[2, 1], [2, 0]]
    assert sorted(report.hit_scores) == [0.7, 0.9] and sorted(report.miss_scores) == [0.75, 0.8]


def test_order_of_features_does_not_matter_even_without_scores():
    found, truth = three_ships()
    without = found.drop(columns="score")
    first = evaluate_layers(without, truth)
    assert first.figures["AP50"] == pytest.approx(2 / 3 * 1 / 2)  # one point: precision 1/2 at recall 2/3
    for order in ([3, 2, 1, 0], [1, 0, 3, 2]):
        check_same(first, evaluate_layers(without.iloc[order], truth.iloc[[2, 0, 1]]))


def scatter(seed, number=30, crs="EPSG:32632", lat=60.0):
    """Labels and shaken copies of them, in metres of a UTM zone; three classes; scores with ties."""
    rng = np.random.default_rng(seed)
    boxes = np.column_stack(
        [
            rng.uniform(0, 400, (number, 2)),
            rng.uniform(20, 60, number),
            rng.uniform(8, 18, number),
            rng.uniform(0, 3, number),
        ]
    )
    shaken = boxes[rng.integers(0, number, number)] + rng.normal(size=(number, 5)) * [4, 4, 3, 1, 0.1]
    names = np.array(["plane", "ship", "tank"])
    origin = pyproj.Transformer.from_crs(4326, 32632, always_xy=True).transform(9.0, lat)
    labels, found = rng.integers(0, 3, number), rng.integers(0, 3, number)
    scores = rng.integers(0, 20, number) / 20
    layers = [
        geopandas.GeoDataFrame(
            {"class_name": names[which], "score": scores},
            geometry=shapely.polygons(boxes_to_polygons(b) + origin),
            crs=32632,
        )
        for which, b in ((found, shaken), (labels, boxes))
    ]
    return layers, (boxes, labels), (shaken, found, scores)


@given(st.integers(0, 10_000), st.sampled_from(CRSS), st.sampled_from(CRSS), st.sampled_from(["iou", "distance"]))
@settings(max_examples=10, deadline=None)
def test_neither_crs_has_a_say(seed, crs, other, match):
    (found, truth), _, _ = scatter(seed)
    rule = {"match": match, "iou": 0.3, "distance_m": 15 if match == "distance" else None}
    check_same(
        evaluate_layers(found, truth, **rule), evaluate_layers(found.to_crs(crs), truth.to_crs(other), **rule), 1e-3
    )


@pytest.mark.parametrize("seed", range(6))
def test_equals_the_matcher_of_images(seed):
    """On the central meridian at the equator a UTM zone is a picture of the ground, but for its scale."""
    (found, truth), (boxes, labels), (shaken, taken, _) = scatter(seed, lat=0.0)
    found["score"] = np.random.default_rng(seed).permutation(len(found)) / 64  # exact in float32, no ties
    detections = Detections(shaken, found["score"].to_numpy(np.float32), taken, frame="scene")
    truths = [Truth(boxes, labels, np.zeros(len(boxes), bool))]
    report = evaluate_layers(found, truth, iou=0.4)
    curves = [precision_recall([detections], truths, label=label, iou_threshold=0.4) for label in range(3)]
    for name, curve in zip(["plane", "ship", "tank"], curves, strict=True):
        assert report.curves[name].average_precision == pytest.approx(curve.average_precision, abs=1e-12)
        np.testing.assert_allclose(report.curves[name].precision, curve.precision)
    assert report.figures["AP40"] == pytest.approx(np.mean([curve.average_precision for curve in curves]))
    assert 0 < report.figures["AP40"] < 1


@pytest.mark.parametrize("change", ["moved", "renamed", "turned"])
def test_what_is_wrong_scores_nothing(change):
    truth = layer([rectangle(NORTH, 30, 100, 20, east=500 * index) for index in range(3)], ["ship", "ship", "tank"])
    found = truth.assign(score=0.9)
    assert evaluate_layers(found, truth).figures["AP50"] == 1
    if change == "moved":
        found.geometry = found.to_crs(32632).translate(21).to_crs(4326)
    elif change == "renamed":
        found["class_name"] = ["tank", "tank", "ship"]
    else:
        found.geometry = [rectangle(NORTH, 120, 100, 20, east=500 * index) for index in range(3)]
    assert evaluate_layers(found, truth).figures["AP50"] == 0


def test_outlines_and_rectangles_differ_by_the_corners():
    """A ship's outline with a pointed bow fills 3/4 of its rectangle."""
    box = rectangle(NORTH, 0, 100, 20)
    west, south, east, north = box.bounds
    middle = (south + north) / 2
    outline = shapely.Polygon(
        [(west, south), (east, south), (east, middle), ((west + east) / 2, north), (west, middle)]
    )
    found, truth = layer([box], scores=[1]), layer([outline])
    assert evaluate_layers(found, truth, iou=0.99).figures["AP99"] == 1  # four corners: rectangles
    assert evaluate_layers(found, truth, iou=0.99, shape="outline").figures["AP99"] == 0
    assert evaluate_layers(found, truth, iou=0.749, shape="outline").figures["AP74.9"] == 1
    assert evaluate_layers(found, truth, iou=0.751, shape="outline").figures["AP75.1"] == 0
    assert evaluate_layers(truth.assign(score=1), truth, iou=0.99).protocol.startswith("layers, IoU of outlines")
    hollow = shapely.difference(box, shapely.affinity.scale(box, 0.5, 0.5))
    assert evaluate_layers(layer([hollow], scores=[1]), layer([box]), iou=0.751).figures["AP75.1"] == 0
    assert evaluate_layers(layer([hollow], scores=[1]), layer([box]), iou=0.749).figures["AP74.9"] == 1


def test_points_match_by_distance():
    found, truth = three_ships()
    points = found.set_geometry(found.to_crs(32632).centroid.to_crs(4326))
    report = evaluate_layers(points, truth, match="distance", distance_m=10)
    assert report.figures["hits"] == 2 and report.figures["error_m"] < 0.01
    assert math.isnan(report.figures["length_error_m"])
    with pytest.raises(AnnotationError, match="predicted layer holds points"):
        evaluate_layers(points, truth)


def test_area_of_interest():
    """Of four ships the first is out with its prediction, a label alone is out, a prediction alone is out."""
    truth = [rectangle(NORTH, 90, 100, 20, east=east) for east in (0, 1000, 2020, 3000)]
    found = [rectangle(NORTH, 90, 100, 20, east=east) for east in (0, 995, 1990, 3000, -500)]
    area = geopandas.GeoDataFrame(geometry=[rectangle(NORTH, 0, 400, 1008, east=1501)], crs=4326).to_crs(3035)
    inside = evaluate_layers(layer(found, scores=[0.5] * 5), layer(truth), aoi=area)
    assert [inside.figures[name] for name in ("hits", "false_alarms", "missed")] == [1, 0, 0]
    whole = evaluate_layers(layer(found, scores=[0.5] * 5), layer(truth))
    assert [whole.figures[name] for name in ("hits", "false_alarms", "missed")] == [4, 1, 0]


def test_bands_of_length():
    truth = layer([rectangle(NORTH, 0, length, 20, east=500 * index) for index, length in enumerate((40, 80, 90, 200))])
    found = layer(
        [rectangle(NORTH, 0, 45, 20), rectangle(NORTH, 0, 80, 20, east=500), rectangle(NORTH, 0, 300, 20, north=900)],
        scores=[0.9, 0.8, 0.7],
    )
    rows = evaluate_layers(found, truth, length_bands_m=(50, 100)).rows[1:]
    assert [row["length_m"] for row in rows] == ["0-50", "50-100", "100 and more"]
    assert [(row["num_objects"], row["num_predictions"]) for row in rows] == [(1, 1), (2, 1), (1, 1)]
    assert [row["recall"] for row in rows] == [1, 0.5, 0]
    assert [row["precision"] for row in rows] == [1, 1, 0]


def test_matched_layer_says_what_became_of_each(tmp_path):
    found, truth = three_ships()
    found.loc[3, "class_name"] = "tank"
    path = tmp_path / "matched.gpkg"
    evaluate_layers(found.to_crs(32632), truth.to_crs(32632), output=path)
    rows = geopandas.read_file(path)
    assert rows.crs == "EPSG:32632"
    assert rows["outcome"].tolist() == ["hit", "false alarm", "false alarm", "false alarm", "missed", "missed"]
    assert rows["source_row"].tolist() == [1, 2, 3, 4, 2, 3]
    assert rows["labelled_class"].isna().tolist() == [False, True, False, False, False, False]
    assert rows["labelled_class"][3] == "ship" and rows["class_name"][3] == "tank"
    np.testing.assert_allclose(rows["iou"][:1], 1, atol=1e-6)
    np.testing.assert_allclose(rows["distance_m"][:1], 0, atol=1e-6)
    assert rows["score"].isna().tolist() == [False] * 4 + [True] * 2
    assert (
        rows.geometry[5].equals_exact(truth.to_crs(32632).geometry[2].normalize(), 1e-6)
        or rows.geometry[5].symmetric_difference(truth.to_crs(32632).geometry[2]).area < 1e-6
    )
    metadata = pyogrio.read_info(path, layer="matched")["layer_metadata"]
    assert metadata["protocol"].startswith("layers, IoU of smallest rectangles at least 0.5")
    with pytest.raises(OutputError, match="--overwrite"):
        evaluate_layers(found, truth, output=path)
    points = found.set_geometry(found.to_crs(32632).centroid, crs=32632)
    evaluate_layers(points, truth, match="distance", distance_m=5, output=path, overwrite=True)
    mixed = geopandas.read_file(path)
    assert set(mixed.geom_type) == {"Point", "Polygon"} and mixed.crs == "EPSG:4326"


@pytest.mark.parametrize("ending", ["gpkg", "geojson", "fgb", "shp", "parquet"])
def test_every_format_gives_the_same(tmp_path, ending):
    found, truth = three_ships()
    paths = [tmp_path / f"{name}.{ending}" for name in ("found", "truth")]
    for frame, path in zip((found, truth), paths, strict=True):
        frame.to_parquet(path) if ending == "parquet" else frame.to_file(path)
    column = {"class_column": "class_name"}
    check_same(evaluate_layers(found, truth, **column), evaluate_layers(*paths, **column), 1e-9)


@pytest.mark.parametrize("ending", ["gpkg", "geojson"])
def test_empty_layers(tmp_path, ending):
    found, truth = three_ships()
    path = tmp_path / f"empty.{ending}"
    found[:0].to_file(path)
    nothing = evaluate_layers(path, truth, output=tmp_path / "m.gpkg")
    assert nothing.figures["AP50"] == 0 and nothing.figures["missed"] == 3 and math.isnan(nothing.figures["precision"])
    assert geopandas.read_file(tmp_path / "m.gpkg")["outcome"].tolist() == ["missed"] * 3
    alarms = evaluate_layers(found, path)
    assert math.isnan(alarms.figures["AP50"]) and alarms.figures["precision"] == 0
    neither = evaluate_layers(path, path, output=tmp_path / "n.gpkg")
    assert math.isnan(neither.figures["AP50"]) and neither.rows == ()
    assert len(geopandas.read_file(tmp_path / "n.gpkg")) == 0


def test_layers_of_other_places_are_told(caplog):
    found, truth = three_ships()
    away = layer([rectangle((-120.0, -30.0))], scores=[1])
    with caplog.at_level(logging.WARNING):
        assert evaluate_layers(away, truth).figures["hits"] == 0
    assert "no prediction is near any label" in caplog.text and "-120.0000 -30.0000" in caplog.text
    caplog.clear()
    evaluate_layers(found, truth)
    assert caplog.text == ""


def test_classes(caplog):
    found, truth = three_ships()
    with pytest.raises(AnnotationError, match="share no class: predicted boat; labelled ship"):
        evaluate_layers(found.assign(class_name="boat"), truth)
    assert evaluate_layers(found.assign(class_name="boat"), truth, any_class=True).figures["hits"] == 2
    other = truth.rename(columns={"class_name": "typ"})
    assert evaluate_layers(found, other, class_column="class_name", labelled_class_column="typ").figures["hits"] == 2
    with pytest.raises(AnnotationError, match="labelled layer has no column 'class_name'; its columns: typ"):
        evaluate_layers(found, other, class_column="class_name")
    with pytest.raises(UnknownClassError, match="no object is of class 'car'; the layers have ship"):
        evaluate_layers(found, truth, classes=["ship", "car"])
    with caplog.at_level(logging.WARNING):
        two = found.assign(class_name=["ship", "car", "ship", "ship"])
        assert evaluate_layers(two, other).figures["hits"] == 2
        assert "places are compared, not classes" in caplog.text
        assert evaluate_layers(two, truth).rows[0]["num_objects"] == 0
        assert "no object is labelled car" in caplog.text
    assert evaluate_layers(two, truth, classes=["ship"]).figures["false_alarms"] == 1


def test_wrong_layers_are_named(tmp_path):
    found, truth = three_ships()
    path = tmp_path / "nothing.gpkg"
    with pytest.raises(DatasetNotFoundError, match=r"labelled layer .*nothing.gpkg' does not exist"):
        evaluate_layers(found, path)
    path.write_text("no layer")
    with pytest.raises(AnnotationError, match=r"predicted layer .*nothing.gpkg' cannot be read"):
        evaluate_layers(path, truth)
    with pytest.raises(AnnotationError, match="labelled layer has no CRS; assign one"):
        evaluate_layers(found, truth.set_crs(None, allow_override=True))
    with pytest.raises(AnnotationError, match="3 features without longitude and latitude: is 'WGS 84' its CRS"):
        evaluate_layers(found, truth.to_crs(32632).set_crs(4326, allow_override=True))
    with pytest.raises(AnnotationError, match="holds LineString; objects must be"):
        evaluate_layers(found, truth.set_geometry(truth.boundary))
    with pytest.raises(AnnotationError, match=r"predicted layer, feature 2: no number in 'score' \(1 such"):
        evaluate_layers(found.assign(score=[0.1, np.nan, 0.2, 0.3]), truth)
    with pytest.raises(AnnotationError, match=r"labelled layer, feature 2: no value in 'class_name' \(1 such"):
        evaluate_layers(found, truth.assign(class_name=["ship", None, "ship"]))
    assert evaluate_layers(found, truth.assign(class_name=["ship", None, "ship"]), any_class=True).figures["hits"] == 2
    empty = truth.assign(class_name=["", "ship", None]).set_geometry([None, *truth.geometry[1:]], crs=truth.crs)
    with pytest.raises(AnnotationError, match="feature 3: no value"):  # counted in the layer, empty ones too
        evaluate_layers(found, empty)
    truth.to_file(path, layer="one")
    truth.to_file(path, layer="two")
    with pytest.raises(AnnotationError, match="holds the layers one, two; name one"):
        evaluate_layers(found, path)
    with pytest.raises(AnnotationError, match="has no layer 'three'"):
        evaluate_layers(found, path, labelled_layer="three")
    assert evaluate_layers(found, path, labelled_layer="two").figures["hits"] == 2


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"iou": 0.0}, "IoU threshold 0.0"),
        ({"match": "distance"}, "--distance-m"),
        ({"distance_m": 5.0}, "--match distance"),
        ({"match": "distance", "distance_m": -1.0}, "outside"),
        ({"length_bands_m": (100, 50)}, "must be positive and rise: --length-band"),
        ({"score": math.nan}, "no number"),
        ({"any_class": True, "classes": ["ship"]}, "compares places only"),
    ],
)
def test_options_out_of_range(options, text):
    found, truth = three_ships()
    with pytest.raises(ConfigError, match=text):
        evaluate_layers(found, truth, **options)


def test_labelled_ships_of_casablanca():
    """Labels fed back are perfect; moved by 10 m to the east they are 10 m off."""
    truth = geopandas.read_file(SHIPS)
    perfect = evaluate_layers(truth.to_crs(3857), SHIPS, iou=0.999).figures
    assert perfect["AP99.9"] == 1 and perfect["error_m"] < 1e-3 and perfect["azimuth_error_deg"] < 1e-3
    zone = truth.estimate_utm_crs()
    moved = truth.to_crs(zone).set_geometry(truth.to_crs(zone).translate(10))
    figures = evaluate_layers(moved, SHIPS, match="distance", distance_m=20).figures
    assert figures["hits"] == len(truth)
    assert figures["error_m"] == pytest.approx(10, abs=0.01) and figures["error_m_p90"] == pytest.approx(10, abs=0.01)


@pytest.mark.slow
def test_what_the_bundled_model_finds_in_casablanca(tmp_path):
    """Scored on the ground, the layer has the average precision that chips had in px; see the README's table."""
    from rtmdet_geo import detect_scene

    with (SHIPS.parent.parent / "benchmarks/results/sen2ships_casablanca.csv").open() as stream:
        published = {row["iou"]: row for row in csv.DictReader(stream) if row["bands"] == "red+green+blue+nir"}
    found = tmp_path / "ships.gpkg"
    detect_scene(SHIPS.parent / "casablanca.tif", found, score_threshold=0.05)
    for iou, row in published.items():
        report = evaluate_layers(found, SHIPS, iou=float(iou), output=tmp_path / "matched.gpkg", overwrite=True)
        assert next(iter(report.figures.values())) == pytest.approx(float(row["ap"]), abs=2e-4)
        assert report.figures["best_f1"] == pytest.approx(float(row["best_f1"]), abs=2e-4)
        assert report.figures["error_m"] < 15 and report.figures["azimuth_error_deg"] < 12
        counted = geopandas.read_file(tmp_path / "matched.gpkg")["outcome"].value_counts()
        assert counted["hit"] == report.figures["hits"] == report.confusion.matrix[0, 0]
        assert counted["hit"] + counted["missed"] == int(row["num_objects"])


def test_command(tmp_path):
    found, truth = three_ships()
    paths = [tmp_path / "found.gpkg", tmp_path / "truth.geojson"]
    for frame, path in zip((found.to_crs(32632), truth), paths, strict=True):
        frame.to_file(path)
    words = ["evaluate", "layers", *map(str, paths)]
    done = CliRunner().invoke(cli, [*words, "--json", "-o", str(tmp_path / "m.gpkg"), "--csv", str(tmp_path / "a.csv")])
    assert done.exit_code == 0 and json.loads(done.stdout)["figures"]["AP50"] == pytest.approx(0.5)
    assert len(geopandas.read_file(tmp_path / "m.gpkg")) == 5
    again = CliRunner().invoke(cli, [*words, "-o", str(tmp_path / "m.gpkg")])
    assert again.exit_code == 1 and "--overwrite" in again.stderr
    near = CliRunner().invoke(cli, [*words, "--distance-m", "5", "--length-band", "50", "--min-ap", "0.6"])
    assert near.exit_code == 3 and "layers, centroids at most 5 m apart" in near.stdout
    assert "50 and more" in near.stdout and "AP 5 m 0.5000 is below --min-ap 0.6" in near.stderr
    for wrong, part in (
        (["--distance-m", "5", "--match", "iou"], "--match distance"),
        (["--match", "distance"], "needs --distance-m"),
        (["--any-class", "--class", "ship"], "--any-class goes with neither"),
        (["--length-band", "9", "--length-band", "5"], "must rise"),
    ):
        done = CliRunner().invoke(cli, [*words, *wrong])
        assert done.exit_code == 2 and part in done.stderr
