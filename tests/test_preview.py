"""The preview: right size, outlines where the objects are, bounded strips, whole file or none."""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from rtmdet_geo import preview
from rtmdet_geo.errors import OutputError
from rtmdet_geo.preview import class_colour, draw_preview, read_overview
from rtmdet_geo.structures import Detections


class ArrayScene:
    """A scene in memory that remembers what was read."""

    scene_id = "scène"

    def __init__(self, pixels: NDArray[np.uint8], valid: NDArray[np.bool_] | None = None) -> None:
        self.pixels = pixels
        self.valid = np.ones(pixels.shape[1:], bool) if valid is None else valid
        self.height, self.width = pixels.shape[1:]
        self.windows: list[tuple[int, int, int, int]] = []

    def read(self, x: int, y: int, width: int, height: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        self.windows.append((x, y, width, height))
        window = (slice(y, y + height), slice(x, x + width))
        return self.pixels[:, *window], self.valid[window]


def water(height: int, width: int, channels: int = 3, value: int = 12) -> NDArray[np.uint8]:
    rng = np.random.default_rng(0)
    return rng.integers(value - 3, value + 4, (channels, height, width)).astype(np.uint8)


def found(boxes: list[list[float]], labels: list[int] | None = None) -> Detections:
    number = len(boxes)
    scores = np.linspace(0.9, 0.5, number)
    return Detections(np.array(boxes).reshape(-1, 5), scores, np.array(labels or [0] * number, int), "scene")


def is_coloured(image: NDArray[np.uint8]) -> NDArray[np.bool_]:
    return np.ptp(image.astype(int), axis=2) > 60


def test_outline_lies_around_the_object(tmp_path: Path) -> None:
    pixels = water(300, 500)
    pixels[:, 140:160, 200:300] = 220
    draw_preview(ArrayScene(pixels), found([[250, 150, 120, 40, 0]]), tmp_path / "ships.png", classes=["ship"])
    assert os.listdir(tmp_path) == ["ships.png"]
    image = cv2.imread(str(tmp_path / "ships.png"))
    assert image.shape[1] == 500 and 320 <= image.shape[0] <= 340  # the caption is below
    rows, columns = np.nonzero(is_coloured(image[:300]))
    assert abs(rows.min() - 129.5) <= 1.5 and abs(rows.max() - 169.5) <= 1.5
    assert abs(columns.min() - 189.5) <= 1.5 and abs(columns.max() - 309.5) <= 1.5
    assert not is_coloured(image[135:165, 195:305]).any()  # the object itself is not painted over
    assert is_coloured(image[300:]).any()  # legend


def test_angle_is_clockwise_on_screen(tmp_path: Path) -> None:
    draw_preview(
        ArrayScene(water(200, 200)), found([[100, 100, 120, 10, np.pi / 4]]), tmp_path / "a.png", classes=["s"]
    )
    coloured = is_coloured(cv2.imread(str(tmp_path / "a.png"))[:200])
    assert coloured[100:, 100:].sum() > 50 and coloured[100:, :90].sum() == 0  # the bow points to the lower right


def test_tiny_boxes_stay_visible_and_nothing_is_drawn_without_detections(tmp_path: Path) -> None:
    scene = ArrayScene(water(1000, 2000))
    draw_preview(scene, found([[1000, 500, 4, 2, 0]]), tmp_path / "a.png", classes=["ship"], max_size=400)
    image = cv2.imread(str(tmp_path / "a.png"))
    assert image.shape[1] == 400
    assert is_coloured(image[:200]).sum() >= 12
    draw_preview(scene, Detections.empty("scene"), tmp_path / "b.png", classes=["ship"], max_size=400)
    assert not is_coloured(cv2.imread(str(tmp_path / "b.png"))).any()


def test_dark_water_shows_and_noise_stays_moderate(tmp_path: Path) -> None:
    pixels = water(200, 200)
    pixels[:, :20] = 200
    draw_preview(ArrayScene(pixels), found([]), tmp_path / "a.png", classes=["ship"])
    assert 20 < cv2.imread(str(tmp_path / "a.png"))[50:200].mean() < 110
    draw_preview(ArrayScene(np.zeros((3, 50, 50), np.uint8)), found([]), tmp_path / "b.png", classes=["ship"])
    image = cv2.imread(str(tmp_path / "b.png"))
    left = (image.shape[1] - 50) // 2
    assert image[:50, left : left + 50].max() == 0


@pytest.mark.parametrize("block_strip", [1, 200, 10**9])
@pytest.mark.parametrize(
    ("height", "width", "max_size"), [(517, 301, 100), (40, 999, 250), (90, 80, 200), (1, 1, 10), (3, 400, 100)]
)
def test_overview_is_the_area_mean_whatever_the_strips(
    height: int, width: int, max_size: int, block_strip: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preview, "_STRIP_PIXELS", block_strip)
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (4, height, width)).astype(np.uint8)
    scene = ArrayScene(pixels)
    image, valid = read_overview(scene, max_size)
    assert valid.all() and max(image.shape[:2]) == min(max_size, max(height, width))
    assert sum(window[3] for window in scene.windows) == height  # each row is read once
    assert all(window[0] == 0 and window[2] == width for window in scene.windows)
    if max(height, width) <= max_size:
        np.testing.assert_array_equal(image, np.moveaxis(pixels[:3], 0, 2))
    else:
        np.testing.assert_allclose(image.mean(axis=(0, 1)), pixels[:3].mean(axis=(1, 2)), atol=3)


