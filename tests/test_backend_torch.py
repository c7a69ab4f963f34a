"""One answer from every engine; the torch backend's weights, devices, more candidates."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import write_openmmlab
from synthetic import SMALLEST, draw_ships, make_spec, small_network, write_scene

from rtmdet_geo.backends import BACKEND_NAMES, Backend, open_backend
from rtmdet_geo.backends.contract import RowsBackend
from rtmdet_geo.backends.pytorch import TorchBackend
from rtmdet_geo.catalog import find_model, known_spec
from rtmdet_geo.checkpoints import CHECKPOINTS
from rtmdet_geo.detect import detect_scene
from rtmdet_geo.errors import (
    BatchHalvedWarning,
    ConfigError,
    DeviceMemoryError,
    MissingDependencyError,
    ModelFileError,
    SaturatedTileWarning,
    WeightsError,
)
from rtmdet_geo.export import export_model, make_check_tiles
from rtmdet_geo.models import get_classifier, get_model
from rtmdet_geo.models.devices import find_device
from rtmdet_geo.models.identify import load_network
from rtmdet_geo.models.weights import save_weights
from rtmdet_geo.structures import Detections

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ("rotated", "horizontal", "mask")
#: Engines that are compared with onnxruntime.
OTHERS = [
    "torch",
    pytest.param(
        "openvino",
        marks=pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed"),
    ),
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Callable[..., tuple[RowsBackend, RowsBackend]]:
    """Return onnxruntime and another engine (torch) with the same two-class network, by kind."""
    folder = tmp_path_factory.mktemp("pair")
    opened: dict[tuple[str, str], RowsBackend] = {}

    def of(kind: str, other: str = "torch") -> tuple[RowsBackend, RowsBackend]:
        if not (folder / f"{kind}.onnx").exists():
            network = small_network(kind, num_classes=2)
            spec = make_spec(kind=kind, architecture=SMALLEST[kind], classes=("ship", "plane"), tile_size=128)
            save_weights(network, folder / f"{kind}.safetensors", spec, half=False)
            export_model(network, folder / f"{kind}.onnx", spec=spec, verify=False)
        for name in ("onnxruntime", other):
            if (kind, name) not in opened:
                file = folder / f"{kind}{'.safetensors' if name == 'torch' else '.onnx'}"
                opened[kind, name] = open_backend(file, name=name, threads=1)
        return opened[kind, "onnxruntime"], opened[kind, other]

    return of


def assert_same(one: Detections, other: Detections) -> None:
    """Every detection of one has its partner in the other: the README's tolerances."""
    assert len(one) == len(other) > 10 and one.kind == other.kind
    distance = np.abs(one.boxes[:, None, :4] - other.boxes[None, :, :4]).max(axis=2)
    turn = np.abs(one.boxes[:, None, 4] - other.boxes[None, :, 4])
    distance += np.minimum(turn, np.abs(np.pi - turn))
    distance[one.labels[:, None] != other.labels[None]] = np.inf
    if one.masks is not None:
        distance[(one.masks.priors[:, None] != other.masks.priors[None]).any(axis=2)] = np.inf
    partner = distance.argmin(axis=1)
    assert len(set(partner)) == len(one) and distance.min(axis=1).max() < 0.05
    np.testing.assert_allclose(one.scores, other.scores[partner], atol=1e-3)
    if one.masks is not None:
        np.testing.assert_allclose(one.masks.kernels, other.masks.kernels[partner], atol=1e-3)
        np.testing.assert_allclose(one.masks.views[0].features, other.masks.views[0].features, atol=1e-3)


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_same_detections_as_onnxruntime(pair, kind, multi_label, other):
    tiles = np.ascontiguousarray(make_check_tiles(3, 3, 160, seed=1)[:, :, :128])
    engines = pair(kind, other)
    assert [engine.name for engine in engines] == ["onnxruntime", other]
    assert engines[0].spec.classes == ("ship", "plane")
    found = [engine.predict(tiles, score_threshold=0.05, multi_label=multi_label) for engine in engines]
    for one, another in zip(*found, strict=True):
        assert_same(one, another)
    if multi_label:
        alone = engines[1].predict(tiles, score_threshold=0.05)
        assert any(len(one) < len(many) for one, many in zip(alone, found[1], strict=True))


