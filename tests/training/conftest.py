"""A small folder of chips with painted ships, and a recipe that trains on it in seconds."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest

from rtmdet_geo.boxes import boxes_to_polygons
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
        "loop": {"mine_interval": 3, "checkpoint_interval": 2, "log_interval": 1},
        "validation": {"drop_bands": [[], ["nir"]]},
    }


@pytest.fixture
def recipe(recipe_values):
    """The recipe of ``recipe_values``."""
    return parse_recipe(recipe_values)
