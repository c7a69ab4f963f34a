"""One answer from every engine: ``RTMDET_DATA=DIR python tests/benchmarks/bench_parity.py [--output FILE.csv]``.

The bundled models over real labelled scenes, with every engine of this machine: ships in the ten ports of sen2ships,
and in Casablanca alone; buildings in the Banepa chips. Each engine's detections are compared with those of onnxruntime
in fp32 at batch 1, whose file it is or was made from, and scored against the labels.

* fp32 engines must match one to one above the model's threshold + .02: boxes within 0.05 px, scores within 1e-3;
  outlines of instances are compared by their boxes, the rest of them by AP.
* fp16 likewise within 0.5 px and 0.01, and AP50 of all ports and chips together may drop by .005.
* bf16 and int8 are reported. int8 is calibrated on other scenes than Casablanca, on half of the chips.

AP50: ``evaluate layers`` at IoU .5, all scores from .05 on. Most of these scenes were in the models' training, so AP is
no measure of the models here, only of what an engine loses. Engines that are not here are listed with the reason.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from machine import describe_machine, verdict

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results" / "parity.csv"
LOWEST_SCORE = 0.05
MARGIN = 0.02
#: px and score that engines of a precision may differ by; none for those that are judged by AP.
LIMITS = {"fp32": (0.05, 1e-3), "fp16": (0.5, 0.01)}
MAX_AP_DROP = 0.005
#: Scenes whose tiles calibrate int8.
NUM_CALIBRATION = 6


@dataclass(frozen=True)
class Case:
    """Scenes of one model, and the layer of their labels."""

    name: str
    model: str
    scenes: tuple[Path, ...]
    labels: Path


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
    Way("onnxruntime, int8 file", "onnxruntime", file="int8"),
    Way("openvino, int8 file", "openvino", file="int8"),
    Way("torch on CUDA", "torch", device="cuda", batch_size=8),
    Way("torch on CUDA fp16", "torch", device="cuda", precision="fp16", batch_size=8),
    Way("torch on CUDA bf16", "torch", device="cuda", precision="bf16", batch_size=8),
    Way("onnxruntime on CUDA", "onnxruntime", device="cuda", batch_size=8),
    Way("tensorrt fp32", "tensorrt", device="cuda", precision="fp32", batch_size=8),
    Way("tensorrt fp16", "tensorrt", device="cuda", precision="fp16", batch_size=8),
)


def make_cases(data, folder):
    """Return the cases; labels of the ports become a layer first."""
    from rtmdet_geo.annotations.convert import convert_labels

    ports = data / "sen2ships"
    layer = folder / "ports.gpkg"
    convert_labels(ports / "annotations.json", layer, from_format="coco", to_format="gis", images=ports, kind="rotated")
    chips = tuple(sorted((data / "banepa" / "oam").glob("*.tif")))
    (buildings,) = (data / "banepa").glob("*.geojson")
    return [
        Case("10 ports", "sen2ships_r", tuple(sorted(ports.glob("*.tif"))), layer),
        Case("Casablanca", "sen2ships_r", (ports / "casablanca.tif",), ROOT / "tests/data/casablanca_ships.geojson"),
        Case(f"{len(chips)} Banepa chips", "banepa_ins", chips, buildings),
    ]


def make_file(case, kind, folder):
    """Return the model's file of a kind, made from the bundled one if need be."""
    from rtmdet_geo.catalog import find_model

    bundled = find_model(case.model)
    target = folder / f"{case.model}_{kind}.onnx"
    if kind == "fp32" or target.is_file():
        return bundled if kind == "fp32" else target
    if kind == "fp16":
        from rtmdet_geo.export import export_model

        export_model(bundled, target, precision="fp16", verify=False)
    else:
        from rtmdet_geo.export.quantize import quantize_model

        scenes = [path for path in case.scenes if path.stem != "casablanca"]
        quantize_model(
            bundled, target, calibration=calibration_tiles(bundled, scenes[:: len(scenes) // NUM_CALIBRATION])
        )
    return target


def calibration_tiles(model, scenes):
    """Yield the tiles of scenes as the model sees them, one a batch."""
    from rtmdet_geo.catalog import read_spec
    from rtmdet_geo.tiles import TileGrid
    from rtmdet_geo.views import pad

    spec = read_spec(model)
    for path in scenes:
        with opened(path, spec) as source:
            for tile in TileGrid(source.width, source.height, spec.tile_size, spec.overlap):
                pixels, valid = source.read(tile.x, tile.y, tile.width, tile.height)
                if valid.any():
                    yield pad(pixels, (spec.tile_size, spec.tile_size))[None]


def opened(path, spec):
    """Return a scene as detect_scene opens it."""
    from rtmdet_geo.raster import open_scene

    return open_scene(
        path,
        model_bands=spec.bands,
        optional_bands=spec.optional_bands,
        stretch=spec.stretch,
        model_gsd_m=spec.gsd_m,
        trained_gsd_m=spec.trained_gsd_m,
    )


def find(path, engine, batch_size):
    """Return the detections of a scene in px of the model's resolution, best score first."""
    from rtmdet_geo.merge import MAX_OVERLAP, merge_survivors
    from rtmdet_geo.tile_loop import TileSettings, run_tiles
    from rtmdet_geo.tiles import TileGrid

    settings = TileSettings.of(engine, score_threshold=LOWEST_SCORE, batch_size=batch_size)
    with opened(path, engine.spec) as source:
        grid = TileGrid(source.width, source.height, settings.tile_size, settings.overlap)
        results = run_tiles(source, grid, engine, settings)
    merged = merge_survivors(
        results.parts,
        grid,
        iou_threshold=settings.iou_threshold,
        max_overlap=MAX_OVERLAP,
        kind=engine.spec.object_kind,
    )
    return merged.detections


def compare(mine, others, threshold):
    """Return detections without a partner, and the largest differences in px and in score of those with one.

    Those of either side above ``threshold`` + MARGIN look for a partner among all of the other: of the same class, the
    nearest box, each once. A partner more than 5 px away is none.
    """
    alone, px, scores = 0, 0.0, 0.0
    for first, second in ((mine, others), (others, mine)):
        taken = np.zeros(len(second), bool)
        for index in np.flatnonzero(first.scores > threshold + MARGIN):
            difference = np.abs(second.boxes - first.boxes[index])
            turn = difference[:, 4] % np.pi
            lever = first.boxes[index, 2] / 2  # px by which a corner moves for each rad
            difference[:, 4] = np.minimum(turn, np.pi - turn) * lever
            distance = np.where(taken | (second.labels != first.labels[index]), np.inf, difference.max(axis=1))
            best = int(distance.argmin()) if len(distance) else -1
            if best < 0 or distance[best] > 5:
                alone += 1
                continue
            taken[best] = True
            px = max(px, float(distance[best]))
            scores = max(scores, abs(float(second.scores[best] - first.scores[index])))
    return alone, px, scores


def average_precision(case, engine, batch_size, folder):
    """Return AP50 of the features of all scenes of a case."""
    import geopandas
    import pandas

    from rtmdet_geo.detect import detect_scene
    from rtmdet_geo.evaluation.gis import evaluate_layers

    frames = [
        detect_scene(path, model=engine, score_threshold=LOWEST_SCORE, batch_size=batch_size) for path in case.scenes
    ]
    features = geopandas.GeoDataFrame(pandas.concat([frame for frame in frames if len(frame)], ignore_index=True))
    report = evaluate_layers(features, case.labels, any_class=True, iou=0.5)
    return next(value for name, value in report.figures.items() if name.lower().startswith("ap"))


def measure(case, way, reference, folder):
    """Return a row of the table; ``problem`` says why there are no numbers."""
    from rtmdet_geo.backends import open_backend
    from rtmdet_geo.errors import RTMDetGeoError

    row = {"scenes": case.name, "model": case.model, "engine": way.name, "batch": way.batch_size}
    try:
        file = make_file(case, way.file, folder)
        engine = open_backend(
            file,
            name=way.backend,
            device=way.device,
            precision=way.precision,
            batch_size=way.batch_size if way.backend == "tensorrt" else None,
        )
    except RTMDetGeoError as error:
        return {**row, "problem": str(error)}, None
    precision = way.file if way.file != "fp32" else getattr(engine, "precision", "fp32")
    found = [find(path, engine, way.batch_size) for path in case.scenes]
    result = {**row, "precision": precision, "problem": ""}
    threshold = engine.spec.score_threshold
    pairs = list(zip(reference or found, found, strict=True))
    alone, px, scores = zip(*(compare(*pair, threshold) for pair in pairs), strict=True)
    result |= {
        "above_threshold": sum(int((item.scores > threshold + MARGIN).sum()) for item in reference or found),
        "without_partner": sum(alone),
        "max_px": round(max(px), 4),
        "max_score": round(max(scores), 5),
        "ap50": round(average_precision(case, engine, way.batch_size, folder), 4),
    }
    return result, found


def judge(rows):
    """Print the table and what it says; return whether all targets are met."""
    columns = (("objects", 8), ("alone", 6), ("px", 9), ("score", 9), ("AP50", 8), ("drop", 8))
    print(f"{'scenes':16}{'engine':25}{'precision':10}" + "".join(f"{name:>{width}}" for name, width in columns))
    is_met = True
    reference = {row["scenes"]: row for row in rows if row["engine"] == WAYS[0].name}
    drops = {}
    for row in rows:
        if row["problem"]:
            print(f"{row['scenes']:16}{row['engine']:25}not here: {row['problem'][:90]}")
            continue
        drop = reference[row["scenes"]]["ap50"] - row["ap50"]
        row["ap50_drop"] = round(drop, 4)
        if row["scenes"] != "Casablanca":  # one of the ports
            drops.setdefault((row["engine"], row["precision"]), []).append(drop)
        print(
            f"{row['scenes']:16}{row['engine']:25}{row['precision']:10}{row['above_threshold']:>8}"
            f"{row['without_partner']:>6}{row['max_px']:>9}{row['max_score']:>9}{row['ap50']:>8}{drop:>8.4f}"
        )
        if row["precision"] in LIMITS:
            px, score = LIMITS[row["precision"]]
            is_met &= row["without_partner"] == 0 and row["max_px"] <= px and row["max_score"] <= score
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
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for case in make_cases(options.data, Path(name)):
            reference = None
            for way in WAYS:
                row, found = measure(case, way, reference, Path(name))
                reference = found if reference is None else reference
                rows.append(row)
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