@pytest.mark.parametrize("other", OTHERS)
def test_batches_lose_nothing(pair, other):
    """Eight tiles at once give what each gives alone."""
    tiles = make_check_tiles(8, 3, 96, seed=4)
    for kind in KINDS:
        engine = pair(kind, other)[1]
        together = engine.predict(tiles, score_threshold=0.05)
        for index, one in enumerate(together):
            assert_same(one, engine.predict(tiles[index : index + 1], score_threshold=0.05)[0])


@pytest.mark.parametrize("other", OTHERS)
def test_protocol(pair, other):
    engines = pair("rotated", other)
    for engine in engines:
        assert isinstance(engine, Backend) and engine.name in BACKEND_NAMES and engine.fixed_tile_size is None
    with pytest.raises(ConfigError, match="multiples of 32"):
        engines[1].predict(np.zeros((1, 3, 60, 64), np.uint8), score_threshold=0.3)


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_limited_as_in_files_and_counted_alike(pair, kind, other):
    """4096 + 1024 + 256 priors of two classes: the finest level is cut for every kind."""
    tiles = make_check_tiles(1, 3, 512, seed=1)
    counts = []
    for engine in pair(kind, other):
        before = engine.num_saturated
        with pytest.warns(SaturatedTileWarning, match="1 of 1 images"):
            engine.predict(tiles, score_threshold=0.05, multi_label=True)
        engine.predict(tiles, score_threshold=0.9999, multi_label=True)
        counts.append(engine.num_saturated - before)
    assert counts == [1, 1]
    shapes = [engine.raw(tiles, multi_label=True)[0].shape for engine in pair(kind, other)]
    assert shapes[0] == shapes[1]


def test_more_candidates(pair):
    weights = pair("horizontal")[1].path
    tiles = make_check_tiles(1, 3, 512, seed=1)
    many = open_backend(weights, candidates=30_000, threads=1)
    assert many.raw(tiles)[0].shape == (1, 2 * (64 * 64 + 32 * 32 + 16 * 16), 5)
    every = many.predict(tiles, score_threshold=0.05, multi_label=True)  # no warning: nothing is cut off
    assert many.num_saturated == 0 and len(every[0]) > 3840
    few = TorchBackend(weights, candidates=7, threads=1)
    assert few.raw(tiles)[0].shape == (1, 21, 5)
    with pytest.warns(SaturatedTileWarning):
        few.predict(tiles, score_threshold=0.05)
    for arguments in ({"candidates": 0}, {"threads": 0}):
        with pytest.raises(ConfigError, match="at least 1"):
            TorchBackend(weights, **arguments)


def test_one_label_a_prior_ranks_priors(pair):
    """8 x 8 + 4 x 4 + 2 x 2 priors: one row each, with its best class."""
    tiles = make_check_tiles(1, 3, 64, seed=1)
    engine = pair("rotated")[1]
    pairs, priors = (engine.raw(tiles, multi_label=value) for value in (True, False))
    assert pairs[0].shape == (1, 168, 5) and priors[0].shape == (1, 84, 5)
    assert len(np.unique(priors[0][0], axis=0)) == 84
    assert priors[1].max() == pairs[1].max()


@pytest.mark.parametrize("other", OTHERS)
def test_whole_scene(pair, tmp_path, other):
    scene = write_scene(tmp_path / "scene.tif", draw_ships(256, 200))
    results = [
        detect_scene(scene, model=engine.path, backend=engine.name, score_threshold=0.5)
        for engine in pair("rotated", other)
    ]
    assert [result.attrs["summary"]["parameters"]["backend"] for result in results] == ["onnxruntime", other]
    one, other = (result.sort_values("score") for result in results)
    assert abs(len(one) - len(other)) <= 2 and len(one) > 50  # overlaps next to the threshold of NMS
    np.testing.assert_allclose(one["score"][-30:], other["score"][-30:], atol=1e-3)


