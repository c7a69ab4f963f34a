"""Pictures of an evaluation: precision over recall, confusion of classes, scores of hits and of false alarms."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rtmdet_geo.charts import COLOURS, GREY, HEIGHT, STYLES, add_legend, new_figure, shortened, to_png
from rtmdet_geo.evaluation.report import BACKGROUND, Confusion, EvaluationReport
from rtmdet_geo.evaluation.rotated import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = NDArray[np.float64]

#: Files that :func:`draw_report` may make.
PICTURES = ("precision_recall.png", "confusion.png", "scores.png")
#: Table beside the picture of the confusion.
CONFUSION_TABLE = "confusion.csv"
#: Lines that a picture names; more cannot be told apart.
MAX_NAMED = 10
#: Classes up to which a confusion matrix shows numbers, and names of its rows and columns.
MAX_NUMBERED, MAX_LISTED = 24, 100
#: Bars of a histogram of scores.
_NUM_BARS = 40


@dataclass(frozen=True)
class NamedCurve:
    """Precision over recall of one class.

    Attributes:
        name: of the class.
        measure: which IoU of what makes a hit, such as "mask AP50".
        average: average precision by the protocol that was chosen.
        curve: with the points.
    """

    name: str
    measure: str
    average: float
    curve: Curve


def draw_report(report: EvaluationReport) -> dict[str, bytes]:
    """Return the pictures of a report as PNG by file name, those of :data:`PICTURES` that have something to show.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    curves = [NamedCurve(name, "area", curve.average_precision, curve) for name, curve in report.curves.items()]
    drawn = (
        draw_precision_recall(curves),
        draw_confusion(report.confusion) if report.confusion is not None else None,
        draw_scores(report.hit_scores, report.miss_scores, num_objects=_num_objects(report.curves)),
    )
    return {name: picture for name, picture in zip(PICTURES, drawn, strict=True) if picture is not None}


def _num_objects(curves: Mapping[str, Curve]) -> int | None:
    return sum(curve.num_objects for curve in curves.values()) if curves else None


