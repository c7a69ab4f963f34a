"""Conventions for the angle of a rotated box and for the order of its corners, by name.

The package itself has one convention (:mod:`rtmdet_geo.boxes`): rad, positive clockwise on screen. Files come in
others, which their numbers do not tell apart, so one is always stated: range, unit and sense, as ``le135,deg,cw``.

======== ============== ======================= =====================================================
range    degrees        w                       who
======== ============== ======================= =====================================================
any      any            either side             HRSC2016, roLabelImg, labelImg2, most text files
oc       [-90, 0)       either side             OpenCV before 4.5.1 and from 4.13 on, MMRotate 1.x
oc451    (0, 90]        either side             OpenCV 4.5.1 to 4.12, MMRotate 0.x (which says "oc", too)
le90     [-90, 90)      the long side           MMRotate, this package
le135    [-45, 135)     the long side           MMRotate
======== ============== ======================= =====================================================

The range is that of the number as written: with ``ccw`` it holds for the counter-clockwise angle. OpenCV's changes:
https://github.com/opencv/opencv/issues/19472 and pull request 28051.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rtmdet_geo.boxes import as_boxes, as_polygons
from rtmdet_geo.errors import ConfigError

FloatArray = NDArray[np.float64]
AngleRange = Literal["any", "oc", "oc451", "le90", "le135"]
AngleUnit = Literal["rad", "deg"]
AngleSense = Literal["cw", "ccw"]
CornerOrder = Literal["any", "head", "top-left"]

#: By how much rounded numbers may leave their range (degrees), and w be shorter than h (px).
_ROUNDING_DEG, _ROUNDING_PX = 0.06, 0.01


class _Span(NamedTuple):
    """A range in degrees: of its two ends, ``start`` belongs to it if ``has_start``, else the other does."""

    start: float
    length: float
    has_start: bool
    is_long: bool


_SPANS = {
    "oc": _Span(-90.0, 90.0, True, False),
    "oc451": _Span(0.0, 90.0, False, False),
    "le90": _Span(-90.0, 180.0, True, True),
    "le135": _Span(-45.0, 180.0, True, True),
}


@dataclass(frozen=True)
class AngleConvention:
    """How a file writes rotated boxes.

    Attributes:
        range: of the angle, and whether w is the long side; see the table above.
        unit: of the angle.
        sense: on screen, x to the right and y down, of a positive angle.
    """

    range: AngleRange = "any"
    unit: AngleUnit = "rad"
    sense: AngleSense = "cw"

    def __str__(self) -> str:
        """Return the text that :func:`parse_angle` reads."""
        return f"{self.range},{self.unit},{self.sense}"

    @property
    def half_turn(self) -> float:
        """Half a turn in the unit."""
        return 180.0 if self.unit == "deg" else float(np.pi)


def parse_angle(text: str) -> AngleConvention:
    """Return the convention that a text such as ``oc,deg`` names; what it leaves out is ``any``, ``rad``, ``cw``.

    Raises:
        ConfigError: a word is unknown, or there are two of a kind.

    Example:
        >>> parse_angle("deg,le135")
        AngleConvention(range='le135', unit='deg', sense='cw')
    """
    known = dict.fromkeys(get_args(AngleRange), "range")
    known |= dict.fromkeys(get_args(AngleUnit), "unit") | dict.fromkeys(get_args(AngleSense), "sense")
    found: dict[str, str] = {}
    for word in text.split(","):
        kind = known.get(word.strip().lower())
        if kind is None or kind in found:
            reason = "is unknown" if kind is None else f"is a second {kind}"
            raise ConfigError(f"angle {text!r}: {word.strip()!r} {reason}; give up to one each of {_choices()}")
        found[kind] = word.strip().lower()
    return AngleConvention(**found)  # type: ignore[arg-type]


def _choices() -> str:
    return ", ".join("|".join(get_args(kind)) for kind in (AngleRange, AngleUnit, AngleSense))


def boxes_to_convention(boxes: ArrayLike, convention: AngleConvention) -> FloatArray:
    """Return the same rectangles as a convention writes them.

    Args:
        boxes: (N, 5) cx, cy, w, h in px, angle in rad, clockwise; of any range.
        convention: of the result.

    Returns:
        (N, 5) float64; w and h are swapped where the range wants it.
    """
    result = as_boxes(boxes).copy()
    half_turn = convention.half_turn
    angle = result[:, 4] * (half_turn / np.pi) * (-1.0 if convention.sense == "ccw" else 1.0)
    if convention.range != "any":
        span = _SPANS[convention.range]
        is_turned = (result[:, 2] < result[:, 3]) & span.is_long
        start, length = span.start * half_turn / 180.0, span.length * half_turn / 180.0
        turned = np.where(is_turned, angle + half_turn / 2, angle)
        angle = _wrap(turned, start, length, span.has_start)
        if not span.is_long:
            is_turned = np.rint((angle - turned) / (half_turn / 2)) % 2 == 1
        result[:, 2:4] = np.where(is_turned[:, None], result[:, [3, 2]], result[:, 2:4])
    result[:, 4] = angle + 0.0  # no negative zero
    return result


def _wrap(angle: FloatArray, start: float, length: float, has_start: bool) -> FloatArray:
    """Return angles plus a multiple of ``length``, in [start, start + length), or (start, start + length]."""
    if has_start:
        wrapped = start + np.mod(angle - start, length)
        return np.where(wrapped >= start + length, start, wrapped)  # np.mod of a tiny negative number rounds to length
    end = start + length
    wrapped = end - np.mod(end - angle, length)
    return np.where(wrapped <= start, end, wrapped)


def boxes_from_convention(boxes: ArrayLike, convention: AngleConvention) -> FloatArray:
    """Return boxes as the package has them: the angle in rad, clockwise; w, h and range as they were.

    Args:
        boxes: (N, 5) cx, cy, w, h in px, angle as the convention says.
        convention: of the boxes.
    """
    result = as_boxes(boxes).copy()
    result[:, 4] *= np.pi / convention.half_turn * (-1.0 if convention.sense == "ccw" else 1.0)
    return result


def convention_fault(width: float, height: float, angle: float, convention: AngleConvention) -> str | None:
    """Return what in a box contradicts the convention that it should follow, but for rounding; None if nothing does."""
    in_degrees = angle * 180.0 / convention.half_turn
    if convention.unit == "rad" and abs(in_degrees) > 360 + _ROUNDING_DEG:
        return f"angle {angle:g} rad is more than a turn, as if it were in degrees"
    span = _SPANS.get(convention.range)
    if span is None:
        return None
    if not span.start - _ROUNDING_DEG <= in_degrees <= span.start + span.length + _ROUNDING_DEG:
        return f"angle {angle:g} {convention.unit} is not in the range of {convention}"
    if span.is_long and width < height - _ROUNDING_PX:
        return f"w {width:g} is shorter than h {height:g}, but in {convention} it is the long side"
    return None


def order_corners(polygons: ArrayLike, order: CornerOrder) -> FloatArray:
    """Return the same quadrilaterals with their corners in another order.

    Args:
        polygons: (N, 4, 2) or (N, 8) x y in px.
        order: "any" leaves the corners as they are. "head" keeps the first one, which marks an object's head, and lets
            the others follow clockwise on screen. "top-left" goes clockwise from the corner that makes the way from
            the four corners to those of the enclosing box, from its top left on, shortest (DOTA_devkit's
            ``get_best_begin_point``; of equal ways the first).

    Returns:
        (N, 4, 2) float64.

    Raises:
        ValueError: unknown order.
    """
    corners = as_polygons(polygons)
    if order == "any" or not len(corners):
        return corners
    if order not in ("head", "top-left"):
        raise ValueError(f"unknown order of corners {order!r}; use any, head or top-left")
    following = np.roll(corners, -1, axis=1)
    doubled_area = (corners[..., 0] * following[..., 1] - corners[..., 1] * following[..., 0]).sum(axis=1)
    corners = np.where((doubled_area < 0)[:, None, None], corners[:, [0, 3, 2, 1]], corners)  # y down: > 0 is clockwise
    if order == "head":
        return corners
    low, high = corners.min(axis=1), corners.max(axis=1)
    frame = np.stack([low, np.stack([high[:, 0], low[:, 1]], 1), high, np.stack([low[:, 0], high[:, 1]], 1)], axis=1)
    turned = np.stack([np.roll(corners, -first, axis=1) for first in range(4)], axis=1)  # (N, 4 starts, 4, 2)
    ways = np.hypot(*np.moveaxis(turned - frame[:, None], -1, 0)).sum(axis=2)
    return np.asarray(turned[np.arange(len(corners)), ways.argmin(axis=1)])
