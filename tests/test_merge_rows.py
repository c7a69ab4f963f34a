"""Merging row by row gives what merging at once gives, and holds a few rows only."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from test_merge import Parts, detections, plant, scenes, stub_detector
from test_stitch import rectangle

from rtmdet_geo.annotations.outlines import Outline, clip_outline, outline_area, transform_outline
from rtmdet_geo.boxes import boxes_to_hboxes, hboxes_to_boxes
from rtmdet_geo.errors import ConfigError
from rtmdet_geo.merge import Merged, merge_survivors, tile_survivors, touches_inner_edge
from rtmdet_geo.merge_methods import MergeMethod
from rtmdet_geo.merge_rows import RowMerger, merge_rows
from rtmdet_geo.nms import rotated_iou
from rtmdet_geo.stitch import Pieces, as_outlines, outline_bounds, outlines_of
from rtmdet_geo.structures import Detections
from rtmdet_geo.tiles import TileGrid


def by_rows(parts: Sequence[Pieces], grid: TileGrid) -> list[list[Pieces]]:
    """Return the parts of each tile row."""
    rows: list[list[Pieces]] = [[] for _ in grid.ys]
    for part in parts:
        if len(part.detections):
            rows[int(part.tile_ids[0]) // grid.num_cols].append(part)
    return rows


def as_set(*yields: Merged) -> list[tuple[object, ...]]:
    """Return all rows, sorted, exact; outlines as their points."""
    rows = []
    for merged in yields:
        found, outlines = merged.detections, outlines_of(merged.detections)
        for i in range(len(merged)):
            points = () if outlines is None else tuple(ring.tobytes() for part in outlines[i] for ring in part)
            numbers = (*found.boxes[i].tolist(), found.scores[i].item(), found.labels[i].item())
            rows.append((*numbers, merged.num_merged[i].item(), merged.on_edge[i].item(), points))
    return sorted(rows)


def random_survivors(grid: TileGrid, seed: int, kind: str, iou_threshold: float, class_aware: bool) -> list[Pieces]:
    """Raw boxes anywhere in the tiles, many beyond the tile's edge, few scores so that ties are common."""
    rng = np.random.default_rng(seed)
    parts = []
    for tile in grid:
        number = int(rng.integers(0, 10))
        size = (rng.uniform(1, 60, number), rng.uniform(1, 30, number))
        angle = rng.uniform(-1.57, 1.57, number) if kind == "rotated" else np.zeros(number)
        x, y = np.round(rng.uniform(0, tile.width, number)), np.round(rng.uniform(0, tile.height, number))
        scores, labels = rng.choice([0.25, 0.5, 0.75, 1.0], number), rng.integers(0, 2, number)
        found = detections(np.column_stack([x, y, *size, angle, scores, labels]).tolist(), kind=kind)
        parts.append(tile_survivors(found, tile, grid, iou_threshold=iou_threshold, class_aware=class_aware))
    return parts


def angle_piece(x0: float, y0: float, x1: float, y1: float, thick: float, turn: int) -> Outline:
    """Return an L whose bounds are given, its bars ``thick`` px, mirrored by the bits of ``turn``."""
    ring = np.array([[x0, y0], [x0 + thick, y0], [x0 + thick, y1 - thick], [x1, y1 - thick], [x1, y1], [x0, y1]], float)
    for axis, total in enumerate((x0 + x1, y0 + y1)):
        if turn >> axis & 1:
            ring[:, axis] = total - ring[:, axis]
    return ((ring,),)


