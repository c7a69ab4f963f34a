"""``rtmdet-geo classify``: exit codes, who owns stdout, one line per error."""

from __future__ import annotations

import json
from pathlib import Path

import geopandas
import numpy as np
import pytest
from classifiers import classifier_spec, write_classifier
from click.testing import CliRunner, Result
from rasters import write_raster

from rtmdet_geo.cli import cli

COLOURS = ("red", "green", "blue")


def run(*words: object) -> Result:
    """Run the real group in this process."""
    return CliRunner().invoke(cli, [str(word) for word in words], prog_name="rtmdet-geo", terminal_width=100)


@pytest.fixture
def greys(tmp_path) -> Path:
    return write_classifier(tmp_path / "greys.onnx")


@pytest.fixture
def scene(tmp_path) -> Path:
    """64 x 64 px of 10 m, dark left, bright right."""
    values = np.full((3, 64, 64), 40, np.uint8)
    values[:, :, 32:] = 160
    return write_raster(tmp_path / "town.tif", values, bounds=(500_000, 4_000_000, 500_640, 4_000_640), colours=COLOURS)


@pytest.fixture
def photos(tmp_path) -> list[Path]:
    """A dark PNG and a bright JPEG, nowhere on Earth."""
    return [
        write_raster(tmp_path / name, np.full((3, 50, 70), grey, np.uint8), crs=None, driver=driver, colours=COLOURS)
        for name, driver, grey in (("night.png", "PNG", 50), ("day.jpg", "JPEG", 150))
    ]


def test_images(greys, photos):
    result = run("classify", *photos, "-m", greys)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        str(photos[0]),
        "  0.9975  dark",
        "  0.0025  bright",
        str(photos[1]),
        "  0.9975  bright",
        "  0.0025  dark",
    ]
    assert run("classify", photos[1], "-m", greys, "--top-k", 1).stdout.splitlines()[1:] == ["  0.9975  bright"]


def test_engines(greys, scene, photos, tmp_path):
    """openvino says what onnxruntime says; torch runs no model files."""
    pytest.importorskip("openvino")
    words = ("classify", photos[0], "-m", greys)
    assert run(*words, "--backend", "openvino").stdout == run(*words, "--backend", "onnxruntime").stdout != ""
    result = run(*words, "--backend", "torch")
    assert result.exit_code == 1 and "torch runs weights" in result.stderr
    result = run("classify", scene, "-m", greys, "-o", tmp_path / "a.gpkg", "--backend", "openvino", "--json")
    summary = json.loads(result.stdout)
    assert summary["parameters"]["backend"] == "openvino" and summary["num_by_class"] == {"dark": 2, "bright": 2}
    assert "openvino" in summary["versions"]


def test_images_as_json(greys, photos):
    result = run("classify", *photos, "-m", greys, "--json")
    facts = json.loads(result.stdout)
    assert [image["image"] for image in facts["images"]] == [str(photo) for photo in photos]
    best = [image["classes"][0] for image in facts["images"]]
    assert [(one["class_id"], one["class_name"]) for one in best] == [(0, "dark"), (1, "bright")]
    assert best[0]["score"] == pytest.approx(0.99753, abs=1e-5)
    assert facts["model"]["name"] == "greys" and len(facts["model"]["sha256"]) == 64
    result = run("classify", *photos, "-m", greys, "--progress", "jsonl")
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert [event["event"] for event in events] == ["start", "progress", "progress", "done"]
    assert events[-1] == {"event": "done", **facts}


