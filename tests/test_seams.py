"""The map must not show where the tiles were: real scenes with the tiles shifted."""

from __future__ import annotations

import numpy as np
import pytest

from rtmdet_geo.backends import Backend, open_backend
from rtmdet_geo.catalog import find_model
from rtmdet_geo.merge import merge_survivors
from rtmdet_geo.nms import rotated_iou_aligned
from rtmdet_geo.raster import open_scene
from rtmdet_geo.scene import Scene
from rtmdet_geo.structures import Detections
from rtmdet_geo.tile_loop import TileSettings, run_tiles
from rtmdet_geo.tiles import TileGrid

PORTS = ("marseille", "valencia", "gdynia")


class Shifted:
    """A scene with pixels without data before its first row and column, so that a grid cuts it elsewhere."""

    def __init__(self, scene: Scene, x: int, y: int) -> None:
        """Move a scene by (x, y) px."""
        self._scene, self._x, self._y = scene, x, y
        self.path = scene.path
        self.width, self.height = scene.width + x, scene.height + y

    def read(self, x: int, y: int, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
        """See Scene.read."""
        return self._scene.read(x - self._x, y - self._y, width, height)


def detect(scene: Scene, engine: Backend, x: int, y: int) -> Detections:
    """Return what is found with the scene shifted, in px of the scene as it is."""
    shifted = Shifted(scene, x, y)
    settings = TileSettings.of(engine, tile_size=512, score_threshold=0.3)
    grid = TileGrid(shifted.width, shifted.height, settings.tile_size, settings.overlap)
    results = run_tiles(shifted, grid, engine, settings)
    merged = merge_survivors(results.parts, grid, iou_threshold=settings.iou_threshold)
    merged.detections.boxes[:, :2] -= (x, y)
    return merged.detections


def count_matches(found: Detections, others: Detections) -> tuple[int, int]:
    """Return how many with score .5 or more have a partner of their own (IoU .5), and how many there are."""
    boxes = found.boxes[found.scores >= 0.5]
    free = np.ones(len(others), bool)
    for box in boxes:
        iou = np.asarray(rotated_iou_aligned(np.repeat(box[None], len(others), axis=0), others.boxes)) * free
        if iou.max(initial=0) >= 0.5:
            free[iou.argmax()] = False
    return int((~free).sum()), len(boxes)


@pytest.mark.slow
@pytest.mark.parametrize("shift,least", [((64, 96), 0.99), ((137, 251), 0.95)])
def test_shifted_tiles_find_the_same_ships_in_real_ports(data_dir, shift, least):
    engine = open_backend(find_model(None))
    num_matched = num_found = 0
    for port in PORTS:
        with open_scene(
            data_dir / "sen2ships" / f"{port}.tif",
            model_bands=engine.spec.bands,
            stretch=engine.spec.stretch,
            model_gsd_m=engine.spec.gsd_m,
        ) as scene:
            one, other = detect(scene, engine, 0, 0), detect(scene, engine, *shift)
        for pair in ((one, other), (other, one)):
            matched, found = count_matches(*pair)
            num_matched, num_found = num_matched + matched, num_found + found
    assert num_found >= 60, "ships that should be there were not found"
    assert num_matched >= least * num_found
