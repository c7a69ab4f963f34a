"""Classes of whole images and of the cells of a grid over a scene, against classifiers whose answers are known."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import geopandas
import numpy as np
import pyogrio
import pytest
import recipes
from affine import Affine
from checkpoint_files import write_openmmlab
from classifiers import (
    BIASES,
    SIDE,
    WEIGHTS,
    classifier_spec,
    expected_scores,
    untrained_network,
    write_classifier,
    write_network,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from rasters import write_raster

from rtmdet_geo import classify as pipeline
from rtmdet_geo.backends import classify as engines
from rtmdet_geo.backends import open_backend
from rtmdet_geo.backends.classify import Classifier, open_classifier
from rtmdet_geo.cells import build_cells, cell_batches, count_cells
from rtmdet_geo.classify import Classification, classify_file, classify_image, classify_scene, describe_cells
from rtmdet_geo.errors import (
    BandError,
    BandWarning,
    Cancelled,
    ConfigError,
    MissingDependencyError,
    ModelFileError,
    NodataWarning,
    NotGeoreferencedWarning,
    OutputError,
    RasterError,
    ResolutionWarning,
    UnknownModelError,
    WeightsError,
)
from rtmdet_geo.preprocess import crop_centre, resize_bicubic
from rtmdet_geo.structures import StretchSpec

TRANSFORM = Affine(10.0, 0.0, 500_000.0, 0.0, -10.0, 4_500_000.0)
DARK, BRIGHT = 40, 160
FILE_ENGINES = [
    "onnxruntime",
    pytest.param(
        "openvino",
        marks=pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed"),
    ),
]


@pytest.fixture(scope="module")
def greys(tmp_path_factory) -> Path:
    """The model file of dark and bright."""
    return write_classifier(tmp_path_factory.mktemp("model") / "greys.onnx")


def write_scene(path: Path, grey: np.ndarray, *, crs: str | None = "EPSG:32630", **options) -> Path:
    """Write (h, w) or (3, h, w) uint8 as red, green, blue of 10 m pixels."""
    values = np.broadcast_to(grey, (3, *grey.shape[-2:])) if grey.ndim == 2 else grey
    if crs is not None:
        options.setdefault("transform", TRANSFORM)
    return write_raster(path, values, crs=crs, bounds=None, colours=("red", "green", "blue"), **options)


def halves(height: int = 100, width: int = 128, split: int = 64) -> np.ndarray:
    """Return (height, width) uint8, dark left of ``split``, bright right of it."""
    grey = np.full((height, width), DARK, np.uint8)
    grey[:, split:] = BRIGHT
    return grey


# ---------------------------------------------------------------- networks


@pytest.mark.usefixtures("one_thread")
def test_oracle_probabilities(oracle_dir):
    """The graph's probabilities are in the ratios that the golden logits say: ln(p / q) = a - b, image by image."""
    import torch

    from rtmdet_geo.models import get_classifier
    from rtmdet_geo.models.classifier import ClassificationGraph

    files = sorted(oracle_dir.glob("forward_cspnext_*.json"), key=lambda file: "tiny" not in file.name)
    assert files
    for file in [file for file in files if "tiny" in file.name] or files[:1]:
        golden = json.loads(file.read_text())
        summary = golden["outputs"]["logits"]
        classes = summary["shape"][1]
        network = get_classifier(golden["model"], num_classes=classes).eval()
        state = {key: torch.from_numpy(value) for key, value in recipes.weights(golden["model"], oracle_dir).items()}
        network.load_state_dict(state, strict=False)
        images = torch.from_numpy(recipes.realise(golden["input"]))
        with torch.inference_mode():
            scores = ClassificationGraph(network, (0.0,) * 3, (1.0,) * 3)(images).double().numpy()
            off = ClassificationGraph(network, (0.1,) * 3, (1.0,) * 3)(images).double().numpy()
        np.testing.assert_allclose(scores.sum(axis=1), 1, atol=1e-5)
        samples = [(*divmod(int(index), classes), value) for index, value in summary["samples"]]
        pairs = [(a, b) for a in samples for b in samples if a[0] == b[0] and a[1] < b[1]]
        assert pairs
        tolerance = 2e-4 * summary["absmax"]
        for (image, one, a), (_, other, b) in pairs:
            assert math.log(scores[image, one] / scores[image, other]) == pytest.approx(a - b, abs=tolerance)
        assert any(
            abs(math.log(off[image, one] / off[image, other]) - (a - b)) > tolerance
            for (image, one, a), (_, other, b) in pairs
        ), "another mean must be seen"
        for image in range(len(scores)):  # the golden sample with the largest logit is the most probable of the samples
            mine = [sample for sample in samples if sample[0] == image]
            best = max(mine, key=lambda sample: sample[2])
            assert max(scores[image, label] for _, label, _ in mine) == scores[image, best[1]]


