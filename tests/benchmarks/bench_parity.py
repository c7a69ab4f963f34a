"""One answer from every engine: ``RTMDET_DATA=DIR python tests/benchmarks/bench_parity.py [--output FILE.csv]``.

The bundled models over real labelled scenes, with every engine of this machine: ships in the ten ports of sen2ships,
and in Casablanca alone; buildings in the Banepa chips, joined to columns, and in the western one alone. Each engine's
detections are compared with those of onnxruntime in fp32 at batch 1, whose file it is or was made from, and scored
against the labels.

* fp32 engines must find the same above the model's threshold + .02: every box of a tile within 0.05 px and 1e-3 of
  score, and after NMS every object; masks of instances are compared by AP.
* fp16 likewise within 0.5 px and 0.01, and AP50 of all ports and chips together may drop by .005. "all roundings" is
  what a GPU makes of a fp16 file: onnxruntime on most CPUs rounds the weights alone.
* Boxes are compared before NMS, which of two boxes of one object keeps the one with the better score, be it by a hair.
* bf16 and int8 are reported. int8 is calibrated on the scenes of the half without Casablanca and Banepa's west.

AP50: at IoU .5, boxes of ships and masks of buildings, all scores from .05 on. Most of these scenes were in the models'
training, so AP is no measure of the models here, only of what an engine loses. Engines that are not here are listed
with the reason.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import tempfile
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from labelled_scenes import HALVES, LEFT_OUT, average_precision, calibration_tiles, load_scenes, search
from machine import describe_machine, verdict

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results" / "parity.csv"
MARGIN = 0.02
#: px and score that engines of a precision may differ by; none for those that are judged by AP.
LIMITS = {"fp32": (0.05, 1e-3), "fp16": (0.5, 0.01)}
MAX_AP_DROP = 0.005
ALL = "all scenes"


@dataclass(frozen=True)
class Way:
    """One engine as it is asked for; ``file`` says which of the model's files it runs."""

    name: str
    backend: str
    file: str = "fp32"
    device: str = "cpu"
    precision: str = "auto"
    batch_size: int = 1


WAYS = (
    Way("onnxruntime", "onnxruntime"),
    Way("onnxruntime, batch 8", "onnxruntime", batch_size=8),
    Way("openvino", "openvino"),
    Way("openvino, batch 8", "openvino", batch_size=8),
    Way("torch", "torch"),
    Way("torch, batch 8", "torch", batch_size=8),
    Way("torch bf16", "torch", precision="bf16"),
    Way("onnxruntime, fp16 file", "onnxruntime", file="fp16"),
    Way("openvino, fp16 file", "openvino", file="fp16"),
    Way("fp16, all roundings", "onnxruntime", file="fp16 rounded"),
    Way("onnxruntime, int8 file", "onnxruntime", file="int8"),
    Way("openvino, int8 file", "openvino", file="int8"),
    Way("torch on CUDA", "torch", device="cuda", batch_size=8),
    Way("torch on CUDA fp16", "torch", device="cuda", precision="fp16", batch_size=8),
    Way("torch on CUDA bf16", "torch", device="cuda", precision="bf16", batch_size=8),
    Way("onnxruntime on CUDA", "onnxruntime", device="cuda", batch_size=8),
    Way("tensorrt fp32", "tensorrt", device="cuda", precision="fp32", batch_size=8),
    Way("tensorrt fp16", "tensorrt", device="cuda", precision="fp16", batch_size=8),
)


def make_file(model, kind, tiles, folder):
    """Return the model's file of a kind, made from the bundled one if need be, int8 by calibration tiles."""
    import onnx

    from rtmdet_geo.catalog import CATALOG
    from rtmdet_geo.export.graph import stored_spec, write_metadata
    from rtmdet_geo.export.half import to_half, with_roundings
    from rtmdet_geo.export.quantize import quantize_model

    bundled, target = CATALOG[model].path, folder / f"{model}_{kind}.onnx"
    if kind == "fp32" or target.is_file():
        return bundled if kind == "fp32" else target
    if kind == "int8":
        quantize_model(bundled, target, calibration=tiles)
        return target
    half = to_half(onnx.load(bundled))
    if kind == "fp16 rounded":
        half = with_roundings(half)
        write_metadata(half, stored_spec(half))
    onnx.save(half, target)
    return target


class Watched:
    """An engine, and the boxes that it found in each tile."""

    def __init__(self, engine):
        self.engine, self.tiles = engine, []

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def run(self, batches, **settings):
        for found in self.engine.run(batches, **settings):
            self.tiles += [replace(detections, masks=None) for detections in found]
            yield found


def distances(box, boxes):
    """Return how far boxes (N, 5) are from one in px, an angle by how far it moves the box's end."""
    difference = np.abs(boxes - box)
    turn = difference[:, 4] % np.pi
    difference[:, 4] = np.minimum(turn, np.pi - turn) * box[2] / 2
    return difference.max(axis=1, initial=0)


def compare(mine, others, threshold, limits):
    """Return the largest differences, px and score, from a box above ``threshold`` + MARGIN to its partner.

    The partner is the nearest of its class, by px and score in units of ``limits``.
    """
    worst = np.zeros(2)
    for first, second in ((mine, others), (others, mine)):
        for index in np.flatnonzero(first.scores > threshold + MARGIN):
            apart = np.abs(second.scores - first.scores[index])
            pairs = np.column_stack([distances(first.boxes[index], second.boxes), apart])
            pairs = pairs[second.labels == first.labels[index]]
            nearest = (pairs / limits).max(axis=1).argmin() if len(pairs) else None
            worst = np.maximum(worst, np.inf if nearest is None else pairs[nearest])
    return worst


