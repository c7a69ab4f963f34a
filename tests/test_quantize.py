"""int8 model files: what is rounded, that both engines run them, what is refused, and what bundled models lose."""

from __future__ import annotations

import gc
import importlib.util
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import geopandas
import numpy as np
import onnx
import onnxruntime
import pytest
from classifiers import SIDE, classifier_spec
from onnx import TensorProto, helper, numpy_helper
from synthetic import make_spec, small_model, small_network
from test_backends import write_model

from rtmdet_geo.backends import open_backend
from rtmdet_geo.backends.classify import open_classifier
from rtmdet_geo.backends.openvino_rt import OpenVinoGraph
from rtmdet_geo.catalog import CATALOG, check_graph, read_spec
from rtmdet_geo.detect import detect_scene
from rtmdet_geo.errors import ConfigError, ModelFileError, OutputError
from rtmdet_geo.export import export_model, make_check_tiles
from rtmdet_geo.export.graph import write_metadata
from rtmdet_geo.export.half import to_half
from rtmdet_geo.export.quantize import OPERATORS, find_trunk, quantize_model
from rtmdet_geo.export.tiles import shipped_tiles

SCENE = Path(__file__).parent / "data" / "casablanca.tif"
ENGINES = [
    "onnxruntime",
    pytest.param(
        "openvino",
        marks=pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed"),
    ),
]
#: Nodes of :func:`write_tiny` between two convolutions, or that one follows.
TINY_TRUNK = ["conv 1", "sigmoid 1", "mul 1", "conv 2", "sigmoid 2", "mul 2", "gated"]


def tiles(number: int = 2, side: int = 128) -> Iterator[np.ndarray]:
    """Yield batches of two tiles."""
    return (make_check_tiles(2, 3, side, seed=index) for index in range(number))


