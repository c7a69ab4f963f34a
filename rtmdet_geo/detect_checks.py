"""What :mod:`rtmdet_geo.detect` refuses before any work, must find unchanged to go on, and warns of at the end."""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import shapely

from rtmdet_geo.area import Area
from rtmdet_geo.backends import Backend
from rtmdet_geo.errors import (
    ConfigError,
    NodataWarning,
    OutputError,
    PaddedTileWarning,
    SaturatedTileWarning,
)
from rtmdet_geo.outputs import check_not_input
from rtmdet_geo.preview import check_preview
from rtmdet_geo.preview_html import PREVIEW_ENDINGS
from rtmdet_geo.scene import Scene
from rtmdet_geo.tile_loop import TileResults, TileSettings
from rtmdet_geo.tiles import TileGrid
from rtmdet_geo.vector import check_output


def check_outputs(
    scenes: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str] | None,
    preview: str | os.PathLike[str] | None,
    driver: str | None,
    overwrite: bool,
) -> None:
    """Refuse before any work what could not be written at the end, or would replace what is read.

    Raises:
        OutputError: an output exists, is an input, or cannot be written.
    """
    for path in (output, preview):
        if path is not None:
            for scene in scenes:
                check_not_input(path, scene)
    if output is not None and preview is not None and os.path.abspath(output) == os.path.abspath(preview):
        raise OutputError(f"output and preview are both {os.fspath(output)!r}; give two names")
    if output is not None:
        check_output(output, overwrite, driver=driver, has_image=True)
    if preview is not None:
        check_preview(preview, overwrite, PREVIEW_ENDINGS)


def check_numbers(simplify_px: float, min_length_m: float | None, max_length_m: float | None) -> None:
    """Check the ranges of what the features are made with.

    Raises:
        ConfigError: a number is outside its range.
    """
    if not (math.isfinite(simplify_px) and simplify_px >= 0):
        raise ConfigError(f"simplify_px={simplify_px!r} must be at least 0")
    for name, value in (("min_length_m", min_length_m), ("max_length_m", max_length_m)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ConfigError(f"{name}={value!r} must be at least 0 m")
    if min_length_m is not None and max_length_m is not None and min_length_m > max_length_m:
        raise ConfigError(f"min_length_m={min_length_m!r} must not exceed max_length_m={max_length_m!r}")


def run_facts(
    record: Mapping[str, Any], path: str, state: dict[str, int] | None, grid: TileGrid, area: Area | None
) -> dict[str, Any]:
    """Return what must be the same when a run is gone on with, ready for JSON."""
    free = {
        "batch_size",
        "device",
        "bounds",
        "geographic",
        "aoi",
        "min_length_m",
        "max_length_m",
        "simplify_px",
        "merge",
    }
    return {
        "scene": os.path.abspath(path) if state is not None else path,
        "scene_file": state,
        "scene_stretch": record["stretch"],
        "area_sha256": hashlib.sha256(shapely.to_wkb(area.shape)).hexdigest() if area is not None else None,
        "model_sha256": record["model"]["sha256"],
        **{name: value for name, value in record["parameters"].items() if name not in free},
        "size": [grid.width, grid.height],
    }


def warn_of(source: Scene, grid: TileGrid, engine: Backend, results: TileResults, settings: TileSettings) -> None:
    """Warn of what makes a result less than it could be."""
    if results.num_empty_tiles == results.num_tiles:
        where = "" if results.num_tiles == len(grid) else " in the area asked for"
        warnings.warn(f"scene {source.path!r} holds no valid pixel{where}", NodataWarning, stacklevel=4)
    fixed = engine.fixed_tile_size
    if fixed is not None and grid.padded_shape(engine.spec.stride_multiple) != (fixed, fixed):
        warnings.warn(
            f"scene {source.path!r} is smaller than the tiles of {fixed} px that the model file takes only; "
            "grey fills them up, which moves scores a little: a file for any size does without",
            PaddedTileWarning,
            stacklevel=4,
        )
    if results.num_saturated:
        warnings.warn(
            f"{results.num_saturated} of {results.num_tiles} tiles hold more candidates above score "
            f"{settings.score_threshold:g} than the model returns, so some may be missing; raise the score or lower "
            "the tile size",
            SaturatedTileWarning,
            stacklevel=4,
        )
