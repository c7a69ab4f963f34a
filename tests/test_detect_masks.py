"""Instances through the pipeline: polygons lie on the objects, hold their holes, and show no tile borders."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import cv2
import geopandas
import numpy as np
import pytest
import shapely
from blob_masks import BlobMaskBackend
from synthetic import GROUND, SHIP, TRANSFORM, make_spec, write_scene

from rtmdet_geo import detect as pipeline
from rtmdet_geo.detect import detect_scene
from rtmdet_geo.structures import Detections


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> BlobMaskBackend:
    backend = BlobMaskBackend()
    monkeypatch.setattr(pipeline, "open_backend", lambda path, **options: backend)
    monkeypatch.setattr(pipeline, "find_model", lambda model: Path(__file__))
    return backend


def paint() -> tuple[np.ndarray, list[shapely.Polygon]]:
    """Return a grey image and the polygons (px) painted in it: one longer than tiles, one with a court, small ones."""
    road = np.array([[40, 100], [560, 180], [560, 230], [300, 190], [300, 330], [240, 330], [240, 180], [40, 150]])
    court = shapely.Polygon(
        [(80, 250), (200, 250), (200, 370), (80, 370)], [[(110, 280), (170, 280), (170, 340), (110, 340)]]
    )
    houses = [shapely.box(x, y, x + 32, y + 24) for x in (400, 480, 560) for y in (280, 340)]
    shapes = [shapely.Polygon(road), court, *houses]
    image = np.full((400, 640), GROUND, np.uint8)
    for shape in shapes:
        rings = [np.array(ring.coords) for ring in (shape.exterior, *shape.interiors)]
        # a pixel belongs to a shape if its centre lies inside
        cv2.fillPoly(image, [np.rint((ring - 0.5) * 256).astype(np.int32) for ring in rings], SHIP, shift=8)
    return image, shapes


def to_pixels(geometry: shapely.Geometry) -> shapely.Geometry:
    return shapely.transform(geometry, lambda points: (points - [TRANSFORM.c, TRANSFORM.f]) / [10.0, -10.0])


def iou(first: shapely.Geometry, second: shapely.Geometry) -> float:
    return float(first.intersection(second).area / first.union(second).area)


@pytest.mark.parametrize(("tile_size", "overlap"), [(640, 64), (256, 64), (192, 64), (160, 96)])
def test_one_valid_polygon_an_object_whatever_the_grid(engine, tmp_path, tile_size, overlap):
    image, shapes = paint()
    scene, output = write_scene(tmp_path / "town.tif", image), tmp_path / "town.gpkg"
    result = detect_scene(scene, output, tile_size=tile_size, overlap=overlap)
    layer = geopandas.read_file(output, layer="detections")
    assert len(result) == len(layer) == len(shapes)
    assert layer.geometry.is_valid.all() and set(layer.geom_type) == {"MultiPolygon"}
    for shape in shapes:
        overlaps = [iou(to_pixels(geometry), shape) for geometry in layer.geometry]
        # features have one cell per 8 px: corners are rounded by some pixels, which small shapes feel
        assert max(overlaps) > (0.9 if shape.area > 2000 else 0.8), shape
        assert sum(value > 0.05 for value in overlaps) == 1, "cut or doubled"
    court = layer.geometry.iloc[int(np.argmax([iou(to_pixels(item), shapes[1]) for item in layer.geometry]))]
    (part,) = court.geoms
    assert len(part.interiors) == 1
    assert shapely.Polygon(part.interiors[0]).area == pytest.approx(60 * 60 * 100, rel=0.15)


def test_pieces_are_joined_only_where_masks_agree(engine, monkeypatch, tmp_path):
    """Negative control: without joining, the road comes as pieces."""
    image, shapes = paint()
    scene = write_scene(tmp_path / "town.tif", image)
    monkeypatch.setattr("rtmdet_geo.merge.stitch", lambda pieces, grid, class_aware: pieces)
    assert len(detect_scene(scene, tile_size=192, overlap=64)) > len(shapes)


def test_attributes_come_from_the_mask(engine, tmp_path):
    angle, (w, h) = np.deg2rad(30.0), (120.0, 40.0)
    image = np.full((256, 256), GROUND, np.uint8)
    cv2.fillPoly(image, [np.rint(cv2.boxPoints(((128, 128), (w, h), 30.0)) * 256).astype(np.int32)], SHIP, shift=8)
    layer = detect_scene(write_scene(tmp_path / "barn.tif", image))
    assert len(layer) == 1
    row = layer.iloc[0]
    assert row["length_m"] == pytest.approx(w * 10, rel=0.06) and row["width_m"] == pytest.approx(h * 10, rel=0.12)
    assert row["area_m2"] == pytest.approx(w * h * 100, rel=0.05)
    assert row["area_m2"] == pytest.approx(row.geometry.area, rel=2e-3)  # UTM's scale there is within a thousandth
    assert row["azimuth_deg"] == pytest.approx(90 + np.rad2deg(angle), abs=2)  # px y points south
    centre = row.geometry.centroid
    assert np.hypot(centre.x - TRANSFORM.c - 1280, centre.y - TRANSFORM.f + 1280) < 20


def test_simplification_moves_edges_by_no_more_than_it_says(engine, tmp_path):
    image, _ = paint()
    scene = write_scene(tmp_path / "town.tif", image)
    exact = detect_scene(scene, simplify_px=0)
    on_grid = shapely.get_coordinates(to_pixels(np.asarray(exact.geometry)))
    np.testing.assert_allclose(on_grid, np.rint(on_grid), atol=1e-6)
    for tolerance in (1.0, 3.0):
        simple = detect_scene(scene, simplify_px=tolerance)
        assert simple.attrs["summary"]["parameters"]["simplify_px"] == tolerance
        corners = shapely.get_num_coordinates(simple.geometry)
        assert (corners < shapely.get_num_coordinates(exact.geometry)).all()
        for one, other in zip(exact.geometry, simple.geometry, strict=True):
            assert shapely.hausdorff_distance(one.boundary, other.boundary) <= tolerance * 10 + 1e-6


def test_geojson_keeps_holes_and_parts(engine, tmp_path):
    image, _ = paint()
    output = tmp_path / "town.geojson"
    detect_scene(write_scene(tmp_path / "town.tif", image), output)
    features = json.loads(output.read_text())["features"]
    assert max(len(item["geometry"]["coordinates"]) for item in features if item["geometry"]["type"] == "Polygon") == 2
    assert geopandas.read_file(output, layer="detections").geometry.is_valid.all()


def test_without_crs_polygons_are_in_source_pixels(engine, tmp_path):
    image, shapes = paint()
    with pytest.warns(UserWarning):
        layer = detect_scene(write_scene(tmp_path / "town.tif", image, crs=None))
    assert all(max(iou(found, shape) for found in layer.geometry) > 0.8 for shape in shapes)
    assert layer["area_m2"].isna().all()


def test_objects_without_a_mask_are_left_out_and_nothing_is_fine(engine, tmp_path):
    image = np.full((256, 256), GROUND, np.uint8)
    image[100:102, 100:102] = SHIP  # far less than half a cell: every pixel of its mask is below one half
    assert len(detect_scene(write_scene(tmp_path / "speck.tif", image))) == 0
    image[:] = GROUND
    output = tmp_path / "empty.gpkg"
    assert len(detect_scene(write_scene(tmp_path / "empty.tif", image), output)) == 0
    assert len(geopandas.read_file(output, layer="detections")) == 0


@pytest.mark.parametrize(("tile_size", "overlap"), [(640, 64), (192, 64)])
def test_preview_draws_outlines_not_boxes_and_no_tiles(engine, tmp_path, tile_size, overlap):
    image, _ = paint()
    picture = tmp_path / "town.png"
    scene = write_scene(tmp_path / "town.tif", image)
    detect_scene(scene, preview=picture, tile_size=tile_size, overlap=overlap)
    drawn = cv2.imread(str(picture))[:400].astype(int)
    coloured = np.ptp(drawn, axis=2) > 60
    assert coloured[245:256, 90:190].any()  # the court's wall
    assert coloured[275:286, 120:160].any()  # and its hole's
    assert not coloured[300:320, 130:150].any()
    assert not coloured[200:320, 260:280].any() and not coloured[130:145, 60:160].any()  # inside the road


def test_horizontal_boxes_have_no_azimuth(monkeypatch, tmp_path):
    class Boxes(BlobMaskBackend):
        def _find(self, image):
            found = super()._find(image)
            return type(found)(found.boxes, found.scores, found.labels, "tile", "horizontal")

    backend = Boxes(make_spec(kind="horizontal", architecture="rtmdet_test", iou_threshold=0.65))
    monkeypatch.setattr(pipeline, "open_backend", lambda path, **options: backend)
    monkeypatch.setattr(pipeline, "find_model", lambda model: Path(__file__))
    image, shapes = paint()
    output = tmp_path / "town.gpkg"
    detect_scene(write_scene(tmp_path / "town.tif", image), output, tile_size=640)
    layer = geopandas.read_file(output, layer="detections")
    assert len(layer) == len(shapes) and layer["azimuth_deg"].isna().all()
    assert set(layer.geom_type) == {"Polygon"}
    for shape in shapes:
        assert max(iou(to_pixels(found), shapely.box(*shape.bounds)) for found in layer.geometry) > 0.9


@pytest.mark.parametrize("tta", ["flips", "all"])
def test_augmented_masks_lie_on_the_objects(engine, tmp_path, tta):
    image, shapes = paint()
    layer = detect_scene(write_scene(tmp_path / "town.tif", image), tile_size=256, overlap=64, tta=tta)
    assert len(layer) == len(shapes) and layer.geometry.is_valid.all()
    for shape in shapes:
        overlaps = [iou(to_pixels(geometry), shape) for geometry in layer.geometry]
        assert max(overlaps) > 0.8 and sum(value > 0.05 for value in overlaps) == 1


def test_masks_end_where_data_end(engine, tmp_path):
    image, shapes = paint()
    image[:, :100] = 0  # no data there; the engine below sees the court whole all the same
    shown = paint()[0]

    class Extrapolating(BlobMaskBackend):
        def run(self, batches, *, score_threshold, multi_label=False):
            for images in batches:
                yield [self._find(np.pad(shown, ((0, images.shape[2] - 400), (0, 0))))]

    pipeline_engine = Extrapolating(make_spec(kind="mask", architecture="rtmdet_ins_test", tile_size=640))
    scene = write_scene(tmp_path / "town.tif", image, nodata=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "open_backend", lambda path, **options: pipeline_engine)
        layer = detect_scene(scene)
    found = [to_pixels(geometry) for geometry in layer.geometry]
    assert min(geometry.bounds[0] for geometry in found) >= 100 - 1e-6
    assert max(iou(geometry, shapes[1]) for geometry in found) > 0.6  # the court lost its western strip only


def test_max_overlap_decides_what_lies_in_another(engine, monkeypatch, tmp_path):
    image, shapes = paint()
    scene = write_scene(tmp_path / "town.tif", image)
    whole = engine._find

    def with_parts(picture):
        found = whole(picture)
        parts = dataclasses.replace(found, boxes=found.boxes * [1, 1, 0.5, 1, 1], scores=found.scores - 0.1)
        return Detections.concatenate([found, parts], "tile", "mask")

    monkeypatch.setattr(engine, "_find", with_parts)
    both = detect_scene(scene, tile_size=640, max_overlap=1)
    one = detect_scene(scene, tile_size=640, classes="ship")
    assert len(one) == len(shapes) < len(both)
    assert one.attrs["summary"]["parameters"]["max_overlap"] == 0.7
    assert one.attrs["summary"]["parameters"]["classes"] == ["ship"]