# ---------------------------------------------------------------- engines and devices


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("model", ["sen2ships_r", "banepa_ins"])
def test_bundled_models(model, other):
    """Every candidate, boxes and what masks are made of."""
    engines = [open_backend(model, name=name, threads=1) for name in ("auto", other)]
    assert [engine.name for engine in engines] == ["onnxruntime", other]
    tiles = make_check_tiles(1, len(engines[0].spec.bands), 256, seed=0)
    assert_same(*(engine.predict(tiles, score_threshold=0.02)[0] for engine in engines))


def test_engine_and_file_must_fit(pair):
    by_file, by_weights = pair("rotated")
    with pytest.raises(ConfigError, match="torch runs weights"):
        open_backend(by_file.path, name="torch")
    for name in ("onnxruntime", "openvino"):
        with pytest.raises(ConfigError, match=f"not {name}; leave the backend out"):
            open_backend(by_weights.path, name=name)


def test_classifier_is_refused(tmp_path):
    spec = make_spec(kind="classification", architecture="cspnext_test", classes=("a", "b"))
    save_weights(get_classifier("cspnext_test", num_classes=2), tmp_path / "c.safetensors", spec)
    with pytest.raises(ModelFileError, match=r"c\.safetensors.*rtmdet-geo classify"):
        open_backend(tmp_path / "c.safetensors")


def test_missing_torch_names_the_extra(pair, monkeypatch):
    path = pair("rotated")[1].path
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'rtmdet-geo\[train\]'"):
        open_backend(path)


