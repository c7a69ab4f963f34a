"""The examples that ``evaluate --help`` and ``data --help`` end with, run as they stand on small generated data."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import zipfile
from pathlib import Path

import click
import geopandas
import numpy as np
import pytest
import shapely
from engines import RectangleEngine, draw_rectangles, scattered_boxes
from label_folders import write_image, write_text
from PIL import Image
from synthetic import SHIPS, TRANSFORM, draw_ships, make_spec, write_scene
from test_cli import every_command, run

from rtmdet_geo import images
from rtmdet_geo.annotations.coco import encode_mask
from rtmdet_geo.boxes import boxes_to_hboxes, boxes_to_polygons
from rtmdet_geo.class_names import DOTA_V1
from rtmdet_geo.cli import cli

HEIGHT, WIDTH = 192, 256
#: What stands in the examples for a place of the user's own, and where the test has it.
PLACES = {"/data/dota": "dota_ss"}
#: Options that name what a command writes.
OUTPUTS = ("-o", "--task2", "--csv", "--plots")
#: Parts of the data of recipe dota_r.
PARTS = ("trainval", "val")


def examples_of(command: click.Command) -> list[str]:
    """Return the command lines of a help text's examples."""
    return re.findall(r"^ +rtmdet-geo (.+)$", (command.help or "").split("Example:")[1], flags=re.MULTILINE)


EXAMPLES = {
    name: examples_of(command) for name, command in every_command(cli) if name.split(" ")[0] in ("evaluate", "data")
}


def corner_text(boxes: np.ndarray) -> list[str]:
    return [" ".join(map(repr, row)) for row in boxes_to_polygons(boxes).reshape(-1, 8).tolist()]


def write_dota(root: Path) -> dict[str, np.ndarray]:
    """Two images of bright rectangles, all of them planes but the first, a ship; by the names of every example."""
    by_name = {f"P{index}": scattered_boxes(HEIGHT, WIDTH, index) for index in range(2)}
    for name, boxes in by_name.items():
        pixels = draw_rectangles(HEIGHT, WIDTH, boxes).transpose(1, 2, 0)
        lines = [f"{text} {'plane' if index else 'ship'} 0\n" for index, text in enumerate(corner_text(boxes))]
        whole = ("images", *(f"{part}/images" for part in ("train", "trainval", "val", "test")))
        for folder in (*whole, *(f"dota_ss/{part}/images" for part in PARTS)):
            (root / folder).mkdir(parents=True, exist_ok=True)
            shown = 255 - pixels if folder == "dota_ss/val/images" else pixels  # not the same pictures in both parts
            Image.fromarray(shown).save(root / folder / f"{name}.png")
        labelled = ("labelTxt", *(f"{part}/labelTxt" for part in ("train", "trainval", "val")))
        for folder in (*labelled, *(f"dota_ss/{part}/annfiles" for part in PARTS)):
            write_text(root / folder / f"{name}.txt", "".join(lines))
        ships = "".join(
            f"<HRSC_Object><Class_ID>100000001</Class_ID><mbox_cx>{cx}</mbox_cx><mbox_cy>{cy}</mbox_cy><mbox_w>{w}"
            f"</mbox_w><mbox_h>{h}</mbox_h><mbox_ang>{angle}</mbox_ang></HRSC_Object>"
            for cx, cy, w, h, angle in boxes[:1].tolist()
        )
        content = f"<HRSC_Image><HRSC_Objects>{ships}</HRSC_Objects></HRSC_Image>"
        write_text(root / "Test/Annotations" / f"{name}.xml", content)
    return by_name


def write_results(root: Path, by_name: dict[str, np.ndarray]) -> None:
    """Result files that find everything: over images, and over patches that are as large as the images."""
    for label, name in enumerate(DOTA_V1):
        for folder, ending in (("results", ""), ("patch_results", "__1__0___0"), ("packed", "")):
            rows = []
            for image, boxes in by_name.items():
                texts = corner_text(boxes)
                own = {"plane": texts[1:], "ship": texts[:1]}.get(name, texts[label : label + 1])
                rows += [f"{image}{ending} 0.9 {text}\n" for text in own if folder == "packed" or label in (0, 6)]
            write_text(root / folder / f"Task1_{name}.txt", "".join(rows))


