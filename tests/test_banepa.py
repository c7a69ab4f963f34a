"""The bundled building model on the column of Banepa that it never saw: polygons lie on labelled buildings."""

from __future__ import annotations

from pathlib import Path

import geopandas
import numpy as np
import pytest
import rasterio
import shapely

from rtmdet_geo import load_model, predict
from rtmdet_geo.detect import detect_scene

UTM = "EPSG:32645"
LABELS = "banepa_buildings_osm_4326_x386690-386692.geojson"


@pytest.fixture(scope="module")
def left_out(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the western column as one scene."""
    chips = sorted((data_dir / "banepa" / "oam").glob("OAM-386690-*.tif"))  # from north to south
    with rasterio.open(chips[0]) as dataset:
        transform = dataset.transform
    pixels = np.concatenate([read(chip) for chip in chips], axis=1)
    path = tmp_path_factory.mktemp("banepa") / "west.tif"
    profile = {"driver": "GTiff", "count": 3, "dtype": "uint8", "height": pixels.shape[1], "width": pixels.shape[2]}
    with rasterio.open(path, "w", **profile, crs="EPSG:4326", transform=transform, photometric="RGB") as scene:
        scene.write(pixels)
    return path


def read(path: Path) -> np.ndarray:
    with rasterio.open(path) as dataset:
        return np.asarray(dataset.read())


def best_overlaps(labels: geopandas.GeoSeries, found: geopandas.GeoSeries) -> np.ndarray:
    """Return for each label the highest IoU of any polygon found."""
    tree = shapely.STRtree(found.to_numpy())
    best = np.zeros(len(labels))
    for i, j in tree.query(labels.to_numpy()).T:
        one, other = labels.iloc[i], found.iloc[j]
        best[i] = max(best[i], one.intersection(other).area / one.union(other).area)
    return best


def test_buildings_of_the_left_out_column(left_out, data_dir, tmp_path):
    output = tmp_path / "buildings.gpkg"
    result = detect_scene(left_out, output, model="banepa_ins")
    layer = geopandas.read_file(output, layer="detections")
    assert layer.geometry.is_valid.all() and len(layer) == len(result)
    found = layer.to_crs(UTM)
    np.testing.assert_allclose(found["area_m2"], found.geometry.area, rtol=3e-3)
    assert (found["length_m"] >= found["width_m"]).all() and (found["area_m2"] <= 1.01 * found["length_m"] * 999).all()

    with rasterio.open(left_out) as scene:
        seen = shapely.box(*scene.bounds)
    assert shapely.contains(seen.buffer(1e-6), layer.geometry.to_numpy()).all()
    labels = geopandas.read_file(data_dir / "banepa" / LABELS)
    inside = labels[shapely.contains(seen, labels.geometry.to_numpy())].to_crs(UTM).geometry
    overlaps = best_overlaps(inside, found.geometry)
    assert len(inside) > 100 and (overlaps >= 0.5).mean() > 0.6
    # negative control: the same polygons 20 m further east are on the wrong houses
    assert (best_overlaps(inside, found.geometry.translate(20)) >= 0.5).mean() < 0.2


def test_image_and_scene_show_the_same_buildings(left_out):
    with rasterio.open(left_out) as scene:
        pixels, transform = scene.read().transpose(1, 2, 0), scene.transform
    result = detect_scene(left_out, model="banepa_ins", simplify_px=0, score_threshold=0.45)
    layer, gsd = result, (result.attrs["summary"]["gsd_x_m"] * result.attrs["summary"]["gsd_y_m"]) ** 0.5
    found = predict(load_model("banepa_ins"), pixels, gsd=gsd, score_threshold=0.4)
    assert found.masks is not None and len(found) >= len(layer) > 50
    matrix = [transform.a, transform.b, transform.d, transform.e, transform.c, transform.f]
    on_map = geopandas.GeoSeries(
        [shapely.affinity.affine_transform(polygon, matrix) for polygon in found.polygons()], crs="EPSG:4326"
    ).to_crs(UTM)
    overlaps = best_overlaps(layer.geometry.to_crs(UTM), on_map)
    assert (overlaps > 0.75).mean() > 0.9  # an image has one gsd, a scene one per axis: scores and edges feel it
