"""File formats of vector layers: which ending means which, what each can hold, and how each is written.

| ending | driver | CRS | about the run | order |
|---|---|---|---|---|
| .gpkg | GPKG | the layer's | metadata of the layer | as given |
| .fgb | FlatGeobuf | the layer's | metadata of the layer | by place (its index) |
| .parquet | Parquet (GeoParquet 1.1) | the layer's | key ``rtmdet_geo`` of the schema, JSON | as given |
| .geojson, .json | GeoJSON | EPSG:4326 | member ``metadata`` | as given |
| .geojsonl, .geojsons | GeoJSONSeq | EPSG:4326 | none | as given |
| .shp, .shp.zip | ESRI Shapefile | the layer's | none | as given |
| .csv | CSV | EPSG:4326, as WKT | none | as given |

Names of drivers are GDAL's, whoever writes. The writers here take geometries as the file has them and a path to write
to; where that lies, and what it is renamed to, is their caller's (:func:`rtmdet_geo.vector.write_features`).
"""

from __future__ import annotations

import csv
import json
import logging
import os
import sqlite3
import tempfile
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Literal

import geopandas
import numpy as np
import pandas as pd
import pyogrio
import shapely
from numpy.typing import NDArray

from rtmdet_geo.errors import OutputError

logger = logging.getLogger(__name__)

GeometryType = Literal["Polygon", "MultiPolygon", "Unknown"]

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
}
#: Drivers whose files are always in EPSG:4326, longitude first (RFC 7946, 4; CSV has no place for a CRS).
LONLAT_DRIVERS = frozenset({"GeoJSON", "GeoJSONSeq", "CSV"})
#: Files that GDAL takes for parts of one Shapefile; an index of an old set would mislead in a new one.
SHAPEFILE_PARTS = (".shp", ".shx", ".dbf", ".prj", ".cpg", ".qix", ".sbn", ".sbx", ".idm", ".ind", ".qpj")
#: Bytes of a column's name in a .dbf file (dBASE III).
_DBF_NAME_BYTES = 10
#: Key of the schema's metadata in a Parquet file.
PARQUET_KEY = "rtmdet_geo"
#: Begins each record of a .geojsons file (RFC 8142, 2), as GDAL has it by that ending.
_RECORD_SEPARATOR = "\x1e"


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


def staged_suffix(path: str | os.PathLike[str], driver: str) -> str | None:
    """Return the extension under which a driver's file is staged, since GDAL minds it; None: that of ``path``."""
    if DRIVERS.get(ending_of(path) or "") == driver:
        return None
    return next(ending for ending, known in DRIVERS.items() if known == driver)