@pytest.mark.usefixtures("one_thread")
def test_graph_normalises_uint8():
    import torch

    from rtmdet_geo.models.classifier import ClassificationGraph

    network = untrained_network(4)
    mean, std = (10.0, 120.0, 30.0), (20.0, 60.0, 90.0)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 64, 64), dtype=np.uint8)
    normalised = (pixels - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    graph = ClassificationGraph(network, mean, std)
    with torch.inference_mode():
        expected = network(torch.from_numpy(normalised.astype(np.float32))).softmax(1).numpy()
    np.testing.assert_allclose(graph.predict(pixels), expected, atol=1e-5)
    assert np.abs(graph.predict(pixels[:, ::-1]) - expected).max() > 1e-3  # the channel order matters


# ---------------------------------------------------------------- opening classifiers


@pytest.mark.parametrize("backend", FILE_ENGINES)
def test_model_file_gives_known_probabilities(greys, backend):
    classifier = open_classifier(greys, backend=backend, threads=1)
    assert isinstance(classifier, Classifier)
    assert (classifier.name, classifier.path, classifier.spec) == (backend, greys, classifier_spec())
    images = np.random.default_rng(0).integers(0, 256, (5, 3, SIDE, SIDE), dtype=np.uint8)
    scores = classifier.predict(images)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected_scores(images), atol=1e-6)


@pytest.mark.usefixtures("one_thread")
def test_weights_give_the_network_s_probabilities(tmp_path):
    from rtmdet_geo.models.classifier import ClassificationGraph
    from rtmdet_geo.models.weights import build_from_weights

    path = write_network(tmp_path / "greys.safetensors")
    classifier = open_classifier(path, device="cpu")
    assert isinstance(classifier, Classifier)
    assert (classifier.name, classifier.path, classifier.spec.name) == ("torch", path, "greys")
    network, spec = build_from_weights(path)
    images = np.random.default_rng(0).integers(0, 256, (3, 3, SIDE, SIDE), dtype=np.uint8)
    expected = ClassificationGraph(network, spec.mean, spec.std).predict(images)
    assert expected.std() > 0.01
    np.testing.assert_allclose(classifier.predict(images), expected, atol=1e-5)


def test_published_weights_are_opened_by_name(monkeypatch, tmp_path):
    """From the cache, without network."""
    from rtmdet_geo.checkpoints import CHECKPOINTS

    monkeypatch.setenv("RTMDET_GEO_CACHE", str(tmp_path))
    entry = CHECKPOINTS["cspnext_tiny_imagenet"]
    small = dataclasses.replace(entry, variant="cspnext_test")
    monkeypatch.setitem(CHECKPOINTS, entry.name, small)
    small.converted_path.parent.mkdir(parents=True)
    write_network(small.converted_path, small.spec())
    classifier = open_classifier("cspnext_tiny_imagenet", threads=1)
    assert classifier.path == small.converted_path
    assert (classifier.spec.bands, classifier.spec.tile_size) == (("red", "green", "blue"), 224)
    photo = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    found = classify_image(classifier, photo, top_k=3)
    assert len(found) == 3 and found.class_names[0] == small.spec().classes[found.labels[0]]


@pytest.mark.usefixtures("one_thread")
def test_another_program_s_checkpoint(tmp_path, caplog):
    """Channels, statistics and side of the published recipes are assumed, which is said."""
    path = write_openmmlab(tmp_path / "mine.pth", untrained_network(2).state_dict(), classes=("dark", "bright"))
    classifier = open_classifier(path)
    assert (classifier.spec.classes, classifier.spec.tile_size) == (("dark", "bright"), 224)
    assert "does not say what it is for" in caplog.text
    images = np.random.default_rng(0).integers(0, 256, (1, 3, 224, 224), dtype=np.uint8)
    assert classifier.predict(images).shape == (1, 2)


