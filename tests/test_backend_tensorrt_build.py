"""Building, checking, keeping and refusing TensorRT engines, on stand-ins (see ``fake_tensorrt.py``)."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fake_tensorrt
import numpy as np
import onnx
import pytest
from fake_cuda import Gpu
from fake_tensorrt import VERSIONS, install
from onnx import helper
from synthetic import make_spec, small_model, small_network
from tensorrt_case import SIDE, assert_near, model_file, tiles, tiny_file
from tensorrt_manifest import describe_tensorrt
from test_backends import write_model
from test_cli import error_line, run

from rtmdet_geo.backends import open_backend, trt_cache
from rtmdet_geo.backends.cuda import describe_devices
from rtmdet_geo.backends.onnxrt import OnnxRuntimeBackend
from rtmdet_geo.backends.trt import TensorRtBackend
from rtmdet_geo.backends.trt_build import build_engine
from rtmdet_geo.backends.trt_check import check_layers
from rtmdet_geo.cache import CACHE_VARIABLE
from rtmdet_geo.catalog import CATALOG
from rtmdet_geo.errors import (
    BatchHalvedWarning,
    Cancelled,
    ConfigError,
    DeviceMemoryError,
    EngineError,
    MissingDependencyError,
    ModelFileError,
    OutputError,
)
from rtmdet_geo.export.graph import fix_size
from rtmdet_geo.export.half import to_half
from rtmdet_geo.export.tiles import shipped_tiles
from rtmdet_geo.models.weights import save_weights
from rtmdet_geo.structures import ModelSpec

NEWEST = "11.4.0.106"
MANIFEST = Path(__file__).parent / "golden" / "tensorrt_api.json"


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty folder of engines."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "engines"


@pytest.fixture
def machine(monkeypatch, cache):
    """The newest TensorRT on one GPU, nothing built yet."""
    return install(monkeypatch, NEWEST)


def engines(cache):
    """Return the names in the folder of engines, timing caches left out."""
    return sorted(path.name for path in cache.glob("*") if path.suffix != ".cache") if cache.is_dir() else []


# --- what has to be there first --------------------------------------------------------------------------------------


def test_missing_tensorrt(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'rtmdet-geo\[tensorrt\]'"):
        TensorRtBackend(tiny_file())


@pytest.mark.parametrize("version", ["8.5.3.1", "10.2.0", "10.2.0.post1", "12.0.0.5"])
def test_versions_that_are_not_supported(machine, version):
    machine.__version__ = version
    with pytest.raises(MissingDependencyError, match=f"TensorRT {version} is not supported"):
        TensorRtBackend(tiny_file())


@pytest.mark.parametrize("version", ["8.6.0", "8.6.1.post1", "9.3.0.post11.dev1", "10.2.1", "11.9"])
def test_versions_that_are(machine, version):
    from rtmdet_geo.backends.trt_load import load_tensorrt

    machine.__version__ = version
    assert load_tensorrt() is machine


@pytest.mark.parametrize("version", ["8.6.1", NEWEST])
def test_no_driver_is_found_before_tensorrt_is_asked(monkeypatch, cache, version):
    """The stand-in fails, as the lean library crashes, where a builder or runtime is made without a driver."""
    trt = install(monkeypatch, version)
    trt.cuda.has_driver = False
    with pytest.raises(EngineError, match=r"no CUDA device answers.*NVIDIA driver"):
        TensorRtBackend(tiny_file())
    trt.cuda.has_driver, trt.cuda.gpus = True, []
    with pytest.raises(EngineError, match="cudaErrorNoDevice"):
        build_engine(tiny_file(), cache.parent.parent / "x.engine")
    assert trt.builds == 0


def test_devices_and_numbers_that_are_wrong(machine, tmp_path):
    for wrong in ({"device": "cuda:1"}, {"device": "cpu"}, {"precision": "int8"}, {"max_batch": 0}):
        with pytest.raises(ConfigError):
            TensorRtBackend(tiny_file(), **wrong)
    for wrong in ({"tile_size": 100}, {"max_batch": 0}, {"workspace_gib": 0.0}, {"precision": "bf16"}):
        with pytest.raises(ConfigError):
            build_engine(tiny_file(), tmp_path / "x.engine", **wrong)
    onnx.save(fix_size(onnx.load(tiny_file()), SIDE, SIDE), tmp_path / "fixed.onnx")
    with pytest.raises(ConfigError, match="takes tiles of 96 px only, not 128"):
        build_engine(tmp_path / "fixed.onnx", tmp_path / "x.engine", tile_size=128)
    assert machine.builds == 0


def test_files_that_are_no_models_of_ours(machine, tmp_path):
    (tmp_path / "text.onnx").write_text("no protobuf")
    foreign = write_model(tmp_path / "foreign.onnx", outputs=("boxes",), metadata={})
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(tiny_file().read_bytes()[:-1000])
    for path, text in (
        (tmp_path / "none.onnx", "is not there"),
        (tmp_path / "text.onnx", "no readable model file"),
        (cut, "truncated"),
        (foreign, "does not follow the model-file contract; it lacks output 'scores'.*metadata key 'model_spec'"),
        (small_model("classification"), "rtmdet-geo classify"),
    ):
        with pytest.raises(ModelFileError, match=text):
            TensorRtBackend(path)
    assert machine.builds == 0


# --- the cache -------------------------------------------------------------------------------------------------------


def test_a_built_engine_is_kept(machine, cache, caplog):
    with caplog.at_level("INFO"):
        first = TensorRtBackend(model_file())
    assert "takes minutes" in caplog.text
    (name, beside) = engines(cache)
    assert name.startswith("small-rotated_fp16_") and beside == f"{name}.json"
    description = json.loads((cache / beside).read_text())
    assert description["spec"]["precision"] == "fp16" and description["spec"]["differences"]["matched"] > 20
    layers = description["layers"]
    assert layers["convolutions"] == layers["fp16"] > 20 and layers["fp32"] == 0
    assert (
        description["key"]
        | {
            "tensorrt": NEWEST,
            "gpu": "NVIDIA Fake 4000",
            "compute_capability": [8, 6],
            "multiprocessors": 46,
            "profile": [[1, 3, SIDE, SIDE], [8, 3, SIDE, SIDE], [8, 3, SIDE, SIDE]],
            "optimization_level": 3,
        }
        == description["key"]
    )
    second = TensorRtBackend(model_file())
    assert machine.builds == 1
    assert second.spec == first.spec
    np.testing.assert_array_equal(first.raw(tiles())[0], second.raw(tiles())[0])


@pytest.mark.parametrize(
    "change", ["precision", "max_batch", "version", "gpu", "memory", "multiprocessors", "model file", "exporter"]
)
def test_what_an_engine_depends_on(monkeypatch, machine, cache, tmp_path, change):
    """Another one of each means another engine; the old one stays."""
    small = {"max_batch": 1, "precision": "fp32"}
    TensorRtBackend(tiny_file(), **small)
    path, gpu = tiny_file(), machine.cuda.gpus[0]
    if change == "precision":
        small["precision"] = "fp16"
    elif change == "max_batch":
        small["max_batch"] = 2
    elif change == "version":
        machine = install(monkeypatch, "10.16.0.72", machine.cuda)
    elif change == "gpu":
        gpu.name = "NVIDIA Fake 5000"
    elif change == "memory":
        gpu.memory += 1
    elif change == "multiprocessors":
        gpu.multiprocessors = 20
    elif change == "exporter":
        monkeypatch.setattr(trt_cache, "__version__", "9.9")
    else:
        path = tiny_file(score_threshold=0.31)
    TensorRtBackend(path, **small)
    assert len(engines(cache)) == 4


@pytest.mark.parametrize("damage", ["cut", "empty", "no description", "bad description", "refused", "other key"])
def test_what_does_not_fit_is_built_again(machine, cache, caplog, damage):
    TensorRtBackend(tiny_file(), max_batch=1, precision="fp32")
    engine, beside = (cache / name for name in engines(cache))
    if damage == "cut":
        engine.write_bytes(engine.read_bytes()[:-10])
    elif damage == "empty":
        engine.write_bytes(b"")
    elif damage == "no description":
        beside.unlink()
    elif damage == "bad description":
        beside.write_text(beside.read_text()[:-10])
    elif damage == "other key":
        text = json.loads(beside.read_text())
        text["key"]["tensorrt"] = "8.6.1"
        beside.write_text(json.dumps(text))
    else:
        whole = machine.refuse
        machine.refuse = {"deserialize_cuda_engine": None}
        machine.log_build = lambda graph: setattr(machine, "refuse", whole)
    again = TensorRtBackend(tiny_file(), max_batch=1, precision="fp32")
    assert machine.builds == 2 and len(again.raw(tiles()[:1])[0]) == 1
    assert ("is built again" in caplog.text) == (damage != "no description")
    TensorRtBackend(tiny_file(), max_batch=1, precision="fp32")
    assert machine.builds == 2


def test_timings_serve_the_next_build(machine, cache):
    TensorRtBackend(tiny_file(), max_batch=1, precision="fp32")
    (path,) = cache.glob("*.cache")
    assert path.name == f"timings_nvidia-fake-4000_8.6_tensorrt-{NEWEST}.cache"
    TensorRtBackend(tiny_file(), max_batch=2, precision="fp32")
    assert machine.timings_seen == [b"", b"timings of one build;"]


@pytest.mark.parametrize("fault", ["none given", "not readable", "not writable"])
def test_timings_are_not_needed(machine, cache, monkeypatch, fault):
    """Whatever is wrong with them, the engine that took minutes is there."""
    cache.mkdir(parents=True)
    name = f"timings_nvidia-fake-4000_8.6_tensorrt-{NEWEST}.cache"
    if fault == "none given":
        monkeypatch.setattr(fake_tensorrt._TimingCache, "serialize", lambda self: None)
    elif fault == "not readable":
        (cache / name).write_bytes(b"x")
        read = trt_cache._read

        def refused(path: Path) -> bytes:
            if path.name == name:
                raise ModelFileError(f"cannot read {str(path)!r}: Permission denied")
            return read(path)

        monkeypatch.setattr(trt_cache, "_read", refused)
    else:
        (cache / name).mkdir()
    TensorRtBackend(tiny_file(), max_batch=1, precision="fp32")
    assert machine.builds == 1 and len(engines(cache)) == 2


@pytest.mark.parametrize("damage", ["cut", "refused"])
def test_damaged_timings_are_made_anew(machine, cache, caplog, damage):
    """A truncated timing cache never reaches TensorRT; one that TensorRT does not like is left out."""
    TensorRtBackend(tiny_file(), max_batch=1, precision="fp32")
    (path,) = cache.glob("*.cache")
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-3])
    else:
        machine.refuse["create_timing_cache"] = None
    with caplog.at_level("INFO"):
        TensorRtBackend(tiny_file(), max_batch=2, precision="fp32")
    assert machine.timings_seen[-1] == b""
    assert ("is damaged" if damage == "cut" else "does not take the timing cache") in caplog.text
    assert trt_cache.read_timings(path) == b"timings of one build;"


def test_threads_build_an_engine_once(machine, cache):
    start = threading.Barrier(3)

    def work(_: int) -> np.ndarray:
        start.wait()
        return TensorRtBackend(tiny_file(), max_batch=2, precision="fp32").raw(tiles()[:2])[0]

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(work, range(3)))
    assert machine.builds == 1 and len(engines(cache)) == 2  # no lock is left
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


def test_processes_build_an_engine_once(cache, tmp_path):
    code = (
        "import sys, pytest\n"
        "from fake_tensorrt import install\n"
        "from rtmdet_geo.backends.trt import TensorRtBackend\n"
        f"trt = install(pytest.MonkeyPatch(), {NEWEST!r})\n"
        "TensorRtBackend(sys.argv[1], max_batch=1, precision='fp32')\n"
        "print('builds', trt.builds)\n"
    )
    tests = Path(__file__).parent
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(tiny_file())]
    both = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    texts = sorted(process.communicate(timeout=120)[0] for process in both)
    assert texts == ["builds 0\n", "builds 1\n"]


def test_a_lock_of_a_dead_process_does_not_block(machine, cache):
    TensorRtBackend(tiny_file(), max_batch=1, precision="fp32")
    engine, _ = (cache / name for name in engines(cache))
    engine.unlink()
    (cache / f"{engine.name}.lock").write_bytes(b"")
    TensorRtBackend(tiny_file(), max_batch=1, precision="fp32")
    assert machine.builds == 2


@pytest.mark.parametrize("fault", ["no folder", "no space"])
def test_an_engine_that_cannot_be_kept_serves_all_the_same(machine, cache, monkeypatch, caplog, fault):
    if fault == "no folder":
        cache.parent.write_bytes(b"a file where the folder should be")
    else:

        def full(*arguments: object) -> None:
            raise OutputError("no space left")

        monkeypatch.setattr(trt_cache, "write_engine", full)
    engine = TensorRtBackend(tiny_file(), max_batch=1, precision="fp32")
    assert len(engine.raw(tiles()[:1])[0]) == 1 and engines(cache) == []
    assert ("cannot be kept: cannot make folder" if fault == "no folder" else "is not kept: no space") in caplog.text


def test_a_cache_that_cannot_be_written_to_still_serves(machine, cache, monkeypatch):
    TensorRtBackend(tiny_file(), max_batch=1, precision="fp32")
    monkeypatch.setattr("rtmdet_geo.backends.trt_build.hold_lock", lambda path: pytest.fail("locked"))
    TensorRtBackend(tiny_file(), max_batch=1, precision="fp32")
    assert machine.builds == 1


# --- engines by name -------------------------------------------------------------------------------------------------


@pytest.fixture
def named(machine, tmp_path):
    """An engine of fp16 for batches up to 2, and its description, built by name."""
    build_engine(tiny_file(), tmp_path / "ships.engine", max_batch=2)
    return tmp_path / "ships.engine"


def test_an_engine_that_the_user_built(machine, named, cache):
    engine = TensorRtBackend(named)
    assert (engine.precision, engine.max_batch, engine.path, engine.fixed_tile_size) == ("fp16", 2, named, SIDE)
    np.testing.assert_allclose(engine.raw(tiles())[0], TensorRtBackend(named, max_batch=1).raw(tiles())[0], atol=1e-4)
    assert TensorRtBackend(named, max_batch=100, precision="fp16").max_batch == 2
    assert machine.builds == 1 and engines(cache) == []


def test_building_by_name(machine, tmp_path, named):
    with pytest.raises(OutputError, match="exists"):
        build_engine(tiny_file(), named)
    with pytest.raises(OutputError, match=r"must end in \.engine"):
        build_engine(tiny_file(), tmp_path / "ships.plan")
    spec = build_engine(
        tiny_file(), named, max_batch=1, precision="fp32", tile_size=64, workspace_gib=0.5, overwrite=True
    )
    assert (spec.precision, spec.tile_size, spec.overlap) == ("fp32", 64, 32)
    assert spec.max_detections == 64 + 16 + 4
    assert json.loads((tmp_path / "ships.engine.json").read_text())["key"]["workspace_bytes"] == 1 << 29
    assert isinstance(spec, ModelSpec) and spec.differences["boxes_px"] < 0.05


@pytest.mark.parametrize(
    ("what", "error", "text"),
    [
        ("description gone", ModelFileError, r"ships\.engine\.json' is missing.*export MODEL -o ships\.engine"),
        ("description cut", ModelFileError, "no description of an engine"),
        ("engine cut", ModelFileError, "is damaged .*copy it again together with its .json"),
        ("engine gone", ModelFileError, "is not there"),
        ("another TensorRT", EngineError, "another machine .TensorRT: 11.4.0.106, here 8.6.1.; build it here"),
        ("another GPU", EngineError, "GPU: NVIDIA Fake 4000, here NVIDIA Fake 90.*compute capability: 8.6, here 9.0"),
        ("another precision", EngineError, "was built in fp16, not in fp32.*--precision fp32"),
        ("refused", EngineError, "Version tag does not match.*build it again here"),
        ("another model's description", ModelFileError, "not those of kind 'mask'"),
    ],
)
def test_engines_that_do_not_fit(monkeypatch, machine, named, what, error, text):
    """Each with its remedy; none of them reaches TensorRT if that may crash on it."""
    beside, asked = trt_cache.description_of(named), "auto"
    if what == "description gone":
        beside.unlink()
    elif what == "description cut":
        beside.write_text(beside.read_text()[:100])
    elif what == "engine cut":
        named.write_bytes(named.read_bytes()[:1000])
    elif what == "engine gone":
        named.unlink()
    elif what == "another TensorRT":
        install(monkeypatch, "8.6.1", machine.cuda)
    elif what == "another GPU":
        machine.cuda.gpus = [Gpu("NVIDIA Fake 90", (9, 0), 132)]
    elif what == "another precision":
        asked = "fp32"
    elif what == "refused":
        machine.refuse["deserialize_cuda_engine"] = None
    else:
        text_of = json.loads(beside.read_text())
        text_of["spec"]["kind"] = "mask"
        beside.write_text(json.dumps(text_of))
    with pytest.raises(error, match=text) as caught:
        TensorRtBackend(named, precision=asked)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("version", VERSIONS)
def test_engines_for_compatible_gpus(monkeypatch, cache, tmp_path, version):
    """The narrower level where TensorRT has it; said in the description; runs on the generation's other GPUs."""
    trt = install(monkeypatch, version)
    build_engine(tiny_file(), tmp_path / "x.engine", max_batch=1, compatible=True)
    level = json.loads((tmp_path / "x.engine.json").read_text())["compatibility"]
    assert level == ("same_compute_capability" if version in ("10.16.0.72", NEWEST) else "ampere_plus")
    trt.cuda.gpus = [Gpu("NVIDIA Fake 4090", (8, 6), 128)]
    assert len(TensorRtBackend(tmp_path / "x.engine").raw(tiles()[:1])[0]) == 1
    trt.cuda.gpus = [Gpu("NVIDIA Fake T4", (7, 5), 40)]
    with pytest.raises(EngineError, match="compute capability"):
        TensorRtBackend(tmp_path / "x.engine")
    if level == "ampere_plus":
        with pytest.raises(EngineError, match="builds no engine for other GPUs than 'NVIDIA Fake T4'"):
            build_engine(tiny_file(), tmp_path / "y.engine", compatible=True)


