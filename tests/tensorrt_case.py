"""What the tests of the TensorRT backend share: a small model file of 96 px tiles, and tiles for it."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from synthetic import SMALLEST, make_spec, small_network

from rtmdet_geo.backends.onnxrt import OnnxRuntimeBackend
from rtmdet_geo.export import export_model, make_check_tiles
from rtmdet_geo.structures import Detections, Kind

SIDE = 96


@functools.cache
def model_file(kind: Kind = "rotated", *, fixed: bool = False, **changes: Any) -> Path:
    """Return an exported small network of one class whose tile size is SIDE px, made once per test process."""
    spec = make_spec(name=f"small {kind}", architecture=SMALLEST[kind], kind=kind, tile_size=SIDE, **changes)
    path = Path(tempfile.mkdtemp(prefix="rtmdet_geo_test_")) / "small.onnx"
    export_model(small_network(kind), path, spec=spec, tile_size=SIDE if fixed else None, verify=False)
    return path


@functools.cache
def tiles(number: int = 5) -> NDArray[np.uint8]:
    """Return uint8 (number, 3, SIDE, SIDE); not to be written to."""
    made = make_check_tiles(number, 3, SIDE, seed=3)
    made.flags.writeable = False
    return made


@functools.cache
def expected(number: int = 5, kind: Kind = "rotated") -> list[Detections]:
    """Return what onnxruntime finds on :func:`tiles` with scores of 0.3 at least."""
    return OnnxRuntimeBackend(model_file(kind), threads=1).predict(tiles(number), score_threshold=0.3)


def assert_near(found: Detections, wanted: Detections, *, px: float = 0.5, score: float = 0.01) -> None:
    """Every detection clearly above the threshold has a partner in the other, within px and score, one to one."""
    for mine, theirs in ((found, wanted), (wanted, found)):
        for box, value, label in zip(mine.boxes, mine.scores, mine.labels, strict=True):
            if value < 0.32:
                continue
            apart = np.abs(theirs.boxes - box)
            apart[:, 4] = np.minimum(apart[:, 4] % np.pi, np.pi - apart[:, 4] % np.pi) * box[2:4].max() / 2
            near = (apart.max(axis=1) <= px) & (np.abs(theirs.scores - value) <= score) & (theirs.labels == label)
            assert near.any()
