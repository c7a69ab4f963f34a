"""Scenes and labels to training chips."""

from __future__ import annotations

import json
import warnings

import geopandas
import numpy as np
import pytest
import shapely
from rasters import make_raster

from rtmdet_geo.annotations.coco import encode_mask
from rtmdet_geo.annotations.outlines import Window, as_outline, fill_outline
from rtmdet_geo.boxes import boxes_to_polygons
from rtmdet_geo.errors import AnnotationError, ConfigError, NotGeoreferencedWarning, OutputError
from rtmdet_geo.gis_labels import cut_chips
from rtmdet_geo.raster import open_scene
from rtmdet_geo.structures import StretchSpec

#: Ships in px of the 60 x 40 px scene: cx, cy, w, h, angle.
SHIPS = np.array([[15.0, 12.0, 10.0, 4.0, 0.3], [40.0, 25.0, 12.0, 3.0, -1.2], [59.0, 20.0, 8.0, 4.0, 0.0]])


def layer_of(polygons_px, *, crs="EPSG:32630", **columns):
    """Polygons in px of make_raster's UTM scene (10 m px, upper-left 500000, 4000400) as a layer."""
    world = [shapely.Polygon(polygon * [10, -10] + [500_000, 4_000_400]) for polygon in polygons_px]
    return geopandas.GeoDataFrame(columns, geometry=world, crs="EPSG:32630").to_crs(crs)


@pytest.fixture
def scene_path(tmp_path):
    return make_raster(tmp_path / "port.tif", dtype="uint16")


@pytest.fixture
def layer_path(tmp_path):
    path = tmp_path / "ships.gpkg"
    layer_of(boxes_to_polygons(SHIPS), kind=["cargo", "tug", "cargo"]).to_file(path)
    return path


def index_of(folder):
    return json.loads((folder / "chips.json").read_text())


def test_whole_scene_chip_from_a_vector_layer(tmp_path, scene_path, layer_path):
    spec = StretchSpec(low=0, high=0.25)
    summary = cut_chips([scene_path], layer_path, tmp_path / "chips", gsd_m=5.5, stretch=spec, chip_size=0)
    index = index_of(tmp_path / "chips")
    assert (
        index["format_version"] == 1 and index["classes"] == ["object"] and index["bands"] == ["red", "green", "blue"]
    )
    assert StretchSpec.model_validate(index["stretch"]) == spec and index["gsd_m"] == 5.5
    (chip,) = index["chips"]
    pixels = np.load(tmp_path / "chips" / chip["file"])
    with open_scene(scene_path, stretch=spec, model_gsd_m=5.5) as scene:
        expected, _ = scene.read(0, 0, scene.width, scene.height)
        factor = 1 / scene.scale_x
        assert scene.scale_x == pytest.approx(scene.scale_y, rel=0.01)
    np.testing.assert_array_equal(pixels, expected)  # training sees what inference sees
    boxes = np.array(chip["boxes"])
    np.testing.assert_allclose(boxes[:, :4], SHIPS[:, :4] * factor, rtol=0.02)
    np.testing.assert_allclose(boxes[:, 4], SHIPS[:, 4], atol=0.01)
    assert chip["ignore"] == [False, False, True]  # the third reaches over the edge: 5 of 8 px inside
    assert chip["stretch_record"]["kind"] == "fixed" and chip["scene"] == "port"
    assert (chip["x"], chip["y"], chip["width"], chip["height"]) == (0, 0, pixels.shape[2], pixels.shape[1])
    assert summary["num_boxes"] == 2 and summary["num_ignored"] == 1 and summary["num_chips"] == 1


def test_layer_in_another_crs_and_classes(tmp_path, scene_path, layer_path):
    path = tmp_path / "ships.geojson"
    layer = layer_of(boxes_to_polygons(SHIPS), crs="EPSG:4326", kind=["cargo", "tug", "cargo"])
    layer.to_file(path, driver="GeoJSON", COORDINATE_PRECISION=12)
    summary = cut_chips([scene_path], path, tmp_path / "chips", class_column="kind", chip_size=0)
    assert index_of(tmp_path / "chips")["classes"] == ["cargo", "tug"]
    (chip,) = index_of(tmp_path / "chips")["chips"]
    assert chip["labels"] == [0, 1, 0] and summary["num_by_class"] == {"cargo": 1, "tug": 1}
    np.testing.assert_allclose(np.array(chip["boxes"]), SHIPS, atol=1e-3)
    cut_chips([scene_path], path, tmp_path / "b", class_column="kind", classes=["tug", "cargo"], chip_size=0)
    assert index_of(tmp_path / "b")["chips"][0]["labels"] == [1, 0, 1]


