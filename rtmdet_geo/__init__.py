"""rtmdet-geo: RTMDet for satellite scenes. Pixels go in, georeferenced polygons come out.

Public names load on first use: importing the package loads neither torch nor rasterio.

Example:
    >>> import rtmdet_geo
    >>> rtmdet_geo.Tile(row=0, col=0, x=0, y=0, width=512, height=512).width
    512
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

#: Where each public name lives. No public name equals a module of the package, so neither can hide the other.
_HOMES = {
    "Detections": "structures",
    "ModelSpec": "structures",
    "StretchSpec": "structures",
    "Tile": "structures",
    "load_model": "images",
    "load_recipe": "config",
    "open_classifier": "backends.classify",
    "predict": "images",
    "Prediction": "images",
    "RTMDetGeoError": "errors",
    "RTMDetGeoWarning": "errors",
    "Scene": "raster",
    "open_scene": "raster",
    "open_backend": "backends",
    "classify_image": "classify",
    "classify_scene": "classify",
    "convert_labels": "annotations.convert",
    "detect_scene": "detect",
    "evaluate_dota": "evaluation.dota",
    "evaluate_hrsc": "evaluation.hrsc",
    "evaluate_layers": "evaluation.gis",
    "export_model": "export",
    "train_model": "training.loop",
}

__all__ = [
    "Detections",
    "ModelSpec",
    "Prediction",
    "RTMDetGeoError",
    "RTMDetGeoWarning",
    "Scene",
    "StretchSpec",
    "Tile",
    "__version__",
    "classify_image",
    "classify_scene",
    "convert_labels",
    "detect_scene",
    "evaluate_dota",
    "evaluate_hrsc",
    "evaluate_layers",
    "export_model",
    "load_model",
    "load_recipe",
    "open_backend",
    "open_classifier",
    "open_scene",
    "predict",
    "train_model",
]

if TYPE_CHECKING:
    from rtmdet_geo.annotations.convert import convert_labels
    from rtmdet_geo.backends import open_backend
    from rtmdet_geo.backends.classify import open_classifier
    from rtmdet_geo.classify import classify_image, classify_scene
    from rtmdet_geo.config import load_recipe
    from rtmdet_geo.detect import detect_scene
    from rtmdet_geo.errors import RTMDetGeoError, RTMDetGeoWarning
    from rtmdet_geo.evaluation.dota import evaluate_dota
    from rtmdet_geo.evaluation.gis import evaluate_layers
    from rtmdet_geo.evaluation.hrsc import evaluate_hrsc
    from rtmdet_geo.export import export_model
    from rtmdet_geo.images import Prediction, load_model, predict
    from rtmdet_geo.raster import Scene, open_scene
    from rtmdet_geo.structures import Detections, ModelSpec, StretchSpec, Tile
    from rtmdet_geo.training.loop import train_model

logging.getLogger(__name__).addHandler(logging.NullHandler())  # the application decides where messages go


def __getattr__(name: str) -> Any:
    """Load a public name's home on first use.

    Raises:
        AttributeError: the package has no such public name.
        ImportError: a package is missing that the name's home needs, such as torch for ``train_model``.
    """
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names, loaded or not."""
    return sorted({*globals(), *__all__})