def mask_survivors(grid: TileGrid, seed: int) -> list[Pieces]:
    """What tiles show of L shapes, long ones too; each is cut off where its tile ends."""
    rng = np.random.default_rng(seed)
    objects = []
    for _ in range(int(rng.integers(2, 16))):
        x, y = np.floor(rng.uniform(0, 1, 2) * (grid.width, grid.height)).tolist()
        w, h = rng.integers(8, rng.choice([20, 120])), rng.integers(8, rng.choice([20, 300]))
        corners = (x, y, min(x + w, grid.width + 9), min(y + h, grid.height + 9))
        objects.append(angle_piece(*corners, 4, int(rng.integers(4))))
    labels, parts = rng.integers(0, 2, len(objects)), []
    for index, tile in enumerate(grid):
        shifted = [transform_outline(item, [[1, 0, -tile.x], [0, 1, -tile.y]]) for item in objects]
        clipped = [clip_outline(item, tile.width, tile.height) for item in shifted]
        seen = np.flatnonzero([outline_area(item) >= 4 for item in clipped])
        outlines = as_outlines([transform_outline(clipped[i], [[1, 0, tile.x], [0, 1, tile.y]]) for i in seen])
        boxes = hboxes_to_boxes(outline_bounds(outlines))
        scores = rng.choice(np.float32([0.5, 0.75, 1.0]), len(seen))
        found = Detections(boxes, scores, labels[seen], "scene", "mask", outlines)
        is_cut = touches_inner_edge(boxes, tile, grid, margin=4)
        parts.append(Pieces(found, np.ones(len(seen), np.int64), is_cut, np.full(len(seen), index)))
    return parts


@st.composite
def tall_scenes(draw: st.DrawFn) -> tuple[TileGrid, int]:
    size = (draw(st.integers(20, 200)), draw(st.integers(150, 900)))
    return TileGrid(*size, 64, draw(st.integers(0, 40))), draw(st.integers(0, 2**31))


@settings(deadline=None, max_examples=45)
@given(
    tall_scenes(),
    st.sampled_from(["rotated", "horizontal"]),
    st.sampled_from(["nms", "soft-nms", "wbf"]),
    st.booleans(),
    st.sampled_from([0.0, 0.1, 0.5]),
)
def test_boxes_by_rows_are_boxes_at_once(
    scene: tuple[TileGrid, int], kind: str, method: MergeMethod, class_aware: bool, iou_threshold: float
) -> None:
    grid, seed = scene
    parts = random_survivors(grid, seed, kind, iou_threshold, class_aware)
    options = {"iou_threshold": iou_threshold, "class_aware": class_aware, "method": method}
    at_once = merge_survivors(parts, grid, **options)
    yields = list(merge_rows(by_rows(parts, grid), grid, **options))
    assert as_set(*yields) == as_set(at_once)
    assert all(len(merged) for merged in yields)


@settings(deadline=None, max_examples=25)
@given(tall_scenes(), st.booleans(), st.sampled_from([0.7, 1.0]))
def test_masks_by_rows_are_masks_at_once(scene: tuple[TileGrid, int], class_aware: bool, max_overlap: float) -> None:
    grid, seed = scene
    parts = mask_survivors(grid, seed)
    options = {"iou_threshold": 0.6, "class_aware": class_aware, "max_overlap": max_overlap}
    at_once = merge_survivors(parts, grid, **options)
    assert as_set(*merge_rows(by_rows(parts, grid), grid, **options)) == as_set(at_once)


def test_what_a_joined_mask_goes_past_is_held():
    """A mast joined to its beam two rows further down gets a box over the hut beside it, which NMS then drops."""
    grid = TileGrid(100, 260, tile_size=100, overlap=20)  # tiles at y 0, 80, 160
    hut = rectangle(25, 5, 95, 55)  # nothing that overlaps it reaches below y 60, above which row 2 has no say
    mast, lower = rectangle(10, 5, 20, 100), rectangle(10, 80, 20, 180)
    beam = angle_piece(10, 160, 95, 240, 10, 0)
    rows = [[mask_part(grid, 0, mast, hut)], [mask_part(grid, 1, lower)], [mask_part(grid, 2, beam)]]
    for last, expected in ((rows[2], [0, 0, 1]), ([], [0, 0, 2])):  # IoU of the boxes: 3500 of 19975
        merger = RowMerger(grid, iou_threshold=0.1)
        assert [len(merger.add_row(row)) for row in (rows[0], rows[1], last)] == expected
        assert merger.num_open == 0
    merger = RowMerger(grid, iou_threshold=0.1)  # without the mast the hut is final once row 1 is in
    assert [len(merger.add_row(row)) for row in ([mask_part(grid, 0, hut)], [], [])] == [0, 1, 0]


