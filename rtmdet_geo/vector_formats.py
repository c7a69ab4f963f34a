"""File formats of vector layers: which ending means which, what each can hold, and what stands in a cell.

| ending | driver | CRS | about the run | order |
|---|---|---|---|---|
| .gpkg | GPKG | the layer's | metadata of the layer | as given |
| .fgb | FlatGeobuf | the layer's | metadata of the layer | by place (its index) |
| .parquet | Parquet (GeoParquet 1.1) | the layer's | key ``rtmdet_geo`` of the schema, JSON | as given |
| .geojson, .json | GeoJSON | EPSG:4326 | member ``metadata`` | as given |
| .geojsonl, .geojsons | GeoJSONSeq | EPSG:4326 | none | as given |
| .shp, .shp.zip | ESRI Shapefile | the layer's | none | as given |
| .csv | CSV | EPSG:4326, as WKT | none | as given |
| .txt | DOTA (labelTxt) | px of the scene | none | as given |
| .coco.json | COCO | px of the scene | member ``info`` | as given |

Names of drivers are GDAL's, whoever writes. They are written in :mod:`rtmdet_geo.vector_tables`,
:mod:`rtmdet_geo.vector_texts` and :mod:`rtmdet_geo.vector_pixels`, which take chunks of features as the file has them
and a path to write to; where that lies, and what it is renamed to, is their caller's
(:func:`rtmdet_geo.vector.write_feature_chunks`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Literal

import geopandas
import numpy as np
import pandas as pd
import shapely
from numpy.typing import NDArray

from rtmdet_geo.errors import OutputError

GeometryType = Literal["Polygon", "MultiPolygon", "Unknown"]
#: About a run: key -> value, or what is called for them after the last chunk, when counts are known.
Metadata = Mapping[str, Any] | Callable[[], Mapping[str, Any]]

#: Ending of a file's name -> driver.
DRIVERS = {
    ".gpkg": "GPKG",
    ".fgb": "FlatGeobuf",
    ".parquet": "Parquet",
    ".geojson": "GeoJSON",
    ".json": "GeoJSON",
    ".geojsonl": "GeoJSONSeq",
    ".geojsons": "GeoJSONSeq",
    ".shp": "ESRI Shapefile",
    ".shp.zip": "ESRI Shapefile",
    ".csv": "CSV",
    ".txt": "DOTA",
    ".coco.json": "COCO",
}
#: Table of a GeoPackage that holds the styles of its layers, which is no layer itself.
STYLE_TABLE = "layer_styles"
#: Drivers whose files are always in EPSG:4326, longitude first (RFC 7946, 4; CSV has no place for a CRS).
LONLAT_DRIVERS = frozenset({"GeoJSON", "GeoJSONSeq", "CSV"})
#: Drivers whose files are in px of the scene, so they want to know it.
PIXEL_DRIVERS = frozenset({"DOTA", "COCO"})
#: Files that GDAL takes for parts of one Shapefile; an index of an old set would mislead in a new one.
SHAPEFILE_PARTS = (".shp", ".shx", ".dbf", ".prj", ".cpg", ".qix", ".sbn", ".sbx", ".idm", ".ind", ".qpj")
#: Bytes of a column's name in a .dbf file (dBASE III).
DBF_NAME_BYTES = 10
#: Key of the schema's metadata in a Parquet file.
PARQUET_KEY = "rtmdet_geo"


def ending_of(path: str | os.PathLike[str]) -> str | None:
    """Return the ending of a name as :data:`DRIVERS` has it, the longest that fits; None: it has no such."""
    name = Path(path).name.lower()
    return max((ending for ending in DRIVERS if name.endswith(ending)), key=len, default=None)


def driver_of(path: str | os.PathLike[str], driver: str | None = None) -> str:
    """Return the driver that writes ``path``: the one given (any case), else by extension.

    Raises:
        OutputError: no such driver, or the extension is unknown, or is none of a Shapefile, whose parts are found by
            their names.
    """
    ending = ending_of(path)
    by_ending = DRIVERS.get(ending or "")
    if driver is None:
        if by_ending is None:
            raise OutputError(
                f"cannot tell the format of {str(path)!r} by its extension; known: {', '.join(sorted(DRIVERS))}"
            )
        return by_ending
    known = {name.lower(): name for name in DRIVERS.values()}.get(driver.lower())
    if known is None:
        raise OutputError(f"unknown driver {driver!r}; known: {', '.join(sorted(set(DRIVERS.values())))}")
    if known == "ESRI Shapefile" and by_ending != known:
        raise OutputError(f"a Shapefile ends with .shp or .shp.zip, {str(path)!r} does not; give such a name")
    return known


def names_of(path: str | os.PathLike[str]) -> list[Path]:
    """Return the files that an output consists of, ``path`` first."""
    path = Path(path)
    return [path, *(path.with_suffix(part) for part in SHAPEFILE_PARTS[1:] if ending_of(path) == ".shp")]


def staged_suffix(path: str | os.PathLike[str], driver: str) -> str | None:
    """Return the extension under which a driver's file is staged, since GDAL minds it; None: that of ``path``."""
    if DRIVERS.get(ending_of(path) or "") == driver:
        return None
    return next(ending for ending, known in DRIVERS.items() if known == driver)