@pytest.mark.parametrize(
    ("name", "error", "part"),
    [
        ("sen2ships_r", ModelFileError, "rtmdet-geo detect"),
        ("rtmdet_tiny_coco", ModelFileError, "rtmdet-geo detect"),
        ("cspnext_tiny", UnknownModelError, "did you mean 'cspnext_tiny_imagenet'"),
        ("cspnext_tiny_imagenett", UnknownModelError, "did you mean .*cspnext_tiny_imagenet"),
        ("nosuch.onnx", ModelFileError, "nosuch.onnx.* not there"),
        ("folder/nosuch", ModelFileError, "not there"),
        ("nosuch.safetensors", ModelFileError, "not there"),
    ],
)
def test_what_is_no_classifier_is_refused(monkeypatch, tmp_path, name, error, part):
    """Detectors point to detect, before anything is downloaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RTMDET_GEO_CACHE", str(tmp_path / "cache"))
    with pytest.raises(error, match=part):
        open_classifier(name)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"output": "probabilities"}, "it lacks output 'scores'"),
        ({"weights": [[0.1] * 3] * 3, "biases": [0.0] * 3}, r"'scores' has the shape .*wants \(N, 2\)"),
        ({"shape": ("N", 3, 64, 64)}, r"'images' has the shape .*wants \(N, 3, 32, 32\)"),
        ({"shape": ("N", 4, "H", "W"), "weights": [[0.1] * 4] * 2}, "4 channels.* 3 bands"),
        ({"has_spec": False}, "model_spec"),
        ({"spec": classifier_spec(kind="rotated")}, "rtmdet-geo detect"),
    ],
)
@pytest.mark.parametrize("backend", FILE_ENGINES)
def test_model_file_that_breaks_the_contract(tmp_path, backend, changes, part):
    path = write_classifier(tmp_path / "broken.onnx", **changes)
    with pytest.raises(ModelFileError, match=part):
        open_classifier(path, backend=backend)


@pytest.mark.parametrize(
    "changes", [{"has_softmax": False}, {"biases": (math.nan, 0.0)}], ids=["logits", "not a number"]
)
@pytest.mark.parametrize("backend", FILE_ENGINES)
def test_scores_that_are_no_probabilities(tmp_path, backend, changes):
    classifier = open_classifier(write_classifier(tmp_path / "broken.onnx", **changes), backend=backend)
    with pytest.raises(ModelFileError, match="no probabilities"):
        classifier.predict(np.zeros((1, 3, SIDE, SIDE), np.uint8))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("backend", FILE_ENGINES)
@pytest.mark.parametrize("sizes", [{}, {"tile_size": SIDE}, {"tile_size": SIDE, "batch_size": 3}])
def test_exported_classifier(tmp_path, sizes, backend):
    """What export writes gives what the weights give, eight images at once what each gives alone."""
    from rtmdet_geo.export import export_model

    weights = write_network(tmp_path / "greys.safetensors")
    export_model(weights, tmp_path / "greys.onnx", verify=False, **sizes)
    images = np.random.default_rng(0).integers(0, 256, (8, 3, SIDE, SIDE), dtype=np.uint8)
    one = open_classifier(weights, backend="torch", threads=1).predict(images)
    by_file = open_classifier(tmp_path / "greys.onnx", backend=backend, threads=1)
    assert one.std() > 0.01
    np.testing.assert_allclose(one, by_file.predict(images), atol=1e-4)
    alone = np.concatenate([by_file.predict(image[None]) for image in images])
    np.testing.assert_allclose(one, alone, atol=1e-4)


def test_engine_and_file_must_fit(greys, tmp_path, monkeypatch):
    weights = write_network(tmp_path / "greys.safetensors")
    with pytest.raises(ConfigError, match=r"is a model file, which onnxruntime and openvino run; torch runs weights"):
        open_classifier(greys, backend="torch")
    for name in ("onnxruntime", "openvino"):
        for source in (weights, "cspnext_tiny_imagenet"):
            with pytest.raises(ConfigError, match=f"torch runs, not {name}; leave the backend out"):
                open_classifier(source, backend=name)
    with pytest.raises(ConfigError, match=r"backend 'tensorflow' is unknown; choose one of auto, "):
        open_classifier(greys, backend="tensorflow")
    monkeypatch.setattr(engines, "BACKEND_NAMES", (*engines.BACKEND_NAMES, "boxes"))
    with pytest.raises(ConfigError, match="boxes runs no classifiers; choose one of onnxruntime, openvino"):
        open_classifier(greys, backend="boxes")


def test_missing_openvino_names_the_extra(greys, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'rtmdet-geo\[openvino\]'"):
        open_classifier(greys, backend="openvino")


def test_detectors_engines_refuse_classifiers(greys):
    with pytest.raises(ModelFileError, match="rtmdet-geo classify"):
        open_backend(greys)


def test_damaged_files(tmp_path, greys):
    damaged = tmp_path / "cut.onnx"
    damaged.write_bytes(greys.read_bytes()[:300])
    with pytest.raises(ModelFileError, match=r"cut\.onnx"):
        open_classifier(damaged)
    weights = write_network(tmp_path / "whole.safetensors")
    damaged = tmp_path / "cut.safetensors"
    damaged.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(WeightsError, match=r"cut\.safetensors"):
        open_classifier(damaged)
    with pytest.raises(ModelFileError, match="rtmdet-geo detect"):
        open_classifier(write_network(tmp_path / "boxes.safetensors", classifier_spec(kind="horizontal")))


def test_odd_engines_and_batches(greys, tmp_path):
    with pytest.raises(ConfigError, match="threads"):
        open_classifier(greys, threads=0)
    with pytest.raises(ConfigError, match="device 'cuda'"):
        open_classifier(greys, device="cuda")
    with pytest.raises(ConfigError, match="device 'tpu'"):
        open_classifier(write_network(tmp_path / "a.safetensors"), device="tpu")
    classifier = open_classifier(greys)
    for wrong in (
        np.zeros((1, 3, SIDE, SIDE), np.float32),
        np.zeros((3, SIDE, SIDE), np.uint8),
        np.zeros((1, 4, SIDE, SIDE), np.uint8),
        np.zeros((1, 3, SIDE, 2 * SIDE), np.uint8),
        np.zeros((0, 3, SIDE, SIDE), np.uint8),
    ):
        with pytest.raises(ConfigError, match="a batch must be"):
            classifier.predict(wrong)


def test_a_model_file_needs_no_torch(greys):
    code = (
        "import sys, numpy as np\nfrom rtmdet_geo.classify import classify_image\n"
        "from rtmdet_geo.backends.classify import open_classifier\n"
        f"print(classify_image(open_classifier({str(greys)!r}), np.full((40, 50, 3), 200, np.uint8), top_k=1))\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "bright 1.000\n"), done.stderr


# ---------------------------------------------------------------- images


def test_image_is_cropped_and_ranked(greys):
    """Only the centre counts: short side 40 px is resized to round(32 * 236 / 224) = 34, the crop leaves a border."""
    classifier = open_classifier(greys)
    image = np.random.default_rng(2).integers(0, 200, (40, 70, 3), dtype=np.uint8)
    cropped = crop_centre(image, SIDE).transpose(2, 0, 1)[None]
    expected = expected_scores(cropped)[0]
    found = classify_image(classifier, image)
    assert isinstance(found, Classification)
    order = np.argsort(-expected)
    assert found.labels.tolist() == order.tolist()  # top_k=5 of two classes
    assert found.class_names == tuple(("dark", "bright")[label] for label in order)
    np.testing.assert_allclose(found.scores, expected[order], atol=1e-6)
    assert len(classify_image(classifier, image, top_k=1)) == 1
    assert str(found).startswith(f"{found.class_names[0]} {found.scores[0]:.3f}; ")


def test_channels_go_by_name(tmp_path):
    """A model of blue, green, red and a file that tells red from blue."""
    spec = classifier_spec(
        classes=("blue", "red"),
        bands=("blue", "green", "red", "nir"),
        mean=(0.0,) * 4,
        std=(1.0,) * 4,
        optional_bands={"nir": 77},
    )
    weights = [[0.1, 0.0, 0.0, 0.01], [0.0, 0.0, 0.1, 0.0]]
    path = write_classifier(
        tmp_path / "colours.onnx", spec, shape=("N", 4, "H", "W"), weights=weights, biases=(0.0, 0.0)
    )
    classifier = open_classifier(path)
    image = np.zeros((50, 50, 3), np.uint8)
    image[:, :, 0] = 60
    image[:, :, 2] = 20
    found = classify_image(classifier, image)
    assert found.class_names[0] == "red"
    difference = 0.1 * 60 - (0.1 * 20 + 0.01 * 77)
    assert found.scores[0] == pytest.approx(1 / (1 + math.exp(-difference)), abs=1e-6)
    assert classify_image(classifier, image, channels=("blue", "green", "red")).class_names[0] == "blue"
    with pytest.raises(BandError, match="wants channel 'red'"):
        classify_image(classifier, image, channels=("blue", "green", "swir"))
    with pytest.raises(BandError, match="3 channels, channels= names 4"):
        classify_image(classifier, image, channels=("red", "green", "blue", "nir"))
    with pytest.raises(ValueError, match="uint8"):
        classify_image(classifier, image.astype(np.float32))
    with pytest.raises(ConfigError, match="top_k"):
        classify_image(classifier, image, top_k=0)


def test_image_files(greys, tmp_path):
    """PNG without place on Earth, silently; GeoTIFF with holes that count as the model's mean; grey is repeated."""
    classifier = open_classifier(greys)
    rng = np.random.default_rng(3)
    values = rng.integers(0, 256, (3, 60, 80), dtype=np.uint8)
    png = write_raster(tmp_path / "a.png", values, crs=None, driver="PNG", colours=("red", "green", "blue"))
    expected = classify_image(classifier, values.transpose(1, 2, 0))
    np.testing.assert_array_equal(classify_file(classifier, png).scores, expected.scores)
    swapped = classify_file(classifier, png, bands=[3, "green", 1])
    np.testing.assert_array_equal(swapped.scores, classify_image(classifier, values[::-1].transpose(1, 2, 0)).scores)

    holed = values.copy()
    holed[:, 10:40, 20:50] = 7
    tif = write_scene(tmp_path / "a.tif", holed)
    filled = holed.copy()
    filled[:, 10:40, 20:50] = 100
    found = classify_file(classifier, tif, nodata=7)
    np.testing.assert_array_equal(found.scores, classify_image(classifier, filled.transpose(1, 2, 0)).scores)
    with pytest.warns(NodataWarning, match="no valid pixel"):
        classify_file(classifier, write_scene(tmp_path / "b.tif", np.zeros((9, 9), np.uint8), nodata=0))

    grey = write_raster(tmp_path / "g.png", values[:1], crs=None, driver="PNG", colours=("gray",))
    with pytest.warns(BandWarning, match="repeated"):
        found = classify_file(classifier, grey)
    repeated = np.repeat(values[:1], 3, axis=0).transpose(1, 2, 0)
    np.testing.assert_array_equal(found.scores, classify_image(classifier, repeated).scores)
    with pytest.raises(RasterError, match="does not exist"):
        classify_file(classifier, tmp_path / "nosuch.jpg")


