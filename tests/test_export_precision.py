"""Export to fp16, to fixed sizes and batches, from weights and from model files; what is compared and found."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from classifiers import SIDE, classifier_spec, untrained_network
from click.testing import CliRunner, Result
from onnx import TensorProto, helper, numpy_helper
from synthetic import SMALLEST, make_spec, small_network, write_scene
from torch import nn

from rtmdet_geo.backends.onnxrt import open_model_file
from rtmdet_geo.catalog import CATALOG, check_graph, read_spec
from rtmdet_geo.cli import cli
from rtmdet_geo.errors import BandError, ConfigError, ExportMismatchError, ModelFileError, OutputError, RasterError
from rtmdet_geo.export import check, export_model, make_check_tiles
from rtmdet_geo.export import trace as export_trace
from rtmdet_geo.export.check import CheckBatch, Differences, FileReference, verify_export
from rtmdet_geo.export.graph import write_metadata
from rtmdet_geo.export.tiles import CHECK_TILES, cut_tiles, shipped_tiles
from rtmdet_geo.models.weights import save_weights

CHIPS = Path(__file__).parent / "data"


def moderate_network(kind: str) -> nn.Module:
    """A network whose logits differ a quarter as much as is usual in tests, so that half precision can follow."""
    network = untrained_network(3) if kind == "classification" else small_network(kind)
    mean = 0 if kind == "classification" else -1
    with torch.no_grad():
        for layer in [network.head.fc] if kind == "classification" else network.bbox_head.rtm_cls:
            layer.weight *= 0.25
            layer.bias.copy_(mean + 0.25 * (layer.bias - mean))
    return network


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A fp32 model file of each kind."""
    folder = tmp_path_factory.mktemp("sources")
    for kind, architecture in SMALLEST.items():
        classes = ("a", "b", "c") if kind == "classification" else ("ship",)
        spec = make_spec(name=f"small_{kind}", kind=kind, classes=classes, architecture=architecture)
        export_model(moderate_network(kind), folder / f"{kind}.onnx", spec=spec, verify=False)
    return {kind: folder / f"{kind}.onnx" for kind in SMALLEST}


def shape_of(path: Path) -> list[int | str]:
    (image,) = onnx.load(path).graph.input
    return [size.dim_param or size.dim_value for size in image.type.tensor_type.shape.dim]


def types_of_weights(path: Path) -> set[int]:
    """Element types of the weights that convolutions read, as stored."""
    graph = onnx.load(path).graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    return {types[node.input[1]] for node in graph.node if node.op_type == "Conv"}


