"""Border rule and merge: planted objects give the same result whatever the grid."""

from __future__ import annotations

import subprocess
import sys

import cv2
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from rtmdet_geo.boxes import boxes_to_hboxes, boxes_to_polygons, overlapping_pairs, polygons_to_boxes
from rtmdet_geo.merge import (
    drop_cut_detections,
    merge_detections,
    merge_survivors,
    to_scene,
    touches_inner_edge,
)
from rtmdet_geo.nms import rotated_iou
from rtmdet_geo.stitch import Pieces, as_outlines
from rtmdet_geo.structures import Detections, Tile
from rtmdet_geo.tiles import TileGrid

Parts = list[tuple[Tile, Detections]]


def detections(rows: list[tuple[float, ...]], *, kind: str = "rotated", frame: str = "tile") -> Detections:
    """Rows of cx, cy, w, h, angle, score, label."""
    array = np.array(rows, np.float64).reshape(-1, 7)
    return Detections(array[:, :5], array[:, 5], array[:, 6], frame, kind)


def plant(rng: np.random.Generator, width: int, height: int, longest: float, number: int) -> NDArray[np.float64]:
    """Return (N, 7) objects inside the scene that keep apart from each other."""
    rows: list[NDArray[np.float64]] = []
    for _ in range(number):
        w = rng.uniform(min(8, longest / 2), longest / 1.1)
        h = w * rng.uniform(0.2, 0.5)
        row = np.array([rng.uniform(0, width), rng.uniform(0, height), w, h, rng.uniform(-1.57, 1.57), 0, 0])
        (bounds,) = boxes_to_hboxes(row[None, :5])
        if bounds[0] < 3 or bounds[1] < 3 or bounds[2] > width - 3 or bounds[3] > height - 3:
            continue
        if rows and rotated_iou(row[None, :5] + [0, 0, 6, 6, 0], np.array(rows)[:, :5]).max() > 0:
            continue
        rows.append(row)
    objects = np.array(rows).reshape(-1, 7)
    objects[:, 5] = rng.uniform(0.6, 0.95, len(objects))
    objects[:, 6] = rng.integers(0, 3, len(objects))
    return objects


def stub_detector(objects: NDArray[np.float64], grid: TileGrid, rng: np.random.Generator) -> Parts:
    """See what a tile shows of each object: the whole box, or the rectangle around the visible part, even when tiny.

    A fragment may score higher than the whole; every object comes with jittered duplicates of lower score.
    """
    parts = []
    polygons, bounds = boxes_to_polygons(objects[:, :5]), boxes_to_hboxes(objects[:, :5])
    for tile in grid:
        rows = []
        frame = np.array([[0, 0], [tile.width, 0], [tile.width, tile.height], [0, tile.height]], np.float32)
        low, high = (tile.x, tile.y), (tile.x + tile.width, tile.y + tile.height)
        near = ((bounds[:, 2:] > low) & (bounds[:, :2] < high)).all(axis=1)
        for row, polygon in zip(objects[near], polygons[near] - low, strict=True):
            whole = (polygon >= 0).all() and (polygon <= (tile.width, tile.height)).all()
            box, score = row[:5] - (tile.x, tile.y, 0, 0, 0), row[5]
            if not whole:
                area, visible = cv2.intersectConvexConvex(polygon.astype(np.float32), frame)
                if area < 4:
                    continue
                (left, top), (right, bottom) = visible.reshape(-1, 2).min(axis=0), visible.reshape(-1, 2).max(axis=0)
                (box,) = polygons_to_boxes(np.array([[[left, top], [right, top], [right, bottom], [left, bottom]]]))
                score = min(0.99, score * rng.uniform(0.5, 1.3))
            rows.append((*box, score, row[6]))
            for _ in range(3):
                # small against the short side too: duplicates reach every IoU threshold in use
                jitter = rng.uniform(-1, 1, 4) * min(0.4, 0.05 * box[3]) * (1, 1, 0.5, 0.5)
                rows.append((*(box[:4] + jitter), box[4], score * rng.uniform(0.3, 0.9), row[6]))
        parts.append((tile, detections(rows)))
    return parts