def test_chips_overlap_and_cut_boxes_are_ignored(tmp_path, scene_path, layer_path):
    out = tmp_path / "chips"
    cut_chips([scene_path], layer_path, out, chip_size=24, overlap=8, gsd_m=None)
    index = index_of(out)
    assert {(chip["x"], chip["y"]) for chip in index["chips"]} == {(x, y) for x in (0, 16, 32, 36) for y in (0, 16)}
    with open_scene(scene_path) as scene:
        whole, _ = scene.read(0, 0, 60, 40)
    for chip in index["chips"]:
        x, y = chip["x"], chip["y"]
        np.testing.assert_array_equal(np.load(out / chip["file"]), whole[:, y : y + 24, x : x + 24])
        frame = shapely.box(0, 0, 24, 24)
        polygons = shapely.polygons(boxes_to_polygons(SHIPS - [x, y, 0, 0, 0]))
        share = shapely.area(shapely.intersection(polygons, frame)) / shapely.area(polygons)
        assert len(chip["boxes"]) == (share > 0).sum()
        assert chip["ignore"] == (share[share > 0] < 0.7).tolist()


def test_empty_chips_and_invalid_chips(tmp_path, layer_path):
    values_path = make_raster(tmp_path / "port.tif", nodata_type="nodata")
    kept = cut_chips([values_path], layer_path, tmp_path / "a", chip_size=20, overlap=0)
    dropped = cut_chips([values_path], layer_path, tmp_path / "b", chip_size=20, overlap=0, keep_empty=False)
    assert kept["num_chips"] == 6 and dropped["num_chips"] == 6 - dropped["num_empty_chips"] < 6
    assert all(chip["boxes"] for chip in index_of(tmp_path / "b")["chips"])
    small = cut_chips([values_path], layer_path, tmp_path / "c", chip_size=4, overlap=0)
    assert small["num_invalid_chips"] > 0


def coco_file(path, masks, *, names=("port.tif",), crowd=()):
    content = {
        "images": [{"id": i, "file_name": n, "width": 60, "height": 40} for i, n in enumerate(names)],
        "categories": [{"id": 1, "name": "ship"}],
        "annotations": [
            {"id": i, "image_id": 0, "category_id": 1, "segmentation": encode_mask(mask), "iscrowd": int(i in crowd)}
            for i, mask in enumerate(masks)
        ],
    }
    path.write_text(json.dumps(content))
    return path


def test_masks_become_rectangles_over_pixel_corners(tmp_path, scene_path):
    mask = np.zeros((40, 60), bool)
    mask[10:14, 20:31] = True
    diagonal = np.zeros((40, 60), bool)
    for step in range(12):
        diagonal[20 + step, 5 + step] = True
    labels = coco_file(tmp_path / "labels.json", [mask, diagonal], crowd=(1,))
    cut_chips([scene_path], labels, tmp_path / "chips", chip_size=0)
    (chip,) = index_of(tmp_path / "chips")["chips"]
    assert chip["boxes"][0] == pytest.approx([25.5, 12, 11, 4, 0])
    # 12 px on a diagonal: from corner (5, 20) to (17, 32), one pixel's diagonal wide
    assert chip["boxes"][1] == pytest.approx([11, 26, 12 * 2**0.5, 2**0.5, np.pi / 4])
    assert chip["ignore"] == [False, True]
    assert index_of(tmp_path / "chips")["classes"] == ["ship"]


def masks_of(chip):
    window = Window(0, 0, chip["width"], chip["height"])
    return [fill_outline(as_outline(outline), window).astype(bool) for outline in chip["outlines"]]


def test_outlines_of_run_lengths_give_the_masks_back(tmp_path, scene_path):
    rng = np.random.default_rng(0)
    masks = [rng.random((40, 60)) < 0.3, np.zeros((40, 60), bool)]
    masks[1][5:30, 10:50], masks[1][10:20, 15:25] = True, False  # with a hole
    labels = coco_file(tmp_path / "labels.json", masks)
    cut_chips([scene_path], labels, tmp_path / "whole", chip_size=0)
    (chip,) = index_of(tmp_path / "whole")["chips"]
    for found, mask in zip(masks_of(chip), masks, strict=True):
        np.testing.assert_array_equal(found, mask)
    cut_chips([scene_path], labels, tmp_path / "tiles", chip_size=24, overlap=8)
    for chip in index_of(tmp_path / "tiles")["chips"]:
        frame = slice(chip["y"], chip["y"] + 24), slice(chip["x"], chip["x"] + 24)
        for found, box in zip(masks_of(chip), chip["boxes"], strict=True):
            mask = masks[0] if box[2] > 45 else masks[1]
            np.testing.assert_array_equal(found, mask[frame])
    # At half the resolution the shapes stay: areas are a quarter, holes are holes.
    cut_chips([scene_path], labels, tmp_path / "coarse", chip_size=0, gsd_m=20)
    (chip,) = index_of(tmp_path / "coarse")["chips"]
    assert masks_of(chip)[1].sum() == pytest.approx(masks[1].sum() / 4, rel=0.06)


