"""How QGIS draws a layer of detections by itself: a default style inside the GeoPackage.

QGIS looks for it in the table ``layer_styles``, with the columns that it writes there itself: the style is a QML text,
found by the layer's name and geometry column. Outlines have the classes' colours, oriented boxes a line along their
long axis, and close by each has its score. QGIS >= 3.22 reads it; other programs pass the table over.
"""

from __future__ import annotations

import sqlite3
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from xml.etree.ElementTree import Element, SubElement

from rtmdet_geo.preview import Colour, class_colour

#: Scores are drawn where a metre of map is at most so many metres of ground.
LABEL_SCALE = 10_000
_NO_CLASS: Colour = (160, 160, 160)
#: Of the axis of a polygon p1 p2 p3 p4: the line between the midpoints of its shorter pair of sides.
_AXIS = (
    "with_variable('p', array_foreach(generate_series(1, 4), point_n($geometry, @element)), "
    "if({length_12} >= {length_23}, "
    "make_line(centroid(make_line(@p[1], @p[2])), centroid(make_line(@p[3], @p[0]))), "
    "make_line(centroid(make_line(@p[0], @p[1])), centroid(make_line(@p[2], @p[3])))))"
)
_TABLE = """
CREATE TABLE IF NOT EXISTS "layer_styles" ("id" INTEGER PRIMARY KEY AUTOINCREMENT NOT NULL,
"f_table_catalog" TEXT(256), "f_table_schema" TEXT(256), "f_table_name" TEXT(256), "f_geometry_column" TEXT(256),
"styleName" TEXT(30), "styleQML" TEXT, "styleSLD" TEXT, "useAsDefault" BOOLEAN, "description" TEXT, "owner" TEXT(30),
"ui" TEXT(30), "update_time" DATETIME DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ','now')))
"""


def detection_style(classes: Sequence[str], *, has_axis: bool, is_geographic: bool = False) -> str:
    """Return the QML of a layer of detections.

    Args:
        classes: class names in label order; the colours are those of the preview.
        has_axis: draw the long axis of each box, for models of oriented boxes.
        is_geographic: the layer's coordinates are degrees, so a degree of longitude is the shorter one.
    """
    root = Element("qgis", version="3.22.0", styleCategories="Symbology|Labeling", labelsEnabled="1")
    renderer = SubElement(root, "renderer-v2", type="categorizedSymbol", attr="class_name", enableorderby="0")
    categories, symbols = SubElement(renderer, "categories"), SubElement(renderer, "symbols")
    axis = axis_expression(is_geographic) if has_axis else None
    entries = [(name, name, class_colour(label)) for label, name in enumerate(classes)]
    for number, (value, label, colour) in enumerate([*entries, ("", "other", _NO_CLASS)]):
        SubElement(categories, "category", value=value, label=label, symbol=str(number), render="true", type="string")
        _add_symbol(symbols, str(number), colour, axis)
    _add_labels(root)
    ElementTree.indent(root)
    return "<!DOCTYPE qgis PUBLIC 'http://mrcc.com/qgis.dtd' 'SYSTEM'>\n" + ElementTree.tostring(root, "unicode")


def axis_expression(is_geographic: bool) -> str:
    """Return the QGIS expression of a box's long axis; which sides are long is measured, not taken from their order."""
    squeeze = "cos(radians(y(@p[0]))) * " if is_geographic else ""

    def squared(start: int, end: int) -> str:
        return f"(({squeeze}(x(@p[{end}]) - x(@p[{start}]))) ^ 2 + (y(@p[{end}]) - y(@p[{start}])) ^ 2)"

    return _AXIS.format(length_12=squared(0, 1), length_23=squared(1, 2))


def _add_options(parent: Element, values: Mapping[str, str]) -> None:
    options = SubElement(parent, "Option", type="Map")
    for name, value in values.items():
        SubElement(options, "Option", name=name, value=value, type="QString")