@pytest.mark.parametrize("sizes", [{}, {"tile_size": 64, "batch_size": 2}], ids=["any", "fixed"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("kind", SMALLEST)
def test_every_kind_precision_and_size(kind, precision, sizes, sources, tmp_path):
    path = tmp_path / "out.onnx"
    stored = export_model(sources[kind], path, precision=precision, **sizes)
    assert read_spec(path) == stored and stored.precision == precision
    check_graph(path)
    side = sizes.get("tile_size")
    assert shape_of(path) == [sizes.get("batch_size", "batch"), 3, side or "height", side or "width"]
    assert stored.tile_size == (side or 256)
    assert types_of_weights(path) == {TensorProto.FLOAT if precision == "fp32" else TensorProto.FLOAT16}
    keys = {"scores"}
    if kind != "classification":
        keys |= {"boxes_px"} | ({"matched", "unmatched"} if precision == "fp16" else set())
    if kind == "mask":
        keys |= {"kernels", "mask_features"}
    assert set(stored.differences) == keys
    if precision == "fp16":
        assert 0 < stored.differences["scores"] <= 0.01 and stored.differences.get("unmatched", 0) == 0
        assert stored.differences.get("matched", 20) >= 20
    assert stored.weights_sha256 == read_spec(sources[kind]).weights_sha256


@pytest.mark.parametrize("kind", ["rotated", "classification"])
def test_weights_to_fp16_are_compared_with_torch(kind, sources, tmp_path):
    """And the graph is that which the fp32 model file gives."""
    spec = read_spec(sources[kind])
    save_weights(moderate_network(kind), tmp_path / "m.safetensors", spec, half=False)
    traced = export_model(tmp_path / "m.safetensors", tmp_path / "a.onnx", precision="fp16", tile_size=64)
    rewritten = export_model(sources[kind], tmp_path / "b.onnx", precision="fp16", tile_size=64)
    tiles = make_check_tiles(2, 3, 64, seed=1)
    one, other = (FileReference(tmp_path / name)(tiles) for name in ("a.onnx", "b.onnx"))
    for name, values in one.items():
        np.testing.assert_array_equal(values, other[name])
    assert traced.precision == rewritten.precision == "fp16"


def test_a_spec_of_ones_own_keeps_what_belongs_to_the_graph(sources, tmp_path):
    """K of tiles of 96 px is 12 x 12 + 6 x 6 + 3 x 3."""
    mine = make_spec(name="mine", tile_size=96, max_detections=7, licence="CC0-1.0")
    stored = export_model(sources["rotated"], tmp_path / "out.onnx", spec=mine, verify=False)
    assert (stored.name, stored.licence, stored.tile_size, stored.max_detections) == ("mine", "CC0-1.0", 96, 189)
    was = read_spec(sources["rotated"])
    assert (stored.weights_sha256, stored.exporter) == (was.weights_sha256, was.exporter) and was.weights_sha256


@pytest.mark.parametrize("kind", ["horizontal", "mask"])
def test_half_weights_are_those_of_the_weights_file(kind, sources, tmp_path):
    """Stored are the very numbers of a half-precision weights file, shared ones once."""
    from safetensors.numpy import load_file

    spec = read_spec(sources[kind])
    save_weights(moderate_network(kind), tmp_path / "m.safetensors", spec, half=True)
    stored = export_model(tmp_path / "m.safetensors", tmp_path / "h.onnx", half_weights=True)
    weights = load_file(tmp_path / "m.safetensors")
    graph = onnx.load(tmp_path / "h.onnx").graph
    halves = {t.name: numpy_helper.to_array(t) for t in graph.initializer if t.data_type == TensorProto.FLOAT16}
    assert len(halves) == sum(values.dtype == np.float16 for values in weights.values()) > 30
    for name, values in halves.items():
        key = name.removeprefix("graph.model.").removesuffix("/fp16")
        np.testing.assert_array_equal(values, weights[key])
    assert stored.precision == "fp32" and (tmp_path / "h.onnx").stat().st_size < 0.75 * sources[kind].stat().st_size
    again = export_model(tmp_path / "h.onnx", tmp_path / "fixed.onnx", tile_size=64)
    assert again.differences["scores"] < 1e-5
    fixed = onnx.load(tmp_path / "fixed.onnx").graph.initializer
    assert sum(tensor.data_type == TensorProto.FLOAT16 for tensor in fixed) == len(halves), "they stay half"


def test_int8_is_calibrated_on_the_tiles_that_it_is_compared_on(tmp_path):
    """Of a trained model: what it finds is found again, a little elsewhere."""
    source, path = CATALOG["sen2ships_r"].path, tmp_path / "int8.onnx"
    scene = CHIPS / "casablanca.tif"
    stored = export_model(source, path, precision="int8", tile_size=256, batch_size=2, verify_on=[scene])
    assert stored.precision == "int8" and shape_of(path) == [2, 4, 256, 256]
    assert stored.differences["matched"] > 10 * stored.differences["unmatched"]
    assert 0.01 < stored.differences["boxes_px"] <= 4
    assert {node.op_type for node in onnx.load(path).graph.node} >= {"QuantizeLinear", "DequantizeLinear"}
    assert path.stat().st_size < 0.8 * source.stat().st_size
    check_graph(path)
    with pytest.raises(ConfigError, match="is int8 already"):
        export_model(path, tmp_path / "again.onnx", precision="int8")


# ---------------------------------------------------------------- verdicts


def damage(model: onnx.ModelProto, by: float = 2) -> None:
    """Change one weight of the finest level's scores."""
    weight = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("rtm_cls.0.weight"))
    values = numpy_helper.to_array(weight).copy()
    values.flat[3] += by
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_one_wrong_weight_is_found(precision, sources, tmp_path, monkeypatch):
    """Negative control: the network whose numbers the file should have is another one than was traced."""
    trace = export_trace._trace

    def trace_another(graph, spec):
        model = trace(graph, spec)
        damage(model)
        return model

    monkeypatch.setattr(export_trace, "_trace", trace_another)
    save_weights(moderate_network("rotated"), tmp_path / "m.safetensors", read_spec(sources["rotated"]), half=False)
    result = run("export", tmp_path / "m.safetensors", "-o", tmp_path / "bad.onnx", "--precision", precision)
    assert result.exit_code == 3 and "differs from torch" in result.stderr
    assert sorted(item.name for item in tmp_path.iterdir()) == ["m.safetensors"]


@pytest.mark.parametrize("factor,is_beyond", [(2.0**8, False), (2.0**14, True)])
def test_numbers_beyond_half_precision_are_found(factor, is_beyond, tmp_path):
    """One layer multiplies pixels of up to 255 / 32, the next divides: fp32 does not mind, fp16 ends at 65504."""
    weights = {"up": np.eye(3) * factor, "down": np.array([[1.0, 0.0, -1.0], [0.0, 0.5, 0.0]]) / factor}
    stored = [
        numpy_helper.from_array(value[..., None, None].astype(np.float32), name) for name, value in weights.items()
    ]
    stored.append(numpy_helper.from_array(np.float32(32), "scale"))
    chain = [("Cast", []), ("Div", ["scale"]), ("Conv", ["up"]), ("Relu", []), ("Conv", ["down"])]
    chain += [("GlobalAveragePool", []), ("Flatten", []), ("Softmax", [])]
    tensors = ["images", *(f"{number}" for number in range(len(chain) - 1)), "scores"]
    nodes = [
        helper.make_node(operator, [tensors[number], *others], [tensors[number + 1]], name=f"{operator} {number}")
        for number, (operator, others) in enumerate(chain)
    ]
    nodes[0].attribute.append(helper.make_attribute("to", TensorProto.FLOAT))
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 3, SIDE, SIDE])
    scores = helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", 2])
    graph = helper.make_graph(nodes, "chain", [images], [scores], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    write_metadata(model, classifier_spec())
    onnx.save(model, tmp_path / "chain.onnx")
    assert export_model(tmp_path / "chain.onnx", tmp_path / "full.onnx").differences == {"scores": 0}
    if not is_beyond:
        stored_spec = export_model(tmp_path / "chain.onnx", tmp_path / "half.onnx", precision="fp16")
        assert stored_spec.differences["scores"] < 2e-3
        return
    with pytest.raises(ExportMismatchError, match="output 'scores' at batch 1 is not finite in the file"):
        export_model(tmp_path / "chain.onnx", tmp_path / "half.onnx", precision="fp16")
    assert not (tmp_path / "half.onnx").exists()


@pytest.mark.parametrize("precision,by", [("fp16", 2), ("int8", 1000)])
def test_verdict_on_detections(precision, by, sources, tmp_path):
    """A weight changed by much moves some scores, changed wildly most: what int8 is refused for."""
    model = onnx.load(sources["rotated"])
    damage(model, by)
    spec = read_spec(sources["rotated"]).model_copy(update={"precision": precision})
    for name in ("same", "other"):
        proto = onnx.load(sources["rotated"]) if name == "same" else model
        write_metadata(proto, spec)
        onnx.save(proto, tmp_path / f"{name}.onnx")
    reference, batches = FileReference(sources["rotated"]), [CheckBatch(make_check_tiles(1, 3, 128, seed=2))]
    found = verify_export(reference, FileReference(tmp_path / "same.onnx"), batches)
    assert found == Differences(matched=found.matched) and found.matched >= 20
    with pytest.raises(ExportMismatchError, match=r"detections matched, \d+ not \(allowed"):
        verify_export(reference, FileReference(tmp_path / "other.onnx"), batches)


def rows(boxes: list[list[float]], scores: list[float]) -> dict[str, np.ndarray]:
    """Outputs of 84 rows, what 64 x 64 px have, one image; the others have score 0."""
    outputs = {"boxes": np.zeros((1, 84, 5), np.float32), "scores": np.zeros((1, 84), np.float32)}
    outputs["boxes"][0, : len(boxes)], outputs["scores"][0, : len(scores)] = boxes, scores
    return outputs | {"labels": np.zeros((1, 84), np.float32)}


def compare(expected, found, **changes) -> Differences:
    spec = make_spec(score_threshold=0.3, **changes)
    batch = check._Run(expected, found, (1, 3, 64, 64))
    return check._compare_detections([batch], spec, check.HALF_TOLERANCES)


def test_detections_worked_by_hand(monkeypatch):
    """Threshold .3: rows from .32 on count; ranks do not; angles are the same half a turn apart."""
    monkeypatch.setattr(check, "NUM_CHECK_DETECTIONS", 1)
    one = rows([[10, 10, 8, 4, 1.5], [30, 10, 8, 4, 0], [50, 10, 8, 4, 0]], [0.9, 0.895, 0.31])
    other = rows([[30.25, 10, 8, 4, 0], [10, 10, 8, 4, 1.5 - np.pi], [90, 90, 8, 4, 0]], [0.9, 0.898, 0.31])
    found = compare(one, other)
    assert found.boxes == pytest.approx(0.25) and found.scores == pytest.approx(0.005, abs=1e-6)
    assert (found.matched, found.unmatched) == (2, 0)
    lost = compare(one, rows([[10, 10, 8, 4, 1.5]], [0.9]))
    assert (lost.matched, lost.unmatched) == (1, 1) and lost.scores == pytest.approx(0.895)
    more = compare(rows([[10, 10, 8, 4, 1.5]], [0.9]), rows([[10, 10, 8, 4, 1.5], [30, 10, 8, 4, 0]], [0.9, 0.5]))
    assert (more.matched, more.unmatched) == (1, 1), "a box that only the file has counts as well"
    large = compare(rows([[500, 500, 400, 40, 0]], [0.9]), rows([[501, 500, 400, 40, 0]], [0.9]))
    assert large.boxes == pytest.approx(0.25), "per 100 px of size"


def test_low_scores_are_compared_where_there_are_no_others():
    """No score reaches the threshold: the best 20 count, so that a file is never let through unseen."""
    boxes = [[10.0 * number, 10, 8, 4, 0] for number in range(30)]
    scores = [0.1 - 0.001 * number for number in range(30)]
    found = compare(rows(boxes, scores), rows(boxes, scores))
    assert (found.matched, found.unmatched) == (20, 0)
    moved = compare(rows(boxes, scores), rows([[x + 1, y, *rest] for x, y, *rest in boxes], scores))
    assert (moved.matched, moved.unmatched) == (0, 20 + 10)  # the file's own count from .01 higher on


def test_the_cut_of_a_level_is_no_loss():
    """640 x 640 px: 6400 pairs on the finest level, of which 2000 are kept; which of near ties is open."""
    scores = np.concatenate([np.linspace(0.9, 0.5, 2000), np.zeros(2000)]).astype(np.float32)[None]
    boxes = np.zeros((1, 4000, 5), np.float32)
    boxes[0, :, 0], boxes[0, :, 2:4] = 10 * np.arange(4000), 4
    expected = {"boxes": boxes, "scores": scores, "labels": np.zeros_like(scores)}
    moved = boxes.copy()
    moved[0, 1950:2000, 0] += 10**6  # other pairs at the end, from .51 down
    batch = check._Run(expected, expected | {"boxes": moved}, (1, 3, 640, 640))
    spec = make_spec(score_threshold=0.3)
    found = check._compare_detections([batch], spec, check.HALF_TOLERANCES)
    assert found.unmatched == 0 and found.boxes == 0 and found.matched == int((scores[0, :2000] > 0.52).sum()) > 1800
    moved[0, 1890, 0] += 10**6
    assert check._compare_detections([batch], spec, check.HALF_TOLERANCES).unmatched == 2


# ---------------------------------------------------------------- tiles


def test_shipped_tiles_follow_the_bands():
    assert CHECK_TILES.stat().st_size < 250_000
    four = read_spec(CATALOG["sen2ships_r"].path)
    colour, aerial = shipped_tiles(four, None)
    assert colour.shape == aerial.shape == (4, 192, 192) and colour.dtype == np.uint8
    assert colour.std() > 10 and aerial[:3].std() > 10
    assert set(np.unique(aerial[3])) == {four.optional_bands["nir"]}, "the orthophoto has no near infrared"
    swapped = shipped_tiles(make_spec(bands=("blue", "green", "red")), None)[0]
    np.testing.assert_array_equal(swapped, colour[[2, 1, 0]])
    other = shipped_tiles(make_spec(bands=("vv", "vh"), mean=(1.0, 1.0), std=(1.0, 1.0)), 224)[0]
    assert other.shape == (2, 224, 224)
    np.testing.assert_array_equal(other[:, :192, :192], colour[:2])
    np.testing.assert_array_equal(other[:, :, 192:], other[:, :, 191:159:-1])  # mirrored
    assert shipped_tiles(four, 640)[1].shape == (4, 640, 640) and shipped_tiles(four, 64)[0].shape == (4, 64, 64)


def test_tiles_of_scenes_and_pictures(tmp_path):
    spec = read_spec(CATALOG["sen2ships_r"].path)
    tiles = list(cut_tiles([CHIPS / "casablanca.tif"], spec, 256))
    assert len(tiles) == 4 and {tile.shape for tile in tiles} == {(4, 256, 256)}  # of 5 x 3 at 4 m
    from rtmdet_geo.raster import open_scene

    with open_scene(
        CHIPS / "casablanca.tif",
        model_bands=spec.bands,
        stretch=spec.stretch,
        model_gsd_m=spec.gsd_m,
        trained_gsd_m=spec.trained_gsd_m,
    ) as scene:
        np.testing.assert_array_equal(tiles[0], scene.read(0, 0, 256, 256)[0])
    write_scene(tmp_path / "small.png.tif", make_check_tiles(1, 3, 64, seed=0)[0][0])
    (padded,) = cut_tiles([tmp_path], make_spec(), 96)
    assert padded.shape == (3, 96, 96) and (padded[:, 64:] == 114).all()


@pytest.mark.parametrize(
    "files,error,words",
    [
        (["nosuch.tif"], RasterError, "nosuch.tif"),
        (["."], ConfigError, "no pictures in"),
        (["note.txt"], RasterError, "note.txt"),
        (["grey.tif"], BandError, "grey.tif"),
    ],
)
def test_what_cannot_be_verified_on(files, error, words, sources, tmp_path):
    folder = tmp_path / "inputs"
    folder.mkdir()
    if files != ["."]:
        (folder / "note.txt").write_text("no raster")
        write_scene(folder / "grey.tif", make_check_tiles(1, 2, 64, seed=0)[0][0], bands=2)
    with pytest.raises(error, match=words):
        export_model(sources["rotated"], tmp_path / "out.onnx", verify_on=[folder / name for name in files])
    assert not (tmp_path / "out.onnx").exists()


# ---------------------------------------------------------------- command line


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], prog_name="rtmdet-geo")