def count_lost(mine, others, threshold):
    """Return the number of objects above ``threshold`` + MARGIN, of either, that the other has none within 5 px of."""
    return sum(
        not (distances(first.boxes[index], second.boxes)[second.labels == first.labels[index]] <= 5).any()
        for first, second in ((mine, others), (others, mine))
        for index in np.flatnonzero(first.scores > threshold + MARGIN)
    )


def open_way(way, file):
    """Return an engine, or why it is not here."""
    from rtmdet_geo.backends import open_backend
    from rtmdet_geo.errors import RTMDetGeoError

    settings = {"batch_size": way.batch_size} if way.backend == "tensorrt" else {}
    try:
        return open_backend(file, name=way.backend, device=way.device, precision=way.precision, **settings), ""
    except RTMDetGeoError as error:
        return None, str(error)


def measure(model, data, folder):
    """Return the rows of a model: each engine on all scenes and on the one that was left out of training."""
    recipe, chips = load_scenes(model, data, folder)
    tiles = calibration_tiles([chips[name] for name in HALVES[model][1]], recipe)
    rows, reference = [], None
    for way in WAYS:
        row = {"model": model, "engine": way.name, "batch": way.batch_size}
        engine, problem = open_way(way, make_file(model, way.file, tiles, folder))
        if engine is None:
            rows.append({**row, "scenes": ALL, "problem": problem})
            continue
        row["precision"] = engine.precision if way.file == "fp32" else way.file.split()[0]
        found, boxes = {}, {}
        for name, chip in chips.items():
            watched = Watched(engine)
            found[name], boxes[name] = search(watched, chip, recipe, way.batch_size), watched.tiles
        reference = reference or (found, boxes)
        threshold, limits = engine.spec.score_threshold, LIMITS.get(row["precision"], LIMITS["fp16"])
        for case, names in ((ALL, list(chips)), (LEFT_OUT[model], [LEFT_OUT[model]])):
            pairs = [pair for name in names for pair in zip(reference[1][name], boxes[name], strict=True)]
            px, score = np.max([compare(*pair, threshold, limits) for pair in pairs], axis=0)
            seen = [found[name] for name in names]
            ap, objects = average_precision([chips[name] for name in names], seen, engine.spec.kind)
            rows.append(
                {
                    **row,
                    "scenes": case,
                    "labelled": objects,
                    "boxes": sum(int((mine.scores > threshold + MARGIN).sum()) for mine, _ in pairs),
                    "max_px": round(float(px), 4),
                    "max_score": round(float(score), 5),
                    "found": sum(int((reference[0][name].scores > threshold + MARGIN).sum()) for name in names),
                    "lost": sum(count_lost(reference[0][name], found[name], threshold) for name in names),
                    "ap50": round(ap, 4),
                    "problem": "",
                }
            )
    return rows


def judge(rows):
    """Print the table and what it says; return whether all targets are met."""
    columns = (("boxes", 7), ("px", 9), ("score", 9), ("found", 7), ("lost", 6), ("AP50", 8), ("drop", 8))
    print(
        f"{'model':13}{'scenes':15}{'engine':25}{'precision':10}"
        + "".join(f"{name:>{width}}" for name, width in columns)
    )
    is_met = True
    reference = {(row["model"], row["scenes"]): row for row in rows if row["engine"] == WAYS[0].name}
    drops = {}
    for row in rows:
        words = f"{row['model']:13}{row['scenes']:15}{row['engine']:25}"
        if row["problem"]:
            print(f"{words}not here: {row['problem'][:90]}")
            continue
        drop = reference[row["model"], row["scenes"]]["ap50"] - row["ap50"]
        row["ap50_drop"] = round(drop, 4)
        if row["scenes"] == ALL:
            drops.setdefault((row["engine"], row["precision"]), []).append(drop)
        print(
            f"{words}{row['precision']:10}{row['boxes']:>7}{row['max_px']:>9}{row['max_score']:>9}{row['found']:>7}"
            f"{row['lost']:>6}{row['ap50']:>8}{drop:>8.4f}"
        )
        if row["precision"] in LIMITS:
            px, score = LIMITS[row["precision"]]
            is_met &= row["lost"] == 0 and row["max_px"] <= px and row["max_score"] <= score
    verdict("every fp32 and fp16 engine here gives the same objects within its limits", is_met)
    for (engine, precision), values in drops.items():
        if precision == "fp16":
            verdict(f"{engine}: AP50 of ports and chips drops by {np.mean(values):.4f}", np.mean(values) <= MAX_AP_DROP)
            is_met &= bool(np.mean(values) <= MAX_AP_DROP)
        elif precision in ("int8", "bf16"):
            print(f"       {engine}: AP50 of ports and chips drops by {np.mean(values):.4f}")
    return is_met


def main():
    """Compare, print, write the CSV; exit 1 if an engine gives another answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV to write")
    parser.add_argument(
        "--data", type=Path, default=os.environ.get("RTMDET_DATA"), help="folder of the labelled scenes"
    )
    options = parser.parse_args()
    if options.data is None or not (options.data / "sen2ships").is_dir():
        print("the labelled scenes are not here: name their folder by --data or RTMDET_DATA")
        return 0
    sys.path.insert(0, str(ROOT))
    warnings.simplefilter("ignore")  # saturated tiles, at so low a score
    with tempfile.TemporaryDirectory() as name:
        rows = [row for model in HALVES for row in measure(model, options.data, Path(name))]
    is_met = judge(rows)
    machine, columns = describe_machine(), {}
    for row in rows:
        columns |= row
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*columns, *machine], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **machine} for row in rows)
    return 0 if is_met else 1


if __name__ == "__main__":
    sys.exit(main())
