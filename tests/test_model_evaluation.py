"""evaluate model: a model that finds everything scores 1 by each protocol, one that errs less, faults are named."""

from __future__ import annotations

import json

import numpy as np
import pytest
from engines import RectangleEngine, draw_rectangles, scattered_boxes
from PIL import Image
from synthetic import make_spec
from test_cli import error_line, run

from rtmdet_geo import images
from rtmdet_geo.annotations.dota_results import read_results
from rtmdet_geo.boxes import boxes_to_hboxes, boxes_to_polygons
from rtmdet_geo.errors import (
    AnnotationError,
    Cancelled,
    ConfigError,
    DatasetNotFoundError,
    OutputError,
    UnknownClassError,
)
from rtmdet_geo.model_evaluation import evaluate_model


class Ships(RectangleEngine):
    """Finds bright rectangles, the first so many of each picture only if it is told so."""

    def __init__(self, kind="rotated", most=None, classes=("ship",)):
        super().__init__(make_spec(kind=kind, classes=classes, tile_size=256, overlap=64))
        self.most = most

    def find(self, image):
        return super().find(image).select(np.arange(self.most) if self.most else np.s_[:])


def paint(folder, kind="rotated", number=2):
    """Write images of 192 x 256 px; return the boxes in them by name."""
    folder.mkdir()
    found = {}
    for index in range(number):
        boxes = scattered_boxes(192, 256, index, kind=kind)
        Image.fromarray(draw_rectangles(192, 256, boxes).transpose(1, 2, 0)).save(folder / f"P{index}.png")
        found[f"P{index}"] = boxes
    return found


@pytest.fixture
def dota(tmp_path):
    labels = tmp_path / "labelTxt"
    labels.mkdir()
    for name, boxes in paint(tmp_path / "images").items():
        corners = boxes_to_polygons(boxes).reshape(-1, 8).tolist()
        (labels / f"{name}.txt").write_text("".join(" ".join(map(str, row)) + " ship 0\n" for row in corners))
    return tmp_path / "images", labels


def coco_labels(path, by_name, *, names=("boat", "ship")):
    """Write a COCO file; ids are not in order and leave gaps."""
    annotations = []
    for name, boxes in by_name.items():
        for x, y, right, bottom in boxes_to_hboxes(boxes).tolist():
            corners = [x, y, right, y, right, bottom, x, bottom]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 7 - int(name[1:]),
                    "category_id": 90,
                    "bbox": [x, y, right - x, bottom - y],
                    "area": (right - x) * (bottom - y),
                    "segmentation": [corners],
                    "iscrowd": 0,
                }
            )
    images = [{"id": 7 - int(name[1:]), "file_name": f"{name}.png", "width": 256, "height": 192} for name in by_name]
    categories = [{"id": 5, "name": names[0]}, {"id": 90, "name": names[1]}]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def test_dota(dota, tmp_path):
    steps = []
    report = evaluate_model(Ships(), *dota, results=tmp_path / "found", progress=lambda *step: steps.append(step))
    assert report.figures["AP75_11"] == pytest.approx(1)
    assert steps[-1] == (2, 2)
    assert len(read_results(tmp_path / "found", 1)["ship"]) == report.rows[0]["objects"] > 20
    assert evaluate_model(Ships(most=3), *dota).figures["AP50_area"] < 0.5
    assert evaluate_model(Ships(), *dota, protocol="mmrotate").figures["AP50_11"] == pytest.approx(1)
    both = evaluate_model(Ships(classes=("ship", "plane")), *dota)
    assert both.figures["AP50_11"] == pytest.approx(0.5)  # the devkit's mean takes a class without objects as 0


def test_dota_of_horizontal_boxes_is_task_2(dota):
    report = evaluate_model(Ships("horizontal"), *dota)
    assert report.protocol.startswith("DOTA task 2")


def test_images_without_labels_are_left_out(dota, tmp_path):
    (dota[1] / "P0.txt").unlink()
    report = evaluate_model(Ships(), *dota, results=tmp_path / "found")
    assert set(read_results(tmp_path / "found", 1)["ship"].image_ids) == {"P1"}
    assert report.figures["AP50_11"] == pytest.approx(1)


