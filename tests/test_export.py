"""Export by the model-file contract, and the check that compares it with torch."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from synthetic import SMALLEST, calibrate, make_spec, small_model, small_network

from rtmdet_geo.backends.contract import OUTPUTS
from rtmdet_geo.backends.onnxrt import OnnxRuntimeBackend, open_model_file
from rtmdet_geo.catalog import read_metadata, read_spec
from rtmdet_geo.errors import ConfigError, ExportMismatchError, ModelFileError, OutputError, WeightsError
from rtmdet_geo.export import export_model, make_check_tiles
from rtmdet_geo.export import trace as export_trace
from rtmdet_geo.export.check import TOLERANCES, CheckBatch, Differences, FileReference, verify_export
from rtmdet_geo.export.trace import TorchReference
from rtmdet_geo.models import RTMDet, get_classifier, get_model
from rtmdet_geo.models.classifier import ClassificationGraph
from rtmdet_geo.models.decode import DetectionGraph
from rtmdet_geo.models.weights import fuse_batch_norm, save_weights
from rtmdet_geo.variants import KINDS, VARIANTS

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
    """The network with fp16-rounded weights, worked out here once more: rounded first, as in a weights file."""
    copied = copy.deepcopy(network)
    for parameter in copied.parameters():
        if parameter.ndim >= 2:
            parameter.data = parameter.data.half().float()
    return copied.eval()


def sorted_rows(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(K, 7) rows in an order that does not depend on ties of scores."""
    rows = np.column_stack([labels, boxes, scores]).astype(np.float64)
    return rows[np.lexsort(rows.round(1).T[:3])]


@pytest.mark.parametrize("number,height,width", [(1, 256, 256), (3, 256, 256), (2, 64, 160), (1, 32, 32)])
def test_file_gives_what_torch_gives(network, exported, number, height, width):
    """Any batch and any side, though the graph was traced at batch 2 and 128 px."""
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


# ---------------------------------------------------------------- every kind