def write_tiny(path: Path) -> Path:
    """Write a classifier of three convolutions, the second with channel attention, by the model-file contract."""
    generator = np.random.default_rng(0)
    shapes = {"1": (4, 3, 3, 3), "2": (4, 4, 3, 3), "fc": (4, 4, 1, 1), "3": (2, 4, 1, 1)}
    stored = [
        numpy_helper.from_array(generator.normal(0, 0.5, shape).astype(np.float32), f"weight {name}")
        for name, shape in shapes.items()
    ]
    stored.append(numpy_helper.from_array(np.float32(64), "scale"))

    def node(operator: str, inputs: list[str], name: str, **attributes: object) -> onnx.NodeProto:
        return helper.make_node(operator, inputs, [name], name=name, **attributes)

    nodes = [
        node("Cast", ["images"], "cast", to=TensorProto.FLOAT),
        node("Div", ["cast", "scale"], "div"),
        node("Conv", ["div", "weight 1"], "conv 1"),
        node("Sigmoid", ["conv 1"], "sigmoid 1"),
        node("Mul", ["conv 1", "sigmoid 1"], "mul 1"),
        node("Conv", ["mul 1", "weight 2"], "conv 2"),
        node("Sigmoid", ["conv 2"], "sigmoid 2"),
        node("Mul", ["conv 2", "sigmoid 2"], "mul 2"),
        node("GlobalAveragePool", ["mul 2"], "mean"),
        node("Conv", ["mean", "weight fc"], "fc"),
        node("HardSigmoid", ["fc"], "gate"),
        node("Mul", ["mul 2", "gate"], "gated"),
        node("Conv", ["gated", "weight 3"], "conv 3"),
        node("GlobalAveragePool", ["conv 3"], "logits"),
        node("Flatten", ["logits"], "flat"),
        node("Softmax", ["flat"], "scores"),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", 3, SIDE, SIDE])
    scores = helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", 2])
    graph = helper.make_graph(nodes, "tiny", [images], [scores], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    write_metadata(model, classifier_spec())
    onnx.save(model, path)
    return path


@cache
def small_int8(kind: str) -> Path:
    """Return the small exported model in int8, made once per test process."""
    source = small_model(kind)
    path = source.with_name(f"{source.stem}_int8.onnx")
    quantize_model(source, path, calibration=tiles())
    return path


def initialisers(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


# ---------------------------------------------------------------- a network that can be counted through


def test_trunk_by_hand(tmp_path):
    original = onnx.load(write_tiny(tmp_path / "tiny.onnx"))
    assert find_trunk(original.graph) == TINY_TRUNK
    quantize_model(tmp_path / "tiny.onnx", tmp_path / "int8.onnx", calibration=tiles(side=SIDE))
    rounded = onnx.load(tmp_path / "int8.onnx").graph
    weights = {node.name: node.input[1] for node in rounded.node if node.op_type == "Conv"}
    assert {name: weight.removesuffix("_DequantizeLinear_Output") for name, weight in weights.items()} == {
        name: f"weight {name.removeprefix('conv ')}" for name in ("conv 1", "conv 2", "fc", "conv 3")
    }
    assert [weight.endswith("_DequantizeLinear_Output") for weight in weights.values()] == [True, True, False, False]
    makers = {name: node.op_type for node in rounded.node for name in node.output}
    fc, gate = (next(node for node in rounded.node if node.name == name) for name in ("fc", "gate"))
    assert makers[fc.input[0]] == "GlobalAveragePool" and makers[gate.input[0]] == "Conv"
    assert rounded.input == original.graph.input and rounded.output == original.graph.output


def test_weights_and_ranges_by_hand(tmp_path):
    """A weight becomes the nearest of 129 steps of its output channel; uint8 steps span what the tiles fill."""
    source = write_tiny(tmp_path / "tiny.onnx")
    quantize_model(source, tmp_path / "int8.onnx", calibration=tiles(side=SIDE))
    original, rounded = initialisers(source), initialisers(tmp_path / "int8.onnx")
    for name in ("weight 1", "weight 2"):
        largest = np.abs(original[name]).max(axis=(1, 2, 3))
        np.testing.assert_allclose(rounded[f"{name}_scale"], largest / 64, rtol=1e-5)
        steps = original[name] / (largest / 64)[:, None, None, None]
        assert rounded[f"{name}_quantized"].dtype == np.int8
        assert np.abs(rounded[f"{name}_quantized"] - steps).max() < 0.501
    pixels = np.concatenate(list(tiles(side=SIDE)))
    np.testing.assert_allclose(rounded["div_scale"], pixels.max() / 64 / 255, rtol=1e-5)  # ranges hold 0
    assert rounded["div_zero_point"] == 0 and rounded["div_zero_point"].dtype == np.uint8


@pytest.mark.parametrize("engine", ENGINES)
def test_classifier(engine, tmp_path):
    """int8 in deed: nearly the probabilities of fp32, and not theirs; eight images at once as each alone."""
    source = write_tiny(tmp_path / "tiny.onnx")
    quantize_model(source, tmp_path / "int8.onnx", calibration=tiles(side=SIDE))
    images = np.concatenate(list(tiles(4, side=SIDE)))
    found, expected = (
        open_classifier(path, backend=engine, threads=1).predict(images) for path in (tmp_path / "int8.onnx", source)
    )
    assert expected.std() > 0.05 and 1e-5 < np.abs(found - expected).max() < 0.03
    classifier = open_classifier(tmp_path / "int8.onnx", backend=engine, threads=1)
    alone = np.concatenate([classifier.predict(image[None]) for image in images])
    np.testing.assert_allclose(found, alone, atol=1e-6)


def test_calibration_decides(tmp_path):
    """Negative control: by the ranges of black tiles nothing can be told apart."""
    source = write_tiny(tmp_path / "tiny.onnx")
    black = [np.zeros_like(batch) for batch in tiles(side=SIDE)]
    quantize_model(source, tmp_path / "int8.onnx", calibration=black)
    images = np.concatenate(list(tiles(4, side=SIDE)))
    found, expected = (open_classifier(path, threads=1).predict(images) for path in (tmp_path / "int8.onnx", source))
    assert np.abs(found - expected).max() > 0.1


def test_tiles_are_forgotten(tmp_path):
    """Of ten batches there are never more than two at a time."""
    alive, most = set(), 0

    def batches():
        nonlocal most
        for index in range(10):
            batch = make_check_tiles(1, 3, SIDE, seed=index)
            alive.add(index)
            weakref.finalize(batch, alive.discard, index)
            most = max(most, len(alive))
            yield batch
            del batch

    quantize_model(write_tiny(tmp_path / "tiny.onnx"), tmp_path / "int8.onnx", calibration=batches())
    gc.collect()
    assert 1 <= most <= 2 and not alive


def test_spec_and_checksum(tmp_path):
    source = write_tiny(tmp_path / "tiny.onnx")
    spec = quantize_model(source, tmp_path / "int8.onnx", calibration=tiles(side=SIDE))
    assert spec == read_spec(tmp_path / "int8.onnx") and spec.precision == "int8"
    assert spec.exporter == f"int8 by onnxruntime {onnxruntime.__version__}"
    assert spec.model_copy(update={"precision": "fp32", "exporter": ""}) == read_spec(source)
    check_graph(tmp_path / "int8.onnx")
    data = (tmp_path / "int8.onnx").read_bytes()
    (tmp_path / "bent.onnx").write_bytes(data.replace(b"weight 2_scale", b"weight 2_scalf"))
    with pytest.raises(ModelFileError, match="damaged"):
        check_graph(tmp_path / "bent.onnx")


# ---------------------------------------------------------------- detectors


@pytest.mark.parametrize("kind,heads", [("rotated", "cls reg ang"), ("mask", "cls reg kernel")])
def test_trunk_of_detectors(kind, heads):
    """fp32 are the last convolutions and those of channel attention, one in each of four stages."""
    rounded = onnx.load(small_int8(kind)).graph
    makers = {name: node.op_type for node in rounded.node for name in node.output}
    convolutions = [node for node in rounded.node if node.op_type == "Conv"]
    full = {node.name for node in convolutions if makers.get(node.input[1]) != "DequantizeLinear"}
    last = {name for name in full if "/attention/" not in name}
    assert len(full - last) == 4 and len(convolutions) > 5 * len(full)
    named = {f"rtm_{head}.{level}" for head in heads.split() for level in range(3)}
    named |= {"mask_head/projection"} if kind == "mask" else set()
    assert {name.split("bbox_head/")[1].removesuffix("/Conv") for name in last} == named
    read = {node.op_type for node in rounded.node if {makers.get(name) for name in node.input} & {"DequantizeLinear"}}
    assert read <= {*OPERATORS, "QuantizeLinear", "GlobalAveragePool", "Shape"}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["rotated", "mask"])
def test_engines_run_detectors(engine, kind):
    """Scores are nearly those of fp32, and not theirs; a tile's rows do not depend on its batch."""
    backend, full = (open_backend(path, name=engine, threads=1) for path in (small_int8(kind), small_model(kind)))
    images = make_check_tiles(3, 3, 128, seed=7)
    found, expected = backend.raw(images), full.raw(images)
    assert np.corrcoef(found[1].ravel(), expected[1].ravel())[0, 1] > 0.98
    assert 1e-3 < np.abs(found[1] - expected[1]).max() < 0.25
    for index in range(len(images)):
        for together, alone in zip(found, backend.raw(images[index : index + 1]), strict=True):
            np.testing.assert_allclose(together[index], alone[0], atol=1e-4)


def test_openvino_rounds_for_convolutions_only():
    """Of the file's roundings as many stay as convolutions read."""
    openvino = pytest.importorskip("openvino")
    path = small_int8("rotated")
    assert open_backend(path, name="openvino").precision == "int8"
    kept = OpenVinoGraph(path, threads=1)._graph.get_ordered_ops()
    every = openvino.Core().read_model(str(path)).get_ordered_ops()
    number, rest = (len([node for node in nodes if node.get_type_name() == "FakeQuantize"]) for nodes in (every, kept))
    makers = [node.input_value(0).get_node() for node in kept if "Convolution" in node.get_type_name()]
    read = {maker.get_friendly_name() for maker in makers if maker.get_type_name() == "Multiply"}
    assert rest == len(read) > 40 and rest < 0.4 * number


def test_older_processors_give_the_same(tmp_path):
    """Without VNNI, oneDNN adds two products in 16 bits: 2 x 255 x 64 fits, 2 x 255 x 127 would not."""
    pytest.importorskip("openvino")
    real = shipped_tiles(read_spec(CATALOG["banepa_ins"].path), 192)
    quantize_model(CATALOG["banepa_ins"].path, tmp_path / "int8.onnx", calibration=[tile[None] for tile in real])
    np.save(tmp_path / "tiles.npy", np.stack(real))
    program = (
        "import sys, numpy as np\nfrom rtmdet_geo.backends import open_backend\n"
        "engine = open_backend(sys.argv[1], name='openvino', threads=1)\n"
        "np.save(sys.argv[3], engine.raw(np.load(sys.argv[2]))[1])"
    )
    for name, isa in (("this", "ALL"), ("older", "AVX2")):
        environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa}
        files = (tmp_path / file for file in ("int8.onnx", "tiles.npy", f"{name}.npy"))
        subprocess.run([sys.executable, "-c", program, *files], env=environment, check=True, capture_output=True)
    this, older = (np.load(tmp_path / f"{name}.npy") for name in ("this", "older"))
    assert np.abs(this - older).max() < 0.02


class Recorder:
    """An engine that remembers what it was shown."""

    def __init__(self, engine):
        self.engine, self.seen = engine, []

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def run(self, batches, **settings):
        def remembered():
            for batch in batches:
                self.seen.append(batch.copy())
                yield batch

        return self.engine.run(remembered(), **settings)


@pytest.fixture(scope="module")
def casablanca(tmp_path_factory):
    """The bundled model's ships of the committed scene, the tiles it saw, and it in int8, calibrated on them."""
    engine = Recorder(open_backend("sen2ships_r", threads=1))
    ships = detect_scene(SCENE, model=engine)
    path = tmp_path_factory.mktemp("int8") / "ships.onnx"
    quantize_model(CATALOG["sen2ships_r"].path, path, calibration=engine.seen)
    return ships, engine.seen, path


@pytest.mark.parametrize("engine", ENGINES)
def test_bundled_model_finds_the_same_ships(casablanca, engine):
    ships, _, path = casablanca
    assert path.stat().st_size < 0.75 * CATALOG["sen2ships_r"].path.stat().st_size
    found = detect_scene(SCENE, model=path, backend=engine, threads=1)
    assert len(ships) == 15 and 13 <= len(found) <= 17
    pairs = geopandas.sjoin_nearest(ships.to_crs(32629), found.to_crs(32629), distance_col="far")
    near = pairs[(pairs["far"] == 0) & (np.abs(pairs["score_left"] - pairs["score_right"]) < 0.1)]
    assert near["id_left"].nunique() >= 13


@pytest.mark.parametrize(
    "batches,words",
    [
        ([], "no calibration tiles"),
        ([np.zeros((0, 3, 64, 64), np.uint8)], "no calibration tiles"),
        ([np.zeros((1, 4, 64, 64), np.uint8)], r"\(N, 3, H, W\), sides multiples of 32 px, not uint8 \(1, 4, 64, 64\)"),
        ([np.zeros((1, 3, 64, 60), np.uint8)], "multiples of 32 px"),
        ([np.zeros((1, 3, 0, 64), np.uint8)], "multiples of 32 px"),
        ([np.zeros((3, 64, 64), np.uint8)], r"not uint8 \(3, 64, 64\); cut them as detection would"),
        ([np.zeros((1, 3, 64, 64), np.float32)], "not float32"),
    ],
)
def test_wrong_calibration(tmp_path, batches, words):
    with pytest.raises(ConfigError, match=words):
        quantize_model(small_model(), tmp_path / "int8.onnx", calibration=batches)
    assert not list(tmp_path.iterdir())


def test_wrong_calibration_later_on(tmp_path):
    batches = [np.zeros((1, 3, SIDE, SIDE), np.uint8), np.zeros((1, 3, SIDE, 2 * SIDE), np.uint8)]
    with pytest.raises(ConfigError, match=r"must be uint8 \(N, 3, 32, 32\), not uint8 \(1, 3, 32, 64\)"):
        quantize_model(write_tiny(tmp_path / "tiny.onnx"), tmp_path / "int8.onnx", calibration=batches)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.onnx"]


def test_fixed_tiles(tmp_path):
    export_model(small_network(), tmp_path / "a.onnx", spec=make_spec(tile_size=96), tile_size=96, verify=False)
    with pytest.raises(ConfigError, match=r"must be uint8 \(N, 3, 96, 96\), not uint8 \(2, 3, 128, 128\)"):
        quantize_model(tmp_path / "a.onnx", tmp_path / "int8.onnx", calibration=tiles())


def test_wrong_files(tmp_path):
    def fails(error, words, source=None, out=None, **options):
        out = tmp_path / "int8.onnx" if out is None else out
        with pytest.raises(error, match=words):
            quantize_model(source or small_model(), out, calibration=tiles(), **options)

    fails(ConfigError, r"is int8 already; .*rtmdet-geo export", small_int8("rotated"))
    onnx.save(to_half(onnx.load(small_model())), tmp_path / "half.onnx")
    fails(ConfigError, "is fp16 already", tmp_path / "half.onnx")
    fails(ConfigError, "holds no convolution", write_model(tmp_path / "rows.onnx"))
    fails(ModelFileError, "it lacks .*model_spec", write_model(tmp_path / "foreign.onnx", metadata={}))
    fails(ModelFileError, "not there", tmp_path / "nosuch.onnx")
    (tmp_path / "cut.onnx").write_bytes(small_model().read_bytes()[:1000])
    fails(ModelFileError, "truncated", tmp_path / "cut.onnx")
    fails(OutputError, r"must end in \.onnx", out=tmp_path / "int8.engine")
    fails(OutputError, "does not exist", out=tmp_path / "nowhere" / "int8.onnx")
    copied = tmp_path / "same.onnx"
    copied.write_bytes(small_model().read_bytes())
    fails(OutputError, "same", source=copied, out=copied, overwrite=True)
    fails(OutputError, "--overwrite", out=copied)
    assert not (tmp_path / "int8.onnx").exists() and copied.read_bytes() == small_model().read_bytes()
    tiny = write_tiny(tmp_path / "tiny.onnx")
    assert quantize_model(tiny, copied, calibration=tiles(side=SIDE), overwrite=True) == read_spec(copied)
