"""A layer of predictions against a layer of labels, in any two CRSs: what an analyst has.

Everything is measured on the ground (:mod:`rtmdet_geo.evaluation.ground`), so neither CRS has a say in the result. A
prediction looks at the labelled object of its class that it overlaps most, or that is nearest; it is a hit if that is
enough and no surer prediction has taken the object (the rule of :mod:`rtmdet_geo.evaluation.rotated`). Predictions of
equal score make one point of the curves, so the order of features does not matter.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import geopandas
import numpy as np
import pandas as pd
import shapely
from numpy.typing import NDArray

from rtmdet_geo.errors import AnnotationError, ConfigError, UnknownClassError
from rtmdet_geo.evaluation.layer_matching import Matches, Rule, Shape, layer_rule, match_layers, pair_errors
from rtmdet_geo.evaluation.layers import (
    ANY_CLASS,
    Layer,
    Source,
    is_within,
    number_classes,
    read_area,
    read_layer,
    warn_of_doubles,
)
from rtmdet_geo.evaluation.plots import best_threshold
from rtmdet_geo.evaluation.report import Confusion, EvaluationReport, count_confusion
from rtmdet_geo.evaluation.rotated import Curve, best_columns, curve_of
from rtmdet_geo.outputs import check_not_among
from rtmdet_geo.vector import WGS84, check_output, project_polygons, write_features
from rtmdet_geo.vector_formats import GeometryType

logger = logging.getLogger(__name__)

Array = NDArray[Any]
Match = Literal["iou", "distance"]

#: What becomes of predictions and labels, in the column ``outcome``.
HIT, FALSE_ALARM, MISSED, NOT_COUNTED = "hit", "false alarm", "missed", "not counted"


@dataclass(frozen=True)
class _Comparison:
    """Two layers and what the one found of the other.

    Attributes:
        found, truth: N predictions, M labelled objects.
        classes: all names.
        found_labels, truth_labels: (N,), (M,) int64.
        rule: what makes a hit.
        same, any: matches within classes, and without regard to them.
        found_in, truth_in: (N,), (M,) bool: what counts.
        errors: of :func:`pair_errors`, within classes.
    """

    found: Layer
    truth: Layer
    classes: tuple[str, ...]
    found_labels: Array
    truth_labels: Array
    rule: Rule
    same: Matches
    any: Matches
    found_in: Array
    truth_in: Array
    errors: dict[str, Array]


def evaluate_layers(
    predicted: Source,
    labelled: Source,
    *,
    match: Match = "iou",
    iou: float = 0.5,
    distance_m: float | None = None,
    shape: Shape = "auto",
    classes: Sequence[str] | None = None,
    class_column: str | None = None,
    labelled_class_column: str | None = None,
    any_class: bool = False,
    score_column: str | None = None,
    score: float | None = None,
    aoi: Source | None = None,
    length_bands_m: Sequence[float] = (),
    predicted_layer: str | None = None,
    labelled_layer: str | None = None,
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> EvaluationReport:
    """Score a layer of predictions by a layer of labels.

    Args:
        predicted: GeoPackage, GeoJSON, FlatGeobuf, shapefile or GeoParquet of polygons or points, or a GeoDataFrame.
        labelled: likewise; the CRSs may differ.
        match: "iou": polygons that overlap; "distance": centroids that are near, also of points.
        iou: from which on a prediction is a hit, in (0, 1].
        distance_m: geodesic metres up to which a prediction is a hit.
        shape: whose overlap: "rectangle": of the smallest rectangles on the ground; "outline": of the polygons as they
            are; "auto": rectangles if all predictions have four corners, as rotated boxes have, else outlines.
        classes: count these only; None: all.
        class_column: column of the class names, in both layers; None: "class_name" if both have it, else all objects
            are of one class.
        labelled_class_column: that of the labels where it has another name.
        any_class: classes do not matter, nor do features without one.
        score_column: column of the scores; None: "score", or all predictions are equally certain.
        score: leave out predictions below; None: take the whole layer.
        aoi: polygons: objects with their centroid inside count. A prediction outside may hit a label inside, and one
            inside that hits a label outside does not count.
        length_bands_m: rising lengths, for rows of their own: (50, 100) makes three bands. Labels of other lengths
            neither count nor are they missed, nor do false alarms of other lengths count.
        predicted_layer: name of the layer where the file has several.
        labelled_layer: likewise.
        output: GeoPackage or GeoJSON to write: predictions with ``outcome`` "hit", "false alarm" or "not counted", and
            labels with "missed"; in the CRS of the layers, in EPSG:4326 if they differ.
        overwrite: replace ``output``.

    Returns:
        Figures: AP by the name of the rule (mean over the classes that have objects) and, over all classes, ``hits``,
        ``false_alarms``, ``missed``, ``precision``, ``recall`` and ``f1`` of the layer as it is, ``best_f1`` and
        ``best_score``; of the hits ``error_m``, ``error_m_median``, ``error_m_p90`` (geodesic, of the centroids),
        ``azimuth_error_deg`` (mean, of elongated labels, see :func:`pair_errors`), ``length_error_m`` and
        ``width_error_m`` (mean of the absolute values), ``length_bias_m`` and ``width_bias_m`` (mean of predicted -
        labelled). Rows: the same by class, and by band of length.

    Raises:
        ConfigError: a number is out of range or missing, or arguments do not go together.
        UnknownClassError: neither layer has a class of that name.
        DatasetNotFoundError, AnnotationError: a layer is missing or malformed, has no scores where ``score`` is given,
            or the layers share no class.
        OutputError: ``output`` exists, is one of the layers, or cannot be written.
    """
    _check_options(match, iou, distance_m, score, length_bands_m)
    if output is not None:
        files = (predicted, labelled, aoi)
        check_not_among(output, [one for one in files if isinstance(one, str | os.PathLike)])
        check_output(output, overwrite)
    if any_class and (classes or class_column or labelled_class_column):
        raise ConfigError("any_class compares places only; name no classes and no column of them")
    found = read_layer(
        predicted,
        "predicted",
        layer=predicted_layer,
        class_column=class_column,
        score_column=score_column,
        has_classes=not any_class,
        has_scores=True,
    )
    if score is not None and not found.has_scores and len(found):
        columns = ", ".join(str(one) for one in found.frame.columns if one != "geometry") or "none"
        raise AnnotationError(
            f"{found.name} has no column 'score', which --score asks for: name it with --score-column; its columns: "
            f"{columns}"
        )
    column = labelled_class_column or class_column
    truth = read_layer(labelled, "labelled", layer=labelled_layer, class_column=column, has_classes=not any_class)
    warn_of_doubles(truth)
    area = read_area(aoi) if aoi is not None else None
    found, truth = _agree_on_classes(found, truth, any_class, classes)
    if score is not None:
        found = found.select(found.scores >= score)
    threshold = {"iou": iou} if match == "iou" else {"distance_m": distance_m}
    rule = layer_rule(found, truth, shape=shape, **threshold)
    compared = _compare(found, truth, rule, area)
    if output is not None:
        _write(compared, output, overwrite)
    return _report(compared, length_bands_m)


def _check_options(
    match: str, iou: float, distance_m: float | None, score: float | None, bands: Sequence[float]
) -> None:
    if match not in ("iou", "distance"):
        raise ConfigError(f"unknown match {match!r}; choose iou or distance")
    if not 0 < iou <= 1:
        raise ConfigError(f"IoU threshold {iou!r} is outside (0, 1]")
    if match == "distance" and distance_m is None:
        raise ConfigError("matching by distance needs the distance: give --distance-m, such as 20")
    if match == "iou" and distance_m is not None:
        raise ConfigError("a distance is given, but the match is by IoU: add --match distance")
    if distance_m is not None and not 0 < distance_m < 1e6:
        raise ConfigError(f"distance {distance_m!r} m is outside (0, 1e6)")
    if score is not None and not math.isfinite(score):
        raise ConfigError(f"score threshold {score!r} is no number")
    if any(not 0 < low < high for low, high in pairwise([*bands, math.inf])):
        raise ConfigError(
            f"bands of length {list(bands)!r} must be positive and rise: --length-band 50 --length-band 100"
        )


def _agree_on_classes(
    found: Layer, truth: Layer, any_class: bool, classes: Sequence[str] | None
) -> tuple[Layer, Layer]:
    """Give both layers class names that can be compared, and leave out those that are not asked for.

    Raises:
        UnknownClassError: neither layer has a class that is asked for.
        AnnotationError: the layers share no class.
    """
    named = [layer for layer in (found, truth) if layer.class_names is not None and len(layer)]
    if any_class or any(layer.class_names is None and len(layer) for layer in (found, truth)):
        for layer in named if not any_class else ():
            number = len(set(layer.class_names if layer.class_names is not None else ()))
            logger.warning(
                "places are compared, not classes: %s has %d, but the %s has no column of them (--class-column, "
                "--labelled-class-column, or --any-class to say so)",
                layer.name,
                number,
                (truth if layer is found else found).name,
            )
        found, truth = (replace(layer, class_names=np.full(len(layer), ANY_CLASS, object)) for layer in (found, truth))
    names = [set() if layer.class_names is None else set(layer.class_names) for layer in (found, truth)]
    if classes is not None:
        unknown = sorted(set(classes) - names[0] - names[1])
        if unknown and (names[0] or names[1]):
            known = ", ".join(sorted(names[0] | names[1]))
            raise UnknownClassError(f"no object is of class {unknown[0]!r}; the layers have {known}")
        found, truth = (
            layer if layer.class_names is None else layer.select(np.isin(layer.class_names, list(classes)))
            for layer in (found, truth)
        )
        names = [one & set(classes) for one in names]
    if names[0] and names[1] and not names[0] & names[1]:
        raise AnnotationError(
            f"the layers share no class: predicted {_listed(names[0])}; labelled {_listed(names[1])}; name the columns "
            "with --class-column and --labelled-class-column, or compare places only with --any-class"
        )
    if names[0] - names[1] and names[1]:
        logger.warning("no object is labelled %s: all such predictions are false alarms", _listed(names[0] - names[1]))
    return found, truth


def _listed(names: set[str]) -> str:
    """Return the first few names."""
    shown = ", ".join(sorted(names)[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def _compare(found: Layer, truth: Layer, rule: Rule, area: geopandas.GeoSeries | None) -> _Comparison:
    none = np.zeros(0, object)
    names = [none if layer.class_names is None else layer.class_names for layer in (found, truth)]
    classes, (found_labels, truth_labels) = number_classes(names)
    same, any_class = match_layers(found, truth, found_labels, truth_labels, rule)
    if len(found) and len(truth) and not (any_class.best >= 0).any():
        places = [" ".join(f"{value:.4f}" for value in layer.objects.lonlat[0]) for layer in (found, truth)]
        logger.warning(
            "no prediction is near any label: the first lie at longitude and latitude %s and %s; are these layers of "
            "the same place, and their CRSs right?",
            *places,
        )
    found_in, truth_in = (
        np.ones(len(layer), bool) if area is None else is_within(layer.objects.lonlat, area) for layer in (found, truth)
    )
    if area is not None and (len(found) or len(truth)) and not (found_in.any() or truth_in.any()):
        west, south, east, north = area.to_crs(WGS84).total_bounds
        place = (found if len(found) else truth).objects.lonlat[0]
        logger.warning(
            "none of the %d predictions and %d labels lies in the area of interest, longitude %.4f to %.4f and "
            "latitude %.4f to %.4f; the first lies at %.4f %.4f: is --aoi of the same place, and its CRS right?",
            len(found),
            len(truth),
            *(west, east, south, north),
            *place,
        )
    errors = pair_errors(found, truth, same.best, rule)
    return _Comparison(
        found, truth, classes, found_labels, truth_labels, rule, same, any_class, found_in, truth_in, errors
    )


def _report(compared: _Comparison, bands: Sequence[float]) -> EvaluationReport:
    found, truth = compared.found, compared.truth
    everything = _Part(compared, np.ones(len(found), bool), np.ones(len(truth), bool))
    rows, curves = [], {}
    for label, name in enumerate(compared.classes):
        part = _Part(compared, compared.found_labels == label, compared.truth_labels == label)
        rows.append({"class": name} | ({"length_m": "all"} if bands else {}) | part.row())
        if part.num_objects:
            curves[name] = part.curve
    for low, high in pairwise([0.0, *bands, math.inf]) if bands else ():
        lengths = [layer.objects.boxes[:, 2] for layer in (found, truth)]
        part = _Part(compared, *((low <= length) & (length < high) for length in lengths))
        rows.append({"class": "all", "length_m": f"{low:g}-{high:g}".replace("-inf", " and more")} | part.row())
    averages = [curve.average_precision for curve in curves.values()]
    figures = {compared.rule.measure: float(np.mean(averages)) if averages else math.nan} | everything.figures()
    hits, misses = everything.scores
    return EvaluationReport(compared.rule.text, figures, tuple(rows), curves, _confusion(compared), hits, misses)


class _Part:
    """Some predictions and labels of a comparison, and how good they are."""

    def __init__(self, compared: _Comparison, found_in: Array, truth_in: Array) -> None:
        """Count these predictions (N,) and objects (M,), as far as they count at all."""
        truth_in = truth_in & compared.truth_in
        hit, counted = compared.same.counted(found_in & compared.found_in, truth_in)
        scores = compared.found.scores
        self.num_objects = int(truth_in.sum())
        self.scores = scores[hit], scores[counted & ~hit]
        self.curve: Curve = curve_of(scores[counted], hit[counted], self.num_objects, join_ties=True)
        self._errors = {name: values[hit] for name, values in compared.errors.items()}

    def row(self) -> dict[str, Any]:
        """Return what a row of the table says."""
        numbers = {"num_objects": self.num_objects, "num_predictions": sum(map(len, self.scores))}
        return numbers | {"ap": self.curve.average_precision} | self._rates() | self._sizes()

    def figures(self) -> dict[str, float]:
        """Return what is said of everything together."""
        hits, misses = map(len, self.scores)
        numbers = {"hits": hits, "false_alarms": misses, "missed": self.num_objects - hits}
        bias = {f"{side}_bias_m": _mean(self._errors[f"{side}_error_m"]) for side in ("length", "width")}
        return self._rates() | numbers | self._sizes() | bias

    def _rates(self) -> dict[str, float]:
        """Return precision, recall and F1 of all, and the best F1; nan where there is nothing to divide by."""
        hits, misses = map(len, self.scores)
        return {
            "precision": _ratio(hits, hits + misses),
            "recall": _ratio(hits, self.num_objects),
            "f1": _ratio(2 * hits, hits + misses + self.num_objects),
        } | best_columns(*best_threshold(*self.scores, self.num_objects), self.num_objects, hits + misses)

    def _sizes(self) -> dict[str, float]:
        """Return how far off the hits are."""
        apart = self._errors["distance_m"]
        return {
            "error_m": _mean(apart),
            "error_m_median": float(np.median(apart)) if len(apart) else math.nan,
            "error_m_p90": float(np.percentile(apart, 90)) if len(apart) else math.nan,
            "azimuth_error_deg": _mean(self._errors["azimuth_error_deg"]),
            "length_error_m": _mean(np.abs(self._errors["length_error_m"])),
            "width_error_m": _mean(np.abs(self._errors["width_error_m"])),
        }


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def _mean(values: Array) -> float:
    """Return the mean of those that are numbers; nan where none is."""
    numbers = values[~np.isnan(values)]
    return float(np.mean(numbers)) if len(numbers) else math.nan


def _confusion(compared: _Comparison) -> Confusion:
    """Count which class was taken for which, predictions matched without regard to classes."""
    hit, counted = compared.any.counted(compared.found_in, compared.truth_in)
    taken = np.zeros(len(compared.truth), bool)
    taken[compared.any.best[hit]] = True
    missed = compared.truth_labels[compared.truth_in & ~taken]
    of_hits, of_others = compared.found_labels[hit], compared.found_labels[counted & ~hit]
    truth = [compared.truth_labels[compared.any.best[hit]], np.full(len(of_others), -1), missed]
    found = [of_hits, of_others, np.full(len(missed), -1)]
    return count_confusion(compared.classes, np.concatenate(truth), np.concatenate(found))


def _write(compared: _Comparison, output: str | os.PathLike[str], overwrite: bool) -> None:
    """Write predictions, and labels that were missed, with what became of them."""
    frame = matched_frame(compared)
    metadata = {"protocol": compared.rule.text, "predicted": compared.found.name, "labelled": compared.truth.name}
    kinds = set(frame.geom_type)
    kind: GeometryType = "Unknown"
    if kinds <= {"Polygon", "MultiPolygon"}:
        kind = "MultiPolygon" if "MultiPolygon" in kinds else "Polygon"
    write_features(frame, output, layer="matched", overwrite=overwrite, metadata=metadata, geometry_type=kind)


def matched_frame(compared: _Comparison) -> geopandas.GeoDataFrame:
    """Return a feature a prediction, best score first, then one a missed object.

    Columns: ``outcome``, ``class_name``, ``score`` (null for labels), ``labelled_class`` (of the object that is there,
    whatever its class; null where there is none), the columns of :func:`pair_errors`, ``source_row`` (place in its own
    layer, from 1).
    """
    found, truth = compared.found, compared.truth
    hit, counted = compared.same.counted(compared.found_in, compared.truth_in)
    taken = np.zeros(len(truth), bool)
    taken[compared.same.best[hit]] = True
    missed = np.flatnonzero(compared.truth_in & ~taken)
    order = np.argsort(-found.scores, kind="stable")
    names = np.array([*compared.classes, None], object)
    outcome = np.where(hit, HIT, np.where(counted, FALSE_ALARM, NOT_COUNTED)).astype(object)
    there = np.where(compared.any.near, np.append(compared.truth_labels, -1)[compared.any.best], -1)
    none = np.full(len(missed), np.nan)

    def joined(of_found: Array, of_missed: Array) -> Array:
        return np.concatenate((of_found[order], of_missed))

    truth_names = names[compared.truth_labels[missed]]
    columns: dict[str, Any] = {
        "outcome": pd.Series(joined(outcome, np.full(len(missed), MISSED, object)), dtype="str"),
        "class_name": pd.Series(joined(names[compared.found_labels], truth_names), dtype="str"),
        "score": joined(found.scores, none),
        "labelled_class": pd.Series(joined(names[there], truth_names), dtype="str"),
    }
    columns |= {name: joined(values, none) for name, values in compared.errors.items()}
    columns["source_row"] = joined(found.rows, truth.rows[missed])
    crs = found.frame.crs if found.frame.crs == truth.frame.crs else WGS84
    shapes = [
        project_polygons(np.asarray(layer.frame.geometry.array)[rows], layer.frame.crs, crs)
        for layer, rows in ((found, order), (truth, missed))
    ]
    return geopandas.GeoDataFrame(columns, geometry=shapely.force_2d(np.concatenate(shapes)), crs=crs)
