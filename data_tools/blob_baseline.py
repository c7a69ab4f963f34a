"""A classical ship detector to compare with: water index, bright blobs in water, minimum rectangles. Nothing is learnt.

python -m data_tools.blob_baseline configs/sen2ships_r.yaml --csv tests/benchmarks/results/sen2ships_baseline.csv
"""

from __future__ import annotations

import csv
import datetime
from pathlib import Path

import click
import cv2
import numpy as np

from rtmdet_geo.boxes import minimum_area_rectangle, regularize_le90
from rtmdet_geo.config import load_recipe
from rtmdet_geo.evaluation.rotated import Truth, precision_recall
from rtmdet_geo.structures import Detections
from rtmdet_geo.training.chips import load_chips
from rtmdet_geo.training.labelled import LabelledImage

MIN_WATER_M2, MIN_SHIP_M2, MAX_SHIP_M2 = 2e5, 800.0, 40_000.0
MAX_WIDTH_M, MIN_FILL, CLOSING_M = 80.0, 0.45, 120.0


def detect_blobs(chip: LabelledImage, bands: tuple[str, ...], gsd_m: float) -> Detections:
    """Find bright blobs inside closed water.

    Water: green above near infrared (NDWI, McFeeters 1996), Otsu's threshold, large areas only. Candidates: what is not
    water inside the morphological closing of water. Kept: area and width of a ship, most of its rectangle filled.

    Args:
        chip: pixels (C, H, W) uint8.
        bands: names of the channels; "green" and "nir" are needed.
        gsd_m: metres per pixel.

    Returns:
        Detections in chip px; score is the blob's mean brightness against the water, in [0, 1].
    """
    green, nir = (chip.pixels[bands.index(name)].astype(np.float32) for name in ("green", "nir"))
    index = np.clip(127.5 * (1 + (green - nir) / (green + nir + 1)), 0, 255).astype(np.uint8)
    _, water = cv2.threshold(index, 0, 1, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    _, regions, stats, _ = cv2.connectedComponentsWithStats(water)
    large = stats[:, cv2.CC_STAT_AREA] * gsd_m**2 >= MIN_WATER_M2
    large[0] = False
    water = large[regions].astype(np.uint8)
    side = int(CLOSING_M / gsd_m) | 1
    closed = cv2.morphologyEx(water, cv2.MORPH_CLOSE, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side)))
    count, regions, stats, _ = cv2.connectedComponentsWithStats(((closed == 1) & (water == 0)).astype(np.uint8))
    brightness = chip.pixels[:3].mean(axis=0)
    level = float(brightness[water == 1].mean()) if water.any() else 0.0
    boxes, scores = [], []
    for region in range(1, count):
        area_m2 = stats[region, cv2.CC_STAT_AREA] * gsd_m**2
        if not MIN_SHIP_M2 <= area_m2 <= MAX_SHIP_M2:
            continue
        x, y, width, height = stats[region, :4]
        rows, columns = np.nonzero(regions[y : y + height, x : x + width] == region)
        corners = np.concatenate([np.stack([columns + dx, rows + dy], 1) for dx in (0, 1) for dy in (0, 1)])
        box = minimum_area_rectangle(corners + np.array([x, y], float))
        if box[3] * gsd_m <= MAX_WIDTH_M and area_m2 >= MIN_FILL * box[2] * box[3] * gsd_m**2:
            boxes.append(box)
            bright = float(brightness[y : y + height, x : x + width][rows, columns].mean())
            scores.append(np.clip((bright - level) / 255, 0, 1))
    found = regularize_le90(np.array(boxes).reshape(-1, 5))
    return Detections(found, np.array(scores, np.float32), np.zeros(len(found), np.int64), frame="scene")


@click.command(help=__doc__.splitlines()[0])
@click.argument("recipe")
@click.option("--csv", "table", type=click.Path(path_type=Path), required=True, help="Table to write.")
@click.option("--data", help="Folder of chips; default as the recipe says.")
def main(recipe: str, table: Path, data: str | None) -> None:
    """Run the command line."""
    settings = load_recipe(recipe)
    chips = load_chips(Path(data or settings.data.chips), settings.model)
    chips = [chip for chip in chips if chip.scene not in settings.data.holdout]
    found = [detect_blobs(chip, settings.model.bands, settings.model.gsd_m or 1.0) for chip in chips]
    truths = [Truth(chip.boxes, chip.labels, chip.ignored) for chip in chips]
    with table.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["method", "scenes", "iou", "ap", "detections", "objects", "date"])
        for iou in settings.validation.iou_thresholds:
            curve = precision_recall(found, truths, label=0, iou_threshold=iou)
            values = [round(curve.average_precision, 4), len(curve.scores), curve.num_objects]
            writer.writerow(["water index and blobs", len(chips), iou, *values, datetime.date.today().isoformat()])
            click.echo(
                f"water index and blobs: IoU {iou:.2f}  AP {values[0]:.4f}  ({values[1]} found, {values[2]} there)"
            )


if __name__ == "__main__":
    main()
