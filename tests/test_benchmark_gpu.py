"""The benchmark of the engines on a GPU, run on the CPU: without what a GPU server lacks, and what it reports."""

from __future__ import annotations

import csv
import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

FOLDER = Path(__file__).parent / "benchmarks"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def gpu(monkeypatch, tmp_path) -> ModuleType:
    """Return the script as a module."""
    monkeypatch.syspath_prepend(FOLDER)
    for name in ("RTMDET_GEO_CACHE", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    return importlib.import_module("gpu")


def read_rows(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))


def run(gpu: ModuleType, tmp_path: Path, *arguments: str) -> tuple[int, list[dict[str, str]]]:
    """Return the exit status and the rows."""
    file = tmp_path / "gpu.csv"
    quick = ["--device", "cpu", "--quick", "--cache", str(tmp_path), "--output", str(file), "--models", "rtmdet_r_test"]
    status = gpu.main([*quick, *arguments])
    return status, read_rows(file)


@pytest.mark.slow
def test_runs_without_what_a_gpu_server_lacks(tmp_path):
    """No rasters, no onnxruntime: what needs them is left out, with the reason."""
    absent = [
        "rasterio",
        "geopandas",
        "shapely",
        "pyogrio",
        "pyarrow",
        "pyproj",
        "onnxruntime",
        "onnx",
        "click",
        "rich",
    ]
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({absent}))\n")
    command = [sys.executable, FOLDER / "gpu.py", "--device", "cpu", "--quick", "--models", "rtmdet_r_test,nosuch"]
    command += ["--sections", "numerics,torch-eager,onnxruntime,tensorrt,nms"]
    command += ["--cache", tmp_path / "cache", "--output", tmp_path / "gpu.csv"]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{FOLDER.parents[1]}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
    rows = read_rows(tmp_path / "gpu.csv")
    mine = [row for row in rows if row["model"] == "rtmdet_r_test"]
    measured = {(row["engine"], row["nms"], row["measure"]) for row in mine if row["status"] == "ok"}
    places = [(where, what) for where in ("none", "host", "device") for what in ("latency", "throughput")]
    assert measured >= {("torch-eager", *place) for place in [*places, ("none", "numerics")]}
    assert measured >= {("nms", "host", "nms alone"), ("nms", "device", "nms alone")}
    numerics = next(row for row in mine if row["measure"] == "numerics")
    assert float(numerics["boxes_px"]) < 0.05 and int(numerics["detections"]) > 100
    for row in mine:
        if row["median_ms"]:
            rate = 1000 * int(row["batch"]) / float(row["median_ms"])
            assert float(row["images_per_s"]) == pytest.approx(rate, rel=0.01)
            assert float(row["mpx_per_s"]) == pytest.approx(rate * 128 * 128 / 1e6, abs=0.06)
    left_out = {row["engine"]: row["status"] for row in mine if row["status"].startswith("left out")}
    assert "onnx" in left_out["onnxruntime"] and "CUDA" in left_out["tensorrt"]
    unknown = [row["status"] for row in rows if row["model"] == "nosuch"]
    assert unknown and all("unknown model 'nosuch'" in status for status in unknown)
    assert all(row["torch"] and row["date"] and row["cpu"] for row in rows)