# ---------------------------------------------------------------- the grid


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 40), st.integers(1, 9))
def test_cells_cover_each_pixel_once(width, height, side, batch_size):
    covered = np.zeros((height, width), int)
    batches = list(cell_batches(width, height, side, batch_size))
    for cells in batches:
        assert 1 <= len(cells) <= batch_size and len({cell.row for cell in cells}) == 1
        for left, right in itertools.pairwise(cells):
            assert left.x + left.width == right.x
        for cell in cells:
            assert 1 <= cell.width <= side and 1 <= cell.height <= side
            assert (cell.x, cell.y) == (cell.col * side, cell.row * side)
            covered[cell.y : cell.y + cell.height, cell.x : cell.x + cell.width] += 1
    assert (covered == 1).all()
    assert sum(map(len, batches)) == count_cells(width, height, side)


def test_scene_half_dark_half_bright(greys, tmp_path):
    """128 x 100 px in cells of 32 px: 4 columns, 3 whole rows and one of 4 px; dark, dark, bright, bright."""
    scene = write_scene(tmp_path / "town.tif", halves(), tags={"TIFFTAG_DATETIME": "2023:04:26 00:00:00"})
    steps = []
    result = classify_scene(scene, model=greys, batch_size=3, progress=lambda done, total: steps.append((done, total)))
    cells = result
    assert steps == [(0, 16), *[(done, 16) for row in range(4) for done in (4 * row + 3, 4 * row + 4)]]
    assert (
        cells.columns.tolist()
        == (
            "id class_id class_name score top2_name top2_score lon lat area_m2 valid_share gsd_m scene_id acquired_at "
            "sensor model model_sha run_id geometry"
        ).split()
    )
    assert cells["id"].tolist() == list(range(1, 17))
    assert cells["class_name"].tolist() == ["dark", "dark", "bright", "bright"] * 4
    assert cells["top2_name"].tolist() == ["bright", "bright", "dark", "dark"] * 4
    dark, bright = (1 / (1 + math.exp(-2 * abs(0.06 * grey - 6))) for grey in (DARK, BRIGHT))
    np.testing.assert_allclose(cells["score"], [dark, dark, bright, bright] * 4, atol=1e-6)
    np.testing.assert_allclose(cells["score"] + cells["top2_score"], 1, atol=1e-6)
    assert cells.crs == "EPSG:32630"
    bounds = [
        [500_000 + 320 * column, 4_500_000 - min(320 * (row + 1), 1000), 500_320 + 320 * column, 4_500_000 - 320 * row]
        for row in range(4)
        for column in range(4)
    ]
    np.testing.assert_allclose(cells.geometry.bounds, bounds, rtol=0, atol=1e-6)
    assert cells.geometry.is_valid.all() and cells.geometry.exterior.is_ccw.all()
    assert cells.geometry.union_all().area == pytest.approx(1280 * 1000)
    np.testing.assert_allclose(cells["area_m2"].to_numpy(), cells.area, rtol=2e-3)
    centres = geopandas.GeoSeries(cells.centroid, crs=cells.crs).to_crs(4326)
    np.testing.assert_allclose(cells[["lon", "lat"]], np.stack([centres.x, centres.y], axis=1), atol=1e-9)
    assert (cells["valid_share"] == 1).all()
    assert cells["gsd_m"].to_numpy() == pytest.approx([10.0] * 16, rel=2e-3)
    assert cells["acquired_at"].dt.strftime("%Y-%m-%d").tolist() == ["2023-04-26"] * 16
    summary = result.attrs["summary"]
    assert cells["run_id"].unique().tolist() == [summary["run_id"]]
    assert (summary["num_cells"], summary["num_chips"], summary["num_empty_chips"], len(result)) == (16, 16, 0, 16)
    assert summary["num_by_class"] == {"dark": 8, "bright": 8}
    assert summary["parameters"]["chip_size"] == SIDE and summary["model"]["path"] == str(greys)
    json.dumps(summary)
    assert describe_cells(result).startswith(f"{scene}: 16 cells (8 dark, 8 bright) of 32 px, ")


