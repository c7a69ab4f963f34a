"""Synthetic scenes with known ships, an engine that finds bright blobs, and a small exported model."""

from __future__ import annotations

import functools
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import rasterio
from affine import Affine
from numpy.typing import NDArray
from rasterio.errors import NotGeoreferencedWarning

from rtmdet_geo.boxes import regularize_le90
from rtmdet_geo.structures import Detections, ModelKind, ModelSpec, StretchSpec

#: cx, cy, w, h in source px (origin at the outer corner of the first pixel), angle in rad, clockwise on screen.
SHIPS = np.array(
    [
        [60.0, 50.0, 40.0, 12.0, 0.0],
        [250.0, 200.0, 50.0, 14.0, np.pi / 4],
        [130.5, 128.0, 36.0, 10.0, -np.pi / 6],
        [400.0, 300.0, 30.0, 11.0, -np.pi / 2],
        [255.0, 64.0, 44.0, 12.0, 1.2],
    ]
)
TRANSFORM = Affine(10.0, 0.0, 500_000.0, 0.0, -10.0, 4_500_000.0)
GROUND, SHIP = 40, 220


def draw_ships(width: int, height: int, ships: NDArray[np.float64] = SHIPS) -> NDArray[np.uint8]:
    """Return uint8 (height, width): GROUND, and SHIP where a pixel's centre lies in a ship."""
    image = np.full((height, width), GROUND, np.uint8)
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    for cx, cy, w, h, angle in ships:
        along = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)
        across = (y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)
        image[(np.abs(along) <= w / 2) & (np.abs(across) <= h / 2)] = SHIP
    return image


def write_scene(
    path: Path,
    image: NDArray[np.uint8],
    *,
    crs: str | None = "EPSG:32630",
    nodata: float | None = None,
    bands: int = 3,
    compress: str | None = None,
) -> Path:
    """Write a grey image as a GeoTIFF with ``bands`` equal bands of 10 m pixels."""
    profile = {"driver": "GTiff", "height": image.shape[0], "width": image.shape[1], "count": bands, "dtype": "uint8"}
    if image.shape[0] >= 16 and image.shape[1] >= 16:
        profile |= {"tiled": True, "blockxsize": 64, "blockysize": 64}
    profile["photometric"] = "RGB" if bands == 3 else "MINISBLACK"
    if compress:
        profile["compress"] = compress
    if nodata is not None:
        profile["nodata"] = nodata
    if crs is not None:
        profile |= {"crs": crs, "transform": TRANSFORM}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        dataset = rasterio.open(path, "w", **profile)
    with dataset:
        for band in range(1, bands + 1):
            dataset.write(image, band)
    return path


def make_spec(**changes: object) -> ModelSpec:
    """Return the spec of a one-class model of three bands and no fixed resolution."""
    values: dict[str, object] = {
        "name": "blobs",
        "architecture": "rtmdet_r_test",
        "classes": ("ship",),
        "mean": (40.0, 40.0, 40.0),
        "std": (40.0, 40.0, 40.0),
        "tile_size": 256,
        "overlap": 64,
        "score_threshold": 0.3,
        "stretch": StretchSpec(kind="none"),
    }
    return ModelSpec(**(values | changes))  # type: ignore[arg-type]


class BlobBackend:
    """An engine that calls each bright connected area in the first channel a ship with score .9."""

    name = "blobs"
    path = Path(__file__)
    device_name = "cpu"
    fixed_tile_size: int | None = None

    def __init__(self, spec: ModelSpec | None = None, *, labels: Sequence[int] = (0,)) -> None:
        """Remember the spec, and the labels that every blob gets."""
        self.spec = spec or make_spec()
        self.labels = labels
        self.num_saturated = 0
        self.num_images = 0

    def run(
        self, batches: Iterable[NDArray[np.uint8]], *, score_threshold: float, multi_label: bool = False
    ) -> Iterator[list[Detections]]:
        """See the protocol."""
        for images in batches:
            assert images.dtype == np.uint8 and images.shape[1] == len(self.spec.bands)
            assert images.shape[2] % 32 == 0 and images.shape[3] % 32 == 0
            self.num_images += len(images)
            yield [self._find(image[0]) for image in images]

    def predict(
        self, images: NDArray[np.uint8], *, score_threshold: float, multi_label: bool = False
    ) -> list[Detections]:
        """See the protocol."""
        return next(iter(self.run([images], score_threshold=score_threshold)))

    def _find(self, image: NDArray[np.uint8]) -> Detections:
        number, areas = cv2.connectedComponents((image > 128).astype(np.uint8), connectivity=8)
        boxes = []
        for area in range(1, number):
            rows, columns = np.nonzero(areas == area)
            corners = np.concatenate(
                [np.stack([columns + dx, rows + dy], axis=1) for dx in (0, 1) for dy in (0, 1)]
            ).astype(np.float32)
            (cx, cy), (w, h), degrees = cv2.minAreaRect(corners)
            boxes.append([cx, cy, w, h, np.deg2rad(degrees)])
        one = regularize_le90(np.array(boxes, np.float32).reshape(-1, 5))
        return Detections(
            np.concatenate([one for _ in self.labels]),
            np.full(len(one) * len(self.labels), 0.9, np.float32),
            np.repeat(self.labels, len(one)),
        )


