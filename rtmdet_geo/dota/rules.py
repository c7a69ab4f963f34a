"""How the two split tools of the field cut an image and its labels: pure geometry, no files.

* "devkit": DOTA_devkit (ImgSplit_multi_process.py). The image is resized by each rate, windows of one size go over it.
  Patches are ``image__rate__x___y``; x and y count px of the resized image. Corners are cut to whole numbers before and
  after they are resized. An object that a window cuts is replaced by what the window shows of it, if that has four
  corners, or five, of which the two that are nearest to each other become one; it is difficult (2) unless more than
  ``iof_threshold`` of it is inside.
* "bboxtoolkit": MMRotate's tools/data/dota/split/img_split.py, which is BboxToolkit's. The image stays as it is,
  windows of size / rate go over it. Patches are ``image__size__x___y``. Objects keep all their corners, also those
  outside, and belong to a patch if at least ``iof_threshold`` of them is inside; they are difficult (2) unless all is.

Windows are those of the tools, in their order, quirks included: where labels are concerned, the devkit's end a pixel
before the image does; BboxToolkit's take an object whose area rounds up in float32 for cut. Golden numbers pin both.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, NamedTuple

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely.geometry.polygon import orient

from rtmdet_geo.annotations.dota import DotaObjects
from rtmdet_geo.annotations.labels import number_text
from rtmdet_geo.errors import AnnotationError, ConfigError

Tool = Literal["devkit", "bboxtoolkit"]
FloatArray = NDArray[np.float64]

#: Word of objects that a window cuts; 1 is what annotators call difficult.
_CUT = "2"
#: Windows that hold this share less of the image than the fullest one are as full (BboxToolkit).
_SAME_SHARE = 0.01
#: The largest rate (devkit) and the smallest size (px, BboxToolkit) that a patch's name may state: what a model's
#: coarsest cell covers.
_MAX_RATE, _MIN_SIZE = 100.0, 32
_PATCH_NAME = re.compile(r"(?P<image>.+)__(?P<scale>\d+(?:\.\d+)?)__(?P<x>\d+)___(?P<y>\d+)")


class Window(NamedTuple):
    """What a patch shows: ``size`` x ``size`` px from ``x``, ``y`` on, of the image resized by ``rate``.

    Attributes:
        name: of the patch, without the image's: ``1__824___0``.
        rate: 1 is the image itself.
        x: px of the resized image.
        y: likewise.
        size: side in px; may reach beyond the image.
    """

    name: str
    rate: float
    x: int
    y: int
    size: int


class PatchName(NamedTuple):
    """The parts of a patch's name: image, rate or size as written, and the window's corner in px."""

    image: str
    scale: str
    x: int
    y: int


@dataclass(frozen=True)
class SplitRules:
    """How images are cut.

    Attributes:
        tool: whose rules.
        size: side of patches in px; with "bboxtoolkit" at rate 1.
        gap: px that neighbours share; with "bboxtoolkit" at rate 1.
        rates: an image is cut once per rate; at 0.5 a patch shows twice the ground.
        iof_threshold: share of an object that has to be inside, see the module's text.
        image_threshold: with "bboxtoolkit", share of a window that has to be image, or it is left out.
        pad: fill up patches that reach beyond the image: black, with "bboxtoolkit" blue 104, green 116, red 124.

    Raises:
        ConfigError: a value is outside its range, or two rates are the same.
    """

    tool: Tool = "devkit"
    size: int = 1024
    gap: int = 200
    rates: tuple[float, ...] = (1.0,)
    iof_threshold: float = 0.7
    image_threshold: float = 0.6
    pad: bool = True

    def __post_init__(self) -> None:
        """Check the values."""
        if self.tool not in ("devkit", "bboxtoolkit"):
            raise ConfigError(f"tool={self.tool!r} is unknown; choose 'devkit' or 'bboxtoolkit'")
        if not self.rates or not all(math.isfinite(rate) and 0.01 <= rate <= _MAX_RATE for rate in self.rates):
            raise ConfigError(f"rates={self.rates!r} must be one number in [0.01, 100] at least")
        if len(set(self.rates)) < len(self.rates):
            raise ConfigError(f"rates={self.rates!r} name a rate twice")
        if self.size < 1 or not 0 <= self.gap < self.size:
            raise ConfigError(f"gap={self.gap} px must be at least 0 and below size={self.size} px, at least 1")
        if any(size <= gap for size, gap in self._scaled()):
            raise ConfigError(f"size={self.size} and gap={self.gap} px are the same at one of the rates {self.rates!r}")
        if self.tool == "bboxtoolkit" and len({size for size, _ in self._scaled()}) < len(self.rates):
            raise ConfigError(f"rates={self.rates!r} are so near to each other that two have windows of one size")
        for name in ("iof_threshold", "image_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be in [0, 1]")

    @property
    def pad_colour(self) -> tuple[int, int, int]:
        """Red, green and blue of what lies beyond the image."""
        return (0, 0, 0) if self.tool == "devkit" else (124, 116, 104)

    def _scaled(self) -> list[tuple[int, int]]:
        """Return size and gap in px by rate."""
        if self.tool == "devkit":
            return [(self.size, self.gap) for _ in self.rates]
        return [(int(self.size / rate), int(self.gap / rate)) for rate in self.rates]

    def windows(self, width: int, height: int) -> list[Window]:
        """Return all windows over an image of so many px, by column, then row; with the devkit by rate first."""
        if self.tool == "bboxtoolkit":
            return self._full_windows(width, height)
        found = []
        for rate in self.rates:
            wide, high = resized_shape(width, height, rate)
            corners = product(_devkit_starts(wide, self.size, self.gap), _devkit_starts(high, self.size, self.gap))
            found += [Window(f"{number_text(rate)}__{x}___{y}", rate, x, y, self.size) for x, y in corners]
        return found

    def _full_windows(self, width: int, height: int) -> list[Window]:
        """Return BboxToolkit's windows that are full enough, or the fullest where none is."""
        windows, shares = [], []
        for size, gap in self._scaled():
            for x, y in product(_toolkit_starts(width, size, gap), _toolkit_starts(height, size, gap)):
                windows.append(Window(f"{size}__{x}___{y}", 1.0, x, y, size))
                shares.append(min(size, width - x) * min(size, height - y) / size**2)
        if max(shares) <= self.image_threshold:
            most = max(shares)
            return [window for window, share in zip(windows, shares, strict=True) if most - share < _SAME_SHARE]
        return [window for window, share in zip(windows, shares, strict=True) if share > self.image_threshold]

    def cut(self, objects: DotaObjects, width: int, height: int, windows: Sequence[Window]) -> Iterator[list[str]]:
        """Yield for each window of an image of so many px the lines of its label file.

        Args:
            objects: of the image.
            width: of the image in px.
            height: likewise.
            windows: what :meth:`windows` gave.
        """
        if self.tool == "bboxtoolkit":
            yield from self._cut_whole(objects, windows)
            return
        for rate in self.rates:
            shape = resized_shape(width, height, rate)
            quads = _Quads(np.trunc(objects.corners) * rate)
            for window in windows:
                if window.rate == rate:
                    yield self._cut_devkit(objects, quads, window, *shape)

    def _cut_devkit(self, objects: DotaObjects, quads: _Quads, window: Window, width: int, height: int) -> list[str]:
        right, bottom = min(window.x + window.size, width - 1), min(window.y + window.size, height - 1)
        lines = []
        for index, part, share in quads.parts(window.x, window.y, right, bottom):
            corners, mark = quads.corners[index], objects.difficult[index]
            if quads.areas[index] <= 0 or share <= 0:
                continue
            if share == 1:
                numbers = _whole(corners, window)
            else:
                four = _four_corners(part)
                if four is None:
                    continue
                numbers = _whole(_as_labelled(four, corners), window)
                numbers = np.where(numbers <= 1, 1.0, np.where(numbers >= window.size, float(window.size), numbers))
                mark = mark if share > self.iof_threshold else _CUT
            lines.append(" ".join([*map(str, numbers.tolist()), objects.class_names[index], mark]))
        return lines

    def _cut_whole(self, objects: DotaObjects, windows: Sequence[Window]) -> Iterator[list[str]]:
        corners = objects.corners.astype(np.float32)
        quads = _Quads(corners.astype(np.float64))
        areas = np.maximum(quads.areas.astype(np.float32), np.float32(1e-6)).astype(np.float64)
        for window in windows:
            lines = []
            shift = np.array([-window.x, -window.y] * 4, np.float32)  # added, as the tool does: -0.0 becomes 0.0
            for index, part, _ in quads.parts(window.x, window.y, window.x + window.size, window.y + window.size):
                share = part.area / areas[index]
                if share < self.iof_threshold or share == 0:
                    continue
                mark = objects.difficult[index] if share >= 1 else _CUT
                numbers = map(str, corners[index] + shift)
                lines.append(" ".join([*numbers, objects.class_names[index], mark]))
            yield lines


