"""Charts of what a data set holds: objects by class, their sizes, shapes and directions, how dense they lie."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rtmdet_geo.charts import COLOURS, HEIGHT, WIDTH, add_legend, new_figure, shortened, to_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from rtmdet_geo.dataset_stats import PartStats

Array = NDArray[Any]

#: Files that :func:`draw_stats` may make.
CHARTS = ("classes.png", "objects.png")
#: Classes that get a bar; the others share one.
MAX_CLASSES = 40
_NUM_BARS = 40


def draw_stats(stats: Mapping[str, PartStats]) -> dict[str, bytes]:
    """Return charts as PNG by file name: ``classes.png``, and ``objects.png`` where there are boxes; {} of nothing.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    if not any(len(part.labels) for part in stats.values()):
        return {}
    charts = {"classes.png": draw_classes(stats)}
    if any(np.isfinite(part.boxes).any() for part in stats.values()):
        charts["objects.png"] = draw_objects(stats)
    return charts


def draw_classes(stats: Mapping[str, PartStats]) -> bytes:
    """Return a PNG of the number of objects of each class, a bar a part, the most frequent class first."""
    counts = {
        name: dict(zip(part.classes, np.bincount(part.labels, minlength=len(part.classes)).tolist(), strict=True))
        for name, part in stats.items()
    }
    totals = {name: sum(part.get(name, 0) for part in counts.values()) for part in counts.values() for name in part}
    ranked = sorted(totals, key=lambda name: -totals[name])
    shown, rest = (ranked, []) if len(ranked) <= MAX_CLASSES else (ranked[: MAX_CLASSES - 1], ranked[MAX_CLASSES - 1 :])
    names = [shortened(name).strip() for name in shown] + ([f"{len(rest)} more classes"] if rest else [])
    figure = new_figure(height=max(1.5, 1.1 + 0.26 * len(names)))
    axes = figure.subplots()
    thickness = 0.8 / len(counts)
    largest = 1
    for number, (part, of_class) in enumerate(counts.items()):
        values = [of_class.get(name, 0) for name in shown] + ([sum(of_class.get(n, 0) for n in rest)] if rest else [])
        places = np.arange(len(names)) + (number - (len(counts) - 1) / 2) * thickness
        colour = COLOURS[number % len(COLOURS)]
        bars = axes.barh(places, values, thickness * 0.92, color=colour, label=f"{part} ({sum(values):,})")
        axes.bar_label(bars, [f"{value:,}" for value in values], padding=3, fontsize=8)
        largest = max(largest, *values)
    axes.set_yticks(range(len(names)), names)
    for text in axes.get_yticklabels():
        text.set_parse_math(False)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel("objects" if len(counts) > 1 else f"objects, {sum(totals.values()):,} together")
    least = min(value for value in totals.values() if value)
    if largest > 100 * least:
        axes.set_xscale("log")
        axes.set_xlim(max(0.5, least / 2), largest * 3)
    else:
        axes.set_xlim(0, largest * 1.15)
    if len(counts) > 1:
        add_legend(axes, outside=True)
    return to_png(figure)


def draw_objects(stats: Mapping[str, PartStats]) -> bytes:
    """Return a PNG of six histograms: long sides in px and metres, aspect, direction, objects an image, density."""
    figure = new_figure(WIDTH * 1.6, HEIGHT * 1.6)
    (long_px, long_m, aspect), (angle, number, density) = figure.subplots(2, 3)
    _histogram(long_px, {name: part.boxes[:, 2] for name, part in stats.items()}, "long side, px", is_log=True)
    sides = {name: part.sides_m[:, 0] for name, part in stats.items()}
    if any(np.isfinite(values).any() for values in sides.values()):
        _histogram(long_m, sides, "long side, m", is_log=True)
    else:
        sizes = {name: np.sqrt(np.prod(part.sizes.astype(float), axis=1)) for name, part in stats.items()}
        _histogram(long_m, sizes, "side of a square as large as the image, px", what="images")
    _histogram(aspect, {name: part.aspects for name, part in stats.items()}, "long / short side", is_log=True)
    turns = {name: part.angles_deg for name, part in stats.items()}
    _histogram(angle, turns, "angle of elongated objects, deg clockwise", limits=(0, 180))
    angle.set_xticks(range(0, 181, 45))
    counts = {name: part.objects_per_image for name, part in stats.items()}
    _histogram(number, counts, "objects an image", what="images", is_whole=True)
    _histogram(density, {name: part.density for name, part in stats.items()}, "objects per million px", what="images")
    if len(stats) > 1:
        add_legend(long_px)
    return to_png(figure)


def _histogram(
    axes: Axes,
    values: Mapping[str, Array],
    label: str,
    *,
    what: str = "objects",
    is_log: bool = False,
    is_whole: bool = False,
    limits: tuple[float, float] | None = None,
) -> None:
    """Draw how values of each part are spread, the parts over each other."""
    numbers = {name: one[np.isfinite(one)].astype(float) for name, one in values.items()}
    together = np.concatenate(list(numbers.values()))
    axes.set(xlabel=label, ylabel=what)
    if not len(together):
        axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", color="grey")
        return
    low, high = limits or (float(together.min()), float(together.max()))
    if is_log:
        low, high = low / 1.05, high * 1.05
        bins: Any = np.geomspace(low, high, _NUM_BARS + 1)
        axes.set_xscale("log")
        _plain_ticks(axes, low, high)
    elif is_whole and high - low <= 2 * _NUM_BARS:
        bins = np.arange(low, high + 2) - 0.5
        axes.locator_params(axis="x", integer=True)
    else:
        margin = 0.0 if high > low else max(0.05 * abs(high), 0.5)
        bins = np.linspace(low - margin, high + margin, (36 if limits else _NUM_BARS) + 1)
    for number, (name, one) in enumerate(numbers.items()):
        colour = COLOURS[number % len(COLOURS)]
        axes.hist(one, bins=bins, color=colour, alpha=0.75 if number == 0 else 0.5, label=name)
    axes.locator_params(axis="y", integer=True)
    if what == "images" and np.histogram(together, bins)[0].max() > 200:
        axes.set_yscale("symlog", linthresh=1)


def _plain_ticks(axes: Axes, low: float, high: float) -> None:
    """Put 1, 2, 5, 10, ... below a logarithmic axis, as plain numbers, few enough to be read."""
    first, last = int(np.floor(np.log10(low))), int(np.ceil(np.log10(high)))
    steps = (1, 2, 5) if last - first <= 2 else (1,)
    ticks = [step * 10.0**power for power in range(first, last + 1) for step in steps]
    if sum(low <= tick <= high for tick in ticks) < 2:
        ticks = [round(tick, 2) for tick in np.geomspace(low, high, 4)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