def test_each_chip_is_seen_whole_and_alone(monkeypatch, greys, tmp_path):
    """What the engine gets: whole chips bit by bit; a chip cut off by the scene is filled up with its mirror image."""
    seen = []
    real = pipeline.open_classifier

    def watched(*arguments, **options):
        classifier = real(*arguments, **options)
        predict = classifier.predict
        classifier.predict = lambda images: (seen.append(images), predict(images))[1]
        return classifier

    monkeypatch.setattr(pipeline, "open_classifier", watched)
    values = np.random.default_rng(0).integers(0, 256, (3, 40, 75), dtype=np.uint8)
    scene = write_scene(tmp_path / "a.tif", values)
    result = classify_scene(scene, model=greys, batch_size=2)
    assert [len(images) for images in seen] == [2, 1, 2, 1]
    chips = np.concatenate(seen)
    np.testing.assert_array_equal(chips[1], values[:, :32, 32:64])
    np.testing.assert_array_equal(chips[2][:, :, :22], np.concatenate([values[:, :32, 64:], values[:, :32, :63:-1]], 2))
    np.testing.assert_array_equal(chips[5][:, :8, :11], values[:, 32:, 64:])
    np.testing.assert_array_equal(chips[5][:, 8:16, :11], values[:, :31:-1, 64:])
    expected = expected_scores(chips)
    np.testing.assert_allclose(result["score"], expected.max(axis=1), atol=1e-6)

    seen.clear()
    classify_scene(scene, model=greys, chip_size=16)  # enlarged to the model's side
    chip = resize_bicubic(values[:, 16:32, 16:32].transpose(1, 2, 0), SIDE, SIDE).transpose(2, 0, 1)
    np.testing.assert_array_equal(seen[1][1], chip)

    seen.clear()
    result = classify_scene(scene, model=greys, overlap=12, batch_size=1)  # cells of 20 px, 6 px around each
    assert result.geometry.iloc[0].bounds == (500_000, 4_499_800, 500_200, 4_500_000)
    assert len(result) == 4 * 2
    np.testing.assert_array_equal(seen[1][0], values[:, :26, 14:46][:, [*range(26), *range(25, 19, -1)]])
    np.testing.assert_array_equal(seen[0][0][:, :26, :26], values[:, :26, :26])
    np.testing.assert_array_equal(seen[7][0][:, :26, :21], values[:, 14:, 54:])


