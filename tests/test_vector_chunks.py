"""Features written chunk by chunk: the same file as at once, flat memory, errors of the chunks, pixels of the scene."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import geopandas
import geopandas.testing
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyogrio
import pytest
import shapely
from affine import Affine

from rtmdet_geo import vector_tables
from rtmdet_geo.annotations.coco import read_coco
from rtmdet_geo.annotations.dota import read_dota_objects
from rtmdet_geo.boxes import boxes_to_polygons
from rtmdet_geo.errors import Cancelled, OutputError
from rtmdet_geo.vector import build_features, check_output, parse_crs, write_feature_chunks, write_features
from rtmdet_geo.vector_pixels import SourceImage

TRANSFORM = Affine(10, 0, 600000, 0, -10, 4500000)
CLASSES = ("ship", "small plane")
ENDINGS = (".gpkg", ".fgb", ".shp", ".shp.zip", ".parquet", ".geojson", ".geojsonl", ".csv")
BOXES = np.array([[100, 200, 20, 5, 0.4], [300, 400, 12, 4, -0.7], [500, 60, 9, 3, 1.5]])


def features(boxes: np.ndarray = BOXES, crs: str | None = "EPSG:32630", **options: Any) -> geopandas.GeoDataFrame:
    number = len(boxes)
    return build_features(
        boxes,
        np.linspace(0.9, 0.3, number),
        np.arange(number) % 2,
        np.ones(number, int),
        np.zeros(number, bool),
        transform=TRANSFORM,
        crs=crs,
        classes=CLASSES,
        gsd_m=10.0,
        scene_id="scene",
        acquired_at="2024-05-06T07:08:09.123Z",
        **options,
    )


def read(path: Path) -> geopandas.GeoDataFrame:
    frame = geopandas.read_parquet(path) if path.suffix == ".parquet" else geopandas.read_file(path)
    return frame.sort_values("id", ignore_index=True)


def image_of(crs: str | None = "EPSG:32630") -> SourceImage:
    return SourceImage("scene.tif", 640, 480, CLASSES, TRANSFORM, parse_crs(crs))


@pytest.mark.parametrize("geometry_type", ["Polygon", "MultiPolygon"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_chunks_make_the_file_that_one_frame_makes(tmp_path: Path, ending: str, geometry_type: Any) -> None:
    frame = features()
    parts = [frame[:0], frame[:1], frame[1:1], frame[1:]]
    whole, chunked = tmp_path / f"whole{ending}", tmp_path / f"chunked{ending}"
    write_features(frame, whole, geometry_type=geometry_type, metadata={"model": "tiny"})
    assert write_feature_chunks(iter(parts), chunked, geometry_type=geometry_type, metadata={"model": "tiny"}) == 3
    geopandas.testing.assert_geodataframe_equal(read(whole), read(chunked))
    if ending in (".geojson", ".geojsonl", ".csv"):
        assert whole.read_bytes() == chunked.read_bytes()


@pytest.mark.parametrize("ending", [".gpkg", ".fgb", ".parquet", ".geojson", ".coco.json"])
def test_metadata_known_after_the_last_chunk(tmp_path: Path, ending: str) -> None:
    counts: list[int] = []

    def chunks() -> Iterator[geopandas.GeoDataFrame]:
        for frame in (features(), features(BOXES[:2])):
            yield frame
            counts.append(len(frame))

    path = tmp_path / f"ships{ending}"
    assert write_feature_chunks(chunks(), path, metadata=lambda: {"counts": list(counts)}, image=image_of()) == 5
    if ending in (".gpkg", ".fgb"):
        stored = json.loads(pyogrio.read_info(path)["layer_metadata"]["counts"])
    elif ending == ".parquet":
        stored = json.loads(pq.read_schema(path).metadata[b"rtmdet_geo"])["counts"]
    else:
        about = json.loads(path.read_text())
        stored = about["metadata" if ending == ".geojson" else "info"]["counts"]
    assert stored == [3, 2]
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("error", [Cancelled("stop"), KeyboardInterrupt(), ZeroDivisionError("odd"), ValueError("bad")])
@pytest.mark.parametrize("ending", [*ENDINGS, ".txt", ".coco.json"])
def test_what_a_chunk_raises_is_raised_and_the_old_file_stays(tmp_path: Path, ending: str, error: Any) -> None:
    path = tmp_path / f"ships{ending}"
    write_features(features(), path, image=image_of())
    before = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}

    def chunks() -> Iterator[geopandas.GeoDataFrame]:
        yield features()
        raise error

    with pytest.raises(type(error)) as caught:
        write_feature_chunks(chunks(), path, overwrite=True, image=image_of(), metadata=dict)
    assert caught.value is error
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == before


@pytest.mark.parametrize("ending", [".gpkg", ".csv"])
def test_chunks_are_of_one_layer(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"ships{ending}"
    with pytest.raises(ValueError, match="no chunk"):
        write_feature_chunks([], path)
    for other in (features(crs="EPSG:32631"), features().drop(columns="score")):
        with pytest.raises(ValueError, match="unlike the first"):
            write_feature_chunks([features(), other], path)
    assert os.listdir(tmp_path) == []


def test_geoparquet_speaks_of_all_chunks(tmp_path: Path) -> None:
    mask = np.array([shapely.MultiPolygon([shapely.box(0, 0, 5, 5), shapely.box(9, 9, 12, 12)])], object)
    second = features(BOXES[:1], polygons=mask)
    path = tmp_path / "ships.parquet"
    write_feature_chunks([features(), second], path)
    column = json.loads(pq.read_table(path).schema.metadata[b"geo"])["columns"]["geometry"]
    assert column["geometry_types"] == ["MultiPolygon", "Polygon"]
    assert column["bbox"] == shapely.total_bounds([*features().geometry, *second.geometry]).tolist()
    assert column["orientation"] == "counterclockwise"
    turned = features()
    turned.geometry = shapely.reverse(turned.geometry.array)
    write_feature_chunks([features(), turned], path, overwrite=True)
    assert "orientation" not in json.loads(pq.read_schema(path).metadata[b"geo"])["columns"]["geometry"]


@pytest.mark.parametrize("ending", [*ENDINGS, ".txt", ".coco.json"])
def test_memory_holds_few_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    monkeypatch.setattr(vector_tables, "_GROUP_ROWS", 7)  # two groups of a Parquet file wait for no more than these
    chunk = features()
    alive: list[weakref.ref[Any]] = []
    most, most_bytes = 0, 0

    def chunks() -> Iterator[geopandas.GeoDataFrame]:
        nonlocal most, most_bytes
        for _ in range(40):
            frame = chunk.copy()
            alive.append(weakref.ref(frame))
            yield frame
            del frame
            most = max(most, sum(ref() is not None for ref in alive))
            most_bytes = max(most_bytes, pa.total_allocated_bytes() - before)

    before = pa.total_allocated_bytes()
    assert write_feature_chunks(chunks(), tmp_path / f"a{ending}", image=image_of(), metadata=dict) == 120
    assert 1 <= most <= 3
    assert most_bytes < 500_000  # a chunk has some kB as Arrow has it, Parquet's buffers some more


# Pixels of the scene


@pytest.mark.parametrize("crs,dst_crs", [("EPSG:32630", None), ("EPSG:32630", "EPSG:4326"), (None, None)])
def test_dota_is_read_back_in_pixels(tmp_path: Path, crs: str | None, dst_crs: str | None) -> None:
    path = tmp_path / "ships.txt"
    assert write_feature_chunks([features(BOXES[:0], crs=crs, dst_crs=dst_crs)], path, image=image_of(crs)) == 0
    assert path.read_text() == "" and len(read_dota_objects(path)) == 0
    write_features(features(crs=crs, dst_crs=dst_crs), path, image=image_of(crs), overwrite=True)
    found = read_dota_objects(path)
    assert found.class_names == ("ship", "small-plane", "ship") and found.difficult == ("0", "0", "0")
    for corners, expected in zip(found.corners.reshape(-1, 4, 2), boxes_to_polygons(BOXES), strict=True):
        distance = np.linalg.norm(corners[:, None] - expected, axis=2)
        assert distance.min(axis=1).max() < 2e-3 and distance.min(axis=0).max() < 2e-3


def test_dota_of_a_mask_is_its_smallest_rectangle(tmp_path: Path) -> None:
    mask = np.array([shapely.Polygon([(10, 10), (30, 10), (30, 15), (20, 20), (10, 20)])], object)
    path = tmp_path / "ships.txt"
    write_features(features(BOXES[:1], polygons=mask), path, image=image_of())
    corners = read_dota_objects(path).corners.reshape(4, 2)
    assert sorted(corners.tolist()) == [[10, 10], [10, 20], [30, 10], [30, 20]]


def test_coco_is_read_back_in_pixels(tmp_path: Path) -> None:
    path = tmp_path / "ships.coco.json"
    box = np.array([[50, 40, 20, 10, 0.0]])
    write_features(features(box, dst_crs="EPSG:4326"), path, image=image_of(), metadata={"model": "tiny"})
    content = json.loads(path.read_text())
    (entry,) = content["annotations"]
    assert entry["bbox"] == [40, 35, 20, 10] and entry["area"] == 200 and entry["score"] == 0.9
    assert sorted(zip(entry["segmentation"][0][::2], entry["segmentation"][0][1::2], strict=True)) == [
        (40, 35),
        (40, 45),
        (60, 35),
        (60, 45),
    ]
    assert content["info"] == {"description": "detections", "model": "tiny"}
    labels = read_coco(path)
    assert [image["file_name"] for image in labels.images.values()] == ["scene.tif"]
    assert list(labels.categories.values()) == list(CLASSES) and len(labels.objects) == 1
    write_features(features(BOXES[:0]), path, image=image_of(), overwrite=True)
    assert json.loads(path.read_text())["annotations"] == []


def test_pixels_want_their_scene(tmp_path: Path) -> None:
    for name, driver in (("a.txt", None), ("a.coco.json", None), ("a.json", "coco"), ("a.dat", "DOTA")):
        for action in (check_output, lambda path, driver: write_features(features(), path, driver=driver)):
            with pytest.raises(OutputError, match="pixels of one scene"):
                action(tmp_path / name, driver=driver)
        check_output(tmp_path / name, driver=driver, has_image=True)
    assert os.listdir(tmp_path) == []
