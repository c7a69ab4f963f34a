"""The examples in the help texts of ``rtmdet-geo data`` run as they stand, on small data of the names they use."""

from __future__ import annotations

import re
import shlex
import shutil
import zipfile

import click
import numpy as np
import pytest
from engines import RectangleEngine, draw_rectangles, scattered_boxes
from label_folders import write_text
from PIL import Image
from rasters import make_raster
from synthetic import make_spec
from test_cli import run
from test_gis_labels import SHIPS, layer_of

from rtmdet_geo import backends, catalog
from rtmdet_geo.boxes import boxes_to_polygons
from rtmdet_geo.class_names import DOTA_V1
from rtmdet_geo.cli import cli
from rtmdet_geo.gis_labels import cut_chips
from rtmdet_geo.structures import Detections


def examples(group):
    """Return the examples of all commands of a group, each an argument line without the program's name."""
    context = click.Context(cli, info_name="rtmdet-geo", **cli.context_settings)
    commands = cli.get_command(context, group)
    names = commands.list_commands(context)
    helps = [commands.get_command(context, name).help for name in names]
    found = [re.findall(r"^ +rtmdet-geo (.*)$", text, re.MULTILINE) for text in helps]
    assert all(found), [name for name, lines in zip(names, found, strict=True) if not lines]
    return [line for lines in found for line in lines]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with all that the examples read."""
    folder = tmp_path_factory.mktemp("prepared")
    boxes = scattered_boxes(60, 80, 0)
    label = " ".join(map(str, boxes_to_polygons(boxes[:1]).ravel())) + " ship 0\n"
    for part in ("train/images", "trainval/images", "test/images", "images", "dota/trainval/images", "dota/val/images"):
        (folder / part).mkdir(parents=True)
        value = np.uint8(len(part))  # the same picture in two parts of a data set would be a fault
        picture = np.maximum(draw_rectangles(60, 80, boxes).transpose(1, 2, 0), value)
        picture[0, 0] = value
        Image.fromarray(picture).save(folder / part / "P0003.png")
    for part in ("train/labelTxt", "trainval/labelTxt", "labelTxt", "dota/trainval/annfiles", "dota/val/annfiles"):
        write_text(folder / part / "P0003.txt", label)
    corners = "10 10 30 10 30 20 10 20"
    for name in DOTA_V1:
        write_text(folder / "patch_results" / f"Task1_{name}.txt", f"P0003__1__0___0 0.5 {corners}\n")
    with zipfile.ZipFile(folder / "task1.zip", "w") as archive:
        for name in DOTA_V1:
            archive.writestr(f"Task1_{name}.txt", f"P0003 0.5 {corners}\n")
    (folder / "scenes").mkdir()
    scene = make_raster(folder / "scenes/port.tif", dtype="uint16")
    shutil.copy(scene, folder / "port.tif")
    layer_of(boxes_to_polygons(SHIPS), class_name=["ship"] * 3).to_file(folder / "ships.gpkg")
    for name in ("port", "sen2ships"):
        cut_chips([scene], folder / "ships.gpkg", folder / "chips" / name)
    return folder


class Known(RectangleEngine):
    """Answers for the published model of DOTA: every rectangle is of every class."""

    def find(self, image):
        found = super().find(image)
        number = len(DOTA_V1)
        labels = np.tile(np.arange(number), len(found.scores))
        return Detections(
            np.repeat(found.boxes, number, axis=0), np.repeat(found.scores, number), labels, kind=found.kind
        )


@pytest.mark.parametrize("line", examples("data"))
def test_the_example_runs(line, prepared, tmp_path, monkeypatch):
    shutil.copytree(prepared, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    words = shlex.split(line.replace("/data/dota", "dota"))
    for index, word in enumerate(words):
        if words[index - 1] == "-o" and (tmp_path / "work" / word).exists():  # what another example begins with
            path = tmp_path / "work" / word
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if words[1] == "submission":
        spec = make_spec(kind="rotated", classes=DOTA_V1, tile_size=128)
        monkeypatch.setattr(catalog, "find_model", lambda name: name)
        monkeypatch.setattr(backends, "open_backend", lambda *names, **settings: Known(spec))
    if words[1] == "split":
        words += ["--workers", "1"]
    result = run(*words)
    assert result.exit_code == 0, result.output
    if "-o" in words:
        assert (tmp_path / "work" / words[words.index("-o") + 1]).exists()
