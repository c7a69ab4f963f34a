"""The OpenVINO backend beyond what all engines share: fp32, threads, fixed tiles, whole scenes, what is missing.

`tests/test_backends.py` holds what it refuses, `tests/test_backend_torch.py` compares it with onnxruntime.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
import rasterio
from onnx import helper
from synthetic import make_spec, small_model, small_network
from test_backend_torch import assert_same
from test_backends import write_model

from rtmdet_geo.backends import Backend, open_backend
from rtmdet_geo.detect import detect_scene
from rtmdet_geo.errors import ConfigError, MissingDependencyError, ModelFileError
from rtmdet_geo.export import export_model, make_check_tiles

DATA = Path(__file__).parent / "data"


@pytest.fixture
def openvino() -> None:
    pytest.importorskip("openvino")


def test_precision_threads_and_cores(openvino):
    """Whatever the processor would be quicker with, and whatever other programs run on the first cores."""
    engine = open_backend(small_model(), name="openvino", threads=2)
    engine.raw(make_check_tiles(1, 3, 64, seed=0))
    (compiled,) = engine._graph._compiled.values()
    assert compiled.get_property("INFERENCE_PRECISION_HINT").to_string() == "f32"
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 2 and compiled.get_property("NUM_STREAMS") == 1
    assert compiled.get_property("ENABLE_CPU_PINNING") is False


@pytest.mark.parametrize("kind", ["rotated", "horizontal", "mask"])
def test_fixed_tiles(openvino, tmp_path, kind):
    spec = make_spec(kind=kind, tile_size=160)
    export_model(small_network(kind), tmp_path / "fixed.onnx", spec=spec, tile_size=160, verify=False)
    one, other = (open_backend(tmp_path / "fixed.onnx", name=name, threads=1) for name in ("onnxruntime", "openvino"))
    assert one.fixed_tile_size == other.fixed_tile_size == 160 and isinstance(other, Backend)
    tiles = make_check_tiles(3, 3, 160, seed=1)
    found = [engine.predict(tiles, score_threshold=0.05) for engine in (one, other)]
    for image in range(3):
        assert_same(found[0][image], found[1][image])
    with pytest.raises(ConfigError, match=r"takes tiles of 160 x 160 px only, not 128 x 128"):
        other.predict(np.zeros((1, 3, 128, 128), np.uint8), score_threshold=0.3)


def test_bundled_buildings(openvino):
    """Real pixels: every candidate of a part of Banepa, with its mask."""
    with rasterio.open(DATA / "banepa_west.tif") as dataset:
        tiles = dataset.read((1, 2, 3))[None, :, :256, :256]  # a view: not in one piece of memory
    engines = [open_backend("banepa_ins", name=name, threads=1) for name in ("onnxruntime", "openvino")]
    assert_same(*(engine.predict(tiles, score_threshold=0.1)[0] for engine in engines))


def test_casablanca(openvino):
    """The same 15 ships as onnxruntime's, at the same places to a centimetre."""
    found = [
        detect_scene(DATA / "casablanca.tif", backend=name, threads=1).sort_values("score")
        for name in ("onnxruntime", "openvino")
    ]
    one, other = found
    assert len(one) == len(other) == 15
    assert other.attrs["summary"]["parameters"]["backend"] == "openvino"
    assert one.geometry.reset_index(drop=True).distance(other.geometry.reset_index(drop=True)).max() == 0
    np.testing.assert_allclose(one.geometry.centroid.x, other.geometry.centroid.x, atol=0.01)
    np.testing.assert_allclose(one.geometry.centroid.y, other.geometry.centroid.y, atol=0.01)
    np.testing.assert_allclose(one["score"], other["score"], atol=1e-3)


def test_several_threads_share_an_engine(openvino):
    """A compiled graph alone would refuse the second caller as busy."""
    engine = open_backend(small_model(), name="openvino", threads=1)
    tiles = make_check_tiles(6, 3, 128, seed=5)
    alone = [engine.predict(tile[None], score_threshold=0.1)[0] for tile in tiles]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda tile: engine.predict(tile[None], score_threshold=0.1)[0], [*tiles] * 4))
    for index, found in enumerate(together):
        np.testing.assert_array_equal(found.boxes, alone[index % 6].boxes)


def test_operators_that_openvino_does_not_know(openvino, tmp_path):
    """onnxruntime's own operators are such; the message says what goes on."""
    model = onnx.load(write_model(tmp_path / "made.onnx"))
    model.graph.node.append(helper.make_node("NhwcMaxPool", ["images"], ["pooled"], domain="com.microsoft"))
    model.graph.output.append(helper.make_tensor_value_info("pooled", onnx.TensorProto.UINT8, None))
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, tmp_path / "special.onnx")
    with pytest.raises(ModelFileError, match=r"OpenVINO cannot \w+ '.*special\.onnx'.*backend onnxruntime") as caught:
        open_backend(tmp_path / "special.onnx", name="openvino")
    assert "\n" not in str(caught.value)


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'rtmdet-geo\[openvino\]'"):
        open_backend(small_model(), name="openvino")