# --- the checks of a new engine --------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["8.6.1", NEWEST])
@pytest.mark.parametrize("hide_types", [False, True])
def test_a_downgrade_is_found(monkeypatch, cache, version, hide_types):
    """A builder that makes a fp32 engine without a word; nothing is kept of it."""
    trt = install(monkeypatch, version)
    trt.ignore_half, trt.hide_types = True, hide_types
    with pytest.raises(
        EngineError, match=r"fp16 was asked for, but TensorRT computes (\d+) of \1 convolutions in fp32"
    ):
        TensorRtBackend(tiny_file(), max_batch=1)
    assert engines(cache) == []
    assert trt.cuda.live() == {}
    assert TensorRtBackend(tiny_file(), max_batch=1, precision="fp32").precision == "fp32"


def test_an_engine_of_one_large_layer(machine):
    """Compilers may hide convolutions; a tensor in fp16 is all that shows then."""
    machine.opaque = True
    assert TensorRtBackend(tiny_file(), max_batch=1).precision == "fp16"


@pytest.mark.parametrize(
    ("precision", "drift_px", "text"),
    [
        ("fp16", 3.0, r"the fp16 engine does not compute what its model file does .*allowed: boxes 2 px"),
        ("fp32", 0.1, r"the fp32 engine does not compute what its model file does .*allowed: boxes 0\.05 px"),
        ("fp16", None, "output 'scores' at batch .* is not finite in the file"),
    ],
)
def test_wrong_numbers_are_found(machine, cache, precision, drift_px, text):
    machine.drift_px, machine.spoil = drift_px or 0.0, () if drift_px else ("scores",)
    with pytest.raises(EngineError, match=text):
        TensorRtBackend(tiny_file(), max_batch=1, precision=precision)
    assert engines(cache) == [] and machine.cuda.live() == {}
    with pytest.raises(EngineError):
        build_engine(tiny_file(), cache.parent / "x.engine", max_batch=1, precision=precision)
    assert not (cache.parent / "x.engine").exists()


