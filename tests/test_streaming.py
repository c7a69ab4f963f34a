"""Rows of tiles that become final one after the other: the same result whatever the order, and nothing held back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pandas.testing import assert_frame_equal
from synthetic import SHIPS, BlobBackend, draw_ships, make_spec, small_model, write_scene

from rtmdet_geo import tile_loop
from rtmdet_geo.boxes import overlapping_pairs
from rtmdet_geo.cli import cli
from rtmdet_geo.detect import detect_scene
from rtmdet_geo.errors import ConfigError
from rtmdet_geo.journal import TileRecord
from rtmdet_geo.strips import read_tiles
from rtmdet_geo.structures import Detections, StretchSpec
from rtmdet_geo.tile_loop import LiveResults
from rtmdet_geo.tiles import TileGrid

#: px, less than the overlap of 64.
LENGTH, WIDTH = 34.0, 9.0


class GuessingBackend(BlobBackend):
    """Finds blobs, and scores that depend on what it sees of them; of two classes."""

    def _find(self, image: NDArray[np.uint8]) -> Detections:
        found = super()._find(image)
        areas = found.boxes[:, 2] * found.boxes[:, 3]
        scores = (0.4 + 0.5 * ((areas * 7.13) % 1)).astype(np.float32)
        return Detections(found.boxes, scores, (areas > 200).astype(np.int64))


def guesser() -> GuessingBackend:
    return GuessingBackend(make_spec(classes=("boat", "ship"), iou_threshold=0.1))


def scattered(rng: np.random.Generator, number: int, width: int, height: int) -> NDArray[np.float64]:
    """Return ships anywhere, over borders and corners too, some of them touching."""
    boxes = np.zeros((number, 5))
    boxes[:, :2] = rng.uniform(0, (width, height), (number, 2))
    boxes[:, 2], boxes[:, 3] = rng.uniform(10, 60, number), rng.uniform(5, 16, number)
    boxes[:, 4] = rng.uniform(-np.pi / 2, np.pi / 2, number)
    return boxes


def save(path: Path, width: int = 500, height: int = 400, ships: NDArray[np.float64] = SHIPS) -> Path:
    return write_scene(path, draw_ships(width, height, ships))


def comparable(found: geopandas.GeoDataFrame) -> Any:
    return pd.DataFrame(found.drop(columns=["run_id", "geometry"])).assign(wkb=found.geometry.to_wkb())


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_batches_and_the_order_of_tiles_do_not_show(tmp_path_factory, monkeypatch, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 10_000)))
    width, height = data.draw(st.integers(1, 500)), data.draw(st.integers(1, 500))
    folder = tmp_path_factory.mktemp("order")
    scene = save(folder / "a.tif", width=width, height=height, ships=scattered(rng, 25, width, height))
    tiles = {"tile_size": data.draw(st.sampled_from([128, 256])), "overlap": data.draw(st.integers(0, 64))}
    expected = detect_scene(scene, folder / "a.gpkg", model=guesser(), **tiles)

    def shuffled(source: Any, wanted: Any) -> Iterator[Any]:
        order = rng.permutation(len(wanted))
        for index in order:
            yield from read_tiles(source, [wanted[index]])

    with monkeypatch.context() as patch:
        patch.setattr(tile_loop, "read_tiles", shuffled)
        size = data.draw(st.integers(1, 9))
        again = detect_scene(scene, folder / "b.gpkg", model=guesser(), batch_size=size, **tiles)
        live = detect_scene(scene, model=guesser(), batch_size=size, **tiles)
    assert_frame_equal(comparable(again), comparable(expected))
    assert_frame_equal(comparable(live), comparable(expected))
    written = [geopandas.read_file(folder / name, layer="detections") for name in ("a.gpkg", "b.gpkg")]
    assert_frame_equal(comparable(written[1]), comparable(written[0]))
    assert written[0]["id"].tolist() == list(range(1, len(expected) + 1))


def test_no_two_results_of_a_class_overlap(tmp_path):
    from rtmdet_geo.boxes import boxes_to_hboxes
    from rtmdet_geo.nms import rotated_iou_aligned

    ships = scattered(np.random.default_rng(3), 300, 1500, 1500)
    scene = save(tmp_path / "a.tif", width=1500, height=1500, ships=ships)
    for agnostic in (False, True):
        found = detect_scene(scene, model=guesser(), tile_size=128, class_agnostic=agnostic)
        assert len(found) > 100
        boxes = np.array([_box(polygon) for polygon in found.geometry])
        bounds = boxes_to_hboxes(boxes)
        i, j = overlapping_pairs(bounds, bounds)
        labels = found["class_name"].to_numpy()
        pairs = (i < j) & (agnostic | (labels[i] == labels[j]))
        assert rotated_iou_aligned(boxes[i[pairs]], boxes[j[pairs]]).max(initial=0.0) <= 0.1 + 1e-6


def _box(polygon: Any) -> NDArray[np.float64]:
    """Return cx, cy, w, h, angle of a rectangle."""
    a, b, c = (np.array(point) for point in polygon.exterior.coords[:3])
    middle = (a + c) / 2
    return np.array([*middle, np.hypot(*(b - a)), np.hypot(*(c - b)), np.arctan2(*(b - a)[::-1])])


def test_ships_on_borders_and_corners_are_found_once(tmp_path):
    grid = TileGrid(1000, 1000, 256, 64)
    cuts = [grid.core(tile) for tile in grid]
    corners = sorted({(cut.x, cut.y) for cut in cuts if cut.x and cut.y})
    middles = sorted({(cut.x, cut.y + cut.height / 2) for cut in cuts if cut.x})
    places = np.array([*corners, *middles], float)
    for angle in (0.0, 0.7, -np.pi / 2):
        ships = np.concatenate([places, np.tile([LENGTH, WIDTH, angle], (len(places), 1))], axis=1)
        scene = save(tmp_path / "a.tif", width=1000, height=1000, ships=ships)
        found = detect_scene(scene, model=BlobBackend(make_spec()), tile_size=256, overlap=64)
        assert len(found) == len(places)
        centres = np.stack([found.geometry.centroid.x, found.geometry.centroid.y], axis=1)
        expected = np.stack([500_000 + 10 * places[:, 0], 4_500_000 - 10 * places[:, 1]], axis=1)
        distances = np.hypot(*(centres[:, None] - expected[None]).transpose(2, 0, 1))
        assert distances.min(axis=0).max() < 15  # m, at 10 m per px


def test_without_an_output_rows_come_while_the_scene_is_read(tmp_path):
    scene = save(tmp_path / "a.tif", width=400, height=2000, ships=scattered(np.random.default_rng(0), 80, 400, 2000))
    done, seen = [0], []
    found = detect_scene(
        scene,
        model=BlobBackend(make_spec()),
        tile_size=128,
        overlap=32,
        each=lambda features: seen.append((done[0], features)),
        progress=lambda number, total: done.__setitem__(0, number),
    )
    assert seen[0][0] < found.attrs["summary"]["num_tiles"] / 3
    assert [row for _, features in seen for row in features["id"]] == found["id"].tolist()


@pytest.mark.parametrize("output", ["ships.gpkg", None])
def test_what_is_not_collected_is_counted(tmp_path, output):
    scene = save(tmp_path / "a.tif")
    seen: list[int] = []
    target = tmp_path / output if output else None
    whole = detect_scene(scene, model=BlobBackend())
    found = detect_scene(
        scene, target, model=BlobBackend(), collect=False, each=lambda rows: seen.extend(rows["id"].tolist())
    )
    assert len(whole) == 5 and len(found) == 0 and list(found.columns) == list(whole.columns)
    assert found.attrs["summary"]["num_detections"] == 5 and seen == [1, 2, 3, 4, 5]
    assert found.attrs["summary"]["num_by_class"] == {"ship": 5}


@pytest.mark.parametrize("ending", ["png", "html"])
def test_a_preview_shows_all_rows(tmp_path, monkeypatch, ending):
    from rtmdet_geo import detect as pipeline

    shown: list[int] = []
    monkeypatch.setattr(
        pipeline, "write_preview", lambda scene, detections, features, *args, **more: shown.extend(features["id"])
    )
    scene = save(tmp_path / "a.tif")
    settings = {"model": BlobBackend(), "collect": False, "preview": tmp_path / f"a.{ending}", "tile_size": 128}
    detect_scene(scene, tmp_path / "a.gpkg", **settings)
    assert shown == [1, 2, 3, 4, 5]


def test_rows_are_handed_on_in_order_and_forgotten():
    grid = TileGrid(20, 40, 16, 4)
    assert (grid.num_rows, grid.num_cols) == (3, 2)
    rows: list[int] = []
    results = LiveResults(grid, [tile for tile in grid if tile.row], lambda pieces: rows.append(len(pieces)))
    assert rows == [0]  # no tile of the first row is wanted
    for index in (4, 5, 2):
        results.add(TileRecord(index))
        assert len(rows) == 1
    results.add(TileRecord(3))
    assert rows == [0, 0, 0] and results.num_tiles == 4 and not results.pieces


def test_lines_on_stdout_are_those_of_the_file(tmp_path):
    scene, model = save(tmp_path / "a.tif", width=600, height=600), small_model()
    words = ["detect", str(scene), "-m", str(model), "--tile-size", "128", "--overlap", "32", "--score", "0.05", "-q"]
    lines = CliRunner().invoke(cli, [*words, "-o", "-"], catch_exceptions=False)
    file = tmp_path / "a.geojsonl"
    assert CliRunner().invoke(cli, [*words, "-o", str(file)], catch_exceptions=False).exit_code == 0

    def rows(text: str) -> list[Any]:
        import json

        return [
            {**(feature := json.loads(line)), "properties": {**feature["properties"], "run_id": None}}
            for line in text.replace("\x1e", "").splitlines()
        ]

    assert lines.exit_code == 0 and rows(lines.stdout) == rows(file.read_text()) and len(rows(lines.stdout)) > 3


@pytest.mark.parametrize("method", ["soft-nms", "wbf"])
def test_other_methods_of_merging(tmp_path, method):
    ships = scattered(np.random.default_rng(5), 60, 900, 900)
    ships[:, 2] = 120  # px: of many, two tiles see a part each
    scene = save(tmp_path / "a.tif", width=900, height=900, ships=ships)
    tiles = {"tile_size": 128, "overlap": 64}
    found = detect_scene(scene, model=guesser(), merge=method, score_threshold={"boat": 0.6, "*": 0.45}, **tiles)
    plain = detect_scene(scene, model=guesser(), score_threshold={"boat": 0.6, "*": 0.45}, **tiles)
    assert found.attrs["summary"]["parameters"]["merge"] == method
    assert found["score"].tolist() != plain["score"].tolist()
    assert (found["score"] >= np.where(found["class_name"] == "boat", 0.6, 0.45) - 1e-6).all()


def test_masks_have_one_method(tmp_path):
    scene = save(tmp_path / "a.tif")
    engine = BlobBackend(make_spec(kind="mask", architecture="rtmdet_ins_test", stretch=StretchSpec(kind="none")))
    with pytest.raises(ConfigError, match="knows boxes only"):
        detect_scene(Path(scene), model=engine, merge="wbf")
