"""The bundled model files give what their weights give, in both precisions, at any batch size, on real tiles."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

from rtmdet_geo.backends import Backend, open_backend
from rtmdet_geo.boxes import boxes_to_polygons
from rtmdet_geo.catalog import CATALOG, read_spec
from rtmdet_geo.export.graph import write_metadata
from rtmdet_geo.export.half import to_half, with_roundings
from rtmdet_geo.export.tiles import shipped_tiles
from rtmdet_geo.structures import Detections

MODELS = ("sen2ships_r", "banepa_ins")


def tiles_of(name: str) -> np.ndarray:
    return np.stack(shipped_tiles(read_spec(CATALOG[name].path), 256))


def find(engine: Backend, tiles: np.ndarray, size: int, score: float) -> list[Detections]:
    batches: Iterator[np.ndarray] = (tiles[start : start + size] for start in range(0, len(tiles), size))
    return [item for batch in engine.run(batches, score_threshold=score) for item in batch]


def assert_found_again(one: Detections, other: Detections, floor: float, px: float, score: float) -> int:
    """Every detection of ``one`` above ``floor`` is in ``other``: same class, corners and score so near."""
    chosen = one.select(one.scores >= floor)
    mine, others = boxes_to_polygons(chosen.boxes), boxes_to_polygons(other.boxes)
    for corners, value, label in zip(mine, chosen.scores, chosen.labels, strict=True):
        distances = np.stack([np.abs(np.roll(others, turn, axis=1) - corners).max(axis=(1, 2)) for turn in (0, 2)])
        near = (distances.min(axis=0) <= px) & (np.abs(other.scores - value) <= score) & (other.labels == label)
        assert near.any(), (corners, value, distances.min(initial=np.inf))
    return len(chosen)


def assert_one_to_one(engines: list[Backend], tiles: np.ndarray, *, px: float, score: float, least: int) -> None:
    threshold = engines[0].spec.score_threshold
    both = [find(engine, tiles, 2, threshold - 0.02) for engine in engines]
    number = 0
    for one, other in zip(*both, strict=True):
        number += assert_found_again(one, other, threshold + 0.02, px, score)
        assert_found_again(other, one, threshold + 0.02, px, score)
    assert number >= least, "the tiles must show what the model finds"


@pytest.mark.parametrize("name", MODELS)
def test_model_file_equals_its_weights(name):
    """Its half weights are those of the weights file: nothing was rounded after the norms were folded in."""
    engines = [open_backend(name, name=engine, threads=1) for engine in ("onnxruntime", "torch")]
    assert_one_to_one(engines, tiles_of(name), px=0.05, score=1e-3, least=30)
    assert engines[0].spec.weights_sha256 == read_spec(CATALOG[name].weights_path).weights_sha256
    assert 0 < engines[0].spec.differences["boxes_px"] < 0.001


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """fp16 files with all their roundings, as a GPU makes them."""
    folder = tmp_path_factory.mktemp("halves")
    for name in MODELS:
        rounded = with_roundings(to_half(onnx.load(CATALOG[name].path)))
        write_metadata(rounded, read_spec(CATALOG[name].path).model_copy(update={"precision": "fp16"}))
        onnx.save(rounded, folder / f"{name}.onnx")
    return {name: folder / f"{name}.onnx" for name in MODELS}


@pytest.mark.parametrize("name", MODELS)
def test_fp16_finds_what_fp32_finds(name, halves):
    engines = [open_backend(name, threads=1), open_backend(halves[name], threads=1)]
    assert [engine.spec.precision for engine in engines] == ["fp32", "fp16"]
    assert_one_to_one(engines, tiles_of(name), px=0.5, score=0.01, least=30)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_batch_of_one_equals_batch_of_eight(name, precision, halves):
    engine = open_backend(halves[name] if precision == "fp16" else name, threads=1)
    two = tiles_of(name)[:, :, :192, :192]
    tiles = np.concatenate([two, two[:, :, ::-1], two[:, :, :, ::-1], two[:, :, ::-1, ::-1]])
    one, eight = (find(engine, tiles, size, 0.1) for size in (1, 8))
    assert sum(map(len, one)) > 100
    for single, joint in zip(one, eight, strict=True):
        assert_found_again(single, joint, 0.12, 0.01, 1e-4)
        assert_found_again(joint, single, 0.12, 0.01, 1e-4)


def test_a_lost_box_would_be_noticed():
    """Negative control of what the tests above compare with."""
    (found,) = find(open_backend("sen2ships_r", threads=1), tiles_of("sen2ships_r")[:1], 1, 0.3)
    assert assert_found_again(found, found, 0.3, 0.05, 1e-3) == len(found) > 5
    with pytest.raises(AssertionError):
        assert_found_again(found, found.select(np.arange(1, len(found))), 0.3, 0.05, 1e-3)
    moved = Detections(found.boxes + np.array([0.1, 0, 0, 0, 0]), found.scores, found.labels)
    with pytest.raises(AssertionError):
        assert_found_again(found, moved, 0.3, 0.05, 1e-3)
