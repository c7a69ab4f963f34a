"""Which prediction of a layer finds which labelled object, and how far off it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.errors import AnnotationError
from rtmdet_geo.evaluation import ground
from rtmdet_geo.evaluation.layers import Layer
from rtmdet_geo.evaluation.rotated import match_class

Array = NDArray[Any]
Shape = Literal["auto", "rectangle", "outline"]

#: Objects count for the azimuth error from this ratio of length to width on: the direction of others is chance.
ELONGATED = 1.5


@dataclass(frozen=True)
class Rule:
    """What makes a hit.

    Attributes:
        measure: name of the average precision: "AP50", "AP 20 m".
        text: in words.
        closeness: (P,) of pairs of a prediction and an object, given by indices; higher is closer, 0 and less never
            overlap where ``iou`` is given.
        iou: from which on a pair is a hit, or None.
        distance_m: up to which a pair is a hit, or None.
        overlap: IoU (P,) of pairs; None where a layer holds points.
    """

    measure: str
    text: str
    closeness: Callable[[Array, Array], Array]
    iou: float | None
    distance_m: float | None
    overlap: Callable[[Array, Array], Array] | None


@dataclass(frozen=True)
class Matches:
    """The closest labelled object of each of N predictions.

    Attributes:
        scores: (N,) float64 of the predictions.
        best: (N,) int64 index of the object; -1 where there is none.
        closeness: (N,) float64 IoU with it, or minus the geodesic distance in m; -inf where there is none.
        threshold: closeness from which on it is found.
    """

    scores: Array
    best: Array
    closeness: Array
    threshold: float

    @property
    def near(self) -> Array:
        """Tell which predictions (N,) are close enough to their object, be it taken or not."""
        return np.asarray(self.closeness >= self.threshold)

    def counted(self, found_in: Array, truth_in: Array) -> tuple[Array, Array]:
        """Return which predictions hit and which count where only some objects do.

        Of predictions that are near the same object the one with the highest score hits, the closest of equal scores.

        Args:
            found_in: (N,) bool: predictions that count where they hit nothing.
            truth_in: (M,) bool: objects that count; predictions near others do not.

        Returns:
            Two (N,) bool: hits of objects that count; these and the false alarms that count.
        """
        closest = np.argsort(-self.closeness, kind="stable")
        matches = match_class(self.scores[closest], self.best[closest], self.closeness[closest], ~truth_in)
        is_hit, is_counted = matches.judge(self.threshold)
        hit, counted = np.zeros((2, len(self.best)), bool)
        hit[closest[matches.order]], counted[closest[matches.order]] = is_hit, is_counted
        return hit, hit | (counted & found_in)


def layer_rule(
    found: Layer, truth: Layer, *, iou: float | None = None, distance_m: float | None = None, shape: Shape = "auto"
) -> Rule:
    """Return the rule by IoU or by distance, whichever is given.

    Raises:
        AnnotationError: IoU is asked of points.
    """
    a, b = found.objects, truth.objects
    points = [layer.name for layer in (found, truth) if layer.has_points]
    has_rectangles = shape == "rectangle" or (shape == "auto" and bool(ground.is_quadrilateral(a.shapes).all()))

    def overlap(rows: Array, columns: Array) -> Array:
        measured = ground.rectangle_ious if has_rectangles else ground.outline_ious
        return measured(a, b, rows, columns)

    def nearness(rows: Array, columns: Array) -> Array:
        return -ground.straight_distances(a, b, rows, columns)

    if iou is not None:
        if points:
            raise AnnotationError(
                f"{points[0]} holds points, which overlap nothing: match by distance, such as --distance-m 20"
            )
        what = "smallest rectangles" if has_rectangles else "outlines"
        text = f"layers, IoU of {what} at least {iou:g}"
        return Rule(f"AP{100 * iou:g}", text, overlap, iou, None, overlap)
    text = f"layers, centroids at most {distance_m:g} m apart"
    return Rule(f"AP {distance_m:g} m", text, nearness, None, distance_m, None if points else overlap)


def match_layers(
    found: Layer, truth: Layer, found_labels: Array, truth_labels: Array, rule: Rule
) -> tuple[Matches, Matches]:
    """Match predictions to objects of their class, and to objects of any class.

    Each prediction looks at the closest object, taken or not.

    Args:
        found: N predictions.
        truth: M labelled objects.
        found_labels: (N,) int64 classes.
        truth_labels: (M,) int64.
        rule: what is close.
    """
    a, b = found.objects, truth.objects
    reach = (a.radii, b.radii)
    if rule.distance_m is not None:
        reach = (np.zeros(len(a)), np.full(len(b), rule.distance_m))
    best = np.full((2, len(a)), -1, np.int64)
    value = np.full((2, len(a)), -np.inf)
    for rows, columns in ground.near_pairs(a, b, *reach):
        closeness = rule.closeness(rows, columns)
        does_touch = (closeness > 0) if rule.iou is not None else np.ones(len(rows), bool)
        is_same = found_labels[rows] == truth_labels[columns]
        for number, chosen in enumerate((does_touch & is_same, does_touch)):
            index = np.flatnonzero(chosen)
            index = index[np.lexsort((columns[index], -closeness[index], rows[index]))]
            index = index[np.unique(rows[index], return_index=True)[1]]
            best[number, rows[index]], value[number, rows[index]] = columns[index], closeness[index]
    if rule.iou is not None:
        return Matches(found.scores, best[0], value[0], rule.iou), Matches(found.scores, best[1], value[1], rule.iou)
    within, without = (_at_distance(found, truth, one, rule) for one in best)
    return within, without


def _at_distance(found: Layer, truth: Layer, best: Array, rule: Rule) -> Matches:
    """Return matches by the distance over the ground, not straight through it."""
    value = np.full(len(best), -np.inf)
    rows = np.flatnonzero(best >= 0)
    value[rows] = -ground.ground_distances(found.objects, truth.objects, rows, best[rows])
    return Matches(found.scores, best, value, -float(rule.distance_m or 0))


def pair_errors(found: Layer, truth: Layer, best: Array, rule: Rule) -> dict[str, Array]:
    """Return how predictions differ from the objects that they look at; nan where there is none, or nothing to say.

    Returns:
        ``iou``, ``distance_m`` (geodesic, of the centroids), ``azimuth_error_deg`` in [0, 90] (of objects that are
        labelled at least :data:`ELONGATED` times as long as wide), ``length_error_m``, ``width_error_m`` (of the
        smallest rectangles, predicted - labelled): (N,) float64 each.
    """
    names = ("iou", "distance_m", "azimuth_error_deg", "length_error_m", "width_error_m")
    errors = {name: np.full(len(best), np.nan) for name in names}
    rows = np.flatnonzero(best >= 0)
    columns, a, b = best[rows], found.objects, truth.objects
    errors["distance_m"][rows] = ground.ground_distances(a, b, rows, columns)
    if rule.overlap is not None:
        errors["iou"][rows] = rule.overlap(rows, columns)
    has_sides = (a.boxes[rows, 2] > 0) & (b.boxes[columns, 2] > 0)
    rows, columns = rows[has_sides], columns[has_sides]
    seen, labelled = ground.seen_boxes(a, b, rows, columns), b.boxes[columns]
    turn = np.degrees(seen[:, 4] - labelled[:, 4])
    is_long = labelled[:, 2] >= ELONGATED * labelled[:, 3]
    errors["azimuth_error_deg"][rows] = np.where(is_long, np.abs((turn + 90) % 180 - 90), np.nan)
    errors["length_error_m"][rows] = seen[:, 2] - labelled[:, 2]
    errors["width_error_m"][rows] = seen[:, 3] - labelled[:, 3]
    return errors
