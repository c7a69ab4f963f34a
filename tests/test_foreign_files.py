"""Model files of other programs: `info` describes them, `detect` says what they lack."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper
from test_cli import error_line, run

from rtmdet_geo.backends.foreign import describe_foreign
from rtmdet_geo.errors import ModelFileError

SCENE = Path(__file__).parent / "data" / "casablanca.tif"


@pytest.fixture
def foreign(tmp_path):
    """A graph with another input and output, made by another program."""
    graph = helper.make_graph(
        [helper.make_node("Relu", ["pixels"], ["dets"])],
        "small",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 3, 64, 64])],
        [helper.make_tensor_value_info("dets", TensorProto.FLOAT, ["batch", 3, 64, 64])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    model.producer_name, model.doc_string = "another", "finds ships"
    helper.set_model_props(model, {"names": "ship"})
    path = tmp_path / "other.onnx"
    onnx.save(model, path)
    return path


def test_what_is_said_of_it(foreign):
    facts = describe_foreign(foreign)
    assert facts["producer"] == "another" and facts["graph"] == "small" and facts["description"] == "finds ships"
    assert facts["inputs"] == [{"name": "pixels", "type": "fp32", "sizes": ("batch", 3, 64, 64)}]
    assert facts["outputs"][0]["name"] == "dets" and facts["metadata"] == {"names": "ship"}
    assert facts["bytes"] == foreign.stat().st_size
    assert facts["lacks"] == [
        "input 'images' uint8 (N, C, H, W) (it has pixels fp32 (batch, 3, 64, 64))",
        "output 'boxes' fp32 (N, K, 5)",
        "output 'scores' fp32 (N, K)",
        "output 'labels' fp32 (N, K)",
        "metadata key 'model_spec'",
    ]


@pytest.mark.parametrize("verb", [("info",), ("models", "show")])
def test_info(foreign, verb):
    text = run(*verb, str(foreign)).stdout
    for part in (
        "made by      another",
        "input        pixels fp32 (batch, 3, 64, 64)",
        "names: ship",
        "rtmdet-geo export",
    ):
        assert part in text
    assert all(len(line) <= 120 for line in text.splitlines())
    facts = json.loads(run(*verb, str(foreign), "--json").stdout)
    assert facts["path"] == str(foreign) and len(facts["lacks"]) == 5


def test_detect_says_what_is_missing(foreign):
    line = error_line(run("detect", SCENE, "-m", foreign, "--json"))
    assert "it lacks input 'images' uint8" in line and "metadata key 'model_spec'" in line


def test_damaged(foreign, tmp_path):
    torn = tmp_path / "torn.onnx"
    torn.write_bytes(foreign.read_bytes()[:-40])
    with pytest.raises(ModelFileError, match=r"torn\.onnx"):
        describe_foreign(torn)
    with pytest.raises(ModelFileError, match="is not there"):
        describe_foreign(tmp_path / "none.onnx")


def test_an_rtmdet_of_another_exporter(data_dir):
    """Its boxes and labels go by other names, and its pixels are normalised outside."""
    path = data_dir / "weights" / "rtmdet_nano_person.onnx"
    facts = describe_foreign(path)
    assert [port["name"] for port in facts["outputs"]] == ["dets", "labels"]
    assert facts["inputs"][0]["type"] == "fp32" and len(facts["lacks"]) == 5
    assert "output   dets fp32 (batch, num_dets" in run("info", str(path)).stdout
