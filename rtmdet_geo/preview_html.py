"""A page with the scene, its detections and their attributes, to look through them in a browser without a network.

One file: the scene's picture, outlines and attributes lie in the page (``assets/preview.html``), which its security
policy forbids to load anything. Names of classes and scenes are data there, never markup.
"""

from __future__ import annotations

import base64
import html
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import cv2
import geopandas
import numpy as np
import shapely
from affine import Affine
from numpy.typing import NDArray

from rtmdet_geo.boxes import boxes_to_polygons
from rtmdet_geo.errors import OutputError
from rtmdet_geo.outputs import staged_output
from rtmdet_geo.polygons import SIMPLIFY_PX, outlines_to_polygons
from rtmdet_geo.preview import (
    Image,
    ReadableScene,
    check_preview,
    class_colour,
    draw_preview,
    read_overview,
    stretch_for_display,
)
from rtmdet_geo.stitch import outlines_of
from rtmdet_geo.structures import Detections
from rtmdet_geo.vector import WGS84, parse_crs, pixel_to_world, project_points
from rtmdet_geo.vector_formats import plain_cells

logger = logging.getLogger(__name__)

#: Endings of previews: a picture, and a page.
PREVIEW_ENDINGS = (".png", ".html")

_TEMPLATE = Path(__file__).parent / "assets" / "preview.html"
_JPEG_QUALITY = 88
#: Points along a side of the grid of longitudes and latitudes, between which the page interpolates.
_GRID_POINTS = 17
#: Decimals of outlines (scene px), and of the grid: 1e-7 degrees are about 1 cm.
_OUTLINE_DECIMALS, _GRID_DECIMALS = 2, 7


class PlacedScene(ReadableScene, Protocol):
    """What a page needs of :class:`rtmdet_geo.scene.Scene`."""

    @property
    def scale_x(self) -> float:
        """Source px per resampled px along x."""

    @property
    def scale_y(self) -> float:
        """Likewise, along y."""

    @property
    def transform(self) -> Affine:
        """Affine map from source px to the CRS."""

    @property
    def crs(self) -> Any:
        """CRS, or None."""


def write_preview(
    scene: PlacedScene,
    detections: Detections,
    features: geopandas.GeoDataFrame,
    path: str | os.PathLike[str],
    *,
    classes: Sequence[str],
    summary: Mapping[str, Any],
    overwrite: bool = True,
) -> None:
    """Write a picture (.png) or a page (.html), as the ending says.

    Args, Raises: as :func:`write_html_preview` has them.
    """
    if Path(path).suffix.lower() == ".html":
        write_html_preview(scene, detections, features, path, classes=classes, summary=summary, overwrite=overwrite)
    else:
        check_preview(path, overwrite, PREVIEW_ENDINGS)
        draw_preview(scene, detections, path, classes=classes, overwrite=overwrite)


def write_html_preview(
    scene: PlacedScene,
    detections: Detections,
    features: geopandas.GeoDataFrame,
    path: str | os.PathLike[str],
    *,
    classes: Sequence[str],
    summary: Mapping[str, Any],
    max_size: int = 1600,
    overwrite: bool = True,
) -> None:
    """Write a page that shows the scene with its detections; it needs no network and no other file.

    Args:
        scene: open scene; its first three channels are red, green and blue.
        detections: frame "scene", in **resampled** px, row by row those of ``features``.
        features: what :func:`rtmdet_geo.vector.build_features` returns; its attributes appear as the files have them.
        path: HTML file; written to a temporary name and renamed.
        classes: class names in label order.
        summary: of the run, as :func:`rtmdet_geo.detect_scene` has it; the page takes ``width``, ``height``, ``crs``,
            ``model`` (name, licence and attribution) and ``parameters`` (score threshold), and no path.
        max_size: longer side of the scene's picture in px.
        overwrite: replace an existing file.

    Raises:
        OutputError: the extension is not .html, the folder is missing or not writable, the file exists and
            ``overwrite`` is False, or writing failed.
        ValueError: the detections are in tile px, are not those of ``features``, or ``max_size`` is less than 1.
    """
    check_preview(path, overwrite, (".html",))
    if detections.frame != "scene":
        raise ValueError("a preview needs detections in scene px; merge them first")
    if max_size < 1:
        raise ValueError(f"max_size {max_size!r} must be at least 1 px")
    _check_rows(detections, features)
    image = stretch_for_display(*read_overview(scene, max_size))
    pixel_size = max(scene.width / image.shape[1], scene.height / image.shape[0])
    content = {
        "scene_id": scene.scene_id,
        "width": scene.width,
        "height": scene.height,
        "scale": [scene.scale_x, scene.scale_y],
        "lonlat": _lonlat_grid(scene),
        "classes": [
            {"name": name, "colour": "#{:02x}{:02x}{:02x}".format(*class_colour(label))}
            for label, name in enumerate(classes)
        ],
        "facts": _facts(summary, len(detections)),
        "attribution": _attribution(summary),
        "rings": _rings(detections, pixel_size),
        "attributes": _attributes(features),
        "image": _data_uri(image, path),
    }
    page = fill_page(f"{scene.scene_id}: detections", content)
    with staged_output(path) as staged:
        staged.write_text(page, encoding="utf-8")
    logger.info("wrote a page with %d detections to %s (%d bytes)", len(detections), path, len(page))


