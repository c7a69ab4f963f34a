"""Export by the model-file contract, and the check that compares it with torch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from synthetic import calibrate, make_spec, small_model

from rtmdet_geo import export as exporting
from rtmdet_geo.backends.onnxrt import OnnxRuntimeBackend
from rtmdet_geo.catalog import read_metadata, read_spec
from rtmdet_geo.errors import ConfigError, ExportMismatchError, ModelFileError, OutputError, WeightsError
from rtmdet_geo.export import export_model, make_check_tiles, verify_export
from rtmdet_geo.models import RTMDet, get_model
from rtmdet_geo.models.decode import DetectionGraph
from rtmdet_geo.models.weights import fuse_batch_norm, save_weights

CLASSES = ("ship", "plane")
SPEC = make_spec(classes=CLASSES, bands=("red", "green", "blue", "nir"), mean=(40.0,) * 4, std=(35.0,) * 4, gsd_m=4.0)


@pytest.fixture(scope="module")
def network() -> RTMDet:
    """A small network of two classes and four bands whose outputs vary from place to place."""
    torch.manual_seed(0)
    network = get_model("rtmdet_r_test", num_classes=2, in_channels=4)
    calibrate(network)
    return network.eval()


@pytest.fixture(scope="module")
def exported(network: RTMDet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "two.onnx"
    export_model(network, path, spec=SPEC)
    return path


def rounded(network: RTMDet) -> torch.nn.Module:
    """The fused network with fp16-rounded weights, worked out here once more."""
    fused = fuse_batch_norm(network)
    for parameter in fused.parameters():
        if parameter.ndim >= 2:
            parameter.data = parameter.data.half().float()
    return fused


def sorted_rows(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(K, 7) rows in an order that does not depend on ties of scores."""
    rows = np.column_stack([labels, boxes, scores]).astype(np.float64)
    return rows[np.lexsort(rows.round(1).T[:3])]


@pytest.mark.parametrize("number,height,width", [(1, 256, 256), (3, 256, 256), (2, 64, 160), (1, 32, 32)])
def test_file_gives_what_torch_gives(network, exported, number, height, width):
    """Any batch and any side, though the graph was traced at batch 2 and 256 px."""
    backend = OnnxRuntimeBackend(exported, threads=1)
    tiles = make_check_tiles(number, 4, max(height, width), seed=5)[:, :, :height, :width]
    tiles = np.ascontiguousarray(tiles)
    with torch.inference_mode():
        expected = [
            value.float().numpy() for value in DetectionGraph(network, SPEC.mean, SPEC.std)(torch.from_numpy(tiles))
        ]
    found = backend.raw(tiles)
    assert [value.dtype for value in found] == [np.float32] * 3
    np.testing.assert_allclose(found[1], expected[1], atol=1e-4)
    assert expected[1].std() > 0.05, "the test network must not give equal scores everywhere"
    for image in range(number):
        for label in range(2):
            mine, other = ([value[image][side[2][image] == label] for value in side] for side in (expected, found))
            assert len(mine[0]) == len(other[0])
            if len(mine[0]):
                distance = np.abs(mine[0][:, None, :4] - other[0][None, :, :4]).max(axis=2).min(axis=1)
                assert distance.max() < 0.05


def test_graph_follows_the_contract(exported):
    model = onnx.load(exported)
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 17)]
    assert {node.domain for node in model.graph.node} == {""}
    (image,) = model.graph.input
    assert image.name == "images" and image.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert [size.dim_param or size.dim_value for size in image.type.tensor_type.shape.dim] == [
        "batch",
        4,
        "height",
        "width",
    ]
    assert [output.name for output in model.graph.output] == ["boxes", "scores", "labels"]
    assert {output.type.tensor_type.elem_type for output in model.graph.output} == {onnx.TensorProto.FLOAT}
    operators = {node.op_type for node in model.graph.node}
    assert "BatchNormalization" not in operators and "NonMaxSuppression" not in operators and "Loop" not in operators


def test_metadata(network, exported):
    spec = read_spec(exported)
    assert spec == spec.model_copy(update=SPEC.model_dump(include={"name", "classes", "bands", "gsd_m", "mean", "std"}))
    assert spec.max_detections == 2000 + 2 * 256 + 2 * 64
    assert len(spec.weights_sha256) == 64 and "torch" in spec.exporter
    metadata = {key: value for key, value in read_metadata(exported).items() if key != "model_spec"}
    decoded = {key: json.loads(value) for key, value in metadata.items()}
    assert decoded["model_type"] == "Detector"
    assert decoded["class_names"] == {"0": "ship", "1": "plane"}
    assert decoded["resolution"] == 400.0  # cm
    assert (decoded["tile_size"], decoded["tiles_overlap"]) == (256, 25)
    assert decoded["standardization_mean"] == [0.0] * 4
    assert (decoded["det_conf"], decoded["det_iou_thresh"]) == (0.3, 0.1)