def test_outlines_of_a_layer_have_holes_and_parts(tmp_path, scene_path):
    def square(x, y, side):
        return np.array([[x, y], [x + side, y], [x + side, y + side], [x, y + side]], float)

    to_world = np.array([10, -10]), np.array([500_000, 4_000_400])
    rings = [square(5, 5, 20) * to_world[0] + to_world[1], square(10, 10, 6) * to_world[0] + to_world[1]]
    court = shapely.Polygon(rings[0], [rings[1]])
    twins = shapely.MultiPolygon(shapely.polygons([square(x, 30, 5) * to_world[0] + to_world[1] for x in (30, 40)]))
    geopandas.GeoDataFrame(geometry=[court, twins], crs="EPSG:32630").to_file(tmp_path / "houses.gpkg")
    cut_chips([scene_path], tmp_path / "houses.gpkg", tmp_path / "chips", chip_size=0)
    (chip,) = index_of(tmp_path / "chips")["chips"]
    first, second = masks_of(chip)
    assert first.sum() == 400 - 36 and first[5:25, 5:25].sum() == first.sum() and not first[10:16, 10:16].any()
    assert second.sum() == 50 and second[30:35, 30:35].all() and second[30:35, 40:45].all()


def test_a_mere_box_has_no_outline(tmp_path, scene_path):
    content = {
        "images": [{"id": 0, "file_name": "port.tif"}],
        "categories": [{"id": 1, "name": "ship"}],
        "annotations": [{"id": 0, "image_id": 0, "category_id": 1, "bbox": [3, 4, 10, 5]}],
    }
    (tmp_path / "labels.json").write_text(json.dumps(content))
    cut_chips([scene_path], tmp_path / "labels.json", tmp_path / "chips", chip_size=0)
    (chip,) = index_of(tmp_path / "chips")["chips"]
    assert chip["boxes"] == [pytest.approx([8, 6.5, 10, 5, 0])] and chip["outlines"] == [[]]


def test_scene_without_crs_takes_pixel_labels(tmp_path):
    path = make_raster(tmp_path / "port.tif", crs=None)
    labels = tmp_path / "labels.gpkg"
    frame = geopandas.GeoDataFrame(geometry=list(shapely.polygons(boxes_to_polygons(SHIPS[:1]))))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pyogrio warns of the missing CRS
        frame.to_file(labels)
    with pytest.warns(NotGeoreferencedWarning):
        cut_chips([path], labels, tmp_path / "chips", chip_size=0)
    np.testing.assert_allclose(index_of(tmp_path / "chips")["chips"][0]["boxes"], SHIPS[:1], atol=1e-5)
    layer_of(boxes_to_polygons(SHIPS)).to_file(tmp_path / "world.gpkg")
    with pytest.warns(NotGeoreferencedWarning), pytest.raises(AnnotationError, match="no CRS"):
        cut_chips([path], tmp_path / "world.gpkg", tmp_path / "b", chip_size=0)


def test_output_is_all_or_nothing(tmp_path, scene_path, layer_path):
    out = tmp_path / "chips"
    cut_chips([scene_path], layer_path, out, chip_size=0)
    before = (out / "chips.json").read_text()
    with pytest.raises(OutputError, match="--overwrite"):
        cut_chips([scene_path], layer_path, out, chip_size=0)
    broken = tmp_path / "broken.tif"
    broken.write_text("no raster")
    with pytest.raises(OSError, match=r"broken\.tif"):
        cut_chips([scene_path, broken], layer_path, out, chip_size=0, overwrite=True)
    assert (out / "chips.json").read_text() == before
    seen = []
    cut_chips(
        [scene_path], layer_path, out, chip_size=24, overlap=0, overwrite=True, progress=lambda *at: seen.append(at)
    )
    assert seen == [(1, 1)] and not (out / "port_0_0.npy").stat().st_mode & 0o111
    assert len(index_of(out)["chips"]) == 6
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["chips"]