def test_nodata_cells_are_left_out(greys, tmp_path):
    """Nodata takes the first cell whole and a quarter of the second, which counts as the model's mean there."""
    grey = halves(64, 96, split=96)
    grey[:32, :40] = 0
    scene = write_scene(tmp_path / "a.tif", grey, nodata=0)
    result = classify_scene(scene, tmp_path / "a.gpkg", model=greys)
    cells = result
    assert len(cells) == 5 and result.attrs["summary"]["num_empty_chips"] == 1
    assert cells["valid_share"].tolist() == [0.75, 1, 1, 1, 1]
    assert cells.geometry.iloc[0].bounds == (500_320, 4_499_680, 500_640, 4_500_000)
    mean = 0.75 * DARK + 0.25 * 100
    assert cells["score"].iloc[0] == pytest.approx(1 / (1 + math.exp(2 * (0.06 * mean - 6))), abs=1e-6)
    assert classify_scene(scene, model=greys, score_threshold=0.999)["valid_share"].tolist() == [1] * 4
    assert len(classify_scene(write_scene(tmp_path / "b.tif", grey), model=greys)) == 6  # control: 0 is a value


def test_scene_without_data_or_without_likely_classes(greys, tmp_path):
    scene = write_scene(tmp_path / "empty.tif", np.zeros((50, 50), np.uint8), nodata=0)
    with pytest.warns(NodataWarning, match="no valid pixel"):
        result = classify_scene(scene, tmp_path / "empty.gpkg", model=greys)
    assert len(result) == 0 and result.attrs["summary"]["num_by_class"] == {}
    layer = geopandas.read_file(tmp_path / "empty.gpkg")
    assert len(layer) == 0 and layer.crs == "EPSG:32630" and "top2_name" in layer.columns
    unsure = write_scene(tmp_path / "unsure.tif", np.full((50, 50), 100, np.uint8))
    assert len(classify_scene(unsure, model=greys, score_threshold=0.6)) == 0
    assert classify_scene(unsure, model=greys, score_threshold=0.5)["score"].tolist() == [0.5] * 4


