"""Against SAHI's slicing on one scene: ``python tests/benchmarks/bench_sahi.py [--output FILE.csv] [--python PATH]``.

A uint8 GeoTIFF of 5,120 x 5,120 px, Casablanca repeated, is run through the bundled model of ships by ``detect_scene``,
which writes a GeoPackage, and by SAHI (sahi_slicing.py says how), which writes COCO json: same model file and version
of onnxruntime, threads, slices, overlap, thresholds, one slice at a time, a process each, in turns. SAHI's merge is
NMS of axis-aligned boxes, the one that it uses for rotated ones, so the number of objects differs. Its pass over the
whole scene at once is switched off; we have none. Seconds are of the call, the opening of the model included, the
start of Python and imports not; the peak is of the process. SAHI gets an environment of its own in a temporary folder,
or is that of ``--python``. There is no target; ratios are ours / SAHI's.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import numpy as np
from big_scenes import GSD_M, write_geotiff
from machine import describe_machine
from processes import report, run_measured

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results" / "sahi.csv"
MODEL = "sen2ships_r"
SAHI = "0.12.8"
#: What SAHI needs for slicing; of OpenCV the build without windows. Its other requirements are of its commands.
NEEDS = ("opencv-python-headless", "pillow", "pyyaml", "requests", "shapely", "tqdm", "click")


def make_environment(folder):
    """Install SAHI into a virtual environment of its own and return its interpreter.

    Raises:
        SystemExit: it cannot be installed.
    """
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    same = [f"{name}=={metadata.version(name)}" for name in ("numpy", "onnxruntime")]
    for words in (["--no-deps", f"sahi=={SAHI}"], [*NEEDS, *same]):
        command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(
                f"SAHI cannot be installed: {done.stderr.strip()[-500:]}\n"
                f"give the interpreter of an environment with sahi {SAHI} and onnxruntime: --python PATH"
            )
    return python


def run_ours(task):
    """Detect in this process and report."""
    from rtmdet_geo import detect_scene
    from rtmdet_geo.backends import open_backend

    start = time.perf_counter()
    engine = open_backend(task["model"], name="onnxruntime", device="cpu", threads=task["threads"])
    features = detect_scene(
        task["scene"],
        task["output"],
        model=engine,
        gsd=GSD_M,
        batch_size=1,
        **{name: task[name] for name in ("tile_size", "overlap", "score_threshold", "iou_threshold")},
    )
    summary = features.attrs["summary"]
    report(
        seconds=round(time.perf_counter() - start, 2),
        tiles=summary["num_tiles"],
        objects=len(features),
        version=summary["versions"]["rtmdet_geo"],
        onnxruntime=summary["versions"]["onnxruntime"],
    )


def measure(folder, task, python):
    """Return the rows of one round, ours and SAHI's."""
    rows = []
    ours = [sys.executable, __file__, "--child"]
    theirs = [python, Path(__file__).with_name("sahi_slicing.py")]
    for program, command, output in (("rtmdet-geo", ours, "ships.gpkg"), ("sahi", theirs, "ships.json")):
        file, target = folder / "task.json", folder / output
        target.unlink(missing_ok=True)
        file.write_text(json.dumps({**task, "output": str(target)}), encoding="utf-8")
        rows.append({"program": program, **run_measured([*command, file])})
        if not target.is_file():
            raise SystemExit(f"{program} wrote nothing")
    return rows


def main():
    """Measure, print, write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV to write")
    parser.add_argument("--size", type=int, default=5120, help="side of the scene in px")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--python", type=Path, help="interpreter of an environment that has SAHI")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if options.child:
        run_ours(json.loads(options.child.read_text(encoding="utf-8")))
        return 0
    from rtmdet_geo.catalog import CATALOG, read_spec
    from rtmdet_geo.cores import usable_cores

    model = CATALOG[MODEL].path
    spec = read_spec(model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        python = options.python or make_environment(folder / "sahi")
        task = {
            "scene": str(folder / "scene.tif"),
            "model": str(model),
            "threads": usable_cores(),
            "tile_size": spec.tile_size,
            "overlap": spec.overlap,
            "score_threshold": spec.score_threshold,
            "iou_threshold": spec.iou_threshold,
            "infrared": spec.optional_bands["nir"],
        }
        write_geotiff(folder / "small.tif", 1536, 1536)
        measure(folder, task | {"scene": str(folder / "small.tif")}, python)  # compiles, loads
        write_geotiff(task["scene"], options.size, options.size)
        machine = describe_machine()
        rounds = [measure(folder, task, python) for _ in range(options.rounds)]
    rows = [summarize(rounds, column, options.size, task["threads"]) | machine for column in range(2)]
    ours, theirs = rows
    if ours["tiles"] != theirs["tiles"] or ours["onnxruntime"] != theirs["onnxruntime"]:
        raise SystemExit(
            f"they cannot be compared: {ours['tiles']} tiles and {theirs['tiles']} slices, onnxruntime "
            f"{ours['onnxruntime']} and {theirs['onnxruntime']}"
        )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        text = f"{row['program']} {row['version']}: {row['tiles']} tiles, {row['objects']} objects, {row['seconds']} s"
        print(f"       {text}, peak {row['peak_mb']} MB")
    print(f"       ours / SAHI's: seconds {ours['seconds_ratio']}, peak memory {ours['peak_ratio']}")
    return 0


def summarize(rounds, column, size, threads):
    """Return the row of one program: medians over rounds, and its ratios to SAHI's, round by round."""
    rows, others = [row[column] for row in rounds], [row[1] for row in rounds]

    def median(name):
        return float(np.median([row[name] for row in rows]))

    def ratio(name):
        return round(float(np.median([row[name] / other[name] for row, other in zip(rows, others, strict=True)])), 3)

    return {
        "program": rows[0]["program"],
        "version": rows[0]["version"],
        "onnxruntime": rows[0]["onnxruntime"],
        "side_px": size,
        "tiles": rows[0]["tiles"],
        "threads": threads,
        "objects": rows[0]["objects"],
        "rounds": len(rows),
        "seconds": round(median("seconds"), 2),
        "process_s": round(median("wall_s"), 2),
        "peak_mb": round(median("peak_mb"), 1),
        "sampled_mb": round(median("sampled_mb"), 1),
        "seconds_ratio": ratio("seconds"),
        "process_ratio": ratio("wall_s"),
        "peak_ratio": ratio("peak_mb"),
    }


if __name__ == "__main__":
    sys.exit(main())