def test_pixels_without_data_are_left_out_of_the_mean_and_grey(tmp_path: Path) -> None:
    pixels = np.full((3, 100, 100), 100, np.uint8)
    valid = np.ones((100, 100), bool)
    valid[:, 51:] = False
    pixels[:, ~valid] = 0
    image, is_valid = read_overview(ArrayScene(pixels, valid), 50)
    assert is_valid[:, :26].all() and not is_valid[:, 26:].any()
    assert (image[:, :26] == 100).all()
    draw_preview(ArrayScene(pixels, np.zeros((100, 100), bool)), found([]), tmp_path / "a.png", classes=["s"])
    drawn = cv2.imread(str(tmp_path / "a.png"))
    assert (drawn[50, drawn.shape[1] // 2] == 96).all()


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_any_number_of_channels_classes_and_scores(tmp_path: Path, channels: int) -> None:
    boxes = [[20 + 30 * index, 30, 20, 8, 0.3] for index in range(8)]
    classes = [f"class number {index}" for index in range(8)]
    draw_preview(
        ArrayScene(water(60, 260, channels)),
        found(boxes, list(range(8))),
        tmp_path / "a.png",
        classes=classes,
        with_scores=True,
    )
    assert cv2.imread(str(tmp_path / "a.png")).shape[0] > 60 + 60  # the legend takes several lines


def test_one_pixel_scene(tmp_path: Path) -> None:
    draw_preview(ArrayScene(water(1, 1)), found([[0.5, 0.5, 1, 1, 0]]), tmp_path / "a.png", classes=["ship"])
    assert cv2.imread(str(tmp_path / "a.png")) is not None


def test_colours_differ() -> None:
    colours = np.array([class_colour(label) for label in range(15)], float)
    distances = np.abs(colours[:, None] - colours[None]).sum(axis=2)
    assert distances[~np.eye(15, dtype=bool)].min() > 30


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = ArrayScene(water(20, 20))
    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    with pytest.raises(OutputError, match="--overwrite"):
        draw_preview(scene, found([]), path, classes=["ship"], overwrite=False)
    with pytest.raises(OutputError, match=r"must be a \.png"):
        draw_preview(scene, found([]), tmp_path / "a.jpg", classes=["ship"])
    with pytest.raises(OutputError, match="nosuch"):
        draw_preview(scene, found([]), tmp_path / "nosuch" / "a.png", classes=["ship"])
    with pytest.raises(ValueError, match="merge them first"):
        draw_preview(scene, Detections.empty("tile"), path, classes=["ship"])
    assert scene.windows == []  # refused before anything was read

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match="No space left"):
        draw_preview(scene, found([]), path, classes=["ship"])
    assert os.listdir(tmp_path) == ["a.png"] and path.read_bytes() == b"old"
