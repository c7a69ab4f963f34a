"""What the pipeline costs beside its engine: ``python tests/benchmarks/bench_pipeline.py [--output FILE.csv]``.

A stand-in engine sleeps 5 ms a tile and returns 200 detections each (50 objects, four boxes on each); tiles of 1024 px
are in memory. What is measured is everything between: cutting into batches, filters, NMS in the tile, the border rule,
and the merge of the scene at the end. Target: at least 0.9 of the stand-in's own rate, which is measured by itself in
turns with the pipeline, in the same process. The break-even time is what the pipeline takes per tile where the engine
takes nothing: engines slower than that are not held up by it (given a core for it).
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from pathlib import Path

import numpy as np
from machine import describe_machine, verdict

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results" / "pipeline.csv"
TARGET = 0.9
SIDE, OVERLAP, PER_TILE = 1024, 200, 200
NUM_POOL = 16


class StandIn:
    """An engine that answers after ``seconds`` a tile with detections made beforehand."""

    name, path, device_name, fixed_tile_size = "stand-in", Path("stand-in"), "cpu", None

    def __init__(self, seconds):
        from rtmdet_geo.structures import ModelSpec

        self.seconds, self.num_saturated, self.count = seconds, 0, 0
        self.spec = ModelSpec(
            name="bench",
            architecture="rtmdet_r_tiny",
            classes=("ship",),
            mean=(0, 0, 0),
            std=(1, 1, 1),
            tile_size=SIDE,
            overlap=OVERLAP,
        )
        generator = np.random.default_rng(0)
        self.pool = [make_detections(generator) for _ in range(NUM_POOL)]

    def run(self, batches, *, score_threshold, multi_label=False):
        for images in batches:
            if self.seconds:
                time.sleep(self.seconds * len(images))
            self.count += len(images)
            yield [self.pool[(self.count + index) % NUM_POOL] for index in range(len(images))]


class MemoryScene:
    """Noise of any size; four tiles of it."""

    path = "memory"

    def __init__(self, side):
        generator = np.random.default_rng(1)
        self.width = self.height = side
        self.tiles = [generator.integers(0, 255, (3, SIDE, SIDE), dtype=np.uint8) for _ in range(4)]
        self.valid = np.ones((SIDE, SIDE), bool)

    def read(self, x, y, width, height):
        return self.tiles[(x + y) // SIDE % 4][:, :height, :width], self.valid[:height, :width]


def make_detections(generator):
    """Return 200 ships of a tile: 50 of them, four boxes each."""
    from rtmdet_geo.structures import Detections

    number = PER_TILE // 4
    centres = generator.uniform(0, SIDE, (number, 2))
    sizes = np.c_[generator.uniform(20, 60, number), generator.uniform(8, 18, number)]
    angles = generator.uniform(-1.5, 1.5, (number, 1))
    boxes = np.repeat(np.c_[centres, sizes, angles], 4, axis=0)
    boxes += generator.normal(0, 1, boxes.shape) * (1.5, 1.5, 1, 0.5, 0.05)
    return Detections(boxes, generator.uniform(0.3, 1, PER_TILE), np.zeros(PER_TILE, int), "tile", "rotated")


def time_pipeline(scene, grid, seconds, batch_size):
    """Return the seconds of tiles and of the merge, and the number of objects."""
    from rtmdet_geo.merge import MAX_OVERLAP, merge_survivors
    from rtmdet_geo.tile_loop import TileSettings, run_tiles

    engine = StandIn(seconds)
    settings = TileSettings.of(engine, batch_size=batch_size)
    start = time.perf_counter()
    results = run_tiles(scene, grid, engine, settings)
    middle = time.perf_counter()
    merged = merge_survivors(results.parts, grid, iou_threshold=0.1, max_overlap=MAX_OVERLAP, kind="rotated")
    return middle - start, time.perf_counter() - middle, len(merged)


def time_engine(number, seconds, batch_size):
    """Return the seconds of the stand-in alone."""
    engine = StandIn(seconds)
    images = np.zeros((batch_size, 3, 1, 1), np.uint8)
    start = time.perf_counter()
    for _ in engine.run((images for _ in range(number // batch_size)), score_threshold=0):
        pass
    return time.perf_counter() - start


def main():
    """Measure, print, write the CSV; exit 1 if the target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV to write")
    parser.add_argument("--side", type=int, default=20480, help="of the scene in px")
    parser.add_argument("--milliseconds", type=float, default=5, help="that the stand-in takes per tile")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from rtmdet_geo.tiles import TileGrid

    scene, grid = MemoryScene(options.side), TileGrid(options.side, options.side, SIDE, OVERLAP)
    seconds = options.milliseconds / 1000
    time_pipeline(MemoryScene(2048), TileGrid(2048, 2048, SIDE, OVERLAP), 0, 1)  # compiles
    machine, rows = describe_machine(), []
    for batch_size in (1, 8):
        rounds = []
        for _ in range(options.rounds):
            tiles, merge, number = time_pipeline(scene, grid, seconds, batch_size)
            bare = time_engine(len(grid), seconds, batch_size) * len(grid) / (len(grid) // batch_size * batch_size)
            free, _, _ = time_pipeline(scene, grid, 0, batch_size)
            rounds.append((bare / (tiles + merge), tiles, merge, bare, free))
        ratio, tiles, merge, bare, free = np.median(np.array(rounds), axis=0)
        rows.append(
            {
                "batch": batch_size,
                "tiles": len(grid),
                "detections_per_tile": PER_TILE,
                "objects": number,
                "engine_ms": round(bare / len(grid) * 1000, 3),
                "pipeline_ms": round((tiles + merge) / len(grid) * 1000, 3),
                "merge_s": round(merge, 3),
                "ratio": round(ratio, 3),
                "lowest_ratio": round(min(row[0] for row in rounds), 3),
                "break_even_ms": round(free / len(grid) * 1000, 3),
                **machine,
            }
        )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        text = (
            f"batch {row['batch']}: {row['ratio']} of the rate of an engine of {row['engine_ms']} ms a tile "
            f"(pipeline {row['pipeline_ms']} ms, break-even {row['break_even_ms']} ms), target {TARGET}"
        )
        verdict(text, row["ratio"] >= TARGET)
    return 1 if any(row["ratio"] < TARGET for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
