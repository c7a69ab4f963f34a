"""Small folders of chips with painted ships and houses, and recipes that train on them in seconds."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest

from rtmdet_geo.annotations.outlines import Window, as_outline, fill_outline, outline_points, outline_to_lists
from rtmdet_geo.boxes import boxes_to_polygons, minimum_area_rectangle
from rtmdet_geo.config import parse_recipe

SCENES = ("alpha", "beta", "gamma")


@pytest.fixture(scope="session")
def chips_dir(tmp_path_factory):
    """Three chips of 256 px with four bright ships each on dark water, bands red, green, blue, nir."""
    folder = tmp_path_factory.mktemp("chips")
    chips = []
    for number, scene in enumerate(SCENES):
        rng = np.random.default_rng(number)
        pixels = rng.integers(20, 40, (4, 256, 256)).astype(np.uint8)
        centres = np.array([[64, 64], [64, 192], [192, 64], [192, 192]]) + rng.uniform(-20, 20, (4, 2))
        boxes = np.column_stack([centres, np.full(4, 48.0), np.full(4, 16.0), rng.uniform(-1.5, 1.5, 4)])
        for polygon in boxes_to_polygons(boxes):
            for plane in pixels:
                cv2.fillPoly(plane, [np.round(polygon).astype(np.int32)], 220)
        np.save(folder / f"{scene}.npy", pixels)
        chips.append(
            {"file": f"{scene}.npy", "scene": scene, "x": 0, "y": 0, "width": 256, "height": 256}
            | {"boxes": boxes.tolist(), "labels": [0] * 4, "ignore": [False] * 4}
            | {"outlines": [outline_to_lists(as_outline([[corners]])) for corners in boxes_to_polygons(boxes)]}
        )
    index = {"format_version": 1, "bands": ["red", "green", "blue", "nir"], "gsd_m": 4.0, "classes": ["ship"]}
    index |= {"stretch": {"kind": "fixed", "low": 0.0, "high": 0.3}, "chips": chips}
    (folder / "chips.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


@pytest.fixture
def recipe_values(chips_dir):
    """Values of a recipe as a dict that tests may change."""
    return {
        "name": "toy",
        "model": {
            "name": "rtmdet_r_test",
            "classes": ["ship"],
            "bands": ["red", "green", "blue", "nir"],
            "optional_bands": {"nir": 30},
            "mean": [60, 60, 60, 60],
            "std": [60, 60, 60, 60],
            "gsd_m": 4.0,
            "tile_size": 256,
            "overlap": 64,
        },
        "data": {"chips": str(chips_dir), "folds": {"a": ["alpha"]}, "fold": "a"},
        "augment": {"crop_size": 128, "false_alarm_crop_prob": 0.3, "band_dropout": {"nir": 0.5}, "mosaic_prob": 0.5},
        "optim": {"batch_size": 2, "iterations": 6, "warmup_iterations": 2},
        "loop": {"mine_interval": 3, "checkpoint_interval": 2, "log_interval": 1, "tensorboard": False},
        "validation": {"drop_bands": [[], ["nir"]]},
    }


@pytest.fixture
def recipe(recipe_values):
    """The recipe of ``recipe_values``."""
    return parse_recipe(recipe_values)


def house(number, centre, angle):
    """Outline of an L-shaped house of 36 px, or of one with a courtyard."""
    wall = np.array([[0, 0], [36, 0], [36, 16], [16, 16], [16, 36], [0, 36]], float)
    yard = np.array([[12, 12], [24, 12], [24, 24], [12, 24]], float)
    rings = [wall] if number % 2 == 0 else [np.array([[0, 0], [36, 0], [36, 36], [0, 36]], float), yard]
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return as_outline([[(ring - 18) @ turn.T + centre for ring in rings]])


@pytest.fixture(scope="session")
def houses_dir(tmp_path_factory):
    """One chip of 128 px with four bright houses on dark ground, their outlines in the index."""
    folder = tmp_path_factory.mktemp("houses")
    rng = np.random.default_rng(5)
    pixels = rng.integers(20, 40, (3, 128, 128)).astype(np.uint8)
    centres = np.array([[32, 32], [96, 32], [32, 96], [96, 96]]) + rng.uniform(-5, 5, (4, 2))
    outlines = [house(number, centre, rng.uniform(0, 6)) for number, centre in enumerate(centres)]
    for outline in outlines:
        pixels[:, fill_outline(outline, Window(0, 0, 128, 128)) > 0] = 220
    np.save(folder / "yard.npy", pixels)
    chip = {"file": "yard.npy", "scene": "yard", "x": 0, "y": 0, "width": 128, "height": 128}
    chip |= {"boxes": [minimum_area_rectangle(outline_points(outline)).tolist() for outline in outlines]}
    chip |= {"outlines": [outline_to_lists(outline) for outline in outlines], "labels": [0] * 4, "ignore": [False] * 4}
    index = {"format_version": 1, "bands": ["red", "green", "blue"], "gsd_m": 1.0, "classes": ["house"]}
    index |= {"stretch": {"kind": "fixed", "low": 0.0, "high": 0.3}, "chips": [chip]}
    (folder / "chips.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


@pytest.fixture
def house_values(houses_dir):
    """Values of a recipe that learns the houses by heart; a test chooses ``model.name``."""
    return {
        "name": "houses",
        "model": {
            "name": "rtmdet_test",
            "classes": ["house"],
            "mean": [60, 60, 60],
            "std": [60, 60, 60],
            "gsd_m": 1.0,
            "tile_size": 128,
            "overlap": 32,
        },
        "data": {"chips": str(houses_dir)},
        "augment": {"crop_size": 128, "mosaic_prob": 0.25, "scale_min": 0.9, "scale_max": 1.1, "min_visible": 0.4},
        "optim": {
            "batch_size": 3,
            "iterations": 120,
            "warmup_iterations": 10,
            "lr": 6e-3,
            "ema_gamma": 20,
            "ema_momentum": 0.03,
        },
        "loop": {"checkpoint_interval": 500, "log_interval": 10, "tensorboard": False},
    }