def draw_precision_recall(curves: Sequence[NamedCurve]) -> bytes | None:
    """Return a PNG of precision over recall of each class, the threshold of the best F1 marked; None without curves.

    Precision is made monotone, so that the area below a line is the average precision by protocol "area". Of more
    classes than can be told apart those with the most objects have colour and name, the others are grey.
    """
    curves = [item for item in curves if len(item.curve.recall)]
    if not curves:
        return None
    ranked = sorted(curves, key=lambda item: -item.curve.num_objects)
    figure = new_figure(height=HEIGHT * 1.15)
    axes = figure.subplots()
    for item in ranked[MAX_NAMED:]:
        axes.plot(*_monotone(item.curve), drawstyle="steps-pre", color=GREY, alpha=0.35, linewidth=0.8)
    for number, item in enumerate(ranked[:MAX_NAMED]):
        _draw_curve(axes, item, number, is_annotated=len(ranked) <= 3)
    axes.plot([], [], "o", ms=6, mfc="white", mec=GREY, mew=1.5, linestyle="none", label="best F1")
    if len(ranked) > MAX_NAMED:
        axes.plot([], [], color=GREY, alpha=0.5, label=f"{len(ranked) - MAX_NAMED} more classes")
    axes.set(xlim=(0, 1.005), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
    add_legend(axes, outside=len(ranked) > 3)
    return to_png(figure)


def _draw_curve(axes: Axes, item: NamedCurve, number: int, *, is_annotated: bool) -> None:
    """Draw one class by name and colour."""
    curve, colour = item.curve, COLOURS[number % len(COLOURS)]
    recall, precision = _monotone(curve)
    style = STYLES[(number // len(COLOURS) * 2 + number) % 4]
    label = f"{shortened(item.name)}  {item.measure} {item.average:.3f}"
    axes.plot(recall, precision, drawstyle="steps-pre", color=colour, linestyle=style, label=label)
    f1, score = curve.best_f1
    at = int(np.argmin(np.abs(curve.scores - score)))
    axes.plot(curve.recall[at], curve.precision[at], "o", ms=6, mfc="white", mec=colour, mew=1.5)
    if is_annotated:
        place = (curve.recall[at], curve.precision[at])
        side: dict[str, Any] = {"ha": "right", "xytext": (-7, -13)}
        if place[0] < 0.4:  # else it would lie on the axis
            side = {"ha": "left", "xytext": (9, -3)}
        axes.annotate(f"F1 {f1:.2f} from score {score:.2f} on", place, textcoords="offset points", color=colour, **side)


def _monotone(curve: Curve) -> tuple[Array, Array]:
    """Return recall from 0 on, and the best precision at that recall or a higher one."""
    envelope = np.maximum.accumulate(curve.precision[::-1])[::-1]
    return np.append(0.0, curve.recall), np.append(envelope[:1], envelope)


def draw_confusion(confusion: Confusion) -> bytes | None:
    """Return a PNG of a confusion matrix; None when nothing was counted.

    Colour is the share of the row: of the objects of that class, or of all false alarms. Numbers stand in the cells up
    to :data:`MAX_NUMBERED` classes; more have a colour scale only.
    """
    matrix = confusion.matrix
    if not matrix.any():
        return None
    size = len(matrix)
    is_numbered = size - 1 <= MAX_NUMBERED
    side = min(max(4.2, 1.6 + 0.42 * size), 13.0)
    figure = new_figure(side + 1.0, side)
    axes = figure.subplots()
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    picture = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, ax=axes, fraction=0.04, label="share of the row")
    if size - 1 <= MAX_LISTED:
        names = [*(shortened(name, 20).strip() for name in confusion.names), BACKGROUND]
        small = 9 if size <= 30 else 6
        axes.set_xticks(range(size), names, rotation=45, ha="right", rotation_mode="anchor", fontsize=small)
        axes.set_yticks(range(size), names, fontsize=small)
        for text in [*axes.get_xticklabels(), *axes.get_yticklabels()]:
            text.set_parse_math(False)
    axes.set(xlabel="predicted", ylabel="labelled")
    axes.axhline(size - 1.5, color=GREY, linewidth=0.8)
    axes.axvline(size - 1.5, color=GREY, linewidth=0.8)
    if is_numbered:
        for row, column in itertools.product(range(size), repeat=2):
            count = int(matrix[row, column])
            if count:
                ink = "white" if share[row, column] > 0.55 else "black"
                axes.text(column, row, _brief(count), ha="center", va="center", color=ink, fontsize=8)
    return to_png(figure, grid=False, is_fitted=True)


def _brief(count: int) -> str:
    """Return a number in at most four characters where it can be."""
    for divisor, ending in ((1, ""), (1_000, "k"), (1_000_000, "M")):
        value = count / divisor
        if value < 9.95 and divisor > 1:
            return f"{value:.1f}{ending}"
        if round(value) < 1_000:
            return f"{value:.0f}{ending}"
    return f"{count / 1e9:.1f}G"


def draw_scores(hit_scores: ArrayLike, miss_scores: ArrayLike, *, num_objects: int | None = None) -> bytes | None:
    """Return a PNG of how scores of hits and of false alarms are spread; None when nothing was predicted.

    Args:
        hit_scores: (H,) of predictions that found an object.
        miss_scores: (M,) of those that did not.
        num_objects: labelled objects, to mark the threshold of the best F1 over all; None: it is not marked.
    """
    hits, misses = (np.asarray(scores, np.float64).ravel() for scores in (hit_scores, miss_scores))
    both = np.concatenate((hits, misses))
    if not len(both):
        return None
    low, high = min(float(both.min()), 0.0), max(float(both.max()), 1.0)
    figure = new_figure()
    axes = figure.subplots()
    bins: Any = np.linspace(low, high, _NUM_BARS + 1)
    labels = [f"hits ({len(hits):,})", f"false alarms ({len(misses):,})"]
    counts, _, _ = axes.hist(
        [hits, misses], bins=bins, stacked=True, color=[COLOURS[0], COLOURS[4]], label=labels, edgecolor="white", lw=0.4
    )
    tallest = np.asarray(counts)[-1]
    if tallest.max() > 100 * max(float(np.median(tallest[tallest > 0])), 1.0):
        axes.set_yscale("symlog", linthresh=1)
    else:
        axes.locator_params(axis="y", integer=True)
    if num_objects:
        f1, threshold = best_threshold(hits, misses, num_objects)
        text = f"best F1 {f1:.2f}, score {threshold:.2f} and above"
        axes.axvline(threshold, color=COLOURS[6], linestyle="--", linewidth=1.2, label=text)
    axes.set(xlim=(low, high), xlabel="score", ylabel="predictions")
    add_legend(axes, outside=True)
    return to_png(figure)


def best_threshold(hit_scores: ArrayLike, miss_scores: ArrayLike, num_objects: int) -> tuple[float, float]:
    """Return the highest F1 over all classes and the score from which on it is reached; (0, 1) without predictions.

    Args:
        hit_scores: (H,).
        miss_scores: (M,).
        num_objects: labelled objects, found or not.

    Example:
        >>> best_threshold([0.9, 0.8], [0.85, 0.3], 2)
        (0.8, 0.8)
    """
    hits, misses = np.sort(np.asarray(hit_scores, float)), np.sort(np.asarray(miss_scores, float))
    levels = np.unique(np.concatenate((hits, misses)))
    if not len(levels):
        return 0.0, 1.0
    true = len(hits) - np.searchsorted(hits, levels)
    false = len(misses) - np.searchsorted(misses, levels)
    f1 = 2 * true / (true + false + num_objects)
    best = len(levels) - 1 - int(np.argmax(f1[::-1]))  # of equal ones the highest score, as Curve.best_f1
    return float(f1[best]), float(levels[best])
