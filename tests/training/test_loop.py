"""The loop: it learns, it resumes to the bit after a kill, it refuses what it cannot do."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from rtmdet_geo.config import load_recipe, parse_recipe
from rtmdet_geo.errors import Cancelled, ConfigError, OutputError, RTMDetGeoError, TrainingError, WeightsError
from rtmdet_geo.models.weights import build_from_weights, load_weights
from rtmdet_geo.training.loop import train_model

LOSSES = ("iteration", "lr", "loss", "loss_cls", "loss_bbox", "grad_norm")


pytestmark = pytest.mark.usefixtures("one_thread")


BAND_SETS = ("red+green+blue+nir", "red+green+blue")


def losses(run):
    with (run / "log.csv").open() as stream:
        return [[row[name] for name in LOSSES] for row in csv.DictReader(stream)]


def test_a_run_leaves_everything_it_promises(recipe, tmp_path):
    seen = []
    summary = train_model(recipe, tmp_path / "run", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 6) for done in range(1, 7)]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "last.pt", "log.csv", "model.safetensors", "recipe.yaml", "validation.csv",
    ]  # fmt: skip
    assert load_recipe(tmp_path / "run" / "recipe.yaml") == recipe
    assert {row["bands"] for row in summary["validation"]} == {"red+green+blue+nir", "red+green+blue"}
    network, spec = build_from_weights(tmp_path / "run" / "model.safetensors")
    assert spec.architecture == "rtmdet_r_test" and spec.optional_bands == {"nir": 30}
    assert network.in_channels == 4
    assert len(losses(tmp_path / "run")) == 6
    assert set(spec.metrics) == {f"ship AP{at} left-out {bands}" for at in (25, 50) for bands in BAND_SETS}
    assert (tmp_path / "run" / "model.safetensors").stat().st_mode & 0o044


def test_a_run_that_failed_to_start_is_no_obstacle(recipe, tmp_path):
    lost = recipe.model_copy(update={"model": recipe.model.model_copy(update={"weights": "nowhere"})})
    with pytest.raises(RTMDetGeoError, match="nowhere"):
        train_model(lost, tmp_path / "run")
    train_model(recipe, tmp_path / "run")
    assert load_recipe(tmp_path / "run" / "recipe.yaml") == recipe


def test_resume_after_cancel_gives_the_unbroken_run_to_the_bit(recipe, tmp_path):
    train_model(recipe, tmp_path / "whole")
    calls = iter(range(100))
    with pytest.raises(Cancelled, match="--resume"):
        train_model(recipe, tmp_path / "broken", cancelled=lambda: next(calls) == 2)
    train_model(recipe, tmp_path / "broken", resume=True)
    assert losses(tmp_path / "whole") == losses(tmp_path / "broken")
    first, _ = load_weights(tmp_path / "whole" / "model.safetensors")
    second, _ = load_weights(tmp_path / "broken" / "model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_resume_after_sigkill_gives_the_unbroken_run_to_the_bit(recipe_values, tmp_path):
    recipe_values["optim"]["iterations"] = 40
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
    with pytest.raises(ConfigError, match="--device cpu"):
        train_model(recipe, tmp_path / "run", device="cuda")
    assert not (tmp_path / "run").exists()


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
