"""Features as Arrow tables, chunk by chunk: GeoPackage, FlatGeobuf and Shapefile by GDAL, GeoParquet by pyarrow.

GDAL takes all chunks in one call as a stream of record batches, so memory holds one chunk whatever their number. What a
file says of the whole (metadata with counts, bounds) is known after the last chunk only, and each format gets it where
it can: a GeoPackage and a Parquet file at the end, a FlatGeobuf, which begins with it, from an Arrow file on the disk.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pandas as pd
import pyogrio
import shapely
from numpy.typing import NDArray

from rtmdet_geo.errors import OutputError
from rtmdet_geo.qgis_style import add_default_style
from rtmdet_geo.vector_formats import (
    DBF_NAME_BYTES,
    PARQUET_KEY,
    GeometryType,
    Metadata,
    as_texts,
    metadata_of,
    plain_cells,
    short_names,
)

logger = logging.getLogger(__name__)

#: Rows of a row group of a Parquet file, more or less; chunks are gathered until they are as many.
_GROUP_ROWS = 65536
_SIDES = ("xmin", "ymin", "xmax", "ymax")


class ChunkStream:
    """Chunks as record batches of one schema, which is that of the first.

    What a chunk raises would reach GDAL as "error in stream": it is kept in ``error`` for whoever called GDAL.

    Attributes:
        first: the first chunk.
        schema: pyarrow's, of all chunks; geometries are WKB.
        num_rows: of the chunks so far.
        error: that ended the stream early, or None.
    """

    def __init__(
        self,
        chunks: Iterable[geopandas.GeoDataFrame],
        convert: Callable[[geopandas.GeoDataFrame], geopandas.GeoDataFrame] | None = None,
        *,
        to_multi: bool = False,
    ) -> None:
        """Take the first chunk.

        Args:
            chunks: at least one, with the same columns and CRS.
            convert: is given each chunk before it is written.
            to_multi: make polygons multipolygons.
        """
        self._chunks = iter(chunks)
        self._convert, self._to_multi = convert, to_multi
        self.first = next(self._chunks)
        self._table = self._as_table(self.first)
        self.schema = self._table.schema
        self.num_rows = 0
        self.error: BaseException | None = None

    def batches(self) -> Iterator[Any]:
        """Return all record batches, once."""
        try:
            table, self._table = self._table, None
            yield from self._batches_of(table)
            del table
            for chunk in self._chunks:
                yield from self._batches_of(self._as_table(chunk).cast(self.schema))
        except GeneratorExit:
            raise
        except BaseException as error:
            self.error = error
            raise

    def _batches_of(self, table: Any) -> Iterator[Any]:
        self.num_rows += table.num_rows
        yield from table.to_batches()

    def _as_table(self, chunk: geopandas.GeoDataFrame) -> Any:
        """Return a chunk as a table without metadata, texts where Arrow has no type, the geometry last."""
        import pyarrow as pa

        chunk = chunk if self._convert is None else self._convert(chunk)
        shapes = np.asarray(chunk.geometry.array)
        if self._to_multi:
            shapes = _as_multi(shapes)
        columns, names = [], []
        for name, column in chunk.drop(columns=chunk.geometry.name).items():
            try:
                array = pa.array(_in_utc(column), from_pandas=True)
            except (pa.ArrowInvalid, pa.ArrowTypeError):
                array = pa.array(column.astype("string"), from_pandas=True)
            if pa.types.is_null(array.type):  # which GDAL does not know
                array = array.cast(pa.string())
            columns.append(array)
            names.append(str(name))
        return pa.table([*columns, pa.array(shapely.to_wkb(shapes), pa.binary())], [*names, str(chunk.geometry.name)])


def _in_utc(column: pd.Series) -> pd.Series:
    """Return times in UTC, other columns as they are."""
    return column.dt.tz_convert("UTC") if isinstance(column.dtype, pd.DatetimeTZDtype) else column


def _as_multi(shapes: NDArray[Any]) -> NDArray[Any]:
    """Return shapes with each polygon as a multipolygon of one part."""
    shapes = shapes.copy()
    is_single = shapely.get_type_id(shapes) == shapely.GeometryType.POLYGON
    shapes[is_single] = shapely.multipolygons(shapes[is_single][:, None])
    return shapes


@contextmanager
def _told_as_output_errors(path: Path, stream: ChunkStream | None = None) -> Iterator[None]:
    """Make an OutputError of what GDAL, Arrow or SQLite refuse meanwhile; errors of the chunks pass as they are."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="'crs' was not provided", category=UserWarning)
            yield
    except (RuntimeError, ValueError, sqlite3.Error) as error:
        if stream is not None and stream.error is not None:
            raise stream.error from None
        reason = " ".join(str(error).split())
        raise OutputError(f"cannot write {str(path)!r}: {reason}; is the disk full?") from error