def test_fp16_that_is_off_more_than_usual_is_said(machine, caplog):
    """Kernels of some GPUs sum in fp16: such an engine serves, and its description says how far it is off."""
    machine.drift_px = 0.8
    engine = TensorRtBackend(tiny_file(), max_batch=1)
    assert 0.7 < engine.spec.differences["boxes_px"] < 0.9
    assert "is off by boxes 0.8" in caplog.text and "(boxes 0.5 px" in caplog.text
    caplog.clear()
    machine.drift_px = 0.0
    TensorRtBackend(tiny_file(), max_batch=2)
    assert "is off by" not in caplog.text


def layer(name, kind="CaskConvolution", *, tensor="Row major linear FP16 format", weights="Half", **more):
    tensors = [{"Name": "t", "Format/Datatype": tensor}]
    return {"Name": name, "LayerType": kind, "Inputs": tensors, "Outputs": tensors, "Weights": {"Type": weights}} | more


def test_layers_by_hand():
    trunk = {"/a/Conv": "Conv", "/b/Conv": "Conv", "/b/Conv_1": "Conv", "/a/Mul": "Mul"}

    def check(*layers, precision="fp16"):
        return check_layers(json.dumps({"Layers": list(layers)}), precision, trunk)

    half = layer("/a/Conv + PWN(/a/Sigmoid)")
    assert check(half, layer("cast", "Reformat")) == {"layers": 2, "convolutions": 1, "fp32": 0, "fp16": 1}
    unknown = layer("/a/Conv", tensor="N/A due to dynamic shapes")
    assert check(unknown)["fp16"] == 1
    mixed = layer("/b/Conv", tensor="Row major linear FP32") | {"Inputs": half["Inputs"]}
    assert check(mixed)["fp16"] == 1  # fp32 sums of fp16 products
    single = layer("/b/Conv", tensor="Row major linear FP32", weights="Float")
    with pytest.raises(EngineError, match="1 of 2 convolutions in fp32, such as '/b/Conv'"):
        check(half, single)
    island = single | {"Name": "/b/Conv_12"}  # a convolution that the graph has in fp32, whatever its name begins with
    assert check(half, island)["fp32"] == 1
    newer = layer("fused_7", Metadata="[ONNX Layer: /b/Relu]\x1e[ONNX Layer: /b/Conv_1]")
    newer["Inputs"] = newer["Outputs"] = [{"Name": "t", "Format": "Row major linear", "DataType": "Float"}]
    with pytest.raises(EngineError, match="'fused_7'"):
        check(newer)
    with pytest.raises(EngineError, match="shows no layer of the engine in it"):
        check("only names", "of layers")
    assert check(single, precision="fp32")["fp32"] == 1


