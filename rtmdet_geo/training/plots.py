"""Pictures of a run: losses, learning rate, figures of validation, precision over recall. matplotlib, inside functions.

Colours are those of Okabe and Ito (2008, Color Universal Design), told apart by the colour-blind; line styles differ as
well. Figures are drawn without pyplot, which would change the state of the host program.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.evaluation.rotated import Curve
from rtmdet_geo.training.validate import NamedCurve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Table = Sequence[Mapping[str, str]]
Array = NDArray[np.float64]

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES = ("-", "--", "-.", ":")
_GREY = "#8a8a8a"
_WIDTH, _HEIGHT, _DPI = 7.2, 4.2, 140
#: A smoothed line averages over this share of the rows.
_SMOOTHING = 0.025
#: Lines that a picture names; more cannot be told apart.
MAX_NAMED = 10


def draw_losses(log: Table) -> bytes | None:
    """Return a PNG of the total loss and its terms, as they are and smoothed; None where there are no rows."""
    columns = [name for name in (log[0] if log else {}) if name.startswith("loss_")]
    iterations, total = _series(log, "loss")
    if len(total) == 0:
        return None
    figure = _figure(height=_HEIGHT * (1.45 if columns else 1))
    axes = figure.subplots(2 if columns else 1, 1, sharex=True, squeeze=False)[:, 0]
    _draw_smoothed(axes[0], iterations, total, "total", 6)
    axes[0].set_ylabel("loss, total")
    _set_loss_scale(axes[0], total)
    if columns:
        drawn = []
        for number, name in enumerate(columns):
            at, values = _series(log, name)
            _draw_smoothed(axes[1], at, values, name.removeprefix("loss_"), number)
            drawn.append(values)
        axes[1].set_ylabel("loss, terms")
        _set_loss_scale(axes[1], np.concatenate(drawn))
        _add_legend(axes[1])
    _label_iterations(axes[-1])
    return _to_png(figure)


def draw_learning_rate(log: Table) -> bytes | None:
    """Return a PNG of the learning rate; None where there are no rows."""
    iterations, rates = _series(log, "lr")
    if len(rates) == 0:
        return None
    figure = _figure()
    axes = figure.subplots()
    axes.plot(iterations, rates, color=_COLOURS[0], marker=_marker(len(rates)))
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    axes.set_ylabel("learning rate")
    _label_iterations(axes)
    return _to_png(figure)


def draw_history(history: Table) -> bytes | None:
    """Return a PNG of the figures of each validation, the best state marked; None where there are none."""
    names = [name for name in (history[0] if history else {}) if name != "iteration"]
    shown = [name for name in names if not name.removeprefix("mask ").startswith("AR")][: len(_COLOURS)]
    series = {name: _series(history, name) for name in shown}
    series = {name: (at, values) for name, (at, values) in series.items() if len(values)}
    if not series:
        return None
    figure = _figure()
    axes = figure.subplots()
    for number, (name, (at, values)) in enumerate(series.items()):
        axes.plot(at, values, label=name, color=_COLOURS[number], linestyle=_STYLES[number % 4], marker="o", ms=3.5)
    if names[0] in series:
        at, values = series[names[0]]
        best = int(np.argmax(values))
        label = f"best {names[0]}: {values[best]:.3f} at {at[best]:,.0f}"
        ring: dict[str, Any] = {"ms": 11, "mfc": "none", "mec": _COLOURS[0], "mew": 1.6}
        axes.plot(at[best], values[best], "o", linestyle="none", label=label, **ring)
    top = max(float(values.max()) for _, values in series.values())
    axes.set_ylim(0, min(1.04, 1.25 * top) if top > 0 else 1.04)
    axes.set_ylabel("average precision on left-out images" if "AP" in names[0] else "figures on left-out images")
    _label_iterations(axes)
    _add_legend(axes)
    return _to_png(figure)


def draw_precision_recall(curves: Sequence[NamedCurve]) -> bytes | None:
    """Return a PNG of precision over recall of each class, the threshold of the best F1 marked; None without curves.

    Precision is made monotone, so that the area below a line is the average precision by protocol "area". Of more
    classes than can be told apart those with the most objects have colour and name, the others are grey.
    """
    curves = [item for item in curves if len(item.curve.recall)]
    if not curves:
        return None
    ranked = sorted(curves, key=lambda item: -item.curve.num_objects)
    figure = _figure(height=_HEIGHT * 1.15)
    axes = figure.subplots()
    for item in ranked[MAX_NAMED:]:
        axes.plot(*_monotone(item.curve), drawstyle="steps-pre", color=_GREY, alpha=0.35, linewidth=0.8)
    for number, item in enumerate(ranked[:MAX_NAMED]):
        curve, colour = item.curve, _COLOURS[number % len(_COLOURS)]
        recall, precision = _monotone(curve)
        style = _STYLES[(number // len(_COLOURS) * 2 + number) % 4]
        label = f"{_shortened(item.name)}  {item.measure} {item.average:.3f}"
        axes.plot(recall, precision, drawstyle="steps-pre", color=colour, linestyle=style, label=label)
        f1, score = curve.best_f1
        at = int(np.argmin(np.abs(curve.scores - score)))
        axes.plot(curve.recall[at], curve.precision[at], "o", ms=6, mfc="white", mec=colour, mew=1.5)
        if len(ranked) <= 3:
            text = f"F1 {f1:.2f} from score {score:.2f} on"
            place = (curve.recall[at], curve.precision[at])
            axes.annotate(text, place, xytext=(-7, -13), textcoords="offset points", color=colour, ha="right")
    axes.plot([], [], "o", ms=6, mfc="white", mec=_GREY, mew=1.5, linestyle="none", label="best F1")
    if len(ranked) > MAX_NAMED:
        axes.plot([], [], color=_GREY, alpha=0.5, label=f"{len(ranked) - MAX_NAMED} more classes")
    axes.set(xlim=(0, 1.005), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
    _add_legend(axes, outside=len(ranked) > 3)
    return _to_png(figure)


def _monotone(curve: Curve) -> tuple[Array, Array]:
    """Return recall from 0 on, and the best precision at that recall or a higher one."""
    envelope = np.maximum.accumulate(curve.precision[::-1])[::-1]
    return np.append(0.0, curve.recall), np.append(envelope[:1], envelope)


def smooth(values: Array, span: float) -> Array:
    """Return the exponential mean of values, of the weight of the last ``span`` of them; it starts without bias."""
    keep = math.exp(-1 / span) if span > 0 else 0.0
    result, mean, weight = np.empty(len(values)), 0.0, 0.0
    for number, value in enumerate(values):
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        result[number] = mean / weight
    return result


def _series(table: Table, name: str) -> tuple[Array, Array]:
    """Return iterations and values of a column, without what is empty or no finite number."""
    rows = [(float(row["iteration"]), float(row[name])) for row in table if row.get(name)]
    points = np.array([pair for pair in rows if math.isfinite(pair[1])]).reshape(-1, 2)
    return points[:, 0], points[:, 1]


def _draw_smoothed(axes: Axes, iterations: Array, values: Array, label: str, number: int) -> None:
    """Draw what was logged pale, and its smoothed course over it."""
    colour, span = _COLOURS[number % len(_COLOURS)], _SMOOTHING * len(values)
    style = "-" if label == "total" else _STYLES[number % 4]
    if span < 1:
        axes.plot(iterations, values, color=colour, label=label, linestyle=style, marker=_marker(len(values)))
        return
    axes.plot(iterations, values, color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(iterations, smooth(values, span), color=colour, label=label, linestyle=style)


def _set_loss_scale(axes: Axes, values: Array) -> None:
    """Start at 0, unless the values span more than a line can show."""
    positive = values[values > 0]
    if len(positive) == len(values) and len(values) and values.max() > 20 * values.min():
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)


def _label_iterations(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("iteration")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def _marker(number: int) -> str:
    """Return a marker where there are so few points that a line alone would hide them."""
    return "o" if number < 3 else ""


def _shortened(name: str) -> str:
    """Return a class's name for a legend, which would hide one that begins with an underscore."""
    short = name if len(name) <= 24 else name[:23] + "\N{HORIZONTAL ELLIPSIS}"
    return f" {short}" if short.startswith("_") else short


def _figure(height: float = _HEIGHT) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(_WIDTH, height), dpi=_DPI, layout="constrained", facecolor="white")


def _add_legend(axes: Axes, *, outside: bool = False) -> None:
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0)} if outside else {"loc": "best"}
    legend = axes.legend(frameon=not outside, framealpha=0.85, edgecolor="none", fontsize=9, handlelength=2.8, **place)
    for text in legend.get_texts():
        text.set_parse_math(False)  # names of classes are no formulas


def _to_png(figure: Figure) -> bytes:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.margins(x=0.02)
        for line in axes.lines:
            line.set_solid_capstyle("round")
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a box stands for it
        figure.savefig(stream, format="png")
    return stream.getvalue()
