"""What ``make demo`` runs: detect ships in the committed scene and say how many labelled ones were found.

Uses the base installation only. Leaves ``ships.gpkg`` and ``ships.png`` in the current folder.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import geopandas
import numpy as np
import shapely

DATA = Path(__file__).resolve().parent.parent / "data"
IOU_THRESHOLD = 0.25


def overlaps(polygons: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return (N, M) float64 intersection over union of shapely polygons (N,) and (M,) in one projected CRS."""
    intersection = shapely.area(shapely.intersection(polygons[:, None], others[None, :]))
    union = shapely.area(polygons)[:, None] + shapely.area(others)[None, :] - intersection
    return intersection / union


def count_found(detected: np.ndarray, scores: np.ndarray, labelled: np.ndarray, iou_threshold: float) -> int:
    """Count labels that have a detection of their own: best scores choose first, one label each."""
    if not len(detected) or not len(labelled):
        return 0
    iou = overlaps(detected, labelled)
    for row in np.argsort(-scores, kind="stable"):
        col = int(np.argmax(iou[row]))
        if iou[row, col] >= iou_threshold:
            iou[:, col] = -1.0  # taken
    return int(np.sum(iou[0] == -1.0))


def main() -> int:
    """Run the demo and print its result; return the exit code."""
    program = Path(sys.executable).with_name("rtmdet-geo")
    command = [program, "detect", DATA / "casablanca.tif", "-o", "ships.gpkg", "--preview", "ships.png", "--overwrite"]
    started = time.perf_counter()
    code = subprocess.run([str(part) for part in command], check=False).returncode
    seconds = time.perf_counter() - started
    if code:
        print(f"demo: rtmdet-geo detect ended with exit code {code}", file=sys.stderr)
        return code
    ships = geopandas.read_file("ships.gpkg", layer="detections")
    labels = geopandas.read_file(DATA / "casablanca_ships.geojson")
    utm = labels.estimate_utm_crs()
    found = count_found(
        ships.geometry.to_crs(utm).to_numpy(),
        ships["score"].to_numpy(),
        labels.geometry.to_crs(utm).to_numpy(),
        IOU_THRESHOLD,
    )
    print(f"ships found: {len(ships)}")
    print(f"labelled ships found: {found} of {len(labels)} (rotated IoU >= {IOU_THRESHOLD})")
    print(f"time of detection: {seconds:.1f} s")
    print("map: ships.gpkg (open it in QGIS), picture: ships.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