def test_what_the_inspector_says_is_no_strict_json(caplog):
    """Names of fused nodes are joined by a control character; without any JSON nothing shows fp16."""
    raw = json.dumps({"Layers": [layer("fused", Metadata="[ONNX Layer: /a/Conv]?[ONNX Layer: /b/Mul]")]})
    raw = raw.replace("?", "\x1e")
    assert check_layers(raw, "fp16", {"/a/Conv": "Conv"})["fp16"] == 1
    with pytest.raises(EngineError, match="shows no layer of the engine in it"):
        check_layers(raw[:-4], "fp16", {"/a/Conv": "Conv"})
    assert "is no JSON" in caplog.text
    assert check_layers("", "fp32", {})["layers"] == 0


# --- the build itself ------------------------------------------------------------------------------------------------


def test_an_operator_that_tensorrt_does_not_know(machine, cache, tmp_path):
    proto = onnx.load(tiny_file())
    proto.graph.node.append(helper.make_node("NhwcMaxPool", ["images"], ["pooled"], domain="com.microsoft", name="odd"))
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    proto.graph.output.append(helper.make_tensor_value_info("pooled", onnx.TensorProto.UINT8, ["batch", 3, 1, 1]))
    spec = next(entry for entry in proto.metadata_props if entry.key == "model_spec").value
    helper.set_model_props(proto, {"model_spec": spec})
    onnx.save(proto, tmp_path / "odd.onnx")
    with pytest.raises(EngineError, match=r"cannot read the graph of '.*odd\.onnx': no importer for NhwcMaxPool"):
        TensorRtBackend(tmp_path / "odd.onnx", precision="fp32")


