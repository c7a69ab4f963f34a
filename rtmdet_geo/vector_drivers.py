"""Which writer writes which format, and what chunks of one layer have in common."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import geopandas

from rtmdet_geo.errors import OutputError
from rtmdet_geo.vector_formats import GeometryType, Metadata, ending_of
from rtmdet_geo.vector_pixels import SourceImage, write_coco, write_dota
from rtmdet_geo.vector_tables import write_parquet, write_with_gdal, write_zipped_shapefile
from rtmdet_geo.vector_texts import write_csv, write_geojson, write_sequence


def open_chunks(
    chunks: Iterable[geopandas.GeoDataFrame],
) -> tuple[geopandas.GeoDataFrame, Iterator[geopandas.GeoDataFrame]]:
    """Return the first chunk's empty head, with columns and CRS, and all chunks, each compared with it.

    Raises:
        ValueError: there is none, or, as they come, the columns or CRS of one are not those of the first.
    """
    chunks = iter(chunks)
    first = next(chunks, None)
    if first is None:
        raise ValueError("there is no chunk; give one without rows, which has the columns and the CRS")
    head = first.iloc[:0].copy()

    def compared(chunk: geopandas.GeoDataFrame) -> geopandas.GeoDataFrame:
        if list(chunk.columns) != list(head.columns) or chunk.crs != head.crs:
            raise ValueError(f"a chunk has columns {list(chunk.columns)} and CRS {chunk.crs}, unlike the first")
        return chunk

    return head, chain([first], map(compared, chunks))


def write_staged(
    chunks: Iterator[geopandas.GeoDataFrame],
    staged: Path,
    path: Path,
    driver: str,
    *,
    layer: str,
    metadata: Metadata,
    geometry_type: GeometryType,
    style: str | None,
    image: SourceImage | None,
    has_crs: bool,
) -> int:
    """Write chunks to ``staged`` and return the number of features; see :func:`rtmdet_geo.vector.write_feature_chunks`.

    Raises:
        OutputError: they cannot be written, or the format wants an image and there is none.
    """
    if driver == "GeoJSON":
        return write_geojson(chunks, staged, layer, metadata, has_crs)
    if driver == "GeoJSONSeq":
        return write_sequence(chunks, staged, path)
    if driver == "CSV":
        return write_csv(chunks, staged)
    if driver == "Parquet":
        return write_parquet(chunks, staged, path, metadata)
    if driver in ("DOTA", "COCO"):
        if image is None:
            raise OutputError(f"{driver} holds pixels of one scene, not a layer on the map; write a .gpkg")
        if driver == "DOTA":
            return write_dota(chunks, staged, image)
        return write_coco(chunks, staged, image, layer, metadata)
    if driver == "ESRI Shapefile" and ending_of(path) == ".shp.zip":
        return write_zipped_shapefile(chunks, staged, path)
    return write_with_gdal(
        chunks, staged, path, driver, layer=layer, metadata=metadata, geometry_type=geometry_type, style=style
    )