def test_devices(pair, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("auto") == find_device("cpu") == torch.device("cpu")
    for name in ("cuda", "cuda:0", "tpu"):
        with pytest.raises(ConfigError, match=f"'{name}' is not here; choose one of auto, cpu$"):
            open_backend(pair("rotated")[1].path, device=name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_device("auto") == torch.device("cuda") and find_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ConfigError, match=r"cuda, cuda:0, cuda:1$"):
        find_device("cuda:2")


def test_memory_of_the_device(pair, monkeypatch):
    engine = TorchBackend(pair("rotated")[1].path)

    graphs, calls = engine._graphs, []

    def room_for_two(images):
        calls.append(len(images))
        if len(images) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return graphs[False](images)

    def exhausted(images):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    images = make_check_tiles(7, 3, 96, seed=0)
    expected = engine.raw(images, multi_label=False)
    monkeypatch.setattr(engine, "_graphs", {False: room_for_two})
    with pytest.warns(BatchHalvedWarning, match=r"cpu is too small for 7 tiles of 96 x 96 px") as warned:
        found = engine.raw(images, multi_label=False)
    assert len(warned) == 1 and calls == [7, 4, 2, 2, 2, 1]
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        engine.raw(images, multi_label=False)
    monkeypatch.setattr(engine, "_graphs", dict.fromkeys((False, True), exhausted))
    with pytest.raises(DeviceMemoryError, match=r"cpu is too small for 1 tiles of 64 x 96 px.*tile_size$"):
        engine.predict(np.zeros((2, 3, 64, 96), np.uint8), score_threshold=0.3)


def test_threads_are_given_back(pair):
    engine = TorchBackend(pair("rotated")[1].path, threads=2)
    seen = []
    engine._graphs[False].register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    engine.predict(np.zeros((1, 3, 64, 64), np.uint8), score_threshold=0.3)
    assert seen == [2] and torch.get_num_threads() == 1


# ---------------------------------------------------------------- weights that do not say what they are for


@pytest.fixture
def published(tmp_path, monkeypatch) -> str:
    """Name of published weights that lie in the cache already."""
    monkeypatch.setenv("RTMDET_GEO_CACHE", str(tmp_path / "cache"))
    file = write_openmmlab(tmp_path / "made.pth", small_network("horizontal", num_classes=80).state_dict())
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    original = CHECKPOINTS["rtmdet_tiny_coco"]
    url = f"https://example.org/test-{digest}.pth"
    entry = replace(original, name="rtmdet_test_coco", variant="rtmdet_test", url=url, sha256="")
    monkeypatch.setitem(CHECKPOINTS, "rtmdet_test_coco", entry)
    entry.path.parent.mkdir(parents=True)
    file.rename(entry.path)
    return "rtmdet_test_coco"


def test_published_weights_by_name_by_path_and_elsewhere(published, tmp_path):
    entry = CHECKPOINTS[published]
    elsewhere = tmp_path / entry.file_name
    elsewhere.write_bytes(entry.path.read_bytes())
    assert find_model(published) == entry.path and known_spec(entry.path) == entry.spec()
    raw = []
    for weights in (elsewhere, find_model(published), find_model(published), published):
        engine = open_backend(weights, threads=1)
        assert engine.name == "torch" and engine.spec.bands == ("blue", "green", "red")
        assert engine.spec.model_copy(update={"weights_sha256": ""}) == entry.spec()
        raw.append(engine.raw(make_check_tiles(1, 3, 64, seed=0))[1])
    assert find_model(published) == entry.converted_path
    for other in raw[1:]:
        np.testing.assert_array_equal(raw[0], other)


@pytest.mark.parametrize(
    "architecture,kind,bands",
    [
        ("rtmdet_test", "horizontal", ("blue", "green", "red")),
        ("rtmdet_r_nano", "rotated", ("blue", "green", "red")),
        ("rtmdet_ins_test", "mask", ("blue", "green", "red")),
        ("cspnext_test", "classification", ("red", "green", "blue")),
    ],
)
def test_network_of_a_foreign_checkpoint(tmp_path, caplog, architecture, kind, bands):
    build = get_classifier if kind == "classification" else get_model
    original = build(architecture, num_classes=2)
    path = write_openmmlab(tmp_path / "mine.pth", original.state_dict(), classes=("tree", "house"))
    network, spec = load_network(path)
    assert (spec.name, spec.architecture, spec.kind, spec.classes) == ("mine", architecture, kind, ("tree", "house"))
    assert spec.bands == bands and spec.licence == spec.training_data == "" and not spec.metrics
    assert dict(zip(spec.bands, spec.mean, strict=True)) == {"red": 123.675, "green": 116.28, "blue": 103.53}
    assert not network.training and len(spec.weights_sha256) == 64
    for name, value in network.state_dict().items():
        assert torch.equal(value, original.state_dict()[name]), name
    assert f"taken for {architecture} of classes tree, house" in caplog.text


def test_foreign_checkpoint_runs_and_is_exported(tmp_path, caplog):
    network = small_network("rotated", num_classes=3)
    path = write_openmmlab(tmp_path / "mine.pth", network.state_dict())
    engine = open_backend(find_model(path), threads=1)
    assert engine.spec.classes == ("class 0", "class 1", "class 2")
    tiles = make_check_tiles(1, 3, 96, seed=0)
    stored = export_model(path, tmp_path / "mine.onnx", score_threshold=0.45, tile_size=96)
    assert stored.score_threshold == 0.45 and stored.weights_sha256 == engine.spec.weights_sha256
    by_file = open_backend(tmp_path / "mine.onnx", threads=1)
    assert_same(*(one.predict(tiles, score_threshold=0.2)[0] for one in (engine, by_file)))
    with pytest.raises(ConfigError, match=r"must be in \[0, 1\]"):
        export_model(path, tmp_path / "other.onnx", score_threshold=1.5)


@pytest.mark.parametrize(
    "state,words",
    [
        ({"layer.weight": torch.zeros(3, 3)}, "holds no RTMDet"),
        (
            {**get_model("rtmdet_test").state_dict(), "backbone.stem.0.conv.weight": torch.zeros(5, 3, 3, 3)},
            "no RTMDet",
        ),
        (get_model("rtmdet_test", in_channels=4).state_dict(), "takes 4 channels"),
        ({**get_model("rtmdet_test").state_dict(), "neck.extra": torch.zeros(1)}, "1 unexpected: neck.extra"),
    ],
)
def test_foreign_checkpoints_that_fit_nothing(tmp_path, state, words):
    path = write_openmmlab(tmp_path / "theirs.pth", state)
    with pytest.raises(WeightsError, match=words) as caught:
        open_backend(path)
    assert "theirs.pth" in str(caught.value)


def test_missing_weights():
    with pytest.raises((WeightsError, ModelFileError), match="nowhere"):
        open_backend(Path("nowhere.safetensors"))
