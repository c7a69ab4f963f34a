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
from pathlib import Path, PurePosixPath
from typing import Literal

from rtmdet_geo.annotations.labels import (
    ImageLabels,
    enclosing_hboxes,
    hboxes_to_le90,
    make_labels,
    number_text,
    parse_difficult,
    parse_floats,
)
from rtmdet_geo.annotations.xml_files import add_fields, field_text, read_tree, stated_size, write_tree
from rtmdet_geo.boxes import boxes_to_hboxes, regularize_le90
from rtmdet_geo.class_names import HRSC, HRSC_LEVEL3
from rtmdet_geo.errors import AnnotationError
from rtmdet_geo.pictures import image_stem
from rtmdet_geo.structures import Kind

HrscLevel = Literal[1, 2, 3]

(_SHIP,) = HRSC
_BOX_FIELDS = ("mbox_cx", "mbox_cy", "mbox_w", "mbox_h", "mbox_ang")
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
#: Class_ID by name; names of levels 1 and 2 are names of level 3, too.
_CLASS_IDS = {names[2]: class_id for class_id, names in HRSC_CLASSES.items()}
#: Before the Class_ID in names of classes that are not in use.
_UNUSED = "class "


def read_hrsc(path: Path, level: HrscLevel = 1, kind: Kind = "rotated") -> ImageLabels:
    """Read an HRSC2016 XML file.

    Args:
        path: of the file.
        level: of the classes; at levels 2 and 3 a Class_ID that is not in use is named "class 100000021".
        kind: of the model that the boxes are for, see :class:`rtmdet_geo.annotations.labels.ImageLabels`.

    Raises:
        AnnotationError: not XML, no HRSC_Image, or an object lacks a field; the message begins with the file.
    """
    root = read_tree(path)
    objects = root.find("HRSC_Objects")
    if root.tag != "HRSC_Image" or objects is None:
        raise AnnotationError(f"{path} is not of HRSC2016: it needs HRSC_Image with HRSC_Objects, not {root.tag!r}")
    boxes, names, difficult = [], [], []
    for number, entry in enumerate(objects.findall("HRSC_Object"), 1):
        place = f"{path}, object {number}"
        box = parse_floats([field_text(entry, field, place) for field in _BOX_FIELDS], place)
        if box[2] < 0 or box[3] < 0:
            raise AnnotationError(f"{place}: sides {box[2]:g} x {box[3]:g} px are negative")
        boxes.append(box)
        names.append(_class_name(field_text(entry, "Class_ID", place), level))
        difficult.append(parse_difficult((entry.findtext("difficult") or "0").strip(), place))
    found = regularize_le90(boxes) if kind == "rotated" else hboxes_to_le90(boxes_to_hboxes(boxes))
    numbers = range(1, len(names) + 1)
    size = stated_size(root, ("Img_SizeWidth", "Img_SizeHeight"), path)
    return make_labels(path, found, names, numbers, difficult=difficult, unit="object", size=size)


def _class_name(class_id: str, level: HrscLevel) -> str:
    if level == 1:
        return _SHIP
    return HRSC_CLASSES[class_id][level - 1] if class_id in HRSC_CLASSES else _UNUSED + class_id


def hrsc_class_id(name: str) -> str | None:
    """Return the Class_ID of a class of any level, or of "class 100000021"; None if HRSC2016 has no such class."""
    digits = name.removeprefix(_UNUSED)
    if name != digits and digits.isdecimal():
        return digits
    return _CLASS_IDS.get(name)


def write_hrsc(path: Path, labels: ImageLabels, image_name: str, size: tuple[int, int] | None = None) -> None:
    """Write an HRSC2016 XML file, with all digits; angles are in [-pi/2, pi/2), a crowd is difficult.

    Args:
        path: of the file.
        labels: of HRSC2016's classes, of any level; outlines are not written.
        image_name: of the image.
        size: width and height of the image in px; None leaves them out.

    Raises:
        AnnotationError: HRSC2016 has no such class.
        OutputError: the file cannot be written.
    """
    root = ElementTree.Element("HRSC_Image")
    stem = image_stem(image_name)
    ending = PurePosixPath(image_name).name.removeprefix(stem).removeprefix(".")
    add_fields(root, {"Img_ID": stem, "Img_FileName": stem, "Img_FileFmt": ending})
    if size is not None:
        add_fields(root, {"Img_SizeWidth": size[0], "Img_SizeHeight": size[1], "Img_SizeDepth": 3})
    add_fields(root, {"Annotated": 1})
    objects = ElementTree.SubElement(root, "HRSC_Objects")
    for index, (name, hbox) in enumerate(zip(labels.class_names, enclosing_hboxes(labels), strict=True)):
        class_id = hrsc_class_id(name)
        if class_id is None:
            raise AnnotationError(f"{labels.place(index)}: class {name!r} is not of HRSC2016; see HRSC_CLASSES")
        fields = {"Object_ID": str(index + 1), "Class_ID": class_id, "Object_NO": str(index + 1), "truncated": "0"}
        fields["difficult"] = str(int(labels.difficult[index] or labels.crowd[index]))
        fields |= zip(("box_xmin", "box_ymin", "box_xmax", "box_ymax"), map(number_text, hbox), strict=True)
        fields |= zip(_BOX_FIELDS, map(number_text, labels.boxes[index]), strict=True)
        add_fields(ElementTree.SubElement(objects, "HRSC_Object"), fields)
    write_tree(root, path)