def resized_shape(width: int, height: int, rate: float) -> tuple[int, int]:
    """Return width and height in px of an image resized by ``rate``, as OpenCV rounds them."""
    return max(1, round(width * rate)), max(1, round(height * rate))


def parse_patch_name(name: str, place: str = "") -> PatchName:
    """Take a patch's name apart.

    Args:
        name: ``image__rate__x___y`` or ``image__size__x___y``, without ending.
        place: where it stands; the message begins with it.

    Raises:
        AnnotationError: it is none.

    Example:
        >>> parse_patch_name("P0003__0.5__824___0")
        PatchName(image='P0003', scale='0.5', x=824, y=0)
    """
    parts = _PATCH_NAME.fullmatch(name)
    if parts is None or float(parts["scale"]) == 0:
        raise AnnotationError(
            f"{place}: " * bool(place) + f"{name!r} is no patch: names are image__rate__x___y (devkit) or "
            "image__size__x___y (bboxtoolkit), as `rtmdet-geo data split` gives them"
        )
    return PatchName(parts["image"], parts["scale"], int(parts["x"]), int(parts["y"]))


def find_tool(names: Iterable[str], tool: Tool | None = None) -> Tool:
    """Return whose patches some names are of.

    A rate is 100 at most, a size a whole number from 32 on; what is both says nothing.

    Args:
        names: of patches; others say nothing.
        tool: the one they should be of; None: the one they say.

    Raises:
        ConfigError: a name contradicts ``tool`` or another name, or none says whose they are.

    Example:
        >>> find_tool(["P0003__1024__824___0"])
        'bboxtoolkit'
    """
    said: dict[Tool, str] = {}
    unsure = ""
    for name in names:
        parts = _PATCH_NAME.fullmatch(name)
        if parts is None:
            continue
        scale = float(parts["scale"])
        if scale > _MAX_RATE:
            said.setdefault("bboxtoolkit", name)
        elif scale < _MIN_SIZE or not scale.is_integer():
            said.setdefault("devkit", name)
        else:
            unsure = unsure or name
    meanings = {"devkit": "a rate", "bboxtoolkit": "a size in px"}
    if len(said) > 1:
        raise ConfigError(
            f"patches {said['devkit']!r} and {said['bboxtoolkit']!r} were not made by one tool (image__rate__x___y by "
            "devkit, image__size__x___y by bboxtoolkit): merge those of each by themselves"
        )
    for found, name in said.items():
        if tool is not None and tool != found:
            raise ConfigError(
                f"patch {name!r} is none of {tool}: after the image it names {meanings[found]}, not {meanings[tool]}; "
                f"it is of {found}"
            )
        return found
    if tool is None and unsure:
        raise ConfigError(f"patch {unsure!r} names a rate (devkit) or a size (bboxtoolkit): say whose it is by tool")
    return tool or "devkit"


