"""Pieces of one object in neighbouring tiles are joined where their masks agree, and only there."""

from __future__ import annotations

import numpy as np
import pytest

from rtmdet_geo.annotations.outlines import Outline, count_common_pixels, join_outlines
from rtmdet_geo.boxes import hboxes_to_boxes
from rtmdet_geo.stitch import Pieces, as_outlines, contained_share, outlines_of, stitch
from rtmdet_geo.structures import Detections
from rtmdet_geo.tiles import TileGrid

GRID = TileGrid(260, 100, tile_size=100, overlap=20)  # tiles at x 0, 80, 160: strips 80..100 and 160..180


def rectangle(x0: float, y0: float, x1: float, y1: float) -> Outline:
    return ((np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], float),),)


def pieces(*rows: tuple[tuple[float, float, float, float], int], labels: tuple[int, ...] = ()) -> Pieces:
    """Rows of (x0, y0, x1, y1) and the tile that saw it; scores fall."""
    corners = np.array([row[0] for row in rows], float)
    found = Detections(
        hboxes_to_boxes(corners),
        np.linspace(0.9, 0.5, len(rows), dtype=np.float32),
        np.array(labels or [0] * len(rows)),
        "scene",
        "mask",
        as_outlines([rectangle(*row[0]) for row in rows]),
    )
    number = len(rows)
    return Pieces(found, np.arange(1, number + 1), np.ones(number, bool), np.array([row[1] for row in rows]))


def test_a_long_object_over_three_tiles_becomes_one():
    given = pieces(((30, 40, 100, 60), 0), ((80, 40, 180, 60), 1), ((160, 40, 240, 60), 2))
    joined = stitch(given, GRID)
    assert len(joined.detections) == 1
    np.testing.assert_allclose(joined.detections.boxes, [[135, 50, 210, 20, 0]])
    outlines = outlines_of(joined.detections)
    assert outlines is not None and count_common_pixels(outlines[0], outlines[0]) == 210 * 20
    assert joined.counts.tolist() == [6] and joined.detections.scores[0] == np.float32(0.9)
    assert joined.is_cut.tolist() == [False] and (joined.tile_ids < 0).all()


@pytest.mark.parametrize(
    "second",
    [
        ((80, 62, 180, 80), 1),  # below: no common pixel
        ((80, 56, 180, 80), 1),  # touches 4 of 20 rows in the strip: 4 / 40
        ((30, 40, 100, 60), 0),  # the same tile
    ],
)
def test_neighbours_stay_apart(second):
    assert len(stitch(pieces(((30, 40, 100, 60), 0), second), GRID).detections) == 2


def test_classes_and_whole_objects():
    two_classes = pieces(((30, 40, 100, 60), 0), ((80, 40, 180, 60), 1), labels=(1, 0))
    assert len(stitch(two_classes, GRID).detections) == 2
    blind = stitch(two_classes, GRID, class_aware=False)
    assert blind.detections.labels.tolist() == [1]  # the better one's
    whole = pieces(((30, 40, 100, 60), 0), ((80, 40, 180, 60), 1))._replace(is_cut=np.array([True, False]))
    assert stitch(whole, GRID) is whole


def test_shares():
    assert contained_share(rectangle(0, 0, 10, 10), rectangle(5, 0, 20, 10)) == 0.5
    assert contained_share((), rectangle(0, 0, 4, 4)) == 0.0
    joined = join_outlines([rectangle(0, 0, 10, 10), rectangle(5, 0, 15, 10)])
    assert contained_share(joined, joined) == 1.0


def test_a_long_object_costs_its_pieces_and_not_the_scene():
    import tracemalloc

    from rtmdet_geo.polygons import outlines_to_polygons

    tracemalloc.start()
    joined = join_outlines(
        [rectangle(k * 50, k * 50, k * 50 + 60, k * 50 + 60) for k in range(2000)]
    )  # 100,000 px long
    (polygon,) = outlines_to_polygons([joined])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert polygon.geom_type == "Polygon" and polygon.area == pytest.approx(2000 * 3600 - 1999 * 100, rel=1e-3)
    assert peak < 20e6
