"""Every recipe of the package trains through the real command on small painted data of its own format."""

from __future__ import annotations

import csv
import json

import painted
import pytest
from click.testing import CliRunner

from rtmdet_geo.cli.group import cli
from rtmdet_geo.config import load_recipe, recipe_names

pytestmark = pytest.mark.usefixtures("one_thread")

#: How each recipe is made small; the rest of it stays as published.
SMALL = ("model.weights=null", "model.weights_parts=null", "model.transfer=false", "optim.warmup_iterations=2")
SMALL += ("optim.batch_size=2", "loop.workers=0", "loop.log_interval=1", "loop.tensorboard=false", "optim.epochs=4")
IMAGES = ("augment.image_size=96", "model.tile_size=96", "model.overlap=32", "augment.weak_epochs=1")


def make_data(root, name):
    """Write the data that a recipe reads, and return (folder for --data, further values)."""
    if name.startswith("coco"):
        painted.coco(root)
        return root, ()
    if name.startswith("dota"):
        painted.dota(root)
        return root, ()
    if name == "imagenet_cls":
        painted.folders(root)
        return root, ("model.classes=[bright, dark]",)
    return painted.hrsc(root), ()


PUBLISHED = ["coco_det", "coco_ins", "dota_r", "dota_r_ms", "dota_r_ms_coco", "dota_r_100e"]
PUBLISHED += ["hrsc_r", "hrsc_r_strong", "imagenet_cls"]
NETWORKS = {
    "rotated": "rtmdet_r_test",
    "horizontal": "rtmdet_test",
    "mask": "rtmdet_ins_test",
    "classification": "cspnext_test",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_trains_validates_and_reports(name, tmp_path):
    folder, more = make_data(tmp_path / "data", name)
    network = NETWORKS[load_recipe(name).model.kind]
    small = (*SMALL, *(() if name == "imagenet_cls" else IMAGES), *more, f"model.name={network}")
    if name == "imagenet_cls":
        small += ("augment.image_size=64", "augment.eval_size=72", "model.tile_size=64", "optim.warmup_epochs=1")
    arguments = ["train", name, "-o", str(tmp_path / "run"), "--data", str(folder), "--json", "--device", "cpu"]
    for value in small:
        arguments += ["--set", value]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["figures"] and all(value is None or 0 <= value <= 1 for value in summary["figures"].values())
    made = {path.name for path in (tmp_path / "run").iterdir()}
    wanted = {
        "recipe.yaml",
        "log.csv",
        "history.csv",
        "validation.csv",
        "last.pt",
        "model.safetensors",
        "best.safetensors",
    }
    assert wanted | {"report.html", "losses.png", "lr.png"} <= made
    with (tmp_path / "run" / "log.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == summary["iterations"] and float(rows[-1]["loss"]) > 0
    saved = load_recipe(tmp_path / "run" / "recipe.yaml")
    assert saved.model.name == network and saved.optim.lr == load_recipe(name).optim.lr


def test_no_recipe_is_left_out():
    others = {"banepa_ins", "sen2ships_r", "starter_r"}  # trained on chips, in other tests
    assert set(recipe_names()) - others - set(PUBLISHED) <= {"hrsc_r_scratch"}  # hrsc_r_strong with other numbers
