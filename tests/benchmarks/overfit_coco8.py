"""Training learns 8 photographs of COCO by heart: ``python tests/benchmarks/overfit_coco8.py [coco_det coco_ins]``.

The recipes ``coco_det`` (RTMDet-tiny) and ``coco_ins`` (RTMDet-Ins-tiny) train from random initialisation, through the
real command, on images that are also those of the validation: what COCO's protocol says of them is how well a network
of this size can know them, and a fault in labels, losses, decoding or scoring shows. Only augmentation, length and
rates are set otherwise than published. Reads ``$RTMDET_DATA/coco8_seg``; takes more than an hour on one core.

A batch is all 8 images: with 4, batch norm sees other statistics in every step, and boxes stay imprecise for long. The
rate is high for large objects that are alone in their image: boxes begin small, and a box's loss weighs as much as its
IoU, so these learn last. Masks need large images: ``mask_ceiling.py`` says how well stride 8 can fit the labels at all.
Most is learnt on small ones, which are cheap, so masks train in stages, each from the best weights of the one before.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results" / "coco8_overfit.csv"
TARGET_AP = 0.9
#: What a training by heart needs otherwise than the published ones: every image as it is, in every step.
COMMON = {
    "model.weights": "null",
    "model.weights_parts": "null",
    "augment.mosaic_prob": 0,
    "augment.mixup_prob": 0,
    "augment.scale_min": 1,
    "augment.scale_max": 1,
    "augment.hue_delta": 0,
    "augment.saturation_delta": 0,
    "augment.value_delta": 0,
    "augment.flip_prob": 0,
    "augment.weak_epochs": 0,
    "optim.epochs": "null",
    "optim.batch_size": 8,
    "optim.lr_for_batch": "null",
    "optim.warmup_iterations": 20,
    "optim.weight_decay": 0,
    "optim.clip_grad_norm": 35,
    "optim.ema_momentum": 0.01,
    "optim.ema_gamma": 50,
    "loop.workers": 1,
    "loop.log_interval": 10,
    "loop.tensorboard": "false",
    "validation.interval": 50,
    "validation.interval_epochs": 0,
    "validation.late_epochs": 0,
}
#: Stages of the trainings; each begins with the weights of the one before.
STAGES = {
    "coco_det": [{"augment.image_size": 320, "optim.iterations": 450, "optim.lr": 4e-3}],
    "coco_ins": [
        {"augment.image_size": 320, "optim.iterations": 380, "optim.lr": 4e-3},
        {"augment.image_size": 768, "optim.iterations": 300, "optim.lr": 4e-3},
        {"augment.image_size": 960, "optim.iterations": 200, "optim.lr": 2e-3},
    ],
}


def write_coco(source, folder):
    """Write labels of YOLO polygons (parts of 0 to 1, class numbers of COCO's 80) as COCO's json; images are linked."""
    from rtmdet_geo.class_names import COCO

    images, annotations = [], []
    for index, path in enumerate(sorted(source.glob("images/*/*.jpg")), 1):
        height, width = cv2.imread(str(path)).shape[:2]
        images.append({"id": index, "file_name": path.name, "width": width, "height": height})
        labels = source / "labels" / path.parent.name / f"{path.stem}.txt"
        for line in labels.read_text(encoding="utf-8").splitlines():
            number, *values = line.split()
            polygon = np.array(values, float).reshape(-1, 2) * (width, height)
            low, high = polygon.min(axis=0), polygon.max(axis=0)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index,
                    "category_id": int(number) + 1,
                    "bbox": [*low.tolist(), *(high - low).tolist()],
                    "area": float(cv2.contourArea(polygon.astype(np.float32))),
                    "segmentation": [polygon.ravel().tolist()],
                    "iscrowd": 0,
                }
            )
        for part in ("train2017", "val2017"):
            (folder / part).mkdir(parents=True, exist_ok=True)
            (folder / part / path.name).symlink_to(path.resolve())
    categories = [{"id": number, "name": name} for number, name in enumerate(COCO, 1)]
    content = json.dumps({"images": images, "annotations": annotations, "categories": categories})
    (folder / "annotations").mkdir()
    for part in ("train2017", "val2017"):
        (folder / "annotations" / f"instances_{part}.json").write_text(content, encoding="utf-8")


def train(name, data, run, overrides):
    """Train by the command and return its summary."""
    command = [sys.executable, "-m", "rtmdet_geo.cli", "train", name, "--data", str(data), "-o", str(run)]
    command += ["--overwrite", "--json", "--progress", "none", "-v"]
    for key, value in overrides.items():
        command += ["--set", f"{key}={value}"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout)


def measure(name, data, runs, more):
    """Row of the results for one recipe; the figures are those of the end of the last stage."""
    import torch

    start = time.perf_counter()
    weights: dict = {}
    for number, stage in enumerate(STAGES[name], 1):
        run = runs / f"{name}_{number}"
        summary = train(name, data, run, COMMON | stage | weights | more)
        weights = {"model.weights": run / "best.safetensors"}
    seconds = time.perf_counter() - start
    kind = "masks" if name == "coco_ins" else "boxes"
    prefix = "mask " if kind == "masks" else ""
    stages = [COMMON | stage | more for stage in STAGES[name]]
    return {
        "recipe": name,
        "network": "rtmdet_ins_tiny" if name == "coco_ins" else "rtmdet_tiny",
        "image_size": " ".join(str(stage["augment.image_size"]) for stage in stages),
        "iterations": " ".join(str(stage["optim.iterations"]) for stage in stages),
        "seconds": round(seconds),
        "measure": kind,
        **{figure: round(summary["figures"][prefix + figure], 4) for figure in ("AP", "AP50", "AP75")},
        "seed": stages[-1].get("loop.seed", 0),
        "machine": f"{platform.machine()}, {summary['device']}, {torch.get_num_threads()} threads",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, OpenCV {cv2.__version__}",
        "date": datetime.date.today().isoformat(),
        "overrides": " ".join(f"{key}={value}" for key, value in stages[-1].items()),
    }


def main():
    """Train, print, write the CSV; exit 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help=f"of {', '.join(STAGES)}; all by default")
    parser.add_argument("--output", type=Path, default=RESULTS, help="rows of recipes that are not trained now stay")
    parser.add_argument("--runs", type=Path, help="keep the run folders here")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a value of the recipes")
    options = parser.parse_args()
    unknown = sorted(set(options.recipes) - set(STAGES))
    if unknown or not os.environ.get("RTMDET_DATA"):
        parser.error(f"no recipe {unknown[0]}" if unknown else "RTMDET_DATA is not set: the folder that has coco8_seg")
    sys.path.insert(0, str(ROOT))

    rows = {}
    if options.output.exists():
        with options.output.open(newline="", encoding="utf-8") as stream:
            rows = {row["recipe"]: row for row in csv.DictReader(stream)}
    more = dict(value.split("=", 1) for value in options.set)
    with tempfile.TemporaryDirectory() as name_of_folder:
        folder = Path(name_of_folder)
        write_coco(Path(os.environ["RTMDET_DATA"]) / "coco8_seg", folder / "data")
        for name in options.recipes or STAGES:
            rows[name] = measure(name, folder / "data", options.runs or folder / "runs", more)
    rows = [rows[name] for name in STAGES if name in rows]
    with options.output.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    passed = True
    for row in rows:
        is_met = float(row["AP"]) >= TARGET_AP
        passed &= is_met
        figures = "  ".join(f"{figure} {float(row[figure]):.3f}" for figure in ("AP", "AP50", "AP75"))
        length = f"{row['iterations']} iterations, {row['seconds']} s"
        print(f"{row['network']:16} {row['image_size']} px  {length:24} {row['measure']}: {figures}  ", end="")
        print(f"AP >= {TARGET_AP}: {'PASS' if is_met else 'FAIL'}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
