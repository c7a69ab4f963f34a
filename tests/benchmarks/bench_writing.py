"""What writing costs beside the writer library: ``python tests/benchmarks/bench_writing.py [--output FILE.csv]``.

500,000 features with the whole schema are written as a GeoPackage: by ``write_feature_chunks`` in chunks of 5,000, as
the merge of a large scene hands them on, with metadata and the count of what arrived, and by pyogrio alone from one
frame. Both in turns, in one process. Target: at most 1.3 times the time of pyogrio.
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
RESULTS = Path(__file__).parent / "results" / "writing.csv"
TARGET = 1.3
CHUNK_ROWS = 5000


def make_features(number):
    """Return oriented boxes on a scene of 40,000 px in UTM."""
    from affine import Affine

    from rtmdet_geo.vector import build_features

    generator = np.random.default_rng(0)
    boxes = np.c_[
        generator.uniform(0, 40000, (number, 2)),
        generator.uniform(20, 60, number),
        generator.uniform(8, 18, number),
        generator.uniform(-1.5, 1.5, number),
    ]
    return build_features(
        boxes,
        generator.uniform(0.3, 1, number),
        generator.integers(0, 3, number),
        np.ones(number, int),
        np.zeros(number, bool),
        transform=Affine(0.5, 0, 600000, 0, -0.5, 4500000),
        crs="EPSG:32630",
        classes=("ship", "plane", "storage-tank"),
        gsd_m=0.5,
        scene_id="bench",
        acquired_at="2024-05-06T07:08:09Z",
        model="rtmdet_r_tiny",
        model_sha="ab" * 32,
        run_id="bench",
    )


def time_ours(frame, path):
    """Return the seconds of the chunks as a whole."""
    from rtmdet_geo.vector import write_feature_chunks

    start = time.perf_counter()
    chunks = (frame[first : first + CHUNK_ROWS] for first in range(0, len(frame), CHUNK_ROWS))
    written = write_feature_chunks(chunks, path, metadata=lambda: {"model": "rtmdet_r_tiny"}, overwrite=True)
    seconds = time.perf_counter() - start
    if written != len(frame):
        raise SystemExit(f"{written} of {len(frame)} features were written")
    return seconds


def time_library(frame, path):
    """Return the seconds of pyogrio alone."""
    import pyogrio

    path.unlink(missing_ok=True)
    start = time.perf_counter()
    pyogrio.write_dataframe(frame, path, layer="detections", driver="GPKG", geometry_type="Polygon", use_arrow=True)
    return time.perf_counter() - start


def main():
    """Measure, print, write the CSV; exit 1 if the target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV to write")
    parser.add_argument("--features", type=int, default=500_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    frame = make_features(options.features)
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench.gpkg"
        time_library(frame[:1000], path)  # loads GDAL
        for _ in range(options.rounds):
            rounds.append((time_ours(frame, path), time_library(frame, path)))
    ours, library = np.median(np.array(rounds), axis=0)
    ratios = [first / second for first, second in rounds]
    row = {
        "features": options.features,
        "chunk_rows": CHUNK_ROWS,
        "ours_s": round(float(ours), 3),
        "library_s": round(float(library), 3),
        "ratio": round(float(np.median(ratios)), 3),
        "highest_ratio": round(max(ratios), 3),
        **describe_machine(),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        writer.writeheader()
        writer.writerow(row)
    text = f"{row['features']} features in {row['ours_s']} s, {row['ratio']} of the library's time, target {TARGET}"
    verdict(text, row["ratio"] <= TARGET)
    return 0 if row["ratio"] <= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