def test_scene_to_a_layer(greys, scene, tmp_path):
    output = tmp_path / "cells.gpkg"
    result = run("classify", scene, "-m", greys, "-o", output)
    assert (result.exit_code, result.stderr) == (0, "")
    assert (
        result.stdout.startswith(f"{scene}: 4 cells (2 dark, 2 bright) of 32 px, ") and result.stdout.count("\n") == 1
    )
    layer = geopandas.read_file(output)
    assert layer["class_name"].tolist() == ["dark", "bright"] * 2
    assert layer.total_bounds.tolist() == [500_000, 4_000_000, 500_640, 4_000_640]

    result = run("classify", scene, "-m", greys, "-o", output)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("rtmdet-geo: error: ") and "--overwrite" in result.stderr
    words = ["--chip-size", 48, "--overlap", 16, "--score", 0.99, "--batch-size", 2, "--gsd", 9, "--overwrite"]
    words += ["--threads", 1, "--device", "cpu", "--dst-crs", "EPSG:4326", "--top-k", 1]
    result = run("classify", scene, "-m", greys, "-o", output, *words, "--json")
    summary = json.loads(result.stdout)
    parameters = summary["parameters"]
    assert (parameters["chip_size"], parameters["overlap"], parameters["gsd"]) == (48, 16, 9)
    assert (parameters["score_threshold"], parameters["batch_size"], parameters["top_k"]) == (0.99, 2, 1)
    layer = geopandas.read_file(output)
    assert layer.crs == "EPSG:4326" and "top2_name" not in layer.columns


def test_scene_to_stdout(greys, scene):
    result = run("classify", scene, "-m", greys, "-o", "-")
    features = [json.loads(line) for line in result.stdout.splitlines()]
    assert [feature["properties"]["class_name"] for feature in features] == ["dark", "bright"] * 2
    assert result.exit_code == 0


def test_progress_of_a_scene(greys, scene, tmp_path):
    result = run("classify", scene, "-m", greys, "-o", tmp_path / "a.gpkg", "--progress", "jsonl", "--batch-size", 2)
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert [event.get("done") for event in events[1:-1]] == [0, 2, 4]
    assert events[-1]["event"] == "done" and events[-1]["num_by_class"] == {"dark": 2, "bright": 2}


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["a.tif"], "published weights: cspnext_tiny_imagenet, cspnext_s_imagenet"),
        (["-m", "a.onnx"], "IMAGE"),
        (["a.tif", "b.tif", "-m", "a.onnx", "-o", "a.gpkg"], "one scene, not 2"),
        (["a.tif", "-m", "a.onnx", "--chip-size", "64"], "--chip-size needs -o"),
        (["a.tif", "-m", "a.onnx", "--score", "0.5"], "--score needs -o"),
        (["a.tif", "-m", "a.onnx", "--overwrite"], "--overwrite needs -o"),
        (["a.tif", "-m", "a.onnx", "-o", "-", "--json"], "choose one"),
        (["a.tif", "-m", "a.onnx", "--top-k", "0"], "--top-k"),
    ],
)
def test_wrong_command_lines(words, part):
    result = run("classify", *words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert part in " ".join(result.stderr.split())


def test_errors_are_one_line(greys, scene, photos, tmp_path):
    four = write_classifier(
        tmp_path / "four.onnx",
        classifier_spec(bands=("red", "green", "blue", "nir"), mean=(0,) * 4, std=(1,) * 4),
        shape=("N", 4, "H", "W"),
        weights=[[0.1] * 4] * 2,
    )
    for words, part in (
        ([scene, "-m", "sen2ships_r"], "rtmdet-geo detect"),
        ([scene, "-m", "rtmdet_r_tiny_dota", "-o", tmp_path / "a.gpkg"], "rtmdet-geo detect"),
        ([scene, "-m", "cspnext_tini"], "did you mean"),
        ([scene, "-m", four], "no band 'nir'"),
        ([tmp_path / "nosuch.jpg", "-m", greys], "does not exist"),
        ([greys, "-m", greys], "cannot be opened as a raster"),
    ):
        result = run("classify", *words)
        assert (result.exit_code, result.stdout) == (1, ""), words
        (line,) = result.stderr.splitlines()
        assert line.startswith("rtmdet-geo: error: ") and part in line
    result = run("detect", scene, "-m", greys, "-o", tmp_path / "a.gpkg")
    assert result.exit_code == 1 and "rtmdet-geo classify" in result.stderr
    result = run("classify", photos[0], "-m", greys, "-o", tmp_path / "a.gpkg", "--dst-crs", "EPSG:4326")
    assert result.exit_code == 1 and "no CRS" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "a.gpkg").exists()