@st.composite
def scenes(draw: st.DrawFn) -> tuple[TileGrid, int]:
    tile_size = draw(st.integers(48, 160))
    overlap = draw(st.integers(30, max(30, tile_size * 3 // 4)))
    return TileGrid(draw(st.integers(20, 300)), draw(st.integers(20, 300)), tile_size, overlap), draw(
        st.integers(0, 2**31)
    )


@settings(deadline=None, max_examples=40)
@example((TileGrid(56, 38, 48, 30), 854), 0.65)
@given(scenes(), st.sampled_from([0.1, 0.3, 0.65]))
def test_planted_objects_come_back_once_whatever_the_grid(scene: tuple[TileGrid, int], iou_threshold: float) -> None:
    grid, seed = scene
    rng = np.random.default_rng(seed)
    objects = plant(rng, grid.width, grid.height, grid.overlap - 8, 40)
    merged = merge_detections(stub_detector(objects, grid, rng), grid, iou_threshold=iou_threshold)
    assert len(merged) == len(objects)
    order = np.argsort(-objects[:, 5].astype(np.float32), kind="stable")
    np.testing.assert_allclose(merged.detections.boxes, objects[order, :5], atol=1e-3)
    np.testing.assert_array_equal(merged.detections.labels, objects[order, 6])
    assert not merged.on_edge.any()
    assert (merged.num_merged >= 1).all() and (merged.num_merged % 4 == 0).all()  # 4 raw boxes in every tile


@settings(deadline=None, max_examples=30)
@given(scenes(), st.booleans(), st.sampled_from([0.1, 0.5]))
def test_any_detections_order_threshold_and_counts(
    scene: tuple[TileGrid, int], class_aware: bool, iou_threshold: float
) -> None:
    grid, seed = scene
    rng = np.random.default_rng(seed)
    parts = []
    for tile in grid:
        number = int(rng.integers(0, 12))
        rows = np.column_stack(
            [
                rng.uniform(0, tile.width, number),
                rng.uniform(0, tile.height, number),
                rng.uniform(1, 90, number),
                rng.uniform(1, 30, number),
                rng.uniform(-1.57, 1.57, number),
                rng.choice([0.25, 0.5, 0.75, 1.0], number),  # ties
                rng.integers(0, 2, number),
            ]
        )
        parts.append((tile, detections(rows.tolist())))
    merged = merge_detections(parts, grid, iou_threshold=iou_threshold, class_aware=class_aware)
    shuffled = [
        (tile, part.select(rng.permutation(len(part))))
        for tile, part in (parts[i] for i in rng.permutation(len(parts)))
    ]
    again = merge_detections(shuffled, grid, iou_threshold=iou_threshold, class_aware=class_aware)
    for name in ("boxes", "scores", "labels"):
        np.testing.assert_array_equal(getattr(merged.detections, name), getattr(again.detections, name))
    np.testing.assert_array_equal(merged.num_merged, again.num_merged)
    np.testing.assert_array_equal(merged.on_edge, again.on_edge)

    found = merged.detections
    assert found.frame == "scene" and found.boxes.dtype == np.float64
    assert (np.diff(found.scores) <= 0).all()
    iou = rotated_iou(found.boxes, found.boxes)
    np.fill_diagonal(iou, 0)
    if class_aware:
        iou[found.labels[:, None] != found.labels[None]] = 0
    assert iou.max(initial=0) < iou_threshold + 1e-9
    assert merged.num_merged.sum() <= sum(len(part) for _, part in parts)
    if len(grid) == 1:
        assert merged.num_merged.sum() == len(parts[0][1])


def test_cut_object_is_taken_from_the_tile_that_sees_it_whole() -> None:
    grid = TileGrid(180, 100, tile_size=100, overlap=20)  # tiles at x 0 and 80; object x 90..110
    fragment = detections([(95, 50, 10, 6, 0, 0.99, 0)])
    whole = detections([(20, 50, 20, 6, 0, 0.5, 0)])
    merged = merge_detections([(grid[0], fragment), (grid[1], whole)], grid, iou_threshold=0.1)
    np.testing.assert_allclose(merged.detections.boxes, [[100, 50, 20, 6, 0]])
    assert merged.num_merged.tolist() == [1]  # the fragment is not part of the count
    # negative control: without the border rule the fragment, of higher score, suppresses the whole
    merged = merge_detections([(grid[0], fragment), (grid[1], whole)], grid, iou_threshold=0.1, margin=-1e9)
    np.testing.assert_allclose(merged.detections.boxes, [[95, 50, 10, 6, 0]])


def test_duplicates_of_a_dropped_fragment_go_with_it() -> None:
    grid = TileGrid(180, 100, tile_size=100, overlap=20)
    fragment = detections([(95, 50, 10, 6, 0, 0.9, 0), (92, 50, 8, 6, 0, 0.4, 0)])  # the second ends 4 px off the edge
    merged = merge_detections([(grid[0], fragment)], grid, iou_threshold=0.3)
    assert len(merged) == 0


def test_corner_object_is_taken_from_the_one_tile_of_four() -> None:
    grid = TileGrid(180, 180, tile_size=100, overlap=20)
    rng = np.random.default_rng(0)
    objects = np.array([[90, 90, 10, 5, 0.7, 0.8, 0], [104, 104, 14, 5, -0.7, 0.7, 0]])
    merged = merge_detections(stub_detector(objects, grid, rng), grid, iou_threshold=0.1)
    np.testing.assert_allclose(merged.detections.boxes, objects[:, :5], atol=1e-4)
    assert merged.num_merged.tolist() == [16, 4]  # seen by four tiles, and by the last one only


def test_object_longer_than_the_overlap_is_kept() -> None:
    grid = TileGrid(180, 100, tile_size=100, overlap=20)  # object x 30..150, no tile sees it whole
    left, right = detections([(65, 50, 70, 10, 0, 0.8, 0)]), detections([(35, 50, 70, 10, 0, 0.9, 0)])
    kept = drop_cut_detections(left, grid[0], grid)
    assert len(kept) == 1 and len(drop_cut_detections(right, grid[1], grid)) == 1
    merged = merge_detections([(grid[0], left), (grid[1], right)], grid, iou_threshold=0.1)
    np.testing.assert_allclose(merged.detections.boxes, [[115, 50, 70, 10, 0]])  # halves overlap by 20 of 120
    assert merged.num_merged.tolist() == [2]
    assert len(merge_detections([(grid[0], left), (grid[1], right)], grid, iou_threshold=0.3)) == 2


def test_fragment_inside_a_larger_box_of_another_tile_gives_way() -> None:
    grid = TileGrid(260, 100, tile_size=100, overlap=60)  # x 0, 40, 80, 120, 160
    whole = detections([(50, 50, 96, 10, 0, 0.4, 0)])  # x 42..138: whole in tile 1 only, at its inner edges
    fragment = detections([(78, 50, 44, 10, 0, 0.9, 0)])  # x 56..100 of tile 0, with room to spare in tile 1
    wide_fragment = detections([(71, 50, 58, 10, 0, 0.9, 0)])  # x 42..100, too near to tile 1's edge to be dropped
    assert len(drop_cut_detections(fragment, grid[0], grid)) == 0
    assert len(drop_cut_detections(wide_fragment, grid[0], grid)) == 1
    for iou_threshold in (0.1, 0.65):  # IoU is 58 / 96
        merged = merge_detections([(grid[0], wide_fragment), (grid[1], whole)], grid, iou_threshold=iou_threshold)
        np.testing.assert_allclose(merged.detections.boxes, [[90, 50, 96, 10, 0]])
        assert merged.num_merged.tolist() == [2]
    other_class = detections([(71, 50, 58, 10, 0, 0.9, 1)])
    assert len(merge_detections([(grid[0], other_class), (grid[1], whole)], grid, iou_threshold=0.1)) == 2
    blind = merge_detections([(grid[0], other_class), (grid[1], whole)], grid, iou_threshold=0.1, class_aware=False)
    np.testing.assert_allclose(blind.detections.boxes, [[90, 50, 96, 10, 0]])


def test_small_object_inside_a_large_one_stays_when_it_is_whole() -> None:
    grid = TileGrid(200, 100, tile_size=100, overlap=40)
    large, small = (50, 50, 60, 40, 0, 0.9, 0), (50, 50, 10, 5, 0, 0.8, 0)
    assert len(merge_detections([(grid[0], detections([large, small]))], grid, iou_threshold=0.1)) == 2


def test_scene_edge_is_kept_and_flagged() -> None:
    grid = TileGrid(180, 100, tile_size=100, overlap=20)
    left = detections([(5, 50, 10, 6, 0, 0.9, 0), (50, 50, 10, 6, 0, 0.8, 0), (50, 96, 10, 9, 0, 0.7, 0)])
    right = detections([(97, 50, 10, 6, 0, 0.6, 0)])  # goes beyond the scene's right edge
    merged = merge_detections([(grid[0], left), (grid[1], right)], grid, iou_threshold=0.1)
    assert merged.on_edge.tolist() == [True, False, True, True]
    # at the scene's edge and cut by an inner edge: the neighbour's
    corner = detections([(95, 2, 10, 4, 0, 0.9, 0)])
    assert len(drop_cut_detections(corner, grid[0], grid)) == 0


def test_jitter_never_makes_both_tiles_defer() -> None:
    grid = TileGrid(180, 100, tile_size=100, overlap=20)  # overlap x 80..100
    rng = np.random.default_rng(3)
    for length in np.arange(8.0, 24.0):
        for centre in np.arange(80.0, 100.5):
            parts = []
            for tile in grid:
                low, high = max(centre - length / 2 - tile.x, 0), min(centre + length / 2 - tile.x, 100)
                low, high = low + rng.uniform(-0.9, 0.9), high + rng.uniform(-0.9, 0.9)
                if high - low > 2:
                    parts.append((tile, detections([((low + high) / 2, 50, high - low, 4, 0, rng.uniform(), 0)])))
            assert len(merge_detections(parts, grid, iou_threshold=0.1)) >= 1, (length, centre)


def test_horizontal_boxes() -> None:
    grid = TileGrid(100, 100, 100, 20)
    rows = [(50, 50, 10, 20, 0, 0.9, 0), (50, 52, 10, 20, 0, 0.8, 0), (50, 62, 10, 20, 0, 0.7, 0)]
    merged = merge_detections([(grid[0], detections(rows, kind="horizontal"))], grid, iou_threshold=0.65)
    assert merged.detections.kind == "horizontal"
    np.testing.assert_allclose(merged.detections.boxes, [rows[0][:5], rows[2][:5]])
    assert merged.num_merged.tolist() == [2, 1]


def test_nothing_found_wrong_frame_and_mixed_kinds() -> None:
    grid = TileGrid(100, 100, 100, 20)
    for parts in ([], [(grid[0], Detections.empty())]):
        merged = merge_detections(parts, grid, iou_threshold=0.1)
        assert len(merged) == 0 and merged.detections.frame == "scene"
        assert merged.num_merged.dtype == np.int64 and merged.on_edge.dtype == bool
    assert len(drop_cut_detections(Detections.empty(), grid[0], grid)) == 0
    with pytest.raises(ValueError, match="scene px already"):
        to_scene(Detections.empty("scene"), grid[0])
    with pytest.raises(ValueError, match="kinds"):
        merge_detections(
            [(grid[0], Detections.empty()), (grid[0], Detections.empty(kind="horizontal"))], grid, iou_threshold=0.1
        )


def test_to_scene_keeps_float64_far_from_the_origin() -> None:
    tile = Tile(0, 0, x=10**8 + 1, y=7, width=1024, height=1024)
    moved = to_scene(detections([(0.25, 0.5, 4, 2, 0, 0.5, 0)]), tile)
    assert moved.boxes[0, :2].tolist() == [10**8 + 1.25, 7.5] and moved.frame == "scene"


def test_inner_edges_only() -> None:
    grid = TileGrid(180, 100, tile_size=100, overlap=20)
    boxes = np.array([[1, 50, 4, 2, 0], [99, 50, 4, 2, 0], [90, 1, 4, 2, 0]], float)
    assert touches_inner_edge(boxes, grid[0], grid, margin=2).tolist() == [False, True, False]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31), st.integers(0, 60), st.integers(0, 60), st.sampled_from([1.0, 30.0, 3000.0]))
def test_overlapping_pairs_are_all_of_them(seed: int, num_first: int, num_second: int, spread: float) -> None:
    rng = np.random.default_rng(seed)

    def boxes(number: int) -> NDArray[np.float64]:
        low = rng.uniform(-spread, spread, (number, 2))
        return np.concatenate([low, low + rng.choice([0.5, 5, 17, 400], (number, 2)) * rng.uniform(0.5, 1)], axis=1)

    first, second = boxes(num_first), boxes(num_second)
    i, j = overlapping_pairs(first, second)
    expected = [
        (a, b)
        for a in range(num_first)
        for b in range(num_second)
        if (first[a, :2] < second[b, 2:]).all() and (first[a, 2:] > second[b, :2]).all()
    ]
    assert list(zip(i.tolist(), j.tolist(), strict=True)) == expected


def test_merging_loads_no_geospatial_package() -> None:
    code = (
        "import sys, rtmdet_geo.merge; print(sorted({'rasterio', 'shapely', 'geopandas', 'torch'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_time_grows_about_linearly() -> None:
    """Work, not seconds: pairs looked at per box do not grow with the scene at constant density."""
    rng = np.random.default_rng(0)
    ratios = []
    for number in (2000, 16000):
        low = rng.uniform(0, 20 * number**0.5, (number, 2))
        bounds = np.concatenate([low, low + rng.uniform(5, 40, (number, 2))], axis=1)
        ratios.append(len(overlapping_pairs(bounds, bounds)[0]) / number)
    assert ratios[1] < 1.2 * ratios[0]


def mask_pieces(rows: list[tuple[tuple[float, float, float, float], float, int]]) -> list[Pieces]:
    """Rows of (x0, y0, x1, y1), score, tile: what NMS in tiles left, nothing cut."""
    parts = []
    for (x0, y0, x1, y1), score, tile in rows:
        ring = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], float)
        box = np.array([[(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0, 0]])
        found = Detections(box, np.float32([score]), np.zeros(1), "scene", "mask", as_outlines([((ring,),)]))
        parts.append(Pieces(found, np.ones(1, np.int64), np.zeros(1, bool), np.array([tile])))
    return parts


def test_masks_mostly_in_each_other_are_one_object():
    grid = TileGrid(160, 100, tile_size=100, overlap=40)  # tiles at x 0 and 60
    house, half = (62, 20, 98, 60), (62, 20, 98, 40)  # IoU of the boxes is 1/2: NMS keeps both
    for tiles in ((0, 1), (0, 0)):
        parts = mask_pieces([(house, 0.6, tiles[0]), (half, 0.7, tiles[1])])
        merged = merge_survivors(parts, grid, iou_threshold=0.6)
        assert merged.detections.scores.tolist() == [np.float32(0.7)] and merged.num_merged.tolist() == [2]
        assert len(merge_survivors(parts, grid, iou_threshold=0.6, max_overlap=1)) == 2  # as the published evaluation
    apart = [(house, 0.6, 0), ((80, 40, 98, 90), 0.7, 1)]  # 18 x 20 of 18 x 50
    assert len(merge_survivors(mask_pieces(apart), grid, iou_threshold=0.6)) == 2
    assert len(merge_survivors(mask_pieces(apart), grid, iou_threshold=0.6, max_overlap=0.4)) == 1


def test_a_part_does_not_replace_the_whole():
    grid = TileGrid(160, 100, tile_size=100, overlap=40)
    roof, chimney = (5, 5, 95, 95), (40, 40, 50, 50)
    merged = merge_survivors(mask_pieces([(roof, 0.6, 0), (chimney, 0.61, 0)]), grid, iou_threshold=0.6)
    np.testing.assert_allclose(merged.detections.boxes, [[50, 50, 90, 90, 0]])
    assert merged.num_merged.tolist() == [2]
