"""No evaluation and no statistics writes over what it reads; wrong outputs are told from the command line alone."""

from __future__ import annotations

import json
from pathlib import Path

import geopandas
import pytest
import shapely
from click.testing import CliRunner
from PIL import Image

from rtmdet_geo.cli import cli
from rtmdet_geo.errors import OutputError
from rtmdet_geo.evaluation.gis import evaluate_layers

BOX = "10 10 50 10 50 30 10 30"


def run(*words):
    return CliRunner().invoke(cli, [*map(str, words)], prog_name="rtmdet-geo", terminal_width=100)


@pytest.fixture
def layers(tmp_path) -> Path:
    """Two layers with a ship of 100 m x 20 m in the same place."""
    ship = geopandas.GeoDataFrame(
        {"class_name": ["ship"], "score": [0.9]}, geometry=[shapely.box(0, 0, 100, 20)], crs="EPSG:32630"
    )
    ship.to_file(tmp_path / "found.gpkg")
    ship.to_crs("EPSG:4326").to_file(tmp_path / "labels.geojson")
    return tmp_path


@pytest.fixture
def dota(tmp_path) -> Path:
    """One image with one ship, labelled and found."""
    for name in ("images", "labels", "results"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (80, 80)).save(tmp_path / "images" / "P1.png")
    (tmp_path / "labels" / "P1.txt").write_text(f"{BOX} ship 0\n")
    (tmp_path / "results" / "Task1_ship.txt").write_text(f"P1 0.9 {BOX}\n")
    return tmp_path


@pytest.mark.parametrize("option", ["-o", "--csv"])
@pytest.mark.parametrize("name", ["found.gpkg", "labels.geojson"])
def test_layers_are_not_written_over(layers, option, name):
    before = (layers / name).read_bytes()
    result = run(
        "evaluate", "layers", layers / "found.gpkg", layers / "labels.geojson", option, layers / name, "--overwrite"
    )
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr == f"rtmdet-geo: error: output '{layers / name}' is the source itself; give another name\n"
    assert (layers / name).read_bytes() == before


def test_the_library_does_not_write_over_layers_either(layers):
    (layers / "link.gpkg").symlink_to(layers / "found.gpkg")
    with pytest.raises(OutputError, match="the source itself"):
        evaluate_layers(layers / "found.gpkg", layers / "labels.geojson", output=layers / "link.gpkg", overwrite=True)


@pytest.mark.parametrize("verb", ["dota", "hrsc", "classification", "coco"])
def test_csv_is_not_written_over_sources(dota, verb):
    for place in ("results/Task1_ship.txt", "labels/P1.txt"):
        before = (dota / place).read_bytes()
        result = run("evaluate", verb, dota / "results", dota / "labels", "--csv", dota / place, "--overwrite")
        assert result.exit_code == 1 and "is a file of the source" in result.stderr, result.output
        assert (dota / place).read_bytes() == before
    file = dota / "results" / "Task1_ship.txt"
    result = run("evaluate", verb, file, dota / "labels", "--csv", file, "--overwrite")
    assert result.exit_code == 1 and "is the source itself" in result.stderr


def test_a_table_may_lie_beside_results(dota):
    words = ("evaluate", "dota", dota / "results", dota / "labels", "--classes", dota / "names.txt")
    (dota / "names.txt").write_text("ship\n")
    table = dota / "results" / "ap.csv"
    assert run(*words, "--csv", table).exit_code == 0 and run(*words, "--csv", table, "--overwrite").exit_code == 0
    result = run(*words, "--csv", dota / "names.txt", "--overwrite")
    assert result.exit_code == 1 and "is the source itself" in result.stderr


def test_statistics_and_sheets_are_not_written_over_data(dota):
    picture = (dota / "images" / "P1.png").read_bytes()
    source = ("--format", "dota", "--images", dota / "images", "--labels", dota / "labels", "--overwrite")
    result = run("data", "stats", *source, "--csv", dota / "labels" / "P1.txt")
    assert result.exit_code == 1 and "is a file of the source" in result.stderr
    assert (dota / "labels" / "P1.txt").read_text().startswith(BOX)
    result = run("data", "show", *source, "-o", dota / "images" / "P1.png")
    assert result.exit_code == 1 and "is a file of the source" in result.stderr
    assert (dota / "images" / "P1.png").read_bytes() == picture
    (dota / "ids.txt").write_text("P1\n")
    result = run("data", "stats", *source, "--ids", dota / "ids.txt", "--csv", dota / "ids.txt")
    assert result.exit_code == 1 and "is the source itself" in result.stderr


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["-o", "matched.shp"], "must end with .gpkg, .geojson, .json"),
        (["--iou", "0.5", "--distance-m", "20"], "--iou and --distance-m"),
        (["-o", "a.json", "--csv", "a.json"], "the same file"),
    ],
)
def test_wrong_options_of_layers(words, text):
    result = run("evaluate", "layers", "nowhere.gpkg", "nowhere.geojson", *words)
    assert result.exit_code == 2 and text in result.stderr


def test_sheets_are_png_files():
    result = run("data", "show", "--format", "chips", "--images", "nowhere", "-o", "sheet.jpg")
    assert result.exit_code == 2 and "must end with .png" in result.stderr


def test_iou_is_a_half_unless_said(layers):
    words = ("evaluate", "layers", layers / "found.gpkg", layers / "labels.geojson", "--json")
    assert json.loads(run(*words).stdout)["protocol"].endswith("at least 0.5")
    assert json.loads(run(*words, "--iou", 0.7).stdout)["protocol"].endswith("at least 0.7")