def fill_page(title: str, content: Mapping[str, Any]) -> str:
    """Return the page's template with a title and its data, both so written that they cannot become markup."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))  # ASCII, whatever the names are
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    parts = {"title": html.escape(title).encode("ascii", "xmlcharrefreplace").decode("ascii"), "data": text}
    return re.sub(r"\{\{(title|data)\}\}", lambda match: parts[match[1]], _TEMPLATE.read_text(encoding="utf-8"))


def _check_rows(detections: Detections, features: geopandas.GeoDataFrame) -> None:
    """Refuse features that are not, row by row, those of the detections."""
    if (
        len(detections) != len(features)
        or not np.array_equal(detections.labels, features["class_id"].to_numpy())
        or not np.allclose(detections.scores, features["score"].to_numpy(), rtol=0, atol=1e-6)
    ):
        raise ValueError(
            f"the {len(features)} features are not those of the {len(detections)} detections, in their order"
        )


def _data_uri(image: Image, path: str | os.PathLike[str]) -> str:
    is_encoded, data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    if not is_encoded:
        raise OutputError(f"cannot encode the scene's picture for the preview {str(path)!r}; try a smaller one")
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode("ascii")


def _rings(detections: Detections, pixel_size: float) -> list[list[list[float]]]:
    """Return per detection its rings, each x y x y ... in resampled px without the closing point.

    Args:
        detections: frame "scene".
        pixel_size: resampled px per px of the picture; masks' edges are as coarse as half of it.
    """
    outlines = outlines_of(detections)
    if outlines is None:
        corners = boxes_to_polygons(np.asarray(detections.boxes, np.float64))
        return [[_numbers(ring)] for ring in corners]
    polygons = outlines_to_polygons(outlines, tolerance=max(SIMPLIFY_PX, pixel_size / 2))
    return [
        [
            _numbers(np.asarray(ring.coords)[:-1])
            for part in shapely.get_parts(polygon)
            for ring in (part.exterior, *part.interiors)
        ]
        for polygon in polygons
    ]


def _numbers(points: NDArray[np.float64]) -> list[float]:
    return np.round(points, _OUTLINE_DECIMALS).ravel().tolist()


def _attributes(features: geopandas.GeoDataFrame) -> dict[str, dict[str, Any]]:
    """Return each column as ``{"each": [cells]}``, or ``{"all": cell}`` where all of several cells are the same."""
    columns = {}
    for name in features.columns:
        if name == features.geometry.name:
            continue
        cells = plain_cells(features[name])
        is_same = len(cells) > 1 and all(cell == cells[0] for cell in cells)
        columns[str(name)] = {"all": cells[0]} if is_same else {"each": cells}
    return columns


def _lonlat_grid(scene: PlacedScene) -> list[list[list[float]]] | None:
    """Return lon lat at evenly spaced points of the scene, rows from the top; None where some have none.

    Longitudes go beyond 180 degrees where the scene lies across the antimeridian.
    """
    crs = parse_crs(scene.crs)
    if crs is None:
        return None
    share = np.linspace(0, 1, _GRID_POINTS)
    x, y = np.meshgrid(share * scene.width * scene.scale_x, share * scene.height * scene.scale_y)
    grid = project_points(pixel_to_world(np.stack([x, y], axis=-1), scene.transform), crs, WGS84)
    if not np.isfinite(grid).all():
        return None
    grid[..., 0] -= 360 * np.round((grid[..., 0] - grid[0, 0, 0]) / 360)
    rows: list[list[list[float]]] = np.round(grid, _GRID_DECIMALS).tolist()
    return rows


def _facts(summary: Mapping[str, Any], number: int) -> list[str]:
    """Return what the page says in its head, one text each."""
    facts = [f"{number:,} detection{'' if number == 1 else 's'}"]
    if "model" in summary:
        facts.append(f"model {summary['model']['name']}")
    if "parameters" in summary:
        facts.append(f"scores from {_score_text(summary['parameters']['score_threshold'])}")
    if "width" in summary:
        facts.append(f"{summary['width']} x {summary['height']} px")
    if summary.get("crs"):
        facts.append(str(summary["crs"])[:40])
    return facts


def _score_text(threshold: float | Mapping[str, float]) -> str:
    """Return a score, or the least and greatest of scores by class."""
    values = sorted(set(threshold.values())) if isinstance(threshold, Mapping) else [threshold]
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g} by class"


def _attribution(summary: Mapping[str, Any]) -> str:
    """Return whom the model's terms ask to name, and its licence."""
    model = summary.get("model", {})
    licence = f"Licence of the model: {model['licence']}" if model.get("licence") else ""
    return ". ".join(text for text in (model.get("attribution"), licence) if text)