def test_a_build_that_fails(machine, cache):
    machine.build_errors = ["first", "Error Code 10: no\nimplementation", "b", "c"]
    with pytest.raises(
        EngineError, match=f"TensorRT {NEWEST} cannot build 'tiny.onnx': Error Code 10: no impl.*; b; c"
    ):
        TensorRtBackend(tiny_file())
    assert engines(cache) == []


def test_a_build_without_memory_is_tried_for_fewer_images(machine):
    machine.build_errors = ["Error Code 2: OutOfMemory (no further information)"]
    machine.log_build = lambda graph: machine.build_errors.clear() if machine.builds == 2 else None
    with pytest.warns(BatchHalvedWarning, match="engine for 4 tiles") as caught:
        engine = TensorRtBackend(tiny_file(), max_batch=4, precision="fp32")
    assert len(caught) == 1 and engine.best_batch_size == 2 and machine.builds == 2
    machine.build_errors, machine.builds = ["out of memory"], 10
    with pytest.raises(DeviceMemoryError, match="cannot build"):
        build_engine(tiny_file(), Path(os.environ[CACHE_VARIABLE]) / "x.engine", max_batch=1)


@pytest.mark.parametrize("drift_px", [0.0, 3.0])
def test_pins_that_no_kernel_obeys_become_wishes(monkeypatch, cache, caplog, drift_px):
    """8.6 alone has pins; what comes of a second try is checked like any other engine."""
    trt = install(monkeypatch, "8.6.1")
    trt.lacks_kernels, trt.drift_px = True, drift_px
    if drift_px:
        with pytest.raises(EngineError, match="does not compute what its model file does"):
            TensorRtBackend(tiny_file(), max_batch=1)
    else:
        assert TensorRtBackend(tiny_file(), max_batch=1).precision == "fp16"
    assert trt.builds == 2 and "Could not find any implementation" in caplog.text and "as wishes" in caplog.text