def write_coco(root: Path) -> None:
    """Two photographs of upright rectangles, which are persons, and what was found: them."""
    images, annotations, boxes, masks = [], [], [], []
    for number in (1, 2):
        found = scattered_boxes(HEIGHT, WIDTH, number, kind="horizontal")
        (root / "val2017").mkdir(exist_ok=True)
        Image.fromarray(draw_rectangles(HEIGHT, WIDTH, found).transpose(1, 2, 0)).save(root / f"val2017/{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": WIDTH, "height": HEIGHT})
        for x, y, right, bottom in boxes_to_hboxes(found).tolist():
            mask = np.zeros((HEIGHT, WIDTH), bool)
            mask[round(y) : round(bottom), round(x) : round(right)] = True
            place = {"image_id": number, "category_id": 1, "bbox": [x, y, right - x, bottom - y]}
            annotation = place | {"segmentation": encode_mask(mask), "area": (right - x) * (bottom - y), "iscrowd": 0}
            annotations.append(annotation | {"id": len(annotations) + 1})
            boxes.append(place | {"score": 0.9})
            masks.append(boxes[-1] | {"segmentation": encode_mask(mask)})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "person"}]}
    for name, part in (("instances_val2017", content), ("results.bbox", boxes), ("results.segm", masks)):
        write_text(root / f"{name}.json", json.dumps(part))


def write_layers(root: Path) -> None:
    """A scene with five ships, and the layers of those found and of those labelled, in two CRSs."""
    for path in ("port.tif", "scenes/port.tif"):
        (root / path).parent.mkdir(exist_ok=True)
        write_scene(root / path, draw_ships(500, 400))
    corners = boxes_to_polygons(SHIPS) * [TRANSFORM.a, TRANSFORM.e] + [TRANSFORM.c, TRANSFORM.f]
    shapes = shapely.polygons(corners)
    columns = {"class_name": ["ship"] * len(shapes), "score": [0.9] * len(shapes)}
    layer = geopandas.GeoDataFrame(columns, geometry=geopandas.GeoSeries(shapes, crs="EPSG:32630"))
    layer.to_file(root / "ships.gpkg")
    layer.drop(columns="score").to_crs("EPSG:4326").to_file(root / "labels.geojson")
    done = run("data", "chips", root / "port.tif", "-l", root / "ships.gpkg", "-o", root / "chips" / "sen2ships")
    assert done.exit_code == 0, done.output


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder with everything that examples name."""
    root = tmp_path_factory.mktemp("data")
    write_results(root, write_dota(root))
    write_coco(root)
    write_layers(root)
    return root


def classify(root: Path) -> None:
    """Folders of images by class, and predictions that are right."""
    shutil.rmtree(root / "val")
    for name in ("plane/1.png", "ship/1.png", "ship/2.png"):
        write_image(root / "val" / name, 0)
    rows = "".join(f"{path.parent.name}/{path.name},{path.parent.name}\n" for path in sorted(root.glob("val/*/*.png")))
    write_text(root / "labels.csv", "image,class\n" + rows)
    write_text(root / "predictions.csv", "image,first\n" + rows)


def pack(root: Path) -> None:
    """A submission."""
    with zipfile.ZipFile(root / "task1.zip", "w") as archive:
        for path in sorted((root / "packed").iterdir()):
            archive.write(path, path.name)


#: What some commands need besides.
SETUPS = {
    "evaluate classification": classify,
    "data check-submission": pack,
    "data merge": lambda root: shutil.rmtree(root / "results"),
    "data split": lambda root: shutil.rmtree(root / "dota_ss"),
}


def open_engine(model: str, **_: object) -> RectangleEngine:
    """Return an engine that sees rectangles as the first class of the model that was asked for."""
    is_dota = model.endswith("dota")
    classes = DOTA_V1 if is_dota else ("person",)
    return RectangleEngine(
        make_spec(kind="rotated" if is_dota else "horizontal", classes=classes, tile_size=256, overlap=64)
    )


@pytest.mark.parametrize("command", EXAMPLES)
def test_examples_run(command, data, tmp_path, monkeypatch):
    place = tmp_path / "place"
    shutil.copytree(data, place)
    SETUPS.get(command, lambda _: None)(place)
    monkeypatch.chdir(place)
    monkeypatch.setattr(images, "load_model", open_engine)
    for line in EXAMPLES[command]:
        words = [PLACES.get(word, word) for word in shlex.split(line)]
        done = run(*words)
        assert done.exit_code == 0, f"rtmdet-geo {line}\n{done.output}\n{done.exception!r}"
        assert done.stdout.strip(), f"rtmdet-geo {line} says nothing"
        written = [Path(words[index + 1]) for index, word in enumerate(words) if word in OUTPUTS]
        assert all(path.exists() for path in written), f"rtmdet-geo {line} leaves no {written}"
        for path in written if command != "data" else ():  # whose second example goes on with what the first made
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_every_command_of_the_groups_has_examples():
    assert len(EXAMPLES) > 14 and all(EXAMPLES.values())
    assert all(line.startswith(name.split(" ")[0]) for name, lines in EXAMPLES.items() for line in lines)
