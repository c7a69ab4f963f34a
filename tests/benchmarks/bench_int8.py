"""int8 against fp32 on the CPU: ``python tests/benchmarks/bench_int8.py [--output FILE.csv]``.

The bundled models are quantised (:mod:`rtmdet_geo.export.quantize`) and run in onnxruntime and OpenVINO.

Speed: one tile of the model's size at a time, two threads, all engines in turns in one process; ``ratio`` is the median
over the rounds of onnxruntime's fp32 seconds by the engine's in the same round.

Cost: average precision at IoU .50 on real labels (boxes of ships over ten ports, masks of buildings over three columns
of Banepa), where the environment variable ``RTMDET_DATA`` names the folder of the real scenes. Scenes come in two
halves; an int8 file is calibrated on tiles of one half and scored on the other, so that no scored pixel was calibrated
on. ``cost`` is onnxruntime's fp32 precision less the engine's. The models saw most of these scenes in training, but not
Casablanca and Banepa's western column, which have rows of their own. Target: a cost of less than .02 over all scenes of
each model.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from labelled_scenes import HALVES, LEFT_OUT, average_precision, calibration_tiles, load_scenes, search
from machine import describe_machine, verdict

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results" / "int8.csv"
MAX_COST = 0.02
PAUSE_SECONDS = 0.1
COLUMNS = (
    "model", "engine", "precision", "what", "scenes", "objects", "ap50", "cost", "calibration_tiles", "threads", "side",
    "rounds", "seconds", "fastest", "ratio", "lowest_ratio", "highest_ratio", "size_mb",
)  # fmt: skip


def list_engines():
    """Return the engines that are here, the reference first."""
    return ["onnxruntime", *(["openvino"] if importlib.util.find_spec("openvino") else [])]


def measure_cost(model, data, folder, threads):
    """Quantise by each half and score on the other; return the rows, and the path of an int8 file."""
    from rtmdet_geo.backends import open_backend
    from rtmdet_geo.catalog import CATALOG
    from rtmdet_geo.export.quantize import quantize_model

    recipe, chips = load_scenes(model, data, folder)
    kind, engines = recipe.model.object_kind, list_engines()
    found, num_tiles = {}, 0
    for index, names in enumerate(HALVES[model]):
        tiles = calibration_tiles([chips[name] for name in HALVES[model][1 - index]], recipe)
        path = folder / f"{model}_{index}.onnx"
        quantize_model(CATALOG[model].path, path, calibration=tiles)
        num_tiles = max(num_tiles, len(tiles))
        for precision, source in (("fp32", CATALOG[model].path), ("int8", path)):
            for engine in engines:
                opened = open_backend(source, name=engine, threads=threads)
                for name in names:
                    found[engine, precision, name] = search(opened, chips[name], recipe)
    rows = []
    for what, names in (("all scenes", list(chips)), ("left out of training", [LEFT_OUT[model]])):
        scenes = [chips[name] for name in names]
        base = None
        for precision in ("fp32", "int8"):
            for engine in engines:
                seen = [found[engine, precision, name] for name in names]
                ap, objects = average_precision(scenes, seen, kind)
                base = ap if base is None else base
                rows.append(
                    {
                        "model": model,
                        "engine": engine,
                        "precision": precision,
                        "what": f"{'mask ' if kind == 'mask' else ''}AP50, {what}",
                        "scenes": "+".join(names),
                        "objects": objects,
                        "ap50": round(ap, 4),
                        "cost": round(base - ap, 4),
                        "calibration_tiles": num_tiles if precision == "int8" else "",
                    }
                )
    largest = max(chips.values(), key=lambda chip: chip.width * chip.height)
    return rows, path, calibration_tiles([largest], recipe)[0]


def make_int8(model, folder):
    """Quantise without real scenes, for the speed alone; return the path and a tile."""
    from rtmdet_geo.catalog import CATALOG
    from rtmdet_geo.export import make_check_tiles
    from rtmdet_geo.export.quantize import quantize_model

    spec = CATALOG[model].spec()
    tiles = [make_check_tiles(1, len(spec.bands), spec.tile_size, seed=seed) for seed in range(3)]
    quantize_model(CATALOG[model].path, folder / f"{model}.onnx", calibration=tiles)
    return folder / f"{model}.onnx", tiles[0]


def measure_speed(model, int8, tile, threads, rounds):
    """Time the engines in turns on one tile; return the rows."""
    from rtmdet_geo.backends import open_backend
    from rtmdet_geo.catalog import CATALOG

    files = {"fp32": CATALOG[model].path, "int8": int8}
    opened = {
        (engine, precision): open_backend(file, name=engine, threads=threads, device="cpu")
        for engine in list_engines()
        for precision, file in files.items()
    }
    seconds = {key: [] for key in opened}
    for number in range(rounds + 1):
        for key, engine in opened.items():
            time.sleep(PAUSE_SECONDS)  # the threads of the one before go to sleep
            start = time.perf_counter()
            engine.raw(tile)
            if number:
                seconds[key].append(time.perf_counter() - start)
    rows, reference = [], np.array(seconds["onnxruntime", "fp32"])
    for (engine, precision), values in seconds.items():
        ratios = reference / values
        rows.append(
            {
                "model": model,
                "engine": engine,
                "precision": precision,
                "what": "speed",
                "threads": threads,
                "side": tile.shape[-1],
                "rounds": rounds,
                "seconds": round(float(np.median(values)), 4),
                "fastest": round(min(values), 4),
                "ratio": round(float(np.median(ratios)), 2),
                "lowest_ratio": round(float(ratios.min()), 2),
                "highest_ratio": round(float(ratios.max()), 2),
                "size_mb": round(files[precision].stat().st_size / 1e6, 2),
            }
        )
    return rows


def main():
    """Measure, print, write the CSV; exit 1 if int8 costs too much."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV to write")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=25)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    data, machine, rows = os.environ.get("RTMDET_DATA"), describe_machine(), []
    if data is None:
        print("RTMDET_DATA names no folder of real scenes: the speed only\n")
    for model in HALVES:
        with tempfile.TemporaryDirectory() as folder:
            cost = []
            if data is not None:
                cost, int8, tile = measure_cost(model, Path(data), Path(folder), options.threads)
            else:
                int8, tile = make_int8(model, Path(folder))
            rows += [*cost, *measure_speed(model, int8, tile, options.threads, options.rounds)]
    for row in rows:
        words = f"{row['model']:14}{row['engine']:13}{row['precision']:6}"
        if row["what"] == "speed":
            print(f"{words}{row['side']} px: {row['seconds']:.4f} s, {row['ratio']:.2f} x onnxruntime fp32")
        else:
            print(f"{words}{row['what']}: {row['ap50']:.4f}, cost {row['cost']:+.4f}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *machine], lineterminator="\n")
        writer.writeheader()
        writer.writerows([row | machine for row in rows])
    costs = [row["cost"] for row in rows if row["what"].endswith("all scenes") and row["precision"] == "int8"]
    verdict(
        f"int8 costs less than {MAX_COST} of AP50 (at most {max(costs, default=0):.4f})",
        max(costs, default=0) < MAX_COST,
    )
    return int(max(costs, default=0) >= MAX_COST)


if __name__ == "__main__":
    sys.exit(main())