def test_rbox_labels_by_the_protocol_of_hrsc(tmp_path):
    labels = tmp_path / "labels"
    labels.mkdir()
    for name, boxes in paint(tmp_path / "images").items():
        (labels / f"{name}.txt").write_text("".join(" ".join(map(str, row)) + "\n" for row in boxes.tolist()))
    report = evaluate_model(Ships(classes=("plane", "ship")), tmp_path / "images", labels, label_format="rbox")
    assert report.figures["AP50_voc07"] == 0  # all were taken for planes
    report = evaluate_model(Ships(), tmp_path / "images", labels, label_format="rbox")
    assert report.figures["AP75_voc07"] == pytest.approx(1)


@pytest.mark.parametrize("kind", ["horizontal", "mask"])
def test_coco(tmp_path, kind):
    pytest.importorskip("faster_coco_eval")
    boxes = paint(tmp_path / "images", kind)
    labels = coco_labels(tmp_path / "all.json", boxes)
    engine = Ships(kind, classes=("car", "ship"))
    engine.spec = engine.spec.model_copy(update={"classes": ("ship", "car")})
    report = evaluate_model(engine, tmp_path / "images", labels, label_format="coco", results=tmp_path / "found.json")
    assert report.protocol == f"COCO, {'masks' if kind == 'mask' else 'boxes'}"
    assert report.figures["AP50"] == pytest.approx(1)
    entries = json.loads((tmp_path / "found.json").read_text())
    assert {entry["category_id"] for entry in entries} == {90} and {entry["image_id"] for entry in entries} == {6, 7}


def test_wrong_input_is_named(dota, tmp_path):
    images, labels = dota

    def fails(error, text, engine=None, images=images, labels=labels, **options):
        with pytest.raises(error, match=text):
            evaluate_model(engine or Ships(), images, labels, results=tmp_path / "found", **options)
        assert not (tmp_path / "found").exists()

    coco = coco_labels(tmp_path / "all.json", {"P0": np.zeros((0, 5)), "P9": np.zeros((0, 5))}, names=("a", "b"))
    fails(ConfigError, "label_format='yolo'", label_format="yolo")
    fails(ConfigError, "finds rotated objects; coco labels want", labels=coco, label_format="coco")
    fails(ConfigError, "finds horizontal objects; hrsc labels want", Ships("horizontal"), label_format="hrsc")
    fails(UnknownClassError, "no class in common", Ships("mask"), labels=coco, label_format="coco")
    fails(UnknownClassError, "knows no ship", Ships(classes=("plane",)), label_format="rbox")
    fails(DatasetNotFoundError, "folder of labels .*nowhere", labels=tmp_path / "nowhere")
    fails(DatasetNotFoundError, r"no label files \(\*\.xml\)", label_format="hrsc")
    coco = coco_labels(tmp_path / "all.json", {"P0": np.zeros((0, 5)), "P9": np.zeros((0, 5))})
    fails(DatasetNotFoundError, r"P9\.png', is missing", Ships("mask"), labels=coco, label_format="coco")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    for label_format in ("dota", "rbox"):
        with pytest.raises(OutputError, match="holds other files than results"):
            evaluate_model(
                Ships(), images, labels, label_format=label_format, results=tmp_path / "mine", overwrite=True
            )
    fails(Cancelled, "stopped after 0 of 2 images", label_format="rbox", cancelled=lambda: True)
    (images / "P1.png").rename(tmp_path / "P1.png")
    fails(DatasetNotFoundError, r"P1\.txt' have no image .*\(1 of 2 without image\)")
    (images / "P1.png").write_bytes(b"")
    fails(AnnotationError, r"P1\.png")


def test_command(dota, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "open_backend", lambda *names, **settings: Ships(most=3))
    words = ("evaluate", "model", "sen2ships_r", *dota, "--csv", tmp_path / "ap.csv")
    result = run(*words, "--min-ap", 0.9)
    assert result.exit_code == 3 and "AP50_11" in result.stdout and (tmp_path / "ap.csv").is_file()
    assert "--overwrite" in error_line(run(*words))
    monkeypatch.setattr(images, "open_backend", lambda *names, **settings: Ships())
    found = run(*words, "--overwrite", "--json")
    assert found.exit_code == 0 and json.loads(found.stdout)["figures"]["AP50_11"] == 1
    assert run(*words, "--overwrite", "--json", "--progress", "jsonl").exit_code == 2
    lines = run(*words, "--overwrite", "--progress", "jsonl").stdout.splitlines()
    assert json.loads(lines[-1])["event"] == "done" and json.loads(lines[-1])["figures"]["AP50_11"] == 1
