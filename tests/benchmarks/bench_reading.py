"""What reading tiles costs beside reading the file: ``python tests/benchmarks/bench_reading.py [--output FILE.csv]``.

A 3-band uint8 GeoTIFF of 512 px blocks, deflate, as COGs are, is read three ways in turns, in the same process: plainly
(rasterio, a row of blocks at a time, the whole width), in tiles of 1024 px cut from strips, as the pipeline does, and
in tiles one by one. Rates are of the scene's pixels, each counted once. Target: strips reach 0.8 of the plain rate.
GDAL's cache is 256 MiB for all. ``--side`` above 8192 px makes two column panels or more.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from machine import describe_machine, verdict

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results" / "reading.csv"
TARGET = 0.8
SIDE, OVERLAP, BLOCK = 1024, 200, 512


def write_scene(path, side):
    """Write a scene of ground-like noise; it deflates to about two thirds."""
    import rasterio
    from rasterio.transform import Affine
    from rasterio.windows import Window

    generator = np.random.default_rng(0)
    texture = generator.normal(90, 12, (3, 2 * BLOCK, 2 * BLOCK)).clip(0, 255).astype(np.uint8)
    profile = {"driver": "GTiff", "dtype": "uint8", "count": 3, "width": side, "height": side, "crs": "EPSG:32630"}
    profile |= {"tiled": True, "blockxsize": BLOCK, "blockysize": BLOCK, "compress": "deflate", "interleave": "pixel"}
    transform = Affine(0.5, 0, 500_000, 0, -0.5, 4_000_000)
    with rasterio.open(path, "w", transform=transform, photometric="RGB", **profile) as target:
        for y in range(0, side, BLOCK):
            for x in range(0, side, BLOCK):
                width, height = min(BLOCK, side - x), min(BLOCK, side - y)
                row, column = generator.integers(0, BLOCK, 2)
                part = texture[:, row : row + height, column : column + width]
                target.write(part, window=Window(x, y, width, height))


def read_plainly(path):
    """Read rows of blocks with the raster library alone."""
    import rasterio
    from rasterio.windows import Window

    from rtmdet_geo.gdal_options import CACHE_BYTES

    with rasterio.Env(GDAL_CACHEMAX=CACHE_BYTES), rasterio.open(path) as dataset:
        for y in range(0, dataset.height, BLOCK):
            dataset.read([1, 2, 3], window=Window(0, y, dataset.width, min(BLOCK, dataset.height - y)))


def read_in_strips(path):
    """Read all tiles as the pipeline does."""
    from rtmdet_geo.raster import open_scene
    from rtmdet_geo.strips import read_tiles
    from rtmdet_geo.tiles import TileGrid

    with open_scene(path) as scene:
        for _ in read_tiles(scene, list(TileGrid(scene.width, scene.height, SIDE, OVERLAP))):
            pass


def read_tile_by_tile(path):
    """Read all tiles one by one."""
    from rtmdet_geo.raster import open_scene
    from rtmdet_geo.tiles import TileGrid

    with open_scene(path) as scene:
        for tile in TileGrid(scene.width, scene.height, SIDE, OVERLAP):
            scene.read(tile.x, tile.y, tile.width, tile.height)


WAYS = {"plain": read_plainly, "strips": read_in_strips, "tile by tile": read_tile_by_tile}


def measure(path, rounds):
    """Return wall and processor seconds, each (rounds, ways)."""
    wall, processor = np.zeros((rounds, len(WAYS))), np.zeros((rounds, len(WAYS)))
    for number in range(rounds):
        for column, read in enumerate(WAYS.values()):
            start, start_processor = time.perf_counter(), time.process_time()
            read(path)
            wall[number, column] = time.perf_counter() - start
            processor[number, column] = time.process_time() - start_processor
    return wall, processor


def main():
    """Measure, print, write the CSV; exit 1 if the target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV to write")
    parser.add_argument("--side", type=int, default=10240, help="of the scene in px")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))

    machine = describe_machine()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scene.tif"
        write_scene(path, options.side)
        size = path.stat().st_size
        for read in WAYS.values():  # files into the system's cache, modules loaded
            read(path)
        wall, processor = measure(path, options.rounds)
    megapixels = options.side**2 / 1e6
    ratios = wall[:, :1] / wall
    rows = [
        {
            "way": way,
            "side_px": options.side,
            "file_mb": round(size / 1e6, 1),
            "mpx_per_s": round(megapixels / float(np.median(wall[:, column])), 1),
            "mpx_per_cpu_s": round(megapixels / float(np.median(processor[:, column])), 1),
            "ratio": round(float(np.median(ratios[:, column])), 3),
            "lowest_ratio": round(float(ratios[:, column].min()), 3),
            **machine,
        }
        for column, way in enumerate(WAYS)
    ]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        text = f"{row['way']}: {row['mpx_per_s']} Mpx/s ({row['mpx_per_cpu_s']} per processor second), {row['ratio']}"
        if row["way"] == "strips":
            verdict(f"{text} of the plain rate, target {TARGET}", row["ratio"] >= TARGET)
        else:
            print(f"       {text} of the plain rate")
    return 1 if rows[1]["ratio"] < TARGET else 0


if __name__ == "__main__":
    sys.exit(main())