def test_resolution_of_the_model(tmp_path):
    """A model of 20 m on a scene of 10 m: chips of 32 px of 20 m, cells of 640 m, edges exactly those of the scene."""
    path = write_classifier(tmp_path / "coarse.onnx", classifier_spec(gsd_m=20.0))
    scene = write_scene(tmp_path / "a.tif", halves(130, 130))
    result = classify_scene(scene, model=path, gsd=10.0)
    assert result["class_name"].tolist() == ["dark", "bright", "bright"] * 3
    assert result.total_bounds.tolist() == [500_000, 4_498_700, 501_300, 4_500_000]
    assert result["gsd_m"].tolist() == [10.0] * 9
    assert result.geometry.iloc[0].bounds == (500_000, 4_499_360, 500_640, 4_500_000)


def test_stretch_and_training_resolution_of_the_model(tmp_path):
    """Reflectances 0 to .2 become 0 to 255; a scene that is far from the model's 40 m yet like its training scenes."""
    stretch = StretchSpec(kind="fixed", low=0.0, high=0.2)
    values = np.broadcast_to(np.uint16(1000), (3, 32, 32))
    scene = write_raster(tmp_path / "a.tif", values, transform=TRANSFORM, colours=("red", "green", "blue"))
    for number, trained in enumerate([(8.0, 12.0), None]):
        spec = classifier_spec(stretch=stretch, gsd_m=40.0, trained_gsd_m=trained)
        path = write_classifier(tmp_path / f"{number}.onnx", spec)
        with pytest.warns(ResolutionWarning) if trained is None else contextlib.nullcontext():
            result = classify_scene(scene, model=path, chip_size=8)
        score = expected_scores(np.full((1, 3, 1, 1), 128, np.uint8))[0, 1]  # .1 of .2 is 127.5, half to even
        assert result["score"].tolist() == pytest.approx([score], abs=0.03)
        assert result["class_name"].tolist() == ["bright"]
        assert result.attrs["summary"]["stretch"]["kind"] == "fixed"


def test_without_crs(greys, tmp_path):
    scene = write_scene(tmp_path / "photo.tif", halves(40, 70), crs=None)
    with pytest.warns(NotGeoreferencedWarning):
        result = classify_scene(scene, tmp_path / "a.gpkg", model=greys)
    cells = result
    assert cells.crs is None and cells[["lon", "lat", "area_m2", "gsd_m"]].isna().all().all()
    assert cells.geometry.bounds.to_numpy().tolist() == [
        [left, top, min(left + 32, 70), min(top + 32, 40)] for top in (0, 32) for left in (0, 32, 64)
    ]
    with pytest.warns(NotGeoreferencedWarning), pytest.raises(ConfigError, match="no CRS"):
        classify_scene(scene, model=greys, dst_crs="EPSG:4326")
    assert len(classify_scene_quietly(scene, tmp_path / "a.geojson", greys)) == 6
    assert json.loads((tmp_path / "a.geojson").read_text())["crs"] is None


def classify_scene_quietly(scene, output, model):
    with pytest.warns(NotGeoreferencedWarning):
        return classify_scene(scene, output, model=model)


def test_layers(greys, tmp_path):
    """GeoPackage and GeoJSON hold the same table; --dst-crs moves geometries, not attributes."""
    scene = write_scene(tmp_path / "town.tif", halves())
    for name in ("cells.gpkg", "cells.geojson"):
        classify_scene(scene, tmp_path / name, model=greys)
    layer = geopandas.read_file(tmp_path / "cells.gpkg")
    assert pyogrio.list_layers(tmp_path / "cells.gpkg").tolist() == [["classification", "Polygon"]]
    metadata = pyogrio.read_info(tmp_path / "cells.gpkg")["layer_metadata"]
    assert json.loads(metadata["num_by_class"]) == {"dark": 8, "bright": 8}
    degrees = geopandas.read_file(tmp_path / "cells.geojson")
    assert layer["class_name"].tolist() == degrees["class_name"].tolist() == ["dark", "dark", "bright", "bright"] * 4
    assert degrees.crs == "EPSG:4326"
    other = classify_scene(scene, model=greys, dst_crs="EPSG:4326")
    np.testing.assert_allclose(degrees.geometry.bounds, other.geometry.bounds, atol=1e-7)
    np.testing.assert_allclose(layer[["lon", "lat", "area_m2"]], other[["lon", "lat", "area_m2"]])


def test_memory_follows_the_batch(monkeypatch, greys, tmp_path):
    """One read per batch, of the batch's pixels only, each pixel once."""
    scene = write_scene(tmp_path / "a.tif", np.full((70, 200), DARK, np.uint8))
    windows = []
    read = pipeline.Scene.read
    monkeypatch.setattr(pipeline.Scene, "read", lambda self, *window: (windows.append(window), read(self, *window))[1])
    classify_scene(scene, model=greys, batch_size=3)
    assert windows == [
        (x, y, width, height)
        for y, height in ((0, 32), (32, 32), (64, 6))
        for x, width in ((0, 96), (96, 96), (192, 8))
    ]