@pytest.mark.parametrize("version", ["8.6.1", NEWEST])
@pytest.mark.parametrize("raises", [True, False])
def test_a_signal_during_a_build(monkeypatch, cache, caplog, version, raises):
    """It ends the build where that can be done, and then gets to its handler, which may raise or only remember."""
    trt = install(monkeypatch, version)
    steps, handled = [], []

    def handler(number: int, frame: object) -> None:
        handled.append(number)
        if raises:
            raise KeyboardInterrupt

    trt.log_build = lambda graph: os.kill(os.getpid(), signal.SIGINT)
    before = signal.signal(signal.SIGINT, handler)
    try:
        wanted = KeyboardInterrupt if raises else Cancelled
        with pytest.raises(wanted) if raises or version == NEWEST else contextlib.nullcontext():
            TensorRtBackend(tiny_file(), max_batch=1, progress=lambda *step: steps.append(step))
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert handled == [signal.SIGINT] and trt.builds == 1
    assert "the same signal again ends the program" in caplog.text
    assert [step for phase, step, _ in steps if phase == "Timing"] == ([] if version == "8.6.1" else [0, 1, 3])
    assert bool(engines(cache)) == (version == "8.6.1" and not raises)


def test_builds_in_other_threads_leave_signals_alone(machine):
    before = signal.getsignal(signal.SIGINT)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(TensorRtBackend, tiny_file(), max_batch=1).result().precision == "fp16"
    assert signal.getsignal(signal.SIGINT) is before


