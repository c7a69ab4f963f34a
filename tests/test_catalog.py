"""Names, paths and the metadata inside model files."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from synthetic import make_spec

from rtmdet_geo import catalog, class_names
from rtmdet_geo.catalog import (
    CATALOG,
    DEFAULT_MODEL,
    WEIGHTS_SUFFIXES,
    count_stored_parameters,
    file_sha256,
    find_model,
    find_published,
    find_weights,
    known_spec,
    list_models,
    read_metadata,
    read_spec,
)
from rtmdet_geo.checkpoints import CHECKPOINTS, find_checkpoint
from rtmdet_geo.errors import MissingDependencyError, ModelFileError, UnknownModelError
from rtmdet_geo.structures import ModelSpec
from rtmdet_geo.variants import TASKS, VARIANTS


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
    foreign = tmp_path / "theirs.pth"
    foreign.write_bytes(b"")
    assert find_weights(foreign) == foreign
    with pytest.raises(ModelFileError, match="no weights file"):
        find_weights(onnx_file(tmp_path / "mine.onnx", {}))
    with pytest.raises(UnknownModelError):
        find_weights("qqqq")


def test_published_weights_to_start_from(tmp_path, monkeypatch):
    monkeypatch.setenv("RTMDET_GEO_CACHE", str(tmp_path))
    fetched = []
    monkeypatch.setattr(catalog, "download_checkpoint", lambda name: fetched.append(name) or Path("x.pth"))
    assert find_weights("rtmdet_s_coco") == Path("x.pth") and fetched == ["rtmdet_s_coco"]
    converted = CHECKPOINTS["rtmdet_s_coco"].converted_path
    converted.parent.mkdir(parents=True)
    converted.write_bytes(b"")
    assert find_weights("rtmdet_s_coco") == converted and len(fetched) == 1


def test_published_weights_are_models_for_torch(tmp_path, monkeypatch):
    monkeypatch.setenv("RTMDET_GEO_CACHE", str(tmp_path))
    fetched = []
    monkeypatch.setattr(catalog, "download_checkpoint", lambda name: fetched.append(name) or Path("x.pth"))
    assert find_model("rtmdet_s_coco") == Path("x.pth") and fetched == ["rtmdet_s_coco"]
    for suffix in WEIGHTS_SUFFIXES:
        path = tmp_path / f"mine{suffix}"
        with pytest.raises(ModelFileError, match="not there"):
            find_model(path.name)
        path.write_bytes(b"")
        assert find_model(path) == path
    with pytest.raises(UnknownModelError, match="did you mean 'rtmdet_s_coco'"):
        find_model("rtmdet_s_cocoo")


@pytest.mark.parametrize(
    ("name", "words"),
    [("rtmdet_s", "a network to train.*rtmdet_s_coco"), ("rtmdet_r_nano", "a network to train.*`rtmdet-geo train`")],
)
def test_networks_are_no_models(name, words):
    with pytest.raises(UnknownModelError, match=words):
        find_model(name)


def test_what_is_known_of_a_file_without_loading_it(tmp_path, monkeypatch):
    from safetensors.numpy import save_file

    monkeypatch.setenv("RTMDET_GEO_CACHE", str(tmp_path))
    checkpoint = CHECKPOINTS["rtmdet_s_coco"]
    for path in (checkpoint.path, checkpoint.converted_path):
        assert find_published(path) is checkpoint and known_spec(path) == checkpoint.spec()
    assert find_published("other.pth") is None and known_spec("other.pth") is None
    spec = make_spec()
    assert known_spec(onnx_file(tmp_path / "m.onnx", {"model_spec": spec.model_dump_json()})) == spec
    tensors = {"a": np.zeros(3, np.float32)}
    save_file(tensors, tmp_path / "ours.safetensors", metadata={"model_spec": spec.model_dump_json()})
    save_file(tensors, tmp_path / "theirs.safetensors")
    assert known_spec(tmp_path / "ours.safetensors") == spec and known_spec(tmp_path / "theirs.safetensors") is None
    with pytest.raises(ModelFileError, match="model_spec"):
        known_spec(onnx_file(tmp_path / "other.onnx", {}))


# ---------------------------------------------------------------- variants and published weights


def oracle_keys(folder: Path) -> dict[str, dict]:
    """Return the keys files by reference name."""
    files = sorted(folder.glob("keys_*.json"))
    assert files
    return {facts["model"]: facts for facts in (json.loads(file.read_text()) for file in files)}


def test_oracle_every_reference_model_is_in_the_catalogue(oracle_dir):
    by_reference = {variant.reference: variant for variant in VARIANTS.values() if variant.reference}
    references = oracle_keys(oracle_dir)
    assert set(by_reference) == set(references)
    for name, facts in references.items():
        variant = by_reference[name]
        assert variant.params == facts["params"], name
        assert variant.flops == pytest.approx(facts["flops"], rel=1e-3), name
        assert [variant.input_size] * 2 == facts["input"][2:], name


def test_variants_say_what_was_published():
    for name, variant in VARIANTS.items():
        assert variant.name == name and type(variant.params) is int and type(variant.flops) is int
        assert variant.task in TASKS
        if variant.is_ours:
            assert variant.published_params_m is None and variant.published_gflops is None
        else:  # published figures are rounded, and older than the count here
            assert variant.params / 1e6 == pytest.approx(variant.published_params_m, rel=0.025)
            assert variant.flops / 1e9 == pytest.approx(variant.published_gflops, rel=0.02)


def test_names_do_not_collide():
    names = [*CATALOG, *VARIANTS, *CHECKPOINTS]
    assert len(set(names)) == len(names)


def test_every_published_size_has_weights():
    sizes = Counter(checkpoint.variant for checkpoint in CHECKPOINTS.values())
    assert set(sizes) == {variant.name for variant in VARIANTS.values() if not variant.is_ours}
    tasks = Counter(checkpoint.task for checkpoint in CHECKPOINTS.values())
    assert tasks == {"detection": 5, "instances": 5, "rotated": 11, "classification": 5}
    assert len({checkpoint.url for checkpoint in CHECKPOINTS.values()}) == 26


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoint_is_described(name):
    checkpoint = CHECKPOINTS[name]
    assert checkpoint.name == name and name.startswith(checkpoint.variant)
    assert checkpoint.url.startswith("https://download.openmmlab.com/mm") and checkpoint.url.endswith(".pth")
    assert re.fullmatch("[0-9a-f]{8}", checkpoint.sha256) and f"-{checkpoint.sha256}.pth" in checkpoint.url
    assert checkpoint.licence == "Apache-2.0" and checkpoint.data.terms and checkpoint.data.resolution
    assert len(checkpoint.classes) == VARIANTS[checkpoint.variant].num_classes or checkpoint.data.name.startswith(
        "HRSC"
    )
    assert checkpoint.metrics and all(30 < value < 100 for value in checkpoint.metrics.values())
    spec = checkpoint.spec()
    assert spec.architecture == checkpoint.variant and spec.classes == checkpoint.classes
    for channel, mean, std in zip(spec.bands, spec.mean, spec.std, strict=True):
        expected = {"red": (123.675, 58.395), "green": (116.28, 57.12), "blue": (103.53, 57.375)}
        assert (mean, std) == expected[channel]
    assert ModelSpec.model_validate_json(spec.model_dump_json()) == spec


def test_a_few_rows_by_hand():
    """Copied from the published tables once more, by eye."""
    tiny = CHECKPOINTS["rtmdet_r_tiny_hrsc"]
    assert (tiny.classes, tiny.input_size, tiny.sha256) == (("ship",), 800, "9f2e3ca6")
    large = CHECKPOINTS["rtmdet_r_l_dota_ms_coco"]
    assert large.metrics == {"mAP": 56.74, "mAP50": 81.33, "mAP75": 63.45} and large.pretraining == "COCO 2017"
    instances = CHECKPOINTS["rtmdet_ins_x_coco"]
    assert instances.url.endswith(
        "/mmdetection/v3.0/rtmdet/rtmdet-ins_x_8xb16-300e_coco/rtmdet-ins_x_8xb16-300e_coco_20221124_111313-33d4595b.pth"
    )
    assert CHECKPOINTS["cspnext_m_imagenet"].bands == ("red", "green", "blue")
    assert CHECKPOINTS["rtmdet_tiny_coco"].bands == ("blue", "green", "red")


def test_class_names():
    assert [len(names) for names in (class_names.COCO, class_names.DOTA_V1, class_names.IMAGENET)] == [80, 15, 1000]
    for names in (class_names.COCO, class_names.DOTA_V1, class_names.IMAGENET):
        assert len({name.lower() for name in names}) == len(names) and all(name == name.strip() for name in names)
    assert [class_names.COCO[index] for index in (0, 8, 79)] == ["person", "boat", "toothbrush"]
    assert [class_names.DOTA_V1[index] for index in (6, 9, 11)] == ["ship", "storage-tank", "roundabout"]
    known = {0: "tench", 404: "airliner", 510: "container ship", 812: "space shuttle", 999: "toilet tissue"}
    assert {index: class_names.IMAGENET[index] for index in known} == known


def test_unknown_weights():
    with pytest.raises(UnknownModelError, match="'rtmdet_r_l_dota_ms_coco'"):
        find_checkpoint("rtmdet_r_l")
    with pytest.raises(UnknownModelError, match="rtmdet_tiny_coco"):
        find_checkpoint("rtmdet_tiny_cocoo")
    with pytest.raises(UnknownModelError, match="models list"):
        find_checkpoint("zzz")


@pytest.mark.parametrize("name", sorted(CATALOG))
def test_parameters_of_a_file(name, tmp_path):
    assert count_stored_parameters(CATALOG[name].weights_path) == CATALOG[name].params > 100_000
    with pytest.raises(ModelFileError):
        count_stored_parameters(tmp_path / "none.safetensors")


@pytest.mark.parametrize("name", sorted(CATALOG))
def test_twin_holds_the_same_description(name):
    """The model file and the weights to fine-tune from are of one training, and each is small enough to bundle."""
    entry = CATALOG[name]
    model, twin = read_spec(entry.path), read_spec(entry.weights_path)
    same = {"name", "architecture", "classes", "bands", "stretch", "mean", "std", "gsd_m", "metrics", "training_data"}
    assert model.model_dump(include=same) == twin.model_dump(include=same)
    assert max(entry.path.stat().st_size, entry.weights_path.stat().st_size) <= 13e6


def test_published_weights_without_torch_are_not_downloaded(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("rtmdet_geo.catalog.download_checkpoint", lambda name: pytest.fail("downloaded"))
    with pytest.raises(MissingDependencyError, match=r"pip install 'rtmdet-geo\[train\]'"):
        find_model("rtmdet_tiny_coco")
