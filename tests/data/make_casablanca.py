"""Make ``casablanca.tif`` and ``casablanca_ships.geojson`` from a copy of the sen2ships data set.

Run ``python tests/data/make_casablanca.py FOLDER`` where FOLDER holds ``annotations.json`` and ``casablanca.tif``.
A label is the minimum-area rectangle, in the scene's projected CRS, around the outer corners of the mask's pixels:
pixel (column, row) covers ``transform * (column, row)`` to ``transform * (column + 1, row + 1)``. Written as
longitude and latitude (RFC 7946). Needs the ``dev`` extra (pycocotools decodes the masks).
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import rasterio
import shapely
from pycocotools import mask as coco_mask
from pyproj import Transformer

HERE = Path(__file__).parent
SCENE = "casablanca.tif"
ATTRIBUTION = (
    "Labels: sen2ships (github.com/ShipDetectionExperts/sen2ships), MIT, Copyright (c) 2023 ShipDetectionExperts. "
    "Scene: contains modified Copernicus Sentinel data 2023."
)


def pixel_corners(mask: np.ndarray) -> np.ndarray:
    """Return (4 * M, 2) float64 x, y: the outer corners of the M pixels that are set in ``mask`` (H, W)."""
    rows, cols = np.nonzero(mask)
    offsets = np.array([[0, 0], [1, 0], [1, 1], [0, 1]])
    return (np.stack([cols, rows], axis=1)[:, None, :] + offsets[None]).reshape(-1, 2).astype(float)


def ship_rectangles(folder: Path) -> tuple[list[shapely.Polygon], str]:
    """Return one rectangle per labelled ship in the scene's CRS, and that CRS."""
    annotations = json.loads((folder / "annotations.json").read_text(encoding="utf-8"))
    image = next(image for image in annotations["images"] if image["file_name"] == SCENE)
    with rasterio.open(folder / SCENE) as scene:
        transform, crs = scene.transform, scene.crs.to_string()
    rectangles = []
    for annotation in annotations["annotations"]:
        if annotation["image_id"] != image["id"]:
            continue
        corners = pixel_corners(coco_mask.decode(annotation["segmentation"]))
        x, y = transform * (corners[:, 0], corners[:, 1])
        rectangles.append(shapely.oriented_envelope(shapely.multipoints(np.stack([x, y], axis=1))))
    return rectangles, crs


def to_features(rectangles: list[shapely.Polygon], crs: str) -> list[dict]:
    """Return GeoJSON features in longitude and latitude, rings counter-clockwise, 8 decimals (about 1 mm)."""
    transformer = Transformer.from_crs(crs, "EPSG:4326", always_xy=True)
    features = []
    for number, rectangle in enumerate(rectangles, start=1):
        ring = np.asarray(shapely.geometry.polygon.orient(rectangle).exterior.coords)
        longitude, latitude = transformer.transform(ring[:, 0], ring[:, 1])
        coordinates = [[round(x, 8), round(y, 8)] for x, y in zip(longitude, latitude, strict=True)]
        features.append(
            {
                "type": "Feature",
                "properties": {"id": number, "class_name": "ship"},
                "geometry": {"type": "Polygon", "coordinates": [coordinates]},
            }
        )
    return features


def main() -> None:
    """Copy the scene and write its labels beside this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with annotations.json and casablanca.tif")
    folder = parser.parse_args().folder
    features = to_features(*ship_rectangles(folder))
    lines = ",\n".join(json.dumps(feature) for feature in features)
    head = f'{{"type": "FeatureCollection", "name": "casablanca_ships", "attribution": {json.dumps(ATTRIBUTION)},'
    text = f'{head}\n"features": [\n{lines}\n]}}\n'
    json.loads(text)
    (HERE / "casablanca_ships.geojson").write_text(text, encoding="utf-8")
    if folder.resolve() != HERE.resolve():
        shutil.copyfile(folder / SCENE, HERE / SCENE)
    print(f"{len(features)} ships -> {HERE / 'casablanca_ships.geojson'}")


if __name__ == "__main__":
    main()
