"""The loop: it learns, it resumes to the bit after a kill, it refuses what it cannot do."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from rtmdet_geo.config import load_recipe, parse_recipe
from rtmdet_geo.errors import (
    Cancelled,
    ConfigError,
    OutputError,
    RTMDetGeoError,
    TrainingError,
    WeightsError,
)
from rtmdet_geo.models import HorizontalOutputs, get_model
from rtmdet_geo.models.weights import build_from_weights, load_weights
from rtmdet_geo.training.chips import load_chips
from rtmdet_geo.training.loop import train_model
from rtmdet_geo.training.search import find_objects
from rtmdet_geo.training.validate import find_false_alarms, mask_overlaps, validate

LOSSES = ("iteration", "lr", "loss", "loss_cls", "loss_bbox", "grad_norm")


pytestmark = pytest.mark.usefixtures("one_thread")


def losses(run):
    with (run / "log.csv").open() as stream:
        return [[row[name] for name in LOSSES] for row in csv.DictReader(stream)]


def test_a_run_leaves_everything_it_promises(recipe, tmp_path):
    seen = []
    summary = train_model(recipe, tmp_path / "run", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 6) for done in range(1, 7)]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "ap.png", "best.safetensors", "history.csv", "last.pt", "log.csv", "losses.png", "lr.png", "model.safetensors",
        "recipe.yaml", "report.html", "validation.csv",
    ]  # fmt: skip
    assert load_recipe(tmp_path / "run" / "recipe.yaml") == recipe
    assert {row["bands"] for row in summary["validation"]} == {"red+green+blue+nir", "red+green+blue"}
    network, spec = build_from_weights(tmp_path / "run" / "model.safetensors")
    assert spec.architecture == "rtmdet_r_test" and spec.optional_bands == {"nir": 30}
    assert network.in_channels == 4
    assert len(losses(tmp_path / "run")) == 6
    assert set(spec.metrics) == {f"AP{at}{bands}" for at in (25, 50) for bands in ("", " red+green+blue")}
    assert summary["figures"].keys() == spec.metrics.keys()
    assert (summary["best_iteration"], summary["processes"], summary["bad_images"]) == (6, 1, [])
    assert summary["data"] == {"images": 2, "objects": 8, "left-out images": 1}
    assert 0 <= summary["data_wait"] < 1 and summary["images_per_second"] > 0
    assert (tmp_path / "run" / "model.safetensors").stat().st_mode & 0o044


def test_a_run_that_failed_to_start_is_no_obstacle(recipe, tmp_path):
    lost = recipe.model_copy(update={"model": recipe.model.model_copy(update={"weights": "nowhere"})})
    with pytest.raises(RTMDetGeoError, match="nowhere"):
        train_model(lost, tmp_path / "run")
    train_model(recipe, tmp_path / "run")
    assert load_recipe(tmp_path / "run" / "recipe.yaml") == recipe


@pytest.mark.parametrize("name", ["rtmdet_r_test", "rtmdet_test", "rtmdet_ins_test"])
def test_resume_after_cancel_gives_the_unbroken_run_to_the_bit(recipe_values, tmp_path, name):
    recipe_values["model"]["name"] = name
    recipe = parse_recipe(recipe_values)
    train_model(recipe, tmp_path / "whole")
    calls = iter(range(100))
    with pytest.raises(Cancelled, match="--resume"):
        train_model(recipe, tmp_path / "broken", cancelled=lambda: next(calls) == 2)
    train_model(recipe, tmp_path / "broken", resume=True)
    assert losses(tmp_path / "whole") == losses(tmp_path / "broken")
    first, spec = load_weights(tmp_path / "whole" / "model.safetensors")
    second, _ = load_weights(tmp_path / "broken" / "model.safetensors")
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert (spec.architecture, spec.kind) == (name, recipe.model.kind)
    header = (tmp_path / "whole" / "log.csv").read_text().splitlines()[0].split(",")
    assert header[2:-4] == ["loss", "loss_cls", "loss_bbox", *(["loss_mask"] if spec.kind == "mask" else [])]
    assert (tmp_path / "whole" / "history.csv").read_bytes() == (tmp_path / "broken" / "history.csv").read_bytes()


@pytest.mark.slow
def test_resume_after_sigkill_gives_the_unbroken_run_to_the_bit(recipe_values, tmp_path):
    recipe_values["optim"]["iterations"] = 40
    recipe_values["loop"]["deterministic"] = True
    recipe = parse_recipe(recipe_values)
    train_model(recipe, tmp_path / "whole")
    run = tmp_path / "killed"
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    program = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from rtmdet_geo.config import load_recipe\n"
        "from rtmdet_geo.training.loop import train_model\n"
        "train_model(load_recipe(sys.argv[1]), sys.argv[2])\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "recipe.yaml"), str(run)]
    process = subprocess.Popen(command)
    deadline = time.monotonic() + 120
    while not (run / "last.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it was killed"
    assert not (run / "model.safetensors").exists()
    train_model(recipe, run, resume=True)
    assert losses(tmp_path / "whole") == losses(run)


@pytest.mark.slow
def test_it_learns_painted_ships(recipe_values, tmp_path):
    recipe_values["optim"] |= {"iterations": 220, "batch_size": 4, "lr": 4e-3, "ema_gamma": 30, "ema_momentum": 0.02}
    recipe_values["optim"]["warmup_iterations"] = 20
    recipe_values["loop"] |= {"log_interval": 20, "checkpoint_interval": 500}
    summary = train_model(parse_recipe(recipe_values), tmp_path / "run")
    by_key = {(row["bands"], row["iou"]): row["ap"] for row in summary["validation"]}
    assert by_key["red+green+blue+nir", 0.25] > 0.8
    assert by_key["red+green+blue", 0.25] > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rtmdet_test", "rtmdet_ins_test"])
def test_houses_are_learnt_by_heart(house_values, tmp_path, name):
    """Horizontal boxes and masks: the loss falls, and the trained picture is found, in one tile and in several."""
    house_values["model"]["name"] = name
    recipe = parse_recipe(house_values)
    train_model(recipe, tmp_path / "run")
    with (tmp_path / "run" / "log.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    for term in (column for column in rows[0] if column.startswith("loss")):
        assert float(rows[-1][term]) < 0.75 * float(rows[0][term]), term
    network, spec = build_from_weights(tmp_path / "run" / "model.safetensors")
    assert spec.kind == recipe.model.kind and spec.iou_threshold == recipe.validation.nms_iou_threshold
    chips = load_chips(Path(recipe.data.chips), recipe.model)
    for tile_size, overlap in ((128, 32), (96, 64)):
        house_values["model"] |= {"tile_size": tile_size, "overlap": overlap}
        scores = {row["iou"]: row["ap"] for row in validate(network, chips, parse_recipe(house_values)).rows}
        assert scores[0.5] > 0.8, (tile_size, scores)
    if spec.kind == "mask":  # the holes and arms of the houses are seen: masks agree better than boxes would
        found = find_objects(network, chips[0], recipe)
        assert len(found.masks) == len(found.detections) and mask_overlaps([found], chips)[0].max(axis=0).mean() > 0.7


def test_masks_of_a_model_of_boxes_are_refused(houses_dir, house_values):
    recipe = parse_recipe(house_values)
    chips = load_chips(houses_dir, recipe.model)
    network = get_model("rtmdet_test", num_classes=1).eval()
    found = find_objects(network, chips[0], recipe)
    assert found.masks is None
    with pytest.raises(ValueError, match="'yard' was searched by a model without masks"):
        mask_overlaps([found], chips)


def test_false_alarms_of_horizontal_models_are_told_by_horizontal_boxes(houses_dir, house_values):
    """A detection exactly around a turned house is no false alarm."""
    recipe = parse_recipe(house_values)
    chips = load_chips(houses_dir, recipe.model)
    (chip,) = chips
    network = _Seer(chip.boxes_of("horizontal"))
    assert len(find_objects(network, chip, recipe).detections) == 4
    assert len(find_false_alarms(network, chips, recipe, max_iou=0.5)) == 0
    away = chip.boxes_of("horizontal") + np.array([25, 0, 0, 0, 0])
    assert len(find_false_alarms(_Seer(away), chips, recipe, max_iou=0.5)) == 4
    rows = validate(network, chips, recipe).rows
    assert all(row["ap"] == 1 for row in rows)


class _Seer(torch.nn.Module):
    """Sees horizontal boxes (cx, cy, w, h, 0) at the nearest cells of stride 8, whatever the picture shows."""

    kind = "horizontal"

    def __init__(self, boxes):
        super().__init__()
        self.boxes = boxes

    def forward(self, images):
        outputs = HorizontalOutputs([], [])
        for stride in (8, 16, 32):
            height, width = images.shape[2] // stride, images.shape[3] // stride
            outputs.cls.append(torch.full((1, 1, height, width), -9.0))
            outputs.reg.append(torch.ones(1, 4, height, width))
        for number, (cx, cy, w, h, _) in enumerate(self.boxes):
            column, row = min(int(cx) // 8, width * 4 - 1), int(cy) // 8
            sides = [column * 8 - cx + w / 2, row * 8 - cy + h / 2, cx + w / 2 - column * 8, cy + h / 2 - row * 8]
            outputs.cls[0][0, 0, row, column] = 4.0 - number / 4
            outputs.reg[0][0, :, row, column] = torch.tensor(sides)
        return outputs


def test_a_loss_that_is_not_finite_stops_with_the_iteration(recipe_values, tmp_path):
    recipe_values["model"]["std"] = [1e-38] * 4
    with pytest.raises(TrainingError, match="iteration 1"):
        train_model(parse_recipe(recipe_values), tmp_path / "run")


def test_a_folder_with_a_run_is_not_written_over(recipe, recipe_values, tmp_path):
    train_model(recipe, tmp_path / "run")
    with pytest.raises(OutputError, match="--resume"):
        train_model(recipe, tmp_path / "run")
    recipe_values["optim"]["lr"] = 5e-4
    with pytest.raises(ConfigError, match="differs"):
        train_model(parse_recipe(recipe_values), tmp_path / "run", resume=True)
    with pytest.raises(OutputError, match="nothing to resume"):
        train_model(recipe, tmp_path / "other", resume=True)


def test_cuda_without_a_card_is_one_clear_error(recipe, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    for device in ("cuda", "gpu"):
        with pytest.raises(ConfigError, match=f"device '{device}' is not here; choose one of auto, cpu"):
            train_model(recipe, tmp_path / "run", device=device)
    assert not (tmp_path / "run").exists()


def test_a_start_that_fails_leaves_the_earlier_run_alone(recipe, recipe_values, tmp_path):
    run = tmp_path / "run"
    train_model(recipe, run)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    recipe_values["model"]["weights"] = str(tmp_path / "nosuch.safetensors")
    with pytest.raises(WeightsError, match="nosuch"):
        train_model(parse_recipe(recipe_values), run, overwrite=True)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_a_corrupt_checkpoint_is_one_clear_error(recipe, tmp_path):
    train_model(recipe, tmp_path / "run")
    checkpoint = tmp_path / "run" / "last.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:5000])
    with pytest.raises(TrainingError, match=r"last\.pt cannot be resumed.*--overwrite"):
        train_model(recipe, tmp_path / "run", resume=True)


@pytest.mark.gpu
def test_one_gpu_trains_in_bf16(recipe, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert train_model(recipe, tmp_path / "run", device="cuda")["iterations"] == 6


def test_training_starts_from_given_weights(recipe, recipe_values, tmp_path):
    train_model(recipe, tmp_path / "first")
    weights = tmp_path / "first" / "model.safetensors"
    recipe_values["model"]["weights"] = str(weights)
    recipe_values["optim"] |= {"iterations": 1, "lr": 1e-12, "weight_decay": 0.0}
    train_model(parse_recipe(recipe_values), tmp_path / "second")
    first, _ = load_weights(weights)
    second, _ = load_weights(tmp_path / "second" / "model.safetensors")
    name = "bbox_head.rtm_cls.0.weight"
    assert torch.allclose(first[name], second[name], atol=1e-6)
    recipe_values["model"]["classes"] = ["ship", "boat"]
    with pytest.raises(WeightsError, match="rtm_cls"):
        train_model(parse_recipe(recipe_values), tmp_path / "third")
