"""Small data sets on disk for tests of label readers, sources of training and the data check."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image


def write_image(path: Path, seed: int, size: tuple[int, int] = (40, 30)) -> Path:
    """Write a noisy picture of width x height px, different for every seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def write_text(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def dota_folder(root: Path, **labels: str) -> Path:
    """Write ``images/NAME.png`` of 40 x 30 px and ``labels/NAME.txt`` for every name."""
    for number, (name, text) in enumerate(labels.items()):
        write_image(root / "images" / f"{name}.png", number)
        write_text(root / "labels" / f"{name}.txt", text)
    return root


def coco_folder(root: Path, annotations: list[dict], images: int = 2, **more: object) -> Path:
    """Write ``images/1.png``, ... of 40 x 30 px and ``all.json`` with classes ship (7) and buoy (3)."""
    entries = []
    for number in range(1, images + 1):
        write_image(root / "images" / f"{number}.png", number)
        entries.append({"id": number, "file_name": f"{number}.png", "width": 40, "height": 30})
    categories = [{"id": 7, "name": "ship"}, {"id": 3, "name": "buoy"}]
    content = {"images": entries, "annotations": annotations, "categories": categories, **more}
    write_text(root / "all.json", json.dumps(content))
    return root


def coco_box(number: int, image: int, bbox: list[float], category: int = 7, **more: object) -> dict:
    return {"id": number, "image_id": image, "category_id": category, "bbox": bbox, **more}
