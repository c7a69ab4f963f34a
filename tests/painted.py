"""Small data sets in public formats: bright objects on dark ground, painted where their labels say."""

from __future__ import annotations

import json

import cv2
import numpy as np

SIDE = 96
#: Colours of objects in turn, as writers give them their classes in turn.
COLOURS = ((210, 220, 230), (60, 200, 120))


def canvas(seed):
    """Dark ground with a little noise, (SIDE, SIDE, 3) uint8, and a generator."""
    generator = np.random.default_rng(seed)
    return generator.integers(20, 45, (SIDE, SIDE, 3)).astype(np.uint8), generator


def boxes_of(generator, number=3):
    """Boxes (N, 5) that do not touch: cx, cy, w, h px, angle rad."""
    cells = generator.permutation(9)[:number]
    centres = np.column_stack([cells % 3, cells // 3]) * 32.0 + 16
    sides = np.column_stack([generator.uniform(18, 26, number), generator.uniform(8, 12, number)])
    return np.column_stack([centres, sides, generator.uniform(-1.5, 1.5, number)])


def corners_of(box):
    """Corners (4, 2) of a box."""
    cx, cy, width, height, angle = box
    axis, side = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
    signs = ((-1, -1), (1, -1), (1, 1), (-1, 1))
    return np.array([[cx, cy] + sx * width / 2 * axis + sy * height / 2 * side for sx, sy in signs])


def paint(image, corners, colour=COLOURS[0]):
    """Fill a polygon."""
    cv2.fillPoly(image, [np.round((corners - 0.5) * 256).astype(np.int32)], colour, shift=8)


def painted_images(folder, number, suffix=".jpg", seed=0):
    """Write images and return (name without suffix, boxes) of each."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for index in range(number):
        image, generator = canvas(seed + index)
        boxes = boxes_of(generator)
        for position, box in enumerate(boxes):
            paint(image, corners_of(box), COLOURS[position % len(COLOURS)])
        name = f"{seed + index:06d}"
        cv2.imwrite(str(folder / f"{name}{suffix}"), image)
        found.append((name, boxes))
    return found


def coco(root, *, classes=("person", "boat"), number=4):
    """Train2017, val2017 and annotations, as the COCO archives unpack."""
    (root / "annotations").mkdir(parents=True)
    for seed, part in enumerate(("train2017", "val2017")):
        images, annotations = [], []
        for index, (name, boxes) in enumerate(painted_images(root / part, number, seed=100 * seed)):
            images.append({"id": index + 1, "file_name": f"{name}.jpg", "width": SIDE, "height": SIDE})
            for number_of_box, box in enumerate(boxes):
                corners = corners_of(box)
                low, high = corners.min(axis=0), corners.max(axis=0)
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": index + 1,
                        "category_id": number_of_box % len(classes) + 1,
                        "bbox": [*low.tolist(), *(high - low).tolist()],
                        "area": float(box[2] * box[3]),
                        "segmentation": [corners.ravel().tolist()],
                        "iscrowd": 0,
                    }
                )
        categories = [{"id": index + 1, "name": name} for index, name in enumerate(classes)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{part}.json").write_text(json.dumps(content), encoding="utf-8")


def dota(root, *, parts=("trainval", "val"), classes=("ship", "roundabout"), number=4):
    """Tiles and label files in DOTA's text format."""
    for seed, part in enumerate(parts):
        labels = root / part / "annfiles"
        labels.mkdir(parents=True)
        for name, boxes in painted_images(root / part / "images", number, ".png", seed=100 * seed):
            lines = ["imagesource:painted", "gsd:0.5"]
            for index, box in enumerate(boxes):
                values = " ".join(f"{value:.2f}" for value in corners_of(box).ravel())
                lines.append(f"{values} {classes[index % len(classes)]} {int(index == 2)}")
            (labels / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def hrsc(root, *, number=6):
    """AllImages, Annotations (XML) and ImageSets, as the archive of HRSC2016 unpacks."""
    full = root / "FullDataSet"
    (full / "Annotations").mkdir(parents=True)
    (root / "ImageSets").mkdir()
    names = []
    for name, boxes in painted_images(full / "AllImages", number, ".bmp"):
        names.append(name)
        objects = "".join(
            f"<HRSC_Object><Class_ID>100000001</Class_ID><difficult>0</difficult><mbox_cx>{cx:.4f}</mbox_cx>"
            f"<mbox_cy>{cy:.4f}</mbox_cy><mbox_w>{w:.4f}</mbox_w><mbox_h>{h:.4f}</mbox_h><mbox_ang>{angle:.6f}</mbox_ang>"
            "</HRSC_Object>"
            for cx, cy, w, h, angle in boxes
        )
        text = (
            f"<HRSC_Image><Img_FileName>{name}</Img_FileName><Img_FileFmt>bmp</Img_FileFmt><Img_SizeWidth>{SIDE}"
            f"</Img_SizeWidth><Img_SizeHeight>{SIDE}</Img_SizeHeight><HRSC_Objects>{objects}</HRSC_Objects></HRSC_Image>"
        )
        (full / "Annotations" / f"{name}.xml").write_text(text, encoding="utf-8")
    half = len(names) * 2 // 3
    (root / "ImageSets" / "trainval.txt").write_text("\n".join(names[:half]) + "\n", encoding="utf-8")
    (root / "ImageSets" / "test.txt").write_text("\n".join(names[half:]) + "\n", encoding="utf-8")
    return full


def folders(root, *, classes=("bright", "dark"), number=4):
    """Train and val, a folder of images for each class."""
    for seed, part in enumerate(("train", "val")):
        for index, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for image_number in range(number):
                image, generator = canvas(1000 * seed + 10 * index + image_number)
                image = np.clip(image.astype(int) + index * 120 + generator.integers(0, 20), 0, 255).astype(np.uint8)
                cv2.imwrite(str(root / part / name / f"{image_number}.jpg"), image)
