"""Features as lines of text, chunk by chunk: GeoJSON, GeoJSONSeq and CSV. Each writer returns how many it wrote."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import shapely

from rtmdet_geo.vector_formats import Metadata, ending_of, feature_texts, metadata_of, plain_cells

#: Begins each record of a .geojsons file (RFC 8142, 2), as GDAL has it by that ending.
_RECORD_SEPARATOR = "\x1e"


def _lines(chunks: Iterable[geopandas.GeoDataFrame]) -> Iterator[str]:
    for chunk in chunks:
        yield from feature_texts(chunk, np.asarray(chunk.geometry.array))


def write_geojson(
    chunks: Iterable[geopandas.GeoDataFrame], staged: Path, layer: str, metadata: Metadata, has_crs: bool
) -> int:
    """Write a FeatureCollection, one feature a line; ``metadata`` comes after them, with what the last chunk told."""
    head: dict[str, Any] = {"type": "FeatureCollection", "name": layer}
    if not has_crs:
        head["crs"] = None  # GeoJSON of 2008: unknown; a missing member means longitude and latitude
    number = 0
    with staged.open("w", encoding="utf-8") as stream:
        stream.write(json.dumps(head, ensure_ascii=False)[:-1] + ', "features": [')
        for line in _lines(chunks):
            stream.write(("\n" if number == 0 else ",\n") + line)
            number += 1
        stream.write("\n]")
        if about := metadata_of(metadata):
            stream.write(', "metadata": ' + json.dumps(about, default=str, ensure_ascii=False))
        stream.write("}\n")
    return number


def write_sequence(chunks: Iterable[geopandas.GeoDataFrame], staged: Path, path: Path) -> int:
    """Write features one a line; in a .geojsons file each after a record separator (RFC 8142). None: an empty file."""
    separator = _RECORD_SEPARATOR if ending_of(path) == ".geojsons" else ""
    number = 0
    with staged.open("w", encoding="utf-8") as stream:
        for line in _lines(chunks):
            stream.write(f"{separator}{line}\n")
            number += 1
    return number


def write_csv(chunks: Iterable[geopandas.GeoDataFrame], staged: Path) -> int:
    """Write a table: the geometries as WKT with all their digits, the attributes; null is an empty cell."""
    number = 0
    with staged.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        for index, chunk in enumerate(chunks):
            names = [name for name in chunk.columns if name != chunk.geometry.name]
            if index == 0:
                writer.writerow(["WKT", *names])
            columns = [
                [str(cell).lower() if isinstance(cell, bool) else cell for cell in plain_cells(chunk[name])]
                for name in names
            ]
            shapes = shapely.to_wkt(np.asarray(chunk.geometry.array), rounding_precision=-1)
            writer.writerows(zip(shapes, *columns, strict=True))
            number += len(chunk)
    return number
