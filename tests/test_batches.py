"""Never a lost box in a batch: what engines of model files find in a tile does not depend on the tiles beside it."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from synthetic import small_model

from rtmdet_geo.backends import open_backend
from rtmdet_geo.export import export_model, make_check_tiles

ENGINES = [
    "onnxruntime",
    pytest.param(
        "openvino",
        marks=pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed"),
    ),
]
THRESHOLD = 0.3
MARGIN = 0.02  # scores nearer to the threshold may fall on either side


def missing(found, others):
    """Return the detections above the threshold by the margin that have no partner of their own among the others."""
    left = list(range(len(others)))
    lost = []
    for index in np.flatnonzero(found.scores > THRESHOLD + MARGIN):
        for other in left:
            turn = abs(found.boxes[index, 4] - others.boxes[other, 4]) % np.pi
            if (
                found.labels[index] == others.labels[other]
                and np.abs(found.boxes[index, :4] - others.boxes[other, :4]).max() < 0.05
                and min(turn, np.pi - turn) < 1e-3
                and abs(found.scores[index] - others.scores[other]) < 1e-3
            ):
                left.remove(other)
                break
        else:
            lost.append(int(index))
    return lost


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("number", [1, 3, 7])
def test_files_of_one_batch_size_take_any(engine, number, tmp_path):
    export_model(small_model("mask"), tmp_path / "three.onnx", batch_size=3, verify=False)
    tiles = make_check_tiles(number, 3, 96, seed=4)
    fixed = open_backend(tmp_path / "three.onnx", name=engine, threads=1)
    assert fixed.best_batch_size == 3
    found = fixed.predict(tiles, score_threshold=THRESHOLD)
    expected = open_backend(small_model("mask"), name=engine, threads=1).predict(tiles, score_threshold=THRESHOLD)
    assert len(found) == number
    for one, other in zip(found, expected, strict=True):
        assert not missing(one, other) and not missing(other, one)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["rotated", "horizontal", "mask"])
def test_batch_of_one_equals_batch_of_eight(kind, engine):
    """Batches of eight or of one come first, then a shorter one: OpenVINO compiles for what is first."""
    tiles = make_check_tiles(11, 3, 96, seed=4)
    orders = []
    for sizes in ((8, 3, *[1] * 11), (*[1] * 11, 8, 3)):
        opened = open_backend(small_model(kind), name=engine, threads=1)
        starts = [sum(sizes[:number]) % len(tiles) for number in range(len(sizes))]
        batches = [tiles[start : start + size] for start, size in zip(starts, sizes, strict=True)]
        found = [one for batch in opened.run(batches, score_threshold=THRESHOLD) for one in batch]
        orders += [found[: len(tiles)], found[len(tiles) :]]
    assert min(len(one) for one in orders[0]) > 3
    for others in orders[1:]:
        for one, other in zip(orders[0], others, strict=True):
            assert not missing(one, other) and not missing(other, one)
    assert missing(orders[0][0], orders[0][1])  # negative control: another tile
