"""Speed and memory of the DOTA evaluation: ``python tests/benchmarks/bench_evaluation.py [--output FILE.csv]``.

Two targets, each printed as PASS or BELOW (nothing is asserted: time depends on the machine and on who shares it):

* 10,000 images with 1,000,000 detections of 15 classes, all ten IoU thresholds, within 60 s on two cores, from arrays;
  reading the same from result files and labelTxt files is a row of its own;
* the ratio to the official algorithm (``tests/dota_official.py``: the development kit's loop, one threshold at a time,
  polygons by shapely) on the first images of the same data, where that finishes. Both must give the same AP.

Every case runs in a process of its own, so that peak memory is that of the case; compilation is measured apart.

Data, drawn from one PCG64 generator, seed 5: classes as frequent as in DOTA-v1.0; objects per image log-normal, median
18, at most 2,000; long sides log-normal around each class's median in px, images of 4,000 px, half of the objects in
rows like parked cars. Detections: 90 % of the objects moved by a normal of 4 % of their sides and turned by one of 0.02
rad, the rest anywhere; scores are higher for those that hit. One in ten objects is difficult.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from machine import describe_machine, verdict

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results" / "evaluation.csv"

NUM_IMAGES, NUM_DETECTIONS = 10_000, 1_000_000
OFFICIAL_IMAGES = 100
TARGET_SECONDS = 60
SIDE_PX = 4000
#: Share of the objects, median long side in px, and ratio of the sides; in the order of class_names.DOTA_V1.
CLASSES = (
    (0.04, 76, 1.1), (0.003, 90, 1.1), (0.01, 40, 2.5), (0.002, 315, 1.7), (0.26, 21, 2.1), (0.17, 49, 3.2),
    (0.28, 31, 2.8), (0.015, 104, 1.9), (0.003, 115, 1.8), (0.05, 27, 1.0), (0.002, 210, 1.6), (0.003, 70, 1.0),
    (0.06, 87, 3.0), (0.012, 43, 1.8), (0.005, 43, 1.2),
)  # fmt: skip


def draw_objects(generator, num_images, per_image):
    """Boxes (G, 5), images (G,) and labels (G,) of labelled objects."""
    counts = np.minimum(generator.lognormal(np.log(18), 1.5, num_images), 2000)
    counts = np.maximum(counts * per_image / counts.mean(), 0).round().astype(int)
    images = np.repeat(np.arange(num_images), counts)
    shares, sides, ratios = np.array(CLASSES).T
    labels = generator.choice(len(CLASSES), len(images), p=shares / shares.sum())
    long_side = sides[labels] * generator.lognormal(0, 0.35, len(images))
    boxes = np.column_stack(
        [
            generator.uniform(0, SIDE_PX, (len(images), 2)),
            long_side,
            long_side / ratios[labels],
            generator.uniform(-np.pi / 2, np.pi / 2, len(images)),
        ]
    )
    follows = np.flatnonzero((np.diff(images, prepend=-1) == 0) & (generator.random(len(images)) < 0.5))
    for index in follows:  # beside the one before, across its long side
        x, y, width, height, angle = boxes[index - 1]
        boxes[index] = (x - 1.3 * height * np.sin(angle), y + 1.3 * height * np.cos(angle), width, height, angle)
        labels[index] = labels[index - 1]
    return boxes, images, labels


def draw(num_images=NUM_IMAGES, num_detections=NUM_DETECTIONS):
    """Labelled objects and detections by class, as the evaluation takes them."""
    from rtmdet_geo.annotations.dota_results import ResultRows
    from rtmdet_geo.boxes import boxes_to_polygons
    from rtmdet_geo.class_names import DOTA_V1
    from rtmdet_geo.evaluation.voc import LabelledObjects

    generator = np.random.Generator(np.random.PCG64(5))
    boxes, images, labels = draw_objects(generator, num_images, 0.9 * num_detections / num_images)
    names = np.array(DOTA_V1, dtype=object)
    ids = tuple(f"P{index:05d}" for index in range(num_images))
    objects = LabelledObjects(
        ids,
        images,
        tuple(names[labels]),
        boxes_to_polygons(boxes).reshape(-1, 8).round(1),
        boxes,
        generator.random(len(boxes)) < 0.1,
    )
    taken = np.flatnonzero(generator.random(len(boxes)) < 0.9)
    found = boxes[taken]
    found[:, :4] += generator.normal(0, 0.04, (len(found), 4)) * found[:, [2, 3, 2, 3]]
    found[:, 4] += generator.normal(0, 0.02, len(found))
    others = boxes[generator.integers(0, len(boxes), num_detections - len(found))]
    others[:, :2] = generator.uniform(0, SIDE_PX, (len(others), 2))
    where = np.concatenate([images[taken], generator.integers(0, num_images, len(others))])
    which = np.concatenate([labels[taken], generator.integers(0, len(DOTA_V1), len(others))])
    scores = np.concatenate([generator.beta(4, 2, len(found)), generator.beta(2, 5, len(others))]).round(6)
    corners = boxes_to_polygons(np.concatenate([found, others])).reshape(-1, 8).round(2)
    results = {}
    for label, name in enumerate(DOTA_V1):
        own = np.flatnonzero(which == label)
        results[name] = ResultRows(tuple(ids[image] for image in where[own]), scores[own], polygons=corners[own])
    return results, objects


def first_images(results, objects, number):
    """The same data of the first images only."""
    from rtmdet_geo.annotations.dota_results import ResultRows
    from rtmdet_geo.evaluation.voc import LabelledObjects

    ids = set(objects.image_ids[:number])
    kept = {}
    for name, rows in results.items():
        own = [index for index, image in enumerate(rows.image_ids) if image in ids]
        kept[name] = ResultRows(tuple(rows.image_ids[i] for i in own), rows.scores[own], polygons=rows.polygons[own])
    own = np.flatnonzero(objects.images < number)
    names = tuple(objects.class_names[index] for index in own)
    parts = [getattr(objects, field)[own] for field in ("polygons", "boxes", "difficult")]
    return kept, LabelledObjects(objects.image_ids[:number], objects.images[own], names, *parts)


def measure(what):
    """Run a case in a fresh process."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    results, objects = draw()
    if what in ("official algorithm", "same images"):
        results, objects = first_images(results, objects, OFFICIAL_IMAGES)
    row = {
        "what": what,
        "images": len(objects.image_ids),
        "objects": len(objects.images),
        "detections": sum(map(len, results.values())),
    }
    before_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    row |= CASES[what](results, objects)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return row | {"data_mb": before_mb, "peak_mb": peak_mb}


