"""The command-line fronts that choose and compare models: cross-validation and the classical baseline."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from data_tools import blob_baseline, cross_validate, score_weights
from rtmdet_geo.config import load_recipe, parse_recipe
from rtmdet_geo.nms import rotated_iou
from rtmdet_geo.training.labelled import LabelledImage
from rtmdet_geo.training.loop import train_model


@pytest.mark.parametrize("name", ["rtmdet_r_test", "rtmdet_ins_test"])
def test_cross_validation_trains_every_fold_once_and_pools(recipe_values, tmp_path, name):
    recipe_values["model"]["name"] = name
    recipe_values["data"] |= {"folds": {"a": ["alpha"], "b": ["beta", "gamma"]}, "fold": None}
    recipe_values["optim"]["iterations"] = 2
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(recipe_values))
    arguments = [str(path), "--out", str(tmp_path / "cv"), "--csv", str(tmp_path / "table.csv")]
    result = CliRunner().invoke(cross_validate.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    with (tmp_path / "table.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert {row["scene"] for row in rows} == {"all left-out", "alpha", "beta", "gamma"}
    pooled = [row for row in rows if row["scene"] == "all left-out"]
    assert {(row["bands"], row["iou"]) for row in pooled} == {
        (bands, iou) for bands in ("red+green+blue+nir", "red+green+blue") for iou in ("0.25", "0.5")
    }
    assert all(row["objects"] == "12" for row in pooled)
    weights = [tmp_path / "cv" / fold / "model.safetensors" for fold in "ab"]
    before = [path.stat().st_mtime_ns for path in weights]
    CliRunner().invoke(cross_validate.main, arguments, catch_exceptions=False)
    assert [path.stat().st_mtime_ns for path in weights] == before


def test_baseline_finds_a_bright_ship_in_water_and_nothing_on_land():
    pixels = np.full((4, 300, 300), 20, np.uint8)
    pixels[1] = 40  # water: green above near infrared
    pixels[3] = 10
    pixels[:, 120:134, 100:150] = 200  # a ship of 200 x 56 m
    pixels[:, :, 220:] = 90  # land
    pixels[3, :, 220:] = 180
    pixels[:, 50:60, 250:280] = 220  # a building
    chip = LabelledImage("toy.npy", "toy", pixels, np.zeros((0, 5)), np.zeros(0, np.int64), np.zeros(0, bool))
    found = blob_baseline.detect_blobs(chip, ("red", "green", "blue", "nir"), 4.0)
    assert len(found) == 1
    assert rotated_iou(found.boxes, np.array([[125.0, 127.0, 50.0, 14.0, 0.0]]))[0, 0] > 0.99
    assert 0.5 < found.scores[0] <= 1


def test_baseline_writes_its_table(recipe_values, tmp_path):
    recipe_values["data"]["holdout"] = ["gamma"]
    path = tmp_path / "toy.yaml"
    path.write_text(parse_recipe(recipe_values).to_yaml())
    result = CliRunner().invoke(
        blob_baseline.main, [str(path), "--csv", str(tmp_path / "table.csv")], catch_exceptions=False
    )
    assert result.exit_code == 0
    with (tmp_path / "table.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["iou"] for row in rows] == ["0.25", "0.5"]
    assert all(row["objects"] == "8" for row in rows)


def test_weights_are_scored_on_the_scenes_named(recipe_values, tmp_path):
    path = tmp_path / "toy.yaml"
    recipe_values["optim"]["iterations"] = 1
    path.write_text(yaml.safe_dump(recipe_values))
    train_model(load_recipe(path), tmp_path / "run")
    arguments = [
        str(tmp_path / "run" / "model.safetensors"),
        "--recipe",
        str(path),
        "--csv",
        str(tmp_path / "table.csv"),
    ]
    result = CliRunner().invoke(score_weights.main, [*arguments, "--scene", "alpha"], catch_exceptions=False)
    assert result.exit_code == 0
    with (tmp_path / "table.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 4 and {row["num_objects"] for row in rows} == {"4"}
    lost = CliRunner().invoke(score_weights.main, [*arguments, "--scene", "atlantis"])
    assert lost.exit_code == 1 and "atlantis" in lost.output
