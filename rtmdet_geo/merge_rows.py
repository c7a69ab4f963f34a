"""The merge of :mod:`rtmdet_geo.merge`, one tile row after the other: memory follows a few rows. numpy only.

Pieces can change each other only where the bounds of their boxes or outlines overlap (:mod:`rtmdet_geo.suppression`;
for the joining of cut masks, :mod:`rtmdet_geo.stitch`, and because a joined mask has the box around all its pieces,
the box around cut pieces that hang together counts as well). So what hangs together by overlaps, directly or through
others, is merged by itself, as soon as no later tile can add to it.

How far a later tile can add: **a box reaches no more than a tile's height above the top of its tile.** The centres of
boxes lie in their tile, so this holds for all objects up to twice the height of a tile. What reaches further is merged
with what is still open, and a warning says so: the same object may then have been given out before.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.boxes import boxes_to_hboxes, overlapping_pairs
from rtmdet_geo.jit import compiled
from rtmdet_geo.merge import MAX_OVERLAP, Merged, join_parts, merge_survivors
from rtmdet_geo.merge_methods import LEAST_SCORE, MergeMethod
from rtmdet_geo.stitch import Pieces, outline_bounds, outlines_of
from rtmdet_geo.structures import Kind
from rtmdet_geo.suppression import check_method
from rtmdet_geo.tiles import TileGrid

logger = logging.getLogger(__name__)

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

#: px that bounds are widened by, so that rounding never parts what overlaps.
_SLACK_PX = 1e-3


def merge_rows(
    rows: Iterable[Sequence[Pieces]],
    grid: TileGrid,
    *,
    iou_threshold: float,
    class_aware: bool = True,
    max_overlap: float = MAX_OVERLAP,
    kind: Kind = "rotated",
    method: MergeMethod = "nms",
    least_score: float = LEAST_SCORE,
) -> Iterator[Merged]:
    """Merge the tile rows of a scene from the top, and yield objects once they are final.

    Args:
        rows: what :func:`rtmdet_geo.merge.tile_survivors` left of the tiles of each tile row of the grid; an empty
            sequence for a row without any.
        grid: the tiles' grid.
        iou_threshold: see :func:`rtmdet_geo.merge.merge_survivors`. With 0 and rotated boxes everything hangs
            together, and all is yielded at the end.
        class_aware: likewise.
        max_overlap: likewise.
        kind: likewise.
        method: likewise.
        least_score: likewise.

    Yields:
        Objects, one at least, highest score first. All together are what ``merge_survivors`` gives for all parts.

    Raises:
        ConfigError: as ``merge_survivors``.
        ValueError: kinds are mixed, or there are more rows than the grid has.
    """
    merger = RowMerger(
        grid,
        iou_threshold=iou_threshold,
        class_aware=class_aware,
        max_overlap=max_overlap,
        kind=kind,
        method=method,
        least_score=least_score,
    )
    for parts in rows:
        if len(merged := merger.add_row(parts)):
            yield merged
    if len(merged := merger.finish()):
        yield merged


class RowMerger:
    """What :func:`merge_rows` does, for callers that push rows; its arguments.

    Attributes:
        num_rows: rows added.
        num_open: pieces that later rows may still change.
        peak_open: the most pieces held at once, those of the row just added included.
        num_late: pieces that reached further above their tile than the module's text allows.
    """

    def __init__(
        self,
        grid: TileGrid,
        *,
        iou_threshold: float,
        class_aware: bool = True,
        max_overlap: float = MAX_OVERLAP,
        kind: Kind = "rotated",
        method: MergeMethod = "nms",
        least_score: float = LEAST_SCORE,
    ) -> None:
        """Begin above the first row.

        Raises:
            ConfigError: see :func:`merge_rows`.
        """
        check_method(method, kind)
        self.grid, self.iou_threshold, self.class_aware, self.kind = grid, iou_threshold, class_aware, kind
        self.max_overlap, self.method, self.least_score = max_overlap, method, least_score
        self.peak_open = self.num_late = 0
        self._open: Pieces | None = None
        self.num_rows = 0
        self._limit = -np.inf  # px; above it everything has been given out

    @property
    def num_open(self) -> int:
        """Return the number of pieces that later rows may still change."""
        return 0 if self._open is None else len(self._open.detections)

    def add_row(self, parts: Sequence[Pieces]) -> Merged:
        """Take the parts of the next tile row, and return what is final now.

        Raises:
            ValueError: kinds are mixed, or the grid has no more rows.
        """
        if self.num_rows == self.grid.num_rows:
            raise ValueError(f"a row more than the grid's {self.grid.num_rows}; give each tile row once")
        self.num_rows += 1
        if parts:
            row = join_parts(parts)
            self._count_late(row)
            self._open = row if self._open is None else join_parts([self._open, row])
            self.peak_open = max(self.peak_open, self.num_open)
        if self.num_rows == self.grid.num_rows:
            return self.finish()
        self._limit = float(self.grid.ys[self.num_rows] - self.grid.tile_height)
        if self._open is None or (self.iou_threshold <= 0 and self._open.detections.kind == "rotated"):
            return self._merge([])
        is_open = _is_open(self._open, self._limit, self.class_aware)
        final, self._open = self._open.select(~is_open), self._open.select(is_open)
        return self._merge([final])

    def finish(self) -> Merged:
        """Return all that is left; the rows that did not come are empty."""
        parts = [] if self._open is None else [self._open]
        self._open, self.num_rows = None, self.grid.num_rows
        if self.num_late:
            logger.warning(
                "%d detections reach more than a tile's height above their tile and may repeat others; "
                "use larger tiles or a coarser ground sample distance",
                self.num_late,
            )
            self.num_late = 0
        return self._merge(parts)

    def _merge(self, parts: list[Pieces]) -> Merged:
        return merge_survivors(
            parts,
            self.grid,
            iou_threshold=self.iou_threshold,
            class_aware=self.class_aware,
            max_overlap=self.max_overlap,
            kind=self.kind,
            method=self.method,
            least_score=self.least_score,
        )

    def _count_late(self, row: Pieces) -> None:
        self.num_late += int((_piece_bounds(row)[:, 1] < self._limit).sum())


def _piece_bounds(pieces: Pieces) -> FloatArray:
    """Return (N, 4) x1 y1 x2 y2 around each piece's box and outline, widened by the slack."""
    bounds = boxes_to_hboxes(pieces.detections.boxes)
    outlines = outlines_of(pieces.detections)
    if outlines is not None:
        around = outline_bounds(outlines)
        bounds[:, :2] = np.minimum(bounds[:, :2], around[:, :2])
        bounds[:, 2:] = np.maximum(bounds[:, 2:], around[:, 2:])
    return bounds + _SLACK_PX * np.array([-1.0, -1.0, 1.0, 1.0])