def test_what_the_box_of_a_joined_mask_covers_is_merged_with_it():
    grid = TileGrid(180, 260, tile_size=100, overlap=20)  # tiles at x 0, 80, y 0, 80, 160
    left, foot = angle_piece(10, 5, 100, 55, 10, 0), rectangle(80, 45, 170, 55)
    above_foot = rectangle(105, 5, 175, 43)  # overlaps no piece, but the box around both: IoU 2470 of 8190
    lower = rectangle(172, 30, 178, 95)  # overlaps the one above, and reaches below y 60
    rows = [[mask_part(grid, 0, left), mask_part(grid, 1, foot, above_foot, lower)], [], []]
    merger = RowMerger(grid, iou_threshold=0.1)
    assert [len(merger.add_row(row)) for row in rows] == [0, 0, 2]


def test_two_joined_masks_meet_by_their_boxes_alone():
    grid = TileGrid(260, 340, tile_size=100, overlap=20)  # tiles at x 0, 80, 160, y 0, 80, 160, 240
    mast, foot = angle_piece(10, 25, 100, 75, 10, 0), rectangle(80, 65, 150, 75)  # box x 10..150, y 25..75
    roof, wall = rectangle(105, 5, 180, 15), angle_piece(160, 5, 250, 60, 10, 3)  # box x 105..250: IoU 1575 of 13400
    step, lower = rectangle(245, 50, 255, 95), rectangle(250, 85, 258, 150)  # lead below y 140
    first = [mask_part(grid, 0, mast), mask_part(grid, 1, foot, roof), mask_part(grid, 2, wall, step)]
    rows = [first, [mask_part(grid, 5, lower)], [], []]
    merger = RowMerger(grid, iou_threshold=0.1)
    assert [len(merger.add_row(row)) for row in rows] == [0, 0, 0, 3]


def mask_part(grid: TileGrid, index: int, *outlines: Outline) -> Pieces:
    """Masks found in one tile, best first."""
    masks, number = as_outlines(list(outlines)), len(outlines)
    boxes = hboxes_to_boxes(outline_bounds(masks))
    found = Detections(boxes, np.float32([0.9, 0.5, 0.5][:number]), np.zeros(number, np.int64), "scene", "mask", masks)
    is_cut = touches_inner_edge(boxes, grid[index], grid, margin=4)
    return Pieces(found, np.ones(number, np.int64), is_cut, np.full(number, index))


@settings(deadline=None, max_examples=15)
@given(scenes())
def test_planted_objects_are_found_exactly_once(scene: tuple[TileGrid, int]) -> None:
    grid, seed = scene
    rng = np.random.default_rng(seed)
    objects = plant(rng, grid.width, grid.height, grid.overlap - 8, 40)
    check_found_once(objects, stub_detector(objects, grid, rng), grid)


def check_found_once(objects: NDArray[np.float64], raw: Parts, grid: TileGrid) -> None:
    parts = [tile_survivors(found, tile, grid, iou_threshold=0.1) for tile, found in raw]
    yields = list(merge_rows(by_rows(parts, grid), grid, iou_threshold=0.1))
    boxes = np.concatenate([np.zeros((0, 5)), *(merged.detections.boxes for merged in yields)])
    assert len(boxes) == len(objects)
    order, expected = np.lexsort(boxes[:, :2].round(1).T), np.lexsort(objects[:, :2].round(1).T)
    assert rotated_iou(boxes[order], objects[expected, :5]).diagonal().min(initial=1) > 0.99


def test_objects_on_every_border_and_corner():
    grid = TileGrid(500, 500, tile_size=128, overlap=40)
    edges = [*grid.xs[1:], *(x + 128 for x in grid.xs[:-1])]
    along = [44.0, *edges]
    rows = [(float(x), float(y), 24, 8, 0.6, 0.8, 0) for x in along for y in along]
    kept: list[tuple[float, ...]] = []
    for row in rows:  # the two edges of an overlap lie 40 px apart: all stay but the ones that meet
        if not kept or rotated_iou([row[:5]], [other[:5] for other in kept]).max() == 0:
            kept.append(row)
    objects = np.array(kept)
    assert len(objects) >= 36
    raw = stub_detector(objects, grid, np.random.default_rng(0))
    assert sum(len(found) for _, found in raw) > 6 * len(objects)  # most are seen by several tiles
    check_found_once(objects, raw, grid)


