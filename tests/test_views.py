"""Test-time augmentation: what views show, and that what is found in them comes back to where it is."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from engines import Engine, RectangleEngine, check_golden, draw_rectangles, golden_candidates, scattered_boxes
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import make_spec

from rtmdet_geo.backends import Backend, choose_batch_size
from rtmdet_geo.boxes import boxes_to_hboxes
from rtmdet_geo.errors import ConfigError, SaturatedTileWarning
from rtmdet_geo.masks import assemble_detections
from rtmdet_geo.nms import nms_horizontal, nms_rotated
from rtmdet_geo.structures import PAD_VALUE, Detections, Kind, MaskKernels
from rtmdet_geo.views import (
    FLIPS,
    PRESETS,
    Augmentation,
    AugmentedBackend,
    View,
    augment,
    find_augmentation,
    pad,
    restore,
    show,
)

ALL = PRESETS["all"]


def rotated(*boxes: list[float]) -> Detections:
    return Detections(np.array(boxes), np.full(len(boxes), 0.5), np.zeros(len(boxes)))


def test_worked_views_of_a_picture() -> None:
    """2 x 3 px, twice as large and mirrored; grey lies at the bottom and the right of every view."""
    image = np.array([[0, 40, 80], [120, 160, 200]], np.uint8)[None, None]
    shown = dict(show(image, Augmentation(flips=FLIPS), multiple=4))
    rows = {view: picture[0, 0, :2, :3].tolist() for view, picture in shown.items()}
    assert rows == {
        View(): [[0, 40, 80], [120, 160, 200]],
        View(flip_x=True): [[80, 40, 0], [200, 160, 120]],
        View(flip_y=True): [[120, 160, 200], [0, 40, 80]],
        View(flip_x=True, flip_y=True): [[200, 160, 120], [80, 40, 0]],
    }
    for picture in shown.values():
        assert picture.shape == (1, 1, 4, 4) and picture.flags.c_contiguous
        assert (picture[..., 2:, :] == PAD_VALUE).all() and (picture[..., 3:] == PAD_VALUE).all()
    ((view, larger),) = show(image, Augmentation(scales=(2.0,)), multiple=4)
    assert view == View(2.0, 2.0) and larger.shape == (1, 1, 4, 8)
    assert larger[0, 0, 0, :6].tolist() == [0, 10, 30, 50, 70, 80]  # linear between pixel centres
    ((view, smaller),) = show(image.repeat(2, 2).repeat(2, 3), Augmentation(scales=(0.5,)), multiple=1)
    assert view == View(0.5, 0.5) and smaller.tolist() == image.tolist()  # the mean of each 2 x 2
    ((view, uneven),) = show(image, Augmentation(scales=(1.25,)), multiple=1, side=8)
    assert view == View(4 / 3, 2 / 2) and uneven.shape == (1, 1, 8, 8)  # sides are whole numbers: 4 x 2 px


def test_worked_boxes_go_back() -> None:
    """Of a picture of 64 x 40 px, shown twice as large, mirrored or not: halved, then mirrored within 64 and 40."""
    found = rotated([100, 20, 16, 8, 0.5], [8, 4, 10, 2, -1.5])
    for flips, expected in (
        ((False, False), [[50, 10, 8, 4, 0.5], [4, 2, 5, 1, -1.5]]),
        ((True, False), [[14, 10, 8, 4, -0.5], [60, 2, 5, 1, 1.5]]),
        ((False, True), [[50, 30, 8, 4, -0.5], [4, 38, 5, 1, 1.5]]),
        ((True, True), [[14, 30, 8, 4, 0.5], [60, 38, 5, 1, -1.5]]),
    ):
        boxes = restore(found, View(2.0, 2.0, *flips), 40, 64).boxes
        np.testing.assert_allclose(boxes, expected, atol=1e-5)
    # twice as wide only: the long side along (1, 1) becomes (1/2, 1), the other (-1, 1) keeps its own stretch
    diagonal = restore(rotated([100, 20, 8 * math.sqrt(2), 4, math.pi / 4]), View(2.0, 1.0), 40, 64).boxes
    stretch = math.hypot(0.5, 1) / math.sqrt(2)
    np.testing.assert_allclose(diagonal, [[50, 20, 8 * math.hypot(0.5, 1), 4 * stretch, math.atan2(1, 0.5)]], rtol=1e-5)
    # a view twice as wide shows a 4 x 6 px upright box as 8 x 6: its long side changes
    upright = restore(rotated([8, 8, 8, 6, 0]), View(2.0, 1.0), 40, 64).boxes
    np.testing.assert_allclose(upright, [[4, 8, 6, 4, -math.pi / 2]], atol=1e-5)


def test_horizontal_boxes_keep_angle_zero() -> None:
    found = Detections([[100, 20, 6, 16, 0]], [0.5], [0], kind="horizontal")
    boxes = restore(found, View(2.0, 0.5, True, True), 40, 64).boxes
    assert boxes.tolist() == [[14, 0, 3, 32, 0]]
    assert not np.signbit(boxes[:, 4]).any()


def distances(found: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Return per found box (N,) the largest difference in px of its corners from the nearest true box's."""
    nearest = np.linalg.norm(found[:, None, :2] - true[None, :, :2], axis=2).argmin(axis=1)
    partner = true[nearest]
    turn = found[:, 4] - partner[:, 4]
    difference = np.abs(found[:, :4] - partner[:, :4]).max(axis=1)
    return np.maximum(difference, np.abs(np.sin(turn)) * partner[:, 2] / 2)