@pytest.mark.parametrize("kind", SMALLEST)
@pytest.mark.parametrize("number,height,width", [(1, 64, 160), (3, 192, 96)])
def test_every_kind_takes_any_batch_and_any_side(kind, number, height, width):
    """Traced at batch 2 and 128 x 128 px."""
    spec = read_spec(small_model(kind))
    graph_type = ClassificationGraph if kind == "classification" else DetectionGraph
    graph = graph_type(small_network(kind, num_classes=len(spec.classes)), spec.mean, spec.std).eval()
    tiles = np.ascontiguousarray(make_check_tiles(number, 3, 192, seed=3)[:, :, :height, :width])
    with torch.inference_mode():
        outputs = graph(torch.from_numpy(tiles))
    outputs = (outputs,) if kind == "classification" else outputs
    session, _ = open_model_file(small_model(kind), threads=1)
    found = dict(zip(OUTPUTS[kind], session.run(list(OUTPUTS[kind]), {"images": tiles}), strict=True))
    expected = {name: value.numpy() for name, value in zip(OUTPUTS[kind], outputs, strict=True)}
    assert {name: value.shape for name, value in found.items()} == {
        name: value.shape for name, value in expected.items()
    }
    np.testing.assert_allclose(found["scores"], expected["scores"], atol=1e-4)
    assert expected["scores"].std() > 0.05, "the test network must not give equal scores everywhere"
    if kind == "mask":
        assert expected["mask_features"].shape == (number, 8, height // 8, width // 8)
        np.testing.assert_allclose(found["mask_features"], expected["mask_features"], atol=1e-4)
        assert expected["mask_features"].std() > 0.5
    if kind != "classification":
        for image in range(number):
            one, other = (
                sorted_rows(*(side[name][image] for name in OUTPUTS["rotated"])) for side in (expected, found)
            )
            assert (np.abs(one - other).max(axis=1) < 0.05).mean() > 0.98  # near ties may stand in another order


@pytest.mark.parametrize("kind", SMALLEST)
def test_declared_outputs(kind):
    model = onnx.load(small_model(kind))
    declared = {
        output.name: [size.dim_param or size.dim_value for size in output.type.tensor_type.shape.dim]
        for output in model.graph.output
    }
    rows = {"boxes": ["batch", "rows", 5], "scores": ["batch", "rows"], "labels": ["batch", "rows"]}
    masks = {
        "kernels": ["batch", "rows", 169],
        "mask_priors": ["batch", "rows", 3],
        "mask_features": ["batch", 8, "feature_height", "feature_width"],
    }
    wanted = {"classification": {"scores": ["batch", 3]}, "mask": rows | masks}
    assert declared == wanted.get(kind, rows)
    assert {output.type.tensor_type.elem_type for output in model.graph.output} == {onnx.TensorProto.FLOAT}
    used = {name for node in model.graph.node for name in node.input}
    assert {tensor.name for tensor in model.graph.initializer} <= used


@pytest.mark.parametrize("name", [name for name in VARIANTS if name.endswith(("_test", "_nano"))])
def test_smallest_variants_of_every_family(name, tmp_path):
    """As published: all classes, three channels; export itself compares the file with torch.

    All scores of a fresh network tie, so rows stand in any order, and a cut level keeps any of them.
    """
    kind, num_classes = KINDS[VARIANTS[name].task], VARIANTS[name].num_classes
    build = get_classifier if kind == "classification" else get_model
    spec = make_spec(
        name=name,
        architecture=name,
        kind=kind,
        classes=tuple(f"class {number}" for number in range(num_classes)),
        tile_size=96,
    )
    torch.manual_seed(0)
    stored = export_model(build(name), tmp_path / "model.onnx", spec=spec, half_weights=True)
    pairs = [12 * 12 * num_classes, 6 * 6 * num_classes, 3 * 3 * num_classes]
    limit = {"rotated": 2000, "horizontal": 3840, "mask": 1000}.get(kind)
    assert stored.max_detections == (sum(min(number, limit) for number in pairs) if limit else spec.max_detections)
    assert read_spec(tmp_path / "model.onnx") == stored and stored.kind == kind


def test_fixed_size_of_instances(tmp_path):
    """TensorRT wants sizes, and k of top-K, as constants."""
    spec = make_spec(kind="mask")
    export_model(small_network("mask"), tmp_path / "fixed.onnx", spec=spec, tile_size=64)
    model = onnx.load(tmp_path / "fixed.onnx")
    shapes = {
        output.name: [size.dim_param or size.dim_value for size in output.type.tensor_type.shape.dim]
        for output in model.graph.output
    }
    assert shapes["kernels"] == ["batch", 64 + 16 + 4, 169] and shapes["mask_features"] == ["batch", 8, 8, 8]
    computed = {output for node in model.graph.node if node.op_type != "Constant" for output in node.output}
    assert not {node.input[1] for node in model.graph.node if node.op_type == "TopK"} & computed


def test_classifier_normalises_inside_and_answers_probabilities(tmp_path):
    """Worked out here once more: (pixel - mean) / std, network, softmax; any side goes."""
    network = small_network("classification", num_classes=3)
    spec = make_spec(kind="classification", classes=("a", "b", "c"), mean=(10.0, 20.0, 30.0), std=(50.0, 60.0, 70.0))
    export_model(network, tmp_path / "classifier.onnx", spec=spec, tile_size=None)
    session, _ = open_model_file(tmp_path / "classifier.onnx")
    assert session.run(["scores"], {"images": np.zeros((2, 3, 45, 70), np.uint8)})[0].shape == (2, 3)
    tiles = make_check_tiles(2, 3, 128, seed=0)
    tiles[1] //= 3
    (found,) = session.run(["scores"], {"images": tiles})
    normalised = (tiles - np.array(spec.mean)[:, None, None]) / np.array(spec.std)[:, None, None]
    with torch.inference_mode():
        logits = network(torch.from_numpy(normalised).float()).double().numpy()
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    np.testing.assert_allclose(found, powers / powers.sum(axis=1, keepdims=True), atol=2e-4)
    assert np.abs(found[0] - found[1]).max() > 0.01, "the two images must differ"
    assert 0.05 < found.max() < 0.95


def test_classifier_of_one_side(tmp_path):
    spec = make_spec(kind="classification", classes=("a", "b"))
    stored = export_model(get_classifier("cspnext_test", num_classes=2), tmp_path / "c.onnx", spec=spec, tile_size=50)
    session, _ = open_model_file(tmp_path / "c.onnx")
    assert stored.tile_size == 50 and session.get_inputs()[0].shape == ["batch", 3, 50, 50]


def test_metadata_for_deepness_where_it_has_such_models():
    for kind in ("rotated", "horizontal", "mask"):
        metadata = read_metadata(small_model(kind))
        assert json.loads(metadata["model_type"]) == "Detector"
        assert "det_type" not in metadata  # it has names for layouts of YOLO's output only
    assert set(read_metadata(small_model("classification"))) == {"model_spec", "graph_sha256"}


# ---------------------------------------------------------------- rotated boxes in detail


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
    trace = export_trace._trace

    def trace_another(graph, spec):
        return trace(DetectionGraph(fuse_batch_norm(network), SPEC.mean, [value * 1.05 for value in SPEC.std]), spec)

    monkeypatch.setattr(export_trace, "_trace", trace_another)
    with pytest.raises(ExportMismatchError, match="differs from torch"):
        export_model(network, tmp_path / "bad.onnx", spec=SPEC)
    assert list(tmp_path.iterdir()) == []


class Altered(torch.nn.Module):
    """A graph of which one output is moved: negative controls."""

    def __init__(self, graph: torch.nn.Module, output: str, shift: object) -> None:
        super().__init__()
        self.graph, self.output, self.shift = graph, output, shift

    def forward(self, images):
        outputs = self.graph(images)
        return outputs._replace(**{self.output: getattr(outputs, self.output) + self.shift})


@pytest.mark.parametrize(
    "kind,output,shift,words",
    [
        ("rotated", "boxes", torch.tensor([0.2, 0, 0, 0, 0]), r"boxes 0\.2 px"),
        ("rotated", "boxes", torch.tensor([0, 0, 0, 0, 0.1]), r"boxes 0\.1 px"),
        ("rotated", "scores", 0.001, r"scores 0\.001"),
        ("rotated", "labels", 1, "boxes inf px"),
        ("horizontal", "boxes", torch.tensor([0, 0, 0.2, 0, 0]), r"boxes 0\.2 px"),
        ("mask", "boxes", torch.tensor([0, 0.2, 0, 0, 0]), r"boxes 0\.2 px"),
        ("mask", "mask_priors", torch.tensor([8, 0, 0]), "kernels inf"),
        ("mask", "kernels", 0.01, r"kernels 0\.00"),
        ("mask", "mask_features", 0.01, r"mask_features 0\.00"),
        ("mask", "mask_features", np.nan, "'mask_features' at batch 1 is not finite in torch"),
    ],
)
def test_a_change_of_one_output_is_found(kind, output, shift, words):
    spec = read_spec(small_model(kind))
    graph = DetectionGraph(small_network(kind), spec.mean, spec.std).eval()
    file = FileReference(small_model(kind))
    batches = [CheckBatch(make_check_tiles(1, 3, 128, seed=1)[:, :, :, :96])]
    assert max(verify_export(TorchReference(graph, spec), file, batches)) < 2e-4
    with pytest.raises(ExportMismatchError, match=words):
        verify_export(TorchReference(Altered(graph, output, shift), spec), file, batches)


def test_tolerances_are_tight():
    """Boxes may be off by a fiftieth of a pixel, the rest by a thousandth and less."""
    assert Differences(0.02, 2e-4, 1e-3, 1e-3) == TOLERANCES


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
        (ConfigError, {"spec": SPEC.model_copy(update={"kind": "mask"})}, "of kind 'rotated', its spec says 'mask'"),
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
