"""What a recipe can tell the loop: each option does what it says, on whole images and on classes too."""

from __future__ import annotations

import csv
import logging
import resource
import time

import painted
import pytest
import torch

from rtmdet_geo.config import load_recipe, parse_recipe
from rtmdet_geo.errors import AnnotationError, Cancelled, ConfigError, OutputError, TrainingError
from rtmdet_geo.models import get_model
from rtmdet_geo.models.weights import load_weights
from rtmdet_geo.training import loop
from rtmdet_geo.training.loop import train_model

pytestmark = pytest.mark.usefixtures("one_thread")


def table(path):
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def numbers(run):
    """What must not change when a run is broken off and resumed."""
    return [
        {key: row[key] for key in row if key not in ("seconds", "data_wait", "images_per_second")}
        for row in table(run / "log.csv")
    ]


@pytest.fixture
def images(tmp_path):
    """Painted tiles in DOTA's format and a recipe of whole images: 4 to train, 4 to score, batches of 2."""
    painted.dota(tmp_path / "data", classes=("ship",))
    return {
        "name": "painted",
        "model": {"name": "rtmdet_r_test", "classes": ["ship"], "tile_size": 96, "overlap": 32},
        "data": {
            "format": "dota",
            "root": str(tmp_path / "data"),
            "train_images": "trainval/images",
            "train_labels": "trainval/annfiles",
            "val_images": "val/images",
            "val_labels": "val/annfiles",
        },
        "augment": {"sampling": "images", "image_size": 96, "mosaic_prob": 0.5, "mixup_prob": 0.5, "rotate_prob": 0.5},
        "optim": {"batch_size": 2, "epochs": 4, "warmup_iterations": 2},
        "loop": {"log_interval": 1, "checkpoint_interval": 1, "tensorboard": False},
        "validation": {"iou_thresholds": [0.5]},
    }


def stopped_after(count):
    """Arguments that stop a run after so many iterations."""
    seen = [0]
    return {
        "progress": lambda done, total: seen.__setitem__(0, done),
        "cancelled": lambda: seen[0] == count - 1,
    }


# Resuming, to the bit.


@pytest.mark.parametrize("more", [{}, {"image_sizes": [64, 96, 128], "image_sizes_interval": 2, "weak_epochs": 2}])
def test_whole_images_resume_to_the_bit(images, tmp_path, more):
    images["augment"] |= more
    images["validation"]["interval"] = 3
    recipe = parse_recipe(images)
    train_model(recipe, tmp_path / "whole")
    with pytest.raises(Cancelled, match="iteration 5"):
        train_model(recipe, tmp_path / "broken", **stopped_after(5))
    train_model(recipe, tmp_path / "broken", resume=True)
    assert numbers(tmp_path / "whole") == numbers(tmp_path / "broken")
    assert (tmp_path / "whole" / "history.csv").read_text() == (tmp_path / "broken" / "history.csv").read_text()
    for name in ("model.safetensors", "best.safetensors"):
        first, second = (load_weights(tmp_path / run / name)[0] for run in ("whole", "broken"))
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_classifier_resumes_to_the_bit(tmp_path):
    painted.folders(tmp_path / "data")
    changes = ["model.name=cspnext_test", "model.classes=[bright, dark]", "model.weights=null", "model.tile_size=64"]
    changes += ["augment.image_size=64", "augment.eval_size=72", "optim.epochs=null", "optim.iterations=6"]
    changes += ["optim.batch_size=4", "optim.warmup_epochs=null", "optim.warmup_iterations=2", "loop.workers=2"]
    changes += ["loop.log_interval=1", "loop.tensorboard=false"]
    recipe = load_recipe("imagenet_cls", changes)
    train_model(recipe, tmp_path / "whole", data=tmp_path / "data")
    with pytest.raises(Cancelled):
        train_model(recipe, tmp_path / "broken", data=tmp_path / "data", **stopped_after(3))
    summary = train_model(recipe, tmp_path / "broken", data=tmp_path / "data", resume=True)
    assert numbers(tmp_path / "whole") == numbers(tmp_path / "broken")
    assert summary["figures"].keys() == {"top1", "top5"}


# Figures on the way.


