"""Several rasters side by side as one scene: a GDAL virtual raster (VRT), written as text. No raster library here.

The parts must agree in CRS, pixel size, pixel grid and bands, so that no pixel is resampled: the mosaic's pixels are
those of the parts, bit for bit. Where parts overlap, the last one lies on top, but its invalid pixels do not. What no
part covers is invalid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from affine import Affine
from numpy.typing import NDArray

from rtmdet_geo.errors import RasterError

#: Endings of the files in a folder that are taken for parts, in lower case.
PART_SUFFIXES = (".tif", ".tiff", ".jp2", ".vrt", ".img", ".ntf")
#: How far a part's corner may lie from the pixel grid of the first part, in px.
_GRID_TOLERANCE_PX = 0.01
_GDAL_TYPES = {
    "uint8": "Byte", "int8": "Int8", "uint16": "UInt16", "int16": "Int16", "uint32": "UInt32", "int32": "Int32",
    "uint64": "UInt64", "int64": "Int64", "float32": "Float32", "float64": "Float64", "complex_int16": "CInt16",
    "complex64": "CFloat32", "complex128": "CFloat64",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class PartBand:
    """One band of a part: name of its dtype, colour as GDAL names it, nodata as text ("nan" too) or None."""

    dtype: str
    colour: str
    description: str
    nodata: str | None
    scale: float
    offset: float


@dataclass(frozen=True, slots=True)
class Part:
    """What a mosaic needs to know of one raster.

    Attributes:
        path: as messages have it. source: as GDAL opens it from anywhere.
        width, height: in px.
        crs: WKT, "" without one.
        transform: px to the CRS.
        bands: in order.
        has_mask: a mask band says which pixels are valid.
        tags: of the file.
    """

    path: str
    source: str
    width: int
    height: int
    crs: str
    transform: Affine
    bands: tuple[PartBand, ...]
    has_mask: bool
    tags: Mapping[str, str]


def mosaic_vrt(parts: Sequence[Part], where: str) -> str:
    """Return the VRT of the parts.

    Args:
        parts: one at least, the last on top.
        where: names the mosaic in errors.

    Raises:
        RasterError: the parts do not fit together.
    """
    first = parts[0]
    for part in parts:
        _check_part(part, first, where)
    corners = np.array([_corner(part, first, where) for part in parts])
    _check_places(parts, corners, where)
    corners -= corners.min(axis=0)
    sizes = np.array([(part.width, part.height) for part in parts])
    width, height = (corners + sizes).max(axis=0).tolist()
    nearest = int(corners.sum(axis=1).argmin())
    column, row = corners[nearest].tolist()
    step_x, step_y = parts[nearest].transform.a, parts[nearest].transform.e
    left, top = parts[nearest].transform.c - step_x * column, parts[nearest].transform.f - step_y * row
    root = ElementTree.Element("VRTDataset", rasterXSize=str(width), rasterYSize=str(height))
    ElementTree.SubElement(root, "SRS", dataAxisToSRSAxisMapping="1,2").text = first.crs
    placed = ", ".join(repr(float(item)) for item in (left, step_x, 0, top, 0, step_y))
    ElementTree.SubElement(root, "GeoTransform").text = placed
    tags = ElementTree.SubElement(root, "Metadata")
    for key, text in first.tags.items():
        if all(part.tags.get(key) == text for part in parts):
            ElementTree.SubElement(tags, "MDI", key=key).text = text
    for number, band in enumerate(first.bands, 1):
        _add_band(root, number, band, parts, corners)
    has_alpha = any(band.colour == "alpha" for band in first.bands)
    has_nodata = any(band.nodata is not None for band in first.bands)
    if first.has_mask or not (has_alpha or has_nodata or _covers(corners, sizes)):
        mask = ElementTree.SubElement(ElementTree.SubElement(root, "MaskBand"), "VRTRasterBand", dataType="Byte")
        for part, corner in zip(parts, corners.tolist(), strict=True):
            _add_source(mask, part, corner, "mask,1", nodata="0")
    return ElementTree.tostring(root, encoding="unicode")


def rasters_in(folder: Path) -> list[str]:
    """Rasters of a folder, by name.

    Raises:
        RasterError: it holds none.
    """
    found = [str(item) for item in sorted(folder.iterdir()) if item.suffix.lower() in PART_SUFFIXES and item.is_file()]
    if not found:
        raise RasterError(f"folder {str(folder)!r} holds no rasters ({', '.join(PART_SUFFIXES)}); check the path")
    return found


def _check_part(part: Part, first: Part, where: str) -> None:
    """Refuse a part that is not like the first one."""
    if not part.crs or part.transform.is_identity:
        raise RasterError(f"{part.path!r} of {where} has no CRS or place; give it one with gdal_edit.py")
    if part.transform.b or part.transform.d or part.transform.a <= 0 or part.transform.e >= 0:
        raise RasterError(f"{part.path!r} of {where} is not north up; warp it with gdalwarp")
    if part.crs != first.crs:
        raise RasterError(f"{part.path!r} and {first.path!r} of {where} differ in CRS; bring them to one with gdalwarp")
    drift = max(
        abs(part.transform.a / first.transform.a - 1) * part.width,
        abs(part.transform.e / first.transform.e - 1) * part.height,
    )
    if drift > _GRID_TOLERANCE_PX:
        raise RasterError(
            f"{part.path!r} and {first.path!r} of {where} differ in pixel size "
            f"({part.transform.a:g} and {first.transform.a:g}); bring them to one with gdalwarp -tr"
        )
    if len(part.bands) != len(first.bands) or part.has_mask != first.has_mask:
        raise RasterError(f"{part.path!r} and {first.path!r} of {where} differ in bands or masks; leave one out")
    for number, (band, other) in enumerate(zip(part.bands, first.bands, strict=True), 1):
        if band != other:
            facts = zip(asdict(band).items(), asdict(other).values(), strict=True)
            unlike = ", ".join(f"{name} {mine!r} and {its!r}" for (name, mine), its in facts if mine != its)
            raise RasterError(
                f"band {number} of {part.path!r} and of {first.path!r}, parts of {where}, differ: {unlike}; "
                "bring them to one with gdal_translate"
            )


def _corner(part: Part, first: Part, where: str) -> tuple[int, int]:
    """Column and row of a part's upper left corner, counted from the first part's."""
    x = (part.transform.c - first.transform.c) / first.transform.a
    y = (part.transform.f - first.transform.f) / first.transform.e
    if max(abs(x - round(x)), abs(y - round(y))) > _GRID_TOLERANCE_PX:
        raise RasterError(
            f"{part.path!r} of {where} lies between the pixels of {first.path!r}; bring it to their grid with "
            "gdalwarp -tap -tr"
        )
    return round(x), round(y)


def _check_places(parts: Sequence[Part], corners: NDArray[np.int64], where: str) -> None:
    """Refuse two parts in one place: files of single bands are no mosaic."""
    seen: dict[tuple[int, ...], Part] = {}
    for part, corner in zip(parts, corners.tolist(), strict=True):
        other = seen.setdefault((*corner, part.width, part.height), part)
        if other is not part:
            raise RasterError(
                f"{part.path!r} and {other.path!r} of {where} cover the same place; leave one out, or stack bands with "
                "gdalbuildvrt -separate"
            )


def _covers(corners: NDArray[np.int64], sizes: NDArray[np.int64]) -> bool:
    """Whether rectangles leave no hole in the smallest one that holds them; corners count from its own."""
    xs = np.unique(np.concatenate([corners[:, 0], (corners + sizes)[:, 0]]))
    ys = np.unique(np.concatenate([corners[:, 1], (corners + sizes)[:, 1]]))
    is_covered = np.zeros((len(ys) - 1, len(xs) - 1), np.bool_)
    for (x, y), (width, height) in zip(corners, sizes, strict=True):
        rows = slice(np.searchsorted(ys, y), np.searchsorted(ys, y + height))
        is_covered[rows, np.searchsorted(xs, x) : np.searchsorted(xs, x + width)] = True
    return bool(is_covered.all())


def _add_band(
    root: ElementTree.Element, number: int, band: PartBand, parts: Sequence[Part], corners: NDArray[np.int64]
) -> None:
    node = ElementTree.SubElement(root, "VRTRasterBand", dataType=_GDAL_TYPES[band.dtype], band=str(number))
    if band.description:
        ElementTree.SubElement(node, "Description").text = band.description
    if band.nodata is not None:
        ElementTree.SubElement(node, "NoDataValue").text = band.nodata
    ElementTree.SubElement(node, "ColorInterp").text = band.colour
    if (band.scale, band.offset) != (1.0, 0.0):
        ElementTree.SubElement(node, "Offset").text = repr(band.offset)
        ElementTree.SubElement(node, "Scale").text = repr(band.scale)
    for part, corner in zip(parts, corners.tolist(), strict=True):
        _add_source(node, part, corner, str(number), nodata=band.nodata)


def _add_source(node: ElementTree.Element, part: Part, corner: Sequence[int], band: str, *, nodata: str | None) -> None:
    """Add a part's pixels, the invalid ones left out so that they hide nothing below."""
    is_masked = nodata is None and (part.has_mask or any(item.colour == "alpha" for item in part.bands))
    source = ElementTree.SubElement(node, "ComplexSource" if nodata is not None or is_masked else "SimpleSource")
    ElementTree.SubElement(source, "SourceFilename", relativeToVRT="0").text = part.source
    ElementTree.SubElement(source, "SourceBand").text = band
    for name, (x, y) in (("SrcRect", (0, 0)), ("DstRect", corner)):
        ElementTree.SubElement(source, name, xOff=str(x), yOff=str(y), xSize=str(part.width), ySize=str(part.height))
    if nodata is not None:
        ElementTree.SubElement(source, "NODATA").text = nodata
    elif is_masked:
        ElementTree.SubElement(source, "UseMaskBand").text = "true"
