"""Statistics and contact sheets of data sets small enough to count by hand."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from click.testing import CliRunner
from PIL import Image

from rtmdet_geo.annotations.folders import FoldersSource
from rtmdet_geo.annotations.parts import PartSource
from rtmdet_geo.boxes import boxes_to_polygons
from rtmdet_geo.cli import cli
from rtmdet_geo.contact_sheet import show_data
from rtmdet_geo.dataset_check import ChipsSource
from rtmdet_geo.dataset_stats import data_stats, stats_rows, stats_summary, stats_text, write_stats
from rtmdet_geo.errors import AnnotationError, OutputError, UnknownClassError
from rtmdet_geo.preview import class_colour

SHIP, PLANE = "10 10 50 10 50 20 10 20 ship 0", "60 60 80 60 80 80 60 80 plane 1"


def dota(folder: Path, labels: dict[str, list[str]], size=(100, 100)) -> PartSource:
    """Write grey images and DOTA label files."""
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    for name, lines in labels.items():
        Image.new("RGB", size, (90, 90, 90)).save(folder / "images" / f"{name}.png")
        (folder / "labels" / f"{name}.txt").write_text("\n".join(lines))
    return PartSource("dota", folder / "images", folder / "labels")


@pytest.fixture
def source(tmp_path) -> PartSource:
    """Three images of 100 x 100 px: a ship and a plane; two ships, one upright; nothing."""
    upright = "20 10 30 10 30 70 20 70 ship 0"
    return dota(tmp_path / "data", {"a": [SHIP, PLANE], "b": [SHIP, upright], "c": []})


def test_counts_and_sizes_worked_out_by_hand(source):
    found = data_stats({"train": source}, gsd_m=0.5)
    rows = {row["class"]: row for row in stats_rows(found)}
    assert [(rows[name]["objects"], rows[name]["images"]) for name in ("plane", "ship", "all")] == [
        (1, 1),
        (3, 2),
        (4, 2),
    ]
    assert rows["ship"]["long_px"] == pytest.approx(40) and rows["ship"]["short_px"] == pytest.approx(10)
    assert rows["ship"]["long_m_p95"] == pytest.approx((0.1 * 40 + 0.9 * 60) / 2)
    assert rows["ship"]["aspect"] == pytest.approx(4) and rows["plane"]["aspect"] == pytest.approx(1)
    part = stats_summary(found)["parts"]["train"]
    assert (part["images"], part["images_without_objects"], part["objects"]) == (3, 1, 4)
    assert part["classes"] == {"plane": 1, "ship": 3}
    assert part["objects_per_mpx"]["max"] == pytest.approx(200) and part["objects_per_image"]["mean"] == pytest.approx(
        4 / 3
    )
    assert (part["small"], part["medium"], part["large"]) == (4, 0, 0)
    assert part["angles"] == {"0": 2, "45": 0, "90": 1, "135": 0}  # the plane is as wide as long
    text = stats_text(found)
    assert "deg clockwise from the row: 67% near 0, 0% near 45, 33% near 90, 0% near 135\n" in text
    assert "train: 3 images (1 without objects), 4 objects" in text and "metres per px: 0.5\n" in text
    json.dumps(stats_summary(found), allow_nan=False, default=str)


def test_angles_are_counted_by_the_nearest_direction(tmp_path):
    """Clockwise on screen from the row; 170 deg is nearer to the row than to 135."""
    corners = boxes_to_polygons([[50, 50, 40, 10, math.radians(angle)] for angle in (10, 40, 170, 140, 100)])
    lines = [" ".join(map(str, row)) + " ship 0" for row in corners.reshape(-1, 8).tolist()]
    found = data_stats({"train": dota(tmp_path / "data", {"a": lines})})
    assert np.sort(found["train"].angles_deg) == pytest.approx([10, 40, 100, 140, 170])
    assert stats_summary(found)["parts"]["train"]["angles"] == {"0": 2, "45": 1, "90": 1, "135": 1}


def test_without_resolution_there_are_no_metres(source):
    found = data_stats({"train": source})
    assert not any("long_m" in row for row in stats_rows(found))
    assert stats_summary(found)["parts"]["train"]["long_m"] is None


def test_georeferenced_images_are_measured_on_the_ground(tmp_path):
    """A GeoTIFF in EPSG:3857 at 60 degrees north: 1 m pixels are half as large there."""
    source = dota(tmp_path, {"a": [SHIP]})
    (tmp_path / "images" / "a.png").unlink()
    profile = {"driver": "GTiff", "width": 100, "height": 100, "count": 3, "dtype": "uint8", "crs": "EPSG:3857"}
    place = Affine(1, 0, 0, 0, -1, 8399737.89)
    with rasterio.open(tmp_path / "images" / "a.tif", "w", transform=place, **profile) as image:
        image.write(np.full((3, 100, 100), 90, np.uint8))
    part = data_stats({"train": source})["train"]
    assert part.gsd_m[0] == pytest.approx(0.5, rel=5e-3)
    assert part.sides_m[0] == pytest.approx([20, 5], rel=5e-3)


def test_what_training_leaves_out_is_left_out(source, caplog):
    (source.labels / "c.txt").write_text("200 200 220 200 220 210 200 210 ship 0\nno label")
    part = data_stats({"train": source})["train"]
    assert len(part.images) == 2 and len(part.labels) == 4  # the malformed file goes as a whole
    (source.labels / "c.txt").write_text("200 200 220 200 220 210 200 210 ship 0")
    part = data_stats({"train": source})["train"]
    assert part.num_left_out == 1 and len(part.labels) == 4
    assert "`data check` names them" in caplog.text


def test_images_in_folders_of_classes(tmp_path):
    for name in ("cat/1.png", "cat/2.png", "dog/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (20, 10)).save(tmp_path / name)
    found = data_stats({"data": FoldersSource(tmp_path)})
    assert [(row["class"], row["objects"]) for row in stats_rows(found)] == [("cat", 2), ("dog", 1), ("all", 3)]
    assert math.isnan(stats_rows(found)[0]["long_px"])
    written = write_stats(found, plots=tmp_path / "charts")
    assert [path.name for path in written] == ["classes.png"]
    sheet = tmp_path / "sheet.png"
    assert show_data({"data": FoldersSource(tmp_path)}, sheet, classes=["cat"])["objects"] == {"cat": 2}


def test_table_and_charts_are_written(source, tmp_path):
    found = data_stats({"train": source, "val": source}, gsd_m=1.0)
    written = write_stats(found, csv=tmp_path / "a.csv", plots=tmp_path / "charts")
    assert [path.name for path in written] == ["a.csv", "classes.png", "objects.png"]
    rows = list(csv.DictReader(io.StringIO((tmp_path / "a.csv").read_text())))
    assert [(row["part"], row["class"], row["objects"]) for row in rows[:3]] == [
        ("train", "plane", "1"),
        ("train", "ship", "3"),
        ("train", "all", "4"),
    ]
    with pytest.raises(OutputError, match="--overwrite"):
        write_stats(found, plots=tmp_path / "charts")


def test_nothing_has_no_charts(tmp_path, caplog):
    found = data_stats({"train": dota(tmp_path / "data", {"a": []})})
    assert write_stats(found, plots=tmp_path / "charts") == []
    assert not (tmp_path / "charts").exists() and "there is nothing to draw" in caplog.text
    assert stats_rows(found) == [{**stats_rows(found)[0], "class": "all", "objects": 0}]


def redness(path: Path) -> np.ndarray:
    """Red less blue of the pictures on a sheet, its captions left out: 0 where it is grey."""
    image = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return image[..., 0] - image[..., 2]


def test_sheet_shows_objects_in_the_colours_of_their_classes(source, tmp_path):
    out = tmp_path / "sheet.png"
    summary = show_data({"train": source}, out, cell_px=200)
    assert summary["images"] == ["a.png", "b.png", "c.png"]
    assert summary["objects"] == {"plane": 1, "ship": 3}
    first = redness(out)[6:206, 6:206]
    assert class_colour(0)[0] > class_colour(0)[2] and class_colour(1)[0] < class_colour(1)[2]
    assert first.min() < -40 and first.max() < 10  # a ship; the plane is difficult, so grey
    (source.labels / "a.txt").write_text(PLANE.replace("plane 1", "plane 0"))
    show_data({"train": source}, out, cell_px=200, overwrite=True)
    assert redness(out)[6:206, 6:206].max() > 40
    assert redness(out).shape[1] >= 2 * 200
    with pytest.raises(OutputError, match="--overwrite"):
        show_data({"train": source}, out)


def test_boxes_lie_where_the_objects_are(tmp_path):
    """A bright ship in a dark image, drawn twice as large: the box runs along its edge."""
    source = dota(tmp_path / "data", {"a": [SHIP]})
    image = np.zeros((100, 100, 3), np.uint8)
    image[10:20, 10:50] = 255
    Image.fromarray(image).save(source.images / "a.png")
    show_data({"d": source}, tmp_path / "s.png", cell_px=200)
    is_line = (redness(tmp_path / "s.png")[6:206, 6:206] > 60).nonzero()
    assert [is_line[0].min(), is_line[0].max()] == pytest.approx([20, 40], abs=1.5)
    assert [is_line[1].min(), is_line[1].max()] == pytest.approx([20, 100], abs=1.5)


def test_choice_of_images_follows_seed_and_class(tmp_path):
    labels = {f"{index:02}": [SHIP if index % 3 else PLANE] for index in range(30)}
    parts = {"d": dota(tmp_path / "data", labels)}

    def chosen(name: str, **options) -> list[str]:
        return show_data(parts, tmp_path / f"{name}.png", number=5, cell_px=64, **options)["images"]

    assert chosen("a") == chosen("b") != chosen("c", seed=1)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert all(int(name[:2]) % 3 == 0 for name in chosen("d", classes=["plane"]))
    with pytest.raises(UnknownClassError, match="no object is of class 'car'; there are plane, ship"):
        chosen("e", classes=["car"])


def test_a_crop_shows_an_object(tmp_path):
    source = dota(tmp_path / "data", {"a": ["500 300 540 300 540 310 500 310 ship 0"]}, size=(1000, 400))
    summary = show_data({"d": source}, tmp_path / "s.png", crop_px=100, cell_px=100)
    assert summary["objects"] == {"ship": 1}
    assert redness(tmp_path / "s.png")[6:106, 6:106].max() > 60


def test_chips_and_broken_files(tmp_path, caplog):
    entry = {"file": "a_0_0.npy", "scene": "a", "width": 60, "height": 40, "labels": [0], "ignore": [False]}
    entry["boxes"] = [[30, 20, 20, 8, 0.3]]
    index = {"classes": ["ship"], "gsd_m": 4.0, "chips": [entry, entry | {"file": "b_0_0.npy"}]}
    (tmp_path / "chips.json").write_text(json.dumps(index))
    np.save(tmp_path / "a_0_0.npy", np.full((4, 40, 60), 30, np.uint8))
    (tmp_path / "b_0_0.npy").write_text("broken")
    parts = {"chips": ChipsSource(tmp_path)}
    assert data_stats(parts)["chips"].sides_m[0] == pytest.approx([80, 32])
    summary = show_data(parts, tmp_path / "s.png")
    assert summary["objects"] == {"ship": 1} and "b_0_0.npy" in caplog.text
    (tmp_path / "chips.json").write_text(json.dumps(index | {"chips": []}))
    with pytest.raises(AnnotationError, match="no images"):
        show_data(parts, tmp_path / "t.png")


def test_commands(source, tmp_path):
    data = ["--format", "dota", "--images", str(source.images), "--labels", str(source.labels)]
    result = CliRunner().invoke(cli, ["data", "stats", *data, "--json", "--gsd", "2"])
    assert result.exit_code == 0 and json.loads(result.stdout)["parts"]["data"]["objects"] == 4
    printed = CliRunner().invoke(cli, ["data", "stats", *data, "--csv", str(tmp_path / "a.csv")])
    assert "data  ship" in printed.stdout and "a.csv" in printed.stderr and (tmp_path / "a.csv").is_file()
    out = tmp_path / "sheet.png"
    shown = CliRunner().invoke(cli, ["data", "show", *data, "-o", str(out), "-n", "2", "--only", "ship"])
    assert shown.exit_code == 0 and shown.stdout.endswith("2 images, 4 objects\n") and out.is_file()
    wrong = CliRunner().invoke(cli, ["data", "show", *data, "-o", str(tmp_path / "sheet.jpg")])
    assert wrong.exit_code == 2 and "must end with .png" in wrong.stderr
    neither = CliRunner().invoke(cli, ["data", "stats"])
    assert neither.exit_code == 2 and "Give a RECIPE" in neither.stderr


def triangle(folder: Path, label_format: str) -> PartSource:
    """A triangle with corners 10 10, 60 60 and 20 60 in an image of 100 x 100 px."""
    (folder / "images").mkdir(parents=True)
    Image.new("RGB", (100, 100), (90, 90, 90)).save(folder / "images" / "a.png")
    if label_format == "yolo_obb":
        (folder / "labels").mkdir()
        (folder / "labels" / "a.txt").write_text("0 .1 .1 .6 .6 .2 .6\n")
        return PartSource("yolo_obb", folder / "images", folder / "labels", classes=("ship",))
    entry = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 50, 50], "iscrowd": 0, "area": 1000}
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 100, "height": 100}],
        "categories": [{"id": 1, "name": "ship"}],
        "annotations": [entry | {"segmentation": [[10, 10, 60, 60, 20, 60]]}],
    }
    (folder / "all.json").write_text(json.dumps(content))
    return PartSource("coco", folder / "images", folder / "all.json", kind="horizontal")


@pytest.mark.parametrize("label_format", ["coco", "yolo_obb"])
@pytest.mark.parametrize("kind", [None, "mask", "horizontal", "rotated"])
def test_sheets_draw_outlines_unless_boxes_are_asked_for(tmp_path, label_format, kind):
    """The triangle alone passes 15 35, the upright box 60 30, the least rectangle, along the longest side, 50 70."""
    out = tmp_path / "s.png"
    show_data({"d": triangle(tmp_path / "data", label_format)}, out, kind=kind, cell_px=100)
    drawn = np.asarray(redness(out)[6:106, 6:106] > 60)

    def passes(x: int, y: int) -> bool:
        return bool(drawn[y - 1 : y + 2, x - 1 : x + 2].any())

    seen = {"mask": passes(15, 35), "horizontal": passes(60, 30), "rotated": passes(50, 70)}
    assert [name for name, is_there in seen.items() if is_there] == [kind or "mask"]


def test_upright_boxes_are_told(tmp_path):
    found = data_stats({"d": triangle(tmp_path, "coco")})
    assert "of upright boxes around the objects" in stats_text(found)
    assert stats_summary(found)["parts"]["d"]["is_upright"] is True
    assert "upright" not in stats_text(data_stats({"d": dota(tmp_path / "dota", {"a": [SHIP]})}))
