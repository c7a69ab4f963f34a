"""The default style inside a GeoPackage: its table, its text, and that the layer is read as before."""

from __future__ import annotations

import math
import re
import sqlite3
import xml.etree.ElementTree as ElementTree
from contextlib import closing
from pathlib import Path

import geopandas
import pyogrio
import pytest
import shapely

from rtmdet_geo.errors import OutputError
from rtmdet_geo.preview import class_colour
from rtmdet_geo.qgis_style import LABEL_SCALE, axis_expression, detection_style
from rtmdet_geo.vector import write_features

CLASSES = ("ship", 'a "plane" & <more>', "größe")
COLUMNS = (
    "id f_table_catalog f_table_schema f_table_name f_geometry_column styleName styleQML styleSLD useAsDefault "
    "description owner ui update_time"
).split()


def parsed(*, has_axis: bool = True) -> ElementTree.Element:
    return ElementTree.fromstring(detection_style(CLASSES, has_axis=has_axis))


def options(layer: ElementTree.Element | None) -> dict[str, str]:
    assert layer is not None
    return {option.get("name", ""): option.get("value", "") for option in layer.findall("./Option/Option")}


def test_each_class_has_its_colour_and_others_one() -> None:
    root = parsed()
    renderer = root.find("renderer-v2")
    assert renderer is not None and renderer.get("type") == "categorizedSymbol" and renderer.get("attr") == "class_name"
    categories = renderer.findall("categories/category")
    assert [entry.get("value") for entry in categories] == [*CLASSES, ""]
    for label in range(len(CLASSES)):
        name = categories[label].get("symbol")
        fill = options(renderer.find(f"symbols/symbol[@name='{name}']/layer[@class='SimpleFill']"))
        red, green, blue = class_colour(label)
        assert fill["outline_color"] == f"{red},{green},{blue},255" and fill["color"] == f"{red},{green},{blue},40"
    assert len(renderer.findall("symbols/symbol")) == len(CLASSES) + 1


def test_oriented_boxes_have_an_axis() -> None:
    symbols = parsed().findall("renderer-v2/symbols/symbol")
    for symbol in symbols:
        generator = symbol.find("layer[@class='GeometryGenerator']")
        assert options(generator)["SymbolType"] == "Line"
        assert options(generator)["geometryModifier"] == axis_expression(False)
        assert generator is not None and generator.find("symbol[@type='line']/layer[@class='SimpleLine']") is not None
    assert not parsed(has_axis=False).findall(".//layer[@class='GeometryGenerator']")


def axis_of(expression: str, corners: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Evaluate the QGIS expression, written anew as Python, on four corners."""
    code = expression.replace("array_foreach(generate_series(1, 4), point_n($geometry, @element))", "None")
    code = re.sub(r"@p\[(\d)\]", r"p[\1]", code).replace("^", "**").replace("if(", "choose(")
    names = {
        "p": corners,
        "with_variable": lambda _name, _value, result: result,
        "choose": lambda condition, first, second: first if condition else second,
        "make_line": lambda *points: list(points),
        "centroid": lambda line: tuple(sum(values) / 2 for values in zip(*line, strict=True)),
        "x": lambda point: point[0],
        "y": lambda point: point[1],
        "cos": math.cos,
        "radians": math.radians,
    }
    return list(eval(code, names))


@pytest.mark.parametrize("first", range(4))
@pytest.mark.parametrize("step", [1, -1])
def test_the_axis_is_the_long_one_whichever_corner_comes_first(first: int, step: int) -> None:
    ring = [(0.0, 0.0), (10.0, 0.0), (10.0, 2.0), (0.0, 2.0)]
    corners = [ring[(first + step * index) % 4] for index in range(4)]
    assert sorted(axis_of(axis_expression(False), corners)) == [(0, 1), (10, 1)]
    # at 60 degrees north 1.5 degrees of longitude are shorter than one of latitude
    ring = [(0.0, 60.0), (1.5, 60.0), (1.5, 61.0), (0.0, 61.0)]
    corners = [ring[(first + step * index) % 4] for index in range(4)]
    assert sorted(axis_of(axis_expression(True), corners)) == [(0.75, 60), (0.75, 61)]
    assert sorted(axis_of(axis_expression(False), corners)) == [(0, 60.5), (1.5, 60.5)]


def test_scores_are_labels_close_by() -> None:
    settings = parsed().find("labeling[@type='simple']/settings")
    assert settings is not None
    text, rendering = settings.find("text-style"), settings.find("rendering")
    assert text is not None and text.get("fieldName") == 'format_number("score", 2)' and text.get("isExpression") == "1"
    assert rendering is not None and rendering.get("scaleVisibility") == "1"
    assert rendering.get("scaleMax") == str(LABEL_SCALE) and parsed().get("labelsEnabled") == "1"


def layer_of(number: int) -> geopandas.GeoDataFrame:
    shapes = [shapely.box(index, 0, index + 1, 3) for index in range(number)]
    return geopandas.GeoDataFrame({"class_name": ["ship"] * number}, geometry=shapes, crs="EPSG:32630")


@pytest.mark.parametrize("number", [3, 0])
def test_the_style_lies_in_the_geopackage(tmp_path: Path, number: int) -> None:
    path, qml = tmp_path / "ships.gpkg", detection_style(CLASSES, has_axis=True)
    write_features(layer_of(number), path, layer='my "ships"', style=qml, metadata={"model": "tiny"})
    with closing(sqlite3.connect(path)) as connection:
        cursor = connection.execute('SELECT * FROM "layer_styles"')
        assert [column[0] for column in cursor.description] == COLUMNS
        (row,) = cursor.fetchall()
        (kind,) = connection.execute("SELECT data_type FROM gpkg_contents WHERE table_name = 'layer_styles'").fetchone()
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    values = dict(zip(COLUMNS, row, strict=True))
    assert values["f_table_name"] == values["styleName"] == 'my "ships"' and values["f_geometry_column"] == "geom"
    assert values["styleQML"] == qml and values["useAsDefault"] == 1 and values["f_table_schema"] == ""
    assert values["update_time"].endswith("Z") and kind == "attributes"
    assert len(geopandas.read_file(path, layer='my "ships"')) == number
    assert pyogrio.read_info(path, layer='my "ships"')["layer_metadata"]["model"] == "tiny"
    assert pyogrio.list_layers(path)[0][0] == 'my "ships"'  # the first, which programs open that ask for none


def test_formats_without_a_place_and_layers_without_a_style(tmp_path: Path) -> None:
    write_features(layer_of(1), tmp_path / "ships.fgb", style=detection_style(CLASSES, has_axis=False))
    write_features(layer_of(1), tmp_path / "ships.gpkg")
    assert pyogrio.list_layers(tmp_path / "ships.gpkg").tolist() == [["detections", "Polygon"]]
    with pytest.raises(OutputError, match="cannot write"):
        write_features(layer_of(1), tmp_path / "new.gpkg", style="\ud800")  # no text of UTF-8
    assert not (tmp_path / "new.gpkg").exists()