@settings(deadline=None, max_examples=12)
@given(st.integers(0, 2**32), st.sampled_from(["rotated", "horizontal"]), st.sampled_from([ALL, PRESETS["flips"]]))
def test_every_view_finds_the_same(seed: int, kind: Kind, augmentation: Augmentation) -> None:
    """An engine that is exact finds in every view what it finds in the plain picture; one NMS leaves that."""
    boxes = scattered_boxes(96, 160, seed, kind=kind)
    image = draw_rectangles(96, 160, boxes)
    engine = RectangleEngine(make_spec(kind=kind))
    (plain,) = engine.predict(image[None], score_threshold=0.5)
    assert len(plain) == len(boxes) and distances(plain.boxes, boxes).max() < 0.3
    (found,) = AugmentedBackend(engine, augmentation).predict(image[None], score_threshold=0.5)
    assert len(found) == augmentation.num_views * len(plain)
    tolerance = 0.01 if augmentation.scales == (1.0,) else 0.6  # mirroring is exact, resampling blurs
    assert distances(found.boxes, plain.boxes).max() < tolerance
    if kind == "rotated":
        assert (found.boxes[:, 2] >= found.boxes[:, 3]).all()
        assert ((found.boxes[:, 4] >= -np.pi / 2 - 1e-6) & (found.boxes[:, 4] < np.pi / 2)).all()
        kept = nms_rotated(found.boxes, found.scores, found.labels, iou_threshold=0.1)
    else:
        kept = nms_horizontal(boxes_to_hboxes(found.boxes), found.scores, found.labels, iou_threshold=0.65)
    assert len(kept) == len(plain)


def test_a_wrong_way_back_would_be_seen() -> None:
    """Boxes mirrored about another width, or not turned, are far off."""
    boxes = scattered_boxes(96, 160, 1)
    engine = RectangleEngine()
    image = draw_rectangles(96, 160, boxes)[None]
    ((view, picture),) = show(image, Augmentation(flips=("horizontal",)), multiple=32)
    (found,) = engine.predict(picture, score_threshold=0.5)
    assert distances(restore(found, view, 96, 160).boxes, boxes).max() < 0.3
    assert distances(restore(found, view, 96, 158).boxes, boxes).max() > 1.5
    assert distances(found.boxes, boxes).max() > 3


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 2**32))
def test_masks_of_mirrored_views_are_equal(seed: int) -> None:
    boxes = scattered_boxes(96, 160, seed, kind="mask")
    image = draw_rectangles(96, 160, boxes)[None]
    engine = RectangleEngine(make_spec(kind="mask"))
    (plain,) = engine.predict(image, score_threshold=0.5)
    expected = assemble_detections(plain, 96, 160)
    assert all(mask.mask.any() for mask in expected)
    (found,) = AugmentedBackend(engine, PRESETS["flips"]).predict(image, score_threshold=0.5)
    assert isinstance(found.masks, MaskKernels) and len(found.masks.views) == 4
    nearest = np.linalg.norm(found.boxes[:, None, :2] - plain.boxes[None, :, :2], axis=2).argmin(axis=1)
    assert np.bincount(nearest).tolist() == [4] * len(plain)
    for mask, partner in zip(assemble_detections(found, 96, 160), nearest, strict=True):
        whole, other = np.zeros((2, 96, 160), np.uint8)
        for canvas, (part, x, y) in ((whole, mask), (other, expected[partner])):
            canvas[y : y + part.shape[0], x : x + part.shape[1]] = part
        # the same blob but for boxes' last digits: windows may differ by a pixel, and hold parts of neighbours
        assert np.count_nonzero(whole != other) <= 16