def test_int8_model_files_are_not_tensorrts(machine):
    with pytest.raises(EngineError, match=r"int8 model files are for CPUs.*take the fp32 file"):
        TensorRtBackend(tiny_file(precision="int8"))
    assert machine.builds == 0


def test_progress(monkeypatch, cache, tmp_path):
    for version in ("8.6.1", NEWEST):
        install(monkeypatch, version)
        told: list[tuple[str, int, int]] = []

        def tell(*step: object, told: list[Any] = told) -> None:
            told.append(step)

        build_engine(
            tiny_file(),
            tmp_path / f"{version}.engine",
            progress=tell,
            max_batch=1,
        )
        steps = [("Building", 0, 2), *(("Timing", step, 3) for step in (0, 1, 2, 3, 3)), ("Building", 2, 2)]
        assert told == ([] if version == "8.6.1" else steps)


def test_progress_that_wants_to_stop(machine, tmp_path):
    def stop(phase: str, step: int, steps: int) -> None:
        if step == 1:
            raise Cancelled("no longer wanted")

    with pytest.raises(Cancelled):
        build_engine(tiny_file(), tmp_path / "x.engine", progress=stop)
    assert not list(tmp_path.glob("x.engine*"))


@pytest.mark.parametrize("version", ["8.6.1", NEWEST])
def test_model_files_with_a_precision_of_their_own(monkeypatch, cache, tmp_path, version):
    install(monkeypatch, version)
    onnx.save(to_half(onnx.load(tiny_file())), tmp_path / "half.onnx")
    assert TensorRtBackend(tmp_path / "half.onnx", max_batch=1).precision == "fp16"
    with pytest.raises(ConfigError, match="the model file is fp16 and stays so"):
        TensorRtBackend(tmp_path / "half.onnx", precision="fp32")


def test_the_graph_that_is_built(machine):
    """Weights in half, islands in fp32, one size, k a constant; batch norms are in the weights already."""
    graphs = []
    machine.log_build = graphs.append
    TensorRtBackend(model_file(), max_batch=2)
    graph = onnx.load_from_string(graphs[0]).graph
    stored = {tensor.name: tensor.data_type for tensor in graph.initializer}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert {stored[node.input[1]] for node in convolutions} == {onnx.TensorProto.FLOAT16}
    assert "BatchNormalization" not in {node.op_type for node in graph.node}
    assert [size.dim_value for size in graph.input[0].type.tensor_type.shape.dim] == [0, 3, SIDE, SIDE]
    assert {output.type.tensor_type.elem_type for output in graph.output} == {onnx.TensorProto.FLOAT}
    TensorRtBackend(model_file(), max_batch=1)
    graph = onnx.load_from_string(graphs[1]).graph
    assert [size.dim_value for size in graph.input[0].type.tensor_type.shape.dim] == [1, 3, SIDE, SIDE]
    assert "Shape" not in {node.op_type for node in graph.node}  # with one batch size nothing is computed of shapes


def test_messages_are_forwarded(machine, cache, caplog):
    machine.build_errors = ["it\nhurts"]
    with caplog.at_level("DEBUG"), pytest.raises(EngineError):
        TensorRtBackend(tiny_file(), max_batch=1)
    levels = {record.message: record.levelname for record in caplog.records}
    assert levels["TensorRT: building"] == "DEBUG" and levels["TensorRT: it\nhurts"] == "WARNING"


