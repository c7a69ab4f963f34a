"""Average precision per class as Pascal VOC counts it, by the rules of two tools: what DOTA and HRSC2016 are scored by.

A detection is a hit if the object of its image and class that it overlaps most is near enough and no better detection
took it before; see :class:`rtmdet_geo.evaluation.rotated.ClassMatches`. The tools differ so (read from
``dota_evaluation_task1.py`` and ``dota_evaluation_task2.py`` of the development kit, ``eval_map.py`` of MMRotate 1.x):

======================== ========================================= ==========================================
rule                     devkit                                    mmrotate
======================== ========================================= ==========================================
IoU of a hit             above the threshold                       from the threshold on
oriented objects         polygons as labelled                      least rectangles around them
horizontal objects       whole px, sides x2 - x1 + 1               sides x2 - x1
difficult objects        neither hit nor miss                      like others, unless they are to be ignored
mean                     over all classes                          over classes with objects
class without objects    0 (11 points), nan (area)                 0, not in the mean
======================== ========================================= ==========================================

Of equal scores the detection that comes first in the file goes first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.annotations.dota_results import ResultRows, Task
from rtmdet_geo.boxes import polygons_to_boxes, polygons_to_hboxes
from rtmdet_geo.cores import usable_cores
from rtmdet_geo.errors import AnnotationError, Cancelled
from rtmdet_geo.evaluation.coco import IOU_THRESHOLDS
from rtmdet_geo.evaluation.confusion import confuse_classes
from rtmdet_geo.evaluation.matching import Measure, best_matches
from rtmdet_geo.evaluation.report import Confusion, EvaluationReport
from rtmdet_geo.evaluation.rotated import ClassMatches, Curve, best_columns, match_class

Array = NDArray[Any]
Protocol = Literal["devkit", "mmrotate"]
Difficult = Literal["ignore", "count"]
Points = Literal["11", "area"]

_BOTH: tuple[Points, Points] = ("11", "area")
_MEASURES: dict[tuple[Protocol, Task], Measure] = {
    ("devkit", 1): "polygons",
    ("devkit", 2): "pixels",
    ("mmrotate", 1): "boxes",
    ("mmrotate", 2): "hboxes",
}


@dataclass(frozen=True)
class LabelledObjects:
    """G labelled objects of all images.

    Attributes:
        image_ids: names of the I images, those without objects too.
        images: (G,) int64 image of each.
        class_names: G names.
        polygons: (G, 8) float64 corners in px.
        boxes: (G, 5) float64 least rectangles around them, px, rad.
        difficult: (G,) bool.
        source: where they were read from, for messages.
    """

    image_ids: tuple[str, ...]
    images: Array
    class_names: tuple[str, ...]
    polygons: Array
    boxes: Array
    difficult: Array
    source: str = "the labels"

    def shapes(self, measure: Measure) -> Array:
        """Return the objects as :func:`rtmdet_geo.evaluation.matching.best_matches` takes them."""
        if measure == "polygons":
            return self.polygons
        if measure == "boxes":
            return self.boxes
        hboxes = polygons_to_hboxes(self.polygons)
        return np.trunc(hboxes) if measure == "pixels" else hboxes


@dataclass(frozen=True)
class ClassScores:
    """How well the objects of a class were found.

    Attributes:
        matches: of its detections with its objects.
        curves: precision over recall at each of COCO's IoU thresholds.
        num_difficult: difficult ones among its objects.
        absent: average precision by points where nothing is labelled.
    """

    matches: ClassMatches
    curves: tuple[Curve, ...]
    num_difficult: int
    absent: Mapping[Points, float]

    @property
    def num_objects(self) -> int:
        """Number of objects that count."""
        return self.matches.num_objects

    def average_precisions(self, points: Points) -> Array:
        """Return the AP at each threshold, (10,)."""
        if self.num_objects == 0:
            return np.full(len(self.curves), self.absent[points])
        name = "average_precision_11" if points == "11" else "average_precision"
        return np.array([getattr(curve, name) for curve in self.curves])


@dataclass(frozen=True)
class VocScores:
    """How well the objects of every class were found.

    Attributes:
        protocol: whose rules.
        classes: by name.
        confusion: of classes at IoU 0.5, each class from the score of its best F1 on.
    """

    protocol: Protocol
    classes: dict[str, ClassScores]
    confusion: Confusion

    @property
    def present(self) -> list[str]:
        """Names of classes with objects that count."""
        return [name for name, scores in self.classes.items() if scores.num_objects]

    def means(self, points: Points, *, of_present: bool | None = None) -> Array:
        """Return the mean AP over classes at each threshold, (10,).

        Args:
            points: how AP is taken from a curve.
            of_present: only classes with objects; None: as the protocol does.
        """
        only = self.protocol == "mmrotate" if of_present is None else of_present
        names = self.present if only else list(self.classes)
        if not names:
            return np.full(len(IOU_THRESHOLDS), 0.0 if of_present is None else np.nan)
        return np.asarray(np.mean([self.classes[name].average_precisions(points) for name in names], axis=0))


def score_results(
    results: Mapping[str, ResultRows],
    objects: LabelledObjects,
    classes: Sequence[str],
    *,
    task: Task = 1,
    protocol: Protocol = "devkit",
    difficult: Difficult | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> VocScores:
    """Score detections, at all of COCO's IoU thresholds.

    Args:
        results: detections by class.
        objects: labelled ones; those of other classes are left out.
        classes: names to score.
        task: 1 oriented, 2 horizontal.
        protocol: whose rules, see above.
        difficult: what becomes of difficult objects; None: as the protocol does. The development kit ignores them.
        threads: classes scored at a time; None takes the cores there are. The result is the same for any number.
        progress: called with the number of classes done, and of all.
        cancelled: asked between classes whether to stop.

    Raises:
        AnnotationError: a detection names an image that has no labels; the message begins with file and line.
        ValueError: ``difficult`` is not the development kit's.
        Cancelled: the caller wished so.
    """
    if protocol == "devkit" and difficult == "count":
        raise ValueError("protocol devkit ignores difficult objects; count them with protocol mmrotate")
    rules = _Rules(protocol, _MEASURES[protocol, task], protocol == "devkit" or difficult == "ignore")
    index_of = {name: index for index, name in enumerate(objects.image_ids)}
    shapes, names = objects.shapes(rules.measure), np.array(objects.class_names, dtype=object)
    no_rows = ResultRows((), np.zeros(0), np.zeros((0, 8)), np.zeros((0, 4)))

    def score_class(name: str) -> tuple[ClassScores, _Found]:
        if cancelled is not None and cancelled():
            raise Cancelled("evaluation stopped")
        found = _found_of(results.get(name, no_rows), index_of, objects.source, rules.measure)
        own = np.flatnonzero(names == name)
        truth = _Found(objects.difficult[own], objects.images[own], shapes[own])
        return _score_class(found, truth, rules), found

    largest_first = sorted(classes, key=lambda name: -len(results.get(name, no_rows)))
    scored: dict[str, tuple[ClassScores, _Found]] = {}
    with ThreadPoolExecutor(threads or usable_cores()) as pool:
        for name, one in zip(largest_first, pool.map(score_class, largest_first), strict=True):
            scored[name] = one
            if progress is not None:
                progress(len(scored), len(classes))
    by_class = {name: scored[name][0] for name in classes}
    found = [scored[name][1] for name in classes]
    return VocScores(protocol, by_class, _confuse(by_class, found, objects, shapes, rules))


@dataclass(frozen=True)
class _Rules:
    """What the protocol says: what is compared, and whether difficult objects are no hit and no miss."""

    protocol: Protocol
    measure: Measure
    is_ignoring: bool

    @property
    def is_strict(self) -> bool:
        return self.protocol == "devkit"


@dataclass(frozen=True)
class _Found:
    """Detections or objects of a class: scores, or whether they are difficult, (D,), images (D,), shapes (D, ...)."""

    values: Array
    images: Array
    shapes: Array


def _score_class(found: _Found, truth: _Found, rules: _Rules) -> ClassScores:
    if rules.protocol == "mmrotate" and rules.is_ignoring:  # it lists them last, which decides between equal overlaps
        order = np.argsort(truth.values, kind="stable")
        truth = _Found(truth.values[order], truth.images[order], truth.shapes[order])
    best, overlap = best_matches(found.shapes, found.images, truth.shapes, truth.images, measure=rules.measure)
    matches = match_class(found.values, best, overlap, truth.values & rules.is_ignoring)
    curves = tuple(matches.curve(threshold, is_strict=rules.is_strict) for threshold in IOU_THRESHOLDS)
    absent: dict[Points, float] = {"11": 0.0, "area": float("nan") if rules.protocol == "devkit" else 0.0}
    return ClassScores(matches, curves, int(truth.values.sum()), absent)


def _found_of(rows: ResultRows, index_of: Mapping[str, int], source: str, measure: Measure) -> _Found:
    images = np.fromiter((index_of.get(name, -1) for name in rows.image_ids), np.int64, len(rows))
    unknown = np.flatnonzero(images < 0)
    if len(unknown):
        first = int(unknown[0])
        raise AnnotationError(
            f"{rows.place(first)}: image {rows.image_ids[first]!r} has no labels in {source}; "
            "evaluate results of the images that are labelled"
        )
    shapes = rows.polygons if measure in ("polygons", "boxes") else rows.hboxes
    assert shapes is not None  # read_results gives the task's
    return _Found(rows.scores, images, polygons_to_boxes(shapes) if measure == "boxes" else shapes)


def _confuse(
    scores: Mapping[str, ClassScores],
    found: Sequence[_Found],
    objects: LabelledObjects,
    shapes: Array,
    rules: _Rules,
) -> Confusion:
    """Let detections look at objects of any class, and count what was taken for what."""
    names = list(scores)
    label_of = {name: label for label, name in enumerate(names)}
    labels = np.fromiter((label_of.get(name, -1) for name in objects.class_names), np.int64, len(objects.class_names))
    own = np.flatnonzero(labels >= 0)
    labels = labels[own]
    sure = [part.values >= one.curves[0].best_f1[1] for part, one in zip(found, scores.values(), strict=True)]
    taken = np.repeat(np.arange(len(names)), [int(kept.sum()) for kept in sure])
    values, images, kept_shapes = (
        np.concatenate([getattr(part, field)[kept] for part, kept in zip(found, sure, strict=True)])
        for field in ("values", "images", "shapes")
    )
    best, overlap = best_matches(kept_shapes, images, shapes[own], objects.images[own], measure=rules.measure)
    matches = match_class(values, best, overlap, objects.difficult[own] & rules.is_ignoring)
    return confuse_classes(names, matches, labels, taken, is_strict=rules.is_strict)


def voc_report(
    scores: VocScores, title: str, *, points: Points = "11", suffixes: Mapping[Points, str] | None = None
) -> EvaluationReport:
    """Return a report: figures and a row per class with AP at 0.5, 0.75 and 0.5 to 0.95, by 11 points and by area.

    Args:
        scores: to report.
        title: of the protocol.
        points: whose figures come first.
        suffixes: how the names of figures end; None: "11", "area".
    """
    ends = suffixes or {"11": "11", "area": "area"}
    ordered: list[Points] = sorted(_BOTH, key=lambda one: one != points)
    figures = {name: value for way in ordered for name, value in _figures(scores.means(way), ends[way]).items()}
    for way in ordered if scores.protocol == "devkit" else ():
        figures |= _figures(scores.means(way, of_present=True), f"{ends[way]}_present")
    rows = []
    hits, misses = [np.zeros(0)], [np.zeros(0)]
    for name, one in scores.classes.items():
        row: dict[str, Any] = {"class": name, "objects": one.num_objects, "difficult": one.num_difficult}
        row["detections"] = len(one.matches.scores)
        for way in ordered:
            row |= _figures(one.average_precisions(way), ends[way])
        curve = one.curves[0]
        row["recall"] = float(curve.recall.max(initial=0.0)) if one.num_objects else float("nan")
        rows.append(row | best_columns(*curve.best_f1, one.num_objects, len(curve.scores)))
        is_hit, is_counted = one.matches.judge(IOU_THRESHOLDS[0], is_strict=scores.protocol == "devkit")
        hits.append(one.matches.scores[is_hit])
        misses.append(one.matches.scores[is_counted & ~is_hit])
    return EvaluationReport(
        title,
        figures,
        tuple(rows),
        {name: scores.classes[name].curves[0] for name in scores.present},
        scores.confusion,
        np.concatenate(hits),
        np.concatenate(misses),
    )


def _figures(values: Array, ending: str) -> dict[str, float]:
    """Return AP at 0.5, at 0.75 and the mean over thresholds, by name."""
    at = {"AP50": values[0], "AP75": values[IOU_THRESHOLDS.index(0.75)], "AP50_95": np.mean(values)}
    return {f"{name}_{ending}": float(value) for name, value in at.items()}
