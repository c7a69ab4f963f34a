"""What the merge gives, resampled px, as features on the ground: where, how long and how sure each object is."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from affine import Affine
from shapely.affinity import affine_transform

from rtmdet_geo.area import Area
from rtmdet_geo.errors import ConfigError
from rtmdet_geo.merge import Merged
from rtmdet_geo.polygons import outlines_to_polygons
from rtmdet_geo.qgis_style import detection_style
from rtmdet_geo.scene import Scene
from rtmdet_geo.stitch import outlines_of
from rtmdet_geo.structures import ModelSpec
from rtmdet_geo.vector import build_features, parse_crs
from rtmdet_geo.vector_pixels import SourceImage

if TYPE_CHECKING:
    import geopandas


@dataclass(slots=True)
class FeatureMaker:
    """Makes the features of one run, chunk by chunk, and counts them.

    Attributes:
        source: open scene.
        spec: of the model.
        run_id: of the run.
        area: keep objects whose centre lies in it; None: all.
        min_length_m: keep objects that are so long at least, in metres on the ground; None: all.
        max_length_m: likewise, at most.
        gsd: metres per pixel that the user gave; None: what the scene says.
        dst_crs: CRS of the geometries; None: the scene's.
        simplify_px: see :func:`rtmdet_geo.polygons.outlines_to_polygons`.
        num_by_class: features made so far, by class name.
    """

    source: Scene
    spec: ModelSpec
    run_id: str
    area: Area | None = None
    min_length_m: float | None = None
    max_length_m: float | None = None
    gsd: float | None = None
    dst_crs: Any = None
    simplify_px: float = 1.0
    num_by_class: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        """Check that the scene has what is asked for.

        Raises:
            ConfigError: it has no CRS, and ``dst_crs`` or a length needs one.
        """
        if self.dst_crs is not None and not self.source.is_georeferenced:
            raise ConfigError(f"scene {self.source.path!r} has no CRS, so it cannot be projected; leave --dst-crs out")
        if self._has_lengths and self.source.gsd_x_m is None:
            raise ConfigError(
                f"scene {self.source.path!r} has no CRS that leads to metres on the ground; leave the least and "
                "greatest length out"
            )

    @property
    def num_features(self) -> int:
        """Return the number of features made so far."""
        return self.num_by_class.total()

    @property
    def _has_lengths(self) -> bool:
        return (self.min_length_m, self.max_length_m) != (None, None)

    def make(self, merged: Merged) -> tuple[Merged, geopandas.GeoDataFrame]:
        """Return the objects that are asked for, and their features row by row; ids go on from the chunk before.

        Args:
            merged: objects in resampled px that are final.
        """
        if self.area is not None:
            merged = merged.select(self.area.holds(merged.detections.boxes[:, :2]))
        features = self._build(merged)
        if self._has_lengths:
            least, most = self.min_length_m or 0, math.inf if self.max_length_m is None else self.max_length_m
            keep = features["length_m"].between(least, most).to_numpy()
            merged, features = merged.select(keep), features[keep].reset_index(drop=True)
        first = self.num_features + 1
        features = features.assign(id=np.arange(first, first + len(features), dtype=np.int64))
        self.num_by_class.update(features["class_name"].tolist())
        return merged, features

    def style(self) -> str:
        """Return the QGIS style of the features' layer."""
        crs = parse_crs(self.dst_crs if self.dst_crs is not None else self.source.crs)
        return detection_style(
            self.spec.classes,
            has_axis=self.spec.kind == "rotated",
            is_geographic=crs is not None and crs.is_geographic,
        )

    def image(self) -> SourceImage:
        """Return the scene as DOTA and COCO files describe it."""
        source = self.source
        return SourceImage(
            os.path.basename(source.path),
            source.source_width,
            source.source_height,
            tuple(self.spec.classes),
            source.transform,
            parse_crs(source.crs),
        )

    def _build(self, merged: Merged) -> geopandas.GeoDataFrame:
        """Resampled px -> geometries in the scene's CRS (source px without one) and attributes."""
        source, boxes, transform = self.source, merged.detections.boxes, self.source.transform
        outlines = outlines_of(merged.detections)
        polygons = outlines_to_polygons(outlines, tolerance=self.simplify_px) if outlines is not None else None
        x, y = source.scale_x, source.scale_y
        if source.is_georeferenced:  # a rectangle on the ground is none in pixels of unequal sides: straight to the CRS
            a, b, c, d, e, f = tuple(transform)[:6]
            transform = Affine(a * x, b * y, c, d * x, e * y, f)
        else:
            boxes = source.to_source(boxes)
            if polygons is not None:
                polygons = np.array([affine_transform(item, [x, 0, 0, y, 0, 0]) for item in polygons])
        return build_features(
            boxes,
            merged.detections.scores,
            merged.detections.labels,
            merged.num_merged,
            merged.on_edge,
            transform=transform,
            crs=source.crs,
            classes=self.spec.classes,
            gsd_m=self.gsd if self.gsd is not None else source.mean_gsd_m,
            scene_id=source.scene_id,
            acquired_at=source.acquired_at,
            sensor=source.sensor,
            model=self.spec.name,
            model_sha=self.spec.weights_sha256,
            run_id=self.run_id,
            dst_crs=self.dst_crs,
            kind=self.spec.object_kind,
            polygons=polygons,
        )


def join_features(chunks: Sequence[geopandas.GeoDataFrame]) -> geopandas.GeoDataFrame:
    """Return the features of all chunks, of which there must be one, in one frame with a new index."""
    filled = [chunk for chunk in chunks if len(chunk)]
    return pd.concat(filled, ignore_index=True) if len(filled) > 1 else (filled or chunks)[0].reset_index(drop=True)