def _devkit_starts(length: int, size: int, gap: int) -> list[int]:
    last = max(length - size, 0)
    return [*range(0, last, size - gap), last]


def _toolkit_starts(length: int, size: int, gap: int) -> list[int]:
    if length <= size:
        return [0]
    step = size - gap
    starts = [step * index for index in range(math.ceil((length - size) / step + 1))]
    return [*starts[:-1], min(starts[-1], length - size)]


class _Quads:
    """Quadrilaterals as shapely polygons, with bounds that sort out those which a window does not touch."""

    def __init__(self, corners: FloatArray) -> None:
        """Make polygons of (N, 8) corners; those that cross themselves become valid ones of the same area."""
        self.corners = corners
        self._polygons = shapely.polygons(corners.reshape(-1, 4, 2))
        self.areas: FloatArray = shapely.area(self._polygons)
        broken = ~shapely.is_valid(self._polygons)
        if broken.any():
            self._polygons[broken] = shapely.make_valid(self._polygons[broken])
            self.areas[broken] = shapely.area(self._polygons[broken])
        self._low = corners.reshape(-1, 4, 2).min(axis=1)
        self._high = corners.reshape(-1, 4, 2).max(axis=1)

    def parts(
        self, left: float, top: float, right: float, bottom: float
    ) -> Iterator[tuple[int, shapely.Geometry, float]]:
        """Yield index, what a window shows, and its share of the area, of each polygon whose bounds it overlaps."""
        touched = (self._low < (right, bottom)).all(axis=1) & (self._high > (left, top)).all(axis=1)
        indexes = np.flatnonzero(touched)
        window = shapely.Polygon([(left, top), (right, top), (right, bottom), (left, bottom)])
        shown = shapely.intersection(self._polygons[indexes], window)
        with np.errstate(divide="ignore", invalid="ignore"):
            shares = shapely.area(shown) / self.areas[indexes]
        yield from zip(indexes.tolist(), shown, shares.tolist(), strict=True)


def _four_corners(part: shapely.Geometry) -> FloatArray | None:
    """Return four corners (4, 2) of what is left of an object, None where it has fewer, or more than five.

    Of several pieces, which only quadrilaterals with a notch fall into, the largest counts.
    """
    pieces = [piece for piece in shapely.get_parts(part) if piece.geom_type == "Polygon"]
    if not pieces:
        return None
    points = np.array(orient(max(pieces, key=shapely.area), sign=1).exterior.coords)[:-1]
    if len(points) == 4:
        return points
    if len(points) != 5:
        return None
    lengths = [math.dist(points[index], points[(index + 1) % 5]) for index in range(5)]
    first = int(np.argmin(lengths))
    middle = (points[first] + points[(first + 1) % 5]) / 2
    points[first] = middle
    return np.delete(points, (first + 1) % 5, axis=0)


def _as_labelled(points: FloatArray, corners: FloatArray) -> FloatArray:
    """Return points (4, 2) as (8,), beginning where they are nearest to the corners (8,) of the labelled object."""
    orders = [np.roll(points, -turn, axis=0).reshape(8) for turn in range(4)]
    return orders[int(np.argmin([((order - corners) ** 2).sum() for order in orders]))]


def _whole(corners: FloatArray, window: Window) -> FloatArray:
    """Return corners (8,) in px of the patch, cut to whole numbers; as floats, for that is how they are printed."""
    return np.asarray(np.trunc(corners - np.array([window.x, window.y] * 4)) + 0.0)  # and not -0
