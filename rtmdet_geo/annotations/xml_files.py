"""What the XML label formats share: trees that are read with the file and the object named, and written indented."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from pathlib import Path

from rtmdet_geo.annotations.labels import parse_floats
from rtmdet_geo.errors import AnnotationError, OutputError


def read_tree(path: Path) -> ElementTree.Element:
    """Return the root of an XML file.

    Raises:
        AnnotationError: the file is missing or not XML.
    """
    try:
        return ElementTree.parse(path).getroot()
    except OSError as error:
        raise AnnotationError(f"cannot read label file {str(path)!r}: {error.strerror or error}") from error
    except ElementTree.ParseError as error:
        raise AnnotationError(f"{path} is not XML: {error}") from error


def field_text(entry: ElementTree.Element, field: str, place: str) -> str:
    """Return the text of a field.

    Raises:
        AnnotationError: it is missing or empty; the message begins with ``place``.
    """
    text = (entry.findtext(field) or "").strip()
    if not text:
        raise AnnotationError(f"{place}: it has no {field}")
    return text


def stated_size(root: ElementTree.Element, fields: tuple[str, str], path: Path) -> tuple[int, int] | None:
    """Return an image's width and height in px as two fields give them; None where they do not."""
    texts = [(root.findtext(field) or "").strip() for field in fields]
    if not all(texts):
        return None
    width, height = parse_floats(texts, f"{path}, image size")
    return (int(width), int(height)) if width and height else None


def add_fields(parent: ElementTree.Element, fields: Mapping[str, str | int]) -> None:
    """Append one element with a text per field."""
    for name, text in fields.items():
        ElementTree.SubElement(parent, name).text = str(text)


def write_tree(root: ElementTree.Element, path: Path) -> None:
    """Write an XML file, UTF-8, indented.

    Raises:
        OutputError: the operating system refuses.
    """
    ElementTree.indent(root)
    try:
        path.write_bytes(ElementTree.tostring(root, encoding="utf-8") + b"\n")
    except OSError as error:
        raise OutputError(f"cannot write label file {str(path)!r}: {error.strerror or error}") from error