def test_masks_of_resized_views_lie_in_the_tile() -> None:
    """Cells of a view twice as large are half as large in the tile: masks come nearer to the rectangle."""
    box = np.array([[70.0, 50.0, 44.0, 36.0, 0.0]])
    image = draw_rectangles(96, 160, box)[None]
    engine = RectangleEngine(make_spec(kind="mask"))
    truth = np.zeros((96, 160), bool)
    truth[32:68, 48:92] = True
    for augmentation, least in (
        (Augmentation(), 0.85),
        (Augmentation(scales=(2.0,)), 0.9),
        (Augmentation(scales=(1.3,), flips=("diagonal",)), 0.85),
    ):
        (found,) = AugmentedBackend(engine, augmentation).predict(image, score_threshold=0.5)
        ((mask, x, y),) = assemble_detections(found, 96, 160)
        whole = np.zeros((96, 160), bool)
        whole[y : y + mask.shape[0], x : x + mask.shape[1]] = mask
        assert np.count_nonzero(whole & truth) / np.count_nonzero(whole | truth) > least, augmentation


def test_batches_come_one_at_a_time_and_in_order() -> None:
    boxes = [scattered_boxes(96, 160, seed) for seed in range(3)]
    images = np.stack([draw_rectangles(96, 160, part) for part in boxes])
    engine = RectangleEngine()
    backend = AugmentedBackend(engine, ALL)
    taken: list[int] = []

    def batches() -> Iterator[np.ndarray]:
        for number, batch in enumerate((images[:2], images[2:])):
            taken.append(number)
            yield batch

    results = backend.run(batches(), score_threshold=0.5)
    assert taken == []
    first = next(results)
    assert taken == [0] and len(first) == 2 and len(engine.batches) == ALL.num_views
    (second,) = results
    assert [len(part) for part in (*first, *second)] == [12 * len(part) for part in boxes]
    sizes = {batch.shape[2:] for batch in engine.batches}
    assert sizes == {(96, 128), (96, 160), (128, 224)}  # 72 x 120, 96 x 160, 120 x 200 px and padding


def test_batches_are_as_large_as_the_engine_likes_them() -> None:
    engine = RectangleEngine()
    assert choose_batch_size(AugmentedBackend(engine, ALL), None) == 1
    engine.best_batch_size = 8
    assert choose_batch_size(AugmentedBackend(engine, ALL), None) == 8


class ScoredEngine(Engine):
    """Finds one box in every picture; scores fall from view to view, and every other view is saturated."""

    def find(self, image: np.ndarray) -> Detections:
        """See the class."""
        number = len(self.batches)
        self.num_saturated += number % 2
        return Detections([[30, 20, 16, 8, 0]], [0.9 - 0.1 * number], [0])


def test_best_score_first_and_saturated_once() -> None:
    engine = ScoredEngine()
    backend = AugmentedBackend(engine, PRESETS["flips"])
    with pytest.warns(SaturatedTileWarning, match="1 of 1 images"):
        (found,) = backend.predict(np.zeros((1, 3, 64, 64), np.uint8), score_threshold=0.6)
    np.testing.assert_allclose(found.scores, [0.8, 0.7, 0.6], atol=1e-6)
    assert found.boxes[:, :2].tolist() == [[30, 20], [34, 20], [30, 44]]
    assert engine.num_saturated == 2 and backend.num_saturated == 1
    with pytest.warns(SaturatedTileWarning, match="2 of 2 images"):
        backend.predict(np.zeros((2, 3, 64, 64), np.uint8), score_threshold=0.0)
    assert backend.num_saturated == 3