def write_with_gdal(
    chunks: Iterable[geopandas.GeoDataFrame],
    staged: Path,
    path: Path,
    driver: str,
    *,
    layer: str,
    metadata: Metadata,
    geometry_type: GeometryType,
    style: str | None = None,
) -> int:
    """Write a GeoPackage, FlatGeobuf or Shapefile, and count what arrived.

    GDAL may report a full disk only when it closes, or not at all.

    Args:
        chunks: at least one, with any number of rows.
        staged: where to write.
        path: the final name, for messages.
        driver: as :data:`rtmdet_geo.vector_formats.DRIVERS` has it.
        layer: its name; a Shapefile is called as its file is.
        metadata: of the layer; a Shapefile has none.
        geometry_type: of the layer; a Shapefile knows polygons alone, in any number of parts.
        style: QML that QGIS draws a GeoPackage with.

    Returns:
        The number of features.

    Raises:
        OutputError: it cannot be written.
    """
    is_shapefile = driver == "ESRI Shapefile"
    convert = _for_shapefile(path) if is_shapefile else None
    stream = ChunkStream(chunks, convert, to_multi=geometry_type == "MultiPolygon" and not is_shapefile)
    options: dict[str, Any] = {
        "layer": staged.stem if is_shapefile else layer,
        "driver": driver,
        "geometry_name": str(stream.first.geometry.name),
        "geometry_type": "Polygon" if is_shapefile else geometry_type,
        "crs": _crs_text(stream.first.crs),
        "encoding": "UTF-8" if is_shapefile else None,
    }
    with ExitStack() as stack:
        stack.enter_context(_told_as_output_errors(path, stream))
        if driver == "FlatGeobuf":
            _write_flatgeobuf(stream, staged, metadata, options)
        else:
            _write_batches(stream.schema, stream.batches(), staged, options)
        if driver == "GPKG" and (texts := as_texts(metadata_of(metadata))):  # no rows: GDAL takes the metadata alone
            _write_batches(stream.schema, iter(()), staged, {**options, "append": True, "layer_metadata": texts})
        if driver == "GPKG" and style is not None:
            add_default_style(staged, layer, style)
        written = _count_rows(staged, layer) if driver == "GPKG" else _count_features(staged)
    check_count(written, stream.num_rows, path)
    return written


def check_count(written: int, expected: int, path: Path) -> None:
    """Refuse a file in which features are missing.

    Raises:
        OutputError: they are.
    """
    if written != expected:
        raise OutputError(f"cannot write {str(path)!r}: {written} of {expected} features arrived; is the disk full?")


def _write_batches(schema: Any, batches: Iterator[Any], staged: Path, options: Mapping[str, Any]) -> None:
    import pyarrow as pa

    pyogrio.write_arrow(pa.RecordBatchReader.from_batches(schema, batches), staged, **options)


def _write_flatgeobuf(stream: ChunkStream, staged: Path, metadata: Metadata, options: Mapping[str, Any]) -> None:
    """Write a FlatGeobuf; metadata that are known after the last chunk only come by way of an Arrow file."""
    import pyarrow as pa

    if not callable(metadata):
        _write_batches(stream.schema, stream.batches(), staged, {**options, "layer_metadata": as_texts(metadata)})
        return
    with tempfile.TemporaryFile(dir=staged.parent) as spool:
        with pa.ipc.new_stream(spool, stream.schema) as writer:
            for batch in stream.batches():
                writer.write_batch(batch)
        spool.seek(0)
        with pa.ipc.open_stream(spool) as reader:
            pyogrio.write_arrow(reader, staged, **options, layer_metadata=as_texts(metadata_of(metadata)))


def _crs_text(crs: Any) -> str | None:
    """Return a CRS as GDAL reads it: by its EPSG code where it has one."""
    if crs is None:
        return None
    epsg = crs.to_epsg()
    return f"EPSG:{epsg}" if epsg else str(crs.to_wkt("WKT1_GDAL"))


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


def write_zipped_shapefile(chunks: Iterable[geopandas.GeoDataFrame], staged: Path, path: Path) -> int:
    """Write a Shapefile as a zip of its parts, which GDAL and QGIS open as it is.

    Args:
        chunks: at least one, with any number of rows.
        staged: where to write; the parts lie beside it for a while.
        path: the final name, for messages and names of the parts.

    Returns:
        The number of features.

    Raises:
        OutputError: it cannot be written.
    """
    stem = path.name[: -len(".shp.zip")]
    with tempfile.TemporaryDirectory(dir=staged.parent) as folder:
        first = Path(folder) / f"{stem}.shp"
        written = write_with_gdal(
            chunks, first, path, "ESRI Shapefile", layer=stem, metadata={}, geometry_type="Polygon"
        )
        with zipfile.ZipFile(staged, "w", zipfile.ZIP_DEFLATED) as archive:
            for part in sorted(first.parent.iterdir()):
                archive.write(part, part.name)
    return written


