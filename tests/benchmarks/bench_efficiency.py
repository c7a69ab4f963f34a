"""What ``detect`` takes beside its engine: ``python tests/benchmarks/bench_efficiency.py [--output FILE.csv]``.

A 3-band uint8 deflate COG of 10,240 x 10,240 px, Casablanca repeated, is run through the bundled model of ships three
ways: the bare session of onnxruntime on tiles that lie in a file mapped into memory, ``detect_scene`` with the model
already open, and the whole command, from the start of Python to its end. The two write a GeoPackage. Tiles, overlap,
batch size and threads are the same. Of the bare run a third each comes before, between and after the others, so that a
machine that slows down or speeds up does so for all. Target: ``detect_scene`` takes at most 1.10 of the bare session,
which is open as well; the command is told beside it.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
from big_scenes import GSD_M, write_cog
from machine import describe_machine, verdict
from processes import run_measured

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results" / "efficiency.csv"
TARGET = 1.10
MODEL = "sen2ships_r"
WAYS = ("detect_scene", "command")


def map_tiles(scene_path, spec, folder):
    """Return all tiles as the pipeline reads them, uint8 (N, C, side, side), mapped from a file."""
    from rtmdet_geo.raster import open_scene
    from rtmdet_geo.strips import read_tiles
    from rtmdet_geo.tiles import TileGrid

    bands = {"model_bands": spec.bands, "optional_bands": spec.optional_bands, "stretch": spec.stretch}
    with open_scene(scene_path, gsd_m=GSD_M, model_gsd_m=spec.gsd_m, **bands) as scene:
        grid = TileGrid(scene.width, scene.height, spec.tile_size, spec.overlap)
        shape = (len(grid), len(spec.bands), spec.tile_size, spec.tile_size)
        tiles = np.lib.format.open_memmap(folder / "tiles.npy", "w+", np.uint8, shape)
        for number, (_, pixels, _) in enumerate(read_tiles(scene, list(grid))):
            tiles[number] = pixels
    return tiles


def run_bare(engine, tiles, batch_size):
    """Return the seconds of the session alone."""
    start = time.perf_counter()
    for first in range(0, len(tiles), batch_size):
        engine.raw(tiles[first : first + batch_size])
    return time.perf_counter() - start


def run_detect(engine, scene, output, batch_size):
    """Return the seconds of ``detect_scene``, its tiles and objects."""
    from rtmdet_geo import detect_scene

    start = time.perf_counter()
    features = detect_scene(scene, output, model=engine, gsd=GSD_M, batch_size=batch_size, overwrite=True)
    return time.perf_counter() - start, features.attrs["summary"]["num_tiles"], len(features)


def run_command(scene, output, batch_size, threads):
    """Return the seconds of ``rtmdet-geo detect``."""
    command = [sys.executable, "-m", "rtmdet_geo.cli", "detect", scene, "-o", output, "--model", MODEL, "--overwrite"]
    command += ["--backend", "onnxruntime", "--device", "cpu", "--gsd", str(GSD_M)]
    command += ["--batch-size", str(batch_size), "--threads", str(threads)]
    return run_measured([str(word) for word in command], os.environ | {"PYTHONPATH": str(ROOT)})["wall_s"]


def main():
    """Measure, print, write the CSV; exit 1 if the target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV to write")
    parser.add_argument("--size", type=int, default=10240, help="side of the scene in px, 1024 at least")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=1)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from rtmdet_geo.backends import open_backend
    from rtmdet_geo.cores import usable_cores
    from rtmdet_geo.errors import BandWarning
    from rtmdet_geo.run_record import library_versions

    warnings.simplefilter("ignore", BandWarning)  # the scene has no infrared, which the model can do without
    machine, threads, batch_size = describe_machine(), usable_cores(), options.batch_size
    engine = open_backend(MODEL, name="onnxruntime", device="cpu", threads=threads)
    if options.size < engine.spec.tile_size:
        parser.error(f"--size must be {engine.spec.tile_size} at least, or the one tile is smaller than the bare one")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small, scene, output = folder / "small.tif", folder / "scene.tif", folder / "ships.gpkg"
        write_cog(small, 2048, 2048)
        run_detect(engine, small, output, batch_size)  # compiles, loads
        write_cog(scene, options.size, options.size)
        file_mb = scene.stat().st_size / 1e6
        tiles = map_tiles(scene, engine.spec, folder)
        thirds = np.array_split(tiles, 3)
        rounds = []
        for _ in range(options.rounds):
            bare = run_bare(engine, thirds[0], batch_size)
            in_process, num_tiles, objects = run_detect(engine, scene, output, batch_size)
            bare += run_bare(engine, thirds[1], batch_size)
            command = run_command(scene, output, batch_size, threads)
            bare += run_bare(engine, thirds[2], batch_size)
            rounds.append((bare, in_process, command))
        if num_tiles != len(tiles):
            raise SystemExit(f"detect ran {num_tiles} tiles, the bare session {len(tiles)}: they cannot be compared")
        del tiles, thirds
    seconds = np.array(rounds)
    rows = [
        {
            "way": way,
            "side_px": options.size,
            "file_mb": round(file_mb, 1),
            "tiles": num_tiles,
            "objects": objects,
            "batch": batch_size,
            "threads": threads,
            "rounds": options.rounds,
            "bare_s": round(float(np.median(seconds[:, 0])), 2),
            "seconds": round(float(np.median(seconds[:, column])), 2),
            "ratio": round(float(np.median(seconds[:, column] / seconds[:, 0])), 3),
            "highest_ratio": round(float((seconds[:, column] / seconds[:, 0]).max()), 3),
            "onnxruntime": library_versions("onnxruntime")["onnxruntime"],
            **machine,
        }
        for column, way in enumerate(WAYS, 1)
    ]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        text = f"{row['way']}: {row['seconds']} s for {row['tiles']} tiles, {row['objects']} objects; "
        text += f"{row['ratio']} of the bare session ({row['bare_s']} s)"
        if row["way"] == "detect_scene":
            verdict(f"{text}, target {TARGET:.2f}", row["ratio"] <= TARGET)
        else:
            print(f"       {text}, the start of Python and of the session included")
    return 1 if rows[0]["ratio"] > TARGET else 0


if __name__ == "__main__":
    sys.exit(main())
