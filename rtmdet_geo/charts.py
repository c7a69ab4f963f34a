"""What the package's charts have in common: size, colours, legend, PNG. matplotlib, inside functions.

Colours are those of Okabe and Ito (2008, Color Universal Design), told apart by the colour-blind; line styles differ as
well. Figures are drawn without pyplot, which would change the state of the host program.
"""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING, Any

from rtmdet_geo.errors import MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")
GREY = "#8a8a8a"
#: Size of a usual chart in inches, and its dots per inch.
WIDTH, HEIGHT, DPI = 7.2, 4.2, 140


def require_matplotlib() -> Any:
    """Return matplotlib.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise MissingDependencyError(
            f"matplotlib cannot be imported ({error}); for charts run: pip install 'rtmdet-geo[eval]'"
        ) from error
    return matplotlib


def new_figure(width: float = WIDTH, height: float = HEIGHT) -> Figure:
    """Return an empty figure of so many inches.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")


def add_legend(axes: Axes, *, outside: bool = False) -> None:
    """Add a legend where there is room, or to the right of the axes."""
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0)} if outside else {"loc": "best"}
    legend = axes.legend(frameon=not outside, framealpha=0.85, edgecolor="none", fontsize=9, handlelength=2.8, **place)
    for text in legend.get_texts():
        text.set_parse_math(False)  # names of classes are no formulas


def shortened(name: str, limit: int = 24) -> str:
    """Return a class's name for a legend, which would hide one that begins with an underscore."""
    short = name if len(name) <= limit else name[: limit - 1] + "\N{HORIZONTAL ELLIPSIS}"
    return f" {short}" if short.startswith("_") else short


def to_png(figure: Figure, *, grid: bool = True, is_fitted: bool = False) -> bytes:
    """Return a figure as PNG.

    Args:
        figure: to draw.
        grid: draw one and leave room beside the lines.
        is_fitted: the picture is as large as what is on it, where the layout would cut something off.
    """
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        if grid:
            axes.grid(color="#dddddd", linewidth=0.6)
            axes.set_axisbelow(True)
            axes.margins(x=0.02)
        for line in axes.lines:
            line.set_solid_capstyle("round")
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a box stands for it
        figure.savefig(stream, format="png", bbox_inches="tight" if is_fitted else None)
    return stream.getvalue()
