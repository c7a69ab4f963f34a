"""Recipes that start from other weights: parts, other classes, other bands; by request, and said in one line."""

from __future__ import annotations

import csv
import hashlib
import logging
from dataclasses import replace

import pytest
import torch
from checkpoint_files import write_openmmlab

from rtmdet_geo.checkpoints import CHECKPOINTS
from rtmdet_geo.config import load_recipe, parse_recipe
from rtmdet_geo.errors import Cancelled, ConfigError, DownloadError, UnknownModelError, WeightsError
from rtmdet_geo.models import cspnext_test, rtmdet_r_test, rtmdet_test
from rtmdet_geo.models.transfer import FIRST_CONVOLUTION
from rtmdet_geo.models.weights import load_weights
from rtmdet_geo.training.loop import train_model

pytestmark = pytest.mark.usefixtures("one_thread")
BGR, FOUR = ["blue", "green", "red"], ["red", "green", "blue", "nir"]


def spread_state(builder, **arguments):
    """Weights unlike any initialisation: all kernels of the first convolution differ by band."""
    torch.manual_seed(7)
    model = builder(**arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model.state_dict()


@pytest.fixture
def still_values(recipe_values):
    """A recipe of one iteration that moves nothing but batch-norm statistics; nothing is left out, nothing mined."""
    recipe_values["optim"] |= {"iterations": 1, "warmup_iterations": 0, "lr": 1e-12, "weight_decay": 0.0}
    recipe_values["loop"] = {"checkpoint_interval": 1, "log_interval": 1}
    recipe_values["data"] |= {"fold": None}
    return recipe_values


def train(values, run, caplog):
    """Train by a recipe; return what became of the weights, the spec, and the warnings."""
    recipe = parse_recipe(values)
    caplog.clear()
    train_model(recipe, run)
    assert load_recipe(run / "recipe.yaml") == recipe
    state, spec = load_weights(run / "model.safetensors")
    return state, spec, [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def is_close(one, other):
    return torch.allclose(one, other, atol=1e-6)


def test_backbone_of_imagenet_into_four_bands(still_values, tmp_path, caplog):
    """A file of the backbone alone, as pretraining leaves it: kernels by name, near infrared gets their mean."""
    source = spread_state(cspnext_test, num_classes=7)
    bare = {name.removeprefix("backbone."): value for name, value in source.items() if name.startswith("backbone.")}
    path = write_openmmlab(tmp_path / "cspnext_in1k.pth", bare)
    still_values["model"] |= {"weights": str(path), "weights_parts": ["backbone"]}
    with pytest.raises(WeightsError, match=r"1 wrongly shaped: backbone.stem.0.conv.weight \(4, 3, 3, 3\) for \(4, 4,"):
        train_model(parse_recipe(still_values), tmp_path / "refused")
    still_values["model"] |= {"transfer": True, "weights_bands": ["red", "green", "blue"]}
    state, spec, warnings = train(still_values, tmp_path / "run", caplog)
    (line,) = warnings
    assert f"other bands, fitted: {FIRST_CONVOLUTION}; not asked for, re-initialised: neck, bbox_head" in line
    kernels = source[FIRST_CONVOLUTION]
    expected = torch.cat([kernels, kernels.mean(dim=1, keepdim=True)], dim=1) * 0.75
    assert is_close(state[FIRST_CONVOLUTION], expected)
    name = "backbone.stage4.0.conv.weight"
    assert is_close(state[name], source[name])
    assert spec.training_data == f"started from {path} (backbone)"


def test_other_classes(still_values, tmp_path, caplog):
    path = write_openmmlab(
        tmp_path / "ships.pth", spread_state(rtmdet_r_test, num_classes=3, in_channels=4), classes=("a", "b", "c")
    )
    still_values["model"] |= {"weights": str(path), "weights_bands": FOUR, "classes": ["ship", "boat"]}
    with pytest.raises(WeightsError, match=r"6 wrongly shaped: bbox_head.rtm_cls.0.weight \(3, .*transfer=True"):
        train_model(parse_recipe(still_values), tmp_path / "refused")
    still_values["model"]["transfer"] = True
    state, _, (line,) = train(still_values, tmp_path / "run", caplog)
    names = [f"bbox_head.rtm_cls.{level}.{kind}" for level in range(3) for kind in ("weight", "bias")]
    assert f"other classes, re-initialised: {', '.join(names)}" in line and "bands" not in line
    assert state["bbox_head.rtm_cls.0.weight"].shape[0] == 2
    source = spread_state(rtmdet_r_test, num_classes=3, in_channels=4)
    assert is_close(state["bbox_head.rtm_reg.0.weight"], source["bbox_head.rtm_reg.0.weight"])
    fresh = rtmdet_r_test(num_classes=2).state_dict()["bbox_head.rtm_cls.0.bias"]
    assert is_close(state["bbox_head.rtm_cls.0.bias"], fresh)


def test_every_fault_is_listed_and_transfer_hides_none(still_values, tmp_path):
    state = dict(spread_state(rtmdet_r_test, num_classes=1, in_channels=4))
    del state["neck.out_convs.0.bn.weight"]
    state["neck.surplus"] = torch.ones(1)
    state["backbone.stem.1.conv.weight"] = torch.ones(2, 2)
    path = write_openmmlab(tmp_path / "a.pth", state)
    for transfer in (False, True):
        still_values["model"] |= {"weights": str(path), "transfer": transfer}
        with pytest.raises(WeightsError) as caught:
            train_model(parse_recipe(still_values), tmp_path / "run", overwrite=True)
        for fault in ("1 missing: neck.out_convs.0.bn.weight", "1 unexpected: neck.surplus", "1 wrongly shaped: back"):
            assert fault in str(caught.value)
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_published_weights_by_name(still_values, tmp_path, caplog, monkeypatch):
    """From the cache, without network: bands by name, the head anew, what they saw goes into the card."""
    monkeypatch.setenv("RTMDET_GEO_CACHE", str(tmp_path / "cache"))
    source = spread_state(rtmdet_test)
    file = write_openmmlab(tmp_path / "a.pth", source)
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    entry = replace(
        CHECKPOINTS["rtmdet_tiny_coco"],
        name="rtmdet_test_coco",
        variant="rtmdet_test",
        url="http://127.0.0.1:9/test.pth",
        sha256=sha256,
    )
    monkeypatch.setitem(CHECKPOINTS, "rtmdet_test_coco", entry)
    still_values["model"] |= {"weights": "rtmdet_test_coco", "weights_parts": ["backbone", "neck"]}
    with pytest.raises(ConfigError, match="is for bands blue, green, red, the network for red, green, blue, nir"):
        parse_recipe(still_values)
    still_values["model"]["transfer"] = True
    monkeypatch.setattr("rtmdet_geo.cache.FIRST_PAUSE_S", 0.0)
    with pytest.raises(DownloadError, match="put it at"):
        train_model(parse_recipe(still_values), tmp_path / "offline")
    file.rename(entry.path)
    state, spec, (line,) = train(still_values, tmp_path / "run", caplog)
    assert line.startswith("rtmdet_test_coco: ") and "re-initialised: bbox_head" in line
    assert is_close(state[FIRST_CONVOLUTION][:, :3], source[FIRST_CONVOLUTION].flip(1) * 0.75)
    assert "started from rtmdet_test_coco (backbone, neck), trained on COCO 2017 train (COCO: " in spec.training_data
    assert entry.converted_path.is_file()


def test_resuming_needs_the_weights_no_more(recipe_values, tmp_path):
    """An unbroken run, and one that is stopped and goes on after the file is gone: the same losses."""
    path = tmp_path / "start.pth"
    recipe_values["model"] |= {"weights": str(path), "transfer": True, "weights_bands": BGR}
    recipe_values["optim"]["iterations"] = 4
    recipe = parse_recipe(recipe_values)
    for name in ("whole", "broken"):
        write_openmmlab(path, spread_state(rtmdet_r_test, num_classes=3))
        calls = iter(range(100))
        if name == "whole":
            train_model(recipe, tmp_path / name)
            continue
        with pytest.raises(Cancelled):
            train_model(recipe, tmp_path / name, cancelled=lambda: next(calls) == 1)  # noqa: B023
        path.unlink()
        train_model(recipe, tmp_path / name, resume=True)
    logs = [(tmp_path / name / "log.csv").read_text().splitlines() for name in ("whole", "broken")]
    whole, broken = ([row["loss"] for row in csv.DictReader(lines)] for lines in logs)
    assert whole == broken and len(whole) == 4


def test_names_that_are_nearly_right(still_values, tmp_path):
    still_values["model"]["weights"] = "sen2ship_r"
    with pytest.raises(UnknownModelError, match="did you mean 'sen2ships_r'"):
        train_model(parse_recipe(still_values), tmp_path / "run")
    still_values["model"]["weights"] = "rtmdet_r_tiny"
    with pytest.raises(UnknownModelError, match="did you mean 'rtmdet_r_tiny_dota'"):
        train_model(parse_recipe(still_values), tmp_path / "run")
    still_values["model"]["weights"] = str(tmp_path / "mine.onnx")
    with pytest.raises(WeightsError, match=r"is a model file; weights are in \.safetensors files"):
        train_model(parse_recipe(still_values), tmp_path / "run")