def metadata_of(metadata: Metadata) -> dict[str, Any]:
    """Return metadata, called for if need be; to be asked after the last chunk."""
    return dict(metadata() if callable(metadata) else metadata)


def as_texts(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return metadata as GDAL holds them: what is not text becomes JSON."""
    return {
        str(key): value if isinstance(value, str) else json.dumps(value, default=str) for key, value in metadata.items()
    }


def short_names(names: Sequence[str], num_bytes: int = DBF_NAME_BYTES) -> list[str]:
    """Return names of few bytes, no two alike whatever the case; they depend on the names and their order alone.

    A name that fits stays; of a longer one the first bytes are taken, and where another has them, fewer and a number.
    """
    taken: set[str] = set()
    short = dict.fromkeys(range(len(names)), "")
    fits = [len(name.encode()) <= num_bytes for name in names]
    for index in sorted(short, key=lambda index: not fits[index]):
        candidate = _cut(names[index], num_bytes)
        for number in count(1):
            if candidate.casefold() not in taken:
                break
            candidate = _cut(names[index], num_bytes - len(f"_{number}")) + f"_{number}"
        taken.add(candidate.casefold())
        short[index] = candidate
    return list(short.values())


def _cut(name: str, num_bytes: int) -> str:
    """Return the start of a name, whole characters of UTF-8."""
    return name.encode()[:num_bytes].decode(errors="ignore")


def plain_cells(column: pd.Series) -> list[Any]:
    """Return cells as JSON has them: NaN and NaT null, float32 with the digits it holds, times ISO 8601 in UTC."""
    if isinstance(column.dtype, pd.DatetimeTZDtype):
        cells = [
            "" if stamp is pd.NaT else stamp.isoformat(timespec="milliseconds").replace("+00:00", "Z")
            for stamp in column
        ]
    elif column.dtype == np.float32:
        cells = [float(text) for text in column.to_numpy().astype(str).tolist()]
    else:
        cells = column.tolist()
    return [None if is_null else value for value, is_null in zip(cells, column.isna().tolist(), strict=True)]


def feature_texts(frame: geopandas.GeoDataFrame, shapes: NDArray[Any]) -> Iterator[str]:
    """Return rows as GeoJSON features without line breaks, with these geometries in place of theirs."""
    names = [name for name in frame.columns if name != frame.geometry.name]
    columns = [plain_cells(frame[name]) for name in names]
    encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
    for shape, values in zip(shapes, zip(*columns, strict=True), strict=True):
        properties = encode(dict(zip(names, values, strict=True)))
        yield f'{{"type": "Feature", "properties": {properties}, "geometry": {shapely.to_geojson(shape)}}}'