@settings(deadline=None, max_examples=25)
@given(tall_scenes(), st.sampled_from(["rotated", "horizontal"]), st.sampled_from([0.1, 0.5]))
def test_no_two_of_a_class_overlap_above_the_threshold(
    scene: tuple[TileGrid, int], kind: str, iou_threshold: float
) -> None:
    grid, seed = scene
    parts = random_survivors(grid, seed, kind, iou_threshold, True)
    yields = list(merge_rows(by_rows(parts, grid), grid, iou_threshold=iou_threshold, kind="rotated"))
    boxes = np.concatenate([np.zeros((0, 5)), *(merged.detections.boxes for merged in yields)])
    labels = np.concatenate([np.zeros(0), *(merged.detections.labels for merged in yields)])
    iou = rotated_iou(boxes, boxes) * (labels[:, None] == labels[None])
    np.fill_diagonal(iou, 0)
    assert iou.max(initial=0) <= iou_threshold + 1e-9


def test_open_pieces_do_not_grow_with_the_scene():
    peaks, yields = [], []
    for height in (2_000, 20_000):
        grid = TileGrid(400, height, tile_size=200, overlap=50)
        merger, given, found = RowMerger(grid, iou_threshold=0.1), 0, []
        rng = np.random.default_rng(0)
        for row in range(grid.num_rows):
            parts = []
            for col in range(grid.num_cols):
                boxes = np.c_[rng.uniform(0, 200, (20, 2)), rng.uniform(5, 20, (20, 2)), rng.uniform(-1.5, 1.5, 20)]
                raw = Detections(boxes, rng.uniform(0.1, 1, 20), np.zeros(20))
                parts.append(tile_survivors(raw, grid.tile(row, col), grid, iou_threshold=0.1))
            given += sum(len(part.detections) for part in parts)
            found.append(len(merger.add_row(parts)))
            lowest = boxes_to_hboxes(parts[0].detections.boxes)[:, 3].max()
            assert merger.num_open == 0 or lowest > grid.ys[row]
        peaks.append(merger.peak_open)
        yields.append(np.count_nonzero(found) / len(found))
        assert merger.num_open == 0
    assert peaks[1] < 1.3 * peaks[0] and peaks[1] < given / 15
    assert min(yields) > 0.8  # rows are given out as they become final


def test_a_later_box_that_reaches_too_far_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    grid = TileGrid(100, 1000, tile_size=100, overlap=20)
    rows: list[list[Pieces]] = [[] for _ in grid.ys]
    far = detections([(50, 50, 10, 300, 0, 0.9, 0)])
    rows[5] = [tile_survivors(far, grid[5], grid, iou_threshold=0.1)]
    with caplog.at_level(logging.WARNING):
        (merged,) = merge_rows(rows, grid, iou_threshold=0.1)
    assert len(merged) == 1 and "1 detections reach more than a tile's height" in caplog.text
    caplog.clear()
    rows[5] = [tile_survivors(detections([(50, 5, 10, 160, 0, 0.9, 0)]), grid[5], grid, iou_threshold=0.1)]
    assert len(list(merge_rows(rows, grid, iou_threshold=0.1))) == 1 and not caplog.text


def test_no_rows_too_many_rows_and_masks():
    grid = TileGrid(100, 100, 100, 20)
    assert list(merge_rows([], grid, iou_threshold=0.1)) == []
    assert list(merge_rows([[]], grid, iou_threshold=0.1)) == []
    with pytest.raises(ValueError, match="more than the grid's 1"):
        list(merge_rows([[], []], grid, iou_threshold=0.1))
    part = tile_survivors(detections([(50, 50, 10, 5, 0, 0.9, 0)]), grid[0], grid, iou_threshold=0.1)
    (merged,) = merge_rows([[part]], grid, iou_threshold=0.1)
    np.testing.assert_allclose(merged.detections.boxes, [[50, 50, 10, 5, 0]])
    with pytest.raises(ConfigError, match="'wbf' knows boxes only"):
        list(merge_rows([], grid, iou_threshold=0.1, kind="mask", method="wbf"))
    with pytest.raises(ConfigError, match="'soft-nms' knows boxes only"):
        list(merge_rows([mask_survivors(grid, 1)], grid, iou_threshold=0.1, method="soft-nms"))
