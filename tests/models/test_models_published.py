"""Published weights end to end: a server of this machine, the cache, conversion, the networks."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import recipes
import torch
from checkpoint_files import write_openmmlab
from click.testing import CliRunner
from fileserver import FileServer

from rtmdet_geo import cache
from rtmdet_geo.catalog import read_spec
from rtmdet_geo.checkpoints import CHECKPOINTS
from rtmdet_geo.cli import cli
from rtmdet_geo.errors import ChecksumError, DownloadError, OutputError, WeightsError
from rtmdet_geo.models import (
    cspnext_tiny,
    rtmdet_ins_tiny,
    rtmdet_nano,
    rtmdet_r_test,
    rtmdet_r_tiny,
    rtmdet_test,
    rtmdet_tiny,
)
from rtmdet_geo.models import weights as loading
from rtmdet_geo.models.weights import build_from_weights, load_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def served(monkeypatch, tmp_path) -> Iterator[FileServer]:
    """A server without files, an empty cache, and no patience."""
    monkeypatch.setenv("RTMDET_GEO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "FIRST_PAUSE_S", 0.01)
    with FileServer({}).running() as server:
        yield server


def publish(monkeypatch, server: FileServer, name: str, file: Path, **changes) -> None:
    """Put a file where the catalogue says that published weights are."""
    content = file.read_bytes()
    digest = hashlib.sha256(content).hexdigest()[:8]
    server.files[f"/{name}-{digest}.pth"] = content
    original = CHECKPOINTS.get(name, CHECKPOINTS["rtmdet_tiny_coco"])
    url = f"{server.url}/{name}-{digest}.pth"
    monkeypatch.setitem(CHECKPOINTS, name, replace(original, name=name, url=url, sha256="", **changes))


def oracle_state(model: str, folder: Path) -> dict[str, torch.Tensor]:
    """The oracle's recipe of a published model's weights, with every name that the reference's state_dict has."""
    values = recipes.weights(model, str(folder))
    keys = json.loads((folder / f"keys_{model}.json").read_text())["keys"]
    return {
        name: torch.from_numpy(values[name]) if dtype == "float32" else torch.zeros(shape, dtype=torch.int64)
        for name, shape, dtype in keys
    }


