"""Labels, samples, losses, decoding and scoring fit together: a small network learns a few images by heart.

It does so by the recipes for COCO, from random initialisation; with another image's labels it does not.
"""

from __future__ import annotations

import json

import painted
import pytest

from rtmdet_geo.config import load_recipe
from rtmdet_geo.training.loop import train_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

LABELS = "annotations/instances_train2017.json"
#: Every image as it is, in every step, and rates for a short training.
BY_HEART = {
    "model.classes": "[person, boat]",
    "model.weights": "null",
    "model.weights_parts": "null",
    "data.val_images": "train2017",
    "data.val_labels": LABELS,
    "augment.image_size": 96,
    "augment.mosaic_prob": 0,
    "augment.mixup_prob": 0,
    "augment.scale_min": 1,
    "augment.scale_max": 1,
    "augment.flip_prob": 0,
    "augment.weak_epochs": 0,
    "optim.epochs": "null",
    "optim.iterations": 80,
    "optim.batch_size": 4,
    "optim.lr": 8e-3,
    "optim.lr_for_batch": "null",
    "optim.warmup_iterations": 10,
    "optim.weight_decay": 0,
    "optim.clip_grad_norm": 35,
    "optim.ema_momentum": 0.03,
    "optim.ema_gamma": 20,
    "loop.workers": 0,
    "loop.tensorboard": "false",
    "validation.interval_epochs": 0,
    "validation.late_epochs": 0,
}
NETWORKS = {"coco_det": "rtmdet_test", "coco_ins": "rtmdet_ins_test"}


def figures(folder, name, **overrides):
    """Train by a recipe for COCO on the images in ``folder/data``, and return what it knows of them."""
    values = (
        BY_HEART | {"model.name": NETWORKS[name]} | {key.replace("__", "."): value for key, value in overrides.items()}
    )
    recipe = load_recipe(name, [f"{key}={value}" for key, value in values.items()])
    return train_model(recipe, folder / "run", data=folder / "data", device="cpu")["figures"]


@pytest.mark.parametrize(("name", "figure", "least"), [("coco_det", "AP50", 0.9), ("coco_ins", "mask AP50", 0.8)])
def test_painted_images_are_learnt_by_heart(tmp_path, name, figure, least):
    painted.coco(tmp_path / "data")
    assert figures(tmp_path, name)[figure] >= least


def test_labels_of_other_images_are_not_learnt(tmp_path):
    """Each image gets the next one's labels; validation knows the right ones."""
    painted.coco(tmp_path / "data")
    content = json.loads((tmp_path / "data" / LABELS).read_text())
    for annotation in content["annotations"]:
        annotation["image_id"] = annotation["image_id"] % len(content["images"]) + 1
    (tmp_path / "data" / "annotations" / "moved.json").write_text(json.dumps(content))
    assert figures(tmp_path, "coco_det", data__train_labels="annotations/moved.json")["AP50"] < 0.3