def test_wrong_numbers_fail_loudly_and_failures_end_nothing(gpu, tmp_path, monkeypatch, capsys):
    class Wrong(gpu.TorchBackend):
        def raw(self, images, *, multi_label=True):
            outputs = super().raw(images, multi_label=multi_label)
            outputs[0][..., 0] += 0.3  # px: more than fp32 may differ
            return outputs

    def broken(section, precision, weights, options, most):
        if section == "torch-graphs":
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")
        if section == "torch-compile":
            raise MemoryError
        return Wrong(weights, device="cpu")

    monkeypatch.setattr(gpu, "open_engine", broken)
    few = {"torch-eager": ("fp32",), "torch-graphs": ("fp16",), "torch-compile": ("fp32",), "tensorrt": ("fp16",)}
    monkeypatch.setattr(gpu, "ENGINES", few)
    status, rows = run(gpu, tmp_path, "--sections", "numerics")
    assert status == 1 and "wrong numbers" in capsys.readouterr().err
    by_engine = {(row["engine"], row["precision"]): row for row in rows}
    eager = by_engine["torch-eager", "fp32"]
    assert eager["status"].startswith("wrong") and float(eager["boxes_px"]) == pytest.approx(0.3, abs=0.01)
    failed = by_engine["torch-graphs", "fp16"]["status"]
    assert failed == "failed: RuntimeError: CUDA error: an illegal memory access was encountered"
    assert by_engine["torch-compile", "fp32"]["status"] == "memory ended"
    assert by_engine["tensorrt", "fp16"]["status"].startswith("wrong")  # the others went on


def test_no_time_and_growing_batches(gpu, tmp_path, monkeypatch):
    status, rows = run(gpu, tmp_path, "--minutes", "0")
    assert status == 0 and rows and all("no time was left of 0 minutes" in row["status"] for row in rows)
    rates = {1: 10.0, 2: 19.0, 4: 18.0}

    def throughput(clock, stream, images):
        if len(images) == 4 and rates[4] is None:
            raise gpu.BatchHalvedWarning("too small")
        return rates.get(len(images)) or pytest.fail("went on although a larger batch was slower")

    monkeypatch.setattr(gpu, "throughput", throughput)
    arguments = ("--sections", "torch-eager", "--batches", "2,4,8")
    _, rows = run(gpu, tmp_path, *arguments)
    found = [(row["batch"], row["images_per_s"]) for row in rows if row["measure"] == "throughput"]
    assert found == [("1", "10.0"), ("2", "19.0"), ("4", "18.0")]
    rates[4] = None
    _, rows = run(gpu, tmp_path, *arguments)
    assert [row["status"] for row in rows if row["measure"] == "throughput"] == ["ok", "ok", "memory ended"]


def test_published_latencies_and_sizes(gpu):
    """README of MMDetection's configs/rtmdet and of MMRotate's configs/rotated_rtmdet."""
    assert gpu.PUBLISHED["rtmdet_l"] == 2.44 and gpu.PUBLISHED["rtmdet_ins_tiny"] == 1.70
    assert gpu.PUBLISHED["rtmdet_r_tiny"] == 4.40 and len(gpu.PUBLISHED) == 14
    assert set(gpu.MODELS) <= set(gpu.PUBLISHED)
    assert gpu.sizes_of_engines("tensorrt", (1, 2, 8)) == [(1,), (2, 8)]
    assert gpu.sizes_of_engines("torch-compile", (1, 2, 8)) == [(1, 8)]
    assert gpu.sizes_of_engines("torch-graphs", (1, 2, 8)) == [(1, 2, 8)]


def test_nearest_of_the_other(gpu):
    from untrained import differences

    from rtmdet_geo.structures import Detections

    def found(*rows: tuple[float, float, int]) -> Detections:
        boxes = np.array([[x, 10, 8, 4, 0.1] for x, _, _ in rows], np.float32).reshape(-1, 5)
        return Detections(boxes, np.array([s for _, s, _ in rows], np.float32), np.array([c for *_, c in rows]))

    one = found((10, 0.9, 0), (50, 0.5, 1))
    assert differences(one, found((50.25, 0.5, 1), (10, 0.875, 0)), 0.5, 0.05).tolist() == [0.25, pytest.approx(0.025)]
    assert differences(one, found((10, 0.9, 0), (50, 0.5, 0)), 0.5, 0.05).tolist() == [np.inf, np.inf]
    assert np.isnan(differences(one, found(), 0.5, 0.05)).all()


def test_unknown_sections(gpu, capsys):
    with pytest.raises(SystemExit):
        gpu.parse(["--sections", "torch-eager,numeric"])
    assert "no such: numeric" in capsys.readouterr().err
