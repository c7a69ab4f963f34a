"""Names, paths and the metadata inside model files."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from synthetic import make_spec

from rtmdet_geo import catalog
from rtmdet_geo.catalog import (
    CATALOG,
    DEFAULT_MODEL,
    file_sha256,
    find_model,
    find_weights,
    list_models,
    read_metadata,
    read_spec,
)
from rtmdet_geo.errors import ModelFileError, UnknownModelError


def onnx_file(path: Path, metadata: dict[str, str]) -> Path:
    """Write the smallest ONNX file with metadata."""
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    other = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    model = helper.make_model(helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [value], [other]))
    helper.set_model_props(model, metadata)
    onnx.save(model, path)
    return path


def test_names():
    assert DEFAULT_MODEL in CATALOG
    assert [entry.name for entry in list_models()] == sorted(CATALOG)
    for name, entry in CATALOG.items():
        assert entry.name == name and entry.summary and entry.path.parent == catalog.ASSETS


@pytest.mark.parametrize("name", sorted(CATALOG))
def test_listed_files_hold_complete_cards(name):
    spec = read_spec(find_model(name))
    assert spec.name == name
    for what in ("training_data", "licence", "attribution", "limits", "weights_sha256", "metrics"):
        assert getattr(spec, what), f"{what} is not stated"


def test_find_by_path(tmp_path):
    path = onnx_file(tmp_path / "mine.onnx", {})
    assert find_model(path) == path and find_model(str(path)) == path


def test_near_names_are_offered():
    with pytest.raises(UnknownModelError, match="did you mean 'sen2ships_r'"):
        find_model("sen2ship")
    with pytest.raises(UnknownModelError, match=r"known names: .*sen2ships_r"):
        find_model("qqqq")


@pytest.mark.parametrize("text", ["nosuch.onnx", "some/where/model", "nosuch.safetensors"])
def test_missing_path(text):
    with pytest.raises(ModelFileError, match="not there"):
        find_model(text)


def test_folder_is_no_model(tmp_path):
    with pytest.raises(ModelFileError, match="folder"):
        find_model(tmp_path)


def test_missing_bundled_file(monkeypatch, tmp_path):
    monkeypatch.setattr(catalog, "ASSETS", tmp_path)
    with pytest.raises(ModelFileError, match="reinstall"):
        find_model(None)


def test_spec_comes_back(tmp_path):
    spec = make_spec(attribution="contains modified Copernicus Sentinel data 2022\u20132023", limits="ä" * 300)
    path = onnx_file(tmp_path / "m.onnx", {"model_spec": spec.model_dump_json(), "other": ""})
    assert read_spec(path) == spec
    assert read_metadata(path)["other"] == ""


@settings(deadline=None, max_examples=30)
@given(st.dictionaries(st.text(min_size=1, max_size=20), st.text(max_size=200), max_size=5))
def test_metadata_as_onnx_reads_it(tmp_path_factory, metadata):
    path = onnx_file(tmp_path_factory.mktemp("m") / "m.onnx", metadata)
    assert read_metadata(path) == metadata == {item.key: item.value for item in onnx.load(path).metadata_props}


def test_every_truncation_is_an_error_or_lacks_the_spec(tmp_path):
    """Cut anywhere, a file never yields a spec: metadata comes after the graph."""
    whole = onnx_file(tmp_path / "m.onnx", {"model_spec": make_spec().model_dump_json()}).read_bytes()
    cut = tmp_path / "cut.onnx"
    end = whole.rindex(b"}") + 1
    for length in range(0, end, 7):
        cut.write_bytes(whole[:length])
        with pytest.raises(ModelFileError):
            read_spec(cut)


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=60))
def test_random_bytes_never_crash(tmp_path_factory, data):
    for suffix in (".onnx", ".safetensors"):
        path = tmp_path_factory.mktemp("r") / f"random{suffix}"
        path.write_bytes(data)
        try:
            read_spec(path)
        except ModelFileError:
            pass


def test_safetensors_header(tmp_path):
    import numpy as np
    from safetensors.numpy import save_file

    path = tmp_path / "w.safetensors"
    save_file({"a": np.zeros(3, np.float32)}, path, metadata={"model_spec": make_spec().model_dump_json()})
    assert read_spec(path) == make_spec()
    save_file({"a": np.zeros(3, np.float32)}, path)
    with pytest.raises(ModelFileError, match="model_spec"):
        read_spec(path)


def test_sha256(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    assert file_sha256(tmp_path / "f") == hashlib.sha256(b"abc").hexdigest()


def test_reading_a_card_loads_no_engine(tmp_path):
    path = onnx_file(tmp_path / "m.onnx", {"model_spec": make_spec().model_dump_json()})
    code = (
        "import sys\nfrom rtmdet_geo.catalog import read_spec\n"
        f"read_spec({str(path)!r})\nprint(sorted({{'torch', 'onnxruntime', 'onnx', 'rasterio'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


def test_weights_to_start_from(tmp_path):
    assert find_weights("sen2ships_r") == CATALOG["sen2ships_r"].weights_path
    path = tmp_path / "mine.safetensors"
    path.write_bytes(b"")
    assert find_weights(path) == path
    with pytest.raises(ModelFileError, match="no safetensors"):
        find_weights(onnx_file(tmp_path / "mine.onnx", {}))
    with pytest.raises(UnknownModelError):
        find_weights("qqqq")


@pytest.mark.parametrize("name", sorted(CATALOG))
def test_twin_holds_the_same_description(name):
    """The model file and the weights to fine-tune from are of one training, and each is small enough to bundle."""
    entry = CATALOG[name]
    model, twin = read_spec(entry.path), read_spec(entry.weights_path)
    same = {"name", "architecture", "classes", "bands", "stretch", "mean", "std", "gsd_m", "metrics", "training_data"}
    assert model.model_dump(include=same) == twin.model_dump(include=same)
    assert max(entry.path.stat().st_size, entry.weights_path.stat().st_size) <= 12e6