def test_command_line(sources, tmp_path):
    scene = write_scene(tmp_path / "scene.tif", make_check_tiles(1, 3, 128, seed=3)[0][0])
    arguments = ("export", sources["mask"], "-o", tmp_path / "half.onnx", "--precision", "fp16", "--tile-size", 96)
    result = run(
        *arguments, "--batch-size", 2, "--verify-on", scene, "--verify-on", CHIPS / "banepa_west.tif", "--json"
    )
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["compared_with"] == str(sources["mask"]) and answer["spec"]["precision"] == "fp16"
    assert answer["spec"]["differences"]["matched"] > 0
    session, spec = open_model_file(tmp_path / "half.onnx")
    assert session.get_inputs()[0].shape == [2, 3, 96, 96] and spec.tile_size == 96
    text = run(*arguments, "--overwrite").stdout
    assert f"small_mask, fp16, 1.4 MB, compared with {sources['mask']}: boxes within" in text


def test_without_torch(sources, tmp_path):
    """A model file is rewritten where only the base installation and onnx are."""
    program = "import sys; sys.modules['torch'] = None\nfrom rtmdet_geo.cli import main\nmain(sys.argv[1:])"
    arguments = ["export", str(sources["rotated"]), "-o", str(tmp_path / "out.onnx"), "--precision", "fp16"]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    weights = tmp_path / "w.safetensors"
    shutil.copy(CATALOG["sen2ships_r"].weights_path, weights)
    arguments[1:4] = [str(weights), "-o", str(tmp_path / "other.onnx")]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "pip install 'rtmdet-geo[export]'" in done.stderr