def _for_shapefile(path: Path) -> Callable[[geopandas.GeoDataFrame], geopandas.GeoDataFrame]:
    """Return what makes chunks as a Shapefile can hold them: short names, times as ISO 8601 texts.

    The log hears once of names that are cut. Raises OutputError where there are other geometries than polygons.
    """
    told: list[dict[str, str]] = []

    def convert(chunk: geopandas.GeoDataFrame) -> geopandas.GeoDataFrame:
        if not (shapely.get_dimensions(np.asarray(chunk.geometry.array)) == 2).all():
            raise OutputError(f"{str(path)!r}: a Shapefile holds one kind of geometry, polygons here; write a .gpkg")
        names = [str(name) for name in chunk.columns if name != chunk.geometry.name]
        renamed = {long: short for long, short in zip(names, short_names(names), strict=True) if long != short}
        if renamed and not told:
            told.append(renamed)
            cut = ", ".join(f"{long} -> {short}" for long, short in renamed.items())
            logger.warning("%s: names in a Shapefile have at most %d bytes: %s", path, DBF_NAME_BYTES, cut)
        chunk = chunk.rename(columns=renamed)
        for name in chunk.columns:
            if isinstance(chunk[name].dtype, pd.DatetimeTZDtype):
                chunk[name] = pd.Series(plain_cells(chunk[name]), dtype="str", index=chunk.index)
        return chunk

    return convert


class _Summary:
    """What GeoParquet says of all geometries, gathered chunk by chunk."""

    def __init__(self) -> None:
        self.kinds: set[str] = set()
        self.bounds = np.full(4, np.nan)
        self.is_counter_clockwise = True

    def add(self, chunk: geopandas.GeoDataFrame) -> geopandas.GeoDataFrame:
        """Take note of a chunk, and return it as it is."""
        shapes = np.asarray(chunk.geometry.array)
        self.kinds |= set(chunk.geom_type)
        if len(shapes):
            bounds = shapely.total_bounds(shapes)
            self.bounds[:2] = np.fmin(self.bounds[:2], bounds[:2])
            self.bounds[2:] = np.fmax(self.bounds[2:], bounds[2:])
        turned = shapely.orient_polygons(shapes)
        self.is_counter_clockwise &= bool(shapely.equals_exact(turned, shapes).all())
        return chunk

    def column(self, crs: Any) -> dict[str, Any]:
        """Return the entry of the geometry column; a CRS of null means that it is unknown."""
        column: dict[str, Any] = {
            "encoding": "WKB",
            "geometry_types": sorted(self.kinds),
            "crs": None if crs is None else crs.to_json_dict(),
            "covering": {"bbox": {side: ["bbox", side] for side in _SIDES}},
        }
        if self.is_counter_clockwise:
            column["orientation"] = "counterclockwise"
        if np.isfinite(self.bounds).all():
            column["bbox"] = self.bounds.tolist()
        return column


def write_parquet(chunks: Iterable[geopandas.GeoDataFrame], staged: Path, path: Path, metadata: Metadata) -> int:
    """Write GeoParquet 1.1: geometries as WKB, and their bounds in the column ``bbox``, by which readers skip rows.

    See https://geoparquet.org/releases/v1.1.0/. What it says of all geometries is written when the file is closed.

    Returns:
        The number of features.

    Raises:
        OutputError: it cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    summary = _Summary()
    stream = ChunkStream(chunks, summary.add)
    box = pa.struct([(side, pa.float64()) for side in _SIDES])
    geometry = str(stream.first.geometry.name)
    with _told_as_output_errors(path, stream):
        schema = stream.schema.append(pa.field("bbox", box))
        # a stored Arrow schema would have no metadata yet, and hide those of the file from readers
        with pq.ParquetWriter(staged, schema, compression="zstd", store_schema=False) as writer:
            for table in _gathered(stream):
                shapes = shapely.from_wkb(table.column(geometry).to_numpy())
                sides = [pa.array(side, pa.float64()) for side in np.ascontiguousarray(shapely.bounds(shapes).T)]
                writer.write_table(table.append_column("bbox", pa.StructArray.from_arrays(sides, _SIDES)))
            columns = {geometry: summary.column(stream.first.crs)}
            about = {
                "geo": {"version": "1.1.0", "primary_column": geometry, "columns": columns},
                PARQUET_KEY: metadata_of(metadata),
            }
            texts = {key: json.dumps(value, default=str, ensure_ascii=False) for key, value in about.items()}
            writer.add_key_value_metadata(texts)
        written = int(pq.read_metadata(staged).num_rows)
    check_count(written, stream.num_rows, path)
    return written


def _gathered(stream: ChunkStream) -> Iterator[Any]:
    """Return tables of enough rows for a row group; one, empty, where there are no rows at all."""
    import pyarrow as pa

    waiting: list[Any] = []
    for batch in stream.batches():
        waiting.append(batch)
        if sum(map(len, waiting)) >= _GROUP_ROWS:
            yield pa.Table.from_batches(waiting, stream.schema)
            waiting = []
    if waiting or not stream.num_rows:
        yield pa.Table.from_batches(waiting, stream.schema)