def timed(function):
    start, cpu_start = time.perf_counter(), time.process_time()
    value = function()
    return value, {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu_start}


def compile_first(protocol="devkit"):
    from rtmdet_geo.evaluation.voc import score_results

    few, there = first_images(*draw(3, 60), 3)
    return timed(lambda: score_results(few, there, list(few), protocol=protocol))[1]


def from_arrays(results, objects, protocol="devkit", threads=None):
    from rtmdet_geo.evaluation.voc import score_results, voc_report

    compile_first(protocol)
    scores, row = timed(lambda: score_results(results, objects, list(results), protocol=protocol, threads=threads))
    return row | {"ap50": voc_report(scores, "").figures["AP50_11"]}


def from_files(results, objects):
    from rtmdet_geo.annotations.dota_results import write_results
    from rtmdet_geo.evaluation.dota import evaluate_dota

    compile_first()
    with tempfile.TemporaryDirectory() as folder:
        write_results(Path(folder) / "results", results, 1, list(results))
        labels = Path(folder) / "labels"
        labels.mkdir()
        lines = [[] for _ in objects.image_ids]
        columns = zip(objects.images, objects.polygons.tolist(), objects.class_names, objects.difficult, strict=True)
        for image, corners, name, difficult in columns:
            lines[image].append(f"{' '.join(map(str, corners))} {name} {int(difficult)}\n")
        for image, text in zip(objects.image_ids, lines, strict=True):
            (labels / f"{image}.txt").write_text("".join(text))
        report, row = timed(lambda: evaluate_dota(Path(folder) / "results", labels))
    return row | {"ap50": report.figures["AP50_11"]}


