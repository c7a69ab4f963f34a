"""How well masks at stride 8 can fit labels at all: ``python tests/benchmarks/mask_ceiling.py [SIDE ...]``.

Every object of the 8 photographs of ``$RTMDET_DATA/coco8_seg`` gets logits at stride 8 that are free numbers. The loss
that trains masks fits them, they are enlarged as a mask is for validation, and COCO's protocol scores them: what a
network of instances could reach there that knew all boxes and classes for certain.

``published``: the loss compares with every fourth pixel from the third on, as published: hard labels, whose centre
lies half a pixel beyond that of the 4 x 4 px they stand for, so masks come out half a pixel up and to the left. ``read
half a pixel off``: the same logits, read where they were taught. ``centred``: the loss compares with the mean of the 4
pixels in the middle.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np
import torch
from overfit_coco8 import COMMON, ROOT, write_coco
from torch.nn import functional

RESULTS = Path(__file__).parent / "results" / "mask_ceiling.csv"
STEPS, RATE = 250, 0.3


def fit(wanted):
    """Return logits (G, side / 8, side / 8) fitted to masks (G, side / 4, side / 4) by the loss of the training."""
    from rtmdet_geo.training.losses import dice_loss

    number, rows, columns = wanted.shape
    logits = torch.zeros(number, 1, rows // 2, columns // 2, requires_grad=True)
    optimizer = torch.optim.Adam([logits], RATE)
    for _ in range(STEPS):
        shown = functional.interpolate(logits, scale_factor=2, mode="bilinear").squeeze(1)
        optimizer.zero_grad()
        dice_loss(shown, wanted, reduction="none").sum().backward()
        optimizer.step()
    return logits.detach()


def read(logits, image, side, shift):
    """Return the masks of logits in the px of the image, read so many px of the sample up and to the left."""
    from rtmdet_geo.masks import CroppedMask

    scale = min(side / image.width, side / image.height)
    start = (scale - 1) / 2 - shift
    matrix = np.array([[scale, 0, start], [0, scale, start]])
    planes = functional.interpolate(logits, scale_factor=8, mode="bilinear")[:, 0].numpy()
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    size = (image.width, image.height)
    shown = [cv2.warpAffine(plane, matrix, size, flags=flags, borderMode=cv2.BORDER_REPLICATE) for plane in planes]
    return [CroppedMask((plane > 0).astype(np.uint8), 0, 0) for plane in shown]


def score(images, masks, num_classes):
    """Return COCO's AP of masks that are all found, with certainty."""
    from rtmdet_geo.boxes import boxes_to_hboxes
    from rtmdet_geo.evaluation.coco import CocoDetections, CocoTruth, evaluate_coco, run_lengths
    from rtmdet_geo.training.validate import chip_masks

    truths, found = [], []
    for image, parts in zip(images, masks, strict=True):
        boxes, (height, width) = boxes_to_hboxes(image.boxes_of("mask")), (image.height, image.width)
        labelled = [run_lengths(mask, height, width) for mask in chip_masks(image)]
        truths.append(CocoTruth(boxes, image.labels, image.ignored, np.ones(len(boxes)), labelled))
        packed = [run_lengths(mask, height, width) for mask in parts]
        found.append(CocoDetections(boxes, np.ones(len(boxes)), image.labels, packed))
    return evaluate_coco(found, truths, num_classes=num_classes, measure="masks").figures["AP"]


def measure(data, side):
    """Rows of the results for one size of the samples."""
    from rtmdet_geo.config import load_recipe
    from rtmdet_geo.training.sources import load_datasets
    from rtmdet_geo.training.whole_images import ImageSampler

    values = COMMON | {"augment.image_size": side, "optim.iterations": 1}
    recipe = load_recipe("coco_ins", [f"{key}={value}" for key, value in values.items()])
    images, _ = load_datasets(recipe.with_data(data))
    number = len(images)
    sampler = ImageSampler(images, recipe, iterations=1, samples_per_step=number, samples_per_process=number)
    shown, published, shifted, centred = [], [], [], []
    for position in range(number):
        image, sample = images[sampler.image_index(0, position)], sampler.draw(0, position)
        labels = torch.from_numpy(sample.masks.astype(np.float32))
        assert sample.labels.tolist() == image.labels.tolist()
        taught = fit(labels[:, 2::4, 2::4])
        middle = sum(labels[:, row::4, column::4] for row in (1, 2) for column in (1, 2)) / 4
        shown.append(image)
        published.append(read(taught, image, side, 0.0))
        shifted.append(read(taught, image, side, 0.5))
        centred.append(read(fit(middle), image, side, 0.0))
    ways = {"published": published, "read half a pixel off": shifted, "centred": centred}
    return [
        {"image_size": side, "labels": name, "AP": round(score(shown, masks, len(recipe.model.classes)), 4)}
        for name, masks in ways.items()
    ]


def main():
    """Measure, print, write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sides", nargs="*", type=int, default=[320, 480, 640], metavar="SIDE", help="px of the samples")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if not os.environ.get("RTMDET_DATA"):
        parser.error("RTMDET_DATA is not set: the folder that has coco8_seg")
    sys.path.insert(0, str(ROOT))

    with tempfile.TemporaryDirectory() as name:
        write_coco(Path(os.environ["RTMDET_DATA"]) / "coco8_seg", Path(name))
        rows = [row for side in options.sides for row in measure(Path(name), side)]
    more = {
        "versions": f"torch {torch.__version__}, OpenCV {cv2.__version__}",
        "date": datetime.date.today().isoformat(),
    }
    with options.output.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [*rows[0], *more], lineterminator="\n")
        writer.writeheader()
        writer.writerows(row | more for row in rows)
    for row in rows:
        print(f"{row['image_size']} px, labels {row['labels']:22} mask AP at most {row['AP']:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