@pytest.mark.parametrize(
    "error,arguments,words",
    [
        (ConfigError, {"precision": "fp8"}, "choose fp32, fp16 or int8"),
        (ConfigError, {"half_weights": True}, "made from weights"),
        (ConfigError, {"half_weights": True, "precision": "fp16"}, "half weights are for fp32 files"),
        (ConfigError, {"tile_size": 100}, "multiple of 32"),
        (ConfigError, {"batch_size": 0}, "batch 0"),
        (ConfigError, {"score_threshold": 2}, "score_threshold"),
        (ConfigError, {"spec": make_spec(classes=("a", "b"))}, "the spec is not that of"),
        (ConfigError, {"spec": make_spec(mean=(1.0, 1.0, 1.0))}, "mean or std differ"),
    ],
)
def test_refusals(error, arguments, words, sources, tmp_path):
    with pytest.raises(error, match=words):
        export_model(sources["rotated"], tmp_path / "out.onnx", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_refused_files(sources, tmp_path):
    mine = tmp_path / "mine.onnx"
    shutil.copy(sources["rotated"], mine)
    with pytest.raises(OutputError, match="is the source itself"):
        export_model(mine, mine, precision="fp16", overwrite=True)
    export_model(mine, tmp_path / "half.onnx", precision="fp16", tile_size=64, verify=False)
    for precision in ("fp32", "fp16"):
        with pytest.raises(ConfigError, match="is fp16 already"):
            export_model(tmp_path / "half.onnx", tmp_path / "again.onnx", precision=precision)
    export_model(mine, tmp_path / "fixed.onnx", tile_size=64, verify=False)
    with pytest.raises(ConfigError, match="takes height 64 only, not 96"):
        export_model(tmp_path / "fixed.onnx", tmp_path / "again.onnx", tile_size=96)
    assert export_model(tmp_path / "fixed.onnx", tmp_path / "half64.onnx", precision="fp16").tile_size == 64
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    with pytest.raises(ModelFileError, match=r"broken\.onnx"):
        export_model(tmp_path / "broken.onnx", tmp_path / "again.onnx")
    with pytest.raises(ModelFileError, match=r"nosuch\.onnx"):
        export_model(tmp_path / "nosuch.onnx", tmp_path / "again.onnx")
