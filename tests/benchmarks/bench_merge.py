"""What merging a large scene costs: ``python tests/benchmarks/bench_merge.py [--output FILE.csv]``.

A million raw detections in 2,500 tiles of 1024 px, 400 a tile: what a detector gives of 64 ships per square of 1024 px
that lie apart, each with jittered duplicates in every tile that sees it. Timed is all that turns them into objects on
one core, NMS in tiles included: ``tile_survivors`` and ``merge_rows``, not the making of the detections. Beside it, the
same by ``merge_survivors`` at once, whose result must be the same. Target: under 30 s.
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
RESULTS = Path(__file__).parent / "results" / "merge.csv"
TARGET_S = 30.0
SIDE, OVERLAP, PER_TILE, IOU_THRESHOLD = 1024, 200, 400, 0.1


class Ships:
    """Ships over a plane, the same wherever they are seen from."""

    def __init__(self, width, height, cell=128):
        generator = np.random.default_rng(0)
        self.cell, rows, columns = cell, -(-height // cell), -(-width // cell)
        x, y = np.meshgrid(np.arange(columns) * cell, np.arange(rows) * cell)
        shape = (rows, columns)
        self.boxes = np.stack(
            [
                x + generator.uniform(0.2, 0.8, shape) * cell,
                y + generator.uniform(0.2, 0.8, shape) * cell,
                generator.uniform(20, 60, shape),
                generator.uniform(8, 18, shape),
                generator.uniform(-1.5, 1.5, shape),
            ],
            axis=-1,
        )

    def seen_by(self, tile, generator):
        """Return PER_TILE raw detections, in tile px: the ships whose centres it shows, and duplicates of them."""
        from rtmdet_geo.structures import Detections

        rows = slice(tile.y // self.cell, -(-(tile.y + tile.height) // self.cell))
        columns = slice(tile.x // self.cell, -(-(tile.x + tile.width) // self.cell))
        boxes = self.boxes[rows, columns].reshape(-1, 5) - (tile.x, tile.y, 0, 0, 0)
        boxes = boxes[((boxes[:, :2] >= 0) & (boxes[:, :2] < SIDE)).all(axis=1)]
        boxes = boxes[np.arange(PER_TILE) % len(boxes)]
        boxes = boxes + generator.normal(0, 1, boxes.shape) * (1, 1, 1, 0.5, 0.03)
        return Detections(boxes, generator.uniform(0.3, 1, PER_TILE), np.zeros(PER_TILE, int), "tile", "rotated")


def main():
    """Measure, print, write the CSV; exit 1 if the target is missed or the results differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV to write")
    parser.add_argument("--tiles", type=int, default=50, help="along each axis")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from rtmdet_geo.tiles import TileGrid

    run(TileGrid(*[SIDE + SIDE - OVERLAP] * 2, SIDE, OVERLAP))  # compiles
    row = run(TileGrid(*[SIDE + (SIDE - OVERLAP) * (options.tiles - 1)] * 2, SIDE, OVERLAP))
    row |= describe_machine()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        writer.writeheader()
        writer.writerow(row)
    is_met = row["seconds"] < TARGET_S and row["is_equal"]
    verdict(
        f"{row['raw']:,} raw detections in {row['tiles']:,} tiles: {row['seconds']} s (target {TARGET_S:g}), of it "
        f"{row['rows_s']} s by rows; {row['objects']:,} objects; at most {row['peak_open']:,} of {row['survivors']:,} "
        f"pieces open; {'the same' if row['is_equal'] else 'NOT the same'} as at once ({row['at_once_s']} s)",
        is_met,
    )
    return 0 if is_met else 1


def run(grid):
    """Return the CSV's row for one scene."""
    from rtmdet_geo.merge import merge_survivors, tile_survivors
    from rtmdet_geo.merge_rows import RowMerger

    ships, generator = Ships(grid.width, grid.height), np.random.default_rng(1)
    merger = RowMerger(grid, iou_threshold=IOU_THRESHOLD)
    tiles_s, rows_s, parts, yields = 0.0, 0.0, [], []
    for row in range(grid.num_rows):
        tiles = [grid.tile(row, column) for column in range(grid.num_cols)]
        raw = [ships.seen_by(tile, generator) for tile in tiles]
        start = time.perf_counter()
        found = [
            tile_survivors(item, tile, grid, iou_threshold=IOU_THRESHOLD) for item, tile in zip(raw, tiles, strict=True)
        ]
        middle = time.perf_counter()
        yields.append(merger.add_row(found))
        rows_s += time.perf_counter() - middle
        tiles_s += middle - start
        parts += found
    start = time.perf_counter()
    at_once = merge_survivors(parts, grid, iou_threshold=IOU_THRESHOLD)
    at_once_s = time.perf_counter() - start
    return {
        "tiles": len(grid),
        "raw": len(grid) * PER_TILE,
        "survivors": sum(len(part.detections) for part in parts),
        "objects": sum(map(len, yields)),
        "seconds": round(tiles_s + rows_s, 2),
        "tiles_s": round(tiles_s, 2),
        "rows_s": round(rows_s, 2),
        "at_once_s": round(at_once_s, 2),
        "peak_open": merger.peak_open,
        "is_equal": np.array_equal(as_rows(yields), as_rows([at_once])),
    }


def as_rows(merged):
    """Return boxes, scores, labels, counts and edge flags as rows, sorted."""
    rows = np.concatenate(
        [
            np.c_[item.detections.boxes, item.detections.scores, item.detections.labels, item.num_merged, item.on_edge]
            for item in merged
        ]
    )
    return rows[np.lexsort(rows.T)]


if __name__ == "__main__":
    sys.exit(main())
