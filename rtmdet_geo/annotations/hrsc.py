"""HRSC2016 XML files: ships with rotated boxes, classes on three levels.

``mbox_cx mbox_cy mbox_w mbox_h`` are px of the image, ``mbox_ang`` rad, positive clockwise on screen. ``Class_ID`` is
1000000 followed by the two digits below. Level 1 takes every object as a ship; level 2 tells aircraft carriers,
warcraft, merchant ships and submarines; level 3 tells their types. An object whose class is known less exactly keeps
the name that it has: a ship of no known category is "ship" at every level.

Digits and names are those of MMRotate's ``HRSCDataset`` (mmrotate/datasets/hrsc.py); 21 and 23 are not in use. These
files do not say which type is in which category; the data set's ``sysdata.xml``, which few copies hold, does
(``HRS_Class_ID``). Public lists differ on six types. Here, as in one that says it was read from that file, 16 is an
aircraft carrier (Tarawa has a flight deck from bow to stern), 19, 28 and 29 (hospital ships) are warcraft, 20 and 30
(car carriers) merchant ships. On the other types the lists that were compared agree.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Literal

from rtmdet_geo.annotations.labels import (
    ImageLabels,
    hboxes_to_le90,
    make_labels,
    parse_difficult,
    parse_floats,
)
from rtmdet_geo.boxes import boxes_to_hboxes, regularize_le90
from rtmdet_geo.class_names import HRSC, HRSC_LEVEL3
from rtmdet_geo.errors import AnnotationError
from rtmdet_geo.structures import Kind

HrscLevel = Literal[1, 2, 3]

(_SHIP,) = HRSC
#: First digits of every Class_ID.
_PREFIX = "1000000"
#: Last two digits of the names of level 3, in their order.
_DIGITS = "01 02 03 04 05 06 07 08 09 10 11 12 13 14 15 16 17 18 19 20 22 24 25 26 27 28 29 30 31 32 33".split()
#: Last two digits of what is in a category; a category's first is the category itself.
_CATEGORIES = {
    "aircraft carrier": "02 05 06 12 13 16 31 32 33",
    "warcraft": "03 07 08 09 10 11 14 15 17 19 28 29",
    "merchant ship": "04 18 20 22 24 25 26 30",
    "submarine": "27",
}
_CATEGORY_OF = {digits: category for category, members in _CATEGORIES.items() for digits in members.split()}
#: Names at levels 1, 2 and 3 by Class_ID.
HRSC_CLASSES: dict[str, tuple[str, str, str]] = {
    _PREFIX + digits: (_SHIP, _CATEGORY_OF.get(digits, _SHIP), name)
    for digits, name in zip(_DIGITS, HRSC_LEVEL3, strict=True)
}


def read_hrsc(path: Path, level: HrscLevel = 1, kind: Kind = "rotated") -> ImageLabels:
    """Read an HRSC2016 XML file.

    Args:
        path: of the file.
        level: of the classes; at levels 2 and 3 a Class_ID that is not in use is named "class 100000021".
        kind: of the model that the boxes are for, see :class:`rtmdet_geo.annotations.labels.ImageLabels`.

    Raises:
        AnnotationError: not XML, no HRSC_Image, or an object lacks a field; the message begins with the file.
    """
    try:
        root = ElementTree.parse(path).getroot()
    except OSError as error:
        raise AnnotationError(f"cannot read label file {str(path)!r}: {error.strerror or error}") from error
    except ElementTree.ParseError as error:
        raise AnnotationError(f"{path} is not XML: {error}") from error
    objects = root.find("HRSC_Objects")
    if root.tag != "HRSC_Image" or objects is None:
        raise AnnotationError(f"{path} is not of HRSC2016: it needs HRSC_Image with HRSC_Objects, not {root.tag!r}")
    boxes, names, difficult = [], [], []
    for number, entry in enumerate(objects.findall("HRSC_Object"), 1):
        place = f"{path}, object {number}"
        fields = ("mbox_cx", "mbox_cy", "mbox_w", "mbox_h", "mbox_ang")
        box = parse_floats([_text(entry, field, place) for field in fields], place)
        if box[2] < 0 or box[3] < 0:
            raise AnnotationError(f"{place}: sides {box[2]:g} x {box[3]:g} px are negative")
        boxes.append(box)
        names.append(_class_name(_text(entry, "Class_ID", place), level))
        difficult.append(parse_difficult((entry.findtext("difficult") or "0").strip(), place))
    found = regularize_le90(boxes) if kind == "rotated" else hboxes_to_le90(boxes_to_hboxes(boxes))
    numbers = range(1, len(names) + 1)
    return make_labels(path, found, names, numbers, difficult=difficult, unit="object", size=_size(root, path))


def _class_name(class_id: str, level: HrscLevel) -> str:
    if level == 1:
        return _SHIP
    return HRSC_CLASSES[class_id][level - 1] if class_id in HRSC_CLASSES else f"class {class_id}"


def _text(entry: ElementTree.Element, field: str, place: str) -> str:
    text = (entry.findtext(field) or "").strip()
    if not text:
        raise AnnotationError(f"{place}: it has no {field}")
    return text


def _size(root: ElementTree.Element, path: Path) -> tuple[int, int] | None:
    """Return width and height as the file gives them; None where it does not."""
    texts = [(root.findtext(field) or "").strip() for field in ("Img_SizeWidth", "Img_SizeHeight")]
    if not all(texts):
        return None
    width, height = parse_floats(texts, f"{path}, image size")
    return int(width), int(height)