def test_half_weights_halve_the_file_and_keep_fp32_arithmetic(network, exported, tmp_path):
    path = tmp_path / "half.onnx"
    export_model(network, path, spec=SPEC, half_weights=True)
    model = onnx.load(path)
    kinds = {tensor.data_type: 0 for tensor in model.graph.initializer}
    for tensor in model.graph.initializer:
        kinds[tensor.data_type] += int(np.prod(tensor.dims))
    assert kinds[onnx.TensorProto.FLOAT16] > 20 * kinds[onnx.TensorProto.FLOAT]
    assert path.stat().st_size < 0.65 * exported.stat().st_size  # the small network's graph weighs much
    tiles = make_check_tiles(1, 4, 256, seed=9)
    with torch.inference_mode():
        _, scores, _ = DetectionGraph(rounded(network), SPEC.mean, SPEC.std)(torch.from_numpy(tiles))
    half, full = (OnnxRuntimeBackend(file, threads=1).raw(tiles)[1] for file in (path, exported))
    difference = np.abs(half - scores.numpy()).max()
    assert difference < 1e-4
    # negative control: the unrounded network is further away
    assert np.abs(full - scores.numpy()).max() > 4 * difference


def test_fixed_tile_size(network, tmp_path):
    path = tmp_path / "fixed.onnx"
    spec = export_model(network, path, spec=SPEC, tile_size=128)
    assert spec.tile_size == 128 and spec.overlap == 64
    backend = OnnxRuntimeBackend(path)
    assert backend.fixed_tile_size == 128
    assert len(backend.raw(np.zeros((3, 4, 128, 128), np.uint8))[1]) == 3
    with pytest.raises(ConfigError, match="128 x 128 px only"):
        backend.raw(np.zeros((1, 4, 256, 256), np.uint8))


def test_weights_file_carries_its_spec(network, tmp_path):
    weights = tmp_path / "model.safetensors"
    stored = save_weights(network, weights, SPEC, half=False)
    spec = export_model(weights, tmp_path / "model.onnx")
    assert spec.weights_sha256 == stored.weights_sha256 == read_spec(tmp_path / "model.onnx").weights_sha256
    assert spec.classes == CLASSES


def test_mismatch_is_found_and_leaves_nothing(network, tmp_path, monkeypatch):
    """Negative control: a graph that normalises a little differently is not let through."""
    trace = exporting._trace

    def trace_another(graph, path, **options):
        other = DetectionGraph(fuse_batch_norm(network), SPEC.mean, [value * 1.05 for value in SPEC.std])
        trace(other, path, **options)

    monkeypatch.setattr(exporting, "_trace", trace_another)
    with pytest.raises(ExportMismatchError, match="differs from torch"):
        export_model(network, tmp_path / "bad.onnx", spec=SPEC)
    assert list(tmp_path.iterdir()) == []


def test_mismatch_of_boxes_alone_is_found(network, exported):
    graph = DetectionGraph(network, SPEC.mean, SPEC.std)

    class Moved(torch.nn.Module):
        def forward(self, images):
            boxes, scores, labels = graph(images)
            return boxes + torch.tensor([0.2, 0, 0, 0, 0]), scores, labels

    assert max(verify_export(graph, exported, batches=[(1, 128)])) < 1e-3
    with pytest.raises(ExportMismatchError, match=r"0\.2 px"):
        verify_export(Moved(), exported, batches=[(1, 128)])


def test_freshly_initialised_network_passes_its_check(tmp_path):
    """All scores tie there, so rows stand in any order."""
    export_model(get_model("rtmdet_r_test", num_classes=1), tmp_path / "new.onnx", spec=make_spec())


def test_existing_file_is_kept(network, tmp_path):
    path = tmp_path / "mine.onnx"
    path.write_text("mine")
    with pytest.raises(OutputError, match="overwrite"):
        export_model(network, path, spec=SPEC)
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    "error,arguments,words",
    [
        (OutputError, {"out": "model.engine"}, r"must end in \.onnx"),
        (OutputError, {"out": "nowhere/model.onnx"}, "folder"),
        (ConfigError, {"spec": None}, "spec="),
        (ConfigError, {"spec": make_spec(classes=CLASSES)}, "4 bands"),
        (ConfigError, {"spec": SPEC.model_copy(update={"classes": ("ship",)})}, "2 classes"),
        (ConfigError, {"spec": SPEC.model_copy(update={"kind": "mask"})}, "mask"),
        (ConfigError, {"tile_size": 100}, "multiple of 32"),
    ],
)
def test_refusals(network, tmp_path, error, arguments, words):
    arguments = {"spec": SPEC, **arguments}
    target = tmp_path / arguments.pop("out", "model.onnx")
    with pytest.raises(error, match=words):
        export_model(network, target, **arguments)


def test_broken_weights(tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"12345678 no header")
    with pytest.raises((WeightsError, ModelFileError), match=r"broken\.safetensors"):
        export_model(tmp_path / "broken.safetensors", tmp_path / "model.onnx")


def test_check_tiles_are_images():
    tiles = make_check_tiles(2, 4, 256, seed=1)
    assert tiles.shape == (2, 4, 256, 256) and tiles.dtype == np.uint8
    assert 20 < tiles.mean() < 120 and tiles.std() > 10
    np.testing.assert_array_equal(tiles, make_check_tiles(2, 4, 256, seed=1))


def test_small_model_is_usable():
    assert small_model().is_file()


def test_damage_inside_the_weights_is_noticed(exported, tmp_path):
    content = bytearray(exported.read_bytes())
    OnnxRuntimeBackend(exported)
    proto = onnx.load(exported)
    weights = max((tensor.raw_data for tensor in proto.graph.initializer), key=len)
    content[content.index(weights) + 7] ^= 0x40
    (tmp_path / "damaged.onnx").write_bytes(content)
    with pytest.raises(ModelFileError, match="damaged"):
        OnnxRuntimeBackend(tmp_path / "damaged.onnx")