def test_outputs_are_kept_and_cancelled_runs_leave_nothing(greys, tmp_path):
    scene = write_scene(tmp_path / "a.tif", halves())
    output = tmp_path / "a.gpkg"
    calls = []
    with pytest.raises(Cancelled, match="stopped after 8 of 16 chips"):
        classify_scene(
            scene,
            output,
            model=greys,
            batch_size=4,
            cancelled=lambda: len(calls) >= 3,
            progress=lambda *n: calls.append(n),
        )
    with pytest.raises(Cancelled, match="last chip"):
        classify_scene(scene, output, model=greys, batch_size=99, cancelled=iter([False] * 4 + [True]).__next__)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tif"]
    output.write_text("mine")
    with pytest.raises(OutputError, match="--overwrite"):
        classify_scene(scene, output, model=greys)
    assert output.read_text() == "mine"
    classify_scene(scene, output, model=greys, overwrite=True)
    assert len(geopandas.read_file(output)) == 16
    with pytest.raises(OutputError, match="the scene itself"):
        classify_scene(scene, scene, model=greys, overwrite=True)
    with pytest.raises(OutputError, match="extension"):
        classify_scene(scene, tmp_path / "a.kml", model=greys)


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"chip_size": 0}, "chip_size"),
        ({"overlap": SIDE}, "overlap"),
        ({"overlap": -1}, "overlap"),
        ({"batch_size": 0}, "batch_size"),
        ({"top_k": 0}, "top_k"),
        ({"score_threshold": 1.5}, "score_threshold"),
        ({"score_threshold": math.nan}, "score_threshold"),
        ({"dst_crs": "EPSG:nosuch"}, "coordinate reference system"),
    ],
)
def test_values_outside_their_range(greys, tmp_path, values, part):
    scene = write_scene(tmp_path / "a.tif", halves(20, 20))
    with pytest.raises(ConfigError, match=part):
        classify_scene(scene, model=greys, **values)


def test_geojson_has_one_crs(greys, tmp_path):
    scene = write_scene(tmp_path / "a.tif", halves(20, 20))
    with pytest.raises(ConfigError, match="always EPSG:4326"):
        classify_scene(scene, tmp_path / "a.geojson", model=greys, dst_crs="EPSG:3857")
    with pytest.raises(BandError, match="nosuch"):
        classify_scene(scene, model=greys, bands=["red", "nosuch", "blue"])
    with pytest.raises(ModelFileError, match="rtmdet-geo detect"):
        classify_scene(scene, model="sen2ships_r")


def test_cells_across_the_antimeridian_and_rotated_pixels():
    """A polygon stays in one piece; a rotated transform turns the cell with the pixels."""
    edges = [[0.0, 0.0, 2.0, 1.0], [2.0, 0.0, 4.0, 1.0]]
    arguments = {"classes": ("a", "b"), "gsd_m": None, "scene_id": "x"}
    labels, scores, shares = [[0, 1], [1, 0]], [[0.9, 0.1], [0.6, 0.4]], [1.0, 1.0]
    world = Affine(0.5, 0, 179.5, 0, -0.5, 10)
    frame = build_cells(edges, labels, scores, shares, transform=world, crs="EPSG:4326", **arguments)
    np.testing.assert_allclose(frame.geometry.bounds, [[179.5, 9.5, 180.5, 10], [180.5, 9.5, 181.5, 10]])
    np.testing.assert_allclose(frame["lon"], [-180, -179])
    turned = Affine.translation(500_000, 4_500_000) @ Affine.rotation(30) @ Affine.scale(10, -10)
    frame = build_cells(edges, labels, scores, shares, transform=turned, crs="EPSG:32630", **arguments)
    corner = frame.geometry.iloc[1].exterior.coords
    expected = [turned @ point for point in ((2, 0), (4, 0), (4, 1), (2, 1))]
    for point in expected:
        assert min(math.dist(point, other) for other in corner) < 1e-6
    assert frame.area.tolist() == pytest.approx([200, 200])
    with pytest.raises(ConfigError, match="without coordinate reference system"):
        build_cells(edges, labels, scores, shares, transform=world, crs=None, dst_crs="EPSG:4326", **arguments)


def test_helpers_know_their_answers(greys):
    """Mean grey 100 is undecided, each level more in all channels adds 0.12 to the log odds."""
    undecided = np.full((1, 3, SIDE, SIDE), 100, np.uint8)
    assert expected_scores(undecided).tolist() == [[0.5, 0.5]]
    one, other = expected_scores(undecided + 1)[0]
    assert math.log(other / one) == pytest.approx(0.12)
    assert (len(WEIGHTS), len(BIASES)) == (2, 2)