def test_validation_runs_when_the_recipe_says_so(images, tmp_path):
    images["optim"]["epochs"] = 5  # of two iterations each
    images["validation"] |= {"interval_epochs": 2, "late_epochs": 2, "late_interval_epochs": 1}
    train_model(parse_recipe(images), tmp_path / "run")
    assert [row["iteration"] for row in table(tmp_path / "run" / "history.csv")] == ["4", "8", "10"]
    images["validation"] |= {"interval_epochs": 0, "interval": 3}
    train_model(parse_recipe(images), tmp_path / "other")
    assert [row["iteration"] for row in table(tmp_path / "other" / "history.csv")] == ["3", "6", "9", "10"]


def test_training_ends_early_without_a_better_figure(images, tmp_path, monkeypatch):
    images["optim"]["epochs"] = 50
    images["loop"]["early_stop"] = 2
    images["validation"]["interval"] = 2
    figures = iter([0.3, 0.5, 0.4, 0.5, 0.9])  # equals: the later one counts, but is no progress
    real = loop._Training._score

    monkeypatch.setattr(loop._Training, "_score", lambda *a: replaced(real(*a), next(figures)))
    summary = train_model(parse_recipe(images), tmp_path / "run")
    assert (summary["iterations"], summary["best_iteration"]) == (8, 8)
    kept = tmp_path / "kept.safetensors"
    kept.write_bytes((tmp_path / "run" / "model.safetensors").read_bytes())
    monkeypatch.setattr(loop._Training, "_score", lambda *a: replaced(real(*a), 0.5))
    again = train_model(parse_recipe(images), tmp_path / "run", resume=True)  # it has ended, and stays so
    assert again["iterations"] == 8 and again["loss"] == pytest.approx(summary["loss"])
    first, second = (load_weights(path)[0] for path in (kept, tmp_path / "run" / "model.safetensors"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert len(table(tmp_path / "run" / "log.csv")) == 8
    assert [row["AP50"] for row in table(tmp_path / "run" / "history.csv")] == ["0.3", "0.5", "0.4", "0.5"]
    assert (tmp_path / "run" / "best.safetensors").exists()


def replaced(validation, figure):
    return type(validation)({"AP50": figure}, validation.rows, validation.curves, validation.num_images)


# Steps.


def test_the_rate_follows_the_batch(images, tmp_path):
    images["optim"] |= {"warmup_iterations": 0, "lr": 1e-3}
    train_model(parse_recipe(images), tmp_path / "plain")
    images["optim"]["lr_for_batch"] = 8
    train_model(parse_recipe(images), tmp_path / "scaled")
    images["optim"]["accumulate"] = 2
    images["optim"]["epochs"] = 8  # of one iteration each
    train_model(parse_recipe(images), tmp_path / "twice")
    first = [float(numbers(tmp_path / run)[0]["lr"]) for run in ("plain", "scaled", "twice")]
    assert first == pytest.approx([1e-3, 1e-3 * 2 / 8, 1e-3 * 4 / 8])


def test_frozen_parts_stay_as_they_are(images, tmp_path):
    images["optim"] |= {"freeze": ["backbone"], "warmup_iterations": 0}
    recipe = parse_recipe(images)
    torch.manual_seed(recipe.loop.seed)
    before = get_model("rtmdet_r_test", num_classes=1).state_dict()
    train_model(recipe, tmp_path / "run")
    after, _ = load_weights(tmp_path / "run" / "model.safetensors")
    floats = [key for key in after if after[key].is_floating_point()]
    assert all(torch.equal(after[key], before[key]) for key in floats if key.startswith("backbone."))
    assert not any(
        torch.equal(after[key], before[key]) for key in floats if key.endswith("conv.weight") and "neck" in key
    )
    images["optim"]["freeze"] = ["backbonne"]
    with pytest.raises(ConfigError, match="no part 'backbonne'"):
        train_model(parse_recipe(images), tmp_path / "other")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_numbers_train_on_the_cpu_too(images, tmp_path, precision):
    train_model(parse_recipe(images), tmp_path / "fp32")
    images["loop"]["precision"] = precision
    train_model(parse_recipe(images), tmp_path / "half")
    full, half = (float(numbers(tmp_path / run)[0]["loss"]) for run in ("fp32", "half"))
    assert half == pytest.approx(full, rel=0.02) and half != full


def test_the_network_is_compiled_on_request(images, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda network: compiled.append(network) or network)
    images["loop"]["compile"] = True
    train_model(parse_recipe(images), tmp_path / "run")
    assert len(compiled) == 1
    assert not any("_orig_mod" in key for key in load_weights(tmp_path / "run" / "model.safetensors")[0])


def test_deterministic_mode_ends_with_the_run(images, tmp_path):
    images["loop"]["deterministic"] = True
    seen = []
    train_model(
        parse_recipe(images),
        tmp_path / "run",
        progress=lambda *_: seen.append(torch.are_deterministic_algorithms_enabled()),
    )
    assert all(seen) and seen
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_run_killed_in_its_validation_loses_nothing(images, tmp_path, monkeypatch, precision):
    images["validation"]["interval"] = 3
    images["loop"] |= {"checkpoint_interval": 100, "precision": precision}
    recipe = parse_recipe(images)
    train_model(recipe, tmp_path / "whole")
    real = loop._Training._score

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop._Training, "_score", killed)
    with pytest.raises(KeyboardInterrupt):
        train_model(recipe, tmp_path / "broken")
    monkeypatch.setattr(loop._Training, "_score", real)
    train_model(recipe, tmp_path / "broken", resume=True)
    assert (tmp_path / "whole" / "history.csv").read_text() == (tmp_path / "broken" / "history.csv").read_text()
    assert numbers(tmp_path / "whole") == numbers(tmp_path / "broken")


def test_a_wish_to_stop_is_heard_in_a_validation(images, tmp_path):
    images["validation"]["interval"] = 3
    asked = []
    seen = stopped_after(10**9)

    def cancelled():
        asked.append(len(asked))
        return len(asked) == 5  # three steps, and the second image of the validation

    with pytest.raises(Cancelled, match="during a validation"):
        train_model(parse_recipe(images), tmp_path / "run", progress=seen["progress"], cancelled=cancelled)
    assert train_model(parse_recipe(images), tmp_path / "run", resume=True)["iterations"] == 8
    assert [row["iteration"] for row in table(tmp_path / "run" / "history.csv")] == ["3", "6", "8"]


def test_speed_is_that_of_the_steps_alone(images, tmp_path, monkeypatch):
    images["loop"]["log_interval"] = 4
    images["validation"]["interval"] = 3
    real = loop._Training._score

    def slow(*arguments):
        time.sleep(1.5)
        return real(*arguments)

    monkeypatch.setattr(loop._Training, "_score", slow)
    summary = train_model(parse_recipe(images), tmp_path / "run")
    rows = table(tmp_path / "run" / "log.csv")
    assert [row["iteration"] for row in rows] == ["4", "8"]
    for row in rows:  # two samples a step; a row says the seconds of its last step
        speed = float(row["images_per_second"])
        assert 2 / speed < 1.5 and 0 <= float(row["data_wait"]) < 1
    assert summary["images_per_second"] == pytest.approx(16 / sum(8 / float(row["images_per_second"]) for row in rows))


def test_other_data_are_not_resumed_with(images, tmp_path):
    with pytest.raises(Cancelled):
        train_model(parse_recipe(images), tmp_path / "run", **stopped_after(3))
    labels = tmp_path / "data" / "trainval" / "annfiles" / "000001.txt"
    kept = labels.read_text()
    labels.write_text("\n".join(kept.splitlines()[:-1]) + "\n")
    with pytest.raises(ConfigError, match="training on other data"):
        train_model(parse_recipe(images), tmp_path / "run", resume=True)
    labels.write_text(kept)
    assert train_model(parse_recipe(images), tmp_path / "run", resume=True)["iterations"] == 8


def test_the_saved_recipe_knows_its_data(images, tmp_path):
    root = images["data"].pop("root")
    recipe = parse_recipe(images)
    with pytest.raises(Cancelled):
        train_model(recipe, tmp_path / "run", data=root, **stopped_after(3))
    saved = load_recipe(tmp_path / "run" / "recipe.yaml")
    assert saved.data.root == root
    assert train_model(saved, tmp_path / "run", resume=True)["iterations"] == 8


def test_leftovers_of_a_kill_are_removed(images, tmp_path):
    leftover = tmp_path / "run" / ".last.pt.abc.partial"
    leftover.mkdir(parents=True)
    (leftover / "last.pt").write_bytes(b"half")
    (tmp_path / "run" / ".mine").mkdir()
    train_model(parse_recipe(images), tmp_path / "run")
    assert not leftover.exists() and (tmp_path / "run" / ".mine").exists()


def test_the_file_says_the_size_of_tile_that_it_was_trained_on(images, tmp_path):
    train_model(parse_recipe(images), tmp_path / "run")
    _, spec = load_weights(tmp_path / "run" / "model.safetensors")
    assert (spec.tile_size, spec.overlap) == (96, 32)


def test_a_weak_stage_is_not_the_whole_training(images, tmp_path):
    images["augment"]["weak_epochs"] = 4
    with pytest.raises(ConfigError, match="weak_epochs 4 covers the whole training of 8 iterations"):
        train_model(parse_recipe(images), tmp_path / "run")
    images["augment"] |= {"mosaic_prob": 0, "mixup_prob": 0}
    assert train_model(parse_recipe(images), tmp_path / "run")["iterations"] == 8


# Bad input.


def test_the_images_of_a_loss_that_is_not_finite_are_named(images, tmp_path):
    images["model"]["std"] = [1e-38] * 3
    with pytest.raises(TrainingError, match=r"loss.* not finite in iteration 1, on images \d+\.png.*bad_batch\.txt"):
        train_model(parse_recipe(images), tmp_path / "run")
    names = (tmp_path / "run" / "bad_batch.txt").read_text().split()
    assert names and all((tmp_path / "data" / "trainval" / "images" / name).exists() for name in names)


def test_an_image_that_breaks_in_the_middle_stops_or_is_left_out(images, tmp_path, caplog):
    path = sorted((tmp_path / "data" / "trainval" / "images").iterdir())[1]
    path.write_bytes(path.read_bytes()[:200])  # the header is whole, the pixels are not
    with pytest.raises(AnnotationError, match=path.name):
        train_model(parse_recipe(images), tmp_path / "stopped")
    images["data"]["on_bad_image"] = "skip"
    with caplog.at_level(logging.WARNING):
        summary = train_model(parse_recipe(images), tmp_path / "run")
    assert summary["bad_images"] == [path.name] and summary["iterations"] == 8
    assert any(path.name in record.message and "1 images did not decode" in record.message for record in caplog.records)


def test_a_full_disk_keeps_the_former_checkpoint(images, tmp_path):
    recipe, run = parse_recipe(images), tmp_path / "run"
    with pytest.raises(Cancelled):
        train_model(recipe, run, **stopped_after(3))
    former = (run / "last.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(former) // 2, limits[1]))
    try:
        with pytest.raises(OutputError, match=r"cannot write .*last\.pt: .*former checkpoint is untouched; make room"):
            train_model(recipe, run, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (run / "last.pt").read_bytes() == former
    assert [path.name for path in run.iterdir() if "last" in path.name] == ["last.pt"]
    assert train_model(recipe, run, resume=True)["iterations"] == 8


def test_best_weights_are_named_where_the_checkpoint_is_cut(images, tmp_path):
    images["validation"]["interval"] = 2
    train_model(parse_recipe(images), tmp_path / "run")
    path = tmp_path / "run" / "last.pt"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(TrainingError, match=r"cannot be resumed.*--overwrite.*model\.weights=.*best\.safetensors"):
        train_model(parse_recipe(images), tmp_path / "run", resume=True)


def test_many_boxes_in_one_image(images, tmp_path):
    """2,000 boxes in one picture: assignment looks at pairs that may match, not at all of them."""
    folder = tmp_path / "data" / "trainval"
    for path in sorted((folder / "annfiles").iterdir())[1:]:
        path.unlink()
        (folder / "images" / path.with_suffix(".png").name).unlink()
    (path,) = (folder / "annfiles").iterdir()
    corners = [(x, y, x + 6, y, x + 6, y + 5, x, y + 5) for x in range(0, 90, 2) for y in range(0, 90, 2)][:2000]
    path.write_text("".join(f"{' '.join(map(str, box))} ship 0\n" for box in corners))
    images["augment"] = {"sampling": "images", "image_size": 96}
    images["optim"] |= {"batch_size": 1, "epochs": 1}
    summary = train_model(parse_recipe(images), tmp_path / "run")
    assert summary["data"]["objects"] == 2000 and summary["loss"] > 0