def test_nothing_found() -> None:
    for kind in ("rotated", "horizontal", "mask"):
        engine = RectangleEngine(make_spec(kind=kind))
        backend = AugmentedBackend(engine, ALL)
        (found,) = backend.predict(np.full((1, 3, 64, 64), PAD_VALUE, np.uint8), score_threshold=0.5)
        assert len(found) == 0 and found.kind == kind and found.frame == "tile"


def test_it_is_a_backend_and_presets() -> None:
    engine = RectangleEngine()
    backend = augment(engine, "all")
    assert isinstance(backend, Backend) and isinstance(backend, AugmentedBackend)
    assert (backend.name, backend.spec, backend.fixed_tile_size) == (engine.name, engine.spec, None)
    assert augment(engine, None) is augment(engine, "none") is augment(engine, Augmentation()) is engine
    assert [PRESETS[name].num_views for name in ("none", "flips", "scales", "all")] == [1, 4, 3, 12]
    assert find_augmentation(ALL) is ALL


def test_what_is_refused() -> None:
    fixed = RectangleEngine()
    fixed.fixed_tile_size = 64
    with pytest.raises(ConfigError, match=r"tiles of 64 px only.*'flips'"):
        augment(fixed, "scales")
    (found,) = augment(fixed, "flips").predict(np.zeros((1, 3, 64, 64), np.uint8), score_threshold=0.5)
    assert len(found) == 0
    with pytest.raises(ConfigError, match="already"):
        augment(augment(fixed, "flips"), "flips")
    with pytest.raises(ConfigError, match="'flip' is unknown; choose from none, flips, scales, all"):
        augment(fixed, "flip")
    for options, words in (
        ({"scales": ()}, "one or more"),
        ({"scales": (1.0, 1.0)}, "each once"),
        ({"scales": (0.0,)}, "1/8"),
        ({"scales": (math.nan,)}, "1/8"),
        ({"flips": ("sideways",)}, "sideways"),
    ):
        with pytest.raises(ConfigError, match=words):
            Augmentation(**options)  # type: ignore[arg-type]
    kernels = RectangleEngine(make_spec(kind="mask")).find(draw_rectangles(64, 64, scattered_boxes(64, 64, 0)))
    once = restore(kernels, View(flip_x=True), 64, 64)
    with pytest.raises(ValueError, match="views of views"):
        restore(once, View(flip_x=True), 64, 64)
    outlines = Detections([[8, 8, 4, 4, 0]], [0.5], [0], "scene", "mask", np.array([()], object))
    with pytest.raises(ValueError, match="polygons"):
        restore(outlines, View(), 64, 64)


def test_padding() -> None:
    image = np.arange(6, dtype=np.uint8).reshape(1, 2, 3)
    assert pad(image, (2, 3)) is image or np.shares_memory(pad(image, (2, 3)), image)
    assert pad(image, (3, 4)).tolist() == [[[0, 1, 2, 114], [3, 4, 5, 114], [114, 114, 114, 114]]]


def test_oracle_boxes_of_resized_pictures(oracle_dir: Path) -> None:
    """Candidates of pictures resized by unequal factors, taken back and through NMS, are the golden results."""
    num_images = 0
    for case in json.loads((oracle_dir / "post.json").read_text())["cases"]:
        threshold = case["test_cfg"]["nms"]["iou_threshold"]
        for image, golden in enumerate(case["results"] if case["rescale"] else []):
            meta = case["img_metas"][image]
            factors = tuple(meta["scale_factor"])
            if case["family"] == "rot" and factors[0] != factors[1]:
                continue  # the reference turns such boxes by swapped factors (boxes.rescale_boxes)
            found = restore(golden_candidates(case, image), View(*factors), *meta["ori_shape"])
            if case["family"] == "rot":
                kept = nms_rotated(found.boxes, found.scores, found.labels, iou_threshold=threshold)
            else:
                kept = nms_horizontal(boxes_to_hboxes(found.boxes), found.scores, found.labels, iou_threshold=threshold)
            found = found.select(kept[: case["test_cfg"]["max_per_img"]])
            check_golden(found.boxes, found.scores, found.labels, case, image)
            num_images += golden["num"] > 0
    assert num_images
