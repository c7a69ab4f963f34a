"""What a run says of itself in summaries and in the metadata of layers: versions, and the model that was used."""

from __future__ import annotations

import logging
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rtmdet_geo import __version__
from rtmdet_geo.catalog import file_sha256

if TYPE_CHECKING:
    from rtmdet_geo.scene import Scene
    from rtmdet_geo.structures import ModelSpec

logger = logging.getLogger(__name__)


def library_versions(*packages: str) -> dict[str, str]:
    """Return the versions of what the numbers depend on: the package, Python, numpy, rasterio and ``packages``."""
    versions = {"rtmdet_geo": __version__, "python": platform.python_version()}
    for package in ("numpy", "rasterio", *packages):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            logger.debug("%s is not installed as a package", package)
    return versions


def file_state(path: str | os.PathLike[str]) -> dict[str, int] | None:
    """Return size and time of a file, by which a changed one is known; None for what is no file of this computer."""
    try:
        state = os.stat(path)
    except (OSError, ValueError):
        return None
    return {"bytes": state.st_size, "mtime_ns": state.st_mtime_ns}


def model_record(spec: ModelSpec, path: Path) -> dict[str, str]:
    """Return a model's name, origin and terms, ready for JSON."""
    return {
        "name": spec.name,
        "architecture": spec.architecture,
        "path": str(path),
        "sha256": file_sha256(path),
        "weights_sha256": spec.weights_sha256,
        "licence": spec.licence,
        "attribution": spec.attribution,
    }


def scene_record(source: Scene) -> dict[str, Any]:
    """Return a scene's size in px, place and stretch, ready for JSON."""
    return {
        "width": source.source_width,
        "height": source.source_height,
        "crs": source.crs.to_string() if source.crs is not None else None,
        "gsd_x_m": source.gsd_x_m,
        "gsd_y_m": source.gsd_y_m,
        "stretch": source.stretch_record,
    }