def test_overwriting_spares_whatever_is_no_chip(tmp_path, scene_path, layer_path):
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "thesis.txt").write_text("three years")
    with pytest.raises(OutputError, match=r"thesis\.txt"):
        cut_chips([scene_path], layer_path, folder, chip_size=0, overwrite=True)
    with pytest.raises(OutputError, match="no folder of chips"):
        cut_chips([scene_path], layer_path, folder / "thesis.txt", chip_size=0, overwrite=True)
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


def test_layer_without_objects_gives_empty_chips(tmp_path, scene_path):
    empty = tmp_path / "empty.gpkg"
    layer_of([]).to_file(empty)
    summary = cut_chips([scene_path], empty, tmp_path / "chips", chip_size=0, classes=["ship"])
    assert (summary["num_chips"], summary["num_empty_chips"], summary["num_boxes"]) == (1, 1, 0)


def test_labels_of_another_place_are_refused(tmp_path, scene_path):
    far = tmp_path / "far.gpkg"
    layer_of([np.array([[0, 0], [4, 0], [4, 4]]) + 5000]).to_file(far)
    with pytest.raises(AnnotationError, match=r"none of the 1 objects.*CRS"):
        cut_chips([scene_path], far, tmp_path / "chips", chip_size=0)
    assert not (tmp_path / "chips").exists()


def test_refusals(tmp_path, scene_path, layer_path):
    out = tmp_path / "chips"

    def refused(message, *, scenes=(scene_path,), labels=layer_path, error=AnnotationError, **options):
        with pytest.raises(error, match=message) as caught:
            cut_chips(scenes, labels, out, **options)
        assert "\n" not in str(caught.value)

    refused("no scenes", scenes=())
    refused("share the names port", scenes=(scene_path, tmp_path / "b" / "port.tif"))
    refused("does not exist", labels=tmp_path / "absent.gpkg")
    refused("no column 'sort'; its columns: kind", class_column="sort")
    refused("'cargo'.*classes are ship", class_column="kind", classes=["ship"])
    refused("2 classes need --class-column", classes=["ship", "boat"])
    refused("different names", classes=["ship", "ship"])
    refused("overlap", error=ConfigError, chip_size=100, overlap=100)
    gaps = geopandas.read_file(layer_path)
    gaps["kind"] = [None] * len(gaps)
    gaps.to_file(tmp_path / "gaps.gpkg")
    refused("feature 1: no value in 'kind'", labels=tmp_path / "gaps.gpkg", class_column="kind")
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    refused("no geometries", labels=tmp_path / "table.csv")
    (tmp_path / "text.gpkg").write_text("nothing")
    refused("cannot be read", labels=tmp_path / "text.gpkg")
    geopandas.GeoDataFrame(geometry=[shapely.Point(5e5, 4e6)], crs="EPSG:32630").to_file(tmp_path / "points.gpkg")
    refused("holds Point; objects must be polygons", labels=tmp_path / "points.gpkg")
    refused("no image for scene port", labels=coco_file(tmp_path / "a.json", [], names=("other.tif",)))
    refused("two images named 'port'", labels=coco_file(tmp_path / "b.json", [], names=("port.tif", "x/port.png")))
    small = coco_file(tmp_path / "c.json", [])
    small.write_text(small.read_text().replace('"width": 60', '"width": 61'))
    refused("61 x 40 px", labels=small, chip_size=0)
    assert not out.exists()


def test_real_ports(data_dir, tmp_path):
    folder = data_dir / "sen2ships"
    path = folder / "casablanca.tif"
    annotations = json.loads((folder / "annotations.json").read_text())
    image_id = next(image["id"] for image in annotations["images"] if image["file_name"] == path.name)
    number = sum(annotation["image_id"] == image_id for annotation in annotations["annotations"])
    summary = cut_chips([path], folder / "annotations.json", tmp_path / "chips", chip_size=0, gsd_m=4)
    assert summary["num_boxes"] == number
    (chip,) = index_of(tmp_path / "chips")["chips"]
    boxes = np.array(chip["boxes"])
    pixels = np.load(tmp_path / "chips" / chip["file"]).mean(axis=0)
    # Ships are brighter than the median of the scene (water and land) at their centres, most of them.
    centres = pixels[boxes[:, 1].astype(int), boxes[:, 0].astype(int)]
    assert np.median(centres) > np.median(pixels)