def official(results, objects):
    from dota_official import official_ap

    def run():
        means = []
        for threshold in [0.5 + 0.05 * step for step in range(10)]:
            means.append(np.mean([class_ap(name, threshold) for name in results]))
        return means[0]

    def class_ap(name, threshold):
        own = np.array(objects.class_names, dtype=object) == name
        labelled = {}
        for index, image in enumerate(objects.image_ids):
            mine = own & (objects.images == index)
            labelled[image] = objects.polygons[mine], objects.difficult[mine]
        rows = results[name]
        detections = list(zip(rows.image_ids, rows.scores.tolist(), rows.polygons, strict=True))
        return official_ap(detections, labelled, threshold)

    ap50, row = timed(run)
    return row | {"ap50": ap50}


CASES = {
    "first call, compiled before or now": lambda results, objects: compile_first(),
    "from arrays, devkit": from_arrays,
    "from arrays, devkit, one thread": lambda results, objects: from_arrays(results, objects, threads=1),
    "from arrays, mmrotate": lambda results, objects: from_arrays(results, objects, "mmrotate"),
    "from files, devkit": from_files,
    "official algorithm": official,
    "same images": from_arrays,
}


def in_fresh_process(what):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (what,))


def main():
    parser = argparse.ArgumentParser(description="benchmark of the DOTA evaluation")
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV to write")
    output = parser.parse_args().output
    machine = describe_machine()
    print("  ".join(f"{name} {value}" for name, value in machine.items()) + "\n")
    print(
        f"{'what':36}{'images':>8}{'objects':>10}{'detections':>12}{'seconds':>10}{'cpu s':>9}{'AP50':>9}{'peak MB':>9}"
    )
    rows = {}
    for what in CASES:
        row = rows[what] = in_fresh_process(what)
        print(
            f"{what:36}{row['images']:>8,}{row['objects']:>10,}{row['detections']:>12,}{row['seconds']:>10.3f}"
            f"{row['cpu_seconds']:>9.3f}{row.get('ap50', float('nan')):>9.5f}{row['peak_mb']:>9.0f}"
        )
    slow, quick, large = rows["official algorithm"], rows["same images"], rows["from arrays, devkit"]
    quick["ratio"] = slow["seconds"] / quick["seconds"]
    print()
    verdict(
        f"{large['images']:,} images, {large['detections']:,} detections: {large['seconds']:.1f} s"
        f" (target {TARGET_SECONDS} s)",
        large["seconds"] <= TARGET_SECONDS,
    )
    verdict(
        f"{quick['images']} images, {quick['detections']:,} detections: {quick['ratio']:.0f} x the official algorithm,"
        f" AP50 {quick['ap50']:.6f} and {slow['ap50']:.6f}",
        abs(quick["ap50"] - slow["ap50"]) < 1e-9,
    )
    same = large["ap50"] == rows["from arrays, devkit, one thread"]["ap50"] == rows["from files, devkit"]["ap50"]
    verdict("one thread, several, and files give the same AP50", same)

    output.parent.mkdir(parents=True, exist_ok=True)
    columns = [
        "what",
        "images",
        "objects",
        "detections",
        "seconds",
        "cpu_seconds",
        "ratio",
        "ap50",
        "data_mb",
        "peak_mb",
    ]
    with output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*columns, *machine], lineterminator="\n")
        writer.writeheader()
        for row in rows.values():
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in (row | machine).items()})


if __name__ == "__main__":
    main()