def _is_open(pieces: Pieces, limit: float, class_aware: bool) -> NDArray[np.bool_]:
    """Return (N,) bool: a piece that lies above ``limit`` px nowhere may still change this one."""
    bounds = _piece_bounds(pieces)
    labels = pieces.detections.labels if class_aware else np.zeros(len(bounds), np.int64)
    first, second = _overlaps(bounds, labels, bounds, labels)
    cut = np.flatnonzero(pieces.is_cut)
    if outlines_of(pieces.detections) is not None and len(cut):
        both = pieces.is_cut[first] & pieces.is_cut[second]
        groups, around = _boxes_around(bounds, cut, _roots(len(bounds), first[both], second[both]))
        # a later piece that is joined to a group makes its box wider, beside all that the group goes past
        limit = min(limit, float(around[around[:, 3] > limit, 1].min(initial=limit)))
        i, j = _overlaps(around, labels[groups], bounds, labels)
        k, m = _overlaps(around, labels[groups], around, labels[groups])
        first = np.concatenate([first, groups[i], groups[k]])
        second = np.concatenate([second, j, groups[m]])
    roots = _roots(len(bounds), first, second)
    is_open = np.zeros(len(bounds), bool)
    is_open[roots[bounds[:, 3] > limit]] = True
    return np.asarray(is_open[roots])


def _overlaps(
    bounds1: FloatArray, labels1: IntArray, bounds2: FloatArray, labels2: IntArray
) -> tuple[IntArray, IntArray]:
    i, j = overlapping_pairs(bounds1, bounds2)
    same = labels1[i] == labels2[j]
    return i[same], j[same]


def _boxes_around(bounds: FloatArray, members: IntArray, roots: IntArray) -> tuple[IntArray, FloatArray]:
    """Return one member of each group of ``members``, and (G, 4) the bounds of the groups."""
    groups, number = np.unique(roots[members], return_inverse=True)
    around = np.tile([np.inf, np.inf, -np.inf, -np.inf], (len(groups), 1))
    np.minimum.at(around[:, :2], number, bounds[members, :2])
    np.maximum.at(around[:, 2:], number, bounds[members, 2:])
    return groups, around


def _roots(number: int, first: IntArray, second: IntArray) -> IntArray:
    """Return for each of ``number`` nodes one node of its connected component, the same for all of it."""
    roots = np.arange(number)
    _connect(roots, first, second)
    return roots


@compiled
def _connect(roots: IntArray, first: IntArray, second: IntArray) -> None:
    """Union-find with path halving, in place; the least node is the root."""
    for pair in range(first.shape[0]):
        one, other = first[pair], second[pair]
        while roots[one] != one:
            roots[one] = roots[roots[one]]
            one = roots[one]
        while roots[other] != other:
            roots[other] = roots[roots[other]]
            other = roots[other]
        if one < other:
            roots[other] = one
        else:
            roots[one] = other
    for node in range(roots.shape[0]):  # a root is less than its nodes, so settled before
        roots[node] = roots[roots[node]]
