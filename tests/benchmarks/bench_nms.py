"""Speed and memory of rotated NMS: ``python tests/benchmarks/bench_nms.py [--output FILE.csv]``.

Three targets, each printed as PASS or BELOW (nothing is asserted: time depends on the machine and on who shares it):

* the oracle's scene of 10,000 boxes at least 200 times faster than the reference CPU operator (mmcv ``nms_rotated``);
* 1,000,002 boxes under 20 s and 2 GB;
* growth from 100,002 to 1,000,002 boxes close to linear, which is read here as CPU time ~ n^1.2 or less (n log n would
  be n^1.08; random access to memory that no longer fits the processor's cache is the rest).

Every case runs in a process of its own, so that peak memory is that of the case; compilation is measured apart.

Scenes of six copies: ``recipes.scene_boxes(7, n, extent)``, every box six times, each copy (none is left as it was)
moved by a normal of standard deviation 1 px on cx and on cy and turned by a normal of 0.05 rad; scores uniform in
[0, 1). All are drawn in this order from one PCG64 generator, seed 8. The smaller scene has the same density.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from machine import describe_machine, verdict

ROOT = Path(__file__).parents[2]
ORACLE = Path(os.environ.get("RTMDET_ORACLE", ROOT / "tests" / "golden" / "oracle"))
RESULTS = Path(__file__).parent / "results" / "nms.csv"

#: Oracle timings.json: mmcv nms_rotated, CPU, same recipe and threshold, on two shared cores of another processor.
REFERENCE_SECONDS = 56.88
TARGET_RATIO = 200
TARGET_SECONDS = 20
TARGET_MB = 2000
TARGET_EXPONENT = 1.2
IOU_THRESHOLD = 0.1
FIRST_CALL = (
    "import time; start = time.perf_counter(); from rtmdet_geo.nms import nms_rotated;"
    "nms_rotated([[0, 0, 1, 1, 0]], [1.0], iou_threshold=0.1); print(time.perf_counter() - start, time.process_time())"
)


def load_recipes():
    path = next(path for path in (ORACLE / "recipes.py", ORACLE.parent / "recipes.py") if path.is_file())
    spec = importlib.util.spec_from_file_location("oracle_recipes", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def oracle_scene():
    return load_recipes().scene_boxes(7, 10_000, 20_000)


def copied_scene(num_objects):
    boxes, _, labels = load_recipes().scene_boxes(7, num_objects, 80_000 * (num_objects / 166_667) ** 0.5)
    generator = np.random.Generator(np.random.PCG64(8))
    boxes = np.repeat(boxes, 6, axis=0)
    boxes[:, :2] += generator.normal(0, 1, (len(boxes), 2))
    boxes[:, 4] += generator.normal(0, 0.05, len(boxes))
    return boxes, generator.random(len(boxes)), np.repeat(labels, 6)


def measure(num_objects, is_class_aware, repetitions):
    """Run in a fresh process: median wall and CPU seconds, kept boxes, peak memory of the process in MB."""
    sys.path.insert(0, str(ROOT))
    from rtmdet_geo.nms import nms_rotated

    nms_rotated([[0, 0, 1, 1, 0]], [1.0], iou_threshold=IOU_THRESHOLD)  # compile or load
    boxes, scores, labels = copied_scene(num_objects) if num_objects else oracle_scene()
    seconds, cpu_seconds = [], []
    for _ in range(repetitions):
        start, cpu_start = time.perf_counter(), time.process_time()
        kept = nms_rotated(boxes, scores, labels if is_class_aware else None, iou_threshold=IOU_THRESHOLD)
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "n": len(boxes),
        "kept": len(kept),
        "seconds": float(np.median(seconds)),
        "cpu_seconds": float(np.median(cpu_seconds)),
        "peak_mb": peak_mb,
    }


def in_fresh_process(*arguments):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, arguments)


def first_calls():
    """Seconds from import to the first result, without and with numba's cache."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"NUMBA_CACHE_DIR": folder, "PYTHONPATH": str(ROOT)}
        for what in ("first call, nothing compiled", "first call, compiled before"):
            command = [sys.executable, "-c", FIRST_CALL]
            text = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
            wall, cpu = map(float, text.split())
            yield {"what": what, "n": 1, "seconds": wall, "cpu_seconds": cpu}


def main():
    parser = argparse.ArgumentParser(description="benchmark of rotated NMS")
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV to write")
    output = parser.parse_args().output
    machine = describe_machine()
    print("  ".join(f"{name} {value}" for name, value in machine.items()))
    print(f"reference: mmcv nms_rotated on the CPU, 10,000 boxes: {REFERENCE_SECONDS} s (oracle timings)\n")

    rows = list(first_calls())
    cases = (
        ("oracle scene, agnostic", 0, False, 9),
        ("six copies, agnostic", 16_667, False, 5),
        ("six copies, agnostic", 166_667, False, 3),
        ("six copies, 15 classes", 166_667, True, 3),
    )
    for what, num_objects, is_class_aware, repetitions in cases:
        rows.append({"what": what} | in_fresh_process(num_objects, is_class_aware, repetitions))
    oracle, small, large, large_classes = rows[2:]
    oracle["ratio"] = REFERENCE_SECONDS / oracle["seconds"]

    print(f"{'what':30}{'n':>10}{'kept':>9}{'seconds':>10}{'cpu s':>9}{'ratio':>8}{'peak MB':>9}")
    for row in rows:
        print(
            f"{row['what']:30}{row['n']:>10,}{row.get('kept', ''):>9}{row['seconds']:>10.4f}{row['cpu_seconds']:>9.4f}"
            f"{row.get('ratio', 0) or '':>8.6}{row.get('peak_mb', 0) or '':>9.5}"
        )
    growth = large["cpu_seconds"] / small["cpu_seconds"]
    exponent = np.log(growth) / np.log(large["n"] / small["n"])
    print()
    verdict(
        f"10,000 boxes: {oracle['ratio']:.0f} x the reference (target {TARGET_RATIO} x)",
        oracle["ratio"] >= TARGET_RATIO,
    )
    for row in (large, large_classes):
        verdict(
            f"{row['n']:,} boxes, {row['what']}: {row['seconds']:.2f} s, {row['peak_mb']:.0f} MB"
            f" (target {TARGET_SECONDS} s, {TARGET_MB} MB)",
            row["seconds"] < TARGET_SECONDS and row["peak_mb"] < TARGET_MB,
        )
    verdict(
        f"growth {small['n']:,} -> {large['n']:,}: {growth:.1f} x the CPU time, n^{exponent:.2f}"
        f" (target n^{TARGET_EXPONENT})",
        exponent <= TARGET_EXPONENT,
    )
    wall, cpu = (rows[0][name] - rows[1][name] for name in ("seconds", "cpu_seconds"))
    print(f"compilation, once after installation: {wall:.1f} s, {cpu:.1f} s of CPU time")

    output.parent.mkdir(parents=True, exist_ok=True)
    columns = ["what", "n", "kept", "seconds", "cpu_seconds", "ratio", "peak_mb", *machine]
    with output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in (row | machine).items()})


if __name__ == "__main__":
    main()