def _add_symbol(symbols: Element, name: str, colour: Colour, axis: str | None) -> None:
    """Add the symbol of a class: a transparent polygon with an outline, and the line of its axis."""
    red, green, blue = colour
    rgb = f"{red},{green},{blue}"
    symbol = SubElement(symbols, "symbol", type="fill", name=name, alpha="1", clip_to_extent="1", force_rhr="0")
    fill = SubElement(symbol, "layer", {"class": "SimpleFill", "enabled": "1", "locked": "0", "pass": "0"})
    _add_options(
        fill,
        {
            "color": f"{rgb},40",
            "style": "solid",
            "outline_color": f"{rgb},255",
            "outline_style": "solid",
            "outline_width": "0.4",
            "outline_width_unit": "MM",
            "joinstyle": "miter",
        },
    )
    if axis is None:
        return
    generator = SubElement(symbol, "layer", {"class": "GeometryGenerator", "enabled": "1", "locked": "0", "pass": "0"})
    _add_options(generator, {"SymbolType": "Line", "geometryModifier": axis, "units": "MapUnit"})
    line = SubElement(generator, "symbol", type="line", name=f"@{name}@1", alpha="1", clip_to_extent="1", force_rhr="0")
    layer = SubElement(line, "layer", {"class": "SimpleLine", "enabled": "1", "locked": "0", "pass": "0"})
    _add_options(
        layer,
        {"line_color": f"{rgb},255", "line_style": "solid", "line_width": "0.25", "line_width_unit": "MM"},
    )


def _add_labels(root: Element) -> None:
    """Add the scores with two digits, drawn from :data:`LABEL_SCALE` on."""
    settings = SubElement(SubElement(root, "labeling", type="simple"), "settings", calloutType="simple")
    style = SubElement(
        settings,
        "text-style",
        fieldName='format_number("score", 2)',
        isExpression="1",
        fontFamily="Sans Serif",
        fontSize="8",
        fontSizeUnit="Point",
        textColor="255,255,255,255",
        textOpacity="1",
    )
    SubElement(
        style,
        "text-buffer",
        bufferDraw="1",
        bufferSize="0.7",
        bufferSizeUnits="MM",
        bufferColor="0,0,0,200",
        bufferOpacity="1",
    )
    SubElement(settings, "placement", placement="1", dist="0", distUnits="MM")
    SubElement(settings, "rendering", scaleVisibility="1", scaleMin="1", scaleMax=str(LABEL_SCALE), drawLabels="1")


def add_default_style(path: Path, layer: str, qml: str) -> None:
    """Make ``qml`` the style with which QGIS opens a layer of a GeoPackage.

    Args:
        path: of the GeoPackage.
        layer: name of the layer; without one its table is missing.
        qml: what :func:`detection_style` returns.

    Raises:
        sqlite3.Error: it cannot be written, or there is no such layer.
    """
    with closing(sqlite3.connect(path)) as connection, connection:
        row = connection.execute(
            "SELECT column_name FROM gpkg_geometry_columns WHERE table_name = ?", (layer,)
        ).fetchone()
        if row is None:
            raise sqlite3.OperationalError(f"no layer {layer!r}")
        connection.execute(_TABLE)
        connection.execute(
            "INSERT INTO gpkg_contents (table_name, data_type, identifier) "
            "SELECT 'layer_styles', 'attributes', 'layer_styles' "
            "WHERE NOT EXISTS (SELECT 1 FROM gpkg_contents WHERE table_name = 'layer_styles')"
        )
        connection.execute(
            'INSERT INTO "layer_styles" ("f_table_catalog", "f_table_schema", "f_table_name", "f_geometry_column", '
            '"styleName", "styleQML", "styleSLD", "useAsDefault", "description", "owner") '
            "VALUES ('', '', ?, ?, ?, ?, '', 1, '', '')",
            (layer, row[0], layer[:30], qml),
        )
