"""Pictures of a run: losses, learning rate, figures of validation. matplotlib, inside functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.charts import COLOURS, HEIGHT, STYLES, add_legend, new_figure, to_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Table = Sequence[Mapping[str, str]]
Array = NDArray[np.float64]

#: A smoothed line averages over this share of the rows.
_SMOOTHING = 0.025


def draw_losses(log: Table) -> bytes | None:
    """Return a PNG of the total loss and its terms, as they are and smoothed; None where there are no rows."""
    columns = [name for name in (log[0] if log else {}) if name.startswith("loss_")]
    iterations, total = _series(log, "loss")
    if len(total) == 0:
        return None
    figure = new_figure(height=HEIGHT * (1.45 if columns else 1))
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
        add_legend(axes[1])
    _label_iterations(axes[-1])
    return to_png(figure)


def draw_learning_rate(log: Table) -> bytes | None:
    """Return a PNG of the learning rate; None where there are no rows."""
    iterations, rates = _series(log, "lr")
    if len(rates) == 0:
        return None
    figure = new_figure()
    axes = figure.subplots()
    axes.plot(iterations, rates, color=COLOURS[0], marker=_marker(len(rates)))
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    axes.set_ylabel("learning rate")
    _label_iterations(axes)
    return to_png(figure)


def draw_history(history: Table) -> bytes | None:
    """Return a PNG of the figures of each validation, the best state marked; None where there are none."""
    names = [name for name in (history[0] if history else {}) if name != "iteration"]
    shown = [name for name in names if not name.removeprefix("mask ").startswith("AR")][: len(COLOURS)]
    series = {name: _series(history, name) for name in shown}
    series = {name: (at, values) for name, (at, values) in series.items() if len(values)}
    if not series:
        return None
    figure = new_figure()
    axes = figure.subplots()
    for number, (name, (at, values)) in enumerate(series.items()):
        axes.plot(at, values, label=name, color=COLOURS[number], linestyle=STYLES[number % 4], marker="o", ms=3.5)
    if names[0] in series:
        at, values = series[names[0]]
        best = int(np.argmax(values))
        label = f"best {names[0]}: {values[best]:.3f} at {at[best]:,.0f}"
        ring: dict[str, Any] = {"ms": 11, "mfc": "none", "mec": COLOURS[0], "mew": 1.6}
        axes.plot(at[best], values[best], "o", linestyle="none", label=label, **ring)
    top = max(float(values.max()) for _, values in series.values())
    axes.set_ylim(0, min(1.04, 1.25 * top) if top > 0 else 1.04)
    axes.set_ylabel("average precision on left-out images" if "AP" in names[0] else "figures on left-out images")
    _label_iterations(axes)
    add_legend(axes)
    return to_png(figure)


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
    colour, span = COLOURS[number % len(COLOURS)], _SMOOTHING * len(values)
    style = "-" if label == "total" else STYLES[number % 4]
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
