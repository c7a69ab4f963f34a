"""What evaluate layers says of layers that are not what somebody thinks."""

from __future__ import annotations

import logging

import geopandas
import pytest
import shapely
from click.testing import CliRunner

from rtmdet_geo.cli import cli
from rtmdet_geo.errors import AnnotationError
from rtmdet_geo.evaluation.gis import evaluate_layers

HERE = "EPSG:32630"


def squares(*places, size=100.0, crs=HERE, **columns):
    """Squares of so many metres whose lower left corners are x, y."""
    shapes = [shapely.box(x, y, x + size, y + size) for x, y in places]
    return geopandas.GeoDataFrame(columns, geometry=shapes, crs=crs)


@pytest.fixture(autouse=True)
def logged(caplog):
    caplog.set_level(logging.WARNING)
    return caplog


TWO = ((500_000, 0), (501_000, 0))


def test_an_area_elsewhere_is_told(logged):
    found, truth = squares(*TWO, score=[0.9, 0.8]), squares(*TWO)
    report = evaluate_layers(found, truth, aoi=squares((500_000, 90_000)))
    assert report.figures["hits"] == 0
    assert "none of the 2 predictions and 2 labels lies in the area of interest, longitude -3.0000" in logged.text
    logged.clear()
    assert evaluate_layers(found, truth, aoi=squares((499_900, -100), size=500)).figures["hits"] == 1
    assert logged.text == ""


def test_features_of_several_parts_are_told(logged):
    truth = squares(*TWO)
    whole = truth.dissolve()
    assert evaluate_layers(squares(*TWO, score=[0.9, 0.8]), whole).figures["missed"] == 1
    assert "labelled layer: 1 feature has 2 parts: each feature counts as one object" in logged.text
    logged.clear()
    assert evaluate_layers(squares(*TWO, score=[0.9, 0.8]), whole.explode()).figures["hits"] == 2
    assert logged.text == ""


def test_copies_of_labels_are_told(logged):
    found = squares(*TWO, score=[0.9, 0.8], class_name=["ship", "ship"])
    labels = squares(*TWO, TWO[0], class_name=["ship", "ship", "ship"])
    labels.geometry = [*labels.geometry[:2], labels.geometry[2].reverse()]  # drawn the other way round
    assert evaluate_layers(found, labels).figures["missed"] == 1
    assert "labelled layer: 1 object is an exact copy of another" in logged.text
    logged.clear()
    labels.class_name = ["ship", "ship", "buoy"]
    evaluate_layers(found, labels)
    assert "copy" not in logged.text


def test_labels_without_classes_are_told(logged):
    found = squares(*TWO, score=[0.9, 0.8], class_name=["ship", "ship"])
    assert evaluate_layers(found, squares(*TWO)).figures["hits"] == 2
    (record,) = logged.records
    assert record.getMessage().startswith("places are compared, not classes: predicted layer has 1, but the labelled")
    logged.clear()
    evaluate_layers(found, squares(*TWO), any_class=True)
    assert logged.text == ""


def test_a_least_score_needs_scores():
    found = squares(*TWO, certainty=[0.9, 0.1])
    with pytest.raises(AnnotationError, match=r"no column .score., which --score asks for.*its columns: certainty"):
        evaluate_layers(found, squares(*TWO), score=0.5)
    assert evaluate_layers(found, squares(*TWO), score=0.5, score_column="certainty").figures["hits"] == 1


def test_options_are_named(tmp_path):
    """Errors that an option mends name it."""
    for name in ("a", "b"):
        squares(*TWO).to_file(tmp_path / "two.gpkg", layer=name)
    one = tmp_path / "one.geojson"
    squares(*TWO, crs=HERE).to_crs("EPSG:4326").to_file(one)
    points = geopandas.GeoDataFrame(geometry=squares(*TWO).centroid).to_crs("EPSG:4326")
    points.to_file(tmp_path / "points.geojson")
    for words, option in (
        ((tmp_path / "two.gpkg", one), "--predicted-layer"),
        ((one, tmp_path / "two.gpkg"), "--labelled-layer"),
        ((one, one, "--aoi", tmp_path / "two.gpkg"), "give a file with one layer"),
        ((one, tmp_path / "points.geojson"), "--distance-m 20"),
    ):
        result = CliRunner().invoke(cli, ["evaluate", "layers", *map(str, words)])
        assert result.exit_code == 1 and option in result.stderr.splitlines()[-1], result.stderr