# --- the stand-ins, and real machines --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "names"),
    [
        ("8.6.1", ["IProgressMonitor"]),
        (NEWEST, ["OnnxParserX"]),
    ],
)
def test_the_stand_in_has_no_more_than_the_real_one(machine, monkeypatch, version, names):
    trt = install(monkeypatch, version)
    for name in names:
        assert not hasattr(trt, name)
    assert hasattr(trt.BuilderFlag, "FP16") == (version != NEWEST)
    assert hasattr(trt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH") == (version != NEWEST)
    with pytest.raises(AssertionError, match="before a device was looked for"):
        trt.Builder(None)


@pytest.mark.tensorrt
@pytest.mark.filterwarnings("default")  # bindings of older TensorRT warn of newer numpy, Python and themselves
def test_the_manifest_is_the_installed_version_s():
    """What the backend uses must be in the real package, with the parameters that the stand-in has."""
    trt = pytest.importorskip("tensorrt", exc_type=ImportError)
    manifest = json.loads(MANIFEST.read_text())["tensorrt"]
    major = trt.__version__.split(".")[0]
    nearest = max((version for version in manifest if version.split(".")[0] == major), default=None)
    assert nearest is not None, f"no manifest for TensorRT {major}; see tensorrt_manifest.py"
    here = describe_tensorrt(trt)["classes"]
    for name, members in manifest[nearest]["classes"].items():
        assert set(members) <= set(here[name]), name


@pytest.mark.gpu
@pytest.mark.tensorrt
@pytest.mark.filterwarnings("default")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("precision", "px", "score"), [("fp32", 0.05, 1e-3), ("fp16", 0.5, 0.01)])
@pytest.mark.parametrize("model", ["sen2ships_r", "banepa_ins"])
def test_on_a_real_gpu(tmp_path, monkeypatch, model, precision, px, score):
    """Bundled models on real tiles against onnxruntime; uneven batches, as graphs; the same from a second opening."""
    pytest.importorskip("tensorrt", exc_type=ImportError)
    report = describe_devices()
    if not report.devices:
        pytest.skip(report.problem)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    reference = OnnxRuntimeBackend(CATALOG[model].path, device="cpu")
    threshold = reference.spec.score_threshold
    real = shipped_tiles(reference.spec, reference.spec.tile_size)
    many = np.stack([np.roll(tile, shift, axis=2) for shift in (0, 100, 200) for tile in real])[:5]
    wanted = reference.predict(many, score_threshold=threshold)
    assert max(map(len, wanted)) > 5
    first: list[np.ndarray] = []
    for _ in range(2):
        engine = TensorRtBackend(CATALOG[model].path, precision=precision, max_batch=4)
        for batches in ([many], [many[:4], many[4:]], [tile[None] for tile in many]):
            found = [one for batch in engine.run(batches, score_threshold=threshold) for one in batch]
            for mine, other in zip(found, wanted, strict=True):
                assert_near(mine, other, px=px, score=score, above=threshold + 0.02)
        first.append(engine.raw(many)[1])
        engine.close()
    np.testing.assert_allclose(first[0], first[1], atol=1e-4)


# --- the command -----------------------------------------------------------------------------------------------------


def test_export_to_an_engine(machine, tmp_path):
    """From weights and from a model file; `detect` runs it by its name."""
    weights, out = tmp_path / "small.safetensors", tmp_path / "ships.engine"
    save_weights(small_network("rotated"), weights, make_spec(tile_size=SIDE))
    told = json.loads(run("export", weights, "-o", out, "--batch-size", 2, "--score", 0.2, "--json").stdout)
    assert told["spec"]["precision"] == "fp16" and told["spec"]["score_threshold"] == 0.2 and told["verified"]
    assert told["spec"]["differences"]["boxes_px"] < 0.5 and told["bytes"] == out.stat().st_size
    engine = open_backend(out)
    assert engine.name == "tensorrt" and engine.best_batch_size == 2 and engine.fixed_tile_size == SIDE
    engine.close()
    assert "--overwrite" in error_line(run("export", weights, "-o", out))
    for verb in (("info",), ("models", "show")):
        card = run(*verb, out).stdout
        assert "\nprecision" in card and "NVIDIA Fake 4000, compute capability 8.6, TensorRT 11.4.0.106" in card
        assert "runs on  GPUs of that name" in card and "batches  up to 2" in card
        facts = json.loads(run(*verb, out, "--json").stdout)
        assert facts["precision"] == "fp16" and facts["engine"]["layers"]["fp16"] > 0
    done = run("export", tiny_file(), "-o", out, "--precision", "fp32", "--overwrite")
    assert "fp32" in done.stdout and f"compared with {tiny_file()} in fp32: boxes within" in done.stdout


@pytest.mark.parametrize("option", ["--no-verify", "--half-weights"])
def test_options_that_are_not_for_engines(option):
    done = run("export", tiny_file(), "-o", "x.engine", option)
    assert done.exit_code == 2 and "not for a .engine" in done.output


def test_options_that_are_for_engines_only():
    done = run("export", tiny_file(), "-o", "x.onnx", "--compatible")
    assert done.exit_code == 2 and "for a .engine only" in done.output