def as_texts(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return metadata as GDAL holds them: what is not text becomes JSON."""
    return {
        str(key): value if isinstance(value, str) else json.dumps(value, default=str) for key, value in metadata.items()
    }


def write_with_gdal(
    frame: geopandas.GeoDataFrame,
    staged: Path,
    path: Path,
    driver: str,
    *,
    layer: str,
    metadata: Mapping[str, Any],
    geometry_type: GeometryType,
) -> None:
    """Write a GeoPackage, FlatGeobuf or Shapefile, and count what arrived.

    GDAL may report a full disk only when it closes, or not at all.

    Args:
        frame: any number of rows.
        staged: where to write.
        path: the final name, for messages.
        driver: as :data:`DRIVERS` has it.
        layer: its name; a Shapefile is called as its file is.
        metadata: of the layer; a Shapefile has none.
        geometry_type: of the layer; a Shapefile knows polygons alone, in any number of parts.

    Raises:
        OutputError: it cannot be written.
    """
    options: dict[str, Any] = {"layer": layer, "layer_metadata": as_texts(metadata) or None}
    if driver == "ESRI Shapefile":
        options, geometry_type = {"encoding": "UTF-8"}, "Polygon"
        frame = _for_shapefile(frame, path)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="'crs' was not provided", category=UserWarning)
            pyogrio.write_dataframe(
                frame,
                staged,
                driver=driver,
                geometry_type=geometry_type,
                promote_to_multi=geometry_type == "MultiPolygon",
                use_arrow=True,
                **options,
            )
        written = _count_rows(staged, layer) if driver == "GPKG" else _count_features(staged)
    except (RuntimeError, ValueError, sqlite3.Error) as error:
        reason = " ".join(str(error).split())
        raise OutputError(f"cannot write {str(path)!r}: {reason}; is the disk full?") from error
    if written != len(frame):
        raise OutputError(f"cannot write {str(path)!r}: {written} of {len(frame)} features arrived; is the disk full?")


def _count_rows(staged: Path, layer: str) -> int:
    """Return the number of features of a GeoPackage without a lock on it."""
    with sqlite3.connect(f"{staged.absolute().as_uri()}?mode=ro", uri=True) as connection:
        quoted = layer.replace('"', '""')
        (written,) = connection.execute(f'SELECT COUNT(*) FROM "{quoted}"').fetchone()
    connection.close()
    return int(written)


def _count_features(staged: Path) -> int:
    """Return the number of features in a FlatGeobuf or Shapefile, whose headers count also what never arrived.

    Raises:
        RuntimeError, ValueError: the file ends early.
    """
    number = int(pyogrio.read_info(staged, force_feature_count=True)["features"])
    if number:  # features lie one after the other: if the last is there, all are
        pyogrio.raw.read(staged, fids=[number - 1])
    if staged.suffix == ".shp":  # GDAL reads what is missing in a .dbf as nulls
        table = staged.with_suffix(".dbf")
        with table.open("rb") as stream:
            head = stream.read(12)
        rows, header_bytes, row_bytes = (int.from_bytes(head[i:j], "little") for i, j in ((4, 8), (8, 10), (10, 12)))
        rest = table.stat().st_size - header_bytes - rows * row_bytes  # dBASE III: at most a byte that ends the file
        if rows != number or rest not in (0, 1):
            raise ValueError("the table of attributes ends early")
    return number


def write_zipped_shapefile(frame: geopandas.GeoDataFrame, staged: Path, path: Path) -> None:
    """Write a Shapefile as a zip of its parts, which GDAL and QGIS open as it is.

    Args:
        frame: any number of rows.
        staged: where to write; the parts lie beside it for a while.
        path: the final name, for messages and names of the parts.

    Raises:
        OutputError: it cannot be written.
    """
    stem = path.name[: -len(".shp.zip")]
    with tempfile.TemporaryDirectory(dir=staged.parent) as folder:
        first = Path(folder) / f"{stem}.shp"
        write_with_gdal(frame, first, path, "ESRI Shapefile", layer=stem, metadata={}, geometry_type="Polygon")
        with zipfile.ZipFile(staged, "w", zipfile.ZIP_DEFLATED) as archive:
            for part in sorted(first.parent.iterdir()):
                archive.write(part, part.name)


def _for_shapefile(frame: geopandas.GeoDataFrame, path: Path) -> geopandas.GeoDataFrame:
    """Return a layer as a Shapefile can hold it: short names, times as ISO 8601 texts; the log hears of the names.

    Raises:
        OutputError: there are other geometries than polygons, or several columns are called the same.
    """
    if not (shapely.get_dimensions(np.asarray(frame.geometry.array)) == 2).all():
        raise OutputError(f"{str(path)!r}: a Shapefile holds one kind of geometry, polygons here; write a .gpkg")
    names = [str(name) for name in frame.columns if name != frame.geometry.name]
    renamed = {long: short for long, short in zip(names, short_names(names), strict=True) if long != short}
    if renamed:
        cut = ", ".join(f"{long} -> {short}" for long, short in renamed.items())
        logger.warning("%s: names in a Shapefile have at most %d bytes: %s", path, _DBF_NAME_BYTES, cut)
    frame = frame.rename(columns=renamed)
    for name in frame.columns:
        if isinstance(frame[name].dtype, pd.DatetimeTZDtype):
            frame[name] = pd.Series(plain_cells(frame[name]), dtype="str", index=frame.index)
    return frame


def short_names(names: Sequence[str], num_bytes: int = _DBF_NAME_BYTES) -> list[str]:
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


def write_parquet(frame: geopandas.GeoDataFrame, staged: Path, metadata: Mapping[str, Any]) -> None:
    """Write GeoParquet 1.1: geometries as WKB, and their bounds in the column ``bbox``, by which readers skip rows.

    See https://geoparquet.org/releases/v1.1.0/. A CRS of null means that it is unknown.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    geometry = frame.geometry.name
    shapes = np.asarray(frame.geometry.array)
    sides = ("xmin", "ymin", "xmax", "ymax")
    bounds = [pa.array(column, pa.float64()) for column in np.ascontiguousarray(shapely.bounds(shapes).T)]
    table = pa.Table.from_pandas(pd.DataFrame(frame.drop(columns=geometry)), preserve_index=False)
    table = table.append_column(geometry, pa.array(shapely.to_wkb(shapes), pa.binary()))
    table = table.append_column("bbox", pa.StructArray.from_arrays(bounds, sides))
    column = {
        "encoding": "WKB",
        "geometry_types": sorted({str(kind) for kind in frame.geom_type}),
        "crs": None if frame.crs is None else frame.crs.to_json_dict(),
        "covering": {"bbox": {side: ["bbox", side] for side in sides}},
    }
    if shapely.equals_exact(shapely.orient_polygons(shapes), shapes).all():
        column["orientation"] = "counterclockwise"
    if len(frame):
        column["bbox"] = [float(value) for value in shapely.total_bounds(shapes)]
    about = {
        "geo": {"version": "1.1.0", "primary_column": geometry, "columns": {geometry: column}},
        PARQUET_KEY: dict(metadata),
    }
    texts = {key: json.dumps(value, default=str, ensure_ascii=False) for key, value in about.items()}
    pq.write_table(table.replace_schema_metadata({**table.schema.metadata, **texts}), staged, compression="zstd")


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


def write_geojson(lines: Iterable[str], staged: Path, layer: str, metadata: Mapping[str, Any], has_crs: bool) -> None:
    """Write a FeatureCollection, one feature a line."""
    head: dict[str, Any] = {"type": "FeatureCollection", "name": layer}
    if not has_crs:
        head["crs"] = None  # GeoJSON of 2008: unknown; a missing member means longitude and latitude
    if metadata:
        head["metadata"] = dict(metadata)
    with staged.open("w", encoding="utf-8") as stream:
        stream.write(json.dumps(head, default=str, ensure_ascii=False)[:-1] + ', "features": [')
        for index, line in enumerate(lines):
            stream.write(("\n" if index == 0 else ",\n") + line)
        stream.write("\n]}\n")


def write_sequence(lines: Iterable[str], staged: Path, path: Path) -> None:
    """Write features one a line; in a .geojsons file each after a record separator (RFC 8142). None: an empty file."""
    separator = _RECORD_SEPARATOR if ending_of(path) == ".geojsons" else ""
    with staged.open("w", encoding="utf-8") as stream:
        for line in lines:
            stream.write(f"{separator}{line}\n")


def write_csv(frame: geopandas.GeoDataFrame, shapes: NDArray[Any], staged: Path) -> None:
    """Write a table: the geometries as WKT with all their digits, the attributes; null is an empty cell."""
    names = [name for name in frame.columns if name != frame.geometry.name]
    columns = [
        [str(cell).lower() if isinstance(cell, bool) else cell for cell in plain_cells(frame[name])] for name in names
    ]
    with staged.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["WKT", *names])
        writer.writerows(zip(shapely.to_wkt(shapes, rounding_precision=-1), *columns, strict=True))
