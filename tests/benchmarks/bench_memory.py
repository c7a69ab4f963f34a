"""How memory grows with a scene: ``python tests/benchmarks/bench_memory.py [--output FILE.csv]``.

Scenes are VRTs of one repeated GeoTIFF of 2,000 px. A stand-in for the engine, which costs nothing and finds three
objects in every tile (two of them those of its neighbours as well, so that there is something to merge), or 40 times
as many, runs over 10,000 x 10,000 and 40,000 x 40,000 px; the bundled model of ships over 10,000 x 4,000 px, which are
as wide as strips of a scene get. All write a GeoPackage. Each run has a process of its own; its peak is of resident
memory, as the system counts it and as it was sampled 50 times a second. Targets: 40,000 px take at most 1.1 times the
memory of 10,000 px; the model takes less than 1.2 GB.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from big_scenes import GSD_M, write_geotiff, write_vrt
from machine import describe_machine, verdict
from processes import report, run_measured

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results" / "memory.csv"
TARGET, TARGET_MB = 1.1, 1200
MODEL = "sen2ships_r"
SIDE, OVERLAP = 1024, 200
REPEATED = 2000
#: Rows of three objects that the stand-ins find in every tile.
STAND_INS = {"stand-in, 3 a tile": 1, "stand-in, 120 a tile": 40}


class Counter:
    """An engine that finds the same objects in every tile at once, and counts tiles."""

    name, path, device_name, fixed_tile_size = "stand-in", Path(__file__), "cpu", None

    def __init__(self, num_rows):
        from rtmdet_geo.structures import Detections, ModelSpec

        self.num_saturated = self.count = 0
        self.spec = ModelSpec(
            name="bench",
            architecture="rtmdet_r_tiny",
            classes=("ship",),
            mean=(0, 0, 0),
            std=(1, 1, 1),
            tile_size=SIDE,
            overlap=OVERLAP,
            gsd_m=GSD_M,
        )
        x = np.tile([OVERLAP / 2, SIDE / 2, SIDE - OVERLAP / 2], num_rows)
        y = np.repeat((np.arange(num_rows) + 0.5) * SIDE / num_rows, 3)
        boxes = np.c_[x, y, np.tile([40, 12, 0.3], (len(x), 1))]
        scores = np.tile([0.9, 0.8, 0.7], num_rows)
        self.found = Detections(boxes, scores, np.zeros(len(x), int), "tile", "rotated")

    def run(self, batches, *, score_threshold, multi_label=False):
        for images in batches:
            self.count += len(images)
            yield [self.found] * len(images)

    def predict(self, images, *, score_threshold, multi_label=False):
        return next(self.run([images], score_threshold=score_threshold, multi_label=multi_label))


def run_child(task):
    """Detect in this process and report."""
    from rtmdet_geo import detect_scene
    from rtmdet_geo.backends import open_backend

    engine = (
        open_backend(MODEL, name="onnxruntime", device="cpu")
        if task["engine"] == MODEL
        else Counter(STAND_INS[task["engine"]])
    )
    start = time.perf_counter()
    features = detect_scene(task["scene"], task["output"], model=engine, gsd=GSD_M, overwrite=True, collect=False)
    seconds, summary = time.perf_counter() - start, features.attrs["summary"]
    tiles, number = summary["num_tiles"], summary["num_detections"]
    if isinstance(engine, Counter) and (engine.count != tiles or number < tiles):
        raise SystemExit(f"{engine.count} tiles were run and {number} objects written, of {tiles} tiles")
    report(seconds=round(seconds, 2), tiles=tiles, objects=number)


def measure(folder, engine, width, height):
    """Return a row of one run."""
    scene = folder / f"{width}x{height}.vrt"
    write_vrt(scene, width, height, folder / "repeated.tif", REPEATED)
    task = {"scene": str(scene), "output": str(folder / "ships.gpkg"), "engine": engine}
    row = run_measured([sys.executable, __file__, "--child", json.dumps(task)])
    return {"engine": engine, "width_px": width, "height_px": height, **row}


def main():
    """Measure, print, write the CSV; exit 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV to write")
    parser.add_argument("--small", type=int, default=10_000, help="side in px of the smaller scene")
    parser.add_argument("--large", type=int, default=40_000, help="side in px of the larger scene")
    parser.add_argument("--model-height", type=int, default=4000, help="height in px of the scene of the model")
    parser.add_argument("--rounds", type=int, default=3, help="of the stand-in; the highest peak of each size counts")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if options.child:
        run_child(options.child)
        return 0

    machine, runs = describe_machine(), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_geotiff(folder / "repeated.tif", REPEATED, REPEATED)
        measure(folder, next(iter(STAND_INS)), REPEATED, REPEATED)  # compiles
        for engine in STAND_INS:
            for _ in range(options.rounds):
                runs += [measure(folder, engine, side, side) for side in (options.small, options.large)]
        runs.append(measure(folder, MODEL, 10_000, options.model_height))
    highest = {}
    for row in runs:
        size = (row["engine"], row["width_px"])
        if size not in highest or row["peak_mb"] > highest[size]["peak_mb"]:
            highest[size] = row
    rows = [
        {name: value for name, value in row.items() if name != "wall_s"}
        | {"lowest_peak_mb": min(other["peak_mb"] for other in runs if is_same(other, row))}
        | machine
        for row in highest.values()
    ]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        text = f"{row['engine']}, {row['width_px']} x {row['height_px']} px: {row['tiles']} tiles, {row['objects']} "
        print(f"       {text}objects, {row['seconds']} s, peak {row['peak_mb']} MB (sampled {row['sampled_mb']} MB)")
    model, is_met = rows[-1], True
    for small, large in zip(rows[:-1:2], rows[1:-1:2], strict=True):
        ratio = large["peak_mb"] / small["peak_mb"]
        is_met &= ratio <= TARGET
        text = f"{large['width_px']} px take {ratio:.3f} of the memory of {small['width_px']} px, target {TARGET}"
        verdict(f"{small['engine']}: {text}", ratio <= TARGET)
    is_met &= model["peak_mb"] < TARGET_MB
    verdict(f"the model takes {model['peak_mb']} MB, target {TARGET_MB}", model["peak_mb"] < TARGET_MB)
    return 0 if is_met else 1


def is_same(row, other):
    """Say whether two rows are of one engine and size."""
    return all(row[name] == other[name] for name in ("engine", "width_px", "height_px"))


if __name__ == "__main__":
    sys.exit(main())