#: Builders of the smallest networks by kind.
SMALLEST: dict[ModelKind, str] = {
    "rotated": "rtmdet_r_test",
    "horizontal": "rtmdet_test",
    "mask": "rtmdet_ins_test",
    "classification": "cspnext_test",
}


def small_network(kind: ModelKind = "rotated", *, num_classes: int = 1, in_channels: int = 3) -> Any:
    """Return the smallest network of a kind, untrained, whose outputs vary from place to place."""
    import torch

    from rtmdet_geo.models import get_classifier, get_model

    torch.manual_seed(0)
    build = get_classifier if kind == "classification" else get_model
    network = build(SMALLEST[kind], num_classes=num_classes, in_channels=in_channels)
    calibrate(network)
    return network.eval()


@functools.cache
def small_model(kind: ModelKind = "rotated") -> Path:
    """Return an exported small network (three bands, untrained), made once per test process.

    It has one class, a classifier three.
    """
    from rtmdet_geo.export import export_model

    name = "small" if kind == "rotated" else f"small_{kind}"
    classes = ("ship", "plane", "bridge") if kind == "classification" else ("ship",)
    spec = make_spec(
        name=name,
        architecture=SMALLEST[kind],
        kind=kind,
        classes=classes,
        training_data="noise",
        licence="Apache-2.0",
    )
    path = Path(tempfile.mkdtemp(prefix="rtmdet_geo_test_")) / f"{name}.onnx"
    export_model(small_network(kind, num_classes=len(classes)), path, spec=spec)
    return path


def calibrate(network: object) -> None:
    """Give an untrained network batch statistics of real activations and strong predictors: its outputs then vary."""
    import torch
    from torch import nn

    from rtmdet_geo.export import make_check_tiles

    assert isinstance(network, nn.Module)
    channels = next(network.parameters()).shape[1]
    tiles = torch.from_numpy(make_check_tiles(4, channels, 128, seed=0)).float()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None  # cumulative average
        network.train()
        network((tiles - 40) / 35)
        network.eval()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):  # channels that hardly vary would blow up rounding errors
                module.running_var.clamp_(min=0.2)
        raw = network((tiles - 40) / 35)
        if network.kind == "classification":  # logits around 0 that differ from image to image
            raw = network((tiles * torch.tensor([0.1, 0.5, 1, 2]).view(4, 1, 1, 1) - 40) / 35)
            factor = 0.1 / raw.std(dim=0).mean()
            network.head.fc.weight *= factor
            network.head.fc.bias -= raw.mean(dim=0) * factor
            return
        head: Any = network.bbox_head
        third = {"rotated": "rtm_ang", "mask": "rtm_kernel"}.get(network.kind)
        predictors = [head.rtm_cls, head.rtm_reg, *([getattr(head, third)] if third else [])]
        for level in range(len(head.strides)):
            # logits around -1 that vary by 2, distances that vary by a stride, angles and kernels by a half
            for layers, values, spread in zip(predictors, raw, (2.0, head.strides[level], 0.5), strict=False):
                layers[level].weight *= spread / values[level].std()
            head.rtm_cls[level].bias += -1 - network((tiles - 40) / 35)[0][level].mean()
        if network.kind == "mask":
            head.mask_head.projection.weight /= raw.mask_features.std()