@pytest.mark.parametrize(
    ("name", "builder", "reference"),
    [
        ("rtmdet_tiny_coco", rtmdet_tiny, "rtmdet_tiny"),
        ("rtmdet_ins_tiny_coco", rtmdet_ins_tiny, "rtmdet-ins_tiny"),
        ("rtmdet_r_tiny_dota", rtmdet_r_tiny, "rotated_rtmdet_tiny"),
        ("cspnext_tiny_imagenet", cspnext_tiny, "cspnext_tiny"),
    ],
)
def test_oracle_download_then_load_by_name(monkeypatch, served, tmp_path, oracle_dir, name, builder, reference):
    """Files with the reference's own keys; the connection breaks twice; the network holds the very numbers."""
    state = oracle_state(reference, oracle_dir)
    file = write_openmmlab(tmp_path / "made.pth", state, classes=CHECKPOINTS[name].classes)
    publish(monkeypatch, served, name, file)
    served.faults = ["drop:3000000", "status:503", "long:1000"]
    result = CliRunner().invoke(cli, ["models", "download", name, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["path"] == str(CHECKPOINTS[name].path)
    model = builder(weights=name)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    spec = read_spec(CHECKPOINTS[name].converted_path)
    assert spec.weights_sha256 and spec.model_copy(update={"weights_sha256": ""}) == CHECKPOINTS[name].spec()
    assert {path.suffix for path in CHECKPOINTS[name].path.parent.iterdir()} == {".pth", ".safetensors"}


@pytest.fixture
def small(monkeypatch, served, tmp_path) -> dict[str, torch.Tensor]:
    """Weights of the test size are published as rtmdet_test_coco."""
    state = {name: value.clone() for name, value in rtmdet_test().state_dict().items()}
    file = write_openmmlab(tmp_path / "made.pth", state, classes=CHECKPOINTS["rtmdet_tiny_coco"].classes)
    publish(monkeypatch, served, "rtmdet_test_coco", file, variant="rtmdet_test")
    return state


def assert_loaded(state) -> None:
    for key, value in rtmdet_test(weights="rtmdet_test_coco").state_dict().items():
        assert torch.equal(value, state[key])


def test_converted_once_and_then_used(served, small, monkeypatch):
    entry = CHECKPOINTS["rtmdet_test_coco"]
    assert not entry.is_cached
    assert_loaded(small)
    assert entry.is_cached and len(served.ranges) == 1
    entry.path.unlink()
    served.always = "status:500"
    monkeypatch.setattr(loading, "convert_checkpoint", None)
    assert_loaded(small)
    network, spec = build_from_weights("rtmdet_test_coco")
    assert not network.training and spec.bands == ("blue", "green", "red") and spec.name == "rtmdet_test_coco"


def test_damaged_conversion_is_made_again(served, small, caplog):
    assert_loaded(small)
    converted = CHECKPOINTS["rtmdet_test_coco"].converted_path
    content = bytearray(converted.read_bytes())
    content[-9] ^= 1
    for damaged in (bytes(content), b""):
        converted.write_bytes(damaged)
        assert_loaded(small)
        assert "made again" in caplog.text
    assert len(served.ranges) == 1


def test_the_card_is_the_catalogues_though_the_conversion_is_older(small, monkeypatch):
    """A converted file keeps the spec of the version that wrote it."""
    assert_loaded(small)
    entry = CHECKPOINTS["rtmdet_test_coco"]
    monkeypatch.setitem(CHECKPOINTS, "rtmdet_test_coco", replace(entry, recipe="600 epochs"))
    _, spec = build_from_weights("rtmdet_test_coco")
    assert "600 epochs" in spec.training_data and "600 epochs" not in read_spec(entry.converted_path).training_data
    assert spec.weights_sha256 == read_spec(entry.converted_path).weights_sha256


def test_a_cache_that_cannot_be_written(served, small, monkeypatch):
    """A cache that somebody else filled."""

    def refuse(*_args, **_kwargs):
        raise OutputError("cannot write")

    monkeypatch.setattr(loading, "convert_checkpoint", refuse)
    assert_loaded(small)
    assert not CHECKPOINTS["rtmdet_test_coco"].converted_path.exists()


def test_file_put_there_by_hand(served, small, tmp_path):
    """What the message of a failed download asks for."""
    served.always = "status:404"
    with pytest.raises(DownloadError) as caught:
        assert_loaded(small)
    place = CHECKPOINTS["rtmdet_test_coco"].path
    assert repr(str(place)) in str(caught.value)
    shutil.copy(tmp_path / "made.pth", place)
    assert_loaded(small)


def test_wrong_hash_is_never_loaded(served, small):
    served.always = "wrong"
    with pytest.raises(ChecksumError):
        assert_loaded(small)
    assert not CHECKPOINTS["rtmdet_test_coco"].is_cached


def test_what_cannot_fit_is_refused_before_the_download(served, small):
    with pytest.raises(WeightsError, match="are weights of rtmdet_test, not of rtmdet_r_test; none are published"):
        rtmdet_r_test(weights="rtmdet_test_coco")
    with pytest.raises(WeightsError, match="published for it: rtmdet_tiny_coco"):
        rtmdet_tiny(weights="rtmdet_test_coco")
    with pytest.raises(WeightsError, match=r"has 80 classes, the network 1; transfer=True"):
        rtmdet_test(num_classes=1, in_channels=4, weights="rtmdet_test_coco")
    with pytest.raises(WeightsError, match=r"is for bands blue, green, red, the network for 4 bands; transfer=True"):
        rtmdet_test(in_channels=4, weights="rtmdet_test_coco")
    with pytest.raises(WeightsError, match=r"is for bands blue, green, red, the network for red, green, blue"):
        load_checkpoint(rtmdet_test(), "rtmdet_test_coco", bands=("red", "green", "blue"))
    with pytest.raises(WeightsError, match=r"rtmdet_test, not of rtmdet_nano; none are published for it$"):
        load_checkpoint(rtmdet_nano(), "rtmdet_test_coco", parts=("backbone",))
    assert served.ranges == []


def test_transfer_of_published_weights(small, caplog):
    """Bands are known from the catalogue: blue, green, red there."""
    model = rtmdet_test(num_classes=1)
    with caplog.at_level(logging.WARNING):
        report = load_checkpoint(
            model, "rtmdet_test_coco", transfer=True, bands=("red", "green", "blue"), progress=lambda done, total: None
        )
    first = "backbone.stem.0.conv.weight"
    assert report.adapted == (first,) and len(report.reinitialised) == 6
    assert torch.equal(model.state_dict()[first], small[first].flip(1))
    other = rtmdet_r_test()
    assert load_checkpoint(other, "rtmdet_test_coco", parts=("backbone", "neck")).ignored


def test_published_backbone_without_head(monkeypatch, served, tmp_path):
    """Good for its part, refused as a whole."""
    state = {name: value for name, value in rtmdet_test().state_dict().items() if name.startswith("backbone.")}
    file = write_openmmlab(tmp_path / "made.pth", state)
    publish(monkeypatch, served, "rtmdet_test_coco", file, variant="rtmdet_test")
    with pytest.raises(WeightsError, match="missing: neck"):
        rtmdet_test(weights="rtmdet_test_coco")
    assert len(load_checkpoint(rtmdet_r_test(), "rtmdet_test_coco", parts="backbone").loaded) == len(state)


def test_export_by_name(monkeypatch, served, tmp_path):
    """From published weights to a model file with its card in one command."""
    file = write_openmmlab(tmp_path / "made.pth", rtmdet_r_test().state_dict())
    dota = CHECKPOINTS["rtmdet_r_tiny_dota"].data
    publish(monkeypatch, served, "rtmdet_r_test_dota", file, variant="rtmdet_r_test", data=dota, input_size=64)
    target = tmp_path / "dota.onnx"
    words = ["export", "rtmdet_r_test_dota", "-o", str(target), "--no-verify", "--json"]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 0, result.output
    spec = read_spec(target)
    assert (spec.name, spec.classes, spec.bands) == ("rtmdet_r_test_dota", dota.classes, ("blue", "green", "red"))
    assert "academic purposes only" in spec.limits and spec.licence == "Apache-2.0"


def test_other_class_names_in_the_file_are_told(monkeypatch, served, tmp_path, caplog):
    file = write_openmmlab(tmp_path / "made.pth", rtmdet_test().state_dict(), classes=("x",) * 80)
    publish(monkeypatch, served, "rtmdet_test_coco", file, variant="rtmdet_test")
    rtmdet_test(weights="rtmdet_test_coco")
    assert "names classes ('x', 'x', 'x')" in caplog.text
