"""Speed of the engines on the CPU: ``python tests/benchmarks/bench_engines.py [--output FILE.csv]``.

One untrained rotated tiny network, one tile of 1024 x 1024 px, two threads: onnxruntime, OpenVINO where it is
installed, and the torch engine (batch norms folded), each over torch as the reference runs it: eager, fp32, batch norms
not folded, with the same decoding. All run in turns in one process; a ratio is the median over the rounds of torch's
seconds by the engine's in the same round. Targets: onnxruntime 1.7, OpenVINO 2.2.

Rows in other precisions than fp32 have no target: int8 model files in onnxruntime and OpenVINO (what they cost is in
``bench_int8.py``), and torch in bf16 where the processor has it.

Nothing else may run on the machine: torch's threads wait for each other after every layer, so where another program has
one of two cores, torch alone becomes many times slower. The CSV says how busy the machine was at the start. Time
between the turns lets the threads of the one before go to sleep.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import importlib.util
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results" / "engines.csv"
REFERENCE = "torch, eager, not folded"
TARGETS = {"onnxruntime": 1.7, "openvino": 2.2}
PAUSE_SECONDS = 0.2
#: Average number of busy programs above which the benchmark says so; one that ran just before leaves some.
MAX_LOAD = 1.0


def open_engines(folder, variant, side, threads):
    """Return what runs a batch (N, 3, side, side) uint8 to the graph's outputs, by name and precision.

    The reference comes first.
    """
    from rtmdet_geo.backends import open_backend
    from rtmdet_geo.backends.pytorch import TorchBackend
    from rtmdet_geo.export import export_model, make_check_tiles
    from rtmdet_geo.export.quantize import quantize_model
    from rtmdet_geo.models import get_model
    from rtmdet_geo.models.decode import DetectionGraph
    from rtmdet_geo.models.devices import cpu_has_bf16
    from rtmdet_geo.models.weights import save_weights
    from rtmdet_geo.structures import ModelSpec

    torch.manual_seed(0)
    classes = tuple(f"class {index}" for index in range(15))
    network = get_model(variant, num_classes=len(classes)).eval()
    spec = ModelSpec(
        name="bench",
        architecture=variant,
        classes=classes,
        mean=(123.675, 116.28, 103.53),
        std=(58.395, 57.12, 57.375),
        tile_size=side,
    )
    save_weights(network, folder / "bench.safetensors", spec, half=False)
    export_model(network, folder / "bench.onnx", spec=spec, verify=False)
    network = get_model(variant, num_classes=len(classes)).eval()  # the export may have folded the other
    graph = DetectionGraph(network, spec.mean, spec.std).eval()

    def reference(images):
        with torch.inference_mode():
            return tuple(output.numpy() for output in graph(torch.from_numpy(images)))

    tiles = (make_check_tiles(1, 3, 512, seed=seed) for seed in range(3))
    quantize_model(folder / "bench.onnx", folder / "bench_int8.onnx", calibration=tiles)
    engines = {(REFERENCE, "fp32"): reference}
    for name in ("onnxruntime", "openvino"):
        if importlib.util.find_spec(name) is None:
            continue
        for precision, file in (("fp32", "bench.onnx"), ("int8", "bench_int8.onnx")):
            engines[name, precision] = open_backend(folder / file, name=name, threads=threads, device="cpu").raw
    for precision in ("fp32", *(["bf16"] if cpu_has_bf16() else [])):
        engines["torch", precision] = TorchBackend(
            folder / "bench.safetensors", threads=threads, device="cpu", precision=precision
        ).raw
    return engines


def time_in_turns(engines, images, rounds):
    """Return the seconds of each round by engine, after one round that does not count."""
    seconds = {name: [] for name in engines}
    for number in range(rounds + 1):
        for name, run in engines.items():
            time.sleep(PAUSE_SECONDS)
            start = time.perf_counter()
            run(images)
            if number:
                seconds[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in seconds.items()}


def main():
    """Measure, print, write the CSV; exit 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV to write")
    parser.add_argument("--network", default="rtmdet_r_tiny")
    parser.add_argument("--side", type=int, default=1024, help="of the tile in px")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from rtmdet_geo.backends.engines import list_engines
    from rtmdet_geo.export import make_check_tiles

    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    if load is not None and load > MAX_LOAD:
        print(f"the machine is busy ({load:.1f} programs on average): these ratios are not to be trusted\n")
    torch.set_num_threads(options.threads)
    images = make_check_tiles(options.batch_size, 3, options.side, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        engines = open_engines(Path(folder), options.network, options.side, options.threads)
        seconds = time_in_turns(engines, images, options.rounds)

    machine = list_engines().machine
    case = {"network": options.network, "side": options.side, "batch": options.batch_size, "threads": options.threads}
    rows = []
    for (name, precision), values in seconds.items():
        ratios = seconds[REFERENCE, "fp32"] / values
        package = "torch" if name == REFERENCE else name
        rows.append(
            {
                "engine": name,
                "precision": precision,
                "version": importlib.metadata.version(package),
                **case,
                "rounds": options.rounds,
                "seconds": round(float(np.median(values)), 4),
                "fastest": round(float(values.min()), 4),
                "ratio": round(float(np.median(ratios)), 2),
                "lowest_ratio": round(float(ratios.min()), 2),
                "highest_ratio": round(float(ratios.max()), 2),
                "cpu": machine["cpu"],
                "cpu_features": " ".join(machine["cpu_features"]),
                "cores": machine["usable_cores"],
                "load": "" if load is None else round(load, 2),
                "python": machine["python"],
                "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            }
        )
    print(f"{'engine':28}{'precision':>9}{'seconds':>9}{'fastest':>9}{'ratio':>7}{'lowest':>8}{'highest':>9}")
    for row in rows:
        print(
            f"{row['engine']:28}{row['precision']:>9}{row['seconds']:>9}{row['fastest']:>9}{row['ratio']:>7}"
            f"{row['lowest_ratio']:>8}{row['highest_ratio']:>9}"
        )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    ratios = {row["engine"]: row["ratio"] for row in rows if row["precision"] == "fp32"}
    for name, target in TARGETS.items():
        state = "not installed" if name not in ratios else "PASS" if ratios[name] >= target else "BELOW"
        print(f"{name} >= {target} x torch as the reference runs it: {state}")
    return 1 if any(ratios.get(name, target) < target for name, target in TARGETS.items()) else 0


if __name__ == "__main__":
    sys.exit(main())
