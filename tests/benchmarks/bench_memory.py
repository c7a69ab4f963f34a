"""What a run holds in memory: ``python tests/benchmarks/bench_memory.py [--output FILE.csv]``.

Peak resident memory of ``detect_scene`` with a GeoPackage as output, each in a process of its own:

* a stand-in engine with three detections in each tile, on scenes of 10,000 and of 40,000 px a side (virtual mosaics of
  one repeated GeoTIFF): the larger one may take 1.1 times the memory of the smaller one;
* the same with three hundred detections in each tile;
* the bundled model of ships on 10,000 px: less than 1.2 GB.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from machine import describe_machine, verdict

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results" / "memory.csv"
TARGET_RATIO, TARGET_MB = 1.1, 1200
PART = 2000


class StandIn:
    """An engine that finds the same objects in every tile, at once, and counts tiles."""

    name, path, device_name, fixed_tile_size = "stand-in", Path("stand-in"), "cpu", None

    def __init__(self, per_tile):
        from rtmdet_geo.structures import Detections, ModelSpec, StretchSpec

        generator = np.random.default_rng(0)
        self.num_saturated = self.num_tiles = 0
        self.spec = ModelSpec(
            name="bench",
            architecture="rtmdet_r_tiny",
            classes=("ship",),
            mean=(0, 0, 0),
            std=(1, 1, 1),
            stretch=StretchSpec(kind="none"),
        )
        boxes = np.c_[
            generator.uniform(0, 1024, (per_tile, 2)),
            generator.uniform(20, 60, per_tile),
            generator.uniform(8, 18, per_tile),
            generator.uniform(-1.5, 1.5, per_tile),
        ]
        self.found = Detections(boxes, generator.uniform(0.4, 1, per_tile), np.zeros(per_tile, int))

    def run(self, batches, *, score_threshold, multi_label=False):
        for images in batches:
            self.num_tiles += len(images)
            yield [self.found] * len(images)


def write_mosaic(folder, side):
    """Write a virtual mosaic of a repeated GeoTIFF of 4 m pixels; return its path."""
    import rasterio
    from rasterio.transform import Affine

    part = folder / "part.tif"
    if not part.exists():
        pixels = np.random.default_rng(0).normal(90, 12, (3, PART, PART)).clip(1, 255).astype(np.uint8)
        profile = {"driver": "GTiff", "dtype": "uint8", "count": 3, "width": PART, "height": PART, "tiled": True}
        profile |= {"compress": "deflate", "photometric": "RGB", "interleave": "pixel", "crs": "EPSG:32630"}
        with rasterio.open(part, "w", transform=Affine(4, 0, 500_000, 0, -4, 4_000_000), **profile) as target:
            target.write(pixels)
    with rasterio.open(part) as source:
        crs = source.crs.to_wkt().replace("&", "&amp;").replace('"', "&quot;")
    bands = []
    for band, colour in enumerate(("Red", "Green", "Blue"), 1):
        sources = "".join(
            f'<SimpleSource><SourceFilename relativeToVRT="1">part.tif</SourceFilename><SourceBand>{band}</SourceBand>'
            f'<SrcRect xOff="0" yOff="0" xSize="{PART}" ySize="{PART}"/>'
            f'<DstRect xOff="{x}" yOff="{y}" xSize="{PART}" ySize="{PART}"/></SimpleSource>'
            for y in range(0, side, PART)
            for x in range(0, side, PART)
        )
        interpretation = f"<ColorInterp>{colour}</ColorInterp>"
        bands.append(f'<VRTRasterBand dataType="Byte" band="{band}">{interpretation}{sources}</VRTRasterBand>')
    path = folder / f"scene{side}.vrt"
    path.write_text(
        f'<VRTDataset rasterXSize="{side}" rasterYSize="{side}"><SRS>{crs}</SRS>'
        f"<GeoTransform>500000, 4, 0, 4000000, 0, -4</GeoTransform>{''.join(bands)}</VRTDataset>"
    )
    return path


def run_child(scene, output, per_tile):
    """Detect, and print what it took as JSON; ``per_tile`` 0 is the bundled model."""
    import resource

    sys.path.insert(0, str(ROOT))
    from rtmdet_geo.detect import detect_scene

    start = time.perf_counter()
    engine = StandIn(per_tile) if per_tile else None
    found = detect_scene(scene, output, model=engine, collect=False)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
    summary = found.attrs["summary"]
    assert engine is None or engine.num_tiles == summary["num_tiles"]
    facts = {"tiles": summary["num_tiles"], "features": summary["num_detections"]}
    print(json.dumps({**facts, "seconds": round(time.perf_counter() - start, 1), "peak_mb": round(peak)}))


def main():
    """Measure, print, write the CSV; exit 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV to write")
    parser.add_argument("--sides", type=int, nargs=2, default=[10_000, 40_000], help="of the scenes in px")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return run_child(options.child[0], options.child[1], int(options.child[2]))
    machine, rows = describe_machine(), []
    small, large = options.sides
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for per_tile, side in [(3, small), (3, large), (300, small), (300, large), (0, small)]:
            scene = write_mosaic(folder, side)
            words = [sys.executable, __file__, "--child", scene, folder / f"{per_tile}_{side}.gpkg", per_tile]
            done = subprocess.run([str(word) for word in words], check=True, capture_output=True, text=True)
            facts = json.loads(done.stdout.splitlines()[-1])
            engine = "stand-in" if per_tile else "sen2ships_r, onnxruntime"
            rows.append({"engine": engine, "side_px": side, "per_tile": per_tile, **facts, **machine})
            print(f"       {engine} {side} px: {facts}", flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    peaks = [row["peak_mb"] for row in rows]
    met = True
    for first, second in ((0, 1), (2, 3)):
        ratio = peaks[second] / peaks[first]
        met &= ratio <= TARGET_RATIO
        verdict(
            f"{rows[first]['per_tile']} objects a tile: {peaks[first]} MB at {small} px, {peaks[second]} MB at {large} "
            f"px, ratio {ratio:.3f}, target {TARGET_RATIO}",
            ratio <= TARGET_RATIO,
        )
    met &= peaks[-1] < TARGET_MB
    verdict(f"bundled model: {peaks[-1]} MB, target {TARGET_MB} MB", peaks[-1] < TARGET_MB)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
