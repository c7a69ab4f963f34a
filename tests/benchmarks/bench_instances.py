"""Memory of instances at scene scale: ``python tests/benchmarks/bench_instances.py [--output FILE.csv]``.

10,000 houses of 60 to 84 px in a scene of 10,000 x 10,000 px go through the whole pipeline: tiles, masks, polygons,
GeoPackage. The engine is a stand-in that finds bright areas and returns ten candidates for each, so what is measured
is the pipeline, not a network. Target: a peak below 1.5 GB. The smaller scene shows the growth. Every case runs in a
process of its own, so that peak memory is that of the case.

Where ``RTMDET_DATA`` names the folder of real scenes, the bundled building model also runs over all of Banepa (24
chips, 1,536 x 4,096 px).
"""

from __future__ import annotations

import argparse
import csv
import datetime
import multiprocessing
import os
import platform
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results" / "instances.csv"
TARGET_MB = 1500
SPACING = 100  # px from house to house
COPIES = 10


def paint(path, houses_per_side):
    """Write the scene in strips of one row of houses."""
    import rasterio
    from rasterio.windows import Window
    from synthetic import GROUND, SHIP, TRANSFORM

    side = houses_per_side * SPACING
    profile = {"driver": "GTiff", "height": side, "width": side, "count": 3, "dtype": "uint8", "photometric": "RGB"}
    profile |= {"crs": "EPSG:32630", "transform": TRANSFORM, "tiled": True, "compress": "deflate"}
    generator = np.random.default_rng(0)
    with rasterio.open(path, "w", **profile, blockxsize=512, blockysize=512) as dataset:
        for row in range(houses_per_side):
            strip = np.full((SPACING, side), GROUND, np.uint8)
            for column in range(houses_per_side):
                width, height = generator.integers(60, 85, 2)
                x, y = column * SPACING + (SPACING - width) // 2, (SPACING - height) // 2
                strip[y : y + height, x : x + width] = SHIP
            window = Window(0, row * SPACING, side, SPACING)
            for band in (1, 2, 3):
                dataset.write(strip, band, window=window)


def measure(houses_per_side):
    """Run in a fresh process: seconds, polygons, memory of the process in MB before the run and at its highest."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from blob_masks import BlobMaskBackend
    from synthetic import make_spec

    from rtmdet_geo import detect as pipeline
    from rtmdet_geo.structures import Detections

    class Candidates(BlobMaskBackend):
        """Ten candidates an object, as a network gives them before NMS."""

        def _find(self, image):
            found = super()._find(image)
            return Detections.concatenate([found] * COPIES, "tile", "mask")

    spec = make_spec(kind="mask", architecture="rtmdet_ins_test", iou_threshold=0.6, tile_size=640, overlap=192)
    pipeline.open_backend = lambda path, **options: Candidates(spec)
    pipeline.find_model = lambda model: Path(__file__)
    with tempfile.TemporaryDirectory() as folder:
        scene = Path(folder) / "houses.tif"
        paint(scene, houses_per_side)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        start = time.perf_counter()
        result = pipeline.detect_scene(scene, Path(folder) / "houses.gpkg")
        seconds = time.perf_counter() - start
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    side = houses_per_side * SPACING
    return row("painted houses, stand-in engine", (side, side), houses_per_side**2, result, seconds, before, peak_mb)


def row(what, size, objects, result, seconds, before_mb, peak_mb):
    """Return one line of the table; ``objects``: how many there are, if that is known."""
    measured = {"seconds": round(seconds, 1), "before_mb": round(before_mb), "peak_mb": round(peak_mb)}
    return {"what": what, "width": size[0], "height": size[1], "objects": objects, "polygons": len(result)} | measured


def measure_banepa(folder):
    """Run the bundled building model over all chips in one scene, in a fresh process."""
    sys.path[:0] = [str(ROOT)]
    import rasterio
    from rasterio.merge import merge

    from rtmdet_geo.detect import detect_scene

    with tempfile.TemporaryDirectory() as place:
        pixels, transform = merge(sorted((Path(folder) / "banepa" / "oam").glob("*.tif")))
        _, height, width = pixels.shape
        scene = Path(place) / "banepa.tif"
        profile = {"driver": "GTiff", "height": height, "width": width, "count": 3, "dtype": "uint8"}
        with rasterio.open(scene, "w", **profile, crs="EPSG:4326", transform=transform, photometric="RGB") as dataset:
            dataset.write(pixels)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        start = time.perf_counter()
        result = detect_scene(scene, Path(place) / "banepa.gpkg", model="banepa_ins")
        seconds = time.perf_counter() - start
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return row("Banepa, banepa_ins", (width, height), "", result, seconds, before, peak_mb)


def main():
    parser = argparse.ArgumentParser(description="memory of instances at scene scale")
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV to write")
    output = parser.parse_args().output
    machine = {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    rows = []
    cases = [(measure, 50), (measure, 100)]
    if os.environ.get("RTMDET_DATA"):
        cases.append((measure_banepa, os.environ["RTMDET_DATA"]))
    for function, argument in cases:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows.append(pool.apply(function, (argument,)))
        print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    large = rows[1]
    is_met = large["peak_mb"] < TARGET_MB and large["polygons"] == large["objects"]
    verdict = "PASS " if is_met else "BELOW"
    print(f"{verdict}  {large['polygons']:,} instances in {large['width']:,}^2 px: {large['peak_mb']} MB", end=" ")
    print(f"(target {TARGET_MB} MB)")
    with output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=[*rows[0], *machine])
        writer.writeheader()
        writer.writerows(line | machine for line in rows)
    print(f"\nwritten to {output}")


if __name__ == "__main__":
    main()
